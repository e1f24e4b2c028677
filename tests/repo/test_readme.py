"The README is what docs/readme.py makes of the front page, and what it says is there"
import re, runpy
from pathlib import Path
import nbformat, pytest

root = Path(__file__).resolve().parents[2]
if not (root/'nbs'/'index.ipynb').exists(): pytest.skip('the notebooks are not here', allow_module_level=True)
text = (root/'README.md').read_text(encoding='utf-8')

def test_readme_is_the_front_page():
    made,pictures = runpy.run_path(str(root/'docs'/'readme.py'))['readme'](nbformat.read(root/'nbs'/'index.ipynb', 4))
    assert made == text, 'run: python docs/readme.py'
    assert pictures and all((root/n).read_bytes() == png for n,png in pictures.items())

def test_links_lead_somewhere():
    links = [l for l in re.findall(r'\]\(([^)\s]+)\)', text) if not re.match(r'\w+:|#', l)]
    assert len(links) > 10 and not [l for l in links if not (root/l).exists()]

def test_commands():
    assert "pip install -e . && fasterprune" in text and "pip install -e '.[dev]' && pytest" in text
    assert 'name' in (root/'settings.ini').read_text() and 'fasterprune=fasterprune.cli:main' in (root/'settings.ini').read_text()

def test_short(): assert len(text.splitlines()) <= 120
