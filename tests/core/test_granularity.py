"Each granularity on each layer type, against a loop over the positions of the weight"
import itertools
import pytest, torch
from torch import nn
from fasterprune.axes import *
from fasterprune.granularity import *

LAYERS = dict(Conv1d=lambda: nn.Conv1d(3, 4, 5), Conv2d=lambda: nn.Conv2d(3, 4, (2, 5)), Conv3d=lambda: nn.Conv3d(3, 4, (2, 5, 6)), Linear=lambda: nn.Linear(3, 4),
              ConvTranspose1d=lambda: nn.ConvTranspose1d(3, 4, 5), ConvTranspose2d=lambda: nn.ConvTranspose2d(3, 4, (2, 5)),
              ConvTranspose3d=lambda: nn.ConvTranspose3d(3, 4, (2, 5, 6)), grouped=lambda: nn.Conv2d(6, 4, (2, 5), groups=2), depthwise=lambda: nn.Conv2d(4, 4, 3, groups=4), Embedding=lambda: nn.Embedding(5, 3))

# What makes two weights part of the same unit: equal values of these coordinates (o, i, d, h, w)
SAME = dict(weight='oidhw', row='oidh', column='oidw', frame='oid', kernel='oi', filter='o', shared_kernel='i', channel='odhw', shared_weight='idhw',
            shared_channel='dhw', shared_row='idh', shared_column='idw', vertical_slice='odw', horizontal_slice='odh', shared_vertical_slice='dw',
            shared_horizontal_slice='dh', layer='')
SAME_EMBEDDING = dict(weight='oi', row='i', column='o')
SAME_LINEAR = dict(weight='oi', row='o', filter='o', column='i', shared_kernel='i', layer='')
ALL = ['weight', 'kernel', 'filter', 'shared_kernel', 'channel', 'shared_weight', 'shared_channel', 'layer']
PLANE = [g for g in SAME if g != 'frame']
VALID = dict(Conv1d=ALL, Conv2d=PLANE, Conv3d=list(SAME), Linear=list(SAME_LINEAR), Embedding=list(SAME_EMBEDDING))

def names_of(layer, shape): # The letters of the weight's axes, written down once more by hand
    k = len(shape) - 2
    return ('io' if 'Transpose' in type(layer).__name__ or isinstance(layer, nn.Embedding) else 'oi') + 'dhw'[3-k:]

def valid(layer): return VALID[type(layer).__name__.replace('Transpose', '')]

def units_by_loop(layer, g):
    "Position → unit, by walking over every single weight"
    w, same = layer.weight, (SAME_LINEAR if isinstance(layer, nn.Linear) else SAME_EMBEDDING if isinstance(layer, nn.Embedding) else SAME)[g]
    letters, res = names_of(layer, w.shape), {}
    for pos in itertools.product(*map(range, w.shape)):
        at = dict(zip(letters, pos))
        res[pos] = tuple(at[a] for a in same if a in at)
    return res

CASES = [(l, g) for l,f in LAYERS.items() for g in valid(f())]

@pytest.mark.parametrize('layer,g', CASES)
def test_against_loop(layer, g):
    layer = LAYERS[layer]()
    w, dims, of = layer.weight.detach().double(), unit_dims(layer, g), units_by_loop(layer, g)
    for pool, f in (('sum', sum), ('max', max), ('mean', lambda v: sum(v)/len(v))):
        s = reduce_units(w, dims, pool)
        assert s.ndim == w.ndim and s.numel() == len(set(of.values()))
        full, unit = s.expand_as(w), {}
        for pos,u in of.items(): unit.setdefault(u, []).append(w[pos].item())
        for pos,u in of.items(): assert full[pos].item() == pytest.approx(f(unit[u]), abs=1e-12)
    assert {len(v) for v in unit.values()} == {unit_size(w.shape, dims)}

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bool])
@pytest.mark.parametrize('k', [1, 2, 3, 5])
def test_small_kernels_to_the_last_bit(k, dtype):
    w = torch.randn(20, 30, k, k, generator=torch.Generator().manual_seed(0)) > 0 if dtype==torch.bool else torch.randn(20, 30, k, k, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for pool in ('max',) if dtype==torch.bool else pools:
        for dims in ((2,), (3,), (0,), (2, 3), (0, 2)): assert torch.equal(reduce_units(w, dims, pool), pools[pool](w, dim=dims, keepdim=True))

@pytest.mark.parametrize('layer,g', CASES)
def test_expand_takes_whole_units(layer, g):
    layer = LAYERS[layer]()
    w, of = layer.weight.detach(), units_by_loop(layer, g)
    units = reduce_units(w, unit_dims(layer, g))
    keep = torch.rand(units.shape, generator=torch.Generator().manual_seed(0)) > .5
    full = expand_units(keep, w.shape)
    assert full.dtype == torch.bool and full.shape == w.shape
    votes = {}
    for pos,u in of.items(): votes.setdefault(u, set()).add(full[pos].item())
    assert all(len(v) == 1 for v in votes.values()) and sum(v == {True} for v in votes.values()) == keep.sum()

@pytest.mark.parametrize('layer', LAYERS)
def test_names_that_a_layer_does_not_have_are_refused(layer):
    layer = LAYERS[layer]()
    kind = type(layer).__name__
    for g in set(granularities) - set(valid(layer)):
        with pytest.raises(ValueError) as e: unit_dims(layer, g)
        text = e.value.args[0]
        assert text.startswith(f'{g!r} (') and f'is not defined for {kind}, whose weight has the axes' in text
        assert text.endswith('choose from ' + ', '.join(repr(n) for n in granularities if n in valid(layer)))

def test_the_table_names_every_granularity_of_the_tests():
    assert set(granularities) == set(SAME)
    assert [n for n,g in granularities.items() if g.prunable] == ['filter', 'shared_kernel']
    assert granularities['row'].layers == ('Conv2d', 'Conv3d', 'Linear', 'ConvTranspose2d', 'ConvTranspose3d', 'Embedding')
    assert len(repr(granularities).splitlines()) == len(granularities) + 1

@pytest.mark.parametrize('g,dims', [('weight', ()), ('row', (3,)), ('column', (2,)), ('kernel', (2, 3)), ('filter', (1, 2, 3)), ('shared_kernel', (0, 2, 3)), ('channel', (1,)),
    ('vector', (1,)), ('shared_weight', (0,)), ('shared_channel', (0, 1)), ('tap', (0, 1)), ('shared_row', (0, 3)), ('shared_column', (0, 2)), ('vertical_slice', (1, 2)),
    ('horizontal_slice', (1, 3)), ('shared_vertical_slice', (0, 1, 2)), ('shared_horizontal_slice', (0, 1, 3)), ('layer', (0, 1, 2, 3))])
def test_conv2d_table(g, dims): assert unit_dims(nn.Conv2d(3, 4, 3), g) == dims

def test_other_tables():
    assert unit_dims(nn.Conv3d(3, 4, 3), 'frame') == (3, 4) and unit_dims(nn.Conv1d(3, 4, 3), 'tap') == (0, 1)
    assert unit_dims(nn.ConvTranspose2d(3, 4, 3), 'filter') == (0, 2, 3) and unit_dims(nn.ConvTranspose2d(3, 4, 3), 'shared_kernel') == (1, 2, 3)
    assert unit_dims(nn.Linear(3, 4), 'row') == (1,) and unit_dims(nn.Linear(3, 4), 'column') == (0,)

def test_subclasses_count_as_their_base():
    class Mine(nn.Conv2d): pass
    assert unit_dims(Mine(3, 4, 3), 'filter') == (1, 2, 3)

def test_a_granularity_of_ones_own():
    g = Granularity('plane', 'io', 'the kernel of a frame', needs='d')
    assert unit_dims(nn.Conv3d(3, 4, 3), g) == (0, 1)
    with pytest.raises(ValueError, match="'plane' .the kernel of a frame. is not defined for Conv2d"): unit_dims(nn.Conv2d(3, 4, 3), g)

def test_refusals():
    w = torch.ones(4, 3, 3, 3)
    with pytest.raises(ValueError, match="no granularity 'filters'; did you mean 'filter'?"): unit_dims(nn.Conv2d(3, 4, 3), 'filters')
    with pytest.raises(ValueError, match='no granularity 3; choose from'): as_granularity(3)
    with pytest.raises(TypeError, match='BatchNorm2d has no weight whose axes are known; a layer is one of Conv1d'): unit_dims(nn.BatchNorm2d(3), 'filter')
    with pytest.raises(ValueError, match="no pool 'median'"): reduce_units(w, (1,), 'median')
    with pytest.raises(ValueError, match=r'units of shape \(5, 1, 1, 1\) do not fit a weight of shape \(4, 3, 3, 3\); every dimension must be equal or 1'):
        expand_units(torch.ones(5, 1, 1, 1), w.shape)
