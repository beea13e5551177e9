"Checkpointing, frame subsets and mixed precision: exactness on a tiny random ModelScope."

import pytest, torch

from tiny_models import Tiny, cond, gradient, pretend_training
from vader_nb.core import VaderError, make_generator
from vader_nb.memory.checkpointing import autocast, checkpoint_activations, checkpoint_network, checkpoint_reward
from vader_nb.memory.lora import add_lora, saved_bytes
from vader_nb.training.vader import pick_frames
from vader_nb.zoo import MODELS, REWARDS, load_model, load_reward


@pytest.fixture
def model():
    return Tiny()


@pytest.fixture
def x():
    return torch.randn(2, 4, 3, 8, 8, generator=make_generator(0))


def test_checkpointing_is_exact_and_saves(model, x):
    add_lora(model)
    pretend_training(model)
    whole = lambda: model.decode(model.predict(x, 500, cond, 3.0))
    plain, g = saved_bytes(whole, model.denoiser, model.vae), gradient(model, x)
    checkpoint_activations(model)
    checkpoint_activations(model)  # twice is once
    less, g2 = saved_bytes(whole, model.denoiser, model.vae), gradient(model, x)
    assert (g - g2).abs().max() <= 1e-6 * g.abs().max() and (g != 0).all() and less < plain / 3
    checkpoint_activations(model, on=False)
    assert saved_bytes(whole, model.denoiser, model.vae) == plain
    assert torch.equal(gradient(model, x), g)


def test_checkpointing_replays_dropout(model, x):
    "In training mode the recomputation must draw the same dropout mask."
    add_lora(model)
    pretend_training(model)
    model.denoiser.train()
    torch.manual_seed(0)
    g = gradient(model, x)
    checkpoint_activations(model)
    torch.manual_seed(0)
    g2 = gradient(model, x)
    assert (g - g2).abs().max() <= 1e-6 * g.abs().max()


def test_an_unknown_network_is_one_clear_line():
    with pytest.raises(VaderError, match='no layers of Linear are named: name those to recompute in checkpoint_layers'):
        checkpoint_network(torch.nn.Linear(2, 2), ())
    with pytest.raises(VaderError, match='Linear has no layers of the classes Block'):
        checkpoint_network(torch.nn.Linear(2, 2), ('Block',))


def recomputed(network):
    return sum('forward' in m.__dict__ for m in network.modules())


@pytest.mark.parametrize('name', [m for m in MODELS if m != 'wan'])
def test_every_small_base_names_layers_that_it_has(name):
    model = load_model(name, 'small', 'cpu')
    checkpoint_activations(model)
    kinds = {type(m).__name__ for net in (model.denoiser, model.vae) for m in net.modules() if 'forward' in m.__dict__}
    assert kinds <= set(model.checkpoint_layers) and recomputed(model.denoiser) > 3 and recomputed(model.vae) > 3


@pytest.mark.parametrize('name', REWARDS)
def test_every_small_reward_names_layers_that_it_has(name):
    reward = load_reward(name, 'small', 'cpu')
    if not list(reward.parameters()):
        assert reward.checkpoint_layers == (), 'without a network there is nothing to recompute'
        return
    checkpoint_reward(reward)
    assert recomputed(reward) > 1
    checkpoint_reward(reward, on=False)
    assert recomputed(reward) == 0


def test_a_sum_names_the_layers_of_its_terms_and_no_weights_need_none():
    aesthetic, hps, jpeg = [load_reward(name, 'small', 'cpu') for name in ('aesthetic', 'hps', 'jpeg')]
    total = aesthetic + hps + 0.1 * jpeg
    alone = 0
    for reward in (aesthetic, hps):
        checkpoint_reward(reward)
        alone += recomputed(reward)
        checkpoint_reward(reward, on=False)
    checkpoint_reward(total)
    checkpoint_reward(jpeg)
    assert recomputed(total) == alone > 2 and recomputed(jpeg) == 0


def test_single_frames_are_unbiased(model, x):
    add_lora(model)
    pretend_training(model)
    ones = torch.stack([gradient(model, x, [k]) for k in range(3)]).mean(0)
    full = gradient(model, x)
    assert (ones - full).abs().max() < 1e-5 * full.abs().max()


def test_pick_frames():
    assert pick_frames(8, None, make_generator(0)) == pick_frames(8, 9, make_generator(0)) == list(range(8))
    rng, counts = make_generator(0), torch.zeros(8)
    for _ in range(2000):
        frames = pick_frames(8, 3, rng)
        assert len(set(frames)) == 3 and frames == sorted(frames)
        counts[frames] += 1
    assert (counts / 2000 - 3 / 8).abs().max() < 0.05
    with pytest.raises(VaderError, match='at least one'):
        pick_frames(8, 0, rng)


def test_autocast():
    layer, v = torch.nn.Linear(4, 4), torch.randn(2, 4)
    for dtype in (torch.float32, torch.bfloat16):
        with autocast('cpu', dtype):
            assert layer(v).dtype == dtype
