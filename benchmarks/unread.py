"The network in which nobody reads what a plan removes: an oracle by the plan's edits that shares nothing with the cut"
from copy import deepcopy
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

def unread(
    wide:nn.Module, # As it was before the cut
    small:nn.Module, # As it is after it: its norms say what statistics over the channels that stay are
    plan, # Of the cut
)->nn.Module:
    "A copy of the wide network in which all that writes or reads a channel that goes is zero, and no norm sees it"
    m = deepcopy(wide)
    for e in plan.edits:
        p = parameter(m, e.param)
        if p is not None and p.shape[e.dim]==e.n: p.data.index_fill_(e.dim, gone(e), 0)
    if plan.mixed: narrow_norms(m, small, plan)
    return m

def gone(e)->torch.Tensor:
    "Positions that an edit removes"
    return torch.tensor(sorted(set(range(e.n))-set(e.keep)), dtype=torch.long)

def parameter(m, name:str)->nn.Parameter|None:
    "A parameter by its path; None for what is none"
    path,_,k = name.rpartition('.')
    p = getattr(m.get_submodule(path), k, None)
    return p if isinstance(p, nn.Parameter) else None

def narrow_norms(m, small, plan):
    "Let the norms of a network look at the channels that stay only, by the pruned network's own"
    for e in plan.edits:
        path,_,k = e.param.rpartition('.')
        norm = m.get_submodule(path)
        if k!='weight' or e.dim or not is_norm(norm): continue
        own = deepcopy(small.get_submodule(path))
        norm.forward = narrowed(own, norm.forward, torch.tensor(e.keep), e.n, axis_of(norm))

def is_norm(m)->bool:
    "Does it average over channels? BatchNorms and InstanceNorms do not"
    if isinstance(m, (_BatchNorm, _InstanceNorm)): return False
    return isinstance(m, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) or 'norm' in type(m).__name__.lower()

def axis_of(m)->int:
    "Where its channels are"
    return 1 if isinstance(m, nn.GroupNorm) or '2d' in type(m).__name__ else -1

def narrowed(own, wide, keep, n:int, dim:int):
    "A forward over the channels that stay; the others are zero"
    def forward(x, *args, **kwargs):
        if x.shape[dim]!=n: return wide(x, *args, **kwargs)
        y = own.to(x.dtype)(x.index_select(dim, keep), *args, **kwargs)
        return y.new_zeros(x.shape).index_copy(dim, keep, y)
    return forward
