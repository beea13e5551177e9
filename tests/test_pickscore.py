"PickScore: the published formula and layout, the processor's own result, each image against its own prompt."

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

import test_aesthetic, test_hps
from test_hps import PROMPTS, layout, reading
from tiny_models import tiny_tokenizer
from vader_nb.core import VaderError, make_generator
from vader_nb.memory.checkpointing import checkpoint_reward
from vader_nb.pretrain import pickscore as pretrain
from vader_nb.rewards.base import check_reward, reward_gradient
from vader_nb.rewards import pickscore
from vader_nb.rewards.aesthetic import Aesthetic
from vader_nb.rewards.hps import HPS, load_hps
from vader_nb.rewards.pickscore import PickScore, load_pickscore
from vader_nb.world.rating import CORRUPTIONS, corrupt
from vader_nb.world.captions import captions
from vader_nb.world.scenes import draw, scenes

here = Path(__file__).parent
golden = {k: torch.from_numpy(v) for k, v in np.load(here / 'data/pickscore_formula_golden.npz').items()}


def tiny_clip(size=32):
    "Two layers a half of ViT-H/14's kind: gelu, not quick_gelu."
    half = dict(num_hidden_layers=2, num_attention_heads=2, hidden_act='gelu')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPModel(
            CLIPConfig(
                projection_dim=12,
                vision_config=dict(hidden_size=24, intermediate_size=48, image_size=size, patch_size=8, **half),
                text_config=dict(
                    hidden_size=16,
                    intermediate_size=32,
                    vocab_size=200,
                    max_position_embeddings=12,
                    bos_token_id=0,
                    eos_token_id=1,
                    pad_token_id=1,
                    **half,
                ),
            )
        )


@pytest.fixture
def reward():
    return PickScore(tiny_clip(), reading(tiny_tokenizer()))


@pytest.fixture
def video():
    return torch.rand(3, 2, 3, 32, 40, generator=make_generator(5)) * 0.8 + 0.1


@pytest.fixture(scope='module')
def small():
    return load_pickscore('small', 'cpu')


# The published formula


@pytest.fixture
def published():
    "A reward whose network returns the reference's vectors: picture i is filled with the number i, prompt i is 'i'."

    class Net(torch.nn.Module):
        config = SimpleNamespace(vision_config=SimpleNamespace(image_size=8))

        def __init__(self):
            super().__init__()
            self.logit_scale = torch.nn.Parameter(golden['logit_scale'].clone())

        def get_image_features(self, pixel_values):
            return SimpleNamespace(pooler_output=golden['image_embs'][pixel_values[:, 0, 0, 0].long()])

        def get_text_features(self, input_ids):
            return SimpleNamespace(pooler_output=golden['text_embs'][input_ids[:, 0]])

    r = PickScore(Net(), lambda prompts: torch.tensor([[int(p)] for p in prompts]))
    r.view = lambda frames, size: frames
    return r


pictures = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 1, 3, 8, 8)


def test_the_published_scores(published):
    "The authors score every picture against the first prompt: the same, if that is what each is asked about."
    scores = published.score(pictures, ['0'] * 4, None)
    assert (scores - golden['scores_row0']).abs().max() < 1e-4
    assert (scores.softmax(0) - golden['probs']).abs().max() < 1e-5
    assert ((1 - scores / 100).abs().mean() - golden['vader_loss']).abs() < 1e-6


def test_each_picture_meets_its_own_prompt(published):
    t, i = F.normalize(golden['text_embs'], dim=1), F.normalize(golden['image_embs'], dim=1)
    own = published.score(pictures, list('0123'), None)
    assert torch.allclose(own, golden['logit_scale'].exp() * (t * i).sum(1), atol=1e-4)
    assert (
        torch.isclose(own[0], golden['scores_row0'][0], atol=1e-4)
        and (own - golden['scores_row0'])[1:].abs().min() > 1e-3
    )


def test_full_size_layout():
    want, o = layout('pickscore_vith14')
    v, t = o['config']['vision'], o['config']['text']
    half = lambda c: dict(
        hidden_size=c['hidden_size'],
        intermediate_size=c['intermediate_size'],
        num_hidden_layers=c['layers'],
        num_attention_heads=c['heads'],
        hidden_act=c['act'],
    )
    config = CLIPConfig(
        projection_dim=o['config']['projection_dim'],
        text_config=half(t),
        vision_config=dict(half(v), patch_size=v['patch'], image_size=v['image']),
    )
    with torch.device('meta'):
        clip = PickScore(CLIPModel(config), None).clip
    assert {k: tuple(p.shape) for k, p in clip.state_dict().items()} == want
    assert sum(p.numel() for p in clip.parameters()) == o['parameters'] == 986109441


@pytest.mark.parametrize('h, w', [(64, 64), (40, 64), (97, 61), (32, 57), (300, 224)])
def test_sees_what_the_processor_makes(reward, h, w):
    "On whole-numbered pixels, up to the processor's rounding to 1/255 after the resize."
    u8 = (F.interpolate(torch.rand(1, 3, 9, 9, generator=make_generator(h)), (h, w), mode='bilinear')[0] * 255).byte()
    theirs = CLIPImageProcessor(size={'shortest_edge': 32}, crop_size={'height': 32, 'width': 32})(
        u8, return_tensors='pt'
    ).pixel_values
    assert (reward.view(u8[None] / 255, 32) - theirs).abs().max() < 1.1 / 255 / 0.26
    with torch.no_grad():
        a, b = reward.images(u8[None] / 255)[0], F.normalize(reward.embed_images(theirs), dim=1)[0]
    assert a @ b > 0.999


def test_sharp_edges_differ_by_the_processors_rounding_alone(reward):
    "It resizes columns, then rows, and rounds and cuts after each, where a bicubic filter overshoots beside an edge."
    u8 = draw(scenes(3, 2, 'vivid'), 1, 45, 75)[:, 0].mul(255).round().byte()
    theirs = CLIPImageProcessor(size={'shortest_edge': 32}, crop_size={'height': 32, 'width': 32})(
        list(u8), return_tensors='pt'
    ).pixel_values
    whole = lambda x, size: F.interpolate(x, size, mode='bicubic', antialias=True).mul(255).round().clamp(0, 255) / 255
    x = whole(whole(u8 / 255, (45, 53)), (32, 53))
    assert (reward.view(x, 32) - theirs).abs().max() < 1.1 / 255 / 0.26
    assert (reward.view(u8 / 255, 32) - theirs).abs().mean() < 0.5 / 255 / 0.26


def test_equal_to_transformers_own_forward(reward, video):
    "`CLIPModel` computes the same logits, from the same pixels and tokens."
    frames = video[:, 0]
    out = reward.clip(input_ids=reward.ids(PROMPTS), pixel_values=reward.view(frames, 32))
    assert (reward(frames[:, None], PROMPTS) - out.logits_per_image.diagonal()).abs().max() < 1e-5


# The contract


def test_contract_of_the_published_layout(reward, video):
    check_reward(reward, video, PROMPTS)


def test_contract_of_the_small_one(small):
    s = scenes(3, 1, 'any', hat=1)
    check_reward(small, draw(s, 2), captions(s))


def test_with_hps(small):
    s = scenes(2, 3, 'any', hat=1)
    both = small + 2 * load_hps('small', 'cpu')
    check_reward(both, draw(s, 2), captions(s))
    assert list(both.parts(draw(s, 1), captions(s))) == ['pickscore', 'hps'] and both.name == 'pickscore + 2*hps'


def test_every_pair_in_the_published_layouts(reward, video):
    "Random weights of small dimensions; each part is logged apart and looks at the frame in its own way."
    rewards = [
        reward,
        HPS(test_hps.tiny_clip(pool_type='eos', eos_id=1), reward.ids),
        Aesthetic(test_aesthetic.tiny_clip(), test_aesthetic.tiny_head()),
    ]
    for a, b in combinations(rewards, 2):
        both, prompts = 2 * a + b, PROMPTS
        check_reward(both, video, prompts)
        assert torch.allclose(both(video, prompts), 2 * a(video, prompts) + b(video, prompts)) and set(
            both.parts(video, prompts)
        ) == {a.name, b.name}


@pytest.mark.parametrize(
    'prompts, words',
    [
        (None, 'pass prompts'),
        (['a fox'], '3 videos need 3 prompts'),
        ('a fox', 'not a single string'),
        (['a fox', 'a zebra', 'a dog'], r"does not know the words \['zebra'\]"),
        (['a fox ' * 9] * 3, 'shorten it'),
    ],
)
def test_bad_prompts(reward, video, prompts, words):
    with pytest.raises(VaderError, match=words):
        reward(video, prompts)


def test_half_precision_is_scored_in_float32(reward, video):
    scores = reward(video, PROMPTS)
    half = reward.to(torch.bfloat16)(video, PROMPTS)
    assert half.dtype == torch.float32 and (half - scores).abs().max() < 0.05 * scores.abs().max() + 0.5


def test_layers_are_checkpointed_with_the_same_gradient(reward, video):
    _, grad = reward_gradient(reward, video, PROMPTS)
    checkpoint_reward(reward)
    assert sum('forward' in m.__dict__ for m in reward.modules()) == 4
    assert torch.allclose(reward_gradient(reward, video, PROMPTS)[1], grad, atol=1e-6)


def test_loads_the_published_layout(tmp_path, monkeypatch, reward, video):
    reward.clip.save_pretrained(tmp_path / 'pickscore')
    tiny_tokenizer().save_pretrained(tmp_path / 'pickscore_words')
    monkeypatch.setattr(pickscore, 'model_path', lambda name, scale: tmp_path / name)
    for scale in ('small', 'full'):
        assert torch.allclose(load_pickscore(scale, 'cpu')(video, PROMPTS), reward(video, PROMPTS), atol=1e-5)
    assert load_pickscore('full', 'cpu', 'bf16').clip.dtype == torch.bfloat16


def test_without_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(pickscore, 'model_path', lambda name, scale: tmp_path / name)
    with pytest.raises(VaderError, match='no usable CLIPModel') as e:
        load_pickscore('full', 'cpu')
    assert '\n' not in str(e.value)


# How the small one was made, and what it learnt


def test_votes():
    better, worse = torch.ones(2000, 1, 2, 2) + torch.arange(2.0), torch.zeros(2000, 1, 2, 2)
    first, second, share = pretrain.votes(better, worse, make_generator(0))
    tie = share[:, 0] == 0.5
    assert torch.equal(first[tie], second[tie].flip(3)) and abs(tie.float().mean() - pretrain.TIES) < 0.03
    for mine, votes in ((first, share[:, 0]), (second, share[:, 1])):
        assert (mine[votes == 1] > 0).all() and (mine[votes == 0] == 0).all()
    assert (share.sum(1) == 1).all() and abs((share[:, 0] == 1).float().mean() - (1 - pretrain.TIES) / 2) < 0.04


def test_held_out_accuracy():
    from vader_nb.zoo import card

    percent = {k: float(v.rstrip('%')) for k, v in card('pickscore')['quality'].items()}
    assert percent['all pairs'] >= 90 and percent['hat'] >= 90 and percent['decoded'] >= 90


def test_small_one_is_not_hps(small):
    "Two rewards of the same weights would not watch each other."
    s = scenes(32, 5, 'any')
    x = draw(s, 1)
    with torch.no_grad():
        a, b = small(x, captions(s)), load_hps('small', 'cpu')(x, captions(s))
    assert 0.1 < torch.corrcoef(torch.stack([a, b]))[0, 1] < 0.999


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
