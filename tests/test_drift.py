"Measures of drift: right on videos that are known, and in the right order from true to lost."

import pytest
import torch

from vader_nb.core import VaderError, make_generator
from vader_nb.rewards.views import IMAGENET_MEAN, IMAGENET_STD
from vader_nb.training import drift
from vader_nb.training.drift import (
    dynamic_degree,
    flicker,
    load_features,
    motion_smoothness,
    sharpness,
    subject_consistency,
    subject_error,
)
from vader_nb.world.rating import corrupt
from vader_nb.world.scenes import ANIMALS, animal_masks, draw, scenes


@pytest.fixture(scope='module')
def world():
    s = scenes(12, 5, animal=torch.arange(12), activity=torch.arange(12) % 3, obj=0, hat=0)
    return s, draw(s, 22)


def errors(video, s):
    return torch.stack([subject_error(v, s[i]) for i, v in enumerate(video)])


def test_the_drawing_itself_has_no_error(world):
    s, video = world
    found = errors(video, s)
    assert found[:, 0].max() < 1e-4 and found.mean() < 0.1


def test_an_empty_wall_is_the_unit(world):
    s, video = world
    first, cover = draw(s, 1, cover=True)
    walls = ((1 - cover) * first).sum((3, 4), keepdim=True) / (1 - cover).sum((3, 4), keepdim=True)
    assert (errors(walls.expand(-1, -1, -1, 64, 64), s) - 1).abs().max() < 1e-4


def test_it_grows_with_corruption_and_with_missing_parts(world):
    s, video = world
    steps = [torch.full((12,), k) for k in (0.0, 0.3, 0.6, 1.0)]
    for kind in ('blur', 'blotches', 'waves'):
        means = [errors(corrupt(video[:, :8], kind, k, make_generator(0)), s).mean() for k in steps]
        assert all(a < b for a, b in zip(means, means[1:])), kind
    masks = [animal_masks(s[i]) for i in range(12)]
    for count in (1, 3):
        gone = torch.stack([m[:count].sum(0).clamp(max=1) for m in masks])[:, None, None]
        painted = torch.lerp(video[:, :1], video[:, :1, :, :1, :1].expand_as(video[:, :1]), gone)
        assert (errors(painted, s) > errors(video[:, :1], s)).all(), 'a part that looks like the wall is an error'


def test_it_does_not_mind_where_the_subject_is(world):
    s, video = world
    moved = torch.roll(video[:, :1], (3, -2), (3, 4))
    inside = [i for i in range(12) if errors(moved[i : i + 1], s[i]).max() < 1e-4]
    assert len(inside) >= 9, 'all but those who were moved across the edge'


def test_masks_are_what_the_animal_covers():
    s = scenes(1, 3, animal=ANIMALS.index('fox'), activity=5, obj=0, hat=0)
    _, cover = draw(s, 1, cover=True)
    together = animal_masks(s).sum(0)
    assert together.max() < 1.01 and (together - cover[0, 0, 0]).abs().mean() < 0.01
    with pytest.raises(VaderError, match='takes one scene, not 2'):
        animal_masks(scenes(2, 0))


def test_known_videos():
    still = torch.rand(2, 1, 3, 16, 16, generator=make_generator(0)).expand(-1, 6, -1, -1, -1)
    assert flicker(still).max() == 0 and dynamic_degree(still).max() < 1e-6
    assert motion_smoothness(still).tolist() == [1, 1]
    ramp = torch.linspace(0, 1, 6).view(1, -1, 1, 1, 1).expand(1, 6, 3, 16, 16)
    assert flicker(ramp).item() == pytest.approx(0.2) and motion_smoothness(ramp).item() == pytest.approx(1)
    assert dynamic_degree(ramp).item() == pytest.approx(0.3) and sharpness(ramp).item() == pytest.approx(0, abs=1e-6)
    point = torch.zeros(1, 1, 3, 16, 16)
    point[..., 8, 8] = 1
    assert sharpness(point).item() == pytest.approx(8 / 14**2)


def test_consistency_is_the_mean_of_two_cosines():
    x = torch.randn(2, 5, 7, generator=make_generator(0))
    cosine = torch.nn.functional.cosine_similarity
    want = [sum(cosine(v[t], v[0], dim=0) + cosine(v[t], v[t - 1], dim=0) for t in range(1, 5)).item() / 8 for v in x]
    assert subject_consistency(x).tolist() == pytest.approx(want, rel=1e-5)
    assert subject_consistency(x[:, :1].expand(-1, 4, -1)).tolist() == pytest.approx([1, 1])
    with pytest.raises(VaderError, match='two frames or more'):
        subject_consistency(x[:, :1])


def test_features_order_true_and_corrupted_videos(world):
    s, video = world
    features = load_features()
    strengths = torch.linspace(0, 1, 22)
    worse = torch.cat([corrupt(video[:, [i]], 'blur', strengths[[i] * 12], None) for i in range(22)], 1)
    true, lost = (subject_consistency(features(v)) for v in (video, worse))
    assert features(video).shape[:2] == (12, 22) and true.mean() > lost.mean() + 0.02


def test_the_full_features_are_those_of_dinov2(monkeypatch, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14, mlp_ratio=2
    )
    net = Dinov2Model(config).eval()
    net.save_pretrained(tmp_path)
    monkeypatch.setattr(drift, 'model_path', lambda name, scale: tmp_path)
    features = load_features('full', 'cpu', 'fp32')
    video = torch.rand(2, 3, 3, 224, 224, generator=make_generator(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        want = net((video.flatten(0, 1) - mean) / std).pooler_output.view(2, 3, -1)
    torch.testing.assert_close(features(video), want, atol=1e-5, rtol=1e-4)
