"Importance looked at: scores are those that are ranked, counts are exact, correlations are SciPy's"
import numpy as np, pytest, torch
from matplotlib import pyplot as plt
from scipy.stats import spearmanr
from torch import nn
from fasterprune.criteria.base import Criterion, criteria
from fasterprune.criteria.normalize import normalizers
from fasterprune.criteria.statistic import Statistic
from fasterprune.measure.importance import *
from fasterprune.measure.plots import lowest_counts, plot_lowest, plot_scores
from fasterprune.sparse.sparsifier import Sparsifier
from support.laws import Trunk

@pytest.fixture
def net():
    torch.manual_seed(0)
    m = Trunk().eval()
    for k in m.modules():
        if isinstance(k, nn.BatchNorm2d): nn.init.uniform_(k.weight, .5, 1.5)
    return m

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

X = torch.randn(2,2,8,8, generator=torch.Generator().manual_seed(1))
weights_only = [n for n,c in criteria.items() if not c.needs and not c.selects_set]

# -- importance -----------------------------------------------------------------------------------
@pytest.mark.parametrize('name', ['l1','l2','bn_scale','random','lamp'])
def test_scores_are_those_of_a_global_sparsifier(net, name):
    a,b = importance(net, X, name),Sparsifier(net, X, criterion=name, context='global').scores()
    assert list(a.scores)==list(b) and all(torch.equal(a.scores[n], b[n].flatten()) for n in b)
    assert a.normalizer==criteria[name].across

@pytest.mark.parametrize('norm', [n for n in normalizers if n!='none'])
def test_a_normaliser_keeps_the_order_within_a_group(net, norm):
    raw,s = importance(net, X, 'l2', normalizer='none'),importance(net, X, 'l2', normalizer=norm)
    assert s.normalizer==norm
    assert all(torch.equal(raw.scores[n].argsort(stable=True), v.argsort(stable=True)) for n,v in s.scores.items())
    assert all(torch.equal(normalizers[norm](raw.scores[n]), v) for n,v in s.scores.items())

def test_own_functions(net):
    s = importance(net, X, lambda w: w**4, normalizer=lambda s: s/s.max())
    assert all(v.max()==1 for v in s.scores.values()) and s.normalizer=='<lambda>'

def test_coupled_layers_have_one_score(net):
    assert [len(v) for v in importance(net, X).scores.values()]==[6,20]
    assert list(importance(net, X, only='wide').scores)==['wide.0']

def test_the_model_stays(net):
    before = {k:v.clone() for k,v in net.state_dict().items()}
    importance(net.train(), X)
    assert net.training and all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

def test_table_of_quantiles(net):
    s = importance(net, X)
    t = s.table()
    for n,v in s.scores.items():
        assert t.loc[n,'units']==len(v)
        assert np.allclose(t.loc[n, ['lowest','25 %','median','75 %','highest']].to_numpy(float), np.quantile(v.numpy(), (0,.25,.5,.75,1)))
    assert "'l2'" in repr(s) and 'median' in repr(s) and '<table' in s._repr_html_()

def test_a_criterion_that_ranks_within_a_layer_only(net):
    c = Criterion('alone', torch.abs, normalizer=None)
    with pytest.raises(ValueError, match="'alone' ranks units within one layer only.*normalizer='none'"): importance(net, X, c)
    assert importance(net, X, c, normalizer='none').normalizer=='none'

def test_criteria_that_look_at_data(net):
    seen = Statistic('energy', energy)
    c = Criterion('energetic', channel=lambda s: s['energy'], stats=(seen,))
    batches = [(torch.randn(4,2,8,8), torch.zeros(4, dtype=torch.long)) for _ in range(3)]
    one,all_ = importance(net, X, c, normalizer='none', data=batches, n_batches=1).scores,importance(net, X, c, normalizer='none', data=batches, n_batches=None).scores
    assert [len(v) for v in one.values()]==[6,20] and all((all_[n]>=v).all() and (all_[n]>v).any() for n,v in one.items())
    assert torch.equal(importance(net, X, c, data=batches[:1]).scores['stem.0'], normalizers['mean'](one['stem.0']))
    with pytest.raises(ValueError, match="'energetic' needs data"): importance(net, X, c)

def energy(b): return dict(s=b.a.square().double().sum((0,2)))

@pytest.mark.parametrize('granularity, n', [('kernel', [12,36,120]), ('shared_kernel', [6,20]), ('weight', [108,324,1080,100])])
def test_other_units(net, granularity, n):
    s = importance(net, X, granularity=granularity)
    assert [len(v) for v in s.scores.values()]==n and len(s.table())==len(n)

# -- where the lowest come from -------------------------------------------------------------------
def some(seed=0, sizes=(5,17,40), ties=False):
    g = torch.Generator().manual_seed(seed)
    return {f'l{i}':(torch.randint(0, 4, (n,), generator=g).double() if ties else torch.rand(n, generator=g, dtype=torch.float64)) for i,n in enumerate(sizes)}

def naive(scores, m): # (score, layer, unit), sorted
    order = sorted((v.item(), i, j) for i,s in enumerate(scores.values()) for j,v in enumerate(s) if v!=-torch.inf)[:m]
    return [sum(i==k for _,i,_ in order) for k in range(len(scores))]

@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('m', [1, 15, 61, 62])
def test_counts_are_exact(m, ties):
    s = some(m, ties=ties)
    t = lowest(s, m).table()
    assert t['count'].tolist()==naive(s, m) and t['count'].sum()==m
    assert np.allclose(t['expected'], m*np.array([5,17,40])/62) and np.allclose(t['part'], t['count']/t['units']) and np.allclose(t['times'], t['count']/t['expected'])

def test_deviations_are_those_of_a_lot():
    rng,n,m = np.random.default_rng(0),(5,17,40),20
    drawn = np.array([np.bincount(np.repeat([0,1,2], n)[rng.permutation(62)[:m]], minlength=3) for _ in range(20000)])
    t = lowest(some(), m).table()
    spread = (t['count']-t['expected'])/t['deviations']
    assert np.allclose(drawn.mean(0), t['expected'], atol=.05) and np.allclose(drawn.std(0), spread, rtol=.03)

def test_all_units_deviate_from_nothing(): assert (lowest(some(), 62).table()['deviations']==0).all()

@pytest.mark.parametrize('ties', [False, True])
def test_rounds_add_up(ties):
    s = some(3, ties=ties)
    went,left = np.zeros(3, int),s
    for _ in range(5):
        went += lowest(left, 9).table()['count'].to_numpy()
        left = without_lowest(left, 9)
    assert went.tolist()==naive(s, 45)==[int(v.isneginf().sum()) for v in left.values()]
    assert all(torch.equal(v[~v.isneginf()], s[n][~v.isneginf()]) for n,v in left.items())
    assert not any(v.isneginf().any() for v in s.values()) # what came in stays

def test_a_group_that_is_gone():
    s = dict(a=torch.full((3,), -torch.inf), b=torch.rand(4))
    t = lowest(s, 2).table()
    assert t['units'].tolist()==[0,4] and t['count'].tolist()==[0,2] and np.isfinite(t.to_numpy(float)).all()
    plot_lowest(s, 2)

def test_the_picture_shows_the_value(net):
    s = importance(net, X).scores
    assert [b.get_width() for b in plot_lowest(s, 7).patches]==lowest(s, 7).table()['count'].tolist()
    assert sum(len(l.get_xdata()) for l in plot_scores(s).lines)==26
    assert '7 lowest of 26' in repr(lowest(s, 7)) and lowest(s).m==26//4

# -- agreement ------------------------------------------------------------------------------------
@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('across', [False, True])
def test_spearman_is_scipys(ties, across):
    scores = {f'c{k}':some(k, ties=ties) for k in range(4)}
    a = agreement(scores, across=across)
    for i,p in enumerate(scores.values()):
        for j,q in enumerate(scores.values()):
            want = spearmanr(torch.cat([*p.values()]), torch.cat([*q.values()])).statistic if across else np.mean([spearmanr(p[g], q[g]).statistic for g in p])
            assert abs(a.values[i,j]-want)<1e-12
    assert a.criteria==tuple(scores) and list(a.groups)==([''] if across else ['l0','l1','l2'])

def test_order_alone_counts():
    s = some()
    a = agreement(dict(a=s, b={n:v.exp() for n,v in s.items()}, c={n:-v for n,v in s.items()}))
    assert np.allclose(a.values, [[1,1,-1],[1,1,-1],[-1,-1,1]])

def test_no_order_no_correlation():
    s = some()
    flat = dict(s, l0=torch.ones(5))
    a = agreement(dict(a=s, b=flat, c={n:torch.zeros(len(v)) for n,v in s.items()}))
    assert np.isnan(a.groups['l0'][0,1]) and abs(a.values[0,1]-1)<1e-12 # the other two groups speak
    assert np.isnan(a.values[2]).all() and np.isnan(a.values[:,2]).all()
    plot_agreement(a)

def test_units_that_are_gone_tie():
    s = dict(g=torch.tensor([-torch.inf, -torch.inf, 1., 2.]))
    assert abs(agreement(dict(a=s, b=dict(g=torch.tensor([0.,0.,3.,4.])))).values[0,1]-1)<1e-12

def test_groups_of_one_unit_are_left_out(): assert list(agreement(dict(a=dict(g=torch.ones(1), h=torch.rand(3)))).groups)==['h']

def test_matrix_of_the_registry(net):
    a = agreement({n:importance(net, X, n, normalizer='none').scores for n in weights_only})
    i = a.criteria.index
    assert a.values.shape==(len(weights_only),)*2 and np.allclose(a.values, a.values.T, equal_nan=True)
    assert a.values[i('l2'),i('rms')]==pytest.approx(1)
    ax = plot_agreement(a, title='on one network')
    assert len(ax.texts)==len(weights_only)**2 and ax.get_title(loc='left')=='on one network'
    assert "Spearman's rank correlation, mean over 2 groups" in repr(a) and '<table' in a._repr_html_()

@pytest.mark.parametrize('f, text', [
    (lambda: agreement({}), 'no criteria to compare'),
    (lambda: agreement(dict(a=dict(g=torch.ones(3)), b=dict(h=torch.ones(3)))), "'b' scores other units than 'a'"),
    (lambda: agreement(dict(a=dict(g=torch.ones(1)))), 'across=True'),
    (lambda: lowest(some(), 0), 'from 1 to 62'), (lambda: lowest(some(), 63), 'from 1 to 62'), (lambda: lowest({}), 'no units to rank'),
    (lambda: without_lowest(some(), 63), 'from 0 to 62'), (lambda: without_lowest(some(), True), 'not True'), (lambda: without_lowest(some(), 2.), 'not 2.0'),
])
def test_refusals(f, text):
    with pytest.raises(ValueError, match=text): f()
