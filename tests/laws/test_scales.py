"""The check sees each value on its own scale, on inputs of the example's kind, and says when a model cannot be checked"""
import itertools, random, time
import numpy as np
import pytest, torch
from torch import nn
from fasterprune.all import *
from fasterprune.surgery.capture.tracer import random_like
from fasterprune.core import seed_rng_
from fasterprune.surgery.capture.isolation import preserved
from fasterprune.surgery.checking.verify import relative_error

pytestmark = pytest.mark.filterwarnings('ignore')
DTYPES = [torch.float64, torch.float32]
def logits(dtype, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)

# ---- scales

@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('mask', [-1e9, -torch.inf, torch.inf, 'min', -3e4, torch.nan])
@pytest.mark.parametrize('how', ['filled','added','one'])
def test_a_mask_hides_nothing(dtype, mask, how):
    y = logits(dtype, 5, 12)
    v = torch.finfo(dtype).min if mask=='min' else mask
    at = torch.arange(12)<(1 if how=='one' else 4)
    y = y.masked_fill(at, v) if how!='added' else y+torch.zeros(12, dtype=dtype).masked_fill(at, v)
    x = y.clone()
    x[:,6] *= 1.2 # an error
    assert relative_error([y], [y])==0
    assert relative_error([x], [y])>.01
    rounded = y*(1+4*torch.finfo(dtype).eps)
    assert relative_error([torch.where(y.isfinite()&(y.abs()<1e30), rounded, y)], [y])<1e-4 if dtype==torch.float32 else 1e-12

@pytest.mark.parametrize('dtype', DTYPES)
def test_rounding_near_zero_is_no_error(dtype):
    eps,g = torch.finfo(dtype).eps,torch.Generator().manual_seed(0)
    y = logits(dtype, 1000)
    for few in (1, 5, 100, 400): # differences of large numbers that happen to be zero
        z = y.clone()
        z[:few] = (torch.randn(few, generator=g)*eps).to(dtype)
        assert relative_error([z+torch.randn(1000, generator=g).to(dtype)*eps], [z])<100*eps
        z[:few] = 0
        assert relative_error([z+torch.randn(1000, generator=g).to(dtype)*eps], [z])<100*eps

def test_not_numbers_and_infinities():
    nan,inf = torch.nan,torch.inf
    t = lambda *v: [torch.tensor(v)]
    assert relative_error(t(nan, 1, inf, -inf), t(nan, 1, inf, -inf))==0
    for a,b in ((t(nan, 1.), t(1., 1.)), (t(1., 1.), t(nan, 1.)), (t(inf, 1.), t(-inf, 1.)), (t(1e30, 1.), t(inf, 1.)), (t(inf, 1.), t(1., 1.))): assert relative_error(a, b)==inf
    assert relative_error([torch.tensor([True])], [torch.tensor([False])])==inf and relative_error([torch.zeros(0)], [torch.zeros(0)])==0
    c = torch.tensor([1+2j, 3j])
    assert relative_error([c], [c])==0 and 0<relative_error([c+1e-3], [c])<1e-2
    assert relative_error(t(1.), t(1., 2.))==inf and relative_error([], [])==0 and relative_error(t(1.), [])==inf

def test_every_tensor_has_its_own_scale():
    small,large = torch.randn(50)*1e-6,torch.randn(50)*1e6
    assert relative_error([large, small*1.5], [large, small])>.1

def test_as_before_where_there_is_one_kind_of_value():
    y,e = logits(torch.float64, 200),torch.randn(200)*1e-6
    assert relative_error([y+e], [y])==pytest.approx((e.abs().max()/y.abs().max()).item(), rel=1e-6)

# ---- the kind of the example

@pytest.mark.parametrize('x', [torch.rand(4,5)+.1, -torch.rand(4,5), torch.rand(4,5)*255//1, (torch.rand(4,5)>.5).float(), torch.ones(4,5)*3, torch.rand(4,5)*2-1, torch.rand(4,5).half(), torch.rand(4,5).bfloat16()])
def test_values_of_the_kind_of_the_example(x):
    y = random_like(x)
    assert y.dtype==x.dtype and y.shape==x.shape and not torch.equal(x, y)
    if x.min()!=x.max(): assert y.min()>=x.min() and y.max()<=x.max()
    assert torch.equal(y.sign().unique(), x.sign().unique()) if x.unique().numel()>2 and (x!=0).all() else True
    if torch.equal(x, x.round()) and x.min()!=x.max(): assert torch.equal(y, y.round())
    assert torch.equal(random_like(x), y) and not torch.equal(random_like(x, seed=1), y)

def test_zeros_stand_for_a_shape():
    for x in (torch.zeros(3,40), torch.full((3,40), torch.nan)): assert .5<random_like(x).std()<1.5
    assert random_like(torch.zeros(3, device='meta')).is_meta
    x = torch.rand(3,40)
    a,b = random_like((x, x))
    assert a is b and torch.equal(random_like(torch.arange(3)), torch.arange(3))

class Log(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.o = nn.Linear(6,16),nn.Linear(16,3)
    def forward(self, x): return self.o(self.a(x.log()).relu())
class Root(Log):
    def forward(self, x, w=None): return self.o(self.a((1-x*x).sqrt()).relu())*(1 if w is None else w.acos())
class Table(Log): # a float that is a position
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(6, 6)
    def forward(self, x): return self.o(self.a(self.e(x.long())).relu())
class Softmaxed(Log): # a mask that is added
    def forward(self, x, mask): return self.o(((x@x.mT+mask).softmax(-1)@self.a(x)).relu())

@pytest.mark.parametrize('m,x', [(Log(), torch.rand(5,6)+.1), (Log(), torch.ones(5,6)), (Root(), torch.rand(5,6)), (Root(), (torch.rand(5,6), torch.rand(3))), (Table(), torch.randint(0, 6, (5,)).float()),
    (Softmaxed(), (torch.randn(2,4,6), torch.zeros(4,4).masked_fill(torch.ones(4,4).triu(1)>0, -torch.inf)))])
def test_models_that_want_a_kind_of_input(m, x):
    r = Pruner(m.eval(), x).prune(.5)
    assert r.removed>=8 and r.error<1e-8

def test_a_model_that_gives_no_numbers_is_told_so():
    m = Log().eval()
    was = m.a.weight.clone()
    with pytest.raises(PruningError, match='own outputs are NaN everywhere.*example input') as e: Pruner(m, torch.randn(5,6)-9).prune(.5)
    assert 'please report' not in str(e.value) and torch.equal(m.a.weight, was)

class Masked(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.a,self.b,self.value = nn.Linear(6,16),nn.Linear(16,4),value
        self.register_buffer('k', torch.tensor([True,False,False,False]))
    def forward(self, x): return self.b(self.a(x).relu()).masked_fill(self.k, self.value)

@pytest.mark.parametrize('value', [-torch.inf, torch.nan, torch.inf, -1e9, torch.finfo(torch.float32).min])
def test_a_masked_output_is_checked(value):
    assert Pruner(Masked(value).eval(), torch.randn(5,6)).prune(.5).removed==8

@pytest.mark.parametrize('value', [-torch.inf, -1e9, torch.finfo(torch.float32).min])
def test_an_error_beside_a_mask_is_seen(value, monkeypatch):
    from fasterprune.surgery import transaction as operation
    from fasterprune.surgery.cutting.apply import carry_out_
    m = Masked(value).eval()
    def badly(steps):
        carry_out_(steps)
        with torch.no_grad(): m.b.bias[2] += .1
    monkeypatch.setattr(operation, 'carry_out_', badly)
    with pytest.raises(VerificationError): Pruner(m, torch.randn(5,6)).prune(.5)
    assert m.a.out_features==16

# ---- random numbers

class Drawn(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.a,self.o,self.draw = nn.Linear(8,16),nn.Linear(16,3),draw
    def forward(self, x): return self.o(self.a(x)*self.draw())

@pytest.mark.parametrize('draw', [np.random.rand, random.random, lambda: np.random.randn()+random.gauss(0, 1)+torch.rand(()), lambda: random.choice([1., 2., 3.]), lambda: float(np.random.permutation(9)[0]+1)])
def test_every_generator_draws_the_same(draw):
    r = Pruner(Drawn(draw).eval(), torch.randn(2,8)).prune(.5)
    assert r.removed>=8 and r.error<1e-8

def test_generators_are_put_back():
    m,x = Drawn(lambda: np.random.rand()+random.random()).eval(),torch.randn(2,8)
    def after(f):
        random.seed(3); np.random.seed(3); torch.manual_seed(3)
        f()
        return random.random(),np.random.rand(),torch.rand(()).item()
    want = after(lambda: None)
    assert after(lambda: Pruner(m, x).plan(.5))==want and after(lambda: Pruner(m, x).prune(.5))==want
    def fails():
        try:
            with preserved():
                seed_rng_()
                raise KeyboardInterrupt
        except KeyboardInterrupt: pass
    assert after(fails)==want

COUNT = itertools.count()

@pytest.mark.parametrize('kind', ['generator','clock','state'])
def test_a_model_that_does_not_repeat_itself_is_told_so(kind):
    m = Drawn(dict(generator=np.random.default_rng(0).random, clock=lambda: 1+time.perf_counter()%1, state=lambda: 1+next(COUNT)*.1)[kind]).eval()
    was = m.a.weight.clone()
    try: r = Pruner(m, torch.randn(2,8)).prune(.5)
    except VerificationError as e: assert 'two runs of this model on the same input differ' in str(e) and 'please report' not in str(e)
    else: assert r.removed==0 and any('number' in why for *_,why in r.plan.pins) # the runs of the plan differed already
    assert torch.equal(m.a.weight, was)

# ---- numbers that the code asks a layer for

class Asks(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a,self.b,self.how = nn.Linear(6,16),nn.Linear(16,4),how
    @property
    def width(self): return self.a.out_features
    def scale(self): return 1/self.b.in_features
    def forward(self, x):
        h = self.a(x).relu()
        return self.b({'power':lambda: h*self.a.out_features**-.5, 'quotient':lambda: h/self.b.in_features, 'property':lambda: h*self.width**-.5, 'method':lambda: h*self.scale()}[self.how]())

@pytest.mark.parametrize('how', ['power','quotient','property','method'])
def test_a_number_that_a_layer_says(how):
    torch.manual_seed(0)
    m,x = Asks(how).eval(),torch.randn(5,6)
    with torch.no_grad():
        m.a.weight[:8],m.a.bias[:8] = 0,0
        want = m(x)
        r = Pruner(m, x).prune()
        assert torch.allclose(m(x), want, atol=1e-6) and r.removed in (0, 8)
