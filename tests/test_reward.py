"The reward contract: sums, weights, input errors, and what the contract test catches."

import subprocess, sys
import pytest, torch
from torch import nn

from vader_nb.core import VaderError, make_generator
from vader_nb.rewards.base import Reward, check_reward, check_video, frame_mean, freeze, reward_from, reward_gradient

bright = reward_from(lambda v, p: v.mean((1, 2, 3, 4)), 'bright')
colourful = reward_from(lambda v, p: v.std(2).mean((1, 2, 3)), 'colourful')
prompts = ['a dull fox', 'a vivid fox', 'a frog']


class Clip(Reward):
    name, wants, min_frames = 'clip', 'clip', 3

    def score(self, video, prompts, generator):
        return -video.diff(dim=1).square().mean((1, 2, 3, 4))


class Asked(Reward):
    "The brightness of the colour channel that the length of the prompt names."

    name, needs_prompts = 'asked', True

    def score(self, video, prompts, generator):
        return torch.stack([v[:, len(p) % 3].square().mean() for v, p in zip(video, prompts)])


class Masked(Reward):
    "Brightness under a random mask: one draw for the whole batch."

    name = 'masked'

    def score(self, video, prompts, generator):
        mask = torch.rand(video.shape[-2:], generator=generator) < 0.5
        return (video * mask).square().mean((1, 2, 3, 4))


@pytest.fixture
def video():
    return torch.rand(3, 4, 3, 16, 16, generator=make_generator(5)) * 0.8 + 0.1


def says(words, fn, *args, **kwargs):
    with pytest.raises(VaderError, match=words) as e:
        fn(*args, **kwargs)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'reward',
    [bright, colourful, Clip(), Asked(), Masked(), 2 * Asked() + Clip() + 0.5 * Masked()],
    ids=lambda r: r.name,
)
def test_contract(reward, video):
    check_reward(reward, video, prompts)


def test_sum_is_weighted_flat_and_linear(video):
    both = 3 * (2 * colourful + bright)
    assert torch.allclose(both(video), 6 * colourful(video) + 3 * bright(video))
    assert both.name == '6*colourful + 3*bright' and len(both.rewards) == 2
    assert set(both.parts(video)) == {'colourful', 'bright'}
    assert torch.equal(both.combine(both.parts(video)), both(video))
    assert torch.allclose((bright * 2)(video), (2 * bright)(video)) and torch.allclose(
        (bright + bright)(video), 2 * bright(video)
    )


def test_each_part_is_scored_once(video):
    calls = []
    counted = reward_from(lambda v, p: calls.append(1) or v.mean((1, 2, 3, 4)), 'counted')
    (counted + 2 * counted + bright)(video)
    assert len(calls) == 1


def test_sum_wants_what_its_terms_want(video):
    assert (
        (bright + colourful).wants == 'frame'
        and (bright + Clip()).wants == 'clip'
        and (bright + Clip()).min_frames == 3
    )
    assert (bright + Asked()).needs_prompts and not (bright + Clip()).needs_prompts
    says('at least 3 frames', bright + Clip(), video[:, :2])
    says('pass prompts', bright + Asked(), video)


def test_bad_sums():
    says('can be added', lambda: bright + 3)
    says('share a name', lambda: bright + reward_from(lambda v, p: v.sum((1, 2, 3, 4)), 'bright'))
    says('frame', reward_from, bright, 'x', 'clips')


def test_sum_moves_its_modules():  # a sum is an nn.Module, so .to() reaches the networks inside
    class Net(Reward):
        name = 'net'

        def __init__(self):
            super().__init__()
            self.net = freeze(nn.Linear(3, 1))

    assert next((2 * Net() + bright).to(torch.float16).parameters()).dtype == torch.float16


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda v: v.transpose(1, 2), 'shape'),
        (lambda v: v[0], 'shape'),
        (lambda v: (v * 255).byte(), 'float'),
        (lambda v: v.numpy(), 'ndarray'),
        (lambda v: v * 255, 'from .* to'),
        (lambda v: (v - 0.1) / 0.8 * 2 - 1, 'from .* to'),
        (lambda v: v[:, :0], 'empty'),
        (lambda v: v[:0], 'empty'),
        (lambda v: torch.where(v > 0.8, torch.nan, v), 'finite'),
        (lambda v: torch.where(v > 0.89, torch.inf, v), 'finite'),
    ],
)
def test_bad_video(video, change, words):
    says(words, bright, change(video))


def test_bad_prompts(video):
    says('3 videos need 3 prompts', bright, video, prompts[:2])
    says('not a single string', bright, video, 'a fox')
    says('pass prompts', Asked(), video)


def test_overshoot_is_fine(video):
    "An unclamped decoder may leave [0, 1] a little, or far at few pixels."
    check_video(video * 1.4 - 0.2)
    video[0, 0, :, :4] = 9.0
    check_video(video)


def test_half_precision_input(video):
    assert bright(video.half()).shape == (3,)


def test_autocast_does_not_reach_a_reward(video):
    class Net(Reward):
        def __init__(self):
            super().__init__()
            self.net = freeze(nn.Linear(16, 1))

        def score(self, video, prompts, generator):
            return self.net(video).mean((1, 2, 3, 4))

    net = Net()
    scores = net(video)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal((2 * net)(video), 2 * scores)


def test_meta_videos_pass(video):
    assert bright(video.to('meta')).shape == (3,)


def test_frame_mean_subsets_are_unbiased(video):
    score = lambda x: x.square().mean((1, 2, 3))
    ones = torch.stack([frame_mean(score, video[:, [k]]) for k in range(4)])
    assert torch.allclose(ones.mean(0), frame_mean(score, video))


def test_reward_gradient_leaves_the_video_alone(video):
    scores, grad = reward_gradient(bright, video)
    assert grad.shape == video.shape and not video.requires_grad and not scores.requires_grad
    assert torch.allclose(grad, torch.full_like(grad, 1 / video[0].numel()))
    says('not differentiable', reward_gradient, reward_from(lambda v, p: v.detach().mean((1, 2, 3, 4)), 'cut'), video)
    says('one score per video', reward_gradient, reward_from(lambda v, p: v.mean(), 'scalar'), video)


def broken(fn):
    return reward_from(fn, 'broken')


@pytest.mark.parametrize(
    'fn, words',
    [
        (lambda v, p: v.std(2).mean((1, 2, 3)) / v.std(2).mean((1, 2, 3)).max().detach(), 'alone|finite diff'),
        (lambda v, p: v.std(2).mean((1, 2, 3)) * len(p[0]), 'alone'),
        (lambda v, p: v.mean((1, 2, 3, 4)) * torch.arange(1.0, len(v) + 1), 'alone|order'),
        (lambda v, p: torch.cat([v[:, :1].detach(), v[:, 1:]], 1).square().mean((1, 2, 3, 4)), 'finite differences'),
        (lambda v, p: v.mean((1, 2, 3, 4)) + v.detach().square().mean((1, 2, 3, 4)), 'finite differences'),
        (lambda v, p: (v - 9).clamp(min=0).mean((1, 2, 3, 4)), 'zero'),
        (lambda v, p: v.mean((1, 2, 3, 4)) / 0, 'finite'),
        (lambda v, p: (v - 0.5).abs().sum((1, 2, 3, 4)).sub(1e9).sqrt(), 'finite'),
    ],
)
def test_contract_catches(fn, words, video):
    says(words, check_reward, broken(fn), video, prompts)


def test_a_reward_with_many_kinks_passes(video):
    "Its slope shows over short distances only, as with the absolute errors of V-JEPA 2."
    check_reward(reward_from(lambda v, p: (1200 * v).sin().mean((1, 2, 3, 4)), 'kinks'), video)


def test_contract_needs_a_batch(video):
    says('two videos', check_reward, bright, video[:1])


class Switches(Reward):
    "Notes torch's switches while it scores."

    name = 'switches'

    def score(self, video, prompts, generator):
        self.seen = float32_switches()
        return video.square().mean((1, 2, 3, 4))


def float32_switches():
    b = torch.backends
    new = [b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul, b.mkldnn.conv] if hasattr(b.cudnn, 'conv') else []
    return (
        [s.fp32_precision for s in new],
        b.cuda.matmul.allow_tf32,
        b.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
    )


@pytest.mark.parametrize('precision', ['highest', 'high', 'medium'])
@pytest.mark.parametrize('convolutions', [True, False])
def test_the_contract_is_computed_in_true_float32(video, precision, convolutions):
    was = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
        before, reward = float32_switches(), Switches()
        check_reward(reward, video)
        assert reward.seen[1:] == (False, False, 'highest') and set(reward.seen[0]) <= {'ieee'}
        assert float32_switches() == before
        with pytest.raises(VaderError):
            check_reward(reward, video[:1])
        assert float32_switches() == before
    finally:
        torch.set_float32_matmul_precision(was[0])
        torch.backends.cudnn.allow_tf32 = was[1]


def test_true_float32_where_the_new_switches_contradict_the_old():
    if not hasattr(torch.backends.cudnn, 'conv'):
        pytest.skip('this torch has no new switches')
    run = """import torch
from vader_nb.core import true_float32
b = torch.backends
b.cuda.matmul.fp32_precision = b.mkldnn.conv.fp32_precision = 'tf32'; b.cudnn.conv.fp32_precision = 'ieee'
read = lambda: [s.fp32_precision for s in (b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul, b.mkldnn.conv)]
before = read()
with true_float32(): print(set(read()), b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32)
print(read() == before, before[0])"""
    said = subprocess.run([sys.executable, '-c', run], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == ["{'ieee'} False False", 'True tf32']


def test_a_video_on_another_device_is_one_line():
    from vader_nb.zoo import load_reward

    reward = load_reward('aesthetic', device='cpu')
    for r in (reward, 2 * reward + bright):
        with pytest.raises(
            VaderError, match="the video for aesthetic is on meta, but must be on cpu: move it with .to\\('cpu'\\)"
        ):
            r(torch.rand(1, 2, 3, 64, 64, device='meta'))
