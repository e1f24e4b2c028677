"The package is what its metadata say: version, requirements, command, files, and the line that tests it"
import ast, os, re, stat, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import entry_points
from pathlib import Path
import pytest
import fasterprune

ROOT = Path(__file__).resolve().parents[2]
config = ConfigParser(delimiters=['='])
config.read(ROOT/'settings.ini', encoding='utf-8')
CFG = config['DEFAULT']
name_of = lambda r: re.match(r'[\w.-]+', r)[0].lower()
PACKAGES = dict(sklearn='scikit-learn', PIL='pillow') # imported as → installed as

def imported(): # top-level names of all libraries that the exported modules import
    res = {}
    for p in (ROOT/'fasterprune').rglob('*.py'):
        if p.name=='_modidx.py': continue
        for n in ast.walk(ast.parse(p.read_text(encoding='utf-8'))):
            names = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module] if isinstance(n, ast.ImportFrom) and not n.level else []
            for m in names:
                top = m.split('.')[0]
                if top not in sys.stdlib_module_names: res.setdefault(PACKAGES.get(top, top), p.relative_to(ROOT))
    return res

def test_one_version(): assert CFG['version']==fasterprune.__version__ and re.fullmatch(r'\d+\.\d+\.\d+', CFG['version'])

def test_the_changelog_knows_the_version():
    text = (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')
    assert CFG['version'] in text or 'nreleased' in text

def test_requirements_are_what_is_imported():
    asked,used = {name_of(r) for r in CFG['requirements'].split()},imported()
    assert set(used)<=asked, f"not required: {', '.join(f'{k} (imported in {v})' for k,v in used.items() if k not in asked)}; add it to settings.ini"
    assert asked<=set(used), f"required, but never imported: {', '.join(sorted(asked-set(used)))}; take it out of settings.ini"

def test_development_requirements_are_separate():
    dev = {name_of(r) for r in CFG['dev_requirements'].split()}
    assert not dev&{name_of(r) for r in CFG['requirements'].split()} and {'nbdev','execnb','pytest','hypothesis'}<=dev
    seen = {n.name.split('.')[0] if isinstance(n, ast.alias) else n for p in (ROOT/'tests').rglob('*.py') for t in ast.walk(ast.parse(p.read_text(encoding='utf-8')))
            for n in (t.names if isinstance(t, ast.Import) else [t.module.split('.')[0]] if isinstance(t, ast.ImportFrom) and not t.level else [])}
    own = {p.stem for d in ('tests', 'benchmarks') for p in (ROOT/d).rglob('*.py')}|{'fasterprune', 'support'}
    known = dev|{name_of(r) for r in CFG['requirements'].split()}|{'torchvision', 'fasttransform', 'pillow'} # fastai brings these
    extra = {PACKAGES.get(m, m) for m in seen}-set(sys.stdlib_module_names)-own-known
    assert not extra, f"tests import {', '.join(sorted(extra))}, which is not in dev_requirements of settings.ini"

def test_the_command_exists():
    name,target = CFG['console_scripts'].split('=')
    mod,f = target.split(':')
    assert name=='fasterprune' and callable(getattr(__import__(mod, fromlist=[f]), f))
    found = [e for e in entry_points(group='console_scripts') if e.name==name]
    assert found and found[0].value==target, "fasterprune is not installed here; pip install -e ."

def test_python_version_is_said_once_and_kept():
    said = re.search(r'requires-python = ">=([\d.]+)"', (ROOT/'pyproject.toml').read_text(encoding='utf-8'))[1]
    assert said==CFG['min_python'] and sys.version_info>=tuple(map(int, said.split('.')))

@pytest.mark.parametrize('f', ['README.md', 'LICENSE', 'CHANGELOG.md', 'CONTRIBUTING.md', 'ARCHITECTURE.md', 'MANIFEST.in', 'settings.ini', 'setup.py', 'pyproject.toml', '.ci/run'])
def test_files(f): assert (ROOT/f).stat().st_size>0

def test_licence():
    assert CFG['license']=='Apache-2.0' and 'Apache License' in (ROOT/'LICENSE').read_text(encoding='utf-8')[:300]

def test_manifest_names_files_that_exist():
    lines = (ROOT/'MANIFEST.in').read_text(encoding='utf-8').splitlines()
    named = [f for l in lines if l.startswith('include ') for f in l.split()[1:]]
    assert {'settings.ini', 'LICENSE', 'README.md'}<=set(named) and all((ROOT/f).exists() for f in named)

def test_packages_have_init_files():
    for p in (ROOT/'fasterprune').rglob('*.py'): assert (p.parent/'__init__.py').exists(), f"{p.parent.relative_to(ROOT)} has no __init__.py, so it would not be installed"

def test_ci_runs_the_line_of_the_readme():
    run,readme = (ROOT/'.ci/run').read_text(encoding='utf-8'),(ROOT/'README.md').read_text(encoding='utf-8')
    assert os.stat(ROOT/'.ci/run').st_mode & stat.S_IXUSR and subprocess.run(['bash', '-n', ROOT/'.ci/run']).returncode==0
    pattern = re.search(r'grep -m1 -oE "(.*?)" README\.md', run)[1]
    found = subprocess.run(['bash', '-c', f'grep -m1 -oE "{pattern}" "{ROOT/"README.md"}"'], capture_output=True, text=True).stdout.strip()
    assert found.startswith("pip install -e '.[dev]' && pytest"), f"the README has no test line that .ci/run finds: {found!r}"
    assert 'README.md' in run and '.[dev]' in readme

def test_nothing_large_or_generated_is_tracked():
    r = subprocess.run(['git', 'ls-files', '-s'], cwd=ROOT, capture_output=True, text=True)
    if r.returncode: pytest.skip('not a git checkout')
    files = [l.split('\t')[1] for l in r.stdout.splitlines()]
    assert not [f for f in files if re.search(r'__pycache__|\.pyc$|\.pth$|\.ipynb_checkpoints|\.egg-info', f)]
    big = [f for f in files if (ROOT/f).exists() and (ROOT/f).stat().st_size>1_000_000]
    assert not big, f"over 1 MB: {', '.join(big)}"
