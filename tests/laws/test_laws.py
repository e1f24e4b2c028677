"The two laws on sixteen architectures, in double precision, by oracles that share nothing with the code that cuts"
import pytest, torch, torchvision
from copy import deepcopy
from torch import nn
from fasterprune.surgery.coupling.couple import couple
from fasterprune.surgery.pruner import Pruner
from support.laws import awake, cut, louder, other, rel, run, silence, unread

ZOO = ('resnet18 resnet50 vgg11_bn mobilenet_v2 mobilenet_v3_small efficientnet_b0 densenet121 squeezenet1_0 googlenet inception_v3 '
       'mnasnet1_0 regnet_x_400mf regnet_y_400mf resnext50_32x4d shufflenet_v2_x1_0 alexnet').split()
FRACTIONS = .25, .5, .9

@pytest.fixture(scope='module', params=ZOO)
def net(request):
    "An awake network and its input; what comes out depends on what goes in"
    name = request.param
    torch.manual_seed(0)
    x = torch.randn(2, 3, *([80]*2 if name=='inception_v3' else [64]*2), dtype=torch.float64)
    more = dict(googlenet=dict(init_weights=False), inception_v3=dict(init_weights=False, aux_logits=False)) # its second head wants 299 pixels
    m = getattr(torchvision.models, name)(weights=None, num_classes=10, **more.get(name, {}))
    for d in m.modules():
        if isinstance(d, (nn.Dropout, torchvision.ops.StochasticDepth)): d.p = 0.
    m = awake(m, x)
    assert rel(run(m, x), run(m, other(x, 2))) > .01
    return m,x

@pytest.mark.parametrize('fraction', FRACTIONS)
def test_readers_law(net, fraction):
    m,x = louder(net[0], fraction),net[1]
    small = deepcopy(m)
    r = Pruner(small, x).prune(fraction, criterion='random', verify=False)
    want = unread(m, r.plan)
    assert rel(run(small, x), run(want, x)) < 1e-10
    y = other(x)
    assert rel(run(small, y), run(want, y)) < 1e-10
    assert rel(run(small, x), run(small, other(x, 2))) > 1e-2 # still awake

@pytest.mark.parametrize('fraction', FRACTIONS)
def test_masks_law(net, fraction):
    m,x = net
    sparse = louder(m, fraction)
    zeroed = silence(sparse, couple(sparse, x), fraction)
    small = deepcopy(sparse)
    r = Pruner(small, x).prune()
    assert r.error < 1e-10
    assert cut(r.plan) == zeroed
    for y in (x, other(x)): assert rel(run(small, y), run(sparse, y)) < 1e-10
    y = other(x, 4)
    assert rel(run(small.train(), y), run(sparse.train(), y)) < 1e-10

def test_masks_law_from_the_other_side(net):
    "A channel that nobody reads is as dead as one that nobody writes"
    m,x = net
    sparse = deepcopy(m)
    zeroed = silence(sparse, couple(sparse, x), .5, roles=('read',))
    small = deepcopy(sparse)
    r = Pruner(small, x).prune()
    assert r.error < 1e-10 and cut(r.plan) == zeroed
    for y in (x, other(x)): assert rel(run(small, y), run(sparse, y)) < 1e-10
