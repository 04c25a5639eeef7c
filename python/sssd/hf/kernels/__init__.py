"""Triton kernels of the passes on a GPU, and plain PyTorch of the same. Only their use imports triton."""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch

DEVICES = {"cuda"}
"""Types of devices on which they run."""


def why_not(device: Any, dtype: Any, head_dim: int) -> str | None:
    """Why they cannot serve a model; None if they can."""
    if device.type not in DEVICES:
        return f"there are none for {device.type}"
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        return "the GPU is older than those they are compiled for, or of another maker"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"there are none for {dtype}"
    if not 8 <= head_dim <= 256 or head_dim % 8:
        return f"there are none for heads of size {head_dim}"
    return None


def on(device: Any) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one, where kernels are launched; of other devices it does nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
