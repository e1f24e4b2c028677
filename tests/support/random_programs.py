"""Random modules as Python text: loops over time and batch, branches, state, caches, numbers and dictionaries

A graph is a list of `(kind, a, b, c)`, numbers that choose what is written. The text is a file of its own, for code
that is rewritten needs its source, and a failure is printed as a program that runs by itself."""
import dataclasses, hashlib, importlib.util, sys, tempfile
from pathlib import Path
import torch
from torch.utils._pytree import tree_map

WIDTHS,HEADS,DIMS = (6, 8, 12),(1, 2, 3),(2, 3, 4)
ZERO = 'relu', 'tanh', 'silu', 'gelu' # What is zero stays zero
INPUT = 5 # Features of a step
def at(xs, k): return xs[k%len(xs)]

FRAME = '''import math
from collections import deque
import torch
from torch import nn
from torch.nn import functional as F

def heads_second(z, n): return z.unflatten(-1, (n, -1)).transpose(1, 2)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
{init}
{methods}
    def forward(self, {takes}):
{body}
'''

class Writer:
    "Writes a module; `h` is (batch, time, channels), and its width is `w`"
    KINDS = '''linear mlp attend attend fused over_time over_time over_batch train_same train_other train_more
        by_value by_value by_size by_batch by_number state state_kept counter remembered past past cache kept
        number number times repeat norm norm glu glu conv image gru'''.split()
    FORMS = 'plain', 'number', 'batch', 'keywords'

    def __init__(self, spec, head):
        self.init,self.body,self.methods,self.n,self.uses,self.asks = [],[],[],0,set(),set()
        self.w = at(WIDTHS, head[0])
        self.form = at(self.FORMS, head[1])
        self.layer('begin', f'nn.Linear({INPUT}, {self.w})')
        self.say('h = self.begin(x)')
        for kind,*numbers in spec:
            self.n += 1
            getattr(self, at(self.KINDS, kind))(*numbers)
        self.end(*head[2:])

    # writing

    def layer(self, name, text): self.init.append(f'self.{name} = {text}')
    def say(self, *lines): self.body += lines
    def name(self, k): return f'{k}{self.n}'
    def linear_layer(self, k, i, o, bias=True):
        self.layer(self.name(k), f"nn.Linear({i}, {o}{'' if bias else ', bias=False'})")
        return f'self.{self.name(k)}'
    def number_of(self, name, value, a):
        "A size in the code: the number itself, or an attribute that holds it"
        if a%2: return str(value)
        self.layer(self.name(name), str(value))
        return f'self.{self.name(name)}'
    def use(self, *what): self.uses.update(what)

    # what may be written

    def linear(self, a, b, c):
        o = at(WIDTHS, a)
        f = self.linear_layer('l', self.w, o, b%3>0)
        self.say(f'h = F.{at(ZERO, c)}({f}(h))')
        self.w = o

    def mlp(self, a, b, c):
        k = at(WIDTHS, a)
        u,d = self.linear_layer('u', self.w, k),self.linear_layer('d', k, self.w)
        self.say(f'h = h + {d}(F.{at(ZERO, b)}({u}(h)))')

    def split_heads(self, z, h, d, a, n, k):
        "Heads second, in ways that say their number, their width, or both"
        return (f'{z}.view(h.shape[0], h.shape[1], {n}, -1).transpose(1, 2)',
            f'{z}.unflatten(-1, ({n}, -1)).transpose(1, 2)',
            f'{z}.reshape(h.shape[0], -1, {n}, {k}).transpose(1, 2)', f'{z}.unflatten(-1, (-1, {k})).transpose(1, 2)',
            f'heads_second({z}, {n})', f'{z}.view(*h.shape[:2], {n}, {k}).permute(0, 2, 1, 3)')[a%6]

    def product(self, h, d, a, k, b):
        "Queries with keys, and then values"
        if a%5==4:
            bias = ''
            if b%2: self.use('mask')
            if b%2: bias = ', attn_mask=None if mask is None else mask[:, None, None] > 0'
            return [f'y = F.scaled_dot_product_attention(q, k, v{bias})']
        scale = (f'q.shape[-1]**-.5', '.35', f'{k}**-.5', 'float(h.shape[1])**-.5')[a%5]
        lines = [f's = (q@k.transpose(-2, -1))*{scale}']
        if b%2: self.use('mask')
        if b%2: lines += ['if mask is not None:', '    s = s + (1-mask)[:, None, None]*-1e4']
        return [*lines, 'y = s.softmax(-1)@v']

    def attend(self, a, b, c):
        h,d = at(HEADS, a),at(DIMS, b)
        q,k,v = (self.linear_layer(x, self.w, h*d, (a+b)%3>0) for x in 'qkv')
        o = self.linear_layer('o', h*d, self.w)
        n,m = self.number_of('heads', h, c),self.number_of('hd', d, c//2)
        halves = [f"{x} = {self.split_heads(f'{f}(h)', h, d, a+c, n, m)}" for x,f in zip('qkv', (q, k, v))]
        join = at(('y.transpose(1, 2).flatten(2)', f'y.transpose(1, 2).reshape(*h.shape[:2], {n}*{m})',
            'y.transpose(1, 2).reshape(h.shape[0], h.shape[1], -1)'), b+c)
        lines = [*halves, *self.product(h, d, a+b, m, c)]
        if c%4==3 and 'mask' not in ' '.join(lines): # another method
            self.methods += [f'def attention{self.n}(self, h):', *(f'    {l}' for l in lines),
                f'    return {o}({join})']
            return self.say(f'h = h + self.attention{self.n}(h)')
        self.say(*lines, f'h = h + {o}({join})')

    def fused(self, a, b, c):
        h,d = at(HEADS, a),at(DIMS, b)
        f,o = self.linear_layer('qkv', self.w, 3*h*d),self.linear_layer('o', h*d, self.w)
        n,m = self.number_of('heads', h, c),self.number_of('hd', d, c//2)
        parts = (f'q,k,v = {f}(h).reshape(*h.shape[:2], 3, {n}, {m}).permute(2, 0, 3, 1, 4)',
            f'q,k,v = {f}(h).reshape(h.shape[0], -1, 3, {n}, {m}).permute(2, 0, 3, 1, 4).unbind(0)',
            f'q,k,v = (z.view(*h.shape[:2], {n}, -1).transpose(1, 2) for z in {f}(h).chunk(3, -1))',
            f'q,k,v = (z.unflatten(-1, ({n}, {m})).transpose(1, 2) for z in {f}(h).split({n}*{m}, -1))')
        self.say(at(parts, b+c), *self.product(h, d, a+b, m, c), f'h = h + {o}(y.transpose(1, 2).flatten(2))')

    def over_time(self, a, b, c):
        k = at(WIDTHS, a)
        w,u,p = self.linear_layer('w', self.w, k),self.linear_layer('u', k, k),self.linear_layer('p', k, self.w)
        size = at((self.number_of('size', k, c), f'{u}.out_features'), b)
        scale = at(('', '*s.shape[-1]**-.5', f'*{size}**-.5'), c)
        each = at((['for z in h.unbind(1):'], ['for i in range(h.shape[1]):', '    z = h[:, i]'],
            ['for z in h.transpose(0, 1):']), a+b)
        self.say(f's,found = h.new_zeros(h.shape[0], {size}),[]', *each, f'    s = torch.tanh({w}(z)+{u}(s))',
            f'    found.append({p}(s){scale})', 'h = h + torch.stack(found, 1)')

    def over_batch(self, a, b, c):
        o = at(WIDTHS, a)
        f,act = self.linear_layer('f', self.w, o),at(ZERO, c)
        lines = (
            [f'h = torch.stack([F.{act}({f}(z)) for z in h])'],
            ['found = []', 'for i in range(len(h)):', f'    found.append(F.{act}({f}(h[i:i+1])))',
                'h = torch.cat(found)'],
            [f'y = h.new_empty(h.shape[0], h.shape[1], {o})', 'for i in range(len(h)):',
                f'    y[i] = F.{act}({f}(h[i]))', 'h = y'])
        self.say(*at(lines, b))
        self.w = o

    def two_ways(self, cond, a, b):
        "Something else on each side of a condition"
        if a%5<2: return self.say(f'if {cond}:', f"    h = h{at(('.flip(1)', '*2', '+h.tanh()'), b)}")
        f,g = self.linear_layer('f', self.w, self.w),self.linear_layer('g', self.w, self.w)
        if a%5<4: self.say(f'h = F.relu({f}(h)) if {cond} else F.relu({g}(h))')
        else: self.say(f'if {cond}:', f'    h = h + F.tanh({g}(h))')
        self.asks.update(k.removeprefix('self.') for k in (f, g))

    def train_same(self, a, b, c):
        self.say('if self.training:', f"    h = h*{at(('torch.ones(1).to(h)', 'torch.ones_like(h)', '1.'), a)}")
    def train_other(self, a, b, c):
        f,g = self.linear_layer('f', self.w, self.w),self.linear_layer('g', self.w, self.w)
        self.say(f'h = h + F.relu({f}(h) if self.training else {g}(h))')
    def train_more(self, a, b, c):
        f,g = self.linear_layer('f', self.w, at(WIDTHS, a)),self.linear_layer('g', at(WIDTHS, a), self.w)
        self.say('if self.training:', f'    h = h + {g}({f}(h).relu()).mean(1, keepdim=True)')
    def by_value(self, a, b, c):
        cond = at(('x.mean()>0', 'bool((x>1.5).any())', 'h.sum()>0', 'x.flatten()[0].item()>0'), c)
        self.asks.add('value')
        if a%4==3: self.say(f'if {cond}:', '    h = h.flip(2)')
        else: self.two_ways(cond, a, b)
    def by_size(self, a, b, c):
        self.two_ways(at(('h.shape[1]>4', 'h.size(1)<=4', 'x.shape[1]%2==0', 'x.numel()>60'), c), a, b)
    def by_batch(self, a, b, c):
        self.two_ways(at(('len(x)>2', 'h.shape[0]==1', 'x.shape[0]<=2'), c), a, b)
    def by_number(self, a, b, c):
        self.use('t')
        self.two_ways(at(('t>3', 't<1', 'int(t)%2==0'), c), a, b)

    def state(self, a, b, c): # a buffer that each call replaces
        name = self.name('s')
        self.init.append(f"self.register_buffer('{name}', torch.zeros({self.w}))")
        f = self.linear_layer('f', self.w, self.w)
        new = at((f'self.{name} = h.detach().mean((0, 1))',
            f'self.{name} = self.{name}*.5 + h.detach().amax((0, 1))*.5',
            f'self.{name}.copy_(h.detach().mean((0, 1)))'), b)
        self.say(*at(([f'h = h + {f}(self.{name})', new], [new, f'h = h + {f}(self.{name}).relu()']), a))
    def state_kept(self, a, b, c): # of a hidden size of its own
        name,k = self.name('s'),at(WIDTHS, a)
        self.init.append(f"self.register_buffer('{name}', torch.zeros({k}))")
        w,u,p = self.linear_layer('w', self.w, k),self.linear_layer('u', k, k),self.linear_layer('p', k, self.w)
        self.say(f's = torch.tanh({w}(h.mean(1))+{u}(self.{name}))', f'self.{name} = s.detach().mean(0)',
            f'h = h + {p}(s)[:, None]')
    def counter(self, a, b, c): # a number on the module
        name = self.name('calls')
        self.layer(name, '0')
        self.say(f'self.{name} += 1',
            f"h = h*{at((f'(1+.1*(self.{name}%3))', f'(1/self.{name})', f'math.cos(self.{name})'), a)}")
    def remembered(self, a, b, c): # a value of the last call, as a number or a tensor
        name = self.name('last')
        self.layer(name, '0.' if a%2 else 'None')
        f = self.linear_layer('f', 1 if a%2 else INPUT, self.w)
        number = f'h = h + {f}(h.new_full((1,), self.{name}))',f'self.{name} = x.mean().item()'
        tensor = f'if self.{name} is not None:',f'    h = h + {f}(self.{name})',f'self.{name} = x.detach().mean((0, 1))'
        self.say(*(number if a%2 else tensor))
    def past(self, a, b, c): # means of the last calls
        name = self.name('past')
        self.layer(name, at(('deque(maxlen=3)', '[]'), a))
        f = self.linear_layer('f', self.w, self.w)
        self.say(f'self.{name}.append(h.detach().mean((0, 1)))',
            f'h = h + {f}(sum(list(self.{name})[-3:])/3)')
    def cache(self, a, b, c): # made once for each length
        name = self.name('cache')
        self.layer(name, '{}')
        f,g = self.linear_layer('f', 1, at(WIDTHS, a)),self.linear_layer('g', at(WIDTHS, a), self.w)
        self.say('n = h.shape[1]', f'if n not in self.{name}:',
            f'    self.{name}[n] = torch.arange(n).to(h)[:, None]/n', f'h = h + {g}({f}(self.{name}[n]).relu())')
    def kept(self, a, b, c): # features of the first call of each length
        name = self.name('kept')
        self.layer(name, '{}')
        f = self.linear_layer('f', self.w, self.w)
        self.say('n = h.shape[1]', f'if n not in self.{name}:', f'    self.{name}[n] = h.detach().mean(0)',
            f'h = h + {f}(self.{name}[n])')

    def number(self, a, b, c): # a timestep
        self.use('t')
        k = at(WIDTHS, a)
        f,g = self.linear_layer('f', 4, k),self.linear_layer('g', k, self.w)
        e = at(('(torch.arange(1, 5).to(h)*t).sin()', 'torch.tensor([math.sin(t*i) for i in range(1, 5)]).to(h)',
            'h.new_full((4,), float(t)).log1p()'), b)
        self.say(f'e = {e}', f"h = h + {g}(F.{at(ZERO, c)}({f}(e)))")
    def times(self, a, b, c):
        self.use('t')
        self.say(at(('h = h*t', 'h = h/(1+t)', 'h = h*float(t)**.5', 'h = h.mul(t).tanh()'), a))
    def repeat(self, a, b, c):
        self.use('t')
        f = self.linear_layer('f', self.w, self.w)
        self.say('for _ in range(min(int(t), 9)):', f'    h = h + {f}(h).tanh()')

    def norm(self, a, b, c):
        name,w = self.name('norm'),self.w
        self.layer(name, at((f'nn.LayerNorm({w})', f'nn.RMSNorm({w})', f'nn.Parameter(torch.ones({w}))'), a))
        written = f'h = h*torch.rsqrt(h.pow(2).mean(-1, keepdim=True)+1e-6)*self.{name}'
        self.say(written if a%3==2 else f'h = self.{name}(h)')
    def glu(self, a, b, c):
        k = at(WIDTHS, a)
        f,d,n = self.linear_layer('f', self.w, 2*k),self.linear_layer('d', k, self.w),self.number_of('half', k, c)
        halves = (f'a,b = {f}(h).chunk(2, -1)', f'a,b = {f}(h).split({n}, -1)',
            f'z = {f}(h)\na,b = z[..., :{n}],z[..., {n}:]', f'a,b = {f}(h).unflatten(-1, (2, {n})).unbind(-2)')
        self.say(*at(halves, b).split('\n'), f"h = h + {d}(a*{at(('b.sigmoid()', 'F.silu(b)', 'b'), c)})")
    def conv(self, a, b, c):
        self.layer(self.name('conv'),
            f'nn.Conv1d({self.w}, {self.w}, 3, padding=1, groups={2 if b%3==0 and self.w%2==0 else 1})')
        self.say(f'h = h + self.{self.name("conv")}(h.transpose(1, 2)).transpose(1, 2).relu()')
    def image(self, a, b, c):
        self.use('image')
        k = at(WIDTHS, a)
        self.layer(self.name('conv'), f'nn.Conv2d(3, {k}, 3, padding=1)')
        p,z = self.linear_layer('p', k, self.w),f'self.{self.name("conv")}(image).relu()'
        pooled = at(('z.mean((2, 3))', 'z.sum((2, 3))/(z.shape[2]*z.shape[3])', 'z.flatten(2).amax(-1)',
            f'F.adaptive_avg_pool2d(z, 1).view(-1, {k})'), b)
        self.say(f'z = {z}', f'h = h + {p}({pooled})[:, None]')
    def gru(self, a, b, c):
        k,kind = at(WIDTHS, a),at(('GRU', 'LSTM'), b)
        self.layer(self.name('rnn'), f'nn.{kind}({self.w}, {k}, batch_first=True)')
        p = self.linear_layer('p', k, self.w)
        self.say(f'h = h + {p}(self.{self.name("rnn")}(h)[0])')

    def end(self, a, b):
        self.layer('last', f'nn.Linear({self.w}, 4)')
        self.say(at(('y = self.last(h.mean(1))', 'y = self.last(h)', 'y = self.last(h[:, -1])'), a))
        self.say(at(('return y', "return {'logits': y, 'length': h.shape[1]}", "return y,{'best': [y.amax(-1)]}",
            'return [y]'), b))

    # the text

    def takes(self)->str:
        if self.form=='batch': return 'batch'
        more = [k for k in ('t', 'mask', 'image') if k in self.uses]
        more = sorted(more, key='image'.__ne__) # without a default, so before the others
        return ', '.join(['x', *({'t':'t=2', 'mask':'mask=None'}.get(k, k) for k in more)])

    def text(self)->str:
        opening = []
        if self.form=='batch':
            opening = ["x = batch['x']", *(f"{k} = batch['{k}']" for k in sorted(self.uses-{'mask'})),
                *["mask = batch.get('mask')"]*('mask' in self.uses)]
        block = lambda lines, n: '\n'.join(' '*n+l for l in lines)
        return FRAME.format(init=block(self.init, 8), methods=block(self.methods, 4), takes=self.takes(),
            body=block([*opening, *self.body], 8))

@dataclasses.dataclass(frozen=True)
class Case:
    "One input: batch, length, side of an image, number, mask"
    batch:int
    length:int
    side:int
    t:object
    masked:bool

EXAMPLE = Case(2, 4, 8, 2, False)
UNSEEN = Case(3, 7, 11, 5, False),Case(1, 3, 6, .5, True),Case(4, 10, 9, 4, False)

@dataclasses.dataclass
class Source:
    "A module's text, and what it is called with"
    text:str
    uses:set # Inputs besides x
    form:str # One of `Writer.FORMS`
    asks:set=dataclasses.field(default_factory=set) # Layers that some inputs do not reach; 'value' where values decide

    def build(self):
        "The module, from a file of its own: code that is rewritten needs its source"
        return module_of(self.text).Net()

    def input(self, case:Case, seed:int=0):
        "What it is called with"
        g = torch.Generator().manual_seed(seed+case.batch)
        rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
        d = dict(x=rand(case.batch, case.length, INPUT))
        if 't' in self.uses: d['t'] = case.t
        if 'image' in self.uses: d['image'] = rand(case.batch, 3, case.side, case.side)
        if 'mask' in self.uses and case.masked:
            d['mask'] = torch.ones_like(d['x'][..., 0])
            d['mask'][:, -1] = 0
        if self.form=='batch': return (d,)
        if self.form=='keywords': return d
        order = [k for k in ('x', 'image', 't', 'mask') if k in d]
        return d['x'] if order==['x'] else tuple(d[k] for k in order)

def Program(spec, head)->Source:
    "What is written for a list of `(kind, a, b, c)`"
    w = Writer(spec, head)
    return Source(w.text(), w.uses, w.form, w.asks)
def as_program(text, uses, form)->Source:
    "From a text that was printed"
    return Source(text, set(uses), form)

def folder()->Path:
    "Where the texts lie while the tests run"
    if not hasattr(folder, 'at'): folder.at = tempfile.TemporaryDirectory(prefix='programs')
    return Path(folder.at.name)

def module_of(text:str):
    "A Python module with this text, imported from a file"
    name = f"program_{hashlib.sha1(text.encode()).hexdigest()[:12]}"
    if name in sys.modules: return sys.modules[name]
    path = folder()/f'{name}.py'
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m
