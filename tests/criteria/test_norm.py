"Norm criteria: golden values, naive loops, normalisers that keep the order, weights that stay as they are"
import itertools, math, pickle
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fasterprune.criteria.base import *
from fasterprune.criteria.normalize import *
from fasterprune.criteria.norm import random
from fasterprune.granularity import unit_dims

INF = float('inf')
ALL = 'l1', 'l2', 'linf', 'mean_abs', 'rms', 'bn_scale', 'lamp', 'random', 'first_k'
NAIVE = dict(l1=lambda u: sum(map(abs, u)), l2=lambda u: math.sqrt(sum(x*x for x in u)), linf=lambda u: max(map(abs, u)),
             mean_abs=lambda u: sum(map(abs, u))/len(u), rms=lambda u: math.sqrt(sum(x*x for x in u)/len(u)))

def conv(): torch.manual_seed(0); return nn.Conv2d(3, 5, (2, 3))
def squares(u): return sum(x*x for x in u)

def naive_units(w, dims): # Unit's position → list of its weights
    res = {}
    for pos in itertools.product(*map(range, w.shape)): res.setdefault(tuple(0 if d in dims else p for d,p in enumerate(pos)), []).append(w[pos].item())
    return res

@pytest.mark.parametrize('g', ['weight', 'kernel', 'filter', 'shared_kernel', 'channel', 'layer'])
@pytest.mark.parametrize('name', NAIVE)
def test_against_loop(name, g):
    m = conv(); w = m.weight.detach(); dims = unit_dims(m, g)
    s = unit_scores(criteria[name], w, dims)
    assert s.dtype == torch.float64
    for pos,u in naive_units(w, dims).items(): assert s[pos].item() == pytest.approx(NAIVE[name](u), rel=1e-12)

def test_golden():
    w = torch.tensor([[3., -4], [0, 1]])
    get = lambda n: unit_scores(criteria[n], w, (1,)).flatten().tolist()
    assert get('l1') == [7, 1] and get('l2') == [5, 1] and get('linf') == [4, 1] and get('mean_abs') == [3.5, .5]
    assert get('rms') == pytest.approx([5/2**.5, 1/2**.5]) and get('first_k') == [2, 1]

def test_lamp_golden():
    assert unit_scores(criteria['lamp'], torch.tensor([1., 2, 3]), ()).tolist() == pytest.approx([.0714286, .3076923, 1.], abs=1e-7)

@pytest.mark.parametrize('g', ['weight', 'kernel', 'filter'])
def test_lamp_against_loop(g):
    m = conv(); w = m.weight.detach(); dims = unit_dims(m, g)
    s, sq = unit_scores(criteria['lamp'], w, dims), {p: squares(u) for p,u in naive_units(w, dims).items()}
    for pos,v in sq.items(): assert s[pos].item() == pytest.approx(v/sum(x for x in sq.values() if x >= v), rel=1e-10)
    assert s.max() == 1

def test_lamp_ties_and_zeros():
    assert lamp_norm(torch.ones(4)).tolist() == pytest.approx([1/4, 1/3, 1/2, 1])  # the order in which they would go
    assert lamp_norm(torch.tensor([0., 0, 2])).tolist() == [0, 0, 1] and lamp_norm(torch.zeros(3)).tolist() == [0, 0, 0]

def test_l1_l2_linf_agree_on_single_weights():
    w = conv().weight
    a, b, c = (unit_scores(criteria[n], w, ()) for n in ('l1', 'l2', 'linf'))
    assert torch.allclose(a, b) and torch.equal(a, c) and torch.equal(a, w.detach().abs().double())

def test_bn_scale_reads_the_norm():
    c = criteria['bn_scale']
    assert c.reads == 'norm' and unit_scores(c, torch.tensor([-2., 0, 1]), ()).tolist() == [2, 0, 1]
    assert [n for n in ALL if criteria[n].reads == 'norm'] == ['bn_scale']

# the table
def test_registry():
    assert set(ALL) <= set(criteria)
    text = repr(criteria).splitlines()
    assert text[0].split() == ['criterion', 'note', 'family', 'needs', 'source'] and any('1608.08710' in l for l in text)
    assert all(criteria[n].name == n and criteria[n].needs == () for n in ALL)

@pytest.mark.parametrize('name', ALL)
def test_scoring_never_changes_the_weight(name):
    m = conv(); was = m.weight.detach().clone()
    unit_scores(criteria[name], m.weight, (1, 2, 3), 'conv')
    assert torch.equal(m.weight, was) and m.weight.requires_grad and m.weight.grad is None

@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(name, dtype):
    s = unit_scores(criteria[name], torch.ones(4, 600, dtype=dtype)*300, (1,))  # the sum of squares overflows in float16
    assert s.dtype == torch.float64 and s.isfinite().all()

@pytest.mark.parametrize('name', ALL)
def test_pickles(name): assert pickle.loads(pickle.dumps(criteria[name])).name == name

# controls
def test_random_is_seeded():
    w = torch.zeros(6, 2, 3, 3)
    draw = lambda seed, key: unit_scores(random(seed), w, (1, 2, 3), key).flatten()
    torch.manual_seed(1); a = draw(0, 'x')
    torch.manual_seed(2); assert torch.equal(a, draw(0, 'x'))  # the user's generator plays no part
    state = torch.get_rng_state(); draw(0, 'x'); assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(a, draw(1, 'x')) and not torch.equal(a, draw(0, 'y'))
    assert torch.equal(a, unit_scores(criteria['random'], w, (1, 2, 3), 'x').flatten()) and (0 <= a).all() and (a < 1).all()
    assert torch.equal(draw(3, 'x'), unit_scores(pickle.loads(pickle.dumps(random(3))), w, (1, 2, 3), 'x').flatten())

def test_random_refuses_what_is_no_seed():
    for bad in ('0', 1.5, None, True):
        with pytest.raises(TypeError) as e: random(bad)
        assert e.value.args[0] == f'random takes a whole number as seed, not {bad!r}'

# your own
def test_user_function():
    def signed(w): return w
    c, w = as_criterion(signed), torch.tensor([[1., -2], [3, 4]])
    assert c.name == 'signed' and not c.comparable and unit_scores(c, w, (1,)).flatten().tolist() == [-1, 7]

def test_user_function_cannot_change_the_weight():
    def rude(w): return w.mul_(0).add_(1)
    p = nn.Parameter(torch.tensor([1., 2])); unit_scores(as_criterion(rude), p, ())
    assert p.tolist() == [1, 2]
    def identity(w): return w
    s = element_scores(as_criterion(identity), p); s.zero_()
    assert p.tolist() == [1, 2]

def test_user_function_runs_without_gradients():
    def f(w): assert not torch.is_grad_enabled() and not w.requires_grad; return w.abs()
    unit_scores(as_criterion(f), nn.Parameter(torch.ones(2)), ())

def test_given_by_name_object_or_function():
    assert as_criterion('l1') is criteria['l1'] and as_criterion(criteria['l2']) is criteria['l2'] and as_criterion(torch.abs).name == 'abs'

def test_register():
    c = Criterion('for_this_test', torch.abs)
    try:
        assert register(c) is c and as_criterion('for_this_test') is c
        assert register(c) is c  # a notebook cell can run twice
    finally: criteria.pop('for_this_test')

def test_layer_keeps_what_is_removed():
    s = torch.tensor([[3.], [-INF], [1.]]).double()
    for name in ('lamp', 'random', 'first_k'):
        out = layer_scores(criteria[name], s, 'x')
        assert out.shape == s.shape and out[1] == -INF and out[[0, 2]].isfinite().all()
    assert layer_scores(criteria['l1'], s) is s
    assert layer_scores(criteria['lamp'], s)[[0, 2]].flatten().tolist() == [1, .25]  # the removed one has no share

# normalisers
def test_normalizer_formulas():
    s = torch.tensor([1., 2, 3, 6]).double()
    want = dict(none=s, sum=s/12, mean=s/3, max=s/6, l2=s/50**.5, minmax=(s-1)/5, zscore=(s-3)/3.5**.5, median=s/3,
                lamp=torch.tensor([1/12, 2/11, 3/9, 1]).double())
    assert list(normalizers) == list(want)
    for n,v in want.items(): assert torch.allclose(normalizers[n](s), v), n

@pytest.mark.parametrize('name', list(normalizers))
def test_removed_units_are_left_out_of_the_statistics(name):
    s, gaps = torch.tensor([1., 2, 3, 6]), torch.tensor([-INF, 1., 2, -INF, 3, 6])
    out = normalizers[name](gaps)
    assert out[[0, 3]].tolist() == [-INF, -INF] and torch.equal(out[[1, 2, 4, 5]], normalizers[name](s))
    assert normalizers[name](torch.full((3,), -INF)).tolist() == [-INF]*3 and normalizers[name](torch.ones(0)).shape == (0,)

@pytest.mark.parametrize('name', list(normalizers))
def test_degenerate_layers(name):
    for s in (torch.zeros(4), torch.ones(4), torch.ones(1), torch.zeros(1), torch.tensor([0., 0, 0, 5])):
        out = normalizers[name](s)
        assert out.isfinite().all() and out.shape == s.shape

@settings(max_examples=100, deadline=None)
@given(xs=st.lists(st.one_of(st.floats(0, 1e4, width=32), st.integers(0, 3).map(float), st.just(-INF)), min_size=1, max_size=30), name=st.sampled_from(sorted(normalizers)))
def test_law_order_within_a_layer_stays(xs, name):
    s = torch.tensor(xs)
    was = s.clone()
    out = normalizers[name](s)
    assert torch.equal(s, was)
    order = s.argsort(stable=True)
    assert (out[order].diff().nan_to_num(0) >= 0).all()

@pytest.mark.parametrize('name', [n for n in normalizers if n not in ('none', 'l2', 'minmax', 'zscore')])
def test_negative_scores_refused_where_the_order_would_turn(name):
    with pytest.raises(ValueError) as e: normalizers[name](torch.tensor([-2., 1]))
    assert e.value.args[0] == f"normalizer {name!r} keeps the order only of scores ≥ 0, and found -2; use 'zscore' or 'minmax'"

@pytest.mark.parametrize('name', ['none', 'l2', 'minmax', 'zscore'])
def test_negative_scores_taken_where_it_does_not(name):
    out = normalizers[name](torch.tensor([-2., 1, -1]))
    assert out.argsort().tolist() == [0, 2, 1]

def test_as_normalizer():
    f = lambda s: s*2
    assert as_normalizer('mean') is normalizers['mean'] and as_normalizer(f) is f

# refusals
w = torch.ones(2, 3)
@pytest.mark.parametrize('f,text', [
    (lambda: as_criterion('l22'), "no criterion 'l22'; did you mean 'l2'? choose from '"),
    (lambda: as_criterion(3), 'a criterion is a name, a Criterion or a function (weight) → scores, not 3; the names are '),
    (lambda: as_criterion(Criterion), 'a criterion is a name, a Criterion or a function (weight) → scores, not <class'),
    (lambda: Criterion('mine', 'abs'), "criterion 'mine': element is a function, not 'abs'"),
    (lambda: Criterion('mine', None), "criterion 'mine': element is a function, not None"),
    (lambda: Criterion('mine', torch.abs, finish=2), "criterion 'mine': finish is a function, not 2"),
    (lambda: Criterion('mine', torch.abs, layer='lamp'), "criterion 'mine': layer is a function, not 'lamp'"),
    (lambda: Criterion('mine', torch.abs, monotone=torch.abs), "criterion 'mine': monotone is what layer makes of ascending scores, so give layer too"),
    (lambda: Criterion('mine', torch.abs, pool='avg'), "criterion 'mine': no pool 'avg'; choose from 'sum', 'mean', 'max'"),
    (lambda: Criterion('mine', torch.abs, reads='bias'), "criterion 'mine' reads 'weight', 'norm' or 'readers', not 'bias'"),
    (lambda: register(torch.abs), 'register takes a Criterion, not'),
    (lambda: unit_scores(Criterion('mine', lambda w: w.sum(1)), w, (1,)), "criterion 'mine' returned shape (2,) for a weight of shape (2, 3); it must return a real score for each weight"),
    (lambda: unit_scores(Criterion('mine', lambda w: 3), w, (1,)), "criterion 'mine' returned 3 for a weight of shape (2, 3)"),
    (lambda: unit_scores(Criterion('mine', lambda w: w/0*0), w, (1,)), "criterion 'mine' returned NaN for a weight of shape (2, 3)"),
    (lambda: unit_scores(Criterion('mine', lambda w: w*1j), w, (1,)), "criterion 'mine' returned complex numbers for a weight of shape (2, 3)"),
    (lambda: as_normalizer('avg'), "no normalizer 'avg'; choose from 'none', 'sum', 'mean'"),
    (lambda: as_normalizer(3), 'a normalizer is a name or a function of 1-D scores, not 3')])
def test_refused(f, text):
    with pytest.raises((ValueError, TypeError)) as e: f()
    assert text in e.value.args[0]
