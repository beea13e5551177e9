"The command line: what it does, and one clear line for whatever goes wrong."

import json, os, subprocess, sys
from pathlib import Path

import pytest, torch
from tiny_run import PROMPTS, TESTS, TINY
from vader_nb import zoo
from vader_nb.experiments import registry as experiments
from vader_nb.cli import clip_name, main


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    "An experiment on a tiny model, and no judges."
    monkeypatch.setitem(zoo.MODELS, 'tiny', 'tiny_run:load_tiny')
    monkeypatch.setitem(zoo.REWARDS, 'bright', 'tiny_run:load_bright')
    e = experiments.Experiment(
        'nowhere', 'to test', 'tiny', 'bright', lambda scale: (PROMPTS, TESTS), dict(TINY, train_steps=2), dict(TINY)
    )
    monkeypatch.setitem(experiments.EXPERIMENTS, 'tiny', e)
    for where in ('vader_nb.experiments.registry', 'vader_nb.world.judge'):
        monkeypatch.setattr(f'{where}.judge_clips', lambda video, prompts: {})
    monkeypatch.setitem(zoo.MODELS, 'modelscope', 'tiny_run:load_tiny')


def said(capsys, *args):
    try:
        code = main([str(a) for a in args])
    except SystemExit as e:
        code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_list(capsys):
    code, out, _ = said(capsys, 'list')
    assert code == 0 and 'modelscope-aesthetic' in out
    entries = json.loads(said(capsys, 'list', '--json')[1])
    assert all(e['small']['scale'] == 'small' and e['full']['scale'] == 'full' for e in entries)


def test_run_resume_eval_sample(capsys, tmp_path):
    run = tmp_path / 'run'
    code, out, _ = said(capsys, 'run', 'tiny', '--out', run, '--device', 'cpu', '--tricks', 'checkpointing')
    assert (
        code == 0
        and str(run / 'report.md') in out
        and json.loads((run / 'config.json').read_text())['tricks'] == 'checkpointing'
    )
    before = (run / 'lora/adapter_model.safetensors').read_bytes()
    code, _, err = said(capsys, 'run', 'tiny', '--out', run, '--device', 'cpu')
    assert code == 2 and '--resume' in err
    assert said(capsys, 'run', 'tiny', '--out', run, '--device', 'cpu', '--tricks', 'checkpointing', '--resume')[0] == 0
    assert (run / 'lora/adapter_model.safetensors').read_bytes() == before
    code, out, _ = said(capsys, 'eval', run, '--device', 'cpu')
    after = [json.loads(line) for line in (run / 'eval.jsonl').read_text().splitlines()]
    assert code == 0 and f'| reward | {after[0]["reward"]:.3f} | {after[1]["reward"]:.3f} |' in out
    code, out, _ = said(
        capsys, 'sample', '--lora', run / 'lora', '--sampling-steps', 2, '--out', tmp_path / 'clips', *PROMPTS[:2]
    )
    assert (
        code == 0
        and len(list((tmp_path / 'clips').glob('*.gif'))) == len(list((tmp_path / 'clips').glob('*.mp4'))) == 2
    )


@pytest.mark.parametrize('method, logged', [('ddpo', 'ratio'), ('dpo', 'accuracy')])
def test_other_methods(capsys, tmp_path, method, logged):
    run = tmp_path / 'run'
    code, _, err = said(capsys, 'run', 'tiny', '--method', method, '--steps', 1, '--out', run, '--device', 'cpu')
    assert code == 0, err
    assert json.loads((run / 'config.json').read_text())['method'] == method
    assert logged in json.loads((run / 'metrics.jsonl').read_text())
    code, _, err = said(capsys, 'run', 'tiny', '--steps', 1, '--out', run, '--device', 'cpu', '--resume')
    assert code == 2 and 'belongs to another run' in err
    assert said(capsys, 'eval', run, '--device', 'cpu')[0] == 0


def test_a_comparison(capsys, tmp_path, monkeypatch):
    from vader_nb.experiments import comparison

    few = comparison.Comparison('', '', ['tiny'], {'vader': ('vader', {})}, queries=2, seeds=2, points=1)
    monkeypatch.setitem(comparison.COMPARISONS, 'few', few)
    monkeypatch.setattr(comparison, 'judge_clips', lambda video, prompts: {})
    code, out, err = said(capsys, 'run', 'few', '--out', tmp_path, '--device', 'cpu')
    assert code == 0 and 'tiny-vader-small-1: step 1, 2 rewards' in out, err
    assert (tmp_path / 'tiny-vader-small-0/final.json').exists()
    assert 'step' not in said(capsys, 'run', 'few', '--out', tmp_path, '--device', 'cpu')[1], 'all is done'
    code, _, err = said(capsys, 'run', 'few', '--steps', 3)
    assert code == 2 and 'leave out --method, --seed and --steps' in err


@pytest.mark.parametrize('base', ['opensora', 'svd', 'videocrafter'])
def test_sample_with_each_base_and_its_own_sampler(capsys, tmp_path, base):
    code, out, err = said(
        capsys,
        'sample',
        '--base',
        base,
        '--sampling-steps',
        2,
        '--out',
        tmp_path,
        '--device',
        'cpu',
        'a labrador playing chess',
    )
    assert code == 0 and out.split() == [str(tmp_path / f'a-labrador-playing-chess-0-{base}-T2.gif')], err


@pytest.mark.parametrize(
    'args, words',
    [
        (['run', 'modelscope-beauty'], 'unknown experiment'),
        (['run', 'tiny', '--scale', 'huge'], 'unknown scale'),
        (['run', 'tiny', '--device', 'tpu'], 'unknown device'),
        (['run', 'tiny', '--steps', '-3'], 'steps is -3'),
        (['run', 'tiny', '--steps', 'many'], "invalid int value: 'many'"),
        (['run', 'tiny', '--precision', 'fp16', '--device', 'cpu'], 'fp16 needs a GPU'),
        (['run', 'tiny', '--method', 'ppo'], "unknown method 'ppo'"),
        (['run', 'tiny', '--seed', '-1'], 'seed is -1'),
        (['run', 'tiny', '--tricks', 'magic'], "unknown trick 'magic'"),
        (['sample', '--base', 'imagen', 'x'], 'unknown base model'),
        (['sample', ''], 'empty'),
        (['sample', '\udcff'], 'not valid Unicode'),
        (['sample', '--lora', '', 'a panda'], 'lora is empty'),
        (['sample', '--base', '', 'a panda'], 'base is empty'),
        (['sample', '--out', '', 'a panda'], 'out is empty'),
        (['run', 'tiny', '--out', ''], 'out is empty'),
        (['eval', ''], 'run is empty'),
        (['sample', 'a panda', '--guidance', 'inf'], 'guidance is inf'),
        (['run', 'tiny', '--steps', '0'], 'steps is 0'),
        (['sample', 'a panda ' * 9], 'shorten it'),
        (['sample', 'a panda', '--sampling-steps', '0'], 'T is 0'),
        (['sample', 'a panda', '--guidance', 'nan'], 'guidance is nan'),
        (['sample', 'a panda', '--seed', str(2**70)], 'seed is'),
        (['run', 'tiny', '--seed', str(2**40)], 'seed is'),
        (['sample', 'a panda', '--lora', 'nowhere'], 'nowhere holds no'),
        (['eval', 'nowhere'], 'nowhere'),
        ([], 'required'),
        (['dance'], 'invalid choice'),
    ],
)
def test_one_clear_line(capsys, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = said(capsys, *args)
    assert code == 2 and words in err and err.startswith('vader') and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_run_folder_of_another_experiment(capsys, tmp_path):
    assert said(capsys, 'run', 'tiny', '--out', tmp_path / 'run', '--device', 'cpu')[0] == 0
    code, _, err = said(capsys, 'run', 'modelscope-aesthetic', '--out', tmp_path / 'run', '--device', 'cpu', '--resume')
    assert code == 2 and "its experiment is 'tiny', not 'modelscope-aesthetic'" in err


def test_a_place_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / 'file').write_text('')
    code, _, err = said(capsys, 'run', 'tiny', '--out', tmp_path / 'file/run', '--device', 'cpu')
    assert code and len(err.strip().splitlines()) == 1 and 'file' in err


def test_an_interrupt_is_no_error(capsys, tmp_path, monkeypatch):
    def stop(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr('vader_nb.training.trainer.Trainer.train_step', stop)
    code, _, err = said(capsys, 'run', 'tiny', '--out', tmp_path / 'run', '--device', 'cpu')
    assert code == 130 and err.strip().endswith('vader run --resume goes on from the last checkpoint')


def test_the_command_answers_without_torch():
    run = 'import sys; from vader_nb.cli import make_parser; make_parser(); sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', run]).returncode == 0


@pytest.mark.parametrize(
    'a, b',
    [
        ('a panda', 'a panda!'),
        ('a panda', 'a, panda'),
        ('\N{PANDA FACE}', '\N{FOX FACE}'),
        ('a panda ' * 30 + 'riding', 'a panda ' * 30 + 'eating'),
        ('a b', 'a-b'),
        ('a b', 'a_b'),
        ('A panda', 'a panda'),
        ('stra\u00dfe', 'strasse'),
        ('caf\u00e9', 'cafe\u0301'),
        ('\u202ea', 'a'),
        ('a\udcff', 'a'),
        ('\u718a\u732b' * 200, '\u718a\u732b' * 201),
    ],
)
def test_different_prompts_have_different_files(a, b):
    names = {clip_name(p, 0).lower() for p in (a, b)}
    assert len(names) == 2 and all(0 < len(n.encode()) < 100 and n.strip('-') == n for n in names)


def test_different_options_have_different_files():
    how = [
        {},
        dict(seed=1),
        dict(lora='runs/x/lora'),
        dict(lora='runs/y/lora'),
        dict(lora='n' * 200),
        dict(T=2),
        dict(T=25),
        dict(guidance=2.0),
        dict(guidance=2.5),
        dict(base='svd'),
        dict(scale='full'),
    ]
    names = [clip_name('a panda', **dict(dict(seed=0), **h)) for h in how]
    assert len(set(names)) == len(how) and all(len(n) < 150 for n in names)


def test_a_prompt_that_comes_twice_is_sampled_once(capsys, tmp_path):
    code, out, _ = said(
        capsys, 'sample', '--sampling-steps', 2, '--out', tmp_path, '--device', 'cpu', 'a panda', 'a panda'
    )
    assert code == 0 and len(out.splitlines()) == 1


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda p: p.write_text(''), 'File exists|Not a directory'),
        (lambda p: (p / '.trial').mkdir(parents=True), 'a folder has that name'),
        (lambda p: p.symlink_to(p), 'symbolic links|File exists'),
    ],
)
def test_a_place_for_clips_is_tried_before_sampling(capsys, tmp_path, monkeypatch, make, words):
    import re

    monkeypatch.setattr('vader_nb.diffusion.rollout.sample', None)
    make(tmp_path / 'clips')
    code, _, err = said(capsys, 'sample', '--out', tmp_path / 'clips', '--device', 'cpu', 'a panda')
    err = [line for line in err.splitlines() if 'deprecated' not in line]
    assert code == 2 and len(err) == 1 and re.search(words, err[0]), err


def test_a_folder_is_not_replaced_by_a_clip(capsys, tmp_path):
    (tmp_path / 'a-panda-0-T2.gif/mine').mkdir(parents=True)
    code, _, err = said(capsys, 'sample', '--sampling-steps', 2, '--out', tmp_path, '--device', 'cpu', 'a panda')
    assert code == 2 and 'a folder has that name' in err and (tmp_path / 'a-panda-0-T2.gif/mine').exists()


def test_a_run_folder_in_place_of_its_lora(capsys, tmp_path):
    assert said(capsys, 'run', 'tiny', '--out', tmp_path / 'run', '--device', 'cpu')[0] == 0
    code, _, err = said(capsys, 'sample', '--lora', tmp_path / 'run', '--device', 'cpu', 'a panda')
    assert code == 2 and f'its LoRA is {tmp_path / "run/lora"}' in err


@pytest.mark.parametrize('rubbish', ['[]\n', '5\n', '{"a": 1}\n', '\x00\n', '{"step": "two"}\n'])
def test_a_damaged_log_is_one_line_and_stays(capsys, tmp_path, rubbish):
    log = tmp_path / 'run/metrics.jsonl'
    assert said(capsys, 'run', 'tiny', '--out', tmp_path / 'run', '--device', 'cpu')[0] == 0
    damaged = rubbish + log.read_text()
    log.write_text(damaged)
    code, _, err = said(capsys, 'run', 'tiny', '--out', tmp_path / 'run', '--device', 'cpu', '--resume')
    err = [line for line in err.splitlines() if 'deprecated' not in line]
    assert (
        code == 2
        and len(err) == 1
        and 'metrics.jsonl is damaged after step 0 of 2' in err[0]
        and log.read_text() == damaged
    )


def test_clips_with_and_without_a_lora_lie_side_by_side(capsys, tmp_path):
    assert said(capsys, 'run', 'tiny', '--out', tmp_path / 'first', '--device', 'cpu')[0] == 0
    for lora in ([], ['--lora', tmp_path / 'first/lora']):
        assert (
            said(
                capsys,
                'sample',
                '--sampling-steps',
                2,
                '--out',
                tmp_path / 'clips',
                '--device',
                'cpu',
                *lora,
                'a panda',
            )[0]
            == 0
        )
    assert sorted(p.name for p in (tmp_path / 'clips').glob('*.gif')) == ['a-panda-0-T2.gif', 'a-panda-0-first-T2.gif']


def test_sampling_with_a_lora_takes_the_settings_of_its_run(capsys, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        'vader_nb.diffusion.rollout.sample', lambda model, prompts, *a: asked.append(a) or torch.rand(1, 4, 3, 16, 16)
    )
    assert said(capsys, 'run', 'tiny', '--out', tmp_path / 'run', '--device', 'cpu', '--seed', 3)[0] == 0
    asked.clear()
    for more in ([], ['--sampling-steps', 5, '--guidance', 2, '--seed', 9]):
        code, _, err = said(
            capsys,
            'sample',
            '--lora',
            tmp_path / 'run/lora',
            '--out',
            tmp_path / 'clips',
            '--device',
            'cpu',
            *more,
            'a panda',
        )
        assert code == 0, err
    assert asked == [(3, 4.0, 3, 'ddim', 0.0, (4, 16, 16)), (5, 2.0, 9, 'ddim', 0.0, (4, 16, 16))]


def test_a_run_of_no_experiment_keeps_base_sampler_and_size_too(capsys, tmp_path, monkeypatch):
    seen = []
    assert said(capsys, 'run', 'tiny', '--out', tmp_path / 'run', '--device', 'cpu')[0] == 0
    for name, change in (('config', dict(experiment='custom')), ('inputs', dict(base='tiny'))):
        file = tmp_path / f'run/{name}.json'
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    monkeypatch.setattr(
        'vader_nb.diffusion.rollout.sample', lambda model, prompts, *a: seen.append(a) or torch.rand(1, 4, 3, 16, 16)
    )
    options = ['--lora', tmp_path / 'run/lora', '--out', tmp_path / 'clips', '--device', 'cpu']
    code, _, err = said(capsys, 'sample', *options, 'a panda')
    assert code == 0, err
    assert seen == [(3, 4.0, 0, 'ddim', 0.0, (4, 16, 16))]


def test_a_console_that_knows_ascii_alone(tmp_path):
    run = (
        "import sys; from vader_nb import cli; "
        "cli._commands['list'] = (lambda args: print('\N{PANDA FACE}'), '', cli._list_options); "
        "sys.exit(cli.main(['list']))"
    )
    out = subprocess.run(
        [sys.executable, '-c', run],
        env=os.environ | {'PYTHONIOENCODING': 'ascii', 'PYTHONUTF8': '0'},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0 and '1f43c' in out.stdout, out.stderr


def test_extend_leaves_a_film_and_a_strip(capsys, tmp_path):
    from PIL import Image

    picture = tmp_path / 'start.webp'
    Image.new('RGB', (80, 64), 'orange').save(picture)
    steps = ('--sampling-steps', 1, '--guidance', 1, '--device', 'cpu')
    code, out, err = said(capsys, 'extend', '--image', picture, '--rounds', 2, *steps, '--out', tmp_path / 'films')
    assert code == 0, err
    film = Path(out.strip())
    assert Image.open(film).n_frames == 15
    assert film.with_suffix('.mp4').is_file() and Image.open(film.with_suffix('.png')).width > 15 * 64
    code, _, err = said(capsys, 'extend', '--image', 'a fox', '--base', 'modelscope', *steps, '--out', tmp_path)
    assert code == 2 and 'cannot go on from a frame' in err


# Your own base, reward and prompts

REWARD = """
def dark(video, prompts): return -video.mean((1, 2, 3, 4))
def blind(video, prompts): return 0 * dark(video, prompts)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    "A folder with prompts and a module of rewards, in which the commands are given."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.delitem(sys.modules, 'my_reward', raising=False)
    (tmp_path / 'my_reward.py').write_text(REWARD)
    (tmp_path / 'mine.txt').write_text('\n'.join(['# mine', *PROMPTS, '', PROMPTS[0]]), encoding='utf-8-sig')
    (tmp_path / 'tests.csv').write_text('id,prompt\n' + '\n'.join(f'{i},{p}' for i, p in enumerate(TESTS)))
    return tmp_path


def train(capsys, *more, reward='bright'):
    words = ['train', '--base', 'tiny', '--reward', reward, '--prompts', 'mine.txt', '--device', 'cpu', '--out', 'run']
    return said(capsys, *words, *more)


def test_own_prompts_and_an_own_reward(capsys, own):
    code, out, err = train(capsys, '--tests', 'tests.csv', '--set', 'train_steps=1', 'lr=1e-2', reward='my_reward:dark')
    assert code == 0, err
    assert f'mine.txt: {len(PROMPTS)} prompts\nleft out as blank, comment or repeated: 3\n' in out
    assert 'my_reward:dark passes' in out
    config, inputs = [json.loads((own / 'run' / f'{name}.json').read_text()) for name in ('config', 'inputs')]
    assert (config['train_steps'], config['lr'], config['T']) == (1, 1e-2, TINY['T'])
    assert (inputs['prompts'], inputs['eval_prompts']) == (PROMPTS, TESTS) and inputs['reward'] == 'my_reward:dark'
    code, out, err = said(capsys, 'eval', 'run', '--device', 'cpu')
    assert code == 0 and '| reward |' in out, err


def test_settings_of_another_run(capsys, own):
    assert train(capsys, '--set', 'train_steps=1', 'rank=2')[0] == 0
    code, _, err = train(capsys, '--out', 'two', '--config', 'run/config.json', '--set', 'rank=3')
    config = json.loads((own / 'two/config.json').read_text())
    assert code == 0 and (config['rank'], config['train_steps']) == (3, 1), err


def test_settings_of_an_experiment(capsys, tmp_path):
    words = ['run', 'tiny', '--out', tmp_path / 'run', '--device', 'cpu', '--set', 'train_steps=1', 'max_grad_norm=2']
    assert said(capsys, *words)[0] == 0
    assert json.loads((tmp_path / 'run/config.json').read_text())['max_grad_norm'] == 2


@pytest.mark.parametrize(
    'more, says',
    [
        (['--set', 'lr'], "'lr' is no setting: write NAME=VALUE"),
        (['--set', 'learning_rate=1'], "unknown setting 'learning_rate'"),
        (['--set', 'lr=fast'], "lr is 'fast', but must be a number"),
        (['--set', 'T=8.5'], "T is '8.5', but must be a whole number"),
        (['--set', 'through=maybe'], "through is 'maybe', but must be True or False"),
        (['--set', 'lr=1', 'lr=2'], 'lr is set twice'),
        (['--set', 'K=99'], 'K is 99'),
        (['--prompts', 'nowhere.txt'], 'cannot read the prompts in nowhere.txt'),
        (['--prompts', 'empty.txt'], 'empty.txt holds no prompts'),
        (['--prompts', 'bad.jsonl'], 'bad.jsonl, line 1 is no JSON'),
        (['--prompts', 'other.jsonl'], 'other.jsonl, line 1 has no field "prompt"'),
        (['--prompts', 'bytes.txt'], 'give a text file in UTF-8'),
        (['--prompts', 'list.json'], 'write one JSON record a line'),
        (['--images', '.'], 'give either --prompts FILE or'),
        (['--base', 'tinny'], "unknown base model 'tinny'"),
        (['--reward', 'brihgt'], "unknown reward 'brihgt'"),
        (['--reward', 'my_reward:none'], 'cannot find the reward my_reward:none'),
        (['--reward', 'no_module:f'], 'cannot find the reward no_module:f'),
        (['--reward', 'my_reward:REWARDS'], 'cannot find the reward'),
        (['--reward', 'my_reward:blind'], 'gets a gradient of zero'),
        (['--reward', 'broken:f'], 'cannot find the reward broken:f (SyntaxError'),
        (['--config', 'nowhere/config.json'], 'nowhere'),
        (['--config', 'mine.txt'], 'mine.txt is no config.json of a run'),
    ],
)
def test_bad_words_for_an_own_run_are_one_line(capsys, own, more, says):
    (own / 'empty.txt').write_text('# nothing\n\n')
    (own / 'bad.jsonl').write_text('a panda\n')
    (own / 'other.jsonl').write_text('{"text": "a panda"}\n')
    (own / 'bytes.txt').write_bytes(b'\xff\xfe\x00')
    (own / 'broken.py').write_text('def f(:\n')
    code, _, err = train(capsys, *more)
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1, err
    assert not (own / 'run').exists()


@pytest.mark.parametrize(
    'name, text, prompts',
    [
        ('mine.CSV', 'prompt,id\n"a panda\nriding a bike",1\na fox,2\n', ['a panda\nriding a bike', 'a fox']),
        ('mine.jsonl', '{"prompt": "a\u2028panda"}\r\n\n{"prompt": " a fox "}\n', ['a\u2028panda', 'a fox']),
        ('mine', '\ufeffa panda\r\n  # a comment\r\na fox', ['a panda', 'a fox']),
    ],
)
def test_prompts_of_every_kind_of_file(tmp_path, name, text, prompts):
    from vader_nb.experiments.prompts import read_prompts

    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name)[0] == prompts


def test_an_own_run_goes_on_with_its_own_prompts_only(capsys, own):
    assert train(capsys, '--set', 'train_steps=1')[0] == 0
    (own / 'other.txt').write_text('\n'.join(PROMPTS[:2]))
    code, _, err = train(capsys, '--set', 'train_steps=2', '--prompts', 'other.txt', '--resume')
    assert code == 2 and 'prompts' in err and len(err.strip().splitlines()) == 1, err
    assert train(capsys, '--set', 'train_steps=2', '--resume')[0] == 0
    assert len((own / 'run/metrics.jsonl').read_text().splitlines()) == 2


@pytest.mark.parametrize('damaged', ['{}', '[]', '{"base": "tiny"}'])
def test_an_own_run_whose_inputs_are_damaged(capsys, own, damaged):
    assert train(capsys, '--tests', 'tests.csv', '--set', 'train_steps=1')[0] == 0
    (own / 'run/inputs.json').write_text(damaged)
    code, _, err = said(capsys, 'eval', 'run', '--device', 'cpu')
    assert code == 2 and 'inputs.json does not say what the run was made of' in err


def test_an_own_run_without_held_out_prompts_cannot_be_evaluated(capsys, own):
    assert train(capsys, '--set', 'train_steps=1')[0] == 0
    code, _, err = said(capsys, 'eval', 'run', '--device', 'cpu')
    assert code == 2 and 'has no held-out prompts' in err


def test_the_strength_of_a_lora(capsys, tmp_path):
    run = tmp_path / 'run'
    assert said(capsys, 'run', 'tiny', '--out', run, '--device', 'cpu')[0] == 0
    rows = [
        [line for line in said(capsys, 'eval', run, '--device', 'cpu', *more)[1].splitlines() if '| reward' in line][0]
        for more in ([], ['--strength', '0'])
    ]
    before, after = rows[1].split('|')[2:4]
    assert before == after and rows[0].split('|')[2] == before and rows[0] != rows[1]
    clips = [tmp_path / 'clips', '--lora', run / 'lora', '--sampling-steps', 2, '--device', 'cpu', PROMPTS[0]]
    code, out, err = said(capsys, 'sample', '--strength', '0.5', '--out', *clips)
    assert code == 0 and 'strength0.5' in out, err
    code, _, err = said(capsys, 'sample', '--strength', '0.5', PROMPTS[0])
    assert code == 2 and 'name one with --lora' in err


PLAIN = """
import sys; sys.modules['vader_nb'] = None  # importing it would fail
import torch
from diffusers import UNet3DConditionModel
unet = UNet3DConditionModel.from_pretrained(sys.argv[1]).eval()
x, text = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad(): torch.save(unet(x, 500, text).sample, sys.argv[3])
"""


def test_merged_weights_in_plain_diffusers(capsys, tmp_path):
    from vader_nb.memory.lora import load_lora

    run = tmp_path / 'run'
    assert said(capsys, 'run', 'tiny', '--out', run, '--device', 'cpu')[0] == 0
    code, out, err = said(capsys, 'export', run)
    assert code == 0 and out.strip() == str(run / 'merged'), err
    model = zoo.load_model('tiny')
    load_lora(model, run / 'lora')
    x, text = torch.randn(1, 4, 4, 2, 2), torch.randn(1, 12, 32)
    torch.save((x, text), tmp_path / 'x.pt')
    files = [run / 'merged', tmp_path / 'x.pt', tmp_path / 'y.pt']
    subprocess.run([sys.executable, '-c', PLAIN, *map(str, files)], check=True, capture_output=True)
    with torch.no_grad():
        tuned = model.denoiser(x, 500, text).sample
        with model.denoiser.disable_adapter():
            base = model.denoiser(x, 500, text).sample
    plain = torch.load(tmp_path / 'y.pt', weights_only=True)
    assert (plain - tuned).abs().max() < 1e-5 < (plain - base).abs().max()
    for words, says in [
        ([run], 'merged exists'),
        ([run, '--to', 'onnx'], "unknown layout 'onnx'"),
        ([run, '--to', 'diffusers'], 'has no load_lora_weights'),
        ([tmp_path], 'config.json'),
    ]:
        code, _, err = said(capsys, 'export', *words)
        assert code == 2 and says in err, err
