"fastai's AWD-LSTM through its own learners: sparsified, pruned and trained on; its sizes follow, its state goes from batch to batch"
import io, pickle
import pytest, torch
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.text.all import AWD_LSTM, LMDataLoader, awd_lstm_clas_config, awd_lstm_lm_config, language_model_learner, text_classifier_learner
from fastai.text.models.core import get_language_model, get_text_classifier
from fastcore.foundation import L
from torch import nn
from fasterprune.all import *
from support.small_fit import quiet

pytestmark = pytest.mark.filterwarnings('ignore')
SMALL = dict(emb_sz=16, n_hid=24, n_layers=2)
STILL = dict(hidden_p=0., input_p=0., embed_p=0., weight_p=0., output_p=0.)

def sentences(n=120):
    x = torch.randint(2, 20, (n,12), generator=torch.Generator().manual_seed(0))
    return x,(x[:,0]>9).long()

def classifier(seq_len=12, **config):
    torch.manual_seed(0)
    x,y = sentences()
    dls = DataLoaders.from_dsets(*[torch.utils.data.TensorDataset(x[i], y[i]) for i in (slice(80), slice(80, None))], bs=40, num_workers=0, device='cpu')
    dls.vocab = L(['w']*20, ['a','b'])
    return text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=awd_lstm_clas_config|SMALL|config, n_out=2, loss_func=CrossEntropyLossFlat(), metrics=accuracy, seq_len=seq_len)

def language(**config):
    torch.manual_seed(0)
    items = list(sentences()[0].reshape(-1, 60))
    dls = DataLoaders(*[LMDataLoader(i, bs=4, seq_len=12, num_workers=0) for i in (items[:16], items[16:])])
    dls.vocab = ['w']*20
    return language_model_learner(dls, AWD_LSTM, pretrained=False, config=awd_lstm_lm_config|SMALL|config, metrics=accuracy)

def lstm_of(m): return next(c for c in m.modules() if isinstance(c, AWD_LSTM))
def widths(m): return [r.module.hidden_size*lstm_of(m).n_dir for r in lstm_of(m).rnns]

@torch.no_grad()
def said(m, batches):
    "What a model says to batches in a row, from a fresh state"
    was = m.training
    m.eval().reset()
    res = [m(x)[0].clone() for x in batches]
    m.train(was).reset()
    return res

def near(a, b, tol=1e-5): assert len(a)==len(b) and max(((x-y).abs().max()/y.abs().max()).item() for x,y in zip(a, b))<tol

def follows(m):
    "Its numbers say what there is, so that a fresh state fits"
    lstm = lstm_of(m)
    assert widths(m)==[lstm.n_hid]*(lstm.n_layers-1)+[lstm.emb_sz]
    assert all(h.shape[-1]*lstm.n_dir==w for hs,w in zip(lstm.hidden, widths(m)) for h in hs)

BATCHES = [torch.randint(2, 20, s, generator=torch.Generator().manual_seed(i)) for i,s in enumerate([(2,12), (2,7), (5,30), (1,1)])]

# ---- through learners

KINDS = {'classifier': (classifier, {}), 'classifier of 3': (classifier, dict(n_layers=3)), 'classifier both ways': (classifier, dict(bidir=True, n_layers=3)), 'long texts': (classifier, dict(seq_len=5)),
    'language': (language, {}), 'language of 4': (language, dict(n_layers=4)), 'language, not tied': (language, dict(tie_weights=False, n_layers=3)), 'one layer': (classifier, dict(n_layers=1))}

@pytest.mark.parametrize('kind', KINDS)
def test_sparse_pruned_and_trained_on(kind, tmp_path):
    make,config = KINDS[kind]
    learn = make(**config)
    learn.path = tmp_path
    cb = SparsifyCallback(.5)
    with quiet(learn): learn.fit_one_cycle(2, 1e-2, cbs=cb)
    lstm = lstm_of(learn.model)
    if lstm.n_layers>1: assert any('rnns.0' in n and (z,k)[0]*2==k for n,(z,k) in cb.masks.units.items())
    want,units = said(learn.model, BATCHES),sum(z for z,_ in cb.masks.units.values())
    r = learn.prune()
    assert r.removed==units
    assert lstm.n_hid==(12 if lstm.n_layers>1 else 24) and lstm.emb_sz==16
    follows(learn.model)
    near(said(learn.model, BATCHES), want)
    before = [p.clone() for p in learn.model.parameters()]
    with quiet(learn): learn.fit(1, 1e-2); learn.validate(); learn.save('pruned')
    assert sum(not torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))>len(before)/2
    follows(learn.model)
    learn.load('pruned')
    torch.save(learn.model, f := io.BytesIO())
    assert b'fasterprune' not in f.getvalue() # fastai alone can load it
    f.seek(0)
    near(said(torch.load(f, weights_only=False), BATCHES), said(learn.model, BATCHES))

@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('kind', ['classifier of 3', 'language of 4'])
def test_layers_keep_one_width(kind, context):
    make,config = KINDS[kind]
    learn,cb = make(**config),SparsifyCallback(.3, context=context)
    with quiet(learn): learn.fit(1, 1e-2, cbs=cb)
    zero = [int((r.weight_hh_l0_raw.view(4, -1, r.weight_hh_l0_raw.shape[1])==0).all(dim=2).all(dim=0).sum()) for r in lstm_of(learn.model).rnns]
    assert len(set(zero[:-1]))==1 and zero[-1]==0
    want = said(learn.model, BATCHES)
    learn.prune()
    assert lstm_of(learn.model).n_hid==24-zero[0]
    follows(learn.model); near(said(learn.model, BATCHES), want)

def test_cut_while_it_trains():
    learn = language(n_layers=3)
    with quiet(learn): learn.fit(3, 1e-2, cbs=PruneCallback(.5, schedule='linear'))
    assert lstm_of(learn.model).n_hid==12
    follows(learn.model)

def test_pruned_by_a_criterion_and_by_a_budget():
    for how in (dict(sparsity=.5), dict(sparsity={'0.module.rnns.1':.25}), dict(budget=Budget(params=.6))):
        learn = classifier(n_layers=3)
        n = sum(p.numel() for p in learn.model.parameters())
        r = learn.prune(**how)
        assert r.removed and sum(p.numel() for p in learn.model.parameters())<n
        follows(learn.model)
        with quiet(learn): learn.fit(1, 1e-2)

# ---- without learners

MODELS = {'classifier': lambda: get_text_classifier(AWD_LSTM, 20, 2, config=awd_lstm_clas_config|SMALL|dict(n_layers=3)),
    'both ways': lambda: get_text_classifier(AWD_LSTM, 20, 3, config=awd_lstm_clas_config|SMALL|dict(n_layers=4, bidir=True), lin_ftrs=[30,20], ps=[.1,.1]),
    'language': lambda: get_language_model(AWD_LSTM, 20, config=awd_lstm_lm_config|SMALL|dict(n_layers=3, tie_weights=False)),
    'decoder of its own': lambda: Tagger()}

class Tagger(nn.Module):
    "The LSTM in somebody else's model, with an attention over its layers' outputs"
    def __init__(self):
        super().__init__()
        self.body,self.score,self.out = AWD_LSTM(20, 16, 24, 3),nn.Linear(16,1),nn.Linear(16,4)
    def reset(self): self.body.reset()
    def forward(self, x):
        h = self.body(x)
        return self.out((h*self.score(h).softmax(1)).sum(1)),

@pytest.mark.parametrize('name', MODELS)
def test_models_alone(name):
    torch.manual_seed(0)
    m = MODELS[name]().eval()
    x = torch.randint(2, 20, (2,12))
    s = Sparsifier(m, x)
    assert {g.name for g in s.units.groups}=={g.name for g in Pruner(m, x).couple().groups if g.primary}
    masks = s.sparsify(.5)
    want,r = said(m, BATCHES),Pruner(m, x).prune()
    assert r.removed==sum(z for z,_ in masks.units.values()) and lstm_of(m).n_hid==12
    m.reset(); follows(m)
    near(said(m, BATCHES), want)
    near(said(pickle.loads(pickle.dumps(m)), BATCHES), want)

@pytest.mark.parametrize('name', MODELS)
def test_a_second_pruning_and_other_inputs(name):
    torch.manual_seed(0)
    m = MODELS[name]().eval()
    for x,n in ((torch.randint(2, 20, (2,12)), 12), (torch.randint(2, 20, (3,9)), 6)):
        Pruner(m, x).prune(.5)
        m.reset()
        assert lstm_of(m).n_hid==n
        follows(m)
    said(m, BATCHES)

def test_the_state_of_the_users_model_is_left_alone():
    m = get_language_model(AWD_LSTM, 20, config=awd_lstm_lm_config|SMALL).eval()
    m.reset()
    x = torch.randint(2, 20, (4,12))
    with torch.no_grad(): m(x)
    before = [h.clone() for hs in lstm_of(m).hidden for h in hs]
    Pruner(m, torch.randint(2, 20, (2,5))).plan(.5)
    Sparsifier(m, torch.randint(2, 20, (2,5))).masks(.5)
    after = [h for hs in lstm_of(m).hidden for h in hs]
    assert lstm_of(m).bs==4 and all(type(h) is torch.Tensor and torch.equal(a, h) for a,h in zip(before, after))
