"Every notebook runs, is clean, reads as a chapter, and is what the library was made from"
import filecmp, io, json, multiprocessing, os, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/'nbs'
NOTEBOOKS = [p.relative_to(NBS).as_posix() for p in sorted(NBS.rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts and not p.name.startswith('_')]
SKIP = ['slow', 'cuda']

# ---- they run: two at a time, each in a process of its own that begins with the imports done

def execute(name, pipe):
    os.environ['MPLBACKEND'] = 'agg'
    sys.__stderr__ = told = io.StringIO() # where nbdev writes the traceback
    import torch
    torch.set_num_threads(1)
    from nbdev.test import test_nb
    ok,_ = test_nb(NBS/name, skip_flags=SKIP, basepath=ROOT, do_print=False)
    pipe.send((ok, told.getvalue()))

def run(ctx, name):
    here,there = ctx.Pipe(False)
    p = ctx.Process(target=execute, args=(name, there))
    p.start(); there.close()
    try: return here.recv()
    except EOFError: return False,'the process died before it was done'
    finally: p.join()

@pytest.fixture(scope='module')
def results(request):
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(['fastai.vision.all', 'fasterprune.all', 'nbdev.test', 'pandas'])
    wanted = [i.callspec.params['name'] for i in request.session.items if i.module is request.module and i.originalname=='test_notebook']
    with ThreadPoolExecutor(2) as pool:
        jobs = {n:pool.submit(run, ctx, n) for n in wanted}
        yield jobs
        for j in jobs.values(): j.cancel()

@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebook(name, results):
    ok,told = results[name].result()
    assert ok, f"nbs/{name} fails:\n{told[-4000:]}"

# ---- they are what the library was made from

@pytest.fixture(scope='module')
def copy(tmp_path_factory): # of all that nbdev reads, exported and cleaned again
    tmp = tmp_path_factory.mktemp('copy')
    for f in ('nbs', 'fasterprune'): shutil.copytree(ROOT/f, tmp/f, ignore=shutil.ignore_patterns('__pycache__', 'models', '.ipynb_checkpoints'))
    for f in ('pyproject.toml', 'settings.ini', 'setup.py', 'README.md'): shutil.copy(ROOT/f, tmp/f)
    env = {**os.environ, 'PYTHONPATH':str(tmp)}
    for f in ('nbdev.doclinks:nbdev_export', 'nbdev.clean:nbdev_clean'):
        mod,fn = f.split(':')
        r = subprocess.run([sys.executable, '-c', f"import sys; sys.argv = ['{fn}']; from {mod} import {fn}; {fn}()"], cwd=tmp, env=env, capture_output=True, text=True)
        assert r.returncode==0, r.stderr
    return tmp

def files(folder): return {p.relative_to(folder).as_posix() for p in folder.rglob('*.py')}

def test_the_library_is_what_the_notebooks_say(copy):
    mine,made = files(ROOT/'fasterprune'),files(copy/'fasterprune')
    assert mine==made, f"not exported: {sorted(made-mine)}; no notebook makes: {sorted(mine-made)}; run nbdev-export"
    other = [f for f in sorted(mine) if not filecmp.cmp(ROOT/'fasterprune'/f, copy/'fasterprune'/f, shallow=False)]
    assert not other, f"{', '.join(other)} differ from what their notebooks say; run nbdev-export"

@pytest.mark.parametrize('name', NOTEBOOKS)
def test_clean(name, copy):
    assert (NBS/name).read_bytes()==(copy/'nbs'/name).read_bytes(), f"nbs/{name} is not clean; run nbdev-clean"

# ---- they read as chapters

def cells(name): return json.loads((NBS/name).read_text(encoding='utf-8'))['cells']
def text(c): return ''.join(c['source'])
def exported(name): return any(re.search(r'#\|\s*default_exp', text(c)) for c in cells(name))

@pytest.mark.parametrize('name', [n for n in NOTEBOOKS if exported(n)])
def test_title_promise_and_see_also(name):
    first,*rest = cells(name)
    assert first['cell_type']=='markdown' and re.match(r'# \S.*\n\n?> \S', text(first)), f"nbs/{name} begins with a title and a promise: '# Title', then '> one line'"
    if name.split('_')[0] in ('12', '13'): return # the public surface and the command: a list, not a chapter
    heads = [h for c in rest if c['cell_type']=='markdown' for h in re.findall(r'^## (.*)', text(c), re.M)]
    assert heads and heads[-1]=='See also', f"nbs/{name} ends with '## See also'; its headings are {heads}"

@pytest.mark.parametrize('name', NOTEBOOKS)
def test_small_and_tidy(name):
    size = (NBS/name).stat().st_size
    assert size<1_000_000, f"nbs/{name} has {size/1e6:.1f} MB; make its pictures smaller"
    for i,c in enumerate(cells(name)):
        for o in c.get('outputs', ()):
            t = ''.join(o.get('text', ()))+''.join(''.join(v) for k,v in o.get('data', {}).items() if k.startswith('text'))
            bad = re.search(r'█|\d+%\|| \[\d+/\d+ \d\d:\d\d|\w*Warning: |(?<![\w.])/(?:home|work|root|tmp|usr|Users)/[\w./]+|<progress', t)
            assert not bad, f"nbs/{name}, cell {i} shows {bad[0]!r}: no progress bars, warnings or paths of this machine in saved outputs"
            assert o['output_type']!='error', f"nbs/{name}, cell {i} shows an error"
        assert 'Users/' not in text(c) and not re.search(r'(?<![\w.])/(?:home|work)/', text(c)), f"nbs/{name}, cell {i} names a path of one machine"
