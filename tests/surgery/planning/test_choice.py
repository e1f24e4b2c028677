"Which units go: exact counts in every context, nested plans, widths that are multiples, layers by name and type, warnings and refusals"
import warnings
from dataclasses import replace
from math import floor
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torchvision.models import resnet18
from fasterprune.allocation import allocate, ranked
from fasterprune.core import NoEffectWarning
from fasterprune.criteria.base import as_criterion
from fasterprune.sparse.sparsifier import Sparsifier
from fasterprune.surgery.planning.budget import Budget, within
from fasterprune.surgery.planning.selection import Selection, PruningWarning, choose, is_of, layers_of, nearly_emptied
from fasterprune.surgery.analysis.scores import isomorphic_sets, group_scores
from fasterprune.surgery.analysis.cost import Costs, unit_costs
from fasterprune.surgery.coupling.couple import couple
from fasterprune.surgery.planning.cuts import labels_of
from fasterprune.surgery.pruner import Pruner

def net(w=24, seed=0):
    torch.manual_seed(seed)
    c = lambda i,o: [nn.Conv2d(i,o,3,padding=1,bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*c(3,w), *c(w,w), *c(w,w), *c(w,20), nn.Flatten(), nn.Linear(20*36,30), nn.ReLU(), nn.Linear(30,5)).eval()

X = torch.randn(1,3,6,6)
l1 = as_criterion('l1')

# counts and nesting, on any scores

layer = st.lists(st.sampled_from([0., .5, 1., 1., 2., 3.5, 7.]), min_size=1, max_size=20)
many = st.lists(layer, min_size=1, max_size=5)
caps = dict(min_keep=st.integers(0, 4), max_ratio=st.sampled_from([.3, .5, .9, 1.]), round_to=st.sampled_from([1, 2, 3, 4, 8]))
contexts = st.sampled_from(['local', 'global', 'isomorphic'])
def named(layers): return {f"l{i}":torch.tensor(l, dtype=torch.float64) for i,l in enumerate(layers)}
def sets_of(s): return {n:len(v)%3 for n,v in s.items()}
def gone_of(keep): return {(n,u) for n,k in keep.items() for u in np.flatnonzero(~np.asarray(k))}

@given(layers=many, a=st.floats(0, 1), b=st.floats(0, 1), context=contexts, **caps)
@settings(deadline=None, max_examples=300)
def test_asked_more_it_removes_more(layers, a, b, context, min_keep, max_ratio, round_to):
    s = named(layers)
    how = dict(context=context, sets=sets_of(s), min_keep=min_keep, max_ratio=max_ratio, round_to=round_to)
    less,more = (allocate(s, f, **how) for f in sorted((a, b)))
    assert gone_of(less)<=gone_of(more)
    for n,k in more.items():
        stay = int(k.sum())
        assert stay==len(k) or stay%round_to==0
        assert stay>=min(min_keep, len(k)) and len(k)-stay<=floor(max_ratio*len(k)+1e-9)

@given(layers=many, f=st.floats(0, 1), context=contexts)
@settings(deadline=None, max_examples=200)
def test_counts_are_exact_in_each_set(layers, f, context):
    s = named(layers)
    of = sets_of(s) if context=='isomorphic' else {n:n if context=='local' else 0 for n in s}
    gone = gone_of(allocate(s, f, context=context, sets=of))
    for k in set(of.values()):
        own = [n for n in s if of[n]==k]
        assert sum(n in own for n,_ in gone)==floor(f*sum(len(s[n]) for n in own)+1e-9)

@given(layers=many, f=st.floats(0, 1), context=contexts, **caps)
@settings(deadline=None, max_examples=200)
def test_masks_are_beginnings_of_the_ranking(layers, f, context, min_keep, max_ratio, round_to):
    s = named(layers)
    of = sets_of(s) if context=='isomorphic' else {n:n if context=='local' else 0 for n in s}
    how = dict(context=context, sets=of, min_keep=min_keep, max_ratio=max_ratio, round_to=round_to)
    order,gone = ranked(s, **how),gone_of(allocate(s, f, **how))
    for k in set(of.values()):
        mine = [[(n,u) for u in us] for n,us in order if of[n]==k]
        left = {p for p in gone if of[p[0]]==k}
        for block in mine:
            if not left: break
            assert set(block)<=left
            left -= set(block)
        assert not left

def test_rounding_removes_as_much_as_blocks_allow():
    s = dict(a=torch.arange(16.), b=torch.arange(16.)+.5)
    keep = allocate(s, .5, context='global', round_to=8)
    assert [int(k.sum()) for k in keep.values()]==[8, 8]
    assert [int(k.sum()) for k in allocate(s, .6, context='global', round_to=8).values()]==[8, 8] # 19 of 32: a third block does not fit
    assert [int(k.sum()) for k in allocate(dict(a=torch.arange(20.)), .9, round_to=8, min_keep=1).values()]==[8] # 4, then 8
    assert [int(k.sum()) for k in allocate(dict(a=torch.arange(5.)), .9, round_to=8, min_keep=1).values()]==[5] # smaller than a block

# in a network

@given(a=st.floats(.05, 1), kind=st.sampled_from(['params', 'macs', 'memory']), context=st.sampled_from(['global', 'isomorphic']), **{**caps, 'min_keep':st.integers(1, 4)})
@settings(deadline=None, max_examples=30)
def test_a_budget_holds_and_keeps_caps(a, kind, context, min_keep, max_ratio, round_to):
    m = net()
    c = couple(m, X)
    how = Selection(None, l1, budget=Budget(**{kind:a}), context=context, min_keep=min_keep, max_ratio=max_ratio, round_to=round_to)
    costs = Costs(c, (kind,))
    whole = costs(np.zeros(c.labels.size, bool))[kind]
    least = costs(labels_of(c, choose(m, c, replace(how, sparsity=1., budget=None))))[kind]
    if least>a*whole:
        with pytest.raises(ValueError, match=f"cannot be met .{kind}: "): choose(m, c, how)
        return
    keep = choose(m, c, how)
    assert costs(labels_of(c, keep))[kind]<=a*whole
    for n,k in keep.items():
        stay = int(k.sum())
        assert (stay==len(k) or stay%round_to==0) and stay>=min(min_keep, len(k)) and len(k)-stay<=floor(max_ratio*len(k)+1e-9)

def test_isomorphic_ranks_the_same_shapes_together():
    m = nn.Sequential(*[l for i in range(4) for l in (nn.Conv2d(3 if i==0 else 24, 24, 3, padding=1), nn.ReLU())], nn.Conv2d(24,5,1)).eval()
    with torch.no_grad(): m[2].weight *= .01
    c = couple(m, X)
    sets = isomorphic_sets(m, c.groups)
    assert sets=={'0':'0', '2':'2', '4':'2', '6':'6'} # the first reads images, the last is read by another kind of layer
    keep = choose(m, c, Selection(.5, l1, context='isomorphic'))
    for k in set(sets.values()):
        own = [n for n in keep if sets[n]==k]
        assert sum(int((~keep[n]).sum()) for n in own)==sum(len(keep[n]) for n in own)//2
    assert int(keep['2'].sum())<int(keep['4'].sum())

def test_importance_per_cost():
    m = net()
    c = couple(m, X)
    scores,costs = group_scores(m, c.groups, l1),unit_costs(c, c.groups, 'macs')
    keep = choose(m, c, Selection(.5, l1, context='global', normalizer='none', per='macs'))
    rate = {(n,u):float(scores[n][u]/costs[n][u]) for n in scores for u in range(len(scores[n]))}
    gone = gone_of(keep)
    assert len(gone)==len(rate)//2 and max(rate[p] for p in gone)<=min(r for p,r in rate.items() if p not in gone and keep[p[0]].sum()>1) # one of each group stays in any case

def test_unit_costs_are_what_goes():
    "Each unit's cost is the difference that a plan makes without it, units of several sizes included"
    class Cat(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Conv2d(3,6,1),nn.Conv2d(3,4,3,padding=1),nn.Conv2d(10,2,1)
        def forward(self, x): return self.c(torch.cat([self.a(x), self.b(x)], 1))
    for m in (net(), Cat(), resnet18(num_classes=5)):
        x = torch.randn(1,3,32,32) if not isinstance(m, nn.Sequential) else X
        c = couple(m, x)
        costs,nothing = Costs(c, ('params','macs','memory')),np.zeros(c.labels.size, bool)
        whole = costs(nothing)
        for k in whole:
            for n,v in unit_costs(c, c.groups, k).items():
                for u in {0, len(v)//2, len(v)-1}:
                    gone = nothing.copy()
                    gone[c.by_name[n].labels[u]] = True
                    assert v[u]==whole[k]-costs(gone)[k]>=0

@pytest.mark.parametrize('context', ['local', 'global', 'isomorphic'])
def test_widths_are_multiples(context):
    m = net()
    Pruner(m, X).prune(.5, context=context, round_to=8, verify=False)
    assert {l.out_channels for l in m if isinstance(l, nn.Conv2d)}<={8, 16, 24, 20} and m[13].out_features in (8, 16, 24, 30)
    assert sum(p.numel() for p in m.parameters())<sum(p.numel() for p in net().parameters())

# layers by name and type

def test_layers_by_type():
    m = net()
    assert layers_of(m, nn.Linear, 'only')==['13', '15'] and layers_of(m, [nn.Linear, '0'], 'only')==['13', '15', '0'] and layers_of(m, None, 'only') is None
    for kw,cut in ((dict(ignore=nn.Linear), {'0', '3', '6', '9'}), (dict(only=nn.Linear), {'13'}), (dict(ignore=[nn.Linear, '0']), {'3', '6', '9'}), (dict(only=[nn.Conv2d, '13'], ignore='3'), {'0', '6', '9', '13'})):
        assert {n for n,_,_ in Pruner(m, X, **kw).plan(.5).rows()}==cut, kw

def test_a_type_means_all_that_is_inside():
    m = nn.Sequential(nn.Linear(6,16), nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), nn.Linear(16,3)).eval()
    x = torch.randn(2,5,6)
    rows = lambda **kw: {n for n,_,_ in Pruner(m, x, **kw).plan(.5).rows()}
    assert any('linear1' in n for n in rows()) and not any(n.startswith('1.') for n in rows(ignore=nn.TransformerEncoderLayer))
    c = couple(m, x)
    assert not any(is_of(g, layers_of(m, nn.MultiheadAttention, 'ignore')) for g in c.groups if 'linear1' in g.name)

@pytest.mark.parametrize('kw,text', [
    (dict(ignore='layr1'), "ignore: no layer 'layr1'; did you mean 'layer1'?"), (dict(only=nn.LSTM), "only: no layer of type 'LSTM'"), (dict(ignore=3), 'ignore takes names and types of layers'),
    (dict(only=[3]), "only takes names and types of layers"), (dict(ignore=[int]), "ignore takes names and types of layers")])
def test_unknown_layers_are_refused(kw, text):
    with pytest.raises((ValueError, TypeError), match=text): Pruner(resnet18(), torch.randn(1,3,32,32), **kw)

# names, while what cannot be cut is found out

class Picky(nn.Module):
    "Its code wants eight channels of `a`"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = nn.Conv2d(3,8,1),nn.Conv2d(8,8,1),nn.Conv2d(8,4,1)
    def forward(self, x):
        x = self.a(x).relu()
        if x.shape[1]!=8: raise ValueError('eight')
        return self.c(self.b(x*2).relu())

class FourHeads(nn.Module):
    "Its code wants four heads"
    def __init__(self): super().__init__(); self.qkv,self.out = nn.Linear(6,48),nn.Linear(16,6)
    def forward(self, x):
        q,k,v = self.qkv(x).view(len(x), -1, 3, 4, 4).permute(2, 0, 3, 1, 4)
        a = (q@k.transpose(-2, -1)).softmax(-1)
        if a.shape[1]!=4: raise ValueError('four')
        return self.out((a@v).transpose(1, 2).flatten(2))

def test_named_groups_that_a_dry_run_pins_are_left_out():
    m = Picky().eval()
    P = Pruner(m, X)
    P.couple()
    assert {'a','b'}==set(P.coupling.by_name) # both can be named
    plan = P.plan({'a':.5, 'b':.25})
    assert plan.rows()==[('b', 8, 6)] and any(n=='a' and 'eight' in why for n,_,_,why in plan.pins)
    P.prune({'a':.5, 'b':.25})
    assert m(X).isfinite().all() and (m.a.out_channels,m.b.out_channels)==(8,6)
    only = Pruner(Picky(), X)
    assert not only.plan({'a':.5}).edits
    with pytest.warns(NoEffectWarning, match='left alone: .*eight'): only.prune({'a':.5})
    with pytest.raises(ValueError, match="no group 'd'"): P.plan({'a':.5, 'd':.5})
    with pytest.raises(ValueError, match="'c' cannot be pruned: the output of the model keeps its shape"): P.plan({'a':.5, 'c':.5})

def test_named_groups_that_get_another_name():
    m,x = FourHeads().eval(),torch.randn(2,5,6)
    P = Pruner(m, x)
    P.couple()
    names = set(P.coupling.by_name)
    assert any('[outer]' in n for n in names)
    r = P.prune({n:.5 for n in names})
    now = {g.name for g in P.coupling.groups}
    assert now=={'qkv'} and r.removed==2 and r.error<1e-10 and m(x).shape==(2,5,6) # the width of the heads, which has the name for itself

# warnings

def lopsided():
    m = net()
    with torch.no_grad(): m[3].weight[:23] *= .001
    return m

def test_a_nearly_emptied_group_is_named():
    with pytest.warns(PruningWarning, match=r"next to nothing stays of '3' \(1 of 24\).*max_ratio="): plan = Pruner(lopsided(), X).plan(.25, context='global')
    assert [k.name for k in nearly_emptied(plan)]==['3']
    with warnings.catch_warnings():
        warnings.simplefilter('error', PruningWarning)
        capped = Pruner(lopsided(), X).plan(.25, context='global', max_ratio=.5)
        Pruner(net(), X).plan(.95, context='global') # all of it is small
        Pruner(net(), X).plan({'3':.95}) # asked for
    assert dict((n, b) for n,_,b in capped.rows())['3']==12 and capped.removed==plan.removed

def test_a_warning_changes_nothing():
    m = lopsided()
    with pytest.warns(PruningWarning): Pruner(m, X).prune(.25, context='global')
    assert m[3].out_channels==1 and m(X).isfinite().all()

# refusals, when the choice is made

@pytest.mark.parametrize('kw,text', [
    (dict(round_to=0), 'round_to is a whole number of units, at least 1, not 0'), (dict(round_to=True), 'round_to is a whole number'), (dict(round_to=8.), 'round_to is a whole number'),
    (dict(per='flops'), "per: no cost 'flops'; choose from 'params', 'macs', or None"), (dict(context='isomorph'), "no context 'isomorph'; did you mean 'isomorphic'?"),
    (dict(min_keep=0), 'min_keep is at least 1 for pruning'), (dict(max_ratio=90), 'max_ratio is a fraction'), (dict(sparsity=50), 'did you mean 0.5'), (dict(sparsity={}), 'empty dict'),
    (dict(sparsity={'3':.5}, context='isomorphic'), "takes one sparsity, not {'3': 0.5}"), (dict(sparsity={'3':.5}, context='global'), "takes one sparsity"),
    (dict(granularity='kernel'), "'filter' or 'shared_kernel'"), (dict(normalizer='men'), "no normalizer 'men'; did you mean 'mean'"), (dict(sparsity=None), 'give a sparsity or a budget'),
    (dict(budget=Budget(macs=.5)), 'not both'), (dict(sparsity=None, budget=.5), r'Budget\(macs=0.5\)')])
def test_refused_when_made(kw, text):
    with pytest.raises((ValueError, TypeError), match=text): Selection(**{**dict(sparsity=.5, criterion=l1), **kw})

def test_prices_need_importances():
    m = net()
    with pytest.raises(ValueError, match='per= divides importances by costs'): choose(m, couple(m, X), Selection(.5, l1, context='global', normalizer='zscore', per='params'))

def test_a_sparsifier_does_not_know_shapes():
    with pytest.raises(ValueError, match="only a Pruner knows.*'local', 'global'"): Sparsifier(net(), X, context='isomorphic')
