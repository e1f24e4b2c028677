"Tiles, N:M, patterns, embeddings and heads on every layer type, against loops over single weights; exact counts, locally and globally; and what cannot be"
import itertools, math
import matplotlib; matplotlib.use("Agg")
import pytest, torch
from copy import deepcopy
from torch import nn
from torch.nn import functional as F
from fasterprune.core import NoEffectWarning
from fasterprune.criteria.base import criteria
from fasterprune.axes import *
from fasterprune.granularity import *
from fasterprune.granularity import block, families, n_m, one_by_n, out_vector, pattern, unit_tiles, why_not
from fasterprune.measure.gallery import exhibit, plot_gallery
from fasterprune.measure.storage import Storage, layer_storage, model_storage
from fasterprune.sparse.heads import head_dim_groups, head_groups
from fasterprune.sparse.masks import Masks
from fasterprune.sparse.sparsifier import Sparsifier
from fasterprune.surgery.coupling.couple import couple
from fasterprune.surgery.pruner import Pruner
from support.laws import rel, run

floor = lambda s, n: math.floor(s*n+1e-9)

class Every(nn.Module):
    "One layer of each type, all with channels that divide by 4 but for three; nothing is ever computed with it"
    def __init__(self):
        super().__init__()
        self.c1,self.c2,self.c3 = nn.Conv1d(4,8,3),nn.Conv2d(8,4,3),nn.Conv3d(4,4,(1,2,3))
        self.grouped,self.depthwise = nn.Conv2d(8,16,3,groups=2),nn.Conv2d(8,8,3,groups=8)
        self.t1,self.t2,self.t3 = nn.ConvTranspose1d(4,8,3),nn.ConvTranspose2d(8,8,3,groups=2),nn.ConvTranspose3d(4,4,(1,2,2))
        self.lin,self.odd,self.six = nn.Linear(8,12),nn.Conv2d(5,7,3),nn.Linear(6,6)

def net(seed=0, ties=True):
    torch.manual_seed(seed)
    m = Every().double()
    with torch.no_grad():
        for p in m.parameters(): p.copy_((p*8/p.abs().max()).round().clamp(min=-8)/4+.5 if ties else p) # many equal scores, none of them zero
        for p in m.parameters(): p.masked_fill_(p==0, .25)
    return m

# ---- the oracle: letters of the axes and channels of one group, written down once more and by hand

AXES = {nn.Conv1d:'oiw', nn.Conv2d:'oihw', nn.Conv3d:'oidhw', nn.ConvTranspose1d:'iow', nn.ConvTranspose2d:'iohw', nn.ConvTranspose3d:'iodhw', nn.Linear:'oi', nn.Embedding:'io'}

def channels(m): # that meet each other
    if isinstance(m, nn.Linear): return dict(o=m.out_features, i=m.in_features)
    return dict(o=m.out_channels//m.groups, i=m.in_channels//m.groups)

def places(m): # ((position, its coordinates by letter), ...)
    for pos in itertools.product(*map(range, m.weight.shape)): yield pos,dict(zip(AXES[type(m)], pos))

def tile_units(m, a, b, taps=False): # position → unit, in the order of the weight; None where channels do not divide
    c = channels(m)
    if c['o']%a or c['i']%b: return None
    by = dict(o=a, i=b)
    return {pos:tuple(at[l]//by.get(l, 1) for l in AXES[type(m)] if taps or l in by) for pos,at in places(m)}

def low(scored, k): return {u for _,u in sorted(scored, key=lambda r: r[:2])[:k]} # ties by position: units are tuples in the order of the weight

def gone(masks, name, m): return ~masks.keep[f'{name}.weight'].expand(m.weight.shape)

TILES = [('1x4',4,1), ('1x2',2,1), ('block2x2',2,2), ('block4x4',4,4), ('block1x4',1,4), ('block1x1',1,1), ('ovw4',4,1)]

@pytest.mark.parametrize('g,a,b', TILES)
def test_tiles_against_a_loop(g, a, b):
    model = net()
    layers = {n:(m, u) for n,m in model.named_children() if (u := tile_units(m, a, b, g.startswith('ovw'))) is not None}
    scores = {}
    for n,(m,units) in layers.items():
        s = {}
        for pos,u in units.items(): s[u] = s.get(u, 0.)+abs(m.weight[pos].item())
        scores[n] = s
    left_out = {n for n,_ in model.named_children()}-set(layers)
    for f in (0., .1, .25, .5, .57, .9, 1.):
        s = Sparsifier(model, granularity=g, criterion='l1')
        assert set(s.skipped)==left_out and all('do not divide by' in w for w in s.skipped.values())
        m = s.masks(f)
        for n,(l,units) in layers.items():
            want = low([(v, u) for u,v in scores[n].items()], k := floor(f, len(scores[n])))
            got = gone(m, n, l)
            assert m.units[n]==(k, len(scores[n])) and all(got[pos].item()==(u in want) for pos,u in units.items())
        glob = Sparsifier(model, granularity=g, context='global', criterion='l1', normalizer='none').masks(f)
        rank = {n:i for i,n in enumerate(layers)}
        want = low([(v, (rank[n], *u)) for n in layers for u,v in scores[n].items()], floor(f, sum(map(len, scores.values()))))
        for n,(l,units) in layers.items():
            got = gone(glob, n, l)
            assert all(got[pos].item()==((rank[n], *u) in want) for pos,u in units.items())

@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('g', ['1x4', 'block2x2', '2:4', '1:2', 'pattern'])
def test_what_is_reported_was_measured(g, context):
    model = net(ties=False)
    for f in (.1, .3, .45):
        m = Sparsifier(model, granularity=g, context=context).sparsify(f)
        s = Sparsifier(model, granularity=g, context=context)
        total = sum(n for _,n in m.units.values())
        assert s.measured()==m.units and s.sparsity()==pytest.approx(m.sparsity)
        assert sum(z for z,_ in m.units.values())==(floor(f, total) if context=='global' else sum(floor(f, n) for _,n in m.units.values()))
        for n,(z,_) in m.units.items(): assert int((model.get_submodule(n).weight==0).sum())==int(gone(m, n, model.get_submodule(n)).sum())==z*s.costs()[n]
        byp = Sparsifier(model, granularity=g, context=context, count='params').masks(f)
        assert byp==m or context=='global' # units of one layer are of one size

@pytest.mark.parametrize('c', ['l1', 'l2', 'linf', 'mean_abs', 'rms', 'lamp', 'fpgm', 'cosine'])
def test_criteria_score_tiles(c):
    conv = net(ties=False).c2
    w = conv.weight.detach()
    v = w.unflatten(0, (2,2)).unflatten(2, (2,4)).permute(0,2,1,3,4,5).flatten(2) # [2 tiles of outputs, 2 of inputs, weights]
    rows = v.flatten(0,1)
    sq = rows.square().sum(1)
    cos = (rows/rows.norm(dim=1, keepdim=True))@(rows/rows.norm(dim=1, keepdim=True)).T
    want = dict(l1=lambda: rows.abs().sum(1), l2=lambda: rows.norm(dim=1), linf=lambda: rows.abs().amax(1), mean_abs=lambda: rows.abs().mean(1), rms=lambda: rows.square().mean(1).sqrt(),
                lamp=lambda: torch.stack([s/sq[sq>=s].sum() for s in sq]), fpgm=lambda: torch.cdist(rows, rows).sum(1))
    s = Sparsifier(nn.Sequential(conv), granularity=block(2, 4), criterion=c)
    if not criteria[c].selects_set: got = s.scores()['0']
    if c in want: assert got.shape==(2,2,1,1) and torch.allclose(got.flatten(), want[c](), rtol=1e-10)
    if c=='cosine': assert s.masks(.25).keep['0.weight'].expand(w.shape).sum()==w.numel()*3/4

# ---- N:M

def allowed(m, n, k): # position → may it go? the k-n lowest of each k consecutive along the input; of equals the first
    where,res = {},{}
    for pos,at in places(m):
        rest = tuple(v for a,v in at.items() if a!='i')
        where.setdefault((rest, at['i']//k), []).append((abs(m.weight[pos].item()), pos))
    for ps in where.values():
        order = sorted(ps, key=lambda r: (r[0], r[1]))
        for j,(_,pos) in enumerate(order): res[pos] = j<k-n
    return res

@pytest.mark.parametrize('n,k', [(2,4), (1,4), (1,2), (3,4), (4,8), (3,8)])
def test_n_m_against_a_loop(n, k):
    model = net()
    layers = {x:m for x,m in model.named_children() if channels(m)['i']%k==0}
    s = Sparsifier(model, granularity=f'{n}:{k}')
    assert set(s.totals)==set(layers) and 'depthwise' in s.skipped and s.skipped['odd']==f'its 5 input channels do not divide by {k}'
    may = {x:allowed(m, n, k) for x,m in layers.items()}
    for f in (.1, .2, 1-n/k, None):
        if f is not None and f>1-n/k: continue
        m,g = s.masks(f),Sparsifier(model, granularity=n_m(n, k), context='global').masks(f)
        part = 1-n/k if f is None else f
        flat = {x:[(abs(l.weight[p].item()), p) for p,ok in may[x].items() if ok] for x,l in layers.items()}
        rank = {x:i for i,x in enumerate(layers)}
        both = low([(v, (rank[x], *p)) for x in layers for v,p in flat[x]], floor(part, sum(l.weight.numel() for l in layers.values())))
        for x,l in layers.items():
            want,got,wide = low(flat[x], floor(part, l.weight.numel())),gone(m, x, l),gone(g, x, l)
            assert all(got[p].item()==(p in want) and wide[p].item()==((rank[x], *p) in both) for p in may[x])
            assert m.units[x]==(floor(part, l.weight.numel()), l.weight.numel())
            if f is None or f==1-n/k: # exactly n of each k, and the same both ways
                t = (~got).movedim(AXES[type(l)].index('i'), -1).unflatten(-1, (-1,k)).sum(-1)
                assert t.unique().tolist()==[n] and torch.equal(got, wide)

def test_two_of_four_is_one_of_six_and_exactly_half():
    lin = nn.Linear(64, 64)
    m = Sparsifier(nn.Sequential(lin), granularity='2:4').sparsify()
    kinds = m.keep['0.weight'].unflatten(1, (-1,4)).flatten(0,1).unique(dim=0)
    assert len(kinds)==6 and (lin.weight!=0).sum()==2048

def test_many_of_many():
    s = torch.randint(0, 5, (6,64), generator=torch.Generator().manual_seed(0)).double() # ties
    for n,m in ((4,16), (31,32), (1,8)):
        got = n_m(n, m).rule.may_go(s, 'oi').unflatten(1, (-1,m))
        want = torch.tensor([[[j in sorted(range(m), key=lambda i: (g[i], i))[:m-n] for j in range(m)] for g in row] for row in s.unflatten(1, (-1,m)).tolist()])
        assert torch.equal(got, want)

def test_rules_on_a_schedule_are_nested_and_end_exactly():
    for g,most in (('2:4', .5), ('pattern', 5/9)):
        model,before = net(ties=False),None
        s = Sparsifier(model, granularity=g)
        for f in (.05, .2, .4, most):
            m = s.sparsify(f)
            for n,k in m.keep.items():
                assert before is None or not (k&~before.keep[n]).any()
                with torch.no_grad(): (p := model.get_parameter(n)).add_(torch.randn_like(p)*p.abs().mean()*k) # it trains on
            before = m
        for n,k in m.keep.items():
            if g=='2:4': assert k.movedim(AXES[type(model.get_submodule(n[:-7]))].index('i'), -1).unflatten(-1, (-1,4)).sum(-1).unique().tolist()==[2]
            else: assert k.sum((2,3)).unique().tolist()==[4]
        if g=='pattern': assert len(torch.cat([k.reshape(-1,9) for k in m.keep.values()]).unique(dim=0))<=8

def test_rules_where_more_was_zero_before():
    model = net(ties=False)
    with torch.no_grad(): model.lin.weight[:,:3] = 0 # three of the first four
    m = Sparsifier(model, granularity='2:4', only='lin').sparsify()
    assert m.keep['lin.weight'].unflatten(1, (-1,4)).sum(2)[:,0].unique().tolist()==[1] and m.keep['lin.weight'].unflatten(1, (-1,4)).sum(2)[:,1].unique().tolist()==[2]

def test_wanda_with_two_of_four():
    torch.manual_seed(0)
    model,xs = nn.Sequential(nn.Linear(8,8), nn.ReLU(), nn.Linear(8,4)),[(torch.randn(16,8),torch.zeros(16)) for _ in range(2)]
    for c in ('wanda', 'wanda_row'):
        m = Sparsifier(model, granularity='2:4', criterion=c, data=xs).masks()
        assert m.keep['0.weight'].unflatten(1, (-1,4)).sum(2).unique().tolist()==[2]
    size = torch.cat([x for x,_ in xs]).norm(dim=0)
    t = (model[0].weight.detach().abs()*size).unflatten(1, (-1,4))
    assert torch.equal(Sparsifier(model, granularity='2:4', criterion='wanda', data=xs).masks().keep['0.weight'], (t>=t.sort(-1).values[...,2:3]).flatten(1))

# ---- patterns

SHAPES = [tuple(sorted((4,*c))) for c in itertools.combinations((0,1,2,3,5,6,7,8), 3)]

def patterns_by_loop(kernels, k): # what stays of each, as tuples of taps
    votes = {}
    for v in kernels:
        best = sorted(range(9), key=lambda t: (v[t], t) if t!=4 else (math.inf, t))[-4:]
        votes[tuple(sorted(best))] = votes.get(tuple(sorted(best)), 0)+1
    library = sorted(SHAPES, key=lambda p: (-votes.get(p, 0), SHAPES.index(p)))[:k]
    return [max(library, key=lambda p: (sum(v[t] for t in p), -library.index(p))) for v in kernels], library

@pytest.mark.parametrize('k', [1, 2, 8, 56])
def test_patterns_against_a_loop(k):
    model = net()
    g = f'pattern{k}' if k!=8 else 'pattern'
    s = Sparsifier(model, granularity=g)
    three = {n:m for n,m in model.named_children() if tuple(m.weight.shape[2:])==(3,3)}
    assert set(s.totals)==set(three)=={'c2','grouped','depthwise','t2','odd'} and s.skipped['lin']==f'{g!r} is not defined for Linear'
    m = s.sparsify()
    kernels = torch.cat([l.weight.detach().reshape(-1,9) for l in net().children() if tuple(l.weight.shape[2:])==(3,3)]).abs().tolist()
    want,library = patterns_by_loop(kernels, k)
    got = torch.cat([m.keep[f'{n}.weight'].reshape(-1,9) for n in three])
    assert got.sum(1).unique().tolist()==[4] and got[:,4].all() and len(got.unique(dim=0))<=k
    assert [tuple(r.nonzero().flatten().tolist()) for r in got]==want and s.rule.library==tuple(library)
    assert m.units=={n:(l.weight.numel()*5//9, l.weight.numel()) for n,l in three.items()}

def test_patterns_of_ones_own_and_connectivity():
    model = net(ties=False)
    cross = pattern(library=((1,3,4,5), (1,4,5,7)))
    m = Sparsifier(model, granularity=cross).sparsify()
    assert cross.name=='pattern2' and cross.rule.k==2
    assert {tuple(r.nonzero().flatten().tolist()) for k in m.keep.values() for r in k.reshape(-1,9)}=={(1,3,4,5), (1,4,5,7)}
    both = m & Sparsifier(model, granularity='kernel', only=list(m.units)).masks(.25)
    for n,k in both.keep.items():
        per = k.sum((2,3))
        assert per.unique().tolist()==[0,4] and int((per==0).sum())==per.numel()//4

def test_a_library_that_ran_out_keeps_nothing_that_has_gone():
    rule = pattern(library=((0,1,3,4), (4,5,7,8))).rule
    s = torch.arange(1., 10).view(3,3)
    assert (~rule.may_go(s, 'hw')).flatten().nonzero().flatten().tolist()==[4,5,7,8]
    s[2,2] = -torch.inf # has gone: the other shape keeps less, but nothing that is not there
    assert (~rule.may_go(s, 'hw')).flatten().nonzero().flatten().tolist()==[0,1,3,4]

# ---- embeddings, and what is only there by name

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.lin,self.out = nn.Embedding(10,6),nn.Linear(6,6),nn.Linear(6,10,bias=False)
        self.out.weight = self.emb.weight
    def forward(self, x): return self.out(self.lin(self.emb(x)).relu())

def test_embeddings():
    torch.manual_seed(0)
    model = Words()
    assert 'emb' not in Sparsifier(model, granularity='weight').totals # only where it is asked for
    for only in ('emb', nn.Embedding, ['emb']):
        w = model.emb.weight.detach()
        row,col,one = (Sparsifier(model, granularity=g, criterion='l1', only=only).masks(.5) for g in ('row', 'column', 'weight'))
        assert torch.equal(row.keep['emb.weight'].flatten(), ~torch.isin(torch.arange(10), w.abs().sum(1).argsort()[:5])) and row.keep['emb.weight'].shape==(10,1)
        assert torch.equal(col.keep['emb.weight'].flatten(), ~torch.isin(torch.arange(6), w.abs().sum(0).argsort()[:3])) and col.keep['emb.weight'].shape==(1,6)
        assert int((~one.keep['emb.weight']).sum())==30
    s = Sparsifier(model, granularity='weight', only=['emb', 'lin', 'out'])
    assert set(s.totals)=={'lin','out'} and s.skipped=={'emb':"its weight is that of 'out'"} # once
    m = Sparsifier(model, granularity='weight', only=['lin','out']).sparsify(.5) # the mask bears the first name of the weight, and any of them will do
    assert set(m.keep)=={'emb.weight','lin.weight'} and (model.out.weight==0).sum()==30
    Masks({'out.weight':torch.zeros(10,1).bool()}).apply_(model)
    assert not model.emb.weight.any()
    with pytest.raises(ValueError, match="'kernel' .* is not defined for Embedding, whose weight has the axes i, o; choose from 'weight', 'row', 'column'$"): Sparsifier(model, granularity='kernel', only='emb')

def test_a_granularity_of_ones_own_by_name():
    granularities['pair'] = Granularity('pair', 'i', 'one tap of two filters', tiles={'o':2})
    try:
        model = nn.Sequential(nn.Conv2d(3,8,3))
        m = Sparsifier(model, granularity='pair').sparsify(.5)
        assert m.units=={'0':(18, 36)} and (model[0].weight.detach()==0).unflatten(0, (4,2)).all(2).all(1).sum()==18
    finally: del granularities['pair']
    with pytest.raises(ValueError, match="no granularity 'pair'"): Sparsifier(model, granularity='pair')

def test_values():
    assert n_m(2,4)==as_granularity('2:4')==families['2:4'] and hash(block(2,3))==hash(as_granularity('block2x3')) and as_granularity('block2×3')==block(2,3)
    assert as_granularity('ovw4')==out_vector(4) and as_granularity('1x4')==one_by_n(4)!=block(4,1) and one_by_n(4).tiles==block(4,1).tiles==(('o',4),) and as_granularity('pattern6').rule.k==6
    assert unit_tiles(nn.ConvTranspose2d(4,8,3), block(4,2))==((0,2),(1,4)) and families['head'].layers==() and families['2:4'].layers==tuple(k for k in layer_axes if k!='Embedding')
    assert pattern().layers==('Conv2d','ConvTranspose2d') and n_m(1,4).most==.75 and block(2,2).most==1.

@pytest.mark.parametrize('f,text', [
    (lambda: n_m(4,4), 'n_m: n of m stay, and 4 of 4 is no choice; n is less than m, such as n_m'), (lambda: n_m(0,4), 'n_m: n is a whole number, at least 1, not 0'), (lambda: n_m(1,1), 'n_m: m is a whole number, at least 2'),
    (lambda: block(2,1.5), 'block: b is a whole number, at least 1, not 1.5'), (lambda: one_by_n(True), 'one_by_n: n is a whole number'), (lambda: pattern(57), 'pattern: k is at most 56'),
    (lambda: pattern(library=((0,1,2,3),)), 'with the centre 4, not'), (lambda: Granularity('x','i*','', tiles={'i':2}), "tiles are of the axes 'o' and 'i', as far as they are not inside a unit, not of 'i'"),
    (lambda: Granularity('x','','', tiles={'h':2}), "not of 'h'"), (lambda: as_granularity('2-4'), "no granularity '2-4'; did you mean '2:4'?"), (lambda: reduce_units(torch.ones(5,4), (), tiles=((0,2),)), 'dimension 0 of shape .* does not divide into tiles of 2')])
def test_refused(f, text):
    with pytest.raises(ValueError, match=text): f()

def test_sparsifier_refuses():
    model = net()
    for kw,text in ((dict(granularity='2:4', only='odd'), "layer 'odd' has no units of granularity '2:4': its 5 input channels do not divide by 4"), (dict(granularity='1x4', only=['c1','depthwise']), "'depthwise' .* its 1 output channels of a group do not divide by 4"),
                    (dict(granularity='pattern', only='c3'), "'pattern' .* is not defined for Conv3d"), (dict(granularity='5:7'), "no layer of this model has units .* 'c1': its 4 input channels do not divide by 7"),
                    (dict(granularity='2:4', criterion='fpgm'), 'a single weight is no vector'), (dict(granularity='head'), 'pass an example input x')):
        with pytest.raises(ValueError, match=text): Sparsifier(model, **kw)
    s = Sparsifier(model, granularity='2:4')
    for bad in (.6, {'lin':.51}):
        with pytest.raises(ValueError, match="more than '2:4' takes, which is 0.5"): s.masks(bad)
    with pytest.raises(ValueError, match="sparsity is None, and granularity 'kernel' has none of its own"): Sparsifier(model, granularity='kernel').masks()
    assert s.masks({'lin':.5}).units['lin']==(48,96)
    with pytest.warns(NoEffectWarning): s.sparsify(.001)

# ---- heads

class Attend(nn.Module):
    "Attention by hand, its scale a number of its own"
    def __init__(self, d=12, heads=3):
        super().__init__()
        self.h,self.q,self.k,self.v,self.o = heads,nn.Linear(d,d),nn.Linear(d,d),nn.Linear(d,d),nn.Linear(d,d)
    def forward(self, x):
        q,k,v = (f(x).unflatten(-1, (self.h,-1)).transpose(1,2) for f in (self.q,self.k,self.v))
        return x+self.o(((q@k.transpose(-1,-2)*.5).softmax(-1)@v).transpose(1,2).flatten(2))

class Fused(nn.Module):
    "The same with one projection and PyTorch's operator"
    def __init__(self, d=12, heads=3): super().__init__(); self.h,self.qkv,self.o = heads,nn.Linear(d,3*d),nn.Linear(d,d)
    def forward(self, x):
        B,N,C = x.shape
        q,k,v = self.qkv(x).reshape(B, N, 3, self.h, C//self.h).permute(2,0,3,1,4).unbind(0)
        return x+self.o(F.scaled_dot_product_attention(q, k, v, scale=.5).transpose(1,2).reshape(B, N, -1))

@pytest.mark.parametrize('make', [Attend, Fused, lambda: nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.)])
def test_heads_and_their_dimensions(make):
    torch.manual_seed(0)
    model,x = nn.Sequential(make(), make()),torch.randn(2,5,12).double()
    model = model.double().eval()
    c = couple(model, x)
    assert [g.n for g in head_groups(c)]==[3,3] and sum(g.n for g in head_dim_groups(c)) in (8, 16) # query and key may have dimensions of their own
    for g in ('head', 'head_dim'):
        for context in ('local', 'global'):
            m = deepcopy(model)
            s = Sparsifier(m, x, granularity=g, context=context)
            masks = s.sparsify(.4)
            total = sum(n for _,n in masks.units.values())
            assert s.measured()==masks.units and sum(z for z,_ in masks.units.values())==(floor(.4, total) if context=='global' else sum(floor(.4, n) for _,n in masks.units.values()))
            before = run(m, x)
            r = Pruner(m, x).prune()
            assert r.removed==sum(z for z,_ in masks.units.values()) and rel(run(m, x), before)<1e-10

def test_the_lowest_heads_by_a_loop():
    torch.manual_seed(0)
    a,f,x = Attend(),Fused(),torch.randn(2,5,12)
    m = Sparsifier(a, x, granularity='head').masks(.4)
    want = sum(l.weight.detach().view(3,4,12).abs().sum((1,2)) for l in (a.q,a.k,a.v)).argmin()
    for l in 'qkv':
        for p in ('weight','bias'): assert (~m.keep[f'{l}.{p}']).flatten().view(3,4).all(1).tolist()==[i==want for i in range(3)]
    assert 'o.weight' not in m.keep
    m = Sparsifier(f, x, granularity='head').masks(.4)
    want = f.qkv.weight.detach().view(3,3,4,12).abs().sum((0,2,3)).argmin()
    assert all((~m.keep['qkv.weight']).view(3,3,4)[:,i].all()==(i==want) for i in range(3)) and int((~m.keep['qkv.weight']).sum())==12

def test_heads_where_there_are_none():
    conv = nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU(), nn.Conv2d(8,4,3), nn.Softmax(-1))
    for g in ('head', 'head_dim'):
        with pytest.raises(ValueError, match="is for attention, and no heads that can go were seen in this model, as a softmax over a table of scores and what it weighs; use granularity='filter'"): Sparsifier(conv, torch.randn(1,3,9,9), granularity=g)
    with pytest.raises(ValueError, match='left out by only or ignore'): Sparsifier(nn.Sequential(Attend(), nn.Linear(12,4)), torch.randn(2,5,12), granularity='head', only='1')
    assert [why_not(nn.Linear(4,4), g) for g in ('head','2:4')]==["'head' is not defined for Linear",'']

@pytest.mark.slow
@pytest.mark.parametrize('name', ['bert', 'llama', 'swin', 'vit'])
def test_heads_of_known_networks(name):
    torch.manual_seed(0)
    if name in ('bert','llama'):
        T = pytest.importorskip('transformers')
        small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, vocab_size=50)
        model = T.BertModel(T.BertConfig(**small)) if name=='bert' else T.LlamaModel(T.LlamaConfig(**small, num_key_value_heads=2, use_cache=False))
        x = dict(input_ids=torch.arange(12).view(2,6))
    else:
        timm = pytest.importorskip('timm')
        model = timm.models.SwinTransformer(img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2,2), num_heads=(2,4), num_classes=5) if name=='swin' else timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
        x = torch.randn(1,3,32,32).double()
    model = model.eval().double()
    out = lambda m: [o for o in run(m, x).values() if isinstance(o, torch.Tensor)] if isinstance(x, dict) else run(m, x)
    for g in ('head', 'head_dim'):
        m = deepcopy(model)
        masks = Sparsifier(m, x, granularity=g).sparsify(.5)
        assert all(z==n//2 for z,n in masks.units.values()) and len(masks.units)==(4 if name=='swin' or name=='bert' and g=='head_dim' else 3 if name=='llama' and g=='head_dim' else 2) # rotary positions are the same in all layers
        before = out(m)
        assert Pruner(m, x).prune().removed==sum(z for z,_ in masks.units.values()) and rel(out(m), before)<1e-10

# ---- what it costs

def test_storage_against_a_loop():
    torch.manual_seed(0)
    model = net(ties=False)
    width = lambda n: max(1, math.ceil(math.log2(n)))
    for g in ('weight', 'kernel', 'row', 'shared_channel', '1x4', 'block2x2', '2:4', 'pattern'):
        m = deepcopy(model)
        s = Sparsifier(m, granularity=g)
        s.sparsify(None if s.rule else .5)
        for n in s.totals:
            l,got = m.get_submodule(n),layer_storage(m.get_submodule(n), g)
            w = l.weight.detach()
            rows = w.movedim(AXES[type(l)].index('o'), 0).flatten(1)
            nz,all_ = int((w!=0).sum()),w.numel()
            assert (got['dense'].bits, got['bitmask'].bits)==(all_*64, nz*64+all_) and set(got)=={'dense','csr','bitmask','units'}
            assert got['csr'].bits==nz*64+nz*width(rows.shape[1])+(len(rows)+1)*width(nz+1)
            if g=='2:4': want = all_//2*64+all_//2*2
            elif g=='pattern': k = len(torch.unique(w.reshape(-1,9)!=0, dim=0)); want = all_//9*4*64+all_//9*width(k)+9*k
            else: z,a = s.measured()[n]; want = (a-z)*s.costs()[n]*64+a
            assert got['units'].bits==want and got['units'].nbytes==-(-want//8)
    lin = nn.Linear(8,8)
    assert 'units' not in layer_storage(lin, '2:4') and layer_storage(lin, 'filter')['small'].bits==64*32 # dense: there are no 2 of 4
    with torch.no_grad(): lin.weight[:2] = 0
    assert layer_storage(lin, 'filter')['small']==Storage(48, 48*32, 0) and layer_storage(lin, value_bits=8, index_bits=16)['csr']==Storage(48, 48*8, (48+9)*16)

def test_storage_of_a_network_counts_everything_once():
    model = Words()
    dense = sum(p.numel() for p in model.parameters())*4
    assert {f:s.nbytes for f,s in model_storage(model).items()}==dict.fromkeys(('dense','csr','bitmask','units'), dense) # nothing is zero
    Sparsifier(model, granularity='row', only='emb').sparsify(.5)
    got = model_storage(model, 'row')
    assert got['dense'].nbytes==dense and got['units'].bits==(dense-60*4)*8+30*32+10 and got['bitmask'].bits==(dense-60*4)*8+30*32+60

def test_every_name_has_an_exhibit():
    for g,v in {**granularities, **families}.items():
        if g in ('frame', 'head', 'head_dim'): continue
        e = exhibit(g)
        assert e.keep.shape==(4,4,3,3) and not e.keep.all() and 0<=e.part<1 and e.text()[0] and (e.text()[3]=='stays as zeros' or e.text()[3].startswith('removed: '))
    f = exhibit('frame', layer=nn.Conv3d(2,2,3))
    assert f.index==1/9 and len(plot_gallery([f, 'weight'], ncols=5).axes)==4

# ---- boxes: which go, on every layer type, by a loop

SAME = dict(weight='oidhw', row='oidh', column='oidw', kernel='oi', channel='odhw', shared_weight='idhw', shared_channel='dhw', shared_row='idh', shared_column='idw',
            vertical_slice='odw', horizontal_slice='odh', shared_vertical_slice='dw', shared_horizontal_slice='dh', layer='')
NEEDS = dict(row='hw', column='hw', shared_row='hw', shared_column='hw', vertical_slice='hw', horizontal_slice='hw', shared_vertical_slice='hw', shared_horizontal_slice='hw')

@pytest.mark.parametrize('g', SAME)
def test_boxes_against_a_loop(g):
    model,scores,units = net(),{},{}
    for n,m in model.named_children():
        axes = AXES[type(m)]
        same = dict(weight='oi', row='o', column='i', layer='').get(g) if isinstance(m, nn.Linear) else SAME[g] if set(NEEDS.get(g, ''))<=set(axes) else None
        if same is None: continue
        units[n] = {pos:tuple(at[a] for a in axes if a in same) for pos,at in places(m)}
        scores[n] = {}
        for pos,u in units[n].items(): scores[n][u] = scores[n].get(u, 0.)+abs(m.weight[pos].item())
    rank = {n:i for i,n in enumerate(scores)}
    for f in (.25, .57):
        m,wide = (Sparsifier(model, granularity=g, context=c, criterion='l1', normalizer=None if c=='local' else 'none').masks(f) for c in ('local', 'global'))
        both = low([(v, (rank[n], *u)) for n in scores for u,v in scores[n].items()], floor(f, sum(map(len, scores.values()))))
        assert set(m.units)==set(scores)
        for n in scores:
            l = model.get_submodule(n)
            one,got,all_ = low([(v, u) for u,v in scores[n].items()], floor(f, len(scores[n]))),gone(m, n, l),gone(wide, n, l)
            assert all(got[p].item()==(u in one) and all_[p].item()==((rank[n], *u) in both) for p,u in units[n].items())

# ---- in training, and on sparse tensor cores

@pytest.mark.parametrize('g,s', [('2:4', .5), ('pattern', 5/9), ('block2x2', .5)])
def test_in_training(g, s):
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fasterprune.callback.sparsify import SparsifyCallback
    from fasterprune.data import digits_dls
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1,8,3,padding=1), nn.ReLU(), nn.Conv2d(8,8,3,stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    dls = digits_dls(bs=256, valid_pct=.6)
    with torch.no_grad(): model(dls.one_batch()[0].cpu())
    cb = SparsifyCallback(s, g, schedule='agp', ignore='0')
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=cb)
    w = learn.model[2].weight.detach().cpu()!=0
    assert cb.measured_sparsity()==pytest.approx(s, abs=1e-3)
    if g=='2:4': assert w.unflatten(1, (2,4)).sum(2).unique().tolist()==[2]
    elif g=='pattern': assert w.sum((2,3)).unique().tolist()==[4]
    else: assert w.unflatten(0, (4,2)).unflatten(2, (4,2)).float().std((1,3,4,5)).max()==0

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_sparse_tensor_cores():
    from fasterprune.sparse.semi_structured import semi_structured_
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8192,8192), nn.ReLU(), nn.Linear(8192,8192), nn.Linear(8192,10)).half().cuda().eval()
    Sparsifier(model, granularity='2:4').sparsify()
    x = torch.randn(4096, 8192, device='cuda', dtype=torch.half)
    def time(n=20):
        with torch.no_grad():
            for _ in range(3): model(x)
            ts = []
            for _ in range(n):
                a,b = torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
                a.record(); out = model(x); b.record(); torch.cuda.synchronize()
                ts.append(a.elapsed_time(b))
        return out,sorted(ts)[n//2]
    dense,t = time()
    said = semi_structured_(model)
    sparse,u = time()
    assert said['0']==said['2']=='' and 'multiple of' in said['3'] # ten outputs are no multiple of theirs
    assert (dense-sparse).abs().max()<.01*dense.abs().max() and u<t, f"{t:.3f} ms dense, {u:.3f} ms 2:4"

# ---- what says how it is removed is removed, and nothing else changes

class Mixed(nn.Module):
    "A residual branch, kernels with padding, and two linear layers"
    def __init__(self):
        super().__init__()
        self.a,self.na,self.b,self.nb,self.c,self.head,self.out = nn.Conv2d(3,8,3,padding=1),nn.BatchNorm2d(8),nn.Conv2d(8,8,3,padding=1),nn.BatchNorm2d(8),nn.Conv2d(8,12,3,padding=1),nn.Linear(12,16),nn.Linear(16,4)
    def forward(self, x):
        x = self.na(self.a(x)).relu()
        return self.out(self.head(self.c(x+self.nb(self.b(x))).relu().flatten(2).mean(2)).relu())

REMOVED = [('filter', .5, {}), ('shared_kernel', .5, {}), ('shared_horizontal_slice', .67, {}), ('shared_vertical_slice', .67, {}), ('shared_channel', .8, {}), ('layer', {'b':1.}, {}),
           ('row', .5, dict(only='head')), ('column', .5, dict(only='out')), ('column', .5, dict(only='head'))]

@pytest.mark.parametrize('g,s,kw', REMOVED)
def test_what_can_go_goes(g, s, kw):
    assert granularities[g].how
    torch.manual_seed(0)
    model,x = Mixed().double().eval(),torch.randn(2,3,8,8).double()
    Sparsifier(model, x, granularity=g, **kw).sparsify(s)
    before,n = run(model, x),sum(p.numel() for p in model.parameters())
    Pruner(model, x).prune()
    assert rel(run(model, x), before)<1e-10 and sum(p.numel() for p in model.parameters())<n

def test_heads_in_training_and_then_cut():
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fasterprune.all import SparsifyCallback, digits_dls
    torch.manual_seed(0)
    dls = digits_dls(bs=256, valid_pct=.6)
    x = dls.one_batch()[0]
    class Net(nn.Module): # each row of the image is a token
        def __init__(self): super().__init__(); self.put,self.a,self.b,self.out = nn.Linear(x.shape[-1],12),Attend(),Fused(),nn.Linear(12,10)
        def forward(self, x): return self.out(self.b(self.a(self.put(x[:,0]))).mean(1))
    learn = Learner(dls, Net(), loss_func=CrossEntropyLossFlat())
    cb = SparsifyCallback(.4, 'head', context='global')
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=cb)
    assert sum(z for z,_ in cb.masks.units.values())==2 and cb.measured_sparsity()==pytest.approx(1/3)
    model = learn.model.double().eval()
    before = run(model, x.double())
    assert Pruner(model, x.double()).prune().removed==2 and rel(run(model, x.double()), before)<1e-10
