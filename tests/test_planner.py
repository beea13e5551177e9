"The planner: the simulated step is the trainer's, the cheapest set that fits is found, and the command speaks plainly."

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from vader_nb import zoo
from vader_nb.cli import main
from vader_nb.core import VaderError, make_generator, read_json
from vader_nb.experiments.registry import EXPERIMENTS, Experiment, experiment_config, load
from vader_nb.memory import planner, simulate as fullsize
from vader_nb.memory.meter import Reading, OpCache, measure, networks
from vader_nb.memory.planner import (
    LARGER,
    SETS,
    arithmetic,
    cache_folder,
    cached,
    config_for,
    describe,
    own_size,
    panel,
    plan,
    sets_for,
    survey,
)
from vader_nb.memory.simulate import Trial, build, memory_limit, simulate, try_step
from vader_nb.rewards.base import reward_from
from vader_nb.training.vader import vader_step
from vader_nb.zoo import DUMMY, MODELS, REWARDS, load_model, load_reward

RECORDED = Path(__file__).parents[1] / 'vader_nb/recorded'
ALL = 'checkpointing vae_slicing batch_slicing model_offload activation_offload'


def load_contrast(scale='small', device=None, dtype=None, weights=True):
    return reward_from(lambda video, prompts: video.flatten(1).std(1), 'contrast')


def load_movement(scale='small', device=None, dtype=None, weights=True):
    return reward_from(lambda video, prompts: video.diff(dim=1).flatten(1).std(1), 'movement', 'clip')


@pytest.fixture(autouse=True)
def tables(monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, 'tiny', 'tiny_run:load_tiny')
    monkeypatch.setitem(REWARDS, 'contrast', 'test_planner:load_contrast')
    monkeypatch.setitem(REWARDS, 'movement', 'test_planner:load_movement')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))


# One line in each table is all that a new base or reward needs


def test_a_tiny_base_and_reward_are_seen_everywhere(monkeypatch, capsys):
    monkeypatch.setitem(
        EXPERIMENTS,
        'tiny-contrast',
        Experiment('nowhere', 'a tiny model', 'tiny', 'contrast', lambda scale: (['a panda'], ['a fox'])),
    )
    assert load_model('tiny').name and load_reward('contrast').name == 'contrast'
    model, reward = load(experiment_config('tiny-contrast'), 'cpu')
    assert type(model) is type(load_model('tiny')) and reward.name == 'contrast'
    assert main(['list']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'tiny-contrast' in lines
    assert any(line.startswith('base models:') and line.endswith(', tiny') for line in lines) and any(
        line.startswith('rewards:') and 'contrast' in line for line in lines
    )
    config = config_for('tiny', 'contrast')
    assert (config.frames, config.height, config.T, config.guidance, config.decoded_frames) == (8, 64, 4, 3.0, 1)
    assert config_for('tiny', 'contrast + 2*movement').decoded_frames == 8  # one of them wants the whole clip
    assert plan('tiny', 'contrast', config, 2).fits and sets_for('tiny') == SETS
    boxes = [row for row in panel().children[0].children]
    assert 'tiny' in boxes[0].options and 'contrast' in boxes[1].options


def test_the_planner_knows_every_experiment():
    for name, e in EXPERIMENTS.items():
        full = experiment_config(name, 'full')
        config = config_for(e.base, e.reward)
        same = ['height', 'width', 'T', 'guidance', 'sampler', 'eta', 'mixed_precision']
        if full.rounds == 1:  # several rounds have frames enough for any reward, one round may not
            same.append('frames')
        assert [getattr(full, k) for k in same] == [getattr(config, k) for k in same], name
        assert {tuple(s.split()) for s in sets_for(e.base)} >= {tuple(full.tricks.split())}, name


def test_one_table_each():
    "No module but the zoo lists all bases or rewards."
    for name in ('memory/simulate', 'memory/planner', 'memory/checkpointing', 'cli'):
        text = (Path(zoo.__file__).parent / f'{name}.py').read_text()
        assert 'vjepa' not in text or 'pickscore' not in text, name
        assert not ('videocrafter' in text and 'svd' in text and 'opensora' in text and 'modelscope' in text), name


# Without weights


@pytest.mark.parametrize('name', ['modelscope', 'videocrafter', 'opensora', 'svd', 'wan'])
def test_published_sizes(name):
    model = load_model(name, 'full', weights=False, dtype='fp16')
    count = {k: sum(p.numel() for p in m.parameters()) for k, m in networks(model).items()}
    assert (
        count['denoiser']
        == dict(modelscope=1411233860, videocrafter=1413284420, opensora=1207643972, svd=1524623082, wan=1418996800)[
            name
        ]
    )
    assert (
        count['vae']
        == dict(modelscope=83653863, videocrafter=83653863, opensora=83653863 + 309687144, svd=97742847, wan=126892531)[
            name
        ]
    )
    assert model.dtype == torch.float16 and {p.device.type for p in model.denoiser.parameters()} == {'meta'}
    f = model.full
    cond = model.encode([DUMMY], f['frames'], f['height'], f['width'])
    assert len(cond) == 1 and cond.embeds.is_meta


@pytest.mark.parametrize('name', [r for r in REWARDS if r not in ('contrast', 'movement')])
def test_every_reward_is_built_without_weights(name):
    reward = load_reward(name, 'full', weights=False)
    count = sum(p.numel() for p in reward.parameters())
    assert (
        count
        == dict(
            aesthetic=304894177,
            hps=986109441,
            hps21=986109441,
            pickscore=986109441,
            objects=127798368,
            action=86534800,
            vjepa=629853568,
            vjepa_long=629853568,
            keep=0,
            jpeg=0,
            depth=24785089,
        )[name]
    )
    assert {p.device.type for p in (*reward.parameters(), *reward.buffers())} <= {'meta'}
    video = torch.empty(1, max(2, reward.min_frames), 3, 320, 512, device='meta', requires_grad=True)
    score = reward(video, [DUMMY])
    score.sum().backward()
    assert score.shape == (1,) and score.dtype == torch.float32 and video.grad.shape == video.shape


def test_only_the_full_size_is_built_without_weights():
    with pytest.raises(VaderError, match="use scale='full'"):
        load_model('modelscope', weights=False)


def test_number_formats_are_those_of_a_loaded_network():
    wan = load_model('wan', 'full', weights=False)
    kept = {n for n, p in wan.denoiser.named_parameters() if p.dtype == torch.float32}
    assert (
        wan.dtype == torch.bfloat16
        and any('time_embedder' in n for n in kept)
        and not any('attn1.to_q' in n for n in kept)
    )
    assert {p.dtype for p in wan.vae.parameters()} == {torch.float32} and {
        p.dtype for p in wan.text_encoder.parameters()
    } == {torch.bfloat16}


# The simulation


@pytest.mark.parametrize('tricks', ['', 'checkpointing vae_slicing batch_slicing encoder_offload'])
def test_the_simulation_agrees_with_the_trainers_own_step(tricks):
    config = replace(config_for('tiny', 'contrast', K=2), rank=4, T=2)
    simulated = simulate('tiny', 'contrast', config, tricks)
    model, reward, optimizer = build('tiny', 'contrast', config, tricks, device='cpu')
    learn = [p for group in optimizer.param_groups for p in group['params']]

    def step():
        vader_step(model, reward, [DUMMY], config, make_generator(0))[0].backward()
        optimizer.step()

    real = measure(step, model, reward, optimizer)
    counters = 512 * len(learn)  # Adam counts its steps on the CPU, which only here is the device
    for part, extra in (('learning', counters), ('denoiser', 0), ('decoder', 0)):
        assert simulated.parts.get(part, 0) + extra == pytest.approx(real.parts.get(part, 0), rel=0.01, abs=2**12)
    if 'encoder_offload' in tricks:
        assert simulated.parts['weights'] < real.parts['weights']  # a CPU has no host to offload the text encoder to
    else:
        assert simulated.peak + counters == pytest.approx(real.peak, rel=0.01)


@pytest.mark.parametrize('reward', ['contrast', 'movement'])
def test_an_evaluation_decodes_every_frame(reward):
    config = replace(config_for('tiny', reward), rank=4, T=2)
    simulated = simulate('tiny', reward, config)
    model, scorer, optimizer = build('tiny', reward, config, device='cpu')
    real = measure(fullsize.evaluation(model, scorer, config), model, scorer, optimizer)
    counters = 512 * len(optimizer.param_groups[0]['params'])
    assert simulated.evaluation + counters == pytest.approx(real.peak, rel=0.01)
    decoded = []
    decode = model.decode
    model.decode = lambda z, frames=None: decoded.append(decode(z, frames)) or decoded[-1]
    fullsize.evaluation(model, scorer, config)()
    assert decoded[0].shape[1] == 8
    assert simulated.most == max(simulated.peak, simulated.evaluation)


def test_weights_are_counted_to_the_byte():
    model = load_model('tiny', 'full', 'cpu', weights=False)
    own = sum(
        -(-t.nbytes // 512) * 512 for net in networks(model).values() for t in (*net.parameters(), *net.buffers())
    )
    assert simulate('tiny', 'contrast', config_for('tiny', 'contrast')).parts['weights'] == own


# On a device


def test_a_step_is_tried_with_random_weights():
    "On a CPU the same function measures with the meter: what was predicted is what it takes."
    config = replace(config_for('tiny', 'contrast'), rank=4)
    trial = try_step('tiny', 'contrast', config, 'checkpointing', device='cpu')
    counters = 512 * len(build('tiny', 'contrast', config, device='cpu')[2].param_groups[0]['params'])
    assert trial.allocated == pytest.approx(
        simulate('tiny', 'contrast', config, 'checkpointing').peak + counters, rel=0.01
    )
    assert trial.seconds > 0 and trial.reserved is None


def fake_gpu(monkeypatch, gb=80):
    limits = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(total_memory=gb * 2**30))
    monkeypatch.setattr(torch.cuda, 'set_per_process_memory_fraction', lambda share, device: limits.append(share))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'a card')
    return limits


def test_the_budget_is_a_hard_limit(monkeypatch):
    limits = fake_gpu(monkeypatch)
    with memory_limit('cuda', 16):
        assert limits == [0.2]
    assert limits == [0.2, 1.0]
    with pytest.raises(VaderError, match='the step needs more than 120 GB: use more tricks') as e:
        with memory_limit('cuda', 120):
            raise torch.OutOfMemoryError('CUDA out of memory.\nTried')
    assert limits == [0.2, 1.0, 1.0, 1.0] and '\n' not in str(e.value)
    with memory_limit('cpu', 16), memory_limit('cuda'):
        assert len(limits) == 4


def test_measure_without_a_gpu_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert main(['memory', '--base', 'tiny', '--reward', 'contrast', '--measure']) == 2
    out, err = capsys.readouterr()
    assert not out and err == 'vader: --measure runs the step on a GPU, and this machine has none\n'


def test_measure_with_one(capsys, monkeypatch):
    fake_gpu(monkeypatch)
    asked = []

    def tried(*args):
        asked.append(args)
        return Trial(9.5, 6 * 2**30, 7 * 2**30)

    monkeypatch.setattr(fullsize, 'try_step', tried)
    monkeypatch.setattr(
        planner, 'cached', lambda *args, **how: Reading(2**20, {}, dict(denoiser=1.0), dict(denoiser=1.0))
    )
    assert main(['memory', '--base', 'tiny', '--reward', 'contrast', '--measure', '--budget', '2']) == 0
    out = capsys.readouterr().out
    assert (
        'measured on a card, torch' in out
        and 'a limit of 2 GB' in out
        and 'allocated 6.00 GB, reserved 7.00 GB, 9.5 s for a step with 4 sampling steps' in out
    )
    assert asked == [('tiny', 'contrast', config_for('tiny', 'contrast'), '', 1, 2.0)]


@pytest.mark.parametrize('name', ['gpu.json', 'gpu-16.json'])
def test_the_recorded_measurements_name_their_source(name):
    record = read_json(RECORDED / 'memory-measured' / name)
    assert 'H100' in record['card'] and record['torch'] and record['source']
    for row in record['rows']:
        assert abs(row['allocated'] / row['predicted'] - 1) < 0.03 and row['reserved'] >= row['allocated']


# The plan


def fake(monkeypatch, peaks):
    "Readings with these peaks in GB for the sets of tricks, and a list of what was asked for."
    asked = []

    def cached(base, reward, config, tricks, rounds, tick):
        asked.append(tricks)
        return Reading(
            int(peaks[SETS.index(tricks)] * 2**30), dict(weights=2**30), dict(denoiser=3e12), dict(denoiser=1e12), 0
        )

    monkeypatch.setattr(planner, 'cached', cached)
    return asked


@pytest.mark.parametrize('budget, best', [(100, 0), (40, 1), (26, 2), (16, 4), (9, 5), (7, 6), (3, 6)])
def test_the_cheapest_that_fits(monkeypatch, budget, best):
    peaks = [60, 30, 20, 18, 10, 6, 4]
    asked = fake(monkeypatch, peaks)
    p = plan('modelscope', 'hps', config_for('modelscope', 'hps'), budget)
    assert (
        p.tricks == SETS[best] and p.needs == 1.15 * peaks[best] + 1.5 and p.fits == (budget != 3) and len(asked) <= 4
    )
    text = describe('modelscope', 'hps', config_for('modelscope', 'hps'), p)
    assert ('does not fit' in text) == (budget == 3) and f'in {budget} GB' in text


def test_a_question_is_simulated_once(monkeypatch):
    calls, c = [], config_for('tiny', 'contrast')
    monkeypatch.setattr(
        planner,
        'simulate',
        lambda *a, **k: calls.append(a) or Reading(5, dict(weights=5), dict(denoiser=1.0), dict(denoiser=1.0), 0),
    )
    assert cached('tiny', 'contrast', c) == cached('tiny', 'contrast', c) and len(calls) == 1
    (
        cached('tiny', 'contrast', c, 'checkpointing'),
        cached('tiny', 'contrast', replace(c, K=2)),
        cached('tiny', 'contrast', c, rounds=3),
    )
    assert len(calls) == 4


@pytest.mark.parametrize('damage', ['', '{"peak": 1', 'null', '{"speed": 3}'])
def test_a_damaged_answer_is_simulated_again(monkeypatch, damage):
    calls, c = [], config_for('tiny', 'contrast')
    monkeypatch.setattr(
        planner,
        'simulate',
        lambda *a, **k: calls.append(a) or Reading(5, dict(weights=5), dict(denoiser=1.0), dict(denoiser=1.0), 0),
    )
    first = cached('tiny', 'contrast', c)
    for file in cache_folder().glob('*.json'):
        file.write_text(damage)
    assert cached('tiny', 'contrast', c) == first and len(calls) == 2
    assert cached('tiny', 'contrast', c) == first and len(calls) == 2


def test_a_decoder_of_neighbours_is_not_sliced():
    assert all('vae_slicing' not in s for name in ('svd', 'wan') for s in sets_for(name)) and any(
        'vae_slicing' in s for s in sets_for('modelscope')
    )


def test_arithmetic_of_a_real_step():
    config = config_for('modelscope', 'hps')
    assert arithmetic(Reading(0, {}, dict(denoiser=7.0, reward=1.0), dict(denoiser=2.0), 0), config) == 8 + 23 * 2
    assert (
        arithmetic(Reading(0, {}, dict(denoiser=7.0, reward=1.0), dict(denoiser=2.0), 0), replace(config, K=5))
        == 8 + 20 * 2
    )
    assert (
        arithmetic(Reading(0, {}, dict(denoiser=21.0, reward=1.0), dict(denoiser=2.0), 0), config, rounds=3)
        == 22 + 3 * 23 * 2
    )


def test_an_evaluation_may_decide():
    small_step = Reading(2**30, {}, evaluation=8 * 2**30)
    assert planner.Plan('', small_step, 12).fits and not planner.Plan('', small_step, 10).fits


def test_progress_is_shown(monkeypatch):
    ticks = []

    class Bar:
        def __init__(self, **how):
            self.how = how
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *e):
            pass

        def update(self):
            ticks.append(1)

    bars = []
    monkeypatch.setattr('tqdm.auto.tqdm', Bar)
    plan('tiny', 'contrast', config_for('tiny', 'contrast'), 100, progress=True)
    assert (
        len(ticks) > 1000
        and bars[0].how['desc'] == 'simulating checkpointing encoder_offload'
        and bars[0].how['disable'] is None
    )


@pytest.mark.parametrize('home', ['', '/dev/null/nowhere'])
def test_a_cache_is_no_condition(monkeypatch, tmp_path, home):
    monkeypatch.setenv('XDG_CACHE_HOME', home)
    monkeypatch.setenv('HOME', str(tmp_path))
    config = config_for('tiny', 'contrast')
    assert cached('tiny', 'contrast', config) == cached('tiny', 'contrast', config)
    assert bool(list(cache_folder().glob('*.json')) if home == '' else []) == (home == '')


@pytest.mark.parametrize(
    'args, words',
    [
        (['--base', 'imagen'], 'unknown base'),
        (['--reward', 'fame'], 'unknown reward'),
        (['--size', 'large'], 'height x width'),
        (['--k', '0'], 'K is 0'),
        (['--budget', '-1'], 'budget is -1'),
        (['--base', 'tiny', '--reward', 'contrast', '--size', '60x60'], 'multiples of'),
        (['--frames', '-2'], 'frames is -2'),
        (['--frames', '0'], 'frames is 0'),
        (['--rounds', '0'], 'rounds is 0'),
        (['--rounds', '3'], 'cannot go on from a frame'),
    ],
)
def test_one_clear_line(capsys, args, words):
    assert main(['memory', *args]) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(planner, 'SETS', ['checkpointing'])
    assert (
        main(['memory', '--base', 'tiny', '--reward', 'contrast', '--budget', '2', '--frames', '4', '--size', '32x32'])
        == 0
    )
    out = capsys.readouterr().out
    assert 'tiny with contrast: 4 x 32 x 32, K = 1' in out and 'fits in 2 GB' in out and 'tricks: checkpointing' in out


@pytest.mark.parametrize('base', ['modelscope', 'videocrafter', 'opensora', 'svd', 'wan'])
def test_the_recorded_survey_is_of_this_code(base):
    "Exactly so with the versions that it was recorded with; others may make or spare a copy."
    rows = {tuple(question): row for question, row in read_json(RECORDED / 'memory-ladder/ladder.json')['frugal']}
    ((question, now),) = survey(SETS[6], ['aesthetic'], [own_size(base)])
    assert now.peak == pytest.approx(rows[question]['peak'], rel=0.02)
    assert now.evaluation == pytest.approx(rows[question]['evaluation'], rel=0.02)


def test_the_survey_holds_every_reward_of_the_experiments():
    rows = read_json(RECORDED / 'memory-ladder/ladder.json')
    recorded = {(question[0], question[5]) for question, _ in rows['frugal']}
    alike = {e.reward.replace('hps21', 'hps') if e.reward == 'hps21' else e.reward for e in EXPERIMENTS.values()}
    assert recorded >= {(base, reward) for base in MODELS if base != 'tiny' for reward in alike}
    assert {tuple(question[:5]) for question, _ in rows['larger']} == set(LARGER)


def test_a_changed_adapter_is_another_question(monkeypatch, tmp_path):
    config = config_for('tiny', 'contrast')
    for code in 'aab':
        monkeypatch.setattr(planner, 'fingerprint', lambda: code)
        cached('tiny', 'contrast', config)
    assert len(list((tmp_path / 'vader_nb').rglob('*.json'))) == 2


def test_remembered_shapes_change_no_figure(monkeypatch):
    config = replace(config_for('tiny', 'contrast', K=2), rank=4)
    before = simulate('tiny', 'contrast', config, 'checkpointing batch_slicing activation_offload')
    monkeypatch.setattr(OpCache, '__call__', lambda self, func, args, kw: func(*args, **kw))
    assert simulate('tiny', 'contrast', config, 'checkpointing batch_slicing activation_offload') == before


def test_what_is_remembered_is_new_and_of_meta():
    ops_seen, ops = OpCache(), torch.ops.aten
    x = torch.empty(4, 6, device='meta').t()

    def same(op, *args):
        first, again = [ops_seen(op, args, {}) for _ in range(2)]
        assert (first.shape, first.stride(), first.dtype) == (again.shape, again.stride(), again.dtype)
        return first.untyped_storage()._cdata, again.untyped_storage()._cdata, x.untyped_storage()._cdata

    assert len(set(same(ops.add.Tensor, x, 1))) == 3 and len(ops_seen.known) == 1
    for op, *args in ((ops.t.default, x), (ops._unsafe_view.default, x, [6, 4]), (ops.mul_.Tensor, x, 2)):
        assert len(set(same(op, *args))) == 1
    assert len(ops_seen.known) == 1
    assert (
        ops_seen(ops.add.Tensor, (torch.ones(2), torch.ones(2)), {}).tolist() == [2, 2] and len(ops_seen.known) == 1
    )  # numbers are computed
    assert (
        ops_seen(ops.mul.Tensor, (x, 2), {}).dtype == torch.float32
        and ops_seen(ops.mul.Tensor, (torch.empty(3, dtype=torch.int64, device='meta'), 2.0), {}).dtype == torch.float32
    )
    for _ in range(2):
        assert ops_seen(ops._assert_tensor_metadata.default, (x,), {}) is None
    a, b = ops_seen(ops.split.Tensor, (x, 3), {}), ops_seen(ops.cat.default, ([x, x], 1), {})
    assert len(a) == 2 and b.shape == ops_seen(ops.cat.default, ([x, x], 1), {}).shape == (6, 8)


def test_the_limit_names_the_card_by_a_number(monkeypatch):
    "Torch 2.11 refuses 'cuda' without an index there; on a machine without a card its calls are written down."
    from types import SimpleNamespace

    from vader_nb.memory.simulate import memory_limit

    named = []
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(total_memory=2**34))
    monkeypatch.setattr(torch.cuda, 'set_per_process_memory_fraction', lambda *args: named.append(args))
    with memory_limit('cuda', 4):
        assert named == [(0.25, torch.device('cuda', 1))]
    assert named[1:] == [(1.0, torch.device('cuda', 1))]
