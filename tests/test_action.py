"The action reward: published preprocessing, resampling in time, prompts and classes, the two forms."

import pytest, torch
import torch.nn.functional as F
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEImageProcessor

from vader_nb.core import VaderError, make_generator
from vader_nb.pretrain.action import soft_labels
from vader_nb.rewards.base import check_reward, reward_gradient
from vader_nb.rewards import action
from vader_nb.rewards.action import Action, action_view, find_class, load_action, near_classes, plain, resample
from vader_nb.rewards.views import IMAGENET_MEAN, IMAGENET_STD
from vader_nb.world.scenes import ACTIVITIES, draw, scenes

NAMES = ['riding a bike', 'playing chess', 'washing dishes', 'eating doughnuts']


def tiny_videomae(frames=4):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VideoMAEForVideoClassification(
            VideoMAEConfig(
                image_size=32,
                patch_size=16,
                num_frames=frames,
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                id2label=dict(enumerate(NAMES)),
                label2id={n: i for i, n in enumerate(NAMES)},
                initializer_range=0.3,
            )
        )


@pytest.fixture
def video():
    return torch.rand(3, 4, 3, 40, 48, generator=make_generator(5)) * 0.8 + 0.1


prompts = ['a fox riding a bike', 'a panda playing chess', 'a pig washing dishes']

# Preprocessing


@pytest.mark.parametrize('h, w', [(32, 32), (40, 64), (97, 61), (64, 200)])
def test_view_is_what_the_processor_makes(h, w):
    "On whole-numbered pixels, up to the processor's rounding to 1/255 after the resize."
    u8 = F.interpolate(torch.rand(4, 3, 9, 9, generator=make_generator(h)) * 255, (h, w), mode='bilinear').byte()
    processor = VideoMAEImageProcessor(
        size=dict(shortest_edge=32),
        crop_size=dict(height=32, width=32),
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    theirs = processor(list(u8), return_tensors='pt').pixel_values
    ours = action_view(u8[None] / 255, 4, 32)
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1.1 / 255 / 0.224


def test_resample_is_linear_interpolation_with_fixed_ends():
    v = torch.rand(2, 5, 3, 4, 6, generator=make_generator(0))
    up = resample(v, 9)
    assert torch.allclose(up[:, ::2], v) and torch.allclose(up[:, 1::2], (v[:, 1:] + v[:, :-1]) / 2)
    assert torch.allclose(resample(v, 3), v[:, ::2]) and resample(v, 5) is v
    assert resample(v, 7).shape == (2, 7, 3, 4, 6)


@pytest.mark.parametrize('frames', [2, 5, 16, 51])
def test_clips_of_any_length_are_scored_and_the_ends_get_a_gradient(frames):
    x = torch.rand(2, frames, 3, 32, 32, generator=make_generator(1))
    scores, grad = reward_gradient(Action(tiny_videomae()), x, prompts[:2])
    assert scores.isfinite().all() and (grad[:, [0, -1]].flatten(2).norm(dim=2) > 0).all()


def test_every_pixel_of_a_square_gets_a_gradient():
    x = torch.rand(1, 4, 3, 100, 100, requires_grad=True)
    action_view(x, 4, 32).square().sum().backward()
    assert (x.grad != 0).float().mean() > 0.99


# From prompt to class


@pytest.mark.parametrize(
    'prompt, name',
    [
        ('A panda Riding a Bike.', 'riding a bike'),
        ('riding a bike', 'riding a bike'),
        ('two bears playing chess, oil painting', 'playing chess'),
    ],
)
def test_prompt_names_a_class(prompt, name):
    assert find_class(prompt, NAMES) == name


def test_longer_name_wins_and_brackets_are_left_out():
    assert (
        find_class('a man playing bass guitar', ['playing guitar', 'playing bass guitar', 'bass'])
        == 'playing bass guitar'
    )
    assert (
        find_class('a girl shooting goal in the rain', ['shooting goal (soccer)', 'shooting basketball'])
        == 'shooting goal (soccer)'
    )
    assert plain('Shooting goal (soccer)') == 'shooting goal'


def test_words_are_whole():
    with pytest.raises(VaderError, match='no action'):
        find_class('a dog overriding a bike', ['riding a bike'])


def test_near_matches():
    assert near_classes('a fox eating a doughnut', NAMES)[0] == 'eating doughnuts'
    with pytest.raises(
        VaderError,
        match="'a fox eating a doughnut' names no action that the classifier knows: say it as in 'eating doughnuts', ",
    ) as e:
        find_class('a fox eating a doughnut', NAMES)
    assert '\n' not in str(e.value)


def test_two_actions_are_an_error():
    with pytest.raises(VaderError, match='names 2 actions, riding a bike and playing chess: ask for one'):
        find_class('playing chess while riding a bike', NAMES)


# The reward


@pytest.mark.parametrize('form', ['log', 'probability'])
def test_contract(form, video):
    check_reward(Action(tiny_videomae(), form), video, prompts)


def test_score_is_transformers_own(video):
    "The log of the probability is minus the loss that transformers computes for the label."
    net = tiny_videomae().eval()
    losses = torch.stack([net(action_view(v[None], 4, 32), labels=torch.tensor([i])).loss for i, v in enumerate(video)])
    assert torch.allclose(Action(net)(video, prompts), -losses, atol=1e-5)
    assert torch.allclose(Action(net, 'probability')(video, prompts), (-losses).exp(), atol=1e-5)


def test_gradients_of_the_two_forms_differ_by_the_probability(video):
    net = tiny_videomae()
    (_, log), (p, prob) = (
        reward_gradient(Action(net), video, prompts),
        reward_gradient(Action(net, 'probability'), video, prompts),
    )
    assert torch.allclose(prob, p.view(-1, 1, 1, 1, 1) * log, atol=1e-6)


def test_very_sure_networks_do_not_overflow(video):
    net = tiny_videomae()
    net.classifier.weight.data *= 1e4
    scores, grad = reward_gradient(Action(net), video, prompts)
    assert scores.isfinite().all() and grad.isfinite().all()


def test_half_precision_counts_in_float32(video):
    reward = Action(tiny_videomae())
    full = reward(video, prompts)
    reward.net.to(torch.bfloat16)
    half = reward(video, prompts)
    assert half.dtype == torch.float32 and (half - full).abs().max() < 0.1


def test_bad_input(video):
    reward = Action(tiny_videomae())
    with pytest.raises(VaderError, match='pass prompts'):
        reward(video)
    with pytest.raises(VaderError, match='need 3 prompts, not 2'):
        reward(video, prompts[:2])
    with pytest.raises(VaderError, match='no action'):
        reward(video, ['a fox'] * 3)
    with pytest.raises(VaderError, match='at least 2 frames'):
        reward(video[:, :1], prompts)
    with pytest.raises(VaderError, match="unknown form 'odds'"):
        Action(tiny_videomae(), 'odds')


def test_load_from_published_layout(tmp_path, monkeypatch, video):
    net = tiny_videomae()
    net.save_pretrained(tmp_path)
    monkeypatch.setattr(action, 'model_path', lambda name, scale: tmp_path)
    for form in ('log', 'probability'):
        assert torch.allclose(
            load_action('full', 'cpu', form=form)(video, prompts), Action(net, form)(video, prompts), atol=1e-5
        )


def test_soft_labels():
    y = soft_labels(torch.tensor([2, 2, 2]), torch.tensor([0.0, 0.3, 1.0]))
    assert (
        torch.allclose(y.sum(1), torch.ones(3))
        and y[:2, 2].tolist() == [1, 1]
        and torch.allclose(y[2], torch.full((6,), 1 / 6))
    )


small = pytest.mark.skipif(
    not (action.model_path('clip').parent / 'videomae').exists(), reason='the small classifier is not there yet'
)


@small
def test_small_classifier_knows_what_is_done():
    reward, n = load_action(), 48
    s = scenes(n, 77, 'any', activity=torch.arange(n) % 6)
    with torch.no_grad():
        guess = reward.log_probabilities(draw(s)).argmax(1)
    assert [reward.net.config.id2label[i] for i in range(6)] == ACTIVITIES and (
        guess == s.activity
    ).float().mean() >= 0.9


@small
def test_small_classifier_passes_the_contract():
    check_reward(
        load_action(),
        draw(scenes(2, 5, 'any', activity=['riding a bike', 'standing still'])),
        ['a fox eating a donut', 'a fox riding a bike'],
    )


@pytest.mark.parametrize('asked', ['passing American football (in game)', 'passing American football (not in game)'])
def test_a_class_with_brackets_can_be_asked_for(asked):
    names = ['passing American football (in game)', 'passing American football (not in game)', 'riding a bike']
    assert find_class(asked, names) == find_class(f'a man {asked.lower()}', names) == asked
    with pytest.raises(VaderError, match='names 2 actions'):
        find_class('passing American football', names)
