"Progressive kernel pruning beside kernel pruning in one shot: ResNet-20 on CIFAR-10, equal short training: `python benchmarks/pkp.py`"
import time
from copy import deepcopy
from statistics import mean, stdev
from rows import keep, no_bars, parser, read, run, said
import torch
from torch import nn
from fasterprune.all import KeepZeros, Pruner, Sparsifier, SparsifyCallback, agp
from fasterprune.callback.kernel_progressive import PKPCallback
from fasterprune.sparse.kernel_progressive import PKP
from cifar import CACHE, DATA, FAST, correct, network, ready, tuned

SPARSITIES,SEEDS,STEPS,BATCH,END = (.5,.7,.8),(0,1,2),150,128,.2 # END: chosen by training images, at 80 % and seed 0
METHODS = dict(
    once_local='one shot, the same part of each layer, lowest L1 norm',
    once_global='one shot, one ranking over all layers, L1 norm over the mean of the layer',
    gradual_local='the same as once_local, but by AGP over the first fifth of the training',
    gradual_global='the same as once_global, but by AGP over the first fifth of the training',
    pkp_once='PKP: both stages before the training',
    pkp='PKP: three rounds of each stage over the first fifth of the training',
    pkp_smioc='the same, ranked by what a kernel is to both its channels')
ONCE,OURS = ('once_local','once_global'),('pkp','pkp_smioc')

# -- one measurement ------------------------------------------------------------------------------
def chosen(method, model, sparsity):
    "What chooses kernels: masks that hold from the beginning, or a callback"
    how = dict(granularity='kernel', only=nn.Conv2d)
    if method=='dense': return None
    if method in ONCE: return KeepZeros(Sparsifier(model, context=method.removeprefix('once_'), **how).sparsify(sparsity))
    if method.startswith('gradual_'): return SparsifyCallback(sparsity, context=method.removeprefix('gradual_'), schedule=agp(end=END), every=10, **how)
    if method=='pkp_once': return KeepZeros(PKP(model, torch.randn(2,3,32,32)).sparsify(sparsity))
    return PKPCallback(sparsity, end=END, mode='smioc' if method=='pkp_smioc' else 'norm')

@torch.no_grad()
def kernels(model):
    "Facts about the kernels of all convolutions, counted in the weights"
    zero = {n:(m.weight==0).flatten(2).all(2) for n,m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return dict(gone=sum(int(z.sum()) for z in zero.values()), kernels=sum(z.numel() for z in zero.values()),
                unread=sum(int(z.all(0).sum()) for z in zero.values()), unwritten=sum(int(z.all(1).sum()) for z in zero.values()))

def measure(job, data, cache):
    "One row"
    d,m = ready(data, cache)
    began,small = time.perf_counter(),deepcopy(m)
    cb = chosen(job['method'], small, job['sparsity'])
    small = tuned(small, d, job['seed'], job['steps'], BATCH, [] if cb is None else [cb])
    row = dict(job, **kernels(small), accuracy=correct(small, d, bf16=FAST), seconds=time.perf_counter()-began)
    r = Pruner(small, torch.randn(2,3,32,32)).prune()
    return row|dict(removed=r.removed, params=r.params[1]/r.params[0], macs=r.macs[1]/r.macs[0])

# -- what is measured -----------------------------------------------------------------------------
KEY = ('method','sparsity','seed','steps')
key = lambda r: tuple(r[k] for k in KEY)

def jobs(a):
    "All methods and sparsities before the next seed"
    for s in a.seeds:
        yield dict(method='dense', sparsity=0., seed=s, steps=a.steps)
        for v in a.sparsities:
            for n in a.only: yield dict(method=n, sparsity=v, seed=s, steps=a.steps)

def line(r): return f"{r['method']:<14} {r['sparsity']:.0%} seed {r['seed']}  {r['accuracy']:.4f}  {r['gone']} of {r['kernels']} kernels gone, {r['unread']} inputs unread, {r['unwritten']} filters empty, {r['removed']} removed  {r['seconds']:.0f} s"

# -- what is said ---------------------------------------------------------------------------------
def cells(rows, a, method, sparsity, field='accuracy'):
    "Seed → number"
    return {r['seed']:r[field] for r in rows if r['method']==method and r['sparsity']==sparsity and r['steps']==a.steps}

def percent(c): return [100*v for v in c.values()]

def difference(rows, a, one, other, sparsity):
    "Points, seed by seed"
    x,y = cells(rows, a, one, sparsity),cells(rows, a, other, sparsity)
    return [100*(x[s]-y[s]) for s in x if s in y]

def table(rows, a):
    "Markdown: accuracy on all test images, percent"
    head = '| | '+' | '.join(f'{v:.0%} of the kernels' for v in a.sparsities)+' |\n|---|'+'---|'*len(a.sparsities)
    out = [f"After {a.steps} steps of {BATCH} images. Accuracy in percent, mean ± standard deviation of the seeds; the network that nothing was taken from: {said(percent(cells(rows, a, 'dense', 0.)))} %.", '', head]
    out += [f"| {n} | "+' | '.join(said(percent(cells(rows, a, n, v))) for v in a.sparsities)+' |' for n in METHODS]
    out += ['', 'Points that PKP is better, seed by seed.', '', head]
    out += [f"| {p} − {o} | "+' | '.join(said(difference(rows, a, p, o, v)) for v in a.sparsities)+' |' for p in OURS for o in METHODS if not o.startswith('pkp')]
    out += ['', 'What can be removed afterwards: input channels that nobody reads and filters without a kernel, in all convolutions; and the part of the multiplications that is left after `Pruner(model, x).prune()`.', '', head]
    facts = lambda n,v: [cells(rows, a, n, v, f).values() for f in ('unread','unwritten','macs')]
    out += [f"| {n} | "+' | '.join('' if not f[0] else f"{mean(f[0]):.0f}, {mean(f[1]):.0f}; {mean(f[2]):.1%}" for f in (facts(n, v) for v in a.sparsities))+' |' for n in METHODS]
    return '\n'.join(out+['', *[f'- `{n}`: {what}' for n,what in METHODS.items()], '', verdict(rows, a)])

def verdict(rows, a):
    "Is PKP at least as good on average?"
    res = []
    for p in OURS:
        d = {o:[x for v in a.sparsities for x in difference(rows, a, p, o, v)] for o in ONCE}
        res += [f"`{p}` is {'at least as good as' if mean(x)>=0 else 'not as good as'} `{o}` on average: {mean(x):+.2f} points over {len(x)} pairs." for o,x in d.items() if x]
    return ' '.join(res)

def picture(rows, a, path):
    "Accuracy by sparsity; bars are standard deviations"
    import matplotlib; matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    fig,ax = plt.subplots(figsize=(5.6,3.4), layout='constrained')
    for i,(n,c) in enumerate(zip(METHODS, ('#7F7F7F','#56B4E9','#B8A800','#E69F00','#CC79A7','#0072B2','#D55E00'))):
        p = [(v+.004*(i-3), percent(cells(rows, a, n, v))) for v in a.sparsities]
        p = [(v,y) for v,y in p if y]
        if p: ax.errorbar([v for v,_ in p], [mean(y) for _,y in p], yerr=[stdev(y) if len(y)>1 else 0 for _,y in p], fmt='o-', ms=3.5, lw=1.1, color=c, label=n)
    dense = percent(cells(rows, a, 'dense', 0.))
    if dense: ax.axhline(mean(dense), color='black', lw=.9, ls=':', label='dense')
    ax.set_xlabel('part of the kernels that is zero', fontsize=8.5); ax.set_ylabel('test accuracy, percent', fontsize=8.5)
    ax.tick_params(labelsize=8); ax.spines[['top','right']].set_visible(False); ax.grid(axis='y', color='#E6E6E6', lw=.6); ax.legend(fontsize=7.5, frameon=False)
    fig.savefig(path, dpi=130); plt.close(fig)

def main():
    p = parser(__doc__, DATA, CACHE)
    p.add_argument('--only', nargs='*', default=list(METHODS), choices=list(METHODS)); p.add_argument('--steps', type=int, default=STEPS)
    p.add_argument('--sparsities', nargs='*', type=float, default=SPARSITIES); p.add_argument('--seeds', nargs='*', type=int, default=SEEDS)
    a = p.parse_args()
    a.rows,until = a.cache/'pkp.jsonl',time.time()+60*a.minutes
    no_bars()
    if not a.report:
        if not network(a): return
        run(list(jobs(a)), key, measure, line, a, until)
    rows = read(a.rows)
    if not rows: print('nothing has been measured yet'); return
    picture(rows, a, a.rows.with_suffix('.png')); keep(table(rows, a), a)

if __name__=='__main__': main()
