"""Surgery takes the memory of one tensor at a time

The sizes of the promise are tried by `pytest -m slow tests/surgery/cutting/test_memory.py`, and printed by `python
benchmarks/memory.py`."""
import importlib.util, json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from torch import nn
from fasterprune.surgery.cutting.apply import apply_
from fasterprune.surgery.planning.plan import Plan
from fasterprune.surgery.pruner import Pruner

SCRIPT = Path(__file__).resolve().parents[3]/'benchmarks'/'memory.py'
linux = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='peaks are read from /proc')

def measured(task, scale):
    out = subprocess.run([sys.executable, str(SCRIPT), '--task', task, '--scale', str(scale)], stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    return json.loads(out.stdout.splitlines()[-1])

@linux
def test_a_small_network_is_planned_and_cut_in_place():
    r = measured('plan', .05)
    assert r['removed']>0 and r['parameters']>9e7 and r['peak_gb']<2 and r['extra_gb']*2**30<.5*r['parameters']*4
    r = measured('apply', .05)
    assert r['left']<.4*r['parameters'] and r['times_size']<1.2

@linux
@pytest.mark.slow
def test_two_billion_parameters_are_planned():
    r = measured('plan', 1)
    assert r['parameters']>=2e9 and r['peak_gb']<4 and r['seconds']<60 and r['removed']>0

@linux
@pytest.mark.slow
@pytest.mark.parametrize('task,limit', [('apply',1.2), ('prune',1.2), ('score',1.5)])
def test_one_billion_parameters_are_cut(task, limit):
    r = measured(task, 1)
    assert r['parameters']>=1e9 and r['times_size']<limit and (r['left']<.4*r['parameters'] or task=='score')

# ---- without values

spec = importlib.util.spec_from_file_location('memory', SCRIPT)
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)

def test_a_plan_without_weights_fits_the_real_network():
    large,ids = memory.language_model(.02),torch.zeros(1,5,dtype=torch.long)
    for criterion in ('first_k', 'random'):
        plan = Pruner(large, ids.to('meta')).plan(.5, criterion=criterion)
        real = memory.filled(memory.language_model(.02))
        assert plan==Pruner(real, ids).plan(.5, criterion=criterion) and plan.removed>0
    apply_(real, Plan.from_json(plan.to_json()))
    assert real(ids).isfinite().all()

def meta():
    with torch.device('meta'): return nn.Sequential(nn.Linear(4,8), nn.ReLU(), nn.Linear(8,2))

@pytest.mark.parametrize('how,match', [(dict(sparsity=.5), "criterion 'l2' reads weights, and this one of shape .8, 4. has no values .device meta.; load the weights first, or choose by 'first_k' or 'random'"),
    (dict(sparsity=.5, criterion=torch.abs), "criterion 'abs' reads weights"), (dict(), "this Sequential has no values .device meta., and what is dead is seen in the weights")])
def test_what_needs_values_says_so(how, match):
    with pytest.raises(ValueError, match=match): Pruner(meta(), torch.empty(3,4, device='meta')).plan(**how)

@pytest.mark.parametrize('how', [{}, dict(compensate=True, verify=False), dict(recalibrate=[torch.zeros(2,4)], verify=False)])
def test_nothing_runs_without_values(how):
    m = meta()
    with pytest.raises(ValueError, match='so nothing can be run; make a plan'): Pruner(m, torch.empty(3,4, device='meta')).prune(.5, criterion='first_k', **how)
    assert m[0].out_features==8
    assert Pruner(m, torch.empty(3,4, device='meta')).prune(.5, criterion='first_k', verify=False).removed==4 and m[0].weight.shape==(4,4)

def test_one_old_tensor_at_a_time(monkeypatch):
    "While a tensor is cut, all that were cut before are gone"
    from fasterprune.surgery.cutting import apply as module
    m = nn.Sequential(*[l for _ in range(5) for l in (nn.Linear(16,16), nn.ReLU())], nn.Linear(16,2))
    alive,plain = [],module.sliced
    def sliced(t, *args):
        alive.append(sum(p.numel() for p in m.parameters()))
        return plain(t, *args)
    monkeypatch.setattr(module, 'sliced', sliced)
    Pruner(m, torch.randn(2,16)).prune(.5, verify=False)
    assert alive==sorted(alive, reverse=True) and alive[-1]<.5*alive[0]
