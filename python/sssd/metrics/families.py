"""The numbers of drafters as families of labelled samples, whoever reads them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sssd._core import Drafter, __version__
from sssd.errors import InvalidArgumentError
from sssd.sharing import Replica

_COUNTERS = {
    "begun": "Sequences begun.",
    "finished": "Sequences finished.",
    "failed": "Sequences that met an internal error.",
    "tokens": "Tokens appended.",
}
_SIZES = (*range(11), 31)
_TIMES = (*range(9, 21), 22, 24, 27, 30, 31)
"""Half a microsecond to a millisecond by powers of two, then fewer up to a second."""
_HISTOGRAMS = {
    "nodes": ("Nodes of each draft whose outcome is known.", _SIZES),
    "accepted": ("Accepted nodes of each draft.", _SIZES),
    "draft_seconds": ("Time of each single draft.", _TIMES),
    "batch_seconds": ("Time of each batch call.", _TIMES),
    "batch_sequences": ("Sequences of each batch call.", _SIZES),
}
"""What each holds, and which of the drafter's buckets bound those that are shown."""
_NAMESPACES = {
    "sequences": "Sequences of a namespace.",
    "live_tokens": "Tokens that a namespace has learned.",
    "memory_bytes": "Memory of a namespace.",
}

SHARING_GAUGES = ("queued_bytes", "lag_seconds", "failing")
"""Which of ``Replica.metrics`` are no counters."""
_OWN_LABELS = ("le", "namespace", "reason", "source", "version")


Sample = tuple[tuple[str, ...], Any]
"""The values of a family's labels, and the value that has them."""


@dataclass(frozen=True)
class Buckets:
    """A histogram: how many values are at most each bound, which rise and end in infinity; and their sum."""

    bounds: tuple[float, ...]
    cumulative: tuple[int, ...]
    sum: float


@dataclass(frozen=True)
class Family:
    """One metric.

    Attributes:
        name: Without prefix.
        kind: ``"counter"``, ``"gauge"`` or ``"histogram"``.
        text: What it tells.
        labels: Names of its labels.
        samples: Values by the labels' values; :class:`Buckets` of a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    samples: list[Sample] = field(default_factory=list)


class Drafters:
    """Drafters whose numbers are read together.

    Args:
        drafter: The first; :meth:`add` takes others beside it.
        prefix: Start of all names.
        labels: What tells it from others, such as ``{"model": "llama-3"}``.
        replica: Its ``metrics`` as well, as ``sharing``.
        namespaces: Of how many namespaces to show what they hold, those with most memory first. Each is a
            series of its own, named as the caller named it.

    Raises:
        InvalidArgumentError: A label has a name that metrics use themselves.
    """

    def __init__(
        self,
        drafter: Drafter,
        prefix: str = "sssd",
        *,
        labels: Mapping[str, str] | None = None,
        replica: Replica | None = None,
        namespaces: int = 0,
    ) -> None:
        self.prefix, self.namespaces = prefix, namespaces
        self._labels = tuple(labels or ())
        if own := [name for name in self._labels if name in _OWN_LABELS or not name.isidentifier()]:
            raise InvalidArgumentError(
                f"{own[0]!r} cannot be a label of a drafter; take a name such as model, none of {_OWN_LABELS}"
            )
        self._held: dict[tuple[str, ...], tuple[Drafter, Replica | None]] = {}
        self._add(drafter, labels or {}, replica)

    def add(self, drafter: Drafter, *, labels: Mapping[str, str], replica: Replica | None = None) -> None:
        """Reads another drafter too.

        Args:
            drafter: The other.
            labels: Of the same names as the first one's, and with other values than any before.
            replica: Its ``metrics`` as well.

        Raises:
            InvalidArgumentError: Names differ, or values do not.
        """
        self._add(drafter, labels, replica)

    def _add(self, drafter: Drafter, labels: Mapping[str, str], replica: Replica | None) -> None:
        if {*labels} != {*self._labels}:
            raise InvalidArgumentError(
                f"drafters that are read together have the same labels: {self._labels}, not {tuple(labels)}"
            )
        values = tuple(str(labels[name]) for name in self._labels)
        if values in self._held:
            raise InvalidArgumentError(
                f"there is a drafter with the labels {dict(labels)} already; nothing would tell them apart"
            )
        self._held[values] = drafter, replica

    def families(self) -> list[Family]:
        """All metrics, with the samples of all drafters, as they are now."""
        merged: dict[str, Family] = {}
        for values, (drafter, replica) in list(self._held.items()):
            for family in _read(drafter, replica, self.namespaces):
                known = merged.setdefault(
                    family.name,
                    Family(family.name, family.kind, family.text, (*self._labels, *family.labels)),
                )
                known.samples.extend(((*values, *own), value) for own, value in family.samples)
        return list(merged.values())


def _read(drafter: Drafter, replica: Replica | None, namespaces: int) -> Iterator[Family]:
    metrics, memory = drafter.metrics, drafter.memory
    yield Family("build_info", "gauge", "1, with the version.", ("version",), [((__version__,), 1)])
    for name, text in _COUNTERS.items():
        yield Family(name, "counter", text, (), [((), metrics[name])])
    reasons: list[Sample] = [((reason,), count) for reason, count in metrics["undrafted"].items()]
    yield Family("undrafted", "counter", "Empty drafts, by what left them empty.", ("reason",), reasons)
    lost = "Whether drafts go without the datastore, because a file of it was changed in place."
    yield Family("datastore_lost", "gauge", lost, (), [((), metrics["datastore_lost"])])
    for name, (text, bounds) in _HISTOGRAMS.items():
        yield Family(name, "histogram", text, (), [((), _buckets(metrics[name], bounds))])
    for name in ("used", "shared", "sequences"):
        yield Family(f"memory_{name}_bytes", "gauge", f"Bytes of memory: {name}.", (), [((), memory[name])])
    refused = "Requests for memory that did not fit."
    yield Family("memory_refused", "counter", refused, (), [((), memory["refused"])])
    sources = drafter.stats["sources"]
    for kind in ("drafted", "accepted"):
        counts: list[Sample] = [((source,), held[kind]) for source, held in sources.items()]
        yield Family(f"source_{kind}", "counter", f"Nodes {kind}, by source.", ("source",), counts)
    yield from _of_namespaces(drafter, namespaces)
    for name, value in (replica.metrics if replica else {}).items():
        text = f"Finished requests shared by replicas: {name.replace('_', ' ')}."
        yield Family(
            f"sharing_{name}", "gauge" if name in SHARING_GAUGES else "counter", text, (), [((), value)]
        )


def _of_namespaces(drafter: Drafter, most: int) -> Iterator[Family]:
    if most <= 0:
        return
    held = sorted(drafter.namespaces().items(), key=lambda item: (-item[1]["memory_bytes"], item[0]))[:most]
    for name, text in _NAMESPACES.items():
        samples: list[Sample] = [((namespace,), numbers[name]) for namespace, numbers in held]
        yield Family(f"namespace_{name}", "gauge", text, ("namespace",), samples)


def _buckets(held: dict[str, Any], shown: tuple[int, ...]) -> Buckets:
    cumulative, total = [], 0
    for count in held["counts"]:
        total += count
        cumulative.append(total)
    return Buckets(
        tuple(held["bounds"][at] for at in shown), tuple(cumulative[at] for at in shown), held["sum"]
    )
