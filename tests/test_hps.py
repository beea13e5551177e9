"""HPSv2: the authors' numbers and layouts, their preprocessing, prompts read once, the contract, and what the small one
learnt.
"""

import json, zlib
from pathlib import Path
import numpy as np, pytest, torch
import torch.nn.functional as F
from open_clip import CLIP, get_model_config, get_tokenizer
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from tiny_models import tiny_tokenizer
from vader_nb.core import VaderError, make_generator
from vader_nb.memory.checkpointing import checkpoint_reward
from vader_nb.pretrain import hps as pretrain
from vader_nb.rewards.base import check_reward, reward_gradient
from vader_nb.rewards import hps
from vader_nb.rewards.aesthetic import load_aesthetic
from vader_nb.rewards.hps import HPS, load_hps, open_clip_ids, open_clip_net, pad_view, square_view
from vader_nb.rewards.text_match import token_ids
from vader_nb.rewards.views import clip_normalise
from vader_nb.world.rating import CORRUPTIONS, corrupt
from vader_nb.world.captions import captions
from vader_nb.world.scenes import draw, scenes

here = Path(__file__).parent
golden = {k: torch.from_numpy(v) for k, v in np.load(here / 'data/hpsv2_golden.npz').items()}
views = {k: torch.from_numpy(v) for k, v in np.load(here / 'data/reward_preprocess_golden.npz').items()}
PROMPTS = ['a fox riding bike', 'a panda with hat', 'dog washing dishes']


def tiny_config(size=32, tokens=12, vocab=200, **text):  # two layers a half of ViT-H-14's kind, not quick_gelu
    return dict(
        embed_dim=16,
        vision_cfg=dict(image_size=size, layers=2, width=24, head_width=12, patch_size=8),
        text_cfg=dict(context_length=tokens, vocab_size=vocab, width=16, heads=2, layers=2, **text),
    )


def tiny_clip(**how):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIP(**tiny_config(**how))


def reading(tokenizer):
    return lambda prompts: token_ids(tokenizer, prompts)


@pytest.fixture
def reward():
    return HPS(tiny_clip(pool_type='eos', eos_id=1), reading(tiny_tokenizer()))


@pytest.fixture
def video():
    return torch.rand(3, 2, 3, 32, 40, generator=make_generator(5)) * 0.8 + 0.1


@pytest.fixture(scope='module')
def small():
    return load_hps('small', 'cpu')


# The authors' code


def golden_weights(key, shape):
    "The weights that the authors' network had when the reference was made, by the rule of the reference."
    z = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return torch.from_numpy(z * np.float32(1 / np.sqrt(np.prod(shape[1:]))))
    return torch.from_numpy(1 + np.float32(0.1) * z if key.endswith('weight') else np.float32(0.1) * z)


@pytest.fixture(scope='module')
def authors():
    "Our reward with the reference's weights; its prompts are the numbers of the reference's rows of tokens."
    config = dict(
        embed_dim=32,
        vision_cfg=dict(image_size=56, layers=2, width=48, head_width=12, patch_size=14),
        text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=4, layers=2),
    )
    with torch.device('meta'):
        shapes = {k: v.shape for k, v in CLIP(**config).state_dict().items()}
    weights = {k: golden_weights(k, s) if s else golden['logit_scale_exp'].log() for k, s in shapes.items()}
    return HPS(
        open_clip_net(config, weights),
        lambda prompts: golden['tokens'][[int(p) for p in prompts]],
        view=lambda frames, size: frames,
    )


def test_equal_to_the_authors_network(authors):
    assert (authors.images(golden['image']) - golden['image_features']).abs().max() < 1e-5
    assert (authors.texts('012') - golden['text_features']).abs().max() < 1e-5
    assert (authors.images(golden['image']) @ authors.texts('012').T - golden['logits']).abs().max() < 1e-5


def test_equal_to_the_authors_score_and_gradient(authors):
    frames = golden['image'].clone().requires_grad_()
    scores = authors.score(frames[:, None], list('012'), None)
    assert (scores - golden['scores']).abs().max() < 1e-5
    loss = 1 - scores.mean()
    assert (loss - golden['loss_1_minus_score_mean']).abs() < 1e-5
    (grad,) = torch.autograd.grad(loss, frames)
    assert (grad - golden['grad_image']).abs().max() < 1e-4 * golden['grad_image'].abs().max()


def test_each_frame_meets_its_own_clips_prompt(authors):
    "Row i of the reference's table is picture i with every text; a clip of two pictures has their mean."
    clip = golden['image'][[0, 2]][None]
    for prompt in '012':
        want = golden['logits'][[0, 2], int(prompt)].mean()
        assert (authors.score(clip, [prompt], None)[0] - want).abs() < 1e-5


def layout(name):
    "Names and shapes of all weights of a published network, the numbered layers written out; its number of weights."
    o = json.loads((here / f'data/{name}_layout.json').read_text())
    return {k.replace('*', str(i)): tuple(s) for k, (n, s) in o['layout'].items() for i in range(n)}, o


def test_full_size_layout():
    want, o = layout('hpsv2_vith14')
    config = get_model_config('ViT-H-14')
    with torch.device('meta'):
        clip = HPS(CLIP(**config), None).clip
    assert {k: tuple(v.shape) for k, v in clip.state_dict().items()} == want
    assert (
        config['embed_dim'] == o['config']['embed_dim']
        and sum(p.numel() for p in clip.parameters()) == o['parameters'] == 986109441
    )
    assert all(config[k].items() <= o['config'][k].items() for k in ('vision_cfg', 'text_cfg'))


def test_full_tokens_are_the_reference_s_words():
    "Start, end and padding marks as in the reference's rows."
    ids = open_clip_ids(get_tokenizer('ViT-H-14'), ['a fox riding a bike'])
    assert ids.shape == (1, golden['tokens'].shape[1]) and ids[0, 0] == golden['tokens'][0, 0] == 49406
    assert (ids == 49407).sum() == (golden['tokens'][0] == 49407).sum() == 1 and ids[0, -1] == golden['tokens'][
        0, -1
    ] == 0


# What it sees


def test_pad_view_is_the_published_preprocessing():
    ours = pad_view(views['image_u8'].permute(2, 0, 1)[None] / 255, 224)
    assert (ours[0, :, ::7, ::7] - views['hps_preprocess_val']).abs().max() < 1e-4
    black = clip_normalise(torch.zeros(1, 3, 1, 1))
    assert (ours == black).all(1).all(2).sum() == 224 - round(64 * 224 / 96)


def test_square_view_is_what_vaders_authors_do():
    ours = square_view((views['vader_frame'] / 2 + 0.5).clamp(0, 1), 224)
    assert (ours[..., ::7, ::7] - views['vader_hps_aesthetic']).abs().max() < 1e-4


@pytest.mark.parametrize('h, w', [(64, 64), (40, 64), (97, 61), (20, 57), (300, 224), (32, 32)])
def test_pad_view_is_torchvisions_resize_and_pad(h, w):
    x, k = torch.rand(1, 3, h, w, generator=make_generator(h)), 32 / max(h, w)
    y = tv.resize(x, [round(h * k), round(w * k)], InterpolationMode.BICUBIC, antialias=True)
    dh, dw = [32 - n for n in y.shape[-2:]]
    theirs = tv.pad(y, [dw // 2, dh // 2, dw - dw // 2, dh - dh // 2])
    assert (pad_view(x, 32) - clip_normalise(theirs)).abs().max() < 1e-5


@pytest.mark.parametrize('view', [pad_view, square_view])
def test_every_pixel_is_watched(view):
    x = torch.rand(1, 3, 50, 80, generator=make_generator(0), requires_grad=True)
    view(x, 32).square().sum().backward()
    assert (x.grad.abs().amax(1) > 0).float().mean() > 0.99


# The contract


@pytest.mark.parametrize('view', [pad_view, square_view])
def test_contract_of_the_published_layout(view, video):
    check_reward(HPS(tiny_clip(), reading(tiny_tokenizer()), view), video, PROMPTS)


def test_contract_of_the_small_one(small):
    s = scenes(3, 1, 'any', hat=1)
    check_reward(small, draw(s, 2), captions(s))


def test_with_the_aesthetic_reward(small):
    s = scenes(2, 3, 'any', hat=1)
    both = load_aesthetic('small', 'cpu') + 10 * small
    check_reward(both, draw(s, 2), captions(s))
    parts = both.parts(draw(s, 2), captions(s))
    assert list(parts) == ['aesthetic', 'hps'] and torch.equal(
        both.combine(parts), parts['aesthetic'] + 10 * parts['hps']
    )


@pytest.mark.parametrize(
    'video, prompts, words',
    [
        (torch.rand(2, 1, 3, 32, 32), None, 'pass prompts'),
        (torch.rand(2, 1, 3, 32, 32), ['a fox'], '2 videos need 2 prompts'),
        (torch.rand(2, 1, 3, 32, 32), 'a fox', 'not a single string'),
        (torch.rand(1, 1, 3, 32, 32), ['a zebra'], r"unknown|does not know the words \['zebra'\]"),
        (torch.rand(1, 1, 3, 32, 32), ['a fox ' * 9], 'shorten it'),
        (torch.full((1, 1, 3, 32, 32), torch.nan), ['a fox'], 'not finite'),
        (torch.rand(1, 3, 32, 32), ['a fox'], 'shape'),
        (torch.zeros(1, 1, 3, 32, 32, dtype=torch.uint8), ['a fox'], 'float tensor'),
    ],
)
def test_bad_input(reward, video, prompts, words):
    with pytest.raises(VaderError, match=words) as e:
        reward(video, prompts)
    assert '\n' not in str(e.value)


def test_a_long_prompt_at_full_scale():
    tokenizer = get_tokenizer('ViT-H-14')
    assert open_clip_ids(tokenizer, ['fox ' * 75]).shape == (1, 77)
    with pytest.raises(VaderError, match='takes 78 tokens.*reads 77: shorten it'):
        open_clip_ids(tokenizer, ['fox ' * 76])


# Prompts are read once


def test_each_prompt_is_read_once(reward, video):
    asked, read = [], reward.ids
    reward.ids = lambda prompts: asked.extend(prompts) or read(prompts)
    for _ in range(2):
        reward(video, [PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert asked == PROMPTS[:2]
    reward(video, PROMPTS)
    assert asked == PROMPTS


def test_what_was_read_does_not_depend_on_the_company(reward):
    together = reward.texts(PROMPTS)
    fresh = HPS(tiny_clip(pool_type='eos', eos_id=1), reward.ids)
    assert torch.equal(together[1], fresh.texts(PROMPTS[1:2])[0]) and not together.requires_grad


def test_casting_forgets_what_was_read(reward):
    reward.texts(PROMPTS)
    assert not reward.to(torch.float64)._texts and reward.texts(PROMPTS).dtype == torch.float32


def test_a_prompt_read_in_inference_mode_serves_a_gradient(reward, video):
    with torch.inference_mode():
        reward(video, PROMPTS)
    assert reward_gradient(reward, video, PROMPTS)[1].abs().max() > 0


# Precision and memory


def test_half_precision_is_normalised_in_float32(reward, video):
    scores = reward(video, PROMPTS)
    half = reward.to(torch.bfloat16)(video, PROMPTS)
    assert half.dtype == torch.float32 and (half - scores).abs().max() < 0.05
    assert (reward.images(video[0]).norm(dim=1) - 1).abs().max() < 1e-6


def test_frozen(reward):
    assert not any(p.requires_grad for p in reward.parameters()) and not any(m.training for m in reward.clip.modules())


def test_layers_are_checkpointed_with_the_same_gradient(reward, video):
    _, grad = reward_gradient(reward, video, PROMPTS)
    checkpoint_reward(reward)
    assert sum('forward' in m.__dict__ for m in reward.modules()) == 4
    assert torch.allclose(reward_gradient(reward, video, PROMPTS)[1], grad, atol=1e-7)


# Loading


@pytest.fixture
def published(tmp_path, monkeypatch):
    "A folder with a small network in the published files."
    net = tiny_clip(tokens=77, vocab=49408)
    for v in ('2', '2.1'):
        torch.save({'state_dict': net.half().state_dict(), 'epoch': 1}, tmp_path / f'HPS_v{v}_compressed.pt')
    monkeypatch.setattr(hps, 'model_path', lambda name, scale: tmp_path)
    monkeypatch.setattr(
        'open_clip.get_model_config', lambda name: {'ViT-H-14': tiny_config(tokens=77, vocab=49408)}[name]
    )
    return tmp_path


@pytest.mark.parametrize('version', ['2', '2.1'])
def test_loads_the_published_files(published, version, video):
    ours = load_hps('full', 'cpu', version=version)
    want = HPS(tiny_clip(tokens=77, vocab=49408).half().float(), lambda p: get_tokenizer('ViT-H-14')(p))
    assert torch.equal(ours(video, PROMPTS), want(video, PROMPTS)) and ours.clip.logit_scale.dtype == torch.float32
    assert load_hps('full', 'cpu', 'bf16').clip.logit_scale.dtype == torch.bfloat16


def test_bad_files(published, tmp_path):
    file = tmp_path / 'HPS_v2_compressed.pt'
    weights = torch.load(file, weights_only=True)['state_dict']

    class Evil:
        def __reduce__(self):
            return (print, ('code from a checkpoint',))

    for bad, words in [
        ({'state_dict': {k: v for k, v in weights.items() if k != 'ln_final.bias'}}, r'1 missing \(ln_final.bias\)'),
        (
            {'state_dict': weights | {'text_projection': torch.zeros(2, 2)}},
            r'1 of another shape \(text_projection \(2, 2\)',
        ),
        ({'state_dict': weights | {'more': torch.zeros(2)}}, r'1 unknown \(more\)'),
        (weights, 'must hold a state_dict'),
        (Evil(), 'no readable file'),
    ]:
        torch.save(bad, file)
        with pytest.raises(VaderError, match=words) as e:
            load_hps('full', 'cpu')
        assert '\n' not in str(e.value)


def test_unknown_version():
    with pytest.raises(VaderError, match="unknown version '3' of HPS: use one of 2, 2.1"):
        load_hps(version='3')


def test_both_versions_are_one_at_small_scale(small):
    assert all(
        torch.equal(a, b) for a, b in zip(small.parameters(), load_hps('small', 'cpu', version='2.1').parameters())
    )


# The experiment


def test_prompts_of_the_experiment():
    from vader_nb.experiments.registry import EXPERIMENTS
    from vader_nb.experiments.prompts import action_prompts, hat_prompts

    train, tests = hat_prompts('small')
    for ps in (train, tests):
        assert len(set(ps)) == len(ps) and sum(' wearing a hat ' in p for p in ps) == len(ps) / 2
    assert not {p.split()[1] for p in train} & {p.split()[1] for p in tests}
    assert hat_prompts('full') == action_prompts('full')
    e = EXPERIMENTS['modelscope-hps']
    assert tuple(e.prompts('small')) == (train, tests * 4)
    assert (
        e.prompts('full')[1] == action_prompts('full')[1]
        and e.reward == 'hps'
        and e.full == EXPERIMENTS['modelscope-aesthetic'].full
    )


# How the small one was made


def test_open_clips_layout_is_the_same_network():
    from transformers import CLIPConfig, CLIPModel

    v, t = pretrain.CONFIG['vision_cfg'], pretrain.CONFIG['text_cfg']
    torch.manual_seed(0)
    theirs = CLIPModel(
        CLIPConfig(
            projection_dim=64,
            vision_config=dict(
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=v['layers'],
                num_attention_heads=4,
                image_size=64,
                patch_size=8,
            ),
            text_config=dict(
                vocab_size=t['vocab_size'],
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=t['context_length'],
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            ),
        )
    ).eval()
    ours = open_clip_net(pretrain.CONFIG, pretrain.to_open_clip(theirs.state_dict())).eval()
    x, ids = torch.randn(2, 3, 64, 64), torch.tensor([[0, 5, 9, 1, 1], [0, 7, 8, 200, 1]])
    ids = F.pad(ids, (0, 15), value=1)
    assert (ours.encode_image(x) - theirs.get_image_features(pixel_values=x).pooler_output).abs().max() < 1e-5
    assert (ours.encode_text(ids) - theirs.get_text_features(input_ids=ids).pooler_output).abs().max() < 1e-5


def test_twins_differ_in_what_their_kind_says():
    s, wrong, kind = pretrain.twins(make_generator(3), 200)
    for i, k in enumerate(pretrain.KINDS):
        for c in pretrain.CHOICES:
            assert torch.equal(
                getattr(s, c)[kind == i] != getattr(wrong, c)[kind == i], torch.full((int((kind == i).sum()),), c == k)
            )
    assert set(kind.tolist()) == set(range(6)) and s.obj[kind == list(pretrain.KINDS).index('colour')].min() > 0


def test_only_the_worse_of_a_clean_pair_is_spoiled_more():
    kind = torch.arange(6).repeat(50)
    better, worse = pretrain.strengths(kind, make_generator(0))
    clean = kind == list(pretrain.KINDS).index('clean')
    assert torch.equal(better[~clean], worse[~clean]) and (worse - better)[clean].min() >= 0.15 and worse.max() <= 1


def test_preference_loss_in_closed_form():
    a, b = torch.tensor([1.3, -0.4]), torch.tensor([0.2, 0.9])
    sure = pretrain.preference_loss(torch.stack([a, b], 1), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert torch.isclose(sure, -F.logsigmoid(a - b).mean())
    tie = torch.full((2, 2), 0.5)
    assert (
        pretrain.preference_loss(torch.stack([a, a], 1), tie).abs()
        < 1e-6
        < pretrain.preference_loss(torch.stack([a, b], 1), tie)
    )


def test_pair_scores_pair_what_belongs_together():
    x = F.normalize(torch.randn(6, 4), dim=1)
    t = F.normalize(torch.randn(3, 4), dim=1)
    s = pretrain.pair_scores(x, t, torch.tensor(2.0))
    assert torch.allclose(s[1], torch.tensor(2.0).exp() * torch.stack([x[1] @ t[1], x[4] @ t[1]]))


# What the small one learnt


def test_held_out_accuracy():
    from vader_nb.zoo import card

    percent = {k: float(v.rstrip('%')) for k, v in card('hps')['quality'].items()}
    assert percent['all pairs'] >= 90 and percent['hat'] >= 90 and percent['decoded'] >= 90


@pytest.mark.parametrize('hat', [0, 1])
def test_small_one_sees_hats(small, hat):
    "Of the same scene with and without a hat, the one that was asked for wins."
    s = scenes(24, 77, 'dull', hat=hat)
    other = scenes(24, 77, 'dull', hat=1 - hat)
    with torch.no_grad():
        right, wrong = small(draw(s, 1), captions(s)), small(draw(other, 1), captions(s))
    assert (right > wrong).float().mean() >= 0.9


@pytest.mark.parametrize('kind', CORRUPTIONS)
def test_small_one_rates_spoiled_frames_low(small, kind):
    s = scenes(24, 78, 'dull')
    x = draw(s, 1)
    with torch.no_grad():
        good, bad = (
            small(x, captions(s)),
            small(corrupt(x, kind, torch.full((24,), 0.7), make_generator(0)), captions(s)),
        )
    assert (good > bad).float().mean() >= 0.9


def test_gradient_of_the_small_one_finds_the_hat(small):
    "Along the gradient of the asked hat there is more of it than elsewhere, where a hat is missing."
    s, hat = scenes(16, 79, 'dull', hat=0), scenes(16, 79, 'dull', hat=1)
    x, y = draw(s, 1), draw(hat, 1)
    _, grad = reward_gradient(small, x, captions(hat))
    size, there = grad.norm(dim=2, keepdim=True), (x - y).abs().amax(2, keepdim=True) > 0.02
    assert size[there].mean() > 1.2 * size[~there].mean()
