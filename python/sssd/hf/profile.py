"""Measuring the verify pass of a model, and the curve that ``sssd.hf.generate`` goes by."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from os import getpid
from pathlib import Path
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from sssd._core import DraftBatch, DraftTree, SizingRule
from sssd.caching import cache_folder
from sssd.errors import CostCurveError, InvalidArgumentError
from sssd.hardware.curve import CostCurve, DraftCost
from sssd.hardware.roofline import DEVICES, Device, ModelShape, known_device, roofline
from sssd.hf.contract import cache_argument, check_model
from sssd.hf.fast import available_bytes
from sssd.hf.passes import STATIC_DEVICES, Passes
from sssd.hf.static import WIDTHS
from sssd.hf.verify import implementation_of

BATCHES, CONTEXTS = (1, 4), (128, 512, 2048)

_Axis = Sequence[int] | None

_logger = logging.getLogger(__name__)
_rules: "WeakKeyDictionary[Any, dict[tuple[Any, ...], SizingRule]]" = WeakKeyDictionary()


def profile(
    model: Any,
    *,
    batches: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    repeats: int = 5,
    refresh: bool = False,
    fast_path: bool = True,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> CostCurve:
    """Measures T(batch, width, context) of a model's verify pass, as ``sssd.hf.generate`` runs it.

    The curve is kept in a file (:func:`cache_file`) by model, device, dtype, attention and number of threads.
    ``sssd.hf.generate`` uses it from then on. A curve that is there already is returned, unless it lies on
    other axes than those asked for.

    Args:
        model: A model that ``sssd.hf.generate`` can verify.
        batches: Numbers of rows, rising; by default 1 and 4.
        widths: Tokens of each row, rising from 1; by default 1 to 64.
        contexts: Text lengths, rising; by default up to 2048 or what the model allows.
        repeats: Passes measured at each point, after one that is not; the median counts. Widths take turns,
            so that what else the machine does meets all of them.
        refresh: Measure even if there is a curve already.
        fast_path: As in ``sssd.hf.generate``.
        progress: Called with the number of passes measured and of all passes.

    Returns:
        The measured curve, made monotone.

    Raises:
        UnsupportedModelError: The model cannot be verified.
        InvalidArgumentError: ``batches``, ``widths`` or ``contexts`` do not rise or are too large for the
            model or the memory, or ``repeats`` is not positive.
    """
    check_model(model)
    asked = {"batches": batches, "tokens": widths, "contexts": contexts}
    axes = _axes(model, batches, widths, contexts)
    if repeats < 1:
        raise InvalidArgumentError(f"repeats must be at least 1, got {repeats}")
    path = cache_file(model, fast_path)
    if not refresh:
        known = load_cached(path)
        if known is not None and all(
            axis is None or np.array_equal(axis, getattr(known, name)) for name, axis in asked.items()
        ):
            return known
    _check_memory(model, *(axis[-1] for axis in axes))
    curve = CostCurve.fit(
        *axes,
        _measure(model, *axes, repeats, fast_path, progress),
        ready=_ready(model, axes[1]),
        draft=_DRAFT,
        device=_device_name(model),
        model=Path(getattr(model.config, "_name_or_path", "") or type(model).__name__).name,
        dtype=str(model.dtype).removeprefix("torch."),
        attention=_attention(model, fast_path),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{getpid()}.tmp")
    curve.save(temporary)
    temporary.replace(path)
    _rules.pop(model, None)
    return curve


def _axes(
    model: Any, batches: _Axis, widths: _Axis, contexts: _Axis
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """The batches, widths and contexts to measure, checked."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 30
    batches = BATCHES if batches is None else tuple(batches)
    widths = WIDTHS if widths is None else tuple(widths)
    if contexts is None:
        contexts = [length for length in CONTEXTS if length + max(widths, default=0) <= limit] or [limit // 2]
    for name, values in (("batches", batches), ("widths", widths), ("contexts", contexts)):
        if not values or values[0] < 1 or any(b <= a for a, b in pairwise(values)):
            raise InvalidArgumentError(f"{name} must rise from at least 1, got {list(values)}")
    if widths[0] != 1:
        raise InvalidArgumentError(f"widths must rise from 1, got {list(widths)}")
    if contexts[-1] + widths[-1] > limit:
        raise InvalidArgumentError(
            f"contexts must leave room for {widths[-1]} more tokens below the model's {limit} positions, "
            f"got {contexts[-1]}"
        )
    return batches, widths, contexts


def _measure(
    model: Any,
    batches: Sequence[int],
    widths: Sequence[int],
    contexts: Sequence[int],
    repeats: int,
    fast_path: bool,
    progress: Callable[[int, int], object],
) -> NDArray[np.float64]:
    """Median seconds of a pass, float64 [batches, widths, contexts]."""
    seconds = np.empty((len(batches), len(widths), len(contexts)))
    total, done = seconds.size * (repeats + 1), 0
    progress(0, total)
    rng = np.random.default_rng(0)
    with torch.inference_mode():
        for i, batch in enumerate(batches):
            for k, context in enumerate(contexts):
                times = np.empty((repeats + 1, len(widths)))
                with Passes(model, batch, None, context + 2 * widths[-1], fast_path) as passes:
                    _fill(passes, context, widths[-1])
                    passes.warm_up(widths)
                    for turn in range(repeats + 1):
                        for j, width in enumerate(widths):
                            times[turn, j] = _time(passes, width, rng)
                            done += 1
                            progress(done, total)
                seconds[i, :, k] = np.median(times[1:], axis=0)
    return seconds


_DRAFT = DraftCost(step=20e-6, request=10e-6, node=0.6e-6)
"""On one thread, with a datastore."""


def _ready(model: Any, widths: Sequence[int]) -> tuple[int, ...]:
    """The widths that passes are rounded up to; none where every width is as good."""
    return tuple(widths) if model.device.type in STATIC_DEVICES else ()


def _check_memory(model: Any, batch: int, width: int, context: int) -> None:
    """Raises if keys, values and logits of so large a pass would not fit."""
    shape = ModelShape.of(model)
    slots = batch * (context + 2 * width)
    needed = 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.bytes * slots
    needed += 2 * batch * width * model.config.get_text_config(decoder=True).vocab_size * 4
    free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else available_bytes()
    if needed > free:
        raise InvalidArgumentError(
            f"batch {batch} with {context} tokens of context and width {width} needs {needed / 1e9:.1f} GB, "
            f"but {free / 1e9:.1f} GB are free; ask for less"
        )


def _fill(passes: Passes, context: int, width: int) -> None:
    """Fills the cache with random states of the given length."""
    model, cache = passes.model, passes.cache
    batch = len(cache.lengths)
    token = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    model(input_ids=token, use_cache=True, **{cache_argument(model): cache})
    for layer in cache.layers:
        layer.reserve(context + 2 * width)
        for buffer in layer.buffers:
            buffer.normal_()
    cache.lengths = [context] * batch


def _time(passes: Passes, width: int, rng: np.random.Generator) -> float:
    """Seconds of a pass over a chain, until the targets are on the host."""
    batch, start = len(passes.cache.lengths), passes.cache.lengths[0]
    vocab = passes.model.config.get_text_config(decoder=True).vocab_size
    chain = DraftTree(rng.integers(vocab, size=width - 1), np.arange(width - 1) - 1)
    trees = DraftBatch.from_trees([chain] * batch)
    passes.fill(trees, rng.integers(vocab, size=batch), [start] * batch, width)
    started = perf_counter()
    logits, answer = passes.launch(accept=True)()
    if answer is None:
        logits.argmax(-1).cpu()
    return perf_counter() - started


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
    return cache_folder() / "curves" / f"{type(model).__name__}-{digest}.json"


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
    threads = torch.get_num_threads()
    return f"{model.device.type}, {threads} thread{'s' if threads > 1 else ''}"


def _attention(model: Any, fast_path: bool) -> str:
    implementation = implementation_of(model.config.get_text_config(decoder=True))
    return f"{implementation}, fast path" if fast_path else str(implementation)


def rule_of(model: Any, passes: Passes) -> SizingRule:
    """The rule for this model, with what it has learned in earlier calls."""
    fast = passes.fast is not None
    key = (str(model.device), model.dtype, fast, torch.get_num_threads())
    known = _rules.setdefault(model, {})
    if key not in known:
        curve = load_cached(cache_file(model, True)) or load_cached(cache_file(model, fast))
        if curve is None:
            curve = estimate(model, passes)
        _logger.info("%s: drafts are sized by a %s curve", type(model).__name__, curve.source)
        known[key] = SizingRule(curve)
    return known[key]


def estimate(model: Any, passes: Passes) -> CostCurve:
    """A roofline of the model on its device, for want of measurements."""
    name = _device_name(model)
    device = known_device(name)
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
    """The model in a folder, or ``smollm2``; for the command line.

    Raises:
        InvalidArgumentError: ``dtype`` or ``device`` is none of torch's, or the device is not there.
        FileNotFoundError: The folder holds no model.
    """
    if dtype != "auto" and not getattr(getattr(torch, dtype, None), "is_floating_point", False):
        raise InvalidArgumentError(f"dtype must be one of torch, e.g. float32 or bfloat16, got {dtype!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidArgumentError(f"device {device!r} cannot be used: {reason}") from None
    if name == "smollm2":
        from sssd.hf import smollm2

        model, _ = smollm2.load(dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype))
    else:
        from transformers import AutoModelForCausalLM

        if not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(f"{name} is no model folder: it holds no config.json")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(device).eval()
