"The bundled digits, image folders, and the small network of the main job"
import random
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from fasterprune import data
from fasterprune.data import digits_dls, image_dls, small_resnet

def epochs(dls, n=2): return [(x.clone(), y.clone()) for _ in range(n) for x,y in dls.train]

def folder(path, classes=('a','b'), n=4):
    for i,c in enumerate(classes):
        (path/c).mkdir(parents=True)
        for j in range(n): Image.fromarray(np.full((12,9,3), 60*i+j, np.uint8)).save(path/c/f'{j}.png')
    return path

@pytest.mark.parametrize('size', [8, 16])
def test_digits_shapes(size):
    dls = digits_dls(bs=32, size=size)
    x, y = dls.one_batch()
    assert type(x) is torch.Tensor and x.shape == (32,1,size,size) and x.dtype == torch.float32
    assert y.dtype == torch.int64 and dls.c == 10 and str(x.device) == 'cpu'
    assert len(dls.train_ds) + len(dls.valid_ds) == 1797 and len(dls.valid_ds) == int(.2*1797)

def test_digits_are_standardised():
    x = torch.cat([torch.stack([d[0] for d in s]) for s in (digits_dls().train_ds, digits_dls().valid_ds)])
    assert abs(x.mean()) < 1e-4 and abs(x.std() - 1) < 1e-3

def test_digits_depend_on_the_seed_alone():
    random.seed(1); torch.manual_seed(1); a = epochs(digits_dls(seed=5))
    random.seed(2); torch.manual_seed(2); b = epochs(digits_dls(seed=5))
    assert all(torch.equal(p, q) for s,t in zip(a, b) for p,q in zip(s, t))
    c = epochs(digits_dls(seed=6))
    assert not torch.equal(a[0][0], c[0][0])
    assert not torch.equal(a[0][0], a[len(a)//2][0])          # each epoch has its own order

def test_digits_leave_the_global_generators_alone():
    torch.manual_seed(0); expected = torch.rand(3)
    torch.manual_seed(0); digits_dls()
    assert torch.equal(torch.rand(3), expected)

def test_training_and_validation_are_disjoint():
    dls = digits_dls(seed=1)
    train = {x.numpy().tobytes() for x,_ in dls.train_ds}
    assert len(train & {x.numpy().tobytes() for x,_ in dls.valid_ds}) <= 1      # the set itself holds a pair of equal images at most

def test_folder(tmp_path):
    dls = image_dls(folder(tmp_path), bs=3, size=16)
    x, y = dls.one_batch()
    assert x.shape == (3,3,16,16) and list(dls.vocab) == ['a','b'] and len(dls.valid_ds) == 1
    assert image_dls(tmp_path, bs=3, grey=True).one_batch()[0].shape == (3,1,32,32)

@pytest.mark.parametrize('train,valid', [('train','valid'), ('training','testing'), ('train','test'), ('train','val')])
def test_folder_with_a_split(tmp_path, train, valid):
    folder(tmp_path/train, n=5); folder(tmp_path/valid, n=2)
    dls = image_dls(tmp_path, bs=2)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (10, 4) and dls.c == 2
    assert all(p.parent.parent.name == valid for p in dls.valid_ds.items)

def test_a_folder_that_is_itself_called_test_is_split(tmp_path):
    assert len(image_dls(folder(tmp_path/'test', n=5), bs=2).valid_ds) == 2

@pytest.mark.parametrize('source', ['mnist', 'cifar'])
def test_a_failed_download_says_what_to_do(monkeypatch, source):
    def fail(url): raise OSError('no route to host')
    monkeypatch.setattr(data, 'untar_data', fail)
    with pytest.raises(ConnectionError, match=f"could not download '{source}' from http.*no route to host.*'digits'.*folder") as e: image_dls(source)
    assert e.value.args[0]

def test_a_downloaded_set_is_read(monkeypatch, tmp_path):
    folder(tmp_path/'training'); folder(tmp_path/'testing', n=1)
    monkeypatch.setattr(data, 'untar_data', lambda url: tmp_path)
    assert image_dls('mnist', bs=2).one_batch()[0].shape == (2,1,28,28)
    assert image_dls('cifar', bs=2).one_batch()[0].shape == (2,3,32,32)

@pytest.mark.parametrize('make,match', [
    (lambda: image_dls('imagenet'), "no data 'imagenet'; it must be 'digits', 'mnist', 'cifar', or a folder"),
    (lambda: digits_dls(valid_pct=20), "valid_pct is a fraction .* did you mean 0.2"),
    (lambda: digits_dls(valid_pct=1), "between 0 and 1, not 1"),
    (lambda: digits_dls(bs=0), "bs is a whole number, at least 1, not 0"),
    (lambda: digits_dls(size=8.5), "size is a whole number, at least 1, not 8.5"),
    (lambda: small_resnet(width=0), "width is a whole number, at least 1, not 0"),
    (lambda: small_resnet(n_classes=True), "n_classes is a whole number, at least 1, not True"),
])
def test_refused(make, match):
    with pytest.raises(ValueError, match=match): make()

def test_a_folder_without_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 images of 0 classes"): image_dls(tmp_path)

def test_small_resnet():
    m = small_resnet(3, 7, 8)
    assert m(torch.randn(2,3,17,23)).shape == (2,7)
    convs = [c for c in m.modules() if isinstance(c, nn.Conv2d)]
    assert all(c.bias is None for c in convs) and len(convs) == 9
    assert isinstance(m.stage1.shortcut, nn.Identity) and m.stage2.shortcut[0].stride == (2,2)
    assert [m.conv1.out_channels, *(getattr(m, f'stage{i}').conv2.out_channels for i in (1,2,3))] == [8,8,16,32]

def test_the_digits_are_learned():
    from fastai.callback.schedule import Learner
    from fastai.metrics import accuracy
    torch.manual_seed(0)
    learn = Learner(digits_dls(), small_resnet(), loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 5e-3)
    assert learn.recorder.values[-1][-1] >= .97
