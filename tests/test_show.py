import numpy as np, pytest, torch
from PIL import Image
from vader_nb.core import VaderError
from vader_nb.show import curve, heatmap, keep_small, player, save_gif, save_mp4, side_by_side, strip, tile, to_uint8

clips = torch.rand(3, 5, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def test_to_uint8_rounds_clamps_and_takes_single_clips():
    x = to_uint8(clips)
    assert x.shape == (3, 5, 16, 24, 3) and x.dtype == np.uint8
    assert np.abs(x[1, 2] / 255 - clips[1, 2].permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(to_uint8(clips[0]), x[:1])
    odd = torch.tensor([-1.0, 2.0, float('nan')]).view(1, 3, 1, 1, 1).expand(1, 3, 3, 1, 1).half().requires_grad_()
    assert to_uint8(odd)[0, :, 0, 0, 0].tolist() == [0, 255, 0]
    assert to_uint8(clips[:, :, :1]).shape == x.shape
    with pytest.raises(VaderError, match='shape'):
        to_uint8(clips[0, 0])
    with pytest.raises(VaderError, match='shape'):
        to_uint8(clips.transpose(1, 2))


def test_strip_puts_each_frame_where_it_belongs():
    s = np.asarray(strip(clips, zoom=1))
    assert s.shape == (3 * 16 + 2 * 4, 5 * 24 + 4 * 2, 3)
    assert np.array_equal(s[20:36, 26:50], to_uint8(clips)[1, 1])
    titled = np.asarray(strip(clips, ['a', 'b', 'c'], zoom=1))
    assert titled.shape[0] == s.shape[0] + 3 * 20 and np.array_equal(titled[20:36], s[:16])
    assert strip(clips).height == 3 * 16 * 7 + 2 * 4  # enlarged to 112 pixels
    assert strip(torch.rand(1, 2, 3, 320, 512)).size == (2 * 256 + 2, 160)  # shrunk


def test_titles_are_counted_and_shortened():
    with pytest.raises(VaderError, match='2 titles for 3 clips'):
        strip(clips, ['a', 'b'])
    assert strip(clips[:1], 'one text').height == 16 * 7 + 20
    assert strip(clips[:1, :1], 'far too long a title for so small a frame', zoom=1).width == 24


def test_tile_fills_the_grid():
    x = tile(clips, columns=2, zoom=1)
    assert x.shape == (5, 2 * 16 + 2, 2 * 24 + 2, 3)
    assert np.array_equal(x[3, :16, 26:], to_uint8(clips)[1, 3]) and (x[:, 18:, 26:] == 255).all()


def test_gif_and_mp4_hold_every_frame(tmp_path):
    import imageio.v2 as iio

    save_gif(clips, tmp_path / 'a.gif', fps=5)
    gif = Image.open(tmp_path / 'a.gif')
    assert gif.n_frames == 5 and gif.info['duration'] == 200 and gif.info['loop'] == 0
    smooth = torch.linspace(0, 1, 35)[:, None].expand(1, 6, 3, 35, 35) * torch.linspace(0.5, 1, 6).view(6, 1, 1, 1)
    save_mp4(smooth, tmp_path / 'a.mp4')
    frames = np.stack([f for f in iio.get_reader(tmp_path / 'a.mp4')])
    assert frames.shape == (6, 106, 106, 3)  # 35*3, made even
    assert np.abs(frames[:, :105, :105].astype(float) - tile(smooth)).mean() < 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.gif', 'a.mp4']


def test_players_fall_back_to_a_picture():
    bundle = side_by_side(clips[:2], clips[:2])._repr_mimebundle_()
    assert bundle['image/jpeg'][:2] == b'\xff\xd8' and 'application/vnd.jupyter.widget-view+json' in bundle
    stack = player(clips[0], 'one').children[0]
    assert len(stack.children) == 5
    with pytest.raises(VaderError, match='one shape'):
        side_by_side(clips, clips[:1])


def test_a_notebook_keeps_one_small_picture():
    im = strip(clips)
    assert im._repr_png_() is None and im._repr_jpeg_()[:2] == b'\xff\xd8'
    assert keep_small(Image.new('RGB', (4, 4)), 'PNG')._repr_jpeg_() is None


def test_curve_draws_what_it_is_given():
    one, two = (
        np.asarray(curve([1, 2, 3])),
        np.asarray(curve(dict(a=[1, 2, 3], b=torch.tensor([3.0, 2.0, 1.0])), smooth=2, log=True)),
    )
    assert one.shape == two.shape == (300, 600, 3) and (one < 250).any() and not np.array_equal(one, two)
    assert np.asarray(curve([5.0], xs=[999], xlabel='t')).shape == one.shape


def test_running_mean():
    from vader_nb.show import _running_mean

    assert _running_mean([1, 2, 3, 6], 3).tolist() == [1, 1.5, 2, 11 / 3]


def test_heatmap_is_bright_where_the_gradient_is_large():
    grad = torch.zeros(1, 2, 3, 16, 16)
    grad[0, 1, 0, 4, 5] = -3
    h = np.asarray(heatmap(torch.zeros(1, 2, 3, 16, 16), grad, 'a'))
    bottom = h[20 + 112 + 4 + 20 :]
    y, x = np.unravel_index(bottom.sum(-1).argmax(), bottom.shape[:2])
    assert (y // 7, (x - 114) // 7) == (4, 5)
    assert np.asarray(heatmap(clips[0], clips[0] * 0)).size  # an all-zero gradient is dark, not an error
    with pytest.raises(VaderError, match='shape'):
        heatmap(clips, clips[:1])
