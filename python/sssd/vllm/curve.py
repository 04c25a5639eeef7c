"""What passes cost before an engine has been timed."""

import logging
from typing import Any

from sssd.hardware import CostCurve
from sssd.hardware.roofline import DEVICES, Device, ModelShape, known_device, roofline

logger = logging.getLogger("vllm.sssd")

_UNKNOWN = ModelShape("unknown", 7e9, 32, 32, 8, 128)


def first_curve(path: str | None, runner: Any) -> CostCurve:
    """The curve to begin with: a measured one, or that of the model's shape on the device's data sheet. The
    rule corrects it by the times of steps.

    Args:
        path: file of a measured curve.
        runner: vLLM's model runner.

    Raises:
        CostCurveError, OSError: the file cannot be used.
    """
    if path is not None:
        return CostCurve.load(path)
    try:
        shape = _shape(runner)
    except Exception as problem:
        logger.debug("sssd: the shape of the model is not known: %s", problem)
        shape = _UNKNOWN
    return roofline(_device(runner), shape, packed=True)


def _shape(runner: Any) -> ModelShape:
    """The part of the model that this worker holds."""
    config, parallel = runner.model_config, runner.parallel_config
    weights = list(runner.get_model().parameters())
    return ModelShape(
        name=str(config.model),
        parameters=float(sum(weight.numel() for weight in weights)),
        layers=int(config.get_num_layers(parallel)),
        heads=int(config.get_num_attention_heads(parallel)),
        kv_heads=int(config.get_num_kv_heads(parallel)),
        head_dim=int(config.get_head_size()),
        bytes=max(1, weights[0].element_size()),
    )


def _device(runner: Any) -> Device:
    """The data sheet that fits best; a fast GPU if none does."""
    if getattr(getattr(runner, "device", None), "type", "cpu") == "cpu":
        return DEVICES["cpu"]
    import torch

    return known_device(torch.cuda.get_device_name(runner.device)) or DEVICES["NVIDIA A100"]
