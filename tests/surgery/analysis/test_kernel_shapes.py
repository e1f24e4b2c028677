"Kernels that become smaller, branches that disappear, heads, rows and columns: what is dead goes, and the outputs stay"
import itertools, pickle
from copy import deepcopy
import pytest, torch
from torch import nn
import torch.nn.functional as F
from fasterprune.core import NoEffectWarning
from fasterprune.measure.metrics import evaluate
from fasterprune.sparse.masks import Masks
from fasterprune.sparse.sparsifier import Sparsifier
from fasterprune.surgery.cutting.apply import apply_
from fasterprune.surgery.planning.plan import Edit, Plan
from fasterprune.surgery.pruner import Pruner
from support.laws import awake, other, rel, run

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
        fewer = [t for a in range(k) for q in range(1, k) for n in range(1, left) for t in [range(a, a+(n-1)*q+1, q)] if (n>1 or q==1) and t[-1]<k and set(at)<=set(t)]
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
    if size==(3,3): assert len(p.dead_but_kept)==1 and ('both ends' in p.dead_but_kept[0][2] if sum(mode) else 'its padding is' in p.dead_but_kept[0][2])

def test_a_row_at_one_end_and_a_gap():
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Conv2d(3,4,3,padding=1), nn.ReLU(), nn.Conv2d(4,2,1)).double(),torch.randn(2,3,9,9, dtype=torch.float64)
    silent(net[0].weight, 0, 0, 1)
    small,r = pruned(net, x)
    assert (small[0].kernel_size,small[0].dilation,small[0].padding)==((2,3),(2,1),(1,1)) and [h[:2] for h in r.plan.dead_but_kept]==[('0',1)]

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
    assert not p.kernels and any(why in h[2] for h in p.dead_but_kept), p

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
    from fasterprune.surgery import transaction as operation
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
    size = {n:b for n,_,b in r.plan.kernels}
    assert [size[n].count(1) for n,_ in wide]==[(1,1,2)[i%3] for i in range(len(wide))]

# --- branches ---------------------------------------------------------------------------------------------------------
class Basic(nn.Module):
    "A block in the ways in which people write it"
    def __init__(self, way, n=6):
        super().__init__()
        self.a,self.b,self.norm,self.relu,self.way = nn.Conv2d(n,4,3,padding=1),nn.Conv2d(4,n,3,padding=1,bias=False),nn.BatchNorm2d(n),nn.ReLU(inplace=True),way
        self.gamma = nn.Parameter(torch.full((1,n,1,1), .5))
    def forward(self, x):
        y = self.norm(self.b(self.relu(self.a(x))))
        if self.way=='in place': y += x; return self.relu(y)
        if self.way=='into the trunk': x += y; return x
        if self.way=='scaled': return x+F.dropout(self.gamma*y, .1, self.training)
        if self.way=='permuted': return (x.permute(0,2,3,1)+y.permute(0,2,3,1)).permute(0,3,1,2)
        if self.way=='function': return torch.add(other=y, input=x).relu_()
        if self.way=='two': return x+(y+self.norm(x*0))
        return self.relu(x+y)

WAYS = ['plain', 'in place', 'into the trunk', 'scaled', 'permuted', 'function']

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('constant', [False, True])
def test_a_branch_goes(way, constant):
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Conv2d(3,6,3), nn.ReLU(), Basic(way), Basic('plain'), nn.Conv2d(6,2,3)),torch.randn(2,3,9,8, dtype=torch.float64)
    net = awake(net, x)
    with torch.no_grad():
        net[2].b.weight.zero_()
        if not constant: net[2].norm.bias.zero_(); net[2].norm.running_mean.zero_()
    seen = []
    want,after = run(net, x),Plan.from_json(Pruner(net, x).plan().to_json())
    small,r = pruned(net, x)
    assert torch.equal(run(net, x), want) # planning left it as it was
    b, = r.plan.branches
    relu = way in ('plain', 'in place') # its ReLU runs elsewhere, too
    assert (b.where,[g.module for g in b.modules],b.banks)==('2', ['2.a', *['2.relu']*(not relu), '2.b', '2.norm'], ('2.b',)) and (b.modules[-1].value is not None)==constant
    assert r.plan==after and r.error<1e-10 and f"branch      2: a, {'' if relu else 'relu, '}b and norm run no more, for 2.b is zero{'; a constant stays'*constant}" in repr(r)
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append(o) if isinstance(o, torch.Tensor) else None) for m in small[2].children()]
    run(small, x)
    for h in hooks: h.remove()
    assert len(seen)==relu # its last one
    assert r.params[1]==sum(p.numel() for p in small.parameters())==sum(p.numel() for n,p in net.named_parameters() if not n.startswith(('2.a','2.b','2.norm')))+6*constant
    assert not any(k.startswith(('2.a','2.b')) for k in small.state_dict()) and r.macs[1]==r.macs[0]-2*(6*4*9+4*6*9)*(7*6)
    small.train()
    if way=='into the trunk': return # writes over what autograd remembers, as it did before
    small(x).square().sum().backward()
    assert all(p.grad is not None for n,p in small.named_parameters() if n!='3.gamma' and not n.endswith('gamma'))
    now = run(small.eval(), x) # BatchNorms have moved on
    assert torch.equal(run(pickle.loads(pickle.dumps(small)), x), now) and torch.equal(run(deepcopy(small), x), now)
    with pytest.warns(NoEffectWarning): Pruner(small, x).prune()
    Pruner(small, x).prune(.5) # and it can be cut as any other
    assert small[0].out_channels==3

class Two(nn.Module): # what its code adds inside the branch cannot be told from the sum
    def __init__(self): super().__init__(); self.a,self.b,self.p = nn.Conv2d(6,4,1),nn.Conv2d(4,6,1),nn.Parameter(torch.ones(1,6,1,1))
    def forward(self, x): return x+(self.b(self.a(x))+self.p)
class Shape(Two):
    def forward(self, x): y = self.b(self.a(x).relu()); return x+y*y.shape[1]
class Uneven(Two): # the border says something else than the middle
    def __init__(self): super().__init__(); self.c = nn.Conv2d(6,6,3,padding=1)
    def forward(self, x): return x+self.c(self.b(self.a(x)))

@pytest.mark.parametrize('kind,why', [(Two,'its own code adds something'), (Shape,'its code asks the branch'), (Uneven,'not the same everywhere')])
def test_a_branch_stays_and_why(kind, why):
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Conv2d(3,6,3), kind(), nn.Conv2d(6,2,3)).double(),torch.randn(2,3,8,8, dtype=torch.float64)
    with torch.no_grad(): net[1].b.weight.zero_()
    small,r = pruned(net, x)
    assert not r.plan.branches and any(n=='1' and why in w for n,_,w in r.plan.dead_but_kept), r.plan.dead_but_kept

def test_branches_that_are_left_alone_on_request():
    net,x = nn.Sequential(nn.Conv2d(3,6,3), Basic('plain'), nn.Conv2d(6,2,3)).eval(),torch.randn(2,3,8,8)
    with torch.no_grad(): net[1].b.weight.zero_()
    assert not Pruner(net, x, ignore='1.a').plan().branches and not Pruner(net, x, only='0').plan().branches and Pruner(net, x, only='1').plan().branches

@pytest.mark.parametrize('kind', [torch.optim.Adam, torch.optim.LBFGS, lambda ps, lr: torch.optim.SGD(ps, lr, momentum=.9)])
def test_branches_optimizer_copies_masks_and_back(kind, monkeypatch):
    from fasterprune.surgery import transaction as operation
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Conv2d(3,6,3), Basic('plain'), Basic('in place'), nn.Conv2d(6,2,3)),torch.randn(2,3,9,8, dtype=torch.float64)
    net = awake(net, x)
    average,opt = torch.optim.swa_utils.AveragedModel(net),kind(net.parameters(), lr=.01)
    def loss(): opt.zero_grad(); l = net(x).square().sum(); l.backward(); return l
    opt.step(loss)
    masks = Sparsifier(net, x, granularity='layer', only=['1.b']).sparsify(1.)
    Sparsifier(net, x, granularity='filter', only=['2.a']).sparsify(.5)
    copy = average.module
    before,want,mine = deepcopy(net.state_dict()),run(net, x),run(copy, x)
    params,state = [list(g['params']) for g in opt.param_groups],{id(p):sorted(s) for p,s in opt.state.items()}
    monkeypatch.setattr(operation, 'tolerance', lambda d: -1.)
    with pytest.raises(Exception, match='put back'): Pruner(net, x).prune(optimizer=opt, also=[average]) # the first step does not hold
    calls = []
    monkeypatch.setattr(operation, 'tolerance', lambda d: calls.append(1) or (1e-8 if len(calls)<3 else -1.))
    with pytest.raises(Exception, match='put back'): Pruner(net, x).prune(optimizer=opt, also=[average]) # the second
    monkeypatch.undo()
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items()) and list(net.state_dict())==list(before) and torch.equal(run(copy, x), mine)
    assert all(p is q for a,g in zip(params, opt.param_groups) for p,q in zip(a, g['params'], strict=True)) and {id(p):sorted(s) for p,s in opt.state.items() if id(p) in state}==state
    silenced = deepcopy(copy)
    with torch.no_grad(): silenced[1].b.weight.zero_()
    r = Pruner(net, x).prune(optimizer=opt, also=[average])
    assert rel(run(net, x), want)<1e-10 and r.also[0].kind=='AveragedModel' and r.also[0].error<1e-10 and r.also[0].change>1e-6
    assert r.rows()==[('2.a', 4, 2)] and [b.where for b in r.plan.branches]==['1'] and list(copy.state_dict())==list(net.state_dict())
    assert {id(p) for g in opt.param_groups for p in g['params']}=={id(p) for p in net.parameters()}
    opt.step(loss); opt.step(loss)
    assert run(net, x).isfinite().all()

def test_masks_of_what_is_gone_go():
    assert not Masks({'a.weight':torch.zeros(1,1,1,1, dtype=torch.bool)}).cut((Edit('a.weight', 0, 4, ()),)).keep

def test_layers_by_granularity_and_whole_vision_transformer():
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    net,x = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=3, embed_dim=24, num_heads=4, num_classes=5),torch.randn(2,3,32,32, dtype=torch.float64)
    net = awake(net, x)
    Sparsifier(net, x, granularity='layer', only=['blocks.0.attn.proj', 'blocks.1.mlp.fc2', 'blocks.2.attn.proj', 'blocks.2.mlp.fc2']).sparsify(1.)
    small,r = pruned(net, x)
    assert [b.where for b in r.plan.branches]==['blocks.0', 'blocks.1', 'blocks.2', 'blocks.2'] and r.macs[1]<.55*r.macs[0]

def test_an_attention_that_gives_two_things():
    torch.manual_seed(0)
    class Own(nn.Module):
        def __init__(self): super().__init__(); self.attn,self.norm = nn.MultiheadAttention(16, 4, batch_first=True),nn.LayerNorm(16)
        def forward(self, x):
            y,weights = self.attn(x, x, x)
            return self.norm(x+y)
    net,x = nn.Sequential(Own(), Own(), nn.Linear(16,3)),torch.randn(2,5,16, dtype=torch.float64)
    net = awake(net, x)
    with torch.no_grad(): net[0].attn.out_proj.weight.zero_()
    small,r = pruned(net, x)
    assert [b.where for b in r.plan.branches]==['0'] and r.plan.branches[0].modules[0].items==(True,True) and r.error<1e-10
    fused = awake(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), x)
    with torch.no_grad(): fused.linear2.weight.zero_()
    assert not Pruner(fused, x).plan().branches and run(fused, x).shape==x.shape and 'fused path' in repr(Pruner(fused, x).plan())

@pytest.mark.parametrize('name,banks', [('resnet18', ['layer1.0.conv2','layer2.0.conv2','layer4.1.conv2']), ('mobilenet_v2', ['features.3.conv.2','features.6.conv.2'])])
def test_branches_of_known_networks(name, banks):
    torch.manual_seed(0)
    net,x = zoo(name),torch.randn(1,3,64,64, dtype=torch.float64)
    Sparsifier(net, x, granularity='layer', only=banks).sparsify(1.)
    small,r = pruned(net, x)
    assert r.error<1e-10 and [b.banks[0] for b in r.plan.branches]==banks and all(b.modules[-1].value for b in r.plan.branches)
    e = evaluate(net, x) # counted on the network as it is
    assert (e.effective_params,e.effective_macs)==(r.params[1],r.macs[1])

# --- rows and columns of linear layers, heads -------------------------------------------------------------------------
@pytest.mark.parametrize('granularity,only', [('row',['0','2']), ('column',['2','4'])])
def test_rows_and_columns_of_linear_layers(granularity, only):
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Linear(6,8), nn.GELU(), nn.Linear(8,8), nn.ReLU(), nn.Linear(8,3)).double(),torch.randn(4,6, dtype=torch.float64)
    Sparsifier(net, x, granularity=granularity, only=only).sparsify(.5) # a row leaves its bias: a constant, which is folded
    small,r = pruned(net, x)
    assert r.rows()==[('0',8,4), ('2',8,4)] and r.error<1e-10

@pytest.mark.parametrize('silenced', ['proj', 'qkv'])
def test_heads(silenced):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    net,x = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=4, num_classes=5),torch.randn(2,3,32,32, dtype=torch.float64)
    net = awake(net, x)
    a = net.blocks[0].attn
    with torch.no_grad():
        if silenced=='proj': a.proj.weight[:,6:12] = 0
        for t in (a.qkv.weight, a.qkv.bias) if silenced!='proj' else (): t.unflatten(0, (3,4,6))[:,1][[0,1,2]] = 0
    small,r = pruned(net, x)
    assert r.rows()==[('blocks.0.attn.qkv[outer]', 4, 3)] and r.error<1e-10

# --- the rest ---------------------------------------------------------------------------------------------------------
def test_a_plan_with_branches_by_hand():
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Conv2d(3,6,3), nn.ReLU(), Basic('plain'), Basic('plain'), nn.Conv2d(6,2,3)),torch.randn(2,3,9,8, dtype=torch.float64)
    net = awake(net, x)
    Sparsifier(net, x, granularity='filter', ignore='2').sparsify(.34) # the trunk, and a layer of the second block
    with torch.no_grad(): net[2].b.weight.zero_(); net[2].norm.bias[:] = .1; net[3].a.weight[:,:,[0,2]] = 0
    plan,want = Plan.from_json(Pruner(net, x).plan().to_json()),run(net, x)
    average = torch.optim.swa_utils.AveragedModel(net)
    assert plan.branches and plan.kernels and plan.removed
    small = apply_(deepcopy(net), plan)
    assert rel(run(small, x), want)<1e-10 and rel(run(apply_(average, plan), x), want)<1e-10
    with pytest.raises(ValueError, match='takes out a branch with'): apply_(small, plan)
    with pytest.raises(ValueError, match='takes out a branch with'): apply_(nn.Linear(2,2), plan)
    r = Pruner(net, x).prune(verify=False)
    assert r.error is None and r.plan==plan and rel(run(net, x), want)<1e-10

class Dense(nn.Module): # as Hugging Face writes it: the sum stands in another module than the branch begins in
    def __init__(self): super().__init__(); self.dense,self.norm = nn.Linear(8,8),nn.LayerNorm(8)
    def forward(self, y, x): return self.norm(self.dense(y)+x)
class Layer(nn.Module):
    def __init__(self): super().__init__(); self.inner,self.output = nn.Sequential(nn.Linear(8,12), nn.GELU(), nn.Linear(12,8)),Dense()
    def forward(self, x): return self.output(self.inner(x), x)

@pytest.mark.parametrize('exact_norms', [False, True])
def test_a_sum_in_another_module(exact_norms):
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Linear(4,8), Layer(), Layer(), nn.Linear(8,3)),torch.randn(2,5,4, dtype=torch.float64)
    net = awake(net, x)
    with torch.no_grad(): net[2].output.dense.weight.zero_()
    small = deepcopy(net)
    r = Pruner(small, x, exact_norms=exact_norms).prune()
    assert [(b.where,[g.module for g in b.modules]) for b in r.plan.branches]==[('2.output', ['2.inner','2.output.dense'])]
    assert rel(run(small, other(x)), run(net, other(x)))<1e-10

def test_a_block_that_runs_twice():
    "Its modules are needed by each of the two sums for the other: it stays, and loses all channels but one"
    torch.manual_seed(0)
    class Again(nn.Module):
        def __init__(self): super().__init__(); self.first,self.block,self.last = nn.Conv2d(3,6,1),Basic('plain'),nn.Conv2d(6,2,1)
        def forward(self, x): return self.last(self.block(self.block(self.first(x))))
    net,x = Again(),torch.randn(2,3,8,8, dtype=torch.float64)
    net = awake(net, x)
    with torch.no_grad(): net.block.b.weight.zero_()
    want,small = run(net, x),deepcopy(net)
    r = Pruner(small, x).prune()
    assert rel(run(small, x), want)<1e-10 and not r.plan.branches and small.block.a.out_channels==1
