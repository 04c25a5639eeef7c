"""Cost curves: the time of a verify pass by batch size, width and context length."""

import json
import math
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sssd._core import PassCosts
from sssd.errors import InvalidArgumentError, SssdError

FORMAT = "sssd cost curve"
VERSION = 1
_MAX_FILE_BYTES = 1 << 24
_MAX_SECONDS = 86_400.0
_MAX_SIZE = 1 << 40
_MOST_KEPT = 256
_SHIPPED = resources.files("sssd.hardware") / "curves"

Floats = NDArray[np.float64]


class CostCurveError(SssdError, ValueError):
    """A cost curve, or the file of one, cannot be used."""


@dataclass(frozen=True)
class DraftCost:
    """Seconds that drafting adds to a step.

    Attributes:
        step: Once per step in which anything is drafted.
        request: Per request that is drafted for, on one thread.
        node: Per node drafted, on one thread.
        threads: Requests drafted at a time.
    """

    step: float = 0.0
    request: float = 0.0
    node: float = 0.0
    threads: int = 1

    def seconds(self, requests: int, nodes: int) -> float:
        """Time to draft for ``requests`` requests that have ``nodes`` nodes together."""
        if not requests:
            return 0.0
        return self.step + (self.request * requests + self.node * nodes) / min(self.threads, requests)


@dataclass(frozen=True, eq=False)
class CostCurve:
    """T(batch, width, context): seconds of a verify pass.

    A pass verifies ``width`` tokens of each of ``batch`` requests (the last token of the text and ``width -
    1`` nodes) whose texts are ``context`` tokens long on average. Width 1 is a step of autoregressive
    decoding. The curve is a grid, monotone along every axis, linear between its points.

    Attributes:
        batches: Float64 [B], rising, at least 1.
        tokens: Float64 [W], rising from 1. Tokens of each row where rows are padded to one width, tokens of
            the whole pass where they are packed.
        contexts: Float64 [C], rising, at least 0.
        seconds: Float64 [B, W, C].
        packed: Whether rows of different widths lie end to end, as in serving engines, or are padded.
        ready: Widths that the verifier has ready, rising from 1; empty where any width is as good.
        draft: What drafting costs.
        source: ``"measured"`` or ``"roofline"``.
        device: For people; likewise ``model``, ``dtype``, ``attention``.
        intensity: Peak arithmetic over memory bandwidth, FLOP/byte; None where unknown.

    Raises:
        CostCurveError: The numbers are no such curve.
    """

    batches: Floats
    tokens: Floats
    contexts: Floats
    seconds: Floats
    packed: bool = False
    ready: tuple[int, ...] = ()
    draft: DraftCost = field(default_factory=DraftCost)
    source: str = "measured"
    device: str = ""
    model: str = ""
    dtype: str = ""
    attention: str = ""
    intensity: float | None = None
    _costs: dict[tuple[int, int, int], PassCosts] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, low in (("batches", 1.0), ("tokens", 1.0), ("contexts", 0.0)):
            object.__setattr__(self, name, _axis(name, getattr(self, name), low))
        seconds = _floats("seconds", self.seconds)
        shape = (len(self.batches), len(self.tokens), len(self.contexts))
        if seconds.shape != shape:
            raise CostCurveError(f"seconds must have the shape {shape} of the axes, got {seconds.shape}")
        if not ((seconds > 0) & (seconds < _MAX_SECONDS)).all():
            raise CostCurveError("seconds must be positive and less than a day")
        if any((np.diff(seconds, axis=axis) < 0).any() for axis in range(3)):
            raise CostCurveError(
                "seconds must not fall with batch, width or context; fit() makes them monotone"
            )
        object.__setattr__(self, "seconds", seconds)
        if self.tokens[0] != 1:
            raise CostCurveError("tokens must begin with 1, the step without drafts")
        ready = np.asarray(self.ready)
        if self.ready and (ready.dtype.kind != "i" or self.ready[0] != 1 or (np.diff(ready) <= 0).any()):
            raise CostCurveError("ready must be integers that rise from 1")
        times = (self.draft.step, self.draft.request, self.draft.node)
        if not all(_is_number(value) and 0 <= value < _MAX_SECONDS for value in times):
            raise CostCurveError("draft times must be numbers of seconds, not negative")
        if type(self.draft.threads) is not int or not 1 <= self.draft.threads <= 1 << 20:
            raise CostCurveError("draft threads must be an integer of at least 1")
        if self.intensity is not None and not (_is_number(self.intensity) and 0 < self.intensity < 1e9):
            raise CostCurveError("intensity must be a positive number of FLOP/byte")

    @classmethod
    def fit(
        cls, batches: ArrayLike, tokens: ArrayLike, contexts: ArrayLike, seconds: ArrayLike, **about: Any
    ) -> Self:
        """The monotone curve nearest to measured times.

        Noise makes some larger passes measure faster than smaller ones. The fit is the mean of the least
        monotone surface above the measurements and the greatest below them.

        Args:
            batches: As in the class, like the other axes.
            tokens: See above.
            contexts: See above.
            seconds: Float [B, W, C], medians.
            **about: The other attributes.

        Raises:
            CostCurveError: The numbers are no times on such axes.
        """
        above = below = np.asarray(seconds, dtype=np.float64)
        if above.ndim == 3 and np.isfinite(above).all():
            for axis in range(3):
                above = np.maximum.accumulate(above, axis)
                below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
        return cls(batches, tokens, contexts, (above + below) / 2, **about)  # type: ignore[arg-type]

    def time(self, batch: float, width: float, context: float) -> float:
        """Seconds of a pass over ``width`` tokens (the mean, where rows differ) of each of ``batch``
        requests.

        Beyond the grid the last slope goes on; before it the first value stands.
        """
        return float(self._at(batch, np.array([width]), context)[0])

    def _at(self, batch: float, widths: Floats, context: float) -> Floats:
        tokens = widths * batch if self.packed else widths
        over_context = _interpolate(self.contexts, self.seconds, context, axis=2)
        over_batch = _interpolate(self.batches, over_context, batch, axis=0)
        index, share = _locate(self.tokens, tokens)
        after = np.minimum(index + 1, len(self.tokens) - 1)
        return np.asarray(over_batch[index] * (1 - share) + over_batch[after] * share)

    def widths(self, max_width: int) -> list[int]:
        """The widths to choose from, up to ``max_width``: those ready, or a selection of all."""
        if self.ready:
            return [width for width in self.ready if width <= max_width] or [1]
        if max_width <= 64:
            return list(range(1, max_width + 1))
        coarse = np.unique(np.geomspace(64, max_width, 64).astype(np.int64)).tolist()
        return [*range(1, 64), *coarse]

    def sizes(self, batch: int, max_width: int) -> list[int]:
        """Numbers of nodes to choose from: of each row, or of the whole pass where it is packed."""
        if not self.packed:
            return [width - 1 for width in self.widths(max_width)]
        most = batch * (max_width - 1)
        if most <= 1024:
            return list(range(most + 1))
        return [*range(1024), *np.unique(np.geomspace(1024, most, 128).astype(np.int64)).tolist()]

    def times(self, batch: int, sizes: ArrayLike, context: float) -> Floats:
        """Seconds of passes of these :meth:`sizes`, float64 [n]."""
        nodes = np.asarray(sizes, dtype=np.float64)
        return self._at(batch, 1 + (nodes / batch if self.packed else nodes), context)

    def costs(self, batch: int, context: float, max_width: int) -> PassCosts:
        """The part of the curve that one step chooses from, kept for contexts within a few percent.

        Args:
            batch: Requests of the step.
            context: Their mean length, tokens.
            max_width: Most tokens of a request in the pass.

        Raises:
            InvalidArgumentError: ``context`` is no number of tokens, or another is less than 1.
        """
        check_context(context)
        if batch < 1 or max_width < 1:
            raise InvalidArgumentError(f"batch and max_width must be at least 1, got {batch} and {max_width}")
        octave = context_key(context)
        key = batch, octave, max_width
        known = self._costs.get(key)
        if known is None:
            sizes = self.sizes(batch, max_width)
            seconds = self.times(batch, sizes, context_of(octave)).tolist()
            known = PassCosts(sizes, seconds, packed=self.packed)
            if len(self._costs) >= _MOST_KEPT:
                self._costs.clear()
            self._costs[key] = known
        return known

    @property
    def knee(self) -> float:
        """Tokens of a pass at which arithmetic takes as long as reading the weights.

        The device's intensity where that is known (at two bytes per weight a token costs one FLOP per byte),
        else where the curve's last slope meets the step without drafts.
        """
        if self.intensity is not None:
            return self.intensity
        times = self.seconds[0, :, 0]
        if len(times) < 2 or times[-1] <= times[-2]:
            return float(self.tokens[-1])
        slope = (times[-1] - times[-2]) / (self.tokens[-1] - self.tokens[-2])
        return float(times[0] / slope)

    def to_json(self) -> dict[str, Any]:
        """The curve as JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "source": self.source,
            "device": self.device,
            "model": self.model,
            "dtype": self.dtype,
            "attention": self.attention,
            "intensity": self.intensity,
            "layout": "packed" if self.packed else "padded",
            "ready": list(self.ready),
            "draft": asdict(self.draft),
            "batches": self.batches.tolist(),
            "tokens": self.tokens.tolist(),
            "contexts": self.contexts.tolist(),
            "seconds": [
                [[float(f"{t:.6g}") for t in row] for row in plane] for plane in self.seconds.tolist()
            ],
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """A curve from what :meth:`to_json` gave.

        Raises:
            CostCurveError: Something is missing, of the wrong kind, or absurd.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise CostCurveError(f'not a cost curve: no JSON object with "format": "{FORMAT}"')
        if value.get("version") != VERSION:
            raise CostCurveError(
                f"version {value.get('version')!r} of cost curves is not known, only {VERSION}"
            )
        missing = sorted({"batches", "tokens", "contexts", "seconds"} - value.keys())
        if missing:
            raise CostCurveError(f"members are missing: {', '.join(missing)}")
        layout = value.get("layout", "padded")
        if layout not in ("padded", "packed"):
            raise CostCurveError(f'layout must be "padded" or "packed", got {layout!r}')
        texts = {name: value.get(name, "") for name in ("device", "model", "dtype", "attention")}
        texts["source"] = value.get("source", "measured")
        for name, text in texts.items():
            if not isinstance(text, str):
                raise CostCurveError(f"{name} must be a string, got {type(text).__name__}")
        draft, ready = value.get("draft", {}), value.get("ready", [])
        if not isinstance(draft, dict) or not draft.keys() <= asdict(DraftCost()).keys():
            raise CostCurveError("draft must be an object with step, request, node and threads")
        if not isinstance(ready, list) or not all(type(width) is int and width < 1 << 31 for width in ready):
            raise CostCurveError("ready must be a list of integers")
        return cls(
            value["batches"],
            value["tokens"],
            value["contexts"],
            value["seconds"],
            packed=layout == "packed",
            ready=tuple(ready),
            draft=DraftCost(**draft),
            intensity=value.get("intensity"),
            **texts,
        )

    def save(self, path: Path | str) -> None:
        """Writes the curve to a JSON file."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads a curve from a JSON file, or one that ships with sssd, by name (:meth:`shipped`).

        Raises:
            CostCurveError: The file holds no usable curve; the message says why.
            OSError: The file cannot be read.
        """
        source: Any = Path(path)
        if str(path) in cls.shipped():
            source = _SHIPPED / f"{path}.json"
        elif not source.exists():
            raise CostCurveError(
                f"{path}: no such file; measure one with `python -m sssd profile MODEL`, "
                f"or use one of {', '.join(cls.shipped())}"
            )
        elif source.stat().st_size > _MAX_FILE_BYTES:
            raise CostCurveError(f"{path}: too large for a cost curve")
        try:
            value = json.loads(source.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CostCurveError(f"{path}: not JSON: {error}") from None
        try:
            return cls.from_json(value)
        except CostCurveError as error:
            raise CostCurveError(f"{path}: {error}") from None

    @staticmethod
    def shipped() -> list[str]:
        """Names of the curves that ship with sssd."""
        return sorted(
            file.name.removesuffix(".json") for file in _SHIPPED.iterdir() if file.name.endswith(".json")
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _floats(name: str, values: Any) -> Floats:
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "iuf":
            raise ValueError
        return array.astype(np.float64)
    except (ValueError, OverflowError, TypeError):
        raise CostCurveError(f"{name} must be an array of numbers") from None


def _axis(name: str, values: Any, low: float) -> Floats:
    axis = _floats(name, values)
    if axis.ndim != 1 or not len(axis):
        raise CostCurveError(f"{name} must be a list of numbers")
    if not ((axis >= low) & (axis < _MAX_SIZE)).all() or (np.diff(axis) <= 0).any():
        raise CostCurveError(f"{name} must rise from at least {low:g}")
    return axis


def _locate(axis: Floats, values: Any) -> tuple[Any, Any]:
    """The segment of each value, and where in it: above 1 beyond the end, 0 before the start."""
    index = np.clip(np.searchsorted(axis, values, side="right") - 1, 0, max(len(axis) - 2, 0))
    after = np.minimum(index + 1, len(axis) - 1)
    length = np.where(after > index, axis[after] - axis[index], np.inf)
    return index, np.maximum((values - axis[index]) / length, 0.0)


def _interpolate(axis_values: Floats, values: Floats, at: float, axis: int) -> Floats:
    index, share = _locate(axis_values, at)
    low: Floats = np.take(values, index, axis)
    if share == 0:
        return low
    return np.asarray(low + share * (np.take(values, index + 1, axis) - low))


def context_key(context: float) -> int:
    """The same number for contexts within a few percent."""
    return round(8 * math.log2(context + 64))


def context_of(key: int) -> float:
    """The context in the middle of those with this :func:`context_key`."""
    return float(max(2 ** (key / 8) - 64, 0.0))


def check_context(context: float) -> None:
    """Raises :class:`InvalidArgumentError` for a context length that is none."""
    if not (context >= 0 and math.isfinite(context)):
        raise InvalidArgumentError(f"context must be a number of tokens, got {context!r}")
