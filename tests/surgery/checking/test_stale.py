"""Numbers that only other methods read are mended where it is shown what they count, and named where it is not; layers that did not run are named"""
import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fasterprune.all import *
from fasterprune.surgery.report import Report
from fasterprune.surgery.checking.stale import head_of, never_ran, read_in_forward, stale_sizes

pytestmark = pytest.mark.filterwarnings('ignore')
C = nn.Conv2d

def cut(m, x, *how, **kw): # As a `Pruner` does it: the plan, what it mends, and what is left to say
    p = Pruner(m, x)
    plan = p.plan(*(how or (.5,)), **kw)
    mended,named = stale_sizes(m, plan)
    unseen = never_ran(p.coupling, m, plan)
    apply_(m, Plan.from_json(replace(plan, attrs=plan.attrs+mended).to_json()))
    return SimpleNamespace(plan=plan, mended={(a.module, a.name):a.value for a in mended}, named=named, unseen=unseen, removed=plan.removed)

def near(a, b, tol=1e-5): assert (a-b).abs().max()<=tol*b.abs().max(), (a-b).abs().max()/b.abs().max()

def stirred(m): # statistics that matter where branches are fused
    torch.manual_seed(0)
    for b in m.modules():
        if isinstance(b, nn.BatchNorm2d): b.running_mean.normal_(0, .1); b.running_var.uniform_(.5, 2)
    return m.eval()

# ---- timm: classifiers and re-parameterisation

@pytest.mark.parametrize('name,size', [('resnet18',64), ('mobilenetv3_small_050',64), ('vit_tiny_patch16_224',224), ('convnext_atto',64), ('repvgg_a0',64)])
def test_a_new_classifier_fits(name, size):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    m,x = timm.create_model(name, num_classes=10).eval(),torch.randn(1,3,size,size)
    r = cut(m, x)
    assert r.removed and m.num_features==m.forward_features(x).shape[-1 if name.startswith('vit') else 1]
    m.reset_classifier(7)
    assert m(x).shape==(1,7)
    assert any(k.startswith('feature_info') for _,k,_ in r.named)

@pytest.mark.parametrize('name', ['mobileone_s0','repvgg_a0','fastvit_t8','repvit_m0_9'])
def test_fused_after_a_cut(name):
    timm = pytest.importorskip('timm')
    m,x = stirred(timm.create_model(name, num_classes=10)),torch.randn(1,3,64,64)
    assert cut(m, x, {n:.5 for n in list(couple(m, x).by_name)[:6]}).removed
    with torch.no_grad(): near(timm.utils.reparameterize_model(m)(x), m(x), 1e-4)

# ---- others of the same kind

class RepBlock(nn.Module): # two branches that become one convolution
    def __init__(self, ci, co, groups=1):
        super().__init__()
        self.in_channels,self.out_channels,self.groups = ci,co,groups
        self.big,self.small,self.fused = C(ci,co,3,padding=1,groups=groups),C(ci,co,1,groups=groups),None
    def forward(self, x): return (self.big(x)+self.small(x) if self.fused is None else self.fused(x)).relu()
    @torch.no_grad()
    def fuse(self):
        f = C(self.in_channels, self.out_channels, 3, padding=1, groups=self.groups)
        f.weight.copy_(self.big.weight+F.pad(self.small.weight, [1]*4))
        f.bias.copy_(self.big.bias+self.small.bias)
        self.fused = f

@pytest.mark.parametrize('depthwise', [False, True])
def test_own_fusion(depthwise):
    torch.manual_seed(0)
    m,x = nn.Sequential(RepBlock(3,16), RepBlock(16,16,16) if depthwise else RepBlock(16,24), RepBlock(16 if depthwise else 24,8)).eval(),torch.randn(2,3,8,8)
    r = cut(m, x)
    with torch.no_grad():
        want = m(x)
        for b in m: b.fuse()
        near(m(x), want)
    assert r.mended['1','in_channels']==8 and (not depthwise or m[1].groups==8) and not r.named

class Model(nn.Module): # a classifier that is made anew, a list of widths, a configuration
    def __init__(self):
        super().__init__()
        self.num_features,self.widths,self.worms,self.config = 32,(16,32),32,SimpleNamespace(hidden=32, layers=2)
        self.a,self.b,self.head = C(3,16,3),C(16,32,3),nn.Linear(32,5)
    def forward(self, x): return self.head(self.b(self.a(x).relu()).mean((2,3)))
    def reset(self, n): self.head = nn.Linear(self.num_features, n)

def test_a_new_head():
    m,x = Model().eval(),torch.randn(2,3,8,8)
    r = cut(m, x)
    m.reset(3)
    assert m(x).shape==(2,3) and m.worms==32 and m.widths==(16,32)
    assert set(r.named)=={('','widths[0]',16), ('','widths[1]',32), ('','worms',32), ('','config.hidden',32)}

class Chance(nn.Module): # numbers that are equal by chance, and one that the code needs as it is
    def __init__(self):
        super().__init__()
        self.tokens,self.dim,self.q,self.o = 16,16,nn.Linear(8,16),nn.Linear(16,4)
    def forward(self, x): return self.o(self.scaled(self.q(x)[:,:self.tokens]).relu())
    def scaled(self, h): return h*self.dim**-.5

def test_equal_numbers_are_not_sizes():
    torch.manual_seed(0)
    m,x = Chance().eval(),torch.randn(2,20,8)
    dense = copy.deepcopy(m)
    r = cut(m, x)
    assert (m.tokens, m.dim)==(16,16) and not r.mended and m(x).shape==dense(x).shape
    assert {k for _,k,_ in r.named}=={'tokens','dim'} and {'tokens','dim'}<=read_in_forward(Chance)

def test_a_parent_that_reads_it():
    class Parent(nn.Module):
        def __init__(self): super().__init__(); self.b,self.o = Part(),nn.Linear(16,3)
        def forward(self, x): return self.o(self.b(x)*self.b.dim**-.5)
    class Part(nn.Module):
        def __init__(self): super().__init__(); self.dim,self.l = 16,nn.Linear(8,16)
        def forward(self, x): return self.l(x)
    mended,named = stale_sizes(m := Parent(), Pruner(Parent().eval(), torch.randn(2,8)).plan({'b.l':.5}))
    assert all(a.name!='dim' for a in mended)

def test_widths_that_disagree_are_named():
    class N(nn.Module):
        def __init__(self): super().__init__(); self.dim,self.a,self.b,self.c = 16,C(3,16,1),C(16,16,1),C(16,4,1)
        def forward(self, x): return self.c(self.b(self.a(x).relu()).relu())
    m = N().eval()
    r = cut(m, torch.randn(2,3,4,4), {'a':.5})
    assert not r.mended and r.named==(('','dim',16),) and m.dim==16

def test_nothing_is_said_where_nothing_is_stale():
    m = nn.Sequential(C(3,8,3), nn.BatchNorm2d(8), nn.ReLU(), C(8,4,3)).eval()
    r = cut(m, torch.randn(2,3,8,8))
    assert r.removed and not r.mended and not r.named and not r.plan.unseen
    assert stale_sizes(m, Plan(())) == ((),())

def test_the_head_of_a_model():
    tv = pytest.importorskip('torchvision').models
    assert head_of(tv.resnet18()).in_features==512 and head_of(tv.mobilenet_v3_small()).out_features==1000 and head_of(nn.ReLU()) is None

# ---- what did not run

class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.c,self.o,self.far = nn.Linear(8,32),nn.Linear(5,32),nn.Linear(32,3),nn.Linear(5,7)
    def forward(self, x, cond=None):
        h = self.a(x)
        return self.o(F.relu(h if cond is None else h+self.c(cond)))

class Experts(nn.Module): # of which one is chosen
    def __init__(self):
        super().__init__()
        self.a,self.e,self.o = nn.Linear(8,16),nn.ModuleList(nn.Sequential(nn.Linear(16,12), nn.ReLU(), nn.Linear(12,16)) for _ in range(3)),nn.Linear(16,3)
    def forward(self, x, k=1): return self.o(self.e[k](self.a(x).relu()))

class Aux(nn.Module): # with a head for training, and a token
    def __init__(self):
        super().__init__()
        self.a,self.b,self.aux,self.token = nn.Linear(8,16),nn.Linear(16,4),nn.Linear(16,4),nn.Parameter(torch.randn(16))
    def forward(self, x, y=None):
        h = self.a(x).relu()
        return self.b(h) if not self.training else F.mse_loss(self.b(h), y)+F.mse_loss(self.aux(h+self.token), y)

@pytest.mark.parametrize('m,want', [(Conditional(), {'c'}), (Experts(), {'e.0.0','e.0.2','e.2.0','e.2.2'}), (Aux(), {'aux','token'})])
def test_layers_that_did_not_run(m, want):
    r = cut(m.eval(), torch.randn(2,8))
    assert r.removed and set(r.plan.unseen)==want

def test_all_ran():
    m = Conditional().eval()
    assert cut(m, (torch.randn(2,8), torch.randn(2,5))).plan.unseen==()
    m = Conditional().eval()
    assert never_ran(couple(m, torch.randn(2,8)), m, Plan(()))==() # nothing is cut

# ---- in words

def test_the_report_says_both():
    r = Report(Plan((), unseen=('c','aux')), (1,1), (1,1), 'masks', None, '', stale=(('','worms',32), ('','info[0].chs',16), ('','info[1].chs',32), ('b','dim',8), ('c','dim',8)))
    lines = str(r).splitlines()
    assert 'not run     c and aux: no run of the example touched them, so they were not cut along and may not fit any more' in lines
    for l in ('still says  32: worms of the model', 'still says  16 and 32: info of the model', 'still says  8: dim of b and 1 more'): assert l in lines
    assert 'c' in [w.strip(':,') for w in str(r).split()]
    assert 'not run' not in str(replace(r, plan=Plan(()))) and 'still' not in str(replace(r, stale=()))
