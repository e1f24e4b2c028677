"What a Pruner cuts a Sparsifier makes zero, whatever class the layers are of; names of blocks; shared kernels by the layer that reads; zeros after loading"
import warnings
from copy import deepcopy
import pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.models import mobilenet_v2, resnet18
from fasterprune.all import *
from fasterprune.callback.keep_zeros import KeepZeros, obeyed
from fasterprune.sparse.units import CoupledUnits, LayerUnits
from support.laws import rel, run
from support.small_fit import equal, fit, learner, quiet, small_dls, tiny, weights

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')

# ---- networks whose units are not those of a layer class

class Conv1D(nn.Module): # as in GPT-2
    def __init__(self, i, o):
        super().__init__()
        self.weight,self.bias = nn.Parameter(torch.randn(i, o)/i**.5),nn.Parameter(torch.randn(o)/9)
    def forward(self, x): return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)

class Experts(nn.Module):
    "A bank of gated experts in two bare parameters, mixed by a router"
    def __init__(self, d=8, n=3, inner=12):
        super().__init__()
        self.router,self.up,self.gate,self.down = nn.Linear(d,n),*(nn.Parameter(torch.randn(n, *s)/3) for s in ((d,inner), (d,inner), (inner,d)))
    def forward(self, x):
        h = x.flatten(0, -2).expand(len(self.up), -1, -1)
        y = torch.bmm(F.silu(torch.bmm(h, self.gate))*torch.bmm(h, self.up), self.down)
        return torch.einsum('enf,ne->nf', y, self.router(x).flatten(0, -2).softmax(-1)).view_as(x)

class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, **kw):
        super().__init__()
        self.emb,self.rnn = nn.Embedding(30, 10),kind(10, 16, 2, batch_first=True, **kw)
        self.fc = nn.Linear(32 if kw.get('bidirectional') else 16, 5)
    def forward(self, x): return self.fc(self.rnn(self.emb(x))[0].mean(1))

class Attends(nn.Module):
    def __init__(self): super().__init__(); self.emb,self.attn,self.mlp,self.out = nn.Embedding(30, 16),nn.MultiheadAttention(16, 4, batch_first=True),Conv1D(16, 24),Conv1D(24, 5)
    def forward(self, x): x = self.emb(x); return self.out(self.mlp(self.attn(x, x, x, need_weights=False)[0]).relu()).mean(1)

class Mixed(nn.Module):
    "Experts between a GRU and a matrix without a module"
    def __init__(self): super().__init__(); self.emb,self.rnn,self.experts,self.w = nn.Embedding(30, 10),nn.GRU(10, 8, batch_first=True),Experts(),nn.Parameter(torch.randn(8, 20)); self.out = nn.Linear(20, 5)
    def forward(self, x): h = self.rnn(self.emb(x))[0]; return self.out(((h+self.experts(h))@self.w).relu().mean(1))

class Logits(nn.Module):
    "A model of transformers that says numbers"
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x): return self.model(input_ids=x).logits[:,-1]

def gpt2():
    t = pytest.importorskip('transformers')
    c = t.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False, bos_token_id=0, eos_token_id=0)
    return Logits(t.GPT2LMHeadModel(c))

def mixtral():
    t = pytest.importorskip('transformers')
    c = t.MixtralConfig(vocab_size=30, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=16, use_cache=False)
    return Logits(t.MixtralForCausalLM(c))

NETS = {'lstm':Recurrent, 'gru both ways':lambda: Recurrent(nn.GRU, bidirectional=True), 'rnn':lambda: Recurrent(nn.RNN), 'attention':Attends, 'mixed':Mixed, 'gpt2':gpt2, 'mixtral':mixtral}
WORDS = torch.randint(0, 30, (64,9), generator=torch.Generator().manual_seed(0))

def made(name, seed=0): # with biases that are not zero, so that what is left of a unit would be seen
    torch.manual_seed(seed)
    m = NETS[name]().eval()
    with torch.no_grad():
        for p in m.parameters(): p.add_(torch.randn_like(p)*.05)
    return m

def word_dls():
    d = TensorDataset(WORDS, WORDS[:,0]%5)
    return DataLoaders.from_dsets(d, d, bs=32, num_workers=0, device='cpu')

def removed_by_zeros(m, s, masks, x): # what a pruner must take out: all that is masked, but for what was said to stay
    stays = {exact:sum(masks.units[n][0] for n,(_,helps) in s.units.staying().items() if not (exact and helps)) for exact in (False, True)}
    for exact in (False, True):
        small,want = deepcopy(m),run(m, x)
        r = Pruner(small, x, exact_norms=exact).prune()
        assert rel(run(small, x), want)<1e-4 and r.removed==sum(z for z,_ in masks.units.values())-stays[exact], str(r)

@pytest.mark.parametrize('name,granularity', [(n, g) for n in NETS for g in ('filter', 'shared_kernel') if (n,g)!=('mixtral','shared_kernel')]) # whose code has one size for keys and values
def test_both_know_the_same_groups(name, granularity):
    m = made(name)
    s = Sparsifier(m, WORDS[:2], granularity=granularity)
    units = {g.name:g.n for g in Pruner(m, WORDS[:2]).couple().groups if g.primary}
    unread = {n for n,why in s.skipped.items() if why=='no weight reads its units'}
    assert s.totals=={n:k for n,k in units.items() if n not in unread} and not (unread and granularity=='filter')
    masks = s.sparsify(.5)
    assert all(z==n//2 for z,n in masks.units.values()) and s.measured()==masks.units
    removed_by_zeros(m, s, masks, WORDS[:3])

@pytest.mark.parametrize('context,criterion', [('local','l1'), ('global','l2'), ('global','random')])
@pytest.mark.parametrize('name', ['lstm', 'attention', 'gpt2'])
def test_other_choices(name, context, criterion):
    m = made(name)
    s = Sparsifier(m, WORDS[:2], context=context, criterion=criterion)
    removed_by_zeros(m, s, s.sparsify(.4), WORDS[:3])

@pytest.mark.parametrize('name', ['lstm', 'gru both ways', 'attention', 'mixed', 'gpt2', 'mixtral'])
def test_a_training_makes_them_zero_and_prune_takes_them_out(name):
    learn,cb = Learner(word_dls(), made(name), loss_func=CrossEntropyLossFlat()),SparsifyCallback(.5, ignore='experts.router' if name=='mixed' else None)
    with quiet(learn): learn.fit(2, 1e-3, cbs=cb)
    x,dense = WORDS[:3],deepcopy(learn.model).eval()
    r = learn.prune(exact_norms=True)
    assert r.removed==sum(z for z,_ in cb.masks.units.values())>0
    assert rel(run(learn.model.eval(), x), run(dense, x))<1e-4
    with quiet(learn): learn.fit(1, 1e-3)
    assert run(learn.model.eval(), x).isfinite().all() and not any(isinstance(c, KeepZeros) for c in learn.cbs)

def test_only_and_ignore_by_any_module():
    m = made('mixed')
    names = lambda **kw: set(Sparsifier(m, WORDS[:2], **kw).totals)
    whole = names()
    assert {'emb','experts','w'}<=whole and names(only='experts')=={'experts','experts.router','rnn'} and names(ignore=nn.GRU)==whole-{'rnn'}
    assert names(only=nn.Embedding)=={'emb'} and names(only=['emb','w'], ignore='emb')=={'w'}
    with pytest.raises(ValueError, match="only: no layer 'expert'; did you mean 'experts'"): names(only='expert')
    with pytest.raises(ValueError, match="leave no layer.*'emb'"): names(only='out')

def test_units_are_of_one_of_two_kinds():
    m = made('lstm')
    assert type(Sparsifier(m, WORDS[:2]).units) is CoupledUnits and type(Sparsifier(m, granularity='weight').units) is LayerUnits
    with pytest.raises(ValueError, match='has no convolution and no linear layer'): Sparsifier(Conv1D(3, 4), torch.randn(2,5,3))

# ---- names of blocks

def named(model, x, sparsity, **kw): return {n:b-a for n,b,a in Pruner(model, x, **kw).plan(sparsity).rows()}

def test_a_block_means_its_layers():
    m,x = resnet18().eval(),torch.randn(1,3,64,64)
    each = {n:.5 for n,l in m.named_modules() if n.startswith('layer1.') and isinstance(l, nn.Conv2d)}
    assert named(m, x, {'layer1':.5})==named(m, x, each)=={'conv1':32, 'layer1.0.conv1':32, 'layer1.1.conv1':32}
    s = Sparsifier(m, x)
    assert s.masks({'layer1':.5})==s.masks(each) and {n for n,(z,_) in s.masks({'layer1':.5}).units.items() if z}==set(named(m, x, each))

def test_the_nearer_name_counts():
    m,x = resnet18().eval(),torch.randn(1,3,64,64)
    for said,want in (({'layer1':.5, 'layer1.1':.25}, {'conv1':16, 'layer1.0.conv1':32, 'layer1.1.conv1':16}), ({'layer1':.5, 'conv1':0., 'layer1.0.conv1':.125}, {'layer1.0.conv1':8, 'layer1.1.conv1':32})):
        assert named(m, x, said)==named(m, x, dict(reversed(said.items())))==want
        assert {n:z for n,(z,_) in Sparsifier(m, x).masks(said).units.items() if z}==want
    for f in (Pruner(m, x).plan, Sparsifier(m, x).masks):
        with pytest.raises(ValueError, match="writes the same channels as 'conv1'"): f({'conv1':.5, 'layer1.0.conv2':.25})
        with pytest.raises(ValueError, match="'layer5'"): f({'layer5':.5})
        with pytest.raises(ValueError, match='keeps its shape'): f({'fc':.5})

class Nested(nn.Module):
    "Blocks in blocks, of different kinds"
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict(dict(words=nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 16)), moe=Experts(16, 2, 8), rnn=nn.ModuleList([nn.LSTM(16, 8, batch_first=True), nn.GRU(8, 6, batch_first=True)])))
        self.head = nn.Linear(6, 5)
    def forward(self, x):
        x = self.body['words'](x).relu()
        x = x+self.body['moe'](x)
        for r in self.body['rnn']: x = r(x)[0]
        return self.head(x.mean(1))

def test_blocks_of_other_kinds():
    torch.manual_seed(0)
    m = Nested().eval()
    for block,want in (('body.rnn', {'body.rnn.0':4, 'body.rnn.1':3}), ('body.moe', {'body.moe':4}), ('body.words', {'body.words.0':6, 'body.words.1':8})):
        assert {n:z for n,(z,_) in Sparsifier(m, WORDS[:2]).masks({block:.5}).units.items() if z}.items()>=want.items()
        assert named(m, WORDS[:2], {block:.5}).items()>=want.items()
    learn = Learner(word_dls(), m, loss_func=CrossEntropyLossFlat())
    with quiet(learn): learn.fit(1, 1e-3, cbs=(cb := SparsifyCallback({'body':.5, 'body.rnn':.25})))
    assert [cb.masks.units[n][0] for n in ('body.words.0','body.rnn.0','body.rnn.1')]==[6,2,1]
    learn.prune()
    assert [r.hidden_size for r in m.body['rnn']]==[6,5]

def test_blocks_inside_of_a_layer_granularity():
    s = Sparsifier(resnet18(), granularity='kernel')
    z = {n:a/b for n,(a,b) in s.masks({'layer1':.5, 'layer1.0':.25}).units.items() if a}
    assert z=={'layer1.0.conv1':.25, 'layer1.0.conv2':.25, 'layer1.1.conv1':.5, 'layer1.1.conv2':.5}
    with pytest.raises(ValueError, match="no layer 'layer9'; choose from 'conv1'"): s.masks({'layer9':.5})

# ---- shared kernels: a name means the layer that reads

def silent_inputs(m): return int((m.weight==0).all(dim=0).flatten(1).all(1).sum()) if m.weight.dim()>2 else int((m.weight==0).all(dim=0).sum())

def test_shared_kernels_of_a_named_layer():
    def make(): torch.manual_seed(0); return nn.Sequential(nn.Conv2d(10,20,3), nn.ReLU(), nn.Conv2d(20,8,3), nn.ReLU(), nn.Flatten(), nn.Linear(8*25,4))
    x = torch.randn(2,10,9,9)
    for name,want in (('2', [0,10,0]), ('5', [0,0,4*25]), ('0', [5,0,0])):
        m = make()
        s = Sparsifier(m, x, granularity='shared_kernel')
        masks = s.sparsify({name:.5})
        assert [silent_inputs(m[i]) for i in (0,2,5)]==want and m[0].bias.all() and sum(z for z,_ in masks.units.values())==want[1]+want[2]//25+want[0]
        assert s.masks({name:.5}).units==masks.units # asked again, nothing more
        y = run(m, x)
        gone = Pruner(m, x).prune().removed
        assert gone==sum(want[1:]) if name=='2' else gone==(4 if name=='5' else 0)
        assert rel(run(m, x), y)<1e-5
    assert named(make(), x, {'2':.5})=={'2':4} and {n:b-a for n,b,a in Pruner(make(), x).plan({'2':.5}, granularity='shared_kernel').rows()}=={'0':10}
    with pytest.raises(ValueError, match="'0' reads no channels that can be removed.*Sparsifier"): Pruner(make(), x).plan({'0':.5}, granularity='shared_kernel')

def test_a_layer_that_reads_several_groups_and_one_that_reads_the_image():
    class Dense(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.c,self.o = nn.Conv2d(4,6,1),nn.Conv2d(4,8,1),nn.Conv2d(14,10,3),nn.Conv2d(10,2,1)
        def forward(self, x): return self.o(self.c(torch.cat([self.a(x), self.b(x)], 1).relu()).relu())
    torch.manual_seed(0)
    m,x = Dense().eval(),torch.randn(2,4,6,6)
    Sparsifier(m, x, granularity='shared_kernel').sparsify({'c':.5, 'b':.25})
    assert [silent_inputs(l) for l in (m.a, m.b, m.c, m.o)]==[0,1,7,0]
    assert Pruner(m, x).prune().removed==7

def test_masks_of_the_first_layer_in_a_training():
    learn,cb = learner(),SparsifyCallback({'4':.5, '0':1.}, 'shared_kernel')
    fit(learn, 2, cbs=cb)
    assert [silent_inputs(learn.model[i]) for i in (0,4)]==[1,4] and cb.masks.units=={'0':(4,8), '4':(0,12), '0[input]':(1,1)}
    assert cb.history.sparsity.iloc[-1]==pytest.approx(5/21)

def test_a_block_names_no_image():
    m = nn.Sequential(nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU(), nn.Conv2d(8,8,3)), nn.Conv2d(8,4,1))
    Sparsifier(m, torch.randn(1,3,9,9), granularity='shared_kernel').sparsify({'0':.5})
    assert [silent_inputs(l) for l in (m[0][0], m[0][2], m[1])]==[0,4,0]

# ---- what stays, said before the training

class Width(nn.Module):
    def __init__(self, norm=nn.LayerNorm): super().__init__(); self.emb,self.norm,self.up,self.down,self.out = nn.Embedding(30,8),norm(8),nn.Linear(8,24),nn.Linear(24,8),nn.Linear(8,5)
    def forward(self, x): x = self.emb(x); return self.out((x+self.down(self.up(self.norm(x)).relu())).mean(1))

def staying(cb, model):
    learn = Learner(word_dls(), model, loss_func=CrossEntropyLossFlat())
    with warnings.catch_warnings(record=True) as w, quiet(learn):
        warnings.simplefilter('always')
        learn.fit(1, 1e-3, cbs=cb); learn.fit(1, 1e-3, cbs=cb)
    return learn,[str(o.message) for o in w if issubclass(o.category, PruningWarning)]

@pytest.mark.parametrize('make,name', [(Width, 'emb'), (lambda: Width(nn.RMSNorm), 'emb'), (gpt2, 'model.transformer.wte'), (mixtral, 'model.model.embed_tokens')])
def test_residual_widths_are_named_once_with_the_way_out(make, name):
    torch.manual_seed(0)
    learn,said = staying(cb := SparsifyCallback(.5), make())
    assert len(said)==1 and f"{name!r} (" in said[0] and 'exact_norms=True' in said[0] and f"ignore={name!r}" in said[0]
    whole,plan = sum(z for z,_ in cb.masks.units.values()),Pruner(learn.model, WORDS[:2]).plan()
    assert plan.removed==whole-cb.masks.units[name][0] # it is true: these stay, and all others go
    assert learn.prune(exact_norms=True).removed==whole # and so is the way out
    assert staying(SparsifyCallback(.5, ignore=name), make())[1]==[]

@pytest.mark.parametrize('name', ['lstm', 'gru both ways', 'attention'])
def test_nothing_is_said_where_all_can_go(name): assert staying(SparsifyCallback(.5), made(name))[1]==[]

def test_nothing_is_said_of_what_is_not_asked_for():
    for cb in (SparsifyCallback({'up':.5}), SparsifyCallback(.5, 'weight'), SparsifyCallback(0.)): assert staying(cb, Width())[1]==[]

# ---- zeros, after weights were loaded

def test_prune_changes_no_weight_that_was_loaded(tmp_path):
    learn = learner(tmp=tmp_path)
    fit(learn, 1); learn.save('dense')
    fit(learn, 1, cbs=SparsifyCallback(.5)); learn.save('sparse')
    learn.load('dense')
    before = weights(learn.model)
    with pytest.warns(NoEffectWarning): learn.prune()
    assert equal(before, weights(learn.model)) and not any(isinstance(c, KeepZeros) for c in learn.cbs)

def test_half_of_the_zeros_came_back(tmp_path):
    learn = learner(tmp=tmp_path)
    fit(learn, 2, cbs=[cb := SparsifyCallback(.5), SparsifyCallback(.75, 'weight', only='9')])
    with torch.no_grad(): learn.model[0].weight.add_(1.); learn.model[0].bias.add_(1.); learn.model[1].weight.add_(1.); learn.model[1].bias.add_(1.) # as a partial state that is loaded
    want,x = weights(learn.model),learn.dls.valid.one_batch()[0]
    y = run(learn.model.eval(), x)
    assert learn.prune().removed==6 and rel(run(learn.model, x), y)<1e-5
    assert torch.equal(learn.model[0].weight, want['0.weight'])
    keep = next(c for c in learn.cbs if isinstance(c, KeepZeros)).masks.keep
    assert set(keep)=={'9.weight'} # what was loaded is free, what is zero stays so
    fit(learn, 1)
    assert (learn.model[0].weight!=0).all() and int((learn.model[9].weight==0).sum())>=int((~keep['9.weight']).sum())>0

@pytest.mark.parametrize('how', [dict(sparsity=.25), dict(budget=Budget(macs=.6)), dict(sparsity={'4':.5})])
def test_by_a_criterion_too(how, tmp_path):
    learn = learner(tmp=tmp_path)
    learn.save('dense')
    fit(learn, 1, cbs=SparsifyCallback(.5)); learn.load('dense')
    by_hand = deepcopy(learn.model)
    learn.prune(x=torch.randn(2,1,8,8), **how); Pruner(by_hand, torch.randn(2,1,8,8)).prune(**how)
    assert equal(weights(learn.model), weights(by_hand))

def test_masks_that_are_obeyed():
    learn = learner()
    fit(learn, 1, cbs=SparsifyCallback(.5))
    masks = next(c for c in learn.cbs if isinstance(c, KeepZeros)).masks
    assert obeyed(masks, learn.model)==masks
    with torch.no_grad(): learn.model[0].weight[int((~masks.keep['0.weight'].flatten()).nonzero()[0]),0,1,1] = float('nan')
    left = obeyed(masks, learn.model)
    assert int((~left.keep['0.weight']).sum())==int((~masks.keep['0.weight']).sum())-1 and {n:k for n,k in left.keep.items() if n!='0.weight'}.keys()==masks.keep.keys()-{'0.weight'}
