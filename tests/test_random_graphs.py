"Both laws on random convolutional graphs"
import warnings
from copy import deepcopy
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from fasterprune.surgery.coupling import couple
from fasterprune.surgery.pruner import Pruner
from laws import WRITTEN, awake, cut, louder, other, rel, run, silence, unread

ACTS = nn.Identity, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.Tanh, nn.LeakyReLU, nn.PReLU, nn.Softplus
SIZES = 2, 3, 4, 6, 8, 12

def act(k, n): return nn.PReLU(n) if ACTS[k%len(ACTS)] is nn.PReLU else ACTS[k%len(ACTS)]()

def norm(k, n): return (nn.Identity(), nn.BatchNorm2d(n), nn.BatchNorm2d(n, affine=False), nn.BatchNorm2d(n), nn.InstanceNorm2d(n, affine=True))[k%5]

def divisors(*ns): return [g for g in range(1, min(ns)+1) if all(n%g==0 for n in ns)]

class Gate(nn.Module):
    "Squeeze and excitation"
    def __init__(self, n, k, a): super().__init__(); self.a,self.b,self.act = nn.Conv2d(n,k,1),nn.Conv2d(k,n,1),act(a, k)
    def forward(self, x): return x*self.b(self.act(self.a(x.mean((2,3), keepdim=True)))).sigmoid()

class Shuffle(nn.Module):
    def __init__(self, g): super().__init__(); self.g = g
    def forward(self, x):
        b,c,h,w = x.shape
        return x.view(b, self.g, c//self.g, h, w).transpose(1, 2).reshape(b, c, h, w)

class Bare(nn.Module):
    "A parameter that is added or multiplied"
    def __init__(self, n, times): super().__init__(); self.p,self.times = nn.Parameter(torch.randn(n,1,1)),times
    def forward(self, x): return x*self.p if self.times else x+self.p

class Call(nn.Module):
    "A function as a module"
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, *x): return self.f(*x)

class Graph(nn.Module):
    "A network from a list of `(kind, a, b, c, d)`, numbers that choose what is built; every tensor that is made can be used again"
    KINDS = 'conv conv grouped depthwise transposed add add times cat cat chunk gate flip shuffle reuse tied pool down up bare slices'.split()
    def __init__(self, spec, head):
        super().__init__()
        self.steps,self.parts,self.head = [],nn.ModuleList(),head
        self.seen = [torch.zeros(1,3,8,8)] # one example of each tensor
        for kind,*numbers in spec: getattr(self, self.KINDS[kind%len(self.KINDS)])(*numbers)
        self.close(*head)

    def add_step(self, part, *srcs):
        with torch.no_grad(): out = part.eval()(*[self.seen[i] for i in srcs])
        self.parts.append(part)
        self.steps.append((len(self.parts)-1, srcs))
        self.seen += list(out) if isinstance(out, tuple) else [out]
    def pick(self, a, like=None):
        "A tensor made before; of the same shape, or of the same size in space"
        ok = [i for i,t in enumerate(self.seen) if like is None or t.shape[1:]==like]
        return ok[-1-a%len(ok)] if ok else None
    def near(self, a, i): # of the same size in space
        ok = [j for j,t in enumerate(self.seen) if t.shape[2:]==self.seen[i].shape[2:]]
        return ok[-1-a%len(ok)]
    def n(self, i): return self.seen[i].shape[1]

    def conv(self, a, b, c, d, groups=1, kind=nn.Conv2d, out=None, **kw):
        i,k = self.pick(a),3 if c%2 else 1
        o = out or SIZES[b%len(SIZES)]
        self.add_step(nn.Sequential(kind(self.n(i), o, k, padding=k//2 if d%4 else 0 if min(self.seen[i].shape[2:])>3 else k//2, groups=groups, bias=bool(d%3), **kw), norm(c, o), act(d, o)), i)
    def grouped(self, a, b, c, d):
        n,o = self.n(self.pick(a)),SIZES[b%len(SIZES)]
        g = divisors(n, o)
        self.conv(a, b, c, d, groups=g[c%len(g)])
    def depthwise(self, a, b, c, d): n = self.n(self.pick(a)); self.conv(a, b, c, d, groups=n, out=n*(1+b%2))
    def transposed(self, a, b, c, d):
        n,o = self.n(self.pick(a)),SIZES[b%len(SIZES)]
        g = divisors(n, o)
        self.conv(a, b, c, d, groups=g[c%len(g)] if d%2 else 1, kind=nn.ConvTranspose2d)
    def add(self, a, b, c, d, f=torch.add):
        i = self.pick(a)
        j = self.pick(b+1, self.seen[i].shape[1:])
        if i==j and len(self.seen)>1: # project another one
            k = self.near(b+1, i)
            self.add_step(nn.Conv2d(self.n(k), self.n(i), 1), k)
            j = len(self.seen)-1
        self.add_step(Call(f), i, j)
    def times(self, a, b, c, d): self.add(a, b, c, d, torch.mul)
    def cat(self, a, b, c, d):
        i = self.pick(a)
        self.add_step(Call(lambda *x: torch.cat(x, 1)), i, self.near(b, i), *([self.near(d, i)] if c%2 else []))
    def chunk(self, a, b, c, d):
        i = self.pick(a)
        if self.n(i)%2==0: self.add_step(Call(lambda x: tuple(x.chunk(2, 1))), i)
    def slices(self, a, b, c, d): # add to a part of it
        i = self.pick(a)
        j = self.near(b, i)
        if self.n(j)<=self.n(i):
            def f(x, y): x = x.clone(); x[:,:y.shape[1]] += y; return x
            self.add_step(Call(f), i, j)
    def gate(self, a, b, c, d): i = self.pick(a); self.add_step(Gate(self.n(i), SIZES[b%len(SIZES)], c), i)
    def flip(self, a, b, c, d): self.add_step(Call(lambda x: x.flip(1+b%3)), self.pick(a))
    def shuffle(self, a, b, c, d):
        i = self.pick(a)
        g = divisors(self.n(i))
        self.add_step(Shuffle(g[b%len(g)]), i)
    def bare(self, a, b, c, d): i = self.pick(a); self.add_step(Bare(self.n(i), b%2), i)
    def pool(self, a, b, c, d):
        self.add_step((nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False))[b%3], self.pick(a))
    def down(self, a, b, c, d):
        i = self.pick(a)
        if self.seen[i].shape[-1]>=4: self.add_step((nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(self.n(i), SIZES[c%len(SIZES)], 3, 2, 1))[b%3], i)
    def up(self, a, b, c, d):
        i = self.pick(a)
        if self.seen[i].shape[-1]<=8: self.add_step(Call(lambda x: F.interpolate(x, scale_factor=2, mode=('nearest','bilinear')[b%2])), i)
    def reuse(self, a, b, c, d): # a part that was used before, on another tensor
        old = [(k,s) for k,s in self.steps if isinstance(self.parts[k], (nn.Sequential, Gate))]
        if not old: return
        k,(i,) = old[a%len(old)]
        j = [j for j,t in enumerate(self.seen) if t.shape[1]==self.n(i) and min(t.shape[2:])>=3]
        if not j: return
        with torch.no_grad(): self.seen.append(self.parts[k].eval()(self.seen[j[-1-b%len(j)]]))
        self.steps.append((k, (j[-1-b%len(j)],)))
    def tied(self, a, b, c, d): # another convolution with the same weight
        old = [(p[0],s) for k,s in self.steps if isinstance(p := self.parts[k], nn.Sequential) and type(p[0]) is nn.Conv2d and p[0].padding!=(0,0)]
        if not old: return
        m,(i,) = old[a%len(old)]
        new = nn.Conv2d(m.in_channels, m.out_channels, m.kernel_size, padding=m.padding, groups=m.groups)
        new.weight = m.weight
        j = [j for j,t in enumerate(self.seen) if t.shape[1]==m.in_channels]
        self.add_step(nn.Sequential(new, act(d, m.out_channels)), j[-1-b%len(j)])

    def close(self, a, b, c, d):
        "A classifier on every tensor that nobody has used, and on one more"
        used = {i for _,srcs in self.steps for i in srcs}
        ends = dict.fromkeys([i for i in range(len(self.seen)) if i not in used] + [self.pick(a)])
        flat = Call(lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1)) if b%2 else Call(lambda x: x.mean((2,3)))
        for i in ends:
            n = self.n(i)*(4 if b%2 else 1)
            self.add_step(nn.Sequential(flat, *([nn.Linear(n, 6), act(c, 6), nn.Linear(6, 5)] if d%2 and ACTS[c%len(ACTS)] is not nn.PReLU else [nn.Linear(n, 5)])), i)
        self.ends = list(range(len(self.seen)-len(ends), len(self.seen)))
        self.seen = None

    def forward(self, x):
        made = [x]
        for k,srcs in self.steps:
            out = self.parts[k](*[made[i] for i in srcs])
            made += list(out) if isinstance(out, tuple) else [out]
        return sum(made[i] for i in self.ends)

number = st.integers(0, 11)
graphs = st.tuples(st.lists(st.tuples(st.integers(0, len(Graph.KINDS)-1), number, number, number, number), min_size=2, max_size=12), st.tuples(*[number]*4))
x = torch.randn(2,3,8,8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

def made(graph, seed=0):
    torch.manual_seed(seed)
    return awake(Graph(*graph), x, seed)

def holds(graph, fraction, roles, seed=0):
    "Both laws on one graph; returns how much was removed by the first, and by the second what was to be removed and what was"
    m = made(graph, seed)
    if rel(run(m, x), run(m, other(x, 2))) < 1e-6: return None # asleep
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        small = deepcopy(m)
        r = Pruner(small, x).prune(fraction, criterion='random')
        want = unread(m, r.plan)
        for y in (x, other(x)): assert rel(run(small, y), run(want, y)) < 1e-10, r
        sparse = deepcopy(m)
        zeroed = silence(sparse, couple(sparse, x), fraction, roles, seed)
        small = deepcopy(sparse)
        r2 = Pruner(small, x).prune()
    for y in (x, other(x)):
        assert rel(run(small.eval(), y), run(sparse.eval(), y)) < 1e-10, r2
        if not (r2.plan.folds and any(isinstance(b, nn.BatchNorm2d) and not b.affine for b in m.modules())): # what it makes of a constant differs between the modes
            assert rel(run(small.train(), y), run(sparse.train(), y)) < 1e-9, r2
    return r,zeroed,r2

calm = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

@settings(max_examples=220, **calm)
@given(graphs, st.sampled_from([.25, .5, .9]), st.sampled_from([WRITTEN, ('read',)]), st.integers(0, 9))
def test_both_laws(graph, fraction, roles, seed):
    res = holds(graph, fraction, roles, seed)
    if res is None: return
    r,zeroed,r2 = res
    assert r.error is None or r.error < 1e-10
    if not r2.plan.held and all(len(c.keep)>1 for c in r2.plan.cuts): assert cut(r2.plan) == zeroed, r2 # neither a constant in the way, nor a group that would be empty

def test_examples_are_of_every_kind(): # the graphs above are not all trivial
    kinds,some = set(),0
    @settings(max_examples=200, **calm)
    @given(graphs)
    def see(graph):
        nonlocal some
        kinds.update(type(p).__name__ for p in made(graph).modules())
        some += len(graph[0])>=6
    see()
    assert {'Conv2d','ConvTranspose2d','BatchNorm2d','InstanceNorm2d','Gate','Shuffle','Bare','Sigmoid','PReLU','MaxPool2d','AvgPool2d'} <= kinds and some > 10
