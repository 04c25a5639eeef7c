"""Triton's kernels on the CPU, by its interpreter, where there is no GPU. To be imported before triton."""

import importlib.util
import os

if importlib.util.find_spec("torch") is None:
    DEVICE = None
else:
    import torch

    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # read when triton and the modules with kernels are imported
    os.environ["TRITON_INTERPRET"] = "1"
