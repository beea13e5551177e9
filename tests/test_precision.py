"Every reward and every base model in every number format: the tables of the zoo say which there are."

import inspect

import pytest
import torch

from test_wan import tiny as tiny_wan
from vader_nb.config import Config
from vader_nb.core import VaderError, make_generator, pick_device, pick_dtype
from vader_nb.memory.lora import add_lora, lora_parameters
from vader_nb.pretrain.vae import peak_activation
from vader_nb.rewards.base import reward_from, reward_gradient
from vader_nb.training.trainer import fit
from vader_nb.training.vader import vader_step
from vader_nb.world.captions import captions
from vader_nb.world.scenes import draw, scenes
from vader_nb.zoo import MODELS, REWARDS, load_model, load_reward

DEVICE = pick_device()


@pytest.fixture(scope='module', autouse=True)
def default_device():
    "These tests are for the GPU, too, and put their videos there."


FORMATS = ['fp32', 'fp16 weights', 'bf16 weights', 'fp16 autocast', 'bf16 autocast']
PROMPTS = ['a fox riding a bike', 'a panda playing chess']
TINY = dict(wan=tiny_wan)  # bases without a small checkpoint
FRAMES = dict(opensora=17, wan=5)


def formats(fmt):
    "Number format of the weights, and of autocast."
    word, _, what = fmt.partition(' ')
    return (word, 'fp32') if what == 'weights' else ('fp32', word)


def autocast(name):
    return torch.autocast(DEVICE.type, pick_dtype(name), enabled=name != 'fp32')


@pytest.fixture(scope='module')
def clips():
    s = scenes(2, 5, 'any')
    return draw(s).to(DEVICE), captions(s)


@pytest.fixture(scope='module')
def exact(clips):
    "Scores and gradients of all rewards in float32."
    video, prompts = clips
    return {name: reward_gradient(load_reward(name), video, prompts, make_generator(0)) for name in REWARDS}


@pytest.mark.parametrize('fmt', FORMATS)
@pytest.mark.parametrize('name', REWARDS)
def test_every_reward_in_every_format(name, fmt, clips, exact):
    video, prompts = clips
    weights, cast = formats(fmt)
    reward = load_reward(name, 'small').to(pick_dtype(weights))
    with autocast(cast):
        scores, grad = reward_gradient(reward, video, prompts, make_generator(0))
    want, slope = exact[name]
    assert scores.dtype == torch.float32 and (scores - want).abs().max() < 0.02 * (1 + want.abs().max())
    along = torch.nn.functional.cosine_similarity(grad.flatten(1), slope.flatten(1))
    assert grad.isfinite().all() and along.min() > 0.9


def bright():
    return reward_from(lambda video, prompts: video.mean((1, 2, 3, 4)), 'bright')


def load_base(name, weights):
    if name not in TINY:
        return load_model(name, 'small', dtype=weights)
    model = TINY[name]()
    for net in (model.denoiser, model.vae, model.text_encoder):
        net.to(DEVICE, pick_dtype(weights))
    return model


def config(name, model, **changes):
    kind = inspect.signature(model.sampler).parameters['kind'].default
    size = dict(frames=FRAMES.get(name, 2), height=32, width=32)
    return Config(
        T=2, K=1, guidance=2.0, train_steps=1, batch_size=1, rank=2, alpha=2.0, sampler=kind, **size, **changes
    )


@pytest.mark.parametrize('fmt', FORMATS)
@pytest.mark.parametrize('name', MODELS)
def test_every_base_in_every_format(name, fmt):
    "Forward and backward."
    weights, cast = formats(fmt)
    model = load_base(name, weights)
    add_lora(model, 2, 2)
    with autocast(cast):
        loss, record = vader_step(model, bright(), PROMPTS[:1], config(name, model), make_generator(0))
    loss.backward()
    grads = [p.grad for p in lora_parameters(model)]
    assert 0 < record['reward'].item() < 1 and record['reward'].dtype == torch.float32
    assert all(g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}


CPU_KNOWS = [f for f in FORMATS if f != 'fp16 autocast']  # accelerate refuses it there


@pytest.mark.parametrize('fmt', FORMATS if DEVICE.type == 'cuda' else CPU_KNOWS)
@pytest.mark.parametrize('name', MODELS)
def test_a_step_of_training_in_every_format(name, fmt, tmp_path):
    weights, cast = formats(fmt)
    model = load_base(name, weights)
    (record,) = fit(model, bright(), PROMPTS[:1], config(name, model, mixed_precision=cast), tmp_path)
    assert record['gradient_norm'] > 0 and 0 < record['reward'] < 1


def networks(owner):
    "The networks of a model, by name."
    return {name: net for name, net in vars(owner).items() if isinstance(net, torch.nn.Module)}


@pytest.mark.parametrize('name', [name for name in MODELS if name not in TINY])
def test_no_activation_of_a_base_comes_near_the_end_of_fp16(name):
    model = load_model(name, 'small')
    conf = config(name, model)
    z = torch.randn(
        1, model.latent_channels, model.noise(1, conf.frames, 64, 64).shape[2], 8, 8, generator=make_generator(1)
    )

    def forward():
        with torch.no_grad():
            cond = model.encode(PROMPTS[:1], conf.frames, 64, 64)
            model.predict(z.to(DEVICE), 500, cond, 2.0)
            for size in (0.5, 1, 2):
                model.decode(size * z.to(DEVICE))

    peaks = {part: peak_activation(net, forward) for part, net in networks(model).items()}
    assert max(peaks.values()) < 10_000, peaks


@pytest.mark.parametrize('name', REWARDS)
def test_no_activation_of_a_reward_comes_near_the_end_of_fp16(name, clips):
    video, prompts = clips
    reward = load_reward(name)
    assert peak_activation(reward, lambda: reward(video, prompts, make_generator(0))) < 10_000


def test_the_advice_after_an_overflow_is_not_the_learning_rate(tmp_path):
    model = load_base('modelscope', 'fp16')
    endless = reward_from(lambda video, prompts: video.mean((1, 2, 3, 4)) / 0, 'endless')
    with pytest.raises(VaderError, match='fp16 may have overflowed .* try bf16 or fp32') as e:
        list(fit(model, endless, PROMPTS, config('modelscope', model), tmp_path))
    assert 'lr' not in str(e.value)
