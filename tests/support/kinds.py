"What the tests of kinds of faults share: oracles over a plan that cut nothing, and what is compared before and after"
import copy, functools, gc, random, re, types
from collections import OrderedDict, deque
import numpy as np
import pytest, torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from fasterprune.core import PruningError
from fasterprune.surgery.pruner import Pruner

REFUSALS = (ValueError, TypeError, PruningError)

# ---- the oracle: the network before, in which everything that goes is zero

@torch.no_grad()
def silenced(dense, plan):
    "A copy of the network before in which all weights of what goes are zero: nobody writes it and nobody reads it"
    m = copy.deepcopy(dense)
    own = {**dict(m.named_parameters(remove_duplicate=False)), **dict(m.named_buffers(remove_duplicate=False))}
    for e in plan.edits:
        t = own[e.param]
        gone = sorted(set(range(e.n))-set(e.keep))
        if t.is_floating_point(): t.index_fill_(e.dim, torch.tensor(gone, dtype=torch.long), 0)
    return m

def call(m, x):
    "A tensor, a tuple of arguments or a dict of keyword arguments"
    return m(**x) if isinstance(x, dict) else m(*x) if isinstance(x, tuple) else m(x)

@torch.no_grad()
def quietly(m, x): "Outputs without gradients"; return call(m, x)

def near(got, want, tol=1e-5):
    "Each tensor on its own scale; the same infinities and the same NaN are equal"
    a,b = ([t for t in tree_leaves(o) if isinstance(t, torch.Tensor)] for o in (got, want))
    shapes,wanted = ([tuple(t.shape) for t in o] for o in (a, b))
    assert shapes==wanted, f"shapes {shapes}, not {wanted}"
    for s,t in zip(a, b):
        s,t = s.detach().double(),t.detach().double()
        odd = ~t.isfinite()
        assert torch.equal(s[odd].nan_to_num(nan=.5),
            t[odd].nan_to_num(nan=.5)) and s[~odd].isfinite().all(), 'other infinities'
        if not (~odd).any(): continue
        e = ((s-t)[~odd].abs().max()/t[~odd].abs().max().clamp_min(1e-12)).item()
        assert e<=tol, f"wrong by {e:.2g}"

def far(a, b):
    "Different enough that a test of equality says something"
    return max(((s-t).abs().max()/t.abs().max().clamp_min(1e-12)).item() for s,
        t in zip(tree_leaves(a), tree_leaves(b)))>1e-2

def fresh(make, seed=0):
    "A network in evaluation mode, always the same"
    torch.manual_seed(seed)
    return make().eval()

def holds(make, x, others=(), tol=1e-5, cut=True, options=None, **how):
    "The readers' law at inputs that the pruner has not seen; gives the network, its report, and what it shall compute"
    m = fresh(make)
    dense = copy.deepcopy(m)
    r = Pruner(m, x, **(options or {})).prune(**how)
    if cut: assert r.removed, f"nothing was cut:\n{r}"
    want = silenced(dense, r.plan)
    for o in (x, *others): near(quietly(m, o), quietly(want, o), tol)
    return m,r,want

def keeps(make, x, others=(), tol=1e-5, dead=None, options=None):
    "`prune()` removes what is dead, so the network computes what it did, at inputs that the pruner has not seen"
    m = fresh(make)
    if dead is not None:
        with torch.no_grad(): dead(m)
    dense = copy.deepcopy(m)
    r = Pruner(m, x, **(options or {})).prune()
    for o in (x, *others): near(quietly(m, o), quietly(dense, o), tol)
    return m,r,dense

def refused(f, *words):
    "A clear refusal, with these words in it, and no raw error of PyTorch or Python"
    with pytest.raises(REFUSALS) as e: f()
    said = str(e.value)
    assert 'please report' not in said and all(w in said for w in words), said
    return said

def words(r): "The words of a report"; return set(re.findall(r"[\w.]+", str(r)))|set(re.findall(r"\w+", str(r)))

def inner(m, x, end='[inner]', fraction=.5):
    "A dict of fractions for the groups whose name ends like this"
    return {g.name:fraction for g in Pruner(m, x).couple().groups if g.name.endswith(end) and g.n>1}

# ---- photographs: what is to be the same afterwards

FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, functools._lru_cache_wrapper)

def photo(o, seen=None):
    "All that anybody could see of an object, as a value: tensors by their bits, modules by their attributes and hooks"
    seen = {} if seen is None else seen
    if isinstance(o, (int, float, str, bytes, bool, type(None), torch.dtype, torch.device,
        type)): return (type(o).__name__, repr(o))
    if id(o) in seen: return ('again', seen[id(o)][0])
    seen[id(o)] = len(seen),o
    if isinstance(o, torch.Tensor): return _tensor(o)
    if isinstance(o, np.ndarray): return ('array', str(o.dtype), o.shape, o.tobytes())
    if isinstance(o, nn.Module): return ('module', id(type(o)), *((k, photo(v, seen)) for k,v in vars(o).items()))
    if isinstance(o, dict): return (type(o).__name__,
        *((repr(k) if not isinstance(k, torch.Tensor) else _tensor(k), photo(v, seen)) for k,v in o.items()))
    if isinstance(o, (list, tuple, deque)): return (type(o).__name__, *(photo(v, seen) for v in o))
    if isinstance(o, (set, frozenset)): return (type(o).__name__, *sorted(map(repr, o)))
    if isinstance(o, FUNCTIONS): return ('function', id(o),
        *(photo(c.cell_contents, seen) for c in getattr(o, '__closure__', None) or ()))
    if isinstance(o, functools.partial): return ('partial', id(o), photo(o.func, seen), photo(o.args, seen),
        photo(o.keywords, seen))
    if isinstance(o, types.MethodType): return ('method', photo(o.__self__, seen), id(o.__func__))
    slots = [k for c in type(o).__mro__ for k in getattr(c, '__slots__', ()) if isinstance(k, str) and hasattr(o, k)
        and not k.startswith('__')]
    own = {**{k:getattr(o, k) for k in slots}, **getattr(o, '__dict__', {})}
    return ('object', id(o), *((k, photo(v, seen)) for k,v in own.items()))

def _tensor(t):
    kind = type(t).__name__
    if 'Fake' in kind: return ('fake',)
    grad = None if not t.is_leaf or t.grad is None else _tensor(t.grad)
    data = t.detach().cpu().contiguous()
    return ('tensor', kind, str(t.dtype), tuple(t.shape), tuple(t.stride()), t.requires_grad,
        data.view(torch.uint8).numpy().tobytes() if data.numel() and data.dim() else repr(data), grad)

def diff(a, b, at=''):
    "Where two photographs differ, in words"
    if a==b: return ''
    if not (isinstance(a, tuple) and isinstance(b, tuple)) or len(a)!=len(b) or not a:
        return f"{at}: {str(a)[:80]} became {str(b)[:80]}"
    name = f"{at}.{a[0]}" if isinstance(a[0], str) and a[0]==b[0] else at
    return next((d for x,y in zip(a, b) if (d := diff(x, y, name))), '')

def torch_state():
    "All that torch, NumPy and Python keep for everybody"
    from torch.nn.modules import module as hooks
    c = torch._C
    flags = dict(grad=torch.is_grad_enabled(), inference=torch.is_inference_mode_enabled(),
        anomaly=torch.is_anomaly_enabled(),
        dispatch=c._len_torch_dispatch_stack(), function=c._len_torch_function_stack(),
        fastpath=torch.backends.mha.get_fastpath_enabled(),
        flash=torch.backends.cuda.flash_sdp_enabled(), efficient=torch.backends.cuda.mem_efficient_sdp_enabled(),
        math=torch.backends.cuda.math_sdp_enabled(),
        autocast=torch.is_autocast_enabled('cpu'), autocast_dtype=str(torch.get_autocast_dtype('cpu')),
        dtype=str(torch.get_default_dtype()),
        deterministic=torch.are_deterministic_algorithms_enabled(), threads=torch.get_num_threads(),
        collects=gc.isenabled(), trace=c._get_tracing_state() is None)
    parts = {k:tuple(map(id, v.values())) for k,v in vars(hooks).items() if k.startswith('_global')
        and isinstance(v, (dict, OrderedDict))}
    parts |= {f"{o.__name__}.{k}":id(v) for o in (torch.Tensor, torch.nn.functional, nn.Module) for k,
        v in vars(o).items()}
    noise = dict(torch=torch.get_rng_state().numpy().tobytes(), numpy=repr(np.random.get_state()),
        numpys=np.random.get_state()[1].tobytes(), python=hash(random.getstate()))
    return {**flags, **parts, **noise}

def changed(before, after):
    "Names of what was there before and is another now, and of what is new on classes that everybody uses"
    new = [k for k in after if k not in before and k.startswith(('Tensor.', 'Module.'))]
    return [k for k in before if before[k]!=after.get(k, 'gone')]+new

def mend_torch(before):
    "Take down what a test found on, so that the tests after it are about something else"
    from torch.utils._python_dispatch import _pop_mode
    while torch._C._len_torch_function_stack()>before['function']: torch._C._pop_torch_function_stack()
    while torch._C._len_torch_dispatch_stack()>before['dispatch']: _pop_mode()
    torch.set_grad_enabled(before['grad'])
    torch.backends.mha.set_fastpath_enabled(before['fastpath'])
    torch.backends.cuda.enable_flash_sdp(before['flash'])
    torch.backends.cuda.enable_mem_efficient_sdp(before['efficient'])
    torch.backends.cuda.enable_math_sdp(before['math'])
    for k in [k for k in vars(torch.Tensor) if f"Tensor.{k}" not in before]: delattr(torch.Tensor, k)

def alive(collect=True):
    "Fake tensors that the garbage collector still finds"
    if collect: gc.collect()
    return [o for o in gc.get_objects() if type(o) is FakeTensor]
