"Least squares for what stays: against numpy, exact where it can be, and everything else as it was"
import warnings
from copy import deepcopy
import numpy as np
import pytest, torch
from torch import nn, optim
from torch.nn.utils import parametrize
from fasterprune.all import Budget, NoEffectWarning, PruneCallback, Pruner, apply_
from fasterprune.criteria.activation import contributions
from fasterprune.surgery.coupling.couple import couple
from fasterprune.surgery.planning.cuts import labels_of
from fasterprune.surgery.recovery.rescale import factors_of, losing
from support.laws import rel, run

torch.manual_seed(0)
rows = torch.randn(200,6, dtype=torch.float64)
images = (torch.randn(64,3,8,8).cumsum(2).cumsum(3)/4).double() # smooth, so that channels have something in common

def mlp(out=1):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6,8), nn.ReLU(), nn.Linear(8,out)).double().eval()

def kept(r, name='2.weight'): return list(next(e for e in r.plan.edits if e.param==name).keep)

# ---- what is found

@pytest.mark.parametrize('criterion', ['l2', 'thinet', 'random'])
def test_factors_are_least_squares(criterion): # with one output every entry is it
    m = mlp()
    whole = deepcopy(m)
    r = Pruner(m, rows[:2]).prune(.5, criterion=criterion, data=[(rows, torch.zeros(200))], rescale=[(rows, 0)])
    X = (whole[1](whole[0](rows))*whole[2].weight[0]).detach().numpy()
    f = np.linalg.lstsq(X[:,kept(r)], X.sum(1), rcond=None)[0]
    assert m[2].weight[0].tolist()==pytest.approx((whole[2].weight[0,kept(r)].detach().numpy()*f).tolist(), rel=1e-8)
    assert torch.equal(m[2].bias, whole[2].bias) and r.rescaled==1 and r.error<1e-10

def test_with_means_it_is_least_squares_with_a_constant():
    m = mlp()
    whole = deepcopy(m)
    r = Pruner(m, rows[:2]).prune(.5, rescale=[(rows, 0)], compensate=[(rows, 0)])
    X = (whole[1](whole[0](rows))*whole[2].weight[0]).detach().numpy()
    A = np.c_[X[:,kept(r)],np.ones(len(X))]
    best = A@np.linalg.lstsq(A, X.sum(1), rcond=None)[0]+whole[2].bias.item()
    assert run(m, rows)[:,0].tolist()==pytest.approx(best.tolist(), rel=1e-8)

def test_both_are_better_than_either_where_they_were_measured():
    far = {}
    for how in ((), ('rescale',), ('compensate',), ('rescale', 'compensate')):
        m = mlp(3)
        want = run(m, rows)
        Pruner(m, rows[:2]).prune(.5, **{k:[(rows.repeat(20,1), 0)] for k in how}) # every entry is looked at, mostly
        far[how] = ((run(m, rows)-want).norm()/want.norm()).item()
    (none,scaled,meant,both) = far.values()
    assert both<min(scaled, meant) and max(scaled, meant)<none

@pytest.mark.parametrize('factor', [.1, .5])
def test_what_somebody_else_says_as_well_is_not_missed(factor): # the quieter of two that say the same goes
    m = mlp(4)
    with torch.no_grad():
        m[0].weight.mul_(10)
        m[0].weight[5],m[0].bias[5] = 1e-3*factor*m[0].weight[0],1e-3*factor*m[0].bias[0]
        m[2].weight[:,5] = 3*m[2].weight[:,0] # one factor serves all outputs
    want = run(m, rows)
    r = Pruner(m, rows[:2]).prune(1/8, rescale=[(rows, 0)])
    assert kept(r)==[0,1,2,3,4,6,7] and rel(run(m, rows), want)<1e-10

def test_a_unit_of_which_nothing_was_seen_is_left_alone():
    m = mlp(3)
    with torch.no_grad(): m[0].weight[3] *= 1e-9; m[0].bias[3] = -10 # dead on these rows
    whole = deepcopy(m)
    r = Pruner(m, rows[:2]).prune({'0':.25}, criterion=lambda w: torch.tensor([[1.],[0.],[1],[1],[1],[0],[1],[1]]).expand(w.shape), rescale=[(rows, 0)])
    assert kept(r)==[0,2,3,4,6,7] and torch.allclose(m[2].weight[:,2], whole[2].weight[:,3], rtol=1e-12)

# ---- which layers

class Readers(nn.Module):
    "A grouped convolution, a transposed one, and 36 places of a channel that are one unit"
    def __init__(self):
        torch.manual_seed(0); super().__init__()
        self.a,self.bn,self.b = nn.Conv2d(3,8,3),nn.BatchNorm2d(8),nn.Conv2d(8,8,3,padding=1,groups=2)
        self.c,self.d,self.e = nn.ConvTranspose2d(8,6,3,padding=1,groups=2),nn.Conv2d(14,4,1,bias=False),nn.Linear(4*36,5)
    def forward(self, x):
        x = self.b(self.bn(self.a(x)).relu()).relu()
        return self.e(self.d(torch.cat([x,self.c(x).relu()], 1)).relu().flatten(1)) # `d` reads two groups at once

def test_each_weight_is_multiplied_where_it_meets_its_channel():
    m = Readers().double().eval()
    plain,whole = deepcopy(m),deepcopy(m)
    r = Pruner(m, images[:2]).prune(.5, rescale=images.split(32))
    apply_(plain, r.plan)
    fs = {f.layer:f.channels for f in factors_of(whole, couple(whole, images[:2]), labels_of(couple(whole, images[:2]), {c.name:c.keep for c in r.plan.cuts}), [(b,) for b in images.split(32)])}
    assert set(fs)=={'b','c','d','e'} and r.rescaled==4 and len(fs['d'])==14 and len(fs['e'])==144
    assert all(len(set(v.tolist()))==1 for v in fs['e'].view(4,36)) # one factor for a unit
    changed = {n for (n,p),q in zip(m.named_parameters(), plain.parameters()) if not torch.equal(p, q)}
    assert changed=={'b.weight','c.weight','d.weight','e.weight'}
    of = lambda name, dim: [list(e.keep) for e in r.plan.edits if e.param==name and e.dim==dim][0]
    assert torch.allclose(m.d.weight, plain.d.weight*fs['d'][of('d.weight', 1)].view(1,-1,1,1))
    assert torch.allclose(m.c.weight, plain.c.weight*fs['c'][of('c.weight', 0)].view(-1,1,1,1))
    for net,layer in ((m,'b'),(plain,'b')): assert getattr(net, layer).groups==2
    stay = of('a.weight', 0) # of a grouped convolution each half of the outputs reads its own half
    per = m.b.weight.shape[1]
    for o in range(m.b.out_channels): assert torch.allclose(m.b.weight[o], plain.b.weight[o]*fs['b'][stay[o//(m.b.out_channels//2)*per:][:per]].view(-1,1,1))

def test_a_layer_that_reads_two_groups_has_one_least_squares_problem():
    m = Readers().double().eval()
    c = couple(m, images[:2])
    (place,stays), = [(p,s) for p,s in losing(c, labels_of(c, {g.name:range(0,g.n,2) for g in c.groups})) if p.name=='d']
    assert len(stays)==14 and sorted(place.index[:,0])==list(range(14))
    f, = [f for f in factors_of(m, c, labels_of(c, {g.name:range(0,g.n,2) for g in c.groups}), [(images,)]) if f.layer=='d']
    with torch.no_grad():
        x = m.b(m.bn(m.a(images)).relu()).relu()
        X = contributions(m.d, torch.cat([x,m.c(x).relu()], 1), torch.arange(14).view(14,1)).numpy()
    at = sorted(place.index[stays,0])
    assert f.channels[at].tolist()==pytest.approx(np.linalg.lstsq(X[:,at], X.sum(1), rcond=None)[0].tolist(), rel=1e-6)

class Twice(nn.Module):
    "A layer that runs twice"
    def __init__(self): torch.manual_seed(0); super().__init__(); self.a,self.b,self.c = nn.Linear(6,8),nn.Linear(8,8),nn.Linear(8,3)
    def forward(self, x): return self.c(self.b(self.b(self.a(x).relu()).relu()).relu())

class Tied(nn.Module):
    "A weight of two layers"
    def __init__(self): torch.manual_seed(0); super().__init__(); self.a,self.b,self.c = nn.Linear(6,8),nn.Linear(8,6),nn.Linear(8,6); self.c.weight = self.b.weight
    def forward(self, x): return self.b(self.a(x).relu())+self.c(self.a(x).relu())

class Borrowed(nn.Module):
    "A weight that a formula uses as well"
    def __init__(self): torch.manual_seed(0); super().__init__(); self.a,self.b = nn.Linear(6,8),nn.Linear(8,6)
    def forward(self, x): h = self.a(x).relu(); return self.b(h)+nn.functional.linear(h.sigmoid(), self.b.weight)

class Bounded(nn.Module):
    "What a weight is made of"
    def forward(self, w): return w.tanh()

class Made(nn.Module):
    "A weight that is computed from another"
    def __init__(self): torch.manual_seed(0); super().__init__(); self.a,self.b = nn.Linear(6,8),parametrize.register_parametrization(nn.Linear(8,6), 'weight', Bounded())
    def forward(self, x): return self.b(self.a(x).relu())

@pytest.mark.parametrize('net', [Tied, Borrowed, Made])
def test_weights_that_others_use_are_left_as_they_are(net):
    m,plain = net().double().eval(),net().double().eval() # the same seed
    with pytest.warns(NoEffectWarning, match='no layer that loses a part of its input'): r = Pruner(m, rows[:2], only='a').prune(.5, rescale=[(rows, 0)])
    apply_(plain, r.plan)
    assert r.removed==4 and not r.rescaled and r.compensation is None and all(torch.equal(p, q) for p,q in zip(m.parameters(), plain.parameters()))

def test_a_layer_that_runs_twice_is_left_as_it_is():
    m = Twice().double().eval()
    plain = deepcopy(m)
    r = Pruner(m, rows[:2]).prune(.5, rescale=[(rows, 0)])
    apply_(plain, r.plan)
    assert r.rescaled==1 and torch.equal(m.b.weight, plain.b.weight) and not torch.equal(m.c.weight, plain.c.weight)

def test_attention_is_cut_and_the_rest_is_scaled():
    torch.manual_seed(0)
    enc,x = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).double().eval(),torch.randn(40,5,16).double()
    plain = deepcopy(enc)
    r = Pruner(enc, x[:2]).prune(.5, rescale=[(x, 0)])
    apply_(plain, r.plan)
    assert {n for (n,p),q in zip(enc.named_parameters(), plain.parameters()) if not torch.equal(p, q)}=={'linear2.weight','self_attn.out_proj.weight'} and r.rescaled==2

# ---- all that goes along

def test_a_copy_has_factors_of_its_own_and_the_optimizer_goes_on():
    m = Readers().double().train()
    opt = optim.SGD(m.parameters(), .01, momentum=.9)
    m(images).square().mean().backward(); opt.step(); m.eval()
    ema = deepcopy(m)
    with torch.no_grad():
        for p in ema.parameters(): p.mul_(torch.rand(p.shape, dtype=p.dtype)*.5+.75)
    alone = deepcopy(ema)
    r = Pruner(m, images[:2]).prune(.25, rescale=[(images, 0)], optimizer=opt, also=[ema])
    c = couple(alone, images[:2])
    f = {f.layer:f.channels for f in factors_of(alone, c, labels_of(c, {c.name:c.keep for c in r.plan.cuts}), [(images,)])}
    keep = [list(e.keep) for e in r.plan.edits if e.param=='d.weight']
    want = (alone.d.weight*f['d'].view(1,-1,1,1))[:,keep[-1]]
    assert torch.allclose(ema.d.weight, want if len(keep)==1 else want[keep[0]]) and not torch.equal(ema.d.weight, m.d.weight)
    m.train()(images).square().mean().backward(); opt.step()

def test_with_a_budget_and_means_and_batchnorm():
    m = Readers().double().eval()
    r = Pruner(m, images[:2]).prune(budget=Budget(macs=.6), rescale=images.split(16), compensate=images.split(16), recalibrate=images.split(16))
    assert r.macs[1]<=.6*r.macs[0] and r.rescaled==4 and r.compensation.compensated<r.compensation.without and r.recalibrated==4
    assert '4 layers, by least squares' in repr(r) and 'rescaled' in r._repr_html_()

def test_what_is_dead_leaves_nothing_to_make_up_for():
    m = mlp(3)
    with torch.no_grad(): m[0].weight[2] = 0; m[0].bias[2] = 1
    want = run(m, rows)
    with pytest.warns(NoEffectWarning, match='nothing to make up for'): r = Pruner(m, rows[:2]).prune(rescale=[(rows, 0)])
    assert r.removed==1 and r.law=='masks' and not r.rescaled and rel(run(m, rows), want)<1e-12

def test_half_precision_and_memory_format_stay():
    m = Readers().eval().to(torch.bfloat16).to(memory_format=torch.channels_last)
    r = Pruner(m, images[:2].bfloat16()).prune(.5, rescale=[(images.bfloat16(), 0)])
    assert r.rescaled==4 and all(p.dtype==torch.bfloat16 for p in m.parameters()) and m.b.weight.is_contiguous(memory_format=torch.channels_last)

# ---- what is refused

@pytest.mark.parametrize('dl,error,match', [([], ValueError, 'rescale: the data loader is empty'), (iter([]), ValueError, 'rescale: the data loader is empty'), (rows, TypeError, 'rescale is a data loader'), (.5, TypeError, 'not float'),
    ([(rows[:1], 0)], ValueError, r"rescale: '2' has 4 factors to find and \d+ means, and 10 entries of its output were looked at, ten for each sample; give more data")])
def test_it_needs_data(dl, error, match):
    m = mlp(50)
    before = {k:v.clone() for k,v in m.state_dict().items()}
    with pytest.raises(error, match=match): Pruner(m, rows[:2]).prune(.5, rescale=dl, compensate=[(rows, 0)])
    assert all(torch.equal(v, m.state_dict()[k]) for k,v in before.items()) and m[0].out_features==8

def test_an_error_afterwards_puts_everything_back(monkeypatch):
    m = Readers().double().eval()
    before = {k:v.clone() for k,v in m.state_dict().items()}
    def broken(*args, **kwargs): raise RuntimeError('no')
    monkeypatch.setattr('fasterprune.surgery.transaction.relative_l2', broken)
    with pytest.raises(RuntimeError, match='no'): Pruner(m, images[:2]).prune(.5, rescale=[(images, 0)])
    assert all(torch.equal(v, m.state_dict()[k]) for k,v in before.items())

# ---- learners

def test_learners_take_the_training_data():
    from fastai.learner import Learner
    from fasterprune.data import digits_dls, small_resnet
    torch.manual_seed(0)
    learn = Learner(digits_dls(bs=256), small_resnet(width=8), loss_func=nn.CrossEntropyLoss())
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    r = learn.prune(.25, rescale=True, compensate=True)
    assert r.rescaled and r.compensation.compensated<r.compensation.without
    cb = PruneCallback(.25, schedule='iterative', rescale=True)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, cbs=cb)
    assert cb.reports and all(r.rescaled for r in cb.reports if r.removed)
