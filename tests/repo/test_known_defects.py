"Defects that were measured in other pruning libraries, one named test each, and every refusal of sparsifying and pruning with its text"
import math, warnings
from copy import deepcopy
from functools import partial
import pytest, torch, torchvision
from fastai.callback.schedule import *  # fine_tune, fit_one_cycle, lr_find
from fastai.callback.tracker import SaveModelCallback
from fastai.optimizer import SGD
from torch import nn
from torch.nn import functional as F
from fasterprune.allocation import contexts, keep_top
from fasterprune.callback import prune # adds learn.prune
from fasterprune.callback.base import example_batch
from fasterprune.callback.keep_zeros import KeepZeros
from fasterprune.callback.sparsify import SparsifyCallback
from fasterprune.core import NoEffectWarning
from fasterprune.criteria.base import Criterion, criteria
from fasterprune.criteria.normalize import normalizers
from fasterprune.data import small_resnet
from fasterprune.granularity import granularities, unit_dims
from fasterprune.schedule import Schedule, one_cycle, one_shot, schedules
from fasterprune.sparse.masks import Masks
from fasterprune.sparse.sparsifier import Sparsifier
from fasterprune.surgery.planning.plan import Plan
from fasterprune.surgery.pruner import Pruner
from support.small_fit import fit, learner as small_learner

pytestmark = pytest.mark.filterwarnings('ignore')
torch.set_num_threads(1)
floor = lambda s, n: math.floor(s*n + 1e-9)

def net(width=8, out=10): # two convolutions and a head
    return nn.Sequential(nn.Conv2d(1,width,3,padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width,12,3,padding=1), nn.BatchNorm2d(12), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12,out))
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

def learner(model=net, **kw): return small_learner(model, **kw)

def dead(m): return [i for i in range(len(m.weight)) if not m.weight[i].any()]
def out(m, x): # in eval mode
    was = m.training; m.eval()
    with torch.no_grad(): y = m(*x) if isinstance(x, tuple) else m(x)
    m.train(was); return y
def close(a, b, tol=1e-5): return ((a-b).abs().max()/b.abs().max()).item()<tol

# ======== fasterai: numbers

def test_half_of_eight_is_four_and_a_tenth_of_sixteen_is_one():
    for n,s,want in ((8,.5,4), (16,.1,1), (10,1.,10)):
        m = Sparsifier(nn.Sequential(nn.Conv2d(3,n,3)), granularity='weight', only='0').masks(0.)
        conv = nn.Sequential(nn.Conv2d(3,n,3), nn.ReLU(), nn.Conv2d(n,2,1))
        Sparsifier(conv, torch.randn(1,3,8,8)).sparsify(s)
        assert len(dead(conv[0]))==want and m.sparsity==0

def test_ties_are_counted():
    conv = nn.Sequential(nn.Conv2d(1,8,1,bias=False), nn.Conv2d(8,2,1))
    with torch.no_grad(): conv[0].weight.view(-1).copy_(torch.tensor([1.,1,1,1,2,2,2,2]))
    Sparsifier(conv, X).sparsify(.25)
    assert dead(conv[0])==[0,1]
    assert keep_top(torch.tensor([1.,1,1,1,2,2,2,2]), .25).tolist()==[False,False,True,True,True,True,True,True]

@pytest.mark.parametrize('context', contexts)
@pytest.mark.parametrize('granularity', list(granularities))
def test_what_is_reported_was_measured(granularity, context): # they print 'Final Sparsity: 50.00%' whatever happened
    for criterion in ('l1', 'linf', 'random'):
        for s in schedules:
            sched = schedules[s]()
            model = nn.Sequential(nn.Conv3d(2,6,3), nn.ReLU(), nn.Conv3d(6,4,(1,2,3)))
            sp = Sparsifier(model, torch.randn(1,2,8,8,8), granularity=granularity, context=context, criterion=criterion)
            for p in (0., .5, .7, 1.):
                m = sp.masks(sched(p, .5)) # what is zero stays zero: dsd does not fall here
                m.apply_(model)
                assert m.units==sp.measured() and f"{sp.sparsity():.2%}" in repr(m)
            n = [k for _,k in m.units.values()]
            assert sum(z for z,_ in m.units.values())==(floor(.5, sum(n)) if context=='global' else sum(floor(.5, k) for k in n))

def test_layer_granularity_prunes():
    model = nn.Sequential(nn.Linear(4,4), nn.Linear(4,4), nn.Linear(4,4), nn.Linear(4,4))
    with torch.no_grad(): model[2].weight.mul_(.1)
    Sparsifier(model, granularity='layer', context='global').sparsify(.25)
    assert [bool(l.weight.any()) for l in model]==[True,True,False,True]

def test_a_sparsity_that_rounds_to_nothing_says_so():
    with pytest.warns(NoEffectWarning, match="sparsity=0.5 of the 1 units of '0', the most in a layer, rounds to none"): Sparsifier(net(), granularity='layer').sparsify(.5)
    with pytest.warns(NoEffectWarning, match='sparsity=0.01 of the 20 units rounds to none; ask for more$'): Sparsifier(net(), X, context='global').sparsify(.01)
    with pytest.warns(NoEffectWarning, match='sparsity=0.05 of the 12 units'): fit(learner(), 1, cbs=SparsifyCallback(.05))
    with warnings.catch_warnings():
        warnings.simplefilter('error', NoEffectWarning)
        Sparsifier(net(), X).sparsify(0.)
        Sparsifier(net(), X).sparsify(.1)

def test_dsd_is_sparse_in_the_middle_and_dense_at_the_end():
    cb = SparsifyCallback(.5, schedule='dsd')
    learn = fit(learner(), 5, cbs=cb)
    assert cb.history.sparsity.tolist()[2]==.5 and cb.history.sparsity.iloc[-1]==0 or cb.measured_sparsity()==0
    assert not dead(learn.model[0]) and not dead(learn.model[3])

def test_global_filters_of_a_resnet_are_counted_and_shown_layer_by_layer():
    torch.manual_seed(0)
    m,x = torchvision.models.resnet18(num_classes=10),torch.randn(1,3,64,64)
    masks = Sparsifier(m, x, context='global').sparsify(.5)
    total = sum(n for _,n in masks.units.values())
    assert sum(z for z,_ in masks.units.values())==floor(.5, total)
    for n,(z,k) in masks.units.items(): # each layer with what it lost, in words
        assert len(dead(m.get_submodule(n)))==z and any(n in l.split() and f"{z} of {k}" in ' '.join(l.split()) for l in repr(masks).splitlines())
    r = Pruner(m, x).prune()
    assert r.removed==floor(.5, total) and all(after>=1 for _,_,after in r.rows())

def test_scale_of_a_layer_does_not_decide_a_global_ranking():
    a = net(); b = deepcopy(a)
    with torch.no_grad(): b[0].weight.mul_(100)
    assert Sparsifier(a, X, context='global').masks(.4)==Sparsifier(b, X, context='global').masks(.4)

def test_every_listed_name_exists_and_works(): # theirs list a criterion that does not exist
    for c,v in criteria.items():
        if v.needs: continue # tests/criteria/test_criteria_matrix.py gives them data
        for ctx in contexts[:1 if v.across is None else 2]:
            assert Sparsifier(net(), X, criterion=c, context=ctx).masks(.5).sparsity==.5, (c, ctx)
    for n in normalizers: assert Sparsifier(net(), X, context='global', normalizer=n).masks(.5).sparsity==.5, n
    for s in schedules: assert SparsifyCallback(.5, schedule=s).schedule==schedules[s]()
    for g in granularities: assert SparsifyCallback(.5, g).granularity is granularities[g]

@pytest.mark.parametrize('f', [lambda w: w, lambda w: w.mul_(0), lambda w: (w.data.zero_(), w.abs())[1], lambda w: torch.relu_(w)])
def test_scoring_never_changes_a_weight(f):
    for kw in (dict(), dict(granularity='weight'), dict(granularity='shared_kernel'), dict(context='global', normalizer='none')):
        m = net(); before = deepcopy(m.state_dict())
        try: Sparsifier(m, X, criterion=f, **kw).masks(.5)
        except TypeError: pass # some of these do not return scores
        assert all(torch.equal(before[k], v) for k,v in m.state_dict().items())

def test_a_criterion_without_what_it_needs_is_refused(): # theirs falls back to another one
    m = nn.Sequential(nn.Conv2d(1,8,3), nn.ReLU(), nn.Conv2d(8,4,3))
    with pytest.raises(ValueError, match="'bn_scale' reads the scale of a normalisation, and '0' has none"): Sparsifier(m, X, criterion='bn_scale')
    with pytest.raises(ValueError, match="'bn_scale' reads the scale"): Pruner(m, X).prune(.5, criterion='bn_scale')

def test_one_cycle_has_the_parameters_of_its_author():
    assert dict(one_cycle().options)==dict(alpha=14., beta=5.)
    f = lambda p: (1+math.exp(-14+5))/(1+math.exp(-14*p+5))
    assert [one_cycle()(p, 1.) for p in (.1, .5, .9)]==pytest.approx([f(.1), f(.5), f(.9)])

def test_conv1d_has_dimensions_of_its_own():
    conv = nn.Conv1d(3,5,7)
    assert unit_dims(conv, 'filter')==(1,2) and unit_dims(conv, 'kernel')==(2,) and unit_dims(conv, 'shared_kernel')==(0,2) and unit_dims(conv, 'channel')==(1,)
    m = nn.Sequential(nn.Conv1d(3,8,3), nn.ReLU(), nn.Conv1d(8,4,3))
    Sparsifier(m, torch.randn(1,3,9), granularity='kernel', only='0').sparsify(.5)
    assert int((m[0].weight==0).all(2).sum())==12

# ======== fasterai: masks

def test_masks_do_not_end_with_fit():
    learn = fit(learner(), cbs=SparsifyCallback(.8))
    z = [dead(learn.model[i]) for i in (0,3)]
    assert list(map(len, z))==[6,9]
    fit(learn, 1, 3e-2)
    assert [dead(learn.model[i]) for i in (0,3)]==z

def test_a_second_fit_and_the_second_phase_of_fine_tune_do_not_start_at_zero():
    seen = []
    cb = SparsifyCallback(.5)
    learn = fit(learner(), cbs=cb)
    fit(learn, cbs=cb)
    assert set(cb.history.sparsity)=={.5}
    learn = learner(splitter=lambda m: [list(m[:6].parameters()), list(m[6:].parameters())])
    cb = SparsifyCallback(.5)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, 1e-2, cbs=cb)
    assert set(cb.history.sparsity)=={.5}

def test_nan_does_not_survive_masking():
    m = net(); masks = Sparsifier(m, X).masks(.5)
    gone = (~masks.keep['0.weight'].flatten()).nonzero()[0,0]
    with torch.no_grad(): m[0].weight[gone] = float('nan'); m[1].bias[gone] = float('inf')
    masks.apply_(m)
    assert all(p.isfinite().all() for p in m.parameters()) and not m[0].weight[gone].any() and m[1].bias[gone]==0

class Shuffled(nn.Module): # registered in another order than it runs
    def __init__(self):
        super().__init__()
        self.n2,self.head,self.n1 = nn.BatchNorm2d(8),nn.Linear(8,10),nn.BatchNorm2d(8)
        self.c2,self.c1 = nn.Conv2d(8,8,3,padding=1),nn.Conv2d(1,8,3,padding=1)
    def forward(self, x): return self.head(self.n2(self.c2(self.n1(self.c1(x)).relu())).relu().mean((2,3)))

def test_batchnorm_is_found_by_the_data_and_stays_dead():
    worst = []
    class Look(KeepZeros.__mro__[1]): # a plain callback, after KeepZeros
        order = KeepZeros.order+1
        def after_step(self):
            m = self.learn.model
            for c,n in ((m.c1,m.n1), (m.c2,m.n2)):
                z = dead(c)
                y = deepcopy(n).eval()(c(torch.randn(2, c.in_channels, 5, 5)))
                if z: worst.append(max(y[:,z].abs().max().item(), n.weight[z].abs().max().item(), n.bias[z].abs().max().item()))
    learn = fit(learner(Shuffled, opt_func=partial(SGD, mom=.9, wd=.1)), 4, cbs=[SparsifyCallback(.5), Look()])
    assert len(dead(learn.model.c1))==len(dead(learn.model.c2))==4 and len(worst)>9 and max(worst)==0

def test_checkpoints_have_the_keys_and_the_size_of_the_model(tmp_path):
    learn = learner(tmp=tmp_path)
    size = learn.save('dense', with_opt=False).stat().st_size
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=8, show_plot=False)
    fit(learn, 3, cbs=[SparsifyCallback(.5), SaveModelCallback(fname='best')])
    assert abs((tmp_path/'best.pth').stat().st_size-size)<200
    fresh = learner(tmp=tmp_path).load('best')
    assert list(fresh.model.state_dict())==list(net().state_dict()) and len(dead(fresh.model[0]))==4

def test_grouped_transposed_convolution_by_filter():
    m = nn.Sequential(nn.Conv2d(1,8,3), nn.ReLU(), nn.ConvTranspose2d(8,12,3,groups=4), nn.ReLU(), nn.Conv2d(12,4,1))
    masks = Sparsifier(m, X).sparsify(.5)
    sp = Sparsifier(m, X)
    assert sp.measured()==masks.units and sum(z for z,_ in masks.units.values())==sum(floor(.5, n) for _,n in masks.units.values())
    want = out(m, X)
    Pruner(m, X).prune()
    assert close(out(m, X), want)

def test_depthwise_convolution():
    m = nn.Sequential(nn.Conv2d(1,8,1), nn.Conv2d(8,8,3,groups=8), nn.ReLU(), nn.Conv2d(8,4,1))
    masks = Sparsifier(m, X).sparsify(.5)
    assert dead(m[0])==dead(m[1]) and len(dead(m[0]))==4 and list(masks.units.values())==[(4,8)]
    want = out(m, X)
    assert Pruner(m, X).prune().removed==4 and close(out(m, X), want) and m[1].groups==4

def test_attention_is_not_reported_as_sparse_when_it_is_not():
    m = nn.TransformerEncoderLayer(16, 2, 32, dropout=0., batch_first=True)
    masks = Sparsifier(m, granularity='weight').sparsify(.5) # in_proj_weight belongs to no layer: it is neither touched nor counted
    assert (m.self_attn.in_proj_weight!=0).all() and 'self_attn.in_proj_weight' not in masks.keep
    assert set(masks.units)=={'self_attn.out_proj','linear1','linear2'} and all(int((m.get_submodule(n).weight==0).sum())==z for n,(z,_) in masks.units.items())

def test_linear_only_network_is_really_sparsified():
    m = nn.Sequential(nn.Linear(6,8), nn.ReLU(), nn.Linear(8,3))
    Sparsifier(m, torch.randn(2,6)).sparsify(.5)
    assert len(dead(m[0]))==4

def test_a_wrong_name_fails_before_training(): # theirs in batch 15 of 20
    for kw in (dict(criterion='magnitud'), dict(granularity='filters'), dict(context='globl'), dict(schedule='cubic'), dict(normalizer='men')):
        with pytest.raises(ValueError, match='choose from'): SparsifyCallback(.5, **kw)

# ======== fasterai: pruner

def test_prune_removes_what_training_zeroed_and_nothing_else():
    learn = fit(learner(partial(small_resnet, width=8)), 3, cbs=SparsifyCallback(.5))
    m = learn.model
    zeros = {n:dead(l) for n,l in m.named_modules() if isinstance(l, nn.Conv2d)}
    with learn.no_bar(), learn.no_logging(): want,before = learn.get_preds()[0],learn.validate()
    r = learn.prune()
    with learn.no_bar(), learn.no_logging(): got,after = learn.get_preds()[0],learn.validate()
    assert close(got, want) and after[1]==before[1]
    gone = {c.name:sorted(set(range(c.n))-set(c.keep)) for c in r.plan.cuts}
    assert gone and all(zeros[n]==z for n,z in gone.items()) and not any(dead(l) for l in m.modules() if isinstance(l, nn.Conv2d))

@pytest.mark.parametrize('s', [.5, .75, .9])
def test_global_pruning_removes_what_is_asked(s): # theirs: 15, 2.6 and .9 %
    m = small_resnet(width=8); x = torch.randn(2,1,8,8)
    r = Pruner(m, x).prune(s, context='global', normalizer='mean')
    assert r.removed==floor(s, 112) and sum(after for _,_,after in r.rows())+sum(c.n for c in r.plan.cuts if len(c.keep)==c.n)==112-r.removed

def test_one_shot_waits_for_its_start():
    cb = SparsifyCallback(.5, schedule=one_shot(.5))
    fit(learner(), 5, cbs=cb)
    assert cb.history.epoch.tolist()==[0,2] and cb.history.sparsity.tolist()==[0,.5]

@pytest.mark.parametrize('head', [lambda: nn.Sequential(nn.Conv2d(12,10,1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                                  lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12,10), nn.Sigmoid()),
                                  lambda: nn.Sequential(nn.Conv2d(12,10,1), nn.Softmax(1), nn.AdaptiveAvgPool2d(1), nn.Flatten())])
def test_no_class_is_lost(head):
    m = nn.Sequential(nn.Conv2d(1,8,3), nn.ReLU(), nn.Conv2d(8,12,3), nn.ReLU(), head())
    Sparsifier(m, X).sparsify(.5)
    want = out(m, X)
    r = Pruner(m, X).prune()
    assert out(m, X).shape==(2,10) and close(out(m, X), want) and r.removed==10
    Pruner(m, X).prune(.5)
    assert out(m, X).shape==(2,10)

# ======== fasterai: cost

def test_scores_are_computed_once_an_epoch_and_once_a_layer():
    calls = []
    def mine(w): calls.append(w.shape); return w.abs()
    sp = Sparsifier(net(), X, criterion=mine, context='global')
    del calls[:]; sp.masks(.5)
    assert len(calls)==2
    del calls[:]
    fit(learner(), 3, cbs=SparsifyCallback(.5, criterion=mine, schedule='agp'))
    assert len(calls)==2*(1+3) # 9 batches

# ======== Torch-Pruning

def test_frozen_parameters_are_pruned_and_stay_frozen():
    m = net()
    for p in m.parameters(): p.requires_grad_(False)
    assert Pruner(m, X).prune(.5).removed==10 and not any(p.requires_grad for p in m.parameters())
    m = net(); m[0].weight.requires_grad_(False); Pruner(m, X).prune(.5)
    assert [n for n,p in m.named_parameters() if not p.requires_grad]==['0.weight']

@pytest.mark.parametrize('make', [lambda ps: torch.optim.SGD(ps, .1, momentum=.9), lambda ps: torch.optim.AdamW(ps)])
def test_the_optimizer_keeps_every_parameter(make):
    m = net(); opt = make(m.parameters())
    F.cross_entropy(m(X), torch.tensor([0,1])).backward(); opt.step(); opt.zero_grad()
    Pruner(m, X).prune(.5, optimizer=opt)
    held = {id(p) for g in opt.param_groups for p in g['params']}
    assert held=={id(p) for p in m.parameters()} and all(v.shape==p.shape for p in m.parameters() for v in opt.state[p].values() if v.dim())
    before = [p.clone() for p in m.parameters() if p.dim()>1]
    F.cross_entropy(m(X), torch.tensor([0,1])).backward(); opt.step()
    assert not any(torch.equal(a, b) for a,b in zip(before, [p for p in m.parameters() if p.dim()>1]))

class Tied(nn.Module):
    def __init__(self): super().__init__(); self.emb,self.mid,self.out = nn.Embedding(12,8),nn.Linear(8,16),nn.Linear(16,8)
    def forward(self, x): return self.out(self.mid(self.emb(x)).relu())@self.emb.weight.t()

def test_a_tied_embedding_stays_tied():
    m,x = Tied(),torch.arange(6).view(2,3)
    r = Pruner(m, x).prune(.5)
    assert out(m, x).shape==(2,3,12) and m.emb.num_embeddings==12 and m.mid.out_features==8 and r.removed>=8

class Functional(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(6,8),nn.Linear(8,3)
    def forward(self, x): return self.b(F.linear(x, self.a.weight, self.a.bias).relu())

def test_a_weight_that_is_used_functionally_is_pruned():
    m,x = Functional(),torch.randn(2,6)
    Sparsifier(m, x).sparsify(.5); want = out(m, x)
    assert Pruner(m, x).prune().removed==4 and close(out(m, x), want)

def test_weight_norm_is_pruned_or_left_alone_with_a_reason():
    m = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1,8,3)), nn.ReLU(), nn.Conv2d(8,4,3))
    want = out(m, X)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter('always')
        r = Pruner(m, X).prune()
    assert r.removed==0 and close(out(m, X), want)
    r = Pruner(m, X).prune(.5)
    assert out(m, X).shape==(2,4,4,4) and (r.removed==4 or r.plan.pins)
    with pytest.raises(ValueError, match='computed from other parameters'): Sparsifier(m, granularity='weight')

def test_nothing_is_shared_between_two_pruners():
    a,b = net(),net(16)
    pa,pb = Pruner(a, X, ignore='0'),Pruner(b, X)
    assert not pb.ignore and pa.plan(.5).removed==6 and pb.plan(.5).removed==14
    x,y = SparsifyCallback(.5),SparsifyCallback(.5)
    for o in (x,y): learner(cbs=o).fit(1)
    kept = lambda o: [v for v in vars(o).values() if isinstance(v, (list,dict,set))]
    assert kept(x) and not any(v is w for v in kept(x) for w in kept(y)) and len(x.history)==len(y.history)==1

def test_a_tensor_is_one_argument(): # theirs unpacks it along the batch
    m,x = net(),torch.randn(3,1,8,8)
    assert Pruner(m, x).plan(.5)==Pruner(m, (x,)).plan(.5)==Pruner(m, dict(input=x)).plan(.5)

def test_a_fraction_is_what_goes_not_what_stays():
    m = nn.Sequential(nn.Linear(6,10), nn.ReLU(), nn.Linear(10,3))
    Pruner(m, torch.randn(2,6)).prune(.2)
    assert m[0].out_features==8

def test_global_does_not_empty_layers():
    m = net()
    with torch.no_grad(): m[0].weight.mul_(1e-3)
    Pruner(m, X).prune(.5, context='global', normalizer='none')
    assert m[0].out_channels==1 and m[3].out_channels==9

def test_a_reason_where_nothing_was_pruned():
    m = nn.Sequential(nn.Conv2d(1,4,3))
    with pytest.warns(NoEffectWarning, match='the output of the model keeps its shape'): r = Pruner(m, X).prune()
    assert 'left alone' in repr(r) and r.plan.pins[0][0]=='0'
    with pytest.warns(NoEffectWarning, match='rounds to none'): Pruner(net(), X).prune(.01)
    with pytest.warns(NoEffectWarning, match='nothing is dead'): Pruner(net(), X).prune()

@torch.library.custom_op('fasterprune_test::mystery', mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor: return x.flip(1)*2
@mystery.register_fake
def _(x): return torch.empty_like(x)
class Mystery(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Conv2d(1,8,3),nn.Conv2d(8,4,3)
    def forward(self, x): return self.b(mystery(self.a(x)))

def test_an_unknown_operator_pins_with_a_reason(): # theirs takes it for elementwise, and is wrong in silence
    m = Mystery()
    plan = Pruner(m, X).plan(.5)
    assert plan.removed==0 and any('mystery' in why for *_,why in plan.pins) and 'mystery' in repr(plan)
    with pytest.raises(ValueError, match='no channel of this model can be chosen.*mystery'): Sparsifier(m, X)

class Flip(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Conv2d(1,8,3),nn.Conv2d(8,4,3)
    def forward(self, x): return self.b(self.a(x).flip(1))
class Shuffle(Flip):
    def forward(self, x): y = self.a(x); return self.b(y.view(len(y),2,4,*y.shape[2:]).transpose(1,2).flatten(1,2))

@pytest.mark.parametrize('model', [Flip, Shuffle])
def test_channels_that_change_places(model):
    m = model()
    Sparsifier(m, X).sparsify(.5); want = out(m, X)
    assert Pruner(m, X).prune().removed==4 or model is Shuffle
    assert close(out(m, X), want)

@pytest.mark.parametrize('make', [torchvision.models.resnet18, torchvision.models.mobilenet_v2])
def test_constants_are_folded_not_dropped(make): # only the convolutions' weights are zero: biases and BatchNorms still write constants
    torch.manual_seed(0)
    m,x = make(num_classes=10).eval(),torch.randn(2,3,64,64)
    with torch.no_grad():
        for b in m.modules():
            if isinstance(b, nn.BatchNorm2d): b.bias.uniform_(-.2, .2); b.running_mean.uniform_(-.2, .2)
        masks = Sparsifier(m, x).masks(.25)
        for n,k in masks.keep.items():
            p = m.get_parameter(n)
            if p.dim()>1: p.masked_fill_(~k, 0)
    want = out(m.double(), x.double()); m.float()
    r = Pruner(m, x).prune()
    assert r.removed>0 and close(out(m.double(), x.double()), want, 1e-5)

# ======== all refusals

conv1 = lambda: nn.Sequential(nn.Conv2d(1,8,3), nn.ReLU(), nn.Conv2d(8,4,3))
REFUSED = {
    'percent': (lambda: SparsifyCallback(50), r'sparsity is a fraction in \[0, 1\], not 50; did you mean 0.5\?'),
    'negative': (lambda: SparsifyCallback(-.1), r'sparsity is a fraction in \[0, 1\], not -0.1'),
    'nan': (lambda: SparsifyCallback(float('nan')), r'sparsity is a fraction in \[0, 1\], not nan'),
    'text': (lambda: SparsifyCallback('half'), r"sparsity is a fraction in \[0, 1\], not 'half'; pass a number"),
    'bool': (lambda: SparsifyCallback(True), 'not True; pass a number'),
    'none': (lambda: SparsifyCallback(None), 'not None; pass a number'),
    'list': (lambda: SparsifyCallback([.5]), r'not \[0.5\]; pass a number'),
    'empty dict': (lambda: SparsifyCallback({}), 'sparsity is an empty dict'),
    'percent in a dict': (lambda: SparsifyCallback({'0':30}), r"sparsity\['0'\] is a fraction in \[0, 1\], not 30; did you mean 0.3\?"),
    'dict and global': (lambda: SparsifyCallback({'0':.5}, context='global'), "context='global' is one ranking over all layers and takes one sparsity, not {'0': 0.5}; use context='local'"),
    'granularity': (lambda: SparsifyCallback(.5, 'filters'), "no granularity 'filters'; did you mean 'filter'\\? choose from 'weight'"),
    'granularity type': (lambda: SparsifyCallback(.5, 3), 'no granularity 3'),
    'context': (lambda: SparsifyCallback(.5, context='Local'), "no context 'Local'; did you mean 'local'\\? choose from 'local', 'global'"),
    'criterion': (lambda: SparsifyCallback(.5, criterion='l3'), "no criterion 'l3'.*choose from .*'l1'"),
    'criterion class': (lambda: SparsifyCallback(.5, criterion=Criterion), 'a criterion is a name, a Criterion or a function'),
    'schedule': (lambda: SparsifyCallback(.5, schedule='AGP'), "no schedule 'AGP'.*choose from 'one_shot'"),
    'schedule maker': (lambda: SparsifyCallback(.5, schedule=one_cycle), r'call it: one_cycle\(\)'),
    'schedule number': (lambda: SparsifyCallback(.5, schedule=.5), 'a schedule is a name, a Schedule or a function of progress, not 0.5'),
    'schedule backwards': (lambda: SparsifyCallback(.5, schedule=Schedule(lambda p,a,b: b, .8, .2)), "start=0.8 must be before its end=0.2"),
    'schedule outside': (lambda: SparsifyCallback(.5, schedule=lambda p: 2*p), r'it must return a number in \[0, 1\]'),
    'schedule nan': (lambda: SparsifyCallback(.5, schedule=lambda p: float('nan')), 'returns nan at p='),
    'schedule percent': (lambda: SparsifyCallback(.5, schedule=one_shot(40)), r'start is a fraction in \[0, 1\], not 40; did you mean 0.4\?'),
    'every zero': (lambda: SparsifyCallback(.5, every=0), "every is 'epoch', a number of training batches or a Patience, not 0"),
    'every text': (lambda: SparsifyCallback(.5, every='batch'), "not 'batch'"),
    'every bool': (lambda: SparsifyCallback(.5, every=True), 'not True'),
    'every float': (lambda: SparsifyCallback(.5, every=1.5), 'not 1.5'),
    'normalizer': (lambda: SparsifyCallback(.5, normalizer='meen'), "no normalizer 'meen'; did you mean 'mean'"),
    'normalizer type': (lambda: SparsifyCallback(.5, normalizer=3), 'a normalizer is a name or a function of 1-D scores, not 3'),
    'count': (lambda: SparsifyCallback(.5, count='weights'), "no count 'weights'.*choose from 'units', 'params'"),
    'unknown option': (lambda: SparsifyCallback(.5, round_to=8), 'round_to'),
    's: no model': (lambda: Sparsifier(3, X), 'Sparsifier needs an nn.Module, not 3'),
    's: no input': (lambda: Sparsifier(net()), "granularity 'filter' is for whole channels.*pass an example input x"),
    's: odd input': (lambda: Sparsifier(net(), 'x'), "an example input is a tensor, a tuple of positional or a dict of keyword arguments, not str 'x'"),
    's: nothing': (lambda: Sparsifier(nn.ReLU(), X), 'this ReLU has no parameters, so there is nothing to prune'),
    's: unknown layer': (lambda: Sparsifier(net(), X, only='conv'), "only: no layer 'conv'; choose from '0', "),
    's: a module': (lambda: Sparsifier(net(), X, ignore=[nn.Linear(2,2)]), 'ignore takes names and types of layers, .*not Linear'),
    's: none left': (lambda: Sparsifier(net(), X, ignore=nn.Module), 'leave no layer'),
    's: only what is pinned': (lambda: Sparsifier(net(), X, only='8'), "only and ignore leave no layer whose channels can be chosen by 'filter'; those that can go are written by '0', '3'"),
    's: not defined': (lambda: Sparsifier(net(), granularity='kernel', only='8'), "'kernel' .* is not defined for Linear.*choose from 'weight'"),
    's: nowhere defined': (lambda: Sparsifier(net(), granularity='frame'), "no layer of this model has units of granularity 'frame'.*it is defined for Conv3d"),
    's: bn_scale': (lambda: Sparsifier(net(), granularity='weight', criterion='bn_scale'), "'bn_scale' scores whole channels by their normalisation, so it needs granularity='filter', not 'weight'"),
    's: no scale': (lambda: Sparsifier(conv1(), X, criterion='bn_scale'), "'0' has none behind it; use another criterion, or leave this layer out with ignore='0'"),
    's: scores shape': (lambda: Sparsifier(net(), X, criterion=lambda w: w.sum(0)), r'returned shape .* it must return a real score for each weight'),
    's: scores type': (lambda: Sparsifier(net(), X, criterion=lambda w: 3), 'returned 3 for a weight of shape'),
    's: scores nan': (lambda: Sparsifier(net(), X, criterion=lambda w: w*float('nan')), 'returned NaN for a weight'),
    's: scores complex': (lambda: Sparsifier(net(), X, criterion=lambda w: w+1j), 'returned complex numbers'),
    's: negative scores': (lambda: Sparsifier(net(), X, context='global', criterion=lambda w: w), "normalizer 'mean' keeps the order only of scores"),
    's: unknown in dict': (lambda: Sparsifier(net(), X).masks({'1':.5}), "no group of channels '1'; choose from '0', '3'"),
    's: pinned in dict': (lambda: Sparsifier(net(), X).masks({'8':.5}), 'the output of the model keeps its shape'),
    's: layer in dict': (lambda: Sparsifier(net(), granularity='weight').masks({'9':.5}), "sparsity: no layer '9'; choose from '0', '3', '8'"),
    's: same channels': (lambda: Sparsifier(small_resnet(width=4), X).masks({'conv1':.5, 'stage1.conv2':.2}), "'stage1.conv2' writes the same channels as 'conv1', .*so it cannot have 0.2 where that has 0.5"),
    's: percent': (lambda: Sparsifier(net(), X).sparsify(50), r'did you mean 0.5\?'),
    'm: other model': (lambda: Masks({'a.weight':torch.ones(1).bool()}).apply_(net()), "these masks are of another model: they mask 'a.weight'"),
    'm: other shape': (lambda: Masks({'0.weight':torch.ones(5,1,1,1).bool()}).apply_(net()), r'a mask of shape \(5, 1, 1, 1\) does not fit a parameter of shape \(8, 1, 3, 3\)'),
    'p: no model': (lambda: Pruner('net', X), "Pruner needs an nn.Module, not 'net'"),
    'p: odd input': (lambda: Pruner(net(), 3), 'an example input is a tensor.*not int 3'),
    'p: unknown layer': (lambda: Pruner(net(), X, only='conv'), "only: no layer 'conv'"),
    'p: unknown ignore': (lambda: Pruner(net(), X, ignore=['10']), "ignore: no layer '10'"),
    'p: percent': (lambda: Pruner(net(), X).prune(50), r'did you mean 0.5\?'),
    'p: granularity': (lambda: Pruner(net(), X).prune(.5, granularity='kernel'), "channels are pruned by granularity 'filter' or 'shared_kernel', not 'kernel'; others can be set to zero with a Sparsifier"),
    'p: context': (lambda: Pruner(net(), X).prune(.5, context='all'), "no context 'all'"),
    'p: criterion': (lambda: Pruner(net(), X).prune(.5, criterion='l9'), "no criterion 'l9'"),
    'p: normalizer': (lambda: Pruner(net(), X).prune(.5, context='global', normalizer='x'), "no normalizer 'x'"),
    'p: min_keep': (lambda: Pruner(net(), X).prune(.5, min_keep=0), 'min_keep is at least 1 for pruning, not 0'),
    'p: max_ratio': (lambda: Pruner(net(), X).prune(.5, max_ratio=90), r'max_ratio is a fraction in \[0, 1\], not 90'),
    'p: empty dict': (lambda: Pruner(net(), X).prune({}), 'sparsity is an empty dict'),
    'p: dict and global': (lambda: Pruner(net(), X).prune({'0':.5}, context='global'), "use context='local' for a fraction a layer"),
    'p: pinned in dict': (lambda: Pruner(net(), X).prune({'8':.5}), "'8' cannot be pruned: the output of the model keeps its shape"),
    'p: unknown in dict': (lambda: Pruner(net(), X).prune({'conv':.5}), "no group 'conv'"),
    'p: same channels': (lambda: Pruner(small_resnet(width=4), X).prune({'conv1':.5, 'stage1.conv2':.2}), "'stage1.conv2' writes the same channels as 'conv1', .*so it cannot have 0.2 where that has 0.5"),
    'p: no scale': (lambda: Pruner(conv1(), X).prune(.5, criterion='bn_scale'), "reads the scale of a normalisation"),
    'l: percent': (lambda: learner().prune(50), r'did you mean 0.5\?'),
    'l: granularity': (lambda: learner().prune(.5, granularity='weight'), 'others can be set to zero with a Sparsifier'),
    'l: ignore': (lambda: learner().prune(ignore='conv'), "ignore: no layer 'conv'"),
}

@pytest.mark.parametrize('what', REFUSED)
def test_refused(what):
    f,text = REFUSED[what]
    with pytest.raises((ValueError, TypeError), match=text) as e: f()
    assert len(e.value.args)==1 and '\n' not in e.value.args[0] # fastai reads e.args[0]

def test_a_plan_of_another_model_is_refused():
    from fasterprune.surgery.cutting.apply import apply_
    plan = Pruner(net(), X).plan(.5)
    for other,text in ((conv1(), "this plan is of another model: it cuts '1"), (net(16), 'this plan is of another model, or has been applied before')):
        with pytest.raises(ValueError, match=text): apply_(other, plan)
    m = net(); apply_(m, plan)
    with pytest.raises(ValueError, match='has been applied before'): apply_(m, plan)
    assert Plan.from_json(plan.to_json())==plan

def test_a_refusal_changes_nothing():
    m = net(); before = deepcopy(m.state_dict())
    for f in (lambda: Pruner(m, X).prune({'0':.5, '8':.5}), lambda: Sparsifier(m, X).sparsify({'0':.5, '8':.5}), lambda: Masks({'0.weight':torch.zeros(1,1,1,1).bool(), 'x':torch.ones(1).bool()}).apply_(m)):
        with pytest.raises(ValueError): f()
    assert all(torch.equal(before[k], v) for k,v in m.state_dict().items())
