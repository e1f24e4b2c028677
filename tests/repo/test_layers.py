"The map of ARCHITECTURE.md, held by reading the source: who may import whom, and what no module does"
import ast, re
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[2]
LIB,NBS = ROOT/'fasterprune',ROOT/'nbs'
ORDER = ('core', 'options', 'schedule', 'axes', 'granularity_rules', 'granularity', 'allocation', 'criteria', 'surgery', 'sparse', 'measure', 'callback', 'data', 'demo', 'cli', 'all', '__main__')
NOTEBOOKS = {}
for p in sorted(NBS.rglob('*.ipynb')): # module → notebook
    m = re.search(r'#\|\s*default_exp\s+([\w.]+)', p.read_text(encoding='utf-8'))
    if m: NOTEBOOKS[m[1]] = p.relative_to(NBS)
PATHS = {'.'.join(p.relative_to(LIB).with_suffix('').parts):p for p in sorted(LIB.rglob('*.py')) if p.name not in ('__init__.py','_modidx.py')}
TREES = {m:ast.parse(p.read_text(encoding='utf-8')) for m,p in PATHS.items()}

def rank(m): # layer, then the number of the notebook within a folder
    return ORDER.index(m.split('.')[0]),str(NOTEBOOKS[m]) if '.' in m else ''

def imports(m): # (module of the library or of others, names or None, line)
    for n in ast.walk(TREES[m]):
        if isinstance(n, ast.Import):
            for a in n.names: yield a.name,None,n.lineno
        elif isinstance(n, ast.ImportFrom):
            if not n.level: yield n.module,[a.name for a in n.names],n.lineno; continue
            base = ('fasterprune.'+m).split('.')[:-n.level]
            yield '.'.join(base+([n.module] if n.module else [])),[a.name for a in n.names],n.lineno

def inside(m): # modules of the library that `m` imports, with the names taken from them
    for name,names,line in imports(m):
        if name!='fasterprune' and not name.startswith('fasterprune.'): continue
        name = name.removeprefix('fasterprune').lstrip('.')
        for n in names or ['']:
            sub = f"{name}.{n}".strip('.')
            yield (sub if sub in PATHS else name),(None if sub in PATHS else n),line

def calls(m, name): return [n.lineno for n in ast.walk(TREES[m]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id==name]

def test_every_module_has_a_notebook(): assert set(PATHS)==set(NOTEBOOKS)

@pytest.mark.parametrize('m', PATHS)
def test_imports_only_downwards(m):
    assert m.split('.')[0] in ORDER, f"{m} has no place in the map; add its folder to ORDER here and in ARCHITECTURE.md"
    for other,name,line in inside(m):
        if other=='' and name=='__version__': continue
        assert other in PATHS, f"fasterprune/{m}.py:{line} imports {other!r}, which is no module"
        assert rank(other)<rank(m), f"fasterprune/{m}.py:{line} imports {other} (nbs/{NOTEBOOKS[other]}), which does not come before it (nbs/{NOTEBOOKS[m]})"

def test_surgery_is_rooms():
    "What stands beside the rooms of surgery carries plans out, reports, or is all of it in one call"
    beside = [m for m in PATHS if m.startswith('surgery.') and m.count('.')==1]
    assert len(beside)<=6, beside

FOLDERS = sorted({p.parent for p in PATHS.values()}-{LIB})
@pytest.mark.parametrize('folder', FOLDERS, ids=lambda p: p.relative_to(LIB).as_posix())
def test_a_folder_says_what_flows_in_and_out(folder):
    doc = ast.get_docstring(ast.parse((folder/'__init__.py').read_text(encoding='utf-8'))) or ''
    assert all(w in doc for w in ('In: ', 'Out: ')), f"{folder}/__init__.py: say what flows in and out"

def test_numbers_of_notebooks_are_unique():
    "The number is the order in which modules of a folder may import each other"
    seen = {}
    for nb in NOTEBOOKS.values():
        if (number := re.match(r'\d+', nb.name)): seen.setdefault((nb.parent.as_posix(), number[0]), []).append(nb.name)
    assert not (twice := {k:v for k,v in seen.items() if len(v)>1}), twice

def test_no_cycles():
    done,path = set(),[]
    def visit(m):
        assert m not in path, ' → '.join([*path[path.index(m):], m])
        if m in done: return
        path.append(m)
        for other,*_ in inside(m):
            if other in PATHS: visit(other)
        path.pop(); done.add(m)
    for m in PATHS: visit(m)

ONLY = dict(fastai=('callback', 'data', 'demo', 'cli'), matplotlib=('measure.plots', 'measure.gallery'))
@pytest.mark.parametrize('m', PATHS)
def test_each_library_in_its_place(m):
    for name,_,line in imports(m):
        top = name.split('.')[0]
        allowed = ONLY.get(top)
        assert allowed is None or any(m==a or m.startswith(a+'.') for a in allowed), f"fasterprune/{m}.py:{line} imports {top}, which belongs to {', '.join(allowed)}"
        assert top not in ('nbdev', 'pytest', 'hypothesis', 'execnb', 'IPython', 'fasterai', 'torch_pruning'), f"fasterprune/{m}.py:{line} imports {top}"

@pytest.mark.parametrize('m', PATHS)
def test_no_star_and_nothing_private_from_another_module(m):
    own = {}
    for name,names,line in imports(m): assert '*' not in (names or ()), f"fasterprune/{m}.py:{line} imports *"
    for other,name,line in inside(m):
        assert name is None or name=='__version__' or not name.startswith('_'), f"fasterprune/{m}.py:{line} imports {name} of {other}, which is private"
        own[(name or other).split('.')[-1]] = other
    for n in ast.walk(TREES[m]):
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in own:
            assert not n.attr.startswith('_') or n.attr.startswith('__'), f"fasterprune/{m}.py:{n.lineno} uses {n.value.id}.{n.attr}, which is private to {own[n.value.id]}"

@pytest.mark.parametrize('m', [m for m in PATHS if m!='cli'])
def test_nothing_is_printed(m): assert not calls(m, 'print')

@pytest.mark.parametrize('m', PATHS)
def test_no_assert_and_no_bare_except(m):
    for n in ast.walk(TREES[m]):
        assert not isinstance(n, ast.Assert), f"fasterprune/{m}.py:{n.lineno}: assert is for tests; raise an error that says what was wrong"
        assert not (isinstance(n, ast.ExceptHandler) and n.type is None), f"fasterprune/{m}.py:{n.lineno}: an except that catches everything"

@pytest.mark.parametrize('m', PATHS)
def test_no_mutable_default(m):
    for n in ast.walk(TREES[m]):
        if isinstance(n, (ast.FunctionDef, ast.Lambda)):
            for d in [*n.args.defaults, *n.args.kw_defaults]: assert not isinstance(d, (ast.List, ast.Dict, ast.Set)), f"fasterprune/{m}.py:{d.lineno}: a default that all calls share"

# ---- density: these numbers may only go down

def test_lines_are_short():
    "House rule: 120 characters; nbdev writes some `__all__` that are longer"
    lines = [(m, i, len(l)) for m,p in PATHS.items() for i,l in enumerate(p.read_text(encoding='utf-8').splitlines(), 1)]
    long = [l for l in lines if l[2]>120]
    assert len(long)<=40, f"{len(long)} lines of the package are longer than 120 characters: {long}"
    assert not (longer := [l for l in lines if l[2]>160]), f"longer than 160 characters: {longer}"

def own_parameters(f):
    a = f.args
    return [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ('self', 'cls')]

def test_functions_take_few_parameters():
    "House rule: at most eight of their own"
    defs = [(m, f) for m,t in TREES.items() for f in ast.walk(t) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]
    many = [(m, f.name, len(own_parameters(f))) for m,f in defs if len(own_parameters(f))>8]
    assert len(many)<=17, f"{len(many)} functions take more than eight parameters: {many}"

def test_comprehensions_are_flat():
    "House rule: at most two `for`"
    kinds = ast.ListComp,ast.SetComp,ast.DictComp,ast.GeneratorExp
    deep = [(m, n.lineno) for m,t in TREES.items() for n in ast.walk(t) if isinstance(n, kinds) and len(n.generators)>2]
    assert len(deep)<=8, f"{len(deep)} comprehensions have more than two `for`: {deep}"
