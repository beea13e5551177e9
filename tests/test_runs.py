"Run folders: checkpoints, whose folder it is, held-out scores."
import pytest, torch
from tiny_run import PROMPTS, TINY, bright, tiny_model
from vader_nb.core import VaderError, write_json
from vader_nb.rewards.base import reward_from
from vader_nb.training.run_folder import check_folder, checkpoints, fold_seed, random_state, read_checkpoint, set_random_state, write_checkpoint
from vader_nb.training.evaluate import FILTER, best_of, evaluate, fit_filter, photo_filter
from vader_nb.config import Config


def test_two_checkpoints_are_kept_in_order(tmp_path):
    for step in (9, 10, 100, 1000): write_checkpoint(tmp_path, dict(step=step))
    assert [read_checkpoint(p, ['step'])['step'] for p in checkpoints(tmp_path)] == [100, 1000]

@pytest.mark.parametrize('spoil', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'hello', lambda b: b[:100] + bytes(50) + b[150:]])
def test_a_damaged_checkpoint_is_told(tmp_path, spoil):
    write_checkpoint(tmp_path, dict(step=1, lora=torch.randn(1000)))
    path = checkpoints(tmp_path)[0]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(VaderError, match='damaged.*delete it') as e: read_checkpoint(path, ['step', 'lora'])
    assert '\n' not in str(e.value)

def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self): return open, (str(tmp_path/'evil'), 'w')
    write_checkpoint(tmp_path, dict(step=1, lora=Evil()))
    with pytest.raises(VaderError): read_checkpoint(checkpoints(tmp_path)[0], ['lora'])
    assert not (tmp_path/'evil').exists()

def test_random_states_come_back():
    import random, numpy
    draw = lambda: (torch.rand(()).item(), random.gauss(0, 1), numpy.random.rand())
    state = random_state(); first = draw(); set_random_state(state)
    assert draw() == first

def test_mixed_seeds_differ(): assert len({fold_seed(i, j) for i in range(30) for j in range(30)}) == 900

def test_whose_folder(tmp_path):
    settings = dict(experiment='a', lr=.1, train_steps=5)
    check_folder(tmp_path/'new', settings); check_folder(tmp_path, settings)
    write_json(tmp_path/'config.json', settings)
    check_folder(tmp_path, dict(settings, train_steps=9), resume=True)
    with pytest.raises(VaderError, match='--resume'): check_folder(tmp_path, settings)
    with pytest.raises(VaderError, match="its experiment is 'a', not 'b'"): check_folder(tmp_path, dict(settings, experiment='b'), resume=True)
    (tmp_path/'config.json').write_text('{"experiment"')
    with pytest.raises(VaderError): check_folder(tmp_path, settings, resume=True)
    (tmp_path/'config.json').rename(tmp_path/'thesis.tex')
    for resume in (False, True):
        with pytest.raises(VaderError, match='holds other files'): check_folder(tmp_path, settings, resume)
    with pytest.raises(VaderError, match='is a file'): check_folder(tmp_path/'thesis.tex', settings)

@pytest.mark.parametrize('left', ['.DS_Store', '.ipynb_checkpoints', 'Thumbs.db'])
def test_what_tools_leave_in_a_folder_is_nothing(tmp_path, left):
    (tmp_path/left).mkdir()
    check_folder(tmp_path, dict(experiment='a'))

def test_scores_are_means_over_prompts_and_judges_may_abstain():
    judge = lambda video, prompts: dict(fox=torch.tensor([1. if 'fox' in p else torch.nan for p in prompts]), hat=torch.full((len(prompts),), torch.nan))
    scores = evaluate(tiny_model(), bright(), PROMPTS, Config(**TINY), judge)
    assert set(scores) == {'bright', 'reward', 'fox'} and scores['fox'] == 1
    assert scores == evaluate(tiny_model(), bright(), PROMPTS, Config(**TINY), judge)

def test_a_score_that_is_not_finite_is_told():
    with pytest.raises(VaderError, match='bad is not finite'):
        evaluate(tiny_model(), reward_from(lambda v, p: v.mean((1, 2, 3, 4)) / 0, 'bad'), PROMPTS, Config(**TINY))

def test_a_filter_of_neutral_settings_changes_nothing():
    video = .1 + .8 * torch.rand(2, 3, 3, 16, 24)
    torch.testing.assert_close(photo_filter(video, {}), video)
    for name, (neutral, low, high) in FILTER.items():
        assert low <= neutral <= high
        for value in (low, high):
            changed = photo_filter(video, {name: value})
            assert changed.shape == video.shape and 0 <= changed.min() and changed.max() <= 1
            assert value == neutral or (changed - video).abs().mean() > .005, name
    with pytest.raises(VaderError, match='no setting sepia: use some of saturation'): photo_filter(video, dict(sepia=1.))

def test_the_best_filter_is_found():
    video = .4 + .2 * torch.rand(2, 1, 3, 16, 16)
    bright = lambda v: v.mean((1, 2, 3, 4))
    assert bright(photo_filter(video, fit_filter(bright, video, 5, 2))).mean() > .9
    same = lambda v: -(v - video).square().mean((1, 2, 3, 4))
    assert fit_filter(same, video, 5, 2) == {name: values[0] for name, values in FILTER.items()}, 'nothing is better than no filter'

def test_best_of_n_takes_the_best_clip_of_each_prompt():
    model, bright = tiny_model(), lambda v: v.mean((1, 2, 3, 4))
    one, four = [best_of(model, bright, PROMPTS, Config(**TINY), n) for n in (1, 4)]
    assert one.shape == four.shape and len(one) == len(PROMPTS)
    assert (bright(four) >= bright(one)).all() and (bright(four) > bright(one)).any()


def test_settings_of_an_older_run_are_read_under_todays_names(tmp_path):
    from vader_nb.config import read_config
    from vader_nb.core import read_json, write_json
    from vader_nb.records import recorded
    folder, = recorded('modelscope-action-small-0')
    old, c = read_json(folder/'config.json'), read_config(folder)
    assert 'train_steps' not in old and (c.train_steps, c.batch_size, c.max_grad_norm, c.mixed_precision) == (old['steps'], old['batch'], old['clip'], old['precision'])
    write_json(tmp_path/'config.json', dict(old, tricks='layers slices turns'))
    assert read_config(tmp_path).tricks == 'checkpointing vae_slicing model_offload'
    check_folder(tmp_path, dict(train_steps=99, batch_size=old['batch'], tricks='checkpointing vae_slicing model_offload'), resume=True)
    with pytest.raises(VaderError, match='batch_size'): check_folder(tmp_path, dict(batch_size=old['batch'] + 1), resume=True)
    write_json(tmp_path/'config.json', dict(steps=3))
    with pytest.raises(VaderError, match='not written by vader run'): read_config(tmp_path)
