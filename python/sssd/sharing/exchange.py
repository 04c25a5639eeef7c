"""The thread of a replica: what it publishes, what it learns, and how much of either."""

import os
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sssd._core import Drafter
from sssd.errors import InvalidArgumentError, SharingError, SssdError
from sssd.sharing.log import Log
from sssd.sharing.record import MAX_NAMESPACE_BYTES, Record

_LONGEST_PAUSE = 5.0
_GIVE_UP = 30.0
"""Seconds after which a record that the log does not take is dropped."""
_ORIGINS = 4096
_COUNTERS = (
    *("published", "published_bytes", "dropped", "learned", "learned_tokens"),
    *("own", "duplicate", "refused", "damaged", "errors"),
)


@dataclass(frozen=True)
class Limits:
    """What a ``Replica`` is made with, by the same names."""

    max_tokens: int
    queue_bytes: int
    learn_share: float
    learn_bytes: float
    interval: float


@dataclass(frozen=True)
class _Finished:
    """A request that waits to be published."""

    namespace: str
    time: float
    start: int
    token_ids: NDArray[np.int32]


class Window:
    """Which numbers of an origin have come: the highest and a bit for each of those below it, as IPsec keeps
    them against replays (RFC 4303, 3.4.3). What is older than the window counts as having come.
    """

    _WIDTH = 1024

    def __init__(self) -> None:
        self._highest, self._bits = -1, 0

    def take(self, number: int) -> bool:
        """Whether a number comes for the first time."""
        ahead = number - self._highest
        if ahead > 0:
            self._bits = (self._bits << ahead | 1) & (1 << self._WIDTH) - 1 if ahead < self._WIDTH else 1
            self._highest = number
            return True
        if -ahead >= self._WIDTH or self._bits >> -ahead & 1:
            return False
        self._bits |= 1 << -ahead
        return True


class Allowance:
    """So much a second, and at most a second's worth at once. It may be overdrawn, which time pays back."""

    def __init__(self, rate: float) -> None:
        self._rate, self._left, self._at = rate, rate, time.monotonic()

    def spend(self, amount: float) -> None:
        """Takes from it."""
        self._left -= amount

    def wait(self) -> float:
        """Seconds until there is some left, 0 if there is."""
        now = time.monotonic()
        self._left = min(self._left + (now - self._at) * self._rate, self._rate)
        self._at = now
        return max(-self._left / self._rate, 0.0)


class Exchange:
    """What a replica and its thread have in common. ``run`` is the thread, ``turn`` what it does again and
    again; the other methods take no time.
    """

    def __init__(
        self,
        drafter: Drafter,
        log: Log,
        namespaces: Container[str],
        fingerprint: bytes | None,
        key: bytes | None,
        limits: Limits,
    ) -> None:
        self._drafter, self._log, self._namespaces = drafter, log, namespaces
        self._fingerprint, self._key, self._limits = fingerprint, key, limits
        self._vocab_size = drafter.vocab_size or 0
        self._origin, self._number = os.urandom(16), 0
        self._queue: deque[_Finished] = deque()
        self._queued_bytes = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        # what follows is the thread's own
        self._sending: tuple[bytes, float] | None = None
        self._seen: OrderedDict[bytes, Window] = OrderedDict()
        self._time, self._bytes = Allowance(limits.learn_share), Allowance(limits.learn_bytes)
        self._counts = Counter(dict.fromkeys(_COUNTERS, 0))
        self._incoming: Iterator[bytes] | None = None
        self._looked = 0.0
        self._lag, self._failures = 0.0, 0

    def shares(self, namespace: str) -> bool:
        """Whether texts of a namespace may go out and come in."""
        # a name with surrogates is none that a drafter has
        short = len(namespace.encode(errors="replace")) <= MAX_NAMESPACE_BYTES
        return short and namespace in self._namespaces

    def put(self, namespace: str, token_ids: NDArray[np.int32]) -> None:
        """Queues the end of a text, int32 [n], without waking anybody; the oldest ones make room."""
        start = max(len(token_ids) - self._limits.max_tokens, 0)
        ids = token_ids[start:].copy() if start else token_ids
        with self._lock:
            self._queue.append(_Finished(namespace, time.time(), start, ids))
            self._queued_bytes += ids.nbytes
            while self._queued_bytes > self._limits.queue_bytes:
                self._queued_bytes -= self._queue.popleft().token_ids.nbytes
                self._counts["dropped"] += 1

    @property
    def stopping(self) -> bool:
        """Whether the thread is to end, or has."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Ends the thread once it has tried to publish what waits."""
        self._stop.set()

    @property
    def metrics(self) -> dict[str, float]:
        """As ``Replica.metrics``."""
        counts = {name: self._counts[name] for name in _COUNTERS}
        counts["damaged"] += getattr(self._log, "damaged", 0)
        now = {"queued_bytes": self._queued_bytes, "lag_seconds": self._lag, "failing": self._failures > 0}
        return {**counts, **{name: float(value) for name, value in now.items()}}

    def run(self) -> None:
        """Publishes and learns until ``stop``; whatever the log raises is counted, and tried again later."""
        while not self._stop.wait(self.turn()):
            pass
        for work in (self._publish, self._log.close):
            self._try(work)

    def turn(self) -> float:
        """Publishes what waits and learns what came, within the limits. Seconds until the next turn."""
        done = [self._try(work) for work in (self._publish, self._learn)]
        self._failures = 0 if all(done) else self._failures + 1
        backoff = self._limits.interval * 2.0 ** min(self._failures, 16)
        return max(self._limits.interval, min(backoff, _LONGEST_PAUSE))

    def _try(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except Exception:
            self._counts["errors"] += 1
            return False
        return True

    def _publish(self) -> None:
        while (sending := self._next_to_send()) is not None:
            record, since = sending
            try:
                self._log.publish(record)
            except Exception as failure:
                # others wait behind it
                if isinstance(failure, InvalidArgumentError) or time.monotonic() - since > _GIVE_UP:
                    with self._lock:
                        self._counts["dropped"] += 1
                    self._sending = None
                if not isinstance(failure, InvalidArgumentError):
                    raise
            else:
                self._sending = None
                self._counts["published"] += 1
                self._counts["published_bytes"] += len(record)

    def _next_to_send(self) -> tuple[bytes, float] | None:
        """The record that is being sent, and since when."""
        if self._sending is None:
            with self._lock:
                if not self._queue:
                    return None
                finished = self._queue.popleft()
                self._queued_bytes -= finished.token_ids.nbytes
            ids = finished.token_ids
            is_token = (ids >= 0) & (ids <= (self._vocab_size or 1 << 31) - 1)
            record = Record(
                self._origin,
                self._number,
                finished.time,
                finished.namespace,
                self._vocab_size,
                self._fingerprint,
                finished.start,
                np.where(is_token, ids, np.int32(-1)),
            )
            self._number += 1
            self._sending = record.encode(self._key), time.monotonic()
        return self._sending

    def _learn(self) -> None:
        """Learns what came, as long as there is an allowance."""
        while not self._time.wait() and not self._bytes.wait():
            incoming = self._incoming or self._poll()
            # one that raises is over
            self._incoming = None
            data = next(incoming, None) if incoming else None
            if data is None or self.stopping:
                return
            self._incoming = incoming
            start = time.perf_counter()
            self._take(data)
            self._time.spend(time.perf_counter() - start)
            self._bytes.spend(len(data))

    def _poll(self) -> Iterator[bytes] | None:
        """Looks at the log, unless it has just been looked at."""
        now = time.monotonic()
        if now - self._looked < self._limits.interval:
            return None
        self._looked = now
        return iter(self._log.poll())

    def _take(self, data: bytes) -> None:
        try:
            record = Record.decode(data, self._key)
        except SharingError:
            self._counts["damaged"] += 1
            return
        if record.origin == self._origin:
            self._counts["own"] += 1
        elif not self._is_first(record):
            self._counts["duplicate"] += 1
        elif not self._is_for_us(record):
            self._counts["refused"] += 1
        else:
            try:
                self._drafter.learn(record.token_ids, namespace=record.namespace)
            except SssdError:
                self._counts["refused"] += 1
                return
            self._counts["learned"] += 1
            self._counts["learned_tokens"] += len(record.token_ids)
            self._lag = max(time.time() - record.time, 0.0)

    def _is_first(self, record: Record) -> bool:
        window = self._seen.setdefault(record.origin, Window())
        self._seen.move_to_end(record.origin)
        if len(self._seen) > _ORIGINS:
            self._seen.popitem(last=False)
        return window.take(record.number)

    def _is_for_us(self, record: Record) -> bool:
        sizes = {size for size in (record.vocab_size, self._vocab_size) if size}
        tokenizers = {one for one in (record.fingerprint, self._fingerprint) if one is not None}
        largest = record.token_ids.max(initial=-1)
        within = not self._vocab_size or largest < self._vocab_size
        return len(sizes) < 2 and len(tokenizers) < 2 and bool(within) and self.shares(record.namespace)
