"06_video_model: the contract, on a model small enough to see through."

import copy

import pytest
import torch
from PIL import Image
from torch import nn
from vader_nb.core import VaderError, make_generator
from vader_nb.models.base import (
    TemporalConv,
    VideoModel,
    check_frames,
    check_prompts,
    check_size,
    with_fast_convolutions,
)
from vader_nb.zoo import load_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.calls = nn.Parameter(torch.tensor(0.5)), 0

    def forward(self, x, t, embeds, fps):
        self.calls += 1
        return self.w * x + (embeds.mean((1, 2)) * fps * t)[:, None, None, None, None]


class Toy(VideoModel):
    name = 'toy'

    def __init__(self):
        super().__init__(Net(), None)
        self.read = []

    def embed(self, prompts):
        self.read += prompts
        return torch.stack([torch.full((2, 3), float(len(p))) for p in prompts]) * self.denoiser.w

    def encode(self, prompts, *size, generator=None):
        cond = super().encode(prompts, *size)
        cond.extra['fps'] = torch.arange(1.0, len(cond) + 1)
        return cond

    def denoise(self, x, t, embeds, fps):
        return self.denoiser(x, t, embeds, fps)

    def to_pixels(self, z):
        return z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.fixture
def model():
    return Toy()


def test_each_prompt_is_read_once_and_leaves_no_graph(model):
    a = model.encode(['fox', 'cat!', 'fox'])
    b = model.encode(['fox'])
    assert sorted(model.read) == ['', 'cat!', 'fox']
    assert torch.equal(a.embeds[2:], b.embeds) and not a.embeds.requires_grad


def test_condition_is_a_batch(model):
    c = model.encode(['a', 'bb', 'ccc'])
    assert len(c) == 3 and len(c[1:]) == 2 and len(c[0]) == len(c[-1]) == 1
    assert c[[2, 0]].extra['fps'].tolist() == [3, 1]
    assert c.repeat(2).extra['fps'].tolist() == [1, 1, 2, 2, 3, 3]
    assert [len(one) for one in c] == [1, 1, 1]
    both = c.paired()
    assert torch.equal(both.embeds[:3], c.uncond) and torch.equal(both.embeds[3:], c.embeds)
    assert both.extra['fps'].tolist() == [1, 2, 3, 1, 2, 3] and len(both[4:]) == 2
    assert c.to(torch.float64).uncond.dtype == torch.float64


def test_guidance_is_linear_and_one_means_one_pass_of_the_plain_batch(model):
    c, x = model.encode(['a', 'bb']), model.noise(2, generator=make_generator(0))
    plain = model.predict(x, 7, c)
    assert model.denoiser.calls == 1
    uncond = model.predict(x, 7, c, 0.0)
    assert model.denoiser.calls == 2
    for s in (2.0, 7.5, torch.tensor([2.0, 5.0]).view(2, 1, 1, 1, 1), torch.linspace(1, 3, 8).view(1, 1, 8, 1, 1)):
        torch.testing.assert_close(model.predict(x, 7, c, s), uncond + s * (plain - uncond))


def test_a_time_for_each_clip(model):
    c, x = model.encode(['a', 'bb']), model.noise(2, generator=make_generator(0))
    both = model.predict(x, torch.tensor([3, 900]), c, 2.0)
    for i, t in enumerate((3, 900)):
        torch.testing.assert_close(both[i : i + 1], model.predict(x[i : i + 1], t, c[i], 2.0))


def test_predict_goes_through_whatever_wraps_the_denoiser(model):
    inner, seen = model.denoiser, []

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = inner

        def forward(self, *args):
            seen.append(len(args[0]))
            return self.module(*args)

    c, x = model.encode('a'), model.noise(1, generator=make_generator(0))
    before = model.predict(x, 1, c, 3.0)
    model.denoiser = Wrapper()
    assert torch.equal(model.predict(x, 1, c, 3.0), before) and seen == [2]


def test_the_caller_decides_about_gradients(model):
    c, x = model.encode('a'), model.noise(1, generator=make_generator(0))
    assert model.predict(x, 1, c, 3.0).requires_grad
    with torch.no_grad():
        assert not model.predict(x, 1, c, 3.0).requires_grad
    z = x.requires_grad_()
    model.decode(z).sum().backward()
    assert (z.grad[:, :3] == 64).all()  # nothing clamped, though most pixels lie outside [0, 1]


def test_decode_only_the_asked_frames(model):
    z = model.noise(2, generator=make_generator(0))
    assert torch.equal(model.decode(z, [5, 1]), model.decode(z)[:, [5, 1]])
    assert model.decode(z, 3).shape == (2, 1, 3, 64, 64)
    assert torch.equal(model.decode(z, torch.tensor([7])), model.decode(z)[:, 7:])


def test_noise_follows_the_seed_and_the_size(model):
    assert torch.equal(model.noise(2, 4, 32, 48, make_generator(3)), model.noise(2, 4, 32, 48, make_generator(3)))
    assert model.noise(2, 4, 32, 48, make_generator(3)).shape == (2, 4, 4, 4, 6)
    assert model.noise(1, generator=make_generator(0)).shape == (1, 4, 8, 8, 8)


@pytest.mark.parametrize('prompts', [[], [''], '  ', ['ok', None], [3]])
def test_bad_prompts(model, prompts):
    with pytest.raises(VaderError):
        model.encode(prompts)
    with pytest.raises(VaderError):
        check_prompts(prompts)


@pytest.mark.parametrize('frames', [[8], [-1], [], [0, 9], 1.5, [True, 2.5]])
def test_bad_frames(model, frames):
    with pytest.raises(VaderError, match='frames are'):
        model.decode(model.noise(1, generator=make_generator(0)), frames)
    with pytest.raises(VaderError):
        check_frames(frames, 8)


@pytest.mark.parametrize(
    'size', [(8, 60, 64), (8, 64, 7), (0, 64, 64), (-2, 64, 64), (8, 0, 64), (2.5, 64, 64), (8, -8, 64)]
)
def test_bad_sizes(model, size):
    with pytest.raises(VaderError):
        model.noise(1, *size, generator=make_generator(0))
    with pytest.raises(VaderError):
        model.encode('a', *size)
    with pytest.raises(VaderError):
        check_size(*size, 8)


def test_inputs_that_do_not_fit(model):
    c, x = model.encode(['a', 'bb']), model.noise(2, generator=make_generator(0))
    with pytest.raises(VaderError, match='2 prompts'):
        model.predict(x[:1], 1, c)
    with pytest.raises(VaderError, match='latents must be'):
        model.predict(x[0], 1, c[0])
    with pytest.raises(VaderError, match='latents must be'):
        model.predict(x[:, :3], 1, c)
    with pytest.raises(VaderError, match='5 axes'):
        model.predict(x, 1, c, torch.tensor([2.0, 3.0]))
    with pytest.raises(VaderError, match='meta'):
        model.predict(x.to('meta'), 1, c)
    with pytest.raises(VaderError, match='meta'):
        model.predict(x, 1, c.to('meta'))


@pytest.mark.parametrize(
    'kind',
    [
        dict(kernel_size=(3, 1, 1), padding=(1, 0, 0)),
        dict(kernel_size=(3, 1, 1), padding=(1, 0, 0), stride=(2, 1, 1), bias=False),
        dict(kernel_size=(3, 1, 1), padding=(2, 0, 0), dilation=(2, 1, 1), groups=2),
        dict(kernel_size=1),
    ],
)
def test_a_convolution_along_time_is_one_of_pictures(kind):
    torch.manual_seed(0)
    slow = torch.nn.Conv3d(4, 6, **kind)
    fast = with_fast_convolutions(copy.deepcopy(slow))
    assert type(fast) is TemporalConv and fast.state_dict().keys() == slow.state_dict().keys()
    x = torch.randn(2, 5, 4, 3, 7).transpose(1, 2)  # as diffusers hands it over: not contiguous
    results = []
    for conv in (slow, fast):
        v = x.clone().requires_grad_()
        y = conv(v)
        results.append([y, *torch.autograd.grad(y.square().sum(), [v, *conv.parameters()])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'kind',
    [
        dict(kernel_size=3),
        dict(kernel_size=(3, 1, 1), stride=2),
        dict(kernel_size=(3, 1, 1), padding=1),
        dict(kernel_size=(3, 1, 1), padding='same'),
        dict(kernel_size=(3, 1, 1), padding=(1, 0, 0), padding_mode='replicate'),
    ],
)
def test_other_convolutions_stay(kind):
    assert type(with_fast_convolutions(torch.nn.Conv3d(4, 4, **kind))) is torch.nn.Conv3d


@pytest.mark.parametrize('name', ['modelscope', 'videocrafter', 'svd'])
def test_a_base_with_fast_convolutions_is_the_same_model(name):
    model = load_model(name, 'small', device='cpu')
    x = model.noise(1, generator=make_generator(0))
    prompts = [Image.new('RGB', (64, 64), 'orange')] if name == 'svd' else ['a panda riding a bike']
    cond = model.encode(prompts)
    fast = [m for net in (model.denoiser, model.vae) for m in net.modules() if type(m) is TemporalConv]
    with torch.no_grad():
        ours = [model.predict(x, 1, cond), model.decode(x)]
        for m in fast:
            m.__class__ = torch.nn.Conv3d
        theirs = [model.predict(x, 1, cond), model.decode(x)]
    assert fast
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
