"""Peak memory, its simulation, and tricks that may not change the gradient: alone and together with mixed precision,
LoRA, guidance and several processes.
"""

from itertools import combinations
from unittest.mock import patch

import pytest, torch
from torch.nn.parallel import DistributedDataParallel
from tiny_models import Tiny, cond
from vader_nb.memory import tricks
from vader_nb.core import VaderError, make_generator
from vader_nb.memory.lora import add_lora, lora_parameters
from vader_nb.memory.meter import Meter, allocator_peak, fused, measure, meta_autocast, to_meta, with_margin
from vader_nb.rewards.base import Reward, freeze
from vader_nb.config import TRICKS, check_tricks
from vader_nb.memory.tricks import Offload, adam, use_tricks


class Judge(Reward):
    "A small transformer that looks at frames."

    checkpoint_layers = ('CLIPEncoderLayer',)

    def __init__(self):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = freeze(
                CLIPVisionModel(
                    CLIPVisionConfig(
                        hidden_size=32,
                        intermediate_size=64,
                        num_hidden_layers=2,
                        num_attention_heads=2,
                        image_size=16,
                        patch_size=4,
                    )
                )
            )

    def score(self, video, prompts, generator):
        return self.net(video.flatten(0, 1)).pooler_output.tanh().mean(1).unflatten(0, video.shape[:2]).mean(1)


def model_and_judge(words='', dtype=None):
    "A tiny model with trained LoRA and a judge, under these tricks."
    model, judge = Tiny(), Judge()
    if dtype:
        model.denoiser.to(dtype)
    for i, p in enumerate(add_lora(model)):
        p.data.add_(0.1 * torch.randn(p.shape, generator=make_generator(i)))
    return use_tricks(model, judge, words), judge


def loss(model, judge, K=1, frames=None):
    x, c = torch.randn(2, 4, 3, 8, 8, generator=make_generator(0)).to(model.device), cond.to(model.device)
    for i in range(K):
        x = x - 0.1 * model.predict(x, 500 - i, c, 3.0)
    return -100 * judge(model.decode(x, frames)).mean()


def gradient(model, judge, **kw):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(model, judge, **kw), lora_parameters(model))])


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


EXACT = ['checkpointing', 'batch_slicing', 'vae_slicing', 'activation_offload', 'encoder_offload', 'model_offload']
companies = [
    ' '.join(w) for n in (1, 2, len(EXACT)) for w in combinations(EXACT, n)
]  # each alone, all pairs, all of them


@pytest.fixture(scope='module')
def true():
    return gradient(*model_and_judge(), K=2)


@pytest.fixture
def painted(monkeypatch):
    "What leaves the device is not a number any more, until it is back."
    pockets = {}

    def to_host(t):
        paint = torch.full_like(t, float('nan')) if t.is_floating_point() else torch.zeros_like(t)
        pockets[paint.data_ptr()] = t.clone(), paint  # kept alive, so that no address is used twice
        return paint

    monkeypatch.setattr(tricks, 'to_host', to_host)
    monkeypatch.setattr(tricks, 'from_host', lambda t, device: pockets[t.data_ptr()][0].clone())


@pytest.mark.parametrize(
    'words',
    [
        'model_offload',
        'checkpointing batch_slicing vae_slicing model_offload',
        'checkpointing activation_offload model_offload',
    ],
)
def test_nothing_that_is_away_is_read(words, true, painted):
    model, judge = model_and_judge(words)
    assert off(gradient(model, judge, K=2), true) < 1e-5
    with torch.no_grad():
        video = model.decode(torch.randn(2, 4, 3, 8, 8, generator=make_generator(1)))
        assert video.isfinite().all() and judge(video).isfinite().all()
    assert off(gradient(model, judge, K=2), true) < 1e-5


def test_turns_really_take_away(painted):
    model, judge = model_and_judge('model_offload')
    away = lambda net: all(p.isnan().all() for p in net.parameters() if not p.requires_grad)
    assert away(model.vae) and away(judge) and not away(model.denoiser)
    with torch.enable_grad():
        value = loss(model, judge)
    assert away(model.denoiser) and not away(model.vae)
    value.backward()
    assert away(model.vae) and not away(model.denoiser)
    assert all(p.grad.isfinite().all() for p in lora_parameters(model))


def test_mixed_precision_too():
    "Frozen weights in bfloat16, LoRA in float32, autocast: the same roundings again, or others of the same size."

    def run(words):
        model, judge = model_and_judge(words, torch.bfloat16)
        assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
        with torch.autocast('cpu', torch.bfloat16):
            return gradient(model, judge)

    plain, exact = run(''), gradient(*model_and_judge())
    assert (
        off(run('checkpointing'), plain)
        == off(run('checkpointing activation_offload model_offload'), plain)
        == 0
        < off(plain, exact)
        < 0.2
    )
    assert off(run('checkpointing batch_slicing vae_slicing'), exact) < 1.5 * off(plain, exact)


COMPANIES = [
    ('checkpointing batch_slicing', None),
    ('checkpointing batch_slicing vae_slicing activation_offload model_offload', None),
    ('checkpointing batch_slicing vae_slicing activation_offload model_offload', torch.bfloat16),
]


def one_process(rank, out):
    torch.distributed.init_process_group('gloo', init_method=f'file://{out}/meet', rank=rank, world_size=2)
    for n, (words, dtype) in enumerate(COMPANIES):
        model, judge = model_and_judge(words, dtype)
        weights, model.denoiser = lora_parameters(model), DistributedDataParallel(model.denoiser)
        x = torch.randn(2, 4, 3, 8, 8, generator=make_generator(0))[rank : rank + 1]
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype is not None):
            for i in range(2):
                x = x - 0.1 * model.predict(x, 500 - i, cond[rank], 3.0)
            score = judge(model.decode(x)).mean()
        (-100 * score).backward()
        if rank == 0:
            torch.save(torch.cat([p.grad.flatten() for p in weights]), f'{out}/gradient{n}')
    torch.distributed.destroy_process_group()


def test_two_processes_average_to_the_whole_batch(true, tmp_path):
    """Recomputed passes, offloading and moving weights under DistributedDataParallel, with LoRA, guidance and two
    steps, in float32 and in mixed precision.
    """
    torch.multiprocessing.spawn(one_process, (str(tmp_path),), nprocs=2)
    with torch.autocast('cpu', torch.bfloat16):
        half = off(gradient(*model_and_judge(dtype=torch.bfloat16), K=2), true)
    for n, (_, dtype) in enumerate(COMPANIES):
        assert off(torch.load(tmp_path / f'gradient{n}'), true) < (1.5 * half if dtype else 1e-5)
    assert 0 < half < 0.2


def simulated(words, **kw):
    ghost, judge = to_meta(model_and_judge()[0]), Judge().to('meta')
    use_tricks(ghost, judge, words)
    return measure(lambda: loss(ghost, judge, **kw).backward(), ghost, judge, watch=tricks.transfers)


@pytest.mark.parametrize('words', ['', 'checkpointing', 'checkpointing batch_slicing vae_slicing'])
def test_the_simulator_agrees_with_the_meter(words):
    model, judge = model_and_judge(words)
    real = measure(lambda: loss(model, judge, K=2).backward(), model, judge)
    assert abs(simulated(words, K=2).peak / real.peak - 1) < 0.01 and sum(real.parts.values()) == real.peak


@pytest.mark.parametrize('words', ['', 'checkpointing'])
def test_the_meter_agrees_with_the_allocator(words):
    model, judge = model_and_judge(words)
    real = measure(lambda: loss(model, judge).backward(), model, judge)
    model.denoiser.zero_grad()
    weights = sum(
        -(-t.untyped_storage().nbytes() // 512) * 512
        for net in (model.denoiser, model.vae, judge)
        for t in (*net.parameters(), *net.buffers())
    )
    assert abs((real.peak - weights) / allocator_peak(lambda: loss(model, judge).backward()) - 1) < 0.05


def test_what_the_tricks_save():
    "Each helps where it should, and one pass at a time makes the peak independent of K."
    above = lambda words, **kw: (r := simulated(words, **kw)).peak - r.parts['weights']
    plain, layers, passes = map(above, ('', 'checkpointing', 'checkpointing batch_slicing vae_slicing'))
    assert layers < 0.6 * plain and passes < 0.6 * layers
    assert (
        above('checkpointing', K=3) > 1.2 * layers
        and above('checkpointing batch_slicing vae_slicing', K=3) < 1.1 * passes
    )


def test_the_tricks_know_no_meter():
    "What is moved is counted from outside, and only there."
    seen = simulated('checkpointing model_offload activation_offload')
    ghost, judge = to_meta(model_and_judge()[0]), Judge().to('meta')
    use_tricks(ghost, judge, 'checkpointing model_offload activation_offload')
    blind = measure(lambda: loss(ghost, judge).backward(), ghost, judge)
    assert seen.moved > 0 == blind.moved and seen.peak == blind.peak and seen.parts['weights'] > blind.parts['weights']
    assert 'Meter' not in vars(tricks)


def test_meter_counts_each_storage_once_and_forgets_the_dead():
    meter = Meter()
    with meter:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        c = b[3].detach()
        assert meter.total == 4096
        del a, b
        assert meter.total == 4096
        del c
        with meter.label('mine'):
            _d = torch.zeros(100)
    assert meter.total == 512 == meter.now['mine'] and meter.peak == 4096 and meter.worst['other'] == 4096


def test_meter_counts_arithmetic():
    meter, a, b = Meter(), torch.randn(3, 5), torch.randn(5, 7)
    with meter:
        a @ b
    assert sum(meter.flops.values()) == 2 * 3 * 5 * 7


def test_the_stub_has_the_kernels_layout():
    q = torch.randn(2, 16, 3, 8, requires_grad=True).transpose(1, 2)  # as all our networks make it
    real = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    with fused():
        fake = torch.nn.functional.scaled_dot_product_attention(*3 * [q.to('meta')])
    assert fake.shape == real.shape and fake.stride() == real.stride()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_meta_autocast_follows_torchs(dtype):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.Flatten(), torch.nn.Linear(32, 3)
    )
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype != torch.float32):
        want = net(torch.randn(1, 4, 4, 4)).dtype
    with meta_autocast(dtype):
        assert net.to('meta')(torch.randn(1, 4, 4, 4, device='meta')).dtype == want == dtype


def test_offload_carries_each_storage_once_and_no_weights():
    layer, v, moved = torch.nn.Linear(300, 300), torch.randn(100, 300, requires_grad=True), []
    with patch.object(tricks, 'to_host', lambda t: moved.append(t.nbytes) or t.clone()):
        y = Offload(layer)(lambda: layer(v).exp() * v.view(100, 300) + v[:50].repeat(2, 1) ** 2)
    assert (
        sorted(moved) == 2 * [120_000] + [120_000] and layer.weight.nbytes == 360_000
    )  # v, exp, and the repeated half
    y.sum().backward()


def test_offload_is_not_fooled_by_an_address_used_again():
    hooks = Offload()
    hooks.weights = set()
    a = torch.full((200, 200), 1.0)
    first = hooks.pack(a)
    del a
    b = torch.full((200, 200), 2.0)
    hooks.known[b.untyped_storage()._cdata] = first[0]  # as if b lay where a was
    assert hooks.unpack(hooks.pack(b)).eq(2).all() and hooks.unpack(first).eq(1).all()


def test_bad_tricks():
    with pytest.raises(VaderError, match='unknown trick'):
        check_tricks('layers magic')
    assert set(check_tricks(' '.join(TRICKS))) == set(TRICKS)


def test_eight_bits_need_bitsandbytes(monkeypatch):
    w = [torch.nn.Parameter(torch.zeros(3))]
    assert isinstance(adam(w, 0.1), torch.optim.AdamW)
    monkeypatch.setattr(tricks.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(VaderError, match='pip install bitsandbytes') as e:
        adam(w, 0.1, bits8=True)
    assert '\n' not in str(e.value)


def test_eight_bits_go_nearly_the_same_way():
    pytest.importorskip('bitsandbytes', exc_type=ImportError)
    a, b = [torch.nn.Parameter(torch.zeros(64, 128)) for _ in range(2)]
    few, many = adam([a], 0.01, bits8=True), adam([b], 0.01)
    for i in range(10):
        for w, optimizer in ((a, few), (b, many)):
            w.grad = torch.randn(w.shape, generator=make_generator(i)) + 0.5
            optimizer.step()
    assert {s.dtype for s in few.state[a].values() if torch.is_tensor(s) and s.shape == a.shape} == {torch.uint8}
    assert 0 < off(a.detach(), b.detach()) < 0.05


def test_margin():
    assert with_margin(10 * 2**30) == 13 * 2**30
