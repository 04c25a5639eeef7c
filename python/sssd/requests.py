"""Sequences by string id, for engines that know their requests by name."""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceABC
from typing import Any

from numpy.typing import ArrayLike

from sssd._core import DraftBatch, Drafter, Sequence
from sssd.errors import InvalidArgumentError
from sssd.sharing import Replica


class Requests:
    """The running sequences of a drafter by request id. Not for use from several threads at once.

    Args:
        drafter: What starts the sequences.
        replica: What shares those that finish with other replicas, if they are to be shared.

    Every method that takes a request id raises ``InvalidArgumentError`` if there is no such request.
    """

    def __init__(self, drafter: Drafter, replica: Replica | None = None) -> None:
        self.drafter, self.replica = drafter, replica
        self._sequences: dict[str, Sequence] = {}

    def begin(self, request_id: str, prompt_ids: ArrayLike, **options: Any) -> Sequence:
        """Starts a request; arguments and errors of ``Drafter.begin``.

        Raises:
            InvalidArgumentError: There is a request with this id.
        """
        self._check_new(request_id)
        sequence = self._sequences[request_id] = self.drafter.begin(prompt_ids, **options)
        return sequence

    def fork(self, request_id: str, new_id: str) -> Sequence:
        """Starts another request with the history of one; errors of ``Sequence.fork``.

        Raises:
            InvalidArgumentError: There is a request with the new id.
        """
        self._check_new(new_id)
        sequence = self._sequences[new_id] = self[request_id].fork()
        return sequence

    def extend_batch(
        self, request_ids: Iterable[str], token_ids: ArrayLike, offsets: ArrayLike, **options: Any
    ) -> None:
        """``Drafter.extend_batch`` for the named requests."""
        self.drafter.extend_batch(self._named(request_ids), token_ids, offsets, **options)

    def draft_batch(self, request_ids: Iterable[str], *args: Any, **options: Any) -> DraftBatch:
        """``Drafter.draft_batch`` for the named requests."""
        return self.drafter.draft_batch(self._named(request_ids), *args, **options)

    def step(
        self, request_ids: Iterable[str], token_ids: ArrayLike, offsets: ArrayLike, *args: Any, **options: Any
    ) -> DraftBatch:
        """``Drafter.step`` for the named requests."""
        return self.drafter.step(self._named(request_ids), token_ids, offsets, *args, **options)

    def finish(self, request_id: str) -> None:
        """Ends a request; later ones learn from it, those of other replicas too if there is a ``replica``."""
        sequence = self._take(request_id)
        if self.replica is None:
            sequence.finish()
        else:
            self.replica.finish(sequence)

    def abort(self, request_id: str) -> None:
        """Drops a request; nothing is learned from it."""
        self._take(request_id).close()

    def __getitem__(self, request_id: str) -> Sequence:
        try:
            return self._sequences[request_id]
        except KeyError:
            raise InvalidArgumentError(f"there is no request {request_id!r}; begin it first") from None

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._sequences

    def __iter__(self) -> Iterator[str]:
        return iter(self._sequences)

    def __len__(self) -> int:
        return len(self._sequences)

    def _named(self, request_ids: Iterable[str]) -> SequenceABC[Sequence]:
        return [self[request_id] for request_id in request_ids]

    def _take(self, request_id: str) -> Sequence:
        sequence = self[request_id]
        del self._sequences[request_id]
        return sequence

    def _check_new(self, request_id: str) -> None:
        if request_id in self._sequences:
            raise InvalidArgumentError(f"request {request_id!r} is running; finish or abort it first")
