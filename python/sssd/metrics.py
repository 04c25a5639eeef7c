"""A drafter's counters for Prometheus: ``pip install 'sssd[prometheus]'``.

prometheus_client.REGISTRY.register(sssd.metrics.Collector(drafter))
"""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector as BaseCollector

from sssd._core import Drafter
from sssd.sharing import Replica

_COUNTERS = {
    "begun": "Sequences begun.",
    "finished": "Sequences finished.",
    "failed": "Sequences that met an internal error.",
    "tokens": "Tokens appended.",
}
_HISTOGRAMS = {
    "nodes": "Nodes of each draft whose outcome is known.",
    "accepted": "Accepted nodes of each draft.",
    "draft_seconds": "Time of each single draft.",
    "batch_seconds": "Time of each batch call.",
    "batch_sequences": "Sequences of each batch call.",
}


SHARING_GAUGES = ("queued_bytes", "lag_seconds", "failing")
"""Which of ``Replica.metrics`` are no counters."""


class Collector(BaseCollector):
    """Reads a drafter's numbers whenever Prometheus asks; drafting pays nothing for it.

    Args:
        drafter: What to read.
        prefix: Start of all names.
        replica: Its ``metrics`` as well, as ``sharing``.
    """

    def __init__(self, drafter: Drafter, prefix: str = "sssd", *, replica: Replica | None = None) -> None:
        self.drafter, self.prefix, self.replica = drafter, prefix, replica

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics."""
        metrics = self.drafter.metrics
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"{self.prefix}_{name}", text, value=metrics[name])
        text = "Whether drafts go without the datastore, because a file of it was changed in place."
        yield GaugeMetricFamily(f"{self.prefix}_datastore_lost", text, value=metrics["datastore_lost"])
        for name, text in _HISTOGRAMS.items():
            held = metrics[name]
            histogram = HistogramMetricFamily(f"{self.prefix}_{name}", text)
            total, buckets = 0, []
            for bound, count in zip(held["bounds"], held["counts"], strict=True):
                total += count
                buckets.append(("+Inf" if bound == float("inf") else repr(bound), total))
            histogram.add_metric([], buckets, sum_value=held["sum"])
            yield histogram
        memory = self.drafter.memory
        for name in ("used", "shared", "sequences"):
            text = f"Bytes of memory: {name}."
            yield GaugeMetricFamily(f"{self.prefix}_memory_{name}_bytes", text, value=memory[name])
        yield CounterMetricFamily(
            f"{self.prefix}_memory_refused", "Requests for memory that did not fit.", value=memory["refused"]
        )
        for kind in ("drafted", "accepted"):
            counter = CounterMetricFamily(
                f"{self.prefix}_source_{kind}", f"Nodes {kind}, by source.", labels=["source"]
            )
            for source, counts in self.drafter.stats["sources"].items():
                counter.add_metric([source], counts[kind])
            yield counter
        for name, value in (self.replica.metrics if self.replica else {}).items():
            text = f"Finished requests shared by replicas: {name.replace('_', ' ')}."
            family = GaugeMetricFamily if name in SHARING_GAUGES else CounterMetricFamily
            yield family(f"{self.prefix}_sharing_{name}", text, value=value)
