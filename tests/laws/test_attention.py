"Attention, normalisations over channels, size calls, adapters and budgets: what is cut computes what the law says"
import pickle, warnings
from copy import deepcopy
import pytest, torch
from torch import nn
import torch.nn.functional as F
from torchvision.models import SwinTransformer, VisionTransformer, convnext_tiny, resnet18
from fasterprune.surgery.planning.budget import Budget, Costs
from fasterprune.surgery.coupling.couple import couple
from fasterprune.surgery.planning.plan import Plan
from fasterprune.surgery.pruner import Pruner

def randomised(m, seed=0):
    "All parameters random, so that no output is zero by initialisation"
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in m.parameters(): p.copy_(torch.randn(p.shape, generator=gen)*(.5 if p.dim()<2 else 1.5/p[0].numel()**.5))
    return m.eval()

class Fused(nn.Module): # as in timm: sizes tied by arithmetic, scale by default
    def __init__(self, c=24, h=3):
        super().__init__()
        self.h,self.qkv,self.proj,self.n,self.up,self.down = h,nn.Linear(c, 3*c),nn.Linear(c, c),nn.LayerNorm(c),nn.Linear(c, 2*c),nn.Linear(2*c, c)
    def forward(self, x):
        b,n,c = x.shape
        q,k,v = self.qkv(self.n(x)).reshape(b, n, 3, self.h, c//self.h).permute(2,0,3,1,4).unbind(0)
        x = x+self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1,2).reshape(b, n, c))
        return x+self.down(F.gelu(self.up(x)))

class Grouped(nn.Module): # separate projections, two queries a key, rotary positions, RMS norm written out, gated MLP
    def __init__(self, c=32, h=4, kv=2, d=8):
        super().__init__()
        self.num_heads,self.num_kv,self.head_dim = h,kv,d
        self.q,self.k,self.v,self.o = nn.Linear(c, h*d, bias=False),nn.Linear(c, kv*d, bias=False),nn.Linear(c, kv*d, bias=False),nn.Linear(h*d, c, bias=False)
        self.norm,self.gate,self.up,self.down = nn.Parameter(torch.ones(c)),nn.Linear(c, 40),nn.Linear(c, 40),nn.Linear(40, c)
    def forward(self, x):
        b,n,_ = x.shape
        y = x*torch.rsqrt(x.pow(2).mean(-1, keepdim=True)+1e-6)*self.norm
        q,k,v = (l(y).view(b, n, -1, self.head_dim).transpose(1, 2) for l in (self.q, self.k, self.v))
        t = torch.arange(n)[:,None]*torch.ones(self.head_dim)
        turn = lambda z: z*t.cos().to(z)+torch.cat([-z[...,self.head_dim//2:], z[...,:self.head_dim//2]], -1)*t.sin().to(z)
        r = self.num_heads//self.num_kv
        k,v = (z[:,:,None].expand(b, self.num_kv, r, n, self.head_dim).reshape(b, self.num_heads, n, self.head_dim) for z in (turn(k), v))
        a = (turn(q) @ k.transpose(2,3) * self.head_dim**-.5).softmax(-1)
        x = x+self.o((a @ v).transpose(1,2).reshape(b, n, -1))
        return x+self.down(F.silu(self.gate(x))*self.up(x))

class Wrap(nn.Module):
    def __init__(self, m, c): super().__init__(); self.a,self.m,self.z = nn.Linear(7, c),m,nn.Linear(c, 5)
    def forward(self, x): return self.z(self.m(self.a(x)))

class Both(nn.Module):
    def __init__(self): super().__init__(); self.e,self.t,self.z = nn.Linear(7, 32),nn.Transformer(32, 4, 1, 1, 64, batch_first=True),nn.Linear(32, 5)
    def forward(self, x): return self.z(self.t(self.e(x), self.e(x[:,1:])))

def encoder(**kw): return Wrap(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, **kw), 2, enable_nested_tensor=False), 32)

seq,img = lambda b=2: torch.randn(b,6,7),lambda s: lambda b=2: torch.randn(b,3,s,s)
NETS = dict(
    fused=(lambda: Wrap(Fused(), 24), seq), grouped=(lambda: Wrap(Grouped(), 32), seq),
    encoder=(lambda: encoder(batch_first=True), seq), encoder_first=(lambda: encoder(), lambda b=2: torch.randn(6,b,7)), transformer=(Both, seq),
    vit=(lambda: VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10), img(32)),
    swin=(lambda: SwinTransformer([4,4], 24, [2,2], [3,6], [4,4], num_classes=10), img(64)),
    convnext=(lambda: convnext_tiny(num_classes=10), img(64)))

@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('fraction', [.25, .5])
def test_half_of_everything(name, fraction):
    "Embedding, MLP and what else is primary: verified, runs at other batch sizes, copies, pickles, trains"
    make,x = NETS[name]
    m = randomised(make())
    n = sum(p.numel() for p in m.parameters())
    r = Pruner(m, x()).prune(fraction)
    assert r.error<1e-9 and r.plan.mixed and sum(p.numel() for p in m.parameters())==r.params[1]<(1-.6*fraction)*n
    for b in (1,3):
        y = m(x(b))
        assert y.shape[1 if name=='encoder_first' else 0]==b and y.isfinite().all()
    one = x(2)
    for copy in (deepcopy(m), pickle.loads(pickle.dumps(m))): torch.testing.assert_close(copy(one), m(one))
    with torch.inference_mode(): torch.testing.assert_close(m(one), m(one.clone().requires_grad_(False)), rtol=1e-4, atol=1e-4)
    m.train()(one).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape==p.shape for p in m.parameters() if p.requires_grad)

@pytest.mark.parametrize('name', ['fused', 'grouped', 'encoder', 'vit', 'swin'])
def test_each_group_alone(name):
    "Every free group (heads, head dimensions, MLP) can be cut by itself; without statistics over it the readers' law holds as it stands"
    make,x = NETS[name]
    whole = randomised(make())
    groups = [g for g in couple(whole, x()).groups if g.n>1]
    assert len(groups)>2
    for g in groups:
        m = deepcopy(whole)
        r = Pruner(m, x()).prune({g.name:.5})
        turned = (name, g.name)==('grouped', 'm.v[inner]') # goes with the queries, of which a unit is two positions: one expression says both sizes
        assert r.removed==(g.n//4 if turned else g.n//2), (g, r)
        assert not turned or m.m.v.out_features==m.m.k.out_features==8
        assert r.error<1e-9 and bool(r.plan.mixed)==bool(g.mixed), (g, r)
        m(x(3))

@pytest.mark.parametrize('name,heads', [('fused',3), ('encoder',4), ('vit',4)])
def test_heads_are_found(name, heads):
    make,x = NETS[name]
    gs = couple(make().eval(), x()).groups
    assert any(g.n==heads for g in gs) and any(g.mixed for g in gs)

def test_scale_stays():
    "A recomputed softmax scale is the one of the width before"
    m = randomised(Wrap(Fused(), 24))
    dims = [g for g in couple(m, seq()).groups if g.n==8 and not g.mixed]
    r = Pruner(m, seq()).prune({g.name:.5 for g in dims})
    said = [k.values[1] for z in r.plan.recoded for e in z.methods for k in e.changes if k.kind=='keyword']
    assert r.error<1e-10 and said and abs(said[0]-8**-.5)<1e-12
    assert Plan.from_json(r.plan.to_json())==r.plan

def test_cut_twice():
    m,x = randomised(Wrap(Fused(), 24)),seq()
    a = Pruner(m, x).prune(.25)
    b = Pruner(m, x).prune(.5)
    assert a.error<1e-9 and b.error<1e-9 and b.params[0]==a.params[1]>b.params[1]
    m(seq(3))

def test_dead_heads_go():
    "Masks' law: a head whose values nobody reads, and an MLP unit that nobody writes"
    m,x = randomised(Wrap(Fused(), 24)),seq()
    with torch.no_grad():
        m.m.proj.weight[:,8:16] = 0
        m.m.up.weight[::2],m.m.up.bias[::2] = 0,0
    want = m(x)
    r = Pruner(m, x).prune()
    assert r.law=='masks' and r.error<1e-6 and r.removed>=24 and not r.plan.mixed
    torch.testing.assert_close(m(x), want, rtol=1e-4, atol=1e-5)

def test_nothing_is_remembered():
    "A module that caches what it computes holds no fake tensor afterwards"
    class Caches(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.table = nn.Linear(7, 8),nn.Linear(8, 3),{}
        def forward(self, x):
            k = x.shape[1]
            if k not in self.table: self.table[k] = torch.ones(k, 1, dtype=x.dtype)
            return self.b(self.a(x)*self.table[k])
    m,x = Caches(),seq()
    Pruner(m, x).prune(.5)
    assert not m.table
    m(x)

@pytest.mark.parametrize('budget', [Budget(macs=.5), Budget(params=.3), Budget(params=2_000_000), Budget(macs=.7, params=.4)])
def test_budgets_are_met(budget):
    m,x = resnet18(num_classes=10),img(64)(1)
    c = couple(m, x)
    limits = budget.limits(Costs(c)(torch.zeros(c.labels.size).bool().numpy()))
    r = Pruner(m, x).prune(budget=budget)
    left = dict(params=r.params[1], macs=r.macs[1])
    assert all(left[k]<=v for k,v in limits.items()) and any(left[k]>=.995*v for k,v in limits.items()), (left, limits)
    assert left['params']==sum(p.numel() for p in m.parameters()) and r.error<1e-9

@pytest.mark.parametrize('kw', [dict(sparsity=.5, budget=Budget(macs=.5)), dict(budget=.5), dict(budget=Budget(params=10))])
def test_budget_refusals(kw):
    with pytest.raises((ValueError, TypeError), match='not both|Budget\\(macs=0.5\\)|cannot be met'): Pruner(resnet18(num_classes=10), img(64)(1)).prune(**kw)

class Merged(nn.Module): # heads stand in the batch
    def __init__(self, c=24, h=4):
        super().__init__()
        self.h,self.a,self.qkv,self.p,self.z = h,nn.Linear(7, c),nn.Linear(c, 3*c),nn.Linear(c, c),nn.Linear(c, 5)
    def forward(self, x):
        x = self.a(x)
        b,n,c = x.shape
        q,k,v = (t.reshape(b, n, self.h, c//self.h).transpose(1, 2).reshape(b*self.h, n, c//self.h) for t in self.qkv(x).chunk(3, -1))
        y = (q @ k.transpose(1, 2) * .4).softmax(-1) @ v
        return self.z(self.p(y.reshape(b, self.h, n, -1).transpose(1, 2).reshape(b, n, -1)))

@pytest.mark.parametrize('batch', [1, 2])
def test_heads_that_are_merged_with_the_batch(batch):
    "A planned size follows the batch and the number of tokens, also where it was planned for a batch of one, and twice"
    m = Merged().double().eval()
    for fraction in (.5, .3):
        r = Pruner(m, torch.randn(batch,6,7).double()).prune(fraction)
        assert r.error<1e-10 and r.removed
        whole = torch.randn(5,9,7).double()
        assert torch.allclose(m(whole), torch.cat([m(x[None]) for x in whole]))
