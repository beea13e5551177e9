"12_rollout: the gradient of steps t > K is cut, exactly and only there."

import gc
import warnings
import weakref
import pytest
import torch
from torch import nn
from vader_nb.core import VaderError, make_generator
from tiny_models import Tiny, cond as tiny_cond, pretend_training
from vader_nb.memory.lora import MergedLora, add_lora, lora_parameters, saved_bytes
from vader_nb.diffusion.rollout import differentiable_latents, eval_mode, last, rollout, sample
from vader_nb.diffusion.samplers import sampler_from_config
from vader_nb.models.base import VideoModel

BASE = dict(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000, steps_offset=1)
KINDS = [('ddim', 0.0), ('ddim', 1.0), ('ddpm', 0.0), ('dpm++', 0.0), ('euler', 0.0)]
T, GUIDANCE = 5, 2.5


class Net(nn.Module):
    "Four weights, a nonlinearity, dropout."

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, -0.4, 0.3, 0.2]))
        self.dropout, self.passes = nn.Dropout(0.5), 0

    def forward(self, x, t, embeds):
        self.passes += 1
        w = self.w + embeds.mean((1, 2)).view(-1, 1) * self.w.flip(0)
        a, b, c, d = w.view(-1, 4, 1, 1, 1, 1).unbind(1)
        return self.dropout(torch.tanh(a * x + b * x.roll(1, 2) + c * t.view(-1, 1, 1, 1, 1) / 1000) + d * x)


class Toy(VideoModel):
    name, native_size = 'toy', (2, 16, 16)

    def __init__(self):
        super().__init__(Net().double().eval(), None)

    def embed(self, prompts):
        return torch.stack([torch.full((2, 3), 0.1 * len(p), dtype=torch.float64) for p in prompts])

    def denoise(self, x, t, embeds):
        return self.denoiser(x, t, embeds)

    def to_pixels(self, z):
        return z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3) / 2 + 0.5

    def sampler(self, steps, kind='ddim', eta=0.0, size=()):
        return sampler_from_config(BASE, kind, steps, eta)


@pytest.fixture
def model():
    return Toy()


def start(model, n=2):
    return model.encode(['fox', 'panda'][:n]), model.noise(n, generator=make_generator(0)).double()


def reward(x):
    return (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() + x.square().mean()


def grad(model, x):
    return torch.autograd.grad(reward(x), model.denoiser.w)[0]


def algorithm_1(model, cond, x, sampler, K, g):
    "As the paper prints it: the whole graph, then stop_grad on every prediction with t > K."
    prev, x = None, x * sampler.init_sigma
    for t in range(len(sampler), 0, -1):
        i = len(sampler) - t
        noise = torch.randn(x.shape, generator=g).to(x) if sampler.stochastic else None
        pred = model.predict(sampler.scale_input(x, i), sampler.timesteps[i], cond, GUIDANCE)
        if t > K:
            pred = pred.detach()
        prev = sampler.step(i, x, pred, noise, prev)
        x = prev.x
    return x


@pytest.mark.parametrize('kind, eta', KINDS)
def test_truncation_is_the_papers_stop_grad(model, kind, eta):
    (cond, x), sampler, grads = start(model), model.sampler(T, kind, eta), []
    for K in range(1, T + 1):
        theirs = algorithm_1(model, cond, x, sampler, K, make_generator(1))
        ours = last(rollout(model, cond, x, sampler, GUIDANCE, K, make_generator(1))).step.x
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(
            grad(model, ours), grads.append(grad(model, theirs)) or grads[-1], rtol=1e-12, atol=1e-14
        )
    assert all((a - b).norm() > 1e-3 * b.norm() for a, b in zip(grads, grads[1:]))  # every K is another gradient


@pytest.mark.parametrize('kind, eta', KINDS)
def test_all_steps_are_full_backpropagation(model, kind, eta):
    (cond, x), sampler = start(model), model.sampler(T, kind, eta)
    whole = algorithm_1(model, cond, x, sampler, T + 1, make_generator(1))  # nothing is stopped
    ours = differentiable_latents(model, cond, x, sampler, GUIDANCE, T, generator=make_generator(1))
    torch.testing.assert_close(grad(model, ours), grad(model, whole), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('K', [1, 3, T])
@pytest.mark.parametrize('kind, eta', KINDS)
def test_agrees_with_finite_differences(model, kind, eta, K):
    """With the weights of the first T-K steps held still, the reward's slope in those of the last K is the truncated
    gradient.
    """
    (cond, x), sampler, w = start(model), model.sampler(T, kind, eta), model.denoiser.w
    ours = grad(model, differentiable_latents(model, cond, x, sampler, GUIDANCE, K, generator=make_generator(1)))

    def R(moved):
        still, states = w.detach().clone(), rollout(model, cond, x, sampler, GUIDANCE, 0, make_generator(1))
        try:
            for i in range(T):
                w.data = moved if i >= T - K else still
                state = next(states)
        finally:
            w.data = still
        return reward(state.step.x).item()

    h, w0 = 1e-6, w.detach().clone()
    slopes = [(R(w0 + h * e) - R(w0 - h * e)) / (2 * h) for e in torch.eye(4, dtype=torch.float64)]
    torch.testing.assert_close(ours, torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_only_the_last_steps_have_a_graph(model):
    (cond, x), sampler = start(model), model.sampler(T)
    for K in range(T + 1):
        states = list(rollout(model, cond, x, sampler, GUIDANCE, K))
        assert [s.pred.requires_grad for s in states] == [s.i >= T - K for s in states]
        assert [s.x_t.requires_grad for s in states] == [s.i > T - K for s in states]
    with torch.no_grad():
        assert not any(s.pred.requires_grad for s in rollout(model, cond, x, sampler, GUIDANCE, T))


def test_the_callers_own_code_keeps_its_gradients(model):
    (cond, x), sampler = start(model), model.sampler(T)
    for _ in rollout(model, cond, x, sampler, GUIDANCE, 1):
        assert torch.is_grad_enabled()
    with torch.no_grad():
        for _ in rollout(model, cond, x, sampler, GUIDANCE, T):
            assert not torch.is_grad_enabled()
    next(rollout(model, cond, x, sampler, GUIDANCE, 1))  # abandoned halfway
    gc.collect()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize('kind, eta', KINDS)
def test_x0_at_a_random_late_step(model, kind, eta):
    (cond, x), sampler = start(model), model.sampler(T, kind, eta)
    drawn = set()
    for seed in range(12):
        g = make_generator(seed)
        i = T - 1 - torch.randint(3, (), generator=g).item()
        drawn.add(i)
        state = list(rollout(model, cond, x, sampler, GUIDANCE, T - i, g))[i]
        model.denoiser.passes = 0
        ours = differentiable_latents(model, cond, x, sampler, GUIDANCE, 3, 'x0', make_generator(seed))
        assert model.denoiser.passes == i + 1  # what follows is not run
        assert torch.equal(ours, state.step.x0)
        torch.testing.assert_close(grad(model, ours), grad(model, state.step.x0))
    assert drawn == {2, 3, 4}


def test_x0_of_the_last_step_is_the_end_of_ddim(model):
    (cond, x), sampler = start(model), model.sampler(T)
    a, b = [
        differentiable_latents(model, cond, x, sampler, GUIDANCE, 1, where, make_generator(0))
        for where in ('last', 'x0')
    ]
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(grad(model, a), grad(model, b))


@pytest.mark.parametrize('where', ['last', 'x0'])
def test_memory_does_not_grow_with_the_number_of_steps(model, where):
    cond, x = start(model)
    size = lambda T, K: saved_bytes(
        lambda: differentiable_latents(model, cond, x, model.sampler(T), GUIDANCE, K, where, make_generator(0)),
        model.denoiser,
    )
    assert size(4, 1) == size(16, 1) == size(64, 1) > 0
    if where == 'last':
        assert size(16, 8) > 6 * size(16, 1)


def test_a_long_rollout_keeps_no_old_latents(model):
    (cond, x), seen = start(model), []
    for state in rollout(model, cond, x, model.sampler(32), GUIDANCE, 1):
        seen.append(weakref.ref(state.x_t))
        assert sum(ref() is not None for ref in seen) <= 2


def test_same_seed_same_clip_and_eval_mode(model):
    model.denoiser.train()
    a, b, other = [sample(model, ['fox', 'panda'], 3, 2.0, seed) for seed in (1, 1, 2)]
    assert torch.equal(a, b) and not torch.equal(a, other) and model.denoiser.training
    model.denoiser.eval()
    assert torch.equal(sample(model, ['fox', 'panda'], 3, 2.0, 1), a)
    assert a.shape == (2, 2, 3, 16, 16) and a.min() >= 0 and a.max() <= 1 and not a.requires_grad
    assert sample(model, 'fox', 3, size=(1, 8, 24)).shape == (1, 1, 3, 8, 24)


def test_eval_mode_is_undone_after_an_error(model):
    model.denoiser.train()
    with pytest.raises(KeyError), eval_mode(model.denoiser):
        raise KeyError
    assert model.denoiser.training


@pytest.mark.parametrize('K', [-1, T + 1, 1.5, None])
def test_bad_K(model, K):
    (cond, x), sampler = start(model), model.sampler(T)
    with pytest.raises(VaderError, match='K is'):
        next(rollout(model, cond, x, sampler, 1.0, K))
    with pytest.raises(VaderError, match='K is'):
        differentiable_latents(model, cond, x, sampler, 1.0, K)


def test_nothing_to_learn_from_is_refused(model):
    (cond, x), sampler = start(model), model.sampler(T)
    with pytest.raises(VaderError, match='K is 0'):
        differentiable_latents(model, cond, x, sampler, 1.0, 0)
    with pytest.raises(VaderError, match='somewhere'):
        differentiable_latents(model, cond, x, sampler, 1.0, 1, 'somewhere')


def test_warns_where_the_last_step_passes_nothing_on(model):
    cond, x = start(model)
    flat = sampler_from_config({**BASE, 'steps_offset': 0, 'set_alpha_to_one': False}, 'ddim', T)
    with pytest.warns(UserWarning, match='next to nothing|little or nothing'):
        z = differentiable_latents(model, cond, x, flat, 1.0)
    assert grad(model, z).abs().max() == 0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        differentiable_latents(model, cond, x, model.sampler(T), 1.0)
        differentiable_latents(model, cond, x, flat, 1.0, 3, 'x0', make_generator(0))


def tuned():
    model = Tiny()
    add_lora(model, rank=4, alpha=4)
    pretend_training(model)
    return model, torch.randn(2, 4, 3, 8, 8, generator=make_generator(0))


@pytest.mark.parametrize('K', [0, 1, 3])
def test_merging_lora_changes_the_rounding_alone(K):
    model, x = tuned()
    ends = [last(rollout(model, tiny_cond, x, model.sampler(3), 2.0, K, merge=merge)).step.x for merge in (False, True)]
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)
    if K:
        grads = [
            torch.cat([g.flatten() for g in torch.autograd.grad(end.square().mean(), lora_parameters(model))])
            for end in ends
        ]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4 * grads[0].abs().max().item())


def test_only_steps_without_a_graph_are_merged_and_nobody_sees_it():
    model, x = tuned()
    layer = next(m for m in model.denoiser.modules() if hasattr(m, 'lora_A'))
    weight, during = layer.get_base_layer().weight.clone(), []
    layer.register_forward_hook(lambda *a: during.append(layer.merged))
    for _ in rollout(model, tiny_cond, x, model.sampler(3), 2.0, 1, merge=True):
        assert not layer.merged and torch.equal(layer.get_base_layer().weight, weight)
    assert during == [True, True, False]
    during.clear()
    list(rollout(model, tiny_cond, x, model.sampler(2), 2.0))
    assert during == [False, False]


def test_the_copies_are_gone_before_the_first_step_with_a_graph():
    model, x = tuned()
    states = rollout(model, tiny_cond, x, model.sampler(3), 2.0, 1, merge=True)
    alive = []
    for _ in states:
        gc.collect()
        alive.append(sum(isinstance(o, MergedLora) for o in gc.get_objects()))
    assert alive == [1, 1, 0]
