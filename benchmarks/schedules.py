"When to remove? Half of the filters of a ResNet-20 on CIFAR-10, by five schedules, with equal training: `python benchmarks/schedules.py`"
import time
from copy import deepcopy
from statistics import mean
from rows import keep, no_bars, parser, read, run, said
import torch
from torch import nn
from fastai.callback.core import Callback
from fastai.learner import Recorder
from fasterprune.all import Patience, Pruner, ResumeCallback, SparsifyCallback, agp, iterative, one_cycle, one_shot
from cifar import CACHE, DATA, FAST, correct, held, learner, loaders, network, part, ready

SPARSITY,EPOCHS,SEEDS,BATCH,HALF = .5,8,(0,1,2),128,.5
METHODS = dict(
    one_shot='all at once, before the first epoch',
    iterative='three equal rounds in the first half of the training',
    agp='by AGP in the first half of the training',
    one_cycle='by the one-cycle schedule in the first half of the training',
    patience='three equal steps in the first half of the training: at once, and then whenever the loss of images that are not trained on has not fallen for an epoch',
    agp_whole='by AGP over the whole training: the last filters go at the beginning of the last epoch',
    patience_whole='three steps over the whole training')

# -- one training ---------------------------------------------------------------------------------
def chosen(method):
    "What makes the network sparse"
    make = lambda schedule, **kw: SparsifyCallback(SPARSITY, 'filter', criterion='l2', schedule=schedule, only=nn.Conv2d, **kw)
    patience = lambda end: make(None, every=Patience(patience=1, steps=3, at_once=True, end=end))
    return {} if method=='dense' else dict(one_shot=lambda: make(one_shot(start=0.)), iterative=lambda: make(iterative(3, start=0., end=HALF)), agp=lambda: make(agp(end=HALF)),
        one_cycle=lambda: make(one_cycle(end=HALF)), patience=lambda: patience(HALF), agp_whole=lambda: make(agp()), patience_whole=lambda: patience(1.))[method]()

@torch.no_grad()
def empty(model):
    "Part of the filters of all convolutions that is zero, counted in the weights"
    z = [(m.weight==0).flatten(1).all(1) for m in model.modules() if isinstance(m, nn.Conv2d)]
    return sum(int(v.sum()) for v in z)/sum(len(v) for v in z)

class Curve(Callback):
    "What a picture is made of. The test images are looked at after each epoch, and steer nothing"
    order = Recorder.order+1
    def __init__(self, d): self.points,self.test = [],lambda: d
    def after_epoch(self): self.points.append(dict(accuracy=correct(self.model, self.test(), bf16=FAST), sparsity=empty(self.model), valid_loss=float(self.recorder.values[-1][1])))

def measure(job, data, cache):
    "One row"
    d,m = ready(data, cache)
    began,curve = time.perf_counter(),Curve(d)
    rest = torch.ones(len(d['train_y']), dtype=torch.bool).index_fill_(0, held(d), False) # the others are for `patience`
    torch.manual_seed(job['seed'])
    learn = learner(deepcopy(m), loaders(part(d, 'train', rest), part(d, 'train', ~rest), BATCH, job['seed']), bf16=FAST)
    learn.path = cache
    cbs = [curve, ResumeCallback('schedules.{method}.{seed}.{epochs}'.format(**job)), *([cb] if (cb := chosen(job['method'])) else [])]
    with learn.no_logging(): learn.fit_one_cycle(job['epochs'], .05, div=5, pct_start=.2, moms=(.9,.9,.9), cbs=cbs)
    r = Pruner(learn.model.eval(), torch.randn(2,3,32,32)).prune()
    return dict(job, curve=curve.points, accuracy=curve.points[-1]['accuracy'], sparsity=curve.points[-1]['sparsity'], params=r.params[1]/r.params[0], macs=r.macs[1]/r.macs[0], seconds=time.perf_counter()-began)

# -- what is measured -----------------------------------------------------------------------------
def key(r): return tuple(r[k] for k in ('method','seed','epochs'))
def line(r): return f"{r['method']:<10} seed {r['seed']}  {r['accuracy']:.4f} with {r['sparsity']:.1%} of the filters zero, MACs {r['macs']:.3f} when they are removed  {r['seconds']:.0f} s"
def jobs(a): # first the five, then what is beside them
    beside = ['dense', *(n for n in a.only if n.endswith('_whole'))]
    return [dict(method=n, seed=s, epochs=a.epochs) for some in ([n for n in a.only if n not in beside], beside) for s in a.seeds for n in some]

# -- what is said ---------------------------------------------------------------------------------
def cells(rows, a, method, field='accuracy'):
    "Seed → number"
    return {r['seed']:r[field] for r in rows if r['method']==method and r['epochs']==a.epochs}

def table(rows, a):
    "Markdown: accuracy on all test images, percent"
    pct,base = lambda v: said([100*x for x in v]),cells(rows, a, 'one_shot')
    out = [f"After {a.epochs} epochs. Accuracy in percent, mean ± standard deviation of the seeds; the same training without removal: {pct(cells(rows, a, 'dense').values())} %.", '',
        '| schedule | accuracy | over one_shot, seed by seed | zero filters | MACs left |', '|---|---|---|---|---|']
    for n in METHODS:
        if c := cells(rows, a, n): out.append(f"| {n} | {pct(c.values())} | {pct([c[s]-base[s] for s in c if s in base])} | {mean(cells(rows, a, n, 'sparsity').values()):.1%} | {mean(cells(rows, a, n, 'macs').values()):.1%} |")
    return '\n'.join(out+['', *[f'- `{n}`: {what}' for n,what in METHODS.items()]])

COLORS = dict(one_shot='#7F7F7F', iterative='#56B4E9', agp='#0072B2', one_cycle='#009E73', patience='#D55E00', agp_whole='#CC79A7', patience_whole='#E69F00', dense='black')

def picture(rows, a, path):
    "Accuracy and sparsity by epoch: means, and a thin line for each seed"
    import matplotlib; matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    fig,axs = plt.subplots(2, 1, figsize=(6.4,5.6), sharex=True, layout='constrained', height_ratios=(2,1))
    for n,color in COLORS.items():
        found = [r['curve'] for r in rows if r['method']==n and r['epochs']==a.epochs]
        for ax,field in zip(axs, ('accuracy','sparsity')):
            if n=='dense' and field=='sparsity' or not found: continue
            ys,x = [[100*p[field] for p in c] for c in found],range(1, a.epochs+1)
            for y in ys: ax.plot(x, y, color=color, lw=.5, alpha=.4)
            ax.plot(x, [mean(v) for v in zip(*ys)], color=color, lw=1.6, ls=':' if n=='dense' else '-', marker='o', ms=3, label=n)
    for ax,what in zip(axs, ('test accuracy, percent','zero filters, percent')):
        ax.set_ylabel(what, fontsize=8.5); ax.tick_params(labelsize=8); ax.spines[['top','right']].set_visible(False); ax.grid(axis='y', color='#E6E6E6', lw=.6)
    axs[1].set_xlabel('epoch', fontsize=8.5); axs[0].legend(fontsize=7.5, frameon=False, ncols=2)
    fig.savefig(path, dpi=130); plt.close(fig)

def main():
    p = parser(__doc__, DATA, CACHE)
    p.add_argument('--only', nargs='*', default=list(METHODS), choices=list(METHODS)); p.add_argument('--epochs', type=int, default=EPOCHS); p.add_argument('--seeds', nargs='*', type=int, default=SEEDS)
    a = p.parse_args()
    a.rows,until = a.cache/'schedules.jsonl',time.time()+60*a.minutes
    no_bars()
    if not a.report:
        if not network(a): return
        run(jobs(a), key, measure, line, a, until)
    rows = read(a.rows)
    if not rows: print('nothing has been measured yet'); return
    picture(rows, a, a.rows.with_suffix('.png')); keep(table(rows, a), a)

if __name__=='__main__': main()
