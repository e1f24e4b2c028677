"Exact counts: every granularity, context and fraction removes `floor(s*n + 1e-9)` units, whatever the scores"
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fasterprune.allocation import *
from fasterprune.criteria.normalize import lamp_norm, lamp_rising
from fasterprune.granularity import expand_units, granularities, reduce_units, unit_dims, unit_size

FRACTIONS = 0, .01, .1, .25, .29, 1/3, .5, .57, .6, .9, .95, .999, 1
INF = float('inf')
n_gone = lambda keep: int((~keep).sum())
floor = lambda s, n: math.floor(s*n + 1e-9)

def weights(): return dict(a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 10, 3), c=nn.Conv2d(10, 7, 3))
TIES = dict(ones=torch.ones_like, zeros=torch.zeros_like, halves=lambda w: (torch.arange(w.numel()) % 2).view(w.shape).float(),
            coarse=lambda w: (w*3/w.abs().max()).round().abs(), distinct=lambda w: w.abs())

@pytest.mark.parametrize('ties', TIES)
@pytest.mark.parametrize('g', [g for g in granularities if 'Conv2d' in granularities[g].layers])
def test_every_granularity_context_and_fraction(g, ties):
    torch.manual_seed(0)
    layers = weights()
    scores = {n: reduce_units(TIES[ties](m.weight.detach()), unit_dims(m, g)) for n,m in layers.items()}
    total = sum(s.numel() for s in scores.values())
    for f in FRACTIONS:
        local, glob = allocate(scores, f), allocate(scores, f, context='global')
        for n,s in scores.items():
            assert n_gone(local[n]) == floor(f, s.numel()) and local[n].shape == s.shape and local[n].dtype == torch.bool
            w = layers[n].weight
            assert n_gone(expand_units(local[n], w.shape)) == floor(f, s.numel())*unit_size(w.shape, unit_dims(layers[n], g))
        assert sum(map(n_gone, glob.values())) == floor(f, total)

@pytest.mark.parametrize('n', [0, 1, 2, 3, 7, 8, 10, 16, 100, 101])
def test_keep_top_counts(n):
    for f in FRACTIONS:
        for s in (torch.ones(n), torch.arange(n).float(), -torch.arange(n), torch.arange(n)//2): assert n_gone(keep_top(s, f)) == floor(f, n)

def test_peers_wrong_counts(): # 50 % of 8 is 4 and not 3; 10 % of 16 is 1 and not 0; half ties at 25 %
    assert n_gone(keep_top(torch.rand(8), .5)) == 4 and n_gone(keep_top(torch.rand(16), .1)) == 1 and n_gone(keep_top(torch.rand(10), 1)) == 10
    assert n_gone(keep_top(torch.tensor([1., 1, 1, 1, 2, 2, 2, 2]), .25)) == 2

def test_lowest_first_then_position():
    assert keep_top(torch.tensor([2., 1, 3, 1, 1]), .4).tolist() == [True, False, True, False, True]
    assert keep_top(torch.tensor([0., -0., 0., -0.]), .5).tolist() == [False, False, True, True]  # minus zero is zero
    assert keep_top(torch.tensor([INF, 1., INF]), 2/3).tolist() == [False, False, True]
    glob = allocate(dict(b=torch.ones(3), a=torch.ones(3)), .5, context='global')  # ties: the order of the layers
    assert glob['b'].tolist() == [False]*3 and glob['a'].tolist() == [True]*3

@pytest.mark.parametrize('n', [400, 70_000]) # of many, a sample tells where to look
@pytest.mark.parametrize('values', [1, 2, 5, 40, 10**6]) # all alike, many alike, few alike
@pytest.mark.parametrize('dead', [0, .1, .6])
@pytest.mark.parametrize('sort', [False, True])
def test_as_a_stable_sort(n, values, dead, sort):
    torch.manual_seed(values)
    s = torch.randint(values, (n,)).double()
    s[torch.randperm(n)[:int(dead*n)]] = -INF
    if sort: s = s.sort().values
    for f in (*FRACTIONS, .073, .62, .63):
        want = s == -INF
        want[s.argsort(stable=True)[:floor(f, n)]] = True
        assert torch.equal(~keep_top(s, f), want)
        halves = dict(a=s[:n//3], b=s[n//3:].float()) # as one ranking of both
        assert torch.equal(~torch.cat(list(allocate(halves, f, context='global').values())), want)

@pytest.mark.parametrize('values', [1, 3, 50, 10**6])
@pytest.mark.parametrize('dead', [0, 60, 200])
def test_rising_as_by_position(values, dead): # what depends on the order in a layer, chosen without positions
    torch.manual_seed(values+dead)
    scores = {n:torch.randint(values, shape).double().square() for n,shape in dict(a=(100,), b=(20, 10), c=(7,)).items()}
    for n in ('a', 'b'): scores[n].view(-1)[torch.randperm(scores[n].numel())[:dead]] = -INF
    by_position = {n:lamp_norm(s.flatten()).view(s.shape) for n,s in scores.items()}
    for f in FRACTIONS:
        want,got = allocate(by_position, f, context='global'),allocate_rising(scores, f, lamp_rising)
        assert all(torch.equal(want[n], got[n]) for n in scores) and list(want)==list(got)
    with pytest.raises(ValueError, match=r"scores\['a'\]: 1 of 2 scores are NaN"): allocate_rising(dict(a=torch.ones(2)), .5, lambda s, rest: s*torch.tensor([1, math.nan]))

@pytest.mark.parametrize('kind', ['normal', 'taps', 'ties', 'steep', 'trap'])
@pytest.mark.parametrize('dead', [0, .4])
def test_rising_of_many(kind, dead): # only those near the last one are sorted, as a sample says; where it is wrong, all are
    g = torch.Generator().manual_seed(0)
    make = dict(normal=lambda n: torch.randn(n, generator=g).double().square(), taps=lambda n: torch.rand(n, generator=g).double()*(torch.arange(n)%3==1), ties=lambda n: torch.randint(4, (n,), generator=g).double(),
                steep=lambda n: torch.randn(n, generator=g).double().mul(6).exp(), trap=lambda n: torch.where(torch.arange(n)%11==0, 1e-3, 1.)+torch.arange(n)/n)[kind] # what the sample sees is not like the rest
    scores = dict(a=make(180_000), b=make(90_000)*3, c=make(300), d=make(40_000)/7)
    for s in scores.values(): s[torch.rand(len(s), generator=g)<dead] = -INF
    by_position = {n:lamp_norm(s) for n,s in scores.items()}
    for f in (0., .05, .3, .5, .73, .95, 1.):
        want,got = allocate(by_position, f, context='global'),allocate_rising(scores, f, lamp_rising)
        assert all(torch.equal(want[n], got[n]) for n in scores)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool])
def test_dtypes(dtype): assert n_gone(keep_top(torch.arange(10).to(dtype), .3)) == 3

# already removed
@pytest.mark.parametrize('dead', range(0, 9))
def test_removed_units_count_and_stay(dead):
    s = torch.ones(8); s[8-dead:] = -INF
    for f in FRACTIONS:
        keep = keep_top(s, f)
        assert n_gone(keep) == max(dead, floor(f, 8)) and not keep[8-dead:].any()
        for kw in ({}, dict(context='global')):
            two = allocate(dict(a=s, b=torch.ones(8)), f, **kw)
            assert not two['a'][8-dead:].any()
            want = max(dead, floor(f, 8)) + floor(f, 8) if not kw else max(dead, floor(f, 16))
            assert sum(map(n_gone, two.values())) == want

# caps
def test_caps():
    s = dict(a=torch.arange(4.), b=torch.arange(4., 20))
    assert {n: n_gone(k) for n,k in allocate(s, .5, context='global').items()} == dict(a=4, b=6)
    assert {n: n_gone(k) for n,k in allocate(s, .5, context='global', min_keep=1).items()} == dict(a=3, b=7)
    assert {n: n_gone(k) for n,k in allocate(s, .5, context='global', max_ratio=.5).items()} == dict(a=2, b=8)
    assert {n: n_gone(k) for n,k in allocate(s, 1, min_keep=2).items()} == dict(a=2, b=14)
    assert {n: n_gone(k) for n,k in allocate(s, 1, min_keep=99).items()} == dict(a=0, b=0)
    assert n_gone(keep_top(torch.ones(4), 1, min_keep=1)) == 3

def test_a_removed_unit_stays_removed_under_a_cap():
    s = torch.tensor([-INF, -INF, -INF, 1.])
    assert n_gone(keep_top(s, .5, min_keep=2)) == 3 and n_gone(allocate(dict(a=s), 1, min_keep=2)['a']) == 3

# a fraction a layer
def test_dict():
    s = dict(a=torch.rand(10), b=torch.rand(10), c=torch.rand(10))
    assert {n: n_gone(k) for n,k in allocate(s, dict(a=.29, b=1)).items()} == dict(a=2, b=10, c=0)

# parameters
def test_params_against_loop():
    g = torch.Generator().manual_seed(0)
    for trial in range(20):
        s = {n: torch.randint(0, 6, (k,), generator=g).float() for n,k in (('a', 9), ('b', 17), ('c', 30))}
        costs = dict(a=7, b=torch.randint(1, 9, (17,), generator=g), c=1.)
        each = [(v.item(), i, j, float(costs[n][j]) if n == 'b' else costs[n]) for i,(n,x) in enumerate(s.items()) for j,v in enumerate(x)]
        total = sum(c for *_,c in each)
        for f in FRACTIONS:
            gone, spent = set(), 0.
            for v,i,j,c in sorted(each):
                if spent + c > f*total + 1e-9: break
                spent += c; gone.add((i, j))
            keep = allocate(s, f, context='global', count='params', costs=costs)
            assert {(i, j) for i,n in enumerate(s) for j in range(len(s[n])) if not keep[n][j]} == gone

def test_params_local_with_equal_costs_is_units():
    s = dict(a=torch.rand(10), b=torch.rand(21))
    for f in FRACTIONS:
        one, two = allocate(s, f), allocate(s, f, count='params', costs=dict(a=9, b=27))
        assert all(torch.equal(one[n], two[n]) for n in s)

def test_nothing_to_allocate(): assert allocate({}, .5) == {} and allocate({}, .5, context='global') == {}

# laws
score_lists = st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6, width=32), st.just(-INF)), min_size=0, max_size=40)
fraction = st.one_of(st.floats(0, 1), st.integers(0, 100).map(lambda i: i/100))

@settings(max_examples=200, deadline=None)
@given(xs=score_lists, f=fraction)
def test_law_keep_top(xs, f):
    s = torch.tensor(xs)
    keep = keep_top(s, f)
    dead = sum(x == -INF for x in xs)
    assert n_gone(keep) == max(floor(f, len(xs)), dead)
    order = sorted(range(len(xs)), key=lambda i: (xs[i], i))
    assert {i for i in range(len(xs)) if not keep[i]} == set(order[:n_gone(keep)])
    assert torch.equal(keep, keep_top(s.clone(), f)) and torch.equal(keep, keep_top(s.double(), f))

@settings(max_examples=200, deadline=None)
@given(layers=st.lists(score_lists, min_size=1, max_size=4), f=fraction, context=st.sampled_from(contexts))
def test_law_allocate_counts(layers, f, context):
    s = {str(i): torch.tensor(x) for i,x in enumerate(layers)}
    keep = allocate(s, f, context=context)
    dead = {n: int((x == -INF).sum()) for n,x in s.items()}
    if context == 'local': assert all(n_gone(keep[n]) == max(dead[n], floor(f, len(s[n]))) for n in s)
    else: assert sum(map(n_gone, keep.values())) == max(sum(dead.values()), floor(f, sum(map(len, s.values()))))
    again = allocate({n: x.clone() for n,x in s.items()}, f, context=context)
    assert all(torch.equal(keep[n], again[n]) for n in s)

@settings(max_examples=150, deadline=None)
@given(layers=st.lists(score_lists, min_size=1, max_size=3), f=fraction, g=fraction, context=st.sampled_from(contexts), count=st.sampled_from(counts),
       min_keep=st.integers(0, 3), max_ratio=st.sampled_from([1., .9, .5]))
def test_law_allocate_is_monotone(layers, f, g, context, count, min_keep, max_ratio):
    s = {str(i): torch.tensor(x) for i,x in enumerate(layers)}
    kw = dict(context=context, count=count, costs={n: i+1 for i,n in enumerate(s)}, min_keep=min_keep, max_ratio=max_ratio)
    less, more = (allocate(s, x, **kw) for x in sorted((f, g)))
    assert all((more[n] <= less[n]).all() for n in s)
    for n,x in s.items():
        live = int((x != -INF).sum())
        assert more[n].sum() >= min(min_keep, live)

# refusals
ok = dict(a=torch.rand(4), b=torch.rand(4))
@pytest.mark.parametrize('f,text', [
    (lambda: keep_top(torch.tensor([1., float('nan')]), .5), 'scores: 1 of 2 scores are NaN; a score is a number, high = keep'),
    (lambda: keep_top([1, 2], .5), 'scores is a tensor of scores, not [1, 2]'),
    (lambda: keep_top(torch.ones(2, dtype=torch.complex64), .5), 'scores has complex scores, which have no order'),
    (lambda: keep_top(ok['a'], 50), 'fraction is a fraction in [0, 1], not 50; did you mean 0.5?'),
    (lambda: keep_top(ok['a'], .5, min_keep=-1), 'min_keep is a whole number of units, at least 0, not -1'),
    (lambda: keep_top(ok['a'], .5, min_keep=.5), 'min_keep is a whole number of units, at least 0, not 0.5'),
    (lambda: allocate(dict(a=torch.tensor([float('nan')])), .5), "scores['a']: 1 of 1 scores are NaN"),
    (lambda: allocate(ok, 80), 'sparsity is a fraction in [0, 1], not 80; did you mean 0.8?'),
    (lambda: allocate(ok, .5, context='globl'), "no context 'globl'; did you mean 'global'? choose from 'local', 'global'"),
    (lambda: allocate(ok, .5, count='flops'), "no count 'flops'; choose from 'units', 'params'"),
    (lambda: allocate(ok, .5, max_ratio=90), 'max_ratio is a fraction in [0, 1], not 90; did you mean 0.9?'),
    (lambda: allocate(ok, .5, min_keep=True), 'min_keep is a whole number of units, at least 0, not True'),
    (lambda: allocate(ok, dict(aa=.5)), "sparsity: no layer 'aa'; did you mean 'a'? choose from 'a', 'b'"),
    (lambda: allocate(ok, dict(a=.5), context='global'), "context='global' is one ranking over all layers and takes one sparsity, not {'a': 0.5}; use context='local' for a fraction a layer"),
    (lambda: allocate(ok, .5, count='params'), "count='params' needs costs['a']: the number of parameters of one unit"),
    (lambda: allocate(ok, .5, count='params', costs=dict(a=1)), "count='params' needs costs['b']"),
    (lambda: allocate(ok, .5, count='params', costs=dict(a=torch.ones(3), b=1)), "costs['a'] has 3 numbers for 4 units; give one, or one a unit"),
    (lambda: allocate(ok, .5, count='params', costs=dict(a=-1, b=1)), "costs['a'] must be numbers ≥ 0, not -1")])
def test_refused(f, text):
    with pytest.raises((ValueError, TypeError)) as e: f()
    assert text in e.value.args[0]
