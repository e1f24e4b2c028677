"Tests of the tests beside fastai: each passes, and fails when the behaviour that it is about is taken out"
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Lock
import pytest, torch
from fastai.callback.core import CancelFitException
from torch import nn
sys.path += [str(Path(__file__).resolve().parents[1]/f) for f in ('callback', 'criteria')]
import test_fastai_compat as company, test_resume as resume, test_stats as stats
from fasterprune.callback import base as frame, keep_zeros as keep, prune, sparsify
from fasterprune.callback.base import TrainingCallback
from fasterprune.callback.keep_zeros import KeepZeros
from fasterprune.callback.sparsify import SparsifyCallback
from fasterprune.sparse import masks, sparsifier
from fasterprune.sparse.sparsifier import Sparsifier
from fasterprune.sparse.units import LayerUnits
from fasterprune.surgery.cutting import apply
from fasterprune.surgery.capture import tracer as capture

pytestmark = pytest.mark.filterwarnings('ignore')
torch.set_num_threads(1)

# ---- what is taken out: functions of pytest's monkeypatch

def nothing(*a, **k): pass
def gone(*places): return lambda p: [p.setattr(c, n, nothing) for c,n in places]
def followed(c, n, f): # by what should not happen
    whole = getattr(c, n)
    def both(self): whole(self); f(self)
    return lambda p: p.setattr(c, n, both)

zeros_after_a_step = gone((KeepZeros, 'after_step'))
zeros_after_the_best = gone((KeepZeros, 'after_fit'))
dense_epochs_do_not_count = gone((sparsify, 'reset_trackers'))
choices = gone((SparsifyCallback, 'before_train'))
taken_down = gone((TrainingCallback, 'take_down'))
def folded(p): p.setattr(apply, 'fold_steps', lambda *a: [])
zeros_after_an_error = gone((SparsifyCallback, 'interrupted'))
known_step = gone((KeepZeros, 'before_step')) # whether a step has its zeros
nothing_on_the_model = followed(KeepZeros, '_pair', lambda self: self.model.register_buffer('kept', torch.zeros(3)))
can_be_pickled = followed(SparsifyCallback, 'start', lambda self: setattr(self, 'own', Lock()))
resumed_masks = gone((KeepZeros, 'load_state_dict'), (SparsifyCallback, 'load_state_dict'))

def columns(p): p.setattr(SparsifyCallback, 'columns', lambda self: {})
def off_in_lr_find(p): # and in validation
    for m in (frame, keep): p.setattr(m, 'is_training', lambda learn: True)
def off_while_predicting(p): p.setattr(SparsifyCallback, 'before_batch', lambda self: self._update_here() if self._on and isinstance(self.every, int) else None)
def frozen_too(p):
    whole = keep.keep_only_
    p.setattr(keep, 'keep_only_', lambda w, *a: whole(w, *a) if w.requires_grad else None)
def zeros_of_an_earlier_fit(p): p.setattr(KeepZeros, 'after_fit', lambda self: vars(self).update(masks=None, _pairs=None))
def zeros_that_were_found(p):
    whole = Sparsifier.masks
    p.setattr(Sparsifier, 'masks', lambda self, s, regrow=False: whole(self, s, regrow=True))
    p.setattr(SparsifyCallback, '_inherited_masks', property(nothing, nothing), raising=False)
def heard_of_an_error(p): p.setattr(TrainingCallback, 'learn', property(lambda self: vars(self).get('_learn'), lambda self, l: vars(self).update(_learn=l)))
def place_in_the_schedule(p):
    whole = SparsifyCallback._update
    def update(self, k, n): self._first = vars(self).setdefault('_first', k); whole(self, k-self._first, n)
    p.setattr(SparsifyCallback, '_update', update)
def unwrapped(p):
    for m in (keep, masks, prune, sparsifier, sparsify): p.setattr(m, 'unwrap', lambda model: model)
def plain_outputs(p): p.setattr(capture, 'plain_operators_', lambda: torch.set_grad_enabled(False))
def several_inputs(p):
    for m in (company, prune, sparsify): p.setattr(m, 'example_batch', lambda learn: frame.example_batch(learn)[:1])
def tied(p):
    whole = nn.Module.named_parameters
    p.setattr(LayerUnits, 'weights', property(lambda self: {n:f'{n}.weight' for n in self.layers}))
    p.setattr(nn.Module, 'named_parameters', lambda self, prefix='', recurse=True, remove_duplicate=True: whole(self, prefix, recurse))
def averages(p): p.setattr(prune, 'copies_of', lambda also: [])
def loss_before_mixup(p): p.setattr(SparsifyCallback, '_loss', property(lambda self: self.learn.loss_func, nothing), raising=False)

# ---- by which test it is noticed

def by(name, *args, tmp=False, of=company): return lambda path: getattr(of, name)(*args, **dict(tmp_path=path) if tmp else {})
files = partial(by, tmp=True)
interrupted = lambda when, error, order=0: by('test_interrupted', when, error, order)

REMOVED = {
    'SaveModelCallback, best: not a dense epoch': (dense_epochs_do_not_count, files('test_best_epoch_is_one_at_full_sparsity')),
    'SaveModelCallback, best: masked when it is loaded': (zeros_after_the_best, files('test_an_older_file_is_masked_when_it_is_loaded')),
    'SaveModelCallback, every epoch': (zeros_after_a_step, files('test_every_epoch_is_saved')),
    'EarlyStopping': (dense_epochs_do_not_count, by('test_early_stopping_waits_for_the_target')),
    'ReduceLROnPlateau': (dense_epochs_do_not_count, by('test_reduce_lr_waits_for_the_target')),
    **{f'beside {who}': (zeros_after_a_step, by('test_company', who)) for who in company.COMPANY},
    'MixUp: the loss that it replaces': (loss_before_mixup, by('test_beside_mixup', of=stats)),
    'averages: cut along': (averages, by('test_average_of_the_weights')),
    'freeze: frozen layers are masked': (frozen_too, by('test_frozen_layers_are_masked_too_and_stay_frozen')),
    'fine_tune: zeros stay in both phases': (zeros_of_an_earlier_fit, by('test_fine_tune_after_sparsify_keeps_zeros_in_both_phases')),
    'fine_tune with the callback': (frozen_too, by('test_fine_tune')),
    **{f'discriminative rates, {f}': (zeros_after_a_step, by('test_discriminative_rates', f)) for f in ('fit', 'fit_one_cycle', 'fit_flat_cos', 'fit_sgdr')},
    'lr_find: nothing is chosen': (off_in_lr_find, files('test_lr_find_and_validation_with_the_callback_on_board')),
    'lr_find: zeros stay': (zeros_after_a_step, files('test_lr_find_with_zeros_trains_with_zeros')),
    'validate and get_preds: nothing is masked': (off_in_lr_find, files('test_validation_does_not_touch_a_loaded_model')),
    'get_preds while training': (off_while_predicting, by('test_predictions_fetched_while_training', 1)),
    'learn.save and learn.load': (nothing_on_the_model, files('test_save_and_load_hold_the_model_and_nothing_else')),
    'learn.save in a training': (zeros_after_a_step, files('test_learn_save_in_the_middle_of_training')),
    'learn.export': (can_be_pickled, files('test_export_and_copy')),
    'start_epoch': (place_in_the_schedule, files('test_resume_with_start_epoch')),
    'a killed process': (resumed_masks, files('test_masks_of_an_earlier_fit_come_along', of=resume)),
    'fit again with a higher target': (zeros_that_were_found, by('test_second_fit_with_a_higher_target')),
    'fit again without the callback': (zeros_of_an_earlier_fit, by('test_zeros_stay_in_a_fit_without_the_callback', partial(company.SGD, mom=.9))),
    'an exception: taken down': (heard_of_an_error, interrupted('after_pred', RuntimeError)),
    'KeyboardInterrupt: taken down': (heard_of_an_error, interrupted('after_batch', KeyboardInterrupt)),
    'CancelFit: taken down': (taken_down, interrupted('after_loss', CancelFitException)),
    'an exception between a step and its zeros, with the callback': (zeros_after_an_error, interrupted('after_step', RuntimeError, -100)),
    'an exception between a step and its zeros, without it': (known_step, by('test_interrupted_between_a_step_and_its_zeros')),
    'CSVLogger': (columns, files('test_logged_like_any_metric')),
    'TensorBoard': (columns, files('test_tensorboard')),
    'vision_learner': (frozen_too, by('test_vision_learner')),
    'unet_learner: the classes stay': (plain_outputs, by('test_unet_learner')),
    'tabular_learner: several inputs': (several_inputs, by('test_tabular_learner')),
    'text_classifier_learner': (zeros_after_a_step, by('test_text_classifier_learner')),
    'language_model_learner: tied weights': (tied, by('test_language_model_learner')),
    'without BatchNorm: constants are folded': (folded, by('test_without_batchnorm')),
    'torch.compile': (unwrapped, by('test_compiled')),
    'anything at all is chosen': (choices, by('test_exactly_the_target_and_nothing_left_behind')),
}

@pytest.mark.parametrize('name', REMOVED)
def test_it_is_noticed(name, monkeypatch, tmp_path):
    if name=='TensorBoard': pytest.importorskip('tensorboard')
    remove,noticed_by = REMOVED[name]
    for d in ('whole', 'removed'): (tmp_path/d).mkdir()
    noticed_by(tmp_path/'whole')
    remove(monkeypatch)
    with pytest.raises((Exception, pytest.fail.Exception)): noticed_by(tmp_path/'removed')
