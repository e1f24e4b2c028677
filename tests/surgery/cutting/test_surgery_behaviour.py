"What surgery leaves as it was, what it carries along, and how it goes back"
import gc, io, pickle, weakref
from copy import deepcopy
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as nn_module
from fasterprune.data import small_resnet
from fasterprune.core import NoEffectWarning, VerificationError
from fasterprune.surgery.cutting import apply as apply_module
from fasterprune.surgery.capture import tracer as capture_module
from fasterprune.surgery.checking import dry_run as dryrun_module
from fasterprune.surgery import transaction as operation_module
from fasterprune.surgery.capture.adapters import ADAPTERS, adapter
from fasterprune.surgery.cutting.apply import apply_
from fasterprune.surgery.capture.tracer import capture
from fasterprune.surgery.coupling.couple import couple
from fasterprune.surgery.planning.plan import Plan
from fasterprune.surgery.pruner import Pruner
from support.laws import awake, cut, other, rel, run, silence

class Net(nn.Module):
    "A stem, a residual block with a gate, a depthwise convolution and a head"
    def __init__(self, n=8):
        super().__init__()
        self.stem,self.bn = nn.Conv2d(3,n,3,padding=1,bias=False),nn.BatchNorm2d(n)
        self.a,self.bn_a,self.b = nn.Conv2d(n,12,3,padding=1),nn.BatchNorm2d(12),nn.Conv2d(12,n,3,padding=1)
        self.down,self.up = nn.Linear(n,4),nn.Linear(4,n)
        self.dw,self.head = nn.Conv2d(n,n,3,padding=1,groups=n),nn.Linear(n,5)
    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        y = self.b(self.bn_a(self.a(x)).relu())
        x = x+y*self.up(self.down(y.mean((2,3))).relu()).sigmoid()[:,:,None,None]
        return self.head(self.dw(x).relu().mean((2,3)))

x = torch.randn(4,3,8,8, generator=torch.Generator().manual_seed(0))
target = torch.tensor([0,1,2,3])
def loss(m): return F.cross_entropy(m(x), target)
def net(seed=0): torch.manual_seed(seed); return Net()
def step(m, opt): opt.zero_grad(); loss(m).backward(); opt.step()

def everything(m, opt=None):
    "All that can be seen of a model and its optimizer, by value"
    res = {n:(id(t), t.detach().clone(), t.requires_grad, None if t.grad is None else t.grad.clone(), t.stride()) for n,t in [*m.named_parameters(), *m.named_buffers()]}
    res['attributes'] = {n:{k:v for k,v in vars(c).items() if isinstance(v, (int,float,str,tuple,bool))} for n,c in m.named_modules()}
    res['keys'] = {n:{k:list(v) if isinstance(v, dict) else None for k,v in vars(c).items()} for n,c in m.named_modules()}
    if opt is not None: res['opt'] = [(id(p), {k:v.clone() if isinstance(v, torch.Tensor) else v for k,v in opt.state[p].items()}) for g in opt.param_groups for p in g['params']]
    return res

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple)): return len(a)==len(b) and all(same(i, j) for i,j in zip(a, b))
    return a==b

def world():
    "Global state that the pruner uses"
    return (torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(), torch.get_rng_state().tolist(), torch.get_default_dtype(), len(nn_module._global_forward_hooks),
            len(nn_module._global_forward_pre_hooks), len(torch.overrides._get_current_function_mode_stack()), torch.utils._python_dispatch._get_current_dispatch_mode())

# ---- trains on

OPTIMIZERS = {'sgd': lambda ps: torch.optim.SGD(ps, .05, momentum=.9, weight_decay=1e-2), 'adamw': lambda ps: torch.optim.AdamW(ps, 1e-2, amsgrad=True),
              'foreach': lambda ps: torch.optim.Adam(ps, 1e-2, foreach=True), 'rmsprop': lambda ps: torch.optim.RMSprop(ps, 1e-2, momentum=.5, centered=True)}

@pytest.mark.parametrize('kind', OPTIMIZERS)
def test_the_next_step_is_that_of_a_small_network_with_the_sliced_state(kind):
    m = net().train()
    opt = OPTIMIZERS[kind](m.parameters())
    for _ in range(3): step(m, opt)
    names = {p:n for n,p in m.named_parameters()}
    state = {names[p]:{k:deepcopy(v) for k,v in s.items()} for p,s in opt.state.items()}
    shapes = {n:p.shape for n,p in m.named_parameters()}
    r = Pruner(m, x).prune(.5, optimizer=opt)
    assert r.removed==4+6+2
    small = deepcopy(m)
    ref = OPTIMIZERS[kind](small.parameters())
    edits = {}
    for e in r.plan.edits: edits.setdefault(e.param, []).append(e)
    for n,p in small.named_parameters():
        def piece(v):
            if not isinstance(v, torch.Tensor) or v.shape!=shapes[n]: return v
            for e in edits.get(n, []): v = torch.from_numpy(np.take(v.numpy(), e.keep, e.dim).copy())
            return v
        ref.state[p] = {k:piece(v) for k,v in state[n].items()}
    for _ in range(2): step(m, opt); step(small, ref)
    assert all(torch.equal(p, q) for p,q in zip(m.parameters(), small.parameters()))
    before = loss(m).item()
    for _ in range(20): step(m, opt)
    assert loss(m).item()<before

def test_gradients_are_cut_with_their_parameters():
    m = net()
    loss(m).backward()
    grads = {n:p.grad.clone() for n,p in m.named_parameters()}
    r = Pruner(m, x).prune(.5)
    for n,p in m.named_parameters():
        g = grads[n]
        for e in r.plan.edits:
            if e.param==n: g = g.index_select(e.dim, torch.tensor(e.keep))
        assert torch.equal(p.grad, g)

def test_the_graph_of_the_last_step_may_be_alive():
    m = net().train()
    opt = torch.optim.SGD(m.parameters(), .1, momentum=.9)
    old = loss(m); old.backward(retain_graph=True); opt.step() # a fastai callback still holds learn.loss
    Pruner(m, x).prune(.5, optimizer=opt)
    for _ in range(2): step(m, opt)
    assert old.grad_fn is not None and all(p.grad.shape==p.shape for p in m.parameters())

def test_hooks_of_modules_and_parameters_stay():
    m,seen = net(),[]
    m.a.register_forward_hook(lambda mod, i, o: seen.append(('forward', tuple(o.shape))))
    m.a.weight.register_hook(lambda g: seen.append(('grad', tuple(g.shape))))
    m.a.bias.register_post_accumulate_grad_hook(lambda p: seen.append(('after', tuple(p.grad.shape))))
    m.a.register_full_backward_hook(lambda mod, gi, go: seen.append(('backward', tuple(go[0].shape))))
    loss(m).backward()
    r = Pruner(m, x).prune(.5)
    seen.clear()
    loss(m).backward()
    assert set(seen)=={('forward',(4,6,8,8)), ('grad',(6,4,3,3)), ('after',(6,)), ('backward',(4,6,8,8))}

def test_what_users_hang_on_parameters_stays():
    m = net()
    m.a.weight.no_decay,m.b.weight.tag = True,['kept']
    Pruner(m, x).prune(.5)
    assert m.a.weight.no_decay and m.b.weight.tag==['kept']

def test_references_of_users_see_the_small_parameters():
    m = net()
    mine = list(m.parameters())
    ref = weakref.ref(m.a.weight)
    Pruner(m, x).prune(.5)
    assert all(p is q for p,q in zip(mine, m.parameters())) and ref() is m.a.weight

# ---- stays what it was

def test_class_names_modes_and_flags_stay():
    m = net().train()
    m.bn.eval(); m.a.weight.requires_grad_(False); m.bn_a.bias.requires_grad_(False)
    modes,flags,keys,classes = ([c.training for c in m.modules()], [p.requires_grad for p in m.parameters()], list(m.state_dict()), [type(c) for c in m.modules()])
    Pruner(m, x).prune(.5)
    assert modes==[c.training for c in m.modules()] and flags==[p.requires_grad for p in m.parameters()]
    assert keys==list(m.state_dict()) and classes==[type(c) for c in m.modules()]
    assert m.a.out_channels==6 and m.b.in_channels==6 and m.bn_a.num_features==6 and m.dw.groups==m.dw.in_channels==m.dw.out_channels==4 and m.head.in_features==4
    assert 'Conv2d(4, 6,' in repr(m.a)

def test_frozen_networks_are_cut_and_stay_frozen():
    m = net().requires_grad_(False)
    assert Pruner(m, x).prune(.5).removed==12 and not any(p.requires_grad for p in m.parameters()) and m.a.weight.shape==(6,4,3,3)

def test_tied_weights_stay_tied():
    m = net()
    m.c = nn.Conv2d(8,12,3,padding=1); m.c.weight = m.a.weight
    forward = m.forward
    class Tied(Net):
        def forward(self, x): return super().forward(x)+self.head(self.b(self.c(self.stem(x)))[:,:self.head.in_features].mean((2,3)))
    m.__class__ = Tied
    Pruner(m, x).prune(.5)
    assert m.c.weight is m.a.weight and m.c.out_channels==m.a.out_channels==6 and m.c.bias.shape==(6,)
    run(m, x)

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_moves_to_another_type(dtype):
    m = net().eval()
    Pruner(m, x).prune(.5)
    want = run(m, x)
    assert rel(run(m.to(dtype), x.to(dtype)).float(), want) < 5e-2

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_type(dtype):
    m = net().to(dtype)
    r = Pruner(m, x.to(dtype)).prune(.5)
    assert r.removed==12 and r.error<1e-10 and {p.dtype for p in m.parameters()}=={dtype}

def test_channels_last_stays():
    m = net().to(memory_format=torch.channels_last)
    Pruner(m, x).prune(.5)
    assert m.a.weight.is_contiguous(memory_format=torch.channels_last) and not m.a.weight.is_contiguous()

def test_copies_and_pickles():
    m = net().eval()
    Pruner(m, x).prune(.5)
    want = run(m, x)
    assert torch.equal(run(deepcopy(m), x), want) and torch.equal(run(pickle.loads(pickle.dumps(m)), x), want)
    f = io.BytesIO(); torch.save(m, f); f.seek(0)
    assert torch.equal(run(torch.load(f, weights_only=False), x), want)
    fresh = Net(); Pruner(fresh, x).prune(.5, criterion='random')
    fresh.load_state_dict(m.state_dict())
    assert fresh.a.weight.shape==m.a.weight.shape

def test_exports():
    m = net().eval()
    Pruner(m, x).prune(.5)
    exported = torch.export.export(m, (x,), dynamic_shapes=({0:torch.export.Dim('batch')},)).module()
    assert rel(run(exported, other(x, 2)), run(m, other(x, 2))) < 1e-6

@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v3_small', 'shufflenet_v2_x1_0', 'regnet_x_400mf'])
def test_architectures_export(name):
    import torchvision
    m,x = getattr(torchvision.models, name)(weights=None, num_classes=10).eval(),torch.randn(1,3,64,64)
    Pruner(m, x).prune(.5)
    assert rel(run(torch.export.export(m, (x,)).module(), x), run(m, x)) < 1e-5

def test_traces_and_scripts():
    m = net().eval()
    Pruner(m, x).prune(.5)
    assert torch.equal(torch.jit.trace(m, x)(x), run(m, x))

# ---- goes back

@pytest.mark.parametrize('how', ['dead', 'chosen'])
def test_a_failed_verification_takes_everything_back(monkeypatch, how):
    m = net().train()
    opt = torch.optim.AdamW(m.parameters(), 1e-2)
    for _ in range(2): step(m, opt)
    if how=='dead':
        with torch.no_grad(): m.a.weight[:3] = 0
        m.bn_a.bias.data[:3] = 0; m.b = nn.Conv2d(12,8,1,bias=False); m.bn_a.bias.data[0] = 1. # folds a constant, makes a bias
        opt = torch.optim.AdamW(m.parameters(), 1e-2); step(m, opt)
        with torch.no_grad(): m.a.weight[:3] = 0; m.a.bias[:3] = 0; m.bn_a.weight[:3] = 0
    before = everything(m, opt)
    monkeypatch.setattr(operation_module, 'relative_error', lambda *a: .5)
    with pytest.raises(VerificationError, match='everything was put back'): Pruner(m, x).prune(**({} if how=='dead' else dict(sparsity=.5)), optimizer=opt)
    assert same(everything(m, opt), before)
    monkeypatch.undo()
    step(m, opt)
    r = Pruner(m, x).prune(.5, optimizer=opt)
    assert r.removed==12
    step(m, opt)

@pytest.mark.parametrize('error', [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize('at', [0, 3, 9])
def test_an_interrupt_takes_everything_back(monkeypatch, error, at):
    m = net().train()
    opt = torch.optim.SGD(m.parameters(), .1, momentum=.9)
    step(m, opt)
    before,calls,plain = everything(m, opt),[],apply_module.sliced
    def sliced(*args):
        calls.append(1)
        if len(calls)>at: raise error('now')
        return plain(*args)
    monkeypatch.setattr(apply_module, 'sliced', sliced)
    state = world()
    with pytest.raises(error, match='now'): Pruner(m, x).prune(.5, optimizer=opt)
    assert same(everything(m, opt), before) and world()==state
    monkeypatch.undo()
    step(m, opt)

def test_planning_touches_nothing():
    m = net().train()
    opt = torch.optim.SGD(m.parameters(), .1, momentum=.9)
    step(m, opt)
    before,versions,state = everything(m, opt),[t._version for t in m.state_dict(keep_vars=True).values()],world()
    p = Pruner(m, x)
    for kw in ({}, dict(sparsity=.5), dict(sparsity=.3, context='global'), dict(sparsity=.5, granularity='shared_kernel')): p.plan(**kw)
    couple(m, x)
    assert same(everything(m, opt), before) and versions==[t._version for t in m.state_dict(keep_vars=True).values()] and world()==state
    assert x.grad is None and torch.equal(x, torch.randn(4,3,8,8, generator=torch.Generator().manual_seed(0)))

class Broken(Net):
    def forward(self, x): raise ValueError('my own error')

def test_the_users_error_comes_through_and_the_world_is_restored():
    state = world()
    with pytest.raises(ValueError, match='my own error'): Pruner(Broken(), x).prune(.5)
    with pytest.raises(RuntimeError, match='expected input'): Pruner(net(), x[:,:1]).prune(.5)
    assert world()==state

class Noisy(Net):
    def forward(self, x): return super().forward(x+torch.randn_like(x)*.1)

class Counting(Net):
    def __init__(self): super().__init__(); self.register_buffer('calls', torch.zeros(()))
    def forward(self, x): self.calls += 1; return super().forward(x)

def test_noise_and_counters():
    torch.manual_seed(1)
    state,m = world(),Noisy()
    torch.manual_seed(1); state = world()
    r = Pruner(m, x).prune(.5)
    assert r.removed==12 and r.error<1e-10 and world()==state
    m = Counting()
    Pruner(m, x).prune(.5)
    assert m.calls==0

def test_nothing_is_left_behind():
    m = net()
    keys = {n:set(vars(c)) for n,c in m.named_modules()}
    state = world()
    silence(m, couple(m, x), .5)
    Pruner(m, x).prune()
    assert keys=={n:set(vars(c)) for n,c in m.named_modules()} and world()==state
    assert not any(c._forward_hooks or c._forward_pre_hooks or c._backward_hooks for c in m.modules()) and not any(p._backward_hooks for p in m.parameters())
    assert all(type(p) is nn.Parameter and p.is_leaf for p in m.parameters()) and not hasattr(m.a, 'parametrizations')

def test_a_pruner_does_not_keep_the_old_tensors():
    m = Net(9) # no other test has tensors of this shape
    p = Pruner(m, x)
    p.prune(.5)
    gc.collect()
    assert not [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.shape==(12,9,3,3)]

# ---- plans

def test_plans_are_values():
    m = net()
    a,b = Pruner(m, x).plan(.5),Pruner(m, x).plan(.5)
    p = Pruner(m, x)
    assert a==b==p.plan(.5)==p.plan(.5) and a!=p.plan(.25) and Plan.from_json(a.to_json())==a and repr(a)==repr(b)
    with pytest.raises(Exception): a.cuts = ()
    silence(m, couple(m, x), .5)
    d = p.plan()
    assert d==p.plan()==Plan.from_json(d.to_json())
    apply_(m, a)
    for other_model in (Net(10), net(), nn.Linear(3,3)):
        if isinstance(other_model, Net) and other_model.a.in_channels==8: apply_(other_model, Plan.from_json(a.to_json())); continue
        with pytest.raises(ValueError, match='of another model'): apply_(other_model, a)
    with pytest.raises(ValueError, match='has been applied before'): apply_(m, a)

class Secret(nn.Module):
    "Its operator has no rule"
    def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Conv2d(3,8,1),nn.Conv2d(8,6,1),nn.Conv2d(6,4,1)
    def forward(self, x): return self.c(self.b(torch.cdist(self.a(x), self.a(x))).relu())

def test_an_operator_without_a_rule_pins_and_says_so():
    x = torch.randn(2,3,8,8)
    plan = Pruner(Secret(), x).plan(.5)
    assert plan.rows()==[('b',6,3)] and "no rule for the operator '_cdist_forward'" in repr(plan) and ('a',8,8) in [p[:3] for p in plan.pins]

class Wide(Net):
    def forward(self, x):
        y = self.a(self.bn(self.stem(x)).relu())
        if y.shape[1]!=12: raise TypeError('this must be twelve')
        return self.head(self.b(y).mean((2,3)))

def test_an_exception_in_the_dry_run_is_answered_by_a_pin():
    m = Wide()
    r = Pruner(m, x).prune(.5)
    assert m.a.out_channels==12 and r.removed==4 and 'this must be twelve' in repr(r)

def test_silent_units_that_stay_have_a_reason():
    class Padded(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Conv2d(3,8,3),nn.Conv2d(8,4,3,padding=1)
        def forward(self, x): return self.b(self.a(x).sigmoid())
    m = Padded()
    silence(m, couple(m, x), .5)
    with pytest.warns(NoEffectWarning, match='zeros of its padding'): r = Pruner(m, x).prune()
    assert r.removed==0 and r.plan.dead_but_kept[0][:2]==('a',4) and 'dead, but' in repr(r) and 'dead, but' in repr(r.plan) and 'dead, but' in r._repr_html_()

# ---- twice

def test_sparsify_prune_sparsify_prune():
    m = awake(net(), x.double())
    for left in (4+6+2, 2+3+1):
        removed = silence(m, couple(m, x.double()), .5)
        sparse = deepcopy(m)
        r = Pruner(m, x.double()).prune()
        assert r.removed==left and cut(r.plan)==removed and rel(run(m, other(x.double())), run(sparse, other(x.double()))) < 1e-10
        with pytest.warns(NoEffectWarning, match='nothing is dead'): assert Pruner(m, x.double()).prune().removed==0

def test_one_pruner_may_be_used_again():
    m = net()
    p = Pruner(m, x)
    assert [p.prune(.5).removed for _ in range(3)]==[12,6,2] and m.a.out_channels==2

def test_pruners_share_nothing():
    a,b = net(),net()
    p,q = Pruner(a, x, ignore=['a']),Pruner(b, x)
    assert p.plan(.5).rows()!=q.plan(.5).rows() and not q.ignore
    p.ignore.append('b') if isinstance(p.ignore, list) else None
    assert not Pruner(b, x).ignore

# ---- choosing

def test_only_and_ignore():
    m = net()
    names = lambda **kw: [n for n,*_ in Pruner(m, x, **kw).plan(.5).rows()]
    assert names()==['stem','a','down'] and names(ignore='a')==['stem','down'] and names(only=['a','down'])==['a','down'] and names(only='b')==['stem'] and names(ignore=['up'])==['a','down']
    assert 'left alone on request' in repr(Pruner(m, x, ignore='a').plan(.5))

@pytest.mark.parametrize('criterion', ['l1','l2','lamp','random'])
def test_asked_for_more_global_removes_more(criterion):
    m,x = small_resnet(width=16),torch.randn(1,1,8,8)
    p = Pruner(m, x)
    total = p.plan(.5).units
    last = {}
    for s in (.1, .25, .5, .75, .9, .99):
        plan = p.plan(s, criterion=criterion, context='global')
        assert plan.removed==min(int(s*total+1e-9), total-len(plan.cuts))
        now = {c.name:set(c.keep) for c in plan.cuts}
        assert not last or all(now[n]<=last[n] for n in now)
        last = now

def test_an_optimizer_is_what_it_says():
    with pytest.raises(TypeError, match="optimizer is a torch or fastai optimizer, not 'adam'"): Pruner(net(), x).prune(.5, optimizer='adam')

def test_a_new_bias_is_trained():
    m = nn.Sequential(nn.Conv2d(3,4,1), nn.Sigmoid(), nn.Conv2d(4,6,1,bias=False), nn.ReLU(), nn.Conv2d(6,2,1))
    with torch.no_grad(): m[0].weight[:2] = 0
    opt = torch.optim.SGD(m.parameters(), .1, momentum=.9)
    sparse = deepcopy(m)
    r = Pruner(m, x).prune(optimizer=opt)
    assert r.removed==2 and [f.kind for f in r.plan.folds]==['new'] and rel(run(m, x), run(sparse, x)) < 1e-5
    before = m[2].bias.clone()
    m(x).square().mean().backward(); opt.step()
    assert not torch.equal(m[2].bias, before)

def test_compiled_models():
    m = net()
    r = Pruner(torch.compile(m), x).prune(.5)
    assert r.removed==12 and m.a.out_channels==6

# --- adapters are compared with what they stand for

class Insists(nn.Module):
    def __init__(self): super().__init__(); self.g = nn.Parameter(torch.ones(16))
    def forward(self, x):
        if x.shape[1]!=16: raise ValueError('16 please')
        return x*self.g

@pytest.mark.parametrize('factor', [1., 2.])
def test_a_wrong_adapter_is_refused(factor):
    net,x = nn.Sequential(nn.Linear(8,16), Insists(), nn.Linear(16,4)),torch.randn(4,8)
    with torch.no_grad(): net[0].weight[:8],net[0].bias[:8] = 0,0
    before = net(x).detach()
    adapter(Insists)(lambda m,x: factor*x*m.g)
    try:
        if factor==1: assert Pruner(net, x).prune().removed==8
        else:
            with pytest.raises(VerificationError, match='the adapter of Insists does not compute what'): Pruner(net, x).prune()
        assert torch.allclose(net(x), before, atol=1e-6) and net[0].out_features==(8 if factor==1 else 16)
    finally: del ADAPTERS[Insists]

class Nothing(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(8,16),nn.Linear(16,4)
    def forward(self, x): y = self.b(self.a(x).relu()); return y[y>1e6]

def test_empty_outputs_verify_nothing():
    r = Pruner(Nothing(), torch.randn(4,8)).prune(.5)
    assert r.removed==8 and r.error is None and 'not verified: the outputs for this example are empty' in repr(r)

class Boxes(nn.Module):
    "As many boxes as values say, and convolutions over them"
    def __init__(self):
        super().__init__()
        self.stem,self.up,self.head = nn.Conv2d(3,8,3,padding=1),nn.ConvTranspose2d(8,12,2,stride=2),nn.Conv2d(12,4,1)
    def forward(self, x):
        x = self.stem(x)
        n = 40+int(x[0,0,0,0]>-1e9)
        return self.head(self.up(x.expand(n,-1,-1,-1)+torch.arange(n).view(-1,1,1,1)).relu())

def test_values_that_do_not_matter_are_not_computed(monkeypatch):
    "Of 41 boxes, capture and dry run convolve eight; shapes are those of all, and the check computes all"
    seen,conv,run_subsampled = [],torch.ops.aten.convolution.default,capture_module.run_subsampled
    def spied(key, func, args, kwargs):
        out = run_subsampled(key, func, args, kwargs)
        if func is conv: seen.append((args[0].shape[0], torch.equal(out, conv(*args, **kwargs))))
        return out
    for m in (capture_module, dryrun_module): monkeypatch.setattr(m, 'run_subsampled', spied)
    net,x = Boxes().eval(),torch.randn(1,3,6,6)
    t = capture(net, x)
    assert not t.fake and seen==[(1,True),(41,False),(41,False)]
    want = {n.key:[t.shapes[r.id] for r in n.outs] for n in t.nodes if n.func is conv}
    rec = capture_module.Recorder()
    capture_module.record(net, x, rec)
    assert want=={n.key:[rec.trace.shapes[r.id] for r in n.outs] for n in rec.trace.nodes if n.func is conv}
    r = Pruner(net, x).prune(.5)
    assert r.error<1e-10 and net.up.weight.shape[:2]==(5,6) and net(x).shape==(41,4,12,12) and len(seen)==3+3+3

class Image(torch.Tensor): "Wraps what comes out of an operator, as fastai's tensors do"

class Casts(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.a,self.b,self.last = nn.Conv2d(3,8,3),nn.Conv2d(8,4,1),last
    def forward(self, x):
        x = self.a(x) if self.last else self.a(x).as_subclass(Image)
        x = self.b(x.relu())
        return x.as_subclass(Image) if self.last else x

@pytest.mark.parametrize('last,kind', [(False,torch.Tensor),(True,torch.Tensor),(False,Image)])
def test_subclasses_of_tensor_hide_nothing(last, kind):
    net,x,was = Casts(last).eval(),torch.randn(2,3,6,6).as_subclass(kind),vars(torch.Tensor).get('as_subclass') # fastai has its own
    t = capture(net, x)
    assert t.fake and [n.op for n in t.nodes]==['convolution','relu','convolution'] and t.outputs==list(t.nodes[-1].outs)
    assert all(a.args[0]==b.outs[0] for a,b in zip(t.nodes[1:], t.nodes))
    with pytest.raises(TypeError): capture(net, x, training=0)
    assert vars(torch.Tensor).get('as_subclass') is was and type(x.as_subclass(Image)) is Image
    r = Pruner(net, x).prune(.5)
    assert r.error<1e-10 and net.b.weight.shape==(4,4,1,1) and type(net(x)) is (kind if kind is Image else Image)
