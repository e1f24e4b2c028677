"The tests held by reading their source: each asserts something, and the names of their files are unique"
import ast
from pathlib import Path
import pytest

TESTS = Path(__file__).resolve().parents[1]
PATHS = sorted(TESTS.rglob('*.py'))
TREES = {p.stem:ast.parse(p.read_text(encoding='utf-8')) for p in PATHS}
FUNCTIONS = ast.FunctionDef,ast.AsyncFunctionDef

def functions(tree):
    "Functions and lambdas of a file by name, wherever they stand in it; a name may have several"
    res = {}
    for n in ast.walk(tree):
        if isinstance(n, FUNCTIONS): res.setdefault(n.name, []).append(n)
        elif isinstance(n, ast.Assign) and isinstance(n.value, ast.Lambda):
            for t in n.targets: res.setdefault(getattr(t, 'id', None), []).append(n.value)
    return res

def taken(tree):
    "What a file has from others: `{name: (file, name there)}`"
    found = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
    return {a.asname or a.name:(n.module.split('.')[-1], a.name) for n in found for a in n.names}

HERE = {m:functions(t) for m,t in TREES.items()}
TAKEN = {m:taken(t) for m,t in TREES.items()}

def means(m, call):
    "The functions of tests that a call in `m` may mean, each with its file"
    f = call.func
    name = f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else None
    at = m
    if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name): # a function of `from support import laws`
        at = TAKEN[m].get(f.value.id, (m, ''))[1] or m
    if name not in HERE.get(at, ()): at,name = TAKEN[m].get(name, (at, name))
    return [(at, g) for g in HERE.get(at, {}).get(name, ())]

def is_assertion(n):
    "An assert, `pytest.raises` and the like, `torch.testing.assert_close`, or an AssertionError with a text of its own"
    if isinstance(n, ast.Assert): return True
    if not isinstance(n, ast.Call): return False
    name = ast.unparse(n.func)
    if name in ('pytest.raises', 'pytest.warns', 'pytest.fail', 'AssertionError'): return True
    return name.split('.')[-1].startswith('assert_')

def asserts(m, f, seen=()):
    "Whether a function of `m` asserts, or calls one that does"
    if f in seen: return False
    inside = list(ast.walk(f))
    if any(map(is_assertion, inside)): return True
    helpers = [means(m, n) for n in inside if isinstance(n, ast.Call)]
    return any(found and all(asserts(at, g, (*seen, f)) for at,g in found) for found in helpers)

@pytest.mark.parametrize('m', [m for m in TREES if m.startswith('test_')])
def test_every_test_asserts(m):
    tests = [f for f in TREES[m].body if isinstance(f, FUNCTIONS) and f.name.startswith('test_')]
    idle = [f"{f.name}, line {f.lineno}" for f in tests if not asserts(m, f)]
    assert tests and not idle, f"{m}: nothing is asserted in {'; '.join(idle)}"

@pytest.mark.parametrize('source,found', [
    ("def test_a(): assert f()", True),
    ("def test_a(): f()", False),
    ("def f(): assert g()\ndef test_a(): f()", True),
    ("def f(): f()\ndef test_a(): f()", False),
    ("def test_a():\n    with pytest.raises(ValueError): f()", True),
    ("def test_a(): torch.testing.assert_close(f(), 1)", True),
])
def test_what_asserts(source, found, monkeypatch):
    tree = ast.parse(source)
    monkeypatch.setitem(HERE, 'sample', functions(tree))
    monkeypatch.setitem(TAKEN, 'sample', taken(tree))
    assert asserts('sample', HERE['sample']['test_a'][0])==found

def test_names_of_files_are_unique():
    "Files of tests are modules without packages, so that two of one name would be the same module"
    names = [p.name for p in PATHS]
    assert not (twice := sorted({n for n in names if names.count(n)>1})), twice
