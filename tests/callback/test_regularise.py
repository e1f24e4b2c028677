"Regularisers: the same as autograd of the penalty says, the proximal step solves its problem, what is zero can be removed without a change"
from functools import partial
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import SGD
from torch import nn
from fasterprune.callback.prune_callback import PruneCallback
from fasterprune.callback.growing import GrowingCallback, Growth, growing_l2_
from fasterprune.callback.regularise import GroupLassoCallback, GroupSparsityCallback, SlimmingCallback, Units, decay_factors, group_decay_, group_lasso, group_lasso_, scale_l1_, scales_of
from fasterprune.data import small_resnet
from fasterprune.sparse.sparsifier import Sparsifier
from support.small_fit import Spy, fit, learner, tiny

pytestmark = pytest.mark.filterwarnings('ignore')

def shaken(make=tiny, dtype=torch.float64): # with values that differ, also in the normalisations
    torch.manual_seed(1)
    m = make().to(dtype)
    with torch.no_grad():
        for p in m.parameters(): p.add_(torch.randn_like(p)*.3)
    return m

X = torch.zeros(2, 1, 8, 8)
def grads(m): return {n:p.grad.clone() for n,p in m.named_parameters()}
def seeded_grads(m): [setattr(p, 'grad', torch.randn_like(p)) for p in m.parameters()]; return grads(m)

def naive_units(m, reads=False): # of `tiny`, said by hand: lists of slices, each a view
    res = {}
    for conv,bn,reader in (('0','1',m[4].weight), ('4','5',m[9].weight)):
        c,b = m[int(conv)],m[int(bn)]
        res[conv] = [[c.weight[i], c.bias[i:i+1], b.weight[i:i+1], b.bias[i:i+1]]+[reader[:,i]]*reads for i in range(len(c.weight))]
    return res

# ---- slimming

def test_scales_and_their_subgradient():
    m = shaken()
    assert list(scales_of(m))==['1.weight','5.weight'] and list(scales_of(m, ignore='1'))==['5.weight']
    assert not scales_of(nn.Sequential(nn.Linear(2,2), nn.BatchNorm1d(2, affine=False)))
    before = seeded_grads(m)
    want = torch.autograd.grad(.3*sum(p.abs().sum() for p in scales_of(m).values()), list(scales_of(m).values()))
    scale_l1_(scales_of(m).values(), .3)
    for (n,p),w in zip(scales_of(m).items(), want): assert torch.allclose(p.grad, before[n]+w)
    assert all(torch.equal(p.grad, before[n]) for n,p in m.named_parameters() if n not in scales_of(m))

def test_slimming_adds_exactly_its_subgradient_after_clipping():
    seen = {}
    cbs = [GradientClip(.1), SlimmingCallback(.5), Spy('before_step', lambda l: seen.setdefault('before', grads(l.model)), order=GradientClip.order+.5), Spy('before_step', lambda l: seen.setdefault('after', grads(l.model)))]
    learn = learner()
    scales = {n:p.detach().sign().clone() for n,p in scales_of(learn.model).items()}
    fit(learn, 1, cbs=cbs)
    for n,g in seen['after'].items(): assert torch.allclose(g, seen['before'][n]+.5*scales.get(n, 0.))
    with pytest.raises(Exception, match='no normalisation with a scale'): fit(learner(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64,10))), cbs=SlimmingCallback())

# ---- units

@pytest.mark.parametrize('reads', [False, True])
def test_units_are_what_one_would_say_by_hand(reads):
    m = shaken()
    u,naive = Units(m, X.double(), reads=reads),naive_units(m, reads)
    assert u.n=={'0':8, '4':12}
    for g,us in naive.items():
        assert torch.allclose(u.squares()[g], torch.stack([sum(t.square().sum() for t in ts) for ts in us]))
        assert u.sizes[g].tolist()==[sum(t.numel() for t in ts) for ts in us]

def test_units_of_a_residual_network_are_all_layers_together():
    m = shaken(partial(small_resnet, width=4))
    u = Units(m, X.double())
    s = Sparsifier(m, X.double())
    assert u.n==s.totals
    for g in s.units.groups:
        for i in range(g.n):
            keep = s.units.spread({h.name:torch.ones(h.n, dtype=torch.bool) if h.name!=g.name else torch.arange(g.n)!=i for h in s.units.groups})
            got = sum(float(m.get_parameter(n)[~k.expand(m.get_parameter(n).shape)].square().sum()) for n,k in keep.items())
            assert float(u.squares()[g.name][i])==pytest.approx(got) # what the masks of this unit would set to zero

def test_only_and_ignore():
    m = tiny()
    assert set(Units(m, X, only='0').n)=={'0'} and set(Units(m, X, ignore='0').n)=={'4'}
    with pytest.raises(ValueError, match='no unit to make small'): Units(m, X, only='9')

# ---- group lasso

def test_the_proximal_step_solves_its_problem():
    m = shaken()
    u = Units(m, X.double())
    old,t = {n:p.detach().clone() for n,p in m.named_parameters()},.12
    objective = lambda: float(sum(.5*(p-old[n]).square().sum() for n,p in m.named_parameters())+t*group_lasso(u))
    naive = {g:[(sum(float(x.square().sum()) for x in ts)**.5, sum(x.numel() for x in ts)) for ts in us] for g,us in naive_units(m).items()}
    group_lasso_(u, t)
    for g,us in naive.items():
        for (norm,n),now in zip(us, u.squares()[g].sqrt().tolist()): assert now==pytest.approx(max(norm-t*n**.5, 0), abs=1e-9)
    best = objective()
    for _ in range(30): # no small change is better
        now = {n:p.detach().clone() for n,p in m.named_parameters()}
        with torch.no_grad():
            for p in m.parameters(): p.add_(torch.randn_like(p)*1e-3)
        assert objective()>=best-1e-12
        with torch.no_grad():
            for n,p in m.named_parameters(): p.copy_(now[n])
    assert torch.equal(m[9].weight, old['9.weight'])

def test_units_that_arrive_at_zero_can_be_removed():
    learn = fit(learner(), 1)
    u = Units(learn.model, X)
    group_lasso_(u, float(torch.cat([v.sqrt()/u.sizes[g].sqrt() for g,v in u.squares().items()]).median())*1.001)
    zero = {g:int((s==0).sum()) for g,s in Units(learn.model, X).squares().items()}
    n = sum(zero.values())
    assert n==10
    x = learn.dls.one_batch()[0]
    want = learn.model.eval()(x)
    assert learn.prune().removed==n and torch.allclose(learn.model(x), want, rtol=1e-4, atol=1e-5)

def test_the_callback_shrinks_by_the_learning_rate_and_goes_on_after_a_cut():
    seen = []
    cb = GroupLassoCallback(.5)
    learn = learner(opt_func=partial(SGD))
    def before(l): seen.append((Units(l.model, X).squares()['0'].sqrt(), Units(l.model, X).sizes['0'].sqrt()))
    fit(learn, 1, .1, cbs=[cb, Spy('after_step', before, order=0), Spy('after_step', before)])
    for (a,n),(b,_) in zip(seen[::2], seen[1::2]): assert torch.allclose(b, (a-.05*n).clamp(min=0), atol=1e-5)
    learn = learner()
    p = PruneCallback()
    fit(learn, 4, cbs=[GroupLassoCallback(2.), p])
    assert p.measured_removed()>0 and all(r.law=='masks' for r in p.reports) and len(learn.metrics)==1
    assert list(learn.recorder.metric_names)[4]=='zero_units'

# ---- growing

def test_growth():
    g = Growth(.6, every=2)
    assert [g(i, 6) for i in range(8)]==pytest.approx([0, 0, .2, .2, .4, .4, .6, .6]) and Growth()(0, 1)==0. and Growth()(5, 1)==1.
    for n in (1, 4, 5, 100): assert Growth(2., every=5)(10*n+10, n)==2.

def test_growing_l2_is_the_gradient_of_its_penalty():
    m = shaken()
    before,masks = seeded_grads(m),Sparsifier(m, X.double()).masks(.5)
    params = {n:m.get_parameter(n) for n in masks.keep}
    want = torch.autograd.grad(.5*.7*sum((p*~masks.keep[n]).square().sum() for n,p in params.items()), list(params.values()))
    growing_l2_(m, masks, .7)
    for (n,p),w in zip(params.items(), want): assert torch.allclose(p.grad, before[n]+w)
    assert torch.equal(m[9].weight.grad, before['9.weight'])

@pytest.mark.parametrize('pick', [0., .2])
def test_growing_ends_at_the_target(pick):
    chosen = []
    cb = GrowingCallback(.5, growth=Growth(1., every=1), pick=pick, end=.7)
    learn = fit(learner(), 5, cbs=[cb, Spy('after_step', lambda l: chosen.append((cb.masks is not None, round(cb.strength, 3))))])
    zero = [int((learn.model[i].weight.flatten(1)==0).all(1).sum()) for i in (0,4,9)]
    assert zero==[4,6,0] and cb.masks.sparsity==.5 and len(learn.metrics)==1
    assert [c for c,_ in chosen]==[s>=pick for _,s in chosen] and chosen[0][1]==0. and max(s for _,s in chosen)>=.9
    names = list(learn.recorder.metric_names)[4:7]
    assert names==['strength','fading','sparsity'] and [v[-1] for v in learn.recorder.values][-1]==.5 and learn.recorder.values[0][-1]==0.
    assert learn.prune().removed==10

def test_growing_single_weights():
    cb = GrowingCallback(.75, 'weight', 'global', growth=Growth(1., every=1))
    learn = fit(learner(), 4, cbs=cb)
    assert sum(int((learn.model[i].weight==0).sum()) for i in (0,4,9))==int(.75*1056)

def test_what_was_chosen_fades():
    cb = GrowingCallback(.5, growth=Growth(5., every=1), end=.9)
    learn = fit(learner(opt_func=partial(SGD)), 8, .1, cbs=cb)
    fading = [v[4] for v in learn.recorder.values]
    assert fading[-2]<.5*fading[0] and fading[-1]==0.

# ---- group sparsity

def test_decay_factors():
    f = decay_factors(dict(a=torch.tensor([1., 2., 3.]), b=torch.tensor([2., 2.])))
    assert f['a'].tolist()==pytest.approx([16, 4, 1]) and f['b'].tolist()==[1., 1.]
    assert decay_factors(dict(a=torch.tensor([0., 1.])), alpha=0.)['a'].tolist()==[1., 1.]

def test_group_decay_is_the_gradient_of_its_penalty():
    m = shaken()
    before,naive = seeded_grads(m),naive_units(m, reads=True)
    factors = decay_factors({g:torch.stack([sum(t.square().sum() for t in ts) for ts in us]).sqrt().detach() for g,us in naive.items()})
    penalty = sum(.5*f*sum(t.square().sum() for t in ts) for g,us in naive.items() for f,ts in zip(factors[g], us))
    want = torch.autograd.grad(.01*penalty, list(m.parameters()), allow_unused=True)
    group_decay_(Units(m, X.double(), reads=True), .01)
    for (n,p),w in zip(m.named_parameters(), want): assert torch.allclose(p.grad, before[n]+(0. if w is None else w)), n

def test_group_sparsity_opens_a_gap():
    spread = lambda l: torch.cat([s.sqrt()/s.sqrt().mean() for s in Units(l.model, X, reads=True).squares().values()])
    a,b = fit(learner(opt_func=partial(SGD)), 4, .1),fit(learner(opt_func=partial(SGD)), 4, .1, cbs=GroupSparsityCallback(.05))
    assert spread(b).min()<.9*spread(a).min() and spread(b).std()>spread(a).std()

# ---- in company, and refused

@pytest.mark.parametrize('make', [lambda: SlimmingCallback(.1), lambda: GroupSparsityCallback(.1), lambda: GrowingCallback(.5, growth=Growth(1., every=1))])
def test_steps_that_only_accumulate_add_nothing(make):
    n = []
    class Count(Callback):
        order = 99
        def before_step(self): n.append(1)
    learn,cb = learner(),make()
    fit(learn, 2, cbs=[GradientAccumulation(10**6), cb])
    other = fit(learner(), 2, cbs=GradientAccumulation(10**6))
    if not isinstance(cb, GrowingCallback): assert all(torch.equal(p, q) for p,q in zip(learn.model.parameters(), other.model.parameters()))
    else: assert cb.state_dict()['step']==0

@pytest.mark.parametrize('f,text', [
    (lambda: SlimmingCallback(-1), 'strength is a number, at least 0, not -1'), (lambda: SlimmingCallback(True), 'not True'), (lambda: GroupLassoCallback(float('inf')), 'not inf'),
    (lambda: GroupSparsityCallback(alpha='4'), "alpha is a number, at least 0, not '4'"), (lambda: GrowingCallback(50), 'did you mean 0.5?'), (lambda: GrowingCallback(.5, growth=1.), 'growth is a Growth'),
    (lambda: GrowingCallback(.5, criterion='taylor_w'), 'chooses by weights'), (lambda: GrowingCallback(.5, pick=1.), 'below the ceiling 1.0'), (lambda: GrowingCallback(.5, end=0.), 'above 0'),
    (lambda: Growth(-1.), 'ceiling is a number'), (lambda: Growth(every=0), 'every is a number of optimizer steps'), (lambda: scales_of(tiny(), 'bn'), "no normalisation with a scale is called 'bn'; there are '1', '5'")])
def test_refused(f, text):
    with pytest.raises((ValueError, TypeError)) as e: f()
    assert text in e.value.args[0]
