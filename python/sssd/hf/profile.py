"""Measuring the verify pass of a model, and the curve that ``sssd.hf.generate`` goes by."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from platformdirs import user_cache_path

from sssd.errors import InvalidArgumentError
from sssd.hardware.budget import Budget
from sssd.hardware.curve import CostCurve, CostCurveError, DraftCost
from sssd.hardware.roofline import DEVICES, Device, ModelShape, roofline
from sssd.hf.passes import STATIC_DEVICES, Passes
from sssd.hf.static import WIDTHS
from sssd.hf.verify import check_model

CONTEXTS = (128, 512, 2048)

_logger = logging.getLogger(__name__)
_budgets: "WeakKeyDictionary[Any, dict[tuple[Any, ...], Budget]]" = WeakKeyDictionary()


def profile(
    model: Any,
    *,
    batches: Sequence[int] = (1, 4),
    widths: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    repeats: int = 5,
    refresh: bool = False,
    fast_path: bool = True,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> CostCurve:
    """Measures T(batch, width, context) of a model's verify pass, as ``sssd.hf.generate`` runs it.

    The curve is kept in a file (:func:`cache_file`) by model, device, dtype, attention and number of threads.
    ``sssd.hf.generate`` uses it from then on.

    Args:
        model: A model that ``sssd.hf.generate`` can verify.
        batches: Numbers of rows, rising.
        widths: Tokens of each row, rising from 1; by default 1 to 64.
        contexts: Text lengths, rising; by default up to 2048 or what the model allows.
        repeats: Passes measured at each point, after one that is not; the median counts.
        refresh: Measure even if there is a curve already.
        fast_path: As in ``sssd.hf.generate``.
        progress: Called with the number of points measured and of all points.

    Returns:
        The measured curve, made monotone.

    Raises:
        UnsupportedModelError: The model cannot be verified.
        InvalidArgumentError: ``batches``, ``widths`` or ``contexts`` do not rise, or ``repeats`` is not
            positive.
    """
    check_model(model)
    path = cache_file(model, fast_path)
    if not refresh:
        known = load_cached(path)
        if known is not None:
            return known
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 30
    widths = tuple(widths or WIDTHS)
    contexts = tuple(
        contexts or [length for length in CONTEXTS if length + widths[-1] <= limit] or [limit // 2]
    )
    for name, values, low in (("batches", batches, 1), ("widths", widths, 1), ("contexts", contexts, 1)):
        if not values or values[0] < low or any(b <= a for a, b in pairwise(values)):
            raise InvalidArgumentError(f"{name} must rise from at least {low}, got {list(values)}")
    if widths[0] != 1:
        raise InvalidArgumentError(f"widths must rise from 1, got {list(widths)}")
    if contexts[-1] + widths[-1] > limit:
        raise InvalidArgumentError(f"contexts must leave room below the model's {limit} positions")
    if repeats < 1:
        raise InvalidArgumentError(f"repeats must be at least 1, got {repeats}")
    seconds = np.empty((len(batches), len(widths), len(contexts)))
    total, done = seconds.size, 0
    progress(0, total)
    with torch.inference_mode():
        for i, batch in enumerate(batches):
            for k, context in enumerate(contexts):
                passes = _filled(model, batch, context, fast_path)
                try:
                    for j, width in enumerate(widths):
                        seconds[i, j, k] = _measure(passes, width, repeats)
                        done += 1
                        progress(done, total)
                finally:
                    passes.close()
    curve = CostCurve.fit(
        batches,
        widths,
        contexts,
        seconds,
        ready=_ready(model, widths),
        draft=_DRAFT,
        device=_device_name(model),
        model=getattr(model.config, "_name_or_path", "") or type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        attention=_attention(model, fast_path),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    curve.save(temporary)
    temporary.replace(path)
    _budgets.pop(model, None)
    return curve


_DRAFT = DraftCost(step=20e-6, request=10e-6, node=0.6e-6)
"""On one thread, with a datastore."""


def _ready(model: Any, widths: Sequence[int]) -> tuple[int, ...]:
    """The widths that passes are rounded up to; none where every width is as good."""
    return tuple(widths) if model.device.type in STATIC_DEVICES else ()


def _filled(model: Any, batch: int, context: int, fast_path: bool) -> Passes:
    """Passes over a cache of random states of the given length."""
    passes = Passes(model, batch, None, context + 2 * WIDTHS[-1], fast_path)
    cache = passes.cache
    token = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    model(input_ids=token, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.reserve(context + 2 * WIDTHS[-1])
        for buffer in layer.buffers:
            buffer.normal_()
    cache.lengths = [context] * batch
    return passes


def _measure(passes: Passes, width: int, repeats: int) -> float:
    """Median seconds of a pass over a chain, until the targets are on the host."""
    batch, start = len(passes.cache.lengths), passes.cache.lengths[0]
    rng = np.random.default_rng(0)
    depths = np.broadcast_to(np.arange(width, dtype=np.int64), (batch, width)).copy()
    mask = np.broadcast_to(np.tril(np.ones((width, width), np.bool_)), (batch, width, width)).copy()
    parents = depths - 1
    vocab = passes.model.config.get_text_config(decoder=True).vocab_size
    times = []
    for _ in range(repeats + 1):
        ids = rng.integers(vocab, size=(batch, width))
        started = perf_counter()
        logits, answer = passes.run(ids, depths, start + depths, mask, parents, accept=True)
        if answer is None:
            logits.argmax(-1).cpu()
        times.append(perf_counter() - started)
    return median(times[1:])


def cache_file(model: Any, fast_path: bool = True) -> Path:
    """Where the curve of this model on this machine is kept: in ``$SSSD_CACHE`` or the user's cache."""
    config = model.config.to_diff_dict() if hasattr(model.config, "to_diff_dict") else {}
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    about = {
        "model": type(model).__name__,
        "config": config,
        "device": _device_name(model),
        "dtype": str(model.dtype),
        "attention": _attention(model, fast_path),
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = Path(os.environ["SSSD_CACHE"]) if os.environ.get("SSSD_CACHE") else user_cache_path("sssd")
    return folder / "curves" / f"{type(model).__name__}-{digest}.json"


def load_cached(path: Path) -> CostCurve | None:
    """The curve in a file; None if there is none, or, with a warning in the log, none that can be used."""
    if not path.exists():
        return None
    try:
        return CostCurve.load(path)
    except (CostCurveError, OSError) as error:
        _logger.warning("the measured cost curve is not used: %s", error)
        return None


def _device_name(model: Any) -> str:
    if model.device.type == "cuda":
        return str(torch.cuda.get_device_name(model.device))
    return f"{model.device.type}, {torch.get_num_threads()} threads"


def _attention(model: Any, fast_path: bool) -> str:
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    return f"{implementation}, fast path" if fast_path else str(implementation)


def budget_of(model: Any, passes: Passes) -> Budget:
    """The rule for this model, with what it has learned in earlier calls."""
    fast = passes.fast is not None
    key = (str(model.device), model.dtype, fast, torch.get_num_threads())
    known = _budgets.setdefault(model, {})
    if key not in known:
        curve = load_cached(cache_file(model, True)) or load_cached(cache_file(model, fast))
        known[key] = Budget(curve if curve is not None else estimate(model, passes))
    return known[key]


def estimate(model: Any, passes: Passes) -> CostCurve:
    """A roofline of the model on its device, for want of measurements."""
    name = _device_name(model)
    device = next((figures for known, figures in DEVICES.items() if name.startswith(known)), None)
    if device is None:
        device = DEVICES["cpu"] if model.device.type == "cpu" else Device(name, 100e12, 1e12, 100.0)
    curve = roofline(device, ModelShape.of(model), packed=False, draft=_DRAFT)
    if _ready(model, WIDTHS):
        return replace(curve, ready=WIDTHS)
    if model.device.type == "cpu" and not (passes.fast is not None and passes.fast.packed):
        # without reordered weights a product with two rows takes twice as long as one with one
        seconds = curve.seconds.copy()
        seconds[:, 1:] *= 2.0
        curve = replace(curve, seconds=seconds)
    return curve


def load_model(name: str, dtype: str, device: str) -> Any:
    """The model in a folder, or ``smollm2``; for the command line."""
    if name == "smollm2":
        from sssd.hf import smollm2

        return smollm2.load(dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype), device=device)[
            0
        ]
    from transformers import AutoModelForCausalLM

    if not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{name} is no model folder: it holds no config.json")
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
