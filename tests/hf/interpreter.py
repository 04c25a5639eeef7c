"""Triton's kernels on the CPU, by its interpreter, where there is no GPU. Import it before triton."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # read when triton and the modules with kernels are imported
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="needs triton")
