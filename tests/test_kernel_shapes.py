"Kernels that become smaller, branches that disappear, heads, rows and columns: what is dead goes, and the outputs stay"
import itertools, pickle
from copy import deepcopy
import pytest, torch
from torch import nn
import torch.nn.functional as F
from fasterprune.core import NoEffectWarning
from fasterprune.sparse.sparsifier import Sparsifier
from fasterprune.surgery.plan import Plan
from fasterprune.surgery.pruner import Pruner
from laws import awake, other, rel, run

def silent(w, j, *rows):
    "Zeros in these rows along spatial dimension `j` of a weight"
    with torch.no_grad(): w.index_fill_(2+j, torch.tensor(rows), 0)

def pruned(net, x, **kw):
    "A pruned copy, after the masks' law on other inputs of three sizes; and its report"
    small = deepcopy(net)
    r = Pruner(small, x).prune(**kw)
    for y in [other(x), other(x, 1, seed=6)]: assert rel(run(small, y), run(net, y))<1e-10
    return small,r

# --- the kernel alone -------------------------------------------------------------------------------------------------
CONVS = {1:(nn.Conv1d, nn.ConvTranspose1d), 2:(nn.Conv2d, nn.ConvTranspose2d), 3:(nn.Conv3d, nn.ConvTranspose3d)}

def by_hand(m, taps): # An oracle that knows no rule: build the layer that says it, if PyTorch has one, by trying every padding
    "All (padding, output padding) with which a layer of these taps, where they are, computes the same on many sizes"
    w,found = m.weight.detach()[:,:,list(taps)],[]
    d = m.dilation[0]*taps.step
    for p,op in itertools.product(range(7), range(4) if m.transposed else [0]):
        try: k = type(m)(m.in_channels, m.out_channels, len(taps), stride=m.stride, padding=p, dilation=d, groups=m.groups, padding_mode=m.padding_mode, **(dict(output_padding=op) if m.transposed else {})).double()
        except ValueError: continue
        k.weight,k.bias = nn.Parameter(w),m.bias
        try: same = all((a := k(y)).shape==(b := m(y)).shape and torch.allclose(a, b, atol=1e-12) for y in (torch.randn(1, m.in_channels, n, dtype=torch.float64) for n in (9,10,11,12)))
        except (RuntimeError, ValueError): continue
        if same: found.append((p, op))
    return found

@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('mode', ['zeros', 'reflect', 'circular', 'replicate'])
def test_one_dimension_against_every_layer_that_there_is(transposed, mode):
    if transposed and mode!='zeros': return
    torch.manual_seed(0)
    ways = [(k, live, s, p, d) for k in (2,3,4,5) for live in itertools.product([0,1], repeat=k) if any(live) for s,p,d in [(1,1,1), (2,2,1), (3,1,2), (1,0,1), (1,4,2)] if sum(live)<k]
    step = 7 if transposed or mode=='zeros' else 23
    for i,(k,live,s,p,d) in enumerate(ways[::step]):
        op = i%min(2, max(s, d)) if transposed else 0
        m = CONVS[1][transposed](2, 4, k, stride=s, padding=p, dilation=d, groups=2, **(dict(output_padding=op) if transposed else dict(padding_mode=mode))).double()
        silent(m.weight, 0, *[t for t in range(k) if not live[t]])
        net,x = nn.Sequential(m),torch.randn(2,2,12, dtype=torch.float64)
        small = deepcopy(net)
        plan = Pruner(small, x).plan()
        r = Pruner(small, x).prune() if plan.edits else None
        for n in (9,10,11,12):
            y = torch.randn(2,2,n, dtype=torch.float64)
            assert small(y).shape==net(y).shape and rel(run(small, y), run(net, y))<1e-12
        left = small[0].kernel_size[0]
        at = [t for t in range(k) if live[t]]
        fewer = [t for a in range(k) for q in range(1, k) for n in range(1, left) for t in [range(a, a+(n-1)*q+1, q)] if t[-1]<k and set(at)<=set(t)]
        assert not any(by_hand(m, t) for t in fewer), (k, live, s, p, d, mode) # no smaller layer does the same

@pytest.mark.parametrize('n', [1,2,3])
@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('kw', [dict(padding=1), dict(padding=2, dilation=2, stride=3), dict(padding=2, groups=2), dict(padding='same'), dict(padding=2, padding_mode='circular', stride=2)])
def test_every_convolution(n, transposed, kw):
    if transposed and (kw['padding']=='same' or 'padding_mode' in kw): return
    torch.manual_seed(0)
    m = CONVS[n][transposed](4, 6, 3, **kw)
    net,x = nn.Sequential(m, nn.ReLU(), CONVS[n][0](6, 2, 1)).double(),torch.randn(2,4,*(7,8,9)[:n], dtype=torch.float64)
    for j in range(n): silent(m.weight, j, 0, 2)
    small,r = pruned(net, x)
    assert small[0].kernel_size==(1,)*n and r.plan.kernels==(('0', (3,)*n, (1,)*n),) and r.error<1e-10
    assert r.macs[1]<r.macs[0] and r.params[1]==sum(p.numel() for p in small.parameters())
    y = torch.randn(1,4,*(11,6,5)[:n], dtype=torch.float64)
    assert rel(run(small, y), run(net, y))<1e-12

@pytest.mark.parametrize('rows,mode,size', [((0,2), (1,1), (1,3)), ((0,), (1,1), (3,3)), ((2,), (1,1), (3,3)), ((0,2), (0,0), (3,3)), ((1,), (0,0), (2,3)), ((0,1,2), (1,1), (1,3))])
def test_what_is_zero_and_what_is_cut(rows, mode, size):
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Conv2d(3,4,3,padding=mode), nn.ReLU(), nn.Conv2d(4,2,1)).double(),torch.randn(1,3,9,9, dtype=torch.float64)
    silent(net[0].weight, 0, *rows)
    if len(rows)==3: net[0].weight.data[0,0,1,0] = 1.; net[0].weight.data[1,0,1,2] = 1.; net[0].weight.data[2:,1,1,1] = 1.
    p = Pruner(net, x).plan()
    assert [k[2] for k in p.kernels if k[0]=='0']==([] if size==(3,3) else [size])
    if size==(3,3): assert len(p.held)==1 and ('both ends' in p.held[0][2] if sum(mode) else 'its padding is' in p.held[0][2])

def test_even_kernel_of_a_layer_that_keeps_the_size():
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Conv2d(3,4,(3,5),padding='same',padding_mode='reflect'), nn.ReLU(), nn.Conv2d(4,2,1)).double(),torch.randn(2,3,9,9, dtype=torch.float64)
    silent(net[0].weight, 0, 0); silent(net[0].weight, 1, 0, 3, 4)
    small,r = pruned(net, x)
    assert small[0].kernel_size==(2,3) or small[0].kernel_size==(2,2)

def test_only_what_stays_is_looked_at():
    "A tap that is alive in a dead filter only is dead"
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Conv2d(3,4,3,padding=1), nn.ReLU(), nn.Conv2d(4,2,3,padding=1)).double(),torch.randn(2,3,9,9, dtype=torch.float64)
    silent(net[2].weight, 0, 0, 2)
    with torch.no_grad():
        net[2].weight[:,1] = 1.; net[0].weight[1],net[0].bias[1] = 0,0
    small,r = pruned(net, x)
    assert net[2].weight.shape==(2,4,3,3) and small[2].weight.shape==(2,3,1,3)

class Padded(nn.Conv2d):
    def forward(self, x): return super().forward(F.pad(x, (1,0,1,0)))
class Same(nn.Conv2d): # its padding follows from the size of its kernel
    def forward(self, x):
        k = self.weight.shape[-1]
        return F.conv2d(F.pad(x, (k-1,0,k-1,0)), self.weight, self.bias)
class Twice(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Conv2d(3,3,3,padding=1),nn.Conv2d(3,3,3,padding=2,dilation=2); self.b.weight = self.a.weight
    def forward(self, x): return self.b(self.a(x).relu())
class Elsewhere(Twice):
    def forward(self, x): return super().forward(x)*self.a.weight.square().mean()
class Asks(Twice): # the code says what its kernel's size is
    def forward(self, x): return self.a(x)[...,self.a.weight.shape[-1]:]

@pytest.mark.parametrize('net,why', [(Padded(3,3,3,padding=1), 'a way of its own'), (Same(3,3,3), 'a way of its own'), (Elsewhere(), 'as well'), (Asks(), 'whose size the code knows')])
def test_what_stays_and_why(net, why):
    torch.manual_seed(0)
    w = next(net.parameters())
    for j in (0,1): silent(w, j, 0, 2)
    p = Pruner(nn.Sequential(net.double()), torch.randn(1,3,8,8, dtype=torch.float64)).plan()
    assert not p.kernels and any(why in h[2] for h in p.held), p

def test_shared_weights_and_stars():
    torch.manual_seed(0)
    net,x = nn.Sequential(Twice(), nn.ReLU(), nn.Conv2d(3,2,1)).double(),torch.randn(2,3,8,8, dtype=torch.float64)
    for j in (0,1): silent(net[0].a.weight, j, 0, 2)
    small,r = pruned(net, x)
    assert (small[0].a.kernel_size,small[0].b.kernel_size,small[0].b.padding)==((1,1),(1,1),(0,0)) and small[0].a.weight is small[0].b.weight

def test_left_alone_on_request():
    net,x = nn.Sequential(nn.Conv2d(3,4,3,padding=1), nn.ReLU(), nn.Conv2d(4,2,3,padding=1)),torch.randn(2,3,9,9)
    for m in (net[0],net[2]): silent(m.weight, 0, 0, 2)
    assert [k[0] for k in Pruner(net, x, ignore='0').plan().kernels]==['2'] and [k[0] for k in Pruner(net, x, only='0').plan().kernels]==['0']

def test_optimizer_copies_masks_and_back(monkeypatch):
    from fasterprune.surgery import operation
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Conv2d(3,4,3,padding=1), nn.ReLU(), nn.Conv2d(4,2,3,padding=1)).double(),torch.randn(2,3,9,9, dtype=torch.float64)
    average,opt = deepcopy(net),torch.optim.Adam(net.parameters(), .01)
    net(x).square().sum().backward(); opt.step()
    s = Sparsifier(net, x, granularity='shared_horizontal_slice')
    masks = s.masks(.67)
    for n in ('0','2'): masks.keep[f'{n}.weight'] = torch.tensor([False,True,False]).view(1,1,3,1)
    masks.apply_(net)
    was,before = {n:p.detach().clone() for n,p in net.named_parameters()},opt.state[net[2].weight]['exp_avg'].clone()
    want,mine = run(net, x),run(average, x)
    with monkeypatch.context() as m: # a law that does not hold puts everything back
        m.setattr(operation, 'relative_error', lambda *a: 1.)
        with pytest.raises(Exception, match='put back'): Pruner(net, x).prune(optimizer=opt, also=[average])
    assert all(torch.equal(p, was[n]) for n,p in net.named_parameters()) and net[0].padding==(1,1)==average[0].padding and net[0].kernel_size==(3,3)
    assert torch.equal(opt.state[net[2].weight]['exp_avg'], before) and rel(run(average, x), mine)==0
    plan = Pruner(net, x).plan()
    assert Plan.from_json(plan.to_json())==plan
    r = Pruner(net, x).prune(optimizer=opt, also=[average])
    assert rel(run(net, x), want)<1e-12 and r.also[0].error<1e-12 and r.also[0].change>1e-3 and average[2].weight.shape==(2,4,1,3)
    assert torch.equal(opt.state[net[2].weight]['exp_avg'], before[:,:,1:2]) and not masks.cut(r.plan.edits).keep
    assert '0 and 1 more: 3×3 → 1×3' in repr(r) and 'kernel 3×3 → 1×3' in repr(plan)
    assert pickle.loads(pickle.dumps(net))(x).shape==want.shape
    net(x).sum().backward(); opt.step()
    with pytest.warns(NoEffectWarning): Pruner(net, x).prune()

def zoo(name):
    from torchvision import models
    return awake(getattr(models, name)(weights=None, num_classes=7), torch.randn(2,3,64,64, dtype=torch.float64))

@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2', 'densenet121'])
def test_kernels_and_channels_of_known_networks(name):
    torch.manual_seed(0)
    net,x = zoo(name),torch.randn(1,3,64,64, dtype=torch.float64)
    Sparsifier(net, x, granularity='filter').sparsify(.25)
    wide = [(n,m) for n,m in net.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0]>1]
    for i,(n,m) in enumerate(wide):
        k = m.kernel_size[0]
        for j in [(0,),(1,),(0,1)][i%3]: silent(m.weight, j, *[t for t in range(k) if t!=k//2])
    small,r = pruned(net, x)
    assert r.error<1e-10 and len(r.plan.kernels)==len(wide) and r.removed>100
    size = dict(r.plan.kernels and [(n,b) for n,_,b in r.plan.kernels])
    assert [size[n].count(1) for n,_ in wide]==[(1,1,2)[i%3] for i in range(len(wide))]
