"""A log in an actor of Ray: ``pip install 'sssd[ray]'``."""

import os
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from sssd.errors import InvalidArgumentError
from sssd.sharing.log import MAX_RECORD_BYTES

_ANSWER_BYTES = 4 << 20


class RayLog:
    """A log in the memory of a named, detached actor, which the first replica starts and all find by its
    name.

    If the actor dies, Ray starts it again, empty: replicas keep what they have learned, and share from there
    on.

    Args:
        name: of the actor.
        namespace: Ray's namespace of it, the same for all replicas.
        max_bytes: bytes of records that it keeps; the oldest go.
        keep_seconds: age at which records go.
        timeout: seconds that it may take to answer.

    Raises:
        InvalidArgumentError: a limit is not positive, or Ray is not initialised.
    """

    def __init__(
        self,
        name: str = "sssd-finished",
        *,
        namespace: str = "sssd",
        max_bytes: int = 64 << 20,
        keep_seconds: float = 86400.0,
        timeout: float = 5.0,
    ) -> None:
        if min(max_bytes, keep_seconds, timeout) <= 0:
            raise InvalidArgumentError("max_bytes, keep_seconds and timeout must be positive")
        if not ray.is_initialized():
            raise InvalidArgumentError("Ray is not initialised; call ray.init(...) first")
        self._options = {"name": name, "namespace": namespace, "lifetime": "detached", "get_if_exists": True}
        self._limits, self._timeout = (max_bytes, keep_seconds), timeout
        self._actor: Any = None
        self._life, self._next = b"", 0

    def publish(self, record: bytes) -> None:
        """Appends a record."""
        if not 0 < len(record) <= MAX_RECORD_BYTES:
            raise InvalidArgumentError(f"a record has 1 to {MAX_RECORD_BYTES} bytes, not {len(record)}")
        self._call("publish", record)

    def poll(self) -> Iterator[bytes]:
        """Gives out what is new."""
        while True:
            self._life, first, records = self._call("read", self._life, self._next)
            self._next = first
            for record in records:
                self._next += 1
                yield record
            if not records:
                return

    def close(self) -> None:
        """Lets go of the actor, which goes on for others; ``ray.kill`` ends it."""
        self._actor = None

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._actor is None:
            options: Any = self._options
            kind = ray.remote(num_cpus=0, max_restarts=-1)(Keeper)
            self._actor = kind.options(**options).remote(*self._limits)
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=self._timeout)
        except (RayActorError, GetTimeoutError):
            # it may have been killed for good, and another started under its name
            self._actor = None
            raise


class Keeper:
    """What the actor runs: records, and their places since it was started."""

    def __init__(self, max_bytes: int, keep_seconds: float) -> None:
        self._max_bytes, self._keep_seconds = max_bytes, keep_seconds
        self._life = os.urandom(8)
        self._first = 0
        self._records: deque[tuple[float, bytes]] = deque()
        self._bytes = 0

    def publish(self, record: bytes) -> None:
        """Appends a record."""
        self._records.append((time.monotonic(), record))
        self._bytes += len(record)
        self._expire()

    def read(self, life: bytes, place: int) -> tuple[bytes, int, list[bytes]]:
        """Records from a place on: this life, the place of the first of them, a few megabytes of them."""
        self._expire()
        place = max(place, self._first) if life == self._life else self._first
        found, size = [], 0
        for _, record in islice(self._records, place - self._first, None):
            found.append(record)
            size += len(record)
            if size >= _ANSWER_BYTES:
                break
        return self._life, place, found

    def _expire(self) -> None:
        oldest = time.monotonic() - self._keep_seconds
        while self._records and (self._bytes > self._max_bytes or self._records[0][0] < oldest):
            self._bytes -= len(self._records.popleft()[1])
            self._first += 1
