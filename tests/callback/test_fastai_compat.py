"SparsifyCallback, KeepZeros and learn.prune in a real fastai training, with everything else that may be going on there"
import importlib.util, math, random
from copy import deepcopy
from functools import partial
import numpy as np
import pandas as pd
import pytest, torch
from fastai.callback.core import Callback, CancelFitException, CancelStepException, FetchPredsCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import *  # fit_one_cycle, fine_tune, lr_find
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.learner import ValueMetric, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam, OptimWrapper, SGD
from fastai.torch_core import params
from torch import nn
from fasterprune.callback import prune # adds learn.prune
from fasterprune.core import unwrap
from fasterprune.callback.base import example_batch
from fasterprune.callback.keep_zeros import KeepZeros
from fasterprune.callback.sparsify import SparsifyCallback
from fasterprune.core import NoEffectWarning
from fasterprune.data import digits_dls, small_resnet
from fasterprune.schedule import agp, linear, one_shot
from fasterprune.sparse.sparsifier import Sparsifier
from fasterprune.surgery.planning.budget import Budget
from fasterprune.surgery.pruner import Pruner
from support.small_fit import Spy, equal, fit, learner, quiet, tiny, weights

pytestmark = pytest.mark.filterwarnings('ignore')
torch.set_num_threads(1)

# ---- what the tests share

def zero_filters(model): # layer name → which of its filters are zero, measured by a loop that knows nothing of the library
    return {n:[i for i in range(len(m.weight)) if not m.weight[i].any()] for n,m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}

def n_zeros(model): return sum(int((p==0).sum()) for p in model.parameters())
def zero_at(model): return {n:p==0 for n,p in model.named_parameters()}
def kept(learn): return [c for c in learn.cbs if isinstance(c, KeepZeros)]
def floor(s, n): return math.floor(s*n+1e-9)

class Holds(Callback):
    "After every step, the masked weights are exactly zero"
    order,steps = KeepZeros.order+1,0
    def after_step(self):
        self.steps += 1
        for k in kept(self.learn):
            for n,m in k.masks.keep.items(): assert not self.model.get_parameter(n).detach()[~m.expand_as(self.model.get_parameter(n))].any()

def traces(learn, keys, metrics): # what must not be left behind
    assert list(learn.model.state_dict())==keys
    assert list(learn.metrics)==list(metrics)
    for m in learn.model.modules(): assert not m._forward_hooks and not m._forward_pre_hooks and not m._backward_hooks
    for p in learn.model.parameters(): assert not p._backward_hooks
    assert not any(isinstance(c, SparsifyCallback) for c in learn.cbs)

def clean(f): # run `f(learn)` and see that nothing is left behind
    learn = learner()
    keys,metrics = list(learn.model.state_dict()),list(learn.metrics)
    f(learn)
    traces(learn, keys, metrics)
    return learn

# ---- one fit

def test_exactly_the_target_and_nothing_left_behind():
    cb,spy = SparsifyCallback(.5),Holds()
    learn = clean(lambda l: fit(l, cbs=[cb, spy]))
    z = zero_filters(learn.model)
    assert [len(v) for v in z.values()]==[4, 6, 0] and spy.steps==9
    for conv,bn in (('0','1'), ('4','5')): # a filter is its weights, its bias, and the scale and shift behind it
        for p in (learn.model[int(conv)].bias, learn.model[int(bn)].weight, learn.model[int(bn)].bias): assert (p==0).nonzero()[:,0].tolist()==z[conv]
    assert cb.masks.units=={'0':(4,8), '4':(6,12)} and len(kept(learn))==1

@pytest.mark.parametrize('s', [.5, .1, .9])
def test_columns_and_history_are_what_a_count_over_the_model_says(s):
    seen = []
    def count(learn):
        z = zero_filters(learn.model)
        ps = list(learn.model.parameters())
        seen.append(((len(z['0'])+len(z['4']))/20, sum(p.numel() for p in ps)/sum(int((p!=0).sum()) for p in ps)))
    cb = SparsifyCallback(s, schedule='agp')
    learn = fit(learner(), 4, cbs=[cb, Spy('after_validate', count, order=-5)])
    names = list(learn.recorder.metric_names)
    assert names==['epoch','train_loss','valid_loss','accuracy','sparsity','compression','time']
    for row,(sparsity,compression) in zip(learn.recorder.values, seen): assert row[3]==pytest.approx(sparsity, abs=1e-12) and row[4]==pytest.approx(compression)
    h = cb.history
    assert list(h)==['epoch','progress','requested','sparsity','compression'] and list(h.epoch)==[0,1,2,3] and list(h.progress)==[0,1/3,2/3,1]
    assert list(h.sparsity)==[(floor(q,8)+floor(q,12))/20 for q in h.requested] and h.requested.iloc[-1]==s
    assert list(h.sparsity)==pytest.approx([z for z,_ in seen])

def test_coupled_layers_agree_with_a_residual():
    learn = fit(learner(partial(small_resnet, width=4)), cbs=SparsifyCallback(.5))
    z = zero_filters(learn.model)
    assert z['conv1']==z['stage1.conv2'] and z['stage2.conv2']==z['stage2.shortcut.0'] and z['stage3.conv2']==z['stage3.shortcut.0']
    assert [len(z[n]) for n in ('conv1','stage1.conv1','stage2.conv1','stage2.conv2','stage3.conv1','stage3.conv2')]==[2,2,4,4,8,8]

@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter', 'shared_kernel', 'column', 'shared_row', 'layer'])
def test_granularities(granularity, context):
    cb,spy = SparsifyCallback(.6, granularity, context, ignore='9'),Holds()
    learn = fit(learner(), 2, cbs=[cb, spy])
    z,n = map(sum, zip(*cb.masks.units.values()))
    want = floor(.6, n) if context=='global' else sum(floor(.6, k) for _,k in cb.masks.units.values())
    assert z==want and learn.recorder.values[-1][3]==pytest.approx(want/n) and spy.steps==6

@pytest.mark.parametrize('criterion', ['l1','l2','linf','mean_abs','rms','bn_scale','lamp','random','first_k', lambda w: w.abs()])
def test_criteria(criterion):
    learn = fit(learner(), 2, cbs=SparsifyCallback(.5, context='global', criterion=criterion))
    assert sum(map(len, zero_filters(learn.model).values()))==10

@pytest.mark.parametrize('schedule', ['one_shot','iterative','agp','one_cycle','cosine','linear','exponential', one_shot(.9), agp(end=.5), lambda p: p**2])
def test_schedules_end_at_the_target(schedule):
    learn = fit(learner(), 4, cbs=SparsifyCallback(.5, schedule=schedule))
    assert sum(map(len, zero_filters(learn.model).values()))==10

def test_dsd_gives_back():
    cb = SparsifyCallback(.5, schedule='dsd')
    learn = fit(learner(), 5, 2e-2, cbs=cb)
    assert list(cb.history.sparsity.round(6))[:3]==[0, pytest.approx(.25, abs=.05), .5] and cb.history.requested.iloc[-1]==0
    assert not any(map(len, zero_filters(learn.model).values())) and cb.measured_sparsity()==0 # what was zero has trained again
    fit(learn, 1)
    assert not any(map(len, zero_filters(learn.model).values()))

def test_dict_of_layers():
    cb = SparsifyCallback({'0':.25, '4':.75})
    learn = fit(learner(), cbs=cb)
    assert [len(v) for v in zero_filters(learn.model).values()]==[2, 9, 0]
    assert cb.history.requested.iloc[-1]==pytest.approx((.25*8+.75*12)/20) and cb.history.sparsity.iloc[-1]==11/20
    learn = fit(learner(), cbs=SparsifyCallback({'4':.5}, 'kernel'))
    assert int((learn.model[4].weight.flatten(2)==0).all(2).sum())==48 and (learn.model[0].weight!=0).all()

def test_count_params():
    cb = SparsifyCallback(.5, 'filter', 'global', count='params')
    learn = fit(learner(), cbs=cb)
    z,cost = zero_filters(learn.model),{'0':9, '4':72}
    share = sum(len(z[n])*cost[n] for n in cost)/(8*9+12*72)
    assert cb.history.sparsity.iloc[-1]==pytest.approx(share) and share<=.5 and learn.recorder.values[-1][3]==pytest.approx(share)

def test_only_and_ignore():
    only = fit(learner(), 2, cbs=SparsifyCallback(.5, only='4'))
    ignore = fit(learner(), 2, cbs=SparsifyCallback(.5, ignore=['0']))
    for l in (only, ignore): assert [len(v) for v in zero_filters(l.model).values()]==[0, 6, 0]

# ---- every n batches

@pytest.mark.parametrize('every', [1, 3, 5, 100])
def test_every_n_batches(every):
    cb = SparsifyCallback(.5, schedule=linear(), every=every)
    learn = fit(learner(), 3, cbs=[cb, Holds()]) # 9 batches
    n = math.ceil(9/every)
    assert list(cb.history.progress)==pytest.approx([k/(n-1) for k in range(n)] if n>1 else [1.])
    assert sum(map(len, zero_filters(learn.model).values()))==10

def test_short_epochs_still_end_at_the_target():
    cb = SparsifyCallback(.5, schedule=linear(), every=2)
    learn = fit(learner(), 3, cbs=[cb, ShortEpochCallback(.5, short_valid=False)])
    assert sum(map(len, zero_filters(learn.model).values()))==10 and cb.history.progress.iloc[-1]==1

def test_scored_once_an_epoch():
    calls = []
    def mine(w): calls.append(1); return w.abs()
    fit(learner(), 4, cbs=SparsifyCallback(.5, criterion=mine, schedule='agp'))
    per_choice = 2
    assert len(calls)==per_choice*(1+4) # once to see that it can, then once an epoch
    del calls[:]
    fit(learner(), 4, cbs=SparsifyCallback(.5, criterion=mine)) # AGP in the first half, unless it is told otherwise
    assert len(calls)==per_choice*(1+3)

def test_it_is_over_by_the_middle_of_the_training():
    fit(learner(), 5, cbs=(cb := SparsifyCallback(.5)))
    assert cb.schedule==agp(end=.5) and list(cb.history.epoch)==[0, 1, 2] and cb.history.requested.iloc[-1]==.5

# ---- fit again

def test_second_fit_with_the_same_callback_starts_from_the_zeros():
    cb,learn,low = SparsifyCallback(.5),learner(),[]
    fit(learn, cbs=cb)
    first = zero_at(learn.model)
    fit(learn, cbs=[cb, Spy('after_batch', lambda l: low.append(n_zeros(l.model)))])
    assert all((first[n]<=z).all() for n,z in zero_at(learn.model).items()) and min(low)>=sum(int(z.sum()) for z in first.values())
    assert [len(v) for v in zero_filters(learn.model).values()]==[4, 6, 0]

def test_second_fit_with_a_higher_target():
    learn,low = fit(learner(), cbs=SparsifyCallback(.25)),[]
    first = zero_at(learn.model)
    fit(learn, cbs=[SparsifyCallback(.75), Spy('after_batch', lambda l: low.append(n_zeros(l.model)))])
    assert all((first[n]<=z).all() for n,z in zero_at(learn.model).items()) and min(low)>=sum(int(z.sum()) for z in first.values())
    assert [len(v) for v in zero_filters(learn.model).values()]==[6, 9, 0]

def test_second_fit_with_a_lower_target_gives_nothing_back():
    learn = fit(learner(), cbs=SparsifyCallback(.5))
    cb = SparsifyCallback(.25)
    fit(learn, cbs=cb)
    assert [len(v) for v in zero_filters(learn.model).values()]==[4, 6, 0] and set(cb.history.sparsity)=={.5} and cb.history.requested.iloc[-1]==.25

@pytest.mark.parametrize('opt', [partial(SGD, mom=.9), partial(Adam, wd=.1)])
def test_zeros_stay_in_a_fit_without_the_callback(opt):
    learn = fit(learner(opt_func=opt), cbs=SparsifyCallback(.5))
    before = zero_at(learn.model)
    fit(learn, 2, cbs=Holds())
    after = zero_at(learn.model)
    assert all((before[n]<=after[n]).all() for n in before) and len(learn.recorder.values[-1])==3

def test_zeros_can_be_let_go():
    learn = fit(learner(), cbs=SparsifyCallback(.5))
    learn.remove_cb(KeepZeros)
    fit(learn, 2, 2e-2)
    assert not any(map(len, zero_filters(learn.model).values()))

def test_another_granularity_does_not_wake_the_first():
    learn = fit(learner(), cbs=SparsifyCallback(.5))
    first = zero_at(learn.model)
    fit(learn, cbs=SparsifyCallback(.9, 'weight', only='9'))
    fit(learn, 1)
    z = zero_at(learn.model)
    assert all((first[n]<=z[n]).all() for n in first) and int(z['9.weight'].sum())==108
    fit(learn, 4, cbs=SparsifyCallback(.5, 'weight', schedule='dsd', only='9')) # a schedule that falls gives back its own units only
    z = zero_at(learn.model)
    assert int(z['9.weight'].sum())<108 and all((first[n]<=z[n]).all() for n in first if n!='9.weight')

def test_two_callbacks_side_by_side():
    cbs = [SparsifyCallback(.5, ignore='9'), SparsifyCallback(.8, 'weight', only='9')]
    learn = clean(lambda l: fit(l, cbs=[*cbs, Holds()]))
    assert [len(v) for v in zero_filters(learn.model).values()][:2]==[4, 6] and int((learn.model[9].weight==0).sum())==96

def test_a_layer_that_was_emptied_stays_empty(): # and is not taken for one that was born zero
    cb = SparsifyCallback(.5, 'layer', 'global', criterion='random', every=1)
    learn,gone = learner(),[]
    fit(learn, cbs=[cb, Spy('after_batch', lambda l: gone.append({n for n,p in l.model.named_parameters() if n in ('0.weight','4.weight','9.weight') and not p.any()}))])
    assert all(a<=b for a,b in zip(gone, gone[1:])) and len(gone[-1])==1

def test_born_zero_is_not_pruned(): # a head that starts at zero may train in the first epoch, and is then chosen from like any other
    model = tiny()
    nn.init.zeros_(model[9].weight)
    cb = SparsifyCallback(.5, 'weight', only='9', schedule='agp')
    learn = fit(learner(model), 3, cbs=cb)
    assert int((learn.model[9].weight==0).sum())==60 and list(cb.history.sparsity)==[1., floor(.4375, 120)/120, .5]

# ---- fine_tune, frozen layers

def body_head(): return nn.Sequential(nn.Sequential(*list(tiny().children())[:7]), nn.Sequential(*list(tiny().children())[7:]))
def split(m): return [params(m[0]), params(m[1])]

def test_fine_tune():
    cb = SparsifyCallback(.5)
    learn = learner(body_head, splitter=split)
    low = []
    with quiet(learn): learn.fine_tune(3, 1e-2, cbs=[cb, Holds(), Spy('after_train', lambda l: low.append(n_zeros(l.model)))])
    z = zero_filters(learn.model)
    assert len(z['0.0'])==4 and len(z['0.4'])==6 and low==sorted(low) and list(learn.model.state_dict())==list(body_head().state_dict())

def test_fine_tune_after_sparsify_keeps_zeros_in_both_phases():
    learn = fit(learner(body_head, splitter=split), cbs=SparsifyCallback(.5))
    before = zero_at(learn.model)
    with quiet(learn): learn.fine_tune(1, 1e-2, cbs=Holds())
    assert all((before[n]<=z).all() for n,z in zero_at(learn.model).items())

def test_frozen_layers_are_masked_too_and_stay_frozen():
    learn = learner(body_head, splitter=split)
    learn.freeze()
    flags = {n:p.requires_grad for n,p in learn.model.named_parameters()}
    assert not flags['0.0.weight'] and flags['1.2.weight']
    fit(learn, cbs=[SparsifyCallback(.5), Holds()])
    assert {n:p.requires_grad for n,p in learn.model.named_parameters()}==flags
    z = zero_filters(learn.model)
    assert len(z['0.0'])==4 and len(z['0.4'])==6
    learn.unfreeze()
    fit(learn, 1, cbs=Holds())
    assert zero_filters(learn.model)==z
    for p in learn.model.parameters(): p.requires_grad_(False)
    learn.model[1][2].weight.requires_grad_(True)
    r = learn.prune()
    assert r.removed==10 and [n for n,p in learn.model.named_parameters() if p.requires_grad]==['1.2.weight']

# ---- lr_find, validate, get_preds

def test_lr_find_before(tmp_path):
    learn = learner(tmp=tmp_path)
    with quiet(learn): learn.lr_find(num_it=8, show_plot=False)
    fit(learn, cbs=SparsifyCallback(.5))
    assert sum(map(len, zero_filters(learn.model).values()))==10

def test_lr_find_and_validation_with_the_callback_on_board(tmp_path):
    cb,learn = SparsifyCallback(.5),learner(tmp=tmp_path)
    learn.add_cb(cb)
    before = weights(learn.model)
    def look():
        with quiet(learn):
            learn.lr_find(num_it=8, show_plot=False)
            assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','time']
            assert len(learn.validate())==2 and len(learn.get_preds())==2 and len(learn.metrics)==1 and cb.run
    look()
    assert equal(before, weights(learn.model)) and cb.history.empty and not kept(learn)
    fit(learn)
    after,masks = weights(learn.model),cb.masks
    assert len(learn.metrics)==1 and len(learn.recorder.metric_names)==7
    look()
    assert equal(after, weights(learn.model)) and kept(learn)[0].masks is not None and cb.masks is masks
    learn.remove_cb(cb)
    fit(learn, 1, cbs=Holds())
    assert sum(map(len, zero_filters(learn.model).values()))==10

def test_lr_find_with_zeros_trains_with_zeros(tmp_path):
    learn = fit(learner(tmp=tmp_path), cbs=SparsifyCallback(.5))
    before,spy = weights(learn.model),Holds()
    learn.add_cb(spy)
    with quiet(learn): learn.lr_find(num_it=8, show_plot=False)
    assert spy.steps and equal(before, weights(learn.model))

def test_a_failed_lr_find_does_not_silence_the_callback(tmp_path):
    cb,learn = SparsifyCallback(.5),learner(tmp=tmp_path)
    learn.add_cb(cb)
    boom = Spy('after_loss', lambda l: 1/0)
    with pytest.raises(ZeroDivisionError), quiet(learn), learn.added_cbs(boom): learn.lr_find(num_it=8, show_plot=False)
    fit(learn)
    assert sum(map(len, zero_filters(learn.model).values()))==10

def test_validation_does_not_touch_a_loaded_model(tmp_path): # a dense checkpoint, loaded to be looked at, is not masked by looking
    learn = learner(tmp=tmp_path)
    learn.save('dense')
    fit(learn, cbs=SparsifyCallback(.5))
    learn.load('dense')
    dense = weights(learn.model)
    with quiet(learn): learn.validate(); learn.get_preds()
    assert equal(dense, weights(learn.model))

@pytest.mark.parametrize('every', ['epoch', 1])
def test_predictions_fetched_while_training(every):
    fetch,cb = FetchPredsCallback(),SparsifyCallback(.5, every=every)
    learn = clean(lambda l: fit(l, cbs=[cb, fetch]))
    assert cb.history.progress.is_monotonic_increasing and cb.history.progress.is_unique # batches that are predicted choose nothing
    assert all(len(v)==5 for v in learn.recorder.values) and sum(map(len, zero_filters(learn.model).values()))==10

# ---- trackers

def falls(l): l.metrics = [accuracy, ValueMetric(lambda: 1.-getattr(l, 'epoch', 0), 'score')]; return l # best at once

def test_best_epoch_is_one_at_full_sparsity(tmp_path): # by a metric that was best in the dense first epoch
    learn,seen = falls(learner(tmp=tmp_path)),[]
    save = SaveModelCallback('score', comp=np.greater)
    fit(learn, 6, cbs=[SparsifyCallback(.5, schedule=agp(end=.6)), save, Spy('after_epoch', lambda l: seen.append(weights(l.model)))])
    assert sum(map(len, zero_filters(learn.model).values()))==10
    assert equal(seen[3], weights(learn.model)) # progress .6 is epoch 3 of 0..5
    assert save.best==-2.
    fresh = learner(tmp=tmp_path, seed=1)
    fresh.load('model')
    assert zero_filters(fresh.model)==zero_filters(learn.model)

def test_best_epoch_by_accuracy_and_loss(tmp_path):
    for monitor in ('accuracy', 'valid_loss'):
        learn = fit(learner(tmp=tmp_path), 4, cbs=[SparsifyCallback(.9), SaveModelCallback(monitor)])
        assert [len(v) for v in zero_filters(learn.model).values()]==[7, 10, 0]

def test_an_older_file_is_masked_when_it_is_loaded(tmp_path): # cancelled before the target: the best epoch is less sparse than the masks
    cb = SparsifyCallback(.5)
    def stop(l):
        if l.epoch==2: raise CancelFitException
    learn = fit(falls(learner(tmp=tmp_path)), 6, cbs=[cb, SaveModelCallback('score', comp=np.greater), Spy('after_train', stop)])
    measured = {n:len(v) for n,v in zero_filters(learn.model).items() if n in cb.masks.units}
    assert measured=={n:z for n,(z,_) in cb.masks.units.items()} and sum(measured.values())>0

def test_every_epoch_is_saved(tmp_path):
    learn = fit(learner(tmp=tmp_path), 3, cbs=[SparsifyCallback(.5, schedule=linear()), SaveModelCallback(every_epoch=True, fname='e')])
    counts = []
    for i in range(3):
        state = torch.load(tmp_path/f'e_{i}.pth')
        assert list(state)==list(tiny().state_dict())
        (fresh := tiny()).load_state_dict(state)
        counts.append(sum(map(len, zero_filters(fresh).values())))
    assert counts==[0, 5, 10]

def test_early_stopping_waits_for_the_target():
    learn = fit(falls(learner()), 8, cbs=[SparsifyCallback(.5, schedule=agp(end=.5)), EarlyStoppingCallback('score', comp=np.greater, patience=2)])
    assert len(learn.recorder.values)==7 # the target comes in epoch 4; then two that are not better
    assert sum(map(len, zero_filters(learn.model).values()))==10

def test_reduce_lr_waits_for_the_target():
    lrs = []
    fit(falls(learner()), 6, 1e-2, cbs=[SparsifyCallback(.5, schedule=agp(end=.6)), ReduceLROnPlateau('score', comp=np.greater, patience=1),
        Spy('before_validate', lambda l: lrs.append(l.opt.hypers[-1]['lr']))])
    assert lrs[:5]==[1e-2]*5 and lrs[5]==pytest.approx(1e-3)

# ---- interruptions

EVENTS = 'before_fit before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch after_train before_validate after_validate after_epoch after_fit'.split()

@pytest.mark.parametrize('error,order', [(RuntimeError, -100), (RuntimeError, 100), (KeyboardInterrupt, 0), (CancelFitException, 0), (CancelFitException, 100)])
@pytest.mark.parametrize('when', EVENTS)
def test_interrupted(when, error, order):
    learn = learner(opt_func=partial(SGD, mom=.9))
    keys,metrics = list(learn.model.state_dict()),list(learn.metrics)
    cb = SparsifyCallback(.5, schedule=linear())
    def stop(l):
        if when in ('before_fit', 'after_fit') or l.epoch==1: raise error('stop')
    if when=='after_fit' and error is CancelFitException: return # fastai has left its loop
    try: fit(learn, 3, cbs=[cb, Spy(when, stop, order)])
    except (RuntimeError, KeyboardInterrupt): assert error is not CancelFitException
    traces(learn, keys, metrics)
    if when not in ('before_fit', 'before_epoch') and not (when=='before_train' and order<SparsifyCallback.order):
        z = zero_filters(learn.model)
        assert {n:len(z[n]) for n in ('0','4')}=={n:k for n,(k,_) in cb.masks.units.items()}==({'0':4, '4':6} if when=='after_fit' else {'0':2, '4':3})
    with quiet(learn): assert len(learn.validate())==2
    for again in (cb, SparsifyCallback(.5)):
        found = zero_filters(learn.model)
        fit(learn, 2, cbs=[again, Holds()])
        assert all(set(found[n])<=set(z) for n,z in zero_filters(learn.model).items())
        assert [len(v) for v in zero_filters(learn.model).values()]==[4, 6, 0]
    traces(learn, keys, metrics)

@pytest.mark.parametrize('when', ['after_pred', 'after_step', 'after_epoch'])
def test_interrupted_with_the_callback_on_board(when):
    cb,learn = SparsifyCallback(.5),learner()
    learn.add_cb(cb)
    def stop(l):
        if l.epoch==1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(learn, 3, cbs=Spy(when, stop))
    with quiet(learn): assert len(learn.validate())==2 and len(learn.metrics)==1 # the next thing that runs takes the columns away
    fit(learn, 2)
    assert [len(v) for v in zero_filters(learn.model).values()]==[4, 6, 0] and len(learn.metrics)==1 and len(learn.recorder.metric_names)==7

def test_interrupted_between_a_step_and_its_zeros():
    learn = fit(learner(), cbs=SparsifyCallback(.5))
    def stop(l): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=Spy('after_step', stop, order=-1)) # before KeepZeros
    assert learn.prune().removed==10

# ---- other callbacks and optimizers

OPTS = dict(sgd=partial(SGD, mom=.9, wd=.1), adam=partial(Adam, wd=.1), torch_sgd=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9, weight_decay=.1)),
            torch_adamw=partial(OptimWrapper, opt=torch.optim.AdamW))
class AutocastCPU(Callback): # fastai's MixedPrecision runs its autocast for CUDA only
    order = MixedPrecision.order
    def before_batch(self): self.ctx = torch.autocast('cpu', dtype=torch.bfloat16); self.ctx.__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.ctx.__exit__(None, None, None)
class SkipSteps(Callback): # as a gradient scaler does when gradients overflow
    order = MixedPrecision.order
    def before_step(self):
        if self.iter%2: raise CancelStepException
COMPANY = dict(accumulate=lambda: GradientAccumulation(200), clip=lambda: GradientClip(.1), bf16=lambda: MixedPrecision('bf16'), fp16=lambda: MixedPrecision('fp16'),
               autocast=AutocastCPU, skipped=SkipSteps, mixup=lambda: MixUp(.4))

@pytest.mark.parametrize('every', ['epoch', 1])
@pytest.mark.parametrize('opt', OPTS)
def test_zeros_stay_zero_after_every_step(opt, every):
    spy,learn = Holds(),learner(opt_func=OPTS[opt])
    fit(learn, 4, cbs=[SparsifyCallback(.5, every=every, schedule=agp(end=.5)), spy])
    assert spy.steps==12 and [len(v) for v in zero_filters(learn.model).values()]==[4, 6, 0]
    moved = [s for p in learn.model.parameters() for s in learn.opt.state.get(p, {}).values() if isinstance(s, torch.Tensor) and s.numel()==p.numel()]
    assert any(s.any() for s in moved) or opt.startswith('torch') # there is momentum that would move them

@pytest.mark.parametrize('who', COMPANY)
def test_company(who):
    spy = Holds()
    learn = clean(lambda l: fit(l, 3, cbs=[COMPANY[who](), SparsifyCallback(.5), spy]))
    assert [len(v) for v in zero_filters(learn.model).values()]==[4, 6, 0] and spy.steps>0
    fit(learn, 1, cbs=[COMPANY[who](), Holds()])
    assert [len(v) for v in zero_filters(learn.model).values()]==[4, 6, 0]

def test_logged_like_any_metric(tmp_path):
    log = CSVLogger(tmp_path/'log.csv')
    fit(learner(tmp=tmp_path), 3, cbs=[SparsifyCallback(.5, schedule=linear()), log])
    rows = [l.split(',') for l in (tmp_path/'log.csv').read_text().split()]
    assert rows[0][4:6]==['sparsity','compression'] and [float(r[4]) for r in rows[1:]]==[0, .25, .5]

def test_nan_in_a_masked_weight_becomes_zero():
    learn = fit(learner(), cbs=SparsifyCallback(.5))
    gone = zero_filters(learn.model)['0'][0]
    with torch.no_grad(): learn.model[0].weight[gone,0,1,1] = float('nan')
    fit(learn, 1)
    assert not learn.model[0].weight[gone].any() and all(p.isfinite().all() for p in learn.model.parameters())

def test_resume_with_start_epoch(tmp_path):
    cb,learn = SparsifyCallback(.5, schedule=linear()),learner(tmp=tmp_path)
    def stop(l):
        if l.epoch==2: raise CancelFitException
    fit(learn, 5, cbs=[cb, Spy('before_epoch', stop)])
    learn.save('half')
    for every in ('epoch', 3):
        fresh = learner(tmp=tmp_path, seed=1)
        fresh.load('half')
        found,again,low = zero_at(fresh.model),SparsifyCallback(.5, schedule=linear(), every=every),[]
        fit(fresh, 5, start_epoch=2, cbs=[again, Holds(), Spy('after_batch', lambda l: low.append(n_zeros(l.model)))])
        assert again.history.progress.iloc[0]==pytest.approx(2/4 if every=='epoch' else 2/4) and min(low)>=sum(int(z.sum()) for z in found.values())
        assert [len(v) for v in zero_filters(fresh.model).values()]==[4, 6, 0]

# ---- reproducible

class Noise: # an augmentation that draws from every source
    def __call__(self, x): return x+.1*torch.randn_like(x)*np.random.rand()*random.random() if x.is_floating_point() else x

def noisy_dls():
    d = digits_dls(bs=128, valid_pct=.75)
    g = random.Random(3)
    dls = DataLoaders.from_dsets(d.train.dataset, d.valid.dataset, bs=128, after_batch=Noise(), num_workers=0, device='cpu')
    dls.train.rng = g
    return dls

@pytest.mark.parametrize('dls', [digits_dls, noisy_dls])
@pytest.mark.parametrize('granularity', ['filter', 'weight'])
def test_sparsity_zero_is_no_callback(dls, granularity):
    make = partial(digits_dls, bs=128, valid_pct=.75) if dls is digits_dls else noisy_dls
    res = []
    for cbs in ([], [SparsifyCallback(0., granularity)]):
        learn = learner(dls=make())
        torch.manual_seed(5); random.seed(5); np.random.seed(5)
        fit(learn, 2, cbs=cbs)
        res.append((weights(learn.model), torch.rand(3), random.random(), np.random.rand(), learn.dls.train.rng.random()))
    assert equal(res[0][0], res[1][0]) and torch.equal(res[0][1], res[1][1]) and res[0][2:]==res[1][2:]

def test_the_same_seed_gives_the_same_masks():
    res = []
    for _ in range(2):
        cb = SparsifyCallback(.5, context='global')
        fit(learner(), cbs=cb)
        res.append(cb.masks)
    assert res[0]==res[1]

def test_example_batch_is_a_small_training_batch():
    learn = learner()
    x, = example_batch(learn)
    assert x.shape==(2,1,8,8) and type(x) is torch.Tensor
    assert torch.equal(example_batch(learn)[0], x)

# ---- files and copies

def test_save_and_load_hold_the_model_and_nothing_else(tmp_path):
    learn = fit(learner(tmp=tmp_path), cbs=SparsifyCallback(.5))
    with_opt,without = learn.save('with_opt'),learn.save('without', with_opt=False)
    assert list(torch.load(with_opt, weights_only=False)['model'])==list(torch.load(without))==list(tiny().state_dict())
    dense = learner(tmp=tmp_path, seed=1)
    assert abs(dense.save('dense', with_opt=False).stat().st_size-without.stat().st_size)<200
    for name in ('with_opt', 'without'):
        fresh = learner(tmp=tmp_path, seed=1)
        fresh.load(name)
        assert equal(weights(fresh.model), weights(learn.model)) and not kept(fresh)
    masks = Sparsifier(fresh.model, example_batch(fresh)).masks(0.) # its zeros can be kept
    fresh.add_cb(KeepZeros(masks))
    fit(fresh, 1, cbs=Holds())
    assert [len(v) for v in zero_filters(fresh.model).values()]==[4, 6, 0]
    again = fit(learner(deepcopy(learn.model), seed=1), 2, cbs=SparsifyCallback(.5))
    assert zero_filters(again.model)==zero_filters(learn.model)

class Images(torch.utils.data.TensorDataset): # an export wants a data set without items
    def new_empty(self): return Images(*(t[:0] for t in self.tensors))

def image_dls():
    d = digits_dls(bs=128, valid_pct=.75)
    return DataLoaders.from_dsets(*(Images(*s.dataset.tensors) for s in (d.train, d.valid)), bs=128, num_workers=0, device='cpu')

def test_export_and_copy(tmp_path):
    learn = learner(tmp=tmp_path, dls=image_dls())
    learn.add_cb(SparsifyCallback(.5)) # stays on board
    fit(learn)
    with quiet(learn): want = learn.get_preds()[0]
    learn.export('l.pkl')
    other = load_learner(tmp_path/'l.pkl')
    with quiet(other): assert torch.equal(other.get_preds(dl=learn.dls.valid)[0], want)
    copy = deepcopy(learn.model)
    assert equal(weights(copy), weights(learn.model)) and [len(v) for v in zero_filters(copy).values()]==[4, 6, 0]
    fit(learn, 1)
    assert [len(v) for v in zero_filters(learn.model).values()]==[4, 6, 0]

# ---- other models

def test_without_batchnorm():
    model = lambda: nn.Sequential(nn.Conv2d(1,8,3), nn.ReLU(), nn.Conv2d(8,12,3,bias=False), nn.Sigmoid(), nn.Flatten(), nn.Linear(192,10))
    learn = fit(learner(model), cbs=[SparsifyCallback(.5), Holds()])
    assert [len(v) for v in zero_filters(learn.model).values()]==[4, 6, 0]
    x, = example_batch(learn)
    want = learn.model.eval()(x)
    assert learn.prune().removed==10 and torch.allclose(learn.model(x), want, rtol=1e-5, atol=1e-5) # the sigmoid's .5 is folded

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.head = nn.Conv2d(1,8,3),nn.Linear(64,8),nn.Linear(8,10)
    def forward(self, img, flat): return self.head(self.a(img).relu().mean((2,3))*self.b(flat).sigmoid())

def two_dls():
    d = digits_dls(bs=128, valid_pct=.75)
    sets = [torch.utils.data.TensorDataset(x, x.flatten(1), y) for x,y in (s.dataset.tensors for s in (d.train, d.valid))]
    return DataLoaders.from_dsets(*sets, bs=128, num_workers=0, device='cpu')

def test_two_inputs():
    learn = fit(learner(Two, dls=two_dls()), cbs=SparsifyCallback(.5))
    z = zero_filters(learn.model)
    assert z['a']==z['b'] and len(z['a'])==4 # they are multiplied, so they go together
    xs = example_batch(learn)
    with torch.no_grad(): want = learn.model.eval()(*xs)
    r = learn.prune()
    assert r.removed==4 and torch.allclose(learn.model(*xs), want, rtol=1e-5, atol=1e-6)
    fit(learn, 1)

def test_linear_only():
    model = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64,32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32,16), nn.ReLU(), nn.Linear(16,10))
    cb = SparsifyCallback(.5)
    learn = fit(learner(model), cbs=[cb, Holds()])
    assert [len(v) for v in zero_filters(learn.model).values()]==[16, 8, 0] and cb.history.sparsity.iloc[-1]==.5
    x, = example_batch(learn)
    want = learn.model.eval()(x)
    assert learn.prune().removed==24 and torch.allclose(learn.model(x), want, rtol=1e-5, atol=1e-5)

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.mid,self.head = nn.Embedding(20,16),nn.Linear(16,24),nn.Linear(24,10)
    def forward(self, x): return self.head(self.mid(self.emb(x).mean(1)).relu())

def word_dls():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 20, (400,6), generator=g)
    sets = [torch.utils.data.TensorDataset(i, i[:,0]%10) for i in (x[:300], x[300:])]
    return DataLoaders.from_dsets(*sets, bs=100, num_workers=0, device='cpu')

def test_embedding():
    learn = fit(learner(Words, dls=word_dls()), cbs=[SparsifyCallback(.5, only='mid'), Holds()])
    assert len(zero_filters(learn.model)['mid'])==12
    x, = example_batch(learn)
    want = learn.model.eval()(x)
    assert learn.prune().removed==12 and torch.allclose(learn.model(x), want, rtol=1e-5, atol=1e-6)
    learn = fit(learner(Words, dls=word_dls()), cbs=[SparsifyCallback(.5, 'weight', only='mid'), Holds()])
    assert int((learn.model.mid.weight==0).sum())==192 and (learn.model.emb.weight!=0).all()

def test_a_model_without_layers_is_refused_before_training():
    class None_(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.randn(64,10))
        def forward(self, x): return x.flatten(1)@self.w
    learn = learner(None_)
    before = weights(learn.model)
    with pytest.raises(Exception, match='no convolution and no linear layer'): fit(learn, cbs=SparsifyCallback(.5))
    assert equal(before, weights(learn.model)) and len(learn.metrics)==1

def test_wrapped_for_several_devices():
    model = tiny()
    learn = learner(nn.DataParallel(model))
    fit(learn, cbs=SparsifyCallback(.5))
    assert unwrap(learn.model) is model and [len(v) for v in zero_filters(model).values()]==[4, 6, 0]

def test_compiled():
    torch.manual_seed(0) # in another head whole columns may become zero
    model = tiny()
    learn = fit(learner(torch.compile(model, backend='eager')), 2, cbs=[SparsifyCallback(.5), SparsifyCallback(.5, 'weight', only='9')])
    assert [len(v) for v in zero_filters(model).values()]==[4, 6, 0] and int((model[9].weight==0).sum())==60
    masks = Sparsifier(torch.compile(model, backend='eager'), granularity='weight', only='9').masks(0.)
    assert set(masks.keep)=={'9.weight'} and masks.apply_(torch.compile(model, backend='eager'))
    learn.model = model
    x, = example_batch(learn)
    with torch.no_grad(): want = model.eval()(x)
    assert learn.prune().removed==10 and torch.allclose(model(x), want, rtol=1e-5, atol=1e-5)

# ---- learners of fastai's applications

def pruned(learn): # what training made zero is removed, and the network says the same
    xs = example_batch(learn)
    with torch.no_grad(): want = learn.model.eval()(*xs)
    r = learn.prune()
    with torch.no_grad(): got = learn.model(*xs)
    assert r.removed and type(got) is type(want) and torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    return r

def picture_dls(n, target):
    x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return DataLoaders.from_dsets(*[torch.utils.data.TensorDataset(x, target(x))]*2, bs=4, num_workers=0, device='cpu')

def test_vision_learner():
    from fastai.vision.learner import vision_learner
    from torchvision.models import resnet18
    learn = vision_learner(picture_dls(8, lambda x: (x.mean((1,2,3))>0).long()), resnet18, pretrained=False, n_out=2, normalize=False, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    cb,low = SparsifyCallback(.5),[]
    with quiet(learn): learn.fine_tune(1, 1e-3, cbs=[cb, Holds(), Spy('after_train', lambda l: low.append(n_zeros(l.model)))])
    assert {n:len(v) for n,v in zero_filters(learn.model).items() if n in ('0.0','0.4.0.conv1','0.7.1.conv2','1.4','1.8')}=={'0.0':32, '0.4.0.conv1':32, '0.7.1.conv2':256, '1.4':256, '1.8':0}
    assert low==sorted(low) and pruned(learn).removed==sum(z for z,_ in cb.masks.units.values())

def test_unet_learner():
    from fastai.vision.learner import unet_learner
    from torchvision.models import resnet18
    learn = unet_learner(picture_dls(4, lambda x: (x[:,0]>0).long()), resnet18, pretrained=False, n_out=2, normalize=False, loss_func=CrossEntropyLossFlat(axis=1))
    cb = SparsifyCallback(.5)
    with quiet(learn): learn.fit(1, 1e-3, cbs=[cb, Holds()])
    assert 'layers.12.0' not in cb.masks.units # the classes
    assert pruned(learn).removed==sum(z for z,_ in cb.masks.units.values())

def test_tabular_learner():
    from fastai.tabular.all import CategoryBlock, Categorify, Normalize, TabularDataLoaders, tabular_learner
    g = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=g.integers(0, 4, 200).astype(str), b=g.normal(size=200), c=g.normal(size=200)))
    df['y'] = (df.b+df.c>0).astype(int)
    dls = TabularDataLoaders.from_df(df, y_names='y', y_block=CategoryBlock(), cat_names=['a'], cont_names=['b','c'], procs=[Categorify, Normalize], bs=50, valid_idx=list(range(50)))
    learn,cb = tabular_learner(dls, layers=[32,16], metrics=accuracy),SparsifyCallback(.5)
    with quiet(learn): learn.fit_one_cycle(3, 1e-2, cbs=[cb, Holds()])
    assert cb.masks.units=={'embeds.0':(2,4), 'layers.0.0':(16,32), 'layers.1.0':(8,16)} and pruned(learn).removed==26

def sentences(n=120):
    x = torch.randint(0, 20, (n,12), generator=torch.Generator().manual_seed(0))
    return x,(x[:,0]>9).long()

def test_text_classifier_learner():
    from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, text_classifier_learner
    from fastcore.foundation import L
    x,y = sentences()
    dls = DataLoaders.from_dsets(*[torch.utils.data.TensorDataset(x[i], y[i]) for i in (slice(80), slice(80, None))], bs=40, num_workers=0, device='cpu')
    dls.vocab = L(['w']*20, ['a','b'])
    for granularity,want in (('filter', {'1.layers.0.2':(25,50)}), ('weight', {'1.layers.0.2':(1200,2400), '1.layers.1.2':(50,100)})):
        learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=awd_lstm_clas_config|dict(emb_sz=16, n_hid=24, n_layers=2), n_out=2, loss_func=CrossEntropyLossFlat(), metrics=accuracy, seq_len=12)
        cb = SparsifyCallback(.5, granularity, only='1')
        with quiet(learn): learn.fit(2, 1e-2, cbs=[cb, Holds()])
        assert cb.masks.units==want and all(int((learn.model.get_parameter(n)==0).sum())>=int((~k).sum()) for n,k in cb.masks.keep.items())

def test_language_model_learner(): # its decoder is tied to its embedding
    from fastai.text.all import AWD_LSTM, LMDataLoader, awd_lstm_lm_config, language_model_learner
    items = list(sentences()[0].reshape(-1, 60))
    dls = DataLoaders(*[LMDataLoader(i, bs=4, seq_len=12, num_workers=0) for i in (items[:16], items[16:])])
    dls.vocab = ['w']*20
    learn = language_model_learner(dls, AWD_LSTM, pretrained=False, config=awd_lstm_lm_config|dict(emb_sz=16, n_hid=24, n_layers=2))
    cb = SparsifyCallback(.5, 'weight', only='1')
    with quiet(learn): learn.fit(2, 1e-2, cbs=[cb, Holds()])
    w = learn.model[1].decoder.weight
    assert w is learn.model[0].encoder.weight and int((w==0).sum())==160 and cb.history.sparsity.iloc[-1]==.5

# ---- averages, rates, loggers, GPUs

class EMA(Callback): # fastai has none: PyTorch's, after each step
    order = KeepZeros.order+2
    def before_fit(self):
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(.9))
    def after_step(self): self.average.update_parameters(self.model)

def test_average_of_the_weights(): # it remembers weights that are zero now; the masks apply to it, and it is cut along
    learn,cb,ema = learner(),SparsifyCallback(.5),EMA()
    fit(learn, 4, cbs=[cb, ema, Holds()])
    average = ema.average.module
    assert not any(map(len, zero_filters(average).values()))
    cb.masks.apply_(average)
    assert zero_filters(average)==zero_filters(learn.model)
    x, = example_batch(learn)
    want = average.eval()(x)
    assert learn.prune(also=average).removed==10 and torch.allclose(average(x), want, rtol=1e-5, atol=1e-6)
    assert [p.shape for p in average.parameters()]==[p.shape for p in learn.model.parameters()]

@pytest.mark.parametrize('f', ['fit', 'fit_one_cycle', 'fit_flat_cos', 'fit_sgdr'])
def test_discriminative_rates(f):
    learn,rates = learner(body_head, splitter=split),[]
    spies = [SparsifyCallback(.5), Holds(), Spy('before_step', lambda l: rates.append([h['lr'] for h in l.opt.hypers]))]
    with quiet(learn):
        if f=='fit_sgdr': learn.fit_sgdr(2, 1, slice(1e-4, 1e-2), cbs=spies)
        else: getattr(learn, f)(3, slice(1e-4, 1e-2), cbs=spies)
    assert all(r[1]==pytest.approx(100*r[0]) for r in rates) and len(rates)==9
    assert [len(v) for v in zero_filters(learn.model).values()]==[4, 6, 0]

def test_learn_save_in_the_middle_of_training(tmp_path): # a file that was written by hand holds what was zero then
    learn = learner(tmp=tmp_path)
    fit(learn, 3, cbs=[SparsifyCallback(.5, schedule=linear()), Spy('after_epoch', lambda l: l.save(f'at{l.epoch}'))])
    counts = []
    for i in range(3):
        learn.load(f'at{i}')
        counts.append(sum(map(len, zero_filters(learn.model).values())))
    assert counts==[0, 5, 10]

@pytest.mark.skipif(importlib.util.find_spec('tensorboard') is None, reason='tensorboard is not installed')
def test_tensorboard(tmp_path):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    fit(learner(tmp=tmp_path), 3, cbs=[SparsifyCallback(.5, schedule=linear()), TensorBoardCallback(tmp_path/'log', trace_model=False, log_preds=False)])
    log = EventAccumulator(str(tmp_path/'log')).Reload()
    assert [round(e.value, 4) for e in log.Scalars('sparsity')]==[0, .25, .5] and len(log.Scalars('compression'))==3

@pytest.mark.cuda
@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_mixed_precision_on_a_gpu(mode):
    learn = learner(dls=digits_dls(bs=128, valid_pct=.75).cuda())
    clean_fit = fit(learn, 4, cbs=[MixedPrecision(mode), SparsifyCallback(.5, criterion='taylor_act'), Holds()])
    assert next(learn.model.parameters()).is_cuda and [len(v) for v in zero_filters(clean_fit.model).values()]==[4, 6, 0]
    assert learn.prune().removed==10

# ---- what a table and a picture say

def test_layers_and_plot():
    cb = SparsifyCallback(.5, schedule=linear())
    with pytest.raises(ValueError, match='nothing has been made sparse yet'): cb.plot()
    learn = fit(learner(), 3, cbs=cb)
    assert list(cb.layers)==['0','4'] and cb.layers.index.tolist()==[(0,0.), (1,.5), (2,1.)] and cb.layers.to_numpy().tolist()==[[0,0], [2/8,3/12], [4/8,6/12]]
    (ax,) = cb.plot().axes
    assert {l.get_label():list(l.get_ydata()) for l in ax.lines}=={'sparsity, requested':[0,.25,.5], 'sparsity':[0,.25,.5]}
    (ax,) = cb.plot(by_layer=True).axes
    assert {l.get_label() for l in ax.lines}=={'sparsity of 0','sparsity of 4'}

# ---- memory

def held_by(*cbs): # bytes of all tensors that callbacks hold beside the model's, each memory once
    seen = {}
    def look(v, depth=0):
        if isinstance(v, torch.Tensor) and not isinstance(v, nn.Parameter): seen[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        elif isinstance(v, dict): [look(i, depth+1) for i in v.values()]
        elif isinstance(v, (list,tuple)): [look(i, depth+1) for i in v]
        elif type(v).__name__=='Masks': look(v.keep, depth+1)
    for c in cbs: look({k:v for k,v in vars(c).items() if k not in ('_scratch',)})
    return sum(seen.values())

@pytest.mark.parametrize('granularity', ['weight', 'column', 'kernel', 'filter', 'shared_row'])
def test_at_most_a_byte_a_weight(granularity):
    make = lambda: nn.Sequential(nn.Conv2d(1,160,3,padding=1), nn.BatchNorm2d(160), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Conv2d(160,200,3,padding=1), nn.BatchNorm2d(200), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(200,10))
    learn,seen = learner(make),[]
    n = sum(m.weight.numel() for m in learn.model if hasattr(m, 'weight') and m.weight.dim()>1)
    for _ in range(2): # and no more in a second fit
        cb = SparsifyCallback(.5, granularity)
        look = lambda l: seen.append(held_by(cb, *kept(l))) if l.training else None
        fit(learn, 1, cbs=[cb, Holds(), Spy('after_step', look)])
    assert 0<max(seen)<=n

# ---- learn.prune

def sliced(t, edits):
    for e in edits: t = t.index_select(e.dim, torch.tensor(e.keep))
    return t

@pytest.mark.parametrize('opt', OPTS)
def test_prune_after_training(opt):
    learn = fit(learner(partial(small_resnet, width=4), opt_func=OPTS[opt]), cbs=SparsifyCallback(.5))
    keys,ids = list(learn.model.state_dict()),[id(p) for p in learn.model.parameters()]
    state = lambda: {n:{k:v.clone() for k,v in getattr(learn.opt, 'opt', learn.opt).state.get(p, {}).items() if isinstance(v, torch.Tensor)} for n,p in learn.model.named_parameters()}
    with quiet(learn): before,preds,total = state(),learn.get_preds()[0],sum(p.numel() for p in learn.model.parameters())
    r = learn.prune()
    with quiet(learn): after = learn.get_preds()[0]
    assert torch.allclose(after, preds, rtol=1e-5, atol=1e-6) and r.error<1e-10 and r.removed==28
    assert sum(p.numel() for p in learn.model.parameters())==r.params[1]<total/2
    assert list(learn.model.state_dict())==keys and [id(p) for p in learn.model.parameters()]==ids and type(learn.model).__name__=='SmallResNet'
    edits = {}
    for e in r.plan.edits: edits.setdefault(e.param, []).append(e)
    for n,s in state().items():
        assert s.keys()==before[n].keys()
        for k,v in s.items(): assert torch.equal(v, sliced(before[n][k], edits.get(n, [])) if before[n][k].dim() else before[n][k])
    assert any(v.dim() for s in before.values() for v in s.values()) and not kept(learn) and not hasattr(learn, 'keep_zeros')
    w = weights(learn.model)
    fit(learn, 1)
    moved = {n for n,p in learn.model.named_parameters() if not torch.equal(p, w[n])}
    assert moved==set(dict(learn.model.named_parameters()))

def test_prune_while_an_output_is_still_held():
    learn = fit(learner(), cbs=SparsifyCallback(.5))
    held = learn.model(example_batch(learn)[0]) # as a notebook does
    learn.prune()
    fit(learn, 1)
    assert held.shape==(2,10)

def test_rounds():
    learn = learner(partial(small_resnet, width=8))
    for k,n in enumerate((56, 28)): # half of 112 channels, then half of what is left
        fit(learn, 2, cbs=SparsifyCallback(.5))
        assert learn.prune().removed==n
        fit(learn, 1)
        assert not any(map(len, zero_filters(learn.model).values()))

def test_prune_with_nothing_dead_warns():
    learn = fit(learner(), 1)
    before = weights(learn.model)
    with pytest.warns(NoEffectWarning, match='nothing is dead'): r = learn.prune()
    assert r.removed==0 and equal(before, weights(learn.model))

def test_prune_before_training_and_without_an_optimizer():
    learn = learner()
    r = learn.prune(.5)
    assert r.removed==10 and learn.opt is None and learn.model[0].out_channels==4
    fit(learn, 1)

def test_prune_to_a_budget():
    learn = fit(learner(partial(small_resnet, width=8)), 1)
    r = learn.prune(budget=Budget(macs=.5))
    assert 0<r.macs[1]<=r.macs[0]/2 and r.removed>0
    fit(learn, 1)

def test_prune_with_the_options_of_the_pruner():
    learn = fit(learner(partial(small_resnet, width=16)), 1)
    r = learn.prune(.4, context='isomorphic', round_to=4, per='macs', normalizer='none', min_keep=4, max_ratio=.6)
    assert r.removed and all(after%4==0 and after>=4 and before-after<=.6*before for _,before,after in r.rows())
    r = learn.prune(budget=Budget(memory=.9), ignore=nn.BatchNorm2d)
    assert r.removed and r.measured is None
    fit(learn, 1)

def test_prune_with_exact_norms():
    learn = fit(learner(lambda: nn.Sequential(nn.Conv2d(1,8,3), nn.Flatten(), nn.LayerNorm(8*36), nn.Linear(8*36,10))), 1)
    with torch.no_grad(): learn.model[0].weight[:4],learn.model[0].bias[:4] = 0,0
    with torch.no_grad(): learn.model[2].weight[:4*36],learn.model[2].bias[:4*36] = 0,0
    x, = example_batch(learn)
    want = learn.model.eval()(x)
    with pytest.warns(NoEffectWarning): assert not learn.prune().removed # the statistics would be others
    assert learn.prune(exact_norms=True).removed==4 and torch.allclose(learn.model.eval()(x), want, rtol=1e-4, atol=1e-5)
    fit(learn, 1)

def test_prune_shared_kernels():
    learn = fit(learner(), cbs=SparsifyCallback(.5, 'shared_kernel'))
    x, = example_batch(learn)
    want = learn.model.eval()(x)
    assert learn.prune().removed==10 and torch.allclose(learn.model(x), want, rtol=1e-5, atol=1e-5)

def test_what_cannot_go_stays_masked():
    learn = fit(learner(), cbs=SparsifyCallback(.5, 'weight'))
    zero = zero_at(learn.model)
    r = learn.prune(.25, ignore='4') # some filters of the first layer go, their single zeros with them
    (keeper,) = kept(learn)
    edits = {}
    for e in r.plan.edits: edits.setdefault(e.param, []).append(e)
    for n in ('0.weight', '4.weight', '9.weight'): assert torch.equal(~keeper.masks.keep[n].expand_as(learn.model.get_parameter(n)), sliced(zero[n], edits.get(n, [])))
    fit(learn, 1, cbs=Holds())

def test_pruned_behind_the_learners_back_is_refused():
    learn = fit(learner(), cbs=SparsifyCallback(.5))
    Pruner(learn.model, example_batch(learn)).prune()
    with pytest.raises(Exception, match='before it was pruned.*learn.remove_cb.KeepZeros'): fit(learn, 1)
    learn.remove_cb(KeepZeros)
    fit(learn, 1, reset_opt=True)

def test_sparsify_callback_on_board_over_a_prune():
    learn = learner(partial(small_resnet, width=8))
    learn.add_cb(SparsifyCallback(.5))
    fit(learn)
    assert learn.prune().removed==56
    fit(learn)
    assert learn.prune().removed==28

# ---- refusals come before training

@pytest.mark.parametrize('cb,text', [
    (lambda: SparsifyCallback({'nine':.5}), "no group of channels 'nine'"),
    (lambda: SparsifyCallback(.5, only='nine'), "only: no layer 'nine'"),
    (lambda: SparsifyCallback(.5, ignore=['0','4','9']), 'leave no layer'),
    (lambda: SparsifyCallback({'9':.5}), 'the output of the model keeps its shape'),
    (lambda: SparsifyCallback(.5, 'kernel', only='9'), 'not defined for Linear'),
    (lambda: SparsifyCallback(.5, 'weight', criterion='bn_scale'), "needs granularity='filter'"),
    (lambda: SparsifyCallback(.5, criterion=lambda w: w.sum()), r'returned shape \(\)'),
    (lambda: SparsifyCallback(.5, criterion=lambda w: w/0*0), 'returned NaN'),
])
def test_refused_when_fit_begins(cb, text):
    learn = learner()
    before,n = weights(learn.model),[]
    with pytest.raises(Exception, match=text): fit(learn, cbs=[cb(), Spy('before_batch', lambda l: n.append(1))])
    assert not n and equal(before, weights(learn.model)) and len(learn.metrics)==1 and not kept(learn)

def test_two_fractions_for_the_same_channels_are_refused():
    learn = learner(partial(small_resnet, width=4))
    with pytest.raises(Exception, match="'stage1.conv2' writes the same channels"): fit(learn, cbs=SparsifyCallback({'conv1':.5, 'stage1.conv2':.25}))
    fit(learn, cbs=SparsifyCallback({'conv1':.5, 'stage1.conv2':.5}))
    assert len(zero_filters(learn.model)['conv1'])==2
