"""sssd in SGLang, in place of the corpus of its NGRAM worker; ``docs/sglang.md``.

    SSSD_SGLANG=1 python -m sglang.launch_server --speculative-algorithm NGRAM ...

The name NGRAM is kept on purpose: SGLang compares names literally where it decides about LoRA adapters,
corpora and caches. Nothing here imports SGLang but :func:`plugin`, which it calls itself.
"""

import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd._core import DatastoreBuilder, DraftBatch
from sssd.errors import BatchError, InvalidArgumentError, MemoryLimitError
from sssd.mini import MINI, attach
from sssd.options import Options, request_options
from sssd.requests import Requests

logger = logging.getLogger("sglang.sssd")

VARIABLE = "SSSD_SGLANG"
"""Switches it on: 1, options as JSON, or a file of them."""

_VOCAB_SIZE = 1 << 20
"""Token ids of external corpora, whose vocabulary SGLang does not tell."""


class NgramCorpus:
    """Has the interface of SGLang's class of that name; its trees have exactly ``draft_token_num`` nodes.

    What goes wrong while drafting is logged once and costs drafts: trees are then a root with padding.
    Per request, in ``custom_params`` of its sampling parameters: ``sssd_prediction``, token ids that the
    output is expected to resemble, and ``sssd_namespace``, by default the id of its LoRA adapter.

    Args:
        max_trie_depth: tokens of each request that :meth:`batch_get` is handed.
        draft_token_num: nodes of each tree, the root included.
        external_corpus_max_tokens: of all external corpora.
        others: what SGLang sets for its own tries; not looked at.

    Attributes:
        drafter: the ``Drafter``.
        requests: its running sequences by SGLang's request ids.
        failed: calls that met an error.
        rebuilt: requests that were not as expected, and were taken over whole.

    Raises:
        SssdError: an option or the datastore cannot be used.
    """

    def __init__(
        self,
        max_trie_depth: int = 18,
        draft_token_num: int = 8,
        external_corpus_max_tokens: int = 10_000_000,
        **others: Any,
    ) -> None:
        del others
        self.options = Options.read(VARIABLE)
        self.draft_token_num, self.tail = draft_token_num, max_trie_depth
        self.external_corpus_max_tokens = external_corpus_max_tokens
        held = self.options.datastore
        self._stores: dict[str, Any] = {} if held is None or held == MINI else {"": held}
        self._wants_mini = held == MINI
        self.drafter = self.options.drafter(self._stores or None)
        self.requests = Requests(self.drafter)
        self.failed = self.rebuilt = 0
        self._seen: dict[str, Any] = {}
        self._out = DraftBatch(64, 64 * draft_token_num)
        self._room = 64
        self._folder: Path | None = None
        self._built = 0
        self._tokens: dict[str, int] = {}

    def see(self, requests: Iterable[Any]) -> None:
        """Tells of the requests of a batch, which :meth:`batch_get` is handed the ends of.

        Args:
            requests: SGLang's, with ``rid``, ``origin_input_ids_unpadded`` and ``output_ids``.
        """
        self._seen = {request.rid: request for request in requests}
        if self._wants_mini:
            self._attach_mini()

    def _attach_mini(self) -> None:
        """Once a request tells the model's tokenizer, a copy of which is loaded anew: this one is in use."""
        found = (getattr(request, "tokenizer", None) for request in self._seen.values())
        name = next((tokenizer.name_or_path for tokenizer in found if tokenizer is not None), None)
        if name is not None:
            self._wants_mini = False
            attach(self.drafter, partial(_load_tokenizer, name))

    def batch_get(
        self, req_ids: Sequence[str], batch_tokens: Sequence[Sequence[int]], total_lens: Sequence[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Drafts for the requests of a batch.

        Args:
            req_ids: n ids.
            batch_tokens: the last tokens of each, at least one.
            total_lens: all tokens of each.

        Returns:
            token ids int64 [n * draft_token_num] and ancestors bool [n * draft_token_num²], node after node:
            the root first, what is missing padded by children of the root with id 0.
        """
        width, count = self.draft_token_num, len(req_ids)
        tokens = np.zeros((count, width), np.int64)
        mask = np.zeros((count, width, width), np.bool_)
        mask[:, :, 0] = True
        mask[:, np.arange(width), np.arange(width)] = True
        tokens[:, 0] = [tail[-1] for tail in batch_tokens]
        try:
            trees = self._draft(req_ids, batch_tokens, total_lens)
            for row in range(count):
                tree = trees[row]
                if len(tree):
                    tokens[row, 1 : 1 + len(tree)] = tree.token_ids
                    mask[row] = tree.attention_mask(width - 1)
        except Exception:
            if self.failed == 0:
                logger.exception("sssd: a step goes without drafts; later failures are counted, not logged")
            self.failed += 1
            self.requests = Requests(self.drafter)
        return tokens.ravel(), mask.ravel()

    def _draft(
        self, req_ids: Sequence[str], tails: Sequence[Sequence[int]], totals: Sequence[int]
    ) -> DraftBatch:
        new: list[int] = []
        offsets, names = [0], []
        for name, tail, total in zip(req_ids, tails, totals, strict=True):
            fresh = self._fresh(name, tail, total)
            names.append(None if fresh is None else name)
            new.extend(fresh or ())
            offsets.append(len(new))
        if len(names) > self._room:
            self._room = 2 * len(names)
            self._out = DraftBatch(self._room, self._room * self.draft_token_num)
        try:
            return self.requests.step(names, new, offsets, self.draft_token_num - 1, out=self._out)
        except BatchError as some:
            logger.debug("sssd: some requests go on without drafts: %s", some)
            for failed in filter(None, (names[place] for place in some.failures)):
                self.requests.abort(failed)
            if some.batch is None:
                raise
            return some.batch

    def _fresh(self, name: str, tail: Sequence[int], total: int) -> Sequence[int] | None:
        """The tokens that a sequence does not have yet; None where there is no memory for one."""
        if name not in self.requests:
            row, prompt = self._row(name, tail, total)
            try:
                self.requests.begin(name, row[:prompt], **self._begin_options(name))
            except MemoryLimitError:
                return None
            return row[prompt:].tolist()  # type: ignore[no-any-return]
        missing = total - len(self.requests[name])
        if 0 <= missing <= len(tail):
            return tail[len(tail) - missing :]
        self.rebuilt += 1
        self.requests[name].follow(self._row(name, tail, total)[0], compare=None)
        return ()

    def _row(self, name: str, tail: Sequence[int], total: int) -> tuple[NDArray[Any], int]:
        """All tokens of a request as far as they are known, and how many of them are its prompt."""
        request = self._seen.get(name)
        if request is None:
            return np.asarray(tail, np.int64), max(0, len(tail) - 1)
        prompt, output = request.origin_input_ids_unpadded, request.output_ids
        late = total - len(prompt) - len(output)  # accepted, and not yet in the output
        parts = [prompt, output, tail[len(tail) - late :] if late > 0 else ()]
        return np.concatenate([np.asarray(part, np.int64) for part in parts]), len(prompt)

    def _begin_options(self, name: str) -> dict[str, Any]:
        request = self._seen.get(name)
        extra = getattr(getattr(request, "sampling_params", None), "custom_params", None)
        return request_options(extra, getattr(request, "lora_id", None) or "")

    def erase_match_state(self, req_ids: Iterable[str]) -> None:
        """Ends requests; later ones learn from them."""
        for name in req_ids:
            if name in self.requests:
                if self.options.learn:
                    self.requests.finish(name)
                else:
                    self.requests.abort(name)

    def batch_put(self, batch_tokens: Any) -> None:
        """Does nothing: sequences know their tokens."""

    def synchronize(self) -> None:
        """Does nothing: nothing is put in the background."""

    def reset(self) -> None:
        """Forgets all requests and all that was learned. External corpora stay."""
        self.requests.clear()
        self.drafter.clear()

    @property
    def remaining_token_budget(self) -> int:
        """Tokens that external corpora may still have."""
        return self.external_corpus_max_tokens - sum(self._tokens.values())

    def load_external_corpus_named(self, corpus_id: str, chunks: Iterable[Sequence[int]]) -> int:
        """Builds a datastore of a corpus, which drafts match from then on. Returns its tokens.

        Raises:
            ValueError: there is one of that name, or it does not fit into the budget.
        """
        if corpus_id in self._stores or not corpus_id:
            raise ValueError(f"there is an external corpus {corpus_id!r} already; remove it first")
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="sssd-sglang-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._built += 1
        path = self._folder / f"{self._built}.sssd"
        size = next((store.vocab_size for store in self.drafter.datastores.values()), _VOCAB_SIZE)
        left, tokens = self.remaining_token_budget, 0
        with DatastoreBuilder(path, vocab_size=size) as builder:
            for chunk in chunks:
                tokens += len(chunk)
                if tokens > left:
                    raise InvalidArgumentError(
                        f"the external corpora may have {left} tokens more, not {tokens}"
                    )
                builder.add(chunk)
        self._open({**self._stores, corpus_id: path})
        return tokens

    def commit_external_corpus_load(self, corpus_id: str, loaded_token_count: int) -> None:
        """Counts a corpus that was loaded."""
        self._tokens[corpus_id] = loaded_token_count

    def remove_external_corpus(self, corpus_id: str) -> None:
        """Has drafts match a corpus no more."""
        self._tokens.pop(corpus_id, None)
        if corpus_id and corpus_id in self._stores:
            path = self._stores[corpus_id]
            self._open({name: store for name, store in self._stores.items() if name != corpus_id})
            Path(path).unlink(missing_ok=True)

    def list_external_corpora(self) -> dict[str, int]:
        """The tokens of each external corpus."""
        return dict(self._tokens)

    def _open(self, stores: dict[str, Any]) -> None:
        held = self.drafter.datastores
        self.drafter.reopen({"": held[""], **stores} if "" in held else stores)
        self._stores = stores


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _see_requests(original: Any, worker: Any, batch: Any) -> Any:
    """Around ``NGRAMWorker._prepare_draft_tokens``, which hands over ends only."""
    if isinstance(worker.ngram_corpus, NgramCorpus):
        worker.ngram_corpus.see(batch.reqs)
    return original(worker, batch)


def plugin() -> None:
    """What SGLang calls by its entry point ``sglang.srt.plugins``. Does nothing without ``SSSD_SGLANG``."""
    if os.environ.get(VARIABLE, "").strip() in ("", "0"):
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    worker = "sglang.srt.speculative.ngram_worker"
    HookRegistry.register(f"{worker}.NgramCorpus", NgramCorpus, HookType.REPLACE)
    HookRegistry.register(f"{worker}.NGRAMWorker._prepare_draft_tokens", _see_requests, HookType.AROUND)
