"DDPO: ratios of 1, the exact policy gradient where it is known, bad input, a kill in the middle of the inner epochs."

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_run import PROMPTS, TINY, bright, tiny_fit, tiny_trainer, two_processes
from vader_nb.config import Config
from vader_nb.core import VaderError, make_generator, randn
from vader_nb.diffusion.samplers import DDIM
from vader_nb.models.base import Condition
from vader_nb.records import read_lines
from vader_nb.rewards.base import reward_from
from vader_nb.training.ddpo import (
    SIGMA_FLOOR,
    Policy,
    advantages,
    clipped_loss,
    ddpo_collect,
    ddpo_step,
    new_log_prob,
    step_log_prob,
)
from vader_nb.training.run_folder import checkpoints
from vader_nb.training.trainer import Method, Trainer

here = Path(__file__).parent
DDPO = dict(method='ddpo', eta=1.0, gradient_accumulation_steps=3)  # T = 3 in TINY
INNER = dict(DDPO, inner_epochs=2, experience_batches=2, train_steps=6, save_every=1, lr=1e-2, clip_range=1.0)


def collected(folder, **changes):
    run = tiny_trainer(folder, **{**DDPO, **changes})
    run.collect()
    return run


# Ratios


@pytest.mark.parametrize('how', ['mean', 'sum'])
def test_the_first_ratio_is_one(tmp_path, how):
    run = collected(tmp_path, log_prob=how)
    for part in run.parts:
        _, record = ddpo_step(run.model, run.reward, part, run.config, None)
        assert (record['ratio'] - 1).abs().max() < 1e-5 and record['kl'].max() < 1e-10


def test_the_ratio_moves_with_the_weights(tmp_path):
    run = collected(tmp_path)
    before = new_log_prob(run.model, run.parts[0], run.config)
    with torch.no_grad():
        for p in run.weights.values():
            p += 0.1
    assert (new_log_prob(run.model, run.parts[0], run.config) - before).abs().min() > 1e-5


def test_a_part_has_one_step_of_each_clip_and_all_parts_have_each_step_once(tmp_path):
    run = collected(tmp_path, batch_size=4)
    steps = torch.stack([part['step'] for part in run.parts])
    assert steps.shape == (3, 4) and (steps.sort(0).values == torch.arange(3)[:, None]).all()
    assert not (steps == steps[:, :1]).all(), 'each clip has an order of its own'


def test_parts_are_the_decisions_of_the_rollout(tmp_path):
    run = collected(tmp_path)
    parts = sorted(((part['step'][0].item(), part) for part in run.parts), key=lambda pair: pair[0])
    for (_, part), (_, following) in zip(parts, parts[1:]):
        torch.testing.assert_close(part['after'][0], following['before'][0])


def test_the_mean_is_the_sum_over_the_elements(tmp_path):
    x, mean = torch.randn(2, 2, 4, 3, 2, 2)
    exact = torch.distributions.Normal(mean, 0.3).log_prob(x).sum((1, 2, 3, 4))
    torch.testing.assert_close(step_log_prob(x, mean, 0.3, 'sum').float(), exact)
    torch.testing.assert_close(step_log_prob(x, mean, 0.3, 'mean').float(), exact / 48)


def test_the_last_step_has_a_finite_probability():
    to_clean = DDIM(torch.tensor([500, 1]), [0.3, 0.999], [0.999, 1.0], eta=1.0)
    policy, x, noise = Policy(to_clean), torch.zeros(1, 2), torch.ones(1, 2)
    assert to_clean.step(1, x, x, noise).sigma == 0
    step = policy.step(1, x, x, noise)
    assert step.sigma == SIGMA_FLOOR and torch.allclose(step.x, step.mean + SIGMA_FLOOR)
    assert step_log_prob(step.x, step.mean, step.sigma, 'sum').isfinite().all()
    assert policy.step(0, x, x, noise).sigma == to_clean.step(0, x, x, noise).sigma > SIGMA_FLOOR


def test_guidance_is_part_of_the_policy(tmp_path):
    run = tiny_trainer(tmp_path, **DDPO, guidance=3.0)
    record = run.train_step()
    assert record['denoiser_passes'] == 2 * (3 + 3) * 2 and record['backward_passes'] == 2 * 3 * 2
    assert record['ratio'] == pytest.approx(1, abs=1e-5) and record['gradient_norm'] > 0


# The gradient


class OneStep:
    "A video model whose prediction is its one weight, whatever the latents: a Gaussian policy of one step."

    name, device = 'one step', torch.device('cpu')

    def __init__(self, D):
        self.weight = torch.zeros(D, 1, 1, 1, requires_grad=True)
        self.D = D

    def encode(self, prompts, *size):
        return Condition(torch.zeros(len(prompts), 1), torch.zeros(len(prompts), 1))

    def noise(self, n, *size):
        return randn((n, self.D, 1, 1, 1), size[-1])

    def predict(self, x, t, cond, guidance):
        return self.weight.expand(len(x), -1, -1, -1, -1)

    def decode(self, latents, frames=None):
        return latents

    def sampler(self, steps, kind, eta, size):
        return DDIM(torch.tensor([500]), [0.3], [0.8], 'sample', eta)


def linear(direction):
    score = lambda video, prompts: (video.flatten(1) * direction).sum(1)
    parts = lambda video, prompts, generator: dict(linear=score(video, prompts))
    return SimpleNamespace(wants='clip', parts=parts, combine=lambda parts: parts['linear'])


def one_step_gradient(n, D, seed, direction, how='sum', clip=1e6):
    "The estimate from n clips, by the functions of the library, with plain differences to the mean for advantages."
    model = OneStep(D)
    config = Config(method='ddpo', eta=1.0, T=1, K=1, log_prob=how, clip_range=clip, frames=1, height=8, width=8)
    with torch.no_grad():
        parts, scores = ddpo_collect(model, linear(direction), ['x'] * n, config, make_generator(seed))
    rewards = scores['reward']
    part = {**parts[0], 'advantage': (rewards - rewards.mean()) * n / (n - 1)}  # unbiased
    loss, record = ddpo_step(model, None, part, config, None)
    assert len(parts) == 1 and record['ratio'].allclose(torch.ones(n).double())
    return -torch.autograd.grad(loss, model.weight)[0].flatten()


def exact_gradient(D, direction):
    "R is linear in the latents, so the gradient of its expectation is that of the mean."
    model = OneStep(D)
    sampler = model.sampler(1, 'ddim', 1.0, ())
    x = torch.randn(1, D, 1, 1, 1)
    mean = sampler.step(0, x, model.predict(x, 0, None, 1.0), torch.zeros_like(x)).mean
    return torch.autograd.grad((mean.flatten() * direction).sum(), model.weight)[0].flatten()


def test_the_estimate_is_the_exact_policy_gradient_and_its_variance_falls_as_one_over_n():
    D = 6
    direction = torch.randn(D, generator=make_generator(3))
    exact = exact_gradient(D, direction)
    variances = {}
    for n in (16, 64, 256):
        many = torch.stack([one_step_gradient(n, D, 1000 * n + i, direction) for i in range(300)])
        deviation = (many.var(0).sum() / len(many)).sqrt()
        assert (many.mean(0) - exact).norm() < 4 * deviation, 'right on average'
        variances[n] = many.var(0).sum().item()
    assert variances[16] / variances[64] == pytest.approx(4, rel=0.25)
    assert variances[64] / variances[256] == pytest.approx(4, rel=0.25)


def test_mean_log_probs_give_the_same_direction():
    direction = torch.ones(6)
    total, mean = [one_step_gradient(64, 6, 0, direction, how) for how in ('sum', 'mean')]
    torch.testing.assert_close(total, 6 * mean)


def test_without_clipping_one_inner_epoch_is_reinforce(tmp_path):
    run = collected(tmp_path, clip_range=1e6)
    weights = list(run.weights.values())
    for part in run.parts:
        loss, _ = ddpo_step(run.model, run.reward, part, run.config, None)
        ours = torch.autograd.grad(loss, weights, allow_unused=True)
        score = -(part['advantage'] * new_log_prob(run.model, part, run.config)).mean()
        plain = torch.autograd.grad(score, weights, allow_unused=True)
        largest = max(g.abs().max() for g in plain if g is not None)
        assert largest > 0
        assert all((a - b).abs().max() < 1e-4 * largest for a, b in zip(ours, plain) if b is not None)


def test_clipping_stops_the_push_in_the_wanted_direction_only():
    new = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    losses, _ = clipped_loss(new, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    (gradient,) = torch.autograd.grad(losses.sum(), new)
    assert (gradient != 0).tolist() == [False, True, True, False]


# Advantages


def test_advantages_of_a_batch():
    values = advantages(torch.tensor([1.0, 2.0, 3.0]), ['a', 'b', 'c'], Config(), {})
    torch.testing.assert_close(values, torch.tensor([-(1.5**0.5), 0.0, 1.5**0.5]))
    assert advantages(torch.tensor([0.0] * 99 + [1.0]), ['a'] * 100, Config(), {}).max() == 5


def test_advantages_of_a_prompt_wait_for_16_rewards():
    config, memory = Config(advantage='prompt'), {}
    rewards = torch.cat([torch.arange(8.0), 100 + torch.arange(8.0)])
    prompts = ['easy' if r >= 100 else 'hard' for r in rewards]
    first = advantages(rewards, prompts, config, memory)
    assert first[:8].max() < 0 < first[8:].min(), 'compared with the batch: the easy prompt seems good'
    second = advantages(rewards, prompts, config, memory)
    torch.testing.assert_close(second[:8], second[8:], msg='compared with their own prompts')
    assert second.mean().abs() < 1e-6 and {len(past) for past in memory.values()} == {16}
    advantages(rewards, prompts, config, memory)
    assert {len(past) for past in memory.values()} == {16}


@pytest.mark.parametrize('n', [1, 4])
def test_equal_rewards_are_said(n):
    with pytest.raises(VaderError, match=f'all {n} clips have the reward 2') as e:
        advantages(torch.full((n,), 2.0), ['a'] * n, Config(), {})
    assert '\n' not in str(e.value)


def test_a_reward_without_variance_stops_the_run(tmp_path):
    flat = reward_from(lambda video, prompts: torch.ones(len(video)), 'flat')
    with pytest.raises(VaderError, match='none is better than another'):
        list(tiny_fit(tmp_path, reward=flat, changes=DDPO))


# Bad input


@pytest.mark.parametrize(
    'changes, says',
    [
        (dict(eta=0.0), "ddpo needs a sampler that draws noise.*eta=1"),
        (dict(sampler='dpm++', eta=0.0), 'ddpo needs a sampler that draws noise'),
        (dict(clip_range=0.0), 'clip_range is 0.0, but must be above 0'),
        (dict(gradient_accumulation_steps=2), 'choose gradient_accumulation_steps that divide 3'),
        (dict(advantage='best'), "unknown advantage 'best'"),
        (dict(log_prob='max'), "unknown log_prob 'max'"),
        (dict(inner_epochs=0), 'inner_epochs is 0'),
    ],
)
def test_settings_with_which_ddpo_cannot_work(changes, says):
    with pytest.raises(VaderError, match=says) as e:
        Config(**{**TINY, **DDPO, **changes})
    assert '\n' not in str(e.value)


def test_ddpm_is_a_policy_too(tmp_path):
    assert list(tiny_fit(tmp_path, changes=dict(DDPO, sampler='ddpm', eta=0.0, train_steps=1)))


# A run


def timeless(folder):
    lines = read_lines(folder / 'metrics.jsonl')
    return [{k: v for k, v in line.items() if k not in ('seconds', 'peak_memory')} for line in lines]


def lora(folder):
    return (folder / 'lora/adapter_model.safetensors').read_bytes()


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ddpo') / 'unbroken'
    list(tiny_fit(folder, changes=INNER))
    return folder


def test_experience_is_collected_when_it_is_used_up(unbroken):
    lines = read_lines(unbroken / 'metrics.jsonl')
    assert [r['reward_queries'] for r in lines] == [4] * 4 + [8] * 2  # 2 batches of 2 clips, for 2 x 2 x 3 passes
    assert len({r['reward'] for r in lines[:4]}) == 1 and lines[4]['reward'] != lines[0]['reward']
    assert lines[0]['ratio'] == pytest.approx(1, abs=1e-4) != lines[3]['ratio']
    forward, backward = [lines[-1][k] for k in ('denoiser_passes', 'backward_passes')]
    assert backward == 6 * 3 * 2 * 2 and forward - backward == 2 * 4 * 3 * 2  # guidance doubles each


@pytest.mark.parametrize('stop', [2, 3])
def test_a_run_killed_in_the_middle_of_its_inner_epochs_goes_on_bit_for_bit(unbroken, tmp_path, stop):
    program = [sys.executable, here / 'tiny_run.py', tmp_path / 'killed', json.dumps(INNER)]
    killed = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while killed.poll() is None and len(read_lines(tmp_path / 'killed/metrics.jsonl')) < stop:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    list(tiny_fit(tmp_path / 'killed', changes=INNER, resume=True))
    assert timeless(tmp_path / 'killed') == timeless(unbroken) and lora(tmp_path / 'killed') == lora(unbroken)


def test_a_checkpoint_holds_what_is_left_of_the_experience(unbroken):
    state = torch.load(checkpoints(unbroken)[-1], weights_only=True)
    assert state['used'] == 6 and len(state['parts'][0]) == 6 and len(state['scores']['reward']) == 4


def test_experience_of_two_processes_is_not_taken_by_one(tmp_path):
    run = collected(tmp_path)
    with pytest.raises(VaderError, match='the experience of 2 processes, not 1'):
        run.load_parts([run.parts, run.parts])


def test_what_a_prompt_got_survives_a_resume(tmp_path):
    changes = dict(DDPO, advantage='prompt', train_steps=2, save_every=1)
    list(tiny_fit(tmp_path, changes=changes))
    memory = torch.load(checkpoints(tmp_path)[-1], weights_only=True)['memory']
    assert set(memory) <= set(PROMPTS) and sum(map(len, memory.values())) == 4


def test_two_processes_are_one(tmp_path):
    changes = dict(INNER, batch_size=4, train_steps=5, advantage='prompt')
    two = two_processes(tmp_path / 'two', changes)
    list(tiny_fit(tmp_path / 'one', changes=changes))
    assert two.wait() == 0, two.stderr.read()
    for a, b in zip(timeless(tmp_path / 'one'), timeless(tmp_path / 'two')):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_bf16_keeps_the_ratio_near_one(tmp_path):
    run = tiny_trainer(tmp_path, **DDPO, mixed_precision='bf16')
    record = run.train_step()
    assert record['ratio'] == pytest.approx(1, abs=1e-3) and record['gradient_norm'] > 0


def test_a_method_of_ones_own(tmp_path):
    "A trainer runs any method that collects parts, without knowing what is in them."
    seen = []

    def collect(model, reward, prompts, config, generator):
        return [dict(prompts=prompts, secret=i) for i in range(2)], dict(reward=torch.arange(len(prompts)).float())

    def step(model, reward, part, config, generator):
        seen.append((part['secret'], part['advantage'].tolist()))
        return sum(p.sum() for p in model.denoiser.parameters() if p.requires_grad), {}

    method = Method(step, collect, lambda rewards, prompts, config, memory: rewards * 2)
    run = Trainer(tiny_trainer(tmp_path).model, bright(), PROMPTS, Config(**TINY), tmp_path, method=method)
    other = tiny_trainer(tmp_path)
    for name in ('model', 'accelerator', 'optimizer', 'weights'):
        setattr(run, name, getattr(other, name))
    for _ in range(2):
        record = run.train_step()
    assert (
        sorted(seen) == [(0, [0.0, 2.0]), (1, [0.0, 2.0])] and record['reward'] == 0.5 and record['reward_queries'] == 2
    )
