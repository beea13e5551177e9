"The named experiments: settings that make sense at both scales, prompts that are kept apart."

import pytest
from vader_nb.core import VaderError
from vader_nb.experiments.prompts import (
    ACTIONS,
    COMMON_ANIMALS,
    TEST_ACTIVITIES,
    action_prompts,
    activity_prompts,
    hps_actions,
    spread,
)
from vader_nb.experiments.registry import EXPERIMENTS, experiment_config, find_experiment, run
from vader_nb.zoo import MODELS, REWARDS, load_reward, parse_reward

both = pytest.mark.parametrize('scale', ['small', 'full'])
each = pytest.mark.parametrize('name', EXPERIMENTS)


@both
@each
def test_settings_make_sense(name, scale):
    config = experiment_config(name, scale, seed=7)
    assert (config.experiment, config.scale, config.seed) == (name, scale, 7)


@both
@each
@pytest.mark.parametrize('method', ['ddpo', 'dpo'])
def test_other_methods_keep_the_experiment(name, scale, method):
    vader = experiment_config(name, scale)
    if vader.sampler == 'rflow' and method == 'ddpo':
        with pytest.raises(VaderError, match='ddpo needs a sampler that draws noise'):
            experiment_config(name, scale, method)
        return
    config = experiment_config(name, scale, method)
    kept = ('experiment', 'scale', 'guidance', 'frames', 'height', 'width', 'mixed_precision')
    assert config.method == method and all(getattr(config, k) == getattr(vader, k) for k in kept)


def test_an_unknown_method_is_named():
    with pytest.raises(VaderError, match="unknown method 'ppo': use vader, ddpo, dpo"):
        experiment_config('modelscope-aesthetic', method='ppo')


def test_the_published_numbers_of_the_other_methods():
    ddpo, dpo = [experiment_config('modelscope-aesthetic', 'full', method) for method in ('ddpo', 'dpo')]
    assert (ddpo.eta, ddpo.clip_range, ddpo.lr, dpo.beta, dpo.lr) == (1, 1e-4, 1e-4, 5000, 2e-4)


@both
@each
def test_training_and_test_prompts_are_kept_apart(name, scale):
    train, tests = find_experiment(name).prompts(scale)
    assert train and tests and not set(train) & set(tests) and len(set(train)) == len(train)


def test_the_published_numbers():
    c = experiment_config('modelscope-aesthetic', 'full')
    assert (c.lr, c.max_grad_norm, c.rank, c.alpha, c.K, c.decoded_frames) == (2e-4, 1, 16, 8, 1, 1)
    assert (c.T, c.guidance, c.frames, c.mixed_precision, c.batch_size * c.gradient_accumulation_steps) == (
        25,
        9,
        16,
        'fp16',
        16,
    )


def test_the_full_scale_prompts():
    assert (
        len(ACTIONS) == 50 and len(COMMON_ANIMALS) == len(set(COMMON_ANIMALS)) == 45 and len(activity_prompts()) == 45
    )
    assert not [p for p in ACTIONS for a in TEST_ACTIVITIES if a.split()[-1] in p.split()]
    assert all(p.startswith(('a ', 'an ')) for p in activity_prompts()) and any(
        p.startswith('an ant ') for p in activity_prompts()
    )


def test_hps_prompts_are_filtered(tmp_path, monkeypatch):
    asked, file = [], tmp_path / 'photo.json'
    file.write_text(
        '["A man riding a wave.", "A wedding ring on a table", '
        '"A very long sentence with many words about a dog that is running over a wide green field", '
        '"Two dogs playing chess"]'
    )
    monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda *a, **k: asked.append((a, k)) or str(file))
    assert hps_actions() == ['A man riding a wave.', 'Two dogs playing chess'] and hps_actions(1) == [
        'A man riding a wave.'
    ]
    assert asked[0] == (('zhwang/HPDv2', 'benchmark/photo.json'), dict(repo_type='dataset'))


def test_hps_prompts_without_a_network(monkeypatch):
    def fail(*a, **k):
        raise ConnectionError

    monkeypatch.setattr('huggingface_hub.hf_hub_download', fail)
    with pytest.raises(VaderError, match='ConnectionError.*ACTIONS'):
        hps_actions()


def test_spread_keeps_all():
    assert sorted(spread(list(range(21)))) == list(range(21)) and sorted(spread(list(range(15)))) == list(range(15))


def test_neighbours_differ():
    for prompts in action_prompts('small'):
        assert all(
            a.split()[1] != b.split()[1] and a.split()[2:] != b.split()[2:] for a, b in zip(prompts[:4], prompts[1:4])
        )


@pytest.mark.parametrize(
    'name, scale, words',
    [
        ('modelscope-beauty', 'small', 'unknown experiment.*modelscope-aesthetic'),
        ('modelscope-aesthetic', 'huge', 'unknown scale'),
    ],
)
def test_unknown_names(name, scale, words):
    with pytest.raises(VaderError, match=words):
        experiment_config(name, scale)


def test_a_wrong_folder_is_told_before_anything_is_loaded(tmp_path):
    (tmp_path / 'thesis.tex').write_text('')
    with pytest.raises(VaderError, match='holds other files'):
        next(run(experiment_config('modelscope-aesthetic'), tmp_path))


@each
def test_parts_are_in_the_zoo(name):
    e = find_experiment(name)
    assert e.base in MODELS and all(reward in REWARDS for _, reward in parse_reward(e.reward))


@pytest.mark.parametrize(
    'text, terms',
    [
        ('hps', [(1, 'hps')]),
        ('hps21 + 0.1*aesthetic', [(1, 'hps21'), (0.1, 'aesthetic')]),
        (' 2 * jpeg+1e-3*depth', [(2, 'jpeg'), (1e-3, 'depth')]),
    ],
)
def test_a_sum_of_rewards_is_read(text, terms):
    assert parse_reward(text) == terms


@pytest.mark.parametrize('text', ['', 'hps +', 'hps - aesthetic', '0.1 aesthetic', 'x*hps', 'hps * 2'])
def test_what_is_no_sum_of_rewards(text):
    with pytest.raises(VaderError, match='is no reward: write'):
        parse_reward(text)


def test_a_weighted_sum_scores_as_its_terms():
    import torch

    video = torch.rand(2, 3, 3, 64, 64)
    total, jpeg, beauty = [load_reward(text, device='cpu') for text in ('2*jpeg + 0.5*aesthetic', 'jpeg', 'aesthetic')]
    torch.testing.assert_close(total(video), 2 * jpeg(video) + 0.5 * beauty(video))
    with pytest.raises(VaderError, match='unknown reward'):
        load_reward('beauty')


def test_runs_lie_in_one_place_and_are_never_mixed(tmp_path, monkeypatch):
    from vader_nb.experiments.registry import default_folder, fresh_folder

    config = experiment_config('modelscope-aesthetic', seed=3)
    (tmp_path / 'nbs/8_results').mkdir(parents=True)
    monkeypatch.chdir(tmp_path / 'nbs/8_results')
    assert default_folder(config) == tmp_path / 'nbs/8_results/runs/modelscope-aesthetic-small-3'
    (tmp_path / 'settings.ini').write_text('')
    (tmp_path / 'vader_nb').mkdir()
    assert default_folder(config) == fresh_folder(config) == tmp_path / 'runs/modelscope-aesthetic-small-3'
    fresh_folder(config).mkdir(parents=True)
    fresh_folder(config).mkdir()
    assert fresh_folder(config).name == 'modelscope-aesthetic-small-3-3'
    ddpo = experiment_config('modelscope-aesthetic', method='ddpo', seed=3)
    assert default_folder(ddpo).name == 'modelscope-aesthetic-ddpo-small-3'


def test_what_macos_leaves_beside_an_image_is_none(tmp_path):
    from vader_nb.experiments.prompts import image_files

    for name in ['dog.JPG', '._dog.JPG', '.hidden.png', 'notes.txt']:
        (tmp_path / name).write_bytes(b'')
    assert image_files(tmp_path) == [str(tmp_path / 'dog.JPG')]
