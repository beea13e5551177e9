"Write README.md from nbs/index.ipynb: prose as it is, code in fences, its printed results and pictures below it."

import base64, json, re
from pathlib import Path

root = Path(__file__).resolve().parent.parent
hidden = re.compile(r'^#\|\s*(hide|default_exp|export)', re.M)
option = re.compile(r'^#\|.*\n?', re.M)


def text(x):
    "Notebook text, which is a string or a list of lines, as one string."
    return x if isinstance(x, str) else ''.join(x)


def picture(data, name, pictures):
    "A link to the PNG in an output's `data`; the file itself goes to `pictures`, a dict name -> bytes."
    pictures[name] = base64.b64decode(text(data['image/png']))
    return f'![](nbs/images/{name})'


def shown(out, name, pictures):
    "Markdown for one output of a code cell."
    data = out.get('data', {})
    if 'image/png' in data:
        return picture(data, name, pictures)
    if 'image/jpeg' in data:
        return ''  # a strip or a player, too large for a README
    if 'text/markdown' in data:
        return text(data['text/markdown'])
    plain = text(out.get('text') or data.get('text/plain', '')).rstrip()
    return '\n'.join('    ' + line for line in plain.splitlines())


def joined(outs):
    "The outputs of a cell, in which text that was printed piece by piece is one piece."
    whole = []
    for o in outs:
        if 'text' in o and whole and 'text' in whole[-1]:
            whole[-1] = {'text': text(whole[-1]['text']) + text(o['text'])}
        else:
            whole.append(o)
    return whole


def prose(source):
    "Markdown whose links, right in `nbs/`, are made right in the repository's root."
    return re.sub(r'(\]\(|src=")(?!https?:|#|\.\./|/)', r'\1nbs/', source).replace('](../', '](')


def readme(nb):
    "README.md's text for the notebook dict `nb`, and the pictures it shows as a dict name -> bytes."
    parts, pictures = [], {}
    for i, cell in enumerate(nb['cells']):
        source = text(cell['source'])
        if hidden.search(source):
            continue
        if cell['cell_type'] == 'markdown':
            parts.append(prose(source))
        elif cell['cell_type'] == 'code' and source.strip():
            parts.append(f'```python\n{option.sub("", source).strip()}\n```')
            parts += [shown(o, f'index_{i}_{j}.png', pictures) for j, o in enumerate(joined(cell['outputs']))]
    head = '<!-- Made from nbs/index.ipynb by `make readme`: edit that. -->'
    return '\n\n'.join([head] + [p for p in parts if p.strip()]) + '\n', pictures


if __name__ == '__main__':
    md, pictures = readme(json.loads((root / 'nbs/index.ipynb').read_text(encoding='utf8')))
    (root / 'README.md').write_text(md, encoding='utf8')
    (root / 'nbs/images').mkdir(exist_ok=True)
    for name, data in pictures.items():
        (root / 'nbs/images' / name).write_bytes(data)
