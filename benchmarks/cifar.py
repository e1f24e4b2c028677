"CIFAR-10 from one file of JPEGs, ResNet-20, and its training; what other benchmarks measure on: `python benchmarks/cifar.py` trains"
import argparse, io, random, time, warnings
from functools import lru_cache, partial
from pathlib import Path
import numpy as np
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import fit_one_cycle # patches Learner
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from torch import nn

HERE = Path(__file__).resolve().parent.parent
DATA,CACHE = HERE.parent/'shared'/'data'/'cifar10_jpeg.npz',HERE/'.cache'
SHIPPED = Path(__file__).with_name('resnet20.npz') # what `python benchmarks/cifar.py` came to
MEAN,STD = (0.4914,0.4822,0.4465),(0.2470,0.2435,0.2616)
FAST = bool(getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)()) # then bfloat16 halves the time

# -- images ---------------------------------------------------------------------------------------
def decoded(path=DATA, cache=CACHE):
    "`dict` of uint8 images [n,32,32,3] and int64 labels of both parts; JPEGs are decoded once"
    from PIL import Image
    kept = cache/'cifar10_uint8.npz'
    if not kept.exists():
        if not Path(path).exists(): raise FileNotFoundError(f"no CIFAR-10 at {str(path)!r}: a file of JPEGs with train_jpeg, train_offsets, train_labels and the same for test; give its place with --data")
        z,out = np.load(path),{}
        for part in ('train','test'):
            raw,at = z[f'{part}_jpeg'].tobytes(),z[f'{part}_offsets']
            out[f'{part}_x'] = np.stack([np.asarray(Image.open(io.BytesIO(raw[a:b])).convert('RGB')) for a,b in zip(at, at[1:])])
            out[f'{part}_y'] = z[f'{part}_labels'].astype(np.int64)
        cache.mkdir(exist_ok=True)
        part = kept.with_suffix('.part.npz')
        np.savez(part, **out); part.replace(kept)
    z = np.load(kept)
    return {k:torch.from_numpy(z[k]) for k in z.files}

def normalised(x):
    "uint8 [n,h,w,3] → float [n,3,h,w], in the memory format that convolutions like"
    scale = 255*torch.tensor(STD)
    return ((x.float()-255*torch.tensor(MEAN))/scale).permute(0,3,1,2)

PAD = 4 # crops are up to so many pixels off

def crops(x, idx, dy, dx, flip):
    "Crops of images that are continued by their reflection: with zeros around them, BatchNorm would learn statistics that no test image has"
    r = torch.arange(32)
    inside = lambda at: 31-(31-at.abs()).abs()
    return normalised(x[idx[:,None,None], inside(dy[:,None]-PAD+r)[:,:,None], inside(dx[:,None]-PAD+torch.where(flip[:,None]==1, 31-r, r))[:,None,:]])

class Images:
    "Batches from tensors; for training cropped and flipped"
    def __init__(self, x, y, augment, seed=0):
        self.x,self.y,self.augment = x,y,augment
        self.rng = torch.Generator().manual_seed(seed)
    def __len__(self): return len(self.y)
    def batch(self, idx):
        idx = torch.as_tensor(idx)
        if not self.augment: return normalised(self.x[idx]),self.y[idx]
        dy,dx,flip = (torch.randint(k, (len(idx),), generator=self.rng) for k in (2*PAD+1,2*PAD+1,2))
        return crops(self.x, idx, dy, dx, flip),self.y[idx]

def loader(images, bs, shuffle, seed=0):
    "A fastai `DataLoader` that takes whole batches"
    dl = DataLoader(range(len(images)), bs=bs, shuffle=shuffle, drop_last=shuffle, create_batch=lambda idx: images.batch(idx), device=torch.device('cpu'), num_workers=0)
    dl.rng = random.Random(seed)
    return dl

def loaders(train, valid, bs=128, seed=0):
    "Training batches, and those to validate with, of (images, labels)"
    return DataLoaders(loader(Images(*train, True, seed), bs, True, seed), loader(Images(*valid, False), 500, False), device='cpu')

def part(d, name, at=slice(None)): return d[f'{name}_x'][at],d[f'{name}_y'][at]

# -- network --------------------------------------------------------------------------------------
class Block(nn.Module):
    "Two convolutions and a shortcut, which is a 1×1 convolution where the shape changes (option B of arXiv 1512.03385)"
    def __init__(self, n_in, n_out, stride=1):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False),nn.BatchNorm2d(n_out)
        self.conv2,self.bn2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False),nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU()
        self.short = nn.Identity() if n_in==n_out and stride==1 else nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
    def forward(self, x): return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))+self.short(x))

class ResNet(nn.Module):
    "The network of He et al. for CIFAR-10, of 6n+2 layers"
    def __init__(self, n=3, width=16, classes=10):
        super().__init__()
        self.conv1,self.bn1,self.relu = nn.Conv2d(3, width, 3, 1, 1, bias=False),nn.BatchNorm2d(width),nn.ReLU()
        stage = lambda i,o,s: nn.Sequential(Block(i, o, s), *(Block(o, o) for _ in range(n-1)))
        self.stage1,self.stage2,self.stage3 = stage(width, width, 1),stage(width, 2*width, 2),stage(2*width, 4*width, 2)
        self.fc = nn.Linear(4*width, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight, mode='fan_out')
    def forward(self, x): return self.fc(self.stage3(self.stage2(self.stage1(self.relu(self.bn1(self.conv1(x)))))).mean((2,3)))

def resnet20(): return ResNet(3).to(memory_format=torch.channels_last)

# -- training -------------------------------------------------------------------------------------
class Bf16(Callback):
    "bfloat16 where autocast thinks it safe, on the processor"
    order = MixedPrecision.order
    def before_batch(self): self.cast = torch.autocast('cpu', torch.bfloat16); self.cast.__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.done()
    def after_cancel_batch(self): self.done()
    def after_cancel_fit(self): self.done()
    def done(self):
        if getattr(self, 'cast', None) is not None: self.cast.__exit__(None, None, None)
        self.cast = None

def saved(values, path):
    "All of a file or nothing of it"
    part = path.with_suffix('.part')
    torch.save(values, part); part.replace(path)
    return values

class Kept(Callback):
    "Everything that is needed to go on, after each epoch, and a line about it"
    order = Recorder.order+20
    def __init__(self, path, said=print): self.path,self.said,self.start,self.before = Path(path),said,0,0.
    def before_fit(self): self.began = time.perf_counter()
    def after_epoch(self):
        if self.epoch<self.start: return # done before
        saved(dict(epoch=self.epoch+1, model=self.model.state_dict(), opt=self.opt.state_dict(), spent=self.spent()), self.path)
        loss,valid,acc = [float(v) for v in self.recorder.values[-1]]
        self.said(f"epoch {self.epoch+1:>3} of {self.n_epoch}   training loss {loss:.4f}   test accuracy {acc:.4f}   {self.spent():.0f} s", flush=True)
    def spent(self): return self.before+time.perf_counter()-self.began

def learner(model, dls, smoothing=.1, wd=5e-4, bf16=True):
    "SGD with momentum and weight decay in the gradient, as in the papers"
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    learn = Learner(dls, model, loss_func=loss, opt_func=partial(SGD, mom=.9, decouple_wd=False), metrics=accuracy, wd=wd, wd_bn_bias=True, cbs=Bf16() if bf16 else None)
    learn.remove_cb(ProgressCallback)
    return learn

def trained(data=DATA, cache=CACHE, epochs=60, lr=.1, bs=128, seed=0, said=print, anew=False):
    "ResNet-20 and its training: `dict(model=weights, accuracy=, seconds=, epochs=)`; from the cache, from beside this script unless `anew`, or from the last epoch if it was stopped"
    final,half = cache/'resnet20.pt',cache/'resnet20.half.pt'
    if final.exists(): return torch.load(final, weights_only=True)
    if SHIPPED.exists() and not anew: return shipped()
    d = decoded(data, cache)
    res = _trained(d, half, epochs, lr, bs, seed, said)
    res = saved(res|dict(accuracy=correct(learned(res), d)), final)
    half.unlink(missing_ok=True)
    return res

def ship(res, path=SHIPPED):
    "Write it for the repository: the first bytes of all numbers, then the second ones, ..., which is the smallest that keeps each bit"
    flat = np.concatenate([t.float().numpy().ravel() for t in res['model'].values()])
    np.savez_compressed(path, bytes=np.ascontiguousarray(flat.view(np.uint8).reshape(-1, 4).T), **{k:v for k,v in res.items() if k!='model'})

def shipped(path=SHIPPED):
    "The network that is in the repository, as `trained` says it"
    z,like = np.load(path),resnet20().state_dict()
    flat = torch.from_numpy(np.ascontiguousarray(z['bytes'].T).view(np.float32).ravel())
    model = {n:v.view(t.shape).to(t.dtype) for (n,t),v in zip(like.items(), flat.split([t.numel() for t in like.values()]))}
    return dict(model=model, accuracy=float(z['accuracy']), seconds=float(z['seconds']), epochs=int(z['epochs']))

def learned(res):
    "The network that was trained"
    m = resnet20()
    m.load_state_dict(res['model'])
    return m.eval()

def _trained(d, half, epochs, lr, bs, seed, said):
    torch.manual_seed(seed)
    learn = learner(resnet20(), loaders(part(d, 'train'), part(d, 'test'), bs, seed), bf16=FAST)
    kept = Kept(half, said)
    learn.add_cb(kept)
    learn.create_opt()
    if half.exists():
        s = torch.load(half, weights_only=False) # our own file; fastai's optimizer states are lists of its own kind
        learn.model.load_state_dict(s['model']); learn.opt.load_state_dict(s['opt'])
        kept.start,kept.before = s['epoch'],s['spent']
        learn.dls.train.rng = random.Random(seed+kept.start)
    with learn.no_logging(): learn.fit_one_cycle(epochs, lr, div=10, pct_start=.2, moms=(.9,.9,.9), start_epoch=kept.start)
    return dict(model=learn.model.state_dict(), seconds=kept.spent(), epochs=epochs)

def correct(model, d, bs=100, bf16=False):
    "Fraction of the test images that are classified rightly, all of them"
    model.eval()
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        return sum((model(normalised(d['test_x'][i:i+bs])).argmax(1)==d['test_y'][i:i+bs]).sum().item() for i in range(0, len(d['test_y']), bs))/len(d['test_y'])

# -- for other benchmarks -------------------------------------------------------------------------
def network(a):
    "Train what is not trained yet, and say how good it is; False if there are no images"
    if not a.data.exists() and not (a.cache/'cifar10_uint8.npz').exists(): print(f"skipped: no CIFAR-10 at {str(a.data)!r}; give its place with --data"); return False
    torch.set_num_threads(a.workers); warnings.simplefilter('ignore')
    net = trained(a.data, a.cache)
    torch.set_num_threads(1)
    print(f"ResNet-20: {net['accuracy']:.4f} on the test images after {net['epochs']} epochs, {net['seconds']:.0f} s", flush=True)
    return True

@lru_cache(1)
def ready(data, cache):
    "Images, and the trained network"
    return decoded(data, cache),learned(trained(data, cache))

class Untested(Callback):
    "Test images are looked at once, after the training"
    def before_validate(self): raise CancelValidException

def drawn(d, n, seed): return torch.randperm(len(d['train_y']), generator=torch.Generator().manual_seed(seed))[:n]
def held(d, n=2000): return drawn(d, n, 10_000) # training images that choose something, so that test images do not

def tuned(model, d, seed, steps=150, bs=128, cbs=()):
    "The same short training for all: images, order and crops depend on the seed alone"
    dls = loaders(part(d, 'train', drawn(d, steps*bs, 200+seed)), part(d, 'test'), bs, seed)
    torch.manual_seed(seed)
    learn = learner(model, dls, bf16=FAST)
    learn.add_cbs([Untested(), *cbs])
    with learn.no_logging(): learn.fit_one_cycle(1, .05, div=5, pct_start=.2, moms=(.9,.9,.9))
    return learn.model.eval()

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--data', type=Path, default=DATA); p.add_argument('--cache', type=Path, default=CACHE)
    p.add_argument('--epochs', type=int, default=60); p.add_argument('--lr', type=float, default=.1); p.add_argument('--bs', type=int, default=128); p.add_argument('--threads', type=int, default=1)
    p.add_argument('--ship', action='store_true', help='put it beside this script')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    warnings.simplefilter('ignore')
    r = trained(a.data, a.cache, a.epochs, a.lr, a.bs, anew=True)
    if a.ship: ship(r)
    print(f"ResNet-20: {r['accuracy']:.4f} on the test images after {r['epochs']} epochs, {r['seconds']:.0f} s")
