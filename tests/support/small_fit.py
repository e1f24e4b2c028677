"A training of three small batches an epoch, for tests of callbacks"
import random
from contextlib import contextmanager
import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch import nn
from torch.utils.data import TensorDataset
from fasterprune.data import digits_dls

def small_dls(n=96, bs=32, **kw):
    x,y = digits_dls(**kw).train.dataset.tensors
    dls = DataLoaders.from_dsets(TensorDataset(x[:n], y[:n]), TensorDataset(x[n:n+64], y[n:n+64]), bs=bs, num_workers=0, device='cpu')
    dls.train.rng = random.Random(0)
    return dls

def tiny(): # two convolutions that are not coupled, and a head
    return nn.Sequential(nn.Conv2d(1,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8,12,3,padding=1),
                         nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12,10))

def learner(model=tiny, tmp=None, seed=0, dls=None, metrics=accuracy, **kw): # of a model, or of a function that makes one
    torch.manual_seed(seed); random.seed(seed); np.random.seed(seed)
    model = model if isinstance(model, nn.Module) else model()
    return Learner(small_dls() if dls is None else dls, model, loss_func=CrossEntropyLossFlat(), metrics=metrics, path=tmp, model_dir='.', **kw)

@contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(): yield

def fit(learn, n=3, lr=1e-2, **kw):
    with quiet(learn): learn.fit(n, lr, **kw)
    return learn

def weights(m): return {n:t.clone() for n,t in m.state_dict().items()}
def equal(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

class Spy(Callback):
    "Calls `f` at one event"
    def __init__(self, when, f, order=100): self.f,self.order = f,order; setattr(self, when, lambda: f(self.learn))
