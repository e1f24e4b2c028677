"Kinds of surgery that once went wrong or were too shy: several networks of each, and oracles that know nothing of how the library cuts"
import warnings
from copy import deepcopy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from fasterprune.all import Budget, Plan, Pruner, Sparsifier
from fasterprune.allocation import allocate
from fasterprune.surgery.coupling.couple import couple
from support.laws import cut, other, rel, run, unread

C,L = nn.Conv2d,nn.Linear

class Net(nn.Module):
    "Parts, and a function that says what is done with them"
    def __init__(self, f, **parts):
        super().__init__()
        self.__dict__['f'] = f
        for k,v in parts.items(): setattr(self, k, v)
    def forward(self, *x): return self.f(self, *x)

def fixed(seed, f):
    "A network in double precision, always the same"
    torch.manual_seed(seed)
    return f().double().eval()

def X(*shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

@torch.no_grad()
def silent(layer, units=slice(None), bias=0.):
    "Zero filters of a layer, in place"
    layer.weight[units] = 0
    if layer.bias is not None: layer.bias[units] = bias

def dead(m, x, **kw):
    "Prune what is dead, and hold the masks' law on inputs that the pruner has not seen"
    small = deepcopy(m)
    with warnings.catch_warnings(record=True): r = Pruner(small, x).prune(**kw)
    for y in (x, other(x)): assert rel(run(small, y), run(m, y)) < 1e-6, r
    assert Plan.from_json(r.plan.to_json()) == r.plan
    return small,r

def chosen(m, x, reads=(), **how):
    "Prune by a criterion, and hold the readers' law on inputs that the pruner has not seen"
    small = deepcopy(m)
    with warnings.catch_warnings(record=True): r = Pruner(small, x).prune(**how)
    want = unread(m, r.plan, reads)
    for y in (x, other(x)): assert rel(run(small, y), run(want, y)) < 1e-9, r
    return small,r

# --- numbers of positions

POSITIONS = dict(argmax=lambda h: h.argmax(1), flat=lambda h: h.argmax(), index=lambda h: h.max(1)[1], lowest=lambda h: h.argmin(-1),
    median=lambda h: h.median(1)[1], kth=lambda h: h.kthvalue(5, 1)[0], one_hot=lambda h: F.one_hot(h.max(1)[1], 5),
    router=lambda h: h.softmax(1).topk(2, 1)[0], sort=lambda h: h.sort(1)[0], pool=lambda h: F.max_pool1d(h[None], 1, return_indices=True)[1])

@pytest.mark.parametrize('f', POSITIONS.values(), ids=POSITIONS.keys())
def test_positions_that_become_numbers_stay(f):
    m,x = fixed(0, lambda: Net(lambda s,x: f(s.b(s.a(x).relu())), a=L(6,16), b=L(16,5))),X(64,6)
    r = Pruner(m, x).prune(.5)
    assert m.b.out_features==5 and m.a.out_features==8, r

def test_values_without_their_numbers_do_not_hold_channels():
    "The largest value of all channels, and nobody asks where it stands"
    m,x = fixed(0, lambda: Net(lambda s,x: s.b(s.a(x).relu()).max(1)[0], a=L(6,16), b=L(16,6))),X(64,6)
    Pruner(m, x).prune(.5)
    assert (m.a.out_features,m.b.out_features)==(8,3)

# --- parts that are not equal

def all_three(s, x):
    p,q,r = torch.cat([s.a(x), s.b(x)], 1).relu().chunk(3, 1)
    return s.e(p)+s.h(q)+s.g(r)
CHUNKS = dict(first=lambda: Net(lambda s,x: s.e(s.a(x).relu().chunk(3, 1)[0]), a=C(1,16,1), e=C(6,5,1)),
    last=lambda: Net(lambda s,x: s.e(s.a(x).relu().chunk(3, 1)[2]), a=C(1,16,1), e=C(4,5,1)),
    of_one=lambda: Net(lambda s,x: s.e(s.a(x).relu().chunk(5, 1)[1]), a=C(1,13,1), e=C(3,5,1)),
    fewer_than_said=lambda: Net(lambda s,x: sum(c(p) for c,p in zip(s.m, s.a(x).relu().chunk(6, 1))), a=C(1,20,1), m=nn.ModuleList([C(4,5,1) for _ in range(5)])),
    all_three=lambda: Net(all_three, a=C(1,9,1), b=C(1,8,1), e=C(6,5,1), h=C(6,5,1), g=C(5,5,1)),
    said=lambda: Net(lambda s,x: sum(c(p) for c,p in zip(s.m, s.a(x).relu().split(6, 1))), a=C(1,16,1), m=nn.ModuleList([C(6,5,1),C(6,5,1),C(4,5,1)])))

@pytest.mark.parametrize('fraction', (.3,.5,.8))
@pytest.mark.parametrize('name', CHUNKS)
def test_uneven_parts(name, fraction):
    m = fixed(0, CHUNKS[name])
    _,r = chosen(m, X(2,1,6,6), sparsity=fraction)
    assert r.removed or name=='of_one'

def test_uneven_parts_that_are_dead():
    m = fixed(0, CHUNKS['all_three'])
    silent(m.a, [0,3,7]); silent(m.b, [0,5,6])
    small,r = dead(m, X(2,1,6,6))
    assert (small.e.in_channels,small.h.in_channels,small.g.in_channels)==(4,4,3), r

# --- what is given back is decided on again

def chain(*layers): return lambda: nn.Sequential(*layers)
BLIND = dict(padded=lambda: nn.Sequential(C(3,8,3,padding=1), C(8,6,3,padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), L(6,2)),
    transposed=lambda: nn.Sequential(C(3,8,3,padding=1), nn.ConvTranspose2d(8,6,3,stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), L(6,2)),
    three=lambda: nn.Sequential(C(3,8,3), nn.Sigmoid(), C(8,7,3,padding=1), nn.Sigmoid(), nn.ConvTranspose2d(7,6,3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), L(6,5), nn.ReLU(), L(5,2)),
    parts=lambda: Net(lambda s,x: s.h((lambda p: p[0]*p[1].sigmoid())(s.b(s.a(x)).chunk(2, 1)).mean((2,3))), a=C(3,8,3), b=C(8,6,3,padding=1), h=L(3,2)))

@pytest.mark.parametrize('name', BLIND)
def test_a_layer_that_is_silent_as_a_whole(name):
    m = fixed(0, BLIND[name])
    first = next(l for l in m.modules() if isinstance(l, C))
    silent(first, bias=.5)
    small,r = dead(m, X(2,3,8,8))
    assert r.error < 1e-10

# --- dead branches that run modules several times

def nested(s, x):
    x = s.a(x)
    y = s.b(x)
    y = y+s.act(s.d(s.act(y)))
    return s.h(x+s.act(s.c(y)))
def two(s, x):
    x = s.a(x)
    x = x+s.act(s.c(s.act(s.b(x))))
    return s.h(x+s.act(s.d(x)))
def gated(s, x):
    x = s.a(x)
    return s.h(x+s.act(s.b(x))*s.act(s.c(x)))
def once_outside(s, x):
    x = s.act(s.a(x))
    return s.h(s.act(x+s.act(s.c(s.act(s.b(x))))))
def gate_without_module(s, x):
    x = s.a(x)
    y = s.b(x)
    y = y+s.act(s.d(s.act(y)))
    return s.h(x+s.act(y)*torch.zeros(4, 1, 1, dtype=x.dtype))
def again(s, x):
    x = s.a(x)
    for _ in range(2): x = x+s.act(s.c(x))
    return s.h(x)

@pytest.mark.parametrize('f,gone', ((nested,4), (two,4), (gated,3), (once_outside,2), (gate_without_module,1), (again,0)), ids=lambda f: getattr(f, '__name__', ''))
@pytest.mark.parametrize('act', (nn.ReLU, nn.SiLU, nn.Sigmoid))
def test_a_branch_says_the_same_wherever_its_activation_runs(f, gone, act):
    m = fixed(0, lambda: Net(f, a=C(1,4,1), b=C(4,4,1), c=C(4,4,1), d=C(4,4,1), act=act(), h=C(4,3,1)))
    for l,bias in ((m.c,.3), (m.d,.7)): silent(l, bias=bias)
    if f is gated: silent(m.b, bias=.2)
    _,r = dead(m, X(2,1,8,8))
    assert sum(len(b.modules) for b in r.plan.branches)==gone, r

# --- a width of 1

def heads(s, x): return s.b(s.a(x).reshape(len(x), s.k, 16).transpose(1, 2))
def functional(s, x): return s.c(F.linear(s.a(x).reshape(len(x), s.k, 16).transpose(1, 2), s.b.weight, s.b.bias).relu())
def weight_only(s, x): return s.c(F.linear(s.a(x).reshape(len(x), s.k, 16).transpose(1, 2), s.b.weight).relu())
def both(s, x): return s.c(s.b(heads_of(s, x)).relu())
def heads_of(s, x): return s.a(x).reshape(len(x), s.k, 16).transpose(1, 2)

@pytest.mark.parametrize('f', (heads, functional, weight_only, both), ids=lambda f: f.__name__)
@pytest.mark.parametrize('k', (2, 3, 4))
def test_a_width_that_becomes_one(f, k):
    m = fixed(0, lambda: Net(f, k=k, a=L(16,k*16), b=L(k,8), c=L(8,3)))
    small,r = chosen(m, X(3,16), sparsity=1-1/k)
    assert small.a.out_features==16 and small.b.in_features==1, r

# --- recurrent layers

@pytest.mark.parametrize('kw', ({}, dict(num_layers=2), dict(bidirectional=True, batch_first=True), dict(num_layers=2, bidirectional=True)), ids=str)
@pytest.mark.parametrize('how', (dict(sparsity=.5), dict(sparsity={'rnn':.75}), dict(sparsity=.95), dict(budget=Budget(params=.5))), ids=str)
def test_an_lstm_stays_wider_than_its_projection(kw, how):
    m = fixed(0, lambda: Net(lambda s,x: s.fc(s.rnn(x)[0]), rnn=nn.LSTM(8, 16, proj_size=8, **kw), fc=L(16 if kw.get('bidirectional') else 8, 3)))
    x = X(4,2,8)
    r = Pruner(m, x).prune(**how)
    l = m.rnn
    assert r.removed and r.error < 1e-10 and l.proj_size < l.hidden_size
    fresh = nn.LSTM(l.input_size, l.hidden_size, proj_size=l.proj_size, **kw).double()
    fresh.load_state_dict(l.state_dict())
    assert rel(run(fresh, other(x)), run(l, other(x))) < 1e-10
    if 'budget' in how: assert r.params[1] <= .5*r.params[0]

@torch.no_grad()
def test_a_silent_lstm_stays_wider_than_its_projection():
    m = fixed(0, lambda: Net(lambda s,x: s.fc(s.rnn(x)[0]), rnn=nn.LSTM(8, 12, proj_size=8), fc=L(8, 3)))
    for n,p in m.rnn.named_parameters():
        if 'hr' not in n: p.view(4, 12, -1)[:,2:] = 0
    small,r = dead(m, X(4,2,8))
    assert small.rnn.hidden_size==9 and small.rnn.proj_size==8, r

# --- what divides the same channels is chosen once

class Rotary(nn.Module):
    "Positions are turned into queries and keys by pairs of channels that cannot go"
    def __init__(self, d=32, h=4):
        super().__init__()
        self.h,self.i,self.out = h,L(d,d),L(d,5)
        self.q,self.k,self.v,self.o = (L(d,d) for _ in range(4))
        turn = torch.outer(torch.arange(7.), 10**-torch.arange(0, 1, 2*h/d)).repeat(1, 2)
        self.register_buffer('cos', turn.cos()); self.register_buffer('sin', turn.sin())
    def turned(self, x): return x*self.cos+torch.cat([-x[...,x.shape[-1]//2:], x[...,:x.shape[-1]//2]], -1)*self.sin
    def forward(self, x):
        B,N,D = x.shape
        q,k,v = (l(self.i(x)).view(B, N, self.h, -1).transpose(1, 2) for l in (self.q, self.k, self.v))
        w = (self.turned(q)@self.turned(k).transpose(-2, -1)*(D//self.h)**-.5).softmax(-1)
        return self.out(self.o((w@v).transpose(1, 2).flatten(2)))
class RotaryByPosition(Rotary):
    def turned(self, x):
        turn = torch.outer(torch.arange(7.), 10**-torch.arange(0, 1, 2/x.shape[-1])).repeat(1, 2).to(x.dtype)
        return x*turn.cos()+torch.cat([-x[...,x.shape[-1]//2:], x[...,:x.shape[-1]//2]], -1)*turn.sin()

@pytest.mark.parametrize('net', (Rotary, RotaryByPosition))
def test_queries_and_keys_are_cut_by_default(net):
    m = fixed(0, net)
    r = Pruner(m, X(2,7,32)).prune(.5)
    for l in (m.q, m.k, m.v): assert l.out_features<32, r
    assert r.error < 1e-10

GROUPED = dict(one=(lambda: nn.Sequential(C(3,32,3), nn.ReLU(), C(32,128,3,groups=8), nn.ReLU(), C(128,4,1)), ('0','2')),
    one_d=(lambda: nn.Sequential(nn.Conv1d(3,24,1), nn.ReLU(), nn.Conv1d(24,48,3,groups=4), nn.ReLU(), nn.Conv1d(48,4,1)), ('0','2')),
    deep=(lambda: nn.Sequential(C(3,16,1), nn.BatchNorm2d(16), nn.ReLU(), C(16,64,3,groups=4), nn.BatchNorm2d(64), nn.ReLU(), C(64,32,3,groups=4), nn.ReLU(), C(32,4,1)), ('0','3','6')))

@pytest.mark.parametrize('name', GROUPED)
def test_the_layer_before_a_grouped_convolution_is_cut_by_default(name):
    net,layers = GROUPED[name]
    m,x = fixed(0, net),X(2,3,9) if name=='one_d' else X(2,3,9,9)
    small,r = chosen(m, x, sparsity=.5)
    for n in layers: assert small.get_submodule(n).out_channels<m.get_submodule(n).out_channels, r

@pytest.mark.parametrize('name', GROUPED)
def test_no_position_has_two_primary_groups(name):
    m,x = fixed(0, GROUPED[name][0]),X(2,3,9) if name=='one_d' else X(2,3,9,9)
    seen = {}
    for g in couple(m, x).groups:
        for member in g.role('write') if g.primary else ():
            for i in (member.unit>=0).nonzero()[0].tolist(): assert seen.setdefault((member.param, member.dim, i), g.name)==g.name

# --- each group loses as many, not the same

def resnext(s, x):
    x = s.i(x)
    return s.h((x+s.nc(s.c(s.nb(s.b(s.na(s.a(x)).relu())).relu()))).relu().mean((2,3)))
ANYWHERE = dict(pairs=(lambda: nn.Sequential(C(3,16,1), nn.ReLU(), C(16,32,3,groups=8), nn.ReLU(), C(32,4,1)),
        {'0':[2*g+g%2 for g in range(8)], '2':[4*g+g%4 for g in range(8)]}, 16),
    resnext=(lambda: Net(resnext, i=C(3,12,1), a=C(12,16,1,bias=False), na=nn.BatchNorm2d(16), b=C(16,16,3,padding=1,groups=4,bias=False), nb=nn.BatchNorm2d(16), c=C(16,12,1,bias=False), nc=nn.BatchNorm2d(12), h=L(12,4)),
        {'a':[0,5,10,15], 'na':[0,5,10,15], 'b':[1,2,4,7,8,9,14,15], 'nb':[1,2,4,7,8,9,14,15]}, 12),
    whole_groups_too=(lambda: nn.Sequential(C(3,16,1), nn.ReLU(), C(16,16,3,groups=4), nn.ReLU(), C(16,4,1)),
        {'0':[0,1,2,3,5,10,15], '2':[0,1,2,3,4,7,8,9,14,15]}, 10),
    other_groups_behind=(lambda: nn.Sequential(C(3,16,1), nn.ReLU(), C(16,32,3,groups=8), nn.ReLU(), C(32,24,1,groups=4), nn.ReLU(), C(24,4,1)),
        {'0':[2*g+g%2 for g in range(8)], '2':[4*g+(g+k)%4 for g in range(8) for k in (0,2)], '4':[6*g+k for g in range(4) for k in (g,5)]}, 32),
    concatenated=(lambda: Net(lambda s,x: s.o(s.g(torch.cat([s.a(x), s.b(x)], 1).relu()).relu()), a=C(3,10,1), b=C(3,6,1), g=C(16,8,3,groups=4), o=C(8,4,1)),
        {'a':[0,5,9], 'b':[5], 'g':[0,3,5,6]}, 8),
    twice=(lambda: Net(lambda s,x: s.o(s.g(s.g(s.a(x).relu()).relu()).relu()), a=C(3,16,1), g=C(16,16,3,groups=4,padding=1), o=C(16,4,1)),
        {'a':[0,5,9,14], 'g':[0,5,9,14]}, 4),
    uneven=(lambda: nn.Sequential(C(3,16,1), nn.ReLU(), C(16,16,3,groups=4), nn.ReLU(), C(16,4,1)),
        {'0':[0,1,5,10,15], '2':[0,4,9,13,14]}, 8))

@pytest.mark.parametrize('name', ANYWHERE)
def test_each_group_loses_as_many(name):
    net,zeros,removed = ANYWHERE[name]
    m = fixed(0, net)
    for n,units in zeros.items(): silent(m.get_submodule(n), units)
    small,r = dead(m, X(2,3,8,8))
    assert r.removed>=removed, r
    for c in small.modules():
        if isinstance(c, C): assert c.weight.shape[:2]==(c.out_channels, c.in_channels//c.groups)

def test_an_optimizer_follows_positions_of_each_group():
    net,zeros,_ = ANYWHERE['resnext']
    m = fixed(0, net)
    opt = torch.optim.Adam(m.parameters(), lr=0.)
    m(X(2,3,8,8)).square().sum().backward()
    opt.step()
    for n,units in zeros.items(): silent(m.get_submodule(n), units)
    was = opt.state[m.b.weight]['exp_avg'].clone()
    small = m
    Pruner(small, X(2,3,8,8)).prune(optimizer=opt)
    ins,outs = ([i for i in range(16) if i not in zeros[n]] for n in ('a','b'))
    want = torch.stack([was[o, [i%4 for i in ins if i//4==o//4]] for o in outs])
    assert torch.equal(opt.state[m.b.weight]['exp_avg'], want)

# --- a share for each layer

SHARED = dict(equal=(lambda: Net(lambda s,x: s.o(torch.cat([s.a(x), s.b(x)], 1)+s.c(x)), a=C(3,8,1), b=C(3,8,1), c=C(3,16,1), o=C(16,4,1)), dict(a=4, b=4, c=8)),
    crossed=(lambda: Net(lambda s,x: s.o(torch.cat([s.a(x), s.b(x)], 1)+torch.cat([s.c(x), s.d(x)], 1)), a=C(3,4,1), b=C(3,12,1), c=C(3,8,1), d=C(3,8,1), o=C(16,4,1)), dict(a=2, b=6, c=4, d=4)),
    three=(lambda: Net(lambda s,x: s.o(torch.cat([s.a(x), s.b(x), s.c(x)], 1)+s.d(x)), a=L(3,6), b=L(3,10), c=L(3,2), d=L(3,18), o=L(18,4)), dict(a=3, b=5, c=1, d=9)))

def widths(m, names): return {n: getattr(m, n).weight.shape[0] for n in names}

@pytest.mark.parametrize('name', SHARED)
def test_each_layer_loses_its_share(name):
    net,want = SHARED[name]
    m,x = fixed(0, net),X(2,3) if name=='three' else X(2,3,5,5)
    with torch.no_grad(): m.a.weight.mul_(.01)
    small,r = chosen(m, x, sparsity=.5)
    assert widths(small, want)==want, r
    Sparsifier(m, x, granularity='filter').sparsify(.5)
    small,r = dead(m, x)
    assert widths(small, want)==want, r

def test_classes_are_exact():
    "In all exactly the part that was asked for, and in each class its part rounded down or one more"
    g = torch.Generator().manual_seed(0)
    for sizes in ((5,7), (1,1,1,1), (3,11,2), (8,8)):
        for part in (.3,.5,.77):
            classes = torch.cat([torch.full((n,), i) for i,n in enumerate(sizes)])[torch.randperm(sum(sizes), generator=g)].numpy()
            s = torch.rand(sum(sizes), generator=g)
            k = allocate({'a':s}, part, classes={'a':classes})['a'].numpy()
            assert (~k).sum()==int(part*sum(sizes)+1e-9)
            for i,n in enumerate(sizes):
                gone = ~k[classes==i]
                assert gone.sum()-int(part*n+1e-9) in (0,1)
                own = s.numpy()[classes==i]
                assert not gone.any() or gone.all() or own[gone].max()<own[~gone].min()

# --- norms of weights

def two_layers(f): return lambda: nn.Sequential(f(C(3,16,3)), nn.ReLU(), f(C(16,8,3)), nn.ReLU(), C(8,4,1))
def turned(f): return lambda: nn.Sequential(f(C(3,16,3)), nn.ReLU(), f(nn.ConvTranspose2d(16,8,3,bias=False)), nn.ReLU(), C(8,4,1))
def matrices(f): return lambda: nn.Sequential(f(L(3,16)), nn.ReLU(), f(L(16,8)), nn.ReLU(), L(8,4))
@torch.no_grad()
def plain(m, net):
    "The same network with weights that are numbers, as they are now"
    res = fixed(0, net(lambda l: l))
    for big,l in zip(res, m):
        if hasattr(l, 'weight'): big.weight.copy_(l.weight)
        if getattr(l, 'bias', None) is not None: big.bias.copy_(l.bias)
    return res

@pytest.mark.parametrize('net', (two_layers, turned, matrices))
def test_weight_norm_is_cut_exactly(net):
    "The weights that stay are what they were: an oracle of plain weights with the columns zeroed"
    m = fixed(0, net(weight_norm))
    x = X(5,3) if net is matrices else X(2,3,9,9)
    small,ema = deepcopy(m),deepcopy(m)
    with torch.no_grad():
        for p in ema.parameters(): p.mul_(1.1)
    want = [plain(m, net),plain(ema, net)]
    r = Pruner(small, x).prune(.5, also=[ema])
    assert r.removed==12, r
    keep = {(e.param.split('.')[0], e.dim):e.keep for e in r.plan.edits if 'original1' in e.param or e.param=='4.weight'}
    for big,got in zip(want, (small, ema)):
        with torch.no_grad():
            for n in ('2','4'):
                w,dim = big.get_submodule(n).weight,0 if isinstance(big.get_submodule(n), nn.ConvTranspose2d) else 1
                w.index_fill_(dim, torch.tensor([i for i in range(w.shape[dim]) if i not in keep[n,dim]]), 0)
        for y in (x, other(x)): assert rel(run(got, y), run(big, y)) < 1e-9
    sizes = ('in_features','out_features') if net is matrices else ('in_channels','out_channels')
    assert [tuple(getattr(l, k) for k in sizes) for l in small[::2]]==[(3,8),(8,4),(4,4)]

@pytest.mark.parametrize('net', (two_layers, matrices))
@pytest.mark.parametrize('norm', (spectral_norm, lambda m: weight_norm(m, dim=None)), ids=('spectral_norm', 'weight_norm of all'))
def test_other_norms_say_what_to_do(net, norm, request):
    m = fixed(0, net(norm))
    x = X(5,3) if net is matrices else X(2,3,9,9)
    with warnings.catch_warnings(record=True): r = Pruner(m, x).prune(.5)
    assert not r.removed and ('remove spectral_norm' if norm is spectral_norm else 'remove weight_norm') in str(r)

# --- axes of no positions, sums of what the code makes

def with_registers(s, x): return s.b(torch.cat([s.reg.expand(len(x), -1, -1), s.a(x)], 1)+s.a(x))
def with_heads(s, x):
    r = s.reg.expand(len(x), -1, -1).unflatten(-1, (4, -1))
    return s.b(torch.cat([r, s.a(x).unflatten(-1, (4, -1))], 1).flatten(2))
def split_off(s, x):
    p,q = torch.cat([s.reg.expand(len(x), -1, -1), s.a(x)], 1).split([0, x.shape[1]], 1)
    return s.b(q)+p.sum()
@pytest.mark.parametrize('f', (with_registers, with_heads, split_off), ids=lambda f: f.__name__)
def test_axes_of_no_positions(f):
    m = fixed(0, lambda: Net(f, a=L(8,16), b=L(16,4), reg=nn.Parameter(torch.randn(1,0,16))))
    _,r = chosen(m, X(2,5,8), sparsity=.5)
    assert r.removed>0, r

MADE = dict(ones=lambda s,x: s.b(s.a(x).relu())+torch.ones(len(x), 5).sum(1, keepdim=True),
    mask=lambda s,x: s.b((s.a(x).relu()*torch.ones(len(x), 16)))/torch.full((len(x),3), 2.).sum(1, keepdim=True),
    norm=lambda s,x: s.b(s.a(x).relu())*torch.linalg.vector_norm(torch.ones(len(x), 7), dim=1, keepdim=True))
@pytest.mark.parametrize('f', MADE.values(), ids=MADE.keys())
def test_sums_of_what_the_code_makes(f):
    m = fixed(0, lambda: Net(f, a=L(8,16), b=L(16,4)))
    silent(m.a, range(8))
    _,r = dead(m, X(3,8))
    assert r.removed==8, r

# --- sums over neighbours, deformable convolutions, Fourier transforms

def graph(how):
    def f(s, x):
        h = s.a(x).relu()
        src,dst = s.edges
        return s.c(s.b(how(h, dst, h[src])).relu())
    return lambda: Net(f, a=L(6,16), b=L(16,12), c=L(12,3), edges=nn.Parameter(torch.tensor([[0,1,2,3,4,0],[1,2,3,4,0,2]]), requires_grad=False))
GRAPHS = dict(scatter_add=lambda h,i,m: torch.zeros_like(h).scatter_add(0, i[:,None].expand_as(m), m),
    in_place=lambda h,i,m: h.new_zeros(len(h), m.shape[1]).scatter_add_(0, i[:,None].expand(-1, m.shape[1]), m),
    mean=lambda h,i,m: torch.zeros_like(h).scatter_reduce(0, i[:,None].expand_as(m), m, 'mean', include_self=False),
    index_add=lambda h,i,m: h.index_add(0, i, m, alpha=.5), index_copy=lambda h,i,m: h.index_copy(0, i, m),
    index_put=lambda h,i,m: torch.zeros_like(h).index_put_((i,), m, accumulate=True))

@pytest.mark.parametrize('how', GRAPHS.values(), ids=GRAPHS.keys())
def test_messages_between_nodes(how):
    m,x = fixed(0, graph(how)),X(5,6)
    small = deepcopy(m)
    r = Pruner(small, x).prune(.5)
    assert r.removed==14 and rel(run(small, x.flip(0)), run(unread(m, r.plan), x.flip(0))) < 1e-9, r
    silent(m.a, range(8)); silent(m.b, [1,4,6])
    small = deepcopy(m)
    r = Pruner(small, x).prune()
    assert r.removed==11 and rel(run(small, x.flip(0)), run(m, x.flip(0))) < 1e-9, r

def deformed(mask=False, **kw):
    from torchvision.ops import DeformConv2d
    def f(s, x):
        h = s.a(x).relu()
        return s.c(s.d(h, s.off(h), s.m(h).sigmoid() if mask else None).relu())
    og = kw.pop('of', 1)
    return lambda: Net(f, a=C(3,16,1), off=C(16,18*og,3,padding=1), m=C(16,9*og,3,padding=1), d=DeformConv2d(16,8,3,padding=1,**kw), c=C(8,4,1))
@pytest.mark.parametrize('kw,removed', ((dict(),12), (dict(mask=True),12), (dict(groups=2),8), (dict(of=2),4)), ids=str)
def test_deformable_convolutions(kw, removed):
    pytest.importorskip('torchvision')
    m,x = fixed(0, deformed(**kw)),X(2,3,8,8)
    r = Pruner(small := deepcopy(m), x).prune(.5)
    assert r.removed>=min(removed, 4) and r.error < 1e-10, r
    silent(m.d, [0,3,5]); silent(m.a, [2,10])
    small,r = dead(m, x)
    assert small.d.out_channels==small.d.weight.shape[0]<8 and r.removed>=3, r

def filtered(s, x): return s.b(torch.fft.irfft2(torch.fft.rfft2(s.a(x).relu(), norm='ortho')*torch.view_as_complex(s.w), s=(8,8), norm='ortho'))
def operator(s, x):
    f = torch.fft.rfft2(s.a(x).relu())
    o = torch.zeros(len(x), 12, 8, 5, dtype=f.dtype)
    o[:,:,:4,:3] = torch.einsum('bixy,ioxy->boxy', f[:,:,:4,:3], torch.view_as_complex(s.v))
    return s.c(torch.fft.irfft2(o, s=(8,8)))
def spectrogram(s, x):
    f = torch.fft.rfft(s.a(x))
    f = torch.complex(f.real.relu(), f.imag.relu())
    return s.b(f.abs()+f.angle().cos())
WAVES = dict(filtered=(lambda: Net(filtered, a=C(3,16,1), b=C(16,4,1), w=nn.Parameter(torch.randn(16,8,5,2))), X(2,3,8,8), ()),
    operator=(lambda: Net(operator, a=C(3,16,1), c=C(12,4,1), v=nn.Parameter(torch.randn(16,12,4,3,2))), X(2,3,8,8), (('v',0),)),
    spectrogram=(lambda: Net(spectrogram, a=nn.Conv1d(2,16,3,padding=1), b=nn.Conv1d(16,4,1)), X(2,2,20), ()))
@pytest.mark.parametrize('name', WAVES)
def test_fourier_transforms_over_other_axes(name):
    net,x,reads = WAVES[name]
    m = fixed(0, net)
    small,r = chosen(m, x, reads, sparsity=.5)
    assert small.a.out_channels==8, r
    silent(m.a, range(8))
    small,r = dead(m, x)
    assert small.a.out_channels==8 or name=='spectrogram', r
