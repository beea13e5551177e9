"Videos of several rounds: what is shown, what each round starts from, and which gradients pass between rounds."

from dataclasses import replace

import pytest
import torch

from test_svd import SIZE, adapter, tiny_pipeline
from tiny_run import tiny_model
from vader_nb.config import Config
from vader_nb.core import VaderError, make_generator
from vader_nb.diffusion.rollout import sample
from vader_nb.memory.lora import add_lora, lora_parameters
from vader_nb.rewards.base import reward_from
from vader_nb.training.evaluate import sample_clips
from vader_nb.training.long_video import (
    extend,
    last_frame,
    long_clip,
    mark_seams,
    match_colours,
    rounds_step,
)
from vader_nb.training.run_folder import fold_seed
from vader_nb.training.trainer import fit
from vader_nb.training.vader import vader_step

STARTS = ['a labrador riding a bike', 'a maltese playing chess']
F, H, W = SIZE
SMALL = dict(
    T=2, K=2, sampler='euler', guidance=2.0, frames=F, height=H, width=W, batch_size=1, rank=2, alpha=2.0, train_steps=1
)


@pytest.fixture
def model():
    return adapter(tiny_pipeline())


def wave(video, prompts):
    "A reward that minds every frame, and each differently."
    weights = torch.linspace(1, 2, video.shape[1], dtype=video.dtype, device=video.device)
    return (weights.view(1, -1, 1, 1, 1) * video.sin()).mean((1, 2, 3, 4))


def with_lora(model):
    torch.manual_seed(0)
    add_lora(model, 2, 2)
    for p in lora_parameters(model):
        p.data.normal_(0, 0.3)
    return model


def test_a_round_starts_from_the_last_frame_which_is_shown_once(model):
    how = dict(T=2, guidance=2.0, noise=0.1)
    video = extend(model, STARTS, rounds=3, seed=5, **how)
    assert video.shape == (2, F + 2 * (F - 1), 3, H, W)
    first = sample(model, STARTS, seed=5, **how)
    assert torch.equal(video[:, :F], first)
    second = sample(model, list(first[:, -1]), seed=fold_seed(5, 'round', 1), **how)
    assert torch.equal(video[:, F : 2 * F - 1], second[:, 1:])
    assert torch.equal(extend(model, STARTS, rounds=1, seed=5, **how), first)


def test_each_round_has_noise_of_its_own(model):
    how = dict(T=1, guidance=1.0)
    image = torch.full((3, H, W), 0.5)
    rounds = [sample(model, [image], seed=fold_seed(0, 'round', r), **how) for r in (1, 2)]
    assert not torch.equal(*rounds)


def test_anchored_colours(model):
    g = make_generator(0)
    frame, reference = torch.rand(2, 3, 8, 8, generator=g) / 4, torch.rand(2, 3, 8, 8, generator=g) / 2 + 0.25
    out = match_colours(frame, reference)
    torch.testing.assert_close(out.mean((2, 3)), reference.mean((2, 3)), atol=0.02, rtol=0)
    assert not torch.equal(
        *(extend(model, STARTS[:1], 2, T=1, guidance=1.0, anchor=anchor)[:, F:] for anchor in (True, False))
    )


@pytest.mark.parametrize('where', ['last', 'x0'])
def test_one_round_is_a_step_of_vader(model, where):
    config = Config(**{**SMALL, 'T': 3}, where=where)
    with_lora(model)
    reward = reward_from(wave, 'wave', wants='clip')
    losses = [step(model, reward, STARTS, config, make_generator(3))[0] for step in (vader_step, rounds_step)]
    assert losses[0].item() == losses[1].item()
    grads = [torch.autograd.grad(loss, lora_parameters(model)) for loss in losses]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize('where', ['last', 'x0'])
def test_what_is_trained_on_is_what_is_sampled(model, where):
    "The start image of a round is the finished clip's last frame, also where the reward sees an estimate."
    config = Config(**SMALL, where=where, rounds=2)
    seen = []
    encode = model.encode
    model.encode = lambda images, *size, **how: seen.append(images) or encode(images, *size, **how)
    long_clip(model, STARTS[:1], config, make_generator(0), 'clip')
    g = make_generator(0)
    x = model.noise(1, F, H, W, g)
    states, sampler = x * model.sampler(2).init_sigma, model.sampler(2)
    cond = encode(STARTS[:1], F, H, W)
    with torch.no_grad():
        for i, t in enumerate(sampler.timesteps):
            states = sampler.step(i, states, model.predict(sampler.scale_input(states, i), t, cond, 2.0)).x
        want = last_frame(model, states, False)[0]
    assert seen[0] == STARTS[:1] and not seen[1][0].requires_grad
    torch.testing.assert_close(seen[1][0], want, atol=1e-4, rtol=1e-4)


def directional(model, config, h=5e-4):
    "The slope of the loss along a direction of the weights, by the gradient and by finite differences."
    weights, g = lora_parameters(model), make_generator(9)
    direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in weights]

    def loss():
        video = long_clip(model, STARTS[:1], config, make_generator(0), 'clip')
        return -wave(video.double(), None).mean()

    grads = torch.autograd.grad(loss(), weights)
    slope = sum((a * d).sum() for a, d in zip(grads, direction)).item()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(weights, direction):
                p += sign * h * d
            ends.append(loss().item())
            for p, d in zip(weights, direction):
                p -= sign * h * d
    return slope, (ends[0] - ends[1]) / (2 * h)


def test_through_is_the_whole_gradient(model):
    for net in (model.denoiser, model.vae, model.image_encoder):
        net.double()
    with_lora(model)
    model.denoiser.double()
    config = Config(**SMALL, where='last', rounds=2)
    slope, true = directional(model, replace(config, through=True))
    assert slope == pytest.approx(true, rel=0.03)
    cut, again = directional(model, config)
    assert again == true and abs(cut - true) > 0.5 * abs(true), 'without it, a part is missing'


def test_a_run_over_rounds(model, tmp_path):
    config = Config(**SMALL, rounds=2)
    seen = []

    def watched(video, prompts):
        seen.append(video.shape[1])
        return wave(video, prompts)

    reward = reward_from(watched, 'wave', wants='clip')
    (record,) = fit(model, reward, STARTS, config, tmp_path / 'run', eval_prompts=STARTS[:1])
    assert record['gradient_norm'] > 0 and set(seen) == {2 * F - 1}
    assert sample_clips(model, STARTS[:1], config, 0).shape[1] == 2 * F - 1
    assert (tmp_path / 'run/report.md').is_file()


def test_a_frame_reward_sees_frames_of_every_round(model):
    config = Config(**SMALL, rounds=3, decoded_frames=2)
    with_lora(model)
    video = long_clip(model, STARTS[:1], config, make_generator(0), 'frame')
    assert video.shape[1] == 6 and video.requires_grad


@pytest.mark.parametrize(
    'changes, says',
    [
        (dict(rounds=0), 'rounds is 0, but must be at least 1'),
        (dict(rounds=1.5), 'rounds is 1.5, but must be a whole number'),
        (dict(rounds=2, method='dpo', batch_size=2), 'dpo trains single clips'),
        (dict(rounds=2, through=True), "through needs where='last'"),
        (dict(through=1), 'through is 1, but must be True or False'),
    ],
)
def test_bad_settings(changes, says):
    with pytest.raises(VaderError, match=says) as e:
        Config(**{**SMALL, **changes})
    assert '\n' not in str(e.value)


def test_a_model_of_texts_cannot_go_on(tmp_path):
    for call in (
        lambda: extend(tiny_model(), 'a fox', 2),
        lambda: list(fit(tiny_model(), reward_from(wave, 'wave'), ['a fox'], Config(rounds=2), tmp_path / 'run')),
    ):
        with pytest.raises(VaderError, match='starts from a text and cannot go on from a frame: use svd') as e:
            call()
        assert '\n' not in str(e.value)
    with pytest.raises(VaderError, match='rounds is 0'):
        extend(tiny_model(), 'a fox', 0)


def test_seams_are_marked_where_rounds_begin():
    marked = mark_seams(torch.zeros(1, 22, 3, 64, 64), 3)
    assert marked[0, :, 0, :, 0].amax(1).nonzero()[:, 0].tolist() == [8, 15]
    assert torch.equal(mark_seams(torch.zeros(1, 8, 3, 64, 64), 1), torch.zeros(1, 8, 3, 64, 64))
