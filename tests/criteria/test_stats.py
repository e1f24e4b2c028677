"Statistics: what is taken from a running model is what loops and autograd say, for any layer that reads; and nothing is left behind"
import copy, pickle, random, subprocess, sys
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fasterprune.callback import prune
from fasterprune.callback.sparsify import SparsifyCallback
from fasterprune.core import NoEffectWarning
from fasterprune.criteria.base import Criterion, criteria, vector_scores
from fasterprune.criteria.statistic import Statistic
from fasterprune.criteria.listen import Listener, Location, classes
from fasterprune.criteria.batches import loss_of, split_batch
from fasterprune.criteria.evidence import Evidence, check_needs
from fasterprune.criteria.runs import gather
from fasterprune.data import digits_dls, small_resnet
from fasterprune.schedule import agp
from fasterprune.sparse.sparsifier import Sparsifier
from fasterprune.surgery.planning.budget import Budget
from fasterprune.surgery.planning.selection import Selection
from fasterprune.surgery.analysis.scores import combined, evidence_for, group_scores, places_of, readers, rows_of
from fasterprune.surgery.coupling.couple import couple
from fasterprune.surgery.pruner import Pruner
from support.small_fit import tiny

pytestmark = pytest.mark.filterwarnings('ignore')

# ---- criteria of these tests

def _size(b): return dict(sum=b.a.abs().double().sum((0,2)), n=torch.tensor(b.a.shape[0]*b.a.shape[2]))
def _mean(s): return s['sum']/s['n']
def _effect(b): return dict(s=(b.a*b.g).double().sum((0,2)))
def _per_sample(b): return dict(s=(b.a*b.g).sum(2).abs().double().sum(0))
def _wg(b): return dict(s=(b.w*b.g).double())
def _wg2(b): return dict(s=(b.w*b.g).square().double(), n=torch.tensor(1))
def _norm_wg(b): return dict(s=(b.w*b.g).sum(1).square().double())
def _group(b): return dict(s=b.p.square().sum(0))
def _square_in(b): return dict(s=b.a.square().sum((0,2)).double())
def _by_class(b): return dict(s=torch.stack([b.a[b.y==k].sum((0,2)) for k in range(2)], 1).double())
def _g2(b): return dict(s=b.g.square().double(), n=torch.tensor(1))
SIZE,EFFECT,TAYLOR = Statistic('size', _size, finish=_mean),Statistic('effect', _effect, by='gradient'),Statistic('taylor', _per_sample, by='gradient')
WG,WG2 = Statistic('wg', _wg, at='weight', by='gradient'),Statistic('wg2', _wg2, at='weight', by='gradient', finish=None)
GATE,GROUP = Statistic('gate', _norm_wg, at='norm', by='gradient'),Statistic('group', _group, at='group', by='gradient')
def _only(s): return next(iter(s.values()))
def _weigh(w, s): return s['wg'].abs()
def _wanda(w, s): return w.abs()*s['in'].sqrt()
def _vw(v, s): return (v*s['wg']).flatten(1).sum(1).abs()
size = Criterion('size', channel=_only, stats=(SIZE,))
taylor = Criterion('taylor', channel=_only, stats=(TAYLOR,), normalizer='l2')
weigh = Criterion('weigh', _weigh, stats=(WG,))
wanda = Criterion('wanda_', _wanda, stats=(Statistic('in', _square_in),))
gate = Criterion('gate', channel=_only, stats=(GATE,))
whole = Criterion('whole', channel=_only, stats=(GROUP,))
def _cluster(v, k): # keeps the first k of the longest
    k = len(v)//2 if k is None else k
    return torch.zeros(len(v)).scatter(0, v.flatten(1).norm(dim=1).topk(k).indices, 1.)
cluster = Criterion('cluster_', vectors=_cluster, selects_set=True)

def scores(model, c, x, data, loss=F.cross_entropy, **kw):
    gs = [g for g in couple(model, x).groups if g.primary]
    return group_scores(model, gs, c, evidence=evidence_for(c, model, data, x, loss_func=loss), **kw)

def same(a, b, tol=1e-5): torch.testing.assert_close(a.double(), b.double(), rtol=tol, atol=tol)
def hooks(model): return sum(len(m._forward_pre_hooks)+len(m._forward_hooks)+len(m._backward_hooks) for m in model.modules())+sum(len(p._backward_hooks or ()) for p in model.parameters())

# ---- models of all kinds

class Flat(nn.Module):
    def __init__(self): super().__init__(); self.a,self.bn,self.b,self.c = nn.Conv2d(2,4,3),nn.BatchNorm2d(4),nn.Linear(4*9,6),nn.Linear(6,2)
    def forward(self, x): return self.c(F.relu(self.b(F.relu(self.bn(self.a(x))).flatten(1))))
class Grouped(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Conv2d(2,8,3),nn.Conv2d(8,8,3,groups=2),nn.Conv2d(8,2,1)
    def forward(self, x): return self.c(F.relu(self.b(F.relu(self.a(x))))).mean((2,3))
class Depthwise(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Conv2d(2,8,3),nn.Conv2d(8,8,3,groups=8),nn.Conv2d(8,2,1)
    def forward(self, x): return self.c(F.relu(self.b(F.relu(self.a(x))))).mean((2,3))
class Residual(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b,self.c,self.d = nn.Conv2d(2,6,1),nn.Conv2d(6,6,3,padding=1),nn.Conv2d(6,5,1),nn.Linear(5,2)
    def forward(self, x):
        x = F.relu(self.a(x)); x = F.relu(x+self.b(x))
        return self.d(F.relu(self.c(x)).mean((2,3)))
class Transposed(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Conv2d(2,6,3),nn.ConvTranspose2d(6,4,2),nn.Conv2d(4,2,1)
    def forward(self, x): return self.c(F.relu(self.b(F.relu(self.a(x))))).mean((2,3))
class Tokens(nn.Module): # [B, T, C]
    def __init__(self): super().__init__(); self.e,self.f,self.g,self.h = nn.Linear(25,8),nn.Linear(8,12),nn.Linear(12,8),nn.Linear(8,2)
    def forward(self, x):
        x = self.e(x.flatten(2))
        return self.h((x+self.g(F.gelu(self.f(x)))).mean(1))
NETS = dict(flat=Flat, grouped=Grouped, depthwise=Depthwise, residual=Residual, transposed=Transposed, tokens=Tokens)

def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    m,x = NETS[name](),torch.randn(2,2,5,5)
    for b in m.modules():
        if isinstance(b, nn.BatchNorm2d): nn.init.uniform_(b.weight, .5, 2); nn.init.normal_(b.bias); nn.init.normal_(b.running_mean)
    data = [(torch.randn(n,2,5,5).to(dtype), torch.arange(n)%2) for n in (4,3,5)]
    return m.to(dtype).eval(),x.to(dtype),data

def inputs(model, name, x): # what a layer reads, by an ordinary hook
    got = []
    h = model.get_submodule(name).register_forward_pre_hook(lambda m, a: got.append(a[0]))
    model(x); h.remove()
    return got[-1]

def by_channel(layer, x): return x.movedim(-1, 1) if isinstance(layer, nn.Linear) else x # [N, C, ...]

# ---- activations where they are read

@pytest.mark.parametrize('name', NETS)
def test_mean_activation_against_loops(name):
    m,x,data = make(name)
    got = scores(m, size, x, data)
    for g in couple(m, x).groups:
        if not g.primary: continue
        parts = []
        for r in g.role('read'):
            layer = m.get_submodule(r.param.rpartition('.')[0])
            acts = [by_channel(layer, inputs(m, r.param.rpartition('.')[0], d)).detach().abs().transpose(0, 1).flatten(1) for d,_ in data] # [C, N*S]
            acts = torch.cat(acts, 1)
            unit = np.tile(r.unit, len(acts)//len(r.unit)) # a grouped convolution reads its part
            parts.append(torch.stack([acts[torch.as_tensor(unit==u)].mean() for u in range(g.n)]))
        same(got[g.name], torch.stack(parts).mean(0))

@pytest.mark.parametrize('name', NETS)
def test_activation_times_gradient_is_reader_weight_times_gradient(name): # a layer is linear in what it reads: Σ a·dL/da = Σ w·dL/dw of its weights for this channel
    m,x,data = make(name,)
    m = m.double(); x = x.double(); data = [(d.double(), y) for d,y in data]
    c = Criterion('effect', channel=_only, stats=(EFFECT,))
    got = scores(m, c, x, data, reduce='sum')
    m.zero_grad()
    for d,y in data: F.cross_entropy(m(d), y, reduction='sum').backward()
    for g in couple(m, x).groups:
        if not g.primary: continue
        want = torch.zeros(g.n).double()
        for r in g.role('read'):
            p = m.get_parameter(r.param)
            s = (p*p.grad).detach().movedim(r.dim, 0).flatten(1).sum(1)
            want.index_add_(0, torch.as_tensor(r.unit[r.unit>=0]), s[torch.as_tensor(r.unit>=0)])
        same(got[g.name], want, 1e-9)

def test_effect_is_the_derivative_of_silencing_a_unit(): # readers' law to first order
    m,x,data = make('residual'); m = m.double(); data = [(d.double(), y) for d,y in data]
    got = scores(m, Criterion('effect', channel=_only, stats=(EFFECT,)), x.double(), data, reduce='sum')['a']
    loss = lambda: sum(F.cross_entropy(m(d), y, reduction='sum').item() for d,y in data)
    for u in range(6):
        eps = 1e-6; ps = [m.b.weight, m.c.weight]
        with torch.no_grad():
            for p in ps: p[:,u] *= 1+eps
            up = loss()
            for p in ps: p[:,u] *= (1-eps)/(1+eps)
            down = loss()
            for p in ps: p[:,u] /= 1-eps
        assert (up-down)/(2*eps)==pytest.approx(got[u].item(), rel=1e-4, abs=1e-6)

def test_rows_are_samples():
    m,x,data = make('residual')
    got = scores(m, taylor, x, data)['c']
    want = 0
    for d,y in data:
        for i in range(len(d)):
            a = F.relu(m.c(inputs(m, 'c', d[i:i+1]))).mean((2,3)).detach().requires_grad_()
            g, = torch.autograd.grad(F.cross_entropy(m.d(a), y[i:i+1]), a)
            want = want+(a*g).abs()[0]
    same(got, want)

def test_group_fisher_adds_readers_before_it_squares():
    m,x,data = make('residual')
    got,want = scores(m, whole, x, data)['a'],0
    for d,y in data:
        for i in range(len(d)):
            m.zero_grad(); F.cross_entropy(m(d[i:i+1]), y[i:i+1]).backward()
            want = want+sum((p*p.grad).sum((0,2,3)) for p in (m.b.weight, m.c.weight)).detach()**2
    same(got, want)

def test_several_positions_are_one_unit():
    m,x,data = make('flat')
    g = couple(m, x).by_name['a']
    place, = readers(m, g)
    assert place.index.shape==(4,9) and (place.index==np.arange(36).reshape(4,9)).all()
    seen = []
    def look(b): seen.append(b); return dict(s=b.a.sum((0,2)))
    gather(m, [(Statistic('look', look), place)], data)
    assert seen[0].a.shape==(4,4,9) and seen[0].shape==(9,) and seen[0].x.shape==(4,36) and seen[0].layer is m.b and [b.i for b in seen]==[0,1,2] and seen[0].g is None and seen[0].y is None

def test_rows_of():
    (u1,i1),(u2,i2) = rows_of(np.array([2,0,0,-1,1,1]))
    assert u1.tolist()==[2] and i1.tolist()==[[0]] and u2.tolist()==[0,1] and i2.tolist()==[[1,2],[4,5]]

class Half(nn.Module): # one reader hears a part of the channels only
    def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(3,6,bias=False),nn.Linear(2,2,bias=False),nn.Linear(6,2,bias=False)
    def forward(self, x): x = self.a(x); return self.b(x[:,:2])+self.c(x)
def test_units_that_a_reader_does_not_hear():
    torch.manual_seed(0); m = Half(); data = [(torch.randn(5,3), torch.zeros(5).long())]
    got = scores(m, size, torch.randn(2,3), data)
    same(torch.cat(list(got.values())) if len(got)>1 else got['a'], m.a(data[0][0]).abs().mean(0).detach())

class Windows(nn.Module): # [B*windows, T, C]: the first dimension is no longer the batch
    def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(3,4),nn.Linear(4,5),nn.Linear(5,2)
    def forward(self, x):
        b = len(x); x = self.a(x).reshape(b*2, -1, 4)
        return self.c(F.relu(self.b(x))).reshape(b, -1, 2).mean(1)
class SeqFirst(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(3,4),nn.Linear(4,5),nn.Linear(5,2)
    def forward(self, x): return self.c(F.relu(self.b(self.a(x.transpose(0,1))))).mean(0)
@pytest.mark.parametrize('kind', [Windows, SeqFirst])
def test_a_row_is_a_sample_whatever_the_layout(kind):
    torch.manual_seed(0); m = kind(); data = [(torch.randn(3,8,3), torch.tensor([0,1,1]))]
    got = scores(m, taylor, data[0][0], data)['b']
    want = 0
    for i in range(3):
        one = scores(m, taylor, data[0][0], [(data[0][0][i:i+1], data[0][1][i:i+1])])['b']
        want = want+one
    same(got, want)

def test_multihead_attention_is_listened_to():
    torch.manual_seed(0)
    class Att(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.h = nn.Linear(3,8),nn.MultiheadAttention(8,2,batch_first=True),nn.Linear(8,2)
        def forward(self, x): x = self.a(x); return self.h((x+self.b(x, x, x, need_weights=False)[0]).mean(1))
    m = Att(); data = [(torch.randn(3,5,3), torch.tensor([0,1,1]))]
    got = scores(m, size, data[0][0], data)
    inner = next(s for n,s in got.items() if n.startswith('b'))
    assert inner.isfinite().all() and (inner>0).all() and 'forward' not in vars(m.b) and 'forward' not in vars(m) and torch.backends.mha.get_fastpath_enabled()

# ---- weights

@pytest.mark.parametrize('name', NETS)
def test_weight_times_gradient(name):
    m,x,data = make(name)
    got = scores(m, weigh, x, data)
    want = {n:0 for n,_ in m.named_parameters()}
    for d,y in data:
        m.zero_grad(); F.cross_entropy(m(d), y).backward()
        for n,p in m.named_parameters(): want[n] = want[n]+(p*p.grad).detach()
    for g in couple(m, x).groups:
        if not g.primary: continue
        parts = []
        for r in g.role('write'):
            if want[r.param].dim()<2: continue
            s = want[r.param].abs().movedim(r.dim, 0).flatten(1).sum(1)
            parts.append(torch.zeros(g.n).index_add(0, torch.as_tensor(r.unit), s))
        same(got[g.name], torch.stack(parts).mean(0))

@pytest.mark.parametrize('gran', ['weight', 'kernel', 'filter', 'shared_kernel', 'layer'])
@pytest.mark.parametrize('name', NETS)
def test_statistics_of_a_layers_own_input_fit_its_weight(name, gran):
    m,x,data = make(name)
    if name=='tokens' and gran=='kernel': return # has no kernels
    s = Sparsifier(m, x, criterion=wanda, data=data, granularity=gran).scores()
    if gran!='weight': return
    for n,got in s.items():
        layer = m.get_submodule(n)
        a = torch.cat([by_channel(layer, inputs(m, n, d)).transpose(0,1).flatten(1) for d,_ in data], 1).square().sum(1).sqrt() # of each input channel
        g,t = getattr(layer, 'groups', 1),getattr(layer, 'transposed', False)
        for o in range(got.shape[0]):
            for i in range(got.shape[1]):
                ch = o if t else (o//(got.shape[0]//g))*got.shape[1]+i
                same(got[o,i], layer.weight[o,i].abs().detach()*a[ch])

def test_gate_is_scale_and_shift_together():
    m,x,data = make('flat')
    got = group_scores(m, [couple(m, x).by_name['a']], gate, evidence=evidence_for(gate, m, data, loss_func=F.cross_entropy))['a']
    want = 0
    for d,y in data:
        m.zero_grad(); F.cross_entropy(m(d), y).backward()
        want = want+(m.bn.weight*m.bn.weight.grad+m.bn.bias*m.bn.bias.grad).detach()**2
    same(got, want)

def test_a_gradient_for_each_sample():
    m,x,data = make('residual')
    s = Statistic('g2', _g2, at='weight', by='sample')
    p = Location('weight', 'c.weight')
    got = gather(m, [(s, p)], data, loss_func=F.cross_entropy)['g2',p]
    want = 0
    for d,y in data:
        for i in range(len(d)):
            m.zero_grad(); F.cross_entropy(m(d[i:i+1]), y[i:i+1]).backward(); want = want+m.c.weight.grad**2
    same(got['s'], want); assert got['n']==12
    batch = gather(m, [(Statistic('g2', _g2, at='weight', by='gradient'), p)], data, loss_func=F.cross_entropy)['g2',p]
    assert (batch['s']/3-got['s']/12).abs().max()>1e-4 # not the same thing

def curvature(loss, params, i):
    g = torch.autograd.grad(loss(), params, create_graph=True)
    v = [torch.ones_like(p) for p in params]
    return torch.autograd.grad(sum((a*b).sum() for a,b in zip(g, v)), params)
def test_derivatives_of_any_order():
    m,x,data = make('tokens'); m = m.double(); d,y = data[0][0].double(),data[0][1]
    p = Location('weight', 'h.weight')
    def take(b): return dict(s=b.g)
    got = gather(m, [(Statistic('hv', take, at='weight', by=curvature), p)], [(d, y)], loss_func=F.cross_entropy)['hv',p]
    f = lambda w: F.cross_entropy(torch.func.functional_call(m, {'h.weight':w}, d), y)
    h = torch.autograd.functional.hessian(f, m.h.weight.detach())
    same(got, h.flatten(2).sum(2), 1e-9)

def cool(loss, params, i): return torch.autograd.grad(loss(4.), params)
def test_temperature_divides_the_outputs():
    m,x,data = make('tokens'); d,y = data[0]
    p = Location('weight', 'h.weight')
    def take(b): return dict(s=b.g)
    got = gather(m, [(Statistic('t', take, at='weight', by=cool), p)], data[:1], loss_func=F.cross_entropy)['t',p]
    m.zero_grad(); F.cross_entropy(m(d)/4, y).backward(); same(got, m.h.weight.grad)

def test_flow_is_the_sum_of_all_paths():
    torch.manual_seed(0); m = nn.Sequential(nn.Linear(3,4,bias=False), nn.ReLU(), nn.Linear(4,2,bias=False))
    was = [p.clone() for p in m.parameters()]
    def take(b): return dict(s=b.w*b.g)
    s = Statistic('flow', take, at='weight', by='flow'); ps = [Location('weight', '0.weight'),Location('weight', '2.weight')]
    got = gather(m, [(s, p) for p in ps], x=torch.randn(1,3))
    a,b = m[0].weight.abs().detach().double(),m[2].weight.abs().detach().double()
    same(got['flow',ps[0]], a*b.sum(0)[:,None], 1e-12); same(got['flow',ps[1]], b*a.sum(1), 1e-12)
    assert got['flow',ps[0]].dtype==torch.float64 and all(torch.equal(p, w) for p,w in zip(m.parameters(), was))

def test_linear_flow_passes_norms_and_activations():
    torch.manual_seed(0); m = nn.Sequential(nn.Linear(3,4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4,2)).eval()
    nn.init.uniform_(m[1].weight, -3, 3)
    def take(b): return dict(s=b.g.sum((0,2)))
    p = Location('input', '3')
    got = gather(m, [(Statistic('nisp', take, by='linear'), p)], x=torch.randn(1,3))['nisp',p]
    same(got, m[3].weight.abs().sum(0).detach(), 1e-6); assert all('forward' not in vars(k) for k in m)

# ---- batches

def test_batches_add_up_as_if_they_were_one():
    m,x,data = make('flat')
    one = [(torch.cat([d for d,_ in data]), torch.cat([y for _,y in data]))]
    for c in (size, taylor, wanda, Criterion('class', channel=_first, stats=(Statistic('class', _by_class, needs=('labels',)),))):
        for a,b in zip(scores(m, c, x, data).values(), scores(m, c, x, one).values()): same(a, b)
def _first(s): return s['class'][:,0]

def test_memory_does_not_grow_with_the_number_of_batches():
    m,x,data = make('flat')
    def rows(b): return dict(z=b.a.mean(2))
    s = Statistic('rows', rows, merge='cat', cap=10); p, = readers(m, couple(m, x).by_name['a'])
    got = gather(m, [(s, p)], data, n_batches=None)['rows',p]
    assert got.shape==(10,4)
    same(got, torch.cat([F.relu(m.bn(m.a(d))).mean((2,3)) for d,_ in data])[:10].detach())
    assert gather(m, [(s, p)], data, n_batches=1)['rows',p].shape==(4,4)

def test_merge_rules():
    s = Statistic('s', dict, merge=dict(a='sum', b='max', c='min', d='first', e='cat'), cap=3)
    t = lambda *v: torch.tensor(v)
    got = s.merged(dict(a=t(1), b=t(1), c=t(1), d=t(1), e=t(1,2)), dict(a=t(5), b=t(5), c=t(5), d=t(5), e=t(5,6)))
    assert {k:v.tolist() for k,v in got.items()}==dict(a=[6], b=[5], c=[1], d=[1], e=[1,2,5])

def test_data_of_all_kinds():
    m,x,data = make('flat')
    xs,ys = torch.cat([d for d,_ in data]),torch.cat([y for _,y in data])
    loader = DataLoader(TensorDataset(xs, ys), batch_size=4)
    want = scores(m, size, x, [(xs, ys)])['a']
    for d in (loader, DataLoaders(loader, loader), data, tuple(data), [[a,b] for a,b in data], [dict(x=a, y=b) for a,b in data], [(a,) for a,_ in data]): same(scores(m, size, x, d)['a'], want)

class Two(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(3,4),nn.Linear(2,4),nn.Linear(4,2)
    def forward(self, x, z): return self.c(F.relu(self.a(x)+self.b(z)))
def test_several_inputs():
    torch.manual_seed(0); m = Two(); x,z,y = torch.randn(5,3),torch.randn(5,2),torch.arange(5)%2
    want = F.relu(m.a(x)+m.b(z)).abs().mean(0).detach()
    for batch in ((x,z,y), ((x,z),y), (dict(x=x,z=z),y), (dict(z=z,x=x),y), dict(x=x,z=z,y=y)):
        assert torch.allclose(scores(m, size, (x,z), [batch])['a'].float(), want, atol=1e-6)
        same(scores(m, taylor, (x,z), [batch])['a'], scores(m, taylor, (x,z), [(x,z,y)])['a'])

class Answers(nn.Module): # as from transformers: takes labels, returns a loss
    def __init__(self): super().__init__(); self.a,self.c = nn.Linear(3,4),nn.Linear(4,2)
    def forward(self, x, labels=None):
        out = self.c(F.relu(self.a(x)))
        return dict(loss=F.cross_entropy(out, labels), logits=out) if labels is not None else dict(logits=out)
def test_a_model_that_returns_its_loss():
    torch.manual_seed(0); m = Answers(); x,y = torch.randn(5,3),torch.arange(5)%2
    got = scores(m, taylor, x, [dict(x=x, labels=y)], loss=None)['a']
    a = F.relu(m.a(x)).detach().requires_grad_(); g, = torch.autograd.grad(F.cross_entropy(m.c(a), y, reduction='sum'), a)
    same(got, (a*g).abs().sum(0).detach())

@pytest.mark.parametrize('loss', [F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction='sum'), nn.CrossEntropyLoss(reduction='none'), CrossEntropyLossFlat()])
def test_reductions_of_the_loss(loss):
    m,x,data = make('residual')
    for a,b in zip(scores(m, taylor, x, data, loss).values(), scores(m, taylor, x, data).values()): same(a, b)
    for a,b in zip(scores(m, weigh, x, data, loss).values(), scores(m, weigh, x, data).values()): same(a, b)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('c', [size, taylor, weigh, wanda], ids=lambda c: c.name)
def test_half_precision(c, dtype):
    m,x,data = make('residual', dtype)
    got,full = scores(m, c, x, data),scores(m.float(), c, x.float(), [(d.float(), y) for d,y in data])
    for n in got: assert got[n].dtype==torch.float64 and torch.allclose(got[n], full[n], rtol=.1, atol=.05*full[n].abs().max())

# ---- nothing is left behind

class Noisy(Flat):
    def forward(self, x): return super().forward(F.dropout(x, .1, True))

def state(m, dl): return dict(mode=[k.training for k in m.modules()], hooks=hooks(m), req=[p.requires_grad for p in m.parameters()], grad=[p.grad if p.grad is None else (id(p.grad), p.grad.tolist()) for p in m.parameters()],
    rng=torch.get_rng_state().tolist(), np=np.random.get_state()[1].tolist(), py=random.getstate(), own=dl.rng.getstate() if hasattr(dl, 'rng') else None, buffers=[b.tolist() for b in m.buffers()], weights=[p.tolist() for p in m.parameters()], forwards=['forward' in vars(k) for k in m.modules()])

class Stop(Exception): pass
def broken(kind, at):
    def loss(out, y):
        loss.n += 1
        if loss.n>at: raise kind()
        return F.cross_entropy(out, y)
    loss.n = 0
    return loss

@pytest.mark.parametrize('kind', [None, Stop, KeyboardInterrupt])
@pytest.mark.parametrize('by', ['gradient', 'sample', curvature], ids=lambda by: getattr(by, '__name__', by))
def test_the_model_is_as_before(kind, by):
    torch.manual_seed(1)
    m = Noisy(); m.train(); m.bn.eval(); m.c.weight.requires_grad_(False)
    m.b.weight.grad = torch.ones_like(m.b.weight)
    dls = digits_dls(bs=16); ds = [(torch.randn(2,5,5), torch.tensor(i%2)) for i in range(40)]
    dl = DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0).train
    was = state(m, dl)
    at = (Statistic('g2', _g2, at='weight', by=by), Location('weight', 'a.weight'))
    more = [(TAYLOR, Location('input', 'b'))] if by=='gradient' else []
    run = lambda: gather(m, [at, *more], dl, loss_func=broken(kind, 2) if kind else F.cross_entropy, n_batches=3)
    if kind is None: run()
    else:
        with pytest.raises(kind): run()
    now = state(m, dl)
    for k in was: assert was[k]==now[k], k
    assert pickle.dumps(m)

@pytest.mark.parametrize('where', ['data', 'measure', 'model', 'flow'])
def test_interrupted_anywhere(where):
    m,x,data = make('flat'); m.train()
    def stop(*a, **k): raise KeyboardInterrupt
    def batches(): yield data[0]; stop()
    class Data:
        def __iter__(self): return batches()
    s,d,h = SIZE,data,None
    if where=='data': d = Data()
    if where=='measure': s = Statistic('s', stop)
    if where in ('model', 'flow'): h = m.c.register_forward_pre_hook(stop)
    if where=='flow': s = Statistic('s', _g2, at='input', by='linear')
    was = state(m, d)
    with pytest.raises(KeyboardInterrupt): gather(m, [(s, Location('input', 'b'))], d, x=x)
    assert state(m, d)==was
    if h: h.remove()
    assert hooks(m)==0

def test_the_same_choice_twice_from_a_loader_that_shuffles():
    m,x,data = make('flat'); ds = TensorDataset(torch.randn(64,2,5,5), torch.arange(64)%2)
    for dl in (DataLoader(ds, 8, shuffle=True), DataLoader(ds, 8, shuffle=True, generator=torch.Generator().manual_seed(3)), DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0)):
        a,b = (Sparsifier(m, x, criterion=taylor, data=dl, n_batches=2, loss_func=F.cross_entropy).masks(.5) for _ in range(2))
        assert a==b
        p,q = (Pruner(m, x).plan(.5, criterion=taylor, data=dl, n_batches=2, loss_func=F.cross_entropy) for _ in range(2))
        assert p==q and p.removed==5

def test_weights_that_need_no_gradient_are_scored_all_the_same():
    m,x,data = make('residual')
    want = scores(m, weigh, x, data),scores(m, taylor, x, data)
    for p in m.parameters(): p.requires_grad_(False)
    for a,c in zip(want, (weigh, taylor)):
        for n,s in scores(m, c, x, data).items(): same(s, a[n])

def test_inputs_changed_in_place_are_noticed():
    class Rude(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(3,4),nn.Linear(4,4),nn.Linear(4,2)
        def forward(self, x): x = self.a(x); y = self.b(x); x.add_(1.); return self.c(y)
    m = Rude()
    with pytest.raises(RuntimeError, match="input of 'b' is changed in place"): gather(m, [(TAYLOR, Location('input', 'b'))], [(torch.randn(2,3), torch.tensor([0,1]))], loss_func=F.cross_entropy)

# ---- what is known is not asked again

@pytest.mark.parametrize('name', ['taylor_w', 'mean_act', 'thinet'])
def test_evidence_serves_several_plans(name):
    torch.manual_seed(0)
    m,x,ran = tiny().eval(),torch.randn(2,1,8,8),[]
    data = [(torch.randn(6,1,8,8), torch.randint(10, (6,))) for _ in range(3)]
    how = dict(criterion=name, loss_func=F.cross_entropy)
    want = [Pruner(m, x).plan(s, data=data, **how) for s in (.25, .5)]
    e = evidence_for(criteria[name], m, data, x, loss_func=F.cross_entropy)
    h = m[0].register_forward_hook(lambda l,i,o: ran.append(len(i[0])))
    got = [Pruner(m, x).plan(s, criterion=name, data=e) for s in (.25, .5)]
    assert ran.count(6)==3 and [[c.keep for c in p.cuts] for p in got]==[[c.keep for c in p.cuts] for p in want]
    h.remove()
    if name!='thinet': assert torch.equal(Sparsifier(m, x, criterion=name, data=e).masks(.5).keep['0.weight'], Sparsifier(m, x, data=data, **how).masks(.5).keep['0.weight'])
    with pytest.raises(ValueError, match='is about another Sequential'): Pruner(tiny(), x).plan(.5, criterion=name, data=e)
    with torch.no_grad(): m[4].weight.mul_(2)
    with pytest.raises(ValueError, match='have changed since this Evidence began'): Pruner(m, x).prune(.5, criterion=name, data=e)
    e = evidence_for(criteria['l1'], m, None, x)
    with pytest.raises(ValueError, match='needs data'): Pruner(m, x).plan(.5, criterion=name, data=e)

def test_evidence_is_gathered_once():
    m,x,data = make('residual')
    class Count(list):
        n = 0
        def __iter__(self): Count.n += 1; return super().__iter__()
    d = Count(data)
    Pruner(m, x).plan(.5, criterion=taylor, data=d, loss_func=F.cross_entropy); assert Count.n==1
    Pruner(m, x).plan(budget=Budget(macs=.5), criterion=taylor, data=d, loss_func=F.cross_entropy); assert Count.n==2
    s = Sparsifier(m, x, criterion=taylor, data=d, loss_func=F.cross_entropy); assert Count.n==2 # nothing to choose yet
    s.masks(0.); assert Count.n==2
    s.masks(.5); assert Count.n==3

def test_combined():
    a,b = (None, torch.tensor([1.,2,3])),(np.array([1]), torch.tensor([6.]))
    get = lambda how: combined([a, b], 3, how).tolist()
    assert get('mean')==[1,4,3] and get('sum')==[1,8,3] and get('max')==[1,6,3] and get('prod')==[1,12,3] and combined([b, a], 3, 'first').tolist()==[1,6,3]
    assert combined([b], 3).isnan().tolist()==[True,False,True]

@pytest.mark.parametrize('how', ['mean', 'sum', 'max', 'prod', 'first'])
def test_reduce(how):
    m,x,data = make('residual')
    l1 = torch.stack([m.a.weight.abs().sum((1,2,3)), m.b.weight.abs().sum((1,2,3))]).detach().double()
    want = dict(mean=l1.mean(0), sum=l1.sum(0), max=l1.amax(0), prod=l1.prod(0), first=l1[0])[how]
    gs = couple(m, x).groups
    from fasterprune.criteria.base import criteria
    same(group_scores(m, gs, criteria['l1'], reduce=how)['a'], want)
    k = Sparsifier(m, x, criterion='l1', reduce=how).masks(.5).keep['a.weight'].flatten()
    assert k.sum()==3 and set(k.nonzero().flatten().tolist())==set(want.topk(3).indices.tolist())
    cut = next(c for c in Pruner(m, x).plan(.5, criterion='l1', reduce=how).cuts if c.name=='a')
    assert sorted(cut.keep)==sorted(want.topk(3).indices.tolist())
    assert all(c.name for c in Pruner(m, x).plan(.5, criterion=taylor, data=data, loss_func=F.cross_entropy, reduce=how).cuts)

# ---- selectors

def test_a_selector_gets_how_many_stay():
    asked = []
    def pick(v, k): asked.append((len(v), k)); return torch.arange(len(v)).double()
    c = Criterion('pick', vectors=pick, selects_set=True)
    m,x,data = make('residual')
    plan = Pruner(m, x).plan(.4, criterion=c)
    assert set(asked)=={(6,4),(5,3)} and plan.rows()[0][2]==4
    asked.clear(); Pruner(m, x).plan(.9, criterion=c, round_to=2, max_ratio=.5); assert {(6,4)}<=set(asked)
    asked.clear(); Sparsifier(m, x, criterion=c).masks(.5); assert {(6,3),(5,3)}<=set(asked)
    asked.clear(); Sparsifier(m, granularity='kernel', criterion=c).masks(.25); assert (12,9) in asked and (36,27) in asked

def test_a_selector_decides_exactly():
    m,x,data = make('residual')
    keep = next(c.keep for c in Pruner(m, x).plan(.5, criterion=cluster).cuts if c.name=='c')
    assert sorted(keep)==sorted(m.c.weight.detach().flatten(1).norm(dim=1).topk(3).indices.tolist())
    def by_activation(s, k): return s['size']
    sel = Criterion('by_act', channel=by_activation, stats=(SIZE,), selects_set=True)
    assert Pruner(m, x).plan(.5, criterion=sel, data=data).cuts

def test_vectors_of_coupled_units_and_of_layers():
    m,x,data = make('flat')
    def check(v): shapes.append(tuple(v.shape)); return v.flatten(1).norm(dim=1)
    c,shapes = Criterion('check', vectors=check),[]
    gs = [g for g in couple(m, x).groups if g.primary]
    group_scores(m, gs, c); assert shapes==[(4,2,9),(6,36,1)]
    shapes.clear(); group_scores(m, gs, c, granularity='shared_kernel'); assert shapes==[(4,6,9),(6,2,1)] # nine inputs are one unit
    shapes.clear(); group_scores(m, gs, Criterion('check', vectors=check, reads='readers')); assert shapes==[(4,6,9),(6,2,1)]
    shapes.clear(); Sparsifier(m, granularity='kernel', criterion=c, only='a').masks(.5); assert shapes[-1]==(8,1,9)
    v = Criterion('vw', vectors=_vw, stats=(WG,))
    got = scores(m, v, x, data)['a']; want = scores(m, Criterion('w', _wgs, stats=(WG,)), x, data)['a']
    assert got.shape==want.shape==(4,)
def _wgs(w, s): return w*s['wg']

# ---- what is refused

def neg(s): return -_only(s)
def nan(s): return _only(s)*float('nan')
relu = Criterion('zeros', channel=_only, stats=(SIZE,), needs=('relu',))
CASES = [
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=size), "criterion 'size' needs data; pass data=, a DataLoader, fastai DataLoaders or a list of batches (x, y)"),
    (lambda m,x,d: Sparsifier(m, x, criterion=taylor), "criterion 'taylor' needs data and gradients; pass data="),
    (lambda m,x,d: group_scores(m, couple(m, x).groups, size), "criterion 'size' needs data"),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=taylor, data=d), 'gradients need a loss, and this model returned Tensor without one; pass loss_func=, such as F.cross_entropy'),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=taylor, data=[(a,) for a,_ in d], loss_func=F.cross_entropy), 'these batches have no labels; data gives batches (x, y)'),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=taylor, data=d, loss_func=lambda o,y: 3), 'loss_func returned 3; it must return a tensor'),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=taylor, data=d, loss_func=lambda o,y: F.cross_entropy(o, y).detach()), 'the loss does not depend on anything that a criterion looks at'),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=size, data=x), 'data is a DataLoader, fastai DataLoaders or a list of batches (x, y), not Tensor; for a single batch, put it into a list'),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=size, data=[]), 'data is empty'),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=size, data=[()]), 'a batch of the data is empty'),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=size, data=d, n_batches=0), 'n_batches is at least 1, or None for all, not 0'),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=size, data=d, loss_func='mse'), "loss_func is a function (out, y) → loss, not 'mse'"),
    (lambda m,x,d: Pruner(m, x).plan(.5, reduce='avg'), "reduce: no reduction 'avg'"),
    (lambda m,x,d: Sparsifier(m, x, reduce='avg'), "reduce: no reduction 'avg'"),
    (lambda m,x,d: SparsifyCallback(.5, reduce='avg'), "reduce: no reduction 'avg'"),
    (lambda m,x,d: SparsifyCallback(.5, n_batches=0), 'n_batches is at least 1'),
    (lambda m,x,d: SparsifyCallback(.5, 'kernel', criterion=size), "criterion 'size' scores whole channels by the layers that read them, so it needs granularity='filter', not 'kernel'"),
    (lambda m,x,d: SparsifyCallback(.5, context='global', criterion=cluster), "criterion 'cluster_' chooses sets within one layer, and its scores cannot be ranked across layers, as context='global' asks for; use context='local'"),
    (lambda m,x,d: Sparsifier(m, x, context='global', criterion=cluster), "criterion 'cluster_' chooses sets within one layer"),
    (lambda m,x,d: Pruner(m, x).plan(.5, context='global', criterion=cluster), "as context='global' asks for"),
    (lambda m,x,d: Pruner(m, x).plan(.5, context='isomorphic', criterion=cluster), "as context='isomorphic' asks for"),
    (lambda m,x,d: Pruner(m, x).plan(budget=Budget(macs=.5), criterion=cluster), 'as a budget asks for'),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=cluster, per='params'), 'chooses sets, and its ranks cannot be divided by costs'),
    (lambda m,x,d: Pruner(m, x).plan(.5, context='global', criterion=Criterion('here', torch.abs, normalizer=None), normalizer='mean'), "criterion 'here' scores units within one layer"),
    (lambda m,x,d: Sparsifier(m, granularity='weight', criterion=cluster), 'a single weight is no vector'),
    (lambda m,x,d: Sparsifier(m, granularity='layer', criterion=cluster), 'here the layer is one unit'),
    (lambda m,x,d: Sparsifier(m, x, criterion=Criterion('k', torch.abs, where=('kernel',))), "criterion 'k' is defined for granularity 'kernel', not 'filter'"),
    (lambda m,x,d: Sparsifier(m, granularity='kernel', criterion=Criterion('r', vectors=_only, reads='readers')), "scores whole channels by the layers that read them"),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=relu, data=d), "criterion 'zeros' counts zeros behind a ReLU, and what 'b' reads of 'a' goes down to -"),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=gate, data=d, loss_func=F.cross_entropy), "criterion 'gate' reads the scale of a normalisation, and 'a' has none behind it"),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=Criterion('n', channel=nan, stats=(SIZE,)), data=d), "'a': criterion 'n' returned NaN for 4 units"),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=Criterion('n', channel=_two, stats=(SIZE,)), data=d), "'a': criterion 'n' returned shape (2,) for 4 units"),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=Criterion('n', channel=_no, stats=(SIZE,)), data=d), "'a': too few samples"),
    (lambda m,x,d: gather(m, [(Statistic('s', _list), Location('input', 'b'))], d), "statistic 's' measured [1]; it must be a dict of tensors"),
    (lambda m,x,d: gather(m, [(Statistic('s', _by_class, needs=('labels',)), Location('input', 'b'))], [(a, y.float()) for a,y in d]), "statistic 's' needs labels, one class for each sample: a tensor of whole numbers, not float32 of shape"),
    (lambda m,x,d: gather(m, [(Statistic('s', _by_class, needs=('labels',)), Location('input', 'b'))], [(a,) for a,y in d]), "a tensor of whole numbers, not none"),
    (lambda m,x,d: gather(m, [(Statistic('s', _wg, at='weight', by=_short), Location('weight', 'b.weight'))], d, loss_func=F.cross_entropy), "_short gave float32 of shape (1,) for 'b.weight'"),
    (lambda m,x,d: gather(m, [(Statistic('s', _changing), Location('input', 'b'))], d), "statistic 's' measured a4 first and a3 then"),
    (lambda m,x,d: Sparsifier(m, granularity='weight', criterion=Criterion('f', _weigh, stats=(Statistic('wg', _wg, at='weight', by='flow'),))), 'needs an example input; pass x'),
    (lambda m,x,d: Pruner(m, x).plan(.5, criterion=Criterion('mv', _weigh, stats=(Statistic('wg', _wg, at='weight', by='gradient', needs=('training',)),))), "criterion 'mv' is gathered while a network trains; use SparsifyCallback(..., criterion='mv')"),
    (lambda m,x,d: Statistic('s', _wg, at='output'), "statistic 's': no place 'output'"),
    (lambda m,x,d: Statistic('s', _wg, by='backward'), "statistic 's': no run 'backward'"),
    (lambda m,x,d: Statistic('s', _wg, by='sample'), "which there is for weights only, not at 'input'"),
    (lambda m,x,d: Statistic('s', _wg, merge='avg'), "statistic 's': no rule 'avg'"),
    (lambda m,x,d: Statistic('s', _wg, needs=('data',)), "needs 'labels' or 'training', or nothing; 'data' is no such thing"),
    (lambda m,x,d: Criterion('two', torch.abs, vectors=_only), 'is one of element, vectors and channel, not element and vectors'),
    (lambda m,x,d: Criterion('ch', channel=_only), 'scores channels by statistics of one place'),
    (lambda m,x,d: Criterion('ch', channel=_only, stats=(SIZE, GATE)), "of one place, 'input', 'norm' or 'group', not ['input', 'norm']"),
    (lambda m,x,d: Criterion('el', torch.abs, stats=(GATE,)), "its statistics cannot be at 'norm'"),
    (lambda m,x,d: Criterion('ve', vectors=_only, stats=(SIZE,)), "its statistics cannot be at 'input'"),
    (lambda m,x,d: Criterion('st', torch.abs, stats=('size',)), "stats are Statistics, not 'size'"),
    (lambda m,x,d: Criterion('se', torch.abs, selects_set=True), 'a selector compares units'),
    (lambda m,x,d: Criterion('sn', channel=_only, stats=(SIZE, SIZE)), 'two of its statistics have one name, of size, size'),
    (lambda m,x,d: Criterion('jo', torch.abs, concat_members=True), 'concat_members puts vectors side by side'),
    (lambda m,x,d: Criterion('re', torch.abs, reduce='avg'), "criterion 're': no reduction 'avg'"),
    (lambda m,x,d: Criterion('no', torch.abs, normalizer='avg'), "no normalizer 'avg'"),
    (lambda m,x,d: Criterion('wh', torch.abs, where=('filters',)), "criterion 'wh': no granularity 'filters'"),
    (lambda m,x,d: vector_scores(Criterion('v', vectors=_only), torch.zeros(1<<15,1,1)), "compares all units of a layer with each other, and 32768 are more than the 16384 that it takes"),
]
def _two(s): return torch.zeros(2)
def _no(s): raise ValueError('too few samples')
def _list(b): return [1]
def _short(loss, params, i): return [torch.zeros(1)]
def _changing(b): return {f'a{len(b.a)}':b.a.sum()}
class Plain(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Conv2d(2,4,3),nn.Linear(4,2)
    def forward(self, x): return self.b(self.a(x).mean((2,3)))

@pytest.mark.parametrize('f,text', CASES, ids=range(len(CASES)))
def test_refused(f, text):
    torch.manual_seed(0); m = Plain().eval(); d = [(torch.randn(n,2,5,5), torch.arange(n)%2) for n in (4,3)]
    x = torch.randn(2,2,5,5); was = state(m, d)
    with pytest.raises((ValueError, TypeError)) as e: f(m, x, d)
    assert text in e.value.args[0] and state(m, d)==was

def test_units_that_nobody_listens_to_are_refused():
    class Bare(nn.Module):
        def __init__(self): super().__init__(); self.a,self.w = nn.Linear(3,4),nn.Parameter(torch.randn(4,2))
        def forward(self, x): return F.relu(self.a(x))@self.w
    m = Bare(); d = [(torch.randn(3,3), torch.zeros(3).long())]
    with pytest.raises(ValueError, match="no reader of 'a' could be listened to .none is a convolution or a linear layer., so criterion 'size' has nothing to score"): Pruner(m, d[0][0]).plan(.5, criterion=size, data=d)
    assert Pruner(m, d[0][0]).plan(.5).removed==2

def test_a_flow_through_layer_norm_is_refused():
    m = nn.Sequential(nn.Linear(3,4), nn.LayerNorm(4), nn.Linear(4,2))
    c = Criterion('flow', _weigh, stats=(Statistic('wg', _wg, at='weight', by='flow'),))
    with pytest.raises(ValueError, match=r"a flow multiplies weights along paths, and '1' \(LayerNorm\) divides by what comes in"): Sparsifier(m, torch.randn(2,3), granularity='weight', criterion=c).masks(.5)

# ---- while it trains

def learner(**kw):
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    return Learner(digits_dls(bs=64, valid_pct=.75), tiny(), loss_func=CrossEntropyLossFlat(), **kw)
def fit(learn, n, cbs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, cbs=cbs)

class Watch(Callback): # hooks in each batch, and between batches
    order = 60
    def before_fit(self): self.during,self.between = [],[]
    def before_batch(self):
        if self.learn.training: self.during.append(hooks(self.learn.model))
    def before_step(self): self.between.append(hooks(self.learn.model))
    def after_epoch(self): self.between.append(hooks(self.learn.model)); pickle.dumps(self.learn.model); copy.deepcopy(self.learn.model)

@pytest.mark.parametrize('c', [size, taylor, weigh, gate, whole, wanda], ids=lambda c: c.name)
def test_hooks_only_in_the_last_batches_before_a_choice(c):
    learn,w = learner(),Watch(); cb = SparsifyCallback(.5, criterion=c, n_batches=2, schedule='agp')
    fit(learn, 3, [cb, w])
    n = len(learn.dls.train)
    heard = [i for i,h in enumerate(w.during) if h]
    assert heard==[n-2,n-1,2*n-2,2*n-1] and set(w.between)=={0} and hooks(learn.model)==0 # the last epoch listens to nothing
    assert cb.masks.sparsity==.5 and cb._batches==[] and cb._listener is None

def test_every_some_batches():
    learn,w = learner(),Watch(); cb = SparsifyCallback(.5, criterion=taylor, n_batches=1, every=3, schedule='agp')
    fit(learn, 2, [cb, w])
    last = (len(w.during)-1)//3
    assert [i for i,h in enumerate(w.during) if h]==[3*k-1 for k in range(1,last+1)] and cb.masks.sparsity==.5

@pytest.mark.parametrize('cbs', [[], [GradientAccumulation(64)]], ids=['plain', 'accumulated'])
def test_what_is_heard_is_what_the_step_computes(cbs):
    got = {}
    class Check(Callback):
        order = SparsifyCallback.order+1
        def before_batch(self):
            if self.learn.epoch or self.learn.iter<len(self.learn.dls.train)-1 or not self.learn.training: return
            m = copy.deepcopy(self.learn.model)
            l = F.cross_entropy(m(self.learn.xb[0]), self.learn.yb[0]); l.backward()
            got.update({n:(p*p.grad).detach() for n,p in m.named_parameters()})
    learn = learner(); seen = {}
    cb = SparsifyCallback(.5, criterion=Criterion('w', _keep_for(seen), stats=(WG,)), n_batches=1)
    fit(learn, 2, [cb, Check(), *cbs])
    assert len(seen)>=2
    for n in ('0.weight', '4.weight'): same(seen[got[n].shape], got[n], 1e-4)
def _keep_for(seen):
    def f(w, s): seen.setdefault(w.shape, s['wg'].clone()); return s['wg'].abs()
    return f

def test_each_row_heard_in_training_is_a_samples_gradient(): # scaled to the sum of the losses
    learn,seen = learner(),[]
    def take(b): seen.append((b.a*b.g).sum().item()); return dict(s=(b.a*b.g).sum((0,2)))
    got = []
    class Check(Callback):
        order = SparsifyCallback.order+1
        def before_batch(self):
            if self.learn.epoch or self.learn.iter<len(self.learn.dls.train)-1 or not self.learn.training: return
            m = copy.deepcopy(self.learn.model); x = m[:9](self.learn.xb[0]).detach().requires_grad_()
            g, = torch.autograd.grad(F.cross_entropy(m[9](x), self.learn.yb[0], reduction='sum'), x)
            got.append((x*g).sum().item())
    cb = SparsifyCallback(.5, criterion=Criterion('t', channel=_only, stats=(Statistic('t', take, by='gradient'),)), n_batches=1, only='4')
    fit(learn, 2, [cb, Check()])
    assert seen[0]==pytest.approx(got[0], rel=1e-4)

@pytest.mark.parametrize('by', ['sample', curvature, 'flow'], ids=lambda by: getattr(by, '__name__', by))
def test_what_steps_do_not_give_is_gathered_on_their_batches(by):
    def g2(b): return dict(wg=b.g.square().double())
    c = Criterion('c', _weigh, stats=(Statistic('wg', g2, at='weight', by=by),))
    learn,w = learner(),Watch(); cb = SparsifyCallback(.5, criterion=c, n_batches=1)
    fit(learn, 2, [cb, w]); assert cb.masks.sparsity==.5 and set(w.during)=={0}

def test_beside_mixup():
    from fastai.callback.mixup import MixUp
    def g2(b): return dict(wg=b.g.square().double())
    for by in ('gradient', 'sample'):
        learn = learner(); cb = SparsifyCallback(.5, criterion=Criterion('c', _weigh, stats=(Statistic('wg', g2, at='weight', by=by),)), n_batches=1, every=3)
        fit(learn, 2, [cb, MixUp()]); assert cb.masks.sparsity==.5

def test_a_choice_before_anything_was_heard():
    for every in ('epoch', 2):
        learn = learner(); cb = SparsifyCallback(.5, criterion=taylor, schedule=lambda p, s=1.: s, every=every, n_batches=2)
        fit(learn, 1, [cb]); assert cb.masks.sparsity==.5 and len(cb.history)==1

@pytest.mark.parametrize('gran,context', [('filter','local'), ('filter','global'), ('shared_kernel','local'), ('kernel','global'), ('weight','local')])
def test_the_same_training_twice(gran, context):
    c = taylor if gran in ('filter', 'shared_kernel') else weigh
    masks = []
    for _ in range(2):
        learn = learner(); cb = SparsifyCallback(.5, gran, context, c, n_batches=2); fit(learn, 2, [cb]); masks.append(cb.masks)
    assert masks[0]==masks[1]

def _mv(b): return dict(s=-(b.w*b.g).double(), n=torch.tensor(1))
def _start(b): return dict(w=b.w.clone())
def _moved(w, s): return s['mv']['s']-0*s['w0'] if isinstance(s['mv'], dict) else s['mv']
def _all_steps(w, s): seen_steps.append(int(s['mv']['n'])); return s['mv']['s']
seen_steps = []
def _just(s): return s['s']
def test_criteria_of_the_training_itself():
    mv = Statistic('mv', _mv, at='weight', by='gradient', needs=('training',), finish=_just)
    w0 = Statistic('w0', _start, at='weight', merge='first', needs=('training',))
    starts = {}
    def change(w, s): starts[w.shape] = s['w0'].clone(); return (w-s['w0']).abs()
    learn = learner(); first = learn.model[0].weight.detach().clone(); w = Watch()
    fit(learn, 2, [SparsifyCallback(.5, criterion=Criterion('change', change, stats=(w0,))), w])
    same(starts[first.shape], first)
    learn = learner(); w = Watch(); total = [0]
    class Add(Callback):
        order = 61
        def before_step(self):
            if self.learn.epoch==0: total[0] = total[0]-(self.learn.model[4].weight*self.learn.model[4].weight.grad).detach()
    got = {}
    def movement(w, s): got.setdefault(w.shape, s['mv'].clone()); return s['mv']
    c = Criterion('movement_', movement, stats=(mv,), comparable=True)
    assert c.needs==('gradients','training')
    fit(learn, 2, [SparsifyCallback(.5, criterion=c), w, Add()])
    same(got[learn.model[4].weight.shape], total[0], 1e-4)
    assert all(h>0 for h in w.during) and set(w.between)=={0}
    with pytest.raises(ValueError, match='not all layers had one before the first choice; let the schedule begin later'): fit(learner(), 1, [SparsifyCallback(.5, criterion=c, schedule=lambda p, s=1.: s)])

def test_after_an_interrupt_nothing_listens():
    class Stop_(Callback):
        order = 90
        def before_backward(self): raise KeyboardInterrupt
    learn = learner(); c = Criterion('w', _weigh, stats=(WG, ))
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, [SparsifyCallback(.5, criterion=c, n_batches=None), Stop_()])
    assert hooks(learn.model)==0
    learn = learner(); learn.add_cb(SparsifyCallback(.5, criterion=taylor, n_batches=None)) # stays with the learner: copies are clean, and the next fit begins anew
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, [Stop_()])
    m = copy.deepcopy(learn.model); pickle.loads(pickle.dumps(learn.model)); m(torch.randn(2,1,8,8))
    fit(learn, 2, []); assert hooks(learn.model)==0

def test_export(tmp_path):
    learn = learner(path=tmp_path); cb = SparsifyCallback(.5, criterion=taylor, n_batches=1); fit(learn, 2, [cb])
    learn.export('x.pkl'); assert load_learner(tmp_path/'x.pkl')
    learn.add_cb(SparsifyCallback(.5, criterion=taylor, n_batches=1)); fit(learn, 1, []); pickle.dumps(learn.model)

def test_learn_prune_takes_the_training_data_and_the_loss():
    learn = learner(); rng = learn.dls.train.rng.getstate(); n = sum(p.numel() for p in learn.model.parameters())
    for c in (size, taylor, weigh, gate): 
        r = learn.prune(.25, criterion=c, n_batches=1); assert r.removed>0
    assert learn.dls.train.rng.getstate()==rng and hooks(learn.model)==0
    fit(learn, 1, [])

# ---- several machines

RANKS = '''
import sys, torch, torch.distributed as dist
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
from torch import nn
from fasterprune.criteria.statistic import Statistic
from fasterprune.criteria.listen import Location
from fasterprune.criteria.runs import gather
torch.manual_seed(0)
net = nn.Linear(3,2)
data = [(torch.randn(4,3)+i, torch.zeros(4).long()) for i in range(2+0)]
more = [(torch.randn(2,3)-1, torch.zeros(2).long())]
def f(b): return dict(sum=b.a.sum((0,2)), max=b.a.amax((0,2)), min=b.a.amin((0,2)), rows=b.a.mean(2), one=b.a[:1].mean(2))
s = Statistic('s', f, merge=dict(sum='sum', max='max', min='min', rows='cat', one='first'), cap=9)
p = Location('input', '')
mine = data if rank==0 else more
got = gather(net, [(s, p)], mine)['s',p]
alone = [b for d in (data, more) for b in d]
x = torch.cat([b[0] for b in alone])
assert torch.allclose(got['sum'], x.sum(0)) and torch.equal(got['max'], x.amax(0)) and torch.equal(got['min'], x.amin(0))
assert torch.equal(got['rows'], x[:9]) and torch.equal(got['one'], x[:1])
dist.destroy_process_group(); print('fine')
'''
def test_ranks_agree(tmp_path):
    ps = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', RANKS, str(r), str(tmp_path/'f')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    for p in ps:
        out,err = p.communicate(timeout=120)
        assert p.returncode==0 and 'fine' in out, err[-2000:]

def test_members_side_by_side():
    m,x,data = make('residual')
    def check(v): shapes.append(tuple(v.shape)); return v.flatten(1).norm(dim=1)
    shapes = []; gs = [g for g in couple(m, x).groups if g.primary]
    got = group_scores(m, gs, Criterion('c', vectors=check, concat_members=True))
    assert shapes==[(6,1,2+54),(5,6,1)]
    same(got['a'], torch.cat([m.a.weight.flatten(1), m.b.weight.flatten(1)], 1).norm(dim=1).detach())

def outer(loss, params, i):
    out,f = loss.outputs()
    g, = torch.autograd.grad(f(out), out)
    return torch.autograd.grad(out, params, g)
def test_outputs_of_a_batch():
    m,x,data = make('tokens'); d,y = data[0]; p = Location('weight', 'h.weight')
    def take(b): return dict(s=b.g)
    got = gather(m, [(Statistic('t', take, at='weight', by=outer), p)], data[:1], loss_func=F.cross_entropy)['t',p]
    m.zero_grad(); F.cross_entropy(m(d), y).backward(); same(got, m.h.weight.grad)
    class Pair(nn.Module):
        def __init__(self): super().__init__(); self.h = nn.Linear(3,2)
        def forward(self, x): return self.h(x),x
    with pytest.raises(ValueError, match="which must be one tensor, and it is tuple; use a criterion such as 'fisher_w'"): gather(Pair(), [(Statistic('t', take, at='weight', by=outer), p)], [(torch.randn(2,3), y)], loss_func=F.cross_entropy)

@pytest.mark.parametrize('act', [nn.ReLU6(), nn.GELU(), nn.Sigmoid(), nn.Softmax(-1)])
def test_a_flow_that_is_not_homogeneous_is_refused(act):
    torch.manual_seed(0); m = nn.Sequential(nn.Linear(3,4), nn.BatchNorm1d(4), act, nn.Linear(4,2)).eval(); nn.init.normal_(m[1].running_mean)
    with torch.no_grad(): m[0].weight.mul_(20 if isinstance(act, nn.ReLU6) else .1)
    c = Criterion('flow', _weigh, stats=(Statistic('wg', _wg, at='weight', by='flow'),))
    with pytest.raises(ValueError, match='twice the input does not give twice the output of this Sequential'): Sparsifier(m, torch.randn(2,3), granularity='weight', criterion=c).masks(.5)
    m[2] = nn.LeakyReLU(.1)
    assert Sparsifier(m, torch.randn(2,3), granularity='weight', criterion=c).masks(.5).sparsity==.5

@pytest.mark.parametrize('first', [True, False])
def test_attention_and_recurrent_layers_are_readers(first):
    class Both(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.r,self.h = nn.Linear(3,4),nn.MultiheadAttention(4,2,batch_first=first),nn.GRU(4,5,batch_first=first),nn.Linear(5,2)
        def forward(self, x):
            x = self.a(x if first else x.transpose(0,1))
            x = x+self.b(x, x, x, need_weights=False)[0]
            return self.h(self.r(x)[0].mean(1 if first else 0))
    torch.manual_seed(0); m = Both().double(); x = torch.randn(3,6,3).double(); data = [(x, torch.tensor([0,1,1]))]
    g = next(g for g in couple(m, x).groups if 'a' in g.layers)
    assert [p.name for p in readers(m, g)]==['b', 'r']
    got = group_scores(m, [g], Criterion('effect', channel=_only, stats=(EFFECT,)), reduce='sum', evidence=evidence_for(taylor, m, data, loss_func=F.cross_entropy))[g.name]
    F.cross_entropy(m(x), data[0][1], reduction='sum').backward()
    want = sum((p*p.grad).sum(0) for p in (m.b.in_proj_weight, m.r.weight_ih_l0)).detach()
    same(got, want, 1e-9)
    for k in range(3): # a row is a sample
        one = group_scores(m, [g], whole, evidence=evidence_for(whole, m, [(x[k:k+1], data[0][1][k:k+1])], loss_func=F.cross_entropy))[g.name]
        want = one if k==0 else want+one
    same(group_scores(m, [g], whole, evidence=evidence_for(whole, m, data, loss_func=F.cross_entropy))[g.name], want, 1e-9)
    assert Pruner(m, x).plan(.5, criterion=wanda, data=data).removed>0 and hooks(m)==0

def test_all_readers_together_or_none():
    class Cross(nn.Module): # a bare parameter reads as well
        def __init__(self): super().__init__(); self.a,self.b,self.w = nn.Linear(3,4),nn.Linear(4,2),nn.Parameter(torch.randn(4,2))
        def forward(self, x): x = F.relu(self.a(x)); return self.b(x)+x@self.w
    m = Cross(); d = [(torch.randn(3,3), torch.zeros(3).long())]
    with pytest.raises(ValueError, match="criterion 'whole' adds up all readers of a unit, and 'w', which reads 'a', cannot be listened to"): Pruner(m, d[0][0]).plan(.5, criterion=whole, data=d, loss_func=F.cross_entropy)
    assert Pruner(m, d[0][0]).plan(.5, criterion=size, data=d).removed==2

@pytest.mark.parametrize('net', ['resnet18', 'plain', 'no shift'])
def test_a_homogeneous_network_needs_no_second_look(net, monkeypatch):
    import torchvision, fasterprune.criteria.runs as stats
    torch.manual_seed(0)
    m = torchvision.models.resnet18(num_classes=3) if net=='resnet18' else nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4, affine=net=='plain'), nn.ReLU(), nn.Flatten(), nn.Linear(4*36,2))
    for k in m.modules():
        if isinstance(k, nn.BatchNorm2d): nn.init.normal_(k.running_mean); k.affine and nn.init.normal_(k.bias)
    calls,real = [],stats.functional_call
    monkeypatch.setattr(stats, 'functional_call', lambda *a, **k: calls.append(1) or real(*a, **k))
    c = Criterion('flow', _weigh, stats=(Statistic('wg', _wg, at='weight', by='flow'),))
    assert Sparsifier(m, torch.randn(1,3,8,8) if net!='resnet18' else torch.randn(1,3,32,32), granularity='kernel', criterion=c).masks(.5).sparsity>.4
    assert len(calls)==(3 if net=='no shift' else 1)
