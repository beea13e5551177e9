"Diffusion-DPO: log 2 at first, the winner's gain, pairs from a file, bad input, exact resume within inner epochs."

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import PROMPTS, TINY, bright, tiny_fit, tiny_model, tiny_trainer, two_processes
from vader_nb.config import Config
from vader_nb.core import VaderError, make_generator
from vader_nb.diffusion.samplers import sampler_from_config
from vader_nb.diffusion.schedules import alpha_bars
from vader_nb.models.base import Condition
from vader_nb.records import read_lines
from vader_nb.rewards.base import reward_from
from vader_nb.show import save_gif, save_mp4
from vader_nb.training.dpo import (
    LEVELS,
    check_dpo,
    denoising_errors,
    dpo_collect,
    dpo_loss,
    dpo_step,
    preferences,
    read_clip,
    read_pairs,
    shared_noise,
    to_latents,
)
from vader_nb.training.run_folder import checkpoints

here = Path(__file__).parent
DPO = dict(method='dpo')
INNER = dict(DPO, inner_epochs=3, experience_batches=2, train_steps=8, save_every=1, lr=1e-2)


def collected(folder, **changes):
    run = tiny_trainer(folder, **{**DPO, **changes})
    run.collect()
    return run


# The loss


def test_the_loss_is_log_2_before_the_first_update(tmp_path):
    run = collected(tmp_path, batch_size=4)
    loss, record = dpo_step(run.model, run.reward, run.parts[0], run.config, make_generator(0))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6) and record['accuracy'].shape == (2,)


def test_the_formula():
    errors, reference = torch.tensor([[0.1, 0.4]]), torch.tensor([[0.2, 0.3]])
    losses, margin = dpo_loss(errors, reference, 10.0)
    assert margin.item() == pytest.approx(0.2)
    assert losses.item() == pytest.approx(-math.log(1 / (1 + math.exp(-10 / 2 * 0.2))))


class OneNumber:
    "A video model that predicts clean latents of one number everywhere, whatever it is given."

    name, device = 'one number', torch.device('cpu')

    def __init__(self):
        self.weight, self.base = torch.tensor(0.0, requires_grad=True), torch.tensor(0.0)
        self.denoiser = self
        self.off = False

    def disable_adapter(self):
        from contextlib import contextmanager

        @contextmanager
        def switched():
            self.off = True
            yield
            self.off = False

        return switched()

    def sampler(self, steps, kind, eta, size):
        return sampler_from_config(dict(prediction_type='sample'), kind, steps, eta)

    def encode(self, prompts, *size):
        return Condition(torch.zeros(len(prompts), 1), torch.zeros(len(prompts), 1))

    def predict(self, x, t, cond, guidance):
        return (self.base if self.off else self.weight).expand(x.shape)


def two_clips(won=1.0):
    "The winner is +1 everywhere, the loser -1."
    latents = torch.ones(2, 1, 1, 2, 2) * torch.tensor([won, -won]).view(2, 1, 1, 1, 1)
    return dict(prompts=['x', 'x'], latents=latents, advantage=torch.tensor([won, -won]))


@pytest.mark.parametrize('won', [1.0, -1.0])
def test_the_gradient_raises_the_likelihood_of_the_winner_by_the_known_amount(won):
    "e = (w -+ 1)^2, so the slope of the loss at w = 0 is -beta/2 * sigmoid(0) * 4 = -beta."
    model, config = OneNumber(), Config(method='dpo', beta=7.0)
    loss, record = dpo_step(model, None, two_clips(won), config, make_generator(0))
    assert torch.autograd.grad(loss, model.weight)[0].item() == pytest.approx(-7, rel=1e-5), 'towards +1, the winner'
    assert record['winner_error'].item() == record['loser_error'].item() == 1


def test_following_it_ends_at_the_known_place():
    "The loss of both orders, the right one with probability p, is least where sigmoid(beta/2 * margin) = p."
    model, config, p = OneNumber(), Config(method='dpo', beta=2.0), 0.8
    optimizer = torch.optim.SGD([model.weight], 0.05)
    for _ in range(400):
        right, _ = dpo_step(model, None, two_clips(1.0), config, make_generator(0))
        reversed_pair = dict(two_clips(1.0), advantage=torch.tensor([-1.0, 1.0]))
        wrong, _ = dpo_step(model, None, reversed_pair, config, make_generator(0))
        (p * right + (1 - p) * wrong).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.weight.item() == pytest.approx(math.log(p / (1 - p)) / 4, rel=1e-3)  # margin = 4 w


def test_a_larger_beta_lets_go_earlier():
    margin = torch.tensor([0.01], requires_grad=True)

    def push(beta):
        losses, _ = dpo_loss(torch.stack([torch.zeros(1), margin], 1), torch.zeros(1, 2), beta)
        return -torch.autograd.grad(losses.sum(), margin)[0].item() / beta

    assert push(5000.0) < push(500.0) < push(50.0)


def test_a_pair_shares_its_noise_and_its_level():
    latents = torch.zeros(6, 4, 2, 3, 3)
    noise, level = shared_noise(latents, make_generator(0))
    assert torch.equal(noise[::2], noise[1::2]) and torch.equal(level[::2], level[1::2])
    assert len(set(level.tolist())) == 3 and not torch.equal(noise[0], noise[2])


def test_noise_levels_are_uniform():
    _, level = shared_noise(torch.zeros(20000, 1, 1, 1, 1), make_generator(0))
    counts = torch.histc(level.float(), 10, 0, LEVELS)
    assert level.min() >= 0 and level.max() < LEVELS and (counts - 2000).abs().max() < 200


def test_errors_are_those_of_plain_training():
    model, config = tiny_model(), Config(**TINY)
    x, level = model.noise(2, generator=make_generator(0)), torch.tensor([490, 150])
    t = model.sampler(LEVELS).timesteps[level]
    assert (t - torch.tensor([18, 698])).abs().max() <= 1, 'every second timestep of training'
    noise = model.noise(2, generator=make_generator(1))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    a = alpha_bars(betas)[t].view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        pred = model.predict(a.sqrt() * x + (1 - a).sqrt() * noise, t, model.encode(PROMPTS[:2]), 1.0)
        ours = denoising_errors(model, x, noise, level, PROMPTS[:2], config)
    torch.testing.assert_close(ours, (pred - noise).square().flatten(1).mean(1), atol=1e-5, rtol=1e-4)


def test_the_reference_is_the_model_without_lora(tmp_path):
    run = collected(tmp_path, batch_size=4)
    with torch.no_grad():
        for p in run.weights.values():
            p += 0.1
    loss, record = dpo_step(run.model, run.reward, run.parts[0], run.config, make_generator(0))
    assert loss.item() != pytest.approx(math.log(2), abs=1e-4) and set(record['accuracy'].tolist()) <= {0.0, 1.0}


# Pairs from the model


def test_two_clips_of_each_prompt(tmp_path):
    run = collected(tmp_path, batch_size=4)
    (part,) = run.parts
    assert part['prompts'][0::2] == part['prompts'][1::2] and len(part['latents']) == 4
    assert not torch.equal(part['latents'][0], part['latents'][1]) and run.queries == 4
    better = run.scores['reward'][0::2] > run.scores['reward'][1::2]
    assert part['advantage'].tolist() == [x for b in better for x in ((1.0, -1.0) if b else (-1.0, 1.0))]


def test_a_tie_teaches_nothing(tmp_path):
    assert preferences(torch.tensor([2.0, 2.0, 1.0, 3.0]), [], None, {}).tolist() == [0, 0, -1, 1]
    run = collected(tmp_path, batch_size=4)
    with torch.no_grad():
        for p in run.weights.values():
            p += 0.1

    def loss(advantage):
        part = {**run.parts[0], 'advantage': torch.tensor(advantage)}
        return dpo_step(run.model, run.reward, part, run.config, make_generator(0))[0].item()

    assert loss([0.0, 0.0, 0.0, 0.0]) == 0 != loss([1.0, -1.0, 0.0, 0.0])


def test_a_reward_without_variance_stops_the_run(tmp_path):
    flat = reward_from(lambda video, prompts: torch.ones(len(video)), 'flat')
    with pytest.raises(VaderError, match='in none of the 1 pairs') as e:
        list(tiny_fit(tmp_path, reward=flat, changes=DPO))
    assert '\n' not in str(e.value)


# Pairs from a file


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    "Clips in the size of the tiny model, as GIF and MP4, and a file of two pairs."
    folder = tmp_path_factory.mktemp('pairs')
    videos = torch.rand(4, 4, 3, 16, 16, generator=make_generator(0))
    for i in (0, 2):
        save_mp4(videos[i], folder / f'{i}.mp4')
    for i in (1, 3):
        save_gif(videos[i], folder / f'{i}.gif')
    lines = [dict(prompt=PROMPTS[i], winner=f'{2 * i}.mp4', loser=f'{2 * i + 1}.gif') for i in range(2)]
    (folder / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n\n')
    return folder


def test_a_file_of_pairs_trains_without_a_reward(clips, tmp_path):
    def never(video, prompts):
        raise AssertionError('no reward is needed')

    changes = dict(DPO, pairs=str(clips / 'pairs.jsonl'), batch_size=4, train_steps=2)
    from vader_nb.training.trainer import fit

    lines = list(fit(tiny_model(), reward_from(never, 'never'), PROMPTS, Config(**{**TINY, **changes}), tmp_path))
    assert [r['reward_queries'] for r in lines] == [0, 0] and lines[0]['reward'] is None
    assert lines[0]['loss'] == pytest.approx(math.log(2), abs=1e-5) and lines[1]['backward_passes'] == 8
    assert (tmp_path / 'report.md').exists()


def test_clips_are_read_and_encoded(clips):
    config, model = Config(**TINY), tiny_model()
    for name in ('0.mp4', '1.gif'):
        clip = read_clip(clips / name, config)
        assert clip.shape == (4, 3, 16, 16) and 0 <= clip.min() and clip.max() <= 1
    latents = to_latents(model, clip[None])
    assert latents.shape == model.noise(1).shape
    again = to_latents(model, torch.cat([clip[None], 1 - clip[None]]))
    torch.testing.assert_close(again[:1], latents, atol=1e-4, rtol=1e-4)


def test_winners_come_first(clips):
    config = Config(**{**TINY, **DPO}, pairs=str(clips / 'pairs.jsonl'))
    (part,), scores = dpo_collect(tiny_model(), None, ['', ''], config, make_generator(0))
    pair = next(p for p in read_pairs(clips / 'pairs.jsonl') if p['prompt'] == part['prompts'][0])
    expected = to_latents(tiny_model(), torch.stack([read_clip(pair[side], config) for side in ('winner', 'loser')]))
    torch.testing.assert_close(part['latents'], expected)
    assert part['advantage'].tolist() == [1, -1] and scores == {}


good = dict(prompt=PROMPTS[0], winner='0.mp4', loser='1.gif')


@pytest.mark.parametrize(
    'line, says',
    [
        (dict(good, winner='none.mp4'), "line 2: the winner 'none.mp4' is missing"),
        (dict(good, loser=''), "line 2: the loser '' is missing"),
        (dict(good, prompt=PROMPTS[:2]), 'the clips of a pair share one prompt'),
        (dict(good, prompt=' '), 'the clips of a pair share one prompt'),
        (
            dict(winner='0.mp4', loser='1.gif', winner_prompt='a fox', loser_prompt='a dog'),
            'must have one prompt for both',
        ),
        (dict(winner='0.mp4', loser='1.gif'), 'must have one prompt for both clips'),
        ('{"prompt"', 'must have one prompt for both clips, a winner and a loser'),
    ],
)
def test_a_file_with_a_wrong_line(clips, tmp_path, line, says):
    bad = clips / 'bad.jsonl'
    bad.write_text(json.dumps(good) + '\n' + (line if isinstance(line, str) else json.dumps(line)))
    with pytest.raises(VaderError, match=says) as e:
        list(tiny_fit(tmp_path / 'run', changes=dict(DPO, pairs=str(bad))))
    assert '\n' not in str(e.value) and not (tmp_path / 'run').exists()


def test_files_that_hold_no_pairs(clips, tmp_path):
    (clips / 'empty.jsonl').write_text('\n')
    config = Config(**{**TINY, **DPO})
    for name, says in dict(none='no file of pairs', empty='holds no pairs').items():
        wrong = replace(config, pairs=str(clips / f'{name}.jsonl'))
        with pytest.raises(VaderError, match=says):
            check_dpo(tiny_model(), wrong)
    with pytest.raises(VaderError, match='holds 2 pairs, fewer than the 3 of a batch'):
        check_dpo(tiny_model(), replace(config, pairs=str(clips / 'pairs.jsonl'), batch_size=6))


def test_clips_that_do_not_fit(clips):
    config = Config(**TINY)
    with pytest.raises(VaderError, match='must be a clip of 5 frames in the shape of 16x16: it has 4 frames'):
        read_clip(clips / '0.mp4', replace(config, frames=5))
    with pytest.raises(VaderError, match='in the shape of 16x32'):
        read_clip(clips / '0.mp4', replace(config, width=32))
    with pytest.raises(VaderError, match='it has 0 frames'):
        read_clip(clips / 'pairs.jsonl', config)


# Bad input


@pytest.mark.parametrize(
    'changes, says',
    [
        (dict(beta=0.0), 'beta is 0.0, but must be above 0'),
        (dict(batch_size=3), 'a batch of 3 cannot hold pairs: choose an even batch_size'),
        (dict(batch_size=1), 'a batch of 1 cannot hold pairs'),
        (dict(gradient_accumulation_steps=2), 'gradient_accumulation_steps that divide 1'),
    ],
)
def test_settings_with_which_dpo_cannot_work(changes, says):
    with pytest.raises(VaderError, match=says) as e:
        Config(**{**TINY, **DPO, **changes})
    assert '\n' not in str(e.value)


def test_what_the_model_cannot_do_is_refused(clips):
    model, config = tiny_model(), Config(**{**TINY, **DPO})
    with pytest.raises(VaderError):
        check_dpo(model, replace(config, sampler='rflow'))
    noise = model.noise
    model.noise = lambda *args: noise(*args)[:, :, ::2]  # as a VAE that squeezes time has it
    check_dpo(model, config)
    with pytest.raises(VaderError, match='not one of images, so clips from a file cannot become latents'):
        check_dpo(model, replace(config, pairs=str(clips / 'pairs.jsonl')))


# A run


def timeless(folder):
    lines = read_lines(folder / 'metrics.jsonl')
    return [{k: v for k, v in line.items() if k not in ('seconds', 'peak_memory')} for line in lines]


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dpo') / 'unbroken'
    list(tiny_fit(folder, changes=INNER))
    return folder


def test_everything_is_counted(unbroken):
    lines = read_lines(unbroken / 'metrics.jsonl')
    assert [r['reward_queries'] for r in lines] == [4] * 6 + [8] * 2
    backward, forward = [lines[-1][k] for k in ('backward_passes', 'denoiser_passes')]
    assert backward == 8 * 2 and forward == 8 * 4 + 8 * 3 * 2  # with the reference; 8 clips sampled with guidance
    assert lines[0]['loss'] == pytest.approx(math.log(2), abs=1e-5) and lines[-1]['loss'] != lines[0]['loss']


@pytest.mark.parametrize('stop', [2, 6, 7])
def test_a_run_left_in_the_middle_of_its_inner_epochs_goes_on_bit_for_bit(unbroken, tmp_path, stop):
    for record in tiny_fit(tmp_path, changes=INNER):
        if record['step'] == stop:
            break
    list(tiny_fit(tmp_path, changes=INNER, resume=True))
    weights = [(folder / 'lora/adapter_model.safetensors').read_bytes() for folder in (unbroken, tmp_path)]
    assert timeless(tmp_path) == timeless(unbroken) and weights[0] == weights[1]
    assert torch.load(checkpoints(tmp_path)[-1], weights_only=True)['used'] == 2


def test_two_processes_are_one(tmp_path):
    changes = dict(INNER, batch_size=4, train_steps=4)
    two = two_processes(tmp_path / 'two', changes)
    list(tiny_fit(tmp_path / 'one', changes=changes))
    assert two.wait() == 0, two.stderr.read()
    for a, b in zip(timeless(tmp_path / 'one'), timeless(tmp_path / 'two')):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5)


def test_a_process_that_would_get_one_clip_is_refused(tmp_path):
    run = tiny_trainer(tmp_path, **DPO)
    with pytest.raises(VaderError, match='1 clips a process cannot hold pairs'):
        dpo_collect(run.model, bright(), PROMPTS[:1], run.config, make_generator(0))
