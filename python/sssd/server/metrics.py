"""The server's numbers for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector as BaseCollector

from sssd.metrics import Collector
from sssd.server.engine import Engine

_COUNTERS = {
    "passes": "Verify passes.",
    "prompt_tokens": "Tokens of prompts of requests that have ended.",
    "output_tokens": "Tokens of their outputs.",
    "undrafted": "Requests that went on without drafts, for want of memory.",
}


class EngineCollector(BaseCollector):
    """Reads an engine's numbers whenever Prometheus asks.

    Args:
        engine: What to read.
        model: What clients call its model, a label of all.
    """

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine, self.model = engine, model

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics."""
        counts = dict(self.engine.counts)
        for name, text in _COUNTERS.items():
            counter = CounterMetricFamily(f"sssd_server_{name}", text, labels=["model"])
            counter.add_metric([self.model], counts.pop(name, 0))
            yield counter
        text = "Requests by how they ended."
        ended = CounterMetricFamily("sssd_server_requests", text, labels=["model", "outcome"])
        for outcome, count in sorted(counts.items()):
            ended.add_metric([self.model, outcome], count)
        yield ended
        for name, text, value in (
            ("running", "Requests in the batch.", self.engine.running),
            ("waiting", "Requests in the queue.", self.engine.waiting),
            ("cache_bytes", "Memory of the key-value cache.", self.engine.cache.bytes),
        ):
            gauge = GaugeMetricFamily(f"sssd_server_{name}", text, labels=["model"])
            gauge.add_metric([self.model], value)
            yield gauge


def render(engine: Engine, model: str) -> tuple[bytes, str]:
    """All metrics of an engine and its drafter as text, and the type of that text."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, model))
    registry.register(Collector(engine.drafter, labels={"model": model}))
    return generate_latest(registry), CONTENT_TYPE_LATEST
