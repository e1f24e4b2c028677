"Networks whose code says sizes: what is pruned runs wherever the network before runs, and is right there"
import copy, functools, inspect, io, os, pickle, subprocess, sys, traceback, types, typing
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from torch import nn
from support import sized_nets as nets
from support.kinds import fresh, holds, inner, near, quietly, silenced
from fasterprune.surgery.cutting.apply import apply_
from fasterprune.surgery.planning.plan import Plan
from fasterprune.surgery.pruner import Pruner

pytestmark = pytest.mark.filterwarnings('ignore') # the other thousand: pytest -m slow
TESTS = Path(__file__).resolve().parents[2] # where `support` is found, in other processes too

NOT = '''Base FusedBase Parent Slim Configured Child AsksForType Registered RegisteredOne OfItsKind FollowsGlobals
    LoopOfTwoSizes Switched SwitchedBlocks'''.split()
NETS = [n for n,c in vars(nets).items() if isinstance(c, type) and issubclass(c, nn.Module)
    and c.__module__==nets.__name__ and n not in NOT]+['local']
FLAT,IMAGES = ('Sections', 'SplitKeyword', 'MadeInForward', 'WrittenNorm', 'Norms'),('Windows', 'Channels')
NO_HEADS = (*FLAT, 'Channels') # nothing but widths of layers to cut
NO_SOURCE = ('Unseen', 'UnseenAttribute')
HOW = [(n, 'half') for n in NETS]+[(n, 'outer') for n in NETS if n not in NO_HEADS]

# ---- where the networks before run; `test_what_the_dense_ones_can` looks

CAN_NOT = dict(compile={'Einops'}, export={'Windows'}, strict={'Einops', 'Checkpointed'}, pickle={'local'},
    fx=set('''NanoGPT TupleShape MadeInForward Walrus HelperChain Einops Private SharedConfig TwoMeanings Checked
        Annotated Grouped Relative Windows local'''.split()),
    script=set(NETS)-set('''Literal Sdpa Root NanoGPT Keywords Sections MadeInForward Helper HelperTwice Methods
        Channels WrittenNorm Norms'''.split()))
def those(what): return [(n, how) for n,how in HOW if n not in CAN_NOT[what] | set(NO_SOURCE)]

def example(name, batch=2, long=False):
    torch.manual_seed(batch)
    if name in FLAT: return torch.randn(batch, 6)
    if name in IMAGES: return torch.randn(batch, 3, *((16, 12) if long else (8, 8)))
    return torch.randn(batch, 11 if long else 7, 32)

def others(name): return [example(name, 5), example(name, 1, True), example(name, 3, True)]
def exact(name): return dict(exact_norms=name in ('WrittenNorm', 'Norms'))

@functools.cache
def pruned(name, how): # (the network, its report, what it shall compute, the network before); nobody changes them
    m,x = fresh(getattr(nets, name)),example(name)
    dense = copy.deepcopy(m)
    r = Pruner(m, x, **exact(name)).prune(.5 if how=='half' else inner(m, x, '[outer]'))
    return m,r,silenced(dense, r.plan),dense

def compiled(m):
    torch._dynamo.reset()
    return torch.compile(m, backend='eager', fullgraph=True)

def exported(m, x, strict): # any batch
    b = torch.export.Dim('b', min=2, max=64)
    return torch.export.export(m, (x,), dynamic_shapes={next(iter(inspect.signature(m.forward).parameters)):{0:b}},
        strict=strict).module()

RUNS = dict(compile=lambda m, x: compiled(m), export=lambda m, x: exported(m, x, False), strict=lambda m,
    x: exported(m, x, True),
    fx=lambda m, x: torch.fx.symbolic_trace(m), script=lambda m, x: torch.jit.script(m))

def runs_as(what, name, how, more=True):
    m,r,want,_ = pruned(name, how)
    assert r.removed, f"nothing was cut:\n{r}"
    f,x = RUNS[what](m, example(name)),example(name)
    near(f(x), quietly(want, x))
    if more: near(f(y := example(name, 5)), quietly(want, y))

@pytest.mark.slow
@pytest.mark.parametrize('what', RUNS)
@pytest.mark.parametrize('name', NETS)
def test_what_the_dense_ones_can(what, name):
    "The demands of this file are fair: the networks before run there, at two sizes"
    if name in CAN_NOT[what]|set(NO_SOURCE): return
    m,x = fresh(getattr(nets, name)),example(name)
    f = RUNS[what](m, x)
    for y in (x, example(name, 5)): near(f(y), quietly(m, y))

# ---- the law, in eager mode

@pytest.mark.parametrize('name,how', HOW)
def test_law(name, how):
    "Cut, and equal to the network that nobody reads from, at other batches, lengths and images, and in training mode"
    m,r,want,dense = pruned(name, how)
    if name not in NO_SOURCE: assert r.removed, f"nothing was cut:\n{r}"
    for x in (example(name), *others(name)): near(quietly(m, x), quietly(want, x))
    x,m,want = example(name, 3),copy.deepcopy(m).train(),copy.deepcopy(want).train()
    near(m(x), want(x))

@pytest.mark.parametrize('name', NETS)
def test_gradients(name):
    "Parameters that stay get the gradients that they get in the network that nobody reads from"
    m,r,want,_ = pruned(name, 'half')
    m,want,x = copy.deepcopy(m),copy.deepcopy(want),example(name, 3)
    for n in (m, want):
        n.zero_grad()
        n(x).square().mean().backward()
    keep = {}
    for e in r.plan.edits: keep.setdefault(e.param, []).append((e.dim, torch.tensor(e.keep)))
    big = dict(want.named_parameters())
    for n,p in m.named_parameters():
        g = big[n].grad
        for d,k in keep.get(n, ()): g = g.index_select(d, k)
        assert (p.grad is None)==(g is None), n
        if g is not None: assert (p.grad-g).abs().max()<=1e-5*max(1., g.abs().max().item()), n

TWO_HOW = dict(
    HelperTwice=[{'qk[inner]':.5, 'qk2[inner]':.25}, {'qk[outer]':.5}, {'qk2[outer]':.5, 'qk[inner]':.25},
    {'v[inner]':.5}],
    SharedConfig=[{'a.qkv[outer]':.5}, {'b.qkv[inner]':.25}, {'a.qkv[outer]':.25, 'b.qkv[outer]':.5}],
    TwoOfAFamily=[{'a.q[outer]':.5}, {'c.q[inner]':.5, 'b.q[outer]':.25}, {'a.v[inner]':.5, 'c.q[outer]':.5}],
    LoopOfTwoSizes=[{'q[inner]':.5}, {'v[inner]':.5}], Loop=[{'v[inner]':.5}],
    TwoMeanings=[{'q[outer]':.5}, {'v[inner]':.5}], Methods=[{'v[inner]':.5}, {'q[inner]':.5}],
    Helper=[{'q[inner]':.25}, {'v[inner]':.5}], OutsideObject=[{'q[inner]':.5}])

@pytest.mark.parametrize('name,fractions', [(n, f) for n,fs in TWO_HOW.items() for f in fs])
def test_places_that_agree_no_longer(name, fractions):
    "One helper, one config, one class, one loop: sizes that were equal before and are not after"
    x = example(name)
    m,r,want = holds(getattr(nets, name), x, others(name), cut=name not in ('LoopOfTwoSizes', 'Loop', 'OutsideObject'),
        sparsity=fractions)
    if name!='OutsideObject': near(compiled(m)(x), quietly(want, x))

# ---- where it runs

FEW = '''Sdpa Root Sections MadeInForward Walrus Helper HelperTwice Methods Inherited Decorated Private Grouped Relative
    Windows WrittenNorm Mha'''.split()
def fast_and_slow(cases, fast): return [c if fast(*c) else pytest.param(*c, marks=pytest.mark.slow) for c in cases]

@pytest.mark.parametrize('name,how', fast_and_slow(those('compile'), lambda n,
    how: how=='half' or n in ('Sdpa', 'Helper', 'HelperTwice', 'Methods', 'Inherited', 'Grouped', 'Relative')))
def test_compile(name, how): runs_as('compile', name, how)

@pytest.mark.parametrize('name,how', those('fx'))
def test_fx(name, how): runs_as('fx', name, how)

@pytest.mark.parametrize('name,how', those('script'))
def test_script(name, how): runs_as('script', name, how)

@pytest.mark.parametrize('name,how', fast_and_slow(those('strict'), lambda n, how: how=='half' and n in FEW[1:12:2]))
def test_strict_export(name, how): runs_as('strict', name, how)

@pytest.mark.parametrize('name,how', fast_and_slow(those('export'), lambda n, how: how=='outer' and n in FEW[::2]))
def test_export(name, how): runs_as('export', name, how)

def onnx(m, x, **how):
    rt,out = pytest.importorskip('onnxruntime'),io.BytesIO()
    pytest.importorskip('onnxscript')
    torch.onnx.export(m, (x,), out, **how)
    session = rt.InferenceSession(out.getvalue(), providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name:x.numpy()})[0])

@pytest.mark.parametrize('name,how,dynamo', [('Helper', 'outer', False)]+[pytest.param(n, 'half', d,
    marks=pytest.mark.slow) for n in FEW for d in (True, False) if d or n not in ('Inherited', 'Private')]) # these the old exporter does not take before, either
def test_onnx(name, how, dynamo):
    m,_,want,_ = pruned(name, how)
    near(onnx(m, example(name), dynamo=dynamo), quietly(want, example(name)), 1e-4)

@pytest.mark.parametrize('name', ['Sdpa', 'Walrus', 'Methods', 'Relative', 'Sections'])
def test_functions_of_parameters(name):
    "`torch.func`: other parameters, a gradient for each example, an ensemble"
    m,_,want,_ = pruned(name, 'half')
    x = example(name)
    twice = {n:p.detach()*1.5 for n,p in m.named_parameters()}
    big = copy.deepcopy(want)
    with torch.no_grad():
        for p in big.parameters(): p.mul_(1.5)
    near(torch.func.functional_call(m, twice, (x,)), quietly(big, x))
    near(torch.func.vmap(m)(x[:,None])[:,0], quietly(want, x))
    both = torch.func.stack_module_state([m, m])
    near(torch.func.vmap(lambda p, b: torch.func.functional_call(m, (p, b), (x,)))(*both),
        torch.stack([quietly(want, x)]*2))

def vit():
    from torchvision.models import VisionTransformer
    m = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128)
    m.heads.head.reset_parameters()
    return m
def encoder(norm_first=False): return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, 0., batch_first=True,
    norm_first=norm_first), 2, enable_nested_tensor=False)
LIBRARY = dict(vit=(vit, (3,32,32)), encoder=(encoder, (7,16)), pre_norm=(functools.partial(encoder, True), (7,16)))

EVERYWHERE = [(n, w) for n in LIBRARY for w in ('compile', 'strict', 'export')]

@pytest.mark.slow
@pytest.mark.parametrize('name,what', EVERYWHERE)
def test_library_modules_before(name, what):
    "The demands are fair: the dense ones run there as in eager mode"
    make,shape = LIBRARY[name]
    x,y = torch.randn(2, *shape),torch.randn(5, *shape)
    m = fresh(make)
    with torch.no_grad():
        f = RUNS[what](m, x)
        near(f(y), m(y))

@pytest.mark.parametrize('name,what', fast_and_slow(EVERYWHERE, lambda n,
    what: what=='compile' or (n, what)==('vit', 'export')))
def test_library_modules(name, what):
    "torchvision's ViT and PyTorch's encoders, whole: what runs there is what runs in eager mode"
    make,shape = LIBRARY[name]
    x,y = torch.randn(2, *shape),torch.randn(5, *shape)
    m = fresh(make)
    assert Pruner(m, x).prune(.5).removed
    with torch.no_grad():
        f = RUNS[what](m, x)
        near(f(x), m(x))
        near(f(y), m(y))

# ---- copies

def moved(m): # the last layer gives nothing but 1
    with torch.no_grad():
        last = [c for c in m.modules() if isinstance(c, (nn.Linear, nn.Conv2d))][-1]
        last.weight, last.bias = nn.Parameter(torch.zeros_like(last.weight)),nn.Parameter(torch.ones_like(last.bias))
    return m

COPIES = dict(deepcopy=copy.deepcopy, pickle=lambda m: pickle.loads(pickle.dumps(m)),
    save=lambda m: torch.load(saved(m), weights_only=False),
    twice=lambda m: pickle.loads(pickle.dumps(copy.deepcopy(copy.deepcopy(m)))))
def saved(m):
    b = io.BytesIO()
    torch.save(m, b)
    b.seek(0)
    return b

COPIED = [(k, n, how) for k in COPIES for n,how in HOW if n not in CAN_NOT['pickle']
    and (n in FEW if k in ('deepcopy', 'pickle') else n in FEW[:6]) | (how=='half' and k=='pickle')]

@pytest.mark.parametrize('kind,name,how', COPIED)
def test_copies(kind, name, how):
    "A copy computes the same with its own weights, and is of the same classes"
    m,_,want,_ = pruned(name, how)
    c = COPIES[kind](m)
    for x in (example(name), *others(name)): near(quietly(c, x), quietly(want, x), 1e-5)
    assert [type(a) for a in c.modules()]==[type(a) for a in m.modules()] or kind!='deepcopy'
    moved(c)
    near(quietly(c, example(name)), quietly(moved(copy.deepcopy(want)), example(name)))
    near(quietly(m, example(name)), quietly(want, example(name)))

@pytest.mark.parametrize('name', NETS)
def test_shallow_copy(name):
    "`copy.copy`: another layer in the copy is used by the copy, and by it alone"
    m,_,want,_ = pruned(name, 'half')
    c,x = copy.copy(m),example(name)
    c._modules = dict(m._modules)
    c._parameters = dict(m._parameters)
    last = list(m._modules)[-1]
    c._modules[last] = moved(copy.deepcopy(m._modules[last])) if isinstance(m._modules[last],
        nn.Linear) else copy.deepcopy(m._modules[last])
    if isinstance(m._modules[last], nn.Linear) and name not in FLAT and last in ('o', 'z', 'c_proj'):
        assert not torch.allclose(quietly(c, x), quietly(m, x))
        assert quietly(c, x)[..., 0].std()<1e-6 or name=='TwoMeanings' or name=='TwoOfAFamily'
    near(quietly(m, x), quietly(want, x))

def replicas(m, scale): # as nn.parallel.replicate makes them, for one device
    ms = list(m.modules())
    new = {id(a):a._replicate_for_data_parallel() for a in ms}
    for a in ms:
        r = new[id(a)]
        for k,c in a._modules.items():
            if c is None: r._modules[k] = None
            else: setattr(r, k, new[id(c)])
        for k,p in a._parameters.items():
            if p is None: r._parameters[k] = None
            else: setattr(r, k, p*scale)
        for k,b in a._buffers.items(): r._buffers[k] = b
    return new[id(m)]

@pytest.mark.parametrize('name,how', HOW)
def test_replicas(name, how):
    "As DataParallel makes them: a replica computes with the parameters that it was given"
    m,_,want,_ = pruned(name, how)
    big,x = copy.deepcopy(want),example(name)
    with torch.no_grad():
        for p in big.parameters(): p.mul_(1.25)
        near(replicas(m, 1.25)(x), big(x))
    near(quietly(m, x), quietly(want, x))

LOAD = """
import sys, torch, pickle
if sys.argv[3]=='without': sys.modules['fasterprune'] = None
sys.path.insert(0, sys.argv[2])
for name,b,x,want in torch.load(sys.argv[1], weights_only=False):
    try: m = pickle.loads(b)
    except ImportError as e:
        print(name, 'needs' if 'fasterprune' in str(e) else e)
        continue
    with torch.no_grad(): print(name, ((m(x)-want).abs().max()/want.abs().max()).item()<1e-5)
"""
def elsewhere(tmp_path, names, how):
    rows = [(n, pickle.dumps(pruned(n, 'half')[0]), example(n, 3), quietly(pruned(n, 'half')[2], example(n, 3)))
        for n in names]
    torch.save(rows, tmp_path/'rows.pt')
    cmd = [sys.executable, '-c', LOAD, str(tmp_path/'rows.pt'), str(TESTS), how]
    p = subprocess.run(cmd, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH':os.pathsep.join(p for p in sys.path if p)})
    assert p.returncode==0, p.stderr[-2000:]
    return dict(l.split(' ', 1) for l in p.stdout.splitlines())

PICKLED = [n for n in NETS if n not in CAN_NOT['pickle']]

def test_in_another_process(tmp_path):
    "A pickle computes the same in a process that has never pruned anything"
    said = elsewhere(tmp_path, PICKLED, 'with')
    assert said==dict.fromkeys(PICKLED, 'True'), {n:s for n,s in said.items() if s!='True'}

def test_in_a_process_without_the_library(tmp_path):
    "Where a pickle needs fasterprune, the report says so, and where it does not need it, it is loaded without"
    said = elsewhere(tmp_path, PICKLED, 'without')
    assert set(said.values())<={'True', 'needs'}, said
    wrong = [n for n in PICKLED if said[n]=='needs' and 'fasterprune' not in str(pruned(n, 'half')[1])]
    assert not wrong, wrong

def test_what_says_no_size_needs_no_library():
    "Layers alone: classes stay what they were, and a pickle names nobody else"
    make = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    m,_,_ = holds(make, torch.randn(2,3,8,8), [torch.randn(5,3,9,7)], sparsity=.5)
    assert [type(a) for a in m]==[type(a) for a in make()] and b'fasterprune' not in saved(m).getvalue()

# ---- again, and elsewhere

@pytest.mark.parametrize('name', [n for n in NETS if n not in NO_SOURCE])
def test_second_pruning(name):
    "A pruned network is pruned again, by another kind of unit, and compiles still"
    m,x = copy.deepcopy(pruned(name, 'half')[0]),example(name)
    before = copy.deepcopy(m)
    how = .5 if name in NO_HEADS else inner(m, x, '[outer]')
    r = Pruner(m, x, **exact(name)).prune(how)
    assert r.removed, f"nothing was cut:\n{r}"
    want = silenced(before, r.plan)
    for y in (x, *others(name)): near(quietly(m, y), quietly(want, y))
    if name in FEW: near(compiled(m)(x), quietly(want, x))
    if name in PICKLED: near(quietly(pickle.loads(pickle.dumps(m)), x), quietly(want, x))

def test_three_times_and_back_again():
    "Each of three cuts at other fractions, and a fresh network carried through all plans"
    m,x = fresh(nets.Root),example('Root')
    other = copy.deepcopy(m)
    for f in ({'q[inner]':.25}, {'q[outer]':.25}, {'v[inner]':.5}):
        r = Pruner(m, x).prune(f)
        assert r.removed
        apply_(other, Plan.from_json(r.plan.to_json()))
        for y in (x, *others('Root')): near(quietly(other, y), quietly(m, y))

@pytest.mark.parametrize('name,how', [(n, how) for n,how in HOW if n not in NO_SOURCE])
def test_plan_on_a_fresh_network(name, how):
    "The plan as text, applied to a network that was made anew, and the state dict: the same in eager mode and compiled"
    m,r,want,_ = pruned(name, how)
    new = fresh(getattr(nets, name), seed=1)
    apply_(new, Plan.from_json(r.plan.to_json()))
    new.load_state_dict(m.state_dict())
    for x in (example(name), *others(name)): near(quietly(new, x), quietly(want, x))
    if name in FEW[:8] and how=='half': near(compiled(new)(example(name)), quietly(want, example(name)))

PLAN = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from support import sized_nets as nets
from fasterprune.surgery.cutting.apply import apply_
from fasterprune.surgery.planning.plan import Plan
for name,text,state,x,want in torch.load(sys.argv[1], weights_only=False):
    m = getattr(nets, name)().eval()
    apply_(m, Plan.from_json(text))
    m.load_state_dict(state)
    with torch.no_grad(): print(name, ((m(x)-want).abs().max()/want.abs().max()).item()<1e-5)
"""
def test_plan_in_another_process(tmp_path):
    "A plan from a file, in a process that has captured nothing"
    names = [n for n in FEW if n in PICKLED]
    rows = [(n, pruned(n, 'half')[1].plan.to_json(), pruned(n, 'half')[0].state_dict(), example(n, 3),
        quietly(pruned(n, 'half')[2], example(n, 3))) for n in names]
    torch.save(rows, tmp_path/'rows.pt')
    p = subprocess.run([sys.executable, '-c', PLAN, str(tmp_path/'rows.pt'), str(TESTS)],
        capture_output=True, text=True, env={**os.environ, 'PYTHONPATH':os.pathsep.join(p for p in sys.path if p)})
    assert p.returncode==0, p.stderr[-2000:]
    said = dict(l.split(' ', 1) for l in p.stdout.splitlines())
    assert said=={n:'True' for n in names}, said

# ---- a pruned module is what it was

@pytest.mark.parametrize('name,how', HOW)
def test_stays_an_instance_of_its_class(name, how):
    "Instances of their classes, with their signature, docstring, annotations and defaults, and nothing new on them"
    m,_,_,dense = pruned.__wrapped__(name, how) # others compile and script the one that is kept, which leaves something on it
    for (n,a),b in zip(m.named_modules(), dense.modules()):
        assert isinstance(a, type(b)) and type(a).__name__==type(b).__name__, n
        s,t = inspect.signature(a.forward),inspect.signature(b.forward)
        assert s==t and str(s)==str(t), n
        f,g = type(a).forward,type(b).forward
        assert f.__doc__==g.__doc__ and a.forward.__doc__==b.forward.__doc__ and type(a).__doc__==type(b).__doc__, n
        if name not in NO_SOURCE: assert typing.get_type_hints(f)==typing.get_type_hints(g), n
        assert f.__name__==g.__name__ and f.__module__==g.__module__, n
        assert 'forward' not in vars(a), n
        assert vars(a).keys()==vars(b).keys(), n
        assert a._forward_hooks.keys()==b._forward_hooks.keys(), n
        assert a._forward_pre_hooks.keys()==b._forward_pre_hooks.keys(), n
    assert list(m.state_dict())==list(dense.state_dict())

@pytest.mark.parametrize('name,how', HOW)
def test_no_mode_while_it_runs(name, how):
    "Nobody stands between the code and PyTorch's functions"
    m,seen,x = copy.deepcopy(pruned(name, how)[0]),[],example(name)
    look = lambda *a: seen.append((torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()))
    for c in m.modules():
        c.register_forward_pre_hook(look)
        c.register_forward_hook(look)
    quietly(m, x)
    assert seen and set(seen)=={(0,0)}

def test_source_is_found():
    "Tracebacks and `inspect.getsource` show the code that runs"
    m = copy.deepcopy(pruned('Root', 'half')[0])
    f = next((g for g in (type(m).forward, inspect.unwrap(type(m).forward)) if inspect.isfunction(g)), None)
    assert 'def forward' in inspect.getsource(f) and 'softmax' in inspect.getsource(f)
    try: m(torch.randn(2, 7, 31))
    except RuntimeError as e: lines = [l.line for l in traceback.extract_tb(e.__traceback__) if l.name=='forward'
        and 'self.q' in (l.line or '')]
    assert lines

def test_one_class_for_each_class_and_plan():
    "Blocks that lose as much run in one class"
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nets.Child(32, 4, 32),nets.Child(32, 4, 32)
        def forward(self, x): return self.b(self.a(x))
    m,r,_ = holds(Two, example('Sdpa'), sparsity={'a.q[inner]':.5, 'b.q[inner]':.5})
    assert type(m.a) is type(m.b)
    m,r,_ = holds(Two, example('Sdpa'), others('Sdpa'), sparsity={'a.q[inner]':.5, 'b.q[inner]':.25})
    assert m.a.q.out_features!=m.b.q.out_features

@pytest.mark.parametrize('name', ['Helper', 'HelperChain', 'Methods', 'Inherited', 'Decorated', 'Einops', 'Static',
    'OutsideObject', 'TwoOfAFamily'])
def test_classes_and_functions_of_others_are_left_alone(name):
    "A network that is made after the cut is whole, and so are its class, its functions and their module"
    def look(): return {k:(v, getattr(v, '__code__', None),
        dict(vars(v)) if isinstance(v, type) and v.__module__==nets.__name__ else None) for k,v in vars(nets).items()}
    before,x = look(),example(name)
    holds(getattr(nets, name), x, sparsity=.5)
    after = look()
    assert after.keys()==before.keys()
    for k in before:
        a,b = before[k],after[k]
        assert a[0] is b[0] and a[1] is b[1] and (a[2] or {}).keys()==(b[2] or {}).keys(), k
        assert all(p is b[2][i] for i,p in (a[2] or {}).items() if i not in ('__doc__', '__weakref__', '__dict__')), k
    m,old = fresh(getattr(nets, name)),pruned(name, 'half')[3]
    near(quietly(m, x), quietly(old, x), 0)

def test_globals_are_followed(monkeypatch):
    "The new code looks up what the old code looked up, when it runs"
    x = example('Sdpa')
    m,r,want = holds(nets.FollowsGlobals, x, others('Sdpa'), sparsity=.5)
    old = quietly(m, x)
    monkeypatch.setattr(nets, 'shout', lambda t: t*2)
    near(quietly(m, x), quietly(want, x))
    assert not torch.allclose(old, quietly(m, x))

def test_closures_and_defaults_are_shared():
    "A variable of the function around, changed later, and a default that is a list"
    state,log = dict(gain=1.),[]
    gain = 1.
    class Inside(nets.Base):
        def forward(self, x, log=log, *, more=2.):
            log.append(x.shape[1])
            q,k,v = (l(x).view(*x.shape[:2], self.h, self.d).transpose(1, 2) for l in (self.q, self.k, self.v))
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2],
                self.h*self.d)*gain*state['gain']*more)
    def louder():
        nonlocal gain
        gain = 3.
    x = example('Sdpa')
    m,r,want = holds(Inside, x, others('Sdpa'), sparsity=.5)
    before = quietly(m, x)
    louder()
    state['gain'] = .5
    n = len(log)
    near(quietly(m, x), quietly(want, x))
    assert len(log)==n+2 and not torch.allclose(before, quietly(m, x))
    near(m(x, more=5.), want(x, more=5.))

@pytest.mark.parametrize('name', ['AsksForType', 'RegisteredOne', 'OfItsKind'])
def test_classes_that_look_at_what_they_are(name):
    "`type(m) is Child`, `__init_subclass__` with arguments of its own, `type(self)(...)`: cut and right, or left alone"
    known = list(nets.Registered.known)
    x = example('Sdpa')
    m,r,want = holds(getattr(nets, name), x, others('Sdpa'), cut=name!='AsksForType', sparsity=.5)
    near(quietly(pickle.loads(pickle.dumps(m)), x), quietly(want, x))
    if name=='OfItsKind': assert isinstance(m.again(), nets.OfItsKind)
    assert nets.Registered.known==known

def test_forward_of_an_instance():
    "Somebody gave an instance a forward of its own: it is cut and right, or left alone, and stays where it is"
    def forward(self, x): return nets.Child.forward(self, x.flip(1))
    def make():
        m = nets.Base()
        m.forward = types.MethodType(forward, m)
        return m
    x = example('Sdpa')
    m,r,want = holds(make, x, others('Sdpa'), cut=False, sparsity=.5)
    assert m.forward.__func__ is forward or r.removed

def test_methods_besides_forward():
    "What only another method says is true after the cut as well, or the report names it"
    m,r,want,_ = pruned('Methods', 'outer')
    x = example('Methods', 3)
    try: near(m.attention_of(x), want.attention_of(x)[:,
        [i for i in range(4) if i in next(c.keep for c in r.plan.cuts if c.name=='q[outer]')]])
    except (RuntimeError, AssertionError): assert 'attention_of' in str(r)

def test_code_without_source():
    "What was made by exec has no source: an attribute that is the size is set, the rest stays, with that reason"
    for how in ('half', 'outer'):
        m,r,want,_ = pruned('Unseen', how)
        assert not r.removed and ('source' in str(r.plan) or 'exec' in str(r.plan)), f"{r.plan}"
        assert b'fasterprune' not in pickle.dumps(m)
    m,r,want,_ = pruned('UnseenAttribute', 'outer')
    assert r.removed==2 and m.h==2 and type(m) is nets.UnseenAttribute
    near(compiled(m)(example('Unseen')), quietly(want, example('Unseen')))

# ---- training

@pytest.mark.parametrize('name', ['Switched', 'SwitchedBlocks'])
def test_checkpointing(name):
    "With activation checkpointing gradients are what they are without, and those of the law"
    x = example('Sdpa')
    how = inner(fresh(getattr(nets, name)), x)
    m,r,want = holds(getattr(nets, name), x, others('Sdpa'), sparsity=how)
    def grads(m, ck):
        m.ck = ck
        m.zero_grad()
        out = m(x)
        out.square().mean().backward()
        return torch.cat([p.grad.flatten() for p in m.parameters()])
    near(grads(m, True), grads(m, False))
    def last(m): return list(m.parameters())[-1].grad
    grads(want, True),grads(m, True)
    near(last(m), last(want))

def test_trained_and_pruned_again():
    "An optimizer goes on with what stays, compiled, and the third cut is right too"
    m,x = fresh(nets.Grouped),example('Grouped')
    for f in (.25, .25, .25):
        opt = torch.optim.Adam(m.parameters(), 1e-3)
        for _ in range(2):
            m(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
        before = copy.deepcopy(m)
        r = Pruner(m, x).prune(f, optimizer=opt)
        assert r.removed
        near(quietly(m, x), quietly(silenced(before, r.plan), x))
        f = compiled(m)
        f(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        near(quietly(f, x), quietly(m, x))

# ---- functions that fx was told not to trace

def in_eight(x):
    "Says a size, and asks for another one as fx could not trace it"
    return x.reshape(x.shape[0], 8, -1) if x.shape[0]<10**6 else x
torch.fx.wrap('in_eight')

class CallsLeaf(nn.Module):
    "Calls it twice, once in a loop"
    def __init__(self): super().__init__(); self.a,self.b,self.o = nn.Linear(6, 8),nn.Linear(8, 8),nn.Linear(8, 3)
    def forward(self, x):
        for l in (self.a, self.b): x = in_eight(l(x)).relu().flatten(1)
        return self.o(x)

def test_fx_stops_at_what_stands_in_for_a_leaf():
    "A function that `torch.fx.wrap` names is a node of the graph, in the pruned network as in the dense one, each time"
    m,x,y = CallsLeaf().eval(),torch.randn(2, 6),torch.randn(5, 6)
    def leaves(g): return [n for n in g.graph.nodes if getattr(n.target, '__name__', '')=='in_eight']
    assert len(leaves(torch.fx.symbolic_trace(m)))==2
    for _ in range(2):
        before = copy.deepcopy(m)
        r = Pruner(m, x).prune(.5)
        assert r.removed and r.plan.recoded
        g = torch.fx.symbolic_trace(m)
        assert len(leaves(g))==2
        for v in (x, y):
            near(quietly(g, v), quietly(m, v))
            near(quietly(m, v), quietly(silenced(before, r.plan), v))
