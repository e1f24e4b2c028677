"Budgets, asked and met: parameters and multiplications of four architectures, and the time of a ResNet-18 in an interleaved run: `python benchmarks/budgets.py [params] [macs] [memory] [latency]`"
import os, sys, time, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
from copy import deepcopy
import torch
from fastprogress import fastprogress
from torchvision import models
from fasterprune.measure.latency import compare_latency
from fasterprune.surgery.planning.budget import Budget
from fasterprune.surgery.analysis.cost import Costs
from fasterprune.surgery.coupling.couple import couple
from fasterprune.surgery.pruner import Pruner
from fasterprune.surgery.analysis.latency import own_clock, time_interleaved, time_ratio

NAMES,FRACTIONS = ('resnet50', 'mobilenet_v2', 'convnext_tiny', 'vit_b_16'),(.25, .5, .75)

def nothing(c): return torch.zeros(c.labels.size, dtype=torch.bool).numpy()

def counted(name, kind):
    "One row for each fraction: what was asked, what is left of the original, measured on the pruned model"
    dense,x = getattr(models, name)(weights=None).eval(),torch.randn(1,3,224,224)
    c = couple(dense, x)
    whole = Costs(c, (kind,))(nothing(c))[kind]
    for f in FRACTIONS:
        m = deepcopy(dense)
        start = time.perf_counter()
        Pruner(m, x).prune(budget=Budget(**{kind:f}), verify=False)
        seconds,c = time.perf_counter()-start,couple(m, x)
        left = Costs(c, (kind,))(nothing(c))[kind]/whole # of the small model, captured afresh
        print(f"{name:<14} {kind:<7} {f:>6.2f} {left:>8.4f} {left/f-1:>+8.2%}  {'ok' if .995<=left/f<=1 else 'NO':<3} {seconds:>6.1f} s", flush=True)

def timed(f, batch=8, name='resnet18'):
    "A budget in time, met and measured again in turns"
    dense,x = getattr(models, name)(weights=None).eval(),torch.randn(batch,3,224,224)
    m = deepcopy(dense)
    start = time.perf_counter()
    p = Pruner(m, x)
    p.prune(budget=Budget(latency=f), verify=False)
    seconds = time.perf_counter()-start
    runs = time_interleaved(dict(dense=dense, pruned=m), x, repeats=15, warmup=2, clock=own_clock('cpu', 1))
    left,wall = time_ratio(runs['pruned'], runs['dense']),compare_latency(dict(dense=dense, pruned=m), x, repeats=15, warmup=2)
    print(f"{name:<14} latency {f:>6.2f} {left:>8.4f} {left/f-1:>+8.2%}  {'ok' if .9<=left/f<=1.1 else 'NO':<3} {seconds:>6.1f} s   found by: {p.measured!r}\n"
        f"on the wall, {1/wall.speedup['pruned']:.3f} of the time (load of the machine {os.getloadavg()[0]:.1f}):\n{wall!r}", flush=True)

if __name__=='__main__':
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter('ignore')
    fastprogress.NO_BAR,fastprogress.ConsoleProgressBar.fill = True,''
    kinds = sys.argv[1:] or ['params', 'macs', 'memory', 'latency']
    print(f"{'model':<14} {'what':<7} {'asked':>6} {'met':>8} {'off':>8}       seconds")
    for kind in [k for k in kinds if k!='latency']:
        for name in NAMES: counted(name, kind)
    if 'latency' in kinds:
        for f in (.5, .75): timed(f)
