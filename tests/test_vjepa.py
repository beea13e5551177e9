"V-JEPA: the authors' numbers, the published layout, masks, the reward's contract, V-JEPA 2, the small checkpoint."

import json, math, zlib
from pathlib import Path
import numpy as np, pytest, torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from vader_nb.core import VaderError, make_generator
from vader_nb.nets import vjepa as nets
from vader_nb.nets.vjepa import (
    MASKS,
    VJepa,
    VJepaConfig,
    block_mask,
    block_size,
    draw_masks,
    half_masks,
    load_vjepa_net,
    masked_error,
    position_table,
    save_vjepa_net,
    stretch,
    take,
)
from vader_nb.rewards.base import check_reward, reward_gradient
from vader_nb.rewards.vjepa import DISTURBANCES, VJepa2, VJepaReward, disturbed, load_vjepa, vjepa_view, windows
from vader_nb.rewards.views import imagenet_normalise
from vader_nb.world.scenes import draw, scenes
from vader_nb.zoo import card, model_path

here = Path(__file__).parent / 'data'
golden = {k: torch.from_numpy(v) for k, v in np.load(here / 'vjepa.npz').items()}
facts = json.loads((here / 'vjepa.json').read_text())
TINY = VJepaConfig(
    size=32, frames=8, patch=8, tubelet=2, dim=64, depth=3, heads=4, pred_dim=32, pred_depth=2, pred_heads=4
)

# The authors' network


def weights(key, shape):
    "Weights of the reference, made from their names."
    z = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape, dtype=np.float32)
    z = (
        z * np.float32(1 / np.sqrt(np.prod(shape[1:])))
        if len(shape) > 1
        else 0.1 * z + (1 if key.endswith('weight') else 0)
    )
    return torch.from_numpy(z.astype(np.float32))


def published(net):
    "The weights of the reference in the layout of the published file."
    name = lambda k: 'module.backbone.' + k
    return {
        part: {
            name(k): v if 'pos_embed' in k else weights(f'{part}.{name(k)}', tuple(v.shape))
            for k, v in getattr(net, part).state_dict().items()
        }
        for part in nets.PARTS
    }


@pytest.fixture(scope='module')
def net():
    net = VJepa(TINY)
    for part, state in published(net).items():
        getattr(net, part).load_state_dict({k.removeprefix('module.backbone.'): v for k, v in state.items()})
    return net.eval().requires_grad_(False)


@pytest.fixture(scope='module')
def inputs():
    "The reference's clips and masks, which are per clip."
    draw = np.random.Generator(np.random.PCG64(0))
    clips, other = [
        torch.from_numpy(draw.standard_normal(s, dtype=np.float32)) for s in ((2, 3, 8, 32, 32), (1, 3, 8, 48, 32))
    ]
    return clips, other, [(golden[f'masks_enc_{i}'].long(), golden[f'masks_pred_{i}'].long()) for i in range(2)]


def near(a, b):
    return (a - b).abs().max() < 1e-5 * max(1, b.abs().max())


def test_features_are_the_authors(net, inputs):
    clips, _, masks = inputs
    assert near(net.encoder(clips)[..., ::4], golden['encoder_nomask'])
    assert near(net.encoder.patch_embed.proj(clips).flatten(2).transpose(1, 2)[..., ::4], golden['patch_embed'])
    assert near(net.targets(clips)[..., ::4], golden['target_full_layernorm'])
    for i, (visible, hidden) in enumerate(masks):
        assert near(net.encoder(clips, visible)[..., ::4], golden[f'ctx_{i}'])
        assert near(net.predict(clips, visible, hidden, i)[..., ::4], golden[f'z_pred_{i}'])


def test_other_sizes_are_the_authors(net, inputs):
    assert near(net.encoder(inputs[1])[..., ::4], golden['encoder_48x32'])


@pytest.mark.parametrize('through_target, name', [(False, 'grad_clips'), (True, 'grad_clips_with_target_grad')])
def test_loss_and_gradient_are_the_authors(net, inputs, through_target, name):
    clips = inputs[0].clone().requires_grad_()
    target = net.targets(clips)
    loss = masked_error(net, clips, inputs[2], target if through_target else target.detach()).mean()
    assert abs(loss.item() - golden['loss'].item()) < 1e-6
    (grad,) = torch.autograd.grad(loss, clips)
    assert (grad[..., ::4, ::4] - golden[name]).abs().max() < 1e-4 * golden[name].abs().max()


def test_positions_are_the_authors():
    for dim in (1024, 384):
        assert torch.equal(position_table((8, 14, 14), dim)[0, golden['rows'].long()], golden[f'rows_{dim}'])
    assert torch.equal(position_table(TINY.grid, 64)[..., ::4], golden['pos_embed'])
    assert torch.equal(position_table(TINY.grid, 32)[..., ::4], golden['predictor_pos_embed'])


def test_full_size_layout():
    "Every key and shape of vitl16.pth.tar, on the meta device."
    with torch.device('meta'):
        full = VJepa(VJepaConfig())
    for part, shapes in facts['shapes'].items():
        state = getattr(full, part).state_dict()
        assert {f'module.backbone.{k}': list(v.shape) for k, v in state.items()} == shapes
    count = lambda m: sum(v.numel() for v in m.state_dict().values())
    assert (count(full.encoder), count(full.predictor)) == (305490944, 22685056)


# Masks


def test_block_sizes_are_the_authors():
    for (share, _), sizes in zip(MASKS, facts['block_sizes']):
        assert [list(block_size((8, 14, 14), share, make_generator(i))) for i in range(20)] == sizes


def test_masks_are_the_authors():
    "Three batches of four clips from the published seed, cut to the shortest of a batch as the published loader does."
    g, grid = make_generator(234), (8, 14, 14)
    for i in range(3):
        for k, (share, blocks) in enumerate(MASKS):
            ours = [block_mask(grid, block_size(grid, share, make_generator(i)), blocks, g) for _ in range(4)]
            for part, name in zip(zip(*ours), ('enc', 'pred')):
                assert torch.equal(
                    torch.stack([m[: min(map(len, part))] for m in part]), golden[f'it{i}_gen{k}_{name}'].long()
                )


@pytest.mark.parametrize('grid', [(4, 8, 8), (8, 14, 14), (1, 3, 3), (4, 4, 6)])
def test_masks_share_out_all_tokens(grid):
    g = make_generator(0)
    for visible, hidden in [m for _ in range(50) for m in draw_masks(grid, g)]:
        assert len(visible) and len(hidden)
        assert torch.cat([visible, hidden]).sort().values.tolist() == list(range(math.prod(grid)))
        frame = torch.zeros(grid).flatten().index_fill(0, hidden, 1).view(grid)
        assert (frame == frame[:1]).all(), 'blocks last for the whole clip'


@pytest.mark.parametrize('context, times', [(1.0, 4), (0.75, 3), (0.5, 2), (0.1, 1)])
def test_context_from_the_first_frames(context, times):
    "The same blocks; all that comes later is hidden as well."
    for (v, h), (seen, _) in zip(
        draw_masks((4, 8, 8), make_generator(3), context), draw_masks((4, 8, 8), make_generator(3))
    ):
        assert torch.equal(v, seen[seen < times * 64])
        assert torch.cat([v, h]).sort().values.tolist() == list(range(256))


def test_an_empty_context_is_drawn_again():
    "Two blocks of 8 x 6 cover a frame of 8 x 8 every ninth or so time."
    for seed in range(60):
        assert len(block_mask((1, 8, 8), (8, 6), 2, make_generator(seed))[0])


def test_too_small_for_masks():
    with pytest.raises(VaderError, match='2 x 2 tokens is too small'):
        draw_masks((4, 2, 2), make_generator(0))


@pytest.mark.parametrize('times', [2, 4, 7])
def test_halves_of_a_clip(times):
    (visible, hidden), back = half_masks((times, 3, 3))
    assert torch.equal(back[0], hidden) and torch.equal(back[1], visible)
    assert visible.tolist() == list(range(times // 2 * 9)) and hidden.tolist() == list(range(times // 2 * 9, times * 9))


def test_one_token_along_time_has_no_halves():
    with pytest.raises(VaderError, match='no halves'):
        half_masks((1, 8, 8))


# Pieces


def test_stretch_to_the_same_grid_changes_nothing():
    table = position_table((2, 3, 4), 12)
    assert stretch(table, (2, 3, 4), (2, 3, 4)) is table
    assert torch.allclose(stretch(torch.full_like(table, 2.0), (2, 3, 4), (4, 6, 5)), torch.tensor(2.0))


def test_take_one_list_or_one_for_each():
    x, i = torch.rand(2, 5, 3), torch.tensor([3, 0])
    assert torch.equal(take(x, i), take(x, i.expand(2, -1)))


def test_windows_cover_every_frame():
    for f in (8, 9, 16, 20, 24, 31):
        pieces = windows(torch.arange(f).view(1, f, 1, 1, 1), 8)[0, :, :, 0, 0, 0]
        assert set(pieces.flatten().tolist()) == set(range(f)) and len(pieces) == -(-f // 8)
        assert (pieces.diff(dim=1) == 1).all(), 'a piece is consecutive'


def test_view_is_normalised_like_imagenet():
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 1, 3, 1, 1).expand(1, 2, 3, 32, 32)
    assert vjepa_view(mean, 32).abs().max() < 1e-6 and vjepa_view(mean, 32).shape == (1, 3, 2, 32, 32)
    x = torch.rand(4, 3, 9, 9)
    assert torch.allclose(imagenet_normalise(x)[:, 2], (x[:, 2] - 0.406) / 0.225)


# The reward


@pytest.fixture
def video():
    return torch.rand(3, 8, 3, 40, 48, generator=make_generator(5)) * 0.8 + 0.1


def test_contract(net, video):
    check_reward(VJepaReward(net), video)


def test_score_is_minus_the_loss(net, video):
    reward = VJepaReward(net, draws=1)
    masks = draw_masks(TINY.grid, make_generator(7))
    x = vjepa_view(video, 32)
    loss = torch.stack(
        [
            (net.predict(x, v, h, i) - F.layer_norm(net.target_encoder(x), [64])[:, h]).abs().mean((1, 2))
            for i, (v, h) in enumerate(masks)
        ]
    ).mean(0)
    assert torch.allclose(reward(video, generator=make_generator(7)), -loss, atol=1e-6)


def test_draws_average_over_masks_from_the_generator(net, video):
    g = make_generator(3)
    singles = torch.stack([VJepaReward(net, draws=1)(video, generator=g) for _ in range(3)])
    assert singles.std(0).min() > 0
    assert torch.allclose(VJepaReward(net, draws=3)(video, generator=make_generator(3)), singles.mean(0), atol=1e-6)


def test_a_context_of_the_first_frames_sees_no_others(net, video):
    "With the target held fixed, only the pixels of the first half have a gradient."
    slope = reward_gradient(VJepaReward(net, through_target=False, context=0.5), video)[1]
    assert (slope[:, 4:] == 0).all() and slope[:, :4].abs().amax() > 0
    check_reward(VJepaReward(net, context=0.5), video)


def test_each_half_from_the_other(net, video):
    """Nothing is drawn: the mean of two errors, that of the second half guessed from the first and the reverse; each
    pixel has a gradient, with the target held fixed too.
    """
    reward, x = VJepaReward(net, halves=True), vjepa_view(video, 32)
    first, second = torch.arange(64).split(32)
    error = lambda visible, hidden, kind: (
        (net.predict(x, visible, hidden, kind) - net.targets(x)[:, hidden]).abs().mean((1, 2))
    )
    assert torch.allclose(reward(video), -(error(first, second, 0) + error(second, first, 1)) / 2, atol=1e-6)
    assert torch.equal(reward(video), reward(video, generator=make_generator(9)))
    slope = reward_gradient(VJepaReward(net, through_target=False, halves=True), video)[1]
    assert (slope.abs().flatten(2).amax(2) > 0).all()
    check_reward(reward, video)


def test_without_a_generator_always_the_same_masks(net, video):
    reward = VJepaReward(net)
    assert torch.equal(reward(video), reward(video)) and not torch.equal(
        reward(video), reward(video, generator=make_generator(9))
    )


def test_the_target_may_be_held_fixed(net, video):
    "The same score, another gradient; held fixed it is not the score's own slope, and the contract test notices."
    (s1, g1), (s2, g2) = [reward_gradient(VJepaReward(net, through_target=t), video) for t in (True, False)]
    assert torch.allclose(s1, s2) and (g1 - g2).norm() > 0.1 * g1.norm()
    with pytest.raises(VaderError, match='disagrees with finite differences'):
        check_reward(VJepaReward(net, through_target=False), video)


def test_a_long_clip_scores_the_mean_of_its_pieces(net):
    video = torch.rand(2, 16, 3, 32, 32, generator=make_generator(1))
    reward = VJepaReward(net)
    assert torch.allclose(reward(video), (reward(video[:, :8]) + reward(video[:, 8:])) / 2, atol=1e-6)
    assert (reward_gradient(reward, video[:, :13])[1].flatten(2).norm(dim=2) > 0).all(), 'every frame gets a gradient'


def test_weights_are_frozen(net, video):
    assert not any(p.requires_grad for p in VJepaReward(net).parameters())


def test_bad_input(net, video):
    reward = VJepaReward(net)
    with pytest.raises(VaderError, match='at least 8 frames, not 7'):
        reward(video[:, :7])
    with pytest.raises(VaderError, match='draws must be at least 1'):
        VJepaReward(net, draws=0)
    for context in (0, 1.5):
        with pytest.raises(VaderError, match='context must be a share'):
            VJepaReward(net, context=context)
    with pytest.raises(VaderError, match='not finite'):
        reward(video * float('nan'))


# Files


def test_load_the_published_layout(net, tmp_path, monkeypatch, video):
    path = tmp_path / 'vitl16.pth.tar'
    torch.save(published(net) | dict(epoch=300, opt=dict(state={}), loss=0.1), path)
    monkeypatch.setattr(nets, 'VJepaConfig', lambda: TINY)
    mine = load_vjepa_net(path)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in mine.state_dict().items())
    assert torch.equal(load_vjepa('full', 'cpu', path=path)(video), VJepaReward(net)(video))


def test_save_and_load(net, tmp_path):
    save_vjepa_net(net, tmp_path, torch.float32)
    mine = load_vjepa_net(tmp_path)
    assert mine.config == TINY and all(torch.equal(v, net.state_dict()[k]) for k, v in mine.state_dict().items())


def test_bad_files(net, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ('code from a checkpoint',))

    (tmp_path / 'cut').write_bytes(b'no weights')
    torch.save(Evil(), tmp_path / 'evil')
    (tmp_path / 'empty').write_bytes(b'')
    torch.save(dict(encoder={}), tmp_path / 'other')
    for name, words in [
        ('cut', 'no readable'),
        ('empty', 'no readable'),
        ('evil', 'no readable'),
        ('gone', 'no readable'),
        ('other', 'must hold encoder'),
    ]:
        with pytest.raises(VaderError, match=words) as e:
            load_vjepa_net(tmp_path / name)
        assert '\n' not in str(e.value)
    save_vjepa_net(net, tmp_path / 'half')
    file = tmp_path / 'half' / 'model.safetensors'
    save_file({k: v for k, v in load_file(file).items() if k != 'encoder.norm.bias'}, file)
    with pytest.raises(VaderError, match=r'1 missing \(encoder.norm.bias\)'):
        load_vjepa_net(tmp_path / 'half')
    with pytest.raises(VaderError, match='path= is for version 1'):
        load_vjepa('full', 'cpu', version=2, path=tmp_path / 'half')


# V-JEPA 2


@pytest.fixture(scope='module')
def two():
    from transformers import VJEPA2Config, VJEPA2Model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        c = VJEPA2Config(
            patch_size=8,
            crop_size=32,
            frames_per_clip=8,
            tubelet_size=2,
            hidden_size=48,
            num_attention_heads=2,
            num_hidden_layers=2,
            pred_hidden_size=48,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=2,
            pred_num_mask_tokens=2,
        )
        return VJEPA2Model(c).eval()


def test_two_is_the_librarys_where_nothing_is_hidden(two, video):
    net, x, every, hidden = VJepa2(two, 8), vjepa_view(video, 32), torch.arange(64), torch.arange(5, 40, 3)
    theirs = two(x.transpose(1, 2), [every.expand(3, -1)], [hidden.expand(3, -1)])
    assert torch.allclose(net.predict(x, every, hidden), theirs.predictor_output.last_hidden_state, atol=1e-5)
    assert torch.allclose(net.targets(x), F.layer_norm(theirs.last_hidden_state, [48]), atol=1e-5)


def test_two_cannot_see_what_is_hidden(two, video):
    "The library encodes the whole clip before it masks; we mask first, as in training."
    x = vjepa_view(video, 32).requires_grad_()
    visible, hidden = draw_masks((4, 4, 4), make_generator(0))[1]
    (grad,) = torch.autograd.grad(VJepa2(two, 8).predict(x, visible, hidden).square().sum(), x)
    seen = torch.zeros(64).index_fill(0, visible, 1).view(4, 4, 4)
    by_token = grad.abs().sum((0, 1)).view(4, 2, 4, 8, 4, 8).sum((1, 3, 5))
    assert (by_token[seen == 0] == 0).all() and (by_token[seen == 1] > 0).all()


def test_two_passes_the_contract(two, video):
    check_reward(VJepaReward(VJepa2(two, 8)), video)


def test_two_guesses_each_half_from_the_other(two, video):
    net, x, (first, second) = VJepa2(two, 8), vjepa_view(video, 32), torch.arange(64).split(32)
    error = lambda visible, hidden: (net.predict(x, visible, hidden) - net.targets(x)[:, hidden]).abs().mean((1, 2))
    assert torch.allclose(
        VJepaReward(net, halves=True)(video), -(error(first, second) + error(second, first)) / 2, atol=1e-6
    )


# The small checkpoint


def test_an_unknown_disturbance():
    with pytest.raises(VaderError, match="unknown disturbance 'slow'"):
        disturbed('slow', scenes(1), make_generator(0))


def test_disturbances_disturb():
    s = scenes(3, 0, 'any')
    for kind in DISTURBANCES:
        x = disturbed(kind, s, make_generator(1))
        assert (
            x.shape == (3, 8, 3, 64, 64)
            and (0 <= x).all()
            and (x <= 1).all()
            and (x - draw(s)).abs().amax((1, 2, 3, 4)).min() > 0.05
        )


def share_above(kind, reward, s):
    "How often do the scenes score above their disturbed version?"
    with torch.no_grad():
        return (reward(draw(s)) > reward(disturbed(kind, s, make_generator(1)))).float().mean().item()


def test_small_notices_what_is_disturbed():
    """Wrong order and another animal, asked for each half of a clip; the masks mind the order only. The card tells the
    shares over more scenes.
    """
    s, masks, halves = scenes(40, 77, 'any'), load_vjepa('small', 'cpu'), load_vjepa('small', 'cpu', halves=True)
    assert (
        min(share_above('shuffled', masks, s), share_above('shuffled', halves, s), share_above('morphing', halves, s))
        >= 0.9
    )
    assert {f'a clip scores above its {k} version, of 300' for k in DISTURBANCES} == set(card('vjepa')['quality'])


def test_small_has_not_collapsed():
    "Features of one place differ from clip to clip, and a prediction beats the best constant for that place."
    reward = load_vjepa('small', 'cpu')
    x = vjepa_view(draw(scenes(16, 5, 'any')), 64)
    with torch.no_grad():
        target = reward.net.targets(x)
        constant = (target - target.median(0).values).abs().mean()
        assert target.std(0).mean() > 0.15
        assert masked_error(reward.net, x, reward.masks(), target).mean() < constant
    assert sum(f.stat().st_size for f in model_path('vjepa').iterdir()) < 3e6
