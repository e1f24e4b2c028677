"Words shared by all: every function of core, every error text"
import math, pickle
import pytest, torch
from collections import UserDict
from torch import nn
from fasterprune import core
from fasterprune.core import *

def net():
    tied = nn.Linear(4, 4)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.Flatten()), tied, tied, nn.Linear(4, 2))

# counts and fractions
@pytest.mark.parametrize('n', [0, 1, 2, 3, 7, 10, 100, 1000])
def test_n_removed_of_decimals(n):
    for f in range(101): assert n_removed(n, f/100) == f*n//100

def test_n_removed_golden(): # definitions: int(.29*100) == 28, int(.57*100) == 56
    assert int(.29*100) == 28 and n_removed(100, .29) == 29
    assert int(.57*100) == 56 and n_removed(100, .57) == 57

@pytest.mark.parametrize('x', [0, 1, .5, 0., 1., torch.tensor(.5).item()])
def test_fraction_taken(x): assert check_fraction(x) == float(x) and type(check_fraction(x)) is float

@pytest.mark.parametrize('x,hint', [(50, 'did you mean 0.5?'), (1.5, 'did you mean 0.015?'), (100, 'did you mean 1?'), (101, 'pass a number such as 0.5'),
                                    (-.1, 'pass a number such as 0.5'), (float('nan'), 'pass a number such as 0.5'), (math.inf, 'pass a number such as 0.5')])
def test_fraction_refused(x, hint):
    with pytest.raises(ValueError) as e: check_fraction(x)
    assert str(e.value) == f"sparsity is a fraction in [0, 1], not {x!r}; {hint}"

@pytest.mark.parametrize('x', [True, False, 'half', None, [.5], torch.tensor(.5)])
def test_fraction_of_another_type_refused(x):
    with pytest.raises(TypeError, match='max_ratio is a fraction in'): check_fraction(x, 'max_ratio')

# names
def test_no_such():
    assert unknown_name('layer', 'cnov', ['conv', 'fc']) == "no layer 'cnov'; did you mean 'conv'? choose from 'conv', 'fc'"
    assert unknown_name('layer', 'x', []) == "no layer 'x'; choose from nothing: there are none"

def test_registry():
    r = Registry('thing', ('dtype', 'ndim'))
    r['one'] = torch.tensor([1.]); r['two'] = 2
    assert repr(r).splitlines()[0].split() == ['thing', 'dtype', 'ndim'] and repr(r).splitlines()[1].startswith('one')
    assert r._repr_markdown_().splitlines()[1] == '|---|---|---|'
    with pytest.raises(KeyError) as e: r['tow']
    assert e.value.args[0] == "no thing 'tow'; did you mean 'two'? choose from 'one', 'two'"
    assert 'tow' not in r and r.get('tow') is None
    back = pickle.loads(pickle.dumps(r))
    assert list(back) == ['one', 'two'] and back.columns == r.columns

# layers
def test_prunable_layers():
    m = net()
    assert list(prunable_layers(m)) == ['0', '2.0', '3', '5']
    assert prunable_layers(m)['3'] is m[4]
    assert list(prunable_layers(nn.Linear(2, 2))) == [''] and prunable_layers(nn.ReLU()) == {}

def test_lazy_layer_refused():
    with pytest.raises(ValueError, match="layer '0' has no weight yet; run the model once"): prunable_layers(nn.Sequential(nn.LazyLinear(3)))

@pytest.mark.parametrize('only,ignore,want', [
    (None, None, ['0', '2.0', '3', '5']), ('2', None, ['2.0']), ('2.0', None, ['2.0']), (None, '2', ['0', '3', '5']), (nn.Linear, None, ['3', '5']),
    (nn.Linear, ['5'], ['3']), (['0', nn.Linear], None, ['0', '3', '5']), (None, [nn.Conv2d, '5'], ['2.0', '3']), (None, nn.Conv3d, ['0', '2.0', '3', '5']),
    (['5', '0'], None, ['0', '5'])])
def test_select_layers(only, ignore, want): assert list(select_layers(net(), only, ignore)) == want

@pytest.mark.parametrize('kw', [dict(only='9'), dict(ignore='1'), dict(only=['0', 'head']), dict(ignore='')])
def test_select_unknown_name(kw):
    with pytest.raises(ValueError) as e: select_layers(net(), **kw)
    (arg, v), = kw.items()
    name = v[-1] if isinstance(v, list) else v
    assert str(e.value) == f"{arg}: no layer {name!r}; choose from '0', '2.0', '3', '5'"

def test_select_prefix_is_not_a_substring(): # '1' is not '10'
    m = nn.Sequential(*[nn.Linear(2, 2) for _ in range(11)])
    assert list(select_layers(m, '1')) == ['1']

def test_select_refusals():
    m = net()
    with pytest.raises(TypeError, match='only takes layer names or types, not Conv2d.*pass its name in named_modules'): select_layers(m, only=[m[0]])
    with pytest.raises(ValueError, match="only='5' and ignore='5' leave no layer; the layers are '0', '2.0', '3', '5'"): select_layers(m, '5', '5')
    with pytest.raises(ValueError, match=r"only=\[\] and ignore=None leave no layer"): select_layers(m, only=[])
    with pytest.raises(ValueError, match="ReLU has no convolution and no linear layer, so there is nothing to prune"): select_layers(nn.ReLU())

def test_check_sparsity():
    assert check_sparsity(1, ['a']) == 1. and check_sparsity({'a': 0}, ['a', 'b']) == {'a': 0.}
    with pytest.raises(ValueError, match=r"sparsity: no layer 'aa'; did you mean 'a'\? choose from 'a', 'b'"): check_sparsity({'aa': .5}, ['a', 'b'])
    with pytest.raises(ValueError, match=r"sparsity\['a'\] is a fraction in \[0, 1\], not 50; did you mean 0.5\?"): check_sparsity({'a': 50}, ['a'])
    with pytest.raises(ValueError, match="sparsity is an empty dict; give at least one layer a fraction, from 'a'"): check_sparsity({}, ['a'])
    with pytest.raises(ValueError, match=r"sparsity is a fraction in \[0, 1\], not 80; did you mean 0.8\?"): check_sparsity(80, ['a'])

# modules and calls
def test_module_of():
    m = net()
    assert module_of(m, '2.0.weight') == (m[2][0], 'weight') and module_of(m, '4.bias') == (m[3], 'bias')
    assert module_of(m, '1.running_mean') == (m[1], 'running_mean') and module_of(nn.Linear(1, 1), 'bias')[1] == 'bias'
    for bad in ('0.wieght', '9.weight', 'weight', '0'):
        with pytest.raises(ValueError, match=f"no parameter '{bad}'"): module_of(m, bad)

def test_eval_mode_restores_every_flag():
    m = net(); m[1].eval(); m[2][1].eval()
    was = [x.training for x in m.modules()]
    with eval_mode(m) as inside: assert inside is m and not any(x.training for x in m.modules())
    assert [x.training for x in m.modules()] == was
    with pytest.raises(ZeroDivisionError):
        with eval_mode(m): m.train(); 1/0
    assert [x.training for x in m.modules()] == was

def test_as_call():
    x = torch.zeros(1)
    assert as_call(x) == ((x,), {}) and as_call((x, x)) == ((x, x), {}) and as_call([x, 2]) == ((x, 2), {})
    assert as_call({'a': x}) == ((), {'a': x}) and as_call(()) == ((), {})
    with pytest.raises(TypeError, match='an example input is a tensor, a tuple of positional or a dict of keyword arguments, not str'): as_call('x')
    with pytest.raises(TypeError, match='not NoneType None'): as_call(None)

def test_wide():
    assert {to_double(torch.ones(1, dtype=d)).dtype for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32)} == {torch.float64}

def test_errors():
    assert issubclass(PruningError, RuntimeError) and issubclass(VerificationError, PruningError) and issubclass(NoEffectWarning, UserWarning)
    assert 'layer_types' in core.__all__
