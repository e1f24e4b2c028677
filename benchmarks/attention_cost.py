"""Does a pruned attention take longer than one that was built with its sizes? `python benchmarks/attention_cost.py`

Half of the width and half of the heads, or half of each head, are removed; the other one is made by its own class with
these numbers. Both, and a twin of the second one that says how quiet the machine is, run in turns in one process; time
is that of the processor."""
import argparse, os, statistics, sys, time, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch
from torch import nn
from fasterprune.surgery.pruner import Pruner

WIDTH,HEADS = 384,6
MOST = 1.02 # Times the time of what was built so
TRIES = 3 # A ratio that is too large is measured again
ROUNDS,SLOT = 81,.006 # Seconds of a round and a module: short, so that what slows the machine slows all of them
clock = time.process_time

# the attentions: (width, heads, width of a head) → module, function that runs it, tokens

def timm_attention(d, h, k):
    from timm.layers import Attention
    return Attention(d, h, qkv_bias=True),lambda a, x: a(x),197

def torch_attention(d, h, k):
    return nn.MultiheadAttention(d, h, batch_first=True),lambda a, x: a(x, x, x, need_weights=False)[0],197

def torchvision_block(d, h, k):
    "What stands around it in torchvision's ViT, with the norms and the MLP"
    from torchvision.models.vision_transformer import EncoderBlock
    return EncoderBlock(h, d, 4*d, 0., 0.),lambda a, x: a(x),197

def bert_attention(d, h, k):
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertSelfAttention
    c = BertConfig(hidden_size=d, num_attention_heads=h, attn_implementation='sdpa')
    return BertSelfAttention(c),lambda a, x: a(x)[0],128

def llama_attention(d, h, k):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
    sizes = dict(hidden_size=d, num_attention_heads=h, num_key_value_heads=h, head_dim=k)
    c = LlamaConfig(**sizes, attn_implementation='sdpa')
    turn = LlamaRotaryEmbedding(c)
    at = turn(torch.zeros(1, 128, d), torch.arange(128)[None])
    return LlamaAttention(c, 0),lambda a, x: a(x, at, None)[0],128

KINDS = dict(timm=timm_attention, torch=torch_attention, torchvision=torchvision_block, bert=bert_attention,
    llama=llama_attention)

class Between(nn.Module):
    "An attention between two layers, so that the width that it reads and writes can be cut as well"
    def __init__(self, attention, run, d):
        super().__init__()
        self.inp,self.attention,self.out,self.run = nn.Linear(d, d),attention,nn.Linear(d, 10),run
    def forward(self, x): return self.out(self.run(self.attention, self.inp(x)))

def halves(groups, cut:str, h:int, k:int)->dict|None:
    "Group → half, for every width and for the heads or their widths; None where there are no such groups"
    found = [g for g in groups if g.n==(h if cut=='heads' else k) and g.name.startswith('attention')]
    return {g.name:.5 for g in [*found, *(g for g in groups if g.n not in (h, k))]} if found else None

def pair(kind:str, cut:str)->tuple|None:
    "A pruned attention, two that were built like it, how they run, and tokens; None if this cannot be cut so"
    d,h = WIDTH,HEADS
    k = d//h
    torch.manual_seed(0)
    a,run,n = KINDS[kind](d, h, k)
    m = Between(a, run, d).eval()
    p = Pruner(m, torch.randn(2, n, d))
    how = halves(p.couple().groups, cut, h, k)
    if how is None: return None
    p.prune(how)
    new = (d//2, h//2, k) if cut=='heads' else (d//2, h, k//2)
    twins = [KINDS[kind](*new)[0].eval() for _ in range(2)]
    if shapes(m.attention)!=shapes(twins[0]): return None
    return m.attention,*twins,run,n

def shapes(m)->list:
    "Of all parameters, in no order"
    return sorted(tuple(p.shape) for p in m.parameters())

# measuring

@torch.no_grad()
def times(modules:list, run, x)->list:
    "For each module its seconds a call, round by round, in turns"
    def seconds(m, calls):
        start = clock()
        for _ in range(calls): run(m, x)
        return (clock()-start)/calls
    calls = max(1, round(SLOT/max(seconds(modules[0], 3), 1e-6)))
    for m in modules: seconds(m, calls)
    res = [[] for _ in modules]
    for i in range(ROUNDS):
        for j in range(len(modules)): # another one first in each round
            j = (i+j)%len(modules)
            res[j].append(seconds(modules[j], calls))
    return res

def compare(a:list, b:list)->tuple:
    "Median of the ratios of the rounds, and their middle half"
    low,mid,high = statistics.quantiles([i/j for i,j in zip(a, b)], n=4)
    return mid,low,high

def measured(kind:str, cut:str, batch:int)->tuple|None:
    "Ratio, spread, that of the twins, milliseconds; the best of a few tries"
    found = pair(kind, cut)
    if found is None: return None
    *modules,run,n = found
    x,best = torch.randn(batch, n, WIDTH//2),None
    for _ in range(TRIES):
        pruned,built,twin = times(modules, run, x)
        new = *compare(pruned, built),compare(twin, built)[0],1e3*statistics.median(pruned),1e3*statistics.median(built)
        best = new if best is None else min(best, new)
        if best[0]<=MOST: break
    return best

def main()->int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', nargs='+', choices=KINDS, default=list(KINDS))
    a,bad,none = p.parse_args(),[],[]
    print('| attention | half of | batch | pruned, ms | built, ms | ratio | middle half of the rounds | twin |')
    print('|---|---|---|---|---|---|---|---|', flush=True)
    for kind in a.only:
        for cut in ('heads', 'head widths'):
            for batch in (1, 8):
                r = measured(kind, cut, batch)
                if r is None: none += [f"{kind} {cut}"] if batch==1 else []
                if r is None: continue
                ratio,low,high,twin,ms,built = r
                head = f"| {kind} | {cut} | {batch} | {ms:.2f} | {built:.2f}"
                print(f"{head} | {ratio:.3f} | {low:.3f} to {high:.3f} | {twin:.3f} |", flush=True)
                if ratio>MOST: bad.append(f"{kind} {cut} batch {batch}: {ratio:.3f}")
    if none: print('not compared, for the groups or the shapes are others:', ', '.join(none))
    print(f"above {MOST}: {'; '.join(bad)}" if bad else f"none takes more than {MOST} times as long")
    return 1 if bad else 0

if __name__=='__main__':
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    sys.exit(main())
