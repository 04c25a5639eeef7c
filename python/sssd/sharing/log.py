"""What replicas share finished requests by: an append-only log, behind one small interface."""

from collections.abc import Iterable
from typing import Protocol

MAX_RECORD_BYTES = 1 << 20
"""The most bytes of a record; logs take and give no longer ones."""


class Log(Protocol):
    """A log of records that every replica appends to and reads. Used by one thread at a time.

    Calls may take their time, or raise whatever they like: a ``Replica`` makes them from a thread of its
    own, and tries again. A record may come twice, never in parts.
    """

    def publish(self, record: bytes) -> None:
        """Appends a record of at most ``MAX_RECORD_BYTES`` bytes.

        Raises:
            InvalidArgumentError: this record cannot be published, now or later.
        """

    def poll(self) -> Iterable[bytes]:
        """Records that this reader has not been given yet, its own included or not: at first the oldest that
        are kept. Does not wait for new ones. Who stops in the middle gets the rest the next time.
        """

    def close(self) -> None:
        """Gives everything back."""
