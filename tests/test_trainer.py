"The trainer: one process or two, killed or not, in good and bad weather; all on a tiny random model."

import errno, json, os, shutil, signal, subprocess, sys, threading, time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from huggingface_hub import ModelCard
from tiny_models import tiny_pipeline
from tiny_run import PROMPTS, TESTS, TINY, bright, tiny_fit, tiny_model, tiny_trainer, two_processes
from vader_nb.core import VaderError, make_generator, write_json
from vader_nb.memory.lora import add_lora
from vader_nb.memory.lora import saved_bytes
from vader_nb.zoo import CHECKPOINTS, load_reward
from vader_nb.rewards.base import reward_from
from vader_nb.diffusion.rollout import sample
from vader_nb.training.run_folder import check_inputs, checkpoints, run_inputs
from vader_nb.records import read_lines
from vader_nb.config import Config
from vader_nb.training.report import write_card
from vader_nb.training.trainer import Trainer, fit
from vader_nb.training.vader import vader_step

here = Path(__file__).parent
LONG = dict(train_steps=5, save_every=2, gradient_accumulation_steps=2)


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    "A whole run with some chance in its reward."
    folder = tmp_path_factory.mktemp('runs') / 'unbroken'
    return folder, list(tiny_fit(folder, chance=0.01, changes=LONG))


def timeless(folder, name='metrics.jsonl'):
    return [{k: v for k, v in r.items() if k not in ('seconds', 'peak_memory')} for r in read_lines(folder / name)]


def assert_equal_runs(a, b):
    assert (a / 'lora/adapter_model.safetensors').read_bytes() == (b / 'lora/adapter_model.safetensors').read_bytes()
    for name in ('metrics.jsonl', 'eval.jsonl'):
        assert timeless(a, name) == timeless(b, name)


def command(*args):
    return subprocess.Popen(
        [sys.executable, *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


# what a run writes


def test_the_run_folder_is_complete(unbroken):
    folder, records = unbroken
    files = {'config.json', 'inputs.json', 'metrics.jsonl', 'eval.jsonl', 'report.md', 'curve.png'}
    assert {p.name for p in folder.iterdir()} == files | {'checkpoints', 'lora', 'samples', 'tensorboard'}
    clips = {'before.gif', 'before.mp4', 'after.gif', 'after.mp4', 'strips.png'}
    assert {p.name for p in (folder / 'samples').iterdir()} == clips
    assert [p.name for p in checkpoints(folder)] == ['step_000004.pt', 'step_000005.pt']
    assert all(
        (folder / link).exists()
        for link in ('curve.png', 'samples/strips.png')
        if link in (folder / 'report.md').read_text()
    )
    assert json.loads((folder / 'config.json').read_text()) == asdict(Config(**TINY, **LONG))


def test_what_decides_a_run_is_recorded(unbroken):
    inputs = json.loads((unbroken[0] / 'inputs.json').read_text())
    assert inputs == run_inputs(tiny_model(), bright(0.01), PROMPTS, TESTS)
    assert (inputs['base'], inputs['reward'], inputs['prompts']) == ('modelscope', 'bright', PROMPTS)


def test_each_step_has_its_line(unbroken):
    folder, records = unbroken
    assert read_lines(folder / 'metrics.jsonl') == records and [r['step'] for r in records] == [1, 2, 3, 4, 5]
    assert {
        'step',
        'loss',
        'reward',
        'bright',
        'reward_queries',
        'denoiser_passes',
        'backward_passes',
        'seconds',
        'peak_memory',
        'gradient_norm',
    } == set(records[0])
    assert all(r['loss'] == pytest.approx(-r['reward']) for r in records)
    assert [r['step'] for r in read_lines(folder / 'eval.jsonl')] == [0, 5]


def test_tensorboard_has_the_curves(unbroken):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(unbroken[0] / 'tensorboard'))
    log.Reload()
    assert [e.step for e in log.Scalars('reward')] == [1, 2, 3, 4, 5]
    assert [e.value for e in log.Scalars('reward')] == pytest.approx([r['reward'] for r in unbroken[1]])
    assert [e.step for e in log.Scalars('held_out/reward')] == [0, 5]


def test_a_plain_pipeline_takes_the_lora(unbroken):
    from peft import PeftModel
    from vader_nb.memory.lora import load_lora

    model, pipe = tiny_model(), tiny_pipeline()
    load_lora(model, unbroken[0] / 'lora')
    for p in pipe.components.values():
        getattr(p, 'eval', lambda: 0)()
    pipe.unet = PeftModel.from_pretrained(pipe.unet, unbroken[0] / 'lora')
    pipe.set_progress_bar_config(disable=True)
    ours = sample(model, PROMPTS[:1], 5, 4.0, seed=3)
    theirs = pipe(
        PROMPTS[0], 16, 16, 4, 5, 4.0, latents=model.noise(1, generator=make_generator(3)), output_type='pt'
    ).frames
    assert (ours - theirs).abs().max() < 1e-4


# killed and resumed


def test_a_killed_run_goes_on_bit_for_bit(unbroken, tmp_path):
    folder = tmp_path / 'killed'
    program = command(here / 'tiny_run.py', folder, json.dumps(dict(LONG, chance=0.01)))
    while program.poll() is None and len(read_lines(folder / 'metrics.jsonl')) < 3:
        time.sleep(0.01)
    program.send_signal(signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL, program.stderr.read()
    assert not (folder / 'report.md').exists()
    with open(folder / 'metrics.jsonl', 'a') as f:
        f.write('{"step": 4, "rewa')
    assert list(tiny_fit(folder, chance=0.01, changes=LONG, resume=True))[0]['step'] == 3
    assert_equal_runs(unbroken[0], folder)


@pytest.mark.parametrize('file', ['torch.save', 'vader_nb.training.report.save_samples'])
def test_stopped_in_an_awkward_moment(unbroken, tmp_path, monkeypatch, file):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(file, stop)
        with pytest.raises(KeyboardInterrupt):
            list(tiny_fit(tmp_path, chance=0.01, changes=LONG))
    list(tiny_fit(tmp_path, chance=0.01, changes=LONG, resume=True))
    assert_equal_runs(unbroken[0], tmp_path)


def test_sigterm_costs_nothing(unbroken, tmp_path):
    """A scheduler's signal: the step is finished and kept, the exit code says what it was, and the run goes on bit for
    bit.
    """
    folder = tmp_path / 'stopped'
    program = command(here / 'tiny_run.py', folder, json.dumps(dict(LONG, chance=0.01)))
    while program.poll() is None and len(read_lines(folder / 'metrics.jsonl')) < 1:
        time.sleep(0.01)
    program.send_signal(signal.SIGTERM)
    assert program.wait() == 143
    done = read_lines(folder / 'metrics.jsonl')[-1]['step']
    said = program.stderr.read()
    assert f'stopped after step {done}; --resume goes on from there' in said and 'Traceback' not in said
    assert checkpoints(folder)[-1].stem == f'step_{done:06d}' and not (folder / 'report.md').exists()
    assert [r['step'] for r in tiny_fit(folder, chance=0.01, changes=LONG, resume=True)] == list(range(done + 1, 6))
    assert_equal_runs(unbroken[0], folder)


def test_the_users_own_handler_comes_back(tmp_path):
    def own(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, own)
    try:
        list(tiny_fit(tmp_path, changes=dict(train_steps=1)))
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_may_be_in_another_thread(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.extend(tiny_fit(tmp_path, changes=dict(train_steps=1))))
    thread.start()
    thread.join()
    assert len(done) == 1


def test_the_surroundings_change_nothing(unbroken, tmp_path, monkeypatch):
    "Variables that accelerate reads, and a gradient that somebody has switched off."
    monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '8')
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    with torch.no_grad():
        list(tiny_fit(tmp_path, chance=0.01, changes=LONG))
    assert_equal_runs(unbroken[0], tmp_path)


def test_a_system_without_the_resource_module(tmp_path, monkeypatch):
    "Windows is one."
    monkeypatch.setitem(sys.modules, 'resource', None)
    (record,) = tiny_fit(tmp_path, changes=dict(train_steps=1))
    assert record['peak_memory'] > 1e7


def test_a_finished_run_can_be_taken_further(unbroken, tmp_path):
    list(tiny_fit(tmp_path, chance=0.01, changes=dict(LONG, train_steps=4)))
    assert [r['step'] for r in tiny_fit(tmp_path, chance=0.01, changes=LONG, resume=True)] == [5]
    assert timeless(tmp_path) == timeless(unbroken[0])


def finished(folder):
    "A run of two steps that has ended."
    list(tiny_fit(folder, changes=dict(train_steps=2)))
    return folder


def go_on(folder, model=None, reward=None, prompts=PROMPTS, eval_prompts=TESTS, train_steps=3):
    config = Config(**TINY, train_steps=train_steps)
    return list(fit(model or tiny_model(), reward or bright(), prompts, config, folder, eval_prompts, resume=True))


@pytest.mark.parametrize(
    'other, says',
    [
        (
            dict(reward=reward_from(lambda video, prompts: video.mean((1, 2, 3, 4)), 'light')),
            "its reward is 'bright', not",
        ),
        (dict(reward=2 * bright()), r"its reward is 'bright', not '2\*bright'"),
        (dict(model=tiny_model(seed=1)), 'its base_weights is '),
        (dict(prompts=PROMPTS[::-1]), r"its prompts\[0\] is 'a panda riding a bike', not 'a dog washing dishes'"),
        (dict(prompts=PROMPTS[:2]), r"its prompts\[2\] is 'a dog washing dishes', not None"),
        (dict(eval_prompts=[]), r"its eval_prompts\[0\] is 'a fox riding a bike', not None"),
    ],
)
def test_a_run_is_resumed_with_what_it_was_made_with(tmp_path, other, says):
    folder = finished(tmp_path / 'run')
    with pytest.raises(VaderError, match=says) as e:
        go_on(folder, **other)
    assert '\n' not in str(e.value) and (folder / 'report.md').exists()


def test_a_reward_with_other_weights_is_another_reward(tmp_path):
    def reward(weight):
        made = reward_from(lambda video, prompts: made.scale * video.mean((1, 2, 3, 4)), 'learnt')
        made.scale = torch.nn.Parameter(torch.tensor(weight), False)
        return made

    config = Config(**TINY, train_steps=1)
    list(fit(tiny_model(), reward(1.0), PROMPTS, config, tmp_path, TESTS))
    with pytest.raises(VaderError, match='its reward_weights is '):
        go_on(tmp_path, reward=reward(1.5))
    assert [line['step'] for line in go_on(tmp_path, reward=reward(1.0))] == [2, 3]


def test_another_base_of_the_same_shape_is_refused(tmp_path):
    folder, other = finished(tmp_path / 'run'), tiny_model()
    other.name = 'videocrafter'
    with pytest.raises(VaderError, match="its base is 'modelscope', not 'videocrafter'"):
        go_on(folder, other)


def test_fewer_steps_than_done_are_refused(tmp_path):
    folder = finished(tmp_path / 'run')
    kept = {name: (folder / name).read_bytes() for name in ('config.json', 'report.md')}
    with pytest.raises(VaderError, match='has done 2 steps, more than 1: go on to 2 or more'):
        go_on(folder, train_steps=1)
    assert kept == {name: (folder / name).read_bytes() for name in kept}


def test_the_report_of_a_run_that_goes_on_is_gone_until_it_ends(tmp_path):
    folder = finished(tmp_path / 'run')
    for _ in tiny_fit(folder, changes=dict(train_steps=4), resume=True):
        break
    assert not (folder / 'report.md').exists()
    list(tiny_fit(folder, changes=dict(train_steps=4), resume=True))
    assert '4 steps in' in (folder / 'report.md').read_text()


def test_a_folder_without_a_record_is_resumed_with_a_note(tmp_path, capsys):
    folder = finished(tmp_path / 'run')
    (folder / 'inputs.json').unlink()
    assert [line['step'] for line in go_on(folder)] == [3]
    assert 'does not say which reward and prompts it had' in capsys.readouterr().err
    assert (folder / 'inputs.json').exists()


def test_a_start_image_is_recorded_by_its_pixels():
    from PIL import Image

    images = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'red', 'blue')]
    one, same, other = run_inputs(tiny_model(), bright(), images, [])['prompts']
    assert one == same != other


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_start_image_may_be_a_tensor_of_any_kind(dtype):
    images = [torch.full((3, 8, 8), grey, dtype=dtype, requires_grad=True) for grey in (0.5, 0.5, 0.25)]
    one, same, other = run_inputs(tiny_model(), bright(), images, [])['prompts']
    assert one == same != other


def test_a_file_that_was_written_again_is_another_input(tmp_path):
    "A start image under the same name, and a file of pairs."
    from PIL import Image

    model, image, pairs = tiny_model(), tmp_path / 'dog.png', tmp_path / 'pairs.jsonl'
    model.starts_from = 'image'

    def inputs():
        return run_inputs(model, bright(), [image, 'a caption'], [], pairs)

    for path in (image, pairs):
        Image.new('RGB', (8, 8), 'red').save(image)
        pairs.write_text('{}')
        write_json(tmp_path / 'inputs.json', before := inputs())
        check_inputs(tmp_path, inputs())
        path.write_bytes(path.read_bytes() + b'\n')
        with pytest.raises(VaderError, match=f'its {path} is '):
            check_inputs(tmp_path, inputs())
    del before['files']  # as older versions wrote it
    write_json(tmp_path / 'inputs.json', before)
    check_inputs(tmp_path, inputs())


def test_a_missing_wandb_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(VaderError, match='wandb is not installed'):
        list(tiny_fit(tmp_path / 'run', wandb=True))
    assert not (tmp_path / 'run').exists()


def test_prompts_may_come_from_a_generator(tmp_path):
    config = Config(**TINY, train_steps=1)
    assert list(fit(tiny_model(), bright(), (p for p in PROMPTS), config, tmp_path, iter(TESTS)))


@pytest.mark.parametrize('prompts', ['a panda riding a bike', b'a panda', None, 3])
def test_a_single_prompt_is_no_list(tmp_path, prompts):
    for given in (dict(prompts=prompts), dict(prompts=PROMPTS, eval_prompts=prompts)):
        with pytest.raises(VaderError, match='must be a list of prompts, not '):
            list(fit(tiny_model(), bright(), config=Config(**TINY), folder=tmp_path, **given))


@torch.inference_mode()
def test_inference_mode_is_one_line(tmp_path):
    with pytest.raises(VaderError, match='inference_mode'):
        list(tiny_fit(tmp_path))


def test_a_reward_without_a_name(tmp_path):
    nameless = reward_from(lambda video, prompts: video.mean((1, 2, 3, 4)), '')
    with pytest.raises(VaderError, match='has no name'):
        list(fit(tiny_model(), nameless, PROMPTS, Config(**TINY), tmp_path))


def test_a_loop_may_be_left(tmp_path):
    model = tiny_model()
    for record in tiny_fit(tmp_path, model, changes=LONG):
        break
    assert type(model.denoiser).__name__ == 'PeftModel'


# one process or two


def test_two_processes_are_one(tmp_path):
    changes = dict(train_steps=2, batch_size=4, gradient_accumulation_steps=2, where='last', eta=1.0)
    two = two_processes(tmp_path / 'two', changes)
    list(tiny_fit(tmp_path / 'one', changes=changes))
    assert two.wait() == 0, two.stderr.read()
    one, two = [
        torch.load(checkpoints(tmp_path / n)[-1], weights_only=True)['optimizer']['state'] for n in ('one', 'two')
    ]
    largest = max(s['exp_avg'].abs().max() for s in one.values())
    assert largest > 0 and all((one[i]['exp_avg'] - two[i]['exp_avg']).abs().max() < 1e-4 * largest for i in one)
    for a, b in zip(timeless(tmp_path / 'one'), timeless(tmp_path / 'two')):
        assert a == pytest.approx(b, rel=1e-4)


# a step


def test_passes_add_up_to_their_mean(tmp_path):
    def gradient(numbers, accumulate):
        run = tiny_trainer(tmp_path, gradient_accumulation_steps=accumulate)
        for i in numbers:
            run.train_pass(i)
        return torch.cat([p.grad.flatten() for p in run.weights.values()])

    both, first, second = gradient([0, 1], 2), gradient([0], 1), gradient([1], 1)
    assert torch.allclose(both, (first + second) / 2, atol=1e-6 * both.abs().max())


def test_the_gradient_is_clipped(tmp_path):
    run = tiny_trainer(tmp_path, max_grad_norm=1e-6)
    run.train_pass(0)
    norm = run.clip_gradient()
    assert norm > 1e-5 and torch.nn.utils.get_total_norm([p.grad for p in run.weights.values()]) == pytest.approx(
        1e-6, rel=0.01
    )


def test_everything_is_counted(tmp_path):
    record = tiny_trainer(tmp_path, where='last', gradient_accumulation_steps=3).train_step()
    assert (
        record['reward_queries'] == 3 * 2 and record['denoiser_passes'] == 3 * 2 * 3 * 2
    )  # passes, clips, T, both halves of guidance


def test_dropout_never_runs(tmp_path):
    seen = []

    def step_fn(model, *args):
        seen.append(any(m.training for m in model.denoiser.modules()))
        return vader_step(model, *args)

    list(tiny_fit(tmp_path, changes=dict(train_steps=2, save_every=1, eval_every=1), step_fn=step_fn))
    assert seen == [False, False]


def test_a_clip_reward_sees_all_frames():
    model, seen = tiny_model(), []
    add_lora(model, 2, 2)

    def score(video, prompts):
        seen.append(video.shape[1])
        return video.mean((1, 2, 3, 4))

    for wants in ('frame', 'clip'):
        vader_step(model, reward_from(score, 'seen', wants), PROMPTS[:2], Config(**TINY), make_generator(0))
    assert seen == [1, 4]


def test_memory_does_not_grow_with_T(tmp_path):
    run = tiny_trainer(tmp_path, tricks='checkpointing')
    kept = [
        saved_bytes(
            lambda: vader_step(
                run.model, bright(), PROMPTS[:2], replace(run.config, T=T, K=1, where='last'), make_generator(0)
            )
        )
        for T in (2, 8)
    ]
    assert kept[0] > 0 and kept[1] <= kept[0] * 1.001


def test_exact_tricks_leave_the_gradient_alone(tmp_path):
    def gradient(words):
        run = tiny_trainer(tmp_path, tricks=words)
        run.train_pass(0)
        return torch.cat([p.grad.flatten() for p in run.weights.values()])

    plain, thrifty = gradient(''), gradient('checkpointing batch_slicing vae_slicing activation_offload model_offload')
    assert plain.abs().max() > 0 and torch.allclose(plain, thrifty, atol=1e-5 * plain.abs().max())


def test_a_run_with_tricks_is_a_run(tmp_path):
    plain, thrifty = [
        [
            r['reward']
            for r in fit(
                tiny_model(),
                bright(),
                PROMPTS,
                Config(**{**TINY, 'train_steps': 2}, tricks=words),
                tmp_path / (words or 'plain'),
                eval_prompts=PROMPTS[:2],
            )
        ]
        for words in ('', 'checkpointing batch_slicing model_offload')
    ]
    assert len(plain) == 2 and plain == pytest.approx(thrifty, rel=1e-4)
    assert (tmp_path / 'checkpointing batch_slicing model_offload' / 'lora' / 'adapter_model.safetensors').exists()
    with pytest.raises(VaderError, match="unknown trick 'magic'"):
        Config(tricks='magic')


def test_bf16_keeps_the_lora_in_float32(tmp_path):
    run = tiny_trainer(tmp_path, mixed_precision='bf16')
    seen = []
    run.model.denoiser.base_model.model.conv_out.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    record = run.train_step()
    assert (
        set(seen) == {torch.bfloat16}
        and all(p.dtype == torch.float32 for p in run.weights.values())
        and record['gradient_norm'] > 0
    )


# bad weather


def breaks_in(step, fn):
    calls = []

    def score(video, prompts):
        calls.append(1)
        good = video.mean((1, 2, 3, 4))
        return fn(good) if len(calls) > step else good

    return reward_from(score, 'broken')


@pytest.mark.parametrize(
    'fn, words',
    [
        (lambda r: r / 0, 'broken is inf for'),
        (lambda r: r * torch.nan, 'broken is nan for'),
        (lambda r: r + (r * 0).sqrt(), 'the gradient is not finite'),
    ],
)
def test_what_is_not_finite_stops_the_run(tmp_path, fn, words):
    with pytest.raises(VaderError, match=f'{words}.*step 4; the last good checkpoint is .*step_000002') as e:
        list(fit(tiny_model(), breaks_in(3, fn), PROMPTS, Config(**TINY, train_steps=5, save_every=2), tmp_path))
    assert '\n' not in str(e.value)
    assert all(p.isfinite().all() for p in torch.load(checkpoints(tmp_path)[-1], weights_only=True)['lora'].values())


def test_the_loss_scaler_may_skip_eight_steps():
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.tensor([torch.inf])
    run = Trainer(tiny_model(), None, PROMPTS, Config(), here)
    run.weights, run.accelerator = {'w': weight}, SimpleNamespace(scaler=object())
    for _ in range(8):
        run.check_gradient(torch.inf)
    with pytest.raises(VaderError, match='1 weights, first w'):
        run.check_gradient(torch.inf)
    run.skipped = 3
    run.check_gradient(1.0)
    assert run.skipped == 0


def test_no_space_left(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    steps = []
    with monkeypatch.context() as m, pytest.raises(VaderError, match='No space left on device'):
        for record in tiny_fit(tmp_path, changes=LONG):
            steps.append(record['step'])
            if record['step'] == 3:
                m.setattr('torch.save', full)
    assert (
        steps == [1, 2, 3]
        and [p.name for p in checkpoints(tmp_path)] == ['step_000002.pt']
        and len(read_lines(tmp_path / 'metrics.jsonl')) == 4
    )
    assert [r['step'] for r in tiny_fit(tmp_path, changes=LONG, resume=True)] == [3, 4, 5]


@pytest.mark.parametrize(
    'changes',
    [
        dict(K=0),
        dict(K=13),
        dict(T=0),
        dict(train_steps=-1),
        dict(train_steps=0),
        dict(train_steps=2.5),
        dict(lr=float('nan')),
        dict(lr=0),
        dict(where='end'),
        dict(sampler='heun'),
        dict(mixed_precision='int8'),
        dict(scale='huge'),
        dict(decoded_frames=9),
        dict(eta=2.0),
        dict(rank=True),
        dict(seed=-1),
        dict(max_grad_norm=0.0),
    ],
)
def test_a_config_that_makes_no_sense(changes):
    with pytest.raises(VaderError) as e:
        Config(**changes)
    assert next(iter(changes)) in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize(
    'changes, words', [(dict(height=20), 'multiples of 8'), (dict(mixed_precision='fp16'), 'fp16 needs a GPU')]
)
def test_what_the_model_cannot_do_is_said_before_the_run(tmp_path, changes, words):
    with pytest.raises(VaderError, match=words):
        list(tiny_fit(tmp_path / 'run', changes=changes))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('prompts', [[''], ['a panda riding a bike with a fox with a fox with a fox'], []])
def test_prompts_are_checked_before_the_run(tmp_path, prompts):
    with pytest.raises(VaderError):
        list(fit(tiny_model(), bright(), prompts, Config(**TINY), tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


# A reward of one's own


@pytest.mark.parametrize(
    'score, words',
    [
        (lambda r, v: v.mean((2, 3, 4)).flatten(), r'shape \(2,\), not \(8,\)'),
        (lambda r, v: r.mean(0, keepdim=True), r'shape \(2,\), not \(1,\)'),
        (lambda r, v: r[:, None], r'shape \(2,\), not \(2, 1\)'),
        (lambda r, v: v.mean((2, 3, 4)), r'shape \(2,\), not \(2, 4\)'),
        (lambda r, v: r.tolist(), 'a float tensor .* not list'),
        (lambda r, v: r.round().long(), 'a float tensor .* not a tensor of torch.int64'),
        (lambda r, v: r.detach(), 'not differentiable'),
        (lambda r, v: r.sum(), r'shape \(2,\), not \(\)'),
    ],
)
def test_a_users_reward_that_returns_something_else(tmp_path, score, words):
    mine = reward_from(lambda video, prompts: score(video.mean((1, 2, 3, 4)), video), 'mine', 'clip')
    with pytest.raises(VaderError, match=f'mine .*{words}') as e:
        list(fit(tiny_model(), mine, PROMPTS, Config(**TINY, train_steps=1), tmp_path))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['step', 'loss', 'seconds', 'peak_memory', 'gradient_norm'])
def test_a_users_reward_with_the_name_of_a_column(tmp_path, name):
    mine = reward_from(lambda video, prompts: video.mean((1, 2, 3, 4)), name)
    for reward in (mine, mine + bright()):
        with pytest.raises(VaderError, match=f"{name}.*another name"):
            list(fit(tiny_model(), reward, PROMPTS, Config(**TINY, train_steps=1), tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_a_prompt_that_the_reward_cannot_read_is_found_before_the_run(tmp_path):
    with pytest.raises(VaderError, match='names no action'):
        list(
            fit(
                tiny_model(),
                load_reward('action') + bright(),
                PROMPTS[:1],
                Config(**TINY, train_steps=1),
                tmp_path / 'run',
                eval_prompts=['a fox with a hat'],
            )
        )
    assert not (tmp_path / 'run').exists()


def test_the_lora_has_a_card_that_the_hub_reads(unbroken):
    folder, _ = unbroken
    card = ModelCard.load(folder / 'lora/README.md')
    inputs = json.loads((folder / 'inputs.json').read_text())
    assert card.data.library_name == 'peft' and 'vader' in card.data.tags
    assert card.data.base_model is None, 'a small model is on no hub'
    for said in (inputs['base'], inputs['reward'], *inputs['prompts'][:3], '| held-out prompts |', '| train_steps |'):
        assert said in card.text
    for picture in ('strips.png', 'curve.png'):
        assert picture in card.text and (folder / 'lora' / picture).read_bytes()[:4] == b'\x89PNG'


LICENCES = [('modelscope', 'cc-by-nc-4.0'), ('videocrafter', 'other'), ('mine: 1', 'other')]


@pytest.mark.parametrize('base, licence', LICENCES)
def test_a_card_at_full_scale_names_the_base_on_the_hub(unbroken, tmp_path, base, licence):
    shutil.copytree(unbroken[0], tmp_path / 'run')
    write_card(tmp_path / 'run', dict(scale='full'), dict(base=base, reward='hps', prompts=['a panda']))
    card = ModelCard.load(tmp_path / 'run/lora/README.md')
    known = CHECKPOINTS.get(base)
    assert card.data.base_model == (known.hub if known else None) and card.data.license == licence
