"""What surgery needs of memory: python benchmarks/memory.py [--scale 1.]

Three tasks, each in a process of its own, on a language model of the Llama type (embedding, blocks of RMSNorm, attention and gated MLP, output), at full scale:
plan: two billion parameters on the `meta` device, planned by 'first_k'. Under 4 GB and 60 s.
score: one billion parameters in float32, planned by 'l1'.
apply: the same network, a plan applied with `apply_`. Less than 1.2 times its size.
prune: the same, `Pruner.prune(verify=False)`, planning and all.
Peaks are those that the kernel saw (VmHWM), from where the task begins, on one thread."""
import argparse, json, os, re, subprocess, sys, time
from pathlib import Path

TASKS = dict(plan=2.05, score=1., apply=1., prune=1.) # billions of parameters

def status(key): return int(re.search(rf"{key}:\s+(\d+) kB", Path('/proc/self/status').read_text())[1])*1024
def reset_peak():
    try: Path('/proc/self/clear_refs').write_text('5')
    except OSError: pass # the peak is that since the start then, which is no smaller

def language_model(billions):
    "About so many parameters; a million and more blocks of the same kind, or few and narrow ones"
    import torch
    from torch import nn
    import torch.nn.functional as F
    width,hidden,heads,vocab = (2048,5632,32,32000) if billions>=.5 else (512,1408,8,8000)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.n1,self.n2 = nn.RMSNorm(width),nn.RMSNorm(width)
            self.q,self.k,self.v,self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
            self.gate,self.up,self.down = nn.Linear(width, hidden, bias=False),nn.Linear(width, hidden, bias=False),nn.Linear(hidden, width, bias=False)
        def forward(self, x):
            h = self.n1(x)
            q,k,v = (p(h).unflatten(-1, (-1, width//heads)).transpose(1, 2) for p in (self.q,self.k,self.v))
            x = x+self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            h = self.n2(x)
            return x+self.down(F.silu(self.gate(h))*self.up(h))

    class Model(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.embed,self.blocks,self.norm,self.out = nn.Embedding(vocab, width),nn.ModuleList(Block() for _ in range(n)),nn.RMSNorm(width),nn.Linear(width, vocab, bias=False)
        def forward(self, ids):
            x = self.embed(ids)
            for b in self.blocks: x = b(x)
            return self.out(self.norm(x))

    each,ends = 4*width**2+3*width*hidden,2*vocab*width
    with torch.device('meta'): return Model(max(round((billions*1e9-ends)/each), 1)).eval()

def filled(model):
    "The same with numbers, one tensor at a time"
    import torch
    model.to_empty(device='cpu')
    with torch.no_grad():
        for p in model.parameters(): p.normal_(std=.02)
    return model

def run(task, billions):
    import torch
    from fasterprune.surgery.cutting.apply import apply_
    from fasterprune.surgery.pruner import Pruner
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = language_model(billions)
    size,params = sum(p.numel()*4 for p in model.parameters()),sum(p.numel() for p in model.parameters())
    ids = torch.zeros(1, 16, dtype=torch.long, device='meta' if task=='plan' else 'cpu')
    if task!='plan': filled(model)
    plan = Pruner(model, ids).plan(.5, criterion='first_k') if task=='apply' else None
    reset_peak()
    before,t = status('VmRSS'),time.perf_counter()
    if task=='apply': apply_(model, plan)
    elif task=='prune': plan = Pruner(model, ids).prune(.5, criterion='first_k', verify=False).plan
    else: plan = Pruner(model, ids).plan(.5, criterion='l1' if task=='score' else 'first_k')
    t,peak = time.perf_counter()-t,status('VmHWM')
    return dict(task=task, parameters=params, removed=plan.removed, left=sum(p.numel() for p in model.parameters()), seconds=round(t, 2), peak_gb=round(peak/2**30, 3),
                extra_gb=round((peak-before)/2**30, 3), size_gb=round(size/2**30, 3), times_size=round((size+peak-before)/size, 3) if task!='plan' else None)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--task', choices=TASKS, help='only this one, in this process, as JSON')
    p.add_argument('--scale', type=float, default=1., help='part of the full size')
    a = p.parse_args()
    if a.task: print(json.dumps(run(a.task, TASKS[a.task]*a.scale))); return
    for task in TASKS:
        out = subprocess.run([sys.executable, __file__, '--task', task, '--scale', str(a.scale)], stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
        r = json.loads(out.stdout.splitlines()[-1])
        need = f"{r['times_size']:.3f}× its size of {r['size_gb']:.2f} GB" if r['times_size'] else f"{r['peak_gb']:.2f} GB in all"
        print(f"{task:<6} {r['parameters']/1e9:.3f} billion parameters ({r['left']/1e9:.3f} left): {r['seconds']:>6.2f} s, {need} (+{r['extra_gb']:.2f} GB; the whole process {r['peak_gb']:.2f} GB)", flush=True)

if __name__=='__main__': main()
