"""Write the tables of contents, in nbs/index.ipynb and in each chapter's README.md, from the notebooks' own first
cells: python tools/contents.py
"""

import json
import re
from pathlib import Path

nbs = Path(__file__).resolve().parent.parent / 'nbs'
CHAPTERS = {
    '0_start': 'Start here',
    '1_ground': 'Common ground and the small world',
    '2_diffusion': 'Diffusion',
    '3_models': 'Base models',
    '4_method': 'The method',
    '5_rewards': 'Rewards',
    '6_memory': 'Memory',
    '7_training': 'Training',
    '8_results': 'Experiments and results',
    'zoo': 'Appendix: how the small models were trained',
}
START, END = '<!-- contents: made by tools/contents.py -->', '<!-- end of contents -->'


def markdown(path):
    "All Markdown of a notebook."
    cells = json.loads(path.read_text(encoding='utf8'))['cells']
    return '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def entry(path):
    "Title, one line and running time of a notebook, as its first cells say."
    text = markdown(path)
    title = re.search(r'^# (.+)$', text, re.M)[1]
    line = re.search(r'^> (.+)$', text, re.M)[1].rstrip('.')
    time = re.search(r'\*\*Runs\s+in\*\*\s+([^.;,(]+)', text)
    words = ' '.join(time[1].split()) if time else ''
    return title, line, re.sub(r'^about | (on a laptop CPU|with the (finished|shipped) checkpoint)$', '', words)


def table(chapter, here):
    "The notebooks of a chapter; links lead from the folder `here`, relative to nbs/."
    rows = ['| notebook | what it is about | runs in |', '|---|---|---|']
    for path in sorted((nbs / chapter).glob('*.ipynb')):
        title, line, time = entry(path)
        link = path.name if here == chapter else f'{chapter}/{path.name}'
        rows.append(f'| [{title}]({link}) | {line} | {time} |')
    return '\n'.join(rows)


def contents():
    "The whole table, for the index."
    parts = [
        f'**{title}** ([`nbs/{folder}`]({folder}/README.md))\n\n{table(folder, "")}'
        for folder, title in CHAPTERS.items()
    ]
    return '\n\n'.join(parts)


def replaced(text, new):
    "`text` with what stands between the two marks replaced by `new`."
    before, rest = text.split(START)
    return f'{before}{START}\n\n{new}\n\n{END}{rest.split(END)[1]}'


def updated():
    "path -> new text, for the index and the chapters' pages."
    index = nbs / 'index.ipynb'
    notebook = json.loads(index.read_text(encoding='utf8'))
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        if START in source:
            cell['source'] = replaced(source, contents()).splitlines(keepends=True)
    pages = {index: json.dumps(notebook, indent=1, ensure_ascii=False) + '\n'}
    for chapter in CHAPTERS:
        page = nbs / chapter / 'README.md'
        pages[page] = replaced(page.read_text(encoding='utf8'), table(chapter, chapter))
    return pages


if __name__ == '__main__':
    for path, text in updated().items():
        path.write_text(text, encoding='utf8')
