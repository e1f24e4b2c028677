"Progressive kernel pruning: golden values, both stages against a loop, exact counts, nested masks, channels that run empty, and the callback"
import math, random
from copy import deepcopy
import numpy as np
import pytest, torch
from fastai.callback.core import Callback, CancelTrainException
from fastai.callback.schedule import *  # fit_one_cycle, fine_tune, lr_find
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch import nn
from fasterprune.callback import prune # adds learn.prune
from fasterprune.callback.kernel_progressive import PKPCallback, pkp_schedule
from fasterprune.callback.keep_zeros import KeepZeros
from fasterprune.callback.sparsify import SparsifyCallback
from fasterprune.core import NoEffectWarning
from fasterprune.data import digits_dls, small_resnet
from fasterprune.schedule import linear, one_shot
from fasterprune.sparse.masks import Masks
from fasterprune.sparse.kernel_progressive import PKP, Round, conv_runs, kernel_norms, low_level, participation, pkp_rounds, saliency, thresholds
from fasterprune.surgery.pruner import Pruner

pytestmark = pytest.mark.filterwarnings('ignore')
torch.set_num_threads(1)
floor = lambda s,n: math.floor(s*n+1e-9)

# ---- what the tests share

def uneven(net, seed=0): # kernels of very different norms, as in a trained network
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.modules.conv._ConvNd): m.weight.copy_(torch.randn(m.weight.shape, generator=g)*torch.randn(m.weight.shape[:2], generator=g).mul(1.2).exp().reshape(*m.weight.shape[:2], *(1,)*(m.weight.ndim-2)))
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for t,a,b in ((m.weight,.5,1.5), (m.bias,-1,1), (m.running_mean,-.5,.5), (m.running_var,.5,2)): t.copy_(a+(b-a)*torch.rand(t.shape, generator=g))
    return net.eval()

def resnet(width=8): return uneven(small_resnet(width=width)),torch.randn(2,1,8,8, generator=torch.Generator().manual_seed(1))

class Odd(nn.Module): # layers of all kinds, written down in another order than they run
    def __init__(self):
        super().__init__()
        self.last = nn.ConvTranspose2d(8, 6, 3, groups=2)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2, padding=1)
        self.deep = nn.Conv2d(6, 6, 3, groups=6, padding=1)
        self.never = nn.Conv2d(3, 3, 1)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
    def forward(self, x): return self.last(self.grouped(self.deep(self.first(x).relu()).relu()).relu())

def readers(m): # input channel → the kernels that read it, as index tuples into the weight; said without the library
    I,O,G = m.in_channels,m.out_channels,m.groups
    res = {}
    for c in range(I):
        group = c//(I//G)
        outs = range(group*(O//G), (group+1)*(O//G))
        res[c] = [(c, o-group*(O//G)) for o in outs] if m.transposed else [(o, c-group*(I//G)) for o in outs]
    return res

def writers(m): # output channel → its kernels
    I,O,G = m.in_channels,m.out_channels,m.groups
    res = {o:[] for o in range(O)}
    for c,ks in readers(m).items():
        for i,k in enumerate(ks): res[(c//(I//G))*(O//G)+i].append(k)
    return res

def keep_of(masks, n, m): return masks.keep[f'{n}.weight'].flatten(2).any(2)
def gone(masks): return sum(z for z,_ in masks.units.values())
def total(masks): return sum(n for _,n in masks.units.values())
def nested(a, b): return all(not (b.keep[k] & ~a.keep[k]).any() for k in a.keep)

# ---- golden values

def test_participation_golden():
    s = torch.tensor([[4.,1],[0,1],[0,1],[0,1]])
    assert participation(s, 0).tolist()==[[1.,4.]] and participation(s).item()==pytest.approx(3.2, abs=1e-12)
    t = thresholds(s[None], 'input')[0]
    assert (t<.5).sum(0).tolist()==[1,2]
    w = torch.randn(64,64,3,3, generator=torch.Generator().manual_seed(0))
    assert .935<participation(w.abs().sum((2,3))).item()/4096<.955
    grown = w*torch.randn(64,64,1,1, generator=torch.Generator().manual_seed(1)).exp()
    assert participation(grown.abs().sum((2,3))).item()/4096==pytest.approx(.33, abs=.04)

def test_participation_bounds_and_extremes():
    assert participation(torch.zeros(5)).item()==0 and participation(torch.full((7,), 3e-200, dtype=torch.float64)).item()==pytest.approx(7)
    for n in (1, 2, 30):
        v = participation(torch.rand(n)+1e-3).item()
        assert 1-1e-12<=v<=n+1e-9
    assert participation(torch.tensor([1e30, 1e30], dtype=torch.float32)).item()==pytest.approx(2)

def test_smioc_golden():
    s = torch.tensor([[[4.,1],[1,1]]])
    assert torch.allclose(saliency(s), torch.tensor([[[1.,.5],[.5,1]]]))
    assert not saliency(torch.zeros(1,2,3)).any()

def test_kernel_norms_of_all_convolutions():
    for m in (nn.Conv1d(4,6,5,groups=2), nn.Conv2d(4,6,3), nn.Conv3d(2,3,2), nn.ConvTranspose1d(4,6,3), nn.ConvTranspose2d(4,6,3,groups=2), nn.Conv2d(4,4,3,groups=4)):
        for p in (1,2):
            s = kernel_norms(m, p)
            for c,ks in readers(m).items():
                for i,k in enumerate(ks):
                    w = m.weight.detach()[k].flatten().double()
                    want = sum(abs(v) for v in w.tolist()) if p==1 else math.sqrt(sum(v*v for v in w.tolist()))
                    assert s[c//(m.in_channels//m.groups), i, c%(m.in_channels//m.groups)].item()==pytest.approx(want, rel=1e-6)

# ---- both stages against a loop that follows the definition

def by_definition(s, rank, alive, theta, of, force): # [O,I] lists; which kernels stay
    O,I = s.shape
    keep = set()
    live = [(o,i) for o in range(O) for i in range(I) if alive[o,i]]
    order = lambda ks: sorted(ks, key=lambda k: (-rank[k].item(), -(k[0]*I+k[1])))
    lines = [[k for k in live if k[1]==i] for i in range(I)] if of=='input' else [live]
    must = set()
    for f in {*force, of}:
        ls = {'input':[[k for k in live if k[1]==i] for i in range(I)], 'output':[[k for k in live if k[0]==o] for o in range(O)], 'layer':[live]}[f]
        must |= {order(l)[0] for l in ls if l}
    for l in lines:
        if not l: continue
        v = [s[k].item() for k in l]
        k = min(len(l), math.ceil(theta*sum(v)**2/sum(a*a for a in v)-1e-9))
        reserved = [a for a in l if a in must]
        rest = [a for a in order(l) if a not in must]
        keep |= set(reserved) | set(rest[:max(k-len(reserved), 0)])
    return keep

@pytest.mark.parametrize('of,force', [('input',()), ('input',('output',)), ('layer',()), ('layer',('input',)), ('layer',('input','output'))])
@pytest.mark.parametrize('mode', ['norm','smioc'])
def test_thresholds_are_the_definition(of, force, mode):
    g = torch.Generator().manual_seed(3)
    for O,I in ((1,1), (5,3), (4,7)):
        s = torch.randn(O,I, generator=g, dtype=torch.float64).mul(1.5).exp()
        s[torch.rand(O,I, generator=g)<.2] = 0
        alive = (s>0)&(torch.rand(O,I, generator=g)<.9)
        rank = saliency((s*alive)[None])[0] if mode=='smioc' else s
        t = thresholds(s[None], of, rank=rank[None], alive=alive[None], force=force)[0]
        assert (t[~alive]==torch.inf).all()
        for theta in (1e-6, .1, .37, .5, .93, 1.4, 3.3, 50.):
            assert {tuple(k) for k in (t<theta).nonzero().tolist()}==by_definition(s, rank, alive, theta, of, force), (O, I, theta)

def test_equals_go_by_position():
    t = thresholds(torch.ones(1,4,1), 'input')[0,:,0]
    assert t.tolist()==[.75,.5,.25,-torch.inf] # the first goes first, as everywhere

# ---- counts, nesting, protection

@pytest.mark.parametrize('mode', ['norm','smioc'])
def test_exact_counts_and_every_channel(mode):
    torch.manual_seed(0)
    net,x = uneven(Odd()),torch.randn(1,3,8,8)
    pkp = PKP(net, x, mode=mode)
    assert list(pkp.layers)==['first','deep','grouped','last'] and pkp.low==('first','deep') and pkp.skipped=={'never':'it did not run'}
    n = 18+6+24+24
    for s in (0., .1, .29, .5, .57, pkp.most(1)):
        m = pkp.masks(s, 1)
        assert gone(m)==floor(s,n) and total(m)==n
        for l,c in pkp.layers.items():
            k = keep_of(m, l, c)
            assert m.keep[f'{l}.weight'].shape==(*c.weight.shape[:2],1,1) and m.units[l]==(int((~k).sum()), k.numel())
            for ks in readers(c).values(): assert any(k[i] for i in ks)
    for s in (.6, .7, pkp.most(2)):
        m = pkp.masks(s)
        assert gone(m)==floor(s,n)
        for l,c in pkp.layers.items():
            k = keep_of(m, l, c)
            assert k.any()
            if l in pkp.low:
                for ks in readers(c).values(): assert any(k[i] for i in ks)
    most = pkp.masks(pkp.most(2))
    assert any(not any(keep_of(most,l,pkp.layers[l])[i] for i in ks) for l in ('grouped','last') for ks in readers(pkp.layers[l]).values()) # high level: adjustable

def test_within_an_input_channel_the_largest_stay():
    net,x = resnet()
    pkp = PKP(net, x)
    m = pkp.masks(.4, 1)
    for l,c in pkp.layers.items():
        s,k = c.weight.detach().abs().sum((2,3)),keep_of(m, l, c)
        for i in range(s.shape[1]):
            if (~k[:,i]).any(): assert s[k[:,i],i].min()>s[~k[:,i],i].max()

def test_filters_keep_a_kernel_if_asked():
    torch.manual_seed(0)
    net,x = uneven(Odd()),torch.randn(1,3,8,8)
    for stage in (1,2):
        pkp = PKP(net, x, protect_out=True)
        m = pkp.masks(pkp.most(stage), stage)
        for l,c in pkp.layers.items():
            k = keep_of(m, l, c)
            for ks in writers(c).values(): assert any(k[i] for i in ks)
    free = PKP(net, x)
    m = free.masks(free.most(2))
    assert any(not any(keep_of(m,l,c)[i] for i in ks) for l,c in free.layers.items() for ks in writers(c).values())

def test_a_part_of_parameters_and_of_multiplications():
    net,x = resnet()
    hw = dict(zip(('conv1','stage1.conv1','stage1.conv2','stage2.conv1','stage2.conv2','stage2.shortcut.0','stage3.conv1','stage3.conv2','stage3.shortcut.0'), (64,64,64,16,16,16,4,4,4)))
    for count in ('params','macs'):
        pkp = PKP(net, x, count=count)
        cost = {n:m.weight[0,0].numel()*(len(x)*hw[n] if count=='macs' else 1) for n,m in pkp.layers.items()}
        all_of = sum(cost[n]*m.weight.shape[0]*m.weight.shape[1] for n,m in pkp.layers.items())
        for s in (.3,.7):
            m = pkp.masks(s)
            went = sum(cost[n]*z for n,(z,_) in m.units.items())
            assert s*all_of-max(cost.values())<went<=s*all_of+1e-6
            k = deepcopy(net); m.apply_(k)
            assert PKP(k, x, count=count).sparsity()==pytest.approx(went/all_of, abs=1e-12)
    assert PKP(net, x, count='macs').masks(.5)!=PKP(net, x).masks(.5)

def test_rounds_are_nested_even_where_training_wakes_what_was_gone():
    net,x = resnet()
    seen = []
    def tune(model, masks):
        seen.append(masks)
        with torch.no_grad():
            for p in model.parameters(): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(seen)))*.3)
    pkp = PKP(net, x)
    n = sum(m.weight.shape[0]*m.weight.shape[1] for m in pkp.layers.values())
    end = pkp.sparsify(.8, rounds=3, tune=tune)
    assert [gone(m) for m in seen]==[floor(r.sparsity,n) for r in pkp_rounds(.8, 3)] and end==seen[-1]
    assert all(nested(a,b) for a,b in zip(seen, seen[1:]))
    for k,v in end.keep.items(): assert not net.get_parameter(k).detach()[~v.expand_as(net.get_parameter(k))].any()
    assert pkp.sparsity()==gone(end)/n

def test_what_is_gone_in_other_masks_stays_gone_however_large():
    net,x = resnet()
    pkp = PKP(net, x)
    first = pkp.masks(.3, 1)
    with torch.no_grad():
        for k,v in first.keep.items(): net.get_parameter(k).masked_fill_(~v, 100.)
    for stage in (1,2):
        m = pkp.masks(.5, stage, within=first)
        assert nested(first, m) and gone(m)==floor(.5, total(m)) and not nested(first, pkp.masks(.5, stage))

def test_what_is_zero_stays_and_counts():
    net,x = resnet()
    with torch.no_grad(): net.stage3.conv2.weight[:,5] = 0; net.stage1.conv1.weight[2,3] = 0
    pkp = PKP(net, x)
    m = pkp.masks(0.)
    assert gone(m)==33 and not keep_of(m, 'stage3.conv2', None)[:,5].any()
    n = total(m)
    assert gone(pkp.masks(.3, 1))==floor(.3,n) and nested(m, pkp.masks(.3, 1))
    assert not pkp.masks(.6).keep['stage3.conv2.weight'][:,5].any()
    with torch.no_grad(): net.stage3.conv2.weight.zero_()
    assert PKP(net, x).skipped=={'stage3.conv2':'all of it is zero'}

def test_masks_are_the_same_again_and_change_nothing():
    net,x = resnet()
    before = {k:v.clone() for k,v in net.state_dict().items()}
    a,b = (PKP(net, x, mode='smioc').masks(.6) for _ in range(2))
    assert a==b and all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

def test_levels_follow_the_run():
    net,x = resnet()
    runs = conv_runs(net, torch.randn(1,1,33,33), dict((n,m) for n,m in net.named_modules() if isinstance(m, nn.Conv2d)))
    names = list(runs)
    for f in (0, .25, .5, 1, 1.): assert low_level(runs, f)==tuple(names[:floor(f,9)])
    assert low_level(runs, 2)==tuple(names[:3]) and low_level(runs, 4)==tuple(names[:6]) and low_level(runs, 64)==tuple(names)
    m = PKP(net, x, protect_until=1.)
    for l in m.layers: assert m.masks(m.most()).keep[f'{l}.weight'].any(0).all()

def test_rounds():
    assert pkp_rounds(.6)==(Round(1,.6/3), Round(2,.6)) and pkp_rounds(.6, moderate=0)==(Round(2,.6),)
    r = pkp_rounds(.9, 2, schedule=linear(), moderate=.5)
    assert [a.stage for a in r]==[1,1,2,2] and [a.sparsity for a in r]==pytest.approx([.225,.45,.675,.9])
    assert [a.sparsity for a in pkp_rounds(.8, 2, schedule='exponential')]==pytest.approx([1-(1-.8/3)**.5, .8/3, 1-((1-.8/3)*.2)**.5, .8])
    s = pkp_schedule(pkp_rounds(.8, 2), end=.5)
    assert [s(p,.8) for p in (0,.16,.17,.34,.49,.5,1)]==pytest.approx([pkp_rounds(.8,2)[i].sparsity for i in (0,0,1,2,2,3,3)])

# ---- what runs empty is removed, and the outputs stay

def law(net, x): # removed, and the difference in float64
    net,x = net.double().eval(),x.double()
    with torch.no_grad():
        before = net(x); r = Pruner(net, x).prune(); after = net(x)
    return r,((after-before).abs().max()/before.abs().max()).item()

def plain(bn, padding): # high layers of 12 channels
    conv = lambda i,o: [nn.Conv2d(i, o, 3, padding=padding, bias=not bn), *([nn.BatchNorm2d(o)] if bn else []), nn.ReLU()]
    return nn.Sequential(*conv(1,8), *conv(8,12), *conv(12,12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12,5))

@pytest.mark.parametrize('bn', [False, True])
@pytest.mark.parametrize('padding', [0, 1])
def test_empty_channels_and_filters_go(bn, padding):
    torch.manual_seed(0)
    x = torch.randn(2,1,9,9)
    net = uneven(plain(bn, padding), 2)
    m = PKP(net, x, silence=bool(padding)).sparsify(.85, rounds=2)
    convs = {n:c for n,c in net.named_modules() if isinstance(c, nn.Conv2d)}
    names,empty_in,empty_out = list(convs),[],[]
    for a,b in zip(names, names[1:]):
        writes,reads = keep_of(m,a,None).any(1),keep_of(m,b,None).any(0)
        empty_in += [i for i in range(len(reads)) if not reads[i]]; empty_out += [i for i in range(len(writes)) if not writes[i]]
    assert empty_in and empty_out
    r,error = law(net, x)
    left = {n:c.weight.shape for n,c in net.named_modules() if isinstance(c, nn.Conv2d)}
    for a,b in zip(names, names[1:]): # both kinds have gone, and those that only read or feed them
        both = int((keep_of(m,a,None).any(1)&keep_of(m,b,None).any(0)).sum())
        assert left[a][0]==left[b][1]<=both
    assert error<1e-10

@pytest.mark.parametrize('kw', [dict(), dict(silence=True), dict(mode='smioc', silence=True), dict(protect_out=True), dict(protect_until=0, silence=True)])
def test_law_on_a_residual_network(kw):
    net,x = resnet()
    PKP(net, x, **kw).sparsify(.93 if 'protect_out' not in kw else .85, rounds=2)
    r,error = law(net, x)
    assert r.removed>0 and error<1e-10

def test_silence_reaches_channels_only_where_all_writers_are_empty():
    net,x = resnet()
    m = PKP(net, x, silence=True).masks(.93)
    extra = {n:k for n,k in m.keep.items() if k.dim()==1}
    assert extra and not any(k.dim()==1 for k in PKP(net, x).masks(.93).keep.values())
    groups = [(['conv1','stage1.conv2'],['bn1','stage1.bn2']), (['stage1.conv1'],['stage1.bn1']), (['stage2.conv1'],['stage2.bn1']), (['stage2.conv2','stage2.shortcut.0'],['stage2.bn2','stage2.shortcut.1']), (['stage3.conv1'],['stage3.bn1']), (['stage3.conv2','stage3.shortcut.0'],['stage3.bn2','stage3.shortcut.1'])]
    for convs,norms in groups:
        alive = torch.stack([keep_of(m,c,None).any(1) for c in convs]).any(0)
        for n in norms:
            for p in ('weight','bias'):
                assert (f'{n}.{p}' in extra)==(not alive.all())
                if not alive.all(): assert extra[f'{n}.{p}'].tolist()==alive.tolist()

# ---- refusals

def test_what_cannot_be_reached_is_refused_before_anything_changes():
    net,x = resnet()
    before = {k:v.clone() for k,v in net.state_dict().items()}
    pkp = PKP(net, x)
    with pytest.raises(ValueError, match='cannot be reached in stage 1: each input channel keeps a kernel, so at most 0.95'): pkp.sparsify(.99, moderate=1.)
    with pytest.raises(ValueError, match='of the 4 layers of low level keeps a kernel, and each layer one'): pkp.sparsify(1.)
    with pytest.raises(ValueError, match='smaller protect_until'): PKP(net, x, protect_until=1.).masks(.99)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    pkp.masks(pkp.most()), pkp.masks(pkp.most(1), 1)
    with torch.no_grad(): net.conv1.weight[0,0,0,0] = torch.nan
    with pytest.raises(ValueError, match="'conv1': 1 of 8 kernels have no finite norm"): pkp.masks(.5)

def test_refusals_of_layers():
    net,x = resnet()
    with pytest.raises(ValueError, match='linear layer and has no kernels'): PKP(net, x, only=['conv1','fc'])
    with pytest.raises(ValueError, match='no convolution can be taken: never: it did not run'): PKP(Odd(), torch.randn(1,3,8,8), only='never')
    made = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1,2,3)), nn.Conv2d(2,2,3))
    with pytest.raises(ValueError, match='computed from other parameters'): PKP(made, torch.randn(1,1,8,8))
    assert list(PKP(made, torch.randn(1,1,8,8), ignore='0').layers)==['1']
    with pytest.raises(TypeError, match='silence is True or False'): PKP(net, x, silence=1)
    with pytest.raises(TypeError, match='needs an nn.Module'): PKP('net', x)
    with pytest.warns(NoEffectWarning, match='rounds to none'): PKP(net, x).sparsify(1e-6)

# ---- in training

def learner(net=None, seed=0, **kw):
    torch.manual_seed(seed); random.seed(seed); np.random.seed(seed)
    return Learner(digits_dls(bs=128, valid_pct=.75), small_resnet(width=4) if net is None else net, loss_func=CrossEntropyLossFlat(), metrics=accuracy, **kw)

def fit(learn, n=2, cbs=None, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, cbs=cbs, **kw)
    return learn

class Holds(Callback): # after every step the masked weights are zero, and nothing that was masked comes back
    order,last,steps = KeepZeros.order+1,None,0
    def __init__(self, cb): self.cb = cb
    def after_step(self):
        self.steps += 1
        for n,m in self.cb.masks.keep.items(): assert not self.model.get_parameter(n).detach()[~m.expand_as(self.model.get_parameter(n))].any()
        if self.last is not None: assert nested(self.last, self.cb.masks)
        self.last = self.cb.masks

@pytest.mark.parametrize('kw', [dict(), dict(mode='smioc', silence=True, count='macs'), dict(rounds=1, end=1.), dict(rounds=4, moderate=0)])
def test_callback_reaches_its_rounds(kw):
    cb = PKPCallback(.6, **{'end':.5, **kw})
    learn = learner()
    keys,spy = list(learn.model.state_dict()),Holds(cb)
    fit(learn, 4, [cb, spy])
    h,todo = cb.history,pkp_rounds(.6, kw.get('rounds', 3), moderate=kw.get('moderate', 1/3))
    assert spy.steps==12 and h.requested.tolist()==pytest.approx([r.sparsity for r in todo]) and h.progress.iloc[0]==0
    if kw.get('count')!='macs':
        n = total(cb.masks)
        assert [round(s*n) for s in h.sparsity]==[floor(r.sparsity,n) for r in todo] and gone(cb.masks)==floor(.6,n)
    else: assert .6-.02<h.sparsity.iloc[-1]<=.6
    assert list(learn.model.state_dict())==keys and list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','sparsity','compression','time'] and len(learn.metrics)==1
    assert not any(isinstance(c, PKPCallback) for c in learn.cbs)

def test_another_fit_goes_on_from_the_zeros():
    learn = fit(learner(), 2, PKPCallback(.6))
    zero = {n:(p==0) for n,p in learn.model.named_parameters()}
    fit(learn, 1)
    for n,p in learn.model.named_parameters(): assert not (zero[n]&(p!=0)).any()
    cb = PKPCallback(.8)
    fit(learn, 2, cb)
    for n,p in learn.model.named_parameters(): assert not (zero[n]&(p!=0)).any()
    assert gone(cb.masks)==floor(.8, total(cb.masks)) and cb.history.sparsity.iloc[0]==pytest.approx(floor(.6, total(cb.masks))/total(cb.masks)) # what is gone counts

def test_beside_a_sparsify_callback():
    a,b = PKPCallback(.6),SparsifyCallback(.5, 'weight', only='fc')
    learn = fit(learner(), 3, [a, b])
    assert int((learn.model.fc.weight==0).sum())==80
    for n,m in a.masks.keep.items(): assert not learn.model.get_parameter(n).detach()[~m.expand_as(learn.model.get_parameter(n))].any()

def test_search_for_a_learning_rate_changes_nothing():
    cb = PKPCallback(.6)
    learn = learner(cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=3, show_plot=False)
    assert cb.masks is None and not any((p==0).all() for p in learn.model.parameters() if p.dim()==4)

def test_interrupted_training_leaves_nothing_behind():
    class Stop(Callback):
        def after_batch(self):
            if self.iter==1: raise KeyError('stop')
    cb,learn = PKPCallback(.6),learner()
    with pytest.raises(KeyError): fit(learn, 2, [cb, Stop()])
    assert len(learn.metrics)==1 and not any(isinstance(c, PKPCallback) for c in learn.cbs)
    fit(learn, 2, cb)
    assert gone(cb.masks)==floor(.6, total(cb.masks))

def test_only_epochs_after_the_last_round_count_as_best(tmp_path):
    learn = learner(path=tmp_path, model_dir='.')
    cb = PKPCallback(.7)
    fit(learn, 4, [cb, SaveModelCallback(monitor='accuracy')])
    for n,m in cb.masks.keep.items(): assert not learn.model.get_parameter(n).detach()[~m.expand_as(learn.model.get_parameter(n))].any()
    assert cb.measured_sparsity()==pytest.approx(floor(.7, total(cb.masks))/total(cb.masks))

def test_two_phases_and_then_removal():
    cb,learn = PKPCallback(.9, silence=True),learner(small_resnet(width=8))
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, 1e-2, freeze_epochs=1, cbs=cb)
    x = torch.stack([learn.dls.valid_ds[i][0] for i in range(8)])
    with torch.no_grad(): before = learn.model.eval()(x)
    r = learn.prune()
    with torch.no_grad(): after = learn.model.eval()(x)
    assert r.removed>0 and torch.allclose(before, after, atol=1e-4)
    fit(learn, 1) # the optimizer and the masks of what is left go on
    assert sum(int((p==0).sum()) for p in learn.model.parameters())>0

def test_epochs_cut_short_and_resumed():
    class Cut(Callback):
        def after_batch(self):
            if self.training and self.iter==0: raise CancelTrainException()
    cb,learn = PKPCallback(.6),learner()
    fit(learn, 3, [cb, Cut()])
    assert cb.history.requested.iloc[0]==pytest.approx(pkp_rounds(.6, 3)[0].sparsity) and gone(cb.masks)==floor(.6, total(cb.masks))
    late,learn = PKPCallback(.6),learner()
    fit(learn, 4, late, start_epoch=3)
    assert gone(late.masks)==floor(.6, total(late.masks))

# ---- on networks as they are used: pytest tests/callback/test_progressive.py -m slow

@pytest.mark.slow
@pytest.mark.parametrize('name,sparsity', [('resnet18',.9), ('mobilenet_v2',.7), ('densenet121',.9)])
def test_law_on_known_networks(name, sparsity):
    from torchvision import models
    torch.manual_seed(0)
    net,x = uneven(getattr(models, name)(weights=None, num_classes=10)).double(),torch.randn(1,3,64,64).double()
    pkp = PKP(net, x, silence=True)
    m = pkp.sparsify(min(sparsity, pkp.most()), rounds=2)
    for l in pkp.low:
        for ks in readers(pkp.layers[l]).values(): assert any(keep_of(m, l, None)[k] for k in ks)
    r,error = law(net, x)
    assert error<1e-10 and r.removed>0
