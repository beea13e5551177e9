"The depth reward against transformers."

import pytest, torch
import torch.nn.functional as F

from vader_nb.core import VaderError, make_generator
from vader_nb.rewards.base import check_reward
from vader_nb.rewards.depth import Depth, correlation, depth_view, load_depth, near, world_depth
from vader_nb.rewards.views import imagenet_normalise
from vader_nb.world.scenes import draw, scenes


@pytest.fixture(scope='module')
def video():
    return draw(scenes(3, 5, 'any', activity='playing chess'), 2, 48, 64)


@pytest.fixture(scope='module')
def net():
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = Dinov2Config(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            mlp_ratio=2,
            image_size=32,
            patch_size=8,
            out_features=['stage1', 'stage2', 'stage3', 'stage4'],
            reshape_hidden_states=False,
        )
        return DepthAnythingForDepthEstimation(
            DepthAnythingConfig(
                backbone_config=backbone,
                patch_size=8,
                reassemble_hidden_size=16,
                neck_hidden_sizes=[8, 8, 8, 8],
                fusion_hidden_size=8,
                head_hidden_size=8,
            )
        )


def test_depth_contract(net, video):
    check_reward(Depth(net), video)


@pytest.mark.parametrize('h, w', [(320, 512), (256, 256), (64, 96), (720, 480), (518, 518), (600, 601)])
def test_sizes_are_the_processors(h, w):
    from transformers import DPTImageProcessor

    theirs = DPTImageProcessor(
        size=dict(height=518, width=518), keep_aspect_ratio=True, ensure_multiple_of=14, resample=3, do_pad=False
    )
    u8 = (F.interpolate(torch.rand(1, 3, 9, 9, generator=make_generator(0)), (h, w), mode='bilinear')[0] * 255).byte()
    want = theirs(u8, return_tensors='pt').pixel_values
    ours = depth_view(u8[None] / 255, 518, 14)
    assert ours.shape[-2:] == want.shape[-2:]


def test_a_frame_of_the_right_size_is_untouched():
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(depth_view(x, 32, 8), imagenet_normalise(x))


def test_correlation_is_pearsons_and_knows_no_units():
    a, b = torch.rand(4, 6, 7), torch.rand(4, 6, 7)
    want = torch.stack([torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1] for x, y in zip(a, b)])
    assert torch.allclose(correlation(a, b), want, atol=1e-6)
    assert torch.allclose(correlation(3 * a + 7, b), want, atol=1e-5) and torch.allclose(
        correlation(-a, b), -want, atol=1e-6
    )


def test_score_is_the_correlation_of_the_librarys_depth(net, video):
    wish = torch.rand(32, 40, generator=make_generator(0))
    reward = Depth(net, wish)
    view = depth_view(video[:, 0], 32, 8)
    d = net(pixel_values=view).predicted_depth
    want = correlation(d, F.interpolate(wish[None, None], d.shape[1:], mode='bilinear', antialias=True)[0].expand_as(d))
    assert torch.allclose(reward(video[:, :1]), want, atol=1e-6)


def test_near_is_where_it_should_be():
    wish = near(0.75, 0.25, size=40)
    assert divmod(wish.argmax().item(), 40) in [(r, c) for r in (9, 10) for c in (29, 30)] and wish.max() <= 1


def test_true_depths_rank_as_they_lie():
    video, depth = world_depth(scenes(2, 1), 2)
    assert depth.shape == (2, 2, 1, 64, 64) and 0.1 - 1e-6 <= depth.min() and depth.max() <= 0.8 + 1e-6
    assert torch.equal(video, draw(scenes(2, 1), 2))
    wall = draw(scenes(2, 1), 2, cover=True)[1][:, :, :, :48] == 0
    assert torch.allclose(depth[:, :, :, :48][wall], torch.tensor(0.1)), 'the wall is far'


@pytest.mark.parametrize('wish', [torch.zeros(4, 4), torch.rand(1, 4, 4), torch.tensor([[1.0, float('nan')]])])
def test_bad_wishes(net, wish):
    with pytest.raises(VaderError, match='a wish is a picture'):
        Depth(net, wish)


def test_small_knows_the_worlds_depths():
    "Far above what an average depth map would reach, and it tells which side the near things are on."
    video, depth = world_depth(scenes(30, 99, 'vivid'), 1)
    truth = depth[:, 0, 0]
    with torch.no_grad():
        seen = correlation(load_depth('small', device='cpu').depth(video[:, 0]), truth)
        right = load_depth('small', 'cpu', wish=near(0.7))(video) > load_depth('small', 'cpu', wish=near(0.3))(video)
    assert seen.mean() > correlation(truth.mean(0).expand_as(truth), truth).mean() + 0.05
    assert (
        right == (correlation(truth, near(0.7).expand_as(truth)) > correlation(truth, near(0.3).expand_as(truth)))
    ).float().mean() > 0.8
