"One thread: the networks of the tests are small, and threads that wait for each other on a shared machine are not faster"
import os

os.environ.setdefault('OMP_NUM_THREADS', '1') # for notebooks and commands that run in their own process, too

import torch

torch.set_num_threads(1)
