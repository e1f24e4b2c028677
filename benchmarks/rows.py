"Measurements that go on where they were stopped: each is a line of JSON; several run at once, each in a process of its own"
import argparse, json, os, threading, time, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
import torch
from fastprogress import fastprogress

def parser(doc, data, cache):
    "The options that all of them have"
    p = argparse.ArgumentParser(description=doc)
    p.add_argument('--data', type=Path, default=data, help='the file of JPEGs'); p.add_argument('--cache', type=Path, default=cache, help='folder of what is kept')
    p.add_argument('--workers', type=int, default=min(os.cpu_count() or 1, 2)); p.add_argument('--minutes', type=float, default=115, help='stop then; a second call goes on')
    p.add_argument('--report', action='store_true', help='only say what there is')
    return p

def read(path): return [json.loads(l) for l in path.read_text().splitlines() if l.strip()] if path.exists() else []

def no_bars(): fastprogress.NO_BAR,fastprogress.ConsoleProgressBar.fill = True,''

def _worker(parent):
    torch.set_num_threads(1); warnings.simplefilter('ignore'); no_bars()
    def watch():
        while os.getppid()==parent: time.sleep(1)
        os._exit(1) # nobody is left to hear of it
    threading.Thread(target=watch, daemon=True).start()

def _several(measure, jobs, data, cache, until): return [measure(j, data, cache) for j in jobs if time.time()<until]

def run(
    jobs, # Dicts
    key, # Job or row → what tells one from another
    measure, # (job, data, cache) → row: a function of the script
    line, # Row → text
    a, # `rows`, `workers`, `data` and `cache`
    until, # No job begins after this time
    together=None, # Job → what those have in common that follow each other in one process; None: nothing
)->bool: # Is everything there?
    "Measure what is not there yet, and say a line for each"
    done = {key(r) for r in read(a.rows)}
    left,n = [j for j in jobs if key(j) not in done],0
    it,waiting = iter([[j] for j in left] if together is None else [list(g) for _,g in groupby(left, together)]),set()
    with ProcessPoolExecutor(a.workers, mp_context=get_context('spawn'), initializer=_worker, initargs=(os.getpid(),)) as pool:
        while True:
            while len(waiting)<a.workers and time.time()<until and (js := next(it, None)): waiting.add(pool.submit(_several, measure, js, a.data, a.cache, until))
            if not waiting: break
            ready,waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for r in (r for f in ready for r in f.result()):
                n += 1
                with a.rows.open('a') as out: out.write(json.dumps(r)+'\n')
                print(f"{n:>4}/{len(left)} {line(r)}", flush=True)
    if n<len(left): print('time ran out; the same command goes on')
    return n==len(left)

def said(v): return '' if not v else f"{mean(v):.2f}" if len(v)==1 else f"{mean(v):.2f} ± {stdev(v):.2f}"

def keep(text, a):
    "Write the table beside the rows, and say it"
    a.rows.with_suffix('.md').write_text(text+'\n')
    print(f"\n{text}\n\n{a.rows.with_suffix('.md')}, {a.rows.with_suffix('.png')}")
