"""Execute notebooks from a fresh kernel, in place, outputs kept and cleaned: python tools/execute.py
nbs/4_method/02_rollout.ipynb ...
"""

import base64, io, os, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from PIL import Image

import vader_nb  # noqa: F401  (kernels inherit how threads wait)

root = Path(__file__).resolve().parent.parent


def skipped(cell):
    "Is this a cell that tests leave out too: marked slow, gpu or weights, or not to be evaluated?"
    flags = ['eval: false', *get_config().tst_flags.split()]
    return any(line.startswith('#|') and line[2:].strip() in flags for line in cell.source.splitlines())


class Client(NotebookClient):
    "Runs all cells but the skipped ones, whose kept outputs stay."

    async def async_execute_cell(self, cell, index, **kw):
        if cell.cell_type == 'code' and skipped(cell):
            return cell
        return await super().async_execute_cell(cell, index, **kw)


WIDGET = 'application/vnd.jupyter.widget-view+json'


def without_players(nb):
    "Store a player as the picture that stands for it; nbdev cannot read the state of linked widgets."
    shown = [o.data for c in nb.cells for o in c.get('outputs', []) if WIDGET in o.get('data', {})]
    players = [data for data in shown if 'image/jpeg' in data]
    for data in players:
        del data[WIDGET]
    if players == shown:
        nb.metadata.pop('widgets', None)
    return nb


def with_small_drawings(nb):
    "Store drawings with a palette of 256 colours: a third of the size, and nobody sees the difference."
    shown = [o.data for c in nb.cells for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
    for data in shown:
        small = io.BytesIO()
        drawing = Image.open(io.BytesIO(base64.b64decode(data['image/png']))).convert('RGB')
        drawing.quantize(256).save(small, 'PNG', optimize=True)
        data['image/png'] = min(data['image/png'], base64.b64encode(small.getvalue()).decode(), key=len)
    return nb


def execute(path):
    "Run one notebook in its own folder and write it back with its outputs."
    nb = nbformat.read(path, 4)
    where = {'metadata': {'path': str(path.parent)}}
    Client(nb, timeout=1800, kernel_name='python3', coalesce_streams=True, resources=where).execute()
    nbformat.write(with_small_drawings(without_players(nb)), path)
    nbdev_clean(str(path))


if __name__ == '__main__':
    os.environ.setdefault('PYTHONPATH', str(root))
    for name in sys.argv[1:]:
        start = time.time()
        execute(Path(name).resolve())
        print(f'{name}: {time.time() - start:.0f} s')
