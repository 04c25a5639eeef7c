"""A log in a Redis stream: ``pip install 'sssd[redis]'``."""

import time
from collections.abc import Iterator
from typing import Any

import redis

from sssd.errors import InvalidArgumentError
from sssd.sharing.log import MAX_RECORD_BYTES

_FIELD = b"record"
_COUNT = 32
_TRIM_SECONDS = 60.0


class RedisLog:
    """A log in a stream of a Redis server (5.0 or newer), or of what speaks its protocol and has streams.

    Args:
        server: a URL such as ``redis://host:6379/0`` (``rediss://`` for TLS), or a client of the package
            ``redis`` that answers in bytes (one for a cluster, say).
        stream: the key of the stream. It holds what users have said: whoever may read the server's keys may
        read it.
        max_records: records that are kept, about; a record has 4 bytes a token and some 120.
        keep_seconds: age at which records go.
        timeout: seconds that the server may take to answer, where ``server`` is a URL.

    Raises:
        InvalidArgumentError: a limit is not positive, or the client decodes its answers.
    """

    def __init__(
        self,
        server: "str | redis.Redis | redis.RedisCluster",
        stream: str = "sssd:finished",
        *,
        max_records: int = 4096,
        keep_seconds: float = 86400.0,
        timeout: float = 1.0,
    ) -> None:
        if min(max_records, keep_seconds, timeout) <= 0:
            raise InvalidArgumentError("max_records, keep_seconds and timeout must be positive")
        self._client: Any = server
        if isinstance(server, str):
            self._client = redis.Redis.from_url(
                server, socket_timeout=timeout, socket_connect_timeout=timeout
            )
        if self._client.get_encoder().decode_responses:
            raise InvalidArgumentError("the client decodes its answers; make it with decode_responses=False")
        self._stream, self._max_records, self._keep_seconds = stream, max_records, keep_seconds
        self._last, self._trimmed, self._failed = b"0-0", 0.0, False

    def publish(self, record: bytes) -> None:
        """Appends a record."""
        if not 0 < len(record) <= MAX_RECORD_BYTES:
            raise InvalidArgumentError(f"a record has 1 to {MAX_RECORD_BYTES} bytes, not {len(record)}")
        self._client.xadd(self._stream, {_FIELD: record}, maxlen=self._max_records, approximate=True)
        if time.monotonic() - self._trimmed > _TRIM_SECONDS or not self._trimmed:
            oldest = int((time.time() - self._keep_seconds) * 1000)
            self._client.xtrim(self._stream, minid=max(oldest, 0), approximate=False)
            self._trimmed = time.monotonic()

    def poll(self) -> Iterator[bytes]:
        """Gives out what is new in the stream, in its order."""
        try:
            if self._failed:
                self._start_anew_after_a_loss()
            while entries := self._read():
                for self._last, fields in entries:
                    # entries that others wrote may hold anything
                    if record := fields.get(_FIELD):
                        yield record
                if len(entries) < _COUNT:
                    break
        except redis.RedisError:
            self._failed = True
            raise

    def close(self) -> None:
        """Closes the client's connections."""
        self._client.close()

    def _read(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """Entries after the last one."""
        found = self._client.xread({self._stream: self._last}, count=_COUNT)
        streams = found.values() if isinstance(found, dict) else [entries for _, entries in found]
        return [entry for entries in streams for entry in _flat(entries)]

    def _start_anew_after_a_loss(self) -> None:
        """A server that came back without its data may count from below where we are."""
        newest = b"0-0"
        if self._client.exists(self._stream):
            newest = self._client.xinfo_stream(self._stream)["last-generated-id"]
        if _place(newest) < _place(self._last):
            self._last = b"0-0"
        self._failed = False


def _flat(entries: Any) -> Any:
    """Entries of a stream, which one version of the protocol wraps in another list."""
    return entries[0] if entries and isinstance(entries[0], list) else entries


def _place(entry: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry.partition(b"-")
    return int(milliseconds), int(number)
