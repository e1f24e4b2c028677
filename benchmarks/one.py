"One model, both engines, one process: prints the row as JSON, again after each step, the last line counts"
import gc, json, os, resource, signal, statistics, sys, time, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
from copy import deepcopy
import torch
from torch import nn
from torch.utils._pytree import tree_map
from fasterprune.surgery.capture.trace import tensors_in
from fasterprune.surgery.capture.tracer import capture, capture_all
from fasterprune.surgery.analysis.cost import n_params, trace_macs
from fasterprune.surgery.coupling.couple import Coupling
from fasterprune.surgery.pruner import Pruner
from attention import attention
from models import batch_of, build, is_detector, targets
from passes import call, forward_seconds

QUICK = 5. # s; what is faster is measured three times
clock = time.process_time # one thread: what other programs do on the machine counts for nothing

def shapes(out): return [tuple(t.shape) for t in tensors_in(out)]
def first_line(e): return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:400]}"

def tiny(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()

# the two engines

def ours(m, x):
    "Seconds of capture, coupling, plan and cut, and the report"
    start = clock()
    r = Pruner(m, x).prune(.5, verify=False)
    return clock()-start,r

def peer(m, x, ignored):
    "Seconds of the peer's construction and step, as its documentation does it"
    import torch_pruning as tp
    heads = {l:h for a in m.modules() if isinstance(h := getattr(a, 'num_heads', getattr(a, 'num_attention_heads', None)), int)
        for k in ('qkv', 'q', 'k', 'v', 'query', 'key', 'value', 'q_proj', 'k_proj', 'v_proj', 'q_lin', 'k_lin', 'v_lin') if isinstance(l := getattr(a, k, None), nn.Linear)}
    layers = [m.get_submodule(n) for n in ignored]
    example = x if isinstance(x, dict) else x if isinstance(x, tuple) else (x,)
    start = clock()
    p = tp.pruner.MagnitudePruner(m, example, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=.5, ignored_layers=layers, num_heads=heads,
        output_transform=lambda out: [t for t in tensors_in(out) if t.grad_fn is not None])
    p.step()
    if hasattr(m, 'conv_proj') and hasattr(m, 'hidden_dim'): m.hidden_dim = m.conv_proj.out_channels # torchvision's ViT, by hand
    return clock()-start,None

def last_layers(m, report)->list:
    "Names of the layers that the peer is told to leave alone: those that write the output"
    own = dict(m.named_modules())
    words = getattr(m, 'get_output_embeddings', lambda: None)() # tied to the input's, whose name a pin says
    pinned = {n for n,k,a,why in report.plan.pins if k==a and 'output of the model' in why} if report is not None else ()
    if report is not None: return [n for n,l in own.items() if isinstance(l, (nn.Linear, nn.modules.conv._ConvNd)) and (n in pinned or l is words)]
    return [n for n,l in own.items() if getattr(l, 'out_features', getattr(l, 'out_channels', 0)) in (1000, 91, 21, 400)]

class limit:
    "Raise TimeoutError in the block after so many seconds"
    def __init__(self, seconds): self.seconds = seconds
    def __enter__(self): signal.signal(signal.SIGALRM, self.stop); signal.setitimer(signal.ITIMER_REAL, self.seconds, 1) # again each second: the code inside may catch it
    def __exit__(self, *_): signal.setitimer(signal.ITIMER_REAL, 0)
    def stop(self, *_): raise TimeoutError(f"not done after {self.seconds:.0f} s")

# the row

class Row(dict):
    "What is known so far; `step` notes a failure and goes on"
    def emit(self): print(json.dumps(self, default=str), flush=True)
    def step(self, name, f, *args):
        self['at'] = name
        self.emit()
        try: return f(*args)
        except Exception as e: self.setdefault('fail', {})[name] = first_line(e)

def timed(row, model, x, with_peer, seconds):
    "Times of both engines in turns, each on fresh copies, and the first model of each"
    times,kept,report = dict(ours=[], peer=[]),{},None
    for rep,order in enumerate((('ours','peer'), ('peer','ours'), ('ours','peer'))):
        for who in order:
            if who=='peer' and not with_peer or who in row.get('fail', {}) or rep and times[who][0]>QUICK: continue
            m = deepcopy(model)
            gc.collect()
            def run():
                with limit(seconds): return ours(m, x) if who=='ours' else peer(m, x, last_layers(m, report))
            res = row.step(who, run)
            if res is None: continue
            times[who].append(res[0])
            report = report or res[1]
            kept.setdefault(who, m)
    for who,t in times.items():
        if t: row[f'{who}_s'],row[f'{who}_all'] = statistics.median(t),t
    return kept,report

def stages(row, model, x):
    "Where our time goes, and what a plan lists as free"
    t = [clock()]
    trace = capture_all(model, x); t.append(clock())
    Coupling(model, trace); t.append(clock())
    p = Pruner(model, x); p.plan(.5); t.append(clock())
    listed = attention(Coupling(model, trace)) # before the plan's dry runs pinned anything
    a,b,c = (j-i for i,j in zip(t, t[1:]))
    row.update(captured='fake' if trace.fake else 'real', nodes=len(trace.nodes), stages=dict(capture=a, couple=b, plan=c-a-b, apply=row.get('ours_s', c)-c))
    row['attention'] = attention(p.coupling)
    row['coarse'] = {n:.5 for k in ('heads', 'head_dim') for n in listed['groups'][k]} if listed else {}
    row['groups'] = len(p.coupling.groups)
    row['pins'] = [q for q in p.coupling.pins() if 'output of the model' not in q[3]][:30]

@torch.no_grad()
def louder(m):
    "Weights that keep the scale of the signal when half of the channels go; else it fades in a deep network and nothing is tested"
    for l in m.modules():
        if isinstance(l, (nn.modules.conv._ConvNd, nn.Linear)) and isinstance(l.weight, nn.Parameter): l.weight *= 2**.5
    return m

@torch.no_grad()
def awake(m, x):
    "BatchNorms with the statistics of two images, as after training; untrained ones let the signal fade too"
    norms = [l for l in m.modules() if isinstance(l, nn.modules.batchnorm._BatchNorm) and l.running_mean is not None]
    if not norms: return m
    was = [l.momentum for l in norms]
    for l in norms: l.train().momentum = 1.
    call(m, tree_map(lambda t: torch.randn(t.shape) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, batch_of(x, 2)))
    for l,k in zip(norms, was): l.momentum = k
    return m.eval()

@torch.no_grad()
def alive(m, x)->float|None:
    "How much the outputs differ between two inputs, relative to the largest; None where their shapes differ"
    gen = torch.Generator().manual_seed(1)
    new = lambda t: torch.randn(t.shape, generator=gen) if t.is_floating_point() else t.flip(-1)
    a,b = ([t for t in tensors_in(call(m, v)) if t.is_floating_point()] for v in (x, tree_map(lambda t: new(t) if isinstance(t, torch.Tensor) else t, x)))
    return max(((i-j).abs().max()/i.abs().max().clamp(min=1e-30)).item() for i,j in zip(a, b)) if a and shapes(a)==shapes(b) and all(t.numel() for t in a) else None

def verified(row, model, x, how=.5, key='law'):
    "The law checked on a fresh copy"
    m = awake(deepcopy(model), x)
    if not is_detector(row['model']): louder(m) # louder scores would all be 1, in no order
    start = clock()
    r = Pruner(m, x).prune(how)
    seconds = clock()-start
    row[key] = dict(error=r.error, law=r.law, dtype=r.dtype, removed=r.removed, statistics=[f"{g}: {why}" for g,why in r.plan.mixed][:3], text=next((l for l in repr(r).splitlines() if l.startswith('verified')), ''),
        seconds=seconds, signal=alive(m, x))

@torch.no_grad()
def forward(m, x, want=None):
    got = shapes(call(m, x))
    if want is not None and got!=want: raise ValueError(f"outputs have shapes {got[:4]}, not {want[:4]}")

def backward(m, x, detector):
    "Training mode, batch 2: the mean of each floating point output, or a detector's losses"
    m.train()
    x = batch_of(x, 2)
    out = m(x[0], targets(m, 2, x[0][0].shape[-1])) if detector else call(m, x)
    sum(t.mean() for t in tensors_in(out) if t.is_floating_point() and t.grad_fn is not None).backward()
    grads = [p.grad for p in m.parameters() if p.grad is not None]
    if not grads or not all(g.isfinite().all() for g in grads): raise ValueError(f"{len(grads)} gradients, of which {sum(not g.isfinite().all() for g in grads)} are not finite")
    m.eval()

def run(spec, with_peer=True, seconds=100., only=False):
    "All steps for one model; `only` those that the peer's numbers need"
    row,detector = Row(model=spec),is_detector(spec)
    built = row.step('build', build, spec)
    if built is None: return row
    model,x = built
    ours(tiny(), torch.randn(1, 3, 16, 16))
    if with_peer: peer(tiny(), torch.randn(1, 3, 16, 16), ['6'])
    row['forward_s'] = row.step('forward', forward_seconds, model, x)
    kept,report = timed(row, model, x, with_peer, seconds)
    if report is not None: row.update(params=report.params, macs=report.macs, kept=report.params[1]/report.params[0], macs_kept=report.macs[1]/max(report.macs[0], 1), removed=report.removed)
    if not only: row.step('stages', stages, row, model, x)
    want = {n: None if detector else row.step('shapes', lambda: [tuple(t.shapes[r.id]) for t in [capture(model, batch_of(x, n))] for r in t.outputs]) for n in (1,2)}
    if 'peer' in kept:
        m = kept.pop('peer')
        row['peer_works'] = row.step('peer_forward', lambda: forward(m, x, want[1]) or True) or False
        row['peer_kept'] = n_params(m)/n_params(model)
        if row['peer_works']: row['peer_macs_kept'] = row.step('peer_macs', lambda: trace_macs(capture(m, x))/max(trace_macs(capture(model, x)), 1))
        del m
    if 'ours' in kept and not only:
        m = kept.pop('ours')
        for n in (1,2): row[f'forward_{n}'] = row.step(f'forward_{n}', lambda: forward(m, batch_of(x, n), want[n]) or True) or False
        row['backward'] = row.step('backward', lambda: backward(m, x, detector) or True) or False
        del m
        row.step('law', verified, row, model, x)
        if row.get('coarse'): row.step('heads', verified, row, model, x, row['coarse'], 'heads_law')
    row['at'] = 'done'
    return row

if __name__=='__main__':
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    most = int(.8*os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_PHYS_PAGES')) # more is an error here, and not the end of other processes
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    spec,who,seconds = sys.argv[1],(sys.argv[2:3] or ['peer'])[0],float((sys.argv[3:4] or [100])[0])
    run(spec, who!='no-peer', seconds, who=='only-peer').emit()
