"What a training step costs with SparsifyCallback, over one without, in turns with it: `python benchmarks/overhead.py`; a second call goes on, `--report` prints the table"
import argparse, json, os, sys, time, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.simplefilter('ignore')
from pathlib import Path
from statistics import median

STEPS = 100 # of an epoch
LIMIT_STEP,LIMIT_EPOCH = 1.03,1.05
CONTEXTS = ('local', 'global')

class Images: # 100 batches of noise, which cost nothing to read
    def __init__(self, batch):
        import torch
        self.n = STEPS*batch
        self.x,self.y = torch.randn(batch, 3, 32, 32),torch.randint(0, 10, (batch,))
    def __len__(self): return self.n
    def __getitem__(self, i): return self.x[i%len(self.x)],self.y[i%len(self.x)]

class Training:
    "A fit whose events are called one by one, so that two of them can take turns"
    def __init__(self, args, cbs=()):
        import torch, torchvision
        from fastai.data.core import DataLoaders
        from fastai.learner import Learner
        from fastai.losses import CrossEntropyLossFlat
        torch.manual_seed(0)
        data = Images(args.batch)
        self.batch = data.x,data.y
        self.learn = Learner(DataLoaders.from_dsets(data, data, bs=args.batch, num_workers=0, device='cpu'), getattr(torchvision.models, args.model)(num_classes=10), loss_func=CrossEntropyLossFlat())
        self.learn.remove_cb(self.learn.progress) if hasattr(self.learn, 'progress') else None
        self.learn.create_opt()
        self.begin(cbs)
    def begin(self, cbs=(), epoch=5, epochs=10): # in the middle of a training: schedules move
        l = self.learn
        l.add_cbs(cbs)
        l.n_epoch,l.epoch,l.dl,l.n_iter = epochs,epoch,l.dls.train,STEPS
        l('before_fit'); l.epoch = epoch; l('before_epoch')
        self.choice = clock(lambda: l('before_train')) # TrainEval's part of it is nothing
        self.i = 0
    def step(self):
        self.i += 1
        return clock(lambda: self.learn.one_batch(self.i, self.batch))
    def bare(self): # a step as if no callback masked: the same network in the same memory, where two learners differ by a percent or two
        return self.among(lambda cbs: [c for c in cbs if not masking(c)])[0]
    def inside(self, n): # median seconds of a step that pass in the callbacks; without what a step costs because its memory is not in the cache any more
        class Timed:
            def __init__(self, c): self.c,self.s = c,0.
            def __getattr__(self, k): return getattr(self.c, k)
            def __call__(self, event): self.s += clock(lambda: self.c(event))
        def step(): return sum(c.s for c in self.among(lambda cbs: [Timed(c) if masking(c) else c for c in cbs])[1] if isinstance(c, Timed))
        return median(step() for _ in range(n))
    def among(self, f): # (seconds of a step with other callbacks, these)
        from fastcore.foundation import L
        l,cbs = self.learn,self.learn.cbs
        l.cbs = L(f(cbs))
        try: return self.step(),l.cbs
        finally: l.cbs = cbs
    def end(self, cbs):
        from fasterprune.callback.keep_zeros import KeepZeros
        self.learn.remove_cbs(cbs); self.learn.remove_cb(KeepZeros)

def masking(c): # one of ours
    from fasterprune.callback.keep_zeros import KeepZeros
    from fasterprune.callback.sparsify import SparsifyCallback
    return isinstance(c, (KeepZeros, SparsifyCallback))

def clock(f):
    "Seconds of this process: what others do on this machine is not counted"
    t = time.process_time(); f(); return time.process_time()-t

def in_turns(base, other, n):
    "Median seconds of a step of each, and the median of the ratios"
    base(); other()
    pairs = [(base(), other()) if i%2 else (other(), base())[::-1] for i in range(n)]
    return dict(base=median(b for b,_ in pairs), step=median(o for _,o in pairs), ratio=median(o/b for b,o in pairs))

def free():
    "Criteria that need no data"
    from fasterprune.all import criteria
    return [n for n,c in criteria.items() if not {'data','training','gradients','labels'}&set(c.needs)]

def bytes_held(cb, learn): # by masks, each memory once, a weight
    from fasterprune.callback.keep_zeros import KeepZeros
    ts = [t for c in [cb, *[c for c in learn.cbs if isinstance(c, KeepZeros)]] for t in (*c.masks.keep.values(), *[f for _,f in getattr(c, '_pairs', None) or ()])]
    held = {t.untyped_storage().data_ptr():t.untyped_storage().nbytes() for t in ts}
    return sum(held.values())/sum(p.numel() for n,p in learn.model.named_parameters() if p.dim()>1)

def ours(args, other, have):
    "Steps once for each granularity: what a step costs follows from the masks. A choice for each criterion and context"
    from fasterprune.callback.sparsify import SparsifyCallback
    from fasterprune.granularity import granularities
    fresh = {n:t.clone() for n,t in other.learn.model.state_dict().items()} # dense: what is zero already makes a choice cheaper
    for g in args.granularities or list(granularities):
        steps = have.get(('steps', g))
        for context in args.contexts or CONTEXTS:
            for c in args.criteria or free():
                key = (g, context, c)
                if key in have and (steps is not None or 'refused' in have[key]): continue
                other.learn.model.load_state_dict(fresh)
                row = dict(who='fasterprune', granularity=g, context=context, criterion=c)
                try: cb = SparsifyCallback(.5, g, context, c)
                except (ValueError, TypeError) as e: yield row|dict(refused=str(e)); continue
                try:
                    setup = clock(lambda: other.begin([cb]))-other.choice
                    if steps is None:
                        steps = in_turns(other.bare, other.step, args.steps)
                        yield dict(who='fasterprune', granularity=g, steps=True, bytes=bytes_held(cb, other.learn), inside=other.inside(args.steps), **steps)
                    if key in have: continue
                    columns = clock(lambda: (cb.measured_sparsity(), cb.measured_compression()))
                    yield row|dict(setup=setup, choice=other.choice+columns)
                except Exception as e: yield row|dict(refused=str(e).split('\n')[-1].strip()) # fastai wraps what was refused when fit begins
                finally: other.end([cb])

def fasterai(args, base, have):
    "Its callback chooses in each batch while its schedule moves, so all its steps are measured"
    try:
        import builtins
        from fasterai.core.criteria import large_final
        from fasterai.core.schedule import agp, one_shot
        from fasterai.sparse.sparsify_callback import SparsifyCallback
    except ImportError as e: print(f'fasterai is not installed, so it is left out ({e}); pip install -r benchmarks/requirements.txt'); return
    for g,context,schedule in (('weight','local',agp), ('weight','global',agp), ('filter','local',agp), ('filter','global',agp), ('weight','local',one_shot), ('filter','local',one_shot)):
        name = schedule.__name__ if hasattr(schedule, '__name__') else 'one_shot' if schedule is one_shot else 'agp'
        if ('fasterai', g, context, name) in have: continue
        said,builtins.print = builtins.print,lambda *a, **k: None
        try:
            other = Training(args, [SparsifyCallback(.5, g, context, large_final, schedule)])
            steps = in_turns(base.step, other.step, args.steps)
        finally: builtins.print = said
        yield dict(who='fasterai', granularity=g, context=context, criterion='l1', schedule=name, epoch=steps['ratio'], **steps)

def torch_prune(args, base, have):
    "Masks of torch.nn.utils.prune: chosen once, and multiplied in each forward pass"
    from torch import nn
    from torch.nn.utils import prune
    for g in ('weight', 'filter'):
        if ('torch', g) in have: continue
        other = Training(args)
        layers = [m for m in other.learn.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        def choose():
            for m in layers: prune.l1_unstructured(m, 'weight', .5) if g=='weight' else prune.ln_structured(m, 'weight', .5, n=1, dim=0)
        choice = clock(choose)
        other.learn.create_opt() # the parameters are others now
        steps = in_turns(base.step, other.step, args.steps)
        yield dict(who='torch.nn.utils.prune', granularity=g, context='local', criterion='l1', choice=choice, epoch=steps['ratio']+choice/(STEPS*steps['base']), **steps)

def key_of(r):
    if r['who']=='fasterai': return 'fasterai',r['granularity'],r['context'],r['schedule']
    if r['who'].startswith('torch'): return 'torch',r['granularity']
    return ('steps',r['granularity']) if r.get('steps') else (r['granularity'],r['context'],r['criterion'])

def report(rows):
    "The table; True if all limits are met"
    ok,ours_ = True,[r for r in rows if r['who']=='fasterprune']
    print(f"{'granularity':<24}{'step':>7}{'inside':>8}{'epoch of 100 steps':>20}  slowest choice{'':<28}bytes a weight")
    for s in [r for r in ours_ if r.get('steps')]:
        choices = [r|dict(epoch=s['ratio']+r['choice']/(STEPS*s['base'])) for r in ours_ if r['granularity']==s['granularity'] and 'choice' in r]
        if not choices: continue
        worst = max(choices, key=lambda r: r['epoch'])
        many = sum(r['epoch']>LIMIT_EPOCH for r in choices)
        ok &= s['ratio']<=LIMIT_STEP and not many and s['bytes']<=1+1e-6
        what = f"{worst['criterion']}, {worst['context']}: {worst['choice']:.2f} s"
        print(f"{s['granularity']:<24}{s['ratio']:>7.3f}{1+s['inside']/s['base']:>8.3f}{median(r['epoch'] for r in choices):>10.3f} – {worst['epoch']:.3f}  {what:<42}{s['bytes']:.2f}"+(f"   {many} of {len(choices)} above {LIMIT_EPOCH}" if many else ''))
    for r in [r for r in rows if r['who']!='fasterprune']: print(f"{r['who']+', '+r['granularity']+', '+r['context']+' '+r.get('schedule', ''):<50} step {r['ratio']:.3f}  epoch {r['epoch']:.3f}")
    refused = [r for r in ours_ if 'refused' in r]
    print(f"{len([r for r in ours_ if 'choice' in r])} combinations measured, {len(refused)} are not defined")
    return ok

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--granularities', nargs='*'); p.add_argument('--contexts', nargs='*'); p.add_argument('--criteria', nargs='*', help='all that need no data, by default')
    p.add_argument('--model', default='resnet18', help='of torchvision'); p.add_argument('--batch', type=int, default=64); p.add_argument('--steps', type=int, default=31, help='of each, in turns')
    p.add_argument('--threads', type=int, default=1); p.add_argument('--out', default='.cache/overhead.jsonl'); p.add_argument('--report', action='store_true')
    args = p.parse_args()
    out = Path(args.out)
    rows = [json.loads(l) for l in out.read_text().splitlines()] if out.exists() else []
    if not args.report:
        import torch
        torch.set_num_threads(args.threads)
        have,base = {key_of(r):r for r in rows},Training(args)
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open('a') as f:
            for r in _all(args, base, have):
                rows.append(r); print(json.dumps(r), file=f, flush=True)
    sys.exit(0 if report(rows) else 1)

def _all(args, base, have):
    yield from torch_prune(args, base, have)
    yield from fasterai(args, base, have)
    yield from ours(args, Training(args), have)

if __name__=='__main__': main()
