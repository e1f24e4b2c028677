"""What cannot be pruned is refused in words, before anything has changed; wrappers are taken off wherever a model is taken"""
import copy, os
import pytest, torch
import torch.distributed as dist
from torch import nn
from fasterprune.all import *
from fasterprune.core import unwrap

pytestmark = pytest.mark.filterwarnings('ignore')
def net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
def x(): return torch.randn(2, 3, 8, 8)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(6, 8),nn.Linear(8, 3)
    def forward(self, x, scale=None): return self.b(self.a(x).relu()) if scale is None else self.b(self.a(x)*scale)

def refused(f, *words):
    with pytest.raises((ValueError, TypeError, PruningError)) as e: f()
    assert all(w in str(e.value) for w in words), str(e.value)
    assert 'please report' not in str(e.value)

def inside(): # a scripted layer among others
    m = net()
    m[2] = torch.jit.script(m[2])
    return m

@pytest.mark.parametrize('make', [lambda: torch.jit.script(net()), lambda: torch.jit.trace(net(), x()), inside], ids=['script','trace','a layer'])
def test_scripted(make):
    m = make()
    was = copy.deepcopy(m.state_dict())
    refused(lambda: Pruner(m, x()).prune(.5), 'script')
    refused(lambda: couple(m, x()), 'script')
    assert all(torch.equal(a, b) for a,b in zip(was.values(), m.state_dict().values()))

@pytest.mark.parametrize('shape', [(1,3,32,32), [1,3,8,8], torch.Size([2,3,8,8]), (8,)])
def test_a_shape_for_an_input(shape): refused(lambda: Pruner(net(), shape).plan(.5), f"torch.randn({', '.join(map(str, shape))})")

def test_numbers_that_a_model_takes_are_no_shape():
    class N(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(6, 8),nn.Linear(8, 3)
        def forward(self, n, k): return self.b(self.a(torch.ones(n, 6)*k).relu())
    assert Pruner(N().eval(), (4, 2)).plan(.5).removed==4

@pytest.mark.parametrize('bad', [torch.randn(1,5,8,8), torch.randn(1,3,8,8).long(), torch.randn(3)], ids=['channels','dtype','dimensions'])
def test_an_input_that_the_model_cannot_take(bad):
    m = net()
    refused(lambda: Pruner(m, bad).plan(.5), 'example input x', str(tuple(bad.shape)), 'Error')
    refused(lambda: evaluate(m, bad), 'example input x')
    refused(lambda: Sparsifier(m, bad), 'example input x')
    assert m[0].weight.shape==(8,3,3,3)

def test_the_models_own_error_is_inside():
    class N(Two):
        def forward(self, x): raise KeyError('my own words')
    refused(lambda: Pruner(N(), torch.randn(2,6)).prune(.5), 'example', 'KeyError', 'my own words')
    with pytest.raises(KeyError): Pruner(N(), torch.randn(2,6)).prune(.5)

@pytest.mark.parametrize('bad', [(), {}, dict(y=torch.randn(2,6)), (torch.randn(2,6),)*3], ids=['empty','no keys','another name','too many'])
def test_a_call_that_does_not_fit_the_signature(bad): refused(lambda: Pruner(Two(), bad).plan(.5), 'example input x', 'forward(x, scale=None)')

def test_what_a_hook_makes_of_the_arguments_counts():
    m = Two().eval()
    m.register_forward_pre_hook(lambda m, args: args[:1])
    assert Pruner(m, (torch.randn(2,6),)*3).plan(.5).removed==4

def test_under_inference_mode():
    m,p = net(),Pruner(net(), x())
    with torch.inference_mode():
        for f in (lambda: Pruner(m, x()).prune(.5), lambda: p.prune(.5), p.plan, lambda: couple(m, x())): refused(f, 'inference')

def test_tensors_of_inference_mode():
    with torch.inference_mode(): m,inp = net(),x()
    want = copy.deepcopy(m)
    assert Pruner(net(), inp).prune(.5).removed==4
    assert Pruner(m, inp).prune(.5).removed==4
    with torch.no_grad(): assert m(x()).shape==want(x()).shape

def quantised(*layers): return torch.ao.quantization.quantize_dynamic(nn.Sequential(*layers), {nn.Linear, nn.LSTM})
def test_quantised_networks():
    refused(lambda: Pruner(quantised(nn.Linear(8,16), nn.ReLU(), nn.Linear(16,4)), torch.randn(2,8)).prune(.5), 'quantise')
    refused(lambda: Pruner(quantised(nn.LSTM(8,16)), torch.randn(3,2,8)).prune(.5), 'quantise')
    m = quantised(*net(), nn.Flatten(), nn.Linear(64,3))
    r = Pruner(m, x()).prune(.5)
    assert r.removed==4 and 'parameters' in str(r) and m(x()).shape==(2,3)

def test_models_without_weights():
    refused(lambda: Pruner(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(2,3)).prune(.5), 'no parameters')
    refused(lambda: Pruner(nn.Sequential(nn.LazyLinear(3)), torch.randn(2,3)), 'no weight yet')
    refused(lambda: Pruner(nn.Sequential(nn.Linear(3,3), nn.LazyBatchNorm1d()), torch.randn(2,3)), "'1'", 'no weight yet')

@pytest.fixture
def one_process():
    os.environ.setdefault('MASTER_ADDR', '127.0.0.1')
    os.environ['MASTER_PORT'] = '29613'
    dist.init_process_group('gloo', rank=0, world_size=1)
    yield
    dist.destroy_process_group()

@pytest.mark.parametrize('wrap', [nn.DataParallel, nn.parallel.DistributedDataParallel, lambda m: torch.compile(m, backend='eager'),
    lambda m: torch.compile(nn.DataParallel(m)), lambda m: nn.DataParallel(torch.compile(m))], ids=['parallel','distributed','compiled','both','inside'])
def test_wrappers_are_taken_off(wrap, one_process):
    m,i = net(),x()
    wrapped,plain = wrap(m),copy.deepcopy(m)
    assert unwrap(wrapped) is m
    assert couple(wrapped, i).groups[0].name=='0'
    assert set(Sparsifier(wrapped, i, granularity='filter').masks(.5).keep)==set(Sparsifier(plain, i, granularity='filter').masks(.5).keep)
    assert repr(evaluate(wrapped, i))==repr(evaluate(plain, i)) and repr(compare(dict(a=wrapped), i, latency=False))==repr(compare(dict(a=plain), i, latency=False))
    assert model_storage(wrapped)==model_storage(plain) and file_size(wrapped)==file_size(plain) and compression_ratio(wrapped)==1
    assert list(importance(wrapped, i).scores)==list(importance(plain, i).scores)
    assert sensitivity(wrapped, i, lambda m: float(m(i).sum()), ratios=(.5,)).curves==sensitivity(plain, i, lambda m: float(m(i).sum()), ratios=(.5,)).curves
    r = Pruner(wrapped, i).prune(.5)
    assert r.removed==4 and m[0].out_channels==4 and {e.param for e in r.plan.edits}=={'0.weight','0.bias','2.weight'}
    apply_(wrap(plain), Plan.from_json(r.plan.to_json()))
    assert plain[0].out_channels==4

def test_statistics_of_a_wrapped_model():
    m = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4))
    assert recalibrate_(nn.DataParallel(m), [x()])==1 and m[1].running_mean.abs().max()>0
    assert 'batch 2' in repr(latency(torch.compile(nn.DataParallel(m), backend='eager'), x(), repeats=2))
