"Write README.md from the front page, nbs/index.ipynb: python docs/readme.py"
import re
from base64 import b64decode
from pathlib import Path
from posixpath import join, normpath
import nbformat

root = Path(__file__).resolve().parent.parent

def relink(text):
    "Links are relative to nbs/ in the notebook, and to the top in the README"
    f = lambda m: m[0] if re.match(r'\w+:|#|/', m[1]) else f"]({normpath(join('nbs', m[1]))})"
    return re.sub(r'\]\(([^)\s]+)\)', f, text)

def shown(out, pictures, alt=''):
    "One output as Markdown; pictures become files"
    if out.output_type == 'stream': return f'```text\n{out.text.rstrip()}\n```' if out.name == 'stdout' else ''
    data = out.get('data', {})
    if 'image/png' in data:
        name = f'nbs/images/index_{len(pictures)}.png'
        pictures[name] = b64decode(data['image/png'])
        return f'![{alt}]({name})'
    if 'text/markdown' in data: return data['text/markdown'].strip()
    if 'text/html' in data: return re.sub(r" style='text-align:(\w+)'", r' align="\1"', re.sub(r'\s*\n\s*', '', data['text/html']))
    return f"```text\n{data['text/plain'].rstrip()}\n```" if 'text/plain' in data else ''

def readme(nb):
    "The text of the README, and its pictures by path"
    parts,code,pictures = ['<!-- Written by docs/readme.py from nbs/index.ipynb; edit that. -->'],[],{}
    def flush():
        if code: parts.append('```python\n'+'\n'.join(code)+'\n```')
        code.clear()
    for c in nb.cells:
        if c.cell_type == 'markdown': flush(); parts.append(relink(c.source.strip()))
        elif c.cell_type == 'code' and not re.match(r'#\|\s*hide\b(?!_)', c.source):
            if not re.match(r'#\|\s*hide_input', c.source): code += c.source.strip().splitlines()
            alt = re.search(r'^#\|\s*fig-alt:\s*(.*)$', c.source, re.M)
            outs = [s for o in c.outputs if (s := shown(o, pictures, alt[1] if alt else ''))]
            if outs: flush(); parts += outs
    flush()
    return '\n\n'.join(parts)+'\n', pictures

def main():
    text,pictures = readme(nbformat.read(root/'nbs'/'index.ipynb', 4))
    (root/'README.md').write_text(text, encoding='utf-8')
    for name,png in pictures.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(png)

if __name__ == '__main__': main()
