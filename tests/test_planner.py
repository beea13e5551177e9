"The planner: the simulated step is the trainer's, the cheapest set that fits is found, and the command speaks plainly."
from dataclasses import replace
from pathlib import Path

import pytest, torch
from tiny_models import tiny_pipeline
from vader_nb.memory import planner, simulate as fullsize
from vader_nb.cli import main
from vader_nb.core import make_generator, read_json
from vader_nb.memory.simulate import BASES, REWARDS, Base, remembering, simulate, weightless
from vader_nb.memory.lora import add_lora
from vader_nb.memory.meter import Reading, Recall, measure, networks
from vader_nb.models.modelscope import ModelScope
from vader_nb.memory.planner import SETS, SIZES, arithmetic, cached, config_for, describe, plan, sets_for, survey
from vader_nb.rewards.base import reward_from
from vader_nb.training.vader import vader_step
from vader_nb.memory.tricks import use_tricks

SIZE = (8, 64, 64)
RECORDED = Path(__file__).parents[1]/'vader_nb/recorded/memory-ladder'

def contrast(): return reward_from(lambda video, prompts: video.flatten(1).std(1), 'contrast')

def tiny():
    pipe = tiny_pipeline()
    return ModelScope(pipe.unet, pipe.vae, pipe.text_encoder, None, pipe.scheduler, SIZE)

@pytest.fixture(autouse=True)
def tables(monkeypatch, tmp_path):
    monkeypatch.setitem(BASES, 'tiny', Base(lambda: remembering(tiny(), 12, 32), SIZE, 'fp32', 3.))
    monkeypatch.setitem(REWARDS, 'contrast', contrast)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))


@pytest.mark.parametrize('words', ['', 'checkpointing vae_slicing batch_slicing encoder_offload'])
def test_the_simulation_agrees_with_the_trainers_own_step(words):
    config = replace(config_for('tiny', 'contrast', K=2), rank=4)
    told = simulate('tiny', 'contrast', config, words)
    model, judge = tiny(), contrast()
    model.cache = {p: torch.randn(12, 32, generator=make_generator(0)) for p in (fullsize.PROMPT, '')}
    learn = add_lora(model, 4, config.alpha)
    use_tricks(model, judge, words)
    optimizer = fullsize.ready(torch.optim.AdamW(learn, config.lr, foreach=True))
    def step():
        vader_step(model, judge, [fullsize.PROMPT], config, make_generator(0))[0].backward()
        optimizer.step()
    real = measure(step, model, judge, optimizer)
    counters = 512 * len(learn)  # Adam counts its steps on the CPU, which only here is the device
    for part, extra in (('learning', counters), ('denoiser', 0), ('decoder', 0)):
        assert told.parts.get(part, 0) + extra == pytest.approx(real.parts.get(part, 0), rel=.01, abs=2**12)
    if 'encoder_offload' in words: assert told.parts['weights'] < real.parts['weights']  # a CPU has nowhere to park the text encoder
    else: assert told.peak + counters == pytest.approx(real.peak, rel=.01)

def test_weights_are_counted_to_the_byte():
    model = tiny()
    own = sum(-(-t.nbytes // 512) * 512 for net in networks(model).values() for t in (*net.parameters(), *net.buffers()))
    assert simulate('tiny', 'contrast', config_for('tiny', 'contrast')).parts['weights'] == own

@pytest.mark.parametrize('name', ['modelscope', 'videocrafter', 'opensora', 'svd', 'wan'])
def test_published_sizes(name):
    with weightless(torch.float16): model = BASES[name].build()
    count = {k: sum(p.numel() for p in m.parameters()) for k, m in networks(model).items()}
    assert count['denoiser'] == dict(modelscope=1411233860, videocrafter=1413284420, opensora=1207643972, svd=1524623082, wan=1418996800)[name]
    assert count['vae'] == dict(modelscope=83653863, videocrafter=83653863, opensora=83653863 + 309687144, svd=97742847, wan=126892531)[name]
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.float16} and {p.device.type for p in model.denoiser.parameters()} == {'meta'}


def fake(monkeypatch, peaks):
    "Readings with these peaks in GB for the sets of tricks, and a list of what was asked for."
    asked = []
    def cached(base, reward, config, words, rounds):
        asked.append(words)
        return Reading(int(peaks[SETS.index(words)] * 2**30), dict(weights=2**30), dict(denoiser=3e12), dict(denoiser=1e12), 0)
    monkeypatch.setattr(planner, 'cached', cached)
    return asked

@pytest.mark.parametrize('budget, best', [(100, 0), (40, 1), (16, 3), (9, 4), (7, 5), (3, 5)])
def test_the_cheapest_that_fits(monkeypatch, budget, best):
    peaks = [60, 30, 20, 10, 6, 4]
    asked = fake(monkeypatch, peaks)
    p = plan('modelscope', 'hps', config_for('modelscope', 'hps'), budget)
    assert p.words == SETS[best] and p.needs == 1.15 * peaks[best] + 1.5 and p.fits == (budget != 3) and len(asked) <= 4
    text = describe('modelscope', 'hps', config_for('modelscope', 'hps'), p)
    assert ('does not fit' in text) == (budget == 3) and f'in {budget} GB' in text

def test_a_question_is_simulated_once(monkeypatch):
    calls, c = [], config_for('tiny', 'contrast')
    monkeypatch.setattr(planner, 'simulate', lambda *a: calls.append(a) or Reading(5, dict(weights=5), dict(denoiser=1.), dict(denoiser=1.), 0))
    assert cached('tiny', 'contrast', c) == cached('tiny', 'contrast', c) and len(calls) == 1
    cached('tiny', 'contrast', c, 'checkpointing'), cached('tiny', 'contrast', replace(c, K=2)), cached('tiny', 'contrast', c, rounds=3)
    assert len(calls) == 4

def test_a_decoder_of_neighbours_is_not_sliced():
    assert all('vae_slicing' not in s for name in ('svd', 'wan') for s in sets_for(name)) and any('vae_slicing' in s for s in sets_for('modelscope'))

def test_arithmetic_of_a_real_step():
    assert arithmetic(Reading(0, {}, dict(denoiser=7., reward=1.), dict(denoiser=2.), 0), 2, 25) == 8 + 23 * 2
    assert arithmetic(Reading(0, {}, dict(denoiser=21., reward=1.), dict(denoiser=2.), 0), 2, 25, rounds=3) == 22 + 3 * 23 * 2

@pytest.mark.parametrize('args, words', [(['--base', 'imagen'], 'unknown base'), (['--reward', 'fame'], 'unknown reward'), (['--size', 'large'], 'height x width'), (['--k', '0'], 'K is 0'),
                                         (['--budget', '-1'], 'budget is -1'), (['--base', 'tiny', '--reward', 'contrast', '--size', '60x60'], 'multiples of'), (['--frames', '-2'], 'frames is -2'), (['--frames', '0'], 'frames is 0'), (['--rounds', '0'], 'rounds is 0')])
def test_one_clear_line(capsys, args, words):
    assert main(['memory', *args]) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1

def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(planner, 'SETS', ['checkpointing'])
    assert main(['memory', '--base', 'tiny', '--reward', 'contrast', '--budget', '2', '--frames', '4', '--size', '32x32']) == 0
    out = capsys.readouterr().out
    assert 'tiny with contrast: 4 x 32 x 32, K = 1' in out and 'fits in 2 GB' in out and 'tricks: checkpointing' in out

@pytest.mark.parametrize('base', ['modelscope', 'videocrafter', 'opensora', 'svd', 'wan'])
def test_the_recorded_survey_is_of_this_code(base):
    "Exactly so with the versions that it was recorded with; others may make or spare a copy."
    rows = {tuple(asked): row for asked, row in read_json(RECORDED/'ladder.json')['frugal']}
    size = next(s for s in SIZES if s[0] == base)
    (asked, now), = survey(SETS[5], ['aesthetic'], [size])
    assert now.peak == pytest.approx(rows[asked]['peak'], rel=.02)

def test_a_changed_adapter_is_another_question(monkeypatch, tmp_path):
    config = config_for('tiny', 'contrast')
    for code in 'aab':
        monkeypatch.setattr(planner, 'fingerprint', lambda: code)
        cached('tiny', 'contrast', config)
    assert len(list((tmp_path/'vader_nb').rglob('*.json'))) == 2

def test_remembered_shapes_change_no_figure(monkeypatch):
    config = replace(config_for('tiny', 'contrast', K=2), rank=4)
    told = simulate('tiny', 'contrast', config, 'checkpointing batch_slicing activation_offload')
    monkeypatch.setattr(Recall, '__call__', lambda self, func, args, kw: func(*args, **kw))
    assert simulate('tiny', 'contrast', config, 'checkpointing batch_slicing activation_offload') == told

def test_what_is_remembered_is_new_and_of_meta():
    recall, ops = Recall(), torch.ops.aten
    x = torch.empty(4, 6, device='meta').t()
    def same(op, *args):
        first, again = [recall(op, args, {}) for _ in range(2)]
        assert (first.shape, first.stride(), first.dtype) == (again.shape, again.stride(), again.dtype)
        return first.untyped_storage()._cdata, again.untyped_storage()._cdata, x.untyped_storage()._cdata
    assert len(set(same(ops.add.Tensor, x, 1))) == 3 and len(recall.known) == 1
    for op, *args in ((ops.t.default, x), (ops._unsafe_view.default, x, [6, 4]), (ops.mul_.Tensor, x, 2)): assert len(set(same(op, *args))) == 1
    assert len(recall.known) == 1
    assert recall(ops.add.Tensor, (torch.ones(2), torch.ones(2)), {}).tolist() == [2, 2] and len(recall.known) == 1  # numbers are computed
    assert recall(ops.mul.Tensor, (x, 2), {}).dtype == torch.float32 and recall(ops.mul.Tensor, (torch.empty(3, dtype=torch.int64, device='meta'), 2.), {}).dtype == torch.float32
    for _ in range(2): assert recall(ops._assert_tensor_metadata.default, (x,), {}) is None
    a, b = recall(ops.split.Tensor, (x, 3), {}), recall(ops.cat.default, ([x, x], 1), {})
    assert len(a) == 2 and b.shape == recall(ops.cat.default, ([x, x], 1), {}).shape == (6, 8)
