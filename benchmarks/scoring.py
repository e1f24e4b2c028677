"What scoring costs: every criterion on a ResNet-50, against a forward pass of 16 images, and FPGM on a layer of 2048 filters: `python benchmarks/scoring.py [--only NAME ...]`"
import argparse, json, os, subprocess, sys, time, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
from statistics import median
from memory import reset_peak, status

def clocked(f, repeats, most=60.):
    "Median seconds of this process on one thread: what others do on this machine is not counted"
    runs,began = [],time.process_time()
    while len(runs)<repeats and (not runs or time.process_time()-began<most):
        t = time.process_time(); f(); runs.append(time.process_time()-t)
    return median(runs)

def one(name, model, batch, repeats):
    "A row, in this process"
    import torch
    from fastprogress import fastprogress
    from torch.nn import functional as F
    from torchvision import models
    from fasterprune.all import criteria
    from fasterprune.surgery.analysis.scores import evidence_for, group_scores
    from fasterprune.surgery.coupling.couple import couple
    fastprogress.NO_BAR,fastprogress.ConsoleProgressBar.fill = True,''
    torch.set_num_threads(1); torch.manual_seed(0); warnings.simplefilter('ignore')
    m = getattr(models, model)(weights=None).eval()
    x,y = torch.randn(batch,3,224,224),torch.randint(0, 1000, (batch,))
    def forward():
        with torch.no_grad(): m(x)
    if name=='forward': # the peak is that of the first pass
        reset_peak(); before = status('VmRSS'); forward(); peak = status('VmHWM')-before
        return dict(name=name, family='', needs=[], seconds=clocked(forward, repeats), ratio=1., peak_mb=peak/2**20)
    c,groups = criteria[name],[g for g in couple(m, x[:1]).groups if g.primary]
    def score():
        e = evidence_for(c, m, [(x, y)] if 'data' in c.needs else None, x[:1], n_batches=1, loss_func=F.cross_entropy) if c.stats else None
        return group_scores(m, groups, c, evidence=e)
    row = dict(name=name, family=c.family, needs=list(c.needs))
    reset_peak(); before = status('VmRSS')
    try: score()
    except Exception as e: return row|dict(refused=f"{type(e).__name__}: {e}"[:200])
    row['peak_mb'] = (status('VmHWM')-before)/2**20
    row['seconds'] = clocked(score, repeats)
    row['forward'] = clocked(forward, 3)
    return row|dict(ratio=row['seconds']/row['forward'])

def fpgm(repeats=5):
    "Seconds of FPGM on layers of 2048 filters"
    import torch
    from fasterprune.all import criteria
    from fasterprune.criteria.base import unit_scores
    torch.set_num_threads(1); torch.manual_seed(0)
    if 'fpgm' not in criteria: return {}
    for shape in ((2048,512,1,1),(2048,512,3,3)):
        w = torch.randn(shape); f = lambda: unit_scores(criteria['fpgm'], w, (1,2,3)); f()
        yield '×'.join(map(str, shape)),clocked(f, repeats)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--only', nargs='*', help='names of criteria; all by default'); p.add_argument('--model', default='resnet50', help='of torchvision')
    p.add_argument('--batch', type=int, default=16); p.add_argument('--repeats', type=int, default=5); p.add_argument('--limit', type=float, default=600, help='seconds for a criterion, on the wall')
    p.add_argument('--one', help='only this one, in this process, as JSON')
    a = p.parse_args()
    if a.one: print(json.dumps(one(a.one, a.model, a.batch, a.repeats))); return
    from fasterprune.all import criteria
    print(f"{a.model}, {a.batch} images of 224×224; seconds of the process on one thread, median of {a.repeats}; peak: what the first time added to the process\n\n| criterion | family | needs | s | forward passes | peak MB |\n|---|---|---|---|---|---|", flush=True)
    late = []
    for name in ['forward',*(a.only or criteria)]:
        cmd = [sys.executable, '-W', 'ignore', __file__, '--one', name, '--model', a.model, '--batch', str(a.batch), '--repeats', str(a.repeats)]
        try: out = subprocess.run(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=a.limit)
        except subprocess.TimeoutExpired: print(f"| {name} | | | over {a.limit:g} s | | |", flush=True); continue
        if out.returncode: print(f"| {name} | | | {out.stderr.strip().splitlines()[-1][:160]} | | |", flush=True); continue
        r = json.loads(out.stdout.splitlines()[-1])
        needs = ', '.join(r['needs'])
        if 'refused' in r: print(f"| {name} | {r['family']} | {needs} | {r['refused']} | | |", flush=True); continue
        print(f"| {name} | {r['family']} | {needs} | {r['seconds']:.3f} | {r['ratio']:.2f} | {r['peak_mb']:.0f} |", flush=True)
        if 'data' not in r['needs'] and name!='forward' and r['ratio']>1: late.append(name)
    print(f"\nwithout data, and longer than a forward pass: {', '.join(late) or 'none'}")
    for shape,s in fpgm(): print(f"fpgm on {shape}: {s:.3f} s {'ok' if s<1 else 'NO'}")
    sys.exit(bool(late))

if __name__=='__main__': main()
