"No model, optimizer, cache, hook, nor torch is changed by looking; an interrupt leaves all as it was, or all done"
import collections, copy, functools, gc, inspect, os, random, signal, sys, threading, time, types, weakref
import numpy as np
import pytest, torch, torch.nn.functional as F
from torch import nn
import fasterprune
from support import sized_nets as nets
from support.kinds import REFUSALS, alive, changed, diff, fresh, mend_torch, near, photo, quietly, silenced, torch_state
from fasterprune.surgery.pruner import Pruner

pytestmark = pytest.mark.filterwarnings('ignore')

class Net(nn.Module):
    "Two layers, and what a forward does beside them"
    def __init__(self):
        super().__init__()
        self.a,self.o = nn.Linear(6, 8),nn.Linear(8, 3)
        self.start()
    def start(self): pass
    def aside(self, h): "Gives another tensor, or nothing"
    def forward(self, x):
        h = self.a(x).relu()
        other = self.aside(h)
        return self.o(h if other is None else other)

def looked_at(m, x): # all ways to look
    for how in (.5, None): Pruner(m, x).plan(how)
    Pruner(m, x).couple()

def nothing_happens(make, x=None, also=lambda m: (), cut=True):
    "Looking changes no bit, leaves no fake tensor, and what a cut leaves is a slice of what was there"
    m,x = fresh(make),torch.randn(4, 6) if x is None else x
    others = also(m)
    before,torch_before,fakes = (photo(m), photo(others)),torch_state(),set(map(id, alive(False)))
    looked_at(m, x)
    assert not (d := diff(before[0], photo(m))), d
    assert not (d := diff(before[1], photo(others))), d
    assert not changed(torch_before, torch_state())
    state = {k:v.clone() for k,v in m.state_dict().items()}
    r = Pruner(m, x).prune(.5)
    assert not (d := diff(before[1], photo(others))), d
    assert not changed(torch_before, torch_state())
    assert not [t for t in alive() if id(t) not in fakes]
    if cut: assert r.removed, str(r)
    for e in r.plan.edits: state[e.param] = state[e.param].index_select(e.dim, torch.tensor(e.keep))
    for k,v in m.state_dict().items(): assert torch.equal(v, state[k]), f"{k} is not a slice of what it was"
    return m,r

# ---- what a forward writes down

class Box: pass
class Slots:
    __slots__ = ('h', 'more')
    def __init__(self): self.h,self.more = None,[]

class Deques(Net):
    def start(self): self.d = collections.deque(maxlen=2)
    def aside(self, h): self.d.append(h)
class Ordered(Net):
    def start(self): self.d,self.e = collections.OrderedDict(),collections.defaultdict(list)
    def aside(self, h):
        self.d['h'] = h
        self.e[h.shape[0]].append(h)
class Nested(Net):
    def start(self): self.d = [[], dict(a=dict(b=[(dict(c=[]),)]))]
    def aside(self, h):
        self.d[0].append(h)
        self.d[1]['a']['b'][0][0]['c'].append(h.detach())
        self.d[1]['a']['n'] = h.shape
        return h
class Objects(Net):
    def start(self):
        self.d = Box()
        self.d.inner = Box()
        self.d.inner.seen = []
    def aside(self, h):
        self.d.h = h
        self.d.inner.seen.append(h)
        self.d.inner.n = len(self.d.inner.seen)
class Slotted(Net):
    def start(self): self.d = Slots()
    def aside(self, h):
        self.d.h = h
        self.d.more.append(h)
class Attribute(Net):
    def aside(self, h): self.last,self.calls = h,getattr(self, 'calls', 0)+1
class OnAChild(Net):
    def aside(self, h):
        self.a.seen = h
        self.o.weight.seen = h.detach()
class Buffers(Net):
    def start(self):
        self.register_buffer('mean', torch.zeros(8))
        self.register_buffer('n', torch.tensor(0))
    def aside(self, h):
        self.mean = self.mean*.9+h.detach().mean(0)*.1
        self.n += 1
class Sets(Net):
    def start(self): self.d,self.f = set(),{}
    def aside(self, h):
        self.d.add(h.shape)
        self.f[h.shape] = self.d
class Weak(Net):
    def start(self):
        self.d = weakref.WeakValueDictionary()
        self.w = None
    def aside(self, h):
        self.d['h'] = h
        self.w = weakref.ref(h)
class Array(Net):
    def start(self): self.d = np.zeros(3)
    def aside(self, h): self.d += 1
class Counter(Net):
    def start(self):
        self.c = collections.Counter()
        self.turns = iter(range(10**6))
    def aside(self, h): self.c['calls'] += 1
class Shared(Net):
    "The same list in two modules and in an object, which must be one list afterwards"
    def start(self):
        self.d = []
        self.a.d = self.d
        self.box = Box()
        self.box.d = self.d
    def aside(self, h):
        self.a.d.append(h)
        assert self.box.d is self.d is self.a.d

KEEPERS = (Deques, Ordered, Nested, Objects, Slotted, Attribute, OnAChild, Buffers, Sets, Weak, Array, Counter, Shared)
@pytest.mark.parametrize('net', KEEPERS)
def test_what_a_forward_writes_down(net): nothing_happens(net)

@pytest.mark.parametrize('net', KEEPERS)
def test_what_it_had_written_down_before(net):
    "A model that has run, and holds tensors of that run, holds these afterwards"
    def make():
        m = net().eval()
        m(torch.ones(4, 6))
        return m
    m,r = fresh(make),None
    before = photo(m)
    looked_at(m, torch.randn(4, 6))
    assert not (d := diff(before, photo(m))), d

# ---- what a first call builds

class Hooked(Net):
    def aside(self, h):
        if not getattr(self, 'hooked', False):
            self.o.register_forward_hook(lambda m, i, o: o*2)
            self.hooked = True
        return h
class Built(Net):
    "A layer that the first call makes"
    def aside(self, h):
        if not hasattr(self, 'late'):
            torch.manual_seed(3)
            self.late = nn.Linear(h.shape[-1], h.shape[-1])
        return self.late(h)
class Swaps(Net):
    "Another forward after the first call"
    def start(self): self.n = nn.BatchNorm1d(8).eval()
    def forward(self, x):
        self.forward = self.later
        return self.later(x)
    def later(self, x): return self.o(self.n(self.a(x)).relu())*3
class Registers(Net):
    def aside(self, h):
        if 'table' not in self._buffers: self.register_buffer('table', torch.linspace(0, 1, h.shape[-1]),
            persistent=False)
        return h+self.table*0

@pytest.mark.parametrize('net', [Hooked, Built, Swaps, Registers])
def test_what_a_first_call_builds(net):
    "Looking is not the first call; after the first call the model is the one that it would have been"
    m,x = fresh(net),torch.randn(4, 6)
    want,before = quietly(copy.deepcopy(m), x),photo(m)
    try: looked_at(m, x)
    except REFUSALS as e: assert net is Built and 'please report' not in str(e)
    assert not (d := diff(before, photo(m))), d
    near(quietly(m, x), want, 0)

@pytest.mark.parametrize('net', [Hooked, Registers])
def test_what_a_first_call_builds_and_a_cut(net):
    "Cut before the first call: computes what the law says at the first call and at the second"
    m,x = fresh(net),torch.randn(4, 6)
    dense = copy.deepcopy(m)
    r = Pruner(m, x).prune(.5)
    want = silenced(dense, r.plan)
    for _ in range(2): near(quietly(m, x), quietly(want, x))

# ---- hooks of the user's

def with_hook(kind):
    "A network and what its hook writes to"
    seen,table,count = [],{},0
    def append(m, i, *o): seen.append(o[0] if o else i[0])
    def store(m, i, *o): table[len(table)] = table['last'] = i[0]
    def add(m, i, *o):
        nonlocal count
        count += 1
    def double(m, i, o):
        seen.append(len(seen))
        return o*2
    def look(): return [seen, table, count]
    f = dict(append=append, store=store, count=add, double=double)[kind]
    def make():
        m = Net()
        m.a.register_forward_hook(f)
        if kind!='double':
            m.o.register_forward_pre_hook(f)
            m.register_forward_hook(f)
        return m
    return make,look

@pytest.mark.parametrize('kind', ['append', 'store', 'count', 'double'])
def test_hooks_with_closures(kind):
    "What a hook of the user's writes to holds what it held; what it does to outputs is part of the model"
    make,look = with_hook(kind)
    x = torch.randn(4, 6)
    m,r = nothing_happens(make, x, also=lambda m: [v for v in look() if isinstance(v, (list, dict))])
    assert not look()[0] and not look()[1] and look()[2]==0
    dense = fresh(make)
    want = quietly(silenced(dense, r.plan), x)
    near(quietly(m, x), want)
    assert look()[0] or look()[1] or look()[2]

class Recorder:
    "A hook that is an object, as feature extractors are"
    def __init__(self): self.seen,self.n = {},0
    def __call__(self, m, i, o):
        self.seen[m] = o
        self.n += 1
    def method(self, m, i): self.seen['in'] = i[0]

@pytest.mark.parametrize('kind', ['object', 'method', 'partial', 'with_kwargs', 'backward'])
def test_hooks_that_are_objects(kind):
    "Objects, bound methods, partials: what they hold is what it was"
    rec = Recorder()
    def note(box, m, i, o): box.append(o)
    box = []
    def make():
        m = Net()
        if kind=='object': m.a.register_forward_hook(rec)
        if kind=='method': m.o.register_forward_pre_hook(rec.method)
        if kind=='partial': m.a.register_forward_hook(functools.partial(note, box))
        if kind=='with_kwargs': m.register_forward_hook(lambda m, a, k, o: box.append((a, k, o)), with_kwargs=True)
        if kind=='backward': m.register_full_backward_hook(lambda m, i, o: box.append(o))
        return m
    nothing_happens(make, also=lambda m: (rec, box))
    assert not rec.seen and not rec.n and not box

def test_global_hooks_are_left_on():
    "Hooks on all modules, of a profiler say, are on afterwards, and keep no fake tensor"
    kept = []
    h = torch.nn.modules.module.register_module_forward_hook(lambda m, i, o: kept.append(o))
    try:
        nothing_happens(Net)
        assert h.id in torch.nn.modules.module._global_forward_hooks
    finally: h.remove()
    assert not [o for o in kept if type(o) is not torch.Tensor]

# ---- caches

def rows(n, dtype): return torch.arange(1, n+1, dtype=dtype).sin()[:,None]

@functools.lru_cache(maxsize=4)
def cached(n, dtype): return rows(n, dtype)
@functools.lru_cache(maxsize=None)
def cached_by_length(n): return rows(n, torch.get_default_dtype())
TABLES = {}
def by_module(n, like):
    if n not in TABLES: TABLES[n] = rows(n, like.dtype) # the first caller's precision
    return TABLES[n]
def by_default(n, like, table={}):
    if n not in table: table[n] = like.new_tensor(rows(n, like.dtype).tolist())
    return table[n]
def by_attribute(n, like):
    if not hasattr(by_attribute, 'table'): by_attribute.table = {}
    return by_attribute.table.setdefault(n, like.new_ones(n, 1))
class Positions(nn.Module):
    @functools.lru_cache(maxsize=1)
    def forward(self, n, dtype): return rows(n, dtype)
class Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.o,self.pos = nn.Linear(6, 8),nn.Linear(8, 3),Positions()
    def forward(self, x):
        h = self.a(x).relu()
        return self.o(h+self.row(h))
class LruFunction(Seq):
    def row(self, h): return cached(h.shape[1], h.dtype)
class LruLength(Seq):
    def row(self, h): return cached_by_length(h.shape[1]).to(h)
class LruMethod(Seq):
    def row(self, h): return self.pos(h.shape[1], h.dtype)
class ModuleDict_(Seq):
    def row(self, h): return by_module(h.shape[1], h)
class DefaultDict_(Seq):
    def row(self, h): return by_default(h.shape[1], h)
class FunctionAttribute(Seq):
    def row(self, h): return by_attribute(h.shape[1], h)
class ClassCache(Seq):
    table = {}
    def row(self, h):
        if h.shape[1] not in type(self).table: type(self).table[h.shape[1]] = rows(h.shape[1], h.dtype)
        return self.table[h.shape[1]]
class CachedProperty(Seq):
    @functools.cached_property
    def width(self): return torch.full((1,), float(self.a.weight.detach().double().sum()>1e9))
    def row(self, h): return rows(h.shape[1], h.dtype)+self.width.to(h)
class GlobalVariable(Seq):
    def row(self, h):
        global LAST
        if LAST is None or LAST.shape[0]!=h.shape[1]: LAST = rows(h.shape[1], h.dtype)
        return LAST
LAST = None

def empty_caches(): # what another test left
    global LAST
    LAST = None
    for f in (cached, cached_by_length, Positions.forward): f.cache_clear()
    for d in (TABLES, by_default.__defaults__[0], vars(by_attribute).setdefault('table', {}), ClassCache.table): d.clear()

@pytest.mark.parametrize('warm', [False, True])
@pytest.mark.parametrize('net', [LruFunction, LruLength, LruMethod, ModuleDict_, DefaultDict_, FunctionAttribute,
    ClassCache, CachedProperty, GlobalVariable])
def test_caches(net, warm):
    "Cut, and afterwards no cache holds a fake tensor or one of another precision, wherever it is"
    empty_caches()
    m,x,fakes = fresh(net),torch.randn(2,11,6),set(map(id, alive(False)))
    want_before = None
    if warm: want_before = quietly(m, x)
    dense = copy.deepcopy(m)
    p = Pruner(m, x).plan(.5)
    assert p.removed==4, str(p)
    y = quietly(m, x)
    assert type(y) is torch.Tensor and y.dtype==torch.float32
    if warm: near(y, want_before, 0)
    r = Pruner(m, x).prune(.5)
    want = silenced(dense, r.plan)
    assert r.removed==4
    for n in (11, 11, 5): near(quietly(m, z := torch.randn(3,n,6)), quietly(want, z))
    assert quietly(m, x).dtype==torch.float32
    del want,dense,p,r,z,y
    assert not [t for t in alive() if id(t) not in fakes]

# ---- in place

class Normalises(Net):
    def aside(self, h):
        with torch.no_grad(): self.o.weight.div_(self.o.weight.norm(dim=1, keepdim=True)*1.5)
        return h
class Data(Net):
    def aside(self, h):
        self.a.weight.data.clamp_(-.1, .1)
        self.o.bias.data += .25
class MaxNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.e,self.a,self.o = nn.Embedding(10, 16, max_norm=.5),nn.Linear(16, 12),nn.Linear(12, 3)
    def forward(self, ids): return self.o(self.a(self.e(ids)).relu())
class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.w,self.a,self.o = nn.Parameter(torch.randn(10, 16)),nn.Linear(16, 12),nn.Linear(12, 3)
    def forward(self, ids): return self.o(self.a(F.embedding(ids, self.w, max_norm=1., norm_type=1.)).relu())
class Statistics(Net):
    def start(self): self.n = nn.BatchNorm1d(8, momentum=.5)
    def aside(self, h): return self.n(h)
class Outside(Net):
    "Writes to a tensor that is no parameter and no buffer"
    def start(self):
        self.total = torch.zeros(8)
        self.box = dict(t=[torch.zeros(())])
    def aside(self, h):
        self.total += h.detach().mean(0)
        self.box['t'][0].add_(1)
class View(Net):
    "Writes through a view of a parameter, and through NumPy's"
    def aside(self, h):
        self.o.bias.detach()[0] += 1
        self.a.bias.detach().numpy()[0] += 1

def ids(): return torch.randint(10, (4, 5))
@pytest.mark.parametrize('double', [False, True])
@pytest.mark.parametrize('net,x', [(Normalises, None), (Data, None), (MaxNorm, ids()), (Functional, ids()),
    (Statistics, None), (Outside, None)])
def test_in_place(net, x, double):
    "What forward writes in place is not written by looking, in any precision: `double()` of a float64 model is no copy"
    make = (lambda: net().double()) if double else net
    x = torch.randn(4, 6) if x is None else x
    stays = net in (Data, Outside) # a tensor that nobody can cut along is added to, or values are bounded
    nothing_happens(make, x.double() if double and x.is_floating_point() else x, cut=not stays)

@pytest.mark.parametrize('double', [False, True])
def test_in_place_through_a_view(double):
    m,x = fresh(lambda: View().double() if double else View()),torch.randn(4, 6,
        dtype=torch.double if double else torch.float)
    before = photo(m)
    try: Pruner(m, x).plan(.5)
    except REFUSALS: pass
    assert not (d := diff(before, photo(m))), d

def old_spectral(): return nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 8)), nn.ReLU(),
    nn.utils.spectral_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))
def new_spectral():
    s = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(s(nn.Linear(6, 8)), nn.ReLU(), s(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))

@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('make', [old_spectral, new_spectral])
def test_power_iterations(make, training):
    "spectral_norm's vectors are turned by a call in training, and not by looking"
    m = fresh(make).train(training)
    before = photo(m)
    for how in (.5, None):
        try: Pruner(m, torch.randn(4, 6)).plan(how)
        except REFUSALS: pass
    assert not (d := diff(before, photo(m))), d

def test_statistics_in_training_mode():
    "A model in training mode, with BatchNorms and dropout, and one child in evaluation"
    def make():
        m = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.5), nn.Linear(8, 8),
            nn.BatchNorm1d(8), nn.Linear(8, 3))
        return m
    m,x = fresh(make).train(),torch.randn(4, 6)
    m[5].eval()
    before,state = photo(m),torch_state()
    looked_at(m, x)
    assert not (d := diff(before, photo(m))), d
    Pruner(m, x).prune(.5)
    assert [c.training for c in m]==[True]*5+[False, True] and not changed(state, torch_state())

# ---- what cannot be copied

def uncopyable():
    yield 'generator',(i for i in range(3))
    yield 'lock',threading.Lock()
    yield 'file',open(os.devnull)
    yield 'event',threading.Event()
    yield 'module',sys
    yield 'lambda',lambda t: t*1.
    yield 'local',threading.local()
    yield 'itself',None
    yield 'torch_generator',torch.Generator()
    yield 'weakref',weakref.ref(Box)

class Holds(Net):
    def __init__(self, kind):
        super().__init__()
        self.__dict__['thing'] = self if kind=='itself' else dict(uncopyable())[kind]
        self.box = Box()
        self.box.thing,self.box.back = self.thing,[self]
    def aside(self, h): self.box.last = h
class NoCopies(Net):
    def __deepcopy__(self, memo): raise RuntimeError('there is one of me')
    def __reduce_ex__(self, protocol): raise RuntimeError('there is one of me')

@pytest.mark.parametrize('kind', [k for k,_ in uncopyable()])
def test_attributes_that_cannot_be_copied(kind):
    "They are the same objects afterwards, and the network is cut"
    m = fresh(lambda: nn.Sequential(nn.Linear(6, 6), Holds(kind)))
    h = m[1]
    things = id(h.thing),id(h.box),id(h.box.back[0])
    before = photo(m)
    looked_at(m, torch.randn(4, 6))
    assert not (d := diff(before, photo(m))), d
    assert Pruner(m, torch.randn(4, 6)).prune(.5).removed and things==(id(h.thing),id(h.box),id(h.box.back[0]))
    assert not hasattr(h.box, 'last') and h.box.back[0] is h
    if kind=='generator': assert next(h.thing)==0

def test_a_model_that_refuses_copies():
    m = fresh(NoCopies)
    before = photo(m)
    looked_at(m, torch.randn(4, 6))
    assert not (d := diff(before, photo(m))), d
    assert Pruner(m, torch.randn(4, 6)).prune(.5).removed

# ---- what torch and the model are set to

def test_gradients_and_flags_of_parameters():
    "`.grad`, `requires_grad`, hooks of parameters and names of the graph"
    def make():
        m = Net()
        m(torch.ones(2, 6)).sum().backward()
        m.o.weight.requires_grad_(False)
        m.a.bias.grad = None
        return m
    nothing_happens(make)
    m,calls = fresh(make),[]
    m.a.weight.register_hook(calls.append)
    looked_at(m, torch.randn(4, 6))
    assert not calls and m.a.weight.grad is not None

CONTEXTS = dict(no_grad=torch.no_grad, grad=torch.enable_grad, autocast=lambda: torch.autocast('cpu', torch.bfloat16),
    deterministic=lambda: deterministic(),
    double=lambda: default_dtype(torch.float64),
    one_backend=lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
class deterministic:
    def __enter__(self): torch.use_deterministic_algorithms(True)
    def __exit__(self, *a): torch.use_deterministic_algorithms(False)
class default_dtype:
    def __init__(self, dtype): self.dtype = dtype
    def __enter__(self): torch.set_default_dtype(self.dtype)
    def __exit__(self, *a): torch.set_default_dtype(torch.float32)

@pytest.mark.parametrize('name', CONTEXTS)
def test_torch_is_set_as_it_was(name):
    "Within any of the user's contexts, all of torch's settings are afterwards what they were within it"
    m,a,x = fresh(nets.Sdpa),fresh(nets.Mha),torch.randn(2, 7, 32)
    with CONTEXTS[name]():
        before = torch_state()
        for n in (m, a):
            try: looked_at(n, x)
            except (RuntimeError, *REFUSALS): pass
            assert not changed(before, torch_state())

def test_noise_goes_on():
    "Numbers that torch, NumPy and Python draw after a cut are those that they would have drawn"
    class Noisy(Net):
        def aside(self, h): return h*(1+0*np.random.rand())+0*random.random()+F.dropout(h, .5, self.training)*0
    def draw(): return torch.rand(3).tolist(),np.random.rand(3).tolist(),random.random()
    for how in (None, .5):
        for seed in (torch.manual_seed, np.random.seed, random.seed): seed(1)
        want = draw()
        m = fresh(Noisy)
        for seed in (torch.manual_seed, np.random.seed, random.seed): seed(1)
        try: Pruner(m, torch.zeros(4, 6)+.5).prune(how)
        except REFUSALS: pass
        assert draw()==want

def test_a_failed_look_leaves_nothing():
    "An example that does not fit, a model that raises half way: all is as before"
    class Raises(Deques):
        def aside(self, h):
            super().aside(h)
            raise LookupError('half way')
    for make,x in ((Deques, torch.randn(4, 7)), (Raises, torch.randn(4, 6))):
        m,state,fakes = fresh(make),torch_state(),set(map(id, alive(False)))
        before = photo(m)
        with pytest.raises(Exception): Pruner(m, x).plan(.5)
        assert not (d := diff(before, photo(m))), d
        assert not changed(state, torch_state())
        sys.last_value = sys.last_exc = None
        assert not [t for t in alive() if id(t) not in fakes]

@pytest.mark.parametrize('name', ['Sdpa', 'Grouped', 'Relative', 'Windows', 'Mha', 'Norms', 'Methods'])
def test_no_fake_tensor_is_alive(name):
    "After plan() and after prune(), while the plan and the report live"
    x = torch.randn(3, 6) if name=='Norms' else torch.randn(2,3,8,8) if name=='Windows' else torch.randn(2,7,32)
    m,fakes = fresh(getattr(nets, name)),set(map(id, alive(False)))
    plan = Pruner(m, x).plan(.5)
    assert not [t for t in alive() if id(t) not in fakes] and plan.removed
    report = Pruner(m, x).prune(.5)
    assert not [t for t in alive() if id(t) not in fakes] and report.removed

class Embed(nn.Module):
    "Checks a size, and lets its child work"
    def __init__(self, i, o):
        super().__init__()
        self.num_channels,self.projection = i,nn.Conv2d(i, o, 1)
    def forward(self, x):
        if x.shape[1]!=self.num_channels: raise ValueError('channels')
        return self.projection(x).flatten(2)
class Guarded(nn.Module):
    "The parent looks at a number of its child, and at one of its own in a tuple"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.o = nn.Conv2d(3, 16, 3),Embed(16, 8),nn.Conv1d(8, 4, 1)
        self.b.width = 8
    def forward(self, x):
        h = self.b(self.a(x).relu())
        assert h.shape[1]==self.b.width, 'width'
        return self.o(h.relu())

@pytest.mark.parametrize('make,n', [(lambda: nn.Sequential(nn.Conv2d(3,16,3), nn.ReLU(), Embed(16,8), nn.ReLU(),
    nn.Conv1d(8,4,1)), 12), (Guarded, 12)])
def test_checked_by_the_parent(make, n):
    "The number that is checked is changed with what it counts"
    m,x = fresh(make),torch.randn(2,3,8,8)
    dense = copy.deepcopy(m)
    r = Pruner(m, x).prune(.5)
    assert r.removed==n, str(r)
    for y in (x, torch.randn(3,3,6,9)): near(quietly(m, y), quietly(silenced(dense, r.plan), y))

# ---- interrupts

class Residual(nn.Module):
    "Dead channels, a branch that is dead as a whole, BatchNorms"
    def __init__(self):
        super().__init__()
        block = lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1))
        self.stem,self.a,self.b,self.o = nn.Conv2d(3, 8, 3),block(),block(),nn.Linear(8, 4)
        with torch.no_grad():
            self.a[0].weight[:4] = self.a[0].bias[:4] = self.a[1].bias[:4] = 0
            self.b[3].weight.zero_()
            self.b[3].bias.zero_()
    def forward(self, x):
        x = self.stem(x).relu()
        x = x+self.a(x)
        return self.o((x+self.b(x)).mean((2,3)))
class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn,self.n,self.o = nn.GRU(6, 8, batch_first=True),nn.LayerNorm(8),nn.Linear(8, 3)
    def forward(self, x): return self.o(self.n(self.rnn(x)[0]))

ALONE = dict(verify=False, also=()) # Nothing to go back to is kept
CASES = dict(residual=(Residual, (2,3,8,8), {}, None, {}), heads=(nets.Methods, (2,5,32), {}, .5, {}),
    recurrent=(Recurrent, (2,4,6), dict(exact_norms=True), .5, {}),
    unchecked=(Residual, (2,3,8,8), {}, None, dict(verify=False)),
    alone=(nets.Methods, (2,5,32), {}, .5, ALONE), alone_recurrent=(Recurrent, (2,4,6), {}, {'rnn':.5}, ALONE))

class Case:
    "A model that has been trained for a step, its optimizer, a copy of it, and a cut of all of them"
    def __init__(self, name):
        make,shape,self.options,self.how,self.extras = CASES[name]
        torch.manual_seed(0)
        self.model,self.x = make(),torch.randn(shape)
        zeros = {n:p==0 for n,p in self.model.named_parameters()}
        self.opt = torch.optim.Adam(self.model.parameters(), 1e-3)
        self.model(self.x).square().mean().backward()
        self.opt.step()
        with torch.no_grad():
            for n,p in self.model.named_parameters(): p[zeros[n]] = 0
        self.model.eval()
        self.copy = copy.deepcopy(self.model)
    def cut(self):
        how = dict(optimizer=self.opt, also=[self.copy])|self.extras
        return Pruner(self.model, self.x, **self.options).prune(self.how, **how)
    def same(self): # by which the very objects are known again
        ps = list(self.model.parameters())
        return dict(model=photo(self.model), copy=photo(self.copy), memory=photo(self.memory()), torch=torch_state(),
            sigint=signal.getsignal(signal.SIGINT),
            own=all(p is q for g in self.opt.param_groups for p,q in zip(g['params'], ps))
            and sum(len(g['params']) for g in self.opt.param_groups)==len(ps))
    def memory(self): # the order of entries says nothing
        s = self.opt.state_dict()
        return dict(sorted(s['state'].items())),s['param_groups']
    def result(self): # by which another one, cut in the same way, is equal
        plain = lambda m: [(n, type(c).__name__, photo({k:v for k,
            v in vars(c).items() if isinstance(v, (int, float, str, tuple, bool)) and not k.startswith('__')})) for n,
            c in m.named_modules()]
        bits = lambda m: photo(dict(m.state_dict()))
        s = self.same()
        models = [f(m) for m in (self.model, self.copy) for f in (plain, bits)]
        return *models,s['memory'],s['own'],changed(self.state, s['torch'])
    def __enter__(self):
        self.state = torch_state()
        return self
    def __exit__(self, *a): mend_torch(self.state)

def told(before, after): # what is not as it was
    parts = [k for k in before if k!='torch' and before[k]!=after[k]]
    return [*changed(before['torch'], after['torch']),
        *(f"{k}: {diff(before[k], after[k])}" if isinstance(before[k], tuple) else k for k in parts)]

HERE = os.path.dirname(fasterprune.__file__)
class Tracer:
    "Raises KeyboardInterrupt before a line of the library runs: the n-th of all; without n it writes all down"
    def __init__(self, n=None): self.n,self.at,self.lines,self.where = n,0,[],None
    def __call__(self, frame, event, arg): return self.line if frame.f_code.co_filename.startswith(HERE) else None
    def line(self, frame, event, arg):
        if event=='line':
            if self.n is None: self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            elif self.at==self.n:
                self.where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
                self.at += 1
                raise KeyboardInterrupt
            self.at += 1
        return self.line

def traced(f, tracer):
    old = sys.gettrace()
    sys.settrace(tracer)
    try: return f()
    finally: sys.settrace(old)

@functools.cache
def reference(name): # what a whole cut leaves, and the lines that run for it
    with Case(name) as c: c.cut() # whatever is done once only
    with Case(name) as c:
        t = Tracer()
        r = traced(c.cut, t)
        assert r.removed
        return c.result(),tuple(t.lines)

def interrupted(name, n):
    "Interrupt one cut before the n-th line; says what is neither as before nor done"
    done,_ = reference(name)
    with Case(name) as c:
        before,t = c.same(),Tracer(n)
        try: traced(c.cut, t)
        except KeyboardInterrupt: pass
        after = c.same()
        wrong = told(before, after)
        if not wrong or c.result()==done: return None
        return f"interrupted before {t.where}: {'; '.join(map(str, wrong))[:300]}"

def moments(name, n, seed=0):
    "Some of all lines, and as many of those of the last part, where the cut is"
    lines,draw = reference(name)[1],random.Random(seed)
    places = {}
    for i,l in enumerate(lines): places.setdefault(l, []).append(i)
    some = [i for l in draw.sample(sorted(places), min(n//2, len(places))) for i in (draw.choice(places[l]),)]
    late = [draw.choice(places[l]) for l in draw.sample(sorted(l for l in places if places[l][-1]>.6*len(lines)),
        n-n//2)]
    return some+late

@pytest.mark.parametrize('name', CASES)
def test_interrupted_at_some_lines(name):
    "KeyboardInterrupt before a line of ours: model, copy, optimizer and torch are as before, or the cut is done"
    wrong = [w for n in moments(name, 10) if (w := interrupted(name, n))]
    assert not wrong, '\n'.join(wrong)

@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_interrupted_at_every_line(name):
    "The same before every line that runs, the first time, the last time and once between"
    lines,places = reference(name)[1],{}
    for i,l in enumerate(lines): places.setdefault(l, []).append(i)
    draw = random.Random(1)
    at = {i for v in places.values() for i in (v[0], v[-1], draw.choice(v))}
    wrong = [w for n in sorted(at) if (w := interrupted(name, n))]
    assert not wrong, f"{len(wrong)} of {len(at)}:\n"+'\n'.join(wrong[:30])

def signalled(name, seconds):
    "The same with a signal from outside, so many seconds after the cut began, wherever it is then"
    done,_ = reference(name)
    old = signal.signal(signal.SIGALRM, lambda *a: signal.raise_signal(signal.SIGINT)) # as Ctrl-C does
    try:
        with Case(name) as c:
            before = c.same()
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                c.cut()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except (KeyboardInterrupt, TypeError): pass # NumPy makes a TypeError of an interrupt in a comparison
            finally: signal.setitimer(signal.ITIMER_REAL, 0)
            after = c.same()
            wrong = told(before, after)
            if not wrong or c.result()==done: return None
            return f"signal after {seconds:.4f} s: {'; '.join(map(str, wrong))[:300]}"
    finally: signal.signal(signal.SIGALRM, old)

def took(name):
    with Case(name) as c:
        start = time.perf_counter()
        c.cut()
        return time.perf_counter()-start

def many_signals(n, seed):
    draw,wrong = random.Random(seed),[]
    for name in CASES:
        reference(name)
        whole = took(name)
        wrong += [f"{name}: {w}" for _ in range(n//len(CASES))
            if (w := signalled(name, max(draw.random()*whole*1.05, 1e-4)))]
    return wrong

def test_twenty_signals():
    wrong = many_signals(21, 0)
    assert not wrong, '\n'.join(wrong)

@pytest.mark.slow
def test_five_hundred_signals():
    wrong = many_signals(501, 1)
    assert not wrong, f"{len(wrong)} of 501:\n"+'\n'.join(wrong[:30])

@pytest.mark.parametrize('name', CASES)
def test_a_cut_after_an_interrupt_is_the_same_cut(name):
    "Interrupted in the middle and called again: what a first call would have made"
    done,lines = reference(name)
    with Case(name) as c:
        state = c.same()
        try: traced(c.cut, Tracer(len(lines)//2))
        except KeyboardInterrupt: pass
        assert not told(state, c.same())
        c.cut()
        assert c.result()==done
