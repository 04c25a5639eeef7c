"""Sequences by string id, for engines that know their requests by name."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from typing import TYPE_CHECKING, Any

from sssd._core import DraftBatch, Drafter, Sequence
from sssd.errors import BatchError, InvalidArgumentError, MemoryLimitError, SssdError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from sssd.sharing import Replica


class Requests:
    """The running sequences of a drafter by request id. Not for use from several threads at once.

    Once per engine step, with whole rows as the engine has them::

        batch = requests.step(ids, rows=rows, ended=gone, options=options_of, shape="chain", rule=rule)

    Args:
        drafter: What starts the sequences.
        replica: What shares those that finish with other replicas, if they are to be shared.

    Every method that takes a request id raises ``InvalidArgumentError`` if there is no such request, but for
    ``step`` with ``rows``, which begins it.
    """

    def __init__(self, drafter: Drafter, replica: "Replica | None" = None) -> None:
        self.drafter, self.replica = drafter, replica
        self._sequences: dict[str, Sequence] = {}
        self._refused: set[str] = set()

    def begin(
        self, request_id: str, prompt_ids: "ArrayLike", prediction: "ArrayLike | None" = None, **options: Any
    ) -> Sequence:
        """Starts a request; arguments and errors of ``Drafter.begin``.

        Raises:
            InvalidArgumentError: There is a request with this id.
        """
        self._check_new(request_id)
        sequence = self._sequences[request_id] = self.drafter.begin(prompt_ids, prediction, **options)
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
        self, request_ids: Iterable[str | None], token_ids: "ArrayLike", offsets: "ArrayLike", **options: Any
    ) -> None:
        """``Drafter.extend_batch`` for the named requests."""
        self.drafter.extend_batch(self._named(request_ids), token_ids, offsets, **options)

    def draft_batch(self, request_ids: Iterable[str | None], *args: Any, **options: Any) -> DraftBatch:
        """``Drafter.draft_batch`` for the named requests."""
        return self.drafter.draft_batch(self._named(request_ids), *args, **options)

    def step(
        self,
        request_ids: SequenceABC[str | None],
        token_ids: "ArrayLike | None" = None,
        offsets: "ArrayLike | None" = None,
        max_nodes: "ArrayLike | None" = None,
        *,
        rows: SequenceABC[Any] | None = None,
        prompt_lengths: SequenceABC[int] | None = None,
        options: Callable[[str], Mapping[str, Any]] | None = None,
        ended: Iterable[str] = (),
        learn: bool = True,
        **drafting: Any,
    ) -> DraftBatch:
        """One engine step: ends requests, begins those that are new, and ``Drafter.step`` for all named.

        Args:
            request_ids: n requests, none twice; None where nothing is to be drafted.
            token_ids: With ``offsets``, what the target has produced for each, as for ``Drafter.step``; or
            offsets: See ``token_ids``.
            max_nodes: As for ``Drafter.step``.
            rows: All tokens of each request, n sequences or arrays of integers: what is new is appended, what
                was taken back is taken back, and a request that has not been seen is begun.
            prompt_lengths: Tokens of each row that are its prompt, for requests that have not been seen; by
                default all.
            options: Called with the id of each request that has not been seen; what ``Drafter.begin`` is to
                be given beside the prompt (``prediction``, ``namespace``, ``max_length``, ``end_token_ids``).
            ended: Requests that are over; ids that are not known, or no longer, do no harm.
            learn: Whether later requests learn from those that have ended, and from texts that are begun anew
                under the same id.
            **drafting: What else ``Drafter.step`` takes.

        Returns:
            Trees or chains of the n requests.

        Raises:
            InvalidArgumentError, InvalidTokenError: Bad input. Requests that have ended are over; no other is
                changed.
            BatchError: As ``Drafter.step``; also of requests that could not be begun, whose drafts are empty.
                A request that has failed has no drafts until it has ended.
        """
        for request_id in ended:
            self._end(request_id, learn)
        if rows is None:
            return self.drafter.step(self._named(request_ids), token_ids, offsets, max_nodes, **drafting)
        if len(request_ids) != len(rows):
            message = f"rows must hold the tokens of each of {len(request_ids)} requests, got {len(rows)}"
            raise InvalidArgumentError(message)
        refused: dict[int, SssdError] = {}
        find: Callable[[Any], Sequence | None] = self._sequences.get
        sequences = list(map(find, request_ids))
        if None in sequences:
            refused = self._begin_new(request_ids, rows, prompt_lengths, options)
            sequences = list(map(find, request_ids))
        try:
            batch = self.drafter.step(
                sequences, token_ids, offsets, max_nodes, rows=rows, learn=learn, **drafting
            )
        except BatchError as failed:
            for place in failed.failures:
                self._refuse(str(request_ids[place]))
            failed.failures = dict(sorted({**failed.failures, **refused}.items()))
            raise
        if refused:
            places, first = ", ".join(map(str, refused)), next(iter(refused.values()))
            not_begun = BatchError(f"requests {places} of the batch could not be begun; first: {first}")
            not_begun.failures, not_begun.batch = refused, batch
            raise not_begun
        return batch

    def keep(self, request_ids: Iterable[str], *, learn: bool = True) -> int:
        """Ends all requests but these.

        Args:
            request_ids: Those that are still running.
            learn: Whether later requests learn from the others.

        Returns:
            How many have ended.
        """
        running = set(request_ids)
        self._refused &= running
        gone = [request_id for request_id in self._sequences if request_id not in running]
        for request_id in gone:
            self._end(request_id, learn)
        return len(gone)

    def clear(self, *, learn: bool = False) -> int:
        """Ends all requests, as ``keep`` does. What was learned stays: ``Drafter.clear`` forgets it."""
        return self.keep((), learn=learn)

    def finish(self, request_id: str) -> None:
        """Ends a request; later ones learn from it, those of other replicas too if there is a ``replica``."""
        self._finish(self._take(request_id))

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

    def _begin_new(
        self,
        request_ids: SequenceABC[str | None],
        rows: SequenceABC[Any],
        prompt_lengths: SequenceABC[int] | None,
        options: Callable[[str], Mapping[str, Any]] | None,
    ) -> dict[int, SssdError]:
        """Begins what has not been seen; returns what there is no memory for, by place."""
        refused: dict[int, SssdError] = {}
        for place, request_id in enumerate(request_ids):
            if request_id is None or request_id in self._sequences or request_id in self._refused:
                continue
            prompt = rows[place] if prompt_lengths is None else rows[place][: prompt_lengths[place]]
            try:
                self.begin(request_id, prompt, **(options(request_id) if options else {}))
            except MemoryLimitError as full:
                refused[place] = full
                self._refuse(request_id)
        return refused

    def _refuse(self, request_id: str) -> None:
        """Leaves a request without drafts until it has ended: every try may take long."""
        self._refused.add(request_id)
        sequence = self._remove(request_id)
        if sequence is not None:
            sequence.close()

    def _end(self, request_id: str, learn: bool) -> None:
        self._refused.discard(request_id)
        sequence = self._remove(request_id)
        if sequence is None:
            return
        try:
            self._finish(sequence) if learn else sequence.close()
        except SssdError:
            # over all the same, and no concern of the others
            sequence.close()

    def _finish(self, sequence: Sequence) -> None:
        if self.replica is None:
            sequence.finish()
        else:
            self.replica.finish(sequence)

    def _named(self, request_ids: Iterable[str | None]) -> list[Sequence | None]:
        return [None if request_id is None else self[request_id] for request_id in request_ids]

    def _take(self, request_id: str) -> Sequence:
        sequence = self[request_id]
        self._remove(request_id)
        return sequence

    def _remove(self, request_id: str) -> Sequence | None:
        return self._sequences.pop(request_id, None)

    def _check_new(self, request_id: str) -> None:
        if request_id in self._sequences:
            raise InvalidArgumentError(f"request {request_id!r} is running; finish or abort it first")
        self._refused.discard(request_id)
