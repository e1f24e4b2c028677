"Schedules: golden values, exactness at the ends, refusals"
import copy, math, pickle
import pytest, torch, numpy as np
from hypothesis import given, settings, strategies as st
from fasterprune.schedule import *

P = .1, .25, .5, .75, .9

@pytest.mark.parametrize('s,want', [
    (agp(), (.271, .578125, .875, .984375, .999)),
    (one_cycle(), (.026600, .182448, .880906, .996053, .999623)),
    (one_cycle(beta=6), (.009955, .075884, .731304, .989345, .998976)),
    (linear(), P),
    (cosine(), tuple((1-math.cos(math.pi*p))/2 for p in P)),
    (dsd(), tuple((1-math.cos(2*math.pi*p))/2 for p in P)),
    (agp(power=1), P)])
def test_golden(s, want): assert [s(p, 1.) for p in P] == pytest.approx(want, abs=1e-6)

def test_golden_at_zero():
    assert one_cycle()(0, 1.) == pytest.approx(.006694, abs=1e-6) and one_cycle(beta=6)(0, 1.) == pytest.approx(.002473, abs=1e-6)
    assert all(as_schedule(n)(0, .9) == 0 for n in schedules if n != 'one_cycle')

@pytest.mark.parametrize('n,q,want', [(3, .535841, (.5358, .7846, .9)), (5, .369043, (.3690, .6019, .7488, .8415, .9)), (10, .205672, None)])
def test_geometric_rounds(n, q, want):
    s = iterative(n, 'geometric', start=0)
    got = [s(j/n, .9) for j in range(n+1)]
    assert [1-(1-b)/(1-a) for a,b in zip(got, got[1:])] == pytest.approx([q]*n, abs=1e-6)
    if want: assert got[1:] == pytest.approx(want, abs=1e-4)

def test_iterative_linear_is_a_staircase():
    s = iterative(3, start=0)
    assert [s(p, .9) for p in (0, .01, 1/3, .34, 2/3, .67, 1)] == pytest.approx([0, .3, .3, .6, .6, .9, .9])

def test_exponential_is_geometric_in_density():
    d = [1-exponential(initial=.2)(k/10, .95) for k in range(11)]
    assert [b/a for a,b in zip(d, d[1:])] == pytest.approx([(.05/.8)**.1]*10)

def test_one_shot_at_40_percent():
    assert [one_shot()(p, .7) for p in (0, .3999, .4, .5, 1)] == [0, 0, .7, .7, .7]
    assert one_shot(initial=.1)(0, .7) == .1

@pytest.mark.parametrize('name', list(schedules))
def test_ends_are_exact(name):
    for start, end in ((0, 1), (.1, .7), (.33, .34)):
        kw = dict(start=start) if name == 'one_shot' else dict(start=start, end=end)
        for initial in (0., .1, .3):
            s = schedules[name](**kw, initial=initial)
            for target in (.3, .7, .8, .9, .95, .99, 1/3, 1.):
                assert s(start-1e-6, target) == initial
                assert s(end, target) == s(1, target) or name == 'one_shot'
                assert s(1, target) == (initial if name == 'dsd' else target)

@pytest.mark.parametrize('name', [n for n in schedules if n != 'dsd'])
def test_never_falls(name):
    s = as_schedule(name)
    v = [s(k/200, .9) for k in range(201)]
    assert all(b >= a for a,b in zip(v, v[1:])) and all(0 <= x <= .9 for x in v)

@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(schedules)), pct=st.floats(0, 1), target=st.floats(0, 1), initial=st.floats(0, 1))
def test_stays_between_initial_and_target(name, pct, target, initial):
    s = schedules[name](initial=initial)(pct, target)
    assert min(initial, target)-1e-9 <= s <= target+1e-9

@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 500), end=st.floats(.05, 1), target=st.floats(0, 1))
def test_last_update_is_exactly_on_target(n, end, target):
    assert Schedule.progress(n-1, n) == 1
    assert agp(end=end)(agp().progress(n-1, n), target) == target

def test_target_below_initial_starts_there(): assert [agp(initial=.5)(p, .2) for p in (0, .5, 1)] == [.2, .2, .2]

def test_a_schedule_is_a_value():
    s = agp(.1, .8, .05, 2)
    assert s == agp(.1, .8, .05, 2) and hash(s) == hash(agp(.1, .8, .05, 2)) and s != agp(.1, .8, .05, 3)
    assert pickle.loads(pickle.dumps(s)) == s and copy.deepcopy(s) == s
    assert repr(s) == 'agp(start=0.1, end=0.8, initial=0.05, power=2)'
    with pytest.raises(AttributeError): s.end = .9
    for n in schedules: assert pickle.loads(pickle.dumps(as_schedule(n))) == as_schedule(n)

# your own
def square(p): return p*p

def test_function():
    s = as_schedule(square)
    assert s.name == 'square' and s(.5, .8) == pytest.approx(.2) and s(1, .8) == .8 and as_schedule(square) == s
    assert as_schedule(lambda p: np.float32(p))(1, .5) == .5 and as_schedule(lambda p: torch.tensor(p))(1, .5) == .5
    assert as_schedule(s) is s and as_schedule('cosine') == cosine()

def test_fastai_curves_are_functions():
    from fastai.callback.schedule import SchedCos
    assert as_schedule(SchedCos(0, 1))(.5, .8) == pytest.approx(cosine()(.5, .8))

# refusals
def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError) as e: as_schedule('apg')
    assert str(e.value) == f"no schedule 'apg'; did you mean 'agp'? choose from {', '.join(map(repr, schedules))}"

@pytest.mark.parametrize('f,text', [
    (lambda: as_schedule(agp), 'schedule=agp is the function that makes a schedule; call it: agp()'),
    (lambda: as_schedule(3), 'a schedule is a name, a Schedule or a function of progress, not 3; the names are one_shot'),
    (lambda: as_schedule(None), 'not None'),
    (lambda: Schedule('agp'), "a schedule's curve is a function (p, s_i, s_f) → sparsity, not 'agp'"),
    (lambda: agp(.5, .5), "a schedule's start=0.5 must be before its end=0.5"),
    (lambda: cosine(.7, .2), "a schedule's start=0.7 must be before its end=0.2"),
    (lambda: one_shot(1.), "a schedule's start=1.0 must be before its end=1.0"),
    (lambda: agp(end=75), 'end is a fraction in [0, 1], not 75; did you mean 0.75?'),
    (lambda: agp(start=-.1), 'start is a fraction in [0, 1], not -0.1'),
    (lambda: agp(initial=20), 'initial is a fraction in [0, 1], not 20; did you mean 0.2?'),
    (lambda: agp(initial=True), 'initial is a fraction in [0, 1], not True'),
    (lambda: iterative(0), 'iterative takes a whole number of rounds, at least 1, not n=0'),
    (lambda: iterative(2.5), 'not n=2.5'),
    (lambda: iterative(kind='log'), "no kind of iterative schedule 'log'; choose from 'linear', 'geometric'"),
    (lambda: agp(power=0), 'agp takes an exponent above 0, not power=0'),
    (lambda: agp(power=float('nan')), 'not power=nan'),
    (lambda: one_cycle(alpha=0), 'one_cycle takes alpha in (0, 100] and beta in [-100, 100], not alpha=0, beta=5.0'),
    (lambda: as_schedule(lambda p: float('nan') if p == .5 else p), "schedule '<lambda>' returns nan at p=0.5; it must return a number in [0, 1] for every p in [0, 1]"),
    (lambda: as_schedule(lambda p: 1-2*p), 'returns -0.02'),
    (lambda: as_schedule(lambda p: 1.1*p), 'it must return a number in [0, 1]'),
    (lambda: as_schedule(lambda p: None), 'returns None at p=0.0'),
    (lambda: as_schedule(lambda p: 'x'), "returns 'x' at p=0.0"),
    (lambda: Schedule(lambda p, a, b: 2., name='mine'), "schedule 'mine' returns 2.0 at p=0.0")])
def test_refused_at_construction(f, text):
    with pytest.raises((ValueError, TypeError)) as e: f()
    assert text in e.value.args[0]

# rounds by the part of what is left
@pytest.mark.parametrize('q,target,n', [(.2, .9, 11), (.5, .9, 4), (.2, .2, 1), (.2, .36, 2), (.2, .1, 1), (.2, 0., 0), (.9, .9, 1)])
def test_rounds_by_a_fraction_of_the_remaining(q, target, n):
    assert n_rounds(q, target) == n
    s = geometric(q, start=0)
    got = [s(k/max(n, 1), target) for k in range(n+1)]
    assert got[-1] == target and all((1-b)/(1-a) == pytest.approx(1-q) for a,b in zip(got, got[1:-1])) # all but the last remove exactly the part
    if n: assert 1-(1-got[-1])/(1-got[-2]) <= q+1e-9 # the last one what is missing

def test_geometric_from_an_initial_sparsity():
    s = geometric(.5, start=0, initial=.5)
    assert n_rounds(.5, .9, .5) == 3 and [s(k/3, .9) for k in range(4)] == pytest.approx([.5, .75, .875, .9])
    assert geometric(.2)(1, 1.) == 1. and geometric(.2)(.95, 1.) < 1

# one after the other
def test_phases():
    assert agp().phases(.2, .3) == agp(.2, .7) and one_shot(.5).phases(.2).start == pytest.approx(.6)
    s = cosine().phases(warmup=.25, finetune=.25)
    assert [s(p, .8) for p in (0, .2499, .5, .75, 1)] == pytest.approx([0, 0, .4, .8, .8]) and s(.75, .8) == .8
    two = linear().then(linear(), share=.5).phases(.5)
    assert [two(p, .8) for p in (.5, .625, .75, .875, 1)] == pytest.approx([0, .2, .4, .6, .8])

def test_then_is_continuous_and_exact():
    for a in (linear(), agp(), cosine(), iterative(), one_cycle()):
        for b in (linear(), agp(), geometric()):
            for at in (.1, .5, 1/3):
                s = a.then(b, at=at, share=.6)
                assert s(1, .9) == .9 and s(at, .9) == pytest.approx(.54, abs=1e-9 if b.name!='one_cycle' else .01)
                v = [s(k/200, .9) for k in range(201)]
                assert all(y >= x-1e-9 for x,y in zip(v, v[1:]))

def test_then_of_then_and_a_fall():
    hard = hold(0).then(hold(1).then(hold(0)), at=1/3)
    assert [hard(p, .8) for p in (0, .33, .34, .66, .67, 1)] == [0, 0, .8, .8, 0, 0]
    s = agp(initial=.1).then('cosine', share=.5) # by name, and the first one's initial sparsity
    assert s(0, .9) == pytest.approx(.1) and s(.5, .9) == pytest.approx(.5) and s(1, .9) == .9
    assert linear().then(dsd())(1, .9) == linear().then(dsd())(.5, .9) == .9 # what dsd returns to is where it began

def test_composed_schedules_are_values():
    s = one_shot(0).then(iterative(4, start=0), at=.3, share=.6)
    assert s == one_shot(0).then(iterative(4, start=0), at=.3, share=.6) and hash(s) and pickle.loads(pickle.dumps(s)) == s == copy.deepcopy(s)
    assert repr(linear().then(cosine())) == 'linear(start=0.0, end=1.0, initial=0.0).then(cosine(start=0.0, end=1.0, initial=0.0), at=0.5, share=1.0)'
    assert eval(repr(linear().then(cosine()))) == linear().then(cosine())
    assert repr(geometric(.3)) == 'geometric(start=0.2, end=1.0, initial=0.0, fraction=0.3)'

def test_course():
    assert linear().course(3, .8) == [(0., 0.), (.5, .4), (1., .8)] and agp().course(1) == [(1., 1.)]

@pytest.mark.parametrize('f,text', [
    (lambda: geometric(1.), 'in (0, 1), not fraction=1.0'),
    (lambda: geometric(0), 'in (0, 1), not fraction=0'),
    (lambda: geometric(20), 'fraction is a fraction in [0, 1], not 20; did you mean 0.2?'),
    (lambda: agp().phases(.6, .4), 'warmup=0.6 and finetune=0.4 leave no training for the schedule; together they must be below 1'),
    (lambda: agp().phases(10), 'warmup is a fraction in [0, 1], not 10; did you mean 0.1?'),
    (lambda: agp().then('cosine', at=0), 'then(..., at=0): one schedule follows another at a part of training between 0 and 1'),
    (lambda: agp().then('cosin'), "no schedule 'cosin'; did you mean 'cosine'?"),
    (lambda: agp().then(cosine), 'schedule=cosine is the function that makes a schedule; call it: cosine()'),
    (lambda: agp().then('cosine', share=50), 'share is a fraction in [0, 1], not 50; did you mean 0.5?'),
    (lambda: hold(2), 'share is a fraction in [0, 1], not 2'),
    (lambda: agp().course(0), 'at least 1, not n=0')])
def test_composition_refuses(f, text):
    with pytest.raises((ValueError, TypeError)) as e: f()
    assert text in e.value.args[0]
