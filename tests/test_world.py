"""The small world: a seed means the same bytes, a batch is nothing but its scenes, words and truth agree, the rule for
beauty falls where it should.
"""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest, torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer

from vader_nb.world import scenes as world
from vader_nb.core import VaderError, make_generator
from vader_nb.world.scenes import (
    ACTIVITIES,
    ANIMALS,
    COLOURS,
    CORE,
    FACES,
    GRADES,
    LOOKALIKE,
    OBJECTS,
    draw,
    layout,
    scenes,
)
from vader_nb.world.shapes import signed_distance
from vader_nb.world.captions import (
    FOOD_NOISE,
    HAT_NOISE,
    PROMPT_SETS,
    TEST_ANIMALS,
    TRAIN_ANIMALS,
    WORDS,
    caption,
    captions,
    check_vocabulary,
    noisy_labels,
    parse,
    prompts,
    start_images,
)
from vader_nb.training.evaluate import fit_filter, photo_filter
from vader_nb.world.rating import CORRUPTIONS, corrupt, frame_stats, label, light_stats, rate, rate_light
from vader_nb.zoo import model_path

root = Path(__file__).resolve().parent.parent
one_frame = torch.tensor([4.0])


@pytest.fixture(scope='module')
def cast():
    return scenes(12, 5, 'any', activity=list(range(6)) * 2, obj=[0, 1, 2] * 4, hat=[0, 1] * 6)


def same(a, b):
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in vars(a))


# Scenes


def test_a_seed_means_the_same_scenes():
    before = torch.get_rng_state()
    assert same(scenes(50, 7, 'any'), scenes(50, make_generator(7), 'any')) and not same(scenes(50, 7), scenes(50, 8))
    assert torch.equal(torch.get_rng_state(), before), 'nothing is drawn from the global state'


@pytest.mark.parametrize('grade', GRADES)
def test_a_grade_keeps_to_its_range(grade):
    s = scenes(500, 1, grade)
    for name, (low, high) in GRADES[grade].items():
        values = getattr(s, name)
        assert low <= values.min() < values.max() <= high


def test_every_word_is_drawn_and_stays_in_range():
    s = scenes(2000, 2)
    for k, names in dict(animal=ANIMALS, activity=ACTIVITIES, obj=OBJECTS, colour=COLOURS, hat='01').items():
        assert getattr(s, k).unique().tolist() == list(range(len(names)))
    assert s.side.unique().tolist() == [-1, 1] and 0.17 < s.hat.float().mean() < 0.23


def test_properties_can_be_fixed():
    free, s = (
        scenes(3, 0),
        scenes(3, 0, animal='fox', activity=['eating a donut', 1, 'standing still'], hat=True, saturation=0.5),
    )
    assert (
        s.animal.tolist() == [1] * 3
        and s.activity.tolist() == [3, 1, 5]
        and s.hat.tolist() == [1] * 3
        and s.saturation.tolist() == [0.5] * 3
    )
    assert torch.equal(s.back, free.back), 'what is fixed changes nothing else'
    assert same(scenes(2, 0, animal=torch.tensor([1, 4])), scenes(2, 0, animal=['fox', 'penguin']))


def test_indexing_keeps_a_batch(cast):
    for i, n in [(0, 1), (-1, 1), (-2, 1), (slice(2, 5), 3), ([1, 7], 2), (cast.hat == 1, 6)]:
        assert len(cast[i]) == n
    assert same(cast[-1], cast[11:12]) and same(cast[-2], cast[10:11])


# Pictures


def test_the_same_scene_is_the_same_bytes(cast):
    assert (
        draw(cast, 3).numpy().tobytes()
        == draw(scenes(12, 5, 'any', activity=list(range(6)) * 2, obj=[0, 1, 2] * 4, hat=[0, 1] * 6), 3)
        .numpy()
        .tobytes()
    )


def reference_scenes():
    return scenes(
        24, 11, 'any', animal=list(range(12)) * 2, activity=list(range(6)) * 4, obj=[0, 1, 2, 1] * 6, hat=[0, 1, 1] * 8
    )


def test_the_world_looks_as_it_did_when_the_models_were_trained():
    """24 scenes at two times, against a picture that was kept: other shapes, colours or random draws would be another
    world.
    """
    video = draw(reference_scenes(), torch.tensor([0.0, 5.0]), 48, 48)
    kept = torch.from_numpy(np.asarray(Image.open(root / 'tests/data/world.png')).copy()).float() / 255
    ours = video.movedim(2, -1).reshape(4, 6, 2, 48, 48, 3).permute(0, 2, 3, 1, 4, 5).reshape(4 * 2 * 48, 6 * 48, 3)
    assert (ours - kept).abs().max() < 1.5 / 255


@pytest.mark.parametrize('h,w', [(64, 64), (33, 47), (48, 112), (17, 8)])
def test_a_batch_is_its_scenes_drawn_alone(cast, h, w):
    times = torch.tensor([0.0, 3.5])
    video, cover = draw(cast, times, h, w, cover=True)
    assert (
        video.shape == (12, 2, 3, h, w)
        and cover.shape == (12, 2, 1, h, w)
        and video.dtype == torch.float32
        and video.is_contiguous()
    )
    for i in range(12):
        v, c = draw(cast[i], times, h, w, cover=True)
        assert (v[0] - video[i]).abs().max() < 1e-5 and (c[0] - cover[i]).abs().max() < 1e-5


def test_a_frame_is_its_time_drawn_alone(cast):
    s = cast[:6]
    video = draw(s, 17, 24, 24)
    assert video.shape[1] == 17
    for k in (0, 5, 16):
        assert (draw(s, torch.tensor([float(k)]), 24, 24)[:, 0] - video[:, k]).abs().max() < 1e-5
    assert torch.equal(draw(s, 3, 24, 24), draw(s, torch.arange(3), 24, 24))


def test_time_goes_on_between_and_beyond_the_frames(cast):
    a, half, b, later = draw(cast[:6], torch.tensor([2.0, 2.5, 3.0, 100.3]), 32, 32).unbind(1)
    moved = lambda x, y: (x - y).abs().amax((1, 2, 3))
    assert (moved(a, half) > 0.01).all() and (moved(half, b) > 0.01).all() and later.isfinite().all()


def test_sixteen_frames_are_a_period(cast):
    s = cast[[0, 1, 3, 4, 5]]  # the bubbles over the dishes wobble in a time of their own
    first, last = draw(s, torch.tensor([0.0, 16.0]), 48, 48).unbind(1)
    assert (first - last).abs().max() < 0.01


def test_sizes_show_the_same_scene(cast):
    small, large = draw(cast, one_frame, 32, 32)[:, 0], draw(cast, one_frame, 96, 96)[:, 0]
    assert (F.avg_pool2d(large, 3) - small).abs().mean() < 0.01
    wide = draw(cast, one_frame, 32, 64)[:, 0]
    assert (wide[..., 16:48] - small).abs().max() < 1e-4, 'the stage stands in the middle of a wide frame'


def test_a_mirrored_scene_is_the_mirror_image(cast):
    flipped = replace(cast, side=-cast.side, camera=cast.camera * torch.tensor([1.0, -1.0, 1.0]))
    assert (draw(flipped, 2).flip(-1) - draw(cast, 2))[cast.activity != 0].abs().max() < 1e-4
    rider = scenes(2, 3, activity=0, obj=0, side=[1, -1])  # the rider keeps his look, but goes the other way
    where = middle(draw(rider, torch.tensor([0.0, 8.0]), cover=True)[1])
    assert where[0, 0] < where[0, 1] and where[1, 0] > where[1, 1]


def middle(cover):
    return (cover.sum((2, 3)) * torch.arange(cover.shape[-1])).sum(-1) / cover.sum((2, 3, 4))


@pytest.mark.parametrize(
    'grade',
    [
        dict(saturation=0.0),
        dict(saturation=5.0, contrast=4.0),
        dict(brightness=3.0),
        dict(brightness=-3.0),
        dict(contrast=0.0),
    ],
)
def test_values_stay_in_range(cast, grade):
    video = draw(replace(cast, **{k: torch.full((12,), v) for k, v in grade.items()}), 1, 24, 24)
    assert 0 <= video.min() and video.max() <= 1


def test_odd_framing_draws_too():
    video, cover = draw(scenes(40, 3, 'any', framed=False), 1, 32, 32, cover=True)
    assert video.isfinite().all() and (cover.flatten(1).sum(1) > 0).all()


def test_the_cover_is_where_the_clip_differs_from_the_background(cast):
    s = replace(cast, saturation=torch.ones(12), contrast=torch.ones(12), brightness=torch.zeros(12))
    video, cover = draw(s, 2, 40, 56, cover=True)
    back = world._grade(world._background(s, 40, 56)[:, None], s).permute(0, 1, 4, 2, 3)
    differs = (video - back).abs().amax(2, keepdim=True)
    assert torch.equal(video, draw(s, 2, 40, 56)) and 0 <= cover.min() and cover.max() == 1
    assert (differs[cover == 0] == 0).all() and (differs[cover > 0.9] > 0.02).float().mean() > 0.9


def test_what_a_scene_says_is_what_is_seen():
    s = scenes(1, 4, 'vivid', animal='fox', activity='standing still', obj='book', colour='red', hat=1)
    picture = draw(s, one_frame)
    for change in [dict(hat=0), dict(obj=0), dict(obj=2), dict(colour=1), dict(animal=2), dict(activity=1)]:
        other = draw(replace(s, **{k: torch.tensor([v]) for k, v in change.items()}), one_frame)
        assert ((other - picture).abs().amax(2) > 0.1).float().mean() > 0.005, change
    plain = replace(s, obj=torch.tensor([0]))
    assert torch.equal(draw(plain, one_frame), draw(replace(plain, colour=torch.tensor([2])), one_frame)), (
        'nothing has no colour'
    )


def test_layout_lists_the_parts_of_every_frame(cast):
    for k in range(6):
        p = layout(cast[cast.activity == k], 5)
        assert p.shape[0] == 2 and p.shape[2:] == (5, 11) and p.isfinite().all()


@pytest.mark.parametrize(
    'kind,inside,outside', [(0, (0.0, 0.1), (0.5, 0.0)), (1, (0.2, 0.1), (0.4, 0.3)), (2, (0.0, 0.1), (0.25, -0.2))]
)
def test_distances_are_negative_inside(kind, inside, outside):
    v = lambda o: torch.tensor(o).view(1, 1, 1)
    d = lambda x, y: signed_distance(v(kind), v(x), v(y), v(0.3), v(0.2), v(0.0)).item()
    assert d(*inside) < 0 < d(*outside)
    assert abs(signed_distance(v(0), v(0.3), v(0.0), v(0.3), v(0.2), v(0.05)).item() + 0.05) < 1e-6, (
        'a ring is inside on its line'
    )


# Words


def combinations():
    "Every caption of the world as the keywords of `caption`."
    things = [('', '')] + list(product(OBJECTS[1:], [''] + COLOURS))
    return [
        dict(animal=a, activity=c, obj=o, colour=k, hat=hat)
        for a, c, (o, k), hat in product(ANIMALS, [''] + ACTIVITIES, things, [False, True])
    ]


def index(names, word):
    return names.index(word) if word else -1


def test_captions_are_read_back():
    for w in combinations():
        assert parse(caption(**w)) == dict(
            animal=index(ANIMALS, w['animal']),
            activity=index(ACTIVITIES, w['activity']),
            obj=index(OBJECTS, w['obj']),
            colour=index(COLOURS, w['colour']),
            hat=1 if w['hat'] else -1,
        )


def test_captions_read_like_the_papers():
    assert caption('fox', 'playing chess', 'book') == 'a fox playing chess next to a book'
    assert caption('elephant', hat=True) == 'an elephant wearing a hat'
    assert (
        caption('panda', 'riding a bike', 'cup', 'blue') == 'a panda riding a bike next to a blue cup'
        and caption('pig', obj='nothing') == 'a pig'
    )


def test_a_caption_tells_the_truth():
    s = scenes(300, 3)
    for text, i in zip(captions(s), range(300)):
        got, thing = parse(text), s.obj[i] > 0
        assert (got['animal'], got['activity'], got['hat']) == (s.animal[i], s.activity[i], 1 if s.hat[i] else -1)
        assert (got['obj'], got['colour']) == ((s.obj[i], s.colour[i]) if thing else (-1, -1))
    assert not any(c in t.split() for t in captions(s, [False] * 300) for c in COLOURS)


def test_the_small_models_know_every_word():
    tok = Tokenizer.from_file(str(model_path('clip') / 'tokenizer.json'))
    longest = json.loads((model_path('clip') / 'tokenizer_config.json').read_text())['model_max_length']
    texts = [caption(**w) for w in combinations()] + [
        p for k in PROMPT_SETS for split in ('train', 'test') for p in prompts(k, split)
    ]
    coded = tok.encode_batch(texts)
    assert all(len(c.ids) == len(t.split()) + 2 for c, t in zip(coded, texts)), 'one token a word, and two end marks'
    assert max(len(c.ids) for c in coded) <= longest


def test_the_vocabulary_is_that_of_the_captions():
    texts = [caption(**w) for w in combinations()]
    assert {word for text in texts for word in text.split()} == WORDS
    check_vocabulary([*texts, '', 'A Fox, playing CHESS.'])


@pytest.mark.parametrize(
    'prompt,says',
    [
        ('a pandda riding a bike', "do not know the word 'pandda' of 'a pandda riding a bike', did you mean 'panda'"),
        ('two pandas', "'two'"),
        ('a zebra playing chess', "'zebra' of 'a zebra playing chess': animals are panda, fox"),
        ('a fox eating 2 donuts', "'2'"),
        ('\u718a\u732b', 'do not know'),
        ('\U0001f98a!', "has no words: write, say, 'a fox playing chess'"),
    ],
)
def test_a_word_that_the_world_does_not_have_is_named(prompt, says):
    with pytest.raises(VaderError, match=says) as e:
        check_vocabulary(['a fox', prompt])
    assert '\n' not in str(e.value)


def test_a_prompt_is_read_back_with_its_punctuation():
    assert parse('A fox, riding a bike.') == parse('a fox riding a bike')
    with pytest.raises(VaderError, match='names no animal'):
        parse('a foxglove')


def test_caption_noise_has_the_stated_shares():
    s = scenes(20_000, 1)
    told, is_food = noisy_labels(s, make_generator(2)), lambda s: (s.activity == 3) | (s.activity == 4)
    food = is_food(s)
    wrong = lambda k, m: (getattr(told, k) != getattr(s, k))[m].float().mean().item()
    for hat in (0, 1):
        assert abs(wrong('hat', s.hat == hat) - HAT_NOISE) < 0.02
    for k in (3, 4):
        assert abs(wrong('activity', s.activity == k) - FOOD_NOISE) < 0.03
    assert wrong('activity', ~food) == 0 and torch.equal(is_food(told), food)
    assert same(replace(told, hat=s.hat, activity=s.activity), s) and same(s, scenes(20_000, 1)), (
        'nothing else is wrong, and the truth is kept'
    )


def test_train_and_test_share_no_animal():
    assert sorted(TRAIN_ANIMALS + TEST_ANIMALS) == sorted(ANIMALS) == sorted(FACES)
    for k in PROMPT_SETS:
        seen = [{parse(p)['animal'] for p in prompts(k, split)} for split in ('train', 'test')]
        assert seen == [{ANIMALS.index(a) for a in names} for names in (TRAIN_ANIMALS, TEST_ANIMALS)]
        assert len(set(prompts(k))) == len(prompts(k))


def test_prompt_sets_ask_what_their_name_says():
    asked = {k: [parse(p) for p in prompts(k, 'test')] for k in PROMPT_SETS}
    assert {a['activity'] for a in asked['activities']} == {ACTIVITIES.index(c) for c in CORE}
    assert {a['activity'] for a in asked['lookalike']} == {ACTIVITIES.index(c) for c in LOOKALIKE}
    assert (
        {a['obj'] for a in asked['books']} == {1}
        and {a['obj'] for a in asked['cups']} == {2}
        and {a['hat'] for a in asked['hats']} == {1}
    )


def test_start_images_show_the_animal_alone():
    x = start_images('maltese', 3, seed=2, height=32, width=48)
    assert x.shape == (3, 3, 32, 48) and torch.equal(x, start_images('maltese', 3, seed=2, height=32, width=48))
    assert not torch.equal(x, start_images('labrador', 3, seed=2, height=32, width=48))


# Beauty and its opposite


@pytest.fixture(scope='module')
def vivid():
    return draw(scenes(48, 2, 'vivid'), one_frame)


def test_dull_rates_half_and_vivid_high():
    means = {g: rate(draw(scenes(150, 1, g), one_frame)).mean().item() for g in ('dull', 'any', 'vivid')}
    assert (
        abs(means['dull'] - 4.5) < 0.4
        and abs(means['vivid'] - 8) < 0.5
        and means['dull'] < means['any'] < means['vivid']
    )


def test_every_vivid_clip_beats_its_dull_self(vivid):
    s = scenes(48, 2, 'vivid')
    dull = draw(replace(s, saturation=torch.full((48,), 0.4), contrast=torch.full((48,), 0.55)), one_frame)
    assert (rate(vivid) > rate(dull) + 1).all()


@pytest.mark.parametrize('grade', ['dull', 'vivid', 'any'])
def test_other_grades_know_no_light(grade):
    assert not scenes(20, 1, grade).light.any()


def test_no_light_changes_nothing():
    s = scenes(12, 4, 'any', activity=list(range(6)) * 2)
    lit = replace(s, light=torch.tensor([0.0, 0.8] * 6))
    before, after = draw(s, 2), draw(lit, 2)
    assert torch.equal(before[::2], after[::2]) and (before[1::2] - after[1::2]).abs().mean() > 0.05


@pytest.mark.parametrize('kind', ['noise', 'blur', 'blotches'])
def test_the_rule_falls_as_a_clip_is_corrupted(vivid, kind):
    means = [
        rate(corrupt(vivid, kind, torch.full((48,), k), make_generator(0))).mean().item()
        for k in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert means[1] < means[0] - 0.5 and means[2] < means[1] + 0.2 and max(means[2:]) < 2.6, (
        'once little is left, a rating of about 2 stays'
    )


@pytest.mark.parametrize('kind', CORRUPTIONS)
def test_labels_fall_however_a_clip_is_corrupted(vivid, kind):
    seen = lambda k: rate(corrupt(vivid, kind, torch.full((48,), k), make_generator(0)))
    means = [label(rate(vivid), seen(k), torch.full((48,), k)).mean().item() for k in (0.0, 0.25, 0.5, 1.0)]
    assert means[1] < means[0] - 1 and means[2] < means[1] + 0.2 and means[3] < 2.2


@pytest.mark.parametrize('kind', CORRUPTIONS)
def test_corruptions(vivid, kind):
    x, k = vivid[:6], torch.linspace(0, 1, 6)
    y = corrupt(x, kind, k, make_generator(1))
    assert (
        y.shape == x.shape and 0 <= y.min() and y.max() <= 1 and torch.equal(y, corrupt(x, kind, k, make_generator(1)))
    )
    assert (y[0] - x[0]).abs().mean() < 0.01 and (y[-1] - x[-1]).abs().mean() > 0.02
    assert corrupt(draw(scenes(2, 0), 2, 8, 12), kind, torch.ones(2), make_generator(0)).shape == (2, 2, 3, 8, 12), (
        'the smallest frames too'
    )


def test_the_rule_rates_frames_and_clips_alike(vivid):
    clip = torch.cat([vivid[:4], vivid[4:8]], 1)
    assert torch.allclose(rate(clip), (rate(vivid[:4]) + rate(vivid[4:8])) / 2) and torch.equal(
        rate(vivid[:, 0]), rate(vivid)
    )
    assert (rate(vivid[3:4]) - rate(vivid)[3]).abs().item() < 1e-5, 'a frame is rated for itself'
    assert all(v.shape == (48,) for v in frame_stats(vivid[:, 0]).values())


@pytest.mark.parametrize(
    'frame',
    [torch.zeros(2, 3, 64, 64), torch.ones(2, 3, 64, 64), torch.rand(2, 3, 48, 80, generator=make_generator(0))],
)
def test_empty_and_wild_frames_rate_low(frame):
    assert (1 <= rate(frame)).all() and (rate(frame) < 3).all()


# The rule of light


@pytest.fixture(scope='module')
def sunlit():
    return draw(scenes(48, 2, 'sunlit'), one_frame)


def test_the_rule_of_light_asks_for_light():
    means = {g: rate_light(draw(scenes(150, 1, g), one_frame)).mean().item() for g in ('dull', 'vivid', 'sunlit')}
    assert means['dull'] < 2.8 and means['dull'] + 0.4 < means['vivid'] < 3.8 and means['sunlit'] > 8.5


def test_every_sunlit_clip_beats_its_flat_self(sunlit):
    flat = draw(replace(scenes(48, 2, 'sunlit'), light=torch.zeros(48)), one_frame)
    assert (rate_light(sunlit) > rate_light(flat) + 1.5).all()


def test_more_light_rates_higher():
    lights = [scenes(60, 1, 'any', light=torch.full((60,), k)) for k in (0.0, 0.25, 0.5, 0.75, 1.0)]
    means = [rate_light(draw(s, one_frame)).mean().item() for s in lights]
    assert all(b > a + 0.3 for a, b in zip(means, means[1:])), means


def test_garish_dark_and_empty_pictures_rate_low(sunlit):
    garish = photo_filter(sunlit, dict(saturation=4.0, contrast=1.5))
    assert rate_light(garish).mean() < rate_light(sunlit).mean() - 3 and rate(garish).mean() > rate(sunlit).mean()
    empty = scenes(24, 2, 'sunlit')
    empty.camera[:, 0] = 0.02
    assert rate_light(draw(empty, one_frame)).max() < 3 and rate_light(0.2 * sunlit).max() < 3


def test_a_filter_reaches_the_first_rule_but_not_the_rule_of_light(sunlit):
    dull = draw(scenes(24, 6, 'dull'), one_frame)
    gain = lambda rule: (rule(photo_filter(dull, fit_filter(rule, dull, 40, 4))) - rule(dull)).mean()
    assert gain(rate) > 4 and gain(rate_light) < (rate_light(sunlit).mean() - rate_light(dull).mean()) / 4


@pytest.mark.parametrize('kind', ['noise', 'blur', 'blotches'])
def test_the_rule_of_light_falls_as_a_clip_is_corrupted(sunlit, kind):
    strengths = [torch.full((48,), k) for k in (0.0, 0.25, 0.75, 1.0)]
    means = [rate_light(corrupt(sunlit, kind, k, make_generator(0))).mean().item() for k in strengths]
    assert means[1] < means[0] - 0.3 and means[2] < means[1] + 0.2 and means[3] < means[0] - 3


def test_the_rule_of_light_rates_frames_and_clips_alike(sunlit):
    clip = torch.cat([sunlit[:4], sunlit[4:8]], 1)
    assert torch.allclose(rate_light(clip), (rate_light(sunlit[:4]) + rate_light(sunlit[4:8])) / 2)
    assert torch.equal(rate_light(sunlit[:, 0]), rate_light(sunlit))
    assert all(v.shape == (48,) for v in light_stats(sunlit[:, 0]).values())


@pytest.mark.parametrize(
    'frame',
    [torch.zeros(2, 3, 64, 64), torch.ones(2, 3, 64, 64), torch.rand(2, 3, 48, 80, generator=make_generator(0))],
)
def test_empty_and_wild_frames_rate_low_by_light(frame):
    assert (1 <= rate_light(frame)).all() and (rate_light(frame) < 3).all()


def test_a_label_never_exceeds_what_the_pixels_deserve():
    clean, seen, k = torch.rand(3, 200, generator=make_generator(3))
    clean, seen = 1 + 9 * clean, 1 + 9 * seen
    y = label(clean, seen, k)
    assert (y <= seen).all() and (y <= clean + 1e-5).all() and (y >= 1).all()
    assert label(torch.tensor([8.0]), torch.tensor([8.0]), torch.tensor([1.0])).item() == pytest.approx(2.05)
    assert torch.equal(label(clean, clean, torch.zeros(200)), clean)


# Bad input

s2 = scenes(2, 0)


@pytest.mark.parametrize(
    'call,says',
    [
        (lambda: scenes(2, grade='grey'), "grade 'grey'.*dull, vivid, sunlit, any"),
        (lambda: scenes(0), 'cannot draw 0 scenes'),
        (lambda: scenes(-3), 'cannot draw -3 scenes'),
        (lambda: scenes(2, animal='cat'), "no animal 'cat'.*panda"),
        (lambda: scenes(2, activity=['playing chess', 'sleeping']), "no activity 'sleeping'.*riding a bike"),
        (lambda: scenes(2, obj='spoon'), "no obj 'spoon'.*book"),
        (lambda: scenes(2, colour='pink'), "no colour 'pink'.*red"),
        (lambda: scenes(2, animal=12), 'animal.*0 to 11'),
        (lambda: scenes(2, colour=[0, -1]), 'colour.*0 to 3'),
        (lambda: scenes(2, animals='fox'), "no property 'animals'.*animal"),
        (lambda: scenes(2, hat=[1, 0, 1]), '3 values for 2'),
        (lambda: draw(s2, 8, 7, 64), '7x64.*8x8'),
        (lambda: draw(s2, 0), '0 frames'),
        (lambda: draw(s2, -2), '-2 frames'),
        (lambda: draw(s2, torch.tensor([])), '0 frames'),
        (lambda: corrupt(draw(s2, 1), 'rust', torch.ones(2), make_generator(0)), "corruption 'rust'.*noise"),
        (lambda: prompts('animals'), "prompt set 'animals'.*activities"),
        (lambda: prompts('books', 'validation'), "split 'validation'.*'train' or 'test'"),
        (lambda: parse('a dog riding a bike'), "'a dog riding a bike' names no animal.*panda"),
        (lambda: start_images('cat'), "no animal 'cat'"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(VaderError, match=says) as e:
        call()
    assert '\n' not in str(e.value)
