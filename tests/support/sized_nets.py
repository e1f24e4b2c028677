"Networks whose Python code says sizes, each in another way; in a file, so that another process can load them"
import functools, math
from dataclasses import dataclass
from typing import NamedTuple, Optional
import numpy as np
import torch, torch.nn.functional as F
from torch import nn, Tensor
from torch.utils.checkpoint import checkpoint

class Base(nn.Module):
    "The layers of an attention; how heads are made of them is what each network is about"
    def __init__(self, c:int=32, h:int=4, out:int=5):
        super().__init__()
        self.h,self.d = h,c//h
        self.q,self.k,self.v,self.o = nn.Linear(c, c),nn.Linear(c, c),nn.Linear(c, c),nn.Linear(c, out)
        for l in (self.q, self.k): nn.init.normal_(l.weight, std=.25)

class FusedBase(nn.Module):
    def __init__(self, c:int=32, h:int=4, out:int=5):
        super().__init__()
        self.h,self.d,self.scale = h,c//h,(c//h)**-.5
        self.qkv,self.o = nn.Linear(c, 3*c),nn.Linear(c, out)
        nn.init.normal_(self.qkv.weight, std=.25)

# ---- numbers, attributes, shapes

class Literal(Base):
    "Three calls on one line, numbers as they are"
    def forward(self, x:Tensor)->Tensor:
        b,n,_ = x.shape
        q,k,v = self.q(x).view(b, n, 4, 8),self.k(x).view(b, n, 4, 8),self.v(x).view(b, n, 4, 8)
        a = (torch.einsum('bnhd,bmhd->bhnm', q, k)*8**-.5).softmax(-1)
        return self.o(torch.einsum('bhnm,bmhd->bnhd', a, v).reshape(b, n, 32))

class Sdpa(FusedBase):
    "The scale is made by PyTorch, the sizes by arithmetic"
    def forward(self, x:Tensor)->Tensor:
        b,n,c = x.shape
        q,k,v = self.qkv(x).reshape(b, n, 3, self.h, c//self.h).permute(2, 0, 3, 1, 4).unbind(0)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))

class Width(Base):
    "The scale is made of a shape"
    def forward(self, x:Tensor)->Tensor:
        q,k,v = (l(x).unflatten(-1, (self.h, -1)).transpose(1, 2) for l in (self.q, self.k, self.v))
        return self.o(((q@k.transpose(-2, -1)*q.shape[-1]**-.5).softmax(-1)@v).transpose(1, 2).flatten(2))

class Root(Base):
    "Augmented assignments, a division, a root of a local variable"
    def forward(self, x:Tensor)->Tensor:
        b,n = x.shape[0],x.shape[1]
        d = self.d
        q = self.q(x).view(b, n, self.h, d).transpose(1, 2)
        k = self.k(x).view(b, n, self.h, d).transpose(1, 2)
        v = self.v(x).view(b, n, self.h, d).transpose(1, 2)
        a = q@k.transpose(2, 3)
        a /= math.sqrt(k.size(-1))
        a = a-a.amax(-1, keepdim=True).detach()
        y = (a.softmax(-1)@v).transpose(1, 2).contiguous()
        y = y.view(b, n, self.h*d)
        return self.o(y)

class NanoGPT(nn.Module):
    "As in nanoGPT: one split by the embedding's width, heads by division of a shape, a mask cut to the length"
    def __init__(self, c=32, h=4, out=5):
        super().__init__()
        self.c_attn,self.c_proj,self.n_head,self.n_embd = nn.Linear(c, 3*c),nn.Linear(c, out),h,c
        nn.init.normal_(self.c_attn.weight, std=.25)
        self.register_buffer('bias', torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))
    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:,:,:T,:T] == 0, float('-inf'))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))

class TupleShape(Base):
    "`view(*shape)`, `view(shape)`, sums of shapes"
    def forward(self, x):
        shape = (*x.shape[:-1], self.h, self.d)
        q = self.q(x).view(shape).transpose(1, 2)
        k = self.k(x).view(*shape).transpose(1, 2)
        v = self.v(x).view(x.shape[:-1]+(self.h, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        back = y.size()[:-2]+(self.h*self.d,)
        return self.o(y.reshape(back))

class Keywords(Base):
    "Sizes by keyword"
    def forward(self, x):
        b,n,_ = x.shape
        q = torch.reshape(input=self.q(x), shape=(b, n, self.h, self.d))
        k = self.k(x).unflatten(dim=-1, sizes=(self.h, self.d))
        v = self.v(x).view(size=(b, n, self.h, self.d))
        a = torch.einsum('bnhd,bmhd->bhnm', q, k).div(self.d**.5).softmax(-1)
        return self.o(torch.einsum('bhnm,bmhd->bnhd', a, v).flatten(start_dim=2))

class Sections(nn.Module):
    "Split with sections, slices up to a number, and narrow, of three layers that are one"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.o = nn.Linear(6, 48),nn.Linear(6, 48),nn.Linear(6, 48),nn.Linear(16, 4)
    def forward(self, x):
        u,v,w = self.a(x).split([16, 8, 24], dim=-1)
        y = self.b(x)
        p,q = y[..., :16],y[..., 16:]
        z = self.c(x)
        s,t = z.narrow(-1, 0, 16),z.narrow(-1, 16, 32)
        return self.o((u*p).tanh()*s)+v.sum(-1, keepdim=True)+(w*t[..., :24]).sum(-1, keepdim=True)+q.mean(-1,
            keepdim=True)*0

class SplitKeyword(nn.Module):
    "A gated unit by `split(split_size_or_sections=)` and by a slice whose ends are computed"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.o,self.n = nn.Linear(6, 32),nn.Linear(6, 32),nn.Linear(16, 4),16
    def forward(self, x:Tensor)->Tensor:
        u,g = torch.split(self.a(x), split_size_or_sections=self.n, dim=-1)
        y = self.b(x)
        return self.o(u*g.sigmoid()+y[:, :self.n]*y[:, self.n:2*self.n].tanh())

class MadeInForward(nn.Module):
    "Tensors that forward makes: zeros of the width, a table, an accumulator"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.o = nn.Linear(6, 16),nn.Linear(6, 16),nn.Linear(16, 4)
    def forward(self, x:Tensor)->Tensor:
        h = torch.zeros(x.shape[0], 16, dtype=x.dtype)
        h += self.a(x).relu()
        h = torch.stack([h, x.new_zeros(h.shape[0], 16), x.new_full((h.shape[0], 16), .5)], 1).sum(1)
        return self.o(h*self.b(x)+torch.ones(16, dtype=x.dtype))

class Walrus(Base):
    "Assignments inside of calls, conditional expressions, a chain over several lines"
    def forward(self, x):
        q = (y := self.q(x)).view(*y.shape[:2], self.h, y.shape[-1]//self.h)
        k = (self.k(x).view(x.shape[0], -1, self.h, self.d)
             if x.dim()==3 else
             self.k(x).view(-1, self.h, self.d))
        v = self.v(x).view(x.shape[0], (n := x.shape[1]), 4 if self.h==4 else 2, 8 if self.h else 1)
        a = (q.transpose(1, 2)
             .matmul(k.permute(0, 2, 3, 1))
             .mul(self.d**-.5)
             .softmax(-1))
        return self.o((a@v.transpose(1, 2)).transpose(1, 2).reshape(-1, n, self.h*self.d))

class Comprehension(Base):
    "Calls in a comprehension, a lambda, a nested function with a closure, a generator"
    def forward(self, x):
        b,n,_ = x.shape
        h = self.h
        q,k = [l(x).view(b, n, h, -1) for l in (self.q, self.k)]
        heads = lambda t: t.view(b, n, h, self.d)
        def back(t): return t.transpose(1, 2).reshape(b, n, h*self.d)
        def pieces():
            yield q.transpose(1, 2)
            yield k.transpose(1, 2)
            yield heads(self.v(x)).transpose(1, 2)
        return self.o(back(F.scaled_dot_product_attention(*pieces())))

class Loop(Base):
    "One call in a loop, which says one size for three layers"
    def forward(self, x):
        parts = []
        for l in (self.q, self.k, self.v): parts.append(l(x).view(x.shape[0], x.shape[1], self.h, 8).transpose(1, 2))
        q,k,v = parts
        return self.o(((q@k.mT*.3).softmax(-1)@v).transpose(1, 2).flatten(2))

# ---- helpers

def to_heads(t:Tensor, h:int, d:int)->Tensor:
    "Helper of several networks, with sizes for arguments"
    return t.view(t.shape[0], -1, h, d).transpose(1, 2)

def from_heads(t:Tensor)->Tensor:
    b,h,n,d = t.shape
    return t.transpose(1, 2).reshape(b, n, h*d)

def attend(q, k, v, scale=None):
    if scale is None: scale = 1/np.sqrt(q.shape[-1])
    return ((q@k.transpose(-2, -1))*float(scale)).softmax(-1)@v

class Helper(Base):
    "Helpers get sizes and give them on"
    def forward(self, x:Tensor)->Tensor:
        q,k,v = to_heads(self.q(x), self.h, self.d),to_heads(self.k(x), self.h, self.d),to_heads(self.v(x), self.h,
            self.d)
        return self.o(from_heads(F.scaled_dot_product_attention(q, k, v)))

class HelperTwice(nn.Module):
    "One helper, called with other sizes each time: two attentions of other heads in one forward"
    def __init__(self):
        super().__init__()
        self.qk,self.v,self.qk2,self.v2,self.o,self.o2 = nn.Linear(32, 64),nn.Linear(32, 32),nn.Linear(32,
            48),nn.Linear(32, 24),nn.Linear(32, 5),nn.Linear(24, 5)
        for l in (self.qk, self.qk2): nn.init.normal_(l.weight, std=.25)
    def forward(self, x:Tensor)->Tensor:
        q,k = self.qk(x).chunk(2, -1)
        y = F.scaled_dot_product_attention(to_heads(q, 4, 8), to_heads(k, 4, 8), to_heads(self.v(x), 4, 8))
        q,k = self.qk2(x).chunk(2, -1)
        z = F.scaled_dot_product_attention(to_heads(q, 2, 12), to_heads(k, 2, 12), to_heads(self.v2(x), 2, 12))
        return self.o(from_heads(y))+self.o2(from_heads(z))

def one_more(t, **sizes): return to_heads(t, **sizes)

class HelperChain(Base):
    "A helper of a helper, by keyword; a number that only the second one computes"
    def forward(self, x):
        q,k,v = (one_more(l(x), h=self.h, d=self.d) for l in (self.q, self.k, self.v))
        return self.o(from_heads(attend(q, k, v)))

class Partial(Base):
    "Sizes that were bound when the module was made"
    def __init__(self):
        super().__init__()
        self.cut = functools.partial(to_heads, h=self.h, d=self.d)
    def forward(self, x): return self.o(from_heads(F.scaled_dot_product_attention(self.cut(self.q(x)),
        self.cut(self.k(x)), self.cut(self.v(x)))))

@functools.lru_cache
def recipe(pattern:str):
    "'b n (h d) -> b h n d' as the axes of each side"
    left,right = (p.strip() for p in pattern.split('->'))
    def parse(s):
        res,inside = [],None
        for w in s.replace('(', ' ( ').replace(')', ' ) ').split():
            if w=='(': inside = []
            elif w==')': res,inside = res+[inside],None
            elif inside is None: res.append([w])
            else: inside.append(w)
        return res
    return parse(left),parse(right)

def rearrange(t, pattern, **sizes):
    "A small einops of our own: names of axes, sizes worked out by division"
    left,right = recipe(pattern)
    sizes = dict(sizes)
    for axes,n in zip(left, t.shape):
        known = math.prod(sizes.get(a, 1) for a in axes)
        for a in axes: sizes.setdefault(a, n//known)
    flat = [a for axes in left for a in axes]
    t = t.reshape([sizes[a] for a in flat])
    t = t.permute([flat.index(a) for axes in right for a in axes])
    return t.reshape([math.prod(sizes[a] for a in axes) for axes in right])

class Einops(Base):
    "Axes by their names, in a helper with a cache"
    def forward(self, x):
        q,k,v = (rearrange(l(x), 'b n (h d) -> b h n d', h=self.h) for l in (self.q, self.k, self.v))
        return self.o(rearrange(attend(q, k, v), 'b h n d -> b n (h d)'))

# ---- methods and classes

class Methods(Base):
    "As in BART: a method that makes heads, with sizes for arguments, and one that nobody calls"
    def _shape(self, t:Tensor, n:int, b:int)->Tensor: return t.view(b, n, self.h, self.d).transpose(1, 2).contiguous()
    def attend(self, x:Tensor)->Tensor:
        b,n = x.shape[:2]
        q = self._shape(self.q(x), n, b).view(b*self.h, n, self.d)
        k = self._shape(self.k(x), -1, b).reshape(b*self.h, -1, self.d)
        v = self._shape(self.v(x), -1, b).reshape(b*self.h, -1, self.d)
        y = torch.bmm((torch.bmm(q, k.transpose(1, 2))*self.d**-.5).softmax(-1), v)
        return y.view(b, self.h, n, self.d).transpose(1, 2).reshape(b, n, self.h*self.d)
    def attention_of(self, x):
        q,k = (self._shape(l(x), x.shape[1], x.shape[0]) for l in (self.q, self.k))
        return (q@k.mT*self.d**-.5).softmax(-1)
    def forward(self, x): return self.o(self.attend(x))

class Private(nn.Module):
    "Names that Python mangles"
    def __init__(self):
        super().__init__()
        self.__heads,self.__dim = 4,8
        self.__qkv,self.o = nn.Linear(32, 96),nn.Linear(32, 5)
        nn.init.normal_(self.__qkv.weight, std=.25)
    def __cut(self, t): return t.view(t.shape[0], -1, self.__heads, self.__dim).transpose(1, 2)
    def forward(self, x):
        q,k,v = map(self.__cut, self.__qkv(x).chunk(3, -1))
        return self.o((q@k.mT*self.__dim**-.5).softmax(-1).matmul(v).transpose(1, 2).reshape(x.shape[0], -1,
            self.__heads*self.__dim))

class Parent(Base):
    def forward(self, x:Tensor, more:float=1.)->Tensor:
        b,n,_ = x.shape
        q,k,v = self.q(x).view(b, n, self.h, self.d),self.k(x).view(b, n, self.h, self.d),self.v(x).view(b, n, self.h,
            self.d)
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1,
            2).reshape(b, n, self.h*self.d)*more

class Inherited(Parent):
    "What the parent's forward gives, by `super()`"
    def forward(self, x:Tensor, more:float=1.)->Tensor: return self.o(super().forward(x, more=more)+.1)

class OldSuper(Parent):
    "The same with the class by name, and a second call of a parent's method"
    def forward(self, x, more=1.):
        y = super(OldSuper, self).forward(x)
        return self.o(Parent.forward(self, x, more).mul(y).view(x.shape[0], x.shape[1], 32))

class Slim(Parent):
    "A parent's forward as it is, with other numbers"
    def __init__(self): super().__init__(32, 8, 32)
    def forward(self, x): return super().forward(x, 2.)

class TwoOfAFamily(nn.Module):
    "Two subclasses of one class, and one class in two widths"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = Inherited(32, 4, 32),Slim(),Inherited(32, 2, 32)
        self.z = nn.Linear(32, 5)
    def forward(self, x): return self.z(self.a(x)+self.c(x).tanh()).tanh()+self.b(x).sum(-1, keepdim=True)

class Mixin:
    @staticmethod
    def cut(t, h, d): return t.view(t.shape[0], t.shape[1], h, d).transpose(1, 2)
    @classmethod
    def glue(cls, t, n): return t.transpose(1, 2).reshape(t.shape[0], t.shape[2], n)

class Static(Mixin, Base):
    "Static methods and class methods of a mixin"
    def forward(self, x):
        q,k,v = (self.cut(l(x), self.h, self.d) for l in (self.q, self.k, self.v))
        return self.o(self.glue(F.scaled_dot_product_attention(q, k, v), self.h*self.d))

def logged(f):
    "A decorator as people write them"
    @functools.wraps(f)
    def wrapped(self, *args, **kwargs): return f(self, *args, **kwargs)
    return wrapped

class Decorated(Base):
    "A forward behind a decorator"
    @logged
    def forward(self, x:Tensor)->Tensor:
        "Attention, behind a decorator"
        b,n,_ = x.shape
        q,k,v = (l(x).view(b, n, self.h, self.d).transpose(1, 2) for l in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, self.h*self.d))

class Bank:
    "Something that is no module, and has a method with sizes in it"
    def __init__(self, h, d): self.h,self.d = h,d
    def __call__(self, t): return t.view(t.shape[0], -1, self.h, self.d).transpose(1, 2)

class OutsideObject(Base):
    "Sizes in an object that is no module"
    def __init__(self):
        super().__init__()
        self.cut = Bank(self.h, self.d)
    def forward(self, x):
        q,k,v = (self.cut(l(x)) for l in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

@dataclass
class Config:
    n_embd:int = 32
    n_head:int = 4

class Configured(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv,self.proj = nn.Linear(config.n_embd, 3*config.n_embd),nn.Linear(config.n_embd, config.n_embd)
        nn.init.normal_(self.qkv.weight, std=.25)
    def forward(self, x):
        c = self.config
        q,k,v = (t.view(*x.shape[:2], c.n_head, c.n_embd//c.n_head).transpose(1, 2)
            for t in self.qkv(x).split(c.n_embd, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], c.n_embd))

class SharedConfig(nn.Module):
    "Two blocks read their sizes from one object: what is true of one block after the cut is not of the other"
    def __init__(self):
        super().__init__()
        config = Config()
        self.a,self.b,self.z = Configured(config),Configured(config),nn.Linear(32, 5)
    def forward(self, x): return self.z(self.b(x+self.a(x)))

class TwoMeanings(Base):
    "An attribute that is a size and something else as well"
    def forward(self, x):
        q,k,v = (l(x).view(*x.shape[:2], self.h, -1).transpose(1, 2) for l in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)/self.h)+self.d

class Checked(Base):
    "Asserts about sizes, f-strings with sizes, a `with` and a `try` around it"
    def forward(self, x):
        b,n,c = x.shape
        assert c%self.h==0, f"{c} channels are not cut into {self.h} heads"
        with torch.autocast('cpu', enabled=False):
            try: q,k,v = (l(x).view(b, n, self.h, self.d).transpose(1, 2) for l in (self.q, self.k, self.v))
            except RuntimeError as e: raise ValueError(f"{tuple(x.shape)}: {e}")
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, self.h*self.d))

class Heads(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor

class Annotated(Base):
    "Defaults, keyword-only and annotated arguments, a docstring, a branch for an argument that may be None"
    def forward(self, x:Tensor, mask:Optional[Tensor]=None, *, scale:Optional[float]=None)->Tensor:
        """Attention over tokens

        `mask` is True where a token counts"""
        s = Heads(*(l(x).view(x.shape[0], -1, self.h, self.d).transpose(1, 2) for l in (self.q, self.k, self.v)))
        a = s.q@s.k.mT*(self.d**-.5 if scale is None else scale)
        if mask is not None: a = a.masked_fill(~mask[:, None, None], -1e4)
        return self.o((a.softmax(-1)@s.v).transpose(1, 2).reshape(x.shape[0], -1, self.h*self.d))

class Checkpointed(Base):
    "Activation checkpointing around what says sizes"
    def core(self, x):
        b,n,_ = x.shape
        q,k,v = (l(x).view(b, n, self.h, self.d).transpose(1, 2) for l in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, self.h*self.d)
    def forward(self, x): return self.o(checkpoint(self.core, x, use_reentrant=False))

def local(h=4, d=8):
    "A class that was made in a function, with sizes in its closure"
    class Local(Base):
        def forward(self, x):
            q,k,v = (l(x).view(*x.shape[:2], h, d).transpose(1, 2) for l in (self.q, self.k, self.v))
            return self.o(F.scaled_dot_product_attention(q, k, v, scale=d**-.5).transpose(1, 2).reshape(*x.shape[:2],
                h*d))
    return Local()

# ---- larger ones

def repeat_kv(t:Tensor, r:int)->Tensor:
    "As in Hugging Face's Llama"
    b,kv,n,d = t.shape
    if r==1: return t
    return t[:, :, None, :, :].expand(b, kv, r, n, d).reshape(b, kv*r, n, d)

def rotate_half(x):
    a,b = x[..., :x.shape[-1]//2],x[..., x.shape[-1]//2:]
    return torch.cat((-b, a), dim=-1)

class Grouped(nn.Module):
    "Two queries a key, rotary positions, a gated MLP: as in Llama"
    def __init__(self, c=32, h=4, kv=2, d=8):
        super().__init__()
        self.num_heads,self.num_kv,self.head_dim,self.num_kv_groups = h,kv,d,h//kv
        self.q,self.k,self.v,self.o = nn.Linear(c, h*d, bias=False),nn.Linear(c, kv*d, bias=False),nn.Linear(c, kv*d,
            bias=False),nn.Linear(h*d, c, bias=False)
        self.gate,self.up,self.down = nn.Linear(c, 40),nn.Linear(c, 40),nn.Linear(40, c)
    def forward(self, x):
        shape = (*x.shape[:-1], -1, self.head_dim)
        q,k,v = (l(x).view(shape).transpose(1, 2) for l in (self.q, self.k, self.v))
        t = torch.arange(x.shape[1])[:, None]*torch.logspace(0, -2, 4).repeat(2)
        q,k = (z*t.cos()+rotate_half(z)*t.sin() for z in (q, k))
        k,v = (repeat_kv(z, self.num_kv_groups) for z in (k, v))
        a = (q@k.transpose(2, 3)*self.head_dim**-.5).softmax(-1)
        x = x+self.o((a@v).transpose(1, 2).contiguous().reshape(*x.shape[:-1], -1))
        return x+self.down(F.silu(self.gate(x))*self.up(x))

class Relative(FusedBase):
    "A table of relative positions, one column a head, looked up by length"
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2*16-1, self.h))
        i = torch.arange(16)
        self.register_buffer('index', i[:, None]-i[None]+15)
    def forward(self, x):
        b,n,c = x.shape
        q,k,v = self.qkv(x).reshape(b, n, 3, self.h, c//self.h).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index[:n, :n].reshape(-1)].view(n, n, self.h).permute(2, 0, 1)
        a = ((q*self.scale)@k.transpose(-2, -1)+bias[None]).softmax(-1)
        return self.o((a@v).transpose(1, 2).reshape(b, n, c))

class Windows(nn.Module):
    "Attention in windows of an image, as in Swin: sizes of windows beside sizes of heads"
    def __init__(self, c=24, h=3, w=4):
        super().__init__()
        self.w,self.h,self.stem,self.qkv,self.o = w,h,nn.Conv2d(3, c, 3, padding=1),nn.Linear(c, 3*c),nn.Linear(c, 5)
        nn.init.normal_(self.qkv.weight, std=.25)
    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        b,H,W,c = x.shape
        x = x.view(b, H//self.w, self.w, W//self.w, self.w, c).transpose(2, 3).reshape(-1, self.w*self.w, c)
        q,k,v = self.qkv(x).view(len(x), self.w**2, 3, self.h, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, H//self.w, W//self.w, self.w, self.w, -1)
        return self.o(y.transpose(2, 3).reshape(b, H, W, -1)).mean((1, 2))

class Channels(nn.Module):
    "Convolutions whose code says numbers of channels: groups made by hand, a pixel shuffle written out, a gate"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.o = nn.Conv2d(3, 16, 3, padding=1),nn.Conv2d(16, 16, 1),nn.Conv2d(16, 48,
            1),nn.Conv2d(12, 4, 1)
        self.n = 16
    def forward(self, x):
        b,_,h,w = x.shape
        y = self.a(x).relu()
        g = self.b(y.mean((2, 3), keepdim=True)).view(b, self.n, 1, 1).sigmoid().expand(b, self.n, h, w)
        z = self.c(y*g).view(b, 12, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, 12, 2*h, 2*w)
        return self.o(z)

class WrittenNorm(nn.Module):
    "Norms over channels, written out: means and variances"
    def __init__(self):
        super().__init__()
        self.a,self.o = nn.Linear(6, 32),nn.Linear(32, 4)
    def forward(self, x):
        h = self.a(x)
        h = h*torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True)+1e-5)
        h = (h-h.mean(-1, keepdim=True))*(h.var(-1, keepdim=True, unbiased=False)+1e-5).rsqrt()
        return self.o(h)

class Norms(nn.Module):
    "Norms of PyTorch: a module, a function with its shape in the code, and a group norm"
    def __init__(self):
        super().__init__()
        self.a,self.n,self.b,self.o = nn.Linear(6, 32),nn.LayerNorm(32),nn.Linear(32, 16),nn.Linear(16, 4)
    def forward(self, x):
        h = self.n(self.a(x))
        h = self.b(h.relu())
        return self.o(F.layer_norm(h, (16,)).relu())

EXEC = """
class Unseen(Base):
    def forward(self, x):
        b,n,_ = x.shape
        q,k,v = self.q(x).view(b, n, 4, 8),self.k(x).view(b, n, 4, 8),self.v(x).view(b, n, 4, 8)
        a = (q.transpose(1, 2)@k.permute(0, 2, 3, 1)*.3).softmax(-1)
        return self.o((a@v.transpose(1, 2)).transpose(1, 2).reshape(b, n, 32))
class UnseenAttribute(Base):
    def forward(self, x):
        b,n,_ = x.shape
        q,k,v = (l(x).view(b, n, self.h, -1).transpose(1, 2) for l in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))
"""
exec(EXEC, globals()) # code whose source nobody can find

class Mha(nn.Module):
    "PyTorch's own attention, which has an adapter, between layers whose widths are free"
    def __init__(self):
        super().__init__()
        self.a,self.m,self.z = nn.Linear(32, 24),nn.MultiheadAttention(24, 3, batch_first=True),nn.Linear(24, 5)
    def forward(self, x):
        h = self.a(x)
        return self.z(self.m(h, h, h, need_weights=False)[0])

# ---- classes that look at what class they are

class Child(Base):
    def forward(self, x):
        q,k,v = (l(x).view(*x.shape[:2], self.h, self.d).transpose(1, 2) for l in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], self.h*self.d))

class AsksForType(nn.Module):
    "Runs another path where a part of it is not exactly of its class"
    def __init__(self):
        super().__init__()
        self.c,self.named = Child(),Child()
    def forward(self, x):
        a = self.c(x) if type(self.c) is Child else self.c(x.flip(1))*2
        return a+(self.named(x) if type(self.named).__name__=='Child' else self.named(x)*3)

class Registered(Base):
    "Every subclass must say a name, and is written into a list"
    known = []
    def __init_subclass__(cls, *, key, **kwargs):
        super().__init_subclass__(**kwargs)
        Registered.known.append(key)
class RegisteredOne(Registered, key='one'):
    def forward(self, x): return Child.forward(self, x)

class OfItsKind(Base):
    "Makes another of its own class, and finds its own methods by name"
    def __init__(self, c:int=32, h:int=4, out:int=5):
        super().__init__(c, h, out)
        self.args = c,h,out
    def again(self): return type(self)(*self.args)
    def forward(self, x): return getattr(self, 'run')(x)
    def run(self, x): return Child.forward(self, x)

def shout(t): return t.tanh() # a global function that a test replaces

class FollowsGlobals(Base):
    def forward(self, x):
        q,k,v = (shout(l(x)).view(*x.shape[:2], self.h, self.d).transpose(1, 2) for l in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], self.h*self.d))

class LoopOfTwoSizes(Base):
    "One call in a loop that has to say one size for some layers and another for others"
    def forward(self, x):
        parts = [l(x).view(x.shape[0], x.shape[1], self.h, self.d).transpose(1, 2) for l in (self.q, self.k, self.v)]
        return self.o((((parts[0]@parts[1].mT)*.3).softmax(-1)@parts[2]).transpose(1, 2).reshape(*x.shape[:2],
            self.h*self.d))

class Switched(Base):
    "With and without checkpointing, to compare gradients"
    ck = True
    def prod(self, q, k, v): return F.scaled_dot_product_attention(q, k, v)
    def forward(self, x):
        q,k,v = (l(x).unflatten(-1, (self.h, -1)).transpose(1, 2) for l in (self.q, self.k, self.v))
        a = checkpoint(self.prod, q, k, v, use_reentrant=False) if self.ck else self.prod(q, k, v)
        return self.o(a.transpose(1, 2).flatten(2))

class SwitchedBlocks(nn.Module):
    "Whole blocks under checkpointing, one of them twice"
    ck = True
    def __init__(self):
        super().__init__()
        self.blocks,self.z = nn.ModuleList([Child(32, 4, 32), Helper(32, 4, 32)]),nn.Linear(32, 5)
    def forward(self, x):
        for b in (*self.blocks, self.blocks[0]): x = x+(checkpoint(b, x, use_reentrant=False) if self.ck else b(x))
        return self.z(x)
