"One thread: the networks of the tests are small, and threads that wait for each other on a shared machine are not faster"
import torch

torch.set_num_threads(1)
