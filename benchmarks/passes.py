"What `prune()` with all its checks costs, in forward passes of the model: `python benchmarks/passes.py --help`"
import argparse, cProfile, gc, io, json, os, pstats, statistics, subprocess, sys, time, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
from copy import deepcopy
from pathlib import Path
import torch
from torch import nn
from fasterprune.core import as_call
from fasterprune.surgery.capture.tracer import capture_all
from fasterprune.surgery.coupling.couple import Coupling
from fasterprune.surgery.pruner import Pruner
from models import build

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent/'.cache'/'passes.jsonl'
STAGES = 'capture', 'couple', 'plan', 'apply', 'verify'
QUICK = 3. # s; what is faster is measured three times
MOST = 12. # Forward passes that all of `prune()` may take, median over the models
clock = time.process_time # one thread: what other programs do on the machine counts for little
SOME = '''torchvision:resnet18 torchvision:resnet50 torchvision:densenet121 torchvision:mobilenet_v2
    torchvision:efficientnet_b0 torchvision:regnet_y_400mf torchvision:shufflenet_v2_x1_0 torchvision:squeezenet1_1
    torchvision:googlenet torchvision:convnext_tiny torchvision:swin_t torchvision:swin_v2_t torchvision:vit_b_32
    torchvision:maxvit_t torchvision:mnasnet1_0 timm:beit_base_patch16_224 timm:coat_tiny timm:davit_tiny
    timm:vit_tiny_patch16_dinov3_qkvb timm:fastvit_t8 timm:levit_128s timm:mobilevit_xxs timm:poolformerv2_s12
    timm:resnest14d timm:test_vit timm:vitamin_small_224 timm:xcit_nano_12_p8_224 timm:hrnet_w18_small
    transformers:bert transformers:gpt2 transformers:llama transformers:t5'''.split()

# one model

def call(m, x):
    "Run a model on its example"
    args,kwargs = as_call(x)
    return m(*args, **kwargs)

def taken(f, *args)->tuple:
    "Seconds of the processor, and what was returned"
    gc.collect()
    start = clock()
    res = f(*args)
    return clock()-start,res

@torch.no_grad()
def forward_seconds(model, x)->float:
    "Median of up to seven forward passes, after one to warm up"
    call(model, x)
    runs = []
    while len(runs)<7 and sum(runs)<2*QUICK: runs.append(taken(call, model, x)[0])
    return statistics.median(runs)

def prune_seconds(model, x)->dict:
    "Median seconds of `prune(.5)` without and with its checks, in turns, each on fresh copies"
    runs = {False:[], True:[]}
    for turn in range(3):
        for verify in runs:
            if turn and runs[verify][0]>QUICK: continue
            m = deepcopy(model)
            runs[verify].append(taken(lambda: Pruner(m, x).prune(.5, verify=verify))[0])
    return {k:statistics.median(v) for k,v in runs.items()}

def stage_seconds(model, x, free:float, whole:float)->dict:
    "Where the seconds go: `free` without checks, `whole` with them"
    capture,trace = taken(capture_all, model, x)
    couple,_ = taken(Coupling, model, trace)
    plan,_ = taken(lambda: Pruner(model, x).plan(.5))
    seconds = capture,couple,plan-capture-couple,free-plan,whole-free
    return dict(zip(STAGES, seconds))

def measure(model, x)->dict:
    "The numbers of a row: seconds of a forward pass, of a cut, and of its steps"
    forward,runs = forward_seconds(model, x),prune_seconds(model, x)
    return dict(forward_s=forward, cut_s=runs[False], prune_s=runs[True],
        passes=runs[True]/forward, cut_passes=runs[False]/forward,
        stages=stage_seconds(model, x, runs[False], runs[True]))

def warm():
    "What is loaded at the first cut is not the model's"
    convs = nn.Conv2d(3, 8, 3),nn.ReLU(),nn.Conv2d(8, 8, 3)
    m = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    Pruner(m.eval(), torch.randn(1, 3, 16, 16)).prune(.5)

def row(spec:str)->dict:
    "Measure one model in this process"
    model,x = build(spec)
    warm()
    return dict(model=spec, params=sum(p.numel() for p in model.parameters()), **measure(model, x))

def profiled(spec:str, n:int=40)->str:
    "Where the time of `prune(.5)` goes, function by function: by their own seconds, and with what they call"
    model,x = build(spec)
    warm()
    forward = forward_seconds(model, x)
    p = cProfile.Profile(timer=clock)
    p.runcall(lambda: Pruner(model, x).prune(.5))
    out = io.StringIO()
    stats = pstats.Stats(p, stream=out)
    stats.sort_stats('tottime').print_stats(n)
    stats.print_callers(12)
    stats.sort_stats('cumulative').print_stats('fasterprune', n)
    return f"{spec}: one forward pass takes {forward:.3f} s without the profiler\n{out.getvalue()}"

# all of them

def run_one(spec:str, timeout:float)->dict:
    "The row of one model, from a process of its own; a crash or a hang is a row too"
    path = os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')])
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':path}
    cmd = [sys.executable, __file__, '--worker', spec]
    try: p = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired: return dict(model=spec, fail=f"stopped after {timeout:.0f} s")
    lines = p.stdout.strip().splitlines()
    if p.returncode==0 and lines: return json.loads(lines[-1])
    return dict(model=spec, fail=' '.join(p.stderr.strip().splitlines()[-1:])[:400])

def read_rows(path:Path)->dict:
    "Model → its latest row"
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {r['model']:r for r in rows}

HEAD = '| model | parameters, M | forward, s | '+' | '.join(f"{s}, s" for s in STAGES)+' | prune, s | passes |'

def line(r:dict)->str:
    "A row of the table"
    if 'fail' in r: return f"| {r['model']} | {r['fail']} |"+' |'*(len(STAGES)+4)
    stages = ' | '.join(f"{r['stages'][s]:.2f}" for s in STAGES)
    head = f"| {r['model']} | {r['params']/1e6:.1f} | {r['forward_s']:.3f}"
    return f"{head} | {stages} | {r['prune_s']:.2f} | {r['passes']:.1f} |"

def summary(rows:list)->str:
    "What was met"
    good = [r for r in rows if 'fail' not in r]
    if not good: return 'nothing was measured'
    med = lambda f: statistics.median(map(f, good))
    parts = ', '.join(f"{s} {med(lambda r: r['stages'][s]/r['forward_s']):.1f}" for s in STAGES)
    whole,cut = med(lambda r: r['passes']),med(lambda r: r['cut_passes'])
    return f"median over {len(good)} of {len(rows)} models: prune() with its checks takes {whole:.1f} forward passes " \
        f"(at most {MOST:.0f}); without, {cut:.1f}; medians of the steps: {parts}"

def arguments():
    p = argparse.ArgumentParser(description='What prune() with all its checks costs, in forward passes of the model.')
    p.add_argument('--only', nargs='+', metavar='NAME', help='source:name; some 30 of the zoo otherwise')
    p.add_argument('--all', action='store_true', help='every model of zoo.txt')
    p.add_argument('--out', type=Path, default=CACHE, help=f'rows as JSON lines; a second call resumes there ({CACHE})')
    p.add_argument('--timeout', type=float, default=600)
    p.add_argument('--fresh', action='store_true', help='run again what has a row already')
    p.add_argument('--report', action='store_true', help='run nothing')
    p.add_argument('--profile', nargs='+', metavar='NAME', help='where the time of these goes, instead')
    p.add_argument('--worker', help=argparse.SUPPRESS)
    return p.parse_args()

def main()->int:
    a = arguments()
    if a.worker: return print(json.dumps(row(a.worker))) or 0
    if a.profile: return print(*map(profiled, a.profile), sep='\n') or 0
    from coverage import zoo
    names,rows = a.only or (zoo() if a.all else SOME),{} if a.fresh else read_rows(a.out)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    print(HEAD, '|'.join([''] + ['---']*(len(STAGES)+5) + ['']), sep='\n', flush=True)
    for s in names:
        if s not in rows and not a.report:
            rows[s] = run_one(s, a.timeout)
            with a.out.open('a') as f: f.write(json.dumps(rows[s])+'\n')
        if s in rows: print(line(rows[s]), flush=True)
    mine = [rows[s] for s in names if s in rows]
    print('', summary(mine), sep='\n')
    good = [r['passes'] for r in mine if 'fail' not in r]
    return 0 if len(good)==len(names) and statistics.median(good)<=MOST else 1

if __name__=='__main__':
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    sys.exit(main())
