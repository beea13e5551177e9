"The methods that VADER is compared with, on every base model of the zoo."

import math

import pytest
import torch

from test_precision import PROMPTS, bright, config, load_base
from vader_nb.config import Config
from vader_nb.core import VaderError, make_generator
from vader_nb.memory.lora import add_lora, lora_parameters
from vader_nb.training.ddpo import ddpo_collect, ddpo_step
from vader_nb.training.dpo import dpo_collect, dpo_step, preferences
from vader_nb.training.trainer import fit
from vader_nb.zoo import MODELS


def with_lora(name):
    model = load_base(name, 'fp32')
    torch.manual_seed(0)
    add_lora(model, 2, 2)
    return model, bright()


def settings(name, model, **changes):
    vader = config(name, model)
    return Config(**{**vars(vader), 'batch_size': 2, 'decoded_frames': 1, **changes})


@pytest.mark.parametrize('name', MODELS)
def test_dpo_begins_at_log_2_and_learns_from_every_base(name):
    model, reward = with_lora(name)
    c = settings(name, model, method='dpo', lr=1e-3)
    with torch.no_grad():
        (part,), scores = dpo_collect(model, reward, PROMPTS, c, make_generator(0))
    part['advantage'] = preferences(scores['reward'], PROMPTS, c, {})
    optimizer = torch.optim.AdamW(lora_parameters(model), 3e-3)
    losses = []
    for _ in range(4):
        loss, record = dpo_step(model, reward, part, c, make_generator(1))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 1e-4 and record['accuracy'].item() == 1


NOISY = dict(modelscope='ddim', videocrafter='ddim', svd='euler')


@pytest.mark.parametrize('name', NOISY)
def test_the_first_ratio_of_ddpo_is_one_on_every_base_that_draws_noise(name):
    model, reward = with_lora(name)
    c = settings(name, model, method='ddpo', eta=1.0, T=4, sampler=NOISY[name])
    with torch.no_grad():
        parts, scores = ddpo_collect(model, reward, PROMPTS, c, make_generator(0))
    assert len(parts) == 4 and scores['reward'].shape == (2,)
    for part in parts:
        part['advantage'] = torch.tensor([1.0, -1.0], device=model.device)
        loss, record = ddpo_step(model, reward, part, c, make_generator(0))
        assert (record['ratio'] - 1).abs().max() < 1e-5
    loss.backward()
    assert any(p.grad.abs().max() > 0 for p in lora_parameters(model))


@pytest.mark.parametrize('name', [name for name in MODELS if name not in NOISY])
def test_ddpo_refuses_a_base_without_noise_in_one_line(name, tmp_path):
    model = load_base(name, 'fp32')
    for eta, says in ((0.0, 'needs a sampler that draws noise'), (1.0, 'needs a sampler that draws noise')):
        with pytest.raises(VaderError, match=says) as e:
            c = settings(name, model, method='ddpo', eta=eta)
            list(fit(model, bright(), PROMPTS, c, tmp_path / 'run'))
        assert '\n' not in str(e.value)
