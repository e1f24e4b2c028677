"What is true of the example is not taken for true of all: other paths, sizes, numbers, states, and what did not run"
import copy, math, re
from collections import deque, namedtuple
from dataclasses import dataclass
import numpy as np
import pytest, torch, torch.nn.functional as F
from torch import nn
from support import sized_nets as nets
from support.kinds import REFUSALS, call, fresh, holds, inner, keeps, near, quietly, refused, silenced, words
from fasterprune.surgery.pruner import Pruner

pytestmark = pytest.mark.filterwarnings('ignore')
TOKENS = lambda b=2, n=7, c=32: torch.randn(b, n, c)

@pytest.fixture(autouse=True)
def _seeded(): torch.manual_seed(0)

class Heads(nets.Base):
    "Heads of three layers, and back"
    def cut(self, x): return (l(x).unflatten(-1, (self.h, -1)).transpose(1, 2) for l in (self.q, self.k, self.v))
    def back(self, a, v): return self.o((a.softmax(-1)@v).transpose(1, 2).flatten(2))

# ---- paths: arguments that may be there or not

class Masked(Heads):
    def forward(self, x, mask=None):
        q,k,v = self.cut(x)
        bias = 0 if mask is None else (1-mask[:,None,None])*-1e4
        return self.back(q@k.mT*q.shape[-1]**-.5+bias, v)

class BiasFirst(Heads):
    "With a mask other calls come first, and there are more of them"
    def forward(self, x, mask=None, gain=None):
        if mask is not None:
            x = x*mask.reshape(len(x), -1, 1)
            mask = torch.ones(len(x), 1, x.shape[1]).mul(mask[:,None]).view(len(x), 1, 1, -1)
        if gain is not None: x = x.mul(gain).reshape(x.shape)
        q,k,v = self.cut(x)
        a = q@k.mT
        if mask is not None: a = a.masked_fill(mask==0, -1e4)
        return self.back(a.mul(q.size(-1)**-.5), v)

class SdpaMasked(Heads):
    def forward(self, x, mask=None, causal=False):
        q,k,v = self.cut(x)
        m = None if mask is None else mask[:,None,None].bool()
        if causal and m is not None: m = m&torch.ones(x.shape[1], x.shape[1]).tril().bool()
        y = F.scaled_dot_product_attention(q, k, v, m, is_causal=causal and m is None)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], -1))

def token_mask(x):
    m = torch.ones(x.shape[:2])
    m[:, x.shape[1]//2+1:] = 0
    return m

@pytest.mark.parametrize('end', ['[inner]', '[outer]'])
@pytest.mark.parametrize('net', [Masked, BiasFirst, SdpaMasked])
def test_mask_that_the_example_had_not(net, end):
    "Pruned with a plain call, used with a mask: as the law says, and masked tokens do not leak"
    x = TOKENS()
    m,r,want = holds(net, x, [(TOKENS(3, 9), token_mask(TOKENS(3, 9)))], sparsity=inner(fresh(net), x, end))
    mask,loud = token_mask(x),x.clone()
    loud[:, 5:] += 10
    near(quietly(m, (loud, mask))[:, :4], quietly(m, (x, mask))[:, :4])

def test_more_arguments_than_the_example_had():
    x = TOKENS()
    how = dict(sparsity=inner(fresh(BiasFirst), x))
    holds(BiasFirst, x, [dict(x=x, gain=2.), dict(x=x, gain=torch.rand(2, 1, 1), mask=token_mask(x))], **how)
    holds(SdpaMasked, x, [dict(x=x, causal=True), dict(x=x, mask=token_mask(x), causal=True)], **how)

class TwoBranches(Heads):
    "The branch for masks has sizes, a scale and a layer of its own"
    def __init__(self):
        super().__init__()
        self.bias = nn.Linear(3, self.h)
    def forward(self, x, pairs=None):
        b,n,_ = x.shape
        q,k,v = self.cut(x)
        if pairs is None: return self.back(q@k.mT*self.d**-.5, v)
        a = (q@k.mT).view(b*self.h, n, n)/math.sqrt(q.shape[-1])
        return self.back(a.view(b, self.h, n, n)+self.bias(pairs).view(b, n, n, self.h).permute(0, 3, 1, 2), v)

class ByName(nn.Module):
    "Which of two branches runs is said by a word"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.o = nn.Linear(8, 16),nn.Linear(16, 16),nn.Linear(16, 16),nn.Linear(16, 4)
    def forward(self, x, mode='plain'):
        h = self.a(x).relu()
        if mode=='flip': h = self.c(h.flip(-1)).view(len(x), 16)*self.b(h).roll(1, -1)
        return self.o(self.b(h))

@pytest.mark.parametrize('end', ['[inner]', '[outer]'])
def test_examples_of_both_branches(end):
    "`examples=`: each path that must keep working is cut along, and is right"
    x,pairs = TOKENS(),torch.randn(2,7,7,3)
    m,r,want = holds(TwoBranches, x, [(x, pairs), (TOKENS(3, 5), torch.randn(3,5,5,3)), TOKENS(1, 9)],
        options=dict(examples=[(x, pairs)]), sparsity=inner(fresh(TwoBranches), x, end))
    n = 2 if end=='[outer]' else 4
    assert m.bias.out_features==n

def test_examples_in_other_forms():
    "A dict beside a tensor, a tuple beside a dict; what holds for one path only stays"
    x,mask = TOKENS(),token_mask(TOKENS())
    how = dict(sparsity=inner(fresh(Masked), x))
    for ex in ([dict(x=x, mask=mask)], [(x, mask), dict(x=TOKENS(3, 4))], ((x, mask),)):
        m,r,_ = holds(Masked, x, [(TOKENS(4, 5), token_mask(TOKENS(4, 5)))], options=dict(examples=ex), **how)
    x = torch.randn(5, 8)
    holds(ByName, x, [(x, 'flip'), (x[:2], 'plain')], cut=False, options=dict(examples=[(x, 'flip')]), sparsity=.5)
    holds(ByName, (x, 'flip'), [(x, 'plain')], cut=False, options=dict(examples=[dict(x=x)]), sparsity=.5)

def test_an_example_that_the_model_refuses():
    "An example of the user's own that does not run is said, and nothing has changed"
    m = fresh(Masked)
    was = copy.deepcopy(m.state_dict())
    refused(lambda: Pruner(m, TOKENS(), examples=[torch.randn(2, 7, 31)]).prune(.5), 'example')
    assert all(torch.equal(a, b) for a,b in zip(was.values(), m.state_dict().values()))

def test_no_examples_are_as_none():
    a,b = (holds(Masked, TOKENS(), options=o, sparsity=.5)[1] for o in ({}, dict(examples=[])))
    assert a.plan==b.plan

# ---- training

class InTraining(Heads):
    def forward(self, x, mask=None):
        if self.training: x = x*torch.ones(1)
        q,k,v = self.cut(x)
        return self.back(q@k.mT*q.shape[-1]**-.5, v)

class OtherScale(Heads):
    "In training the scale is worked out elsewhere, after calls that evaluation does not make"
    def forward(self, x):
        b,n,_ = x.shape
        if self.training:
            x = x.view(b*n, -1).reshape(b, n, -1)
            q,k,v = (t.reshape(b, self.h, n, -1) for t in self.cut(x))
            return self.back((q@k.mT)/math.sqrt(k.shape[-1]), v)
        q,k,v = self.cut(x)
        return self.back(q@k.mT*self.d**-.5, v)

class Drops(nn.Module):
    "Dropout and stochastic depth that do nothing at rate 0, a BatchNorm, an auxiliary sum in training"
    def __init__(self):
        super().__init__()
        self.a,self.n,self.b,self.o,self.d = nn.Conv2d(3, 8, 3, padding=1),nn.BatchNorm2d(8),nn.Conv2d(8, 16,
            1),nn.Linear(16, 4),nn.Dropout(0.)
    def forward(self, x):
        h = self.d(self.n(self.a(x)).relu())
        if self.training: h = h*h.new_empty((h.shape[0],)+(1,)*(h.ndim-1)).bernoulli_(1.)
        g = self.b(h)
        if self.training: g = g+g.flatten(2).mean(-1).view(len(x), 16, 1, 1)*0
        return self.o(self.d(g.relu().mean((2, 3))))

@pytest.mark.parametrize('net,x', [(InTraining, TOKENS()), (OtherScale, TOKENS()), (Drops, torch.randn(4,3,8,8))])
def test_training_mode_computes_the_same(net, x):
    "The law holds in training mode, forward and backward, at other sizes too"
    groups = inner(fresh(net), x) or .5
    m,r,want = holds(net, x, sparsity=groups)
    for y in (x, torch.randn(3, *((11, 32) if x.dim()==3 else (3, 6, 9)))):
        m.train()
        want.train()
        a,b = m(y),want(y)
        near(a, b)
        a.square().mean().backward()
        b.square().mean().backward()
        near(m.o.bias.grad, want.o.bias.grad)

class Auxiliary(nn.Module):
    "A head that only training runs, with another argument"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.aux = nn.Linear(8, 16),nn.Linear(16, 4),nn.Linear(16, 4)
    def forward(self, x, y=None):
        h = self.a(x).relu()
        return self.b(h) if not self.training else F.mse_loss(self.b(h), y)+F.mse_loss(self.aux(h), y)

class DeepSupervision(nn.Module):
    "As in GoogLeNet: two heads on the way, in training only, given back beside the output"
    def __init__(self):
        super().__init__()
        conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU())
        self.s1,self.s2,self.s3,self.fc = conv(3, 8),conv(8, 12),conv(12, 16),nn.Linear(16, 4)
        self.aux1,self.aux2 = nn.Linear(8, 4),nn.Sequential(nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(6*64, 4))
    def forward(self, x):
        a = self.s1(x)
        b = self.s2(a)
        y = self.fc(self.s3(b).mean((2, 3)))
        return (y, self.aux1(a.mean((2, 3))), self.aux2(b)) if self.training else y

class Losses(nn.Module):
    "As in Hugging Face: labels make another head run, and the output another"
    def __init__(self):
        super().__init__()
        self.e,self.a,self.score,self.reg = nn.Embedding(20, 16),nn.Linear(16, 24),nn.Linear(24, 3),nn.Linear(24, 1)
    def forward(self, ids, labels=None):
        h = self.a(self.e(ids)).tanh().mean(1)
        if labels is None: return dict(logits=self.score(h))
        return dict(logits=self.score(h), loss=F.cross_entropy(self.score(h), labels)+self.reg(h).square().mean())

AUX = dict(aux=(Auxiliary, torch.randn(2,8), (torch.randn(2,8), torch.randn(2,4)), ['aux']),
    deep=(DeepSupervision, torch.randn(2,3,8,8), torch.randn(3,3,8,8), ['aux1', 'aux2.0']),
    losses=(Losses, torch.randint(20, (2,5)), (torch.randint(20, (4,6)), torch.tensor([0,1,2,1])), ['reg']))

@pytest.mark.parametrize('name', AUX)
def test_head_used_in_training_only(name):
    "It is cut along, and computes what the law says, or the report names it"
    make,x,call_in_training,heads = AUX[name]
    m = fresh(make)
    dense = copy.deepcopy(m)
    r = Pruner(m, x).prune(.5)
    assert r.removed
    try: near(call(m.train(), call_in_training), call(silenced(dense, r.plan).train(), call_in_training))
    except RuntimeError: assert all(h in words(r) for h in heads), str(r)

@pytest.mark.parametrize('name', ['aux', 'losses'])
def test_head_with_its_own_example(name):
    "With an example of how training calls it, it is cut along"
    make,x,other,heads = AUX[name]
    m = fresh(make)
    if name=='aux': m.train()
    dense = copy.deepcopy(m)
    r = Pruner(m, x if name!='aux' else other, examples=[other]).prune(.5)
    assert r.removed
    near(call(m.train(), other), call(silenced(dense, r.plan).train(), other))

# ---- loops and sizes

class OverTime(nn.Module):
    def __init__(self):
        super().__init__()
        self.q,self.k,self.o = nn.Linear(6, 16),nn.Linear(6, 16),nn.Linear(16, 4)
    def forward(self, x):
        out = []
        for t in x.unbind(1):
            q,k = self.q(t),self.k(t)
            out.append(self.o((q*k*q.shape[-1]**-.5).relu()))
        return torch.stack(out, 1)

class Cell(nn.Module):
    "A recurrent cell written by hand: gates by views and splits, a state of the width made before the loop"
    def __init__(self):
        super().__init__()
        self.n,self.i,self.hh,self.o = 12,nn.Linear(6, 36),nn.Linear(12, 36),nn.Linear(12, 4)
    def forward(self, x):
        h = x.new_zeros(len(x), self.n)
        for t in range(x.shape[1]):
            r,z,c = self.i(x[:, t]).view(-1, 3, self.n).unbind(1)
            a,b,d = self.hh(h).split(self.n, -1)
            h = (1-(z+b).sigmoid())*(c+(r+a).sigmoid()*d).tanh()+(z+b).sigmoid()*h
        return self.o(h)

class Decode(nets.Base):
    "Each step looks at all steps before it: keys and values grow"
    def forward(self, x):
        ks,vs,out = [],[],[]
        for t in x.split(1, 1):
            q,k,v = (l(t).view(len(x), 1, self.h, self.d).transpose(1, 2) for l in (self.q, self.k, self.v))
            ks.append(k)
            vs.append(v)
            a = q@torch.cat(ks, 2).mT*(1/math.sqrt(q.shape[-1]))
            out.append((a.softmax(-1)@torch.cat(vs, 2)).transpose(1, 2).reshape(len(x), 1, self.h*self.d))
        return self.o(torch.cat(out, 1))

class Pyramid(nn.Module):
    "Halves an image until it is small: the number of rounds depends on its size, each with a call that says the width"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.o = nn.Conv2d(3, 16, 1),nn.Conv2d(16, 16, 3, padding=1),nn.Linear(16, 4)
    def forward(self, x):
        h,total = self.a(x),0
        while h.shape[-1]>2:
            h = F.avg_pool2d(self.b(h).relu(), 2)
            total = total+h.mean((2, 3)).view(-1, 16)
        return self.o(total)

class Batches(nn.Module):
    "A loop over the batch, and one over chunks of the length"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.o = nn.Linear(6, 16),nn.Linear(16, 16),nn.Linear(16, 4)
    def forward(self, x):
        rows = [torch.cat([self.b(c).view(-1, 16).tanh() for c in self.a(row).split(3)]) for row in x]
        return self.o(torch.stack(rows))

@pytest.mark.parametrize('net,x,others', [
    (OverTime, torch.randn(2,4,6), [torch.randn(2,9,6), torch.randn(3,2,6), torch.randn(1,1,6)]),
    (Cell, torch.randn(2,4,6), [torch.randn(2,9,6), torch.randn(3,1,6)]),
    (Decode, torch.randn(2,4,32), [torch.randn(3,7,32), torch.randn(1,1,32)]),
    (Pyramid, torch.randn(2,3,8,8), [torch.randn(2,3,32,32), torch.randn(3,3,4,4)]),
    (Batches, torch.randn(2,6,6), [torch.randn(5,12,6), torch.randn(1,4,6)])])
def test_loops_that_run_more_often(net, x, others): holds(net, x, others, sparsity=.5)

def small_swin(): # an image that the windows do not divide is padded, one of a single window is not shifted
    from torchvision.models import SwinTransformer
    return SwinTransformer([4,4], 24, [2,2], [3,6], [4,4], num_classes=10)
def small_swin_2():
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
    return SwinTransformer([4,4], 24, [2,2], [3,6], [4,4], num_classes=10, block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2)

@pytest.mark.parametrize('make', [small_swin, small_swin_2, nets.Windows])
def test_images_of_another_size(make):
    "Windows, shifts and paddings of other images; norms keep their divisor, so the law is that of zeros"
    sizes = [(64,64), (96,64), (80,72), (32,32)] if make is not nets.Windows else [(8,8), (16,12), (4,4)]
    holds(make, torch.randn(2,3,*sizes[0]), [torch.randn(1,3,*s) for s in sizes[1:]], tol=1e-4,
        options=dict(exact_norms=True), sparsity=.5)

@pytest.mark.slow
def test_swin_at_256():
    import torchvision
    m = fresh(torchvision.models.swin_t)
    assert Pruner(m, torch.randn(1,3,224,224)).prune(.5, verify=False).removed
    assert quietly(m, torch.randn(1,3,256,256)).shape==(1,1000)

def scaled(number):
    "An attention whose scale is this function of a query and a key"
    class Scaled(Heads):
        def forward(self, x):
            q,k,v = self.cut(x)
            return self.back(q@k.mT*number(q, k), v)
    return Scaled

def by_two(q, k): return q.shape[-1]**-.5*float(k.shape[-2])**-.5 # a ratio that is the same at every length
def product(q, k): return (q.shape[-1]*k.shape[-2])**-.5
def logarithm(q, k): return math.log2(1+k.shape[2])/math.sqrt(q.size(3))
def of_batch(q, k): return 1/(np.sqrt(q.shape[-1])*len(k))
def heads_too(q, k): return 1/math.sqrt(q.shape[1]*q.shape[3])
def total(q, k): return (q.shape[-1]+k.shape[-2])**-.5 # and where it is not
def maximum(q, k): return max(q.shape[-1], k.shape[-2])**-.5
def by_case(q, k): return q.shape[-1]**-.5 if k.shape[-2]<8 else 1/k.shape[-2]

@pytest.mark.parametrize('end', ['[inner]', '[outer]'])
@pytest.mark.parametrize('number', [by_two, product, logarithm, of_batch, heads_too, total, maximum, by_case])
def test_numbers_of_widths_and_lengths(number, end):
    "What follows from the width is what it was, what follows from the length follows it still"
    x,others = TOKENS(2, 5),[TOKENS(2, 11), TOKENS(3, 9), TOKENS(1, 8), TOKENS(4, 2)]
    sure = number in (by_two, product, logarithm, of_batch) or end=='[outer]' and number is not heads_too
    holds(scaled(number), x, others, cut=sure, sparsity=inner(fresh(scaled(number)), x, end))

# ---- attributes that are equal by chance

class MaxTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.hd = self.max_tokens = 8
        self.qkv,self.o = nn.Linear(16, 48),nn.Linear(16, 4)
    def forward(self, x):
        x = x[:, :self.max_tokens]
        b,n,_ = x.shape
        q,k,v = self.qkv(x).view(b, n, 3, 2, self.hd).permute(2, 0, 3, 1, 4)
        return self.o((q@k.mT*.3).softmax(-1).matmul(v).transpose(1, 2).reshape(b, n, -1))

class Rounds(nn.Module):
    "A number of rounds, a padding and a width are the same number"
    def __init__(self):
        super().__init__()
        self.width,self.rounds,self.pad = 6,6,6
        self.a,self.b,self.o = nn.Linear(5, 6),nn.Linear(6, 6),nn.Linear(6, 4)
    def forward(self, x):
        h = F.pad(self.a(x), (0, 0, self.pad, 0)).view(len(x), -1, self.width)
        for _ in range(self.rounds): h = h+self.b(h).tanh().view(len(x), -1, self.width)/self.rounds
        return self.o(h)[:, self.pad:]

class OfTheClass(nn.Module):
    "A class attribute and an attribute of a child, one a size and one not"
    width = tokens = 10
    def __init__(self):
        super().__init__()
        self.a,self.b,self.o = nn.Linear(5, 10),nn.Linear(5, 10),nn.Linear(10, 4)
        self.a.limit = 10
    def forward(self, x):
        h = self.a(x)[:, :self.a.limit]*self.b(x)[:, :self.tokens]
        return self.o(h.reshape(-1, self.width)).view(len(x), -1, 4)

@pytest.mark.parametrize('net,x,others', [(MaxTokens, torch.randn(2,4,16), [torch.randn(2,7,16), torch.randn(1,12,16)]),
    (Rounds, torch.randn(2,3,5), [torch.randn(3,9,5)]),
    (OfTheClass, torch.randn(2,4,5), [torch.randn(2,8,5), torch.randn(1,15,5)])])
def test_attributes_that_are_equal_by_chance(net, x, others): holds(net, x, others, sparsity=.5)

# ---- inputs that are no tensors

class Timestep(nn.Module):
    "Features of what it is given, made by `feature`, beside those of a tensor"
    def __init__(self, feature):
        super().__init__()
        self.feature,self.a,self.t1,self.t2,self.o = feature,nn.Linear(6, 8),nn.Linear(4, 16),nn.Linear(16,
            8),nn.Linear(8, 3)
    def forward(self, x, t): return self.o((self.a(x)+self.t2(self.t1(self.feature(t)).relu())).relu())

WAVES = torch.arange(1, 5, dtype=torch.float)
@dataclass
class Settings:
    t:float
INPUTS = dict(
    number=(lambda t: (t*WAVES).sin(), [3, 7, 100.5, -2]),
    python=(lambda t: torch.tensor([math.sin(t*k) for k in (1,2,3,4)]), [.3, 7., -1.]),
    list=(lambda t: torch.tensor(t), [[.1,.2,.3,.4], [4.,3.,2.,1.], [-1.,-1.,-1.,-1.]]),
    dict=(lambda t: torch.stack([torch.tensor(float(v)) for v in t.values()]),
    [dict(a=1,b=2,c=3,d=4), dict(a=-1,b=0,c=0,d=9)]),
    flag=(lambda t: WAVES if t else -WAVES, [True, False]),
    dataclass=(lambda t: t.t*WAVES, [Settings(1.), Settings(-5.)]),
    numpy=(lambda t: torch.from_numpy(t).float(), [np.arange(4.), -np.arange(4.), np.random.RandomState(0).randn(4)]),
    numpy_number=(lambda t: float(t)*WAVES, [np.float32(1.5), np.float64(-4.), np.int64(3)]),
    numpy_nested=(lambda t: torch.as_tensor(t[0]['a'], dtype=torch.float),
    [[dict(a=np.ones(4))], [dict(a=-np.arange(4.))]]))

@pytest.mark.parametrize('how', [None, .5])
@pytest.mark.parametrize('name', INPUTS)
def test_what_is_given_is_an_input(name, how):
    "A number, a list, a dict, an object, an array: no constant, also where units are dead"
    feature,values = INPUTS[name]
    def make():
        m = Timestep(feature)
        with torch.no_grad():
            m.t1.weight[:5],m.t1.bias[:5] = 0,torch.linspace(-1, 1, 5)
        return m
    x = torch.randn(3, 6)
    others = [(torch.randn(4, 6), v) for v in values]
    if how is None:
        m,r,_ = keeps(make, (x, values[0]), others)
        assert r.removed>=5 and m.t1.out_features<=11
    else: holds(make, (x, values[0]), others, sparsity=how)

class SetBefore(nn.Module):
    "A call gets what was set before it"
    def __init__(self, put, get):
        super().__init__()
        self.put,self.get = put,get
        self.a,self.t1,self.t2,self.o = nn.Linear(6, 8),nn.Linear(4, 16),nn.Linear(16, 8),nn.Linear(8, 3)
    def set_input(self, v): self.put(self, v)
    def forward(self, x): return self.o((self.a(x)+self.t2(self.t1(self.get(self)).relu())).relu())

class Slots:
    __slots__ = ('value',)
    def __init__(self, value): self.value = value

PLACES = dict(
    tensor=(lambda m, v: setattr(m, 'v', v), lambda m: m.v),
    array=(lambda m, v: setattr(m, 'v', v.numpy()), lambda m: torch.from_numpy(m.v)),
    list=(lambda m, v: setattr(m, 'v', v.tolist()), lambda m: torch.tensor(m.v)),
    deque=(lambda m, v: setattr(m, 'v', deque([v])), lambda m: m.v[-1]),
    slots=(lambda m, v: setattr(m, 'v', Slots(v)), lambda m: m.v.value),
    nested=(lambda m, v: setattr(m, 'v', dict(a=[(v,)])), lambda m: m.v['a'][0][0]),
    number=(lambda m, v: setattr(m, 'v', v[0].item()), lambda m: m.v*WAVES))

@pytest.mark.parametrize('name', PLACES)
def test_what_was_set_before_is_an_input(name):
    put,get = PLACES[name]
    def make():
        m = SetBefore(put, get)
        m.set_input(torch.tensor([.5, -1., 2., 0.]))
        with torch.no_grad(): m.t1.weight[:5],m.t1.bias[:5] = 0,-1.
        return m
    x = torch.randn(3, 6)
    m,r,dense = keeps(make, x)
    for v in (torch.randn(4), -torch.ones(4)):
        for n in (m, dense): n.set_input(v)
        near(quietly(m, x), quietly(dense, x))

# ---- constants that depend on a size

class Area(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.o = nn.Conv2d(3, 8, 3, padding=1),nn.Linear(8, 4)
    def forward(self, x):
        h = self.a(x).sigmoid()
        return self.o(h.mean((2,3))*(h.shape[2]*h.shape[3]))

class Summed(nn.Module):
    "A dead channel carries .5 for each token, and the sum counts them"
    def __init__(self):
        super().__init__()
        self.a,self.o = nn.Linear(3, 8),nn.Linear(8, 4)
    def forward(self, x): return self.o(self.a(x).sigmoid().sum(1))

class OfBatch(nn.Module):
    "What a dead channel carries depends on the batch"
    def __init__(self):
        super().__init__()
        self.a,self.o = nn.Linear(3, 8),nn.Linear(8, 4)
    def forward(self, x): return self.o(self.a(x).sigmoid()/len(x)+self.a(x).cosh().cumsum(0)[-1:])

class Grid(nn.Module):
    "Coordinates are added before a layer that is dead: what it carries depends on the place"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.o = nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(8, 8, 3, padding=1),nn.Linear(8, 4)
    def forward(self, x):
        h,w = x.shape[2:]
        g = torch.linspace(-1, 1, h)[:,None]*torch.linspace(0, 2, w)*h
        return self.o(self.b(self.a(x)+g).relu().amax((2,3)))

@pytest.mark.parametrize('net,shapes', [(Area, [(2,3,6,6), (2,3,9,9), (1,3,17,5)]),
    (Summed, [(2,5,3), (2,11,3), (7,1,3)]),
    (OfBatch, [(2,3), (9,3), (1,3)]), (Grid, [(2,3,6,6), (2,3,9,9), (1,3,5,17)])])
def test_constants_of_a_size(net, shapes):
    "They are not folded at the example's size"
    def dead(m): m.a.weight[:4] = 0
    x,*others = (torch.randn(s) for s in shapes)
    keeps(net, x, others, dead=dead)

class PositionMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.e,self.p,self.p2,self.o = nn.Linear(6, 8),nn.Linear(1, 16),nn.Linear(16, 8),nn.Linear(8, 3)
    def forward(self, x):
        p = torch.arange(x.shape[1], dtype=x.dtype)[:,None]
        return self.o(self.e(x)+self.p2(self.p(p).relu()))

class PairBias(Heads):
    "As in Swin v2: a bias from a small network of relative positions, a column a head"
    def __init__(self):
        super().__init__()
        self.p1,self.p2 = nn.Linear(1, 16),nn.Linear(16, self.h)
    def forward(self, x):
        q,k,v = self.cut(x)
        i = torch.arange(x.shape[1], dtype=x.dtype)
        bias = self.p2(self.p1((i[:,None]-i)[...,None]).relu())
        return self.back(q@k.mT*.3+bias.permute(2, 0, 1), v)

class Embedded(nn.Module):
    "Learned positions by an index that the length makes, and a network on them"
    def __init__(self):
        super().__init__()
        self.e,self.pos,self.a,self.o = nn.Linear(6, 8),nn.Embedding(64, 12),nn.Linear(12, 8),nn.Linear(8, 3)
    def forward(self, x): return self.o((self.e(x)+self.a(self.pos(torch.arange(x.shape[1])).relu())).relu())

@pytest.mark.parametrize('how', [None, .5])
@pytest.mark.parametrize('net,c', [(PositionMLP, 6), (PairBias, 32), (Embedded, 6)])
def test_positions_are_no_constants(net, c, how):
    "Computed from the length: nothing of it is dead, however short the example"
    x,others = torch.randn(2, 2, c),[torch.randn(2, 40, c), torch.randn(3, 1, c)]
    if how is None:
        m,r,_ = keeps(net, x, others)
        assert not r.removed
    else: holds(net, x, others, sparsity=how)

# ---- state between calls

class Hidden(nn.Module):
    def __init__(self, put, get):
        super().__init__()
        self.put,self.get,self.a,self.u,self.w,self.o = put,get,nn.Linear(6, 8),nn.Linear(8, 16),nn.Linear(16,
            8),nn.Linear(8, 3)
        self.register_buffer('h', torch.zeros(8))
        self.old,self.n,self.box = torch.zeros(8),0,dict(h=[torch.zeros(8)])
    def forward(self, x):
        h = (self.a(x)+self.w(self.u(self.get(self)).relu())).tanh()
        self.put(self, h.detach().mean(0))
        return self.o(h)
def count(m, h): m.n += 1
def push(m, h): m.box['h'] = [*m.box['h'], h][-2:]

STATES = dict(buffer=(lambda m, h: setattr(m, 'h', h), lambda m: m.h),
    in_place=(lambda m, h: m.h.mul_(.5).add_(h), lambda m: m.h),
    attribute=(lambda m, h: setattr(m, 'old', h), lambda m: m.old), nested=(push, lambda m: sum(m.box['h'])),
    counter=(count, lambda m: torch.full((8,), float(m.n))))

@pytest.mark.parametrize('name', STATES)
def test_state_between_calls(name):
    "What forward itself assigns is no constant, and is after the check what it was"
    m = fresh(lambda: Hidden(*STATES[name]))
    dense,x = copy.deepcopy(m),torch.randn(4, 6)
    Pruner(m, x).prune()
    for k in range(5):
        x = torch.randn(4, 6)
        near(quietly(m, x), quietly(dense, x))

# ---- values decide

class FlipByValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.o = nn.Linear(6, 8),nn.Linear(8, 3)
    def forward(self, x):
        h = self.a(x)
        return self.o(h.flip(1) if x.mean()>0 else h)

class EarlyExit(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.o,self.early = nn.Linear(6, 16),nn.Linear(16, 16),nn.Linear(16, 3),nn.Linear(16, 3)
    def forward(self, x):
        h = self.a(x).relu()
        if x.mean()>0: return self.early(h)
        return self.o(self.b(h).relu())

class Routed(nn.Module):
    "The expert is chosen by the values, and reads and writes what the others do"
    def __init__(self):
        super().__init__()
        self.a,self.gate,self.o = nn.Linear(6, 16),nn.Linear(6, 3),nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(3))
    def forward(self, x):
        h = self.a(x).relu()
        return self.o(self.experts[int(self.gate(x).mean(0).argmax())](h))

class UntilSmall(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.o = nn.Linear(6, 16),nn.Linear(16, 16),nn.Linear(16, 3)
    def forward(self, x):
        h,k = self.a(x),0
        while h.abs().max()>1 and k<5: h,k = self.b(h).flip(-1)*.5,k+1
        return self.o(h)

@pytest.mark.parametrize('net', [FlipByValue, EarlyExit, Routed, UntilSmall])
def test_paths_by_value(net):
    "On each path right, or the report says that values decided the path"
    m = fresh(net)
    dense,x = copy.deepcopy(m),torch.randn(4, 6)
    r = Pruner(m, x).prune(.5)
    want = silenced(dense, r.plan)
    for y in (x.abs(), -x.abs(), x*20, x*.01, *(torch.randn(4, 6) for _ in range(6))):
        try: near(quietly(m, y), quietly(want, y))
        except (AssertionError, RuntimeError, IndexError): assert re.search('value|path',
            str(r).lower()), f"wrong on another path, and no word about it:\n{r}"

# ---- what did not run

class Condition(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.c,self.o = nn.Linear(8, 32),nn.Linear(5, 32),nn.Linear(32, 3)
    def forward(self, x, cond=None):
        h = self.a(x)
        return self.o(F.relu(h if cond is None else h+self.c(cond)))

class OneExpert(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.o = nn.Linear(8, 32),nn.Linear(32, 3)
        self.experts = nn.ModuleDict({k:nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32))
            for k in ('text', 'image')})
    def forward(self, x, kind='text'): return self.o(self.experts[kind](self.a(x)))

class OwnMethod(nn.Module):
    "A head that only another method calls, and a parameter that only an argument uses"
    def __init__(self):
        super().__init__()
        self.a,self.o,self.project,self.prompt = nn.Linear(8, 32),nn.Linear(32, 3),nn.Linear(32,
            6),nn.Parameter(torch.randn(32))
    def features(self, x, prompt=False): return self.a(x).relu()+(self.prompt if prompt else 0)
    def embed(self, x): return self.project(self.features(x))
    def forward(self, x, prompt=False): return self.o(self.features(x, prompt))

@pytest.mark.parametrize('net,names,whole', [(Condition, ['c'], lambda m: m(torch.randn(2,8), torch.randn(2,5))),
    (OneExpert, ['experts.image.0', 'experts.image.2'], lambda m: m(torch.randn(2,8), 'image')),
    (OwnMethod, ['project', 'prompt'], lambda m: (m.embed(torch.randn(2,8)), m(torch.randn(2,8), True)))])
def test_what_did_not_run_is_named(net, names, whole):
    "In the report and in the plan, unless it works as it is; what is its own part of a name is not enough"
    m = fresh(net)
    plan = Pruner(copy.deepcopy(m), torch.randn(2, 8)).plan(.5)
    r = Pruner(m, torch.randn(2, 8)).prune(.5)
    assert r.removed
    try: whole(m)
    except RuntimeError:
        for said in (r, plan): assert all(n in words(said)
            or any(n.startswith(f"{w}.") for w in words(said) if len(w)>2) for n in names), str(said)

@pytest.mark.parametrize('net,example', [(Condition, (torch.randn(2,8), torch.randn(2,5))),
    (OneExpert, (torch.randn(2,8), 'image')), (OwnMethod, (torch.randn(2,8), True))])
def test_what_runs_in_an_example_is_cut_along(net, example):
    x = torch.randn(2, 8)
    m,r,_ = holds(net, x, [example], options=dict(examples=[example]), sparsity=.5)
    dense = fresh(net)
    assert sum(p.numel() for p in m.parameters())<sum(p.numel() for p in dense.parameters())

class Timmlike(nn.Module):
    "Attributes that other code reads: on the model, on a block, in a dict"
    def __init__(self):
        super().__init__()
        self.num_features = self.embed_dim = 16
        self.stem,self.fc = nn.Conv2d(3, 16, 3),nn.Linear(16, 4)
        self.feature_info = dict(num_chs=16)
    def forward_features(self, x): return self.stem(x).relu()
    def forward(self, x): return self.fc(self.forward_features(x).mean((2,3)))
    def reset_classifier(self, n): self.fc = nn.Linear(self.num_features, n)

def test_attributes_that_still_say_an_old_size():
    "They are mended or named; a classifier that is made anew by them fits"
    m,r,_ = holds(Timmlike, torch.randn(2,3,8,8), sparsity=.5)
    assert m.num_features==m.fc.in_features==8 or 'num_features' in str(r)
    assert m.embed_dim==8 or 'embed_dim' in str(r)
    if m.num_features==8:
        m.reset_classifier(7)
        assert quietly(m, torch.randn(2,3,9,9)).shape==(2,7)

# ---- PyTorch's own fast paths

def encoder(**how): return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, 0., batch_first=True), 2, **how)
class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.e,self.t,self.o = nn.Embedding(20, 16),encoder(),nn.Linear(16, 5)
    def forward(self, ids): return self.o(self.t(self.e(ids),
        src_key_padding_mask=ids==0).masked_fill((ids==0)[...,None], 0))
class Attended(nn.Module):
    def __init__(self):
        super().__init__()
        self.m,self.o = nn.MultiheadAttention(16, 4, batch_first=True),nn.Linear(16, 5)
    def forward(self, x, pad): return self.o(self.m(x, x, x, key_padding_mask=pad, need_weights=False)[0])

PADS = torch.arange(7).expand(2, 7)>torch.tensor([[6],[3]])
IDS = torch.tensor([[3,4,5,6,7,8,9],[3,4,5,0,0,0,0]])
@pytest.mark.parametrize('make,x,others', [(Padded, IDS, [torch.tensor([[5,6,0],[1,2,3],[9,0,0]])]),
    (encoder, dict(src=torch.randn(2,7,16), src_key_padding_mask=PADS),
    [dict(src=torch.randn(2,7,16)), torch.randn(3,5,16)]),
    (Attended, (torch.randn(2,7,16), PADS), [(torch.randn(3,4,16),
    torch.tensor([[0,0,0,1],[0,0,0,0],[0,1,1,1]]).bool())])])
def test_own_fast_paths(make, x, others):
    "Padding masks, without gradients, where PyTorch takes its fused path, and with them, where it does not"
    m = fresh(make)
    dense = copy.deepcopy(m)
    r = Pruner(m, x, exact_norms=True).prune(.5)
    assert r.removed
    want = silenced(dense, r.plan)
    for o in (x, *others):
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode(): got = call(m, o)
            slow = call(want, o)
            if isinstance(o, dict) and 'src_key_padding_mask' in o: # what stands at padding is not defined
                got,slow = (t.masked_fill(o['src_key_padding_mask'][:, :t.shape[1], None], 0) for t in (got, slow))
            near(got, slow, 1e-4)

# ---- outputs that hide

class Out:
    __slots__ = ('y',)
    def __init__(self, y): self.y = y
class Plain:
    def __init__(self, y): self.inner = Out(y)
    @property
    def y(self): return self.inner.y
Pair = namedtuple('Pair', 'y more')
OUTS = dict(slots=Out, property=Plain, deque=lambda y: deque([y]), pair=lambda y: Pair(y, None),
    nested=lambda y: dict(a=[Out(y)]), closure=lambda y: lambda: y, generator=lambda y: iter([y]))
FIND = dict(slots=lambda o: o.y, property=lambda o: o.y, deque=lambda o: o[0], pair=lambda o: o.y,
    nested=lambda o: o['a'][0].y, closure=lambda o: o(), generator=next)

class Returns(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind,self.a,self.b = kind,nn.Linear(6, 8),nn.Linear(8, 8)
    def forward(self, x): return OUTS[self.kind](self.b(self.a(x).relu()))

@pytest.mark.parametrize('kind', OUTS)
def test_outputs_in_an_object(kind):
    "An output keeps its width and its values, whatever it is given in, or it is refused"
    m = fresh(lambda: Returns(kind))
    dense,x = copy.deepcopy(m),torch.randn(2, 6)
    try: plan = Pruner(m, x).prune(.5).plan
    except REFUSALS as e:
        assert 'please report' not in str(e)
        plan = None
    want = dense if plan is None else silenced(dense, plan)
    for y in (x, torch.randn(5, 6)): near(FIND[kind](quietly(m, y)), FIND[kind](quietly(want, y)))
    assert m.b.out_features==8

class Remembers(nn.Module):
    "What it computes is read from an attribute afterwards"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.o = nn.Linear(6, 8),nn.Linear(8, 8),nn.Linear(8, 3)
    def forward(self, x):
        self.features = self.b(self.a(x).relu())
        return self.o(self.features)

def test_an_attribute_that_is_an_output():
    "It is there after a call, real, as wide as the layer that wrote it"
    m = fresh(Remembers)
    Pruner(m, torch.randn(2, 6)).prune(.5)
    m(torch.randn(5, 6))
    assert type(m.features) is torch.Tensor and m.features.shape==(5, m.b.out_features)

# ---- relations of the example

class Image16(nn.Module):
    "Tokens back to an image: the number of channels is written, height and width are those of the input"
    def __init__(self):
        super().__init__()
        self.n,self.a,self.b,self.c = 16,nn.Conv2d(3, 16, 1),nn.Conv2d(16, 16, 1),nn.Conv2d(16, 4, 1)
    def forward(self, x):
        b,_,h,w = x.shape
        y = self.a(x).relu().flatten(2).transpose(1, 2)
        return self.c(self.b(y.reshape(b, self.n, h, w)).relu())

class LikeTokens(nn.Module):
    "As many tokens, heads, examples as channels"
    def __init__(self):
        super().__init__()
        self.h,self.qkv,self.o = 2,nn.Linear(8, 24),nn.Linear(8, 3)
    def forward(self, x):
        b,n,c = x.shape
        q,k,v = self.qkv(x).reshape(b, n, 3, self.h, -1).permute(2, 0, 3, 1, 4)
        return self.o((q@k.mT*.4).softmax(-1).matmul(v).transpose(1, 2).reshape(b, n, -1))

class Transposed(nn.Module):
    "Mixes tokens with a layer as wide as the channels are many"
    def __init__(self):
        super().__init__()
        self.a,self.mix,self.b,self.o = nn.Linear(6, 8),nn.Linear(8, 8),nn.Linear(8, 8),nn.Linear(8, 3)
    def forward(self, x): return self.o(self.b(self.a(x)+self.mix(self.a(x).mT).mT).relu())

class Outer(nn.Module):
    "A square of channels by channels beside one of tokens by tokens"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.o = nn.Linear(6, 5),nn.Linear(6, 5),nn.Linear(25, 3)
    def forward(self, x):
        u,v = self.a(x),self.b(x)
        return self.o(torch.einsum('bni,bnj->bij', u, v).flatten(1))+(u@v.mT).mean((1, 2))[:,None]

@pytest.mark.parametrize('net,x,others', [(Image16, torch.randn(2,3,2,2), [torch.randn(2,3,6,6)]),
    (Image16, torch.randn(2,3,4,4), [torch.randn(2,3,6,6), torch.randn(1,3,2,8)]),
    (Image16, torch.randn(2,3,2,8), [torch.randn(2,3,4,4), torch.randn(1,3,3,5)]),
    (LikeTokens, torch.randn(8,8,8), [torch.randn(3,5,8)]),
    (LikeTokens, torch.randn(2,4,8), [torch.randn(4,2,8), torch.randn(3,3,8)]),
    (Transposed, torch.randn(8,8,6), [torch.randn(3,8,6)]),
    (Outer, torch.randn(5,5,6), [torch.randn(3,7,6)])])
def test_sizes_that_happen_to_be_equal(net, x, others):
    "An input as large as a layer is wide: dead units go or stay, and other inputs are computed as before"
    def dead(m):
        for l in [l for l in m.modules() if isinstance(l, (nn.Linear, nn.Conv2d))][:-1]: l.weight[::2],l.bias[::2] = 0,0
    keeps(net, x, others, dead=dead)
    try: holds(net, x, others, cut=False, sparsity=.5)
    except REFUSALS as e: assert 'please report' not in str(e)

class Pad64(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(8, 16),nn.Linear(16, 4)
    def forward(self, x):
        h = self.a(x).relu()
        pad = h.new_zeros((len(x), 64, 16)).narrow(1, 0, x.shape[1])
        return self.b(torch.cat([pad, h, h], 1)).mean(1)

class Merge(nn.Module):
    "Two tokens become one of twice the width"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(8, 16),nn.Linear(32, 4)
    def forward(self, x):
        b,n,_ = x.shape
        return self.b(self.a(x).relu().view(b, n//2, 2*16))

class Queries(nn.Module):
    "Learned queries, expanded to the batch; a table of the tokens' number made at each call"
    def __init__(self):
        super().__init__()
        self.a,self.q,self.b = nn.Linear(8, 16),nn.Parameter(torch.randn(1, 6, 16)),nn.Linear(16, 4)
    def forward(self, x):
        h = self.a(x)
        q = self.q.expand(len(x), 6, 16)
        a = (q@h.mT+torch.zeros(len(x), 6, x.shape[1])).softmax(-1)
        return self.b(q+a@h)

@pytest.mark.parametrize('net', [Pad64, Merge, Queries])
def test_sizes_of_axes_that_stay(net):
    "Only axes that are cut are told their size: other lengths and batches run as before"
    x,others = torch.randn(2,6,8),[torch.randn(2,10,8), torch.randn(5,14,8), torch.randn(1,2,8)]
    m,r,_ = holds(net, x, others, sparsity=.5)
    def dead(m): m.a.weight[:8],m.a.bias[:8] = 0,0
    m,r,_ = keeps(net, x, others, dead=None if net is Queries else dead)
    if net is not Queries: assert r.removed==8

# ---- values that decide what runs in an attention

class Lengths(nn.Module):
    def __init__(self):
        super().__init__()
        self.i,self.q,self.k,self.o = nn.Linear(8, 16),nn.Linear(16, 16),nn.Linear(16, 16),nn.Linear(16, 4)
    def forward(self, x, lengths):
        pad = torch.arange(int(lengths.max()))[None]>=lengths[:,None]
        h = self.i(x).transpose(0, 1)
        q,k = self.q(h).transpose(0, 1),self.k(h).transpose(0, 1)
        return self.o(torch.bmm(torch.bmm(q, k.transpose(1, 2)).masked_fill(pad[:,None], -1e9).softmax(-1), k))

class Chosen(nn.Module):
    "Only tokens that count are computed, and put back"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.o = nn.Linear(8, 16),nn.Linear(16, 16),nn.Linear(16, 4)
    def forward(self, x, lengths):
        on = torch.arange(x.shape[1])[None]<lengths[:,None]
        h = self.a(x)
        out = torch.zeros_like(h)
        out[on] = self.b(h[on].relu())
        return self.o(out+h)

class RowByRow(nn.Module):
    "Each row alone, as long as it is"
    def __init__(self):
        super().__init__()
        self.q,self.k,self.v,self.o = nn.Linear(8, 16),nn.Linear(8, 16),nn.Linear(8, 16),nn.Linear(16, 4)
    def forward(self, x, lengths):
        out = []
        for row,n in zip(x, lengths.tolist()):
            q,k,v = (l(row[:n]).view(n, 2, -1).transpose(0, 1) for l in (self.q, self.k, self.v))
            out.append(self.o((q@k.mT*q.shape[-1]**-.5).softmax(-1).matmul(v).transpose(0, 1).reshape(n, -1)).mean(0))
        return torch.stack(out)

PATHS = pytest.mark.xfail(strict=True, reason='a product of matrices takes other steps for some lengths when heads are narrow, so all stays')
@pytest.mark.parametrize('net', [Lengths, Chosen, pytest.param(RowByRow, marks=PATHS)])
def test_attention_that_depends_on_values(net):
    "Captured for real: it is cut, and right for other lengths"
    one = lambda *n: (torch.randn(len(n), max(n), 8), torch.tensor(n))
    holds(net, one(5, 4, 3), [one(2, 6), one(1, 1, 1, 4), one(3)], tol=1e-4, sparsity=.5)

# ---- what the report says

def verified(r): return next(l for l in str(r).splitlines() if l.startswith('verified'))

def test_the_report_lists_its_witnesses():
    "Where the law was checked: the example, another batch and size, training mode"
    make = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4))
    m,r,_ = holds(make, torch.randn(2,3,32,32), [torch.randn(5,3,17,9)], sparsity=.5)
    said = verified(r)
    shapes = set(re.findall(r"\d+(?:×\d+)+", said))
    assert '2×3×32×32' in shapes and 'training' in said, said
    assert any(s.split('×')[0]!='2' and s.split('×')[1]=='3' and s.split('×')[2:]!=['32','32'] for s in shapes), said

def test_the_report_lists_examples_of_the_users():
    x = TOKENS()
    m,r,_ = holds(Masked, x, options=dict(examples=[(TOKENS(4, 13), torch.ones(4, 13))]), sparsity=.5)
    assert '2×7×32' in verified(r) and '4×13×32' in verified(r), verified(r)

def test_a_witness_that_the_model_refuses_is_no_failure():
    "An image of one size only, a batch of one only, a model that cannot train: cut, and what was checked is said"
    make = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8*36, 4))
    m,r,_ = holds(make, torch.randn(2,3,8,8), [torch.randn(5,3,8,8)], sparsity=.5)
    assert '2×3×8×8' in verified(r) and not re.search(r"×3×(?!8×8)\d", verified(r)), verified(r)
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.o = nn.Linear(6, 16),nn.Linear(16, 3)
        def forward(self, x):
            if len(x)!=1: raise ValueError('one example at a time')
            if self.training: raise NotImplementedError('for inference only')
            return self.o(self.a(x).relu())
    m,r,_ = holds(One, torch.randn(1, 6), [torch.randn(1, 6)], sparsity=.5)
    assert '1×6' in verified(r) and 'training' not in verified(r)

# ---- what only larger images do

class Beyond(nn.Module):
    "Says a width where there are more than three rows; the example and smaller images have no more"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.n = nn.Conv2d(3, 8, 32, stride=32),nn.Conv2d(8, 4, 1),8
    def forward(self, x):
        y = self.a(x)
        if y.shape[2]>3: y = y.flatten(2).transpose(1, 2).reshape(len(x), *y.shape[2:], self.n).permute(0, 3, 1, 2)
        return self.b(y)
class BeyondLiteral(Beyond):
    def forward(self, x):
        y = self.a(x)
        if y.shape[3]>3: y = y.reshape(len(x), 8, -1).relu().unflatten(2, y.shape[2:])
        return self.b(y)
class BeyondScale(Beyond):
    "Divides by a width there"
    def forward(self, x):
        y = self.a(x)
        if y.shape[2]>3: y = y.flatten(2).transpose(1, 2).reshape(-1, self.n).sum(1).view(len(x), 1, *y.shape[2:])/8+y
        return self.b(y)

@pytest.mark.parametrize('net', [Beyond, BeyondLiteral, BeyondScale])
def test_ways_that_only_larger_images_go(net):
    "A third witness goes them: the pruned network runs there as well, and is right; or nothing is cut"
    m,r,_ = holds(net, torch.randn(1,3,96,96), [torch.randn(2,3,160,160), torch.randn(1,3,128,160)], sparsity=.5)
    if net is not BeyondScale: assert r.removed==4
    assert any(w.shapes==((1,3,128,128),) for w in r.witnesses) or not r.removed
