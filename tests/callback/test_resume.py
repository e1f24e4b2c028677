"A training that is killed with SIGKILL, and goes on in another process: the same masks, the same weights, the same history"
import multiprocessing, os, random, signal, sys
from functools import partial
from pathlib import Path
import numpy as np
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *  # fit_one_cycle, fine_tune
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam, OptimWrapper, SGD
from fastai.torch_core import params
from torch import nn
from torch.optim.swa_utils import AveragedModel
from fasterprune.callback.prune_callback import PruneCallback
from fasterprune.callback.keep_zeros import KeepZeros
from fasterprune.callback.growing import Growth, GrowingCallback
from fasterprune.callback.lottery import CheckpointCallback, lottery_ticket
from fasterprune.callback.patience import Patience
from fasterprune.callback.kernel_progressive import PKPCallback
from fasterprune.callback.regrow import RegrowCallback
from fasterprune.callback.regularise import GroupLassoCallback, GroupSparsityCallback, SlimmingCallback
from fasterprune.callback.resume import ResumeCallback
from fasterprune.callback.sparsify import SparsifyCallback
from fasterprune.criteria.base import criteria
from fasterprune.data import digits_dls
from fasterprune.schedule import agp, hold, linear
from fasterprune.surgery.planning.budget import Budget
from support.small_fit import equal

pytestmark = [pytest.mark.filterwarnings('ignore'), pytest.mark.skipif(sys.platform=='win32', reason='there are no such signals')]
torch.set_num_threads(1)

class Noise: # an augmentation that draws from every source
    def __call__(self, x): return x+.1*torch.randn_like(x)*np.random.rand()*random.random() if x.is_floating_point() else x

def make(seed, path, opt=partial(SGD, mom=.9)):
    torch.manual_seed(seed); random.seed(seed); np.random.seed(seed)
    body = nn.Sequential(nn.Conv2d(1,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8,12,3,padding=1), nn.BatchNorm2d(12), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.1), nn.Linear(12,10))
    d = digits_dls(bs=128, valid_pct=.75) # 3 batches an epoch
    dls = DataLoaders.from_dsets(d.train.dataset, d.valid.dataset, bs=128, after_batch=Noise(), num_workers=0, device='cpu')
    return Learner(dls, nn.Sequential(body, head), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=path, model_dir='.', opt_func=opt, splitter=lambda m: [params(m[0]), params(m[1])])

class Kill(Callback):
    "SIGKILL in the middle of everything: nothing of the process gets to say goodbye"
    run_valid = False
    def __init__(self, when, step, order): self.step,self.seen,self.order = step,0,order; setattr(self, when, self._now)
    def _now(self):
        self.seen += 1
        if self.seen==self.step: os.kill(os.getpid(), signal.SIGKILL)

WHAT = { # what is trained, as a function of the callbacks
    'epochs': lambda l, cbs: l.fit_one_cycle(3, 1e-2, cbs=cbs),
    'phases': lambda l, cbs: l.fine_tune(2, 1e-2, cbs=cbs),
    'long': lambda l, cbs: l.fit(7, 1e-2, cbs=cbs),
}
class Average(Callback):
    def before_fit(self): self.average = AveragedModel(self.model)
    def after_step(self): self.average.update_parameters(self.model)

HOW = {
    'l1': lambda: [SparsifyCallback(.5)],
    'steps': lambda: [SparsifyCallback(.5, schedule=linear(), every=2)],
    'taylor': lambda: [SparsifyCallback(.5, criterion='taylor_act', context='global', n_batches=2)],
    'movement': lambda: [SparsifyCallback(.5, 'weight', criterion='movement', schedule=agp(start=.2), ignore='1.3')],
    'fisher': lambda: [SparsifyCallback(.5, criterion='fisher_w', n_batches=1)],
    'falls': lambda: [SparsifyCallback(.5, schedule='dsd', every=2)],
    'two': lambda: [SparsifyCallback(.5, ignore='1.3'), SparsifyCallback(.5, 'weight', only='1.3')],
    'patience': lambda: [SparsifyCallback(.6, every=Patience(2, steps=3, min_delta=10., at_once=True))], # chooses at epochs 0, 3 and 6
    'soft': lambda: [SparsifyCallback(.5, criterion='l2', schedule=hold(), regrow=True)],
    'both': lambda: [SparsifyCallback(.6, every=Patience(1, steps=4, min_delta=10.), ignore='1.3'), SparsifyCallback(.5, 'weight', criterion='taylor_w', schedule=hold(), only='1.3', regrow=True, n_batches=2)],
    'pattern': lambda: [SparsifyCallback(.5, 'pattern', schedule=linear(), every=2)],
    'pkp': lambda: [PKPCallback(.5, end=.9)],
    'greg1': lambda: [GrowingCallback(.5, growth=Growth(every=1), end=.8)],
    'greg2': lambda: [GrowingCallback(.5, growth=Growth(every=1), pick=.2, end=.8)],
    'set': lambda: [RegrowCallback(.8, grow='random', every=2, density='uniform', fraction=.4)],
    'rigl': lambda: [RegrowCallback(.8, every=2, density='uniform', fraction=.4)],
    'slimming': lambda: [SlimmingCallback(1e-2)],
    'lasso': lambda: [GroupLassoCallback(1e-1)],
    'groups': lambda: [GroupSparsityCallback(1e-2)],
    'remember': lambda: [CheckpointCallback(1), SparsifyCallback(.5)],
    'prune': lambda: [PruneCallback(.5, schedule=linear(), every=2)],
    'wait': lambda: [PruneCallback(.5, every=Patience(2, steps=3, min_delta=10., at_once=True))],
    'budget': lambda: [PruneCallback(budget=Budget(macs=.4), criterion='taylor_act', context='global', n_batches=2, schedule=linear(), compensate=True)],
    'dead': lambda: [GroupLassoCallback(2.), PruneCallback(every=2)],
    'average': lambda: [a := Average(), PruneCallback(.5, schedule=linear(), also=lambda: a.average.module)],
    'company': lambda: [SparsifyCallback(.5, schedule=agp(end=.5)), SaveModelCallback('accuracy'), EarlyStoppingCallback('valid_loss', patience=9), GradientAccumulation(200), MixedPrecision('bf16')],
}

def trained(path, how, what, seed=0, every='epoch', kill=None, resume=True, opt=partial(SGD, mom=.9)):
    learn,cbs = make(seed, path, opt),HOW[how]()
    with learn.no_bar(), learn.no_logging(): WHAT[what](learn, [*cbs, *([ResumeCallback(every=every)] if resume else []), *([kill] if kill else [])])
    return learn,cbs

def _dies(*args, kill): torch.set_num_threads(1); trained(*args, kill=Kill(*kill))

def killed(*args, kill):
    "Train in another process until it is killed: one that begins with the imports done"
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(['fastai.vision.all', 'fastai.distributed', 'fasterprune.all', 'nbdev.test', 'pandas'])
    p = ctx.Process(target=_dies, args=args, kwargs=dict(kill=kill))
    p.start(); p.join(120)
    assert p.exitcode==-signal.SIGKILL

def alike(a, b): return len(a)==len(b) and all(x.keys()==y.keys() and all(torch.equal(x[k], y[k]) if isinstance(x[k], torch.Tensor) else x[k]==y[k] for k in x) for x,y in zip(a, b))

def same(a, b):
    (la,ca),(lb,cb) = a,b
    for x,y in zip(ca, cb):
        if hasattr(x, 'masks'): assert x.masks==y.masks
        if isinstance(x, PruneCallback): assert x.history.equals(y.history) and x.reports==y.reports and x.whole==y.whole and len(x.reports)
        if isinstance(x, Average): assert equal(x.average.state_dict(), y.average.state_dict())
        if isinstance(x, SparsifyCallback): assert x.history.equals(y.history) and x.layers.equals(y.layers)
        if isinstance(x, CheckpointCallback): assert x.checkpoint.step==y.checkpoint.step and equal(x.checkpoint.model, y.checkpoint.model) and alike(x.checkpoint.opt['state'], y.checkpoint.opt['state'])
    sa,sb = la.model.state_dict(),lb.model.state_dict()
    assert equal(sa, sb)
    assert la.recorder.losses==lb.recorder.losses and la.recorder.values==lb.recorder.values and la.recorder.lrs==lb.recorder.lrs

CASES = [ # how, what, every, killed at which event for which time, in which place among the callbacks
    ('l1', 'epochs', 'epoch', 'before_batch', 9, 0), ('l1', 'epochs', 1, 'after_step', 5, 0), ('l1', 'epochs', 'epoch', 'after_step', 2, 2000), ('l1', 'phases', 1, 'after_step', 7, 0),
    ('steps', 'epochs', 1, 'after_batch', 8, 0), ('steps', 'epochs', 2, 'after_step', 6, 2000), ('taylor', 'epochs', 1, 'before_step', 3, 0), ('taylor', 'epochs', 'epoch', 'after_epoch', 2, 2000),
    ('movement', 'epochs', 1, 'after_step', 5, 0), ('fisher', 'epochs', 1, 'after_step', 4, 0), ('falls', 'epochs', 1, 'after_step', 7, 0), ('two', 'epochs', 2, 'before_validate', 2, 0), ('company', 'epochs', 1, 'after_step', 4, 0),
    ('patience', 'long', 1, 'after_step', 5, 0), ('patience', 'long', 'epoch', 'before_batch', 14, 0), ('soft', 'epochs', 1, 'after_step', 6, 0), ('soft', 'epochs', 'epoch', 'after_train', 2, 0), ('both', 'long', 1, 'before_step', 12, 0),
    ('pattern', 'epochs', 1, 'after_step', 6, 0), ('pkp', 'epochs', 1, 'after_step', 5, 0), ('greg1', 'epochs', 1, 'after_step', 6, 0), ('greg1', 'epochs', 'epoch', 'after_step', 9, 0), ('greg2', 'epochs', 1, 'after_step', 3, 0), ('greg2', 'epochs', 1, 'after_step', 6, 0),
    ('prune', 'epochs', 1, 'after_step', 6, 0), ('prune', 'epochs', 'epoch', 'after_batch', 8, 0), ('wait', 'long', 1, 'after_step', 12, 0), ('budget', 'epochs', 1, 'after_step', 9, 0), ('dead', 'epochs', 1, 'after_step', 6, 0), ('average', 'epochs', 1, 'after_step', 8, 0),
    ('set', 'epochs', 1, 'after_step', 4, 0), ('rigl', 'epochs', 1, 'after_step', 4, 0), ('slimming', 'epochs', 1, 'after_step', 4, 0), ('lasso', 'epochs', 1, 'after_step', 5, 0), ('groups', 'epochs', 1, 'after_step', 4, 0), ('remember', 'epochs', 1, 'after_step', 5, 0),
]

@pytest.mark.parametrize('how,what,every,when,step,order', CASES)
def test_killed_and_resumed(tmp_path, how, what, every, when, step, order):
    want = trained(tmp_path/'a', how, what, resume=False)
    killed(tmp_path/'b', how, what, 0, every, kill=(when, step, order))
    file = tmp_path/'b'/'resume.pth'
    assert file.exists()!=((how,step)==('l1',2)) # killed in the first epoch: nothing was written yet, and it begins anew
    seed = 7 if file.exists() else 0 # another process has other random numbers
    same(want, trained(tmp_path/'b', how, what, seed, every))
    assert not file.exists() and not file.with_suffix('.part').exists()

def test_killed_twice(tmp_path):
    want = trained(tmp_path/'a', 'taylor', 'epochs', resume=False)
    killed(tmp_path/'b', 'taylor', 'epochs', 0, 1, kill=('after_step', 4, 0))
    killed(tmp_path/'b', 'taylor', 'epochs', 7, 1, kill=('after_step', 3, 0))
    same(want, trained(tmp_path/'b', 'taylor', 'epochs', 8, 1))

@pytest.mark.parametrize('opt', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_memory_of_optimizers(tmp_path, opt):
    want = trained(tmp_path/'a', 'l1', 'epochs', resume=False, opt=opt)
    learn,cbs = make(0, tmp_path/'b', opt),HOW['l1']()
    def stop(_):
        if learn.epoch==1 and learn.iter==1: raise RuntimeError('stop')
    with learn.no_bar(), learn.no_logging(), pytest.raises(RuntimeError, match='stop'): WHAT['epochs'](learn, [*cbs, ResumeCallback(every=1), Callback(after_step=stop)])
    same(want, trained(tmp_path/'b', 'l1', 'epochs', 7, 1, opt=opt))

def test_masks_of_an_earlier_fit_come_along(tmp_path):
    def both(path, kill=None):
        learn = make(0, path)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-2, cbs=SparsifyCallback(.75, 'weight', schedule='one_shot', every=1, only='1.3'))
            cb,resume = SparsifyCallback(.5, ignore='1.3'),ResumeCallback(every=1)
            if kill:
                with pytest.raises(RuntimeError): learn.fit(2, 1e-2, cbs=[cb, resume, Callback(after_step=kill)])
                learn = make(7, path) # knows nothing of the first fit
            learn.fit(2, 1e-2, cbs=[cb := SparsifyCallback(.5, ignore='1.3'), ResumeCallback(every=1)] if kill else [cb])
        return learn,[cb]
    seen = []
    def stop(_):
        seen.append(1)
        if len(seen)==4: raise RuntimeError('stop')
    a,b = both(tmp_path/'a'),both(tmp_path/'b', stop)
    same(a, b)
    keep = [next(c for c in l.cbs if isinstance(c, KeepZeros)).masks for l,_ in (a, b)]
    assert keep[0]==keep[1] and '1.3.weight' in keep[0].keep

def test_another_training_is_refused_and_an_ended_one_leaves_nothing(tmp_path):
    killed(tmp_path, 'l1', 'epochs', 0, 'epoch', kill=('before_batch', 9, 0))
    with pytest.raises(Exception, match='its callbacks were .*remove the file to begin anew'): trained(tmp_path, 'two', 'epochs')
    learn = make(0, tmp_path)
    with learn.no_bar(), learn.no_logging(), pytest.raises(Exception, match='its epochs were 3, and are 4'): learn.fit(4, cbs=[*HOW['l1'](), ResumeCallback()])
    assert not any(type(c).__name__=='_Skip' for c in learn.cbs) and len(learn.metrics)==1
    trained(tmp_path, 'l1', 'epochs')
    assert not list(tmp_path.iterdir())

def test_it_disturbs_nothing(tmp_path): # neither a training, nor what runs between trainings
    a,b = trained(tmp_path, 'taylor', 'epochs', resume=False),trained(tmp_path, 'taylor', 'epochs', every=1)
    same(a, b)
    learn = b[0]
    learn.add_cb(ResumeCallback())
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=4, show_plot=False)
        assert len(learn.validate())==2 and len(learn.get_preds())==2
        learn.fit(1)
    assert not list(tmp_path.glob('resume*')) and not any(type(c).__name__=='_Skip' for c in learn.cbs)

def test_lottery_ticket_goes_on_in_its_round(tmp_path):
    def ticket(path, seed, *cbs):
        learn = make(seed, path)
        with learn.no_bar(), learn.no_logging(): return learn,lottery_ticket(learn, .7, 2, 1e-2, fraction=.5, step=1, cbs=cbs)
    seen = []
    def stop(self):
        seen.append(1)
        if len(seen)==9: raise RuntimeError('stop') # 6 steps, and the third of 5
    la,rows = ticket(tmp_path/'a', 0)
    with pytest.raises(RuntimeError, match='stop'): ticket(tmp_path/'b', 0, ResumeCallback(every=1), Callback(before_step=stop))
    lb,again = ticket(tmp_path/'b', 7, ResumeCallback(every=1))
    assert again.equals(rows) and len(rows)==3 and equal(la.model.state_dict(), lb.model.state_dict()) and la.recorder.losses==lb.recorder.losses
