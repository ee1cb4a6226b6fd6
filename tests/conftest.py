"""Set before anything imports triton, which reads it as kernels are defined: without a GPU they are interpreted."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
