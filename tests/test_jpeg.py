"Compressibility against PIL."

import io
import numpy as np, pytest, torch
import torch.nn.functional as F
from PIL import Image

from vader_nb.core import VaderError, make_generator
from vader_nb.rewards.base import check_reward, reward_gradient
from vader_nb.rewards.jpeg import Compressibility, block_dct, dct_matrix, luma_chroma, quality_tables, soft_round
from vader_nb.show import to_uint8
from vader_nb.world.rating import CORRUPTIONS, corrupt
from vader_nb.world.scenes import draw, scenes


@pytest.fixture(scope='module')
def video():
    return draw(scenes(3, 5, 'any', activity='playing chess'), 2, 48, 64)


def jpeg(frame, quality):
    "A frame (3, h, w) as the bytes of a JPEG file."
    Image.fromarray(to_uint8(frame[None])[0, 0]).save(out := io.BytesIO(), 'JPEG', quality=quality)
    return out.getvalue()


# Piece by piece


@pytest.mark.parametrize('quality', [1, 10, 49, 50, 75, 95, 100])
def test_tables_are_those_in_a_file(quality):
    theirs = Image.open(io.BytesIO(jpeg(torch.zeros(3, 16, 16), quality))).quantization
    assert [theirs[i] for i in range(2)] == [t.int().flatten().tolist() for t in quality_tables(quality)]


@pytest.mark.parametrize('quality', [0, 101])
def test_no_such_quality(quality):
    with pytest.raises(VaderError, match='between 1 and 100'):
        Compressibility(quality)


def test_colours_are_pils():
    x = torch.rand(3, 16, 16, generator=make_generator(0))
    theirs = (
        torch.from_numpy(np.array(Image.fromarray(to_uint8(x[None])[0, 0]).convert('YCbCr'))).float().permute(2, 0, 1)
        - 128
    )
    y, c = luma_chroma(x[None])
    assert (y[0] - theirs[:1]).abs().max() < 1.6 and (c[0] - F.avg_pool2d(theirs[1:], 2)).abs().max() < 1.6


def test_padding_repeats_the_edge():
    y, c = luma_chroma(torch.rand(2, 3, 17, 30))
    assert y.shape == (2, 1, 32, 32) and c.shape == (2, 2, 16, 16)
    assert torch.equal(y[:, :, 17:, :30], y[:, :, 16:17, :30].expand(-1, -1, 15, -1))


def test_dct_keeps_lengths_and_has_the_textbook_values():
    x = torch.randn(2, 1, 16, 24)
    assert torch.allclose(block_dct(x).square().sum(), x.square().sum(), rtol=1e-5)
    flat = block_dct(torch.full((1, 1, 8, 8), 3.0))[0, 0, 0, 0]
    assert abs(flat[0, 0] - 24) < 1e-5 and flat.flatten()[1:].abs().max() < 1e-5
    one = torch.outer(dct_matrix()[2], dct_matrix()[5])
    assert torch.allclose(
        block_dct(F.pad(one, (8, 0))[None, None])[0, 0, 0, 1],
        F.one_hot(torch.tensor(21), 64).view(8, 8).float(),
        atol=1e-6,
    )


def test_soft_round_meets_the_stairs():
    n = torch.arange(-5.0, 6)
    assert torch.allclose(soft_round(n), n, atol=1e-5) and torch.allclose(soft_round(n + 0.5), n + 0.5, atol=1e-5)
    x = torch.linspace(-3, 3, 1000)
    assert (soft_round(x) - x.round()).abs().mean() < (x - x.round()).abs().mean() * 0.65 and (
        soft_round(x).diff() > -1e-6
    ).all()


@pytest.mark.parametrize('quality', [20, 75, 90])
def test_order_is_that_of_real_files(quality):
    clean = draw(scenes(50, 3, 'any'), 1)
    frames = torch.cat(
        [
            clean[:20],
            *[
                corrupt(v, k, torch.rand(6, generator=make_generator(2)), make_generator(1))
                for k, v in zip(CORRUPTIONS, clean[20:].split(6))
            ],
        ]
    )[:, 0]
    real = torch.tensor([float(len(jpeg(f, quality))) for f in frames])
    ranks = [v.argsort().argsort().float() for v in (real, Compressibility(quality).bits(frames))]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.97


# The compressibility reward


def test_compressibility_contract(video):
    check_reward(Compressibility(), video)


def test_a_flat_grey_frame_is_the_best(video):
    reward, grey = Compressibility(), torch.full((1, 2, 3, 32, 32), 128 / 255)
    assert reward(grey).abs().item() < 1e-3 and (reward(video) < -0.1).all()


def test_finer_quality_takes_more_bits(video):
    bits = torch.stack([-Compressibility(q)(video) for q in (10, 50, 90)])
    assert (bits.diff(dim=0) > 0).all()


def test_descending_bits_shrinks_the_file(video):
    reward, x = Compressibility(), video[:1].clone()
    for _ in range(30):
        x = (x + 0.003 * reward_gradient(reward, x)[1].sign()).clamp(0, 1)
    payload = lambda v: len(jpeg(v[0, 0], 75)) - len(jpeg(torch.zeros(3, 48, 64), 75))
    assert payload(x) < 0.9 * payload(video)


def test_the_opposite_wish(video):
    assert torch.equal((-1 * Compressibility())(video), -Compressibility()(video))
