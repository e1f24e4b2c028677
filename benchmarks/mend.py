"What is won back without training: means, factors and BatchNorm, after filters went from ResNet-20 on CIFAR-10: `python benchmarks/mend.py`"
import time
from copy import deepcopy
from rows import keep, no_bars, parser, read, run, said
import torch
from fasterprune.all import Pruner
from cifar import CACHE, DATA, FAST, correct, network, ready
from criteria import HOW, SEEDS, SPEEDUPS, asked, calibration, criterion_of, recalibrated

CRITERIA = dict(random='budget', l2='budget', wanda='budget', thinet='uniform') # a selector chooses within a layer
WAYS = dict(nothing=(), means=('compensate',), factors=('rescale',), both=('compensate','rescale'))

# -- one measurement ------------------------------------------------------------------------------
def measure(job, data, cache):
    "One row"
    name,way,speedup,seed = (job[k] for k in ('criterion','way','speedup','seed'))
    (d,m),began = ready(data, cache),time.perf_counter()
    small,seen = deepcopy(m),calibration(d, seed)
    r = Pruner(small, torch.randn(2,3,32,32)).prune(criterion=criterion_of(name, seed), data=seen, verify=False, **asked(CRITERIA[name], speedup), **dict.fromkeys(WAYS[way], seen))
    return dict(job, macs=1/r.theoretical_speedup, accuracy=correct(small, d, bf16=FAST), recalibrated=correct(recalibrated(small, d, seed), d, bf16=FAST), seconds=time.perf_counter()-began)

KEY = ('criterion','way','speedup','seed')
key = lambda r: tuple(r[k] for k in KEY)
def jobs(): return [dict(criterion=c, way=w, speedup=v, seed=s) for s in SEEDS for c in CRITERIA for v in SPEEDUPS for w in WAYS]
def line(r): return f"{r['criterion']:<7} {r['way']:<8} {r['speedup']}× seed {r['seed']}  {r['accuracy']:.4f}  recalibrated {r['recalibrated']:.4f}  MACs {r['macs']:.3f}  {r['seconds']:.1f} s"

# -- what is said ---------------------------------------------------------------------------------
def cell(rows, field, *of): return [100*r[field] for r in rows if key(r)[:3]==of]

def table(rows):
    "Markdown: accuracy on all test images, percent"
    out = ['Accuracy in percent, mean ± standard deviation of the seeds.', '']
    for field,title in dict(accuracy='After the cut', recalibrated='BatchNorm recalibrated as well').items():
        out += [f"**{title}**", '', f"| criterion | fewer multiplications | {' | '.join(WAYS)} |", '|---|---|'+'---|'*len(WAYS)]
        out += [f"| {c}, {HOW[h]} | {v}× | {' | '.join(said(cell(rows, field, c, w, v)) for w in WAYS)} |" for c,h in CRITERIA.items() for v in SPEEDUPS]+['']
    return '\n'.join(out)

def picture(rows, path):
    "Accuracy by speedup, a panel for each criterion"
    import matplotlib; matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    fig,axs = plt.subplots(1, len(CRITERIA), figsize=(2.6*len(CRITERIA), 2.8), sharey=True, layout='constrained')
    for ax,c in zip(axs, CRITERIA):
        for (w,_),col in zip(WAYS.items(), ('#777777','#D55E00','#0072B2','#009E73')):
            for field,ls in dict(accuracy=':', recalibrated='-').items():
                got = [cell(rows, field, c, w, v) for v in SPEEDUPS]
                if all(got): ax.plot(SPEEDUPS, [sum(g)/len(g) for g in got], ls=ls, marker='o', ms=3, color=col, label=w if ls=='-' else None)
        ax.set_title(f"{c}\n{HOW[CRITERIA[c]]}", fontsize=8.5, loc='left'); ax.set_xticks(SPEEDUPS, [f'{v}×' for v in SPEEDUPS]); ax.grid(axis='y', color='#E6E6E6', lw=.6); ax.spines[['top','right']].set_visible(False)
    axs[0].set_ylabel('test accuracy, percent\n(dotted: BatchNorm as it was)', fontsize=8)
    fig.legend(*axs[0].get_legend_handles_labels(), loc='outside lower center', ncols=len(WAYS), fontsize=8, frameon=False)
    fig.savefig(path, dpi=130); plt.close(fig)

def main():
    a = parser(__doc__, DATA, CACHE).parse_args()
    a.rows,until = a.cache/'mend.jsonl',time.time()+60*a.minutes
    no_bars()
    if not a.report:
        if not network(a): return
        run(jobs(), key, measure, line, a, until, lambda j: (j['criterion'], j['seed']))
    rows = read(a.rows)
    if rows: picture(rows, a.rows.with_suffix('.png'))
    keep(table(rows), a)

if __name__=='__main__': main()
