"The command: what it prints, what it writes, what it refuses, and that every option does something"
import re, subprocess, sys
from functools import partial
import pytest, torch
from PIL import Image
from fasterprune.measure.latency import compare_latency
from fasterprune.cli import Job, job_page, main, run_job, schedule_of, text_table

columns = ['', 'accuracy', 'parameters', 'nonzero', 'compression ratio', 'MACs', 'theoretical speedup', 'latency (ms)', 'measured speedup', 'file size (kB)']
names = ['dense', 'sparse', 'pruned', 'fine-tuned']
pictures = ['comparison', 'widths', 'schedule', 'history', 'lowest', 'mask']
command = [sys.executable, '-m', 'fasterprune']

@pytest.fixture(scope='module', autouse=True)
def quick():
    "Latencies are not what is tested here"
    with pytest.MonkeyPatch.context() as m:
        m.setattr('fasterprune.demo.job.compare_latency', partial(compare_latency, repeats=2, warmup=1))
        yield

@pytest.fixture(scope='module')
def result(): return run_job(Job(epochs=2))

@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "What the command writes and prints, in a process of its own"
    out = tmp_path_factory.mktemp('report')/'made'/'here'
    return out, subprocess.run([*command, '--epochs', '1', '--out', str(out)], capture_output=True, text=True)

def test_table(result):
    head,*rows = result.comparison.rows()
    assert head == columns and [r[0] for r in rows] == names
    t = result.comparison.table()
    assert t.loc['dense','accuracy'] > .9 and t.loc['dense','parameters'] > 2*t.loc['pruned','parameters']
    assert t.loc['sparse','parameters'] == t.loc['dense','parameters'] and t.loc['sparse','nonzero'] < t.loc['dense','nonzero']
    assert t.loc['pruned','theoretical speedup'] > 2 and t.loc['pruned','file size (kB)'] < t.loc['dense','file size (kB)']/2
    assert len(text_table(result.comparison.rows()).splitlines()) == 6

def test_pruned_equals_sparse(result):
    a = result.comparison.accuracy
    assert result.equal and result.error <= 1e-5 and a['pruned'] == a['sparse'] and result.report.error < 1e-10
    assert 'The pruned network equals the sparse one' in result.equality()
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    sparse,pruned = (result.models[n].double().eval() for n in ('sparse', 'pruned'))
    assert torch.allclose(sparse(x), pruned(x), rtol=0, atol=1e-10)
    for n in ('sparse', 'pruned'): result.models[n].float()

def test_measured_not_asked(result):
    assert int((result.models['sparse'].conv1.weight.flatten(1) == 0).all(1).sum()) == 16
    assert result.updates[-1]['sparsity'] == .5 and [h['epoch'] for h in result.history] == [1, 2, 3, 4, 5]
    assert len(result.rounds) == 2 and result.rounds[0].keys() == result.rounds[1].keys()

def test_same_seed_same_result(result):
    again = run_job(Job(epochs=2))
    for n in names: assert all(torch.equal(a, b) for a,b in zip(result.models[n].parameters(), again.models[n].parameters())), n

def test_leaves_nothing_behind():
    threads,state = torch.get_num_threads(),torch.get_rng_state()
    r = run_job(Job(epochs=1))
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for n in names for m in r.models[n].modules())

def test_command(written):
    out,p = written
    assert p.returncode == 0, p.stderr
    assert not p.stderr.strip()
    for n in names: assert re.search(rf'^{n} ', p.stdout, re.M), n
    assert 'The pruned network equals the sparse one' in p.stdout and str(out/'index.html') in p.stdout
    assert {f.name for f in out.iterdir()} == {'index.html', *(f'{n}.png' for n in pictures)}
    assert all(f.read_bytes()[:4] == b'\x89PNG' for f in out.glob('*.png'))

def test_page_stands_alone(written):
    page = (written[0]/'index.html').read_text(encoding='utf-8')
    links = re.findall(r'''(?:src|href|srcset|action)\s*=\s*['"]([^'"]{0,22})''', page)
    assert len(links) == 6 and all(l.startswith('data:image/png;base64,') for l in links)
    assert not re.search(r'https?://|<script|<link|@import|url\(|<iframe', page)
    for text in ('What came out', 'equals the sparse one', 'fine-tuned', 'stage3.conv1', 'fasterprune --sparsity 0.5'): assert text in page, text
    assert all(int(a) > 100 < int(b) for a,b in re.findall(r"width='(\d+)' height='(\d+)'", page))

def test_wrong_input_is_one_line(tmp_path):
    p = subprocess.run([*command, '--sparsity', '50', '--out', str(tmp_path)], capture_output=True, text=True)
    assert p.returncode == 1 and p.stderr == 'fasterprune: sparsity is a fraction in [0, 1], not 50.0; did you mean 0.5?\n' and not p.stdout

def test_help():
    p = subprocess.run([*command, '--help'], capture_output=True, text=True)
    assert p.returncode == 0
    for o in ('sparsity', 'granularity', 'criterion', 'context', 'schedule', 'epochs', 'data', 'out', 'seed', 'budget', 'round-to', 'per'): assert f'--{o}' in p.stdout

@pytest.mark.parametrize('kw,text', [
    (dict(sparsity=50), 'sparsity is a fraction in [0, 1], not 50; did you mean 0.5?'),
    (dict(sparsity=-.1), 'sparsity is a fraction in [0, 1], not -0.1; pass a number such as 0.5'),
    (dict(granularity='filtre'), "no granularity 'filtre'; did you mean 'filter'?"),
    (dict(granularity='frame'), "no layer of this model has units of granularity 'frame'"),
    (dict(granularity='weight', criterion='bn_scale'), "criterion 'bn_scale' scores whole channels by their normalisation"),
    (dict(criterion='l3'), "no criterion 'l3'; choose from '"),
    (dict(context='everywhere'), "no context 'everywhere'; choose from 'local', 'global'"),
    (dict(schedule='apg'), "no schedule 'apg'; did you mean 'agp'?"),
    (dict(budget='macs'), "budget: macs is a number, as in macs=0.5, not ''"),
    (dict(budget='flops=.5'), "budget: no cost 'flops'; choose from 'params', 'macs', 'latency', 'memory'"),
    (dict(budget='macs=50.5'), 'macs of a budget is a fraction in (0, 1]'),
    (dict(budget='macs=.5', granularity='weight'), "channels are pruned by granularity 'filter' or 'shared_kernel', not 'weight'"),
    (dict(round_to=0), 'round_to is a whole number of units, at least 1, not 0'),
    (dict(per='flops'), "per: no cost 'flops'; choose from 'params', 'macs'"),
    (dict(epochs=0), 'epochs is a whole number, at least 1, not 0'),
    (dict(seed=-1), 'seed is a whole number, at least 0, not -1'),
    (dict(data='nowhere'), "no data 'nowhere'; it must be 'digits', 'mnist', 'cifar', or a folder"),
])
def test_refusals_come_before_training(kw, text, tmp_path, monkeypatch):
    monkeypatch.setattr('fasterprune.cli.run_job', lambda *a, **k: pytest.fail('it trained'))
    with pytest.raises(SystemExit) as e: main(**kw, out=tmp_path)
    assert str(e.value).startswith('fasterprune: ') and text in str(e.value)

def test_out_is_a_folder(tmp_path):
    (tmp_path/'file').write_text('mine')
    with pytest.raises(SystemExit, match='is a file; give another name'): main(out=tmp_path/'file')
    assert (tmp_path/'file').read_text() == 'mine'

def images(folder, n):
    "Folders of dark and of light images"
    for c,v in (('dark', 0), ('light', 200)):
        (folder/c).mkdir(parents=True)
        for i in range(n): Image.new('RGB', (32, 32), (v+i, v, v)).save(folder/c/f'{i}.png')
    return str(folder)

def test_few_images(tmp_path):
    with pytest.raises(SystemExit, match='has 5 images to train on and 1 to validate; at least 64 and 1 are needed'): main(data=images(tmp_path/'data', 3), out=tmp_path/'out')

def test_folder_of_images(tmp_path):
    r = run_job(Job(data=images(tmp_path/'data', 40), epochs=1))
    assert r.images == 16 and r.equal and r.models['pruned'].conv1.weight.shape == (16, 3, 3, 3) and r.models['pruned'].fc.out_features == 2

@pytest.mark.parametrize('kw', [dict(sparsity=.25), dict(criterion='random'), dict(seed=1), dict(epochs=2)])
def test_options_have_an_effect(kw):
    a,b = (run_job(Job(**dict(epochs=1)|k)) for k in ({}, kw))
    assert not torch.equal(a.models['sparse'].conv1.weight, b.models['sparse'].conv1.weight) and a.equal and b.equal

def test_context_has_an_effect():
    a,b = (run_job(Job(epochs=1, context=c, criterion='l2')) for c in ('local', 'global'))
    assert a.report.rows() != b.report.rows() and b.equal

@pytest.mark.parametrize('kw', [dict(budget='macs=.3', round_to=4), dict(budget='params=.4,macs=.5', context='isomorphic'), dict(context='isomorphic', round_to=8), dict(budget='macs=.5', per='macs', granularity='shared_kernel')])
def test_planned_jobs(kw):
    "What is removed after the training is what was planned before it"
    r = run_job(Job(epochs=1, **kw))
    assert r.equal and r.report.removed and all(b%kw.get('round_to', 1)==0 for _,_,b in r.report.rows()), r.report
    d,p = r.comparison['dense'],r.comparison['pruned']
    left = [getattr(p, k)/getattr(d, k)/float(v) for k,v in (b.split('=') for b in kw.get('budget', '').split(',') if b)]
    assert not left or .85<max(left)<=1
    assert r.updates[-1]['sparsity']==pytest.approx(r.updates[-1]['requested']) and all(f"--{k.replace('_', '-')} {v}" in r.job.command for k,v in kw.items())
    page = job_page(r, {n: b'\x89PNG\r\n\x1a\n'+bytes(16) for n in pictures})
    assert kw.get('budget', 'of the units become zero') in page

def test_schedule_has_an_effect():
    asked = {s: [schedule_of(Job(schedule=s))(k/3, .5) for k in range(4)] for s in ('agp', 'one_shot', 'linear')}
    assert asked['one_shot'] == [0, 0, .5, .5] and asked['agp'][1] > asked['linear'][1] > 0 and all(v[-1] == .5 for v in asked.values())
    assert run_job(Job(epochs=4, schedule='one_shot')).updates[0]['sparsity'] == 0

@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'row'])
def test_zeros_that_cannot_be_removed(granularity, recwarn):
    r = run_job(Job(granularity=granularity, epochs=1))
    c = r.comparison
    assert c['pruned'].params == c['dense'].params and c['sparse'].nonzero == c['pruned'].nonzero < .6*c['dense'].nonzero
    assert c['fine-tuned'].nonzero <= c['sparse'].nonzero, 'zeros stay zero while the network is fine-tuned'
    assert r.equal and 'Nothing was removed' in r.equality() and not r.explained()
    assert not [w for w in recwarn if 'nothing is dead' in str(w.message)]
    assert 'Nothing was removed' in job_page(r, {n: b'\x89PNG\r\n\x1a\n'+bytes(16) for n in pictures})

def test_shared_kernels_are_removed():
    r = run_job(Job(granularity='shared_kernel', epochs=1))
    assert r.equal and r.report.removed and r.comparison['pruned'].params < r.comparison['dense'].params/2

@pytest.mark.parametrize('kw', [dict(sparsity=0.), dict(sparsity=1.), dict(schedule='dsd')])
def test_ends_of_the_range(kw, tmp_path):
    r = run_job(Job(**kw, epochs=1))
    assert r.equal and isinstance(r.equality(), str)
