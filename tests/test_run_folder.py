"Run folders: checkpoints, and whose folder it is."

import pytest, torch
from vader_nb.core import VaderError, write_json
from vader_nb.training.run_folder import (
    check_folder,
    check_inputs,
    checkpoints,
    fold_seed,
    random_state,
    read_checkpoint,
    set_random_state,
    write_checkpoint,
)


def test_two_checkpoints_are_kept_in_order(tmp_path):
    for step in (9, 10, 100, 1000):
        write_checkpoint(tmp_path, dict(step=step))
    assert [read_checkpoint(p, ['step'])['step'] for p in checkpoints(tmp_path)] == [100, 1000]


@pytest.mark.parametrize(
    'spoil', [lambda b: b[: len(b) // 2], lambda b: b'', lambda b: b'hello', lambda b: b[:100] + bytes(50) + b[150:]]
)
def test_a_damaged_checkpoint_is_told(tmp_path, spoil):
    write_checkpoint(tmp_path, dict(step=1, lora=torch.randn(1000)))
    path = checkpoints(tmp_path)[0]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(VaderError, match='damaged.*delete it') as e:
        read_checkpoint(path, ['step', 'lora'])
    assert '\n' not in str(e.value)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / 'evil'), 'w')

    write_checkpoint(tmp_path, dict(step=1, lora=Evil()))
    with pytest.raises(VaderError):
        read_checkpoint(checkpoints(tmp_path)[0], ['lora'])
    assert not (tmp_path / 'evil').exists()


def test_random_states_come_back():
    import random, numpy

    draw = lambda: (torch.rand(()).item(), random.gauss(0, 1), numpy.random.rand())
    state = random_state()
    first = draw()
    set_random_state(state)
    assert draw() == first


def test_mixed_seeds_differ():
    assert len({fold_seed(i, j) for i in range(30) for j in range(30)}) == 900


def test_whose_folder(tmp_path):
    settings = dict(experiment='a', lr=0.1, train_steps=5)
    check_folder(tmp_path / 'new', settings)
    check_folder(tmp_path, settings)
    write_json(tmp_path / 'config.json', settings)
    check_folder(tmp_path, dict(settings, train_steps=9), resume=True)
    with pytest.raises(VaderError, match='--resume'):
        check_folder(tmp_path, settings)
    with pytest.raises(VaderError, match="its experiment is 'a', not 'b'"):
        check_folder(tmp_path, dict(settings, experiment='b'), resume=True)
    (tmp_path / 'config.json').write_text('{"experiment"')
    with pytest.raises(VaderError):
        check_folder(tmp_path, settings, resume=True)
    (tmp_path / 'config.json').rename(tmp_path / 'thesis.tex')
    for resume in (False, True):
        with pytest.raises(VaderError, match='holds other files'):
            check_folder(tmp_path, settings, resume)
    with pytest.raises(VaderError, match='is a file'):
        check_folder(tmp_path / 'thesis.tex', settings)


@pytest.mark.parametrize('left', ['.DS_Store', 'Thumbs.db', '._run', '.directory', '.gitkeep'])
def test_what_tools_leave_in_a_folder_is_nothing(tmp_path, left):
    (tmp_path / left).touch()
    (tmp_path / '.ipynb_checkpoints').mkdir()
    check_folder(tmp_path, dict(experiment='a'))
    (tmp_path / '.git').mkdir()
    with pytest.raises(VaderError, match='holds other files'):
        check_folder(tmp_path, dict(experiment='a'))


@pytest.mark.parametrize('damaged', ['[]', 'null', '3', '"a"', '{"prompts": 3}', '{"prompts": ["a"], "files": [1]}'])
def test_a_damaged_record_of_the_inputs_is_one_line(tmp_path, damaged):
    (tmp_path / 'inputs.json').write_text(damaged)
    with pytest.raises(VaderError, match=str(tmp_path)):
        check_inputs(tmp_path, dict(prompts=['a', 'b'], files={'a.png': '12'}))
