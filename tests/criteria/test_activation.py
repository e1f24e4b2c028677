"Activation criteria: golden values, naive loops, numpy as oracle, what is refused"
import math, pickle
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from fasterprune.criteria.activation import *
from fasterprune.criteria.base import criteria, unit_scores
from fasterprune.criteria.statistic import BatchView
from support.laws import engine

FAMILY = 'apoz', 'mean_act', 'std_act', 'max_act', 'entropy', 'hrank', 'wanda', 'wanda_row', 'thinet', 'nisp'
UNITS = 'apoz', 'mean_act', 'std_act', 'max_act', 'entropy', 'hrank'

def value(c, *seen): c = criteria[c] if isinstance(c, str) else c; return {s.name:s.value(seen) for s in c.stats}
def scores(c, *seen): c = criteria[c] if isinstance(c, str) else c; return c.channel(value(c, *seen))

def maps(N=5, n=4, side=6, seed=0, relu=True):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(N, n, side*side, generator=g)+torch.linspace(-1, 1, n).view(1, n, 1)
    return a.relu() if relu else a

# ---- apoz

def test_zero_share_against_a_loop():
    a = maps()
    for c in range(4): assert zero_share(a)[c].item() == sum(v == 0 for n in range(5) for v in a[n,c].tolist())/(5*36)

def test_zero_share_golden():
    a = torch.tensor([[[0., 0, 1, 2], [0, 3, 4, 5]]])
    assert zero_share(a).tolist() == [.5, .25] and zero_share(a, 1.).tolist() == [.75, .25] and zero_share(-a, 1.).tolist() == [.75, .25]

# ---- entropy

@pytest.mark.parametrize('bins', [2, 10, 100])
def test_entropy_against_numpy(bins):
    z = torch.randn(300, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for c in range(5):
        p = np.histogram(z[:,c].numpy(), bins)[0]/300
        assert pooled_entropy(z, bins)[c].item() == pytest.approx(-sum(x*math.log(x) for x in p if x), abs=1e-12)

def test_entropy_golden():
    z = torch.tensor([[0., 7, 0], [1, 7, 0], [2, 7, 0], [3, 7, 1]])
    assert pooled_entropy(z, 4).tolist() == pytest.approx([math.log(4), 0, -.75*math.log(.75)-.25*math.log(.25)])

# ---- hrank

@pytest.mark.parametrize('shape', [(6, 6), (4, 9), (1, 36)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_rank_against_numpy(shape, dtype):
    a = maps().to(dtype)
    a[0,0] = 0
    a[1,1] = torch.outer(torch.arange(1., shape[0]+1), torch.arange(1., shape[1]+1)).flatten()
    want = np.linalg.matrix_rank(a.unflatten(-1, shape).numpy())
    got = map_ranks(a, shape)
    assert (got.numpy() == want).all() and got[0,0] == 0 and got[1,1] == 1

def test_rank_tolerance():
    s = torch.diag(torch.tensor([1., 1e-2, 1e-5, 1e-9])).flatten().view(1, 1, 16)
    assert map_ranks(s, (4, 4)).item() == 3                                 # 4·1.2e-7 of the largest
    assert [map_ranks(s, (4, 4), t).item() for t in (1e-10, 1e-6, 1e-3, .1)] == [4, 3, 2, 1]
    assert map_ranks(s.double(), (4, 4)).item() == 4
    assert map_ranks(1e6*s, (4, 4)).item() == 3                             # relative, not absolute

def test_half_precision_maps_have_a_rank(): assert map_ranks(maps().bfloat16(), (6, 6)).shape == (5, 4)

# ---- wanda

def test_wanda_against_a_loop():
    w, x = torch.randn(4, 3, 2, 2), torch.randn(7, 3, 25)
    c = criteria['wanda']
    norm = value('wanda', BatchView(a=x, shape=(1, 5, 5)))['loudness']
    s = c.element(w.double(), dict(loudness=norm.view(1, 3, 1, 1)))
    for o in range(4):
        for i in range(3):
            size = math.sqrt(sum(v*v for n in range(7) for v in x[n,i].tolist()))
            for y in range(2):
                for k in range(2): assert s[o,i,y,k].item() == pytest.approx(abs(w[o,i,y,k].item())*size, rel=1e-5)

@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_row_ranks_against_a_loop(seed):
    s = torch.randint(0, 4, (3, 2, 2), generator=torch.Generator().manual_seed(seed)).double() # with ties
    for o in range(3):
        row = s[o].flatten().tolist()
        order = sorted(range(4), key=lambda i: (row[i], i))
        assert row_ranks(s)[o].flatten().tolist() == [order.index(i)/4 for i in range(4)]

# ---- thinet

def greedy(X): # the definition: every set is tried
    out, T = [], []
    while len(T) < X.shape[1]:
        cost = {c: (X[:, T+[c]].sum(1)**2).sum().item() for c in range(X.shape[1]) if c not in T}
        T.append(min(cost, key=cost.get))
    return T

@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_thinet_order_against_the_definition(seed):
    X = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert thinet_order(X.T@X).tolist() == greedy(X)

def test_thinet_takes_what_cancels_together(): # each of the two is loud, and both are nothing
    x, z = torch.randn(2, 50, dtype=torch.float64)
    X = torch.stack([x, 3*z, -x, 2*z], 1)
    assert set(thinet_order(X.T@X).tolist()[:2]) == {0, 2}

def test_thinet_rescale_is_least_squares():
    X = torch.randn(60, 5, dtype=torch.float64)@torch.randn(5, 5, dtype=torch.float64)
    keep = torch.tensor([0, 2, 3])
    want = np.linalg.lstsq(X[:,keep].numpy(), X.sum(1).numpy(), rcond=None)[0]
    assert thinet_rescale(X.T@X, keep).tolist() == pytest.approx(want.tolist(), rel=1e-8)

def test_thinet_rescale_of_duplicates_and_zeros():
    x = torch.randn(60, 1, dtype=torch.float64)
    X = torch.cat([x, x, torch.zeros_like(x)], 1)
    assert thinet_rescale(X.T@X, torch.tensor([0])).tolist() == pytest.approx([2.])
    f = thinet_rescale(X.T@X, torch.tensor([0, 1, 2]))
    assert f.tolist() == [1, 1, 1] # nothing goes, and of the last nothing was seen

# ---- nisp

def test_nisp_step_against_a_loop():
    w, s = torch.randn(4, 3, 2, 2), torch.rand(4).double()
    for i in range(3): assert nisp_step(w, s)[i].item() == pytest.approx(sum(abs(w[o,i,y,x].item())*s[o].item() for o in range(4) for y in range(2) for x in range(2)), rel=1e-6)

def test_nisp_step_groups_and_transposed():
    g = torch.Generator().manual_seed(0)
    w, s = torch.randn(4, 3, 2, generator=g), torch.rand(4, generator=g).double()
    full = torch.zeros(4, 6, 2); full[:2,:3], full[2:,3:] = w[:2], w[2:]
    assert torch.allclose(nisp_step(w, s, groups=2), nisp_step(full, s))
    t = torch.randn(6, 2, 3, generator=g)                                   # transposed, two groups: [I, O/g, ...]
    full = torch.zeros(6, 4, 3); full[:3,:2], full[3:,2:] = t[:3], t[3:]
    assert torch.allclose(nisp_step(t, s, groups=2, transposed=True), nisp_step(full.transpose(0, 1), s))

def test_nisp_is_the_derivative_through_absolute_weights(): # several readers, a residual branch, a pooling
    torch.manual_seed(0)
    convs = [nn.Conv2d(4, 4, 1, bias=False).double() for _ in range(3)]
    lin = nn.Linear(4, 3, bias=False).double()
    w = [c.weight.abs().detach() for c in convs]
    x = torch.rand(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    h = F.conv2d(x, w[0])+x
    y = F.linear(F.max_pool2d(F.conv2d(h, w[1])+F.conv2d(h, w[2]), 2).mean((2, 3)), lin.weight.abs())
    y.sum().backward()
    last = nisp_step(lin.weight, torch.ones(3))
    mid = nisp_step(convs[1].weight, last)+nisp_step(convs[2].weight, last)
    want = nisp_step(convs[0].weight, mid)+mid
    assert torch.allclose(x.grad.sum((0, 2, 3)), want, rtol=1e-10)

def test_nisp_adds_up_positions_and_readers():
    g = torch.rand(2, 3, 5, dtype=torch.float64)
    assert criteria['nisp'].reduce == 'sum' and torch.allclose(scores('nisp', BatchView(g=g, a=g)), g.sum(2).mean(0))

# ---- the criteria

def naive(name, a): # from all the values of one unit, [N, S]
    v = a.flatten().tolist(); n = len(v); mean = sum(v)/n
    if name == 'apoz': return sum(x != 0 for x in v)/n
    if name == 'mean_act': return sum(map(abs, v))/n
    if name == 'std_act': return math.sqrt(sum((x-mean)**2 for x in v)/n)
    if name == 'max_act': return max(v)
    if name == 'entropy':
        p = np.histogram(a.mean(1).numpy(), 100)[0]/len(a)
        return -sum(x*math.log(x) for x in p if x)
    return float(np.mean(np.linalg.matrix_rank(a.unflatten(1, (6, 6)).numpy())))

@pytest.mark.parametrize('name', UNITS)
def test_against_a_loop_in_batches(name):
    a = maps(N=40)
    got = scores(name, *[BatchView(a=b, shape=(1, 6, 6)) for b in a.split(16)]) # the last one is smaller
    assert got.dtype == torch.float64
    for c in range(4): assert got[c].item() == pytest.approx(naive(name, a[:,c]), rel=1e-5)

@pytest.mark.parametrize('name', UNITS)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_units_may_come_in_any_order(name, seed):
    g = torch.Generator().manual_seed(seed)
    a, p = maps(N=8, n=5, seed=seed), torch.randperm(5, generator=g)
    one, two = (scores(name, BatchView(a=x, shape=(1, 6, 6))) for x in (a, a[:,p]))
    assert torch.allclose(one[p], two, rtol=1e-5, atol=1e-7)

@pytest.mark.parametrize('name', UNITS)
def test_samples_may_come_in_any_order(name):
    a = maps(N=8)
    one, two = (scores(name, *[BatchView(a=b, shape=(1, 6, 6)) for b in x.split(3)]) for x in (a, a.flip(0)))
    assert torch.allclose(one, two, rtol=1e-5, atol=1e-7)

@pytest.mark.parametrize('name', UNITS)
def test_a_dead_unit_is_the_worst(name):
    a = maps(); a[:,2] = 0
    s = scores(name, BatchView(a=a, shape=(1, 6, 6)))
    assert s[2] == 0 and s[2] == s.min() and not s.isnan().any()

def test_high_is_keep(): # a public pruner inherits the sign of APoZ for its mean activations, and removes the most active
    a = maps(); a[:,1] *= 100
    assert scores('mean_act', BatchView(a=a, shape=(1, 6, 6))).argmax() == 1

def test_std_of_a_large_constant_is_not_drowned():
    a = torch.full((64, 2, 100), 1000.)
    a[:,1] += .01*torch.randn(64, 100)
    s = scores('std_act', *[BatchView(a=b, shape=(1, 10, 10)) for b in a.split(16)])
    assert s[0] < 1e-6 and s[1].item() == pytest.approx(a[:,1].double().std().item(), rel=1e-3)

def test_apoz_with_eps_reads_any_activation():
    a = F.gelu(torch.randn(8, 4, 36))
    assert 'relu' in criteria['apoz'].needs and 'relu' not in apoz(.01).needs
    assert torch.allclose(scores(apoz(.1), BatchView(a=a)), 1-zero_share(a, .1))

def test_apoz_refuses_to_rank_what_is_never_zero():
    c, s = criteria['apoz'], scores('apoz', BatchView(a=torch.rand(8, 4, 36)+.1))
    with pytest.raises(ValueError, match=r"no activation of 'conv' is exactly 0 where it is read: .* criterion=apoz\(eps=0.01\), use 'mean_act', or leave this layer out with ignore='conv'"): c.layer(s, 'conv')
    assert apoz(.1).layer is None
    for ok in (scores(c, BatchView(a=maps())), torch.ones(1), torch.tensor([1., .9]), torch.zeros(3)): assert c.layer(ok, 'conv') is ok
    half = (scores(c, BatchView(a=maps()))+s)/2 # read behind a ReLU by one layer, behind a pooling by another
    assert c.layer(half, 'conv') is half

def test_hrank_random_maps_are_all_alike():
    r = scores('hrank', BatchView(a=maps(N=2, n=8, side=32)[:,4:], shape=(1, 32, 32)))
    assert r.min() > 31.8

def test_hrank_of_one_pixel_is_how_often_it_is_not_zero():
    a = maps(N=32, side=1)
    for shape in ((1,), (1, 1, 1)): assert torch.equal(scores('hrank', BatchView(a=a, shape=shape)), 1-zero_share(a))

def test_hrank_of_several_positions_is_their_mean():
    a = maps(N=6, side=6)
    two = torch.cat([a, a.flip(0)], 2)
    assert torch.allclose(scores('hrank', BatchView(a=two, shape=(2, 6, 6))), scores('hrank', BatchView(a=a, shape=(1, 6, 6))))

def test_hrank_refuses_tokens_and_global_rankings():
    with pytest.raises(ValueError, match="hrank takes the rank of maps, and these units are read as sequences; use 'std_act'"): scores('hrank', BatchView(a=maps(), shape=(1, 36)))
    assert criteria['hrank'].across is None

def test_entropy_keeps_a_bounded_number_of_samples():
    st_, = criteria['entropy'].stats
    assert len(st_.value([BatchView(a=torch.rand(500, 3, 2)) for _ in range(10)])) == 4096

# ---- thinet on layers

LAYERS = [(nn.Conv2d(6, 8, 3), (5, 6, 9, 9)), (nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2, groups=2), (5, 6, 9, 9)), (nn.Conv1d(6, 4, 3), (5, 6, 12)),
          (nn.Conv3d(6, 4, 2), (5, 6, 4, 4, 4)), (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (5, 6, 5, 5)), (nn.Linear(6, 3), (5, 6)), (nn.Linear(6, 3), (5, 7, 6))]

@pytest.mark.parametrize('layer,shape', LAYERS, ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else None)
def test_contributions_sum_to_the_output_without_its_bias(layer, shape):
    x = torch.randn(shape)
    got = contributions(layer, x, torch.arange(6).view(6, 1), entries=3, seed=1)
    assert got.shape == (15, 6) and not got.requires_grad and layer.weight.grad is None
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        dim = -1 if isinstance(layer, nn.Linear) else 1
        bias = layer.bias if dim == -1 else layer.bias.view(-1, *[1]*(x.dim()-2))
        y = (layer(x)-bias).flatten(1)
        want = torch.cat([y.gather(1, torch.randint(y.shape[1], (5,), generator=g)[:,None]) for _ in range(3)])[:,0]
        assert torch.allclose(got.sum(1), want, atol=1e-5)
        g.manual_seed(1)
        at = torch.cat([torch.randint(y.shape[1], (5,), generator=g)[:,None] for _ in range(3)])[:,0].view(3, 5)
        for c in range(6): # a unit's part is what the output is made of when all others are silent
            alone = torch.zeros_like(x); alone.select(dim, c).copy_(x.select(dim, c))
            part = (layer(alone)-bias).flatten(1)
            assert torch.allclose(got.view(3, 5, 6)[...,c], torch.stack([part.gather(1, r[:,None])[:,0] for r in at]), atol=1e-5)

def test_contributions_of_units_of_several_positions_and_of_none():
    lin, x = nn.Linear(6, 1), torch.randn(5, 6)
    got = contributions(lin, x, torch.tensor([[0, 3], [5, -1], [-1, -1]]), entries=1)
    p = (x*lin.weight).detach()
    assert torch.allclose(got, torch.stack([p[:,0]+p[:,3], p[:,5], torch.zeros(5)], 1), atol=1e-6)

def test_thinet_the_same_twice_and_in_batches():
    conv, x = nn.Conv2d(4, 5, 3), torch.randn(8, 4, 6, 6)
    see = lambda x, i: BatchView(a=x.flatten(2), x=x, layer=conv, index=torch.arange(4).view(4, 1), shape=(1, 6, 6), i=i)
    one, two = (scores_k('thinet', see(x[:4], 0), see(x[4:], 1)) for _ in range(2))
    assert torch.equal(one, two) and sorted(one.tolist()) == [0, 1, 2, 3]

def scores_k(c, *seen): return criteria[c].channel(value(c, *seen), 2)

def test_thinet_counts_backwards_from_what_goes_first():
    x = torch.randn(400, 4)*torch.tensor([3., 1, 4, 2])
    lin = nn.Linear(4, 1, bias=False)
    with torch.no_grad(): lin.weight.fill_(1)
    s = scores_k('thinet', BatchView(a=x[...,None], x=x, layer=lin, index=torch.arange(4).view(4, 1), shape=(1,)))
    assert s.tolist() == [2, 0, 3, 1] and criteria['thinet'].selects_set

def test_thinet_refuses_what_is_not_linear():
    with pytest.raises(ValueError, match="thinet reads convolutions and linear layers, and these units are read by a LSTM; leave this layer out with ignore="):
        contributions(nn.LSTM(3, 3), torch.ones(1, 3), torch.arange(3).view(3, 1))

# ---- what they need, and what is refused

def test_what_they_need():
    needs = {n:criteria[n].needs for n in FAMILY}
    assert needs.pop('apoz') == ('relu', 'data') and needs.pop('nisp') == () and set(needs.values()) == {('data',)}
    assert all(criteria[n].family == 'activation' and criteria[n].source and criteria[n].note for n in FAMILY if n != 'std_act')
    assert criteria['wanda_row'].where == ('weight',)

@pytest.mark.parametrize('bad', [-1, float('nan'), float('inf'), '0', True, None])
def test_apoz_eps(bad):
    with pytest.raises(ValueError, match='apoz: eps is a number ≥ 0, not '): apoz(bad)

@pytest.mark.parametrize('bad', [1, 0, 2., '10', True])
def test_entropy_bins(bad):
    with pytest.raises(ValueError, match='entropy: bins is a whole number of at least 2, not '): entropy(bad)

@pytest.mark.parametrize('bad', [-.1, 1, '0', True, float('nan')])
def test_hrank_tol(bad):
    with pytest.raises(ValueError, match='hrank: tol is a part of the largest singular value'): hrank(bad)

@pytest.mark.parametrize('bad', [0, 1.5, True, '3'])
def test_thinet_entries(bad):
    with pytest.raises(ValueError, match='thinet: entries is a whole number of at least 1, not '): thinet(bad)

@pytest.mark.parametrize('c', [*FAMILY, apoz(.1), entropy(10), hrank(.01), thinet(3)], ids=lambda c: getattr(c, 'name', c))
def test_they_pickle(c):
    c = criteria[c] if isinstance(c, str) else c
    assert pickle.loads(pickle.dumps(c)) == c or c.name in ('apoz', 'entropy', 'hrank', 'thinet') and pickle.loads(pickle.dumps(c)).name == c.name

# ---- through the engine

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem,self.a,self.b,self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1), nn.Linear(6, 4)
    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x+self.b(F.relu(self.a(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))

def residual(): torch.manual_seed(0); return Residual().eval(), torch.randn(8, 3, 6, 6), torch.randint(4, (8,))

def test_nisp_in_a_residual_network_is_the_formula():
    m, x, _ = residual()
    s = engine(m, x, 'nisp')
    last = nisp_step(m.fc.weight, torch.ones(4))
    inner = nisp_step(m.b.weight, last)
    assert torch.allclose(s['a'], inner, rtol=1e-6)
    assert torch.allclose(s['stem'], nisp_step(m.a.weight, inner)+last, rtol=1e-6) # it is read by `a` and, after the addition, by `fc`

@pytest.mark.parametrize('name', ['apoz', 'mean_act', 'std_act', 'max_act', 'entropy'])
def test_units_are_scored_where_they_are_read(name):
    m, x, _ = residual()
    s = engine(m, x, name, data=[(x[:5],), (x[5:],)])
    with torch.no_grad():
        h = F.relu(m.stem(x)); k = F.relu(m.a(h)); z = F.adaptive_avg_pool2d(F.relu(h+m.b(k)), 1).flatten(1)
    see = lambda t: scores(name, BatchView(a=t.flatten(2) if t.dim()>2 else t[...,None], shape=(1, *t.shape[2:])))
    assert torch.allclose(s['a'], see(k), rtol=1e-4) and torch.allclose(s['stem'], (see(h)+see(z))/2, rtol=1e-4)

def test_thinet_keeps_what_the_reader_needs():
    torch.manual_seed(0)
    m, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), torch.randn(16, 3, 8, 8)
    with torch.no_grad(): m[2].weight[:,[1,4]] *= 1e-3
    s = engine(m, x, 'thinet', data=[(x,)])['0']
    assert sorted(s.tolist()) == list(range(6)) and set(s.argsort()[:2].tolist()) == {1, 4}

def test_wanda_row_of_grouped_and_transposed_convolutions():
    from fasterprune.sparse.sparsifier import Sparsifier
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 3, 2), nn.Flatten(), nn.Linear(3*25, 2))
    x = torch.randn(8, 4, 6, 6)
    keep = Sparsifier(m, x, granularity='weight', criterion='wanda_row', data=[(x,)]).masks(.5).keep
    for n,dims in (('0', (1, 2, 3)), ('1', (0, 2, 3)), ('3', (1,))): # each output loses the same part
        part = keep[f'{n}.weight'].float().mean(dims)
        assert part.min() > .4 and part.max()-part.min() < .06, n

def test_wanda_prunes_the_weights_of_silent_inputs():
    m, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(32, 6)*torch.tensor([1., 1e-4, 1, 1e-4, 1, 1])
    from fasterprune.sparse.sparsifier import Sparsifier
    keep = Sparsifier(m, x, granularity='weight', criterion='wanda', data=[(x,)]).masks(1/3).keep['0.weight']
    assert not keep[:,[1,3]].any() and keep[:,[0,2,4,5]].all()
