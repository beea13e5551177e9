"""Write the first cell into every notebook, which installs the package in Colab: python tools/colab.py

The address of the repository comes from settings.ini. pip leaves packages alone that are there and within the bounds of
settings.ini, so Colab's own torch stays. The package is imported before torch, since it says how torch's threads wait.
"""

import hashlib, json
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
template = """#| eval: false
#| hide
if 'google.colab' in str(get_ipython()):
    %pip install -q git+{url}
import vader_nb  # noqa: F401 (before torch: it says how the threads of torch wait)"""


def address():
    "Where the repository is."
    ini = ConfigParser(delimiters=['='])
    ini.read(root / 'settings.ini', encoding='utf8')
    return ini['DEFAULT']['git_url']


def source(cell):
    return ''.join(cell['source'])


def is_install(cell):
    return cell['cell_type'] == 'code' and 'google.colab' in source(cell)


def install_cell(name):
    "The cell, with an id of its own for the notebook called `name`."
    text = template.format(url=address())
    return dict(
        cell_type='code',
        execution_count=None,
        id=hashlib.sha1(name.encode()).hexdigest()[:8],
        metadata={},
        outputs=[],
        source=text.splitlines(keepends=True),
    )


def with_install_cell(nb, name):
    "The notebook `nb` with that cell, once: below the title, or below `default_exp`."
    cells = [cell for cell in nb['cells'] if not is_install(cell)]
    place = next((i + 1 for i, cell in enumerate(cells) if 'default_exp' in source(cell)), 1)
    old = [cell for cell in nb['cells'] if is_install(cell)]
    new = install_cell(name)
    if old:
        new['id'] = old[0]['id']
    return nb | dict(cells=cells[:place] + [new] + cells[place:])


def notebooks():
    "All notebooks."
    return sorted(p for p in (root / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def as_text(nb):
    return json.dumps(nb, indent=1, ensure_ascii=False) + '\n'


if __name__ == '__main__':
    for path in notebooks():
        old = path.read_text(encoding='utf8')
        new = as_text(with_install_cell(json.loads(old), path.name))
        if new == old:
            continue
        path.write_text(new, encoding='utf8')
        print(path.relative_to(root))
