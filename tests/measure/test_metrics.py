"Metrics: naive loops over modules, zeros and shapes that agree exactly, any code, and texts of refusals"
import io, math
from copy import deepcopy
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torchvision import models as tv
from fasterprune.measure.latency import compare_latency
from fasterprune.measure.metrics import *
from fasterprune.surgery.cutting.apply import apply_
from fasterprune.surgery.capture.isolation import state_of
from fasterprune.surgery.coupling.couple import couple
from fasterprune.surgery.analysis.dead import dead_labels
from fasterprune.surgery.analysis.constants import observe
from fasterprune.surgery.planning.folding import fold_targets, folds_of
from fasterprune.surgery.planning.cuts import make_plan, ensure_nonempty
from fasterprune.surgery.pruner import Pruner

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

@pytest.fixture(autouse=True, scope='module')
def one_thread(): # small networks, run operator by operator: more threads only wait for each other
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def naive_macs(model, x):
    "(MACs, MACs with a nonzero weight) by hooks: every output position, every weight that is used for it"
    res = [0,0]
    def hook(m, i, o):
        w = m.weight
        times = o[0].numel()//o.shape[1]*o.shape[0] # positions in space and batch
        if isinstance(m, nn.Linear): times = o.numel()//o.shape[-1]
        elif isinstance(m, TRANSPOSED): times = i[0].numel()//i[0].shape[1] # each input position meets every weight
        res[0] += times*w.numel()
        res[1] += times*sum(v!=0 for v in w.flatten().tolist())
    hs = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, CONVS+TRANSPOSED+(nn.Linear,))]
    with torch.no_grad(): model(x)
    for h in hs: h.remove()
    return tuple(res)

def scatter_zeros(model, part=.4, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.mul_((torch.rand(p.shape, generator=g)>part).to(p.dtype))
    return model

@torch.no_grad()
def awake(model, seed=0):
    "No entry of any parameter is zero"
    g = torch.Generator().manual_seed(seed)
    for n,p in model.named_parameters():
        if p.ndim<2: p.copy_(torch.rand(p.shape, generator=g)+.5)
        else: p[p==0] = .01
    return model.eval()

@torch.no_grad()
def silence(model, x, part=.5, roles=('write','bias','scale','shift')):
    "Zero the first units of each group: weights that write, biases, scale and shift of normalisations"
    state = state_of(model)
    for g in couple(model, x).groups:
        if not g.primary: continue
        gone = ~g.balance(np.arange(g.n)>=int(g.n*part), np.arange(g.n)) # of channels that are shuffled, so many of each kind
        for m in g.role(*roles):
            at = torch.as_tensor((m.unit>=0)&gone[m.unit]).nonzero()[:,0]
            state[m.param].index_fill_(m.dim, at, 0)
    return model

@pytest.mark.parametrize('layer,shape', [
    (nn.Conv1d(4,6,3), (2,4,11)), (nn.Conv1d(4,6,3,stride=2,padding=2,dilation=2), (2,4,11)),
    (nn.Conv2d(4,6,3,padding=1), (2,4,7,5)), (nn.Conv2d(4,6,(3,2),padding='same'), (1,4,7,5)), (nn.Conv2d(4,8,3,groups=2,stride=2), (2,4,9,9)),
    (nn.Conv2d(4,4,3,groups=4,padding=1), (3,4,6,6)), (nn.Conv2d(4,12,3,groups=4,bias=False), (1,4,6,6)), (nn.Conv2d(4,6,3,padding=1,padding_mode='reflect'), (1,4,6,6)),
    (nn.Conv3d(2,4,3,padding=1), (1,2,4,5,6)), (nn.Conv3d(2,4,(1,2,3),groups=2), (2,2,4,5,6)),
    (nn.ConvTranspose1d(4,6,3,stride=2), (2,4,5)), (nn.ConvTranspose2d(4,6,3,stride=2,padding=1,output_padding=1), (2,4,5,5)),
    (nn.ConvTranspose2d(4,6,4,groups=2,stride=2), (1,4,5,5)), (nn.ConvTranspose3d(2,4,2,stride=2), (1,2,3,3,3)),
    (nn.Linear(5,7), (3,5)), (nn.Linear(5,7), (2,3,5)), (nn.Linear(5,7,bias=False), (2,3,4,5)),
], ids=str)
def test_one_layer_against_hooks(layer, shape):
    torch.manual_seed(0)
    model,x = scatter_zeros(nn.Sequential(deepcopy(layer))),torch.randn(shape)
    e = evaluate(model, x)
    assert (e.macs, e.nonzero_macs) == naive_macs(model, x)
    assert e.params == sum(p.numel() for p in model.parameters())
    assert e.nonzero == sum(v!=0 for p in model.parameters() for v in p.flatten().tolist())
    assert e.inputs == (shape,) and e.uncounted == () and [l.name for l in e.layers] == ['0'] and e.layers[0].shape == tuple(layer.weight.shape)

@pytest.mark.parametrize('name', ['resnet18','mobilenet_v2','shufflenet_v2_x1_0'])
def test_networks_against_hooks(name):
    torch.manual_seed(0)
    model,x = scatter_zeros(getattr(tv, name)(weights=None, num_classes=10)).eval(),torch.randn(2,3,32,32)
    e = evaluate(model, x, effective=False)
    assert (e.macs, e.nonzero_macs) == naive_macs(model, x)
    assert e.effective_params is None and e.effective_macs is None and e.effective_compression is None and e.effective_speedup is None
    assert compression_ratio(model) == e.compression_ratio == sum(p.numel() for p in model.parameters())/sum(int((p!=0).sum()) for p in model.parameters())
    assert theoretical_speedup(model, x) == e.theoretical_speedup == e.macs/e.nonzero_macs

def test_well_known_numbers():
    e = evaluate(tv.resnet18(weights=None), torch.randn(1,3,224,224), effective=False)
    assert e.params == 11_689_512 and e.macs == 1_814_073_344

@pytest.mark.parametrize('name', ['resnet18','mobilenet_v2','densenet121','shufflenet_v2_x1_0','efficientnet_b0'])
def test_zeros_that_are_channels_agree_with_shapes(name):
    "Effective figures of the sparse network, shapes of the pruned one: parameters and MACs, exactly"
    torch.manual_seed(0)
    dense,x = awake(getattr(tv, name)(weights=None, num_classes=10)),torch.randn(1,3,32,32)
    sparse = silence(deepcopy(dense), x)
    pruned = deepcopy(sparse)
    Pruner(pruned, x).prune(verify=False)
    e,p = evaluate(sparse, x),evaluate(pruned, x)
    assert (e.effective_params, e.effective_macs) == (p.params, p.macs) == (p.nonzero, p.nonzero_macs)
    assert p.params == sum(q.numel() for q in pruned.parameters()) and p.macs == naive_macs(pruned, x)[0]
    assert e.effective_compression == compression_ratio(pruned, dense=dense) > compression_ratio(sparse) > 1
    assert e.effective_speedup == theoretical_speedup(pruned, x, dense=dense) > theoretical_speedup(sparse, x) > 1
    if name=='resnet18': assert compression_ratio(sparse, x, effective=True) == e.effective_compression and theoretical_speedup(sparse, x, effective=True) == e.effective_speedup
    assert [(l.name, l.effective_params, l.effective_macs) for l in e.layers] == [(l.name, l.params, l.macs) for l in p.layers]

@pytest.mark.parametrize('part', [.25,.9])
def test_agrees_with_a_plan_that_is_applied_by_hand(part):
    torch.manual_seed(0)
    x = torch.randn(1,3,32,32)
    sparse = silence(awake(tv.resnet18(weights=None, num_classes=10)), x, part)
    e,c = evaluate(sparse, x),couple(sparse, x)
    facts,to = observe(sparse, x, c),fold_targets(c)
    gone = ensure_nonempty(c, dead_labels(c, facts, [t is not None for t in to]))
    apply_(sparse, make_plan(c, gone, folds_of(c, facts, to, gone)))
    assert (e.effective_params, e.effective_macs) == (sum(q.numel() for q in sparse.parameters()), naive_macs(sparse, x)[0])

def test_the_other_direction():
    "Channels that nobody reads: the filters that write them are dead"
    torch.manual_seed(0)
    x = torch.randn(1,3,32,32)
    sparse = silence(awake(tv.resnet18(weights=None, num_classes=10)), x, roles=('read',))
    pruned = deepcopy(sparse)
    Pruner(pruned, x).prune(verify=False)
    e,p = evaluate(sparse, x),evaluate(pruned, x)
    assert (e.effective_params, e.effective_macs) == (p.params, p.macs)
    assert e.effective_params < e.nonzero

def test_channels_and_scattered_zeros_together():
    torch.manual_seed(0)
    x = torch.randn(1,3,32,32)
    sparse = silence(scatter_zeros(awake(tv.resnet18(weights=None, num_classes=10))), x)
    e = evaluate(sparse, x)
    Pruner(sparse, x).prune(verify=False)
    p = evaluate(sparse, x)
    assert (e.effective_params, e.effective_macs) == (p.nonzero, p.nonzero_macs) and p.nonzero < p.params and p.nonzero_macs < p.macs
    assert (p.effective_params, p.effective_macs) == (p.nonzero, p.nonzero_macs)

@pytest.mark.parametrize('bias', [True,False])
def test_folded_constants_are_counted(bias):
    "A constant that the pruner folds makes a zero bias nonzero, or a new bias"
    torch.manual_seed(0)
    m,x = nn.Sequential(nn.Conv2d(3,8,3), nn.Sigmoid(), nn.Conv2d(8,6,1,bias=bias), nn.ReLU(), nn.Conv2d(6,2,1)),torch.randn(1,3,9,9)
    with torch.no_grad():
        m[0].weight[:4] = 0; m[2].weight[:2] = 0
        if bias: m[2].bias.zero_()
    e = evaluate(m, x)
    Pruner(m, x).prune()
    p = evaluate(m, x)
    assert (e.effective_params, e.effective_macs) == (p.nonzero, p.nonzero_macs)

def test_nothing_dead():
    x = torch.randn(1,3,32,32)
    e = evaluate(awake(tv.mobilenet_v2(weights=None)), x)
    assert e.params == e.nonzero == e.effective_params and e.macs == e.nonzero_macs == e.effective_macs
    assert e.compression_ratio == e.theoretical_speedup == e.effective_compression == e.effective_speedup == 1

class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.k,self.a,self.b,self.c = (nn.Parameter(torch.ones(s)) for s in ((4,3,3,3), (5,4), (4,10), (2,3,3)))
    def forward(self, x):
        h = F.conv2d(x, self.k, padding=1).mean((2,3)) # (n,4)
        h = h @ self.a.t() @ self.a                    # (n,5), (n,4)
        h = torch.addmm(self.b[0,:1], h, self.b[:,:5])  # a slice of a parameter
        u,v = self.c.transpose(1,2).unbind(0)
        return h.sum() + (x[:,:,0,:3].transpose(1,2) @ u).sum() + torch.einsum('nij,ij->n', x[:,:,1,:3], v).sum()

def test_bare_parameters_transposed_and_sliced():
    m,x = Functional(),torch.randn(2,3,6,6)
    with torch.no_grad(): m.k[0],m.a[:,1],m.b[:,1:9],m.c[0,0] = 0,0,0,0
    e = evaluate(m, x, effective=False)
    assert e.macs == 2*(4*27*36 + 20 + 20 + 20) + 2*3*9 + 2*9 and e.params == 108+20+40+18
    assert e.nonzero_macs == 2*(3*27*36 + 15 + 15 + 4) + 2*3*6 + 2*9
    assert e.nonzero == 81+15+8+15 and len(e.layers) == 1 and e.layers[0].name == ''

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc,self.dec,self.conv = nn.Embedding(11,4),nn.Linear(4,11,bias=False),nn.Conv1d(4,4,1,bias=False)
        self.dec.weight = self.enc.weight
    def forward(self, i):
        h = self.enc(i)
        for _ in range(3): h = self.conv(h.transpose(1,2)).transpose(1,2)
        return self.dec(h)

def test_tied_weights_count_once_and_work_as_often_as_it_is_done():
    m,i = Tied(),torch.randint(11, (2,5))
    with torch.no_grad(): m.enc.weight[:3],m.conv.weight[0] = 0,0
    e = evaluate(m, i)
    assert e.params == 44+16 and e.nonzero == 32+12 and compression_ratio(m) == 60/44
    assert e.macs == 10*44 + 3*10*16 and e.nonzero_macs == 10*32 + 3*10*12
    rows = {l.name:l for l in e.layers}
    assert rows['enc'].params == 44 and rows['dec'].params == 0 and rows['dec'].macs == 440 and rows['dec'].shape == (11,4) and rows['conv'].macs == 480

def test_attention_products_count_in_full():
    m,x = nn.MultiheadAttention(8, 2, batch_first=True),[torch.randn(2,5,8) for _ in range(3)]
    with torch.no_grad():
        for p in m.parameters(): p.zero_()
    e = evaluate(m, x, effective=False)
    products = 2*2*5*5*4*2 # batch × heads × queries × keys × dimensions, twice
    assert e.nonzero == 0 and e.nonzero_macs == products and e.macs == 2*5*8*8*4 + products
    assert compression_ratio(m) == math.inf and {l.name:l.macs for l in e.layers} == {'':2*5*8*8*3+products, 'out_proj':2*5*8*8}

def test_masks_and_computed_weights():
    l = nn.Linear(4,4)
    prune.l1_unstructured(l, 'weight', .5)
    e = evaluate(l, torch.randn(3,4))
    assert e.nonzero == 20 and e.nonzero_macs == 3*8 # the parameter is still whole; what is multiplied is not

def test_buffers_are_no_parameters():
    m = nn.Sequential(nn.Conv2d(3,4,1,bias=False), nn.BatchNorm2d(4))
    class Blur(nn.Module):
        def __init__(self): super().__init__(); self.register_buffer('k', torch.tensor([0.,1,0]).view(1,1,3,1).repeat(4,1,1,1))
        def forward(self, x): return F.conv2d(m(x), self.k, groups=4)
    e = evaluate(Blur(), torch.randn(1,3,5,5))
    assert (e.params, e.macs, e.nonzero_macs) == (0, 25*12+15*12, 25*12+15*12)
    assert evaluate(m, torch.randn(1,3,5,5)).params == 12+8

def test_the_model_is_not_changed():
    torch.manual_seed(0)
    x = torch.randn(2,3,32,32)
    m = silence(awake(tv.resnet18(weights=None)), x).train()
    m.layer1.eval()
    before,modes,hooks = deepcopy(m.state_dict()),[k.training for k in m.modules()],[len(k._forward_hooks) for k in m.modules()]
    compare(dict(a=m), x, latency=False), theoretical_speedup(m, x), compression_ratio(m, x, effective=True), layer_collapse(m), file_size(m)
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items()) and modes == [k.training for k in m.modules()]
    assert hooks == [len(k._forward_hooks) for k in m.modules()] and all(p.grad is None and p.requires_grad for p in m.parameters())

def test_other_precisions_inputs_and_wrappers():
    m = nn.Sequential(nn.Conv1d(3,4,3), nn.Linear(7,2))
    e = evaluate(m, torch.randn(2,3,9))
    assert e == evaluate(deepcopy(m).double(), torch.randn(2,3,9).double()) == evaluate(m, dict(input=torch.randn(2,3,9))) == evaluate(m, (torch.randn(2,3,9),))
    assert evaluate(m, torch.randn(3,9)).macs == e.macs//2
    assert evaluate(deepcopy(m).bfloat16(), torch.randn(2,3,9).bfloat16()).macs == e.macs
    assert evaluate(torch.compile(m), torch.randn(2,3,9)) == e and compression_ratio(torch.compile(m)) == 1
    assert evaluate(nn.ReLU(), torch.randn(3)).compression_ratio == 1 and evaluate(nn.ReLU(), torch.randn(3)).theoretical_speedup == 1

def test_what_is_not_counted_is_said():
    class R(nn.Module):
        def __init__(self): super().__init__(); self.r,self.f = nn.LSTM(4,6,batch_first=True),nn.Linear(6,2)
        def forward(self, x): return self.f(self.r(x)[0])
    e = evaluate(R(), torch.randn(2,5,4), effective=False)
    if e.macs == 2*5*12: assert len(e.uncounted) == 1 and ' in r' in e.uncounted[0] and e.uncounted[0] in repr(e)
    class Table(nn.Module):
        def __init__(self): super().__init__(); self.t = nn.Parameter(torch.randn(5,3))
        def forward(self, i): return self.t[i]
    assert evaluate(Table(), torch.tensor([1,2]), effective=False).uncounted == ()

def test_collapse():
    m = nn.Sequential(nn.Conv2d(3,4,1), nn.Conv2d(4,4,1), nn.Flatten(), nn.Linear(4,2))
    with torch.no_grad(): m[1].weight.zero_(); m[3].weight.zero_(); m[3].weight[0,0] = 1
    assert layer_collapse(m) == ('1',)
    e = evaluate(m, torch.randn(1,3,1,1))
    assert e.layers[1].nonzero == 4 and e.effective_macs < e.nonzero_macs

def test_file_size():
    for m in (nn.Linear(3,4), tv.mobilenet_v2(weights=None)):
        f = io.BytesIO()
        torch.save(m.state_dict(), f)
        assert file_size(m) == len(f.getvalue())

def test_tables_and_texts():
    torch.manual_seed(0)
    m = scatter_zeros(nn.Sequential(nn.Conv2d(3,4,3), nn.Flatten(), nn.Linear(16,2)))
    e = evaluate(m, torch.randn(2,3,4,4))
    t = e.table()
    assert list(t.index) == ['0','2'] and list(t.columns) == ['kind','shape','parameters','nonzero','sparsity','MACs','nonzero MACs','effective parameters','effective MACs']
    assert t['parameters'].sum() == e.params and t['nonzero MACs'].sum() == e.nonzero_macs and t.loc['0','shape'] == '4×3×3×3'
    assert t.loc['0','sparsity'] == pytest.approx(1-e.layers[0].nonzero/112)
    assert 'effective MACs' not in evaluate(m, torch.randn(2,3,4,4), effective=False).table()
    for text in (repr(e), e._repr_html_()):
        assert 'multiply-accumulates' in text and '2×3×4×4' in text and f"{e.nonzero:,}" in text and f"{e.compression_ratio:.2f}" in text
    assert evaluate(nn.ReLU(), torch.randn(3)).table().empty
    with pytest.raises(AttributeError): e.layers = ()
    with pytest.raises(AttributeError): e.layers[0].params = 1

def test_compare():
    torch.manual_seed(0)
    net = lambda n: awake(nn.Sequential(nn.Conv2d(3,n,3), nn.ReLU(), nn.Conv2d(n,n,3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n,10)))
    x = torch.randn(4,3,12,12)
    ms = dict(small=net(8), large=net(16), sparse=silence(net(16), x))
    c = compare(ms, x, dense='large', accuracy=dict(large=.91, small=.9))
    t = c.table()
    assert list(t.columns) == ['accuracy','parameters','nonzero','compression ratio','MACs','theoretical speedup','effective compression','effective speedup',
                               'latency (ms)','measured speedup','file size (kB)']
    assert t.loc['large','compression ratio'] == t.loc['large','theoretical speedup'] == t.loc['large','measured speedup'] == 1
    assert t.loc['small','compression ratio'] == t.loc['sparse','effective compression'] == c['large'].params/c['small'].params
    assert t.loc['small','theoretical speedup'] == t.loc['sparse','effective speedup'] == c['large'].macs/c['small'].macs
    assert t.loc['small','file size (kB)'] == file_size(ms['small'])/1e3 and t['parameters'].dtype == int and t['accuracy'].isna().tolist() == [False,False,True]
    for text in (repr(c), c._repr_html_()): assert 'multiply-accumulates' in text and '91.00%' in text and '–' in text and 'median of 30 runs' in text
    with pytest.raises(AttributeError): c.dense = 'small'
    given = compare_latency(ms, x, repeats=2)
    assert compare(ms, x, latency=given).latencies is given
    plain = compare(ms, x, latency=False, effective=False)
    assert list(plain.table().columns) == ['parameters','nonzero','compression ratio','MACs','theoretical speedup','file size (kB)'] and 'latency' not in repr(plain)
    assert plain.dense == 'small'

@pytest.mark.parametrize('call,error,text', [
    (lambda m,x: evaluate('resnet18', x), TypeError, 'a model is an nn.Module'),
    (lambda m,x: evaluate(m, 3), TypeError, 'an example input is a tensor'),
    (lambda m,x: evaluate(nn.LazyLinear(3), x), ValueError, 'no weight yet'),
    (lambda m,x: compression_ratio(m, effective=True), ValueError, 'needs x'),
    (lambda m,x: compression_ratio(m, dense=3), TypeError, 'a model is an nn.Module'),
    (lambda m,x: theoretical_speedup(m, x, dense='dense'), TypeError, 'a model is an nn.Module'),
    (lambda m,x: layer_collapse(3), TypeError, 'a model is an nn.Module'),
    (lambda m,x: file_size(3), TypeError, 'a model is an nn.Module'),
    (lambda m,x: compare(m, x), TypeError, 'use evaluate for one model'),
    (lambda m,x: compare({}, x), ValueError, 'no models to compare'),
    (lambda m,x: compare(dict(a=m), x, dense='b'), ValueError, "dense: no model 'b'"),
    (lambda m,x: compare(dict(a=m), x, accuracy=dict(b=1)), ValueError, "accuracy: no model 'b'"),
    (lambda m,x: compare(dict(b=m), x, latency=compare_latency(dict(a=m), x, repeats=2)), ValueError, "latency: no model 'b'"),
])
def test_refusals(call, error, text):
    with pytest.raises(error, match=text): call(nn.Linear(4,3), torch.randn(2,4))
