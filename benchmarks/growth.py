"""How the time of a cut grows with the network: python benchmarks/growth.py [--repeat 3] [name ...]

Six networks, each in three sizes, of which each is twice the one before: residual blocks that are all silent, writes
into slices and into channels of one tensor, modules whose code insists on a size, and a plain MLP, by a fraction and by
what is dead. Processor time of all of `prune()`, with its checks, on one thread; the median of some runs, each on a
network of its own. Twice the size may take 2.6 times as long."""
import argparse, statistics, time, warnings
import torch
from torch import nn
from fasterprune.all import Pruner

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a,self.n,self.b = nn.Conv2d(c, c, 3, padding=1),nn.BatchNorm2d(c),nn.Conv2d(c, c, 3, padding=1)
        nn.init.zeros_(self.b.weight)
        nn.init.zeros_(self.b.bias)
    def forward(self, x): return x+self.b(self.n(self.a(x)).relu())

class Blocks(nn.Sequential):
    "Residual blocks that add nothing: each of them goes as a whole"
    example,how = (1,3,8,8),None
    def __init__(self, n): super().__init__(nn.Conv2d(3, 8, 1), *(Block(8) for _ in range(n)), nn.Conv2d(8, 4, 1))

@torch.no_grad()
def quiet(layer, n=4):
    "The same with units that nobody writes"
    layer.weight[:n],layer.bias[:n] = 0,0
    return layer

class Slices(nn.Module):
    "A step for each slice of one tensor, a layer in each step"
    example,how = (2,8),None
    def __init__(self, n):
        super().__init__()
        self.n,self.a,self.b,self.o = n,quiet(nn.Linear(8, 16)),nn.Linear(16, 16),nn.Linear(16, 4)
    def forward(self, x):
        h = self.a(x).relu()
        out = torch.zeros(len(x), self.n, 16, dtype=x.dtype)
        for i in range(self.n): out[:, i] = self.b(h)
        return self.o(out).mean(1)

class Columns(nn.Module):
    "Writes channels of one tensor, one at a time"
    example,how = (2,8),None
    def __init__(self, n):
        super().__init__()
        self.n,self.e,self.a,self.o = n,quiet(nn.Linear(8, 16)),nn.Linear(16, n),nn.Linear(n, 4)
    def forward(self, x):
        h = self.a(self.e(x).relu()).relu()
        out = torch.zeros_like(h)
        for i in range(self.n): out[:, i] = h[:, i]*(i+1)
        return self.o(out)

class Insists(nn.Module):
    "Heads whose numbers stand in the code, and are checked there"
    def __init__(self, c=16):
        super().__init__()
        self.qkv,self.o = nn.Linear(c, 3*c),nn.Linear(c, c)
    def forward(self, x):
        b,n,_ = x.shape
        q,k,v = self.qkv(x).view(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4)
        if q.shape!=(b, 4, n, 4): raise ValueError('4 heads of 4')
        return x+self.o(((q@k.transpose(-2, -1))*.5).softmax(-1).matmul(v).transpose(1, 2).reshape(b, n, 16))

class Insisting(nn.Sequential):
    example,how = (1,5,16),.5
    def __init__(self, n):
        super().__init__(*(Insists() for _ in range(n)), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))

class MLP(nn.Sequential):
    example,how = (2,8),.5
    def __init__(self, n):
        more = (m for _ in range(n-2) for m in (nn.ReLU(), quiet(nn.Linear(16, 16))))
        super().__init__(quiet(nn.Linear(8, 16)), *more, nn.ReLU(), nn.Linear(16, 4))

class QuietMLP(MLP): how = None

NETS = dict(silent_blocks=(Blocks, (20,40,80)), writes_into_slices=(Slices, (400,800,1600)),
    writes_into_channels=(Columns, (400,800,1600)), insists_on_a_size=(Insisting, (10,20,40)),
    mlp=(MLP, (300,600,1200)), mlp_dead=(QuietMLP, (300,600,1200)))
LIMIT = 2.6

def seconds(make, n:int)->float:
    "Processor time of one cut of a fresh network; it must do what it is measured for"
    torch.manual_seed(0)
    m = make(n).eval()
    x,before = torch.randn(make.example),sum(p.numel() for p in m.parameters())
    start = time.process_time()
    r = Pruner(m, x).prune(make.how)
    took = time.process_time()-start
    if sum(p.numel() for p in m.parameters())>=before: raise RuntimeError(f"nothing cut of {make.__name__}({n}):\n{r}")
    return took

def growth(name:str, repeat:int=3)->list:
    "(size, seconds) of each size, medians"
    make,sizes = NETS[name]
    seconds(make, sizes[0]//2) # what is loaded once only
    return [(n, statistics.median(seconds(make, n) for _ in range(repeat))) for n in sizes]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', help=f"of {', '.join(NETS)}")
    p.add_argument('--repeat', type=int, default=3)
    args = p.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    print(f"{'network':<20}{'size':>6}{'s':>9}{'growth':>9}")
    for name in args.names or NETS:
        last = None
        for n,s in growth(name, args.repeat):
            print(f"{name:<20}{n:>6}{s:>9.2f}{'' if last is None else f'{s/last:.2f}×':>9}", flush=True)
            last = s
if __name__=='__main__': main()
