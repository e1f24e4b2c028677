"PruneCallback: exact counts on the way, the optimizer and everything else go on, budgets are met, each cut is verified"
import random
from functools import partial
import numpy as np
import pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import *  # fit_one_cycle, fine_tune, lr_find
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.optimizer import Adam, OptimWrapper, SGD
from torch import nn
from torch.optim.swa_utils import AveragedModel
from fasterprune.callback.prune_callback import PruneCallback, next_cut
from fasterprune.callback.base import TrainingCallback, example_batch, reset_trackers
from fasterprune.callback.keep_zeros import KeepZeros
from fasterprune.callback.patience import Patience
from fasterprune.callback.sparsify import SparsifyCallback
from fasterprune.core import VerificationError, preserve_rng
from fasterprune.data import small_resnet
from fasterprune.schedule import agp, iterative, linear, one_shot
from fasterprune.sparse.sparsifier import Sparsifier
from fasterprune.surgery import transaction as operation
from fasterprune.surgery.planning.budget import Budget
from fasterprune.surgery.pruner import Pruner
from support.small_fit import Spy, equal, fit, learner, quiet, small_dls, tiny, weights

pytestmark = pytest.mark.filterwarnings('ignore')

def widths(m): return [l.weight.shape[0] for l in m.modules() if isinstance(l, nn.Conv2d)]
def at(epoch, f): return lambda l: f(l) if l.epoch==epoch and l.training else None

# ---- how much

def test_next_cut_is_exact_for_any_number_of_steps():
    for n in (1, 7, 30, 100):
        for s_end in (.1, .5, .9, 1.):
            for steps in (1, 3, 10):
                left = n
                for k in range(1, steps+1):
                    s = s_end*k/steps
                    f = next_cut({'a':torch.rand(left)}, {'a':n}, s).get('a', 0.)
                    left -= int(np.floor(f*left+1e-9))
                    assert left==max(n-int(np.floor(s*n+1e-9)), 1)

def test_next_cut_ranks_all_layers_and_caps_by_what_there_was():
    s = dict(a=torch.tensor([.1, .2, 3.]), b=torch.tensor([1., 2., 4., 5.]))
    assert next_cut(s, dict(a=5, b=5), .6, context='global')==dict(a=2/3, b=1/4) # 3 have gone, 6 shall
    assert next_cut(s, dict(a=5, b=5), .6, context='global', max_ratio=.6)==dict(a=1/3, b=2/4)
    assert next_cut(s, dict(a=5, b=5), .2)=={} # more have gone already
    assert next_cut(s, dict(a=3, b=4), dict(b=.5))==dict(b=.5)

@pytest.mark.parametrize('s', [.5, .3, {'0':.75, '4':.25}])
def test_each_epoch_has_exactly_what_the_schedule_says(s):
    seen = []
    cb = PruneCallback(s, schedule=linear())
    learn = fit(learner(), 5, cbs=[cb, Spy('after_epoch', lambda l: seen.append(widths(l.model)))])
    share = s if isinstance(s, dict) else {'0':s, '4':s}
    floor = lambda v: int(np.floor(v+1e-9))
    assert seen==[[8-floor(share['0']*k/4*8), 12-floor(share['4']*k/4*12)] for k in range(5)]
    assert cb.measured_removed()==1-sum(seen[-1])/20 and [round((1-r)*20) for r in cb.history.removed]==[sum(w) for w in seen]
    names = list(learn.recorder.metric_names)
    assert names==['epoch','train_loss','valid_loss','accuracy','removed','params','macs','time'] and len(learn.metrics)==1
    assert [v[3] for v in learn.recorder.values]==[1-sum(w)/20 for w in seen] and learn.recorder.values[-1][4]==sum(p.numel() for p in learn.model.parameters())
    again = Pruner(learn.model, cb.state_dict()['x']).prune(0.) # a fresh capture says the same
    assert learn.recorder.values[-1][5]==cb.history.macs.iloc[-1]==again.macs[0]

def test_sparsity_zero_is_no_callback():
    a,b = fit(learner(), 2),fit(learner(), 2, cbs=PruneCallback(0.))
    assert equal(weights(a.model), weights(b.model))

@pytest.mark.parametrize('context', ['global', 'isomorphic'])
def test_global_counts_and_caps(context):
    cb = PruneCallback(.6, context=context, schedule=linear(), max_ratio=.75)
    learn = fit(learner(partial(small_resnet, width=8)), 4, cbs=cb)
    n = sum(cb.whole['units'].values())
    now = {g.name:g.n for g in Pruner(learn.model, cb.state_dict()['x']).couple().groups if g.primary}
    gone = n-sum(now.values())
    assert int(.6*n+1e-9)-(3 if context=='isomorphic' else 0)<=gone<=.6*n+1e-9 # three sets of one shape, each rounded down
    assert all(now[g]>=k-int(.75*k+1e-9) for g,k in cb.whole['units'].items())
    assert all(h<=q+1e-9 for h,q in zip(cb.history.removed, cb.history.requested))

def test_heads_that_become_wider_than_deep_do_not_confuse_the_counts(): # from 8 to 2 dimensions in each of 4 heads, which swaps the finer of the two ways to cut
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(img_size=16, patch_size=8, in_chans=1, embed_dim=32, depth=1, num_heads=4, num_classes=10)
    cb = PruneCallback(.75, schedule=linear())
    fit(learner(lambda: model, dls=small_dls(32, size=16)), 4, 1e-3, cbs=cb)
    left,whole = cb.state_dict()['units'],cb.whole['units']
    assert list(cb.history.removed)==[0., .25, .5, .75]
    assert {n:left[n]/k for n,k in whole.items()}==dict.fromkeys(whole, .25)

# ---- it is learn.prune, at the right moment

def test_it_is_a_cut_by_hand():
    a = fit(learner(), 3, cbs=PruneCallback(.5, schedule=one_shot(.5)))
    b = fit(learner(), 3, cbs=Spy('before_train', lambda l: l.prune(.5) if l.epoch==1 else None))
    assert widths(a.model)==[4,6] and equal(weights(a.model), weights(b.model))

OPTS = dict(adam=Adam, sgd=partial(SGD, mom=.9), torch=partial(OptimWrapper, opt=torch.optim.AdamW))
@pytest.mark.parametrize('opt', OPTS)
def test_the_optimizer_goes_on(opt):
    seen = {}
    learn = learner(opt_func=OPTS[opt])
    states = lambda l: {n:{k:v.clone() for k,v in getattr(l.opt, 'opt', l.opt).state.get(p, {}).items() if isinstance(v, torch.Tensor)} for n,p in l.model.named_parameters()}
    def before(l): seen.update(opt=l.opt, ids=[id(p) for p in l.model.parameters()], state=states(l))
    def after(l): seen.update(after=states(l))
    cb = PruneCallback(.5, schedule=one_shot(.5))
    fit(learn, 3, cbs=[cb, Spy('before_train', at(1, before), order=0), Spy('before_train', at(1, after))])
    edits = {}
    for e in cb.reports[0].plan.edits: edits.setdefault(e.param, []).append(e)
    def cut(t, es):
        for e in es: t = t.index_select(e.dim, torch.tensor(e.keep))
        return t
    assert learn.opt is seen['opt'] and [id(p) for p in learn.model.parameters()]==seen['ids']
    for n,s in seen['after'].items():
        for k,v in s.items(): assert torch.equal(v, cut(seen['state'][n][k], edits.get(n, [])) if v.dim() else seen['state'][n][k])
    assert any(v.dim() for s in seen['after'].values() for v in s.values()) and len(learn.recorder.losses)==9

def test_a_cut_that_fails_is_taken_back(monkeypatch):
    learn = learner()
    monkeypatch.setattr(operation, 'relative_error', lambda *a: .5)
    seen = {}
    with pytest.raises(VerificationError, match='put back'): fit(learn, 3, cbs=[PruneCallback(.5, schedule=one_shot(.5)), Spy('before_train', lambda l: seen.update(w=weights(l.model)), order=0)])
    assert equal(seen['w'], weights(learn.model)) and widths(learn.model)==[8,12] and len(learn.metrics)==1
    monkeypatch.undo()
    assert widths(fit(learn, 3, cbs=PruneCallback(.5)).model)==[4,6]

def test_each_cut_is_verified():
    cb = PruneCallback(.5, schedule=linear())
    fit(learner(partial(small_resnet, width=4)), 4, cbs=cb)
    assert len(cb.reports)>=2 and all(r.law=='readers' and r.error<1e-10 for r in cb.reports)

# ---- budgets

@pytest.mark.parametrize('budget', [dict(macs=.4), dict(params=.5), dict(memory=.8, macs=.6), dict(params=5000)])
def test_budgets_are_met_on_the_way_and_in_the_end(budget):
    cb = PruneCallback(budget=Budget(**budget), schedule=linear())
    learn = fit(learner(partial(small_resnet, width=8)), 4, cbs=cb)
    whole = cb.whole['costs']
    for k,h in enumerate(cb.history.itertuples()):
        for kind in ('params', 'macs'):
            v = budget.get(kind)
            if v is not None: assert getattr(h, kind)<=whole[kind]-k/3*(whole[kind]-(v if v>1 else v*whole[kind]))+1e-6
    if 'params' in budget: assert sum(p.numel() for p in learn.model.parameters())<=(5000 if budget['params']>1 else whole['params']/2)
    assert cb.history.removed.iloc[-1]>0 and cb.history.requested.tolist()==[0,1/3,2/3,1]

def test_a_budget_in_time_approaches_by_what_was_measured(monkeypatch):
    asked,cb = [],PruneCallback(budget=Budget(latency=.4), schedule=linear())
    class R: removed,measured,macs = 1,type('M', (), dict(ratio=.9))(),(1,1); error = 0.; rows = lambda self: []
    learn = learner()
    learn.prune = lambda *a, budget, **k: asked.append(budget.latency) or R()
    fit(learn, 4, cbs=cb)
    assert asked==pytest.approx([.8/1, .6/.9, .4/.81])

# ---- when

@pytest.mark.parametrize('criterion', ['l1', 'taylor_w'])
def test_every_n_batches(criterion):
    seen,order = [],{}
    def note(key): return lambda l: order.setdefault(key, []).append(l.xb[0].sum().item()) if l.training else None
    fit(learner(), 3, cbs=Spy('before_batch', note('without')))
    cb = PruneCallback(.5, criterion=criterion, schedule=linear(), every=2, n_batches=2)
    learn = fit(learner(), 3, cbs=[cb, Spy('before_batch', note('with')), Spy('after_pred', lambda l: seen.append(sum(widths(l.model))) if l.training else None)])
    # updates before batches 0, 2, 4, 6 and 8 of 9, at 0, 1/8, 1/4, 3/8 and 1/2 of 8 and 12
    assert seen==[20, 20, 18, 18, 15, 15, 13, 13, 10] and order['with']==order['without']
    assert list(cb.history.progress)==[0, .25, .5, .75, 1]

def test_cut_short_epochs_end_at_the_target():
    learn = fit(learner(), 3, cbs=[PruneCallback(.5, schedule=linear(), every=2), ShortEpochCallback(.3)])
    assert widths(learn.model)==[4,6]

def test_patience():
    cb = PruneCallback(.5, schedule=linear(), every=Patience(1, steps=2, min_delta=10.)) # no epoch is an improvement
    learn = fit(learner(), 8, cbs=cb)
    assert list(cb.history.epoch)==[2, 4] and widths(learn.model)==[4,6]
    cb = PruneCallback(.5, schedule=linear(), every=Patience(5, steps=4))
    assert widths(fit(learner(), 2, cbs=cb).model)==[4,6] and list(cb.history.progress)==[.75, 1]
    with pytest.raises(Exception, match="no column 'accurac'; did you mean 'accuracy'"): fit(learner(), 2, cbs=PruneCallback(.5, every=Patience(monitor='accurac')))

def test_the_same_callback_twice_is_half_once():
    learn,cb = learner(),PruneCallback(.5)
    for _ in range(2): fit(learn, 2, cbs=cb)
    assert widths(learn.model)==[4,6]
    fit(learn, 2, cbs=PruneCallback(.5)) # another one begins with what there is
    assert widths(learn.model)==[2,3]

def test_on_board_and_learn_prune_is_still_there():
    learn = learner()
    learn.add_cb(PruneCallback(.5))
    fit(learn)
    assert widths(learn.model)==[4,6] and callable(learn.prune) and learn.prune(.25).removed==2

def test_resume():
    cb = PruneCallback(.5, schedule=linear())
    whole = fit(learner(), 5, cbs=cb)
    first = PruneCallback(.5, schedule=linear())
    class Stop(Callback):
        order = -50
        def before_epoch(self):
            if self.learn.epoch==3: raise CancelFitException
    half = fit(learner(), 5, cbs=[first, Stop()])
    assert widths(half.model)==[6,9]
    with pytest.raises(Exception, match='goes on at epoch 3.*whole='): fit(half, 5, cbs=PruneCallback(.5, schedule=linear()), start_epoch=3)
    fit(half, 5, cbs=PruneCallback(.5, schedule=linear(), whole=first.whole), start_epoch=3)
    assert equal(weights(half.model), weights(whole.model))

# ---- what is dead

def test_without_a_target_what_dies_goes():
    def kill(l):
        with torch.no_grad():
            for p in (l.model[0].weight, l.model[0].bias, l.model[1].weight, l.model[1].bias): p[:3] = 0
    seen = []
    cb = PruneCallback()
    learn = fit(learner(), 3, cbs=[cb, Spy('after_train', at(0, kill)), Spy('after_epoch', lambda l: seen.append(widths(l.model)))])
    assert seen==[[8,12],[5,12],[5,12]] and cb.reports[1].law=='masks' and cb.reports[1].error<1e-10

def test_a_branch_that_dies_goes_while_training_goes_on():
    def kill(l):
        with torch.no_grad():
            for m in (l.model.stage1.conv2, l.model.stage1.bn2): [p.zero_() for p in m.parameters()]
    cb = PruneCallback()
    learn = fit(learner(partial(small_resnet, width=4)), 3, cbs=[cb, Spy('after_train', at(1, kill))])
    assert cb.reports[-1].error<1e-10 and cb.history.params.iloc[-1]==sum(p.numel() for p in learn.model.parameters())<cb.history.params.iloc[0]
    assert len(learn.recorder.losses)==9 and all(np.isfinite(learn.recorder.losses)) and learn.prune(.25).error<1e-10

def test_masks_of_an_earlier_training_are_cut_along():
    learn = fit(learner(), 2, cbs=SparsifyCallback(.5, 'weight'))
    fit(learn, 2, cbs=PruneCallback(.25, schedule=one_shot(.5), ignore='4'))
    (keeper,) = [c for c in learn.cbs if isinstance(c, KeepZeros)]
    assert widths(learn.model)==[6,12]
    for n,k in keeper.masks.keep.items(): assert k.shape==learn.model.get_parameter(n).shape and not learn.model.get_parameter(n)[~k].any()
    assert int((learn.model[4].weight==0).sum())>0

# ---- company

COMPANY = dict(clip=lambda: [GradientClip()], accumulate=lambda: [GradientAccumulation(64)], mixup=lambda: [MixUp()], early=lambda: [EarlyStoppingCallback(patience=20)], plateau=lambda: [ReduceLROnPlateau()])
@pytest.mark.parametrize('name', COMPANY)
def test_company(name):
    learn = fit(learner(), 4, cbs=[PruneCallback(.5, schedule=linear(), every=2), *COMPANY[name]()])
    assert widths(learn.model)==[4,6] and len(learn.recorder.values)==4

def test_autocast():
    learn = fit(learner().to_bf16(), 3, cbs=PruneCallback(.5, schedule=linear(), every=2))
    assert widths(learn.model)==[4,6]

def test_only_epochs_of_the_final_size_count_as_best(tmp_path, capsys):
    best = []
    class Falls(Callback): # each epoch is worse than the one before
        order = SaveModelCallback.order-5
        def after_epoch(self): self.recorder.values[-1][1] = 1.+self.learn.epoch
    learn = fit(learner(tmp=tmp_path), 5, cbs=[PruneCallback(.5, schedule=linear(end=.75)), Falls(), SaveModelCallback(), Spy('after_epoch', lambda l: best.append(l.save_model.best))])
    assert widths(learn.model)==[4,6] and best==[1., 2., 3., 4., 4.] # the fourth is the first of the final size

def test_a_schedule_of_the_learning_rate_goes_on():
    learn = learner()
    with quiet(learn): learn.fit_one_cycle(4, 1e-2, cbs=PruneCallback(.5))
    other = learner()
    with quiet(other): other.fit_one_cycle(4, 1e-2)
    assert learn.recorder.hps['lr']==other.recorder.hps['lr'] and len(learn.recorder.lrs)==12

def test_an_average_goes_along():
    learn = learner()
    ema = AveragedModel(learn.model, avg_fn=lambda a, b, n: .5*a+.5*b)
    step = Spy('after_step', lambda l: ema.update_parameters(l.model))
    cb = PruneCallback(.5, also=lambda: [ema.module])
    fit(learn, 3, cbs=[cb, step])
    assert [p.shape for p in ema.module.parameters()]==[p.shape for p in learn.model.parameters()] and cb.reports[-1].also[0].error<1e-10

def test_nothing_happens_outside_of_training():
    learn = learner()
    learn.add_cb(PruneCallback(.5, schedule=one_shot(0)))
    with quiet(learn):
        assert len(learn.validate())==2
        learn.get_preds()
        learn.lr_find(show_plot=False, num_it=3, stop_div=False)
    assert widths(learn.model)==[8,12] and len(learn.metrics)==1

@pytest.mark.parametrize('event,how', [('before_epoch', CancelFitException), ('before_batch', KeyboardInterrupt), ('after_step', RuntimeError), ('after_validate', KeyboardInterrupt), ('after_epoch', RuntimeError)])
def test_every_way_out_leaves_no_trace(event, how):
    learn = learner()
    def stop(l):
        if l.epoch==1: raise how('stop')
    try: fit(learn, 3, cbs=[PruneCallback(.5, schedule=linear()), Spy(event, stop)])
    except (KeyboardInterrupt, RuntimeError): pass
    assert len(learn.metrics)==1 and not any(isinstance(c, PruneCallback) for c in learn.cbs) and callable(learn.prune)
    for m in learn.model.modules(): assert not m._forward_hooks and not m._forward_pre_hooks
    fit(learn, 1)

def test_preserve_rng_and_reset_trackers():
    learn = learner()
    def draws(): return torch.rand(1).item(),random.random(),np.random.rand(),learn.dls.train.rng.random()
    torch.manual_seed(1); random.seed(1); np.random.seed(1); learn.dls.train.rng = random.Random(1)
    want = draws()
    torch.manual_seed(1); random.seed(1); np.random.seed(1); learn.dls.train.rng = random.Random(1)
    with preserve_rng(learn.dls.train, seed=42): list(learn.dls.train); draws()
    assert draws()==want
    cb = EarlyStoppingCallback('accuracy')
    cb.best,cb.wait = .5,3
    learn.add_cb(cb); reset_trackers(learn)
    assert cb.best==-float('inf') and cb.wait==0

# ---- refusals

@pytest.mark.parametrize('f,text', [
    (lambda: PruneCallback(50), 'sparsity is a fraction in [0, 1], not 50; did you mean 0.5?'),
    (lambda: PruneCallback(.5, budget=Budget(macs=.5)), 'give a sparsity or a budget, not both'),
    (lambda: PruneCallback(budget=.5), 'budget is a Budget, such as Budget(macs=0.5), not 0.5'),
    (lambda: PruneCallback({}), 'sparsity is an empty dict'),
    (lambda: PruneCallback(.5, schedule='dsd'), "schedule 'dsd' falls, and channels that were removed cannot come back"),
    (lambda: PruneCallback(.5, schedule='cubic'), "no schedule 'cubic'"),
    (lambda: PruneCallback(.5, every=2.5), "every is 'epoch', a number of training batches or a Patience, not 2.5"),
    (lambda: PruneCallback(.5, granularity='kernel'), "channels are pruned by granularity 'filter' or 'shared_kernel', not 'kernel'"),
    (lambda: PruneCallback(.5, criterion='magnitud'), 'magnitud'),
    (lambda: PruneCallback(.5, n_batches=0), 'n_batches is at least 1'),
    (lambda: PruneCallback(.5, min_keep=0), 'min_keep is at least 1 for pruning'),
    (lambda: PruneCallback(budget=Budget(params=.5), max_ratio=.8), 'max_ratio=0.8 and a budget'),
    (lambda: PruneCallback(budget=Budget(latency=2.)), 'a budget of 2.0 milliseconds'),
])
def test_refused_when_it_is_made(f, text):
    with pytest.raises((ValueError, TypeError, KeyError)) as e: f()
    assert text in str(e.value.args[0])

@pytest.mark.parametrize('cb,text', [
    (lambda: PruneCallback({'nine':.5}), "no group 'nine'"),
    (lambda: PruneCallback({'9':.5}), "'9' cannot be pruned"),
    (lambda: PruneCallback(.5, only='nine'), "only: no layer 'nine'"),
    (lambda: PruneCallback(budget=Budget(macs=1e-5)), 'the budget cannot be met'),
    (lambda: [PruneCallback(.5), SparsifyCallback(.5)], 'train with one after the other'),
])
def test_refused_before_the_first_batch(cb, text):
    learn,n = learner(),[]
    before = weights(learn.model)
    with pytest.raises(Exception, match=text): fit(learn, cbs=[*(c if isinstance(c := cb(), list) else [c]), Spy('before_batch', lambda l: n.append(1))])
    assert not n and equal(before, weights(learn.model)) and len(learn.metrics)==1

def test_fine_tune_frozen_and_then_whole():
    halves = lambda m: [[p for l in part for p in l.parameters()] for part in (m[:4], m[4:])]
    learn,seen = learner(splitter=halves),[]
    cb = PruneCallback(.5, schedule=one_shot(0))
    with quiet(learn): learn.fine_tune(2, 1e-2, cbs=[cb, Spy('after_epoch', lambda l: seen.append((widths(l.model), l.model[0].weight.requires_grad)))])
    assert seen==[([4,6], False), ([4,6], True), ([4,6], True)]
