"Sensitivity: what is removed is what the pruner would remove, and everything comes back"
from copy import deepcopy
import pytest, torch
from fastprogress import fastprogress
from torch import nn
from fasterprune.criteria.base import as_criterion
from fasterprune.core import n_removed
from fasterprune.measure.plots import plot_curves
from fasterprune.measure.sensitivity import *
from fasterprune.surgery.pruner import Pruner
from support.laws import Trunk

@pytest.fixture(autouse=True, scope='module')
def quiet():
    was,n = (fastprogress.NO_BAR,fastprogress.ConsoleProgressBar.fill),torch.get_num_threads()
    fastprogress.NO_BAR,fastprogress.ConsoleProgressBar.fill = True,''
    torch.set_num_threads(1)
    yield
    fastprogress.NO_BAR,fastprogress.ConsoleProgressBar.fill = was
    torch.set_num_threads(n)

def net():
    torch.manual_seed(0)
    m = Trunk()
    for k in m.modules():
        if isinstance(k, nn.BatchNorm2d): nn.init.uniform_(k.weight, .5, 1.5); nn.init.normal_(k.bias); k.running_mean.normal_(); k.running_var.uniform_(.5, 1.5)
    return m

X = torch.randn(4,2,8,8, generator=torch.Generator().manual_seed(1))
mean = lambda m: m(X).pow(2).mean().item()

def test_what_is_evaluated_is_the_network_that_the_pruner_makes():
    m = net()
    s = sensitivity(m, X, mean, ratios=(.25,.5,.75))
    assert s.fractions == (0.,.25,.5,.75) and list(s.curves) == ['stem.0','wide.0'] and s.units == {'stem.0':6,'wide.0':20} and s.criterion == 'l2'
    for name,curve in s.curves.items():
        for r,v in zip(s.fractions[1:], curve[1:]):
            p = deepcopy(m).eval()
            Pruner(p, X).prune({name:r})
            assert v == pytest.approx(mean(p), rel=1e-5)
    assert s.baseline == mean(m.eval()) and s.curves['stem.0'][0] == s.curves['wide.0'][0] == s.baseline

def test_against_a_loop():
    "One group, its filters sorted by their norm, by hand"
    m = net().eval()
    s = sensitivity(m, X, mean, ratios=(.3,), only='wide')
    w = deepcopy(m)
    order = w.wide[0].weight.detach().flatten(1).norm(dim=1).sort().indices[:n_removed(20, .3)]
    with torch.no_grad():
        for p in (w.wide[0].weight, w.wide[0].bias, w.wide[1].weight, w.wide[1].bias): p[order] = 0
    assert list(s.curves) == ['wide.0'] and s.curves['wide.0'][1] == mean(w)

@pytest.mark.parametrize('criterion', ['taylor_act','apoz','kmeans','thinet']) # two of them choose sets, another one for each fraction
def test_criteria_with_data_and_selectors(criterion):
    m,how = net(),dict(criterion=criterion, data=[(X,torch.tensor([0,1,2,1]))], loss_func=nn.functional.cross_entropy)
    s = sensitivity(m, X, mean, ratios=(.3,.6), only='wide', **how)
    for r,v in zip((.3,.6), s.curves['wide.0'][1:]):
        p = deepcopy(m).eval()
        Pruner(p, X).prune({'wide.0':r}, **how)
        assert v == pytest.approx(mean(p), rel=1e-5)

def snapshot(m): return {k:v.clone() for k,v in m.state_dict().items()},[k.training for k in m.modules()],[p.requires_grad for p in m.parameters()],[id(p) for p in m.parameters()]

def same(a, b): return all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1:] == b[1:]

def test_everything_comes_back():
    m = net().train()
    m.block.eval(); m.head.weight.requires_grad_(False)
    with torch.no_grad(): m.wide[0].weight[0] = float('nan'); m.wide[0].weight[0] = torch.randn(6,3,3); m.wide[1].bias[3] = float('inf')
    before = snapshot(m)
    seen = []
    sensitivity(m, X, lambda k: seen.append((k.training, torch.is_grad_enabled())) or 0.)
    assert same(snapshot(m), before) and set(seen) == {(False,False)} and torch.is_grad_enabled()
    assert all(p.grad is None for p in m.parameters()) and not any(k._forward_hooks or k._forward_pre_hooks for k in m.modules())

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('when', [0,1,4])
def test_everything_comes_back_after_an_error(error, when):
    m,calls = net(),[]
    before = snapshot(m)
    def broken(k):
        calls.append(0)
        if len(calls)>when: raise error('stop')
        return 0.
    with pytest.raises(error, match='stop'): sensitivity(m, X, broken)
    assert same(snapshot(m), before)

def test_the_same_units_are_not_evaluated_twice():
    calls = []
    s = sensitivity(net(), X, lambda m: calls.append(0) or float(len(calls)), ratios=(.01,.2,.2,.3,.34,.5))
    assert s.fractions == (0.,.01,.2,.3,.34,.5)
    removed = {n:[n_removed(k, f) for f in s.fractions] for n,k in s.units.items()}
    assert removed == {'stem.0':[0,0,1,1,2,3], 'wide.0':[0,0,4,6,6,10]}
    assert s.curves == {'stem.0':(1.,1.,2.,2.,3.,4.), 'wide.0':(1.,1.,5.,6.,6.,7.)} and len(calls) == 7

def test_criterion_decides_who_goes_first():
    m = net()
    for c in ('l2','random','first_k', lambda w: w.abs()): assert sensitivity(m, X, mean, criterion=c, ratios=(.5,)).criterion == as_criterion(c).name
    with without(m, Pruner(m, X).couple().by_name['wide.0'], torch.arange(20)<10):
        assert m.wide[0].weight.flatten(1).count_nonzero(1).gt(0).tolist() == [True]*10+[False]*10
        assert all((p==0).tolist() == [False]*10+[True]*10 for p in (m.wide[0].bias, m.wide[1].weight, m.wide[1].bias))

def test_the_value():
    s = Sensitivity((0.,.5,.9), {'a':(.9,.89,.2),'b':(.9,.91,.88)}, {'a':4,'b':8}, 'l1')
    assert s.baseline == .9 and s.within(.015) == {'a':.5,'b':.5} and s.within(.03) == {'a':.5,'b':.9} and s.within(0) == {'a':0.,'b':.5}
    t = s.table()
    assert t.shape == (2,3) and t.loc['a',.5] == .89 and 'l1' in repr(s) and '0.89' in repr(s) and '<table' in s._repr_html_()
    assert [tuple(l.get_ydata()) for l in plot_curves(s.fractions, s.curves).get_lines()[:2]] == list(s.curves.values())
    with pytest.raises(AttributeError): s.curves = {}

@pytest.mark.parametrize('args,error,text', [
    (dict(evaluate_fn=.9), TypeError, 'evaluate_fn is a function of the model'), (dict(evaluate_fn=lambda m: None), TypeError, 'one number for the model, not None'),
    (dict(evaluate_fn=lambda m: m(X)), TypeError, 'one number'), (dict(ratios=(50,)), ValueError, 'did you mean 0.5'), (dict(ratios=()), ValueError, 'at least one above 0'),
    (dict(ratios=(0,)), ValueError, 'at least one above 0'), (dict(criterion='magnitude'), (KeyError, ValueError), 'magnitude'), (dict(only='stem.7'), ValueError, 'stem.7'),
])
def test_refusals(args, error, text):
    m = net()
    before = snapshot(m)
    with pytest.raises(error, match=text): sensitivity(m, X, **{'evaluate_fn':mean, **args})
    assert same(snapshot(m), before)

def test_nothing_to_prune():
    with pytest.raises(ValueError, match='no group of this model can be pruned'): sensitivity(nn.Linear(3,2), torch.randn(1,3), mean)
