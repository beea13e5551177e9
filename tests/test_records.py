"Records: lines that survive a kill, the runs that come with the package, tables of scores."

import pytest

from vader_nb.core import VaderError, read_json
from vader_nb.records import append_line, cut_lines, first_and_last, held_out_table, read_lines, recorded
from vader_nb.records import seeds_table, table

home = recorded('modelscope-hps-small-0')[0].parent


# Lines


def test_lines_are_cut_at_the_checkpoint(tmp_path):
    file = tmp_path / 'metrics.jsonl'
    for step in range(1, 6):
        append_line(file, dict(step=step))
    file.write_text(file.read_text() + '{"step": 6, "rew')
    cut_lines(file, 3)
    assert [r['step'] for r in read_lines(file)] == [1, 2, 3] and file.read_text().endswith('}\n')


def test_no_lines_yet(tmp_path):
    cut_lines(tmp_path / 'metrics.jsonl', 3)
    assert read_lines(tmp_path / 'metrics.jsonl') == read_lines(tmp_path / 'none.jsonl') == []


@pytest.mark.parametrize(
    'rubbish',
    [
        b'{"step": 2, "rew',
        b'\xff\xfe',
        bytes(40),
        b'nonsense',
        b'[]',
        b'5',
        b'null',
        b'{"reward": 1}',
        b'{"step": "2"}',
    ],
)
def test_what_a_kill_left_is_ignored(tmp_path, rubbish):
    file = tmp_path / 'metrics.jsonl'
    append_line(file, dict(step=1, reward=0.5))
    file.write_bytes(file.read_bytes() + rubbish)
    assert read_lines(file) == [dict(step=1, reward=0.5)]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    says = 'cannot write .*free some space, then go on with --resume'
    with pytest.raises(VaderError, match=says) as e:
        append_line(tmp_path, {})
    assert '\n' not in str(e.value)


# Recorded runs


def test_patterns_find_all_seeds():
    names = [p.name for p in recorded('modelscope-hps-small-[0-9]')]
    assert names == [f'modelscope-hps-small-{seed}' for seed in range(3)]
    assert recorded('modelscope-hps-small-1') == [home / 'modelscope-hps-small-1']


def test_a_missing_run_is_named():
    says = "no recorded run is called 'modelscope-hps-smal-0', did you mean 'modelscope-hps-small-0'"
    with pytest.raises(VaderError, match=says):
        recorded('modelscope-hps-smal-0')
    with pytest.raises(VaderError, match="is called 'sora': there are .* others in .*recorded"):
        recorded('sora')


@pytest.mark.parametrize('run', recorded('*-[0-9]'), ids=lambda p: p.name)
def test_every_recorded_run_is_whole(run):
    metrics, evals = read_lines(run / 'metrics.jsonl'), read_lines(run / 'eval.jsonl')
    lines = lambda name: len((run / name).read_text().splitlines())
    assert len(metrics) == lines('metrics.jsonl') and len(evals) == lines('eval.jsonl')
    config = read_json(run / 'config.json')
    assert metrics[-1]['step'] == evals[-1]['step'] == config.get('train_steps', config.get('steps'))
    assert evals[0]['step'] == 0 and read_json(run / 'lora/adapter_config.json')['peft_type'] == 'LORA'


# Tables


def test_a_table():
    lines = table(['a', 'b'], [[1, 'x'], [2.0, None]]).splitlines()
    assert lines == ['| a | b |', '| --- | --- |', '| 1 | x |', '| 2.0 | None |']


def test_held_out_scores():
    one = [dict(step=0, hps=0.7, reward=0.7, animal=1.0), dict(step=20, hps=0.8, reward=0.8, animal=0.5)]
    head, _, reward, animal = held_out_table(one).splitlines()
    assert head == '| held-out prompts | step 0 | step 20 |' and reward == '| reward | 0.700 | 0.800 |'
    assert 'hps' not in held_out_table(one), 'the only part of a reward equals it'
    assert '| hps | 0.500 |' in held_out_table([dict(step=0, hps=0.5, aesthetic=3.0, reward=0.8)])
    assert held_out_table([]) == 'No held-out prompts were given.'


def test_the_gain_over_seeds(tmp_path):
    for seed, scores in enumerate([(1.0, 9.0, 3.0), (2.0, 6.0)]):
        (tmp_path / f'run-{seed}').mkdir()
        for step, r in enumerate(scores):
            append_line(tmp_path / f'run-{seed}' / 'eval.jsonl', dict(step=step, reward=r))
    runs = [tmp_path / 'run-0', tmp_path / 'run-1']
    assert first_and_last(runs, 'reward').tolist() == [[1, 3], [2, 6]]
    last = seeds_table(runs, ['reward']).splitlines()[-1]
    assert last == '| reward | 1.00 \u2192 3.00 | 2.00 \u2192 6.00 | +3.00 \u00b1 1.41 |'
    assert seeds_table(runs[:1], ['reward']).endswith('| +2.00 |')
