"""Continuous batching: one thread that decodes whatever requests there are, all in one pass per step.

Between passes requests join (their prompt read, piece by piece) and leave. Each gets what ``model.generate``
would give it alone; ``docs/server.md`` says what that rests on.
"""

import copy
import logging
from collections import Counter, deque
from collections.abc import Iterator
from threading import Condition, Thread
from time import monotonic, perf_counter
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sssd._core import MAX_NODES, Datastore, DraftBatch, Drafter
from sssd.errors import BatchError, InternalError, InvalidArgumentError, MemoryLimitError
from sssd.hf.choices import choices, most_probable
from sssd.hf.contract import Call, cache_argument, check_model, frequency_limit, position_limit
from sssd.hf.passes import Passes
from sssd.hf.profile import rule_of
from sssd.hf.verify import TreeCache
from sssd.mini import MINI, attach, is_installed
from sssd.server.cache import RunningCache
from sssd.server.errors import ApiError, closing
from sssd.server.request import Request, Running, Update, Usage, prepare

_logger = logging.getLogger(__name__)


class Engine:
    """Decodes requests in a running batch.

    Args:
        model: A model that ``sssd.hf.generate`` can verify.
        tokenizer: Its tokenizer; a copy of it is used.
        datastore: A corpus to match as well; by default the mini store (``docs/mini.md``) of the tokenizer,
            from when it is ready; None for none.
        max_running: Most requests in a pass.
        max_length: Most tokens of a request, prompt and output; by default what the model has positions for.
        max_nodes: Nodes of each draft tree; by default as many as pay.
        prefill_tokens: Tokens of prompts that are read between two passes.
        drafter_bytes: Most memory that drafting may take; a request that finds none left is decoded without.
        namespace_ttl: Seconds after which what an idle namespace has learned is forgotten.
        fast_path: As in ``sssd.hf.generate``.

    Attributes:
        counts: What became of requests, and the tokens and passes of all, by name.

    Raises:
        UnsupportedModelError: The model cannot verify draft trees.
        InvalidArgumentError: A number is out of range.
        VocabularyMismatchError: The datastore has more token ids than the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        datastore: Datastore | Literal["mini"] | None = MINI,
        max_running: int = 8,
        max_length: int | None = None,
        max_nodes: int | None = None,
        prefill_tokens: int = 512,
        drafter_bytes: int | str = "1G",
        namespace_ttl: float = 3600.0,
        fast_path: bool = True,
    ) -> None:
        check_model(model)
        if max_running < 1 or prefill_tokens < 1 or not 0 <= (max_nodes or 0) <= MAX_NODES:
            raise InvalidArgumentError(
                f"max_running and prefill_tokens must be at least 1 and max_nodes at most {MAX_NODES}, "
                f"got {max_running}, {prefill_tokens} and {max_nodes}"
            )
        self.model, self.tokenizer = model, copy.deepcopy(tokenizer)
        self.max_running, self.prefill_tokens = max_running, prefill_tokens
        self.max_length = min(_longest(model), max_length or 1 << 30)
        self.vocab_size = model.config.get_text_config(decoder=True).vocab_size
        ends = model.generation_config.eos_token_id
        self.drafter = Drafter(
            vocab_size=self.vocab_size,
            end_token_ids=[] if ends is None else np.unique(ends),
            datastore=None if datastore == MINI else datastore,
            max_bytes=drafter_bytes,
            namespace_ttl=namespace_ttl,
        )
        if datastore == MINI and is_installed():
            copied = copy.deepcopy(tokenizer)
            attach(self.drafter, lambda: copied)
        self.cache = RunningCache(max_running)
        with torch.inference_mode():
            self.passes = Passes(model, 0, fast_path=fast_path, cache=self.cache)
            self.rule = rule_of(model, self.passes) if max_nodes is None else None
        self.max_nodes: int = max_nodes if self.rule is None else self.rule.max_nodes  # type: ignore[assignment]
        self.drafts = DraftBatch(max_running, max_running * self.max_nodes)
        self.counts: Counter[str] = Counter()
        self.rows: list[Running] = []
        self._reading: Running | None = None
        self._waiting: deque[Request] = deque()
        self._changed = Condition()
        self._ends_at = float("inf")
        self._closed = False
        self._thread = Thread(target=self._run, name="sssd-decoding", daemon=True)
        self._thread.start()

    # --- from any thread

    def prepare(self, prompt: list[int], options: dict[str, Any]) -> Call:
        """As :func:`sssd.server.request.prepare`, for this model."""
        return prepare(self.model, prompt, options)

    def submit(self, request: Request) -> None:
        """Puts a request into the queue; its updates come from the decoding thread.

        Raises:
            ApiError: The engine is about to end.
        """
        with self._changed:
            if self._ends_at < float("inf") or not self.alive:
                raise closing()
            self._waiting.append(request)
            self._changed.notify()

    def drain(self, seconds: float) -> None:
        """Takes no more requests, and gives those that are there so long to finish."""
        with self._changed:
            self._ends_at = min(self._ends_at, monotonic() + seconds)
            self._changed.notify()

    def close(self) -> None:
        """Ends all requests, and the thread."""
        with self._changed:
            self._closed, self._ends_at = True, 0.0
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and self._ends_at == float("inf")

    @property
    def running(self) -> int:
        """Requests in the batch, with the one whose prompt is being read."""
        return len(self.rows) + (self._reading is not None)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    # --- the decoding thread

    def _run(self) -> None:
        with torch.inference_mode():
            while self._await_work():
                try:
                    self._drop()
                    self._prefill()
                    if self.rows:
                        self._step()
                except Exception as error:
                    _logger.exception("a pass failed")
                    self._fail_all(error)

    def _await_work(self) -> bool:
        """Waits for something to do; False when the engine is closed and everything has ended."""
        with self._changed:
            while not (self.rows or self._reading or self._waiting):
                if self._closed:
                    return False
                self._changed.wait()
        return True

    def _drop(self) -> None:
        """Ends requests that were cancelled or whose time is up."""
        now = monotonic()
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
            for request in waiting:
                reason = self._why_end(request, now)
                if reason is None:
                    self._waiting.append(request)
                else:
                    self.counts[str(reason.code)] += 1
                    self._deliver(request, Update([], Usage(len(request.prompt)), error=reason))
        for row in [*self.rows, *([self._reading] if self._reading else [])]:
            reason = self._why_end(row.request, now)
            if reason is not None:
                self._fail(row, reason)

    def _why_end(self, request: Request, now: float) -> ApiError | None:
        if request.cancelled:
            return ApiError(499, "the client has gone", code="cancelled")
        if now >= self._ends_at:
            return closing()
        if now >= request.deadline:
            return ApiError(504, "the request took longer than the server allows", code="timeout")
        return None

    def _prefill(self) -> None:
        """Reads prompts, no more than ``prefill_tokens`` at a time lest running requests wait."""
        budget = self.prefill_tokens
        while budget > 0:
            if self._reading is None and len(self.rows) < self.max_running and self._waiting:
                self._reading = Running(self._waiting.popleft(), self.tokenizer)
            row = self._reading
            if row is None:
                return
            try:
                budget -= self._read(row, budget)
            except Exception as error:
                _logger.exception("a prompt could not be read")
                self._fail(row, error)

    def _read(self, row: Running, most: int) -> int:
        """Reads the next tokens of a prompt, with the last of them chooses the first token of the output."""
        if row.prefilled is None:
            row.prefilled = TreeCache(1, None, len(row.prompt), self.cache.alike)
            self._begin(row)
        cache = row.prefilled
        start: int = cache.lengths[0]
        end = min(start + most, len(row.prompt))
        device = self.model.device
        # as far as the model knows that
        keep = {} if row.call.inputs.get("logits_to_keep") is None else {"logits_to_keep": 1}
        logits = self.model(
            input_ids=torch.tensor([row.prompt[start:end]], device=device),
            position_ids=torch.arange(start, end, device=device)[None],
            use_cache=True,
            return_dict=True,
            **{cache_argument(self.model): cache},
            **keep,
        ).logits[:, -1:]
        cache.lengths = [end]
        if end < len(row.prompt):
            return end - start
        targets, ids, probs = self._looked_at(logits)
        row.feedback = None if ids is None else (ids[0], probs[0])
        _, pieces = row.walk(logits[0], targets[0].tolist(), [row.prompt[-1]], [-1], [-1])
        self._reading = row.prefilled = None
        if row.finish is None:
            self.cache.join(cache)
            self.rows.append(row)
        self._tell(row, pieces)
        return end - start

    def _begin(self, row: Running) -> None:
        """Starts drafting for a request; one that finds no memory is decoded without."""
        if not row.request.speculate or self.max_nodes == 0:
            return
        try:
            row.sequence = self.drafter.begin(
                row.prompt,
                row.request.prediction,
                namespace=row.request.namespace,
                max_length=row.max_length,
                background=True,
            )
        except (MemoryLimitError, InternalError) as error:
            self.counts["undrafted"] += 1
            _logger.warning("a request is decoded without drafts: %s", error)

    def _step(self) -> None:
        """Drafts for all, verifies all in one pass, and hands out what was accepted."""
        rows, cache = list(self.rows), self.cache
        context = sum(cache.lengths) / len(rows)
        started = perf_counter()
        trees = self._draft(rows)
        drafted = perf_counter()
        block = self.passes.fill(trees, [row.tokens[-1] for row in rows], cache.lengths)
        width = block.ids.shape[1]
        cache.make_room(width)
        logits, _ = self.passes.launch()()
        targets, ids, probs = self._looked_at(logits)
        entries: list[int] = []
        offsets, outcomes = [0], []
        for i, row in enumerate(rows):
            row.usage.passes += 1
            row.usage.drafted += 0 if trees is None else int(trees.offsets[i + 1] - trees.offsets[i])
            links = (part[i].tolist() for part in (targets, block.ids, block.first_child, block.next_sibling))
            outcome: list[Any] | Exception
            try:
                kept, outcome = row.walk(logits[i], *links)
            except Exception as error:  # of its own processors, say
                kept, outcome = [0], error
            outcomes.append(outcome)
            entries += kept
            offsets.append(len(entries))
            row.feedback = None if ids is None else (ids[i], probs[i])
        cache.commit(np.array(entries), np.array(offsets))
        seconds = perf_counter() - drafted
        self.counts["passes"] += 1
        if self.rule is not None:
            self.rule.observe(
                batch=len(rows),
                size=width - 1,
                context=context,
                seconds=seconds,
                tokens=len(entries),
                draft_seconds=drafted - started if trees is not None else 0.0,
            )
        for row, outcome in zip(rows, outcomes, strict=True):
            if isinstance(outcome, Exception):
                _logger.error("a request failed", exc_info=outcome)
                self._fail(row, outcome)
            else:
                self._tell(row, outcome)

    def _looked_at(self, logits: Any) -> tuple[NDArray[np.int64], Any, Any]:
        """The most probable token at each entry, and what teaches the drafter, if anything is drafted."""
        if self.max_nodes == 0:
            return choices(logits), None, None
        return most_probable(logits, self.vocab_size)

    def _draft(self, rows: list[Running]) -> DraftBatch | None:
        """Hands the last step to the drafter and drafts for the next one; None where nothing is drafted."""
        drafting = [row for row in rows if row.sequence is not None]
        if not drafting:
            return None
        try:
            trees = self.drafter.step(
                [row.sequence for row in drafting],
                [token for row in drafting for token in row.news],
                np.cumsum([0, *(len(row.news) for row in drafting)]),
                self.max_nodes,
                rule=self.rule,
                out=self.drafts,
                **_stacked([row.feedback for row in drafting]),
            )
        except BatchError as error:
            if error.batch is None:
                raise
            trees = error.batch
            for place, failure in error.failures.items():
                _logger.warning("a request goes on without drafts: %s", failure)
                self.counts["undrafted"] += 1
                self._forget(drafting[place])
        for row in rows:
            row.news = []
        if len(drafting) == len(rows):
            return trees
        found: Iterator[Any] = iter([trees[i] for i in range(len(drafting))])
        drafts = {id(row) for row in drafting}
        return DraftBatch.from_trees([next(found) if id(row) in drafts else None for row in rows])

    def _tell(self, row: Running, pieces: list[Any]) -> None:
        """Hands text to the client; ends the request if it is complete, and lets others learn from it."""
        usage = copy.copy(row.usage)
        if pieces or row.finish is not None:
            delivered = self._deliver(row.request, Update(pieces, usage, row.finish))
            row.request.cancelled |= not delivered
        if row.finish is None:
            return
        self.counts[row.finish] += 1
        self._count(row)
        if row.sequence is not None:
            try:
                row.sequence.extend(row.news)
                row.sequence.finish()
            except (MemoryLimitError, InternalError) as error:
                _logger.warning("nothing was learned from a request: %s", error)
        self._remove(row)

    def _fail(self, row: Running, error: Exception) -> None:
        """Ends a request with an error."""
        if not isinstance(error, ApiError):
            error = ApiError(500, "the request failed inside the server; its log says why", code="failed")
        self.counts[str(error.code)] += 1
        self._count(row)
        self._remove(row)
        self._deliver(row.request, Update([], copy.copy(row.usage), error=error))

    def _fail_all(self, error: Exception) -> None:
        rows, self.rows = self.rows, []
        self.cache.clear()
        for row in [*rows, *([self._reading] if self._reading else [])]:
            self._fail(row, error)

    def _count(self, row: Running) -> None:
        self.counts["prompt_tokens"] += row.usage.prompt
        self.counts["output_tokens"] += row.usage.output

    def _remove(self, row: Running) -> None:
        """Takes a request out of the batch."""
        self._forget(row)
        row.prefilled = None
        if row is self._reading:
            self._reading = None
        place = next((i for i, one in enumerate(self.rows) if one is row), None)
        if place is None:
            return
        last = self.rows.pop()
        if last is not row:
            self.rows[place] = last
        self.cache.leave(place)

    def _forget(self, row: Running) -> None:
        if row.sequence is not None:
            row.sequence.close()
            row.sequence = None

    def _deliver(self, request: Request, update: Update) -> bool:
        try:
            request.deliver(update)
        except Exception:  # whoever asked is gone
            return False
        return True


def _longest(model: Any) -> int:
    """Tokens that a text may have."""
    config = model.config.get_text_config(decoder=True)
    known = [position_limit(model), getattr(config, "max_position_embeddings", None)]
    limits = [limit for limit in known if isinstance(limit, int) and limit > 0]
    if (limit := frequency_limit(model)) is not None:
        limits.append(limit - 1)
    return min(limits, default=1 << 30)


def _stacked(feedback: list[Any]) -> dict[str, Any]:
    """What the target held most probable, of passes of different widths, as ``Drafter.step`` takes it."""
    if any(one is None for one in feedback):
        return {}
    width, k = max(len(ids) for ids, _ in feedback), feedback[0][0].shape[1]
    all_ids = np.zeros((len(feedback), width, k), np.int64)
    all_probs = np.zeros((len(feedback), width, k), np.float32)
    for i, (ids, probs) in enumerate(feedback):
        all_ids[i, : len(ids)], all_probs[i, : len(probs)] = ids, probs
    return {"feedback_ids": all_ids, "feedback_probs": all_probs}
