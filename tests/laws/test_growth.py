"Twice the network, about twice the time: what was quadratic stays so no longer"
import sys
from pathlib import Path
import pytest, torch
sys.path.insert(0, str(Path(__file__).resolve().parents[2]/'benchmarks'))
import growth

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')] # timed: they say nothing on a busy machine

@pytest.mark.parametrize('name', growth.NETS)
def test_growth(name):
    "Processor time of a whole cut: each size is twice the one before, and takes at most 2.6 times as long"
    torch.set_num_threads(1)
    found = growth.growth(name)
    ratios = [b[1]/a[1] for a,b in zip(found, found[1:])]
    assert all(r<=growth.LIMIT for r in ratios), f"{found}: {', '.join(f'{r:.2f}×' for r in ratios)}"
