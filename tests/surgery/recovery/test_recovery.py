"After the cut: optimizers go on, copies follow, statistics are estimated again, means are folded in, and the report says all of it"
import warnings
from copy import deepcopy
from functools import partial
import fastai.optimizer as fo
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset
from fasterprune.core import NoEffectWarning, PruningWarning, VerificationError
from fasterprune.data import small_resnet
from fasterprune.surgery import transaction as operation_module
from fasterprune.surgery.cutting.apply import apply_
from fasterprune.surgery.planning.budget import Budget
from fasterprune.surgery.planning.plan import Plan
from fasterprune.surgery.pruner import Pruner
from fasterprune.surgery.recovery.recalibrate import recalibrate_
from support.laws import awake, rel, run, unread

class Net(nn.Module):
    "Convolutions, one of them depthwise, norms and linear layers, in any width"
    def __init__(self, a=8, b=12, h=6):
        super().__init__()
        self.a,self.bn,self.dw = nn.Conv2d(3,a,3,bias=False),nn.BatchNorm2d(a),nn.Conv2d(a,a,3,groups=a)
        self.b,self.h,self.head = nn.Conv2d(a,b,(3,1)),nn.Linear(b,h),nn.Linear(h,5)
    def forward(self, x): return self.head(self.h(self.b(self.dw(self.bn(self.a(x)).relu())).relu().mean((2,3))).tanh())

class Matrices(nn.Module):
    "All that Muon trains; one matrix is square"
    def __init__(self, a=6, b=8): super().__init__(); self.a,self.b,self.c,self.d = nn.Linear(6,a,bias=False),nn.Linear(a,b,bias=False),nn.Linear(b,b,bias=False),nn.Linear(b,3,bias=False)
    def forward(self, x): return self.d(self.c(self.b(self.a(x.flatten(1)[:,:6]).tanh()).tanh()).tanh())

x = torch.randn(6,3,10,10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
target = torch.tensor([0,1,2,0,1,2])
def loss(m): return F.cross_entropy(m(x), target)
def step(m, opt):
    def closure(): opt.zero_grad(); l = loss(m); l.backward(); return l
    if isinstance(opt, optim.LBFGS): return opt.step(closure)
    closure(); opt.step()
def net(kind=Net, *widths, seed=0): torch.manual_seed(seed); return kind(*widths).double()

TORCH = {'sgd': partial(optim.SGD, lr=.1), 'momentum': partial(optim.SGD, lr=.1, momentum=.9, weight_decay=1e-2), 'nesterov': partial(optim.SGD, lr=.1, momentum=.9, nesterov=True, foreach=True),
    'adam': partial(optim.Adam, lr=1e-2), 'amsgrad': partial(optim.AdamW, lr=1e-2, amsgrad=True), 'adamw': partial(optim.AdamW, lr=1e-2, foreach=False), 'fused': partial(optim.AdamW, lr=1e-2, fused=True),
    'adadelta': partial(optim.Adadelta, lr=1.), 'adagrad': partial(optim.Adagrad, lr=1e-2), 'adamax': partial(optim.Adamax, lr=1e-2), 'asgd': partial(optim.ASGD, lr=1e-2, t0=2.),
    'nadam': partial(optim.NAdam, lr=1e-2), 'radam': partial(optim.RAdam, lr=1e-2), 'rmsprop': partial(optim.RMSprop, lr=1e-3, centered=True, momentum=.5), 'rprop': partial(optim.Rprop, lr=1e-2),
    'adafactor': partial(optim.Adafactor, lr=1e-2), 'lbfgs': partial(optim.LBFGS, lr=.1, max_iter=3, history_size=4)}
FASTAI = {'sgd': partial(fo.SGD, lr=.1, mom=.9, wd=1e-2), 'adam': partial(fo.Adam, lr=1e-2), 'rmsprop': partial(fo.RMSProp, lr=1e-3), 'radam': partial(fo.RAdam, lr=1e-2), 'qhadam': partial(fo.QHAdam, lr=1e-2),
    'larc': partial(fo.Larc, lr=.1), 'lamb': partial(fo.Lamb, lr=1e-2), 'ranger': partial(fo.ranger, lr=1e-2, k=4), 'wrapper': lambda ps: fo.OptimWrapper(ps, optim.AdamW, lr=1e-2)}
OPTS = {**{f'torch {k}':v for k,v in TORCH.items()}, **{f'fastai {k}':v for k,v in FASTAI.items()}}

def inner(opt): return inner(opt.opt) if isinstance(opt, (fo.OptimWrapper, fo.Lookahead)) else opt

def pieces(plan):
    "Parameter name → function that takes out what stays, of a tensor that has some of its dimensions at full size"
    keep = {}
    for e in plan.edits: keep.setdefault(e.param, {})[e.dim] = list(e.keep), e.n
    def take(n, v):
        for d,(k,full) in keep.get(n, {}).items():
            if v.dim()>d and v.shape[d]==full: v = torch.from_numpy(np.take(v.numpy(), k, d).copy())
        return v
    return take

def built_small(kind, weights, take, widths):
    "A network that was never large, with those weights"
    small = kind(*widths).double().train()
    small.load_state_dict({n:take(n, v) for n,v in weights.items()})
    return small

def memory(opt, m):
    names = {p:n for n,p in m.named_parameters()}
    return {names[p]:deepcopy(dict(s)) for p,s in inner(opt).state.items() if p in names}

def give_state(opt, m, memory, take):
    "The memory of another optimizer, cut by hand"
    for n,p in m.named_parameters():
        if n in memory: inner(opt).state[p] = {k: take(n, v) if isinstance(v, torch.Tensor) and v.dim() else v for k,v in memory[n].items()}

def same_steps(kind, make, widths, fraction=.5, k=2):
    m = net(kind).train()
    opt = make(list(m.parameters()))
    for _ in range(5): step(m, opt)
    weights,mem,names = deepcopy(m.state_dict()),memory(opt, m),[n for n,_ in m.named_parameters()]
    extra = [deepcopy(o) for o in [getattr(opt, 'slow_weights', None), getattr(opt, 'count', None)]] if isinstance(opt, fo.Lookahead) else None
    r = Pruner(m, x).prune(fraction, optimizer=opt)
    take = pieces(r.plan)
    small = built_small(kind, weights, take, widths)
    ref = make(list(small.parameters()))
    if isinstance(opt, optim.LBFGS): give_history(ref, mem[names[0]], r.plan, weights, names)
    else: give_state(ref, small, mem, take)
    if extra: ref.slow_weights,ref.count = fo.L(fo.L(take(n, w) for n,w in zip(names, extra[0][0]))),extra[1]
    for _ in range(k):
        step(m, opt); step(small, ref)
        for (n,p),q in zip(m.named_parameters(), small.parameters()): assert p.shape==q.shape and torch.allclose(p, q, rtol=1e-9, atol=1e-12), n
    return m,opt

def give_history(ref, mem, plan, weights, names):
    "Pairs of L-BFGS, cut by hand, one parameter after the other"
    take = pieces(plan)
    def cut(v):
        parts = torch.split(v, [weights[n].numel() for n in names])
        return torch.cat([take(n, p.view(weights[n].shape)).flatten() for n,p in zip(names, parts)])
    s = {k:v for k,v in mem.items() if k!='al'}
    for k in ('d', 'prev_flat_grad'): s[k] = cut(s[k])
    for k in ('old_dirs', 'old_stps'): s[k] = [cut(v) for v in s[k]]
    pairs = [(y,d) for y,d in zip(s['old_dirs'], s['old_stps']) if y@d>1e-10]
    s['old_dirs'],s['old_stps'],s['ro'] = [p[0] for p in pairs],[p[1] for p in pairs],[1/(y@d) for y,d in pairs]
    s['H_diag'] = pairs[-1][0]@pairs[-1][1]/(pairs[-1][0]@pairs[-1][0])
    ref.state[ref._params[0]] = s

# ---- the optimizer

@pytest.mark.parametrize('name', OPTS)
def test_a_step_is_that_of_a_network_built_small(name): same_steps(Net, OPTS[name], (4,6,3))

def test_muon(): same_steps(Matrices, partial(optim.Muon, lr=1e-2, momentum=.9), (3,4))
@pytest.mark.parametrize('name', ['torch momentum', 'torch adamw', 'torch adafactor', 'fastai adam', 'fastai ranger'])
def test_square_matrices(name): same_steps(Matrices, OPTS[name], (3,4))

def test_optimizers_of_torch_are_all_tried():
    known = {n for n in dir(optim) if isinstance(getattr(optim, n), type) and issubclass(getattr(optim, n), optim.Optimizer)} - {'Optimizer', 'SparseAdam'}
    assert known=={f.func.__name__ for f in TORCH.values()} | {'Muon'}

def test_parameter_groups_and_frozen_layers():
    m = net().train()
    m.a.weight.requires_grad_(False)
    opt = optim.SGD([dict(params=m.b.parameters(), lr=.01), dict(params=[*m.h.parameters(), *m.head.parameters()])], .1, momentum=.9)
    for _ in range(2): step(m, opt)
    r = Pruner(m, x).prune(.5, optimizer=opt)
    assert r.removed==4+6+3 and [g['lr'] for g in opt.param_groups]==[.01,.1] and [len(g['params']) for g in opt.param_groups]==[2,4]
    for p in (m.b.weight, m.h.weight): assert opt.state[p]['momentum_buffer'].shape==p.shape
    step(m, opt)

class Factored(optim.Optimizer):
    "Keeps rows and columns as the Adafactors of Transformers and timm do"
    def __init__(self, ps, odd=None): super().__init__(ps, {}); self.odd = odd
    def step(self):
        for g in self.param_groups:
            for p in g['params']:
                s = self.state[p]
                if p.dim()>1: s['exp_avg_sq_row'],s['exp_avg_sq_col'] = p.grad.square().mean(-1),p.grad.square().mean(-2)
                s['nested'] = [p.grad.clone(), {'step':1}]
                if self.odd: s[self.odd] = p.grad.new_zeros(7)

def test_rows_columns_and_nested_states():
    for kind in (Net, Matrices):
        m = net(kind)
        opt = Factored(m.parameters())
        step(m, opt)
        before = memory(opt, m)
        plan = Pruner(m, x).prune(.5, optimizer=opt).plan
        take = pieces(plan)
        for n,p in m.named_parameters():
            g = take(n, before[n]['nested'][0])
            assert torch.equal(opt.state[p]['nested'][0], g) and opt.state[p]['nested'][1]=={'step':1}
            if p.dim()==2: # also of a square matrix
                whole = [list(range(k)) for k in before[n]['nested'][0].shape]
                rows,cols = (next((list(e.keep) for e in plan.edits if e.param==n and e.dim==d), whole[d]) for d in (0,1))
                assert torch.equal(opt.state[p]['exp_avg_sq_row'], before[n]['exp_avg_sq_row'][rows]) and torch.equal(opt.state[p]['exp_avg_sq_col'], before[n]['exp_avg_sq_col'][cols])
            if p.dim()>1: assert opt.state[p]['exp_avg_sq_row'].shape==p.shape[:-1] and opt.state[p]['exp_avg_sq_col'].shape==p.shape[:-2]+p.shape[-1:]

def everything(m): return {n:(id(t), t.clone()) for n,t in [*m.named_parameters(), *m.named_buffers()]}
def same(a, b): return a.keys()==b.keys() and all(a[k][0]==b[k][0] and torch.equal(a[k][1], b[k][1]) for k in a)

def test_a_state_that_nobody_can_cut_is_refused_before_anything_changed():
    m = net()
    opt = Factored(m.parameters(), odd='absmax')
    step(m, opt)
    before = everything(m)
    with pytest.raises(ValueError, match=r"Factored keeps 'absmax' of shape \(7,\) for a parameter of shape .* prune without optimizer="): Pruner(m, x).prune(.5, optimizer=opt)
    assert same(everything(m), before) and m.a.out_channels==8

def test_an_optimizer_of_another_model_is_refused():
    m,other = net(),net(seed=1)
    before = everything(m)
    with pytest.raises(ValueError, match='SGD optimizer trains no parameter of this Net'): Pruner(m, x).prune(.5, optimizer=optim.SGD(other.parameters(), .1))
    assert same(everything(m), before)

@pytest.mark.parametrize('name', ['torch lbfgs', 'torch adafactor', 'fastai ranger', 'fastai wrapper'])
def test_everything_comes_back_after_a_failure(name, monkeypatch):
    def trained():
        m = net().train()
        opt = OPTS[name](list(m.parameters()))
        for _ in range(4): step(m, opt)
        return m,opt
    (m,opt),twin = trained(),trained()
    before = everything(m)
    monkeypatch.setattr(operation_module, 'relative_error', lambda *a: .5)
    with pytest.raises(VerificationError): Pruner(m, x).prune(.5, optimizer=opt)
    assert same(everything(m), before)
    for _ in range(5): step(m, opt); step(*twin)
    assert all(torch.equal(p, q) for p,q in zip(m.parameters(), twin[0].parameters()))

@pytest.mark.parametrize('name', ['torch momentum', 'torch lbfgs', 'fastai adam', 'fastai ranger', 'fastai wrapper'])
def test_a_new_bias_joins_its_weight(name):
    m = nn.Sequential(nn.Conv2d(3,4,1), nn.Sigmoid(), nn.Conv2d(4,6,1,bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(600,5)).double()
    opt = OPTS[name](list(m.parameters()))
    for _ in range(3): step(m, opt)
    with torch.no_grad(): m[0].weight[:2] = 0
    want = run(m, x)
    r = Pruner(m, x).prune(optimizer=opt)
    assert [f.kind for f in r.plan.folds]==['new'] and rel(run(m, x), want)<1e-10
    bias = m[2].bias.detach().clone()
    for _ in range(7): step(m, opt) # a slow weight is met on the way
    assert m[2].bias.shape==(6,) and not torch.equal(m[2].bias, bias)

# ---- what the report says

def test_the_report_says_which_norms_keep_their_divisor():
    class Block(nn.Module):
        def __init__(self, own=False): torch.manual_seed(0); super().__init__(); self.a,self.n,self.b,self.own = nn.Linear(6,12),nn.LayerNorm(12),nn.Linear(12,3),own
        def forward(self, x):
            y = self.a(x)
            return self.b((y-y.mean(-1, keepdim=True))/(y.var(-1, keepdim=True)+1e-5).sqrt() if self.own else self.n(y))
    t = torch.randn(2,6)
    r = Pruner(Block(), t, exact_norms=True).prune(.5)
    assert ('layer_norm keeps its divisor', ['n']) in r.modules() and 'n: layer_norm keeps its divisor' in repr(r)
    assert ('mean, var keep their divisor', ['']) in Pruner(Block(True), t, exact_norms=True).prune(.5).modules()
    assert not any('divisor' in what for what,_ in Pruner(Block(), t).prune(.5).modules())

def test_the_report_says_what_a_budget_in_time_came_to():
    torch.manual_seed(0)
    m,t = nn.Sequential(nn.Linear(256,512), nn.ReLU(), nn.Linear(512,512), nn.ReLU(), nn.Linear(512,8)),torch.randn(64,256)
    P = Pruner(m, t)
    r = P.prune(budget=Budget(latency=.6))
    assert r.measured is P.measured and r.measured.met and r.measured.target==.6 and repr(r.measured) in repr(r) and 'time ' in repr(r)
    assert 'clock' in repr(r) and r.measured.clock in ("the wall's", "the processor's own")
    assert P.prune(.1).measured is None and P.measured is None

# ---- copies

def averaged(m, k=3):
    "An exponential average of a model that goes on training"
    ema,opt = AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(.8)),optim.SGD(m.parameters(), .3)
    for _ in range(k): step(m.train(), opt); ema.update_parameters(m)
    return ema

def test_an_average_is_cut_by_the_same_plan():
    m = awake(net(), x)
    ema = averaged(m)
    want = run(unread(ema.module, Pruner(m, x).plan(.5)).eval(), x)
    r = Pruner(m, x).prune(.5, also=[ema])
    assert [p.shape for p in ema.module.parameters()]==[p.shape for p in m.parameters()] and ema.module.a.out_channels==4
    assert rel(run(ema.eval(), x), want)<1e-10 and r.also[0].error<1e-10 and r.also[0].change>1e-3 and 'AveragedModel was cut as well' in repr(r)
    ema.update_parameters(m)
    assert rel(run(ema.eval(), x), want)>0

def test_a_plan_fits_an_average():
    m = awake(net(), x)
    ema = averaged(m)
    want = run(unread(ema.module, Pruner(m, x).plan(.5)).eval(), x)
    r = Pruner(m, x).prune(.5)
    assert apply_(ema, r.plan) is ema and rel(run(ema.eval(), x), want)<1e-10
    with pytest.raises(ValueError, match='has been applied before'): apply_(ema, r.plan)

def sigmoid_net():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3,4,1), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4,6,1,bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6,2,1)).double().eval()
    with torch.no_grad(): m[0].weight[:2],m[1].weight[:2],m[0].bias[:2] = 0,0,0
    return m

def test_an_average_has_its_own_constants():
    m = sigmoid_net()
    ema = deepcopy(m)
    with torch.no_grad():
        for p in ema.parameters(): p.mul_(torch.rand(p.shape, dtype=p.dtype)+.5)
        ema[1].bias[:2] = torch.tensor([.7,-.2], dtype=torch.float64)
    want = run(m, x),run(ema, x)
    r = Pruner(m, x).prune(also=ema)
    assert r.removed==2 and [f.kind for f in r.plan.folds]==['mean'] and r.law=='masks'
    assert rel(run(m, x), want[0])<1e-10 and rel(run(ema, x), want[1])<1e-10 and r.also[0].change<1e-10

def test_a_copy_that_fails_takes_all_back(monkeypatch):
    m = net()
    opt = optim.SGD(m.parameters(), .1, momentum=.9)
    step(m, opt)
    copies = [deepcopy(m), AveragedModel(m)]
    before = [everything(c) for c in (m, *copies)]
    calls,plain = [],operation_module.relative_error
    monkeypatch.setattr(operation_module, 'relative_error', lambda *a: calls.append(1) or (plain(*a) if len(calls)<6 else .5)) # the model at two calls and in training mode, the first copy twice, then
    with pytest.raises(VerificationError): Pruner(m, x).prune(.5, optimizer=opt, also=copies)
    assert all(same(everything(c), b) for c,b in zip((m, *copies), before)) and len(calls)==6
    step(m, opt)

def test_what_is_no_copy_is_refused():
    m = net()
    before = everything(m)
    with pytest.raises(ValueError, match="this plan is of another model, or has been applied before: it expects 8 positions along dimension 0 of 'a.weight'"): Pruner(m, x).prune(.5, also=[net(Net,10,12,6)])
    with pytest.raises(ValueError, match="it cuts 'a.weight', which this one does not have"): Pruner(m, x).prune(.5, also=[nn.Linear(2,2)])
    with pytest.raises(TypeError, match='also is a list of copies of the model'): Pruner(m, x).prune(.5, also=['ema'])
    with pytest.raises(ValueError, match='one of them is the model itself'): Pruner(m, x).prune(.5, also=[m])
    assert same(everything(m), before)

# ---- BatchNorm statistics

data = torch.randn(40,3,10,10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
loader = DataLoader(TensorDataset(data, torch.zeros(40)), batch_size=8)

def test_recalibration_is_update_bn():
    m = net().train()
    r = Pruner(m, x).prune(.5)
    other = deepcopy(m)
    assert recalibrate_(m, loader, progress=False)==5
    update_bn(loader, other)
    assert all(torch.equal(a, b) for a,b in zip(m.state_dict().values(), other.state_dict().values())) and r.recalibrated is None
    assert recalibrate_(m, loader, 2, progress=False)==2 and m.bn.num_batches_tracked==2

class Two(nn.Module):
    def __init__(self): super().__init__(); self.bn,self.norm,self.off = nn.BatchNorm2d(3),nn.InstanceNorm2d(3,track_running_stats=True),nn.BatchNorm2d(3,track_running_stats=False)
    def forward(self, a, b=None): return self.off(self.norm(self.bn(a if b is None else a+b)))

@pytest.mark.parametrize('batch,kw', [((data[:8],), {}), (data[:8], {}), ([data[:8], torch.zeros(8)], {}), ((data[:8], data[:8]), dict(n_inp=2)), ((data[:8], data[:8], torch.zeros(8)), {}),
    (dict(a=data[:8], labels=torch.zeros(8)), {}), (dict(a=data[:8], b=data[:8]), {})])
def test_batches_come_in_many_forms(batch, kw):
    m = Two().double()
    other = deepcopy(m.norm.state_dict())
    assert recalibrate_(m, [batch]*3, progress=False, **kw)==3
    double = 'b' in batch if isinstance(batch, dict) else kw.get('n_inp')==2 or isinstance(batch, tuple) and len(batch)==3
    assert torch.allclose(m.bn.running_mean, data[:8].mean((0,2,3))*(2 if double else 1)) and all(torch.equal(a, b) for a,b in zip(m.norm.state_dict().values(), other.values()))

def test_modes_and_momenta_come_back_whatever_happens():
    m = nn.Sequential(nn.BatchNorm2d(3, momentum=.3), nn.Dropout(), nn.BatchNorm2d(3)).double().train()
    m[2].eval()
    before,modes = everything(m),[c.training for c in m.modules()]
    with pytest.raises(RuntimeError, match='should contain 2 elements'): recalibrate_(m, [data[:8], data[:8,:2]], progress=False)
    assert same(everything(m), before) and modes==[c.training for c in m.modules()] and [m[0].momentum,m[2].momentum]==[.3,.1]
    recalibrate_(m, [data[:8]], progress=False)
    assert modes==[c.training for c in m.modules()] and [m[0].momentum,m[2].momentum]==[.3,.1]
    assert torch.allclose(m[2].running_mean, torch.zeros(3, dtype=torch.float64), atol=1e-8) # no dropout before it

def test_recalibration_within_a_cut():
    m = net().train()
    copy = deepcopy(m)
    r = Pruner(m, x).prune(.5, recalibrate=loader, also=[copy])
    assert r.recalibrated==5 and 'recalibrated on 5 batches' in repr(r) and m.bn.num_batches_tracked==5 and torch.equal(m.bn.running_var, copy.bn.running_var)
    want = F.conv2d(data, m.a.weight).unflatten(0, (5,8)).mean((1,3,4)).mean(0)
    assert torch.allclose(m.bn.running_mean, want)
    once = iter([data[:8], data[8:16]])
    assert Pruner(m, x).prune(.5, recalibrate=once, also=[copy]).recalibrated==2
    with pytest.warns(NoEffectWarning, match='Matrices has no BatchNorm'): assert Pruner(net(Matrices), x).prune(.5, recalibrate=loader).recalibrated==0

@pytest.mark.parametrize('dl,error,match', [([], ValueError, 'recalibrate: the data loader is empty'), (iter([]), ValueError, 'recalibrate: the data loader is empty'), (data, TypeError, 'put it into a list'), (True, TypeError, 'not bool'),
    (3, TypeError, 'not int'), ([data[:,:2]], RuntimeError, 'expected input')])
def test_data_that_cannot_be_used_changes_nothing(dl, error, match):
    m = net().train()
    before = everything(m)
    with pytest.raises(error, match=match): Pruner(m, x).prune(.5, recalibrate=dl)
    assert same(everything(m), before) and m.training and m.a.out_channels==8

# ---- means

class Means(nn.Module):
    "Readers with a bias, with a BatchNorm behind them, and with nothing"
    def __init__(self):
        torch.manual_seed(0); super().__init__()
        self.a,self.b,self.bn = nn.Conv2d(3,8,3),nn.Conv2d(8,12,3,padding=1,bias=False),nn.BatchNorm2d(12)
        self.c,self.d,self.e = nn.Conv2d(12,8,3,groups=2),nn.Linear(8,16,bias=False),nn.Linear(16,4)
    def forward(self, x): return self.e(self.d(self.c(self.bn(self.b(self.a(x).relu())).relu()).relu().mean((2,3))).relu())

def meant(m): return awake(m, data, seed=1)

def test_means_are_folded_into_biases_means_and_new_biases():
    m = meant(Means())
    whole = deepcopy(m)
    r = Pruner(m, data).prune(.25, compensate=True)
    assert {(f.kind,f.name) for f in r.plan.folds}=={('bias','c.bias'), ('mean','bn.running_mean'), ('new','d'), ('bias','e.bias')}
    assert r.error<1e-10 and r.law=='readers' and r.compensation.compensated<r.compensation.without
    far = lambda y: ((y-run(whole, data)).norm()/run(whole, data).norm()).item()
    assert abs(far(run(m, data))-r.compensation.compensated)<1e-9 and abs(far(run(unread(whole, r.plan), data))-r.compensation.without)<1e-9
    assert f"{r.compensation.without:.3g}" in repr(r) and 'means' in repr(r)

class Up(nn.Module):
    "A grouped transposed convolution: its weight has the outputs of one group only"
    def __init__(self, groups=2):
        torch.manual_seed(0); super().__init__()
        self.a,self.b,self.c = nn.Conv2d(3,16,1),nn.ConvTranspose2d(16,12,1,groups=groups,bias=False),nn.Conv2d(12,4,1)
    def forward(self, x): return self.c(self.b(self.a(x).sigmoid()).relu())

@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('only', ['a', 'b', None])
def test_means_make_the_new_bias_of_a_transposed_convolution(groups, only):
    m = meant(Up(groups))
    whole = deepcopy(m)
    r = Pruner(m, data, only=only).prune(.5, compensate=True)
    assert r.removed and all(f.kind!='new' or len(f.value)==12 for f in r.plan.folds)
    if only!='b': # its bias is what the removed channels said on average, where outputs stay
        y,gone = whole.a(data).sigmoid(),torch.ones(16, dtype=bool)
        gone[[e.keep for e in r.plan.edits if e.param=='a.weight'][0],] = False
        mean = whole.b(y*gone.view(-1,1,1)).mean((0,2,3))
        stay = next((list(e.keep) for e in r.plan.edits if e.param=='c.weight'), range(12))
        assert m.b.bias.shape==(m.b.out_channels,) and torch.allclose(m.b.bias, mean[list(stay)], rtol=1e-9)
    assert run(m, data).isfinite().all()

def test_a_plan_with_constants_is_of_one_model():
    m = net()
    with torch.no_grad(): m.h.weight[:2] = 0 # its tanh is constant
    whole,average = deepcopy(m),deepcopy(m)
    with torch.no_grad(): average.head.bias.mul_(.9); average.h.bias.mul_(.9)
    plan = Pruner(m, x).plan()
    assert [f.kind for f in plan.folds]==['bias'] and Plan.from_json(plan.to_json())==plan
    assert plan.folds[0].seen==pytest.approx(m.head.bias.sum().item(), rel=1e-12)
    other = deepcopy(average)
    with pytest.warns(PruningWarning, match=r"made of other weights: 'head.bias' .* gives a copy its own constants"): apply_(other, plan)
    assert other.h.out_features==4 and torch.equal(other.head.bias, average.head.bias) # the shapes, and no constant
    done = Pruner(m, x).prune(also=[average]).plan
    assert all(torch.equal(p, q) for p,q in zip(m.parameters(), apply_(whole, Plan.from_json(done.to_json())).parameters()))
    assert average.h.out_features==4 and all(f.seen is not None for f in done.folds)
    with pytest.raises(ValueError, match="has been applied before"): apply_(m, plan)

def test_means_know_their_model():
    m = meant(Means())
    whole,other = deepcopy(m),deepcopy(m)
    plan = Pruner(m, data).prune(.25, compensate=True).plan
    assert len(plan.folds)==4 and all(f.seen is not None for f in plan.folds)
    assert rel(run(apply_(whole, plan), data), run(m, data))<1e-12
    with torch.no_grad(): other.d.weight.mul_(1.01)
    with pytest.warns(PruningWarning, match="'d' has the sum"): apply_(other, plan)
    other.load_state_dict(m.state_dict())
    assert torch.equal(run(other, data), run(m, data))

def test_a_mean_is_what_is_missing_on_average():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6,8), nn.ReLU(), nn.Linear(8,5)).double()
    batches,whole = torch.randn(30,6, dtype=torch.float64).split(10),deepcopy(m)
    r = Pruner(m, batches[0][:2]).prune(.5, compensate=[(b, 0) for b in batches])
    keep = set(next(e for e in r.plan.edits if e.param=='2.weight').keep)
    gone = [i for i in range(8) if i not in keep]
    mean = whole[:2](torch.cat(batches))[:,gone].mean(0)
    assert torch.allclose(m[2].bias, whole[2].bias+whole[2].weight[:,gone]@mean)
    assert torch.allclose(run(m, torch.cat(batches)).mean(0), run(whole, torch.cat(batches)).mean(0))

def test_means_with_a_budget():
    m = meant(Means())
    r = Pruner(m, data[:2]).prune(budget=Budget(macs=.7), compensate=loader)
    assert r.macs[1]<=.7*r.macs[0] and r.compensation.compensated<r.compensation.without

def test_means_with_an_optimizer_and_a_copy():
    m = meant(Means())
    opt = optim.SGD(m.parameters(), .01, momentum=.9)
    (m(data).square().mean()).backward(); opt.step(); m.eval()
    ema,want = deepcopy(m),deepcopy(m)
    with torch.no_grad():
        for p in ema.parameters(): p.mul_(torch.rand(p.shape, dtype=p.dtype)*.2+.9)
    alone = deepcopy(ema)
    r = Pruner(m, data[:2]).prune(.25, compensate=loader, optimizer=opt, also=[ema])
    assert r.compensation.compensated<r.compensation.without
    assert any(p is m.d.bias for p in opt.param_groups[0]['params']) and ema.d.bias.shape==m.d.bias.shape and not torch.equal(ema.d.bias, m.d.bias)
    far = lambda a, b: ((run(a, data)-run(b, data)).norm()/run(b, data).norm()).item()
    assert far(ema, alone) < far(unread(alone, r.plan), alone) and far(m, want)<1
    (m(data).square().mean()).backward(); opt.step()

class Padded(nn.Module):
    def __init__(self): torch.manual_seed(0); super().__init__(); self.a,self.b = nn.Conv2d(3,8,3),nn.Conv2d(8,4,3,padding=1)
    def forward(self, x): return self.b(self.a(x).sigmoid())

def test_silent_channels_that_cannot_be_folded_exactly_go_too():
    m = Padded().double()
    with torch.no_grad(): m.a.weight[:4] = 0
    whole = deepcopy(m)
    with pytest.warns(NoEffectWarning, match='zeros of its padding'): Pruner(m, x).prune()
    r = Pruner(m, x).prune(compensate=True)
    assert r.removed==4 and r.law=='readers' and r.error<1e-10 and not r.plan.dead_but_kept
    inside = lambda net: run(net, x)[:,:,1:-1,1:-1]
    assert r.compensation.compensated<r.compensation.without and rel(inside(m), inside(whole))<rel(inside(unread(whole, r.plan)), inside(whole))

def test_exact_constants_stay_exact():
    m = sigmoid_net()
    want = run(m, x)
    r = Pruner(m, x).prune(compensate=True)
    assert r.removed==2 and r.law=='masks' and r.compensation is None and rel(run(m, x), want)<1e-10

def test_means_through_transposed_convolutions_and_attention():
    torch.manual_seed(0)
    m = meant(nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU(), nn.ConvTranspose2d(8,6,4,stride=2), nn.ReLU(), nn.Conv2d(6,4,1)))
    r = Pruner(m, data).prune(.25, compensate=True)
    assert r.compensation.compensated<r.compensation.without and r.error<1e-10
    enc,x = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(),torch.randn(8,5,16)
    r = Pruner(enc, x).prune({'linear1':.5}, compensate=True)
    assert r.compensation.compensated<r.compensation.without and [f.name for f in r.plan.folds]==['linear2.bias']

@pytest.mark.parametrize('dl,error,match', [([], ValueError, 'compensate: the data loader is empty'), (iter([]), ValueError, 'compensate: the data loader is empty'), (data, TypeError, 'put it into a list'), (.5, TypeError, 'not float')])
def test_means_need_data(dl, error, match):
    m = meant(Means())
    before = everything(m)
    with pytest.raises(error, match=match): Pruner(m, data).prune(.5, compensate=dl)
    assert same(everything(m), before)

# ---- the report

def test_the_rows_of_a_report_add_up():
    m = small_resnet(width=16)
    images = torch.randn(2,1,8,8)
    r = Pruner(m, images).prune(.5)
    t = r.table(every=True)
    assert (t['parameters'].sum(), t['parameters after'].sum())==r.params and (t['MACs'].sum(), t['MACs after'].sum())==r.macs
    assert t.loc['conv1', ['channels','channels after']].tolist()==[16,8] and set(r.table().index)<=set(t.index) and 'conv1' in r._repr_html_()
    assert r.table().shape[1]==7

def test_what_has_no_count_is_named():
    class Nearest(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.centers = nn.Linear(4,8),nn.Linear(8,6),nn.Parameter(torch.randn(3,6))
        def forward(self, x): return torch.cdist(self.b(self.a(x).relu()), self.centers)
    r = Pruner(Nearest(), torch.randn(2,4)).prune({'a':.5})
    assert r.uncounted==('_cdist_forward in the model',) and 'not counted' in repr(r) and 'not counted' in r._repr_html_() and not Pruner(net(), x).prune(.5).uncounted

def test_recurrent_layers_are_counted_or_named():
    class Recurrent(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.rnn = nn.Linear(4,8),nn.Linear(8,6),nn.LSTM(6,6,batch_first=True)
        def forward(self, x): return self.rnn(self.b(self.a(x).relu()))[0]
    r = Pruner(Recurrent(), torch.randn(2,3,4)).prune({'a':.5})
    assert any('rnn' in u for u in r.uncounted) or r.table(every=True).loc['rnn', 'MACs']==2*3*4*(6*6+6*6)

def test_modules_whose_code_says_sizes_are_listed():
    enc = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    r = Pruner(enc, torch.randn(2,5,16)).prune(.5)
    assert r.adapters==('self_attn',) and ('runs in an adapter', ['self_attn']) in r.modules() and 'self_attn: runs in an adapter' in repr(r)

def test_nothing_to_do_is_a_report_too():
    m = net()
    with pytest.warns(NoEffectWarning): r = Pruner(m, x).prune(.01)
    assert r.removed==0 and not len(r.table()) and len(r.table(every=True)) and r._repr_html_()

def test_without_verification_old_tensors_go_at_once():
    m = net()
    r = Pruner(m, x).prune(.5, verify=False)
    assert r.error is None and r.removed==13 and 'not verified' in repr(r)
    run(m, x)

# ---- learners

def test_learners_take_the_training_data():
    from fasterprune.data import digits_dls
    from fastai.learner import Learner
    from fasterprune.callback import prune
    learn = Learner(digits_dls(bs=256), small_resnet(width=8), loss_func=nn.CrossEntropyLoss())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    ema = AveragedModel(learn.model)
    r = learn.prune(.25, also=ema, recalibrate=True, compensate=True)
    assert r.recalibrated==len(learn.dls.train) and r.compensation.compensated<r.compensation.without and len(r.also)==1
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
