"Exact counts on a model: for every granularity, context and fraction, under ties, exactly `floor(s*n + 1e-9)` units are zero, and what is reported was measured"
import math
import pytest, torch
from copy import deepcopy
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from fasterprune.callback.sparsify import SparsifyCallback
from fasterprune.data import digits_dls, small_resnet
from fasterprune.granularity import granularities
from fasterprune.sparse.sparsifier import Sparsifier

pytestmark = pytest.mark.filterwarnings('ignore') # many fractions here round to none
torch.set_num_threads(1)
FRACTIONS = 0., .01, .1, .25, .29, 1/3, .5, .57, .6, .9, .95, .999, 1.
CONTEXTS = 'local', 'global'
floor = lambda s, n: math.floor(s*n + 1e-9)

# ---- which weights make a unit, written down once more and by hand: (letters of the weight's axes, letters inside a unit)
AXES = {nn.Conv1d:'oiw', nn.Conv2d:'oihw', nn.Conv3d:'oidhw', nn.ConvTranspose1d:'iow', nn.ConvTranspose2d:'iohw', nn.ConvTranspose3d:'iodhw', nn.Linear:'oi'}
INSIDE = dict(weight='', row='w', column='h', frame='hw', kernel='dhw', filter='idhw', shared_kernel='odhw', channel='i', shared_weight='o', shared_channel='oi',
              shared_row='ow', shared_column='oh', vertical_slice='ih', horizontal_slice='iw', shared_vertical_slice='oih', shared_horizontal_slice='oiw', layer='oidhw')
LINEAR = dict(weight='', row='i', column='o', filter='i', shared_kernel='o', layer='oi')
NEEDS = dict(row='hw', column='hw', frame='dhw', shared_row='hw', shared_column='hw', vertical_slice='hw', horizontal_slice='hw', shared_vertical_slice='hw', shared_horizontal_slice='hw')

def inside(layer, g):
    axes = AXES[type(layer)]
    if isinstance(layer, nn.Linear): return LINEAR.get(g)
    return INSIDE[g] if set(NEEDS.get(g, ''))<=set(axes) else None

def units(layer, g): # bool, one number a unit: is every weight in it zero?
    axes,within = AXES[type(layer)],inside(layer, g)
    w = layer.weight.detach().permute([i for i,a in enumerate(axes) if a not in within]+[i for i,a in enumerate(axes) if a in within])
    k = math.prod(n for a,n in zip(axes, layer.weight.shape) if a not in within)
    return (w.reshape(k, -1)==0).all(1)

class Every(nn.Module):
    "One layer of each type; nothing is ever computed with it"
    def __init__(self):
        super().__init__()
        self.c1,self.c2,self.c3 = nn.Conv1d(3,7,5),nn.Conv2d(4,6,3,groups=2),nn.Conv3d(2,5,(1,2,3))
        self.t1,self.t2,self.t3 = nn.ConvTranspose1d(5,4,3),nn.ConvTranspose2d(6,4,(3,2),groups=2),nn.ConvTranspose3d(2,3,2)
        self.lin = nn.Linear(9,11)

TIES = dict(constant=lambda w: torch.full_like(w, .5), halves=lambda w: torch.where(torch.arange(w.numel())%2==0, 1., -2.).view(w.shape),
            coarse=lambda w: (w*3/w.abs().max()).round().abs()+1, distinct=lambda w: w+.01*w.sign())

def fill(model, ties):
    with torch.no_grad():
        for p in model.parameters():
            if p.dim()>1: p.copy_(TIES[ties](p))
    return model

def test_the_table_by_hand_is_complete(): assert set(INSIDE)==set(granularities)

@pytest.mark.parametrize('context', CONTEXTS)
@pytest.mark.parametrize('ties', TIES)
@pytest.mark.parametrize('g', [g for g in INSIDE if g not in ('filter','shared_kernel')])
def test_every_granularity_on_every_layer_type(g, ties, context):
    torch.manual_seed(0)
    model = fill(Every(), ties)
    mine = {n:m for n,m in model.named_children() if inside(m, g) is not None}
    state = deepcopy(model.state_dict())
    for criterion in ('l1', 'linf', 'first_k'):
        for s in FRACTIONS:
            model.load_state_dict(state)
            sp = Sparsifier(model, granularity=g, context=context, criterion=criterion)
            m = sp.sparsify(s)
            z = {n:units(l, g) for n,l in mine.items()}
            count = {n:(int(v.sum()), len(v)) for n,v in z.items()}
            if context=='local': assert all(a==floor(s, n) for a,n in count.values())
            total = sum(n for _,n in count.values())
            assert context=='local' or sum(a for a,_ in count.values())==floor(s, total)
            assert sp.measured()==count==m.units and sp.sparsity()==pytest.approx(sum(a for a,_ in count.values())/total, abs=1e-12)==pytest.approx(m.sparsity)
            rest = [n for n in state if n.removesuffix('.weight') not in mine]
            assert all(torch.equal(model.state_dict()[n], state[n]) for n in rest)

# ---- coupled units: a residual network, in every kind of convolution

def residual(conv, norm, channels=8):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.na,self.b,self.nb,self.c = conv(3,channels,3,padding=1),norm(channels),conv(channels,channels,3,padding=1),norm(channels),conv(channels,10,3,padding=1)
            self.nc,self.short,self.head = norm(10),conv(channels,10,1),nn.Linear(10,4)
        def forward(self, x):
            x = self.na(self.a(x)).relu()
            x = x+self.nb(self.b(x)).relu()
            return self.head((self.nc(self.c(x))+self.short(x)).relu().flatten(2).mean(2))
    return Net()
NETS = {'1d':(nn.Conv1d, nn.BatchNorm1d, (2,3,8)), '2d':(nn.Conv2d, nn.BatchNorm2d, (2,3,8,8)), '3d':(nn.Conv3d, nn.BatchNorm3d, (2,3,4,4,4)),
        't1d':(nn.ConvTranspose1d, nn.BatchNorm1d, (2,3,8)), 't2d':(nn.ConvTranspose2d, nn.BatchNorm2d, (2,3,8,8)), 't3d':(nn.ConvTranspose3d, nn.BatchNorm3d, (2,3,4,4,4))}
GROUPS = (('a','b'), ('c','short')) # by hand: layers whose outputs are added
READERS = (('b','c','short'), ('head',)) # and those that read the sum

def all_zero(layers, g): # unit by unit: zero in all of these layers
    return torch.stack([units(l, g) for l in layers]).all(0)

@pytest.mark.parametrize('context', CONTEXTS)
@pytest.mark.parametrize('ties', TIES)
@pytest.mark.parametrize('net', NETS)
def test_filters_of_coupled_layers(net, ties, context):
    torch.manual_seed(0)
    conv,norm,shape = NETS[net]
    model,x = residual(conv, norm),torch.randn(shape)
    fill(model, ties)
    state = deepcopy(model.state_dict())
    for s in FRACTIONS:
        model.load_state_dict(state)
        sp = Sparsifier(model, x, granularity='filter', context=context)
        m = sp.sparsify(s)
        count = []
        for group,norms in zip(GROUPS, (('na','nb'), ('nc',))):
            z = [units(getattr(model, l), 'filter') for l in group]
            assert all(torch.equal(z[0], i) for i in z) # coupled layers agree
            for t in [getattr(model, l).bias for l in group]+[p for n in norms for p in getattr(model, n).parameters()]: assert not t.detach()[z[0]].any()
            count.append((int(z[0].sum()), len(z[0])))
        if context=='local': assert [a for a,_ in count]==[floor(s, n) for _,n in count]
        else: assert sum(a for a,_ in count)==floor(s, 18)
        assert list(sp.measured().values())==count==list(m.units.values()) and sp.sparsity()==pytest.approx(sum(a for a,_ in count)/18, abs=1e-12)

@pytest.mark.parametrize('context', CONTEXTS)
@pytest.mark.parametrize('ties', TIES)
@pytest.mark.parametrize('net', NETS)
def test_shared_kernels_of_coupled_layers(net, ties, context):
    torch.manual_seed(0)
    conv,norm,shape = NETS[net]
    model,x = residual(conv, norm),torch.randn(shape)
    fill(model, ties)
    state = deepcopy(model.state_dict())
    for s in FRACTIONS:
        model.load_state_dict(state)
        sp = Sparsifier(model, x, granularity='shared_kernel', context=context)
        m = sp.sparsify(s)
        z = [all_zero([getattr(model, l) for l in readers], 'shared_kernel') for readers in READERS]
        for v,readers in zip(z, READERS): assert all(torch.equal(v, units(getattr(model, l), 'shared_kernel')) for l in readers)
        count = [(int(v.sum()), len(v)) for v in z]
        if context=='local': assert [a for a,_ in count]==[floor(s, n) for _,n in count]
        else: assert sum(a for a,_ in count)==floor(s, 18)
        assert list(sp.measured().values())==count==list(m.units.values())
        assert all(torch.equal(model.state_dict()[n], v) for n,v in state.items() if n.split('.')[0] not in ('b','c','short','head') or 'bias' in n)

@pytest.mark.parametrize('s', FRACTIONS)
def test_asked_again_for_more(s): # what is zero stays zero and counts
    torch.manual_seed(0)
    model = fill(Every(), 'halves')
    for context in CONTEXTS:
        a = Sparsifier(model, granularity='kernel', context=context).sparsify(s/2)
        b = Sparsifier(model, granularity='kernel', context=context).sparsify(s)
        assert all((b.keep[n]<=a.keep[n]).all() for n in a.keep)
        total = sum(n for _,n in b.units.values())
        assert sum(z for z,_ in b.units.values())==(floor(s, total) if context=='global' else max(sum(floor(s, n) for _,n in b.units.values()), sum(z for z,_ in a.units.values())))

def test_the_same_inputs_give_the_same_masks():
    torch.manual_seed(0)
    model,x = small_resnet(width=4),torch.randn(2,1,8,8)
    for g in ('filter', 'shared_kernel', 'weight', 'kernel'):
        for criterion in ('l1', 'random'): assert Sparsifier(model, x, granularity=g, context='global', criterion=criterion).masks(.5)==Sparsifier(deepcopy(model), x, granularity=g, context='global', criterion=criterion).masks(.5)

# ---- and in training, where the progress table shows it

@pytest.mark.parametrize('context', CONTEXTS)
@pytest.mark.parametrize('g', ['weight', 'kernel', 'filter', 'shared_kernel', 'shared_row', 'horizontal_slice'])
def test_columns_show_what_is_zero(g, context):
    for s in (.29, .5, .9):
        torch.manual_seed(0)
        learn = Learner(digits_dls(bs=128, valid_pct=.9), small_resnet(width=4), loss_func=CrossEntropyLossFlat())
        cb = SparsifyCallback(s, g, context, ignore='fc')
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=cb)
        layers = dict(learn.model.named_modules())
        groups = ([['conv1','stage1.conv2'], ['stage1.conv1'], ['stage2.conv1'], ['stage2.conv2','stage2.shortcut.0'], ['stage3.conv1'], ['stage3.conv2','stage3.shortcut.0']] if g=='filter'
                  else [['stage1.conv1','stage2.conv1','stage2.shortcut.0'], ['stage1.conv2'], ['stage2.conv2'], ['stage3.conv1','stage3.shortcut.0'], ['stage3.conv2'], ['fc']] if g=='shared_kernel'
                  else [[n] for n,m in layers.items() if isinstance(m, nn.Conv2d)])
        z = [all_zero([layers[n] for n in group], g) for group in groups]
        count,total = sum(int(v.sum()) for v in z),sum(map(len, z))
        assert count==(floor(s, total) if context=='global' else sum(floor(s, len(v)) for v in z))
        assert learn.recorder.values[-1][-2]==pytest.approx(count/total, abs=1e-12)==cb.history.sparsity.iloc[-1]
