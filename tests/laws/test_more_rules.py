"Operators that few networks have: both laws, on one small network each"
import warnings
from copy import deepcopy
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fasterprune.surgery.coupling.couple import couple
from fasterprune.surgery.pruner import Pruner
from support.laws import WRITTEN, awake, cut, louder, other, rel, run, silence, unread
from test_surgery_nets import C, Net, P, X

x = X(2,3,8,8)
CASES = { # name → (forward, parts, units that go at one half, part of the reason of a pin)
    'every_second': (lambda s,x: s.c((y:=s.a(x))[:,::2].relu()*y[:,1::2].sigmoid()), dict(a=C(3,16), c=C(8,4)), 4, ''),
    'every_third_back': (lambda s,x: s.c(torch.stack([(y:=s.a(x))[:,2::3].relu(), y[:,::3], y[:,1::3].tanh()], 2).flatten(1, 2)), dict(a=C(3,12,bias=False), c=C(12,4)), 2, ''),
    'every_third_of_eight': (lambda s,x: s.c(s.b(s.a(x))[:,::3]), dict(a=C(3,6), b=C(6,8), c=C(3,4)), 3, 'takes every 3th'),
    'from_the_third': (lambda s,x: s.c(s.b(s.a(x))[:,2::2]), dict(a=C(3,6), b=C(6,8), c=C(3,4)), 3, 'takes every 2th'),
    'unfold': (lambda s,x: s.c(s.a(x).unfold(2, 3, 2).unfold(3, 3, 2).mean((4,5))), dict(a=C(3,8), c=C(8,4)), 4, ''),
    'unfold_over_channels': (lambda s,x: s.c(s.b(s.a(x)).unfold(1, 4, 2).mean(4)), dict(a=C(3,6), b=C(6,8), c=C(3,4)), 3, 'cuts windows out'),
    'unfold_2d': (lambda s,x: s.c(s.b(F.unfold(s.a(x), 3, padding=1, stride=2).mT)), dict(a=C(3,8), b=nn.Linear(72,6), c=nn.Linear(6,4)), 4+3, ''),
    'fold_2d': (lambda s,x: s.c(F.fold(s.b(F.unfold(s.a(x), 2, stride=2).mT).relu().mT, (8,8), 2, stride=2)), dict(a=C(3,8), b=nn.Linear(32,24), c=C(6,4)), 4+3, ''),
    'fold_of_unfold': (lambda s,x: s.c(F.fold(F.unfold(s.a(x), 3, padding=1).relu(), (8,8), 3, padding=1)), dict(a=C(3,8), c=C(8,4)), 4, ''),
    'pool_over_positions': (lambda s,x: s.c(F.avg_pool2d(s.a(x).flatten(2).mT[:,None], (2,1), (2,1))[:,0]), dict(a=C(3,8), c=nn.Linear(8,4)), 4, ''),
    'max_pool_over_positions': (lambda s,x: s.c(F.max_pool2d(s.a(x).flatten(2).mT[:,None], (3,1), (2,1), (1,0))[:,0]), dict(a=C(3,8), c=nn.Linear(8,4)), 4, ''),
    'pool_over_channels': (lambda s,x: s.c(F.avg_pool2d(s.b(s.a(x)).flatten(2).mT[:,None], (1,2))[:,0]), dict(a=C(3,6), b=C(6,8), c=nn.Linear(4,4)), 3, 'mixes positions'),
    'strided_over_channels': (lambda s,x: s.c(F.max_pool2d(s.b(s.a(x)).flatten(2).mT[:,None], (2,1), 2)[:,0]), dict(a=C(3,6), b=C(6,8), c=nn.Linear(4,4)), 3, 'mixes positions'),
}

def build(name): f,parts,*_ = CASES[name]; return awake(deepcopy(Net(f, **parts)), x)

@pytest.mark.parametrize('name', CASES)
def test_readers_law(name):
    _,_,removed,pinned = CASES[name]
    big = louder(build(name), .5)
    small = deepcopy(big)
    r = Pruner(small, x).prune(.5, criterion='random')
    assert r.removed==removed and r.error<1e-10 and pinned in ' '.join(why for *_,why in r.plan.pins), r
    want = unread(big, r.plan)
    for y in (x, other(x)): assert rel(run(small, y), run(want, y)) < 1e-10

@pytest.mark.parametrize('roles', [WRITTEN, ('read',)], ids=['writers','readers'])
@pytest.mark.parametrize('name', CASES)
def test_masks_law(name, roles):
    m = build(name)
    zeroed = silence(m, couple(m, x), .5, roles)
    small = deepcopy(m)
    assert cut(Pruner(small, x).prune().plan) == zeroed
    for y in (x, other(x)): assert rel(run(small, y), run(m, y)) < 1e-10

# --- a mixture of experts: PyTorch has no product of grouped rows in double precision, and none whose rows are not multiples of 16 bytes

class Experts(nn.Module):
    "Each third of the rows has matrices of its own"
    def __init__(self):
        super().__init__()
        self.a,self.up,self.down,self.c = nn.Linear(8, 16),P(3,16,32),P(3,16,32),nn.Linear(16, 4)
    def forward(self, x):
        offs = torch.arange(1, 4, dtype=torch.int32)*(len(x)//3)
        y = torch._grouped_mm(self.a(x), self.up, offs=offs).relu()
        return self.c(torch._grouped_mm(y, self.down.transpose(1, 2), offs=offs))

@torch.no_grad()
def test_experts():
    torch.manual_seed(0)
    m,rows = Experts().eval(),torch.randn(12, 8)
    small = deepcopy(m)
    r = Pruner(small, rows).prune(.5)
    assert r.removed==8+16+8 and small.up.shape==(3,8,16) and small.down.shape==(3,8,16) and small.a.out_features==8
    keep = {(e.param,e.dim):list(e.keep) for e in r.plan.edits}
    def stays(n, k): z = torch.zeros(n); z[k] = 1; return z
    m.up.mul_(stays(16, keep['up',1])[:,None]); m.down.mul_(stays(32, keep['down',2])); m.c.weight.mul_(stays(16, keep['c.weight',1]))
    for y in (rows, torch.randn(24, 8)): assert rel(small(y), m(y)) < 1e-5

@torch.no_grad()
def test_dead_experts():
    torch.manual_seed(0)
    m,rows = Experts().eval(),torch.randn(12, 8)
    m.up[:,:,3:7] = 0
    m.up[0,:,9] = 0 # in one expert only
    m.down[:,:,20:24] = 0
    small = deepcopy(m)
    r = Pruner(small, rows).prune()
    assert r.removed==8 and small.up.shape==(3,16,24) and small.down.shape==(3,16,24)
    assert rel(small(rows), m(rows)) < 1e-5

# --- weight_norm: a filter that goes takes its length along; the norm of a filter is over its inputs, so these stay

def normed(old):
    wn = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    with warnings.catch_warnings(record=True): a,b = wn(C(3,8)),wn(C(6,8))
    return nn.Sequential(a, nn.ReLU(), C(8,6), nn.ReLU(), b, nn.ReLU(), C(8,4)).double().eval()

@torch.no_grad()
@pytest.mark.parametrize('old', [False,True], ids=['parametrized','hook'])
def test_weight_norm(old):
    m = normed(old)
    small = deepcopy(m)
    r = Pruner(small, x).prune(.5)
    assert r.removed==4+3+4 and small(x).shape==(2,4,8,8) and small[0].weight.shape==(4,3,3,3) and small[4].weight.shape==(4,3,3,3)
    assert r.error<1e-10
    gone = {e.param.split('.')[0]:[i for i in range(e.n) if i not in e.keep] for e in r.plan.edits if e.dim==1}
    m(x) # the weights of a hook are made when it runs
    plain = C(6,8).double()
    plain.weight.copy_(m[4].weight); plain.bias.copy_(m[4].bias)
    m[4] = plain # what its weights are, whatever their norm was
    for k in (2,4,6): m[k].weight[:,gone[str(k)]] = 0
    for y in (x, other(x)): assert rel(run(small, y), run(m, y)) < 1e-10

@torch.no_grad()
@pytest.mark.parametrize('old', [False,True], ids=['parametrized','hook'])
def test_dead_filters_of_weight_norm(old):
    m = normed(old)
    g = m[0].weight_g if old else m[0].parametrizations.weight.original0
    g[[1,4]] = 0; m[0].bias[[1,4]] = 0
    small = deepcopy(m)
    assert Pruner(small, x).prune().removed==2 and small(x).shape==(2,4,8,8) and small[0].weight.shape==(6,3,3,3)
    for y in (x, other(x)): assert rel(run(small, y), run(m, y)) < 1e-10
