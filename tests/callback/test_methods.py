"Patience, rewinding, lottery tickets, soft pruning, SET and RigL: exact counts, exact states, nothing left behind"
import math, random
from functools import partial
import numpy as np
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.schedule import *  # fit_one_cycle
from fastai.callback.tracker import SaveModelCallback
from fastai.optimizer import Adam, OptimWrapper, SGD
from torch import nn
from fasterprune.callback.keep_zeros import KeepZeros
from fasterprune.callback.lottery import CheckpointCallback, lottery_ticket, checkpoint_of, rewind_
from fasterprune.callback.patience import Patience
from fasterprune.callback.regrow import RegrowCallback, drop_and_grow, drop_fraction, erk
from fasterprune.callback.sparsify import SparsifyCallback
from fasterprune.schedule import hold, linear
from support.small_fit import Spy, equal, fit, learner, quiet, weights

pytestmark = pytest.mark.filterwarnings('ignore')

def state(learn): return [{k:v.clone() if isinstance(v, torch.Tensor) else v for k,v in getattr(learn.opt, 'opt', learn.opt).state.get(p, {}).items()} for p in learn.model.parameters()]
def same_state(a, b): return len(a)==len(b) and all(x.keys()==y.keys() and all(torch.equal(v, y[k]) if isinstance(v, torch.Tensor) else v==y[k] for k,v in x.items()) for x,y in zip(a, b))
def zero_filters(m): return [int((l.weight.flatten(1)==0).all(1).sum()) for l in m.modules() if isinstance(l, (nn.Conv2d, nn.Linear))]

# ---- patience

def test_waiting_is_what_a_loop_says():
    g = random.Random(0)
    for _ in range(300):
        how,n = Patience(g.randint(1, 3), g.randint(1, 6), g.choice([0., .1]), at_once=g.random()<.5),g.randint(1, 15)
        w,step,best,bad,got,want = how.tracker(),0,math.inf,0,[],[]
        for e in range(n):
            seen = best<math.inf
            left,todo = n-e,how.steps-step
            k = None
            if todo and (bad>=how.patience or e==0 and how.at_once or left<=todo): k = step = max(step+1, how.steps-left+1); best,bad = math.inf,0
            want.append(k); got.append(w.next_step(left))
            loss = g.random()
            w.update(loss)
            if loss<best-how.min_delta: best,bad = loss,0
            else: bad += 1
        assert got==want and step==how.steps

def test_more_is_better_for_accuracy_and_nan_is_no_improvement():
    w = Patience(1, monitor='accuracy').tracker()
    for v in (.5, .6): w.update(v)
    assert w.bad==0
    w.update(float('nan')); assert w.bad==1
    assert Patience(monitor='f1', lower=True).less and not Patience(monitor='f1').less and Patience(monitor='error_rate').less

def test_sparsify_by_patience():
    cb = SparsifyCallback(.5, every=Patience(1, steps=2, min_delta=10.)) # no epoch is an improvement
    learn = fit(learner(), 8, cbs=cb)
    assert list(cb.history.epoch)==[2, 4] and zero_filters(learn.model)==[4,6,0] and list(cb.history.sparsity)==[5/20, .5]
    cb = SparsifyCallback(.5, criterion='taylor_w', every=Patience(9, steps=5), n_batches=1)
    assert zero_filters(fit(learner(), 2, cbs=cb).model)==[4,6,0]
    assert len(learn.metrics)==1

@pytest.mark.parametrize('n,end,at', [(8, 1., [5, 6, 7]), (8, .75, [4, 5, 6]), (8, .5, [2, 3, 4]), (4, .5, [0, 1, 2]), (3, .5, [0, 1]), (5, .01, [0, 1]), (1, 1., [0])])
def test_patience_has_an_end(n, end, at): # a loss that never rests: the last steps are taken by then
    cb = SparsifyCallback(.5, every=Patience(99, steps=3, end=end))
    learn = fit(learner(), n, cbs=cb)
    assert list(cb.history.epoch)==at and zero_filters(learn.model)==[4,6,0]

def test_steps_of_patience_are_equal_unless_a_schedule_says_otherwise():
    steps = lambda **kw: list(_run(SparsifyCallback(.6, every=Patience(9, steps=3), **kw)).history.requested)
    _run = lambda cb: (fit(learner(), 3, cbs=cb), cb)[1]
    assert steps()==pytest.approx([.6/4*2-.1, .4, .6]) and steps(schedule='agp')==pytest.approx([.6*(1-(2/3)**3), .6*(1-(1/3)**3), .6])

def test_dense_epochs_of_patience_do_not_count_as_best(tmp_path):
    best = SaveModelCallback('accuracy', every_epoch=False)
    learn = learner(tmp=tmp_path)
    fit(learn, 5, cbs=[cb := SparsifyCallback(.75, every=Patience(1, steps=2, min_delta=10., end=1.)), Spy('after_epoch', lambda l: l.recorder.values[-1].__setitem__(2, 1/(1+l.epoch)), order=SaveModelCallback.order-1), best])
    assert list(cb.history.epoch)==[2, 4] and best.best==pytest.approx(1/5) and zero_filters(learn.model)==[6,9,0]

# ---- moments

OPTS = dict(adam=Adam, sgd=partial(SGD, mom=.9), torch=partial(OptimWrapper, opt=torch.optim.AdamW))
@pytest.mark.parametrize('opt', OPTS)
def test_going_back_is_going_back(opt):
    learn,seen,r = learner(opt_func=OPTS[opt]),{},CheckpointCallback(1, epoch=1)
    def look(l):
        if l.training and l.epoch==1 and l.iter==1: seen.update(w=weights(l.model), s=state(l))
    fit(learn, 3, cbs=[r, Spy('before_batch', look)])
    assert r.checkpoint.step==4 and not equal(seen['w'], weights(learn.model))
    rewind_(learn, r.checkpoint)
    assert equal(seen['w'], weights(learn.model)) and same_state(seen['s'], state(learn))
    before = {n:t.clone() for n,t in r.checkpoint.model.items()}
    fit(learn, 1) # training on does not change the moment
    assert equal(before, r.checkpoint.model)

def test_masks_stay_when_the_weights_go_back():
    learn,r = learner(),CheckpointCallback()
    fit(learn, 1, cbs=r)
    fit(learn, 2, cbs=SparsifyCallback(.5))
    rewind_(learn, r.checkpoint)
    assert zero_filters(learn.model)==[4,6,0]
    w = learn.model[0].weight
    live = w.detach().flatten(1).any(1)
    assert torch.equal(w[live], r.checkpoint.model['0.weight'][live])

def test_moments_that_cannot_be():
    learn = learner()
    with pytest.raises(ValueError, match='no optimizer yet'): checkpoint_of(learn)
    learn.create_opt()
    m = checkpoint_of(learn)
    learn.prune(.5)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(4, 1, 3, 3\) now and had \(8, 1, 3, 3\)"): rewind_(learn, m)
    for k in (-1, 1.5, True):
        with pytest.raises(ValueError, match='step is a whole number'): CheckpointCallback(k)

# ---- lottery tickets

class Starts(Callback):
    "What each training begins with"
    order = -60
    def __init__(self): self.w,self.steps,self.lrs = [],[],[]
    def before_fit(self): self.steps.append(0)
    def before_step(self):
        if not self.steps[-1]: self.w.append(weights(self.learn.model)); self.lrs.append(self.learn.opt.hypers[-1]['lr'])
        self.steps[-1] += 1

@pytest.mark.parametrize('epoch,step', [(0,0), (1,0), (1,2)])
def test_ticket_with_rewound_weights(epoch, step):
    learn,s = learner(),Starts()
    with quiet(learn): rows = lottery_ticket(learn, .7, 3, 1e-2, fraction=.5, epoch=epoch, step=step, cbs=s)
    n,k = 72+864+120,epoch*3+step
    assert list(rows.sparsity)==[0., int(.5*n)/n, int(.7*n)/n] and s.steps==[9, 9-k, 9-k]
    ws = [torch.cat([learn.model[i].weight.flatten() for i in (0,4,9)])]
    assert int((ws[0]==0).sum())==int(.7*n)
    for a,b in zip(s.w[1:], s.w[2:]): # what survives begins each round alike: nested zeros, the same values elsewhere
        for key in ('0.weight', '4.weight', '9.weight', '0.bias'): assert torch.equal(b[key], torch.where(b[key]==0, 0., a[key]))
    assert s.lrs[1]==s.lrs[2] and (s.lrs[0]==s.lrs[1])==(k==0)
    if k==0: assert all(torch.equal(s.w[1][key], torch.where(s.w[1][key]==0, 0., s.w[0][key])) for key in ('0.weight', '4.weight', '9.weight'))

def test_ticket_with_a_rewound_learning_rate():
    learn,s,ends = learner(),Starts(),[]
    with quiet(learn): rows = lottery_ticket(learn, .5, 3, 1e-2, fraction=.5, rewind='lr', epoch=1, granularity='filter', context='local', cbs=[s, Spy('after_fit', lambda l: ends.append(weights(l.model)))])
    assert s.steps==[9, 6] and zero_filters(learn.model)==[4,6,0] and rows.sparsity.iloc[-1]==.5
    a,b = ends[0],s.w[1]
    assert all(torch.equal(b[k], torch.where(b[k]==0, 0., a[k])) for k in ('0.weight', '4.weight')) # weights go on
    assert len(learn.recorder.losses)==6 and all(np.isfinite(learn.recorder.losses))

@pytest.mark.parametrize('kw,text', [
    (dict(sparsity=70), 'did you mean 0.7'), (dict(fraction=0.), 'in (0, 1), not 0.0'), (dict(rewind='all'), "choose from 'weights', 'lr'"),
    (dict(fit='fit_twice'), "such as 'fit' or 'fit_one_cycle', not 'fit_twice'"), (dict(epoch=3), 'too late'), (dict(step=9), 'too late'), (dict(step=-1), 'at least 0')])
def test_ticket_refuses(kw, text):
    learn = learner()
    before = weights(learn.model)
    with pytest.raises((ValueError, TypeError)) as e: lottery_ticket(learn, **{**dict(sparsity=.5, n_epoch=3), **kw})
    assert text in e.value.args[0] and equal(before, weights(learn.model))

# ---- soft pruning

def test_soft_pruning_lets_filters_come_back():
    zero,alive = [],[]
    cb = SparsifyCallback(.5, criterion=torch.rand_like, schedule=hold(), regrow=True)
    where = lambda l: tuple((l.model[4].weight.flatten(1)==0).all(1).nonzero().flatten().tolist())
    learn = fit(learner(), 4, cbs=[cb, Spy('after_train', lambda l: zero.append(where(l))), Spy('after_train', lambda l: alive.append(where(l)), order=0)])
    assert all(len(z)==6 for z in zero) and alive==[()]*4 and len(set(zero))>1 and where(learn)==zero[-1]
    assert list(cb.history.sparsity)==[.5]*4 and [v[3] for v in learn.recorder.values]==[.5]*4
    for p in (learn.model[4].bias, learn.model[5].weight, learn.model[5].bias): assert tuple((p==0).nonzero().flatten().tolist())==zero[-1] # in the end whole filters
    x = learn.dls.one_batch()[0]
    want = learn.model.eval()(x)
    assert learn.prune().removed==10 and torch.allclose(learn.model(x), want, rtol=1e-4, atol=1e-5)

def test_soft_pruning_on_a_schedule_and_another_fit_keeps():
    cb = SparsifyCallback(.5, schedule=linear(), regrow=True)
    learn = fit(learner(), 3, cbs=cb)
    assert list(cb.history.sparsity)==[0., 5/20, .5]
    before = zero_filters(learn.model)
    assert zero_filters(fit(learn, 1).model)==before==[4,6,0]

def test_soft_pruning_beside_another_callback():
    soft,hard,live = SparsifyCallback(.5, only='4', schedule=hold(), regrow=True),SparsifyCallback(.75, 'weight', only='9', schedule='one_shot', every=2),[]
    look = lambda l: live.append((int((l.model[4].weight.flatten(1)==0).all(1).sum()), int((l.model[9].weight==0).sum())))
    learn = fit(learner(), 3, cbs=[hard, soft, Spy('after_train', look, order=0)])
    assert live==[(0,0), (0,90), (0,90)] and zero_filters(learn.model)==[0,6,0] # neither holds for the other what is not its own

def test_soft_pruning_hears_what_a_criterion_needs_while_it_trains():
    runs = []
    cb = SparsifyCallback(.5, criterion='taylor_act', schedule=hold(), regrow=True, n_batches=2)
    learn = learner()
    fit(learn, 2, cbs=[cb, Spy('before_fit', lambda l: learn.model.register_forward_hook(lambda *a: runs.append(learn.training)))])
    assert zero_filters(learn.model)==[4,6,0] and runs==([True]*3+[False]*2)*2 # nothing runs for it alone

def test_best_epoch_of_soft_pruning_is_the_last(tmp_path): # those before have other zeros
    learn,seen = learner(tmp=tmp_path),[]
    fit(learn, 3, cbs=[SparsifyCallback(.5, criterion=torch.rand_like, schedule=hold(), regrow=True), Spy('after_epoch', lambda l: (l.recorder.values[-1].__setitem__(2, 1/(1+l.epoch)), seen.append(weights(l.model))), order=SaveModelCallback.order-1), SaveModelCallback('accuracy')])
    assert zero_filters(learn.model)==[4,6,0] and equal(seen[-1], weights(learn.model))

def test_dense_sparse_dense_with_hard_switches():
    cb = SparsifyCallback(.5, schedule=hold(0).then(hold(1).then(hold(0)), at=1/3))
    learn = fit(learner(), 6, cbs=cb)
    assert [v[3] for v in learn.recorder.values]==[0, 0, .5, .5, 0, 0] and zero_filters(learn.model)==[0,0,0]
    assert zero_filters(fit(learn, 1).model)==[0,0,0]

# ---- sparse all along

def test_erk():
    shapes = dict(a=(64,3,3,3), b=(64,64,3,3), c=(128,64,3,3), d=(10,128))
    assert [1-v for v in erk(shapes, .9).values()]==pytest.approx([1, .09144, .06756, 1], abs=1e-5)
    n = {k:math.prod(v) for k,v in shapes.items()}
    for s in (0., .05, .3, .5, .8, .95, .99):
        e = erk(shapes, s)
        assert sum(e[k]*n[k] for k in n)/sum(n.values())==pytest.approx(s, abs=1e-9) and all(0<=v<=1 for v in e.values())
    assert set(erk(shapes, 1.).values())=={1.}

def test_drop_and_grow_is_what_a_loop_says():
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        w,score = torch.randn(4, 5, generator=g),torch.rand(4, 5, generator=g)
        keep = torch.rand(4, 5, generator=g)<.5
        k = int(torch.randint(0, int(keep.sum())+1, (1,), generator=g))
        there = sorted(keep.flatten().nonzero().flatten().tolist(), key=lambda i: -abs(w.flatten()[i]))
        stay = there[:len(there)-k]
        grow = sorted(set(range(20))-set(stay), key=lambda i: -score.flatten()[i])[:k]
        new = drop_and_grow(w, keep, score, k)
        assert sorted(new.flatten().nonzero().flatten().tolist())==sorted(stay+grow) and new.sum()==keep.sum()
    with pytest.raises(ValueError, match='of the'): drop_and_grow(w, keep, score, 99)
    assert drop_fraction(0.)==.3 and drop_fraction(1.)==0. and drop_fraction(.5)==pytest.approx(.15)

@pytest.mark.parametrize('grow', ['gradient', 'random'])
def test_regrow_keeps_the_number_of_weights(grow):
    seen,grown = [],[]
    cb = RegrowCallback(.8, grow=grow, every=2, density='uniform', fraction=.4)
    masks = lambda l: {n:k.clone() for n,k in cb.masks.keep.items()}
    def look(l):
        seen.append(masks(l))
        for n,k in seen[-1].items(): assert not l.model.get_parameter(n)[~k].any()
        if len(seen)>1:
            for n in seen[-1]:
                new = seen[-1][n]&~seen[-2][n]
                if not new.any(): continue
                grown.append(n)
                if grow=='gradient': # the step is left out: what came is zero, and the optimizer knows nothing of it
                    p = l.model.get_parameter(n)
                    assert not p[new].any() and all(not v[new].any() for v in l.opt.state[p].values() if isinstance(v, torch.Tensor) and v.shape==p.shape)
    learn = fit(learner(), 4, cbs=[cb, Spy('after_step', look)])
    want = {'0.weight':72-int(.8*72), '4.weight':864-int(.8*864+1e-9), '9.weight':120-96}
    assert all({n:int(k.sum()) for n,k in m.items()}==want for m in seen) and set(grown)==set(want)
    assert cb.changes==4 and all(torch.equal(seen[9][n], seen[11][n]) for n in want) # nothing changes after three quarters
    assert len(learn.metrics)==1 and len([c for c in learn.cbs if isinstance(c, KeepZeros)])==1
    assert list(learn.recorder.metric_names)[-2]=='sparsity' and learn.recorder.values[-1][-1]==pytest.approx(1-sum(want.values())/1056, abs=.02)

def test_regrow_grows_where_the_gradient_is_largest():
    got = []
    cb = RegrowCallback(.5, every=3, only='9')
    def before(l):
        if cb.state_dict()['steps']%3!=2 or got: return
        w = l.model[9].weight
        got.append((w.detach().clone(), w.grad.clone(), cb.masks.keep['9.weight'].clone()))
    fit(learner(), 2, cbs=[cb, Spy('before_step', before, order=cb.order-1), Spy('after_step', lambda l: got.append(cb.masks.keep['9.weight'].clone()) if len(got)==1 and cb.changes else None)])
    (w,g,keep),new = got[:2]
    k = int(drop_fraction(2/6/.75)*60+1e-9)
    assert torch.equal(new, drop_and_grow(w, keep, g.abs(), k)) and int((new&~keep).sum())>0

@pytest.mark.parametrize('f,text', [
    (lambda: RegrowCallback(80), 'did you mean 0.8'), (lambda: RegrowCallback(.8, grow='grad'), "'gradient', 'random'"), (lambda: RegrowCallback(.8, every=0), 'optimizer steps'),
    (lambda: RegrowCallback(.8, density='erdos'), "'erk', 'uniform'"), (lambda: RegrowCallback(.8, fraction=30), 'did you mean 0.3'), (lambda: SparsifyCallback(.5, schedule='agpp'), "did you mean 'agp'"),
    (lambda: SparsifyCallback(.5, every=3, regrow=True), "takes every='epoch', not 3"), (lambda: SparsifyCallback(.5, every=Patience(), regrow=True), "takes every='epoch', not Patience("), (lambda: SparsifyCallback(.5, regrow='yes'), "regrow is True or False, not 'yes'"), (lambda: SparsifyCallback(.5, every='batch'), 'a number of training batches or a Patience'),
    (lambda: Patience(0), 'patience is a whole number'), (lambda: Patience(steps=0), 'steps is a whole number'), (lambda: Patience(min_delta=-1.), 'min_delta is a number'), (lambda: Patience(monitor=3), 'monitor is the name'), (lambda: Patience(end=0.), 'end is a part of the training'), (lambda: Patience(end=75), 'did you mean 0.75')])
def test_refusals(f, text):
    with pytest.raises((ValueError, TypeError)) as e: f()
    assert text in e.value.args[0]

def test_regrow_of_shared_and_of_computed_weights():
    def tied():
        m = nn.Sequential(nn.Flatten(), nn.Linear(64,64), nn.ReLU(), nn.Linear(64,64), nn.ReLU(), nn.Linear(64,10))
        m[3].weight = m[1].weight
        return m
    cb = RegrowCallback(.5, every=2, density='uniform')
    learn = fit(learner(tied), 2, cbs=cb)
    assert set(cb.masks.keep)=={'1.weight', '5.weight'} and int((~cb.masks.keep['1.weight']).sum())==2048 and not learn.model[3].weight[~cb.masks.keep['1.weight']].any()
    with pytest.raises(Exception, match="'1' is computed from other parameters"): fit(learner(lambda: nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64,10)))), cbs=RegrowCallback(.5))

def test_soft_pruning_when_the_same_callback_trains_again():
    learn,cb = learner(),SparsifyCallback(.5, schedule=linear(), regrow=True)
    fit(learn, 2, cbs=cb)
    fit(learn, 2, cbs=cb)
    assert zero_filters(learn.model)==[4,6,0] and cb.masks.sparsity==.5
