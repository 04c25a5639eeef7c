"""Drafters for OpenTelemetry: ``pip install 'sssd[opentelemetry]'``."""

from collections.abc import Callable, Iterable, Mapping

try:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation
except ImportError as error:
    raise ImportError(
        f"sssd.metrics.Instruments needs opentelemetry-api: pip install 'sssd[opentelemetry]' ({error})"
    ) from error

from sssd._core import Drafter
from sssd.metrics.families import Buckets, Drafters, Family
from sssd.sharing import Replica

_HISTOGRAM_PARTS = ("bucket", "count", "sum")


class Instruments(Drafters):
    """Observable instruments of a meter that read drafters whenever it exports; drafting pays nothing for it.

    Names are those of :class:`sssd.metrics.Collector` with a dot behind the prefix, ``sssd.begun``. A
    histogram is three counters, as OpenTelemetry observes none: ``sssd.nodes.bucket`` with the attribute
    ``le``, ``sssd.nodes.count`` and ``sssd.nodes.sum``, which is how Prometheus keeps it.

    Args:
        meter: Of ``opentelemetry.metrics.get_meter``, say. It takes one of these for a prefix.
        drafter: What to read; :meth:`add` takes others beside it.
        prefix: Start of all names.
        labels: Attributes that tell the drafter from others, such as ``{"model": "llama-3"}``.
        replica: Its ``metrics`` as well, as ``sharing``.
        namespaces: Of how many namespaces to show what they hold, those with most memory first.

    Raises:
        InvalidArgumentError: A label has a name that metrics use themselves.
    """

    def __init__(
        self,
        meter: Meter,
        drafter: Drafter,
        prefix: str = "sssd",
        *,
        labels: Mapping[str, str] | None = None,
        replica: Replica | None = None,
        namespaces: int = 0,
    ) -> None:
        super().__init__(drafter, prefix, labels=labels, replica=replica, namespaces=namespaces)
        self._meter, self._made = meter, set[str]()
        self._make()

    def add(self, drafter: Drafter, *, labels: Mapping[str, str], replica: Replica | None = None) -> None:
        """As :meth:`Drafters.add`."""
        super().add(drafter, labels=labels, replica=replica)
        self._make()

    def _make(self) -> None:
        """Makes the instruments that are not there yet: a replica brings others."""
        for family in self.families():
            if family.name in self._made:
                continue
            self._made.add(family.name)
            name, unit = f"{self.prefix}.{family.name}", _unit(family.name)
            if family.kind == "gauge":
                self._meter.create_observable_gauge(name, [self._reader(family.name)], unit, family.text)
            elif family.kind == "counter":
                self._meter.create_observable_counter(name, [self._reader(family.name)], unit, family.text)
            else:
                for part in _HISTOGRAM_PARTS:
                    self._meter.create_observable_counter(
                        f"{name}.{part}",
                        [self._reader(family.name, part)],
                        unit if part == "sum" else "1",
                        family.text,
                    )

    def _reader(self, name: str, part: str = "") -> Callable[[CallbackOptions], Iterable[Observation]]:
        def read(_: CallbackOptions) -> Iterable[Observation]:
            for family in self.families():
                if family.name == name:
                    yield from _observations(family, part)

        return read


def _observations(family: Family, part: str) -> Iterable[Observation]:
    for values, value in family.samples:
        attributes = dict(zip(family.labels, values, strict=True))
        if not isinstance(value, Buckets):
            yield Observation(value, attributes)
        elif part == "bucket":
            for bound, count in zip(value.bounds, value.cumulative, strict=True):
                le = "+Inf" if bound == float("inf") else repr(bound)
                yield Observation(count, {**attributes, "le": le})
        else:
            yield Observation(value.sum if part == "sum" else value.cumulative[-1], attributes)


def _unit(name: str) -> str:
    return "s" if name.endswith("seconds") else "By" if name.endswith("bytes") else "1"
