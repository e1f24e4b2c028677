"""A pruned model goes where the dense one goes: compile, fx, script, export, copies, processes, other sizes of inputs

A handful runs here. All models of benchmarks/zoo.txt of at most 30 M parameters, and seven types of Hugging Face, take
hours on one thread: `pytest -m slow tests/laws/test_everywhere_zoo.py`, some of them with `-k vit`. `python
benchmarks/everywhere.py` does the same, goes on where it was stopped, and makes the table."""
import sys, warnings
from pathlib import Path
import pytest, torch
from torch import nn
from torch.overrides import TorchFunctionMode

BENCHMARKS = Path(__file__).resolve().parents[2]/'benchmarks'
sys.path.insert(0, str(BENCHMARKS))
for package in ('timm', 'torchvision', 'transformers'): pytest.importorskip(package)
import everywhere
from unread import unread

FAST = 'timm:test_vit', 'timm:test_resnet', 'transformers:bert', 'transformers:llama'

def quiet(spec, **kw):
    "The row of a model, made in this process"
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return everywhere.run(spec, **kw)

@pytest.mark.parametrize('spec', FAST)
def test_goes_where_the_dense_one_goes(spec):
    row = quiet(spec, skip=('process', 'second'))
    assert not (p := everywhere.problems(row)), '\n'.join(p)
    assert row['removed'] and row['kept']<.6 and row['laws']['example']!='no oracle'

@pytest.mark.slow
@pytest.mark.parametrize('spec', everywhere.models())
def test_every_small_model(spec):
    row = everywhere.run_one(spec, 3600)
    if row.get('left_out'): pytest.skip(row['left_out'])
    assert not (p := everywhere.problems(row)), '\n'.join(p)

# what the benchmark says of a model that is wrong

class Sized(nn.Module):
    "Says a size in its code"
    def __init__(self): super().__init__(); self.a,self.o,self.n = nn.Linear(6, 8),nn.Linear(8, 3),8
    def forward(self, x): return self.o(self.a(x).reshape(-1, self.n)*self.n)

class Told(Sized):
    "The same with a forward that only eager mode knows"
    def __init__(self): super().__init__(); self.forward = self.other
    def other(self, x): return self.o(self.a(x))

X,MORE = torch.randn(2, 6),torch.randn(5, 6)

def test_a_way_that_fails_for_the_pruned_model_only_is_named():
    def way(m, x, more):
        if isinstance(m, Told): raise RuntimeError('sizes do not fit')
        return 0.
    assert everywhere.tried(way, Told(), Sized(), 9., X, MORE)=='NO: RuntimeError: sizes do not fit'
    assert everywhere.tried(way, Told(), Told(), 9., X, MORE)=='dense'
    assert everywhere.tried(way, Sized(), Told(), 9., X, MORE)==0.

def test_other_outputs_are_a_failure():
    def way(m, x, more): return everywhere.error(m(x)+(1e-3 if isinstance(m, Told) else 1e-7)*m(x).abs().max(), m(x))
    assert everywhere.tried(way, Sized(), Sized(), 9., X, MORE)<1e-5
    assert everywhere.tried(way, Told(), Sized(), 9., X, MORE).startswith('NO: outputs differ')
    assert everywhere.tried(way, Told(), Told(), 9., X, MORE)=='dense'

def test_error_looks_at_each_output_on_its_own_scale():
    a,b = torch.tensor([1., 2.]),torch.tensor([1e9, 2e9])
    assert everywhere.error((a+.1, b), (a, b))>.01
    inf = torch.tensor([-torch.inf, 1.])
    assert everywhere.error(inf, inf)==0 and everywhere.error(torch.tensor([0., 1.]), inf)==float('inf')
    assert everywhere.error(a, torch.ones(3))==float('inf')

def test_forwards_and_modes_are_seen():
    assert everywhere.plain_class(Sized(), Sized())==0. and not everywhere.modes_of(Sized(), X)
    assert 'forward of its own' in everywhere.plain_class(Told(), Sized())
    assert 'is no Told' in everywhere.plain_class(Sized(), Told())
    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None): return func(*args, **kwargs or {})
    class Watched(Sized):
        def forward(self, x):
            with Watch(): return self.o(self.a(x))
    assert everywhere.modes_of(Watched(), X)=={'Watch'}

def test_the_oracle_knows_a_wrong_number():
    from fasterprune.surgery.pruner import Pruner
    torch.manual_seed(0)
    net = lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    wide = net()
    small = everywhere.deepcopy(wide)
    r = Pruner(small, X).prune(.5)
    assert everywhere.law(wide, small, r.plan, MORE)<1e-12
    with torch.no_grad(): small[2].weight[0,0] += .1
    assert everywhere.law(wide, small, r.plan, MORE)>1e-3

def test_the_oracle_knows_norms_over_what_stays():
    from fasterprune.surgery.pruner import Pruner
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3)).eval()
    small = everywhere.deepcopy(wide)
    r = Pruner(small, X).prune(.5)
    assert r.plan.mixed and everywhere.law(wide, small, r.plan, MORE)<1e-12
    assert everywhere.error(unread(wide, small, r.plan)(MORE), small(MORE))<1e-5
