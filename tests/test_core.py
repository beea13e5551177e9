import errno, os, re
from pathlib import Path

import numpy as np
import pytest, torch
from vader_nb.core import (
    VaderError,
    atomic_path,
    check,
    check_device,
    check_writable,
    default_dtype,
    from_frames,
    make_generator,
    pick_device,
    pick_dtype,
    placement,
    randn,
    read_json,
    reason,
    suggest,
    swap_cf,
    to_frames,
    write_json,
)

root = Path(__file__).resolve().parent.parent


def test_check_raises_one_kind_of_error():
    check(True, 'fine')
    with pytest.raises(VaderError, match='^no$'):
        check([], 'no')
    assert issubclass(VaderError, ValueError)


def test_frames_keep_their_order():
    v = torch.arange(2 * 3 * 1 * 2 * 2.0).view(2, 3, 1, 2, 2)
    assert to_frames(v).shape == (6, 1, 2, 2)
    assert torch.equal(to_frames(v)[3], v[1, 0])
    assert torch.equal(from_frames(to_frames(v), 2), v)
    assert torch.equal(from_frames(torch.arange(6), 2), torch.tensor([[0, 1, 2], [3, 4, 5]]))
    assert to_frames(v).data_ptr() == v.data_ptr()


def test_swap_cf_is_its_own_inverse():
    v = torch.randn(2, 3, 4, 5, 6)
    assert swap_cf(v).shape == (2, 4, 3, 5, 6)
    assert torch.equal(swap_cf(swap_cf(v)), v)


@pytest.mark.parametrize(
    'call',
    [
        lambda: to_frames(torch.zeros(3, 4, 4)),
        lambda: swap_cf(torch.zeros(3)),
        lambda: from_frames(torch.zeros(7), 2),
        lambda: from_frames(torch.zeros(7), 0),
    ],
)
def test_wrong_shapes_are_refused(call):
    with pytest.raises(VaderError):
        call()


def test_a_seed_means_the_same_noise_in_every_precision():
    a, b = randn((3, 4), make_generator(1)), randn((3, 4), make_generator(1), dtype=torch.float16)
    assert a.dtype == torch.float32 and torch.equal(a.half(), b)
    assert not torch.equal(a, randn((3, 4), make_generator(2)))
    torch.manual_seed(5)
    x = torch.randn(1)
    torch.manual_seed(5)
    randn(3, make_generator(0))
    assert torch.equal(x, torch.randn(1))  # the global state was not touched


def test_processes_share_the_noise_of_one():
    whole = randn((4, 3), make_generator(7))
    assert torch.equal(whole, torch.cat([randn((2, 3), make_generator(7, share=(i, 2))) for i in range(2)]))


def test_device_and_precision_names():
    assert pick_device('cpu') == torch.device('cpu') == pick_device(torch.device('cpu'))
    assert pick_device().type in ('cpu', 'cuda')
    assert pick_dtype('bf16') is pick_dtype('bfloat16') is pick_dtype(torch.bfloat16) is torch.bfloat16
    for bad in ['tpu', 'cpu:7', 'cuda:x', 'cuda:99']:
        with pytest.raises(VaderError):
            pick_device(bad)
    with pytest.raises(VaderError, match='fp32, fp16, bf16'):
        pick_dtype('int8')


def test_one_rule_for_number_formats():
    assert (
        default_dtype('small', 'cuda')
        == default_dtype('full', 'cpu')
        == default_dtype('full', torch.device('cpu'))
        == torch.float32
    )
    assert default_dtype('full', 'cuda:1') == default_dtype('full', 'mps') == torch.float16
    assert (
        default_dtype('full', torch.device('cuda'), 'bf16')
        == default_dtype('full', 'cuda', torch.bfloat16)
        == torch.bfloat16
    )
    assert default_dtype('small', 'cuda', 'bf16') == torch.float32


def test_every_loader_keeps_to_that_rule():
    "No module but core decides by itself where a network goes and which scale and device take half precision."
    modules = [p for part in ('models', 'rewards') for p in (root / 'vader_nb' / part).glob('*.py')]
    loaders = [p.name for p in modules if re.search(r'^def load_\w+\(\n(?s:.*?)weights=True', p.read_text(), re.M)]
    assert len(loaders) > 10 and all(
        'placement(scale, device, dtype, weights' in p.read_text() for p in modules if p.name in loaders
    )
    assert not [p.name for p in modules if re.search(r'\b(pick_device|pick_dtype|default_dtype)\(', p.read_text())]


def test_tests_run_on_the_cpu_unless_they_say_otherwise(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    assert placement('full', None, None) == (torch.device('cpu'), torch.float32)
    assert placement('full', 'cuda', None) == (torch.device('cuda'), torch.float16)
    assert pick_device() == torch.device('cuda')  # the library's own rule


def test_placement():
    assert (
        placement('full', 'cpu', None) == (torch.device('cpu'), torch.float32)
        and placement('small', 'cpu', 'bf16')[1] == torch.bfloat16
    )
    assert placement('full', None, None, weights=False, half='bf16') == (torch.device('meta'), torch.bfloat16)
    with pytest.raises(VaderError, match='unknown device'):
        placement('small', 'meta', None)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_atomic_path_replaces_files_and_folders(tmp_path):
    for text in ['one', 'two']:
        with atomic_path(tmp_path / 'deep' / 'a.txt') as new:
            new.write_text(text)
        with atomic_path(tmp_path / 'deep' / 'folder') as new:
            new.mkdir()
            (new / text).write_text(text)
    assert (tmp_path / 'deep' / 'a.txt').read_text() == 'two'
    assert names(tmp_path / 'deep') == ['a.txt', 'folder'] and names(tmp_path / 'deep' / 'folder') == ['two']


@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('boom'), FileNotFoundError('other')])
def test_atomic_path_keeps_the_old_file_when_the_writer_fails(tmp_path, error):
    (tmp_path / 'a.txt').write_text('old')
    with pytest.raises(type(error)):
        with atomic_path(tmp_path / 'a.txt') as new:
            new.write_text('half')
            raise error
    assert (tmp_path / 'a.txt').read_text() == 'old' and names(tmp_path) == ['a.txt']


@pytest.mark.parametrize(
    'error',
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError('PytorchStreamWriter: file write failed'),
        Exception('Error while serializing: I/O error: No space left on device (os error 28)'),
    ],
)
def test_a_full_disk_is_one_clear_line(tmp_path, error):
    (tmp_path / 'a.txt').write_text('old')
    with pytest.raises(VaderError, match='No space left.*free some space') as e:
        with atomic_path(tmp_path / 'a.txt') as new:
            new.mkdir()
            raise error
    assert '\n' not in str(e.value) and names(tmp_path) == ['a.txt'] and (tmp_path / 'a.txt').read_text() == 'old'


def test_a_file_never_replaces_a_folder(tmp_path):
    (tmp_path / 'a.json' / 'mine').mkdir(parents=True)
    with pytest.raises(VaderError, match='cannot write .*a folder has that name'):
        write_json(tmp_path / 'a.json', {})
    assert (tmp_path / 'a.json' / 'mine').exists() and names(tmp_path) == ['a.json']


@pytest.mark.parametrize('failing', [1, 2])
def test_an_interrupt_while_folders_change_places_loses_none(tmp_path, monkeypatch, failing):
    (tmp_path / 'lora').mkdir()
    (tmp_path / 'lora' / 'old').write_text('')
    calls, replace = [], os.replace

    def stop(a, b):
        calls.append(a)
        if len(calls) == failing:
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(os, 'replace', stop)
    with pytest.raises(KeyboardInterrupt):
        with atomic_path(tmp_path / 'lora') as new:
            new.mkdir()
    assert names(tmp_path) == ['lora'] and names(tmp_path / 'lora') == ['old']


def test_whether_a_folder_can_be_written_to_is_tried(tmp_path):
    check_writable(tmp_path / 'new' / 'folder')
    assert names(tmp_path / 'new' / 'folder') == []
    (tmp_path / 'file').write_text('')
    for bad in ['file', 'file/x', 'n' * 300]:
        with pytest.raises(VaderError, match='cannot write'):
            check_writable(tmp_path / bad)


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(VaderError, match='cannot write'):
        write_json(tmp_path / 'file' / 'a.json', {})


def test_json_round_trip_and_damage(tmp_path):
    data = dict(a=1, b=[1.5, None], c='\u00e9')
    write_json(tmp_path / 'a.json', data)
    assert read_json(tmp_path / 'a.json') == data
    (tmp_path / 'a.json').write_text('{"a": 1, "b')
    for f in ['a.json', 'missing.json']:
        with pytest.raises(VaderError, match=f):
            read_json(tmp_path / f)
    with pytest.raises(TypeError):
        write_json(tmp_path / 'b.json', object())
    assert names(tmp_path) == ['a.json']


def test_a_reason_is_one_line_and_never_empty():
    assert reason(OSError(' first\nsecond')) == 'first' and reason(EOFError()) == 'EOFError'


@pytest.mark.parametrize('seed', [2**64, 10**30, -(2**63) - 1, 1.5, '7', None])
def test_a_seed_that_torch_cannot_take_is_one_clear_line(seed):
    with pytest.raises(VaderError, match='seed .* must be a whole number below') as e:
        make_generator(seed)
    assert '\n' not in str(e.value)


def test_any_other_whole_number_is_a_seed():
    for seed in (0, -1, 2**64 - 1, -(2**63), np.int64(3), torch.tensor(3)):
        assert randn(2, make_generator(seed)).isfinite().all()
    assert torch.equal(randn(2, make_generator(3)), randn(2, make_generator(np.int64(3))))


def test_a_tensor_on_another_device_is_named():
    x = torch.zeros(2)
    for device in ('cpu', torch.device('cpu'), 'cpu:0'):
        check_device(x, device, 'the video')
    with pytest.raises(VaderError, match=r"^the video is on cpu, but must be on cuda:1: move it with .to\('cuda:1'\)$"):
        check_device(x, 'cuda:1', 'the video')
    with pytest.raises(VaderError, match='the latents is on meta'):
        check_device(x.to('meta'), 'cpu', 'the latents')


def test_a_word_that_is_nearly_right_is_suggested():
    assert suggest('pandda', {'panda', 'fox'}) == ", did you mean 'panda'?" and suggest('zebra', {'panda', 'fox'}) == ''
