"Scores on held-out prompts, the best filter, the best of n clips."

import pytest, torch
from tiny_run import PROMPTS, TINY, bright, tiny_model
from vader_nb.core import VaderError
from vader_nb.rewards.base import reward_from
from vader_nb.training.evaluate import FILTER, best_of, evaluate, fit_filter, photo_filter
from vader_nb.config import Config


def test_scores_are_means_over_prompts_and_judges_may_abstain():
    judge = lambda video, prompts: dict(
        fox=torch.tensor([1.0 if 'fox' in p else torch.nan for p in prompts]),
        hat=torch.full((len(prompts),), torch.nan),
    )
    scores = evaluate(tiny_model(), bright(), PROMPTS, Config(**TINY), judge)
    assert set(scores) == {'bright', 'reward', 'fox'} and scores['fox'] == 1
    assert scores == evaluate(tiny_model(), bright(), PROMPTS, Config(**TINY), judge)


def test_a_score_that_is_not_finite_is_told():
    with pytest.raises(VaderError, match='bad is not finite'):
        evaluate(tiny_model(), reward_from(lambda v, p: v.mean((1, 2, 3, 4)) / 0, 'bad'), PROMPTS, Config(**TINY))


def test_a_filter_of_neutral_settings_changes_nothing():
    video = 0.1 + 0.8 * torch.rand(2, 3, 3, 16, 24)
    torch.testing.assert_close(photo_filter(video, {}), video)
    for name, (neutral, low, high) in FILTER.items():
        assert low <= neutral <= high
        for value in (low, high):
            changed = photo_filter(video, {name: value})
            assert changed.shape == video.shape and 0 <= changed.min() and changed.max() <= 1
            assert value == neutral or (changed - video).abs().mean() > 0.005, name
    with pytest.raises(VaderError, match='no setting sepia: use some of saturation'):
        photo_filter(video, dict(sepia=1.0))


def test_the_best_filter_is_found():
    video = 0.4 + 0.2 * torch.rand(2, 1, 3, 16, 16)
    bright = lambda v: v.mean((1, 2, 3, 4))
    assert bright(photo_filter(video, fit_filter(bright, video, 5, 2))).mean() > 0.9
    same = lambda v: -(v - video).square().mean((1, 2, 3, 4))
    assert fit_filter(same, video, 5, 2) == {name: values[0] for name, values in FILTER.items()}, (
        'nothing is better than no filter'
    )


def test_best_of_n_takes_the_best_clip_of_each_prompt():
    model, bright = tiny_model(), lambda v: v.mean((1, 2, 3, 4))
    one, four = [best_of(model, bright, PROMPTS, Config(**TINY), n) for n in (1, 4)]
    assert one.shape == four.shape and len(one) == len(PROMPTS)
    assert (bright(four) >= bright(one)).all() and (bright(four) > bright(one)).any()
