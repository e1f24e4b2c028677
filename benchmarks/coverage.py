"Prune every model of a list by half, beside the peer, one process a model: `python benchmarks/coverage.py --help`"
import argparse, json, os, statistics, subprocess, sys, time
from importlib.util import find_spec
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent/'.cache'/'coverage.jsonl'
PEER = HERE/'measured'/'peer.jsonl' # What the peer took where it was measured, with the seconds of a forward pass there
RATIO,PASSES = .6,12. # At most, medians: our time over the peer's, and forward passes that `prune()` and its checks take
ATTENTION = ('heads', 'head_dim', 'embed')

# running

def zoo()->list: "The models of zoo.txt"; return [s for l in (HERE/'zoo.txt').read_text().splitlines() if (s := l.split('#')[0].strip())]

def chosen(only)->list:
    "The models to run: all of the zoo, or those that a word is a part of; a name with a colon may be any model"
    if not only: return zoo()
    res = []
    for o in only: res += [o] if ':' in o else [s for s in zoo() if o in s]
    return list(dict.fromkeys(res))

def last_json(text:str)->dict|None:
    "The last whole row that a worker printed"
    for l in reversed(text.splitlines()):
        try: return json.loads(l)
        except ValueError: pass

def run_one(spec:str, timeout:float, peer)->dict: # peer: True, False or 'only'
    "The row of one model; a crash or a hang is a row too"
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')])}
    who = {True:'peer', False:'no-peer'}.get(peer, 'only-peer')
    cmd,start = [sys.executable, str(HERE/'one.py'), spec, who, str(timeout/6)],time.time()
    try:
        p = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=timeout)
        out,err,end = p.stdout,p.stderr,f"exit status {p.returncode}"
    except subprocess.TimeoutExpired as e:
        out,err,end = (e.stdout or b'').decode(),(e.stderr or b'').decode(),f"stopped after {timeout:.0f} s"
    row = last_json(out) or dict(model=spec, at='start')
    if row['at']!='done': row.setdefault('fail', {})['process'] = ' '.join([f"{end} in step {row['at']!r}", *err.strip().splitlines()[-1:]])
    if row['at']=='peer': # it takes the process with it: ours alone, then
        row = run_one(spec, timeout, False)
        row.setdefault('fail', {})['peer'] = end
    return {**row, 'wall':time.time()-start}

def read_rows(path:Path)->dict:
    "Model → its latest row"
    return {r['model']:r for l in path.read_text().splitlines() if (r := json.loads(l))} if path.exists() else {}

# judging

def problems(r:dict)->list:
    "What is wrong with a row: nothing if it passes"
    res = [f"{k}: {v}" for k,v in r.get('fail', {}).items() if not k.startswith('peer')]
    if weak(r): res.append(f"the law says little: outputs differ by {r['law']['signal']:.0e} between inputs")
    res += [f"no {k}" for k in ('captured', 'removed', 'forward_1', 'forward_2', 'backward') if not r.get(k) and not r.get('fail')]
    if (law := r.get('law')) and law['error'] is None: res.append(f"law not checked: {law['text']}")
    if r.get('ours_s', 0)>10: res.append(f"{r['ours_s']:.1f} s, mostly {slowest_stage(r)}")
    if behind(r): res.append(f"keeps {r['kept']:.2f} of the parameters where the peer keeps {r['peer_kept']:.2f}; left alone: {pins(r)}")
    a = r.get('attention')
    if a and (missing := [k for k in ATTENTION if not a[k]]): res.append(f"no free group for {' and '.join(missing)}: {why_missing(a)}")
    return res

def behind(r:dict)->bool: "Does the peer reach 40 % where we do not?"; return bool(r.get('peer_works')) and r.get('peer_kept', 1)<=.4<r.get('kept', 0)
def with_stored_peer(r:dict, stored:dict)->dict:
    "A row without the peer, and the peer's numbers from elsewhere: seconds of as many forward passes here"
    p = stored.get(r['model'])
    if p is None or tried_peer(r) or 'forward_s' not in r: return r
    scale = r['forward_s']/p['forward_s']
    times = dict(peer_s=p['peer_s']*scale, peer_all=[t*scale for t in p['peer_all']])
    return {**p, **r, **times, 'stored':True}

def peer_of(r:dict)->dict:
    "What is stored of the peer"
    return {k:v for k,v in r.items() if k in ('model', 'forward_s') or k.startswith('peer_')}

def passes(r:dict)->float|None:
    "All of `prune()` with its checks, in forward passes of the model"
    return r['law']['seconds']/r['forward_s'] if r.get('law') and r.get('forward_s') else None

def tried_peer(r:dict)->bool: return 'peer_works' in r or 'peer' in r.get('fail', {})
def weak(r:dict)->bool: "Do the outputs of the pruned model hardly depend on its input?"; s = (r.get('law') or {}).get('signal'); return s is not None and s<1e-6
def ratio(r:dict)->float|None: "Our time over the peer's, if that did anything"; return r['ours_s']/r['peer_s'] if 'ours_s' in r and r.get('peer_kept', 1)<.99 else None
def pins(r:dict)->str: return '; '.join(f"{n} ({k} of {a}): {why}" for n,k,a,why in r.get('pins', [])[:3]) or 'nothing'
def slowest_stage(r:dict)->str: return ' '.join(f"{k} {v:.1f} s" for k,v in sorted(r.get('stages', {}).items(), key=lambda kv: -kv[1])[:2])
def why_missing(a:dict)->str: return '; '.join(dict.fromkeys(f"{m['module']} {k}: {', '.join(m.get(k+'_why', [])) or 'no reason'}" for m in a['missing'] for k in ATTENTION if not m[k]))[:600]

# printing

COLUMNS = (('model',44), ('captured',8), ('pruned',6), ('batch 1',7), ('batch 2',7), ('backward',8), ('law',9), ('heads',5), ('head_dim',8), ('embed',5), ('params',6), ('MACs',6), ('s',6), ('verify s',8), ('passes',6),
    ('peer',5), ('params',6), ('MACs',6), ('s',6), ('ratio',6))

def line(cells)->str: return '  '.join(str(c).ljust(n) if i==0 else str(c).rjust(n) for i,(c,(_,n)) in enumerate(zip(cells, COLUMNS)))

def cells(r:dict)->list:
    "One row of the table"
    yes = lambda v: 'yes' if v else 'NO'
    num = lambda v, f='.2f': '-' if v is None else format(v, f)
    law,a,works = r.get('law') or {},r.get('attention'),r.get('peer_works')
    error = 'NO' if law.get('error') is None else f"{law['error']:.0e}{'*' if law['statistics'] else ' '}"
    head = [r['model'].removeprefix('torchvision:'), r.get('captured', 'NO'), yes(r.get('removed')), *(yes(r.get(k)) for k in ('forward_1', 'forward_2', 'backward')), error]
    verify = max(0, law['seconds']-r['ours_s']) if law and 'ours_s' in r else None
    return [*head, *('-' if not a else 'out' if a[k]=='output' else yes(a[k]) for k in ATTENTION), num(r.get('kept')), num(r.get('macs_kept')), num(r.get('ours_s')), num(verify), num(passes(r), '.1f'),
        '-' if works is None and not tried_peer(r) else yes(works), num(r.get('peer_kept')), num(r.get('peer_macs_kept')), num(r.get('peer_s')), num(ratio(r))]

def titles(name, rows, say)->list: return [f"{name}: {len(rows)}", *(f"  {r['model']}: {say(r)}" for r in rows)]

def median_ratio(rows)->str:
    "Median of our time over the peer's, and of the first (cold) runs alone"
    rs = [q for r in rows if (q := ratio(r))]
    cold = [r['ours_all'][0]/r['peer_all'][0] for r in rows if ratio(r)]
    return f"{statistics.median(rs):.2f} over {len(rs)} models (first runs {statistics.median(cold):.2f})" if rs else '- over no models'

def median_passes(rows)->str:
    "Median of the forward passes that all of `prune()` takes"
    ps = sorted((p,r['model']) for r in rows if (p := passes(r)))
    most = ', '.join(f"{m} {p:.0f}" for p,m in ps[:-4:-1])
    return f"{statistics.median(p for p,_ in ps):.1f} over {len(ps)} models; most: {most}" if ps else '- over no models'

def summary(rows:list)->list:
    "Lines that say what was met and what not"
    bad,slow = [r for r in rows if problems(r)],sorted((r for r in rows if 'ours_s' in r), key=lambda r: -r['ours_s'])
    works = [r for r in rows if r.get('peer_works')]
    return [f"passed: {len(rows)-len(bad)} of {len(rows)}; the peer: {len(works)} of {sum(map(tried_peer, rows))}, of which {sum(r['peer_kept']<=.4 for r in works)} keep at most 40 % of the parameters (ours {sum(r.get('kept', 1)<=.4 for r in rows)})",
        f"our time / the peer's, median: {median_ratio(works)} where it works; {median_ratio(rows)} where it ends",
        f"all of prune() with its checks, in forward passes, median: {median_passes(rows)}",
        f"slowest of ours: {', '.join(f'''{r['model']} {r['ours_s']:.1f} s''' for r in slow[:3])}; over 10 s: {sum(r['ours_s']>10 for r in slow)}",
        *titles('not passed', bad, lambda r: ' | '.join(problems(r))),
        *titles('the peer keeps at most 40 % where we do not', [r for r in rows if behind(r)], pins),
        *titles('attention without a free group', [r for r in rows if (a := r.get('attention')) and not all(a[k] for k in ATTENTION)], lambda r: why_missing(r['attention']))]

def met(rows:list)->bool:
    "Is all of it met: every model, our time beside the peer's, and beside a forward pass?"
    medians = [([q for r in rows if (q := f(r))],most) for f,most in ((ratio, RATIO), (passes, PASSES))]
    return not any(problems(r) for r in rows) and all(statistics.median(v)<=most for v,most in medians if v)

# the command

def arguments():
    p = argparse.ArgumentParser(description='Prune every model of a list by half, beside the peer, one process a model.')
    p.add_argument('--only', nargs='+', metavar='NAME', help='part of a name in zoo.txt, or any source:name')
    p.add_argument('--out', type=Path, default=CACHE, help=f'rows as JSON lines; a second call resumes there ({CACHE})')
    p.add_argument('--timeout', type=float, default=600, help='seconds for a model; each run of an engine gets a sixth')
    p.add_argument('--fresh', action='store_true', help='run again what has a row already')
    p.add_argument('--no-peer', action='store_true', help='leave the peer out')
    p.add_argument('--only-peer', action='store_true', help=f"only what the peer takes, stored in {PEER}")
    p.add_argument('--jobs', type=int, default=1, help='models at a time; with more than one the seconds say nothing')
    p.add_argument('--report', action='store_true', help='run nothing, print the table of the rows that are there')
    return p.parse_args()

def store_peer(names:list, stored:dict, timeout:float)->int:
    "Measure the peer on what has no stored times yet"
    for s in names:
        if s in stored: continue
        r = run_one(s, timeout, 'only')
        print(s, f"{r['peer_s']:.2f} s" if 'peer_s' in r else r.get('fail'), flush=True)
        if 'peer_s' not in r: continue
        with PEER.open('a') as f: f.write(json.dumps(peer_of(r))+'\n')
    return 0

def main()->int:
    a = arguments()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    rows,names,stored = read_rows(a.out),chosen(a.only),read_rows(PEER)
    peer = not a.no_peer and find_spec('torch_pruning') is not None
    if a.only_peer: return store_peer(names, stored, a.timeout)
    print(line([n for n,_ in COLUMNS]), '  * with statistics over the channels that stay', flush=True)
    def row(s):
        if a.report or s in rows and not a.fresh: return rows.get(s)
        r = run_one(s, a.timeout, peer)
        with a.out.open('a') as f: f.write(json.dumps(r)+'\n')
        return r
    with ThreadPoolExecutor(a.jobs) as pool:
        for s,r in zip(names, pool.map(row, names)):
            if r is None: continue
            rows[s] = r = with_stored_peer(r, {} if a.no_peer else stored)
            print(line(cells(r)), flush=True)
    mine = [rows[s] for s in names if s in rows]
    print('', *summary(mine), sep='\n')
    return 0 if len(mine)==len(names) and met(mine) else 1

if __name__=='__main__': sys.exit(main())
