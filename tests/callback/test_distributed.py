"""Two processes on one machine, over gloo, by fastai's own means: `with learn.distrib_ctx(): learn.fit(...)`

All that needs them runs in one launch; the tests look at what it brought back."""
import multiprocessing, os, random, socket, sys, warnings
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
import numpy as np
import pytest, torch
import torch.distributed as dist
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.distributed import DistributedDL, DistributedTrainer # adds learn.distrib_ctx
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from torch import nn
from fasterprune.callback import prune # adds learn.prune
from fasterprune.callback.base import example_batch
from fasterprune.callback.keep_zeros import KeepZeros
from fasterprune.callback.resume import ResumeCallback
from fasterprune.callback.sparsify import SparsifyCallback
from fasterprune.core import NoEffectWarning
from fasterprune.surgery.pruner import Pruner

pytest.importorskip('accelerate')
pytestmark = [pytest.mark.filterwarnings('ignore'), pytest.mark.skipif(sys.platform=='win32', reason='there is no forkserver')]
torch.set_num_threads(1)
N,BS,PROCESSES = 64,8,2

# ---- what fastai and torch do on GPUs only

def _broadcast(self, t, rank): # fastai's sends the order of the data by way of a GPU
    t = torch.tensor(t)
    dist.broadcast(t, rank)
    return t.tolist()

def _sync_forward(self, x): # torch's SyncBatchNorm refuses a CPU: the same sums, by an all-reduce that can be differentiated
    if not (self.training and dist.is_initialized()): return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)
    dims,n = (0,2,3),torch.tensor(float(x.numel()/x.shape[1]), dtype=x.dtype)
    from torch.distributed.nn.functional import all_reduce
    total,s,q = all_reduce(torch.cat([n[None], x.sum(dims), (x*x).sum(dims)])).split([1, x.shape[1], x.shape[1]])
    mean = s/total; var = q/total-mean*mean
    with torch.no_grad():
        self.num_batches_tracked.add_(1)
        for b,v in ((self.running_mean, mean), (self.running_var, var*total/(total-1))): b.mul_(1-self.momentum).add_(self.momentum*v)
    at = lambda t: t.view(1,-1,1,1)
    return (x-at(mean))/(at(var)+self.eps).sqrt()*at(self.weight)+at(self.bias)

# ---- the training: the joint batch of two processes is one of twice the size

def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, 1, 6, 6, generator=g, dtype=torch.float64)
    return x,(x[:,0,:3].sum((1,2))>0).long()+2*(x[:,0,3:].sum((1,2))>0).long()

def net(bn): # float64, so that rounding decides nothing
    torch.manual_seed(0)
    norm = (lambda c: nn.BatchNorm2d(c)) if bn else (lambda c: nn.GroupNorm(1, c))
    return nn.Sequential(nn.Conv2d(1,8,3,padding=1), norm(8) if bn else nn.Identity(), nn.ReLU(), nn.Conv2d(8,12,3), norm(12) if bn else nn.Identity(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12,4)).double()

def learner(bn, joint, rank=0):
    torch.manual_seed(rank); random.seed(rank); np.random.seed(rank) # each process draws other numbers
    x,y = data()
    half = N//PROCESSES
    if joint: # fastai gives the first half of the data to the first process
        order = [i+half*r for k in range(0, half, BS) for r in range(PROCESSES) for i in range(k, k+BS)]
        x,y = x[order],y[order]
    sets = [torch.utils.data.TensorDataset(x, y)]*2
    dls = DataLoaders.from_dsets(*sets, bs=BS*(PROCESSES if joint else 1), shuffle=False, num_workers=0, device='cpu')
    dls.train.shuffle = dls.train.drop_last = False
    return Learner(dls, net(bn), loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=.9))

CASES = dict(
    l1=(False, lambda: SparsifyCallback(.5)),
    bn=(True, lambda: SparsifyCallback(.5, context='global', schedule='linear')),
    random=(False, lambda: SparsifyCallback(.5, 'weight', 'global', 'random', every=3)),
    taylor=(False, lambda: SparsifyCallback(.5, context='global', criterion='taylor_act', n_batches=2, schedule='one_shot')),
    fisher=(False, lambda: SparsifyCallback(.5, criterion='fisher_w', n_batches=1, schedule='one_shot')),
    std=(True, lambda: SparsifyCallback(.5, context='global', criterion='std_act', n_batches=3, schedule='one_shot')),
    movement=(False, lambda: SparsifyCallback(.5, 'kernel', criterion='movement', schedule='one_shot', ignore='8')),
    wanda=(False, lambda: SparsifyCallback(.5, 'weight', criterion='wanda', n_batches=2, schedule='one_shot')),
    mi=(False, lambda: SparsifyCallback(.5, context='global', criterion='mi_binned', n_batches=2, schedule='one_shot')),
)

def run(name, joint, rank=0):
    bn,make = CASES[name]
    learn,cb = learner(bn, joint, rank),make()
    out = StringIO()
    with warnings.catch_warnings(record=True) as said, redirect_stdout(out), context(learn, joint, bn), learn.no_bar():
        warnings.simplefilter('always')
        learn.fit(3, .05, cbs=cb)
    res = dict(masks={n:k.clone() for n,k in cb.masks.keep.items()}, units=cb.masks.units, weights={n:t.clone() for n,t in learn.model.state_dict().items()}, history=cb.history.to_dict('list'),
        printed=out.getvalue(), wrapped=type(learn.model).__name__, keepers=sum(isinstance(c, KeepZeros) for c in learn.cbs), norms=[type(m).__name__ for m in learn.model if hasattr(m, 'running_mean')])
    return learn,cb,res

@contextmanager
def context(learn, joint, bn):
    if joint: yield
    else:
        with learn.distrib_ctx(sync_bn=bn, cpu=True): yield

def _more(rank, tmp): # things of which one launch is enough
    res = {}
    learn,cb,_ = run('l1', False, rank)
    x = torch.randn(5, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = learn.model.eval()(x)
    r = learn.prune()
    res['prune'] = dict(removed=r.removed, error=float((learn.model(x)-before).abs().max()), params=[p.numel() for p in learn.model.parameters()])
    with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging(): learn.fit(1, .01) # and trains on, in two processes
    res['after'] = [p.detach().clone() for p in learn.model.parameters()]
    learn = learner(False, False, rank)
    with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging():
        learn.fit(1, .01)
        r = learn.prune(.5, criterion='taylor_act', context='global', data=learn.dls.train) # while the learner is set up for several processes
    res['chosen'] = [p.shape for p in learn.model.parameters()]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn = learner(False, False, rank)
        with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging(): learn.fit(1, .01, cbs=SparsifyCallback(.01))
    res['warned'] = sum(issubclass(w.category, NoEffectWarning) for w in said)
    # the batch that finds coupled layers is not drawn from the training's random numbers
    learn,orders = learner(False, False, rank),[]
    learn.dls.train.shuffle = True
    state = learn.dls.train.rng.getstate()
    for cbs in ([], [SparsifyCallback(0.)]):
        learn.dls.train.rng = random.Random(); learn.dls.train.rng.setstate(state)
        seen = []
        with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging(): learn.fit(1, .01, cbs=[*cbs, Callback(before_batch=lambda self: seen.append(self.xb[0][:,0,0,0].tolist()))])
        orders.append(seen)
    res['undisturbed'] = orders[0]==orders[1]
    res['resume'] = _resumed(rank, tmp)
    return res

def _resumed(rank, tmp): # written by the first process, read by both
    def go(stop, *cbs):
        learn,cb = learner(False, False, rank+10*(not stop)),CASES['taylor'][1]()
        learn.path,learn.model_dir = tmp,'.'
        with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging(): learn.fit(3, .05, cbs=[cb, *cbs])
        return learn
    def stop(self):
        if self.epoch==1 and self.iter==2: raise RuntimeError('stop')
    want = go(True)
    try: go(True, ResumeCallback(every=1), Callback(before_batch=stop))
    except RuntimeError: pass
    dist.barrier()
    files = sorted(p.name for p in tmp.iterdir())
    dist.barrier()
    got = go(False, ResumeCallback(every=1))
    dist.barrier()
    return dict(files=files, same=all(torch.equal(a, b) for a,b in zip(want.model.parameters(), got.model.parameters())), left=[p.name for p in tmp.iterdir()])

def _process(rank, port, tmp):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), ACCELERATE_USE_CPU='true')
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    DistributedDL._broadcast = _broadcast
    nn.SyncBatchNorm.forward = _sync_forward
    nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None # which refuses it too
    res = {n:run(n, False, rank)[2] for n in CASES}
    torch.save((res, _more(rank, tmp/'resume')), tmp/f'{rank}.pt')
    dist.destroy_process_group()

@pytest.fixture(scope='module')
def both(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('two')
    (tmp/'resume').mkdir()
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    ctx = multiprocessing.get_context('forkserver') # its processes begin with the imports done
    ctx.set_forkserver_preload(['fastai.vision.all', 'fastai.distributed', 'fasterprune.all', 'nbdev.test', 'pandas'])
    ps = [ctx.Process(target=_process, args=(r, port, tmp)) for r in range(PROCESSES)]
    for p in ps: p.start()
    for p in ps: p.join(400)
    assert [p.exitcode for p in ps]==[0]*PROCESSES
    return [torch.load(tmp/f'{r}.pt', weights_only=False) for r in range(PROCESSES)]

def equal(a, b): return a.keys()==b.keys() and all(torch.equal(a[n], b[n]) for n in a)

@pytest.mark.parametrize('name', CASES)
def test_the_same_on_each(both, name):
    a,b = (res[name] for res,_ in both)
    assert equal(a['masks'], b['masks']) and a['units']==b['units'] and equal(a['weights'], b['weights']) and a['history']==b['history']
    for n,k in a['masks'].items(): assert not a['weights'][n][~k.expand_as(a['weights'][n])].any()
    assert sum(z for z,_ in a['units'].values())>0 and a['wrapped']=='Sequential' and a['keepers']==1

@pytest.mark.parametrize('name', CASES)
def test_as_one_process_on_the_joint_batch(both, name):
    one,two = run(name, True)[2],both[0][0][name]
    assert equal(one['masks'], two['masks']) and one['units']==two['units']
    for n,w in one['weights'].items(): torch.testing.assert_close(two['weights'][n], w, rtol=1e-9, atol=1e-11)
    assert one['history'].keys()==two['history'].keys() and one['history']['sparsity']==two['history']['sparsity']

def test_half_of_the_data_chooses_otherwise(both): # so that the tests above would fail if statistics were not summed over processes
    other = []
    for name in ('taylor', 'std', 'wanda', 'mi', 'movement', 'fisher'):
        learn,cb = learner(CASES[name][0], True),CASES[name][1]()
        x,y = data()
        half = torch.utils.data.TensorDataset(x[:N//2], y[:N//2])
        learn.dls = DataLoaders.from_dsets(half, half, bs=BS, shuffle=False, num_workers=0, device='cpu')
        learn.dls.train.shuffle = False
        with learn.no_bar(), learn.no_logging(): learn.fit(3, .05, cbs=cb)
        other.append(not equal({n:k for n,k in cb.masks.keep.items()}, both[0][0][name]['masks']))
    assert sum(other)>=4

def test_batchnorm_is_synchronised(both):
    assert both[0][0]['bn']['norms']==['SyncBatchNorm']*2
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net(True))
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    model.load_state_dict(both[0][0]['bn']['weights'])
    want = model.eval()(x)
    r = Pruner(model, x).prune() # what is left of such a training is pruned like any other
    assert r.removed==10 and torch.allclose(model(x), want, rtol=1e-10, atol=1e-12)

def test_only_the_first_prints_and_warns(both):
    a,b = (res['l1']['printed'] for res,_ in both)
    assert len(a.split('\n'))==4 and not b # three epochs
    assert [more['warned'] for _,more in both]==[1, 0]

def test_pruned_alike_and_trained_on(both):
    (_,a),(_,b) = both
    assert a['prune']==b['prune'] and a['prune']['removed']==10 and a['prune']['error']<1e-10
    assert all(torch.equal(x, y) for x,y in zip(a['after'], b['after']))
    assert a['chosen']==b['chosen'] and a['chosen'][0][0]<8

def test_the_order_of_the_data_is_not_disturbed(both): assert all(more['undisturbed'] for _,more in both)

def test_resumed(both):
    for _,more in both: assert more['resume']==dict(files=['resume.pth'], same=True, left=[])
