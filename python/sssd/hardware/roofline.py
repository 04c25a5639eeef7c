"""Cost curves from device figures and the shape of a model, where nothing was measured.

The roofline model (Williams, Waterman, Patterson, 2009): a kernel takes as long as its arithmetic or its
memory traffic, whichever is longer. Reality lies above: nothing here knows of launches, tile sizes or
communication.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sssd.hardware.curve import CostCurve, DraftCost


@dataclass(frozen=True)
class Device:
    """What a device reaches on real kernels.

    Attributes:
        name: For people.
        flops: Dense matrix arithmetic, FLOP/s.
        bandwidth: Memory traffic, bytes/s.
        intensity: FLOP/byte by the data sheet.
    """

    name: str
    flops: float
    bandwidth: float
    intensity: float


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer.

    Attributes:
        name: For people.
        parameters: Weights that a pass multiplies with, output layer included, input embedding not.
        layers: Number of layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Size of a head.
        bytes: Of a weight, and of a number in the cache.
    """

    name: str
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    bytes: int = 2

    @classmethod
    def of(cls, model: Any) -> "ModelShape":
        """The shape of a Hugging Face model."""
        config = model.config.get_text_config(decoder=True)
        embedding = model.get_input_embeddings().weight
        tied = model.get_output_embeddings() is None or model.get_output_embeddings().weight is embedding
        parameters = sum(parameter.numel() for parameter in model.parameters())
        heads = config.num_attention_heads
        return cls(
            name=type(model).__name__,
            parameters=parameters if tied else parameters - embedding.numel(),
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            bytes=embedding.element_size(),
        )


_COMPUTE_SHARE, _MEMORY_SHARE = 0.80, 0.90
"""Of the data sheet, what one H200 was seen to reach: 788 of 989 TFLOP/s in a bfloat16 product of 8192 rows,
4.3 of 4.8 TB/s in a copy."""


def _gpu(name: str, teraflops: float, terabytes: float) -> Device:
    figures = teraflops * 1e12, terabytes * 1e12
    return Device(name, figures[0] * _COMPUTE_SHARE, figures[1] * _MEMORY_SHARE, figures[0] / figures[1])


DEVICES = {
    device.name: device
    for device in (
        _gpu("NVIDIA H100", 989, 3.35),
        _gpu("NVIDIA H200", 989, 4.8),
        _gpu("NVIDIA A100", 312, 2.04),
        _gpu("NVIDIA L40S", 362, 0.864),
        _gpu("NVIDIA B200", 2250, 8.0),
        # two cores of a server; the online correction finds the rest
        Device("cpu", 200e9, 25e9, 8.0),
    )
}
"""Data sheets (SXM parts, dense bfloat16), times the share of them that was seen in practice."""


def known_device(name: str) -> Device | None:
    """The data sheet of a device by the name that it has for its system, None if there is none."""
    return next((device for known, device in DEVICES.items() if name.startswith(known)), None)


LLAMA_3_8B = ModelShape("Llama-3-8B", 7.505e9, 32, 32, 8, 128)

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CONTEXTS = (0, 1024, 2048, 4096, 8192, 16384, 32768, 131072)


def roofline(
    device: Device, model: ModelShape, *, packed: bool = True, draft: DraftCost | None = None
) -> CostCurve:
    """The curve of a model on a device that nobody has measured.

    Args:
        device: Its figures, of :data:`DEVICES` or your own.
        model: The shape of the model.
        packed: As in :class:`CostCurve`.
        draft: What drafting costs; by default as measured with a datastore of 30.9 M tokens, for 8 threads.
    """
    tokens = np.array(
        [1, 2, 4, 8, 16, 32, 64, *range(96, 1025, 32), 2048, 4096, 16384]
        if packed
        else [1, 2, 4, 8, *range(16, 257, 16)],
        dtype=np.float64,
    )
    batches, contexts = np.array(_BATCHES, np.float64), np.array(_CONTEXTS, np.float64)
    rows = tokens[None, :] if packed else tokens[None, :] * batches[:, None]
    linear = np.maximum(
        model.parameters * model.bytes / device.bandwidth, 2 * model.parameters * rows / device.flops
    )[:, :, None]
    cached = contexts[None, None, :]
    per_token = 2 * model.layers * model.kv_heads * model.head_dim * model.bytes
    attention = np.maximum(
        per_token * batches[:, None, None] * cached / device.bandwidth,
        4 * model.layers * model.heads * model.head_dim * rows[:, :, None] * cached / device.flops,
    )
    return CostCurve(
        batches,
        tokens,
        contexts,
        linear + attention,
        packed=packed,
        draft=draft if draft is not None else DraftCost(step=20e-6, request=8e-6, node=0.55e-6, threads=8),
        source="roofline",
        device=device.name,
        model=model.name,
        dtype="bfloat16" if model.bytes == 2 else "float32",
        intensity=device.intensity,
    )
