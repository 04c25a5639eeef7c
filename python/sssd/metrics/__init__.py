"""What drafters have done, for Prometheus and OpenTelemetry; ``docs/metrics.md``.

prometheus_client.REGISTRY.register(sssd.metrics.Collector(drafter))
sssd.metrics.Instruments(opentelemetry.metrics.get_meter("sssd"), drafter)

``pip install 'sssd[prometheus]'`` or ``'sssd[opentelemetry]'``.
"""

from typing import TYPE_CHECKING, Any

from sssd.metrics.families import SHARING_GAUGES, Buckets, Drafters, Family

if TYPE_CHECKING:
    from sssd.metrics.instruments import Instruments
    from sssd.metrics.prometheus import Collector

__all__ = ["SHARING_GAUGES", "Buckets", "Collector", "Drafters", "Family", "Instruments"]


def __getattr__(name: str) -> Any:
    # either needs a package that the other does not
    if name == "Collector":
        from sssd.metrics.prometheus import Collector

        return Collector
    if name == "Instruments":
        from sssd.metrics.instruments import Instruments

        return Instruments
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
