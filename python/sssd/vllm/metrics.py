"""A proposer's counters beside vLLM's own, in the registry that its server shows at ``/metrics``.

Where the engine runs in a process of its own, the server sees them if ``PROMETHEUS_MULTIPROC_DIR`` names an
empty folder before it starts.
"""

import functools
from dataclasses import dataclass
from typing import Any

from sssd._core import Drafter

EVERY = 32
"""Steps between two updates."""

_COUNTERS = {
    "steps": "Engine steps that drafts were asked for.",
    "drafted": "Tokens drafted.",
    "failed": "Steps without drafts because of an error.",
    "ended": "Requests that are over.",
    "seconds": "Time of drafting.",
}


@dataclass
class Counts:
    """What a proposer has done.

    Attributes:
        steps: calls.
        drafted: tokens handed to vLLM.
        failed: calls that met an error and drafted nothing.
        ended: requests that are over.
        seconds: time of all calls.
    """

    steps: int = 0
    drafted: int = 0
    failed: int = 0
    ended: int = 0
    seconds: float = 0.0


@functools.cache
def _made() -> tuple[dict[str, Any], Any]:
    """The metrics of this process: a registry takes each name once."""
    from prometheus_client import Counter, Gauge

    counters = {name: Counter(f"sssd_vllm_{name}", text) for name, text in _COUNTERS.items()}
    return counters, Gauge("sssd_vllm_memory_bytes", "Memory of the drafter.", multiprocess_mode="livesum")


class Metrics:
    """What a proposer has done, counted on in the registry. Does nothing without prometheus_client.

    Args:
        drafter: whose memory is shown.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter, self._told = drafter, dict.fromkeys(_COUNTERS, 0.0)
        try:
            self._counters, self._memory = _made()
        except (ImportError, ValueError):  # not there, or names that somebody else has taken
            self._counters = {}

    def update(self, counts: Counts) -> None:
        """Adds what has been done since the last time."""
        for name, counter in self._counters.items():
            value = float(getattr(counts, name))
            counter.inc(max(0.0, value - self._told[name]))
            self._told[name] = value
        if self._counters:
            self._memory.set(self._drafter.memory["used"] or 0)
