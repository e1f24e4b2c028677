"""A plan is data: it is looked at as a whole before the first cut, and what comes from a file is refused in words or carried out as it was made"""
import copy, json, random, warnings
from dataclasses import dataclass, replace
import pytest, torch
from torch import nn
from fasterprune.all import *
from fasterprune.surgery.cutting.apply import size_attributes
from fasterprune.surgery.planning.plan import Attr, Cut, Edit, plan_version
from fasterprune.surgery.planning.folding import Fold
from fasterprune.surgery.planning.values import checked, digest

pytestmark = pytest.mark.filterwarnings('ignore')
C = nn.Conv2d

def mlp(): return nn.Sequential(nn.Linear(6,8), nn.ReLU(), nn.Linear(8,4))
def silent(): # with constants, a smaller kernel and a layer that gets a bias
    torch.manual_seed(0)
    m = nn.Sequential(C(3,8,3), nn.BatchNorm2d(8), nn.ReLU(), C(8,6,3, bias=False), nn.ReLU(), C(6,6,1,groups=2), nn.Flatten(), nn.Linear(96,4)).eval()
    with torch.no_grad():
        m[1].weight[:4],m[1].bias[:3] = 0,.5
        m[3].weight[:,:,:,2] = 0
    return m
class Residual(nn.Module): # with a branch that is dead
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.d = nn.Linear(6,8),nn.Linear(8,12),nn.Linear(12,8),nn.Linear(8,3)
    def forward(self, x):
        x = self.a(x)
        return self.d(x+self.c(self.b(x).relu()))
def branch():
    m = Residual().eval()
    with torch.no_grad(): m.c.weight.zero_(), m.c.bias[2:4].fill_(.5), m.a.weight[0].zero_(), m.a.bias[0].zero_()
    return m
class Heads(nn.Module): # whose code says sizes
    def __init__(self):
        super().__init__()
        self.heads,self.width = 4,8
        self.q,self.o = nn.Linear(32,96),nn.Linear(32,5)
    def forward(self, x):
        q,k,v = self.q(x).view(*x.shape[:2], 3, self.heads, self.width).permute(2,0,3,1,4)
        return self.o(((q@k.mT)*.3).softmax(-1).matmul(v).transpose(1,2).flatten(2))

class Views(nn.Module): # whose code says sizes in its calls
    def __init__(self):
        super().__init__()
        self.q,self.o = nn.Linear(32,96),nn.Linear(32,5)
        nn.init.normal_(self.q.weight)
    def forward(self, x):
        q,k,v = self.q(x).reshape(*x.shape[:2], 3, 4, 8).permute(2,0,3,1,4)
        return self.o(((q@k.mT)*.3).softmax(-1).matmul(v).transpose(1,2).flatten(2))

MODELS = {'views': (lambda: Views().eval(), torch.randn(2,3,32), dict(sparsity=.5)), 'mlp': (mlp, torch.randn(2,6), dict(sparsity=.5)), 'constants': (silent, torch.randn(2,3,8,8), {}), 'branch': (branch, torch.randn(2,6), {}),
    'heads': (lambda: Heads().eval(), torch.randn(2,3,32), dict(sparsity=.5))}

def plan_of(name):
    make,x,how = MODELS[name]
    torch.manual_seed(1)
    return Pruner(make(), x).plan(**how)

def state(m): # everything that a plan could change
    plain = {n:{k:v for k,v in vars(s).items() if isinstance(v, (int,float,str,tuple,bool))} for n,s in m.named_modules()}
    return {n:t.clone() for n,t in m.state_dict().items()},plain,[(n,type(s)) for n,s in m.named_modules()]

def same(a, b): return a[0].keys()==b[0].keys() and all(torch.equal(t, b[0][n]) for n,t in a[0].items()) and a[1:]==b[1:]

def refused(f, m, *words):
    was = state(m)
    with pytest.raises((ValueError, TypeError, PruningError)) as e: f()
    assert same(was, state(m)), 'the model was changed'
    assert all(w in str(e.value) for w in words), str(e.value)
    return str(e.value)

def resealed(d): return json.dumps({**d, 'digest':digest({k:v for k,v in d.items() if k not in ('format','version','digest')})})

# ---- what was written is read again

@pytest.mark.parametrize('name', MODELS)
def test_a_plan_is_read_as_it_was_written(name):
    p = plan_of(name)
    text = p.to_json()
    assert Plan.from_json(text)==p and json.loads(text)['version']==plan_version
    assert Plan.from_json(json.dumps(json.loads(text), indent=2, sort_keys=True))==p # laid out anew

# ---- refused in words

@pytest.mark.parametrize('bad', [[99], [-1], ['a'], [0,0], [1.5], [], [None], [True], [[1]], [10**30], None, 3, 'x', {}, [2,1]])
@pytest.mark.parametrize('sealed', [False, True])
def test_positions_that_are_none(bad, sealed):
    d = json.loads(plan_of('mlp').to_json())
    for part,i in (('edits',-1), ('edits',0), ('cuts',0)):
        q = copy.deepcopy(d)
        q[part][i]['keep'] = bad
        m = mlp()
        refused(lambda: apply_(m, Plan.from_json(resealed(q) if sealed else json.dumps(q))), m)

@pytest.mark.parametrize('change,words', [
    (lambda d: d.update(version=plan_version+1), 'version'), (lambda d: d.pop('version'), 'version'), (lambda d: d.update(version='1'), 'version'),
    (lambda d: d.pop('format'), 'format'), (lambda d: d.update(format='Masks'), 'format'), (lambda d: d.update(more=1), "'more'"), (lambda d: d.pop('folds'), "'folds'"),
    (lambda d: d['edits'][0].update(more=1), "edits[0] has no 'more'"), (lambda d: d['edits'][0].pop('n'), "edits[0] lacks 'n'"),
    (lambda d: d['edits'][0].update(n=9), 'another model'), (lambda d: d['edits'][0].update(dim=7), 'dimension'), (lambda d: d['edits'][0].update(dim=-1), 'dimension'),
    (lambda d: d['edits'][0].update(param='9.weight'), 'another model'), (lambda d: d['edits'].append(d['edits'][0]), 'twice'),
    (lambda d: d['edits'][1].update(keep=[0]), 'numbers in its bias')])
def test_other_fields_and_versions(change, words):
    d,m = json.loads(plan_of('mlp').to_json()),mlp()
    change(d)
    refused(lambda: apply_(m, Plan.from_json(resealed(d))), m, words)

@pytest.mark.parametrize('text', ['', '{', 'null', '[]', '3', '"plan"', '['*100000, b'\xff\xfe', '{"format": "Plan", "version": 1}'])
def test_no_plan_at_all(text): refused(lambda: Plan.from_json(text), mlp(), 'no Plan')
def test_something_else_than_text(): refused(lambda: Plan.from_json(dict(a=1)), mlp(), 'text')

def test_a_swap_that_no_type_sees():
    d = json.loads(plan_of('mlp').to_json())
    keep = d['edits'][0]['keep']
    other = sorted({*keep[1:], next(i for i in range(8) if i not in keep)})
    d['edits'][0]['keep'] = other # as many as before, and others than the bias and the reader keep
    refused(lambda: Plan.from_json(json.dumps(d)), mlp(), 'changed since it was written')

@pytest.mark.parametrize('module,name,value', [('0','stride',1), ('0','__class__',1), ('0','forward',1), ('0','weight',1), ('0','training',0), ('0','nowhere',1),
    ('9','in_features',1), ('0','in_features',7), ('0','in_features',-1), ('0','out_features',(1,2)), ('0','out_features',True), ('0','x y',1), ('','training',1), ('0','_backward_hooks',1)])
def test_attributes_that_are_no_sizes(module, name, value):
    p,m = plan_of('mlp'),mlp()
    refused(lambda: apply_(m, replace(p, attrs=(Attr(module, name, value),))), m)

def test_sizes_of_own_modules_are_set():
    m = Heads()
    from fasterprune.surgery.cutting.apply import check_plan
    check_plan(m, Plan((), attrs=(Attr('', 'heads', 2),)))
    for bad in (Attr('', 'heads', 5), Attr('', 'heads', (2,)), Attr('', 'hands', 2)): refused(lambda: check_plan(m, Plan((), attrs=(bad,))), m, bad.name)
    assert 'stride' not in size_attributes

@pytest.mark.parametrize('fold', [Fold('bias','7.bias',(float('nan'),)*4), Fold('bias','7.bias',(float('inf'),)*4), Fold('bias','7.bias',(1.,)*3), Fold('bias','7.bias',()), Fold('bias','7.nothing',(1.,)*4),
    Fold('other','7.bias',(1.,)*4), Fold('new','7',(1.,)*4), Fold('new','1',(1.,)*8), Fold('new','3',(1.,)*5), Fold('mean','7.bias',('a',)*4), Fold('bias','7.bias',(1.,)*4,float('nan')), Fold('bias',7,(1.,)*4)])
def test_constants_that_are_none(fold):
    m = silent()
    refused(lambda: apply_(m, Plan((), folds=(fold,))), m)

def test_plans_that_code_makes_are_checked_as_well():
    for bad in (Plan(3), Plan((), edits=(Edit('0.weight', 0, 8, [0,1]),)*2), Plan((), edits=(Cut('0', 8, (0,)),)), Plan((Cut('0', 8, (8,)),)), Plan((Cut('0', 0, ()),)), Plan((), edits=(Edit('0.weight', 0, 8, ()),))):
        m = mlp()
        refused(lambda: apply_(m, bad), m)

def test_half_of_a_branch_is_put_back():
    p,m = plan_of('branch'),branch()
    assert p.branches
    bad = replace(p, edits=(*p.edits, Edit('d.weight', 1, 8, (0,))), attrs=(Attr('d', 'bias', 1),))
    opt = torch.optim.Adam(m.parameters())
    groups = [len(g['params']) for g in opt.param_groups]
    refused(lambda: apply_(m, bad, opt), m)
    assert groups==[len(g['params']) for g in opt.param_groups]
    apply_(m, replace(p, folds=()), opt)

def test_new_fields_are_checked_without_further_code():
    @dataclass(frozen=True)
    class Said:
        order:tuple[int,...]
        scale:float|None=None
    assert checked(Said, dict(order=[1,2], scale=None), 'said')==Said((1,2))
    for bad in (dict(order=['a'], scale=None), dict(order=[1], scale='x'), dict(order=[1]), dict(order=[1], scale=float('nan')), 3):
        with pytest.raises(ValueError, match='said'): checked(Said, bad, 'said')

# ---- two hundred and more

POOL = [0, 1, -1, 2, 7, 8, 9, 99, 10**9, 10**40, 1.5, 1e308, float('inf'), float('nan'), '', 'a', '0.weight', '__class__', 'forward', 'stride', None, True, False, [], [0], [0,0], [-1], {}, {'a':1}, [[]], 'x'*3000]

def places(o, at=()): # Every place in a nest
    yield at
    for k,v in (o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ()): yield from places(v, (*at, k))

def mutated(d, rng):
    d = copy.deepcopy(d)
    at = rng.choice([p for p in places(d) if p and p[0] not in ('format','version','digest')])
    o = d
    for k in at[:-1]: o = o[k]
    how = rng.choice(['set','set','cut','twice','swap','name'])
    if how=='cut': del o[at[-1]]
    elif how=='twice' and isinstance(o, list): o.append(copy.deepcopy(o[at[-1]]))
    elif how=='swap' and isinstance(o, list): rng.shuffle(o)
    elif how=='name' and isinstance(o, dict): o[f"{at[-1]}x"] = o.pop(at[-1])
    else: o[at[-1]] = rng.choice(POOL)
    return d

@pytest.mark.parametrize('name', MODELS)
def test_mutated_plans_are_refused_or_carried_out_as_they_were(name):
    make,x,_ = MODELS[name]
    p,rng = plan_of(name),random.Random(name)
    d,refusals = json.loads(p.to_json()),0
    torch.manual_seed(1); m = make()
    was = state(m)
    for i in range(150): # the text is not what was written
        q = mutated(d, rng)
        if q==d: continue
        try: text = json.dumps(q)
        except ValueError: continue
        try: apply_(m, Plan.from_json(text))
        except (ValueError, TypeError, PruningError) as e: assert len(str(e))>20
        else: raise AssertionError(f"carried out: {text[:300]}")
        assert same(was, state(m))
        refusals += 1
    assert refusals>100

@pytest.mark.parametrize('name', MODELS)
def test_mutated_plans_with_a_seal_of_their_own(name): # what types, ranges and the model say, without the digest
    make,x,_ = MODELS[name]
    p,rng = plan_of(name),random.Random(f"sealed {name}")
    d,refusals = json.loads(p.to_json()),0
    for i in range(100):
        q = mutated(d, rng)
        torch.manual_seed(1); m = make()
        was = state(m)
        try: apply_(m, Plan.from_json(resealed(q)))
        except (ValueError, TypeError, PruningError) as e:
            assert len(str(e))>20 and same(was, state(m)), f"{e}: {q}"
            refusals += 1
            continue
        for n,l in m.named_modules(): # what was carried out leaves layers that are layers
            if isinstance(l, (nn.Linear, C)) and l.bias is not None: assert len(l.bias)==len(l.weight)
            if isinstance(l, nn.Linear): assert (l.out_features, l.in_features)==tuple(l.weight.shape)
    assert refusals>30

# ---- a plan that folds constants, and a network that has other weights

@pytest.mark.parametrize('name', ['constants', 'branch'])
def test_made_again_from_a_plan_and_weights(name):
    make,x,how = MODELS[name]
    m,f = make(),make()
    r = Pruner(m, x).prune(**how)
    for t in f.parameters(): nn.init.normal_(t) if t.dim()<2 else nn.init.xavier_normal_(t)
    text = r.plan.to_json()
    if r.plan.folds:
        with pytest.warns(PruningWarning, match='made of other weights.*load the weights'): apply_(f, Plan.from_json(text))
    else: apply_(f, Plan.from_json(text))
    f.load_state_dict(m.state_dict())
    with torch.no_grad(): assert torch.equal(f(x), m(x))

def test_dead_plan_elsewhere():
    net = lambda: nn.Sequential(C(3,8,3), nn.ReLU(), C(8,6,3), nn.ReLU(), nn.Flatten(), nn.Linear(96,4))
    m,x = net(),torch.randn(2,3,8,8)
    with torch.no_grad(): m[0].weight[:4] = 0
    r = Pruner(m, x).prune()
    f = net()
    apply_(f, Plan.from_json(r.plan.to_json()), later=True)
    f.load_state_dict(m.state_dict())
    with torch.no_grad(): assert torch.equal(f(x), m(x))

def test_constants_of_other_weights_are_left_out_and_told():
    m,x = silent(),torch.randn(2,3,8,8)
    p,f = Pruner(m, x).plan(),silent()
    assert p.folds
    with torch.no_grad():
        for q in f.parameters(): q.mul_(1.3)
    biases = {k.name:f.get_parameter(k.name).clone() for k in p.folds if k.kind=='bias'}
    with pytest.warns(PruningWarning, match='no constant was moved'): apply_(f, p)
    for n,b in biases.items(): assert set(f.get_parameter(n).tolist())<=set(b.tolist())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        apply_(silent(), p) # these are the weights
        apply_(copy.deepcopy(silent()), replace(p, folds=()))

def test_the_same_weights_get_their_constants():
    m,x = silent(),torch.randn(2,3,8,8)
    f = copy.deepcopy(m)
    with torch.no_grad(): want = m(x)
    p = Pruner(m, x).plan()
    apply_(f, Plan.from_json(p.to_json()))
    with torch.no_grad(): assert (f(x)-want).abs().max()<1e-5
