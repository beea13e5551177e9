"The aesthetic reward: published numbers, published layouts, preprocessing, the contract."

import os
from pathlib import Path
import numpy as np, pytest, torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from vader_nb.core import VaderError, make_generator
from vader_nb.rewards.base import check_reward, freeze, reward_from
from vader_nb.rewards import aesthetic
from vader_nb.rewards.aesthetic import Aesthetic, AestheticHead, load_aesthetic, load_head
from vader_nb.training.evaluate import fit_filter, photo_filter
from vader_nb.world.rating import rate_light
from vader_nb.world.scenes import draw, scenes
from vader_nb.rewards.views import center_crop, clip_normalise, clip_view, resize_shorter

here = Path(__file__).parent
golden = {k: torch.from_numpy(v) for k, v in np.load(here / 'data/aesthetic_golden.npz').items()}
views = {k: torch.from_numpy(v) for k, v in np.load(here / 'data/reward_preprocess_golden.npz').items()}
published = Path(os.environ.get('VADER_NB_WEIGHTS', here / 'weights')) / 'laion_aesthetic_v2_head.pth'
needs_head = pytest.mark.skipif(not published.is_file(), reason=f'the published LAION head is not at {published}')


def tiny_clip(size=32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=24,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=size,
                patch_size=8,
                projection_dim=12,
            )
        )


def tiny_head(dim=12):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AestheticHead((dim, 16, 8, 8, 4))


@pytest.fixture
def reward():
    return Aesthetic(tiny_clip(), tiny_head())


@pytest.fixture
def video():
    return torch.rand(3, 4, 3, 40, 48, generator=make_generator(5)) * 0.8 + 0.1


# The published head


@needs_head
def test_published_head_gives_the_published_scores():
    head = freeze(load_head(published))
    embed = golden['embed'].requires_grad_()
    scores = head(embed)
    assert (scores - golden['scores']).abs().max() < 1e-5
    assert ((0.1 * (scores - 10).abs()).mean() - golden['vader_loss_target10_scale0p1']).abs() < 1e-6
    (grad,) = torch.autograd.grad(scores[0], embed)
    assert (grad[0] - golden['grad_embed_row0']).abs().max() < 1e-4


@needs_head
def test_published_head_is_one_vector():
    head = freeze(load_head(published).double())
    b = head(torch.zeros(1, 768).double())
    w = head(torch.eye(768).double()) - b
    assert (w - golden['grad_embed_row0']).abs().max() < 1e-4
    assert (golden['embed'].double() @ w + b - golden['scores']).abs().max() < 1e-5


def test_golden_scores_lie_on_one_straight_line():
    "Without the weights: the gradient w of one score explains the differences of all."
    w, e, s = golden['grad_embed_row0'].double(), golden['embed'].double(), golden['scores'].double()
    assert ((s - s[0]) - (e - e[0]) @ w).abs().max() < 1e-5


def test_head_layout():
    "Keys and shapes of the published file, on the meta device."
    with torch.device('meta'):
        head = AestheticHead()
    widths = [768, 1024, 128, 64, 16, 1]
    shapes = {
        f'layers.{i}.{k}': s
        for i, n, m in zip((0, 2, 4, 6, 7), widths, widths[1:])
        for k, s in (('weight', (m, n)), ('bias', (m,)))
    }
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == shapes
    assert sum(p.numel() for p in head.parameters()) == 927969


def test_full_size_clip_layout():
    "The image half of openai/clip-vit-large-patch14: what we build has the names and shapes that its file holds."
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        projection_dim=768,
    )
    with torch.device('meta'):
        clip = Aesthetic(CLIPVisionModelWithProjection(config), AestheticHead()).clip
    have = {k: tuple(v.shape) for k, v in clip.state_dict().items()}
    v = 'vision_model.'
    want = {
        v + 'embeddings.class_embedding': (1024,),
        v + 'embeddings.patch_embedding.weight': (1024, 3, 14, 14),
        v + 'embeddings.position_embedding.weight': (257, 1024),
        'visual_projection.weight': (768, 1024),
    }
    norms = ['pre_layrnorm', 'post_layernorm'] + [
        f'encoder.layers.{i}.layer_norm{j}' for i in range(24) for j in (1, 2)
    ]
    want |= {f'{v}{n}.{k}': (1024,) for n in norms for k in ('weight', 'bias')}
    for i in range(24):
        shapes = {f'self_attn.{p}_proj': (1024, 1024) for p in ('q', 'k', 'v', 'out')} | {
            'mlp.fc1': (4096, 1024),
            'mlp.fc2': (1024, 4096),
        }
        for n, s in shapes.items():
            want |= {f'{v}encoder.layers.{i}.{n}.weight': s, f'{v}encoder.layers.{i}.{n}.bias': s[:1]}
    assert have == want and sum(np.prod(s) for s in want.values()) == 303966208


# Preprocessing


def test_view_is_the_published_shorter_side_and_crop():
    "PickScore's published preprocessing is CLIP's own: bicubic, antialiased, long side rounded down, centre crop."
    x = (views['vader_frame'] / 2 + 0.5).clamp(0, 1)
    assert tuple(resize_shorter(x, 224).shape[-2:]) == tuple(views['resize_hw'].tolist())
    ours = clip_view(x, 224)[..., ::7, ::7]
    assert (ours - views['vader_pickscore']).abs().max() < 1e-4


@pytest.mark.parametrize('h, w', [(64, 64), (40, 64), (97, 61), (32, 57), (300, 224)])
def test_view_is_what_the_clip_processor_makes(h, w):
    "On whole-numbered pixels, up to the processor's rounding to 1/255 after the resize."
    u8 = torch.rand(3, 9, 9, generator=make_generator(h)) * 255
    u8 = F.interpolate(u8[None], (h, w), mode='bilinear')[0].byte()
    theirs = CLIPImageProcessor(size={'shortest_edge': 32}, crop_size={'height': 32, 'width': 32})(
        u8, return_tensors='pt'
    ).pixel_values
    assert (clip_view(u8[None] / 255, 32) - theirs).abs().max() < 1.1 / 255 / 0.26


def test_view_of_a_square_of_the_right_size_is_untouched():
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(clip_view(x, 32), clip_normalise(x))


def test_every_pixel_of_a_square_gets_a_gradient():
    x = torch.rand(1, 3, 256, 256, requires_grad=True)
    clip_view(x, 32).square().sum().backward()
    assert (x.grad != 0).float().mean() > 0.99


def test_center_crop():
    assert center_crop(torch.arange(7.0).expand(1, 3, 4, 7), 4)[0, 0, 0].tolist() == [1, 2, 3, 4]


# The reward


def test_contract(reward, video):
    check_reward(reward, video)


def test_sum_passes_the_contract(reward, video):
    check_reward(2 * reward + reward_from(lambda v, p: v.mean((1, 2, 3, 4)), 'bright'), video)


def test_embedding_is_clips_own(reward, video):
    "The same as transformers' two-tower `CLIPModel` gives, brought to unit length."
    model = CLIPModel(
        CLIPConfig(
            vision_config=reward.clip.config.to_dict(),
            text_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
            projection_dim=12,
        )
    ).eval()
    model.load_state_dict(reward.clip.state_dict(), strict=False)
    theirs = model.get_image_features(clip_view(video[0], 32)).pooler_output
    assert torch.allclose(reward.embed(video[0]), F.normalize(theirs, dim=1), atol=1e-6)


def test_weights_are_frozen_and_dropout_is_off(reward, video):
    assert not any(p.requires_grad for p in reward.parameters()) and not any(
        m.training for m in (*reward.clip.modules(), *reward.head.modules())
    )
    assert torch.equal(reward(video), reward(video))


def test_half_precision_tower_rates_in_float32(reward, video):
    scores = reward(video)
    reward.clip.to(torch.bfloat16)
    half = reward(video)
    assert half.dtype == torch.float32 and (half - scores).abs().max() < 0.05


def test_head_must_fit_the_tower():
    with pytest.raises(VaderError, match='embeddings of 9 numbers.*makes 12'):
        Aesthetic(tiny_clip(), tiny_head(9))


# Loading


@pytest.mark.parametrize('kind', ['pth', 'safetensors'])
def test_load_from_published_layout(kind, tmp_path, monkeypatch, capfd, reward, video):
    from safetensors.torch import load_file, save_file

    clip = CLIPModel(
        CLIPConfig(
            vision_config=reward.clip.config.to_dict(),
            text_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
            projection_dim=12,
        )
    )
    clip.load_state_dict(reward.clip.state_dict(), strict=False)
    clip.save_pretrained(tmp_path / 'clip')
    file = tmp_path / 'clip/model.safetensors'  # OpenAI's file is from a time when position_ids were saved too
    save_file(
        load_file(file) | {'vision_model.embeddings.position_ids': torch.arange(17)[None]},
        file,
        metadata={'format': 'pt'},
    )
    (tmp_path / 'aesthetic').mkdir()
    (torch.save if kind == 'pth' else save_file)(reward.head.state_dict(), tmp_path / f'aesthetic/head.{kind}')
    monkeypatch.setattr(aesthetic, 'model_path', lambda name, scale: tmp_path / name)
    for scale in ('small', 'full'):
        assert torch.allclose(load_aesthetic(scale, 'cpu')(video), reward(video), atol=1e-5)
    assert 'UNEXPECTED' not in ''.join(capfd.readouterr())


def test_bad_heads(tmp_path):
    (tmp_path / 'cut.pth').write_bytes(b'no weights')
    torch.save({'layers.0.weight': torch.zeros(2, 2)}, tmp_path / 'other.pth')

    class Evil:
        def __reduce__(self):
            return (print, ('code from a checkpoint',))

    torch.save(Evil(), tmp_path / 'evil.pth')
    for name, words in [
        ('cut', 'no readable'),
        ('other', 'not an aesthetic head'),
        ('evil', 'no readable'),
        ('gone', 'no readable'),
    ]:
        with pytest.raises(VaderError, match=words) as e:
            load_head(tmp_path / f'{name}.pth')
        assert '\n' not in str(e.value)


# The reward of light


def test_the_reward_of_light_follows_its_rule():
    s = scenes(60, 78, 'any', light=torch.linspace(0, 1, 60))
    video = draw(s, torch.tensor([3.0]))
    light = aesthetic.load_light('cpu')
    assert light.name == 'light' and torch.corrcoef(torch.stack([light(video), rate_light(video)]))[0, 1] > 0.85
    check_reward(light, video[:3])


def test_a_filter_gains_little_by_the_reward_of_light():
    dull, sunlit = [draw(scenes(24, 6, grade), torch.tensor([3.0])) for grade in ('dull', 'sunlit')]
    light = aesthetic.load_light('cpu')
    with torch.no_grad():
        gain = light(photo_filter(dull, fit_filter(light, dull, 30, 3))).mean() - light(dull).mean()
        assert gain < (light(sunlit).mean() - light(dull).mean()) / 2.5
