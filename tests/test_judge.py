"""Judges: shapes at any size and length, what is asked and what is not, errors, and that the trained one sees what is
there.
"""

import pytest, torch

from vader_nb.world import judge as judging
from vader_nb.core import VaderError, make_generator
from vader_nb.world.judge import QUESTIONS, Judge, judge_clips, judge_means, load_judge
from vader_nb.world.captions import captions, parse
from vader_nb.world.scenes import draw, scenes
from vader_nb.world.rating import rate, corrupt


@pytest.fixture(scope='module')
def random_judge():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Judge((8, 8, 16, 16)).eval().requires_grad_(False)


@pytest.mark.parametrize('b,f,h,w', [(1, 1, 64, 64), (2, 8, 64, 64), (3, 5, 32, 32), (2, 3, 48, 96), (1, 17, 33, 70)])
def test_a_judge_takes_any_clip(random_judge, b, f, h, w):
    video = torch.rand(b, f, 3, h, w, generator=make_generator(1))
    out = random_judge(video)
    assert {k: v.shape for k, v in out.items()} == {**{k: (b, n) for k, n in QUESTIONS.items()}, 'rating': (b,)}
    assert all(v.isfinite().all() for v in out.values())
    alone = random_judge(video[-1:])
    assert all((alone[k][0] - out[k][-1]).abs().max() < 1e-4 for k in out), 'a clip is judged for itself'


def test_a_judge_sees_motion(random_judge):
    video = torch.rand(1, 4, 3, 64, 64, generator=make_generator(2))
    shuffled, frozen = random_judge(video[:, [2, 0, 3, 1]]), random_judge(video[:, [0] * 4])
    now = random_judge(video)
    assert (now['activity'] - shuffled['activity']).abs().max() > 1e-6 and (
        now['activity'] - frozen['activity']
    ).abs().max() > 1e-6
    assert (now['rating'] - shuffled['rating']).abs() < 1e-5, 'the rating looks at single frames'


@pytest.fixture(scope='module')
def clips():
    s = scenes(48, 77, 'any', obj=[0, 1, 2] * 16)
    return draw(s, torch.arange(0, 8, 2)), s


def test_the_trained_judge_sees_what_is_there(clips):
    video, s = clips
    judge = load_judge()
    assert judge is load_judge() and not judge.training and not any(p.requires_grad for p in judge.parameters())
    got = judge_means(video, captions(s))
    assert got['animal'] > 0.9 and got['activity'] > 0.9 and abs(got['rule'] - rate(video).mean().item()) < 1e-4
    assert torch.corrcoef(torch.stack([judge(video)['rating'], rate(video)]))[0, 1] > 0.7
    wrecked = corrupt(video, 'noise', torch.ones(48), make_generator(0))
    assert judge_means(wrecked, captions(s))['rating'] < got['rating'] - 1


def test_only_what_a_prompt_says_is_asked(clips):
    video, texts = (
        clips[0][:4],
        ['a fox', 'a fox riding a bike', 'a pig wearing a hat', 'a pig playing chess next to a blue book'],
    )
    got = judge_clips(video, texts)
    assert list(got) == [*QUESTIONS, 'rating', 'rule'] and all(v.shape == (4,) for v in got.values())
    for k in QUESTIONS:
        asked = torch.tensor([parse(t)[k] for t in texts]) >= 0
        assert torch.equal(got[k].isnan(), ~asked) and set(got[k][asked].tolist()) <= {0.0, 1.0}
    assert set(judge_means(video[:1], texts[:1])) == {'animal', 'rating', 'rule'}


def test_right_and_wrong(clips):
    video, s = clips
    wrong = captions(scenes(48, 77, 'any', animal=(s.animal + 1) % 12, activity=(s.activity + 1) % 6, obj=0, hat=0))
    got = judge_means(video, wrong)
    assert got['animal'] < 0.1 and got['activity'] < 0.1 and 'obj' not in got


def test_clips_are_judged_as_shown(clips):
    "Values outside of [0, 1] are shown clamped, and so judged; half precision is welcome."
    video, texts = clips[0][:3], captions(clips[1][:3])
    loud = judge_clips(video * 3 - 1, texts)
    assert all(
        torch.equal(a, b) or a.isnan().any()
        for a, b in zip(loud.values(), judge_clips((video * 3 - 1).clamp(0, 1), texts).values())
    )
    assert judge_clips(video.half(), texts)['rating'].dtype == torch.float32
    assert not judge_clips(video.requires_grad_(), texts)['rating'].requires_grad


@pytest.mark.parametrize(
    'prompts,says',
    [
        (['a fox'], '2 clips a list of 2 prompts'),
        ('a fox', "2 prompts, not 'a fox'"),
        (['a fox', 'a cat'], "'a cat' names no animal"),
    ],
)
def test_bad_prompts(prompts, says):
    with pytest.raises(VaderError, match=says):
        judge_clips(torch.zeros(2, 1, 3, 64, 64), prompts)


def test_frames_are_no_clips():
    with pytest.raises(VaderError, match='5 axes'):
        judge_clips(torch.zeros(2, 3, 64, 64), ['a fox', 'a pig'])


@pytest.mark.parametrize('damage', ['cut', 'foreign'])
def test_a_damaged_judge_is_named(damage, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    file = tmp_path / 'model.safetensors'
    save_file({'weight': torch.zeros(3)}, file)
    if damage == 'cut':
        file.write_bytes(file.read_bytes()[:20])
    monkeypatch.setattr(judging, 'model_path', lambda name: tmp_path)
    load_judge.cache_clear()
    with pytest.raises(VaderError, match='is not the judge.*install the package again') as e:
        load_judge()
    assert '\n' not in str(e.value)


def test_diversity():
    from vader_nb.world.judge import diversity, mean_distance

    assert mean_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])) == pytest.approx(10 / 3)
    clips = draw(scenes(12, 3, 'any'))
    same = clips[:1].expand(6, -1, -1, -1, -1)
    assert max(diversity(same).values()) < 1e-3 < 0.3 < min(diversity(clips).values())
    grey = clips.mean(2, keepdim=True)
    assert diversity(0.8 * grey + 0.2 * clips)['hue'] == pytest.approx(
        diversity(clips)['hue'], rel=1e-3
    )  # paler, yet as many hues
    with pytest.raises(VaderError, match='at least two'):
        diversity(clips[:1])
