"Every criterion × every granularity × local and global, from Sparsifier, SparsifyCallback and Pruner: exact counts, the same masks twice, or a refusal that says why"
import random
from copy import deepcopy
from functools import lru_cache
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.data.core import DataLoaders
from fastai.learner import Learner
import fasterprune.surgery.planning.selection # registers all criteria
from fasterprune.callback import prune # adds learn.prune
from fasterprune.callback.sparsify import SparsifyCallback
from fasterprune.core import n_removed
from fasterprune.criteria.base import criteria
from fasterprune.granularity import granularities
from fasterprune.sparse.sparsifier import Sparsifier
from fasterprune.surgery.planning.budget import Budget
from fasterprune.surgery.analysis.scores import evidence_for
from fasterprune.surgery.pruner import Pruner

pytestmark = pytest.mark.filterwarnings('ignore')
NAMES = [n for n,c in criteria.items() if c.family!='own']
COUPLED = 'filter', 'shared_kernel'

# ---- networks

class Small(nn.Module): # a residual, a depthwise and a grouped convolution, a flattened map
    def __init__(self):
        super().__init__()
        conv = lambda i,o,k=3,**kw: nn.Sequential(nn.Conv2d(i, o, k, padding=k//2, bias=False, **kw), nn.BatchNorm2d(o), nn.ReLU())
        self.a,self.b,self.d,self.g,self.fc = conv(3,8),conv(8,8),conv(8,8,groups=8),conv(8,8,groups=2),nn.Linear(8*4,3)
    def forward(self, x):
        x = self.a(x)
        return self.fc(F.adaptive_avg_pool2d(self.g(self.d(F.relu(x+self.b(x)))), 2).flatten(1))
class Block(nn.Module):
    def __init__(self, n, heads):
        super().__init__()
        self.norm1,self.norm2,self.qkv,self.proj,self.fc1,self.fc2,self.heads = nn.LayerNorm(n),nn.LayerNorm(n),nn.Linear(n,3*n),nn.Linear(n,n),nn.Linear(n,2*n),nn.Linear(2*n,n),heads
    def forward(self, x):
        B,T,C = x.shape
        q,k,v = self.qkv(self.norm1(x)).reshape(B, T, 3, self.heads, C//self.heads).permute(2,0,3,1,4)
        x = x+self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1,2).reshape(B, T, C))
        return x+self.fc2(F.gelu(self.fc1(self.norm2(x))))
class Vit(nn.Module):
    def __init__(self, n=8, heads=2, depth=1, patch=4, classes=3):
        super().__init__()
        self.patch,self.blocks,self.norm,self.head = nn.Conv2d(3,n,patch,patch),nn.Sequential(*[Block(n, heads) for _ in range(depth)]),nn.LayerNorm(n),nn.Linear(n,classes)
    def forward(self, x): return self.head(self.norm(self.blocks(self.patch(x).flatten(2).transpose(1,2))).mean(1))

def _torchvision(name, **kw):
    import torchvision
    return getattr(torchvision.models, name)(num_classes=3, **kw)
NETS = dict(small=(Small, 8), tokens=(Vit, 8), resnet18=(lambda: _torchvision('resnet18'), 32), mobilenet_v2=(lambda: _torchvision('mobilenet_v2'), 32),
            densenet121=(lambda: _torchvision('densenet121'), 32), vit=(lambda: Vit(48, 4, 3, 8), 32))
FAST,SLOW = ('small', 'tokens'),('resnet18', 'mobilenet_v2', 'densenet121', 'vit')

@lru_cache(maxsize=2)
def make(name):
    torch.manual_seed(0)
    make,size = NETS[name]
    m = make().eval()
    for k in m.modules(): # as after training: nothing is 0 or 1
        if isinstance(k, (nn.BatchNorm2d, nn.LayerNorm)): nn.init.uniform_(k.weight, .5, 1.5); nn.init.normal_(k.bias, 0, .1)
    data = [(torch.randn(6,3,size,size), torch.arange(6)%3) for _ in range(2)]
    with torch.no_grad():
        m.train(); [m(x) for x,_ in data*3]; m.eval()
    return m,torch.randn(2,3,size,size),data

# ---- where a criterion is not defined, by what it says of itself, and by what each network has

WHOLE = 'scores whole channels'
NOT_HERE = { # (criterion, network) → what the refusal says
    **{(c, n):'has none behind it' for c in ('bn_scale', 'taylor_gate') for n in ('tokens', 'vit')}, # a hidden width without a norm
    **{('apoz', n):'counts zeros behind a ReLU' for n in ('tokens', 'vit', 'mobilenet_v2')},
    **{('hrank', n):'hrank takes the rank of maps' for n in ('tokens', 'vit')},
    **{('synflow', n):'divides by what comes in' for n in ('tokens', 'vit')},
    ('synflow', 'mobilenet_v2'):'twice the input does not give twice the output',
}

def refusal(name, net, gran, context, frm):
    "What must be said, or None where it must work"
    c = criteria[name]
    if c.channel is not None or c.reads!='weight':
        if gran not in COUPLED: return WHOLE
    if c.where is not None and gran not in c.where: return 'is defined for granularity'
    if c.vectors is not None and gran in ('weight', 'layer'): return 'as vectors'
    if context!='local' and (c.selects_set or not c.comparable and c.normalizer is None): return 'cannot be ranked across layers'
    if 'training' in c.needs and frm!='callback': return 'is gathered while a network trains'
    return NOT_HERE.get((name, net))

def checked(f, text, name, twice=True):
    "The value of `f`, twice the same, or None after the refusal that is due"
    if text is None:
        a = f(); b = f() if twice else a
        assert a==b, 'another choice the second time'
        return a
    with pytest.raises(ValueError) as e: f()
    said = e.value.args[0]
    assert text in said, said
    assert name in said or WHOLE in said or 'flow' in said, said
    assert any(w in said for w in ('use ', 'pass ', 'needs', 'ignore=', 'is defined for')), said # the way out

# ---- Sparsifier

def _sparsify(net, name, gran, context):
    m,x,data = make(net)
    return Sparsifier(m, x, granularity=gran, context=context, criterion=name, data=data, loss_func=F.cross_entropy).masks(.5)

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('net', FAST)
def test_sparsifier(net, name):
    for gran in granularities:
        if gran=='frame': continue # of 3-D kernels, and there are none
        for context in ('local', 'global'):
            got = checked(lambda: _sparsify(net, name, gran, context), refusal(name, net, gran, context, 'sparsifier'), name)
            if got is None: continue
            if context=='global': assert sum(z for z,_ in got.units.values())==n_removed(sum(n for _,n in got.units.values()), .5)
            else: assert all(z==n_removed(n, .5) for z,n in got.units.values())

@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('net', SLOW)
def test_sparsifier_on_known_networks(net, name):
    m,x,data = make(net); c = criteria[name]
    found = {}
    for gran in ('filter', 'shared_kernel', 'weight', 'kernel', 'channel', 'row', 'shared_channel', 'layer'):
        if c.vectors is not None and gran in ('kernel', 'row'): continue # each with each of thousands
        for context in ('local', 'global')[gran=='weight':]:
            text = refusal(name, net, gran, context, 'sparsifier')
            def run():
                ev = (lambda: evidence_for(c, m, data, x, loss_func=F.cross_entropy, found=found)) if c.stats and text is None and found and gran not in COUPLED else None # runs the network once for each kind
                s = Sparsifier(m, x, granularity=gran, context=context, criterion=name, data=data, loss_func=F.cross_entropy, evidence=ev)
                if c.stats and gran not in COUPLED and ev is None and text is None:
                    e = evidence_for(c, m, data, x, loss_func=F.cross_entropy); s.evidence = lambda: e
                    got = s.masks(.5); found.update(e.found); return got
                return s.masks(.5)
            got = checked(run, text, name, gran in COUPLED)
            if got is not None and context=='local': assert all(z==n_removed(n, .5) for z,n in got.units.values())

# ---- Pruner

def _plan(net, name, context, gran='filter'):
    m,x,data = make(net)
    kw = dict(budget=Budget(macs=.6)) if context=='budget' else dict(sparsity=.4, context=context)
    return Pruner(m, x).plan(criterion=name, granularity=gran, data=data, loss_func=F.cross_entropy, max_ratio=.9, **kw)

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('net', FAST)
def test_pruner(net, name):
    for gran in COUPLED:
        for context in ('local', 'global', 'isomorphic', 'budget'):
            got = checked(lambda: _plan(net, name, context, gran), refusal(name, net, gran, context, 'pruner'), name)
            if got is not None: assert got.removed>0 and all(len(c.keep)>=1 for c in got.cuts)

@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('net', SLOW)
def test_pruner_on_known_networks(net, name):
    m,x,data = make(net)
    for context in ('local', 'global'):
        text = refusal(name, net, 'filter', context, 'pruner')
        if text is not None: checked(lambda: _plan(net, name, context), text, name); continue
        small = [deepcopy(m) for _ in range(2)]
        rs = [Pruner(k, x).prune(.4, criterion=name, context=context, data=data, loss_func=F.cross_entropy, max_ratio=.9, verify=i==0) for i,k in enumerate(small)]
        assert rs[0].plan==rs[1].plan and rs[0].removed>0 and rs[0].error<1e-5
        assert all(torch.equal(a, b) for a,b in zip(small[0].parameters(), small[1].parameters()))

# ---- SparsifyCallback

def _train(net, name, gran, context, n=2):
    m,x,data = make(net)
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    ds = [(a, b) for x,y in data for a,b in zip(x, y)]
    dls = DataLoaders.from_dsets(ds, ds[:2], bs=4, num_workers=0)
    learn = Learner(dls, deepcopy(m), loss_func=F.cross_entropy)
    cb = SparsifyCallback(.5, gran, context, name, n_batches=2)
    with learn.no_bar(), learn.no_logging():
        try: learn.fit(n, 1e-3, cbs=cb)
        except ValueError as e: raise ValueError(str(e.args[0]))
    assert not any(k._forward_pre_hooks or k._forward_hooks for k in learn.model.modules())
    for k,v in cb.masks.keep.items(): assert not learn.model.get_parameter(k)[~v.expand(learn.model.get_parameter(k).shape)].any()
    return cb.masks

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('net', FAST)
def test_callback(net, name):
    for gran,context in (('filter', 'local'), ('shared_kernel', 'global'), ('row', 'local'), ('weight', 'global')):
        text = refusal(name, net, gran, context, 'callback')
        got = checked(lambda: _train(net, name, gran, context), text, name)
        if got is not None: assert got.sparsity==pytest.approx(.5, abs=.1)

@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('net', SLOW)
def test_callback_on_known_networks(net, name):
    for gran,context in (('filter', 'local'), ('filter', 'global'), ('shared_kernel', 'local'), ('row', 'local')):
        if gran=='row' and criteria[name].vectors is not None: continue # each with each of thousands
        text = refusal(name, net, gran, context, 'callback')
        got = checked(lambda: _train(net, name, gran, context), text, name, gran=='filter')
        if got is not None: assert got.sparsity==pytest.approx(.5, abs=.1)

# ---- learn.prune

@pytest.mark.parametrize('name', NAMES)
def test_learn_prune(name):
    m,x,data = make('small')
    ds = [(a, b) for x,y in data for a,b in zip(x, y)]
    def run():
        torch.manual_seed(0); random.seed(0)
        learn = Learner(DataLoaders.from_dsets(ds, ds[:2], bs=4, num_workers=0), deepcopy(m), loss_func=F.cross_entropy)
        return learn.prune(.5, criterion=name, n_batches=2).plan
    checked(run, refusal(name, 'small', 'filter', 'local', 'pruner'), name)

def test_names_families_needs_and_sources_are_listed():
    assert len(NAMES)>=40 and {'norm', 'control', 'correlation', 'activation', 'information', 'taylor', 'curvature'}<={criteria[n].family for n in NAMES}
    for n in NAMES: assert criteria[n].note and set(criteria[n].needs)<={'data', 'gradients', 'labels', 'training', 'norm', 'relu'}
