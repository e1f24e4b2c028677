"Which criterion keeps a network best? ResNet-20 on CIFAR-10, two to four times fewer multiplications: `python benchmarks/criteria.py`"
import json, time
from copy import deepcopy
from functools import lru_cache
from statistics import mean, stdev
from rows import keep, no_bars, parser, read, run, said
import torch
from fasterprune.all import Budget, Pruner, apply_, criteria, evaluate
from fasterprune.criteria.norm import random
from fasterprune.surgery.analysis.scores import evidence_for
from fasterprune.surgery.coupling.couple import couple
from cifar import CACHE, DATA, FAST, Images, correct, drawn, held, network, normalised, part, ready, resnet20, tuned

SPEEDUPS,SEEDS,STEPS,BATCH,CALIBRATION = (2,3,4),(0,1,2),150,128,8
HOW = dict(budget='one ranking over all layers', uniform='the same part of each layer')

# -- one measurement ------------------------------------------------------------------------------
def few(d, seed): return drawn(d, CALIBRATION*BATCH, 100+seed).split(BATCH)

def calibration(d, seed):
    "Batches of training images without augmentation, the same for every criterion"
    return [(normalised(d['train_x'][i]),d['train_y'][i]) for i in few(d, seed)]

@lru_cache(None)
def uniform(speedup):
    "Group → the least part that reaches a speedup: the same for all, but that the first groups may be a 64th behind"
    m,x = resnet20().eval(),torch.randn(2,3,32,32)
    groups = [g.name for g in couple(m, x).groups if g.primary]
    shares = lambda step: {n:(step//len(groups)+(i>=len(groups)-step%len(groups)))/64 for i,n in enumerate(groups)} # a step: one group loses a 64th more
    def reached(step):
        r = Pruner(deepcopy(m), x).prune(shares(step), criterion='first_k', verify=False)
        return r.macs[1]/r.macs[0]<=1/speedup
    low,high = 0,len(groups)*60
    while high-low>1: low,high = (low,mid) if reached(mid := (low+high)//2) else (mid,high)
    return shares(high)

def criterion_of(name, seed): return random(seed) if name=='random' else criteria[name]

@lru_cache(1)
def known(name, seed, data, cache):
    "What a criterion finds out by itself serves all speedups; none for one that needs no data"
    d,m = ready(data, cache)
    c = criterion_of(name, seed)
    return c,evidence_for(c, m, calibration(d, seed), n_batches=CALIBRATION, loss_func=torch.nn.CrossEntropyLoss()) if needs_data(c) else None

def asked(how, speedup):
    "What a pruner is told"
    return dict(budget=Budget(macs=1/speedup), max_ratio=.9) if how=='budget' else dict(sparsity=uniform(speedup))

def smaller(m, x, how, speedup, c, evidence):
    "A pruned copy, and seconds of choosing"
    told,began = asked(how, speedup),time.perf_counter()
    plan = Pruner(m, x).plan(criterion=c, data=evidence, **told)
    return apply_(deepcopy(m), plan),time.perf_counter()-began

@lru_cache(1)
def whole(data, cache): return evaluate(ready(data, cache)[1], torch.randn(2,3,32,32), effective=False)

def needs_data(c): return 'data' in c.needs

def recalibrated(m, d, seed):
    "BatchNorm statistics of the smaller network, from training images"
    m,bns = deepcopy(m),[]
    for k in m.modules():
        if isinstance(k, torch.nn.BatchNorm2d): k.reset_running_stats(); k.momentum = None; bns.append(k)
    images = Images(d['train_x'], d['train_y'], True, seed) # cropped and flipped as in training: without, the network as it is loses three points
    m.train()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=FAST):
        for at in few(d, 50+seed): m(images.batch(at)[0])
    return m.eval()

def measure(job, data, cache):
    "One row"
    stage,name,how,speedup,seed = (job[k] for k in ('stage','criterion','how','speedup','seed'))
    d,m = ready(data, cache)
    row,began = dict(job),time.perf_counter()
    if name=='dense': small = m
    else:
        x = torch.randn(2,3,32,32)
        try: small,row['cut_s'] = smaller(m, x, how, speedup, *known(name, seed, data, cache))
        except Exception as e: return row|dict(refused=f"{type(e).__name__}: {e}"[:400])
        before,after = whole(data, cache),evaluate(small, x, effective=False)
        row.update(macs=after.macs/before.macs, params=after.params/before.params)
    if stage=='shot':
        again = recalibrated(small, d, seed)
        row.update(accuracy=correct(small, d, bf16=FAST), recalibrated=correct(again, d, bf16=FAST), choice=correct(again, dict(zip(('test_x','test_y'), part(d, 'train', held(d)))), bf16=FAST))
    else: row.update(accuracy=correct(tuned(deepcopy(small), d, seed, STEPS, BATCH), d, bf16=FAST))
    return row|dict(seconds=time.perf_counter()-began)

# -- what is measured -----------------------------------------------------------------------------
KEY = ('stage','criterion','how','speedup','seed')
key = lambda r: tuple(r[k] for k in KEY)

def shots(names):
    "One shot, all criteria before the next seed; where neither the network nor the data changes with the seed, one run says it all"
    yield dict(stage='shot', criterion='dense', how='budget', speedup=1, seed=0)
    for s in SEEDS:
        for n in sorted(names, key=lambda n: n!='random'):
            if s==SEEDS[0] or n=='random' or needs_data(criteria[n]):
                for how in HOW:
                    for v in SPEEDUPS: yield dict(stage='shot', criterion=n, how=how, speedup=v, seed=s)

def best(rows, names, k=2):
    "(criterion, how) of the best `k` of each family, by training images after recalibration, mean over speedups and seeds; random in both"
    found = {}
    for n in names:
        if criteria[n].family=='control': continue # random is tuned in any case
        for how in HOW:
            v = [r['choice'] for r in rows if key(r)[:3]==('shot',n,how) and 'choice' in r]
            if v and len({r['speedup'] for r in rows if key(r)[:3]==('shot',n,how) and 'choice' in r})==len(SPEEDUPS):
                if mean(v)>found.get(n, (0,))[0]: found[n] = (mean(v),how)
    families = {}
    for n in found: families.setdefault(criteria[n].family, []).append(n)
    chosen = [n for ns in families.values() for n in sorted(ns, key=lambda n: -found[n][0])[:k]]
    return [('random',h) for h in HOW]+[(n,found[n][1]) for n in chosen]

def tunings(rows, names):
    "Short fine-tuning of the best, of random, and of the network that nothing was removed from"
    for s in SEEDS:
        yield dict(stage='tuned', criterion='dense', how='budget', speedup=1, seed=s)
        for v in SPEEDUPS:
            for n,how in best(rows, names): yield dict(stage='tuned', criterion=n, how=how, speedup=v, seed=s)

def line(r):
    said = r.get('refused') or f"{r['accuracy']:.4f}"+(f"  recalibrated {r['recalibrated']:.4f}" if 'recalibrated' in r else '')+f"  MACs {r.get('macs', 1):.3f}  {r['seconds']:.1f} s"
    return f"{r['stage']:<5} {r['criterion']:<14} {r['how']:<7} {r['speedup']}× seed {r['seed']}  {said}"

# -- what is said ---------------------------------------------------------------------------------
def cell(rows, stage, name, how, speedup, field='accuracy'):
    "Accuracies of the seeds"
    return [100*r[field] for r in rows if key(r)[:4]==(stage,name,how,speedup) and field in r]

def ordered(names): return ['random',*sorted((n for n in names if n!='random'), key=lambda n: (criteria[n].family, n))]

def table(rows, names):
    "Markdown: accuracy on all test images, percent"
    dense = cell(rows, 'shot', 'dense', 'budget', 1)
    out = [f"Dense: {said(dense)} %; after the same fine-tuning {said(cell(rows, 'tuned', 'dense', 'budget', 1))} %. Accuracy in percent, mean ± standard deviation of the seeds (one number: the seed changes nothing).", '']
    kinds = [('one shot','shot','accuracy'),('one shot, BatchNorm recalibrated','shot','recalibrated'),(f'{STEPS} steps of fine-tuning','tuned','accuracy')]
    for title,stage,field in kinds:
        for how,what in HOW.items():
            lines = [(n,[said(cell(rows, stage, n, how, v, field)) for v in SPEEDUPS]) for n in ordered(names)]
            if not any(any(c) for _,c in lines): continue
            out += [f"**{title[0].upper()+title[1:]}; {what}**", '', '| criterion | family | '+' | '.join(f'{v}×' for v in SPEEDUPS)+' |', '|---|---|'+'---|'*len(SPEEDUPS)]
            out += [f"| {n} | {criteria[n].family} | "+' | '.join(c)+' |' for n,c in lines if any(c)]+['']
    why = {(r['criterion'],r['how']):r['refused'] for r in rows if 'refused' in r and r['criterion'] in names}
    return '\n'.join(out+[f"- {n}, {HOW[h]}: {w}" for (n,h),w in why.items()])

def picture(rows, names, path):
    "Accuracy above or below random at the same speedup and in the same ranking, and how far random itself spreads"
    import matplotlib; matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    panels = [(t,s,f,h) for t,s,f in (('one shot','shot','accuracy'),('recalibrated','shot','recalibrated'),('fine-tuned','tuned','accuracy')) for h in HOW]
    panels = [p for p in panels if any(cell(rows, p[1], n, p[3], v, p[2]) for n in names if n!='random' for v in SPEEDUPS)]
    shown = [n for n in ordered(names) if n!='random' and any(cell(rows, s, n, h, v, f) for _,s,f,h in panels for v in SPEEDUPS)]
    if not shown: return
    fig,axs = plt.subplots(1, len(panels), figsize=(2.9*len(panels)+1, .24*len(shown)+1.3), sharey=True, layout='constrained', squeeze=False)
    for ax,(title,stage,field,how) in zip(axs[0], panels):
        for v,c,dy in zip(SPEEDUPS, ('#0072B2','#009E73','#D55E00'), (-.22,0,.22)):
            base = cell(rows, stage, 'random', how, v, field)
            if not base: continue
            if len(base)>1: ax.axvspan(-2*stdev(base), 2*stdev(base), color=c, alpha=.07, lw=0)
            for y,n in enumerate(shown):
                if got := cell(rows, stage, n, how, v, field): ax.errorbar(mean(got)-mean(base), y+dy, xerr=stdev(got) if len(got)>1 else None, fmt='o', ms=3.2, lw=.9, color=c, label=f'{v}×' if n==shown[0] else None)
        ax.axvline(0, color='black', lw=.9); ax.set_title(f"{title}\n{HOW[how]}", fontsize=8.5, loc='left'); ax.grid(axis='x', color='#E6E6E6', lw=.6)
        ax.spines[['top','right']].set_visible(False); ax.tick_params(labelsize=7.5); ax.set_xlabel('points above random', fontsize=8)
    axs[0,0].set_yticks(range(len(shown)), [f"{n} ({criteria[n].family})" for n in shown]); axs[0,0].set_ylim(len(shown)-.4, -.6)
    marks = [plt.Line2D([], [], marker='o', ls='', color=c, ms=4, label=f'{v}× fewer multiplications') for v,c in zip(SPEEDUPS, ('#0072B2','#009E73','#D55E00'))]
    fig.legend(handles=marks, loc='outside lower center', ncols=3, fontsize=8, frameon=False)
    fig.savefig(path, dpi=130); plt.close(fig)

def main():
    global SPEEDUPS, SEEDS
    p = parser(__doc__, DATA, CACHE)
    p.add_argument('--only', nargs='*', help='names of criteria; all by default'); p.add_argument('--shots', action='store_true', help='no fine-tuning')
    p.add_argument('--again', nargs='*', help='forget the rows of these criteria; without names, those that were refused')
    p.add_argument('--speedups', nargs='*', type=int, default=SPEEDUPS); p.add_argument('--seeds', nargs='*', type=int, default=SEEDS)
    a = p.parse_args()
    SPEEDUPS,SEEDS = tuple(a.speedups),tuple(a.seeds)
    a.rows,until = a.cache/'criteria.jsonl',time.time()+60*a.minutes
    names = ordered(a.only or list(criteria))
    if unknown := [n for n in names if n not in criteria]: raise SystemExit(f"no criterion {unknown[0]!r}; there are {', '.join(criteria)}")
    no_bars()
    if a.again is not None and a.rows.exists(): a.rows.write_text(''.join(json.dumps(r)+'\n' for r in read(a.rows) if not (r['criterion'] in a.again if a.again else 'refused' in r)))
    if not a.report:
        if not network(a): return
        measured = lambda jobs, together=None: run(list(jobs), key, measure, line, a, until, together)
        if measured(shots(names), lambda j: (j['criterion'], j['seed'])) and not a.shots: measured(tunings(read(a.rows), names))
    rows = read(a.rows)
    picture(rows, names, a.rows.with_suffix('.png')); keep(table(rows, names), a)

if __name__=='__main__': main()
