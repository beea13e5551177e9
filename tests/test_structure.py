"The shape of the project: the order of notebooks, light imports, a wheel that works, notebooks fit to be read."

import ast, json, os, re, shlex, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / 'tools'))
paths = sorted(p for p in (root / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
ids = [str(p.relative_to(root / 'nbs')) for p in paths]
notebooks = pytest.mark.parametrize('path', paths, ids=ids)
modules = sorted(p for p in (root / 'vader_nb').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))


@cache
def read(path):
    return json.loads(path.read_text(encoding='utf8'))


def code(path):
    return [''.join(c['source']) for c in read(path)['cells'] if c['cell_type'] == 'code']


def exports(path):
    "The module that a notebook exports, or None."
    found = [m[1] for s in code(path) for m in re.finditer(r'^#\|\s*default_exp\s+(\S+)', s, re.M)]
    return found[0] if found else None


def place(path):
    """Where a notebook stands in the reading order: its chapter, then its number; `nbs/zoo` is an appendix after all
    others.
    """
    chapter = re.match(r'(\d+)_', path.parent.name)
    number = re.match(r'(\d+)_', path.name)
    return int(chapter[1]) if chapter else 99, int(number[1]) if number else 999


def tree(source):
    return ast.parse(re.sub(r'^(\s*)[%!].*$', r'\1pass', source, flags=re.M))


def imports(source):
    "Our own modules that a piece of code imports, anywhere in it, without the package's name."
    for n in ast.walk(tree(source)):
        if isinstance(n, ast.Import):
            names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            names = [n.module or ''] + [f'{n.module}.{a.name}' for a in n.names]
        else:
            continue
        yield from (m.split('.', 1)[1] for m in names if m.startswith('vader_nb.'))


@notebooks
def test_a_notebook_imports_only_from_lower_numbers(path):
    if path.parent.name == '0_start':
        pytest.skip('the first page shows the whole method with ready-made networks, before it is built')
    where = {exports(p): place(p) for p in paths if exports(p)}
    wrong = [m for s in code(path) for m in imports(s) if m in where and m != exports(path) and where[m] >= place(path)]
    assert not wrong, f'{path.name} imports {wrong} from notebooks that are not before it'


def test_every_module_comes_from_one_notebook():
    names = [exports(p).replace('.', '/') + '.py' for p in paths if exports(p)]
    assert sorted(names) == sorted(str(p.relative_to(root / 'vader_nb')) for p in modules)


def module_imports(path):
    "Our own modules that a module of the library imports, by their full names below vader_nb."
    package = path.relative_to(root / 'vader_nb').parent.parts
    for n in ast.walk(ast.parse(path.read_text(encoding='utf8'))):
        if not isinstance(n, ast.ImportFrom):
            continue
        above = package[: len(package) - n.level + 1] if n.level else ()
        if n.level or (n.module or '').startswith('vader_nb'):
            yield '.'.join([*above, *(n.module or '').removeprefix('vader_nb').strip('.').split('.')]).strip('.')


SHARED = {'rewards.base', 'rewards.views', 'rewards.text_match'}


def test_no_reward_needs_another_and_no_base_needs_another():
    seen = set()
    for path in modules:
        kind = path.parent.name
        if kind not in ('rewards', 'models'):
            continue
        found = set(module_imports(path))
        others = {f'{kind}.{p.stem}' for p in modules if p.parent.name == kind} - SHARED - {'models.base'}
        assert not found & others, f'{path.name} imports {found & others}'
        assert not any(f.startswith('models.') for f in found) or kind == 'models', f'{path.name} imports a base model'
        seen |= found
    assert SHARED | {'models.base'} <= seen


def ruff(*args):
    "What ruff finds: (file, row, message)."
    out = subprocess.run(
        [sys.executable, '-m', 'ruff', 'check', '--isolated', '--no-cache', '--output-format=json', *args],
        cwd=root,
        capture_output=True,
        text=True,
    )
    return [
        (Path(f['filename']).relative_to(root), f['location']['row'], f'{f["code"]} {f["message"]}')
        for f in json.loads(out.stdout)
    ]


def test_the_library_keeps_the_style():
    "Imports, names, lines of 120 columns, functions of at most 22 statements."
    rules = 'E,F,W,B006,N801,N802,N804,N805,PLR0915'
    found = ruff(
        'vader_nb',
        '--exclude=_modidx.py',
        f'--select={rules}',
        '--ignore=E401,E701',
        '--line-length=120',
        '--config=lint.pylint.max-statements=22',
    )
    by_nbdev = {
        p.relative_to(root): ''.join(p.read_text(encoding='utf8').split('# %% ')[:2]).count('\n') for p in modules
    }  # docstring and __all__
    found = [f for f in found if not (f[2].startswith('E501') and f[1] <= by_nbdev.get(f[0], 0))]
    assert not found


def test_everything_keeps_the_settings_of_pyproject():
    "Library, notebooks, tests and tools: what `ruff check` says to whoever types it."
    run = subprocess.run(
        [sys.executable, '-m', 'ruff', 'check', '--no-cache', '.'], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout


def test_no_base_model_knows_the_drawn_world():
    "Only a loader of a small model may, when it is called."
    for path in modules:
        if path.parent.name not in ('models', 'nets'):
            continue
        body = ast.parse(path.read_text(encoding='utf8')).body
        named = [f'{n.module}.{a.name}' for n in body if isinstance(n, ast.ImportFrom) for a in n.names]
        assert named and not [n for n in named if 'world' in n.split('.')], path.name


def test_no_star_imports():
    stars = [
        f'{p.name}: {n.module}'
        for p, s in [(p, s) for p in paths for s in code(p)] + [(p, p.read_text()) for p in modules]
        for n in ast.walk(tree(s))
        if isinstance(n, ast.ImportFrom) and n.names[0].name == '*'
    ]
    assert not stars


def public_names(path):
    "What `__all__` of a module holds."
    body = ast.parse(path.read_text(encoding='utf8')).body
    return next(
        (ast.literal_eval(n.value) for n in body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__'), []
    )


FOR_USERS = {
    'Animal',
    'KIND',
    'load_grounding_dino',
}  # to add an animal, to read a shape's row, to load a detector alone


def test_every_public_name_is_used():
    """By another module, a cell that is no part of the library, a test, a tool or a page; what only its own module
    needs is `exporti`.
    """
    words = lambda text: set(re.findall(r'\w+', text))
    here = {p: words(p.read_text(encoding='utf8')) for p in modules}
    cells = [s for p in paths for s in code(p) if not re.match(r'#\|\s*export', s)]
    texts = [*(root / 'tests').glob('*.py'), *(root / 'tools').glob('*.py'), *root.glob('*.md'), root / 'Makefile']
    outside = words('\n'.join(cells + [p.read_text(encoding='utf8') for p in texts if p != Path(__file__)]))
    public = {p: public_names(p) for p in modules}
    unused = {
        n for p in modules for n in public[p] if n not in outside and not any(n in here[q] for q in modules if q != p)
    }
    assert sum(map(len, public.values())) > 500
    assert unused == FOR_USERS


@pytest.mark.parametrize('path', modules, ids=[str(p.relative_to(root / 'vader_nb')) for p in modules])
def test_exported_functions_have_docstrings(path):
    t = ast.parse(path.read_text(encoding='utf8'))
    public = public_names(path)
    mute = [
        n.name
        for n in t.body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in public and not ast.get_docstring(n)
    ]
    assert not mute


@notebooks
def test_notebooks_are_fit_to_be_read(path):
    nb = read(path)
    assert path.stat().st_size < 500_000, f'{path.stat().st_size / 1e3:.0f} kB: show fewer or smaller pictures'
    errors = [o['evalue'] for c in nb['cells'] for o in c.get('outputs', []) if o['output_type'] == 'error']
    assert not errors
    assert nb['metadata'].get('kernelspec', {}).get('name') == 'python3', (
        'without a kernel named, JupyterLab asks each reader for one'
    )
    assert re.match(r'# \S.*\n(.*\n)*?> \S', ''.join(nb['cells'][0]['source'])), (
        'a notebook begins with its title and a line that says what it is'
    )


@notebooks
def test_one_cell_installs_the_package_in_colab(path):
    "The same in all notebooks, with the address of settings.ini, skipped by tests and hidden from documentation."
    from colab import install_cell, is_install

    cells = [c for c in read(path)['cells'] if is_install(c)]
    assert [c['source'] for c in cells] == [install_cell('')['source']], 'run python tools/colab.py'
    assert read(path)['cells'].index(cells[0]) <= 2, 'before any other code'


def test_the_install_cell():
    from colab import address, install_cell, with_install_cell

    lines = [line.rstrip() for line in install_cell('')['source']]
    assert lines[:2] == ['#| eval: false', '#| hide'] and lines[3].endswith(address())
    assert lines[4].startswith('import vader_nb '), 'before torch: it says how the threads of torch wait'
    assert not re.search(r'-U|--upgrade|--force|dev', lines[3]), 'an installed torch within the bounds stays as it is'
    bare = dict(
        cells=[dict(cell_type='markdown', source=['# Title'], id='a'), dict(cell_type='code', source=['1'], id='b')]
    )
    once = with_install_cell(bare, 'x.ipynb')
    assert [c['id'] for c in once['cells']][::2] == ['a', 'b'] and with_install_cell(once, 'x.ipynb') == once


def test_import_is_light():
    run = (
        'import sys, time; t = time.perf_counter(); import vader_nb; s = time.perf_counter() - t; '
        'assert "torch" not in sys.modules; print(s)'
    )
    assert float(subprocess.check_output([sys.executable, '-c', run])) < 1


WAITING = 'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'


def waiting(run, **settings):
    "How threads wait, as a fresh Python with these settings says at the end of `run`."
    env = {k: v for k, v in os.environ.items() if k not in WAITING} | settings
    run += f'; import os; print(*[os.environ.get(k) for k in {WAITING}])'
    return subprocess.check_output([sys.executable, '-c', run], env=env, text=True, cwd=root).split()


def test_threads_wait_a_short_while():
    "On a busy machine torch's threads spin on each other; the setting must stand before torch loads."
    seen = """
import sys
def note(name, args):
    if name == 'import' and args[0] == 'torch': import os; print(os.environ['GOMP_SPINCOUNT'])
sys.addaudithook(note)
import vader_nb.cli"""
    first, *_ = waiting(seen)
    assert first == '1000'
    assert waiting('import vader_nb') == ['1000', 'None']


def test_a_users_own_way_of_waiting_wins():
    assert waiting('import vader_nb', GOMP_SPINCOUNT='7') == ['7', 'None']
    assert waiting('import vader_nb', OMP_WAIT_POLICY='PASSIVE') == ['None', 'PASSIVE']


def test_threads_of_the_tests_wait_a_short_while():
    "conftest.py imports the package before torch."
    assert {k for k in WAITING if k in os.environ}


def test_export_changes_nothing(tmp_path):
    copy(tmp_path, ignore=shutil.ignore_patterns('checkpoints', 'recorded', '__pycache__'))
    shutil.copytree(root / 'nbs', tmp_path / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    subprocess.run(
        [sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    made = {p.relative_to(tmp_path): p.read_text() for p in (tmp_path / 'vader_nb').rglob('*.py')}
    kept = {p.relative_to(root): p.read_text() for p in (root / 'vader_nb').rglob('*.py')}
    assert sorted(made) == sorted(kept)
    assert not [str(p) for p in kept if made[p] != kept[p]], 'run nbdev_export'


def directives(source):
    return {(name, value) for name, value in re.findall(r'^#\|\s*(\S+)[ \t]*(\S*)', source, re.M)}


def executed_for_documentation(source):
    """Does nbdev execute this cell to describe the exported ones? It executes what imports, unless it is exported
    itself.
    """
    names = {name for name, value in directives(source)}
    skipped = ('eval:', 'false') in directives(source) or names & {'export', 'exports', 'exporti'}
    return not skipped and any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(tree(source)))


def belongs_to_imports(node, names):
    "Is it an import, or a setting of something that has just been imported, such as warnings.filterwarnings('ignore')?"
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return True
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, 'value', None)
    if isinstance(node, ast.Assign) and isinstance(target, ast.Name):
        return False
    roots = [n.id for n in ast.walk(target) if isinstance(n, ast.Name)] if target is not None else []
    return bool(roots) and set(roots) <= names


@notebooks
def test_a_cell_that_imports_does_nothing_else(path):
    "nbdev_proc_nbs executes it without the cells before, so that other code in it would fail or take long."
    mixed = []
    for source in filter(executed_for_documentation, code(path)):
        imported = [n for n in tree(source).body if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {(a.asname or a.name).split('.')[0] for n in imported for a in n.names}
        if not all(belongs_to_imports(n, names) for n in tree(source).body):
            mixed.append(source)
    assert not mixed, 'move the imports to the first cells'


def test_nbdev_makes_pages_of_notebooks(tmp_path):
    "What nbdev_proc_nbs does to each notebook, tried on some."
    few = ['index.ipynb', '1_ground/01_show.ipynb', '3_models/00_base.ipynb', '8_results/02_cli.ipynb']
    run = (
        'import nbdev.serve_drv as d; from nbdev.processors import FilterDefaults as F; from pathlib import Path as P; '
        f'[d.main((P("nbs")/n, P({str(tmp_path)!r})/P(n).name, F)) for n in {few}]'
    )
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', run], cwd=root, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    assert 'strip(' in (tmp_path / '01_show.ipynb').read_text(encoding='utf8')


@notebooks
def test_a_notebook_is_stored_as_it_is_saved(path):
    "As nbdev's hook leaves it, and as nbdev reads and writes it: opened and saved unrun, nothing changes."
    from execnb.nbio import nb2str, read_nb
    from nbdev.clean import clean_nb

    nb = read_nb(path)
    clean_nb(nb)
    assert nb2str(nb) == path.read_text(encoding='utf8'), 'run nbdev_clean, or python tools/execute.py on it'


def test_readme_is_made_from_the_index():
    from readme import readme

    text, pictures = readme(read(root / 'nbs/index.ipynb'))
    assert (root / 'README.md').read_text(encoding='utf8') == text, 'run make readme'
    assert all((root / 'nbs/images' / name).read_bytes() == data for name, data in pictures.items())


def headings(path):
    "The anchors of a notebook, as JupyterLab makes them."
    text = '\n'.join(''.join(c['source']) for c in read(path)['cells'] if c['cell_type'] == 'markdown')
    return {h.strip().replace(' ', '-') for h in re.findall(r'^#+ (.+)$', text, re.M)}


pages = [
    *paths,
    *sorted((root / 'nbs').rglob('README.md')),
    *[root / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')],
]


@pytest.mark.parametrize('path', pages, ids=[str(p.relative_to(root)) for p in pages])
def test_every_link_leads_somewhere(path):
    if path.suffix == '.md':
        text = path.read_text(encoding='utf8')
    else:
        text = '\n'.join(''.join(c['source']) for c in read(path)['cells'] if c['cell_type'] == 'markdown')
    text = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)
    broken = []
    for target, anchor in re.findall(r'\]\(((?!https?:)[^)#\s]*)(?:#((?:[^()\s]|\([^()]*\))+))?\)', text) + [
        (t, '') for t in re.findall(r'src="((?!https?:)[^"]+)"', text)
    ]:
        place = (path.parent / target).resolve() if target else path
        if not place.exists():
            broken.append(target)
        elif anchor and place.suffix == '.ipynb' and anchor not in headings(place):
            broken.append(f'{target}#{anchor}')
    assert not broken


def shown(path):
    "Lines of code in a page's Markdown: indented, in a fence, or as a word of the text."
    text = (
        path.read_text(encoding='utf8')
        if path.suffix == '.md'
        else '\n'.join(''.join(c['source']) for c in read(path)['cells'] if c['cell_type'] == 'markdown')
    )
    return (
        re.findall(r'^ {4,}(\S.*)$', text, re.M)
        + re.findall(r'`([^`\n]+)`', text)
        + [line for f in re.findall(r'```\w*\n(.*?)```', text, re.S) for line in f.split('\n')]
    )


@pytest.mark.parametrize('path', pages, ids=[str(p.relative_to(root)) for p in pages])
def test_code_in_the_text_names_what_exists(path):
    "Imports can be made, and `vader ...` is a command that the parser takes."
    from importlib import import_module
    from vader_nb.cli import make_parser

    for line in shown(path):
        if m := re.match(r'from (vader_nb[.\w]*) import ([\w, ]+)$', line):
            missing = [n for n in re.split(r',\s*', m[2]) if not hasattr(import_module(m[1]), n)]
            assert not missing, f'{line}: no {missing}'
        words = line.split(' #')[0].split()
        whole = len(words) > 2 and not words[-1].startswith('--')  # or else a command is only mentioned
        if words[:1] == ['vader'] and whole and '...' not in line and not re.search(r'\b[A-Z]{3,}\b|[|\[<]', line):
            make_parser().parse_args(shlex.split(' '.join(words[1:])))
        if m := re.match(r'(?:nice )?python -m (vader_nb[.\w]+)', line):
            import_module(m[1])


def test_contents_are_up_to_date():
    sys.path.insert(0, str(root / 'tools'))
    from contents import CHAPTERS, updated

    assert {p.name for p in (root / 'nbs').iterdir() if p.is_dir() and list(p.glob('*.ipynb'))} == set(CHAPTERS)
    assert not [
        str(p) for p, text in updated().items() if p.suffix == '.md' and p.read_text(encoding='utf8') != text
    ], 'run make readme'
    sources = lambda nb: [''.join(c['source']) for c in nb['cells']]
    index = root / 'nbs/index.ipynb'
    assert sources(json.loads(updated()[index])) == sources(read(index)), 'run make readme'


@pytest.mark.skipif(
    not (root / 'vader_nb/checkpoints/modelscope/unet').exists(), reason='the small ModelScope is not there yet'
)
def test_the_example_of_the_index_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = [s for s in code(root / 'nbs/index.ipynb') if 'fit(' in s]
    assert 'Config(train_steps=30)' in example
    exec(
        example.replace('Config(train_steps=30)', 'Config(train_steps=1, batch_size=1, T=2, K=2)').replace(
            'T=12', 'T=2'
        ),
        {},
    )
    assert (tmp_path / 'runs/mine/lora').exists()


def copy(to, **kw):
    "What a build needs, copied to `to`, so that nothing is left in the checkout."
    for name in ['settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE']:
        shutil.copy(root / name, to)
    shutil.copytree(root / 'vader_nb', to / 'vader_nb', **kw)


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel that is built from the source distribution of this checkout, and from nothing else."
    source = tmp_path_factory.mktemp('source')
    copy(source, ignore=shutil.ignore_patterns('__pycache__'))
    build = [sys.executable, '-c', 'from setuptools.build_meta import build_sdist; build_sdist("dist")']
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (sdist,) = (source / 'dist').glob('*.tar.gz')
    pip('wheel', sdist, '--no-build-isolation', '-w', source / 'dist')
    return next((source / 'dist').glob('*.whl'))


def pip(*args):
    subprocess.run([sys.executable, '-m', 'pip', *map(str, args), '--no-deps', '-q'], check=True, capture_output=True)


def test_the_wheel_holds_every_file(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        str(p.relative_to(root)) for p in (root / 'vader_nb').rglob('*') if p.is_file() and '__pycache__' not in p.parts
    }
    assert {f for f in inside if '.dist-info/' not in f} == {
        o for o in ours if o.endswith('.py') or '/checkpoints/' in o or '/recorded/' in o
    }


def test_the_wheel_imports_where_there_is_no_checkout(wheel, tmp_path):
    pip('install', wheel, '--target', tmp_path / 'site')
    names = ['vader_nb'] + ['.'.join(p.relative_to(root).with_suffix('').parts) for p in modules]
    run = f'import importlib; print([importlib.import_module(n) for n in {names}][0].__file__)'
    out = subprocess.run(
        [sys.executable, '-c', run],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(tmp_path / 'site')},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip().startswith(str(tmp_path / 'site'))


def test_the_page_on_a_package_index_has_no_relative_links(wheel):
    archive = zipfile.ZipFile(wheel)
    text = archive.read(next(n for n in archive.namelist() if n.endswith('METADATA'))).decode()
    assert 'VADER in a hundred lines' in text
    assert not re.findall(r'\]\((?!https?:|#)[^)]*\)', text)


def test_settings_name_the_packages_the_code_imports():
    ini = ConfigParser(delimiters=['='])
    ini.read(root / 'settings.ini')
    listed = {re.split(r'[<>=!]', r)[0].lower().replace('-', '_') for r in ini['DEFAULT']['requirements'].split()}
    listed |= {dict(pillow='PIL', open_clip_torch='open_clip').get(r, r) for r in listed}
    nodes = [n for p in modules for n in ast.walk(ast.parse(p.read_text()))]
    used = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    used |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
    missing = {u.split('.')[0] for u in used} - listed - sys.stdlib_module_names
    assert missing <= {'vader_nb', 'bitsandbytes'}  # the latter, for 8-bit Adam, only where a user has installed it


def test_the_makefile_asks_for_the_torch_of_the_settings():
    ini = ConfigParser(delimiters=['='])
    ini.read(root / 'settings.ini')
    torch = [r for r in ini['DEFAULT']['requirements'].split() if re.match('torch(vision)?[<>=]', r)]
    assert len(torch) == 2 and ' '.join(f"'{r}'" for r in torch) in (root / 'Makefile').read_text()


def test_python_3_10_can_read_the_code():
    "And knows what it calls: what came with 3.11 shows only when it runs."
    subprocess.run(
        [
            sys.executable,
            '-m',
            'ruff',
            'check',
            '--isolated',
            '--select',
            'F821',
            '--target-version',
            'py310',
            root / 'vader_nb',
            root / 'tools',
        ],
        check=True,
    )
    newer = (
        r'catch_warnings\(.+\)|import tomllib|from typing import (Self|assert_never)|ExceptionGroup|\.add_note\(|'
        r'datetime\.UTC|itertools\.batched|contextlib\.chdir|StrEnum'
    )
    found = [
        f'{p.name}: {m[0]}'
        for p in modules + sorted((root / 'tools').glob('*.py'))
        for m in re.finditer(newer, p.read_text(encoding='utf8'))
    ]
    assert not found


def test_the_first_page_is_a_hundred_lines_of_plain_pytorch():
    path = root / 'nbs/0_start/00_vader.ipynb'
    cells = [s for s in code(path) if '#| hide' not in s]
    assert sum(1 for s in cells for line in s.splitlines() if line.strip()) <= 100
    assert {m for s in cells for m in imports(s)} <= {
        'models.modelscope',
        'models.modelscope.load_modelscope',
        'rewards.aesthetic',
        'rewards.aesthetic.load_aesthetic',
    }


def test_the_front_door_is_lazy():
    run = (
        'import sys, vader_nb; assert "torch" not in sys.modules; from vader_nb import *; '
        'assert {"Config", "fit", "sample", "load_model", "load_reward"} <= set(globals()); '
        'assert "torch" in sys.modules'
    )
    subprocess.run([sys.executable, '-c', run], check=True)
    import vader_nb

    with pytest.raises(AttributeError, match='nothing'):
        vader_nb.nothing


@notebooks
def test_lines_of_code_can_be_read(path):
    long = [line for source in code(path) for line in source.split('\n') if len(line) > 120]
    assert not long


@pytest.mark.parametrize(
    'path', [p for p in paths if p.parent.name != 'nbs'], ids=lambda p: f'{p.parent.name}/{p.name}'
)
def test_every_notebook_says_what_one_learns_and_how_long_it_runs(path):
    opening = [''.join(c['source']) for c in read(path)['cells'][:5] if c['cell_type'] == 'markdown']
    assert '**You will learn**' in '\n'.join(opening) and '**Runs in**' in '\n'.join(opening)
