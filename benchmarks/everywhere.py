"""Every small model of zoo.txt, pruned by half, goes where the dense one goes: `python benchmarks/everywhere.py --help`

compile with and without fullgraph, fx, script, export (also strict), deepcopy, pickle, a second pruning, another batch
size, another image size or length. A way that the dense model cannot go either is no failure; what a way computes must
be what plain eager mode computes."""
import argparse, inspect, io, json, os, signal, subprocess, sys, tempfile, time, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
from collections import Counter
from copy import deepcopy
from pathlib import Path
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import tree_map
from fasterprune.core import as_call
from fasterprune.surgery.coupling.couple import couple
from fasterprune.surgery.pruner import Pruner
from fasterprune.surgery.capture.trace import tensors_in
from attention import attention
from coverage import last_json, read_rows, zoo
from models import batch_of, build, is_detector
from one import Row, alive, awake, first_line, louder
from passes import call, taken
from unread import unread

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent/'.cache'/'everywhere.jsonl'
KEPT = HERE/'measured'
TYPES = 'bert gpt2 llama t5 vit mixtral whisper'.split() # Hugging Face, tiny random configurations
LARGEST,SLOWEST = 30e6,3. # Parameters and seconds of a forward pass; larger ones are left out
TOLERANCE = 1e-5
SAMPLE = '''torchvision:squeezenet1_1 torchvision:shufflenet_v2_x0_5 timm:test_vit timm:levit_128s
    timm:mobilevit_xxs'''.split() # Loaded by another process, too

def models()->list:
    "All of the zoo, and the Hugging Face types"
    return list(dict.fromkeys([*zoo(), *(f"transformers:{t}" for t in TYPES)]))

# comparing

def error(a, b)->float:
    "Largest difference of any output relative to the largest value of its own; infinite where the shapes differ"
    a,b = tensors_in(a),tensors_in(b)
    if [t.shape for t in a]!=[t.shape for t in b]: return float('inf')
    return max(map(one_error, a, b), default=0.)

def one_error(a, b)->float:
    "The same for one tensor; what is not finite must be the same"
    if not a.numel(): return 0.
    if not b.is_floating_point(): return float((a!=b).any())
    if not torch.equal(a.isfinite(), b.isfinite()): return float('inf')
    a,b = (torch.where(t.isfinite(), t, 0) for t in (a, b))
    return ((a-b).abs().max()/b.abs().max().clamp(min=1e-30)).item()

@torch.no_grad()
def plain(m, x): "Outputs in eager mode"; return call(m, x)

class limit:
    "Raise TimeoutError in the block after so many seconds of the processor; others on the machine count for nothing"
    def __init__(self, seconds): self.seconds = seconds
    def __enter__(self):
        signal.signal(signal.SIGPROF, self.stop)
        signal.setitimer(signal.ITIMER_PROF, self.seconds, 1) # again each second: the code inside may catch it
    def __exit__(self, *_): signal.setitimer(signal.ITIMER_PROF, 0)
    def stop(self, *_): raise TimeoutError(f"not done after {self.seconds:.0f} s of the processor")

# ways to run a model: (model, input, input of another batch size) → error

@torch.no_grad()
def fullgraph(m, x, more)->float:
    torch._dynamo.reset()
    return error(call(torch.compile(m, backend='eager', fullgraph=True), x), call(m, x))

@torch.no_grad()
def compiled(m, x, more)->float:
    "And once more with another batch size, for which the sizes become symbols"
    torch._dynamo.reset()
    c = torch.compile(m, backend='eager')
    return max(error(call(c, v), call(m, v)) for v in (x, more))

@torch.no_grad()
def fx(m, x, more)->float:
    g = torch.fx.symbolic_trace(m)
    return max(error(call(g, v), call(m, v)) for v in (x, more))

@torch.no_grad()
def script(m, x, more)->float:
    g = torch.jit.script(m)
    return max(error(call(g, v), call(m, v)) for v in (x, more))

@torch.no_grad()
def export(m, x, more, strict=False)->float:
    args,kwargs = as_call(x)
    return error(call(torch.export.export(m, tuple(args), kwargs, strict=strict).module(), x), call(m, x))

def strict(m, x, more)->float: return export(m, x, more, True)

def copied(m, x, more)->float: return error(plain(deepcopy(m), x), plain(m, x))

def pickled(m, x, more)->float:
    f = io.BytesIO()
    torch.save(m, f)
    f.seek(0)
    return error(plain(torch.load(f, weights_only=False), x), plain(m, x))

def elsewhere(m, x, more)->float:
    "Loaded and run by another process"
    with tempfile.TemporaryDirectory() as d:
        torch.save((m, x, plain(m, x)), Path(d)/'model.pt')
        cmd = [sys.executable, __file__, '--load', f"{d}/model.pt"]
        p = subprocess.run(cmd, capture_output=True, text=True, timeout=600)
    if p.returncode: raise RuntimeError(' '.join(p.stderr.strip().splitlines()[-1:]))
    return float(p.stdout.split()[-1])

WAYS = dict(fullgraph=fullgraph, compile=compiled, fx=fx, script=script, export=export, strict=strict,
    deepcopy=copied, pickle=pickled, process=elsewhere)

def tried(way, small, dense, seconds:float, *xs):
    "Error of a way, 'dense' where the dense model cannot go it either, or what is wrong"
    def go(m): # a copy: what fx traces may leave its proxies in the caches of a model
        with limit(seconds): return way(deepcopy(m), *xs)
    try:
        if (e := go(small))<=TOLERANCE: return e
        wrong = f"outputs differ by {e:.1e}"
    except Exception as ex: wrong = first_line(ex)
    try: return f"NO: {wrong}" if go(dense)<=TOLERANCE else 'dense'
    except Exception: return 'dense'

# what a pruned module is

def plain_class(small, dense):
    "Each module is an instance of its class with the signature of its forward, and no mode watches its calls"
    was = dict(dense.named_modules())
    for n,m in small.named_modules():
        if n not in was: continue
        if not isinstance(m, type(was[n])): return f"NO: {n or 'the model'} is no {type(was[n]).__name__}"
        a,b = (inspect.signature(k.forward) for k in (m, was[n]))
        if list(a.parameters)!=list(b.parameters): return f"NO: {n or 'the model'}.forward takes {a}, not {b}"
        if 'forward' in vars(m) and 'forward' not in vars(was[n]):
            return f"NO: {n or 'the model'} has a forward of its own"
    return 0.

def modes_of(m, x)->set:
    "Names of the torch function modes that are on while the modules of a model run"
    found = set()
    see = lambda *_: found.update(type(k).__name__ for k in _get_current_function_mode_stack())
    hooks = [k.register_forward_hook(see) for k in m.modules()]
    try: plain(m, x)
    finally:
        for h in hooks: h.remove()
    return found

# the law at other sizes

def fresh(x, seed:int):
    "Other values of the same kind"
    g = torch.Generator().manual_seed(seed)
    def one(t):
        if not isinstance(t, torch.Tensor): return t
        if t.is_floating_point(): return torch.randn(t.shape, generator=g, dtype=t.dtype)
        return torch.randint(3, 90, t.shape, generator=g) if t.dtype==torch.long else t
    return tree_map(one, x)

def resized(x)->list:
    "The same inputs with another image size or length, several to try"
    def to(more, times):
        def one(t):
            if not isinstance(t, torch.Tensor): return t
            if t.dim()>=3 and t.is_floating_point() and t.shape[-1]==t.shape[-2]:
                return t.new_zeros(*t.shape[:-2], *(times*s+more for s in t.shape[-2:]))
            if t.dim()!=2: return t
            return t.new_zeros(t.shape[0], t.shape[1]*3//4 if t.dtype==torch.long else t.shape[1]+480)
        return tree_map(one, x)
    return [to(32, 1), to(64, 1), to(0, 2), to(1, 1)]

def law(wide, small, plan, x)->float:
    "How far the pruned network is from the one in which nobody reads what is gone, in double precision if it can"
    want = unread(wide, small, plan)
    try: return error(plain(deepcopy(small).double(), doubled(x)), plain(want.double(), doubled(x)))
    except RuntimeError: return error(plain(small, x), plain(unread(wide, small, plan), x))/10 # single precision

def doubled(x): return tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, x)

def other_size(dense, x):
    "An input of another size that the dense model takes, or None"
    for y in resized(x):
        try: plain(dense, fresh(y, 3))
        except Exception: continue
        return fresh(y, 3)

def laws(steps:list, x, seconds:float)->dict:
    "The readers' law of each cut, at the example, at another batch size and at another size"
    places = dict(example=fresh(x, 1), batch=fresh(batch_of(x, 3), 2), size=other_size(steps[0][0], x))
    res = {}
    for name,y in places.items():
        if y is None: res[name] = 'dense'
        elif res.get('example')=='no oracle': res[name] = 'no oracle'
        else: res[name] = lawful(steps, y, seconds)
        if name=='example' and isinstance(res[name], str): res[name] = 'no oracle'
    return res

def lawful(steps:list, x, seconds:float):
    "Error of the law at one input, or what is wrong"
    try:
        with limit(seconds): e = max(law(*s, x) for s in steps)
    except Exception as ex: return f"NO: {first_line(ex)}"
    return e if e<=TOLERANCE else f"NO: differs from the law by {e:.1e}"

# a row

def cut(model, x, how):
    "A pruned copy, and its report"
    m = deepcopy(model)
    return m,Pruner(m, x).prune(how)

def left_of_attention(model, x, plan)->dict:
    "Groups of heads and of their widths that a plan has left whole"
    found = attention(couple(model, x))
    if not found: return {}
    was = {c.name for c in plan.cuts if len(c.keep)<c.n}
    return {n:.5 for k in ('heads', 'head_dim') for n in found['groups'][k] if n not in was}

def ways(*reports)->dict:
    "How many modules learned their sizes by attributes, by rewritten source and in adapters; how many are pinned"
    plans,adapters = [r.plan for r in reports],{m for r in reports for m in r.adapters}
    named = {a.module for p in plans for a in p.attrs if a.name not in USUAL and not a.name.startswith('_')}
    pins = {n for p in plans for n,_,_,why in p.pins if 'output of the model' not in why}
    rewritten = {r.module for p in plans for r in p.recoded if r.changes}
    found = dict(adapters=adapters, attributes=named-adapters, rewritten=rewritten-adapters, pins=pins)
    return {k:len(v) for k,v in found.items()}

USUAL = '''groups num_features num_groups normalized_shape kernel_size dilation padding
    output_padding'''.split() # Every standard layer has these set: that is no code that learned a size

def pruned(row, model, x)->tuple:
    "The cuts: (wide, small, plan), and the reports: half of all, then of the heads and their widths that this left"
    small,r = cut(model, x, .5)
    steps,reports = [(model, small, r.plan)],[r]
    if more := left_of_attention(small, x, r.plan):
        again,r = cut(small, x, more)
        if r.removed: steps,reports = [*steps, (small, again, r.plan)],[*reports, r]
    n = [sum(p.numel() for p in m.parameters()) for m in (model, steps[-1][1])]
    row.update(kept=n[1]/n[0], removed=sum(r.removed for r in reports), law=[r.error for r in reports])
    row.update(ways=ways(*reports), heads=sorted(more))
    return steps,reports

def again(small, dense, x, way, seconds:float, by_law:bool):
    "Error of a second pruning of what was pruned, by the law, and compiled where the first one can be compiled"
    try:
        n,r = cut(small, x, .3)
        if not r.removed: return 0.
        e = law(small, n, r.plan, fresh(x, 4)) if by_law else 0.
    except Exception as ex: return f"NO: {first_line(ex)}"
    if e>TOLERANCE: return f"NO: differs from the law by {e:.1e}"
    return e if way=='dense' else tried(compiled, n, dense, seconds, x, fresh(batch_of(x, 3), 5))

def run(spec:str, seconds:float=150., skip=())->dict:
    "All of it for one model, in this process"
    row = Row(model=spec)
    model,x = build(spec)
    row['params'] = sum(p.numel() for p in model.parameters())
    if row['params']>LARGEST: return done(row, left_out=f"{row['params']/1e6:.0f} M parameters")
    row['forward_s'] = taken(plain, model, x)[0]
    if row['forward_s']>SLOWEST: return done(row, left_out=f"a forward pass takes {row['forward_s']:.1f} s")
    model = awake(model, x)
    if not is_detector(spec): louder(model)
    found = row.step('prune', pruned, row, model, x)
    if found is None: return done(row)
    steps,small = found[0],found[0][-1][1]
    row['signal'],row['modes'] = row.step('alive', alive, small, x),sorted(modes_of(small, x))
    row['class'] = row.step('class', plain_class, small, model)
    row['laws'] = row.step('laws', laws, steps, x, seconds)
    res = row['ways_to_run'] = {}
    for name,way in WAYS.items():
        sampled = spec in SAMPLE or spec.startswith('transformers')
        if name in skip or name=='process' and not sampled: continue
        res[name] = row.step(name, tried, way, small, model, seconds, x, fresh(batch_of(x, 3), 5))
    by_law = (row['laws'] or {}).get('example')!='no oracle'
    if 'second' not in skip: res['second'] = row.step('second', again, small, model, x, res['compile'], seconds, by_law)
    return done(row)

def done(row, **kw):
    row.update(at='done', **kw)
    return row

# all of them

def run_one(spec:str, timeout:float)->dict:
    "The row of one model, from a process of its own; a crash or a hang is a row too"
    path = os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')])
    env,start = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':path},time.time()
    cmd = [sys.executable, __file__, '--worker', spec, '--timeout', str(timeout)]
    try:
        p = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=timeout)
        out,err,end = p.stdout,p.stderr,f"exit status {p.returncode}"
    except subprocess.TimeoutExpired as e:
        out,err,end = (e.stdout or b'').decode(),(e.stderr or b'').decode(),f"stopped after {timeout:.0f} s"
    row = last_json(out) or dict(model=spec, at='start')
    last = err.strip().splitlines()[-1:]
    if row['at']!='done': row.setdefault('fail', {})['process'] = ' '.join([f"{end} in step {row['at']!r}", *last])
    return {**row, 'wall':time.time()-start}

def problems(r:dict)->list:
    "What is wrong with a row: nothing if it passes"
    if r.get('left_out'): return []
    res = [f"{k}: {v}" for k,v in r.get('fail', {}).items()]
    res += [f"{k}: {v}" for k,v in said(r).items() if isinstance(v, str) and v.startswith('NO')]
    if r.get('modes'): res.append(f"modes while it runs: {', '.join(r['modes'])}")
    if r.get('signal') is not None and r['signal']<1e-6:
        res.append(f"says little: outputs differ by {r['signal']:.0e} between inputs")
    return res

def said(r:dict)->dict:
    "Way → error, or why not"
    return {**(r.get('laws') or {}), **r.get('ways_to_run', {}), 'class':r.get('class')}

COLUMNS = (*(k for k in WAYS), 'second', 'batch', 'size', 'class')
TITLES = 'attributes', 'rewritten', 'adapters', 'pins'

def cell(v)->str:
    if isinstance(v, str): return {'dense':'–', 'no oracle':'?'}.get(v, '**no**')
    return '' if v is None else 'yes'

def line(r:dict)->str:
    "A row of the table"
    ways,cells = r.get('ways', {}),[cell(said(r).get(k)) for k in COLUMNS]
    kept = f"{r['kept']:.2f}" if 'kept' in r else 'no'
    return f"| {' | '.join([r['model'], kept, *(str(ways.get(k, '')) for k in TITLES), *cells])} |"

HEAD = [f"| {' | '.join(['model', 'kept', *TITLES, *COLUMNS])} |", '|'+'---|'*(2+len(TITLES)+len(COLUMNS))]

def table(rows:list)->list:
    "The whole table with its sums, in Markdown"
    run,out = [r for r in rows if not r.get('left_out')],[r for r in rows if r.get('left_out')]
    lines = [*HEAD, *map(line, run), '', *summary(run)]
    names = '; '.join(f"{r['model']} ({r['left_out']})" for r in out)
    return [*lines, '', f"Left out: {names}."] if out else lines

def summary(rows:list)->list:
    "What was met and what not"
    bad = [r for r in rows if problems(r)]
    need = {k:sum(bool(r.get('ways', {}).get(k)) for r in rows) for k in TITLES}
    free = sum('ways' in r and not any(r['ways'][k] for k in TITLES[:3]) for r in rows)
    of = f"attributes {need['attributes']}, rewritten source {need['rewritten']}, adapters {need['adapters']}"
    first = f"Passed: {len(rows)-len(bad)} of {len(rows)}. Models that need {of}; none of these {free}; " \
        f"pins {need['pins']}."
    sums = '; '.join(tallied(k, Counter(cell(said(r).get(k)) for r in rows)) for k in COLUMNS)
    return [first, '', f"By way: {sums}.", *(f"- {r['model']}: {' · '.join(problems(r))}" for r in bad)]

def tallied(way:str, c:Counter)->str:
    "How often a way is gone"
    unknown = f", {c['?']} without an oracle" if c['?'] else ''
    return f"{way} {c['yes']} ({c['–']} dense cannot, {c['**no**']} wrong{unknown})"

def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', nargs='+', metavar='NAME', help='part of a name in zoo.txt, or any source:name')
    p.add_argument('--out', type=Path, default=CACHE, help=f'rows as JSON lines; a second call resumes there ({CACHE})')
    p.add_argument('--timeout', type=float, default=1800, help='seconds for a model; a tenth for each way')
    p.add_argument('--minutes', type=float, default=1e6, help='no model begins after this time; a second call goes on')
    p.add_argument('--fresh', action='store_true', help='run again what has a row already')
    p.add_argument('--again', action='store_true', help='run again what did not pass')
    p.add_argument('--report', action='store_true', help='run nothing, print the table of the rows that are there')
    p.add_argument('--keep', action='store_true', help='put rows and table into benchmarks/measured')
    p.add_argument('--worker', help=argparse.SUPPRESS)
    p.add_argument('--load', help=argparse.SUPPRESS)
    return p.parse_args()

def chosen(only)->list:
    "The models to run; a name with a colon may be any model"
    if not only: return models()
    found = [[o] if ':' in o else [m for m in models() if o in m] for o in only]
    return list(dict.fromkeys(s for f in found for s in f))

def loaded(path:str)->float:
    "How far a model that another process saved is from what it computed there"
    m,x,want = torch.load(path, weights_only=False)
    return error(plain(m, x), want)

def keep(rows:list):
    "The rows and their table, as they are in git"
    (KEPT/'everywhere.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    (KEPT/'everywhere.md').write_text('\n'.join(table(rows))+'\n')

def main()->int:
    a = arguments()
    if a.worker: return run(a.worker, a.timeout/10).emit() or 0
    if a.load: return print(loaded(a.load)) or 0
    names,rows,until = chosen(a.only),{} if a.fresh else read_rows(a.out),time.time()+60*a.minutes
    a.out.parent.mkdir(parents=True, exist_ok=True)
    if not a.report: print(*HEAD, sep='\n', flush=True)
    for s in names:
        if a.report or s in rows and not (a.again and problems(rows[s])) or time.time()>until: continue
        rows[s] = run_one(s, a.timeout)
        with a.out.open('a') as f: f.write(json.dumps(rows[s])+'\n')
        print(line(rows[s]), *(f"    {p}" for p in problems(rows[s])), sep='\n', flush=True)
    mine = [rows[s] for s in names if s in rows]
    if a.report: print(*table(mine), sep='\n')
    else: print('', *summary([r for r in mine if not r.get('left_out')]), sep='\n')
    if a.keep: keep(mine)
    return 0 if len(mine)==len(names) and not any(map(problems, mine)) else 1

if __name__=='__main__':
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    sys.exit(main())
