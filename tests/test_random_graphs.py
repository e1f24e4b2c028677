"""Both laws on random graphs: convolutional ones, and ones with attention, norms, recurrent layers and several inputs

The 500 graphs of the second kind: `pytest -m slow tests/test_random_graphs.py`"""
import warnings
from collections import Counter
from copy import deepcopy
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from fasterprune.surgery.coupling import couple
from fasterprune.surgery.pruner import Pruner
from laws import CONV, TRANSPOSED, WRITTEN, awake, cut, other, rel, run, silence, tensors, unread
from random_graphs import INPUTS, RMS, Fused, Graph, Mixed, Multihead, Recurrent, Separate, again

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

# ---- attention, norms, recurrent layers, several inputs

mixed_graphs = st.tuples(st.lists(st.tuples(st.integers(0, len(Mixed.KINDS)-1), number, number, number, number), min_size=1, max_size=5), st.tuples(*[number]*4), st.integers(0, len(INPUTS)-1))
NORMS = nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, RMS

@torch.no_grad()
def lively(graph, seed=0):
    "A network of which no part is zero or one by initialisation, and its input"
    torch.manual_seed(seed)
    m,x = Mixed(*graph).double(),INPUTS[graph[2]%len(INPUTS)]()
    for p in m.parameters(): p.copy_(torch.rand_like(p)+.5 if p.dim()<2 else torch.randn_like(p)*(1.5/p[0].numel()**.5 if p.dim()<3 else .5))
    return awake(m, x, seed),x

def gone(plan): return {(e.param,e.dim): sorted(set(range(e.n))-set(e.keep)) for e in plan.edits}

def reads(m, name):
    "The dimension along which a parameter reads"
    path,_,k = name.rpartition('.')
    c = m.get_submodule(path)
    return 0 if isinstance(c, TRANSPOSED) else 1 if isinstance(c, CONV+(nn.Linear, nn.MultiheadAttention, nn.RNNBase)) and 'weight' in k else None

@torch.no_grad()
def emptied(m, plan, readers=True):
    "A copy of the wide network in which all that writes a channel that goes is zero, and all that reads it"
    m = deepcopy(m)
    own = dict(m.named_parameters())
    for (n,dim),at in gone(plan).items():
        if n in own and (readers or reads(m, n)!=dim): own[n].index_fill_(dim, torch.tensor(at), 0)
    return m

def unseen(m, plan):
    "The same, and no norm sees these channels"
    m = emptied(m, plan)
    for (n,_),at in gone(plan).items():
        c = m.get_submodule(n.rpartition('.')[0])
        if isinstance(c, NORMS) and n.endswith('weight'): c.register_forward_pre_hook(lambda c, x, at=at: x[0].index_fill(1 if isinstance(c, nn.GroupNorm) else -1, torch.tensor(at), 0))
    return m

def gradients(m, x):
    m.zero_grad()
    sum(t.square().mean() for t in tensors(m(**x) if isinstance(x, dict) else m(*x) if isinstance(x, tuple) else m(x))).backward()
    return {n:p.grad for n,p in m.named_parameters()}

def same_step(small, wide, plan, x, tol):
    "Gradients are those of the wide network, as far as they stay"
    a,b,keep = gradients(small, x),gradients(wide, x),{}
    for e in plan.edits: keep.setdefault(e.param, []).append((e.dim, torch.tensor(e.keep)))
    most = max(g.abs().max() for g in b.values() if g is not None)
    for n,g in a.items():
        want = b[n]
        if want is None: assert g is None; continue
        for dim,k in keep.get(n, ()): want = want.index_select(dim, k)
        assert g.shape==want.shape and (g-want).abs().max()<=tol*most, n

def chosen(groups, seed, plain):
    "Some of the groups, heads and their widths alike; with `plain` only those that no statistics are over"
    g = torch.Generator().manual_seed(seed)
    return [k.name for k in groups if torch.rand(1, generator=g)<.7 and k.n>1 and not (plain and k.mixed)]

def what(m, plan):
    "Kinds of parts that a plan makes smaller"
    at,res = gone(plan),set()
    for n,c in m.named_modules():
        rows = lambda k, dim=0: at.get((f"{n}.{k}".lstrip('.'), dim), [])
        if isinstance(c, (Fused,Separate)):
            name,size = ('qkv',3*c.h*c.d) if isinstance(c, Fused) else ('q',c.h*c.d)
            k = sorted(set(range(size))-set(rows(f"{name}.weight")))
            if isinstance(c, Separate) or c.code%4!=2: heads,dims = {i//c.d%c.h for i in k},{i%c.d for i in k}
            else: heads,dims = {i//(3*c.d) for i in k},{i%c.d for i in k}
            res |= {'heads'} if len(heads)<c.h else set()
            res |= {'head dims'} if len(dims)<c.d else set()
        if isinstance(c, nn.MultiheadAttention) and (rows('in_proj_weight') or rows('q_proj_weight')): res.add('multihead')
        if isinstance(c, NORMS) and rows('weight'): res.add(type(c).__name__)
        if isinstance(c, nn.RNNBase) and rows('weight_hh_l0', 1): res.add(type(c).__name__)
        if isinstance(c, nn.Embedding) and rows('weight', 1): res.add('Embedding')
        if rows('p', 2): res.add(type(c).__name__)
        if rows('table', 1): res.add('position table')
        if rows('scale'): res.add('LayerScale')
        if rows('up.weight'): res.add('MLP')
    return res

WAYS = 'exact', 'exact some', 'plain some', 'plain'

def hold(graph, fraction, way, readers, seed=0):
    "Both laws on one graph; returns the report and what was cut, or None where it is asleep"
    m,x = lively(graph, seed)
    y = again(x)
    if rel(run(m, x), run(m, again(x, 2)))<1e-6: return None
    kw = dict(exact_norms='exact' in way)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if 'some' in way: fraction = dict.fromkeys(chosen(Pruner(m, x, **kw).couple().groups, seed, 'plain' in way), fraction)
        if fraction=={}: return None
        small = deepcopy(m)
        r = Pruner(small, x, **kw).prune(fraction, criterion='random')
        assert r.error is None or r.error<1e-10, r
        if way!='plain' and not any('softmax' in why for _,why in r.plan.mixed): assert not r.plan.mixed, r
        if not r.plan.mixed: agree(small, unseen(m, r.plan), r, x, y)
        else: gradients(small, y)
        sparse = emptied(m, r.plan, readers)
        small = deepcopy(sparse)
        r2 = Pruner(small, x, **kw).prune()
    fickle = r2.plan.folds and any(isinstance(b, nn.modules.batchnorm._BatchNorm) for b in m.modules()) # what it makes of a constant differs between the modes
    agree(small, sparse, r2, x, y, step=readers and not fickle)
    return r,r2,what(m, r.plan)

def agree(small, want, r, x, y, step=True):
    for z in (x, y): assert rel(run(small.eval(), z), run(want.eval(), z))<1e-10, r
    if not step: return
    for z in (x, y): assert rel(run(small.train(), z), run(want.train(), z))<1e-9, r
    same_step(small, want, r.plan, y, 1e-8)

PARTS = {'Fused','Separate','Multihead','Windows','Channels','MLP','TransformerEncoderLayer','TransformerDecoderLayer','LSTM','GRU','Embedding','Tied','ClassToken','Positions','GatedTokens',
    'LayerNorm','RMSNorm','RMS','GroupNorm','BatchNorm1d','Conv1d','Conv2d'}
SHARES = {'heads':.08, 'head dims':.12, 'multihead':.05, 'MLP':.15, 'norms':.25, 'recurrent':.05, 'Embedding':.1, 'LayerScale':.1, 'positions':.03} # of all graphs: what is made smaller

def many(n, **kw):
    "Both laws on `n` graphs, of which a large share is cut where it matters"
    tally = Counter()
    @settings(**{**calm, 'max_examples':n, **kw})
    @given(mixed_graphs, st.sampled_from([.25, .5, .9]), st.sampled_from(WAYS), st.booleans(), st.integers(0, 9))
    def check(graph, fraction, way, readers, seed):
        res = hold(graph, fraction, way, readers, seed)
        tally['asked'] += 1
        if res is None: return
        r,r2,cuts = res
        norms,rnns = cuts&{k.__name__ for k in NORMS},cuts&{'LSTM','GRU','RNN'}
        tally.update(['all', way, *cuts, *['norms'][:len(norms)], *['recurrent'][:len(rnns)], *['positions'][:len(cuts&{'ClassToken','Positions'})]])
        tally.update({f"has {type(p).__name__}" for p in Mixed(*graph).modules()} | {f"input {graph[2]}", f"output {graph[1][3]%4}"})
        if r.plan.mixed: tally['mixed'] += 1
        elif readers and not r2.plan.held: # what nobody writes and nobody reads is found
            tally['found'] += 1
            assert all(v<=cut(r2.plan).get(k, set()) for k,v in cut(r.plan).items()), r2
    check()
    assert tally['all']>=.8*tally['asked'] and tally['mixed']<.3*tally['all'] and tally['found']>.25*tally['all'], tally
    assert all(tally[k]>=v*tally['all'] for k,v in SHARES.items()), tally
    assert {f"has {k}" for k in PARTS}|{f"input {k}" for k in range(len(INPUTS))}|{f"output {k}" for k in range(4)}|{*WAYS} <= set(tally), tally
    return tally

def test_both_laws_with_attention(): many(150)

@pytest.mark.slow
def test_both_laws_with_attention_500(): many(500)
