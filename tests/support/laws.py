"What the tests of surgery share: networks that are awake, and oracles that know nothing of how the library cuts"
import numpy as np
import torch
from copy import deepcopy
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

def tensors(o):
    "Every tensor in nested lists, tuples, dicts and dataclasses"
    if isinstance(o, torch.Tensor): return [o]
    if isinstance(o, dict): o = list(o.values())
    elif hasattr(o, '__dataclass_fields__'): o = [getattr(o, k) for k in o.__dataclass_fields__]
    return [t for i in o for t in tensors(i)] if isinstance(o, (list, tuple)) else []

def rel(a, b):
    "Largest difference relative to the largest value of the second, over all tensors in both"
    a,b = tensors(a),tensors(b)
    assert len(a)==len(b) and [t.shape for t in a]==[t.shape for t in b]
    assert all(t.isfinite().all() for t in b)
    return max(((s-t).abs().max()/t.abs().max().clamp(min=1e-30)).item() for s,t in zip(a, b))

def run(m, x):
    "Outputs without gradients; a tensor, a tuple of arguments or a dict of keyword arguments"
    with torch.no_grad(): return m(**x) if isinstance(x, dict) else m(*x) if isinstance(x, tuple) else m(x)

@torch.no_grad()
def awake(m, x, seed=0):
    "Float64, random weights that keep their scale, random biases, and BatchNorms near the real statistics but not at them"
    g = torch.Generator().manual_seed(seed)
    rand = lambda t, lo, hi: t.copy_(torch.rand(t.shape, generator=g, dtype=t.dtype)*(hi-lo)+lo)
    m.double().train()
    for c in m.modules():
        if isinstance(c, CONV+TRANSPOSED+(nn.Linear,)):
            c.weight.mul_((2/c.weight[0].numel())**.5/c.weight.square().mean().sqrt())
            if c.bias is not None: rand(c.bias, -.2, .2)
        elif isinstance(c, (_NormBase, nn.GroupNorm, nn.LayerNorm)) and c.weight is not None:
            rand(c.weight, .5, 1.5); rand(c.bias, -.2, .2)
    norms = [c for c in m.modules() if isinstance(c, _NormBase) and c.running_mean is not None]
    was = [c.momentum for c in norms]
    for c in norms: c.momentum = 1.
    run(m, x)
    for c,k in zip(norms, was):
        c.momentum = k
        c.running_mean += c.running_var.sqrt()*torch.randn(c.running_mean.shape, generator=g, dtype=torch.float64)*.3
        c.running_var *= torch.rand(c.running_var.shape, generator=g, dtype=torch.float64)+.5
    return m.eval()

@torch.no_grad()
def louder(m, fraction):
    "A copy with larger weights, so that the signal still comes through when this part of the channels is gone"
    m = deepcopy(m)
    for c in m.modules():
        if isinstance(c, CONV+TRANSPOSED+(nn.Linear,)): c.weight /= (1-fraction)**.5
    return m

def other(x, batch=3, seed=5):
    "The same kind of input with other values and another batch size"
    g = torch.Generator().manual_seed(seed)
    one = lambda t: torch.randn(batch, *t.shape[1:], generator=g, dtype=t.dtype) if t.is_floating_point() else t
    return {k:one(t) for k,t in x.items()} if isinstance(x, dict) else tuple(map(one, x)) if isinstance(x, tuple) else one(x)

@torch.no_grad()
def unread(m, plan, reads=()):
    "A copy of the original in which no convolution and no linear layer, and no parameter of `reads`, reads the input columns that the plan removes"
    m = deepcopy(m)
    gone = {}
    for e in plan.edits:
        k = torch.ones(e.n, dtype=torch.bool)
        k[list(e.keep)] = False
        gone.setdefault(id(m.get_parameter(e.param) if e.param in dict(m.named_parameters()) else m.get_buffer(e.param)), {})[e.dim] = k
    for n,d in reads: m.get_parameter(n).index_fill_(d, gone.get(id(m.get_parameter(n)), {}).get(d, torch.zeros(0)).nonzero()[:,0], 0)
    for c in m.modules(): # a filter of a depthwise convolution reads the channel that it writes: who reads that one counts
        if isinstance(c, TRANSPOSED): c.weight[gone.get(id(c.weight), {}).get(0, torch.zeros(len(c.weight), dtype=torch.bool))] = 0
        elif isinstance(c, CONV+(nn.Linear,)) and 1 in gone.get(id(c.weight), {}): c.weight[:,gone[id(c.weight)][1]] = 0
    return m

class Trunk(nn.Module):
    "A stem, a residual block, a wide layer and a head"
    def __init__(self):
        super().__init__()
        conv = lambda i,o: nn.Sequential(nn.Conv2d(i,o,3,padding=1), nn.BatchNorm2d(o), nn.ReLU())
        self.stem,self.block,self.wide,self.head = conv(2,6),conv(6,6),conv(6,20),nn.Linear(20,5)
    def forward(self, x):
        x = self.stem(x)
        return self.head(self.wide(x+self.block(x)).mean((2,3)))

def engine(model, x, c, data=None, granularity='filter', loss_func=None):
    "Scores of all primary groups, as the pruner gets them"
    from fasterprune.criteria.base import criteria
    from fasterprune.surgery.analysis.scores import evidence_for, group_scores
    from fasterprune.surgery.coupling.couple import couple
    c = criteria[c] if isinstance(c, str) else c
    gs = [g for g in couple(model, x).groups if g.primary]
    return group_scores(model, gs, c, granularity=granularity, evidence=evidence_for(c, model, data=data, x=x, loss_func=loss_func))

WRITTEN = ('write', 'bias', 'scale', 'shift')

@torch.no_grad()
def silence(m, coupling, fraction, roles=WRITTEN, seed=0):
    "Zero a random part of each primary group in place, by the roles of its members; returns what `cut` should say when these units, and no others, are removed"
    g,res = torch.Generator().manual_seed(seed),{}
    own = {**dict(m.named_parameters()), **dict(m.named_buffers())}
    for group in coupling.groups:
        if not group.primary: continue
        units = torch.randperm(group.n, generator=g)[:min(int(group.n*fraction+1e-9), group.n-1)]
        if group.equal_units: # code that cuts it into equal parts can do so with equally many
            kinds = torch.tensor([[next((i for i,p in enumerate(parts) if u in p.tolist()), -1) for parts in group.equal_units] for u in range(group.n)])
            units = torch.cat([(at := (kinds==k).all(1).nonzero()[:,0])[torch.randperm(len(at), generator=g)][:int(len(at)*fraction)] for k in kinds.unique(dim=0)])
        if group.flow is not None: # code that shuffles it can do so with so many of each kind
            scores = torch.rand(group.n, generator=g).numpy()
            stays = np.ones(group.n, bool)
            stays[scores.argsort()[:int(group.n*fraction+1e-9)]] = False
            units = torch.as_tensor(np.flatnonzero(~group.balance(stays, scores)))
        for member in group.members:
            at = torch.isin(torch.as_tensor(member.unit), units).nonzero()[:,0]
            if member.role in roles: own[member.param].index_fill_(member.dim, at, 0)
            res.setdefault((member.param, member.dim), set()).update(at.tolist())
    return {k:v for k,v in res.items() if v}

def cut(plan):
    "(parameter, dimension) → positions that a plan removes"
    return {(e.param, e.dim): set(range(e.n))-set(e.keep) for e in plan.edits}
