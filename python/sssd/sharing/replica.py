"""A drafter whose finished requests other replicas learn from, and which learns from theirs."""

import os
import threading
import weakref
from collections.abc import Container
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from sssd._core import Drafter, Sequence
from sssd.errors import InvalidArgumentError, InvalidTokenError
from sssd.sharing.exchange import Exchange, Limits
from sssd.sharing.log import Log
from sssd.sharing.record import MAX_TOKENS


class Replica:
    """Shares the finished requests of a drafter with the other replicas of a deployment, through a log.

    ``finish`` hands a request over and returns; a thread of its own publishes it, and lets the drafter learn
    what others have published: at first what the log has kept, so that a replica that starts anew catches up.
    No draft and no ``finish`` waits for the log, however slow or dead it is. A context manager that closes
    itself.

    Texts leave the process: only those of the ``namespaces`` that are named here, and only into these are
    others' taken. After a fork the child shares nothing until it makes a replica of its own.

    Args:
        drafter: learns, by ``Drafter.learn``.
        log: where records go and come from; closed with the replica.
        namespaces: the shared ones: a set, or anything that tells by ``in`` whether a name is. ``{""}``
            shares the default namespace. Asked for each record, so that a set may change.
        fingerprint: ``tokenizer_fingerprint`` of the model's tokenizer, 32 bytes. Records of another
            tokenizer are refused, as are those of another ``vocab_size``.
        key: a secret of up to 64 bytes that all replicas have: records that were not written with it are
            refused.
        max_tokens: the last tokens of a request that are shared: its output and the end of its prompt.
        queue_bytes: bytes of requests that wait to be published; beyond, the oldest are dropped and counted.
        learn_share: share of the time that the thread may spend learning, 0 to 1.
        learn_bytes: bytes of records that it takes in a second.
        interval: seconds between two looks at the log.

    Raises:
        InvalidArgumentError: an argument is out of range.
    """

    def __init__(
        self,
        drafter: Drafter,
        log: Log,
        *,
        namespaces: Container[str],
        fingerprint: bytes | None = None,
        key: bytes | None = None,
        max_tokens: int = 8192,
        queue_bytes: int = 16 << 20,
        learn_share: float = 0.1,
        learn_bytes: int = 16 << 20,
        interval: float = 0.05,
    ) -> None:
        if isinstance(namespaces, str) or not hasattr(namespaces, "__contains__"):
            raise InvalidArgumentError('namespaces must be a set of names, such as {""} for the default one')
        if fingerprint is not None and len(fingerprint) != 32:
            raise InvalidArgumentError(f"fingerprint must have 32 bytes, not {len(fingerprint)}")
        if key is not None and not 1 <= len(key) <= 64:
            raise InvalidArgumentError(f"key must have 1 to 64 bytes, not {len(key)}")
        if not 1 <= max_tokens <= MAX_TOKENS:
            raise InvalidArgumentError(f"max_tokens must be between 1 and {MAX_TOKENS}, not {max_tokens}")
        if not (queue_bytes >= 4 * max_tokens and learn_bytes > 0 and 0 < learn_share <= 1 and interval > 0):
            raise InvalidArgumentError(
                "learn_bytes and interval must be positive, learn_share at most 1, and queue_bytes hold a "
                f"request (4 bytes for each of max_tokens): got {learn_bytes}, {interval}, {learn_share}, "
                f"{queue_bytes}"
            )
        limits = Limits(max_tokens, queue_bytes, learn_share, learn_bytes, interval)
        self._drafter = drafter
        self._exchange = Exchange(drafter, log, namespaces, fingerprint, key, limits)
        self._pid = os.getpid()
        thread = threading.Thread(target=self._exchange.run, name="sssd-sharing", daemon=True)
        # also when nobody has closed it, at the end of the interpreter at the latest
        self._stop = weakref.finalize(self, _stop, self._exchange, thread, self._pid)
        thread.start()
        self._thread = thread

    @property
    def drafter(self) -> Drafter:
        """The drafter that learns."""
        return self._drafter

    def finish(self, sequence: Sequence) -> None:
        """In place of ``sequence.finish()``: later requests learn from it, here and in the other replicas.

        Raises:
            As ``Sequence.finish``; the request is not shared then.
        """
        if self._is_over or sequence.closed or not self._exchange.shares(sequence.namespace):
            sequence.finish()
            return
        namespace, token_ids = sequence.namespace, sequence.token_ids
        sequence.finish()
        self._exchange.put(namespace, token_ids)

    def share(self, token_ids: ArrayLike, *, namespace: str = "") -> None:
        """Hands a text to the other replicas, not to this one's drafter. Does nothing if the namespace is
        not shared.

        Args:
            token_ids: any one-dimensional sequence or array of integers.
            namespace: whose text it is.

        Raises:
            InvalidTokenError: an id is not an integer.
        """
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise InvalidTokenError(
                f"token ids must be a one-dimensional sequence of integers, got {ids.dtype}"
            )
        if not self._is_over and self._exchange.shares(namespace):
            wide = ids.astype(np.int64)
            self._exchange.put(namespace, np.where(wide < 1 << 31, wide, -1).astype(np.int32))

    @property
    def metrics(self) -> dict[str, float]:
        """Counters since the replica was made.

        ``published``, ``published_bytes`` records; ``dropped`` requests for want of room in the queue, or
        because the log would not take them; ``learned``, ``learned_tokens`` of others; ``own`` and
        ``duplicate`` records passed over; ``refused`` ones, of other namespaces, tokenizers or vocabularies,
        or that did not fit into memory; ``damaged`` ones, of other versions or keys too; ``errors`` of the
        log. And at the moment: ``queued_bytes``; ``lag_seconds`` between the last learned record's end there
        and its coming here, by the two clocks; ``failing``, 1 if the log's last call failed.
        """
        return self._exchange.metrics

    def close(self, timeout: float = 2.0) -> None:
        """Publishes what waits, and ends the thread and closes the log. Closing twice is fine, as is
        finishing sequences afterwards.

        Args:
            timeout: seconds after which the thread is left to end by itself.
        """
        if not self._is_over:
            self._exchange.stop()
            if self._thread is not threading.current_thread():
                self._thread.join(timeout)
            self._stop.detach()

    @property
    def closed(self) -> bool:
        """Whether it shares no more: closed, or the copy of a forked child."""
        return self._is_over

    @property
    def _is_over(self) -> bool:
        return os.getpid() != self._pid or self._exchange.stopping

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _stop(exchange: Exchange, thread: threading.Thread, pid: int) -> None:
    if os.getpid() == pid:
        exchange.stop()
        if thread is not threading.current_thread():
            thread.join(1.0)
