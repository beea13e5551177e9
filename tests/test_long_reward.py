"Rewards for long videos: the whole video is seen, fog is punished, and a run is judged round by round."

import pytest
import torch

from vader_nb.core import make_generator
from vader_nb.rewards.base import check_reward
from vader_nb.rewards.vjepa import disturbed
from vader_nb.training.long_reward import Keep, judge_long, load_vjepa_long
from vader_nb.world.captions import start_image, start_scene
from vader_nb.world.scenes import draw

STARTS = ['a fox playing chess (1)', 'a rabbit washing dishes (2)', 'a penguin riding a bike (3)']


@pytest.fixture(scope='module')
def real():
    return torch.cat([draw(start_scene(s), 9) for s in STARTS])


def test_a_start_scene_is_what_its_image_shows():
    assert torch.equal(draw(start_scene(STARTS[0]), 1)[0, 0], start_image(STARTS[0], 64, 64))


def test_fog_is_punished_and_a_drawing_is_not(real):
    fog = torch.lerp(real, torch.tensor(0.6), torch.linspace(0, 0.5, 9).view(1, -1, 1, 1, 1))
    assert (Keep()(fog) < Keep()(real) - 0.1).all() and (Keep()(real) > -0.1).all()


def test_vjepa_sees_a_change_across_the_whole_video():
    reward, s = load_vjepa_long(), start_scene(STARTS[0])
    real = draw(s, 22)
    assert reward(real) > reward(disturbed('morphing', s, make_generator(0), frames=22))
    x = real.clone().requires_grad_()
    reward(x).sum().backward()
    assert (x.grad.abs().sum((0, 2, 3, 4)) > 0).nonzero()[:, 0].tolist() == list(range(0, 22, 3))


@pytest.mark.parametrize('make', [Keep, load_vjepa_long])
def test_rewards_keep_the_contract(make):
    noise = torch.rand(2, 8, 3, 40, 48, generator=make_generator(5)) * 0.8 + 0.1
    check_reward(make(), noise * torch.linspace(1, 0.7, 8).view(1, -1, 1, 1, 1))


def test_rounds_are_judged_apart(real):
    soft = torch.nn.functional.avg_pool2d(real.flatten(0, 1), 9, 1, 4, count_include_pad=False).view_as(real)
    worse = torch.lerp(real, soft, torch.linspace(0, 1, 9).view(1, -1, 1, 1, 1))
    true, drifting = judge_long(real, STARTS), judge_long(worse, STARTS)
    assert (drifting['error 3'] > drifting['error 1']).all() and (drifting['error 3'] > true['error 3'] + 0.1).all()
    assert (drifting['sharpness 3'] < true['sharpness 3']).all() and true['animal'].tolist() == [1.0] * 3
