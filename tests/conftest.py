"""Settings of every test process: kernels are interpreted without a GPU, and one thread computes."""

from __future__ import annotations

import os

import torch

# Before anything imports triton, which reads it as kernels are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# As many test processes as cores run at once; threads that wait for each other would cost far more than they save.
torch.set_num_threads(1)
