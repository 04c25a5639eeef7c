"""Drafters for Prometheus: ``pip install 'sssd[prometheus]'``."""

from collections.abc import Iterable, Iterator

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector as BaseCollector
except ImportError as error:
    raise ImportError(
        f"sssd.metrics.Collector needs prometheus-client: pip install 'sssd[prometheus]' ({error})"
    ) from error

from sssd.metrics.families import Drafters, Family


class Collector(Drafters, BaseCollector):
    """Reads drafters' numbers whenever Prometheus asks; drafting pays nothing for it.

    Args:
        drafter: What to read; :meth:`add` takes others beside it. A registry takes one collector of a prefix.
        prefix: Start of all names.
        labels: What tells the drafter from others, such as ``{"model": "llama-3"}``.
        replica: Its ``metrics`` as well, as ``sharing``.
        namespaces: Of how many namespaces to show what they hold, those with most memory first. Each is a
            series of its own, named as the caller named it.

    Raises:
        InvalidArgumentError: A label has a name that metrics use themselves.
    """

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics."""
        for family in self.families():
            yield _metric(f"{self.prefix}_{family.name}", family)

    def describe(self) -> Iterable[Metric]:
        """Yields the same, by which a registry refuses a second collector of these names."""
        return self.collect()


def _metric(name: str, family: Family) -> Metric:
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(name, family.text, labels=family.labels)
        for labels, held in family.samples:
            bounds = ["+Inf" if bound == float("inf") else repr(bound) for bound in held.bounds]
            histogram.add_metric(labels, [*zip(bounds, held.cumulative, strict=True)], sum_value=held.sum)
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(name, family.text, labels=family.labels)
    for labels, value in family.samples:
        metric.add_metric(labels, value)
    return metric
