"""Cost curves: the time of a verify pass by batch size, width and context length."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sssd._core import CostGrid, PassCosts
from sssd.errors import CostCurveError

FORMAT = "sssd cost curve"
VERSION = 1
_MAX_FILE_BYTES = 1 << 24
_SHIPPED = resources.files("sssd.hardware") / "curves"

Floats = NDArray[np.float64]


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
    grid: CostGrid = field(init=False, repr=False)
    """The same numbers for the core, which checks them."""

    def __post_init__(self) -> None:
        for name in ("batches", "tokens", "contexts", "seconds"):
            object.__setattr__(self, name, _floats(name, getattr(self, name)))
            if name != "seconds" and (getattr(self, name).ndim != 1 or not getattr(self, name).size):
                raise CostCurveError(f"{name} must be a list of numbers")
        shape = (len(self.batches), len(self.tokens), len(self.contexts))
        if self.seconds.shape != shape:
            raise CostCurveError(f"seconds must have the shape {shape} of the axes, got {self.seconds.shape}")
        times = (self.draft.step, self.draft.request, self.draft.node)
        if not all(_is_number(value) for value in times):
            raise CostCurveError("draft times must be numbers of seconds, not negative")
        if type(self.draft.threads) is not int or not 1 <= self.draft.threads <= 1 << 20:
            raise CostCurveError("draft threads must be an integer of at least 1")
        if not all(_is_number(width) and 0 < width == int(width) < 1 << 31 for width in self.ready):
            raise CostCurveError("ready must be integers that rise from 1")
        if self.intensity is not None and not (_is_number(self.intensity) and 0 < self.intensity < 1e9):
            raise CostCurveError("intensity must be a positive number of FLOP/byte")
        grid = CostGrid(
            self.batches,
            self.tokens,
            self.contexts,
            self.seconds.ravel(),
            packed=self.packed,
            ready=[int(width) for width in self.ready],
            draft=(*times, self.draft.threads),
        )
        object.__setattr__(self, "grid", grid)

    def __reduce__(self) -> tuple[Any, ...]:
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.init}
        return partial(CostCurve, **values), ()

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
        return self.grid.time(batch, width, context)

    def widths(self, max_width: int) -> list[int]:
        """The widths to choose from, up to ``max_width``: those ready, or a selection of all."""
        return self.grid.widths(max_width)

    def sizes(self, batch: int, max_width: int) -> list[int]:
        """Numbers of nodes to choose from: of each row, or of the whole pass where it is packed."""
        return self.grid.sizes(batch, max_width)

    def times(self, batch: int, sizes: ArrayLike, context: float) -> Floats:
        """Seconds of passes of these :meth:`sizes`, float64 [n]."""
        return self.grid.times(batch, np.asarray(sizes, dtype=np.float64), context)

    def costs(self, batch: int, context: float, max_width: int) -> PassCosts:
        """The part of the curve that one step chooses from, kept for contexts within a few percent.

        Args:
            batch: Requests of the step.
            context: Their mean length, tokens.
            max_width: Most tokens of a request in the pass.

        Raises:
            InvalidArgumentError: ``context`` is no number of tokens, or another is less than 1.
        """
        return self.grid.costs(batch, context, max_width)

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
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def _floats(name: str, values: Any) -> Floats:
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "iuf":
            raise ValueError
        return array.astype(np.float64)
    except (ValueError, OverflowError, TypeError):
        raise CostCurveError(f"{name} must be an array of numbers") from None
