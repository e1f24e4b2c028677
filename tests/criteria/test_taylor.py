"Taylor and curvature: golden values, naive loops, identities of autograd, a full Hessian, the mistakes of others"
import pickle
from functools import partial
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.func import functional_call
from fasterprune.criteria.base import criteria, unit_scores
from fasterprune.criteria.statistic import BatchView
from fasterprune.criteria.taylor import *
from fasterprune.criteria.curvature import *
from support import laws

def ag(N=6, n=4, S=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, n, S, generator=g, dtype=torch.float64), torch.randn(N, n, S, generator=g, dtype=torch.float64)

# ---- E0: what products of values and gradients must be

def watched(layers, x): # values after each layer, with gradients
    out = []
    for l in layers:
        x = l(x); x.retain_grad(); out.append(x)
    return out

@pytest.mark.parametrize('groups', [1, 2])
def test_products_of_maps_are_products_of_weights_without_bias(groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=groups, bias=False).double()
    x = torch.randn(5, 4, 8, 8, dtype=torch.float64)
    a, = watched([conv], x)
    a.tanh().pow(3).sum().backward()
    by_map = (a*a.grad).sum((0, 2, 3))
    by_weight = (conv.weight*conv.weight.grad).sum((1, 2, 3))
    assert by_map.abs().max() > .1 and torch.allclose(by_map, by_weight, rtol=1e-10)

@pytest.mark.parametrize('train', [True, False])
def test_products_after_a_batchnorm_are_those_of_its_gate(train):
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 6, 3, bias=False).double(), nn.BatchNorm2d(6).double().train(train)
    with torch.no_grad(): bn.weight.uniform_(.5, 2); bn.bias.normal_()
    _, z = watched([conv, bn], torch.randn(5, 3, 8, 8, dtype=torch.float64))
    z.tanh().pow(3).sum().backward()
    gate = bn.weight*bn.weight.grad+bn.bias*bn.bias.grad
    assert gate.abs().max() > .1 and torch.allclose((z*z.grad).sum((0, 2, 3)), gate, rtol=1e-10)

@pytest.mark.parametrize('train', [True, False])
def test_the_trap_filters_before_a_batchnorm_in_training_have_no_scale(train):
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 6, 3, bias=False).double(), nn.BatchNorm2d(6, eps=1e-15).double().train(train)
    with torch.no_grad(): bn.weight.uniform_(.5, 2); bn.bias.normal_()
    _, z = watched([conv, bn], torch.randn(5, 3, 8, 8, dtype=torch.float64))
    z.tanh().pow(3).sum().backward()
    wg = conv.weight*conv.weight.grad
    zero = wg.sum((1, 2, 3)).abs().max() < 1e-10*wg.abs().sum((1, 2, 3)).min()
    assert zero == train and wg.square().sum((1, 2, 3)).min() > 0

# ---- criteria on arrays

def value(c, *seen): return {s.name:s.value(seen) for s in c.stats}
def scores(c, *seen): c = criteria[c] if isinstance(c, str) else c; return c.channel(value(c, *seen))
def weights(c, *seen): c = criteria[c] if isinstance(c, str) else c; return c.element(seen[-1].w.double(), value(c, *seen))
def split(a, g, k): return [BatchView(a=x, g=y, shape=(1, a.shape[2])) for x,y in zip(a.split(k), g.split(k))]

def naive_act(a, g, c): # a list for each sample: the products at its positions
    return [[a[n,c,s].item()*g[n,c,s].item() for s in range(a.shape[2])] for n in range(a.shape[0])]

@pytest.mark.parametrize('k', [6, 4, 1])
def test_taylor_act_against_a_loop(k):
    a, g = ag()
    got, cancelled, fisher = scores('taylor_act', *split(a, g, k)), scores(taylor_act(False), *split(a, g, k)), scores('fisher_act', *split(a, g, k))
    for c in range(4):
        p = naive_act(a, g, c)
        assert got[c].item() == pytest.approx(sum(abs(sum(q)/9) for q in p)/6, rel=1e-10)
        assert cancelled[c].item() == pytest.approx(abs(sum(sum(q)/9 for q in p)/6), rel=1e-10)
        assert fisher[c].item() == pytest.approx(sum(sum(q)**2 for q in p)/12, rel=1e-10)

def test_two_samples_that_disagree(): # jacobgil/pytorch-pruning takes the absolute value after the sum over examples
    see = BatchView(a=torch.ones(2, 1, 1), g=torch.tensor([1., -1]).view(2, 1, 1), shape=(1,))
    assert scores('taylor_act', see).item() == 1 and scores(taylor_act(per_sample=False), see).item() == 0

def test_taylor_act_is_ranked_by_shares_of_the_layers_norm(): assert criteria['taylor_act'].across == 'l2' and taylor_act(False).across == 'l2'

def wg(seed, shape=(3, 2, 2, 2)):
    g = torch.Generator().manual_seed(seed)
    return BatchView(w=torch.randn(shape, generator=g, dtype=torch.float64), g=torch.randn(shape, generator=g, dtype=torch.float64))

def test_weights_against_loops():
    w = wg(0).w
    see = [BatchView(w=w, g=wg(s).g) for s in (1, 2, 3)]
    for i in range(w.numel()):
        p = [w.flatten()[i].item()*s.g.flatten()[i].item() for s in see]
        at = lambda n: weights(n, *see).flatten()[i].item()
        assert at('taylor_w') == pytest.approx(sum(x*x for x in p)/3, rel=1e-10)
        assert at('taylor_abs') == pytest.approx(sum(map(abs, p))/3, rel=1e-10)
        assert at('snip') == pytest.approx(abs(sum(p)/3), rel=1e-10)
        assert at('fisher_w') == pytest.approx(sum(x*x for x in p)/6, rel=1e-10)
        assert at('movement') == pytest.approx(-sum(p), rel=1e-10)

def test_taylor_of_units_sums_squares_and_does_not_square_sums():
    see = BatchView(w=torch.tensor([[1., 1]]), g=torch.tensor([[1., -1]]))
    one = lambda n: unit_scores(criteria[n], see.w, (1,), s=value(criteria[n], see)).item()
    assert one('taylor_w') == 2 and one('taylor_abs') == 2

def test_gate_golden():
    see = [BatchView(w=torch.tensor([[2., 1], [1, 0]]), g=torch.tensor([[1., -2], [3, 5]])), BatchView(w=torch.tensor([[2., 1], [1, 0]]), g=torch.tensor([[1., 0], [0, 5]]))]
    assert scores('taylor_gate', *see).tolist() == [2, 4.5] # (0²+2²)/2, (3²+0²)/2
    assert 'norm' in criteria['taylor_gate'].needs

def test_fisher_keeps_all_samples_and_not_the_last(): # Torch-Pruning's GroupHessian overwrites, and its counter stays at 1
    w = torch.ones(3)
    see = [BatchView(w=w, g=torch.tensor(g)) for g in ([3., 0, 1], [0., 4, 1], [0., 0, 1])]
    assert weights('fisher_w', *see).tolist() == pytest.approx([1.5, 8/3, .5])

def test_mean_of_squares_is_no_square_of_the_mean():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=False).double()
    x = torch.randn(16, 3, 6, 6, dtype=torch.float64)
    losses = conv(x).pow(3).mean((1, 2, 3))
    gs = [torch.autograd.grad(l, conv.weight, retain_graph=True)[0] for l in losses]
    got = weights('fisher_w', *[BatchView(w=conv.weight.detach(), g=g) for g in gs])
    right, wrong = (conv.weight**2/2*f for f in (torch.stack(gs).square().mean(0), torch.stack(gs).mean(0).square()))
    assert torch.allclose(got, right, rtol=1e-10) and right.sum() > 3*wrong.sum()

def test_group_fisher_sums_readers_before_it_squares():
    p = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    got = scores('group_fisher', BatchView(p=p[:5]), BatchView(p=p[5:]))
    for c in range(3): assert got[c].item() == pytest.approx(sum(v*v for v in p[:,c].tolist()), rel=1e-6)
    assert scores('group_fisher', BatchView(p=p-p)).tolist() == [0, 0, 0] and criteria['group_fisher'].stats[0].at == 'group'

def test_movement_is_positive_away_from_zero(): # and weight_change does not ask which way: fasterai's 'movement'
    w, goal, see = torch.tensor([1., 1, -.5, -.5], dtype=torch.float64), torch.tensor([2., .1, -1.5, 0]), []
    for _ in range(20): see.append(BatchView(w=w, g=w-goal)); w = w-.1*(w-goal)
    moved = weights('movement', *see)
    assert (moved > 0).tolist() == [True, False, True, False]
    changed = criteria['weight_change'].element(w, value(criteria['weight_change'], *see))
    assert torch.allclose(changed, (w-torch.tensor([1., 1, -.5, -.5])).abs()) and (changed > .3).all()
    assert 'training' in criteria['movement'].needs and 'training' in criteria['weight_change'].needs

def test_start_is_a_copy():
    w = torch.ones(3)
    st_, = criteria['weight_change'].stats
    kept = st_.measure(BatchView(w=w))
    w.zero_()
    assert kept['w'].tolist() == [1, 1, 1]

ACT = 'taylor_act', 'fisher_act'
@pytest.mark.parametrize('name', [*ACT, 'group_fisher', 'taylor_gate'])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_units_may_come_in_any_order(name, seed):
    g = torch.Generator().manual_seed(seed)
    a, p = torch.randn(2, 6, 5, 4, generator=g), torch.randperm(5, generator=g)
    see = lambda q: BatchView(p=a[0,:,q,0]) if name == 'group_fisher' else BatchView(w=a[0].transpose(0, 1)[q][:,:2,0], g=a[1].transpose(0, 1)[q][:,:2,0]) if name == 'taylor_gate' else BatchView(a=a[0][:,q], g=a[1][:,q], shape=(1, 4))
    assert torch.allclose(scores(name, see(torch.arange(5)))[p], scores(name, see(p)), rtol=1e-5)

@pytest.mark.parametrize('name', [*ACT, 'group_fisher'])
def test_samples_may_come_in_any_order_and_in_any_batches(name):
    a, g = ag(N=8)
    see = lambda a, g, k: [BatchView(a=x, g=y, p=(x*y).sum(2), shape=(1, 9)) for x,y in zip(a.split(k), g.split(k))]
    one = scores(name, *see(a, g, 8))
    for k in (1, 3, 8): assert torch.allclose(scores(name, *see(a.flip(0), g.flip(0), k)), one, rtol=1e-10)

@pytest.mark.parametrize('name', ['taylor_w', 'taylor_abs', 'snip', 'fisher_w'])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_signs_of_filters_do_not_matter(name, seed):
    s = wg(seed)
    flip = torch.tensor([1., -1, 1]).view(3, 1, 1, 1)
    assert torch.allclose(weights(name, s), weights(name, BatchView(w=s.w*flip, g=s.g*flip)))

def test_scoring_through_a_network_by_hand():
    "taylor_act is what autograd says the loss loses, to first order, when a unit of one sample fades"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    x, y = torch.randn(5, 2, 8, 8, dtype=torch.float64), torch.randint(3, (5,))
    h = net[:2](x).detach().requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(net[2:](h), y, reduction='sum'), h)
    got = scores('taylor_act', BatchView(a=h.detach().flatten(2), g=g.flatten(2), shape=(1, 6, 6)))
    fade, = torch.autograd.functional.jacobian(lambda m: F.cross_entropy(net[2:](h*m[:,:,None,None]), y, reduction='none'), (torch.ones(5, 4, dtype=torch.float64),))
    each = torch.stack([fade[n,n] for n in range(5)])                       # [sample, unit]
    assert torch.allclose(got, each.abs().mean(0)/36, rtol=1e-9)

# ---- curvature: against a Hessian that is written down

def tiny(seed=0, act=nn.ReLU, mse=False):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), act(), nn.Linear(6, 3)).double()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
    ws = [net[0].weight, net[2].weight]
    f = (lambda o: F.mse_loss(o, F.one_hot(y, 3).double())) if mse else (lambda o: F.cross_entropy(o, y))
    H = torch.autograd.functional.hessian(lambda a, b: f(functional_call(net, {'0.weight':a, '2.weight':b}, (x,))), tuple(w.detach() for w in ws))
    H = torch.cat([torch.cat([H[i][j].reshape(ws[i].numel(), -1) for j in (0, 1)], 1) for i in (0, 1)])
    return net, x, f, ws, H

class Run: # what an own run is given
    def __init__(self, net, x, f): self.net,self.x,self.f = net,x,f
    def __call__(self, temperature=1.): return self.f(self.net(self.x)/temperature)
    def outputs(self): return self.net(self.x), self.f

def flat(ts): return torch.cat([t.detach().flatten() for t in ts])
def found(c, net, x, f, ws, i=0): s, = c.stats; return [{s.name:s.value([BatchView(w=w.detach(), g=v.detach())])} for w,v in zip(ws, s.by(Run(net, x, f), ws, i))]

@pytest.mark.parametrize('act', [nn.ReLU, nn.Tanh, nn.GELU])
def test_hessian_vector(act):
    net, x, f, ws, H = tiny(act=act)
    v = [torch.randn_like(w) for w in ws]
    assert torch.allclose(flat(hessian_vector(f(net(x)), ws, v)), H@flat(v), atol=1e-12)
    g = torch.autograd.grad(f(net(x)), ws)
    assert torch.allclose(flat(hessian_vector(f(net(x)), ws)), H@flat(g), atol=1e-12)

def test_hessian_of_a_loss_without_curvature_and_of_weights_that_are_not_used():
    w, u = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    assert [t.tolist() for t in hessian_vector((2*w).sum(), [w, u])] == [[0, 0, 0], [0, 0]]
    assert [t.tolist() for t in hessian_vector((w**2).sum(), [w, u], [torch.ones(3), torch.ones(2)])] == [[2, 2, 2], [0, 0]]
    assert [t.tolist() for t in hutchinson((w**2).sum(), [w, u], probes=2)] == [[2, 2, 2], [0, 0]]

@pytest.mark.parametrize('mse', [False, True])
@pytest.mark.parametrize('act', [nn.ReLU, nn.Tanh])
def test_hutchinson_finds_the_diagonal(act, mse):
    net, x, f, ws, H = tiny(act=act, mse=mse)
    d = flat(hutchinson(f(net(x)), ws, probes=3000))
    assert (d-H.diagonal()).norm() < .12*H.diagonal().norm()

@pytest.mark.parametrize('mse', [False, True])
def test_gauss_newton_finds_the_diagonal_of_a_network_of_relus(mse):
    net, x, f, ws, H = tiny(mse=mse)
    d = flat(gauss_newton(net(x), f, ws, probes=2000))
    assert H.diagonal().min() >= -1e-12 and (d-H.diagonal()).norm() < .1*H.diagonal().norm()

def test_gauss_newton_against_jacobians():
    net, x, f, ws, H = tiny(act=nn.Tanh)
    J = torch.stack([flat(torch.autograd.grad(net(x).flatten()[k], ws)) for k in range(48)])
    HL = torch.autograd.functional.hessian(lambda o: f(o.view(16, 3)), net(x).detach().flatten())
    d = flat(gauss_newton(net(x), f, ws, probes=2000))
    assert (d-(J.T@HL@J).diagonal()).norm() < .1*(J.T@HL@J).diagonal().norm()

def test_gauss_newton_of_other_losses():
    net, x, _, ws, _ = tiny()
    assert flat(gauss_newton(net(x), lambda o: o.sum(), ws)).abs().max() == 0      # no curvature at all
    assert flat(gauss_newton(net(x)[0], lambda o: (o**2).sum(), ws)).isfinite().all() # one row of outputs

def test_probes_are_seeded_and_leave_the_global_state_alone():
    net, x, f, ws, _ = tiny()
    state = torch.get_rng_state()
    run = lambda s, i=0: flat(s.by(Run(net, x, f), ws, i))
    for c in (obd, hap_trace):
        a, b, other, later = run(c().stats[0]), run(c().stats[0]), run(c(seed=1).stats[0]), run(c().stats[0], 1)
        assert torch.equal(a, b) and not torch.equal(a, other) and not torch.equal(a, later)
    assert torch.equal(torch.get_rng_state(), state) and all(w.grad is None for w in ws)

def test_obd_against_the_hessian():
    net, x, f, ws, H = tiny()
    c = obd(2000)
    for w,s,h in zip(ws, found(c, net, x, f, ws), H.diagonal().split([24, 18])):
        want = .5*h.view(w.shape)*w.detach()**2
        assert (c.element(w.detach(), s)-want).norm() < .1*want.norm()

@pytest.mark.parametrize('kw', [{}, dict(by='weights')])
def test_hap_against_the_hessian(kw):
    net, x, f, ws, H = tiny()
    c = hap_trace(2000, **kw)
    for w,s,at in zip(ws, found(c, net, x, f, ws), (0, 24)):
        n, D = w.shape
        got = unit_scores(c, w.detach(), (1,), s=s).flatten()
        want = torch.stack([H[at+u*D:at+u*D+D, at+u*D:at+u*D+D].trace()/(2*D)*w[u].detach().square().sum() for u in range(n)])
        assert (got-want).norm() < .1*want.norm()

def test_hap_golden():
    s = {'h':torch.tensor([[1., 3], [-2, 0], [5, 5]])[:,None]}
    v = torch.tensor([[1., 2], [1, 1], [0, 0]])[:,None]
    assert hap_trace(by='weights').vectors(v, s).tolist() == [5, -1, -1]  # 4/4·5, −2/4·2; what is removed is lowest
    assert hap_trace().vectors(v, s).tolist() == [5, 0, 0]                # there is no curvature below zero

def test_grasp_against_the_hessian():
    net, x, f, ws, H = tiny(act=nn.Tanh)
    c = grasp(1)
    got = flat([c.element(w.detach(), s) for w,s in zip(ws, found(c, net, x, f, ws))])
    g = flat(torch.autograd.grad(f(net(x)), ws))
    assert torch.allclose(got, flat(ws)*(H@g), atol=1e-12)

def test_grasp_sign_and_temperature():
    "high = keep: removing the lowest raises the norm of the gradient, removing the highest lowers it"
    net, x, f, ws, _ = tiny()
    c = grasp(200)
    s = c.element(ws[0].detach(), found(c, net, x, f, ws)[0])
    norm = lambda: sum(g.square().sum() for g in torch.autograd.grad(f(net(x)/200), ws)).item()
    before, w = norm(), ws[0].data.clone()
    def without(i):
        ws[0].data.view(-1)[i] *= .99
        n = norm(); ws[0].data.copy_(w)
        return n
    assert without(s.argmax()) < before < without(s.argmin())
    o = net(x).detach().requires_grad_()
    loss = f(net(x)/200)
    assert torch.allclose(s, ws[0].detach()*hessian_vector(loss, ws)[0])

def chain(ws): # sum over all paths, one by one
    total = {}
    for a in range(ws[0].shape[1]):
        for b in range(ws[0].shape[0]):
            for c in range(ws[1].shape[0]):
                p = abs(ws[0][b,a].item()*ws[1][c,b].item())
                for e in ((0, b, a), (1, c, b)): total[e] = total.get(e, 0)+p
    return total

def test_synflow_is_the_sum_over_paths():
    ws = [torch.randn(3, 4).double(), torch.randn(2, 3).double()]
    own = [w.abs().requires_grad_() for w in ws]
    R = (own[1]@own[0]@torch.ones(4).double()).sum()
    gs = torch.autograd.grad(R, own)
    for l,(w,g) in enumerate(zip(own, gs)):
        s = weights('synflow', BatchView(w=w.detach(), g=g))
        for o in range(w.shape[0]):
            for i in range(w.shape[1]): assert s[o,i].item() == pytest.approx(chain(ws)[l,o,i], rel=1e-10)
        assert s.sum().item() == pytest.approx(R.item())

# ---- what they need, and what is refused

NEEDS = dict(taylor_act='gradient', taylor_w='gradient', taylor_abs='gradient', taylor_gate='gradient', snip='gradient', fisher_act='gradient', group_fisher='gradient', movement='gradient', fisher_w='sample', weight_change='forward', synflow='flow')

@pytest.mark.parametrize('name', NEEDS)
def test_what_they_need(name):
    c = criteria[name]
    assert c.stats[0].by == NEEDS[name] and c.family in ('taylor', 'curvature') and c.note and (c.source or name == 'weight_change')
    assert ('gradients' in c.needs) == (NEEDS[name] in ('gradient', 'sample')) and ('training' in c.needs) == (name in ('movement', 'weight_change'))

@pytest.mark.parametrize('c', [*NEEDS, 'grasp', 'obd', 'hap_trace', taylor_act(False), grasp(1), obd(2, 3), hap_trace(2, by='weights')], ids=lambda c: getattr(c, 'name', c))
def test_they_pickle(c):
    c = criteria[c] if isinstance(c, str) else c
    assert pickle.loads(pickle.dumps(c)).stats[0].name == c.stats[0].name

def test_settings_are_told_apart_by_the_names_of_their_statistics():
    names = [c.stats[0].name for c in (taylor_act(), taylor_act(False), grasp(), grasp(1), obd(), obd(2), obd(seed=1), hap_trace(by='weights'), hap_trace(2, by='weights'))]
    assert len(set(names)) == len(names) and hap_trace().stats[0].name == obd().stats[0].name

@pytest.mark.parametrize('bad', [1, None, 'yes'])
def test_taylor_act_per_sample(bad):
    with pytest.raises(TypeError, match='taylor_act: per_sample is True or False, not '): taylor_act(bad)

@pytest.mark.parametrize('bad', [0, -1, float('inf'), float('nan'), '200', True])
def test_grasp_temperature(bad):
    with pytest.raises(ValueError, match='grasp: temperature is a number above 0, not '): grasp(bad)

@pytest.mark.parametrize('f,name', [(obd, 'obd'), (hap_trace, 'hap_trace')])
def test_probes_and_seeds(f, name):
    for bad in (0, 1.5, True, '4'):
        with pytest.raises(ValueError, match=f'{name}: probes is a whole number of at least 1, not '): f(bad)
    for bad in (None, '0', 1., True):
        with pytest.raises(TypeError, match=f'{name} takes a whole number as seed, not '): f(seed=bad)
    with pytest.raises(ValueError, match="hap_trace: by is 'outputs' or 'weights', not 'units'"): hap_trace(by='units')

# ---- through the engine

engine = partial(laws.engine, loss_func=F.cross_entropy)

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem,self.bn,self.a,self.b,self.fc = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1), nn.Linear(6, 4)
    def forward(self, x):
        h = F.relu(self.bn(self.stem(x)))
        return self.fc(F.relu(h+self.b(F.relu(self.a(h)))).mean((2, 3))) # the stream is read by `a` and, after the addition, by `fc`

def residual():
    torch.manual_seed(0)
    m = Residual().double().eval()
    with torch.no_grad(): m.bn.weight.uniform_(.5, 2); m.bn.bias.normal_()
    return m, torch.randn(8, 3, 6, 6, dtype=torch.float64), torch.randint(4, (8,))

def test_taylor_w_and_snip_in_a_network():
    m, x, y = residual()
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    gs = [torch.autograd.grad(F.cross_entropy(m(a), b), m.a.weight)[0] for a,b in data]
    want = torch.stack([(m.a.weight*g).detach() for g in gs])
    unit = lambda t: t.sum((1, 2, 3))
    assert torch.allclose(engine(m, x, 'taylor_w', data)['a'], unit(want.square().mean(0)))
    assert torch.allclose(engine(m, x, 'taylor_abs', data)['a'], unit(want.abs().mean(0)))
    assert torch.allclose(engine(m, x, 'snip', data)['a'], unit(want.mean(0).abs()))

def test_fisher_w_in_a_network_is_of_each_sample():
    m, x, y = residual()
    gs = torch.stack([torch.autograd.grad(F.cross_entropy(m(x[i:i+1]), y[i:i+1]), m.a.weight)[0] for i in range(8)])
    want = (m.a.weight.detach()**2/2*gs.square().mean(0)).sum((1, 2, 3))
    assert torch.allclose(engine(m, x, 'fisher_w', [(x[:3], y[:3]), (x[3:], y[3:])])['a'], want)

def test_gates_in_a_network_are_gates():
    "the gate multiplies what the normalisation writes"
    m, x, y = residual()
    gate = torch.ones(6, dtype=torch.float64, requires_grad=True)
    def run(x):
        h = F.relu(m.bn(m.stem(x))*gate[:,None,None])
        return m.fc(F.relu(h+m.b(F.relu(m.a(h)))).mean((2, 3)))
    gs = [torch.autograd.grad(F.cross_entropy(run(x[s]), y[s]), gate)[0] for s in (slice(4), slice(4, None))]
    seen = [BatchView(w=torch.stack([m.bn.weight, m.bn.bias], 1).detach(), g=torch.stack(torch.autograd.grad(F.cross_entropy(m(x[s]), y[s]), [m.bn.weight, m.bn.bias]), 1)) for s in (slice(4), slice(4, None))]
    assert torch.allclose(scores('taylor_gate', *seen), torch.stack(gs).square().mean(0))

def test_group_fisher_in_a_network_is_the_fisher_information_of_one_gate_for_all_readers():
    m, x, y = residual()
    gate = torch.ones(8, 6, dtype=torch.float64)
    got = engine(m, x, 'group_fisher', [(x[:5], y[:5]), (x[5:], y[5:])])
    h = F.relu(m.bn(m.stem(x)))
    def parts(ga, gf):
        z = F.relu(h+m.b(F.relu(m.a(h*ga[:,:,None,None])))).mean((2, 3))
        return F.cross_entropy(m.fc(z*gf), y, reduction='none')
    Ja, Jf = torch.autograd.functional.jacobian(parts, (gate, gate))
    want = torch.stack([Ja[n,n]+Jf[n,n] for n in range(8)]).square().sum(0)
    assert torch.allclose(got['stem'], want, rtol=1e-8)

def test_second_derivatives_in_a_network():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
    H = torch.autograd.functional.hessian(lambda w: F.cross_entropy(functional_call(m, {'0.weight':w}, (x,)), y), m[0].weight.detach())
    H = H.reshape(24, 24)
    w = m[0].weight.detach()
    ws = [m[0].weight]
    s = engine(m, x, hap_trace(1500, by='weights'), [(x, y)])['0']
    want = torch.stack([H[4*u:4*u+4, 4*u:4*u+4].trace()/8*w[u].square().sum() for u in range(6)])
    assert (s-want).norm() < .1*want.norm()
    s = engine(m, x, grasp(1), [(x, y)])['0']
    g = torch.autograd.grad(F.cross_entropy(m(x), y), [m[0].weight])
    assert torch.allclose(s, (w*hessian_vector(F.cross_entropy(m(x), y), ws)[0]).sum(1))

def test_obd_in_a_network():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
    H = torch.autograd.functional.hessian(lambda w: F.cross_entropy(functional_call(m, {'0.weight':w}, (x,)), y), m[0].weight.detach()).reshape(24, 24)
    want = (H.diagonal().view(6, 4)*m[0].weight.detach()**2/2).sum(1)
    s = engine(m, x, obd(1500), [(x, y)])['0']
    assert (s-want).norm() < .1*want.norm()

def test_synflow_in_a_network_touches_nothing():
    m, x, _ = residual()
    m.float()
    before = {k:v.clone() for k,v in m.state_dict().items()}
    s = engine(m, x.float(), 'synflow')
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items()) and (s['a'] > 0).all()
    pos = {k:v.double().abs() if v.is_floating_point() else v for k,v in m.state_dict().items()}
    w = pos['a.weight'].requires_grad_()
    g, = torch.autograd.grad(functional_call(m, pos, (torch.ones_like(x),)).sum(), w)
    assert torch.allclose(s['a'], (w*g).sum((1, 2, 3)).detach())

def test_how_layers_are_compared():
    assert {n:criteria[n].across for n in (*NEEDS, 'grasp', 'obd', 'hap_trace')} == {**dict.fromkeys((*NEEDS, 'obd', 'hap_trace'), 'mean'), 'taylor_act':'l2', 'movement':'zscore', 'grasp':'zscore'}
    assert hap_trace(by='weights').across == 'zscore' # what has a sign has no mean to be a multiple of

def test_obd_of_units_is_not_negative():
    see = BatchView(w=torch.ones(2, 2), g=torch.tensor([[1., 3], [-2, 1]]))
    assert unit_scores(criteria['obd'], see.w, (1,), s={'h':see.g.double()}).flatten().tolist() == [2, 0]
