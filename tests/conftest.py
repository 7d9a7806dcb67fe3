"""One thread a process: the tests' tensors are small, and ranks and workers share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch  # noqa: E402

torch.set_num_threads(1)
