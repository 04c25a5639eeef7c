"""Types of the compiled core."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sssd.hardware.curve import CostCurve

_Given: TypeAlias = "DraftTree | ArrayLike | Iterable[ArrayLike]"
_GivenProbs: TypeAlias = ArrayLike | Iterable[ArrayLike]
_Allowed: TypeAlias = ArrayLike | Callable[[tuple[int, ...]], ArrayLike | None]

__all__ = [
    "MAX_NODES",
    "SOURCES",
    "TOP_K",
    "BuildSummary",
    "CostGrid",
    "Datastore",
    "DatastoreBuilder",
    "DatastoreInfo",
    "Documents",
    "DraftBatch",
    "DraftTree",
    "Drafter",
    "FileInfo",
    "Pace",
    "PassBlock",
    "PassCosts",
    "Sequence",
    "SizingRule",
    "__version__",
    "build_profile",
    "top_k",
    "write_tombstones",
]

MAX_NODES: int
SOURCES: tuple[str, ...]
TOP_K: int
__version__: str
build_profile: str

def write_tombstones(
    store: Datastore,
    dead: ArrayLike,
    path: _StrPath,
    *,
    progress: Callable[[int, int], object] | None = None,
) -> int:
    """Writes which documents of a datastore file are dead, for ``Datastore.open(tombstones=...)``. They are passed over by all
    that is looked up; the file itself stays as it is. The target appears, or is replaced, in one durable step.

    Args:
        store: an open datastore of one file. Documents that its own tombstones name stay dead.
        dead: bool [documents], which are dead.
        path: the file to write.
        progress: called about twenty times a second with how much is done and of how much.

    Returns:
        How many tokens the dead documents have.

    Raises:
        InvalidArgumentError: the store has several files, or ``dead`` is not one bool per document.
        CorruptDatastoreError, DatastoreChangedError: the store is damaged, or changed since it was opened.
        OSError: the file cannot be written, or ``path`` is a folder, a pipe or a device.
        MemoryError: there is no memory for it: a quarter of a byte per token of the largest segment.
        ClosedError: the store is closed.
    """

def top_k(logits: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The most probable tokens under logits, and their probabilities, in one pass. The GIL is released.

    Args:
        logits: float32 [..., vocabulary], of which the last axis is contiguous.
        k: tokens wanted, at most 8; no more than the vocabulary has are given.

    Returns:
        ids int64 [..., k], the most probable first, the first of equals first; probs float32 [..., k], which sum to at
        most 1. Where logits are no distribution (NaN, infinite) probs are 0, and the first NaN comes first.

    Raises:
        InvalidArgumentError: logits of another type or layout, no vocabulary, or ``k`` is not in 1 to 8.
    """

@final
class Drafter:
    """Drafts continuations of token sequences. One drafter serves any number of sequences and threads.

    Its sequences learn from one another: from what ``Sequence.finish`` and ``commit`` hand over, and from the target's
    probabilities given to ``extend`` and ``feedback``.

    Args:
        vocab_size: number of token ids; ids outside are refused everywhere. Any id below 2^31 if left out.
        end_token_ids: tokens that end a sequence; nothing is drafted after one.
        datastore: a corpus to match as well: a path, several paths that are one store, the folder of a corpus, or an open
            ``Datastore`` (which may be closed afterwards). Or several by name, a mapping from names to such: sequences
            match all of them, or those that ``begin(datastores=...)`` names.
        load: how to open paths, ``"mmap"``, ``"mmap-wait"`` or ``"ram"``; see ``Datastore.open``.
        ranking: rank the candidates of probable nodes anew where the datastore has tables for it (``DatastoreBuilder``):
            more accepted tokens for some microseconds a draft. Without such tables nothing changes.
        live_bytes: memory that the tokens of finished requests (the live store) may come to take in each namespace, about
            42 bytes a token; 0 keeps none. Every size is a number or text such as ``"512M"`` (K, M, G, T: powers of
            1024).
        soft_bytes: the same for the target's own most probable tokens; 0 keeps none.
        max_bytes: limit of all memory. No limit if left out. See ``memory``.
        max_sequence_bytes: limit of each sequence's memory.
        threads: threads of a batch call, the caller's included; by default the number of cores, at most 8. They are
            started when first needed.
        namespace_ttl: seconds after which a named namespace without sequences is forgotten; never if left out.

    Raises:
        InvalidArgumentError: ``vocab_size`` is not in 1..2^31, or a size is negative.
        InvalidTokenError: an end token is outside the vocabulary.
        VocabularyMismatchError: a datastore has more token ids than ``vocab_size``, or datastores differ in vocabulary or
            tokenizer.
        OSError, DatastoreError: the datastore cannot be opened.
        MemoryLimitError: ``max_bytes`` is less than a drafter takes.
    """
    def __new__(
        cls,
        *,
        vocab_size: int | None = None,
        end_token_ids: ArrayLike | None = None,
        datastore: _Store | Mapping[str, _Store] | None = None,
        load: Literal["mmap", "mmap-wait", "ram"] = "mmap",
        ranking: bool = True,
        live_bytes: int | str = 67108864,
        soft_bytes: int | str = 16777216,
        max_bytes: int | str | None = None,
        max_sequence_bytes: int | str | None = None,
        threads: int | None = None,
        namespace_ttl: float | None = None,
    ) -> Self: ...
    def begin(
        self,
        prompt_ids: ArrayLike,
        prediction: ArrayLike | None = None,
        *,
        namespace: str = "",
        max_length: int | None = None,
        datastores: Iterable[str] | None = None,
        end_token_ids: ArrayLike | None = None,
        background: bool = False,
    ) -> Sequence:
        """Starts a sequence (a request).

        Args:
            prompt_ids: its tokens so far, any one-dimensional sequence or array of integers; may be empty. Ids outside
                the vocabulary, such as -1 at a picture's place, are held as placeholders, here and in what is appended:
                ``token_ids`` shows -1, they match nothing and are never drafted.
            prediction: tokens that the output is expected to resemble, such as the file that is to be edited. Drafts
                follow it from the start of the output and find it again after differences; it need not be right.
            namespace: whose live store, target's probabilities and weights to use and to add to: a tenant, a model, an
                adapter. Made when first named. Nothing is shared with other namespaces but the datastore.
            max_length: the most tokens that the sequence may have; nothing is drafted beyond.
            datastores: names of those of the drafter's datastores that this sequence and its forks match; none if empty, all
                by default. A datastore that was given alone is named ``""``.
            end_token_ids: tokens that end this sequence, at most 256, in place of the drafter's; none if empty.
            background: return at once and let another thread index the prompt. Until it is done ``ready`` is False and
                drafts are empty; other calls wait. With ``threads=1`` the first of these does the work.

        Raises:
            InvalidTokenError: an id is not an integer, or an end token is outside the vocabulary.
            InvalidArgumentError: ``max_length`` is negative, there is no datastore of a name, or there are more end tokens.
            MemoryLimitError: the sequence or its namespace does not fit into the limits.
        """
    def extend_batch(
        self,
        sequences: Iterable[Sequence | None],
        token_ids: ArrayLike,
        offsets: ArrayLike,
        topk_ids: ArrayLike | None = None,
        topk_probs: ArrayLike | None = None,
    ) -> None:
        """Appends the tokens that the target model has produced for each of many sequences, in one call.

        Args:
            sequences: n sequences of this drafter, none twice.
            token_ids: their tokens one after another, integers [m].
            offsets: those of sequence i are ``token_ids[offsets[i]:offsets[i + 1]]``; integers [n+1].
            topk_ids, topk_probs: as in ``Sequence.extend``, [m, k].

        Raises:
            InvalidTokenError, InvalidArgumentError: bad input; nothing is appended to any sequence.
            BatchError: sequences are closed, met an internal error or do not fit into memory; the others are extended.
        """
    def follow_batch(
        self,
        sequences: Iterable[Sequence | None],
        rows: Iterable[ArrayLike],
        *,
        compare: int | None = 64,
        learn: bool = False,
    ) -> NDArray[np.int32]:
        """``Sequence.follow`` for many sequences in one call.

        Args:
            sequences: n sequences of this drafter, none twice.
            rows: all tokens of each, n sequences or arrays of integers.
            compare, learn: as in ``Sequence.follow``.

        Returns:
            nodes of the last draft that the new tokens have accepted, int32 [n].

        Raises:
            InvalidTokenError, InvalidArgumentError: bad input; no sequence is changed.
            BatchError: sequences are closed, met an internal error or do not fit into memory; the others have followed.
        """
    def draft_batch(
        self,
        sequences: Iterable[Sequence | None],
        max_nodes: ArrayLike | None = None,
        *,
        total_nodes: int | None = None,
        min_nodes: ArrayLike | None = None,
        max_depth: ArrayLike | None = None,
        min_prob: float = 0.001,
        cost: PassCosts | CostCurve | None = None,
        rate: float | None = None,
        rule: SizingRule | None = None,
        shape: Literal["tree", "chain"] = "tree",
        given: Iterable[_Given | None] | DraftBatch | None = None,
        given_probs: Iterable[_GivenProbs | None] | None = None,
        allowed: Iterable[_Allowed | None] | None = None,
        out: DraftBatch | None = None,
    ) -> DraftBatch:
        """Drafts for many sequences in one call. The GIL is released, and the drafter's threads share the work.

        Args:
            sequences: n sequences of this drafter, none twice; None where nothing is to be drafted.
            max_nodes: the most nodes of each tree, 0 to 1024: one number or integers [n]. 0 turns a sequence off. By
                default 32, or what the ``rule`` says.
            total_nodes: the most nodes of all trees together. They go to the most probable nodes, whichever sequences
                these belong to. Without it every tree gets what ``Sequence.draft`` gives it.
            min_nodes: nodes that a tree gets before others are considered, if it can have so many; one number or [n].
            max_depth: no node is deeper; one number or [n]. ``max_length`` of a sequence holds as well.
            min_prob: least probability of a node. A ``rule`` has its own.
            cost: what passes cost, ``PassCosts`` or a ``CostCurve``: then all trees together are as large as pays, as
                ``PassCosts.allocate`` has it, with at most ``max_nodes`` each; not together with ``total_nodes``. A
                curve is read at this number of sequences and their mean length.
            rate: what a second is worth then, in tokens; by default what decoding without drafts makes of it.
            rule: a ``SizingRule`` in place of the two: it says how much to draft for each sequence, shares the pass out,
                and learns from both.
            shape: ``"tree"``, or ``"chain"`` as in ``Sequence.draft``. Chains share totals and passes as trees do: a node
                where it is worth more than those of the others. See ``DraftBatch.chains``.
            given, given_probs, allowed: as in ``Sequence.draft``, one for each sequence, None where there is none: lists or
                arrays [n, ...], or a ``DraftBatch`` of n trees. What a callable raises is raised when the step has ended
                without drafts.
            out: where to put the trees; by default a new ``DraftBatch``.

        Returns:
            ``out`` or the new ``DraftBatch``.

        Raises:
            InvalidArgumentError: bad input, or ``out`` has not room enough for all trees at their largest; nothing is
                drafted.
            BatchError: sequences are closed or met an internal error. Its ``batch`` has the trees of the others.
        """
    def step(
        self,
        sequences: Iterable[Sequence | None],
        token_ids: ArrayLike | None = None,
        offsets: ArrayLike | None = None,
        max_nodes: ArrayLike | None = None,
        *,
        rows: Iterable[ArrayLike] | None = None,
        compare: int | None = 64,
        learn: bool = False,
        total_nodes: int | None = None,
        min_nodes: ArrayLike | None = None,
        max_depth: ArrayLike | None = None,
        min_prob: float = 0.001,
        cost: PassCosts | CostCurve | None = None,
        rate: float | None = None,
        rule: SizingRule | None = None,
        shape: Literal["tree", "chain"] = "tree",
        topk_ids: ArrayLike | None = None,
        topk_probs: ArrayLike | None = None,
        feedback_ids: ArrayLike | None = None,
        feedback_probs: ArrayLike | None = None,
        given: Iterable[_Given | None] | DraftBatch | None = None,
        given_probs: Iterable[_GivenProbs | None] | None = None,
        allowed: Iterable[_Allowed | None] | None = None,
        out: DraftBatch | None = None,
    ) -> DraftBatch:
        """One engine step in one call: the target's probabilities after the last drafts, ``extend_batch`` or
        ``follow_batch``, then ``draft_batch``, for each sequence in one go.

        Args:
            token_ids, offsets: what the target has produced since the last step, as in ``extend_batch``; or
            rows, compare, learn: all tokens of each sequence, as in ``follow_batch``.
            feedback_ids: the target's k most probable tokens after every node of the last drafts, verified and accepted or
                not, integers [n, rows, k]: row 0 of a sequence after its last token (the root), row i + 1 after node i of
                its last draft; further rows are not looked at. As ``Sequence.feedback``; ``topk_ids`` are not needed then.
            feedback_probs: their probabilities, floats [n, rows, k].

            The others are those of ``draft_batch``.

        Returns, Raises:
            As these.
        """
    @property
    def memory(self) -> dict[str, int | None]:
        """Bytes of memory: ``{"limit": int | None, "used": int, "peak": int, "shared": int, "sequences": int, "refused":
        int}``.

        ``used`` never exceeds ``limit``. It counts ``shared``, what namespaces hold (live stores, target's probabilities,
        weights, names) and what is kept to draft and step with, and ``sequences``, what each sequence holds; what forks
        share counts once. Not counted: the datastore, stacks of threads, and a draft or step under way. ``refused`` counts
        what did not fit.
        """
    @property
    def metrics(self) -> dict[str, Any]:
        """Counters and histograms since the drafter was made, as plain numbers.

        Counters: ``begun``, ``finished``, ``failed`` sequences; ``tokens`` appended. ``datastore_lost``: 1 if a file of the
        mapped datastore was changed in place, so that drafts go without the store, else 0. ``undrafted``: empty drafts by
        reason: ``budget`` (no node was allowed, or all went to others), ``unprofitable`` (by the rule or the costs),
        ``indexing`` (a prompt is read in the background), ``no_match`` (no continuation was known, or the text is over).
        Histograms, each ``{"bounds": [...], "counts": [...], "sum": number}``: ``nodes`` of each draft whose outcome is
        known, and how many were ``accepted``; ``draft_seconds`` of each single draft; ``batch_seconds`` and
        ``batch_sequences`` of each batch call. ``counts[i]`` values are at most ``bounds[i]`` and above the bound before;
        bounds are always the same, the last one is infinite.

        A name for an exporter: ``sssd.metrics``.
        """
    def namespaces(self) -> dict[str, dict[str, Any]]:
        """The namespaces that are there, by name: ``{name: {"sequences": int, "live_tokens": int, "memory_bytes": int,
        "idle_seconds": float}}``. The default one is named ``""``.
        """
    def remove_namespace(self, name: str) -> bool:
        """Forgets what a namespace has learned. Its running sequences go on with what they know and hand it on to nobody.

        Returns:
            Whether there was one of that name.
        """
    def save(self, folder: _StrPath) -> None:
        """Writes what the drafter has learned from finished sequences, of all namespaces, into a folder: live stores,
        target's probabilities, weights. Atomic: whatever happens, the folder has the old state or the new one.

        Args:
            folder: made if need be. It may hold one state.

        Raises:
            OSError: the folder cannot be written.
        """
    @staticmethod
    def load(folder: _StrPath, **options: Any) -> Drafter:
        """A drafter that knows what another one has saved.

        Args:
            folder: as given to ``save``.
            options: of the new drafter, as in ``Drafter(...)``. ``vocab_size``, ``end_token_ids``, ``live_bytes`` and
                ``soft_bytes`` are those of the saved one unless given; a datastore is always to be given. What does not fit
                is left out.

        Raises:
            OSError: the file cannot be read.
            CorruptStateError: it is damaged or no saved state.
            StateVersionError: another release wrote it.
            VocabularyMismatchError: ``vocab_size`` is not that of the saved drafter.
            As ``Drafter``.
        """
    def learn(self, token_ids: ArrayLike, *, namespace: str = "") -> None:
        """Learns a text that was decoded elsewhere, such as by another replica (``sssd.sharing``), as if a sequence that
        holds it had finished here: later sequences of the namespace match it. Takes about a microsecond a token, in slices
        between which others draft; the oldest texts make room.

        Args:
            token_ids: any one-dimensional sequence or array of integers. Ids outside the vocabulary end a text, and the
                next begins after them.
            namespace: which learns; made when first named.

        Raises:
            InvalidTokenError: an id is not an integer.
            MemoryLimitError: the text or the namespace does not fit into the limits.
        """
    def freeze(self, builder: DatastoreBuilder, *, namespace: str = "") -> int:
        """Adds a namespace's live store to a datastore in the making, to be mapped by other processes when it is
        finished::

            with DatastoreBuilder("learned.sssd", vocab_size=...) as builder:
                drafter.freeze(builder)

        Returns:
            The number of documents. Runs of tokens that several requests had in common are there once.

        Raises:
            InvalidArgumentError: there is no such namespace.
            As ``DatastoreBuilder.add``.
        """
    @property
    def stats(self) -> dict[str, Any]:
        """How drafts fared, by source: ``{"drafts": int, "sources": {name: {"drafted": int, "accepted": int,
        "predicted": float}}}``.

        A node counts for the source that contributed most to it. ``predicted`` is the sum of the nodes'
        probabilities: how many were expected to be accepted. Drafts count once their outcome is known; those of
        running sequences are added every 64 drafts.
        """
    def state_dict(self) -> dict[str, bytes]:
        """What the predictor has learned from finished sequences, as a dict to be saved and loaded.

        Next sequences start with it. It holds no tokens.
        """
    def load_state_dict(self, state: dict[str, bytes]) -> None:
        """Replaces what the predictor has learned, for sequences begun from now on.

        Args:
            state: from ``state_dict`` of a drafter or sequence.

        Raises:
            InvalidArgumentError: the dict is not such a state, or that of another release; nothing changes.
        """
    def clear(self) -> None:
        """Forgets all that was learned: live stores, the target's probabilities and weights of every namespace, as if the
        drafter were new. Sequences that run go on with what they know, and hand it on to nobody. The datastore stays.
        """
    def reset(self) -> None:
        """Forgets the default namespace's weights: sequences begun from now on start with those that ship with sssd. The
        live store stays; see ``clear``.
        """
    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that its sequences share: live store, target's probabilities, weights. A datastore is not
        counted.
        """
    @property
    def live_tokens(self) -> int:
        """Tokens in the live store."""
    def reopen(
        self,
        datastore: _Store | Mapping[str, _Store] | None = None,
        *,
        load: Literal["mmap", "mmap-wait", "ram"] = "mmap",
    ) -> bool:
        """Opens the datastores anew, as they are now in the same places (of a corpus: its newest version), or others, and has
        drafts match them from the next one on, those of running sequences too. Each draft goes by one version; nobody
        waits meanwhile. What a sequence has chosen stays chosen; names that are gone match nothing. The files of the old
        version are closed when nobody uses them any more.

        Args:
            datastore: others, as in ``Drafter(datastore=...)``.
            load: how to open them, if they are given; else it stays as it was.

        Returns:
            Whether anything has changed. If not, only headers have been read.

        Raises:
            VocabularyMismatchError: vocabulary or tokenizer is not that of the datastores before, or of the drafter.
            OSError, DatastoreError: a datastore cannot be opened.

        After an error everything is as it was.
        """
    @property
    def datastore(self) -> Datastore | None:
        """What sequences match by default: all datastores as one, open for look-up, or None. Closing it does not take it from
        the drafter.
        """
    @property
    def datastores(self) -> dict[str, Datastore]:
        """The datastores by name, without corpora that are empty; ``""`` is one that was given alone."""
    @property
    def vocab_size(self) -> int | None:
        """Number of token ids, or None if not given."""
    @property
    def end_token_ids(self) -> NDArray[np.int32]:
        """Tokens that end a sequence, int32 [n]."""
    def __eq__(self, value: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Sequence:
    """One request's tokens and their index. Made by ``Drafter.begin``; a context manager that finishes the sequence, or
    closes it on an exception.

    Calls from several threads are safe and take turns.
    """
    def extend(
        self, token_ids: ArrayLike, topk_ids: ArrayLike | None = None, topk_probs: ArrayLike | None = None
    ) -> None:
        """Appends tokens that the target model has produced. They are matched from the next draft on.

        Args:
            token_ids: any one-dimensional sequence or array of n integers.
            topk_ids: the target's k most probable tokens at each of them, integers [n, k]: row i is the distribution
                that token i came from. The eight most probable ones are kept.
            topk_probs: their probabilities, floats [n, k].

        Raises:
            InvalidTokenError: an id is not an integer; nothing is appended.
            InvalidArgumentError: shapes do not fit, or a row of probabilities is not within 0..1 and sums to at most
                1; nothing is appended.
            MemoryLimitError: the sequence would not fit into the limits; nothing is appended.
            ClosedError: the sequence is closed.
        """
    def feedback(self, tree: DraftTree, topk_ids: ArrayLike, topk_probs: ArrayLike) -> None:
        """Hands over the target's probabilities after every node of a verified tree, accepted or not.

        Rejected nodes count too: they are distributions of the target for real contexts. Call it before ``extend``;
        ``extend`` then needs no ``topk_ids``.

        Args:
            tree: the tree of n nodes that was verified after the sequence's last token.
            topk_ids: the target's k most probable tokens, integers [n+1, k]: row 0 after the root, row i+1 after node i.
            topk_probs: their probabilities, floats [n+1, k].

        Raises:
            InvalidTokenError: an id of `topk_ids` is not an integer or outside the vocabulary; nothing is learned.
            InvalidArgumentError: shapes do not fit, or a row of probabilities is not within 0..1 and sums to at most
                1; nothing is learned.
            ClosedError: the sequence is closed.
        """
    def prefill(self, token_ids: ArrayLike) -> None:
        """Appends tokens that the target model has not produced: more of the prompt, as it is prefilled in pieces, or
        what a user or a tool adds later. For the prompt it makes no difference how many pieces it comes in.

        Args:
            token_ids: any one-dimensional sequence or array of integers.

        Raises:
            As ``extend``.
        """
    def follow(self, token_ids: ArrayLike, *, compare: int | None = 64, learn: bool = False) -> int:
        """Makes the sequence that of a whole row, as an engine has it now: keeps the first tokens that the two share, takes
        back what it has beyond them, and appends the rest of the row as ``extend`` does. Where they share none it begins
        anew with the row as its prompt: with the same namespace, ``max_length`` and end tokens, and no prediction.

        Only the end of what both have is read and compared, as engines change rows nowhere else: the time does not depend
        on the length of the text. Where the ends differ, all is compared.

        Args:
            token_ids: all tokens of the request, any one-dimensional sequence or array of integers.
            compare: how many tokens at the end of what both have are compared; None for all.
            learn: whether other requests learn from a text that is begun anew, as by ``finish``.

        Returns:
            nodes of the last draft that the new tokens have accepted.

        Raises:
            InvalidTokenError, InvalidArgumentError: an id is not an integer, or ``compare`` is negative; nothing changes.
            MemoryLimitError: the row does not fit into the limits. The sequence then holds what the two share.
            ClosedError: the sequence is closed.
        """
    def clear(self, *, learn: bool = False) -> None:
        """Forgets all tokens, as if the sequence had just begun without a prompt: with the same namespace, ``max_length`` and
        end tokens, and no prediction.

        Args:
            learn: whether other requests learn from the text, as by ``finish``.

        Raises:
            MemoryLimitError: there is no memory for another sequence; nothing changes.
            ClosedError: the sequence is closed.
        """
    def truncate(self, length: int) -> None:
        """Takes the newest tokens back, as if they had never come: a rejected overlap step, a beam that is given up.
        What the weights, the live store and the target's probabilities have learned stays learned. Takes time
        proportional to the number of tokens taken back.

        Args:
            length: tokens that remain, at most as many as there are.

        Raises:
            InvalidArgumentError: there are fewer tokens.
            MemoryLimitError: tokens shared with a fork cannot be taken back within the limits; nothing changes.
            ClosedError: the sequence is closed.
        """
    def fork(self) -> Sequence:
        """Another sequence with the same tokens, weights and namespace: a beam, a further sample of the same prompt. The
        two share the index of what they have in common; the time is proportional to what was appended or taken
        back since the last fork, and four bytes per token are copied. What came of the last draft is learned by
        this sequence only.

        Raises:
            MemoryLimitError: the fork does not fit into the limits.
            ClosedError: the sequence is closed.
        """
    @property
    def ready(self) -> bool:
        """Whether the prompt is indexed; see ``Drafter.begin(background=True)``.

        Raises:
            ClosedError: the sequence is closed.
        """
    def check_integrity(self) -> None:
        """Compares everything the sequence holds with what it should hold. For tests; takes milliseconds per thousand
        tokens.

        Raises:
            InternalError: something is wrong; the message says what.
            ClosedError: the sequence is closed.
        """
    def draft(
        self,
        max_nodes: int = 32,
        *,
        min_prob: float = 0.001,
        max_depth: int | None = None,
        cost: PassCosts | CostCurve | None = None,
        rate: float | None = None,
        rule: SizingRule | None = None,
        shape: Literal["tree", "chain"] = "tree",
        given: _Given | None = None,
        given_probs: _GivenProbs | None = None,
        allowed: _Allowed | None = None,
    ) -> DraftTree:
        """Drafts continuations of the sequence.

        Args:
            max_nodes: the most nodes, 0 to 1024. The tree has fewer if fewer are worth drafting.
            min_prob: least probability of a node, 0 to 1. A ``rule`` has its own.
            max_depth: no node is deeper; the longest path that is of use.
            cost: what passes cost, ``PassCosts`` or a ``CostCurve``: then the tree is as large as pays, as
                ``PassCosts.allocate`` has it. A curve is read at one sequence of this length.
            rate: what a second is worth then, in tokens; by default what decoding without drafts makes of it.
            rule: a ``SizingRule`` in place of the two, which learns them.
            shape: ``"tree"``, or ``"chain"`` for verifiers that take no trees: after each token the most probable one, a
                path of at most ``max_nodes`` nodes.
            given: what another drafter proposes: a ``DraftTree``, a chain of token ids (which ends before the first negative
                one) or several chains; at most 1024 nodes. Of each place the first 64 tokens are heard. It is one more
                source: how far it is trusted is learned, its leaves are extended, and useless ones fade.
            given_probs: of each token of a chain its probability given those before it, floats of the same shape. A tree has
                its own; if all of these are 0, or none are given, they are learned by depth and rank.
            allowed: which tokens may follow: bools [vocabulary], 32-bit words [vocabulary / 32] (bit ``t % 32`` of word
                ``t // 32`` for token t) or a list of ids, for the first place; or a callable that gets the tuple of a
                path's tokens, () first, and returns such a mask for what follows it, or None for anything. Nothing else
                is drafted, and what is forced is. The callable is asked for each node that is worth it, and some more.

        Raises:
            InvalidArgumentError: ``max_nodes``, ``min_prob``, ``max_depth`` or ``rate`` is out of range, ``cost`` or
                ``shape`` is neither, there is a ``rate`` without it, or a ``rule`` as well; ``given``, ``given_probs`` or
                ``allowed`` is none.
            InvalidTokenError: an id of ``given`` or ``allowed`` is outside the vocabulary.
            ClosedError: the sequence is closed.
        """
    def cut_draft(self, nodes: int) -> None:
        """Cuts the last draft to its first ``nodes`` nodes; does nothing if it has no more. For callers who verify less
        than they have drafted, to be called before ``extend``: the sequence then learns what a draft of that size
        teaches, and ``Drafter.stats`` and ``Drafter.metrics`` count those nodes only.

        Args:
            nodes: the number of nodes that are verified, as in ``DraftTree.first``.

        Raises:
            InvalidArgumentError: ``nodes`` is negative.
            ClosedError: the sequence is closed.
        """
    def commit(self) -> None:
        """Hands the tokens so far to the live store, for other sequences of the drafter. ``finish`` does it by itself.

        Raises:
            ClosedError: the sequence is closed.
        """
    def finish(self) -> None:
        """Ends the request and frees the sequence. Later sequences of the drafter learn from it: its tokens go to the
        live store and what the predictor has learned is merged. Finishing or closing again does nothing.
        """
    def close(self) -> None:
        """Frees the sequence; nothing is learned from it, as after an abort. Further calls raise ``ClosedError``; closing
        again does nothing.
        """
    @property
    def drafter(self) -> Drafter:
        """The drafter that it belongs to."""
    @property
    def closed(self) -> bool:
        """Whether ``close`` has been called."""
    @property
    def token_ids(self) -> NDArray[np.int32]:
        """All tokens so far, int32 [len]."""
    @property
    def namespace(self) -> str:
        """The name of its namespace."""
    def state_dict(self) -> dict[str, bytes]:
        """What the predictor has learned so far in this sequence, for ``Drafter.load_state_dict``."""
    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that the sequence holds."""
    def __len__(self) -> int: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

@final
class DraftTree:
    """A draft: continuations of the last token as a tree.

    Nodes are numbered from the most probable one down, so the first ``k`` nodes are the best tree of ``k`` nodes.
    Parents precede their children and siblings have distinct tokens. The root is the last token of the sequence
    and is not a node. Arrays are copies: writing to them does not change the tree.

    Args:
        token_ids: token of each node, n integers.
        parents: parent of each node, n integers; -1 for children of the root.
        probs: path probability of each node, n floats; 0 if left out.
        sources: as in ``sources``, n integers; -1 if left out.

    Trees can be pickled and copied.

    Raises:
        InvalidArgumentError: a parent does not precede its child, siblings share a token, lengths differ, or a source is
            none.
        InvalidTokenError: a token id is not an integer in 0..2^31.
    """
    def __new__(
        cls,
        token_ids: ArrayLike,
        parents: ArrayLike,
        probs: ArrayLike | None = None,
        sources: ArrayLike | None = None,
    ) -> Self: ...
    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Token of each node, int32 [n]."""
    @property
    def parents(self) -> NDArray[np.int32]:
        """Parent of each node, int32 [n]; -1 for children of the root."""
    @property
    def depths(self) -> NDArray[np.int32]:
        """Distance of each node from the root, int32 [n], at least 1."""
    @property
    def probs(self) -> NDArray[np.float32]:
        """Probability that the target produces the path from the root to each node, float32 [n]. Never rises along
        a path; siblings sum to at most their parent's.
        """
    @property
    def sources(self) -> NDArray[np.int8]:
        """The source that contributed most to each node, int8 [n], as an index of ``sssd.SOURCES``; -1 in trees that
        no drafter made.
        """
    @property
    def expected_accepted(self) -> float:
        """Expected number of accepted tokens: the sum of ``probs``."""
    def first(self, nodes: int) -> DraftTree:
        """The tree of the first ``nodes`` nodes, which is the best tree of that size; all of it if it has no more.

        Raises:
            InvalidArgumentError: ``nodes`` is negative.
        """
    def attention_mask(self, width: int | None = None) -> NDArray[np.bool_]:
        """Tree attention mask, bool [w+1, w+1], root first; True where the row's token may attend to the column's:
        to itself and its ancestors (SpecInfer, arXiv 2305.09781).

        Args:
            width: w, at least n; by default n. The root is not counted. Rows added as padding attend to the root and to
                themselves: as in ``pad``, they are children of the root.

        Raises:
            InvalidArgumentError: ``width`` is less than n.
        """
    def position_ids(self, start: int, width: int | None = None) -> NDArray[np.int64]:
        """Position id of the root and each node, int64 [w+1]: ``start`` plus depth. Padding stays at ``start``, so that no
        position lies beyond those of the text.

        Args:
            start: position of the root, which is the number of tokens before it.
            width: w, at least n; by default n.

        Raises:
            InvalidArgumentError: ``width`` is less than n.
        """
    def pad(self, width: int, token_id: int = 0) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Tokens and parents at a fixed width, for verifiers with static shapes.

        Args:
            width: number of nodes, at least n; the root is not counted, as in ``attention_mask``.
            token_id: token of the padding nodes, whose parent is -1: children of the root. They must not be accepted.

        Returns:
            token_ids int32 [width] and parents int32 [width].

        Raises:
            InvalidArgumentError: ``width`` is less than n.
        """
    def breadth_first(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """The tree in breadth-first order, as engines with linked siblings want it.

        Returns:
            nodes int32 [n], the node at each breadth-first position from 1 on (position 0 is the root);
            first_child int32 [n+1] and next_sibling int32 [n+1], positions linked to each position, or -1.
        """
    def chain(self, k: int) -> NDArray[np.int32]:
        """The single path with the most expected accepted tokens, for verifiers that take chains only.

        Args:
            k: the longest path wanted.

        Returns:
            its tokens, int32 [at most k].

        Raises:
            InvalidArgumentError: ``k`` is negative.
        """
    def path(self, k: int) -> NDArray[np.int32]:
        """The nodes of that path: ``probs[path]`` are its probabilities.

        Args:
            k: the longest path wanted.

        Returns:
            nodes int32 [at most k], from the root down.

        Raises:
            InvalidArgumentError: ``k`` is negative.
        """
    def accept(self, target_ids: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Walks from the root along the target's own tokens.

        Args:
            target_ids: the target's token after the root and after each node, n+1 integers.

        Returns:
            nodes int32 [a], the accepted path; token_ids int32 [a+1], the accepted tokens and the bonus token.

        Raises:
            InvalidArgumentError: not n+1 target tokens.
            InvalidTokenError: a target token is not an integer in 0..2^31.
        """
    def render(self, decode: Callable[[SequenceABC[int]], str] | None = None) -> str:
        """The tree as text, one node a line with its probability.

        Args:
            decode: turns a list of token ids into text (such as ``tokenizer.decode``); ids are shown without it.
        """
    def __len__(self) -> int: ...

@final
class DraftBatch:
    """The trees of a batch in flat arrays, which later batches can reuse.

    Tree ``i`` has the nodes ``offsets[i]`` to ``offsets[i + 1]``; its parents are numbered from 0 within the tree, -1
    for children of the root. The properties are views of the buffers as the last batch left them; the next batch
    that is drafted into the same object overwrites them. One batch at a time may use it.

    Args:
        max_sequences: room for so many trees.
        max_nodes: room for so many nodes in all.
        token_ids, parents, depths: buffers to use, int32 [at least max_nodes], such as pinned memory; by default new
            ones.
        probs, sources: the same, float32 and int8.
        offsets: the same, int32 [at least max_sequences + 1].

    Raises:
        InvalidArgumentError: a buffer is too short, not contiguous, of another dtype, or read-only; a size is negative.
    """
    def __new__(
        cls,
        max_sequences: int,
        max_nodes: int,
        *,
        token_ids: NDArray[np.int32] | None = None,
        parents: NDArray[np.int32] | None = None,
        depths: NDArray[np.int32] | None = None,
        probs: NDArray[np.float32] | None = None,
        sources: NDArray[np.int8] | None = None,
        offsets: NDArray[np.int32] | None = None,
    ) -> Self: ...
    @staticmethod
    def from_trees(trees: Iterable[DraftTree | None], *, out: DraftBatch | None = None) -> DraftBatch:
        """A batch of trees that were made one by one, such as by a drafter of another kind.

        Args:
            trees: n ``DraftTree``, or None for none.
            out: where to put them; by default a new ``DraftBatch``.

        Returns:
            ``out`` or the new ``DraftBatch``.

        Raises:
            InvalidArgumentError: an item is neither, ``out`` has not room enough, or there are too many trees.
        """
    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Token of each node, int32 [nodes]."""
    @property
    def parents(self) -> NDArray[np.int32]:
        """Parent of each node within its tree, int32 [nodes]; -1 for children of the root."""
    @property
    def depths(self) -> NDArray[np.int32]:
        """Distance of each node from its root, int32 [nodes], at least 1."""
    @property
    def probs(self) -> NDArray[np.float32]:
        """Probability that the target produces the path from the root to each node, float32 [nodes]."""
    @property
    def sources(self) -> NDArray[np.int8]:
        """The source that contributed most to each node, int8 [nodes], as an index of ``sssd.SOURCES``."""
    @property
    def offsets(self) -> NDArray[np.int32]:
        """Where each tree starts, int32 [sequences + 1]."""
    @property
    def drafted_sequences(self) -> int:
        """Sequences that drafts were made for, which takes time even where nothing of them is left."""
    @property
    def drafted_nodes(self) -> int:
        """Nodes of these drafts before any was cut to what pays or to what others left."""
    @property
    def context(self) -> float:
        """Mean length of the sequences, in tokens."""
    @property
    def accepted(self) -> NDArray[np.int32]:
        """Nodes of the drafts before these that the step's tokens have accepted, int32 [sequences]; empty if it appended none."""
    def chains(
        self,
        k: int,
        *,
        pad: int = -1,
        out: NDArray[np.int32] | None = None,
        lengths: NDArray[np.int32] | None = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The most probable chain of each tree in arrays of fixed length, for verifiers that take no trees. Drafts of
        ``shape="chain"`` are such chains; of other trees it is ``DraftTree.chain``.

        Args:
            k: length of the rows, 0 to 1024; longer chains are cut.
            pad: what fills the rest of a row.
            out: where to put the tokens, a contiguous int32 array [at least n, k]; by default a new one.
            lengths: where to put the lengths, a contiguous int32 array [at least n].

        Returns:
            token_ids int32 [n, k] and lengths int32 [n].

        Raises:
            InvalidArgumentError: ``k`` is out of range, or an array does not fit.
        """
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> DraftTree:
        """Return self[key]."""

@final
class PassBlock:
    """What one verify pass takes and gives back, for the trees of a whole batch: ``[root] + nodes`` of each row.

    Entry 0 of a row is its root, the last token of the text; entry ``i + 1`` is node ``i``. Rows are padded to one
    width, ``[B, T]``, or packed end to end, ``[N]``. Fillers repeat the root's token and position, have no parent and
    attend to themselves only. The arrays are views of buffers that the next ``fill`` or ``accept`` overwrites; nothing
    is allocated once they have grown. One call at a time may use a block.

    Args:
        ids, positions, depths, parents, first_child, next_sibling: buffers to use, contiguous int64 [n] with room for
            every pass, such as pinned memory; by default own ones, which grow.
        ancestors: the same, uint64.
        mask: the same, bool.

    Raises:
        InvalidArgumentError: a buffer is not contiguous, of another dtype, or read-only.
    """
    def __new__(
        cls,
        *,
        ids: NDArray[np.int64] | None = None,
        positions: NDArray[np.int64] | None = None,
        depths: NDArray[np.int64] | None = None,
        parents: NDArray[np.int64] | None = None,
        ancestors: NDArray[np.uint64] | None = None,
        mask: NDArray[np.bool_] | None = None,
        first_child: NDArray[np.int64] | None = None,
        next_sibling: NDArray[np.int64] | None = None,
    ) -> Self: ...
    def fill(
        self,
        trees: DraftBatch | None,
        roots: ArrayLike,
        positions: ArrayLike,
        *,
        width: int | None = None,
        packed: bool = False,
        mask: bool = False,
        links: bool = False,
    ) -> None:
        """Writes the entries of a pass. The GIL is released for large ones.

        Args:
            trees: the drafts of B rows, or None where nothing is drafted.
            roots: the last token of each row, B integers.
            positions: its position id, B integers.
            width: T, at least one more than the largest tree has nodes; by default just that.
            packed: whether rows lie end to end, without fillers; then there is no ``width``.
            mask: whether to write ``mask`` as well.
            links: whether to write ``first_child`` and ``next_sibling`` as well.

        Raises:
            InvalidArgumentError: bad input, or a buffer that was given is too short. The block has no rows then.
            InvalidTokenError: a root is not an integer in 0..2^31.
        """
    @property
    def ids(self) -> NDArray[np.int64]:
        """Tokens, int64 [B, T] or [N]."""
    @property
    def positions(self) -> NDArray[np.int64]:
        """Position ids: the root's plus the depth; int64 [B, T] or [N]."""
    @property
    def depths(self) -> NDArray[np.int64]:
        """Distance from the root, int64 [B, T] or [N]."""
    @property
    def parents(self) -> NDArray[np.int64]:
        """The parent's entry within the row, int64 [B, T] or [N]; -1 for roots and fillers."""
    @property
    def first_child(self) -> NDArray[np.int64]:
        """The entry of the first child within the row, int64 [B, T] or [N]; -1 for none. Children and siblings come in
        the order of entries, which is that of probability.

        Raises:
            InvalidArgumentError: ``fill`` was not asked for links.
        """
    @property
    def next_sibling(self) -> NDArray[np.int64]:
        """The entry of the next child of the same parent within the row, int64 [B, T] or [N]; -1 for none.

        Raises:
            InvalidArgumentError: ``fill`` was not asked for links.
        """
    @property
    def rows(self) -> NDArray[np.int64]:
        """The row of each entry, int64 [B, T] or [N]."""
    @property
    def offsets(self) -> NDArray[np.int32]:
        """Where each row starts among all entries, int32 [B+1]."""
    @property
    def ancestors(self) -> NDArray[np.uint64]:
        """What each entry attends to within its row, uint64 [B, T, W] or [N, W]: bit ``j % 64`` of word ``j // 64`` is set
        where entry ``j`` is its ancestor or itself. W is 1 for rows of up to 64 entries.
        """
    @property
    def mask(self) -> NDArray[np.bool_]:
        """The attention mask, bool [B, T, T] or [N, N]; True where the entry may attend to the other.

        Raises:
            InvalidArgumentError: ``fill`` was not asked for the mask.
        """
    def accept(self, targets: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
        """Walks every row from its root along the target's own tokens.

        Args:
            targets: the target's token after each entry, integers [B, T] or [N]; at fillers they are not looked at.

        Returns:
            kept int64 [M], the entries of each row to keep in the cache: the root and the accepted nodes; tokens int64
            [M], the target's token after each of them: the accepted tokens and one that was not drafted; offsets int32
            [B+1], where each row starts in both. ``tokens`` and ``offsets`` are what ``Drafter.step`` takes next.

        Raises:
            InvalidArgumentError: ``targets`` are not integers of that shape.
        """
    def __len__(self) -> int: ...

@final
class PassCosts:
    """Seconds of a verify pass by its size, for one batch size and context length; sizes draft trees by them.

    Args:
        sizes: numbers of nodes that the verifier has ready, rising from 0 (a pass without drafts): nodes of each
            row, to which all rows are padded, or of the whole pass where it is packed.
        seconds: time of a pass of each size, not falling.
        packed: whether rows lie end to end, so that sizes count the nodes of all rows together.

    Raises:
        InvalidArgumentError: the numbers are no such sizes or times.
    """
    def __new__(cls, sizes: ArrayLike, seconds: SequenceABC[float], *, packed: bool = False) -> Self: ...
    @property
    def sizes(self) -> NDArray[np.int64]:
        """The sizes, int64 [n]."""
    @property
    def seconds(self) -> NDArray[np.float64]:
        """Seconds of a pass of each size, float64 [n]."""
    def allocate(self, trees: SequenceABC[DraftTree | None], rate: float) -> list[int]:
        """The number of nodes to verify of each tree; its first nodes are the ones to take.

        Maximises the expected number of accepted tokens minus ``rate`` times the seconds that the pass takes beyond
        one without drafts: nodes of all trees compete, the most probable first, and where none pays for itself the
        answer is 0 for all.

        Args:
            trees: the draft of each row, None for none.
            rate: what a second is worth, in tokens; see ``SizingRule``.

        Raises:
            InvalidArgumentError: ``rate`` is negative or not finite.
        """

_Floats = SequenceABC[float] | NDArray[np.float64]

@final
class CostGrid:
    """The numbers of a ``CostCurve``: T(batch, width, context) on a grid, linear in between. Beyond it the last slope goes
    on; before it the first value stands.

    Args:
        batches: float64 [B], rising from at least 1.
        tokens: float64 [W], rising from 1.
        contexts: float64 [C], rising from at least 0.
        seconds: float64 [B * W * C] in this order, rising along each axis.
        packed: whether ``tokens`` are those of the whole pass.
        ready: widths to choose from, rising from 1; all if empty.
        draft: seconds of drafting per step, per request and per node, and the threads that draft.

    Raises:
        CostCurveError: the numbers are no such curve.
    """
    def __new__(
        cls,
        batches: _Floats,
        tokens: _Floats,
        contexts: _Floats,
        seconds: _Floats,
        *,
        packed: bool,
        ready: SequenceABC[int],
        draft: tuple[float, float, float, int],
    ) -> Self: ...
    def time(self, batch: float, width: float, context: float) -> float:
        """Seconds of a pass over ``width`` tokens of each of ``batch`` requests, ``context`` tokens long on average."""
    def times(self, batch: int, sizes: _Floats, context: float) -> NDArray[np.float64]:
        """Seconds of passes of these sizes, float64 [n]."""
    def widths(self, max_width: int) -> list[int]:
        """The widths to choose from, up to ``max_width``."""
    def sizes(self, batch: int, max_width: int) -> list[int]:
        """Numbers of nodes to choose from: of each row, or of the whole pass where it is packed."""
    def costs(self, batch: int, context: float, max_width: int) -> PassCosts:
        """The part of the curve that one step chooses from, kept for contexts within a few percent.

        Raises:
            InvalidArgumentError: ``batch`` or ``max_width`` is less than 1, or ``context`` is no number of tokens.
        """

@final
class Pace:
    """What a ``SizingRule`` remembers of one request whose trees are drafted elsewhere. Made by ``SizingRule.pace``."""

@final
class SizingRule:
    """Sizes the drafts of batches by a cost curve, and corrects the curve by the times of steps.

    At each step::

        batch = drafter.step(sequences, token_ids, offsets, rule=rule)
        ...                  # verify the trees
        rule.observe(batch=len(batch), size=..., context=batch.context, seconds=..., tokens=...)

    Nodes of all trees compete, the most probable first. What maximises tokens per second over many steps is to maximise,
    in each, *expected tokens - rate * seconds*, with the rate at which tokens come at large. The rate is learned, and
    at least that of decoding without drafts. When times show that the whole machine has become slower or faster, those
    before are forgotten and some steps without drafts are asked for.

    Three things keep speculation from costing more than it brings: the rate never falls below plain decoding's;
    measured times count only relative to one another and within bounds, kept monotone in the width; and when tokens
    that drafts brought, minus those that plain decoding would have made in the extra time, sink below a bound,
    drafting pauses, longer every time.

    One rule serves any number of requests, batches and threads.

    Args:
        curve: T(batch, width, context), a ``CostCurve``.
        max_nodes: most nodes to verify of one request, 0 to 1023; by default 256, or what the widest pass that is ready
            has room for.
        options: constants to change, by name, to measure what they are worth; see ``options``.

    Raises:
        InvalidArgumentError: ``curve`` is none, ``max_nodes`` is out of range, or an option is unknown or out of range.
    """
    def __new__(
        cls, curve: CostCurve, *, max_nodes: int | None = None, options: dict[str, float] | None = None
    ) -> Self: ...
    @staticmethod
    def options() -> dict[str, tuple[float, str]]:
        """The constants by name: ``(default, unit and effect)``. What each is worth is in
        ``benches/results/rule-constants.md``.
        """
    @property
    def curve(self) -> CostCurve:
        """The curve that it was made with."""
    @property
    def max_nodes(self) -> int:
        """Most nodes to verify of one request."""
    @property
    def speedup(self) -> float:
        """Tokens per second at large, over those of plain decoding."""
    @property
    def min_prob(self) -> float:
        """Least probability of a node worth drafting: somewhat below the least that was verified lately."""
    def pace(self) -> Pace:
        """The state of a new request whose trees are drafted elsewhere; sequences of a drafter carry their own."""
    def limits(self, paces: SequenceABC[Pace]) -> list[int]:
        """Begins a step for trees that are drafted elsewhere: the number of nodes to draft for each request, down to
        ``min_prob``; 0 where drafting would not pay. ``Drafter.step`` does it by itself.

        Args:
            paces: the state of each request.
        """
    def allocate(
        self,
        trees: SequenceABC[DraftTree | None],
        context: float,
        paces: SequenceABC[Pace] | None = None,
    ) -> list[int]:
        """The number of nodes to verify of each of the trees drafted elsewhere: its first ones, which are its best.

        Args:
            trees: draft of each request of the step, None for none.
            context: mean length of the requests, tokens.
            paces: their states, which learn from it.

        Raises:
            InvalidArgumentError: ``context`` is no number of tokens, or there is not one state for each tree.
        """
    def costs(self, batch: int, context: float) -> tuple[PassCosts, float]:
        """What the next pass may cost and what a second is worth: ``cost=`` and ``rate=`` of drafting calls.

        Args:
            batch: requests of the step, at least 1.
            context: their mean length, tokens.

        Raises:
            InvalidArgumentError: ``batch`` is less than 1, or ``context`` is no number of tokens.
        """
    def observe(
        self,
        *,
        batch: int,
        size: int,
        context: float,
        seconds: float | None,
        tokens: float,
        draft_seconds: float = 0.0,
        prefill_tokens: int = 0,
    ) -> None:
        """Learns from a step.

        Args:
            batch: requests of the step.
            size: nodes that the pass had room for: of each row, or of all where rows are packed.
            context: mean length of the requests, tokens.
            seconds: time of the verify pass, or None where it is not known: the step's tokens count then, its time does
                not. Values that are no time are ignored.
            tokens: tokens that the step produced, at least one per request.
            draft_seconds: time of drafting.
            prefill_tokens: prompt tokens that the same pass has read, for requests that are not among the ``batch``: its
                time then tells nothing of drafts, and is not looked at. Where every step reads prompts, the curve is
                gone by as it is.

        Raises:
            InvalidArgumentError: ``batch`` is less than 1, ``size`` or ``prefill_tokens`` negative, or ``context`` no number
                of tokens.
        """

_StrPath = str | PathLike[str]

@final
class Datastore:
    """A corpus of token documents on disk, opened for look-up. Made by ``Datastore.open``; a context manager that
    closes itself. Immutable, so that any number of threads, drafters and (mapped) processes can share it. A copy, also
    one that was pickled, opens the same files again; it raises ``DatastoreError`` if they have been replaced.

    A mapped file that is shortened or overwritten in place (by ``cp``, say) is noticed before it is read: calls raise
    ``DatastoreChangedError`` from then on, and drafters go on without the store.
    """
    @staticmethod
    def open(
        paths: _StrPath | SequenceABC[_StrPath],
        *,
        load: Literal["mmap", "mmap-wait", "ram"] = "mmap",
        vocab_size: int | None = None,
        fingerprint: bytes | None = None,
        tombstones: SequenceABC[_StrPath | None] | None = None,
        domains: SequenceABC[SequenceABC[tuple[int, int, int]]] | None = None,
    ) -> Datastore:
        """Opens one file, or several as one store, or the corpus in a folder (``sssd.corpus``) as it is now.

        Args:
            paths: a path or a sequence of paths.
            tombstones: for each file the path of what ``write_tombstones`` has written for it, or None: its dead documents
                are passed over. A corpus has its own.
            domains: for each file its documents by domain (source, say), in their order: (documents, tokens, domain) of those
                that follow one another, domains from 0 to 15. By default each file is a domain, and a corpus tells its own.
                Drafts sample small domains (an eighth of all tokens or less, at most 2^21) by themselves, and a request learns
                which ones its text is like.
            load: ``"mmap"`` maps the files, whose memory is shared with other processes; they must not be changed in
                place meanwhile (replacing them is safe). Drafts never wait for a disk: they leave out what is not in
                memory, have it read in the background, and look up for 200 us at most (``docs/large-stores.md``).
                With ``"mmap-wait"`` they wait, so that drafts depend on the files alone. ``"ram"`` reads
                everything now.
            vocab_size: the model's number of token ids, refused if the store's differs.
            fingerprint: the model's ``tokenizer_fingerprint`` (32 bytes), refused if the store's differs.

        Raises:
            OSError: a file cannot be read.
            CorruptDatastoreError: a file is no datastore, truncated, damaged where opening looks, or has more than 64
                segments with tokens; or tombstones are damaged.
            DatastoreVersionError: a file has a format version that this release cannot read.
            VocabularyMismatchError: vocabularies or tokenizers differ.
            InvalidArgumentError: no path, an empty corpus, tombstones of another file, domains that are not those of the
                files' documents, or an argument out of range.
            MemoryError: there is no memory for it.
        """
    @property
    def info(self) -> DatastoreInfo:
        """What the headers say."""
    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
    def verify(self) -> None:
        """Compares every byte with the checksums.

        Raises:
            CorruptDatastoreError: bytes have changed since the file was written; the message says which.
            DatastoreChangedError: the file has been changed in place since it was opened.
            OSError: the file cannot be read.
            ClosedError: the datastore is closed.
        """
    def count(self, ids: ArrayLike) -> int:
        """Occurrences of ``ids`` within documents; without ids, the number of tokens in the store.

        Raises:
            InvalidTokenError: an id is not an integer or outside the vocabulary.
            DatastoreChangedError: a file has been changed in place since it was opened.
            ClosedError: the datastore is closed.
        """
    def continuations(
        self, ids: ArrayLike, *, limit: int = 64, max_tokens: int = 16
    ) -> list[NDArray[np.int32]]:
        """What follows occurrences of ``ids``, evenly spread over all of them, in the order of the tokens.

        Args:
            ids: at least one token id.
            limit: at most this many occurrences.
            max_tokens: at most this many tokens of each; fewer at the end of a document.

        Returns:
            A list of int32 arrays, possibly empty ones.

        Raises:
            InvalidTokenError: an id is not an integer or outside the vocabulary.
            InvalidArgumentError: no ids.
            DatastoreChangedError: a file has been changed in place since it was opened.
            MemoryError: there is no memory for the result.
            ClosedError: the datastore is closed.
        """
    def successors(self, token_id: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The most frequent successors of a token, at most 32, most frequent first.

        Returns:
            Their ids, int32 [n], and their shares of the token's occurrences, float32 [n], to within 3 %.

        Raises:
            InvalidTokenError: the id is outside the vocabulary.
            DatastoreChangedError: a file has been changed in place since it was opened.
            ClosedError: the datastore is closed.
        """
    def documents(self, start: int = 0, stop: int | None = None) -> Documents:
        """The documents in their order, those of the first file first, as they were added (one longer than a segment in
        several). They are read in pieces, through the file and not the map.

        Args:
            start: the first that is wanted, counted from 0 over all files; ``info.documents`` says how many there are.
            stop: the one to stop before; by default all are read.

        Returns:
            An iterator of int32 arrays, with None in the place of a document that tombstones name.

        Raises:
            InvalidArgumentError: ``start`` or ``stop`` is negative.
            CorruptDatastoreError, DatastoreChangedError, OSError: when a file turns out to be damaged, changed or
                unreadable. The documents are not compared with their checksums; ``verify`` is for that.
            MemoryError: there is no memory for a document.
            ClosedError: the datastore is closed.
        """
    def close(self) -> None:
        """Gives the files back. Drafters that use the store keep it until they are gone. Closing twice is fine."""
    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

@final
class Documents(Iterator[NDArray[np.int32] | None]):
    """The documents of a datastore, in their order: an iterator of int32 arrays, None for dead ones. Made by
    ``Datastore.documents``. It keeps the files until it is gone, also if the datastore is closed.
    """
    def __iter__(self) -> Self: ...
    def __next__(self) -> NDArray[np.int32] | None:
        """Implement next(self)."""

_Store = Datastore | _StrPath | SequenceABC[_StrPath]

@final
class DatastoreInfo:
    """Totals over the files of a store."""
    def __new__(
        cls,
        vocab_size: int,
        tokens: int,
        documents: int,
        segments: int,
        file_bytes: int,
        files: SequenceABC[FileInfo],
    ) -> Self: ...
    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
    @property
    def documents(self) -> int:
        """Documents, the empty ones included."""
    @property
    def segments(self) -> int:
        """Independently sorted parts."""
    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
    @property
    def files(self) -> list[FileInfo]:
        """One entry per file."""

@final
class FileInfo:
    """What a file's header says."""
    def __new__(
        cls,
        path: _StrPath,
        version: int,
        uuid: str,
        vocab_size: int,
        fingerprint: bytes | None,
        tokens: int,
        documents: int,
        segments: int,
        segment_symbols: int,
        deduplicated: bool,
        file_bytes: int,
        ranking_tokens: int | None,
    ) -> Self: ...
    @property
    def path(self) -> Path:
        """The file."""
    @property
    def version(self) -> int:
        """Format version."""
    @property
    def uuid(self) -> str:
        """Identifier derived from the contents: equal for equal files."""
    @property
    def fingerprint(self) -> bytes | None:
        """Fingerprint of the tokenizer, 32 bytes, or None if unknown."""
    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
    @property
    def documents(self) -> int:
        """Documents, the empty ones included."""
    @property
    def segments(self) -> int:
        """Independently sorted parts."""
    @property
    def deduplicated(self) -> bool:
        """Whether repeated documents were left out."""
    @property
    def ranking_tokens(self) -> int | None:
        """Tokens that the tables for ranking were learned from, or None without tables."""
    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""

@final
class DatastoreBuilder:
    """Writes a datastore file. The target appears, or is replaced, only when ``finish`` returns; until then
    everything goes into a temporary file beside it. As a context manager it finishes at the end of the block, and
    removes the temporary file after an exception.

    Args:
        path: the file to write or replace.
        vocab_size: number of token ids, 1 to 2^24.
        fingerprint: ``tokenizer_fingerprint`` of the tokenizer (32 bytes).
        deduplicate: leave out documents that were added before.
        max_memory: bytes that the builder may allocate (16 per document of ``deduplicate`` come on top). A limit
            too small for one segment gives several, which makes look-ups slower, and of which a file has at most 64.
            Without one, segments have 2^28 tokens, and each thread takes 2.3 GB where a text has so many.
        ranking: learn tables by which drafts rank candidates, from at most 2^25 tokens: some 4 us a token of one core,
            and 404 bytes of the file for each token id. By default where the text has 2^23 tokens or more and
            ``max_memory`` has room for it (about 2.6 kB for each token id). A datastore that is added whole hands its
            tables on, if they were learned from three quarters of what there is in the end.
        threads: threads that sort segments, as far as ``max_memory`` allows, 1 to 64; by default the number of cores, at
            most 8. The file is the same whatever their number.

    Raises:
        InvalidArgumentError: an argument is out of range.
        OSError: the folder cannot be written, or ``path`` is a folder, a pipe or a device.
        MemoryError: there is no memory for it.
    """
    def __new__(
        cls,
        path: _StrPath,
        *,
        vocab_size: int,
        fingerprint: bytes | None = None,
        deduplicate: bool = False,
        max_memory: int | None = None,
        ranking: bool | None = None,
        threads: int | None = None,
    ) -> Self: ...
    def add(self, ids: ArrayLike) -> None:
        """Adds one document, which may be empty.

        Args:
            ids: its tokens, any one-dimensional sequence or array of integers.

        Raises:
            InvalidTokenError: an id is not an integer or outside the vocabulary; nothing is added.
            OSError: the temporary file cannot be written.
            InvalidArgumentError: ``max_memory`` would give more than 64 segments.
            MemoryError: there is no memory for it.
            ClosedError: the builder is finished or closed.

        A builder whose file is torn by an error in the middle of a document, Ctrl-C included, closes itself.
        """
    def add_datastore(
        self,
        store: Datastore,
        keep: ArrayLike | None = None,
        *,
        progress: Callable[[int, int], object] | None = None,
    ) -> NDArray[np.bool]:
        """Adds the documents of an open datastore, those of its first file first, without tokenizing again and in little
        memory. Their bytes are compared with the checksums first.

        Args:
            store: the datastore.
            keep: bool [documents], which of its documents (``store.info.documents``) to add; all by default. Documents that
                its tombstones name are never added.
            progress: called about twenty times a second with the tokens and document ends done with and their total.

        Returns:
            bool [documents]: which were added; with ``deduplicate`` those that were added before are not.

        Raises:
            VocabularyMismatchError: the store has another vocabulary or tokenizer.
            InvalidArgumentError: ``keep`` is not one bool per document, or ``max_memory`` would give more than 64 segments.
            CorruptDatastoreError: the store is damaged; nothing of the damaged file is added.
            DatastoreChangedError: a file of the store has been changed in place since it was opened.
            OSError: the temporary file cannot be written, or the store's cannot be read.
            MemoryError: there is no memory for it.
            ClosedError: the builder is finished or closed, or the store is closed.

        Ctrl-C, and what ``progress`` raises, ends it after some documents; the builder goes on unless it was in the middle
        of one, after which it closes itself.
        """
    def add_stream(self, ids: ArrayLike, end_token_id: int) -> None:
        """Adds a stretch of a token stream in which ``end_token_id`` is the last token of each document. The last
        document goes on with the next call, until ``end_stream`` or ``finish``.

        Raises:
            As ``add``.
        """
    def end_stream(self) -> None:
        """Ends the document that ``add_stream`` has left open, if any.

        Raises:
            As ``add``.
        """
    @property
    def symbols(self) -> int:
        """Tokens and document ends added so far."""
    def finish(self, progress: Callable[[int, int], object] | None = None) -> BuildSummary:
        """Sorts, writes the rest, makes the file durable and puts it in the target's place. Ctrl-C leaves the
        target as it was.

        Args:
            progress: called about twenty times a second with the symbols indexed, and learned from, so far and their
                total.

        Raises:
            OSError: the file cannot be written; the target is as it was.
            MemoryError: there is no memory to sort it; the target is as it was. ``max_memory`` takes less.
            ClosedError: the builder is finished or closed.
        """
    def close(self) -> None:
        """Gives up and removes the temporary file. Does nothing after ``finish``."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

@final
class BuildSummary:
    """What a build wrote."""
    def __new__(
        cls, tokens: int, documents: int, duplicates: int, segments: int, file_bytes: int
    ) -> Self: ...
    @property
    def tokens(self) -> int:
        """Tokens in the file."""
    @property
    def documents(self) -> int:
        """Documents in the file."""
    @property
    def duplicates(self) -> int:
        """Documents left out because they had been added before."""
    @property
    def segments(self) -> int:
        """Independently sorted parts of the file."""
    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
