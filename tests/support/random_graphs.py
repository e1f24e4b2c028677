"Random networks: convolutions, attention, norms, recurrent layers, several inputs and outputs"
import dataclasses, math
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

# ---- convolutional graphs

ACTS = nn.Identity, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.Tanh, nn.LeakyReLU, nn.PReLU, nn.Softplus
SIZES = 2, 3, 4, 6, 8, 12

def act(k, n): return nn.PReLU(n) if ACTS[k%len(ACTS)] is nn.PReLU else ACTS[k%len(ACTS)]()

def norm(k, n): return (nn.Identity(), nn.BatchNorm2d(n), nn.BatchNorm2d(n, affine=False), nn.BatchNorm2d(n), nn.InstanceNorm2d(n, affine=True))[k%5]

def divisors(*ns): return [g for g in range(1, min(ns)+1) if all(n%g==0 for n in ns)]

class Gate(nn.Module):
    "Squeeze and excitation"
    def __init__(self, n, k, a): super().__init__(); self.a,self.b,self.act = nn.Conv2d(n,k,1),nn.Conv2d(k,n,1),act(a, k)
    def forward(self, x): return x*self.b(self.act(self.a(x.mean((2,3), keepdim=True)))).sigmoid()

class Shuffle(nn.Module):
    def __init__(self, g): super().__init__(); self.g = g
    def forward(self, x):
        b,c,h,w = x.shape
        return x.view(b, self.g, c//self.g, h, w).transpose(1, 2).reshape(b, c, h, w)

class Bare(nn.Module):
    "A parameter that is added or multiplied"
    def __init__(self, n, times): super().__init__(); self.p,self.times = nn.Parameter(torch.randn(n,1,1)),times
    def forward(self, x): return x*self.p if self.times else x+self.p

class Call(nn.Module):
    "A function as a module"
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, *x): return self.f(*x)

class Graph(nn.Module):
    "A network from a list of `(kind, a, b, c, d)`, numbers that choose what is built; every tensor that is made can be used again"
    KINDS = 'conv conv grouped depthwise transposed add add times cat cat chunk gate flip shuffle reuse tied pool down up bare slices'.split()
    def __init__(self, spec, head):
        super().__init__()
        self.steps,self.parts,self.head = [],nn.ModuleList(),head
        self.seen = [torch.zeros(1,3,8,8)] # one example of each tensor
        for kind,*numbers in spec: getattr(self, self.KINDS[kind%len(self.KINDS)])(*numbers)
        self.close(*head)

    def add_step(self, part, *srcs):
        with torch.no_grad(): out = part.eval()(*[self.seen[i] for i in srcs])
        self.parts.append(part)
        self.steps.append((len(self.parts)-1, srcs))
        self.seen += list(out) if isinstance(out, tuple) else [out]
    def pick(self, a, like=None):
        "A tensor made before; of the same shape, or of the same size in space"
        ok = [i for i,t in enumerate(self.seen) if t.dim()==4 and (like is None or t.shape[1:]==like)]
        return ok[-1-a%len(ok)] if ok else None
    def near(self, a, i): # of the same size in space
        ok = [j for j,t in enumerate(self.seen) if t.dim()==4 and t.shape[2:]==self.seen[i].shape[2:]]
        return ok[-1-a%len(ok)]
    def n(self, i): return self.seen[i].shape[1]

    def conv(self, a, b, c, d, groups=1, kind=nn.Conv2d, out=None, **kw):
        i,k = self.pick(a),3 if c%2 else 1
        o = out or SIZES[b%len(SIZES)]
        self.add_step(nn.Sequential(kind(self.n(i), o, k, padding=k//2 if d%4 else 0 if min(self.seen[i].shape[2:])>3 else k//2, groups=groups, bias=bool(d%3), **kw), norm(c, o), act(d, o)), i)
    def grouped(self, a, b, c, d):
        n,o = self.n(self.pick(a)),SIZES[b%len(SIZES)]
        g = divisors(n, o)
        self.conv(a, b, c, d, groups=g[c%len(g)])
    def depthwise(self, a, b, c, d): n = self.n(self.pick(a)); self.conv(a, b, c, d, groups=n, out=n*(1+b%2))
    def transposed(self, a, b, c, d):
        n,o = self.n(self.pick(a)),SIZES[b%len(SIZES)]
        g = divisors(n, o)
        self.conv(a, b, c, d, groups=g[c%len(g)] if d%2 else 1, kind=nn.ConvTranspose2d)
    def add(self, a, b, c, d, f=torch.add):
        i = self.pick(a)
        j = self.pick(b+1, self.seen[i].shape[1:])
        if i==j and len(self.seen)>1: # project another one
            k = self.near(b+1, i)
            self.add_step(nn.Conv2d(self.n(k), self.n(i), 1), k)
            j = len(self.seen)-1
        self.add_step(Call(f), i, j)
    def times(self, a, b, c, d): self.add(a, b, c, d, torch.mul)
    def cat(self, a, b, c, d):
        i = self.pick(a)
        self.add_step(Call(lambda *x: torch.cat(x, 1)), i, self.near(b, i), *([self.near(d, i)] if c%2 else []))
    def chunk(self, a, b, c, d):
        i = self.pick(a)
        if self.n(i)%2==0: self.add_step(Call(lambda x: tuple(x.chunk(2, 1))), i)
    def slices(self, a, b, c, d): # add to a part of it
        i = self.pick(a)
        j = self.near(b, i)
        if self.n(j)<=self.n(i):
            def f(x, y): x = x.clone(); x[:,:y.shape[1]] += y; return x
            self.add_step(Call(f), i, j)
    def gate(self, a, b, c, d): i = self.pick(a); self.add_step(Gate(self.n(i), SIZES[b%len(SIZES)], c), i)
    def flip(self, a, b, c, d): self.add_step(Call(lambda x: x.flip(1+b%3)), self.pick(a))
    def shuffle(self, a, b, c, d):
        i = self.pick(a)
        g = divisors(self.n(i))
        self.add_step(Shuffle(g[b%len(g)]), i)
    def bare(self, a, b, c, d): i = self.pick(a); self.add_step(Bare(self.n(i), b%2), i)
    def pool(self, a, b, c, d):
        self.add_step((nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False))[b%3], self.pick(a))
    def down(self, a, b, c, d):
        i = self.pick(a)
        if self.seen[i].shape[-1]>=4: self.add_step((nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(self.n(i), SIZES[c%len(SIZES)], 3, 2, 1))[b%3], i)
    def up(self, a, b, c, d):
        i = self.pick(a)
        if self.seen[i].shape[-1]<=8: self.add_step(Call(lambda x: F.interpolate(x, scale_factor=2, mode=('nearest','bilinear')[b%2])), i)
    def reuse(self, a, b, c, d): # a part that was used before, on another tensor
        old = [(k,s) for k,s in self.steps if isinstance(self.parts[k], (nn.Sequential, Gate)) and self.seen[s[0]].dim()==4]
        if not old: return
        k,(i,) = old[a%len(old)]
        j = [j for j,t in enumerate(self.seen) if t.dim()==4 and t.shape[1]==self.n(i) and min(t.shape[2:])>=3]
        if not j: return
        with torch.no_grad(): self.seen.append(self.parts[k].eval()(self.seen[j[-1-b%len(j)]]))
        self.steps.append((k, (j[-1-b%len(j)],)))
    def tied(self, a, b, c, d): # another convolution with the same weight
        old = [(p[0],s) for k,s in self.steps if isinstance(p := self.parts[k], nn.Sequential) and type(p[0]) is nn.Conv2d and p[0].padding!=(0,0)]
        if not old: return
        m,(i,) = old[a%len(old)]
        new = nn.Conv2d(m.in_channels, m.out_channels, m.kernel_size, padding=m.padding, groups=m.groups)
        new.weight = m.weight
        j = [j for j,t in enumerate(self.seen) if t.shape[1]==m.in_channels]
        self.add_step(nn.Sequential(new, act(d, m.out_channels)), j[-1-b%len(j)])

    def close(self, a, b, c, d):
        "A classifier on every tensor that nobody has used, and on one more"
        used = {i for _,srcs in self.steps for i in srcs}
        ends = dict.fromkeys([i for i in range(len(self.seen)) if i not in used] + [self.pick(a)])
        flat = Call(lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1)) if b%2 else Call(lambda x: x.mean((2,3)))
        for i in ends:
            n = self.n(i)*(4 if b%2 else 1)
            self.add_step(nn.Sequential(flat, *([nn.Linear(n, 6), act(c, 6), nn.Linear(6, 5)] if d%2 and ACTS[c%len(ACTS)] is not nn.PReLU else [nn.Linear(n, 5)])), i)
        self.ends = list(range(len(self.seen)-len(ends), len(self.seen)))
        self.seen = None

    def forward(self, x):
        made = [x]
        for k,srcs in self.steps:
            out = self.parts[k](*[made[i] for i in srcs])
            made += list(out) if isinstance(out, tuple) else [out]
        return sum(made[i] for i in self.ends)

# ---- numbers that choose

WIDTHS,HEADS,DIMS = (4, 6, 8, 12),(1, 2, 3, 4),(2, 3, 4, 6)
def at(xs, k): return xs[k%len(xs)]

# ---- attention

def attend(q, k, v, way, d):
    "Heads second, tokens third: six ways to write it; `d` is the width of a head as the module knows it"
    way = way%6
    if way<4: return F.scaled_dot_product_attention(q, k, v, scale=d**-.5 if way==1 else .3 if way==2 else None, is_causal=way==3 and q.shape[2]==k.shape[2])
    a = q@k.transpose(-2, -1)*q.shape[-1]**-.5 if way==4 else torch.einsum('bhid,bhjd->bhij', q, k)/math.sqrt(d)
    if way==5 and q.shape[2]==k.shape[2]: a = a.masked_fill(~torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(), float('-inf'))
    return a.softmax(-1)@v

def joined(y, code, *size):
    "Heads beside each other again"
    y = y.transpose(1, 2)
    return y.flatten(2) if code%3==0 else y.reshape(*size, -1) if code%3==1 else y.contiguous().view(*size, y.shape[2]*y.shape[3])

class Fused(nn.Module):
    "Queries, keys and values from one matrix"
    def __init__(self, c, out, h, d, way, code, bias=True):
        super().__init__()
        self.h,self.d,self.way,self.code = h,d,way,code
        self.qkv,self.proj = nn.Linear(c, 3*h*d, bias=bias),nn.Linear(h*d, out)
    def heads(self, x):
        b,n,c = x.shape
        y,code = self.qkv(x),self.code%4
        if code==0: return y.reshape(b, n, 3, self.h, self.d).permute(2,0,3,1,4).unbind(0)
        if code==1: return [t.view(b, n, self.h, -1).transpose(1, 2) for t in y.chunk(3, -1)]
        if code==2: return y.view(b, n, self.h, 3*self.d).transpose(1, 2).chunk(3, -1)
        return [t.unflatten(-1, (self.h, -1)).transpose(1, 2) for t in y.split(self.h*self.d, -1)]
    def forward(self, x): return self.proj(joined(attend(*self.heads(x), self.way, self.d), self.way//2, *x.shape[:2]))

class Separate(nn.Module):
    "Three matrices; several queries may share a key; keys may come from elsewhere; positions may turn"
    def __init__(self, c, out, h, d, way, code, kv=None, mem=None, turn=False):
        super().__init__()
        self.h,self.d,self.kv,self.way,self.code,self.turn = h,d,kv or h,way,code,turn and d%2==0
        self.q,self.k,self.v,self.proj = nn.Linear(c, h*d, bias=code%2==0),nn.Linear(mem or c, self.kv*d),nn.Linear(mem or c, self.kv*d),nn.Linear(h*d, out)
    def rotated(self, z):
        t = torch.arange(z.shape[2]).to(z)[:,None]*torch.arange(1, self.d//2+1).to(z)
        t = torch.cat([t, t], -1)
        return z*t.cos() + torch.cat([-z[...,self.d//2:], z[...,:self.d//2]], -1)*t.sin()
    def forward(self, x, memory=None):
        m = x if memory is None else memory
        q,k,v = self.q(x),self.k(m),self.v(m)
        q,k,v = (t.view(*t.shape[:2], -1, self.d) for t in (q,k,v)) if self.code%2 else (t.unflatten(-1, (n, -1)) for t,n in ((q,self.h), (k,self.kv), (v,self.kv)))
        q,k,v = (t.transpose(1, 2) for t in (q,k,v))
        if self.turn: q,k = self.rotated(q),self.rotated(k)
        r = self.h//self.kv
        if r>1 and self.code%3==0: k,v = (t.repeat_interleave(r, 1) for t in (k,v))
        elif r>1: k,v = (t[:,:,None].expand(-1, -1, r, -1, -1).reshape(t.shape[0], self.h, t.shape[2], -1) for t in (k,v))
        return self.proj(joined(attend(q, k, v, self.way, self.d), self.way//2, *x.shape[:2]))

class Multihead(nn.Module):
    "PyTorch's own"
    def __init__(self, c, h, mem=None, bias=True): super().__init__(); self.m = nn.MultiheadAttention(c, h, kdim=mem, vdim=mem, bias=bias, batch_first=True)
    def forward(self, x, memory=None): memory = x if memory is None else memory; return self.m(x, memory, memory, need_weights=False)[0]

class Windows(nn.Module):
    "Attention in windows of two by two, moved or not, with a table of relative positions"
    def __init__(self, c, out, h, d, code):
        super().__init__()
        self.inner,self.shift,self.h = Fused(c, out, h, d, 4, code),code%2,h
        self.table = nn.Parameter(torch.randn(9, h))
        i = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing='ij')).flatten(1)
        i = i[:,:,None]-i[:,None]+1
        self.register_buffer('index', i[0]*3+i[1])
    def forward(self, x):
        b,n,c = x.shape
        s = math.isqrt(n)
        x = x.view(b, s, s, c)
        if self.shift: x = x.roll((-1,-1), (1,2))
        x = x.view(b, s//2, 2, s//2, 2, c).permute(0,1,3,2,4,5).reshape(-1, 4, c)
        q,k,v = self.inner.heads(x)
        a = q@k.transpose(-2, -1)*self.inner.d**-.5 + self.table[self.index.view(-1)].view(4, 4, -1).permute(2,0,1).unsqueeze(0)
        y = self.inner.proj((a.softmax(-1)@v).transpose(1, 2).reshape(x.shape[0], 4, -1))
        y = y.view(b, s//2, s//2, 2, 2, -1).permute(0,1,3,2,4,5).reshape(b, s, s, -1)
        return (y.roll((1,1), (1,2)) if self.shift else y).flatten(1, 2)

class Channels(nn.Module):
    "Attention between the channels of a head"
    def __init__(self, c, out, h, d, code): super().__init__(); self.inner,self.t = Fused(c, out, h, d, 0, code),nn.Parameter(torch.ones(h,1,1))
    def forward(self, x):
        q,k,v = (t.transpose(-2, -1) for t in self.inner.heads(x))
        a = (F.normalize(q, dim=-1)@F.normalize(k, dim=-1).transpose(-2, -1)*self.t).softmax(-1)
        return self.inner.proj((a@v).permute(0,3,1,2).flatten(2))

# ---- what stands around it

class MLP(nn.Module):
    "Plain, gated by another matrix, or by the other half of one"
    def __init__(self, c, k, out, code, a):
        super().__init__()
        self.code = code%4
        self.up,self.down,self.act = nn.Linear(c, 2*k if self.code>1 else k),nn.Linear(k, out),act(a, 1) if a%9!=7 else nn.GELU()
        if self.code==1: self.gate = nn.Linear(c, k, bias=False)
    def forward(self, x):
        y = self.up(x)
        if self.code==0: return self.down(self.act(y))
        if self.code==1: return self.down(self.act(self.gate(x))*y)
        if self.code==3: return self.down(F.glu(y))
        a,b = y.chunk(2, -1)
        return self.down(self.act(a)*b)

class RMS(nn.Module):
    "A root mean square, written out"
    def __init__(self, c): super().__init__(); self.weight = nn.Parameter(torch.ones(c))
    def forward(self, x): return x*torch.rsqrt(x.pow(2).mean(-1, keepdim=True)+1e-6)*self.weight

class Turned(nn.Module):
    "A module for channels in the second dimension, over tokens"
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x): return self.m(x.transpose(1, 2)).transpose(1, 2)

def token_norm(k, c):
    g = divisors(c)
    return (lambda: nn.LayerNorm(c), lambda: nn.RMSNorm(c), lambda: Turned(nn.GroupNorm(at(g, k//7), c)), lambda: RMS(c), lambda: nn.LayerNorm(c, eps=1e-3), lambda: Turned(nn.BatchNorm1d(c)), nn.Identity)[k%7]()

class Block(nn.Module):
    "Something between a norm, a scale and a sum"
    def __init__(self, inner, c, code, second=None):
        super().__init__()
        self.inner,self.post,self.norm,self.other = inner,code%3==0,token_norm(code, c),None if second is None else token_norm(code+1, second)
        self.scale = nn.Parameter(torch.rand(c)+.5) if code%2 else None
    def forward(self, x, *more):
        if more and self.other is not None: more = [self.other(more[0])]
        y = self.inner(x if self.post else self.norm(x), *more)
        y = x + (y if self.scale is None else y*self.scale)
        return self.norm(y) if self.post else y

class ClassToken(nn.Module):
    def __init__(self, c): super().__init__(); self.p = nn.Parameter(torch.randn(1,1,c))
    def forward(self, x): return torch.cat([self.p.expand(x.shape[0], -1, -1), x], 1)

class Positions(nn.Module):
    def __init__(self, n, c): super().__init__(); self.p = nn.Parameter(torch.randn(1,n,c))
    def forward(self, x): return x+self.p[:,:x.shape[1]]

class Recurrent(nn.Module):
    "Outputs of each step, or the last state beside each"
    def __init__(self, m, last): super().__init__(); self.m,self.last = m,last
    def forward(self, x):
        y,s = self.m(x)
        return y if not self.last else torch.cat([y, (s[0] if isinstance(s, tuple) else s)[-1][:,None].expand(-1, y.shape[1], -1)], -1)

class GatedTokens(nn.Module):
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x): return x*self.m(x.mean(1, keepdim=True)).sigmoid()

class Tied(nn.Module):
    "The table of an embedding, as what says the words again"
    def __init__(self, table): super().__init__(); self.weight = table.weight
    def forward(self, x): return F.linear(x, self.weight)

@dataclasses.dataclass
class Out:
    logits:torch.Tensor
    more:list

# ---- the graphs

def rand(*shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
def some_ids(b=2): return torch.randint(0, 9, (b,4), generator=torch.Generator().manual_seed(b))
INPUTS = (lambda: rand(2,4,5), lambda: (rand(2,4,5), rand(2,3,6)), lambda: dict(x=rand(2,5,5), image=rand(2,3,8,8)), lambda: some_ids(),
    lambda: (rand(2,4,5), [rand(2,3,6), dict(image=rand(2,3,8,8))]), lambda: dict(ids=some_ids(), extra=(rand(2,3,6),)), lambda: rand(2,3,8,8))

def again(x, batch=3, seed=7):
    "The same kind of input with other values and another batch size"
    g = torch.Generator().manual_seed(seed)
    return tree_map(lambda t: torch.randn(batch, *t.shape[1:], generator=g, dtype=t.dtype) if t.is_floating_point() else torch.randint(0, 9, (batch,*t.shape[1:]), generator=g), x)

def longer(x, batch:int, steps:int):
    "The same kind of input with more tokens and larger images"
    g = torch.Generator().manual_seed(steps)
    def one(t):
        if not t.is_floating_point(): return torch.randint(0, 9, (batch, t.shape[1]+steps), generator=g)
        shape = (t.shape[1]+steps, t.shape[2]) if t.dim()==3 else (t.shape[1], t.shape[2]+8, t.shape[3]+8)
        return torch.randn(batch, *shape, generator=g, dtype=t.dtype)
    return tree_map(one, x)

class Mixed(Graph):
    "A network from a list of `(kind, a, b, c, d)` with tokens, images, or both"
    TOKENS = 'fused fused separate separate cross cross multihead windows windows channels mlp mlp mlp layer lstm lstm gru norm cls pos linear conv1d mixer gate_tokens add_tokens cat_tokens halves encoder decoder patches image'.split()
    KINDS = TOKENS + 'conv grouped depthwise add times cat chunk gate shuffle bare pool reuse'.split()
    def __init__(self, spec, head, inputs):
        nn.Module.__init__(self)
        self.steps,self.parts,self.head,self.form = [],nn.ModuleList(),head,head[3]%4
        self.seen = tree_leaves(at(INPUTS, inputs)())
        self.tables = []
        for i,t in enumerate(self.seen[:]): self.begin(i, t, at(WIDTHS, head[0]+i))
        for kind,*numbers in spec:
            kind = self.KINDS[kind%len(self.KINDS)]
            if kind in self.TOKENS or any(t.dim()==4 for t in self.seen): getattr(self, kind)(*numbers)
        self.close(*head)

    def add_step(self, part, *srcs):
        part.double()
        super().add_step(part, *srcs)
    def begin(self, i, t, c):
        "Embed an input"
        if t.dim()==4: return self.add_step(nn.Sequential(nn.Conv2d(3, c, 2, 2), Call(lambda x: x.flatten(2).transpose(1, 2))), i)
        self.add_step(nn.Embedding(9, c) if t.dim()==2 else nn.Linear(t.shape[-1], c), i)
        if t.dim()==2: self.tables.append(self.parts[-1])
    def tok(self, a, fit=lambda t: True):
        ok = [i for i,t in enumerate(self.seen) if t.dim()==3 and fit(t)]
        return ok[-1-a%len(ok)] if ok else None
    def c(self, i): return self.seen[i].shape[-1]

    def block(self, inner, i, d, *more): self.add_step(Block(inner, self.c(i), d, self.c(more[0]) if more else None), i, *more)
    def fused(self, a, b, c, d):
        i = self.tok(a//4)
        self.block(Fused(self.c(i), self.c(i), at(HEADS, b), at(DIMS, a), c, d, bias=a!=5), i, c+d)
    def separate(self, a, b, c, d):
        i,h = self.tok(a//4),at(HEADS, b)
        self.block(Separate(self.c(i), self.c(i), h, at(DIMS, a), c, d, kv=at(divisors(h), d), turn=c%3==0), i, b+d)
    def cross(self, a, b, c, d):
        i,j,h = self.tok(a//4),self.tok(b//2+1),at(HEADS, b)
        self.block(Separate(self.c(i), self.c(i), h, at(DIMS, a), c, d, kv=at(divisors(h), d), mem=self.c(j)), i, a+d, j)
    def multihead(self, a, b, c, d):
        i,j = self.tok(a//4),self.tok(b//2+1)
        self.block(Multihead(self.c(i), at([h for h in HEADS if self.c(i)%h==0], c), mem=self.c(j) if d%2 and self.c(j)!=self.c(i) else None, bias=c!=5), i, b+c, *([j] if d%2 else []))
    def windows(self, a, b, c, d):
        i = self.tok(a//4, lambda t: t.shape[1] in (4,16))
        if i is not None: self.block(Windows(self.c(i), self.c(i), at(HEADS, b), at(DIMS, a), c), i, d)
    def channels(self, a, b, c, d): i = self.tok(a//4); self.block(Channels(self.c(i), self.c(i), at(HEADS, b), at(DIMS, a), c), i, d)
    def mlp(self, a, b, c, d): i = self.tok(a); self.block(MLP(self.c(i), at(WIDTHS, b), self.c(i), c, d), i, a+d)
    def layer(self, a, b, c, d): self.fused(a, b, c, d); self.mlp(0, d, b, c)
    def lstm(self, a, b, c, d, kind=nn.LSTM):
        i = self.tok(a)
        self.add_step(Recurrent(kind(self.c(i), at(DIMS, b), num_layers=1+(c%3==0), bidirectional=bool(c%2), batch_first=True), d%4==0), i)
    def gru(self, a, b, c, d): self.lstm(a, b, c, d, nn.GRU if d%3 else nn.RNN)
    def norm(self, a, b, c, d): i = self.tok(a); self.add_step(token_norm(b, self.c(i)), i)
    def cls(self, a, b, c, d): i = self.tok(a); self.add_step(ClassToken(self.c(i)), i)
    def pos(self, a, b, c, d): i = self.tok(a); self.add_step(Positions(self.seen[i].shape[1]+b%2, self.c(i)), i)
    def linear(self, a, b, c, d): i = self.tok(a); self.add_step(nn.Sequential(nn.Linear(self.c(i), at(WIDTHS, b), bias=bool(c%3)), act(d, 1)), i)
    def conv1d(self, a, b, c, d):
        i,o = self.tok(a),at(WIDTHS, b)
        g = divisors(self.c(i), o) if d%2 else [1]
        self.add_step(Turned(nn.Conv1d(self.c(i), o, 3 if c%2 else 1, padding=c%2, groups=at(g, c))), i)
    def mixer(self, a, b, c, d): i = self.tok(a); n = self.seen[i].shape[1]; self.block(Turned(MLP(n, at(WIDTHS, b), n, c, d)), i, a+d)
    def gate_tokens(self, a, b, c, d):
        i = self.tok(a)
        self.add_step(GatedTokens(MLP(self.c(i), at(DIMS, b), self.c(i), 0, c)), i)
    def add_tokens(self, a, b, c, d):
        i = self.tok(a)
        j = self.tok(b, lambda t: t.shape[1] in (1, self.seen[i].shape[1]))
        if self.c(j)!=self.c(i): self.add_step(nn.Linear(self.c(j), self.c(i)), j); j = len(self.seen)-1
        self.add_step(Call((torch.add, torch.mul)[c%2]), i, j)
    def cat_tokens(self, a, b, c, d):
        i = self.tok(a)
        k = 1+c%2 # beside each other, or after each other
        j = self.tok(b, lambda t: t.shape[3-k]==self.seen[i].shape[3-k])
        self.add_step(Call(lambda *x: torch.cat(x, k)), i, j)
    def halves(self, a, b, c, d): i = self.tok(a); self.add_step(Call(lambda x: tuple(x.chunk(2, -1))), i)
    def encoder(self, a, b, c, d):
        i = self.tok(a)
        self.add_step(nn.TransformerEncoderLayer(self.c(i), at([h for h in HEADS if self.c(i)%h==0], b), at(WIDTHS, c), 0., ('relu','gelu')[d%2], batch_first=True, norm_first=bool(d%3)), i)
    def decoder(self, a, b, c, d):
        i = self.tok(a)
        j = self.tok(b+1, lambda t: t.shape[-1]==self.c(i))
        self.add_step(nn.TransformerDecoderLayer(self.c(i), at([h for h in HEADS if self.c(i)%h==0], b), at(WIDTHS, c), 0., batch_first=True, norm_first=bool(d%3)), i, j)
    def patches(self, a, b, c, d):
        i = self.pick(a)
        if i is not None: self.add_step(Call(lambda x: x.flatten(2).transpose(1, 2)), i)
    def image(self, a, b, c, d):
        i = self.tok(a, lambda t: t.shape[1] in (4,16,64))
        if i is None: return
        s = math.isqrt(self.seen[i].shape[1])
        self.add_step(Call(lambda x: x.transpose(1, 2).unflatten(2, (s, s))), i)

    def close(self, a, b, c, d):
        "A reader for every tensor that nobody has used, and for one more; words are said by the table that reads them"
        used = {i for _,srcs in self.steps for i in srcs}
        ends = [i for i in range(len(self.seen)) if i not in used]
        start,more = len(self.seen),[]
        for i in dict.fromkeys([*ends, self.tok(a)]):
            t = self.seen[i]
            flat = Call(lambda x: x.mean((2,3))) if t.dim()==4 else Call((lambda x: x.mean(1), lambda x: x[:,0], lambda x: x.amax(1))[c%3])
            self.add_step(nn.Sequential(flat, nn.Linear(t.shape[1 if t.dim()==4 else 2], 5)), i)
        self.ends = range(start, len(self.seen))
        for t in self.tables:
            i = self.tok(b, lambda y: y.shape[-1]==t.weight.shape[1] and y.dtype==t.weight.dtype)
            self.add_step(Tied(t), i); more.append(len(self.seen)-1)
        self.more,self.seen = more,None

    def forward(self, *args, **kwargs):
        made = tree_leaves((args, kwargs))
        for k,srcs in self.steps:
            out = self.parts[k](*[made[i] for i in srcs])
            made += list(out) if isinstance(out, tuple) else [out]
        y,more = sum(made[i] for i in self.ends),[made[i] for i in self.more]
        return (dict(logits=y, aux=more), (y, more), Out(y, more), y if not more else [y, *more])[self.form]
