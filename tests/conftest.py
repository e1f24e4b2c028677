"One thread: the networks of the tests are small, and threads that wait for each other on a shared machine are not faster"
import os

os.environ.setdefault('OMP_NUM_THREADS', '1') # for notebooks and commands that run in their own process, too

import torch

torch.set_num_threads(1)

def pytest_xdist_auto_num_workers(config):
    "A whole run is shared by the cores, file by file; what is named runs at once"
    whole = config.args==config.getini('testpaths')
    return len(os.sched_getaffinity(0)) if whole and hasattr(os, 'sched_getaffinity') else 0
