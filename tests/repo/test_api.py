"The public surface: what `fasterprune.all` promises, and that all of it is documented"
import ast, dataclasses, importlib, inspect, pkgutil
import pytest
import fasterprune, fasterprune.all as fp
from fastai.learner import Learner
from fastcore.docments import docments

PUBLIC = set('''Budget Criterion Granularity GroupLassoCallback GroupSparsityCallback GrowingCallback Growth KeepZeros Latency Masks Checkpoint NoEffectWarning PKP PKPCallback Patience
    Plan PruneCallback Pruner PruningError PruningWarning RegrowCallback CheckpointCallback Report ResumeCallback Schedule SlimmingCallback
    Sparsifier SparsifyCallback Statistic VerificationError adapter agp agreement allocate apply_ compare compare_latency compression_ratio contexts cosine couple
    criteria digits_dls dsd erk evaluate exhibit exponential file_size geometric granularities hold image_dls importance iterative keep_top latency layer_storage linear
    lottery_ticket lowest model_storage normalizers one_cycle one_shot participation pkp_rounds plot_agreement plot_compare plot_curves plot_gallery plot_granularities
    plot_groups plot_history plot_lowest plot_mask plot_matrix plot_plan plot_schedule plot_schedules plot_scores plot_widths recalibrate_ register rewind_ rule
    schedules semi_structured_ sensitivity silenced small_resnet theoretical_speedup'''.split())
MODULES = [m.name for m in pkgutil.walk_packages(fasterprune.__path__, 'fasterprune.') if not m.ispkg and m.name.split('.')[-1] not in ('_modidx', '__main__')]

def test_public_names(): assert set(fp.__all__)==PUBLIC, f"new: {sorted(set(fp.__all__)-PUBLIC)}, gone: {sorted(PUBLIC-set(fp.__all__))}; change this list and the CHANGELOG with them"
def test_star_import_gives_these_and_no_more():
    ns = {}
    exec('from fasterprune.all import *', ns)
    assert set(ns)-{'__builtins__'}==PUBLIC
def test_learners_can_prune(): assert Learner.prune.__module__=='fasterprune.callback.prune'
def test_registries_are_shown_as_tables():
    for r in (fp.criteria, fp.granularities, fp.schedules, fp.normalizers): assert len(repr(r).splitlines())==len(r)+1 and r._repr_markdown_().startswith('|')

# ---- signatures, and the names of the options that scripts rely on

SIGNATURES = {
    'SparsifyCallback': 'sparsity granularity context criterion schedule * every regrow normalizer only ignore count x n_batches reduce',
    'PruneCallback': 'sparsity * budget criterion granularity context normalizer min_keep max_ratio round_to per reduce n_batches recalibrate compensate rescale verify only ignore exact_norms schedule every x also whole',
    'PKP': 'model x * mode p protect_until protect_out silence count only ignore', 'PKPCallback': 'sparsity * mode p protect_until protect_out silence count only ignore rounds moderate schedule end x',
    'lottery_ticket': 'learn sparsity n_epoch lr * fraction rewind epoch step granularity context criterion only ignore fit cbs', 'rewind_': 'learn checkpoint * optimizer',
    'Sparsifier': 'model x * granularity context criterion normalizer only ignore count data n_batches loss_func reduce evidence',
    'Pruner': 'model x * only ignore examples exact_norms',
    'Pruner.prune': 'self sparsity * budget criterion granularity context normalizer min_keep max_ratio round_to per reduce data n_batches loss_func optimizer also recalibrate compensate rescale verify',
    'Pruner.plan': 'self sparsity * budget criterion granularity context normalizer min_keep max_ratio round_to per reduce data n_batches loss_func',
    'Budget': 'params macs latency memory', 'adapter': 'kinds * watch_only sizes attrs', 'apply_': 'model plan optimizer * later', 'recalibrate_': 'model dl n_batches * n_inp progress',
    'Sparsifier.masks': 'self sparsity * regrow', 'Sparsifier.sparsify': 'self sparsity', 'Masks.apply_': 'self model', 'Masks': 'keep units',
    'KeepZeros': 'masks', 'Schedule': 'curve start end initial name options', 'agp': 'start end initial power', 'one_cycle': 'alpha beta * start end initial',
    'iterative': 'n kind * start end initial', 'one_shot': 'start initial', 'digits_dls': 'bs valid_pct seed * size device',
    'keep_top': 'scores fraction * min_keep', 'allocate': 'scores sparsity * context count costs min_keep max_ratio round_to sets parts classes',
}
def get(path):
    o = fp
    for k in path.split('.'): o = getattr(o, k)
    return o
def spelled(f):
    res,star = [],False
    for p in inspect.signature(f).parameters.values():
        if p.kind==p.KEYWORD_ONLY and not star: res.append('*'); star = True
        res.append(p.name)
    return ' '.join(res)

@pytest.mark.parametrize('path', SIGNATURES)
def test_signatures(path): assert spelled(get(path))==SIGNATURES[path]
def test_learn_prune_has_the_options_of_the_pruner():
    of = lambda f: {k:p.default for k,p in inspect.signature(f).parameters.items() if k not in ('self','model','x','optimizer')}
    assert of(Learner.prune)=={**of(fp.Pruner), **of(fp.Pruner.prune)} and spelled(Learner.prune).startswith('self sparsity * budget criterion')

# ---- documented

def functions(o): # the functions of an object of the surface: itself, or its constructor and public methods
    if inspect.isclass(o):
        if issubclass(o, (Exception, Warning)): return
        own = lambda f: inspect.isfunction(f) and f.__module__.startswith('fasterprune')
        for k,f in vars(o).items():
            if own(f) and (k=='__init__' and not dataclasses.is_dataclass(o) or k=='__call__' or not k.startswith('_')) : yield f"{o.__name__}.{k}",f
    elif inspect.isfunction(o): yield o.__name__,o

HELPFUL = ('Sparsifier.__init__', 'SparsifyCallback.__init__', 'Pruner.__init__', 'PKP.__init__') # help() shows the text of each option
OWN_NAMES = {('adapter','attrs')} # keywords that are names of the user's, not options
EVENTS = {'before_fit','before_train','before_batch','before_backward','after_backward','before_step','after_step','after_batch','after_train','after_epoch','after_fit'} # their names say when, and what is in the class
DOCUMENTED = [(n,f) for k in sorted(PUBLIC) for n,f in functions(getattr(fp, k)) if n.split('.')[-1] not in EVENTS]+[('Learner.prune', Learner.prune)]

@pytest.mark.parametrize('name,f', DOCUMENTED, ids=[n for n,_ in DOCUMENTED])
def test_documented(name, f):
    if not name.endswith(('__init__', '__call__')) : assert f.__doc__ and '\n' not in f.__doc__.strip().split('\n\n')[0], f"{name} needs a docstring that begins with one line"
    docs = docments(f)
    if hasattr(f, '__delwrap__') or name in HELPFUL: assert all(f"  {n}: " in f.__doc__ for n in docs if n not in ('self', 'return')), f"help({name}) shows no text for some parameter"
    for p in inspect.signature(f).parameters.values():
        if p.name in ('self', 'cls') or (name,p.name) in OWN_NAMES: continue
        said = docs.get(p.name)
        assert said or p.name in ('model', 'learn'), f"{name}: parameter {p.name!r} is not documented"
        assert p.annotation is not p.empty or said, f"{name}: parameter {p.name!r} has neither a type nor a comment"
        assert p.kind is not p.VAR_KEYWORD, f"{name}: options are spelled out, not passed on in **{p.name}"

@pytest.mark.parametrize('name', sorted(n for n in PUBLIC if inspect.isclass(getattr(fp, n))))
def test_classes_are_documented(name):
    c = getattr(fp, name)
    assert c.__doc__ and not c.__doc__.startswith(name+'(')
    if dataclasses.is_dataclass(c):
        assert c.__dataclass_params__.frozen, f"{name} is a value, so it is frozen"
        docs = docments(c)
        for f in dataclasses.fields(c): assert docs.get(f.name), f"{name}.{f.name} is not documented"

@pytest.mark.parametrize('module', MODULES)
def test_modules_are_documented_and_say_what_is_public(module):
    m = importlib.import_module(module)
    assert m.__doc__ and isinstance(m.__all__, list) and all(hasattr(m, n) for n in m.__all__)
    for n in m.__all__:
        o = getattr(m, n)
        if inspect.isfunction(o) and o.__module__==module and module!='fasterprune.surgery.coupling.rules': # rules bear the names of operators
            assert o.__doc__, f"{module}.{n} needs a docstring"

def test_errors_are_kinds_of_what_python_has():
    assert issubclass(fp.PruningError, RuntimeError) and issubclass(fp.VerificationError, fp.PruningError) and issubclass(fp.NoEffectWarning, UserWarning) and issubclass(fp.PruningWarning, UserWarning)
