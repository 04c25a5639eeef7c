"""The decoding loop: draft, verify, accept, row by row, until every row has stopped."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from sssd._core import DraftBatch, Drafter, DraftTree, Pace, Sequence, SizingRule
from sssd.errors import BatchError
from sssd.hf.choices import BatchSampler, accept, choices, top_k
from sssd.hf.contract import Call, cache_argument, must_stand_in_place, position_limit
from sssd.hf.passes import Passes
from sssd.hf.static import Answer
from sssd.hf.verify import Block

_EXPECTED_TOKENS, _TREE_ROOM = 4096, 64
_EMPTY = DraftTree([], [])


@dataclass
class Row:
    """One sequence of the batch."""

    index: int
    prompt: list[int]
    position: int
    """Position id of the newest token once there is one; that of the last prompt token before."""
    ids: Any
    """Int64 [1, length] of prompt and output; follows the output only if somebody looks at it."""
    sequence: Any = None
    pace: Pace | None = None
    """What the rule remembers of it, if its drafter is of another kind."""
    tokens: list[int] = field(default_factory=list)
    drafted_tokens: list[bool] = field(default_factory=list)
    scores: list[Any] = field(default_factory=list)
    logits: list[Any] = field(default_factory=list)
    steps: int = 0
    drafted: int = 0
    stop: int | None = None
    """Number of output tokens at which a stopping criterion held."""


class Decoder:
    """Decodes one call. ``active`` lists the rows still in the batch, in the order of the cache's rows.

    Args:
        call: A call that :func:`sssd.hf.contract.why_not` has nothing against.
        stack: Gives back, at its end, what the loop holds.
        fast_path: Whether passes may run on sssd's own code.
    """

    def __init__(self, call: Call, stack: ExitStack, fast_path: bool) -> None:
        self.call, self.model, self.config = call, call.model, call.config
        self.streamer, self.input_ids = call.streamer, call.input_ids
        self.batch = call.input_ids.shape[0]
        self.processors, self.user_cache = call.processors, call.user_cache
        returned = self.config.return_dict_in_generate
        self.record_scores = bool(returned and self.config.output_scores)
        self.record_logits = bool(returned and self.config.output_logits)
        self.criteria = StoppingCriteriaList(
            criterion
            for criterion in call.criteria
            if type(criterion) not in (EosTokenCriteria, MaxLengthCriteria)
        )
        self.max_length = call.criteria.max_length
        self.end_ids = {
            token
            for criterion in call.criteria
            if type(criterion) is EosTokenCriteria
            for token in criterion.eos_token_id.tolist()
        }
        # Without an end token, transformers lets a stopped row run on until the last one stops.
        self.rows_end_alone = any(hasattr(criterion, "eos_token_id") for criterion in call.criteria)
        self.picks_alone = (
            bool(self.processors) or self.config.do_sample or self.record_scores or self.record_logits
        )
        self.needs_ids = self.picks_alone or bool(self.criteria)
        self.stands_in_place = must_stand_in_place(call)
        self.sampler = BatchSampler(self.batch) if self.config.do_sample and self.batch > 1 else None
        self.vocab_size = self.model.config.get_text_config(decoder=True).vocab_size
        self.position_limit = position_limit(self.model)
        self.streamed = 0
        self._prepare(call.inputs, stack, fast_path)

    def _prepare(self, inputs: dict[str, Any], stack: ExitStack, fast_path: bool) -> None:
        """Sets up cache, positions and rows."""
        ids, mask, positions = self.input_ids, inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None and bool(mask.all()):
            mask = None
        total, fresh = self.call.lengths
        self.fresh = ids[:, ids.shape[1] - fresh :]
        if positions is None:
            counts = (
                torch.ones(1, total, dtype=torch.long, device=ids.device) if mask is None else mask.long()
            )
            positions = (counts.cumsum(-1) - 1).clamp(min=0)
        self.positions = positions[:, -self.fresh.shape[1] :].expand(self.batch, -1)
        self.mask = mask
        self.logits_to_keep = {"logits_to_keep": 1} if inputs.get("logits_to_keep") is not None else {}
        # room for the whole text and a tree, unless the length is a mere bound
        room = total + min((self.max_length or total) - ids.shape[1], _EXPECTED_TOKENS) + _TREE_ROOM
        padding = None if mask is None else mask.bool().to(self.model.device)
        self.passes = stack.enter_context(Passes(self.model, self.batch, padding, room, fast_path))
        self.cache = self.passes.cache
        if self.user_cache is not None:
            self.cache.load(self.user_cache)
        prompts = ids.tolist()
        if mask is not None:
            kept = mask[:, -ids.shape[1] :].bool().tolist()
            prompts = [
                [t for t, keep in zip(row, use, strict=True) if keep]
                for row, use in zip(prompts, kept, strict=True)
            ]
        last = self.positions[:, -1].tolist()
        self.rows = [Row(i, prompts[i], last[i], ids[i : i + 1]) for i in range(self.batch)]
        self.active = list(self.rows)

    def begin(self, drafter: Any, stack: ExitStack) -> None:
        """Opens one drafting sequence per row."""
        if drafter is None:
            drafter = Drafter(vocab_size=self.vocab_size, end_token_ids=sorted(self.end_ids))
        for row in self.rows:
            # drafters of other kinds need not know of lengths
            bound = {}
            if isinstance(drafter, Drafter) and self.max_length is not None:
                bound = {"max_length": self.max_length - self.input_ids.shape[1] + len(row.prompt)}
            row.sequence = stack.enter_context(drafter.begin(row.prompt, **bound))
        # sequences of other kinds need not know of batches and the target's probabilities
        self.drafter: Drafter | None = None
        if all(isinstance(row.sequence, Sequence) for row in self.rows):
            drafters = [row.sequence.drafter for row in self.rows]
            self.drafter = drafters[0] if all(other == drafters[0] for other in drafters) else None
        known = None if self.drafter is None else self.drafter.vocab_size
        self.may_draft_others = known is None or known > self.vocab_size
        self.draft_vocab_size = known or self.vocab_size
        self.news: list[list[int]] = []
        """Tokens of the last step, of each active row, that its sequence has not seen."""
        self.feedback: dict[str, Any] = {}
        self.has_drafted, self.drafts_whole = False, True

    def run(self, max_nodes: int | None, rule: SizingRule | None) -> None:
        """Decodes until every row has stopped, with ``max_nodes`` a tree or as ``rule`` says."""
        most = (max_nodes or 0) if rule is None else rule.max_nodes
        self.drafts = DraftBatch(self.batch, self.batch * most)
        if rule is not None and self.drafter is None:
            for row in self.rows:
                row.pace = rule.pace()
        self._advance([None] * self.batch, self._prefill(), None)
        # What no pass depends on is done while a device works on the next one, else at once.
        settle: Callable[[], None] = self._stream
        while self.active:
            if not self.passes.overlaps:
                settle()
            rows, batch = self.active, len(self.active)
            context = sum(self.cache.lengths) / batch
            before = sum(len(row.tokens) for row in rows)
            started = perf_counter()
            trees = self._draft(most, rule) if self.drafter is not None else self._ask(most, rule, context)
            drafted = perf_counter()
            finish = self._launch(trees)
            if self.passes.overlaps:
                settle()
            self._advance(trees, *finish())
            step = {
                "batch": batch,
                "size": self.passes.width(max(0 if tree is None else len(tree) for tree in trees)) - 1,
                "context": context,
                "seconds": perf_counter() - drafted,
                "tokens": sum(len(row.tokens) for row in rows) - before,
                "draft_seconds": drafted - started if self.has_drafted else 0.0,
            }
            settle = partial(self._settle, rule, step)
        settle()

    def _settle(self, rule: SizingRule | None, step: dict[str, Any]) -> None:
        """Shows the tokens of a step, and tells the rule what came of it."""
        self._stream()
        if rule is not None:
            rule.observe(**step)

    def _draft(self, most: int, rule: SizingRule | None) -> list[DraftTree | None]:
        """Hands the last step to the drafter and drafts for the next one, all rows in one call."""
        assert self.drafter is not None
        try:
            batch = self.drafter.step(
                [row.sequence for row in self.active],
                np.array([token for tokens in self.news for token in tokens], dtype=np.int64),
                np.cumsum([0, *map(len, self.news)]),
                most,
                max_depth=self._depths(),
                rule=rule,
                out=self.drafts,
                **self.feedback,
            )
        except BatchError as error:
            raise next(iter(error.failures.values())) from error
        self.has_drafted = batch.drafted_sequences > 0
        trees = [self._fitting(batch[i], row) for i, row in enumerate(self.active)]
        self.drafts_whole = all(
            len(batch[i]) == (0 if tree is None else len(tree)) for i, tree in enumerate(trees)
        )
        return trees

    def _depths(self) -> list[int] | None:
        """How deep the trees of the rows may be, where that is bounded."""
        bounds = []
        if self.position_limit is not None:
            bounds.append([self.position_limit - 1 - row.position for row in self.active])
        if self.max_length is not None:
            # the last token needs no draft
            room = self.max_length - self.input_ids.shape[1] - 1
            bounds.append([room - len(row.tokens) for row in self.active])
        return [max(min(depths), 0) for depths in zip(*bounds, strict=True)] if bounds else None

    def _ask(self, most: int, rule: SizingRule | None, context: float) -> list[DraftTree | None]:
        """Drafts by sequences of other kinds, one after the other."""
        limits = [most] * len(self.active)
        paces = [row.pace for row in self.active if row.pace is not None]
        if rule is not None:
            limits = rule.limits(paces)
        self.has_drafted = any(limits)
        trees = [
            None
            if limit == 0 or self._is_full(row, more=1)
            else self._fitting(row.sequence.draft(limit), row)
            for row, limit in zip(self.active, limits, strict=True)
        ]
        if rule is None:
            return trees
        counts = rule.allocate(trees, context, paces)
        return [
            tree.first(count) if tree is not None and count else None
            for tree, count in zip(trees, counts, strict=True)
        ]

    def _fitting(self, tree: DraftTree, row: Row) -> DraftTree | None:
        """What of a draft the model can look at."""
        if self.may_draft_others:
            fits = (tree.token_ids >= 0) & (tree.token_ids < self.vocab_size)
            if self.position_limit is not None:
                fits &= tree.depths < self.position_limit - row.position
            if not fits.all():
                tree = _pruned(tree, fits)
        return tree if len(tree) else None

    def _prefill(self) -> Any:
        total = self.fresh.shape[1]
        past, device = self.cache.lengths[0], self.model.device
        logits = None
        for start in range(0, total, self.config.prefill_chunk_size or total):
            end = min(start + (self.config.prefill_chunk_size or total), total)
            logits = self.model(
                # inputs may be on the host, the model on a device
                input_ids=self.fresh[:, start:end].to(device),
                attention_mask=None if self.mask is None else self.mask[:, : past + end].to(device),
                position_ids=self.positions[:, start:end].to(device),
                use_cache=True,
                return_dict=True,
                **{cache_argument(self.model): self.cache},
                **self.logits_to_keep,
            ).logits[:, -1:]
            self.cache.lengths = [past + end] * self.batch
        # The last prompt token is the root of an empty tree, which `_advance` commits.
        self.cache.lengths = [past + total - 1] * self.batch
        return logits

    def _launch(self, trees: list[DraftTree | None]) -> Callable[[], tuple[Any, Answer | None]]:
        """Begins the pass over the last token and every node; see :meth:`Passes.launch`."""
        for row, tree in zip(self.active, trees, strict=True):
            row.steps += 1
            row.drafted += 0 if tree is None else len(tree)
        block = Block.of(
            [row.tokens[-1] for row in self.active],
            trees,
            [row.position for row in self.active],
            self.passes.width(max(0 if tree is None else len(tree) for tree in trees)),
        )
        return self.passes.launch(block, accept=not self.picks_alone)

    def _advance(self, trees: list[DraftTree | None], logits: Any, answer: Answer | None) -> None:
        """Appends what the target chose, commits it to cache and drafter, and drops finished rows.

        Args:
            trees: Draft of each row.
            logits: [B, 1 + nodes or more, vocabulary] after the last token and every node.
            answer: What the device makes of them, if it does.
        """
        targets = topk = None
        if answer is not None:
            targets = answer.targets
        elif not self.picks_alone:
            targets = choices(logits)
        if self.drafter is not None:
            # padding of the vocabulary is no token to the drafter
            if answer is not None and self.draft_vocab_size >= self.vocab_size:
                topk = answer.topk_ids, answer.topk_probs
            else:
                topk = top_k(logits[..., : self.draft_vocab_size])
        kept, news = [], []
        for i, (row, tree) in enumerate(zip(self.active, trees, strict=True)):
            before = len(row.tokens)
            walk = self._walk(row, tree, logits[i]) if targets is None else accept(tree, targets[i])
            offsets = []
            for offset, token, drafted in walk:
                offsets.append(offset)
                self._append(row, token, drafted)
                if self._ended(row):
                    break
            kept.append(offsets)
            news.append(row.tokens[before:])
        self.cache.commit(kept)
        left = [i for i, row in enumerate(self.active) if not self._ended(row)]
        if left and len(left) < len(self.active):
            self.cache.select(left)
        self._teach(trees, topk, news, left)
        self.active = [self.active[i] for i in left]
        if self.sampler is not None and left:
            self.sampler.forget(min(len(row.tokens) for row in self.active))

    def _teach(
        self, trees: list[DraftTree | None], topk: Any, news: list[list[int]], left: list[int]
    ) -> None:
        """Has the drafter learn from the rows that go on: in the call that drafts, where it can."""
        self.news, self.feedback = [news[i] for i in left], {}
        if topk is None:
            for i in left:
                self.active[i].sequence.extend(news[i])
        elif self.drafts_whole:
            rows = slice(None) if len(left) == len(self.active) else left
            self.feedback = {"feedback_ids": topk[0][rows], "feedback_probs": topk[1][rows]}
        else:
            for i in left:
                tree = trees[i] or _EMPTY
                rows = slice(len(tree) + 1)
                self.active[i].sequence.feedback(tree, topk[0][i, rows], topk[1][i, rows])

    def _walk(self, row: Row, tree: DraftTree | None, logits: Any) -> Iterable[tuple[int, int, bool]]:
        """Picks tokens one by one as plain decoding would, while the tree has the picked child."""
        children = {}
        if tree is not None:
            pairs = zip(tree.parents.tolist(), tree.token_ids.tolist(), strict=True)
            children = {(parent + 1, token): node + 1 for node, (parent, token) in enumerate(pairs)}
        offset: int | None = 0
        while offset is not None:
            token = self._pick(row, logits[offset])
            child = children.get((offset, token))
            yield offset, token, child is not None
            offset = child

    def _pick(self, row: Row, logits: Any) -> int:
        """The target's choice after the row's present tokens, through its own processors."""
        logits = logits[None].to(device=row.ids.device, dtype=torch.float32, copy=True)
        if self.stands_in_place:
            scores = self.processors(row.ids.repeat(self.batch, 1), logits.repeat(self.batch, 1))
            scores = scores[row.index : row.index + 1]
        else:
            scores = self.processors(row.ids, logits)
        if self.record_scores:
            row.scores.append(scores)
        if self.record_logits:
            row.logits.append(logits)
        if self.config.do_sample:
            probs = torch.softmax(scores, dim=-1)
            if self.sampler is not None:
                return self.sampler.pick(probs[0], row.index, len(row.tokens))
            return int(torch.multinomial(probs, num_samples=1))
        return int(scores.argmax(-1))

    def _append(self, row: Row, token: int, drafted: bool) -> None:
        row.tokens.append(token)
        row.drafted_tokens.append(drafted)
        row.position += 1
        if self.needs_ids:
            row.ids = torch.cat([row.ids, row.ids.new_tensor([[token]])], dim=1)
        if row.stop is None and self._stops(row, token):
            row.stop = len(row.tokens)

    def _stops(self, row: Row, token: int) -> bool:
        stopped = token in self.end_ids or self._is_full(row)
        if not self.criteria:
            return stopped
        # Each row at its own place, for criteria that look up the row number.
        scores = tuple(row.scores) if self.record_scores else None
        return stopped | bool(self.criteria(row.ids.expand(self.batch, -1), scores)[row.index])

    def _is_full(self, row: Row, more: int = 0) -> bool:
        """Whether the row reaches its maximal length with ``more`` further tokens."""
        length = self.input_ids.shape[1] + len(row.tokens) + more
        return self.max_length is not None and length >= self.max_length

    def _ended(self, row: Row) -> bool:
        if row.stop is None:
            return False
        if self.rows_end_alone or self._is_full(row):
            return True
        stops = [other.stop for other in self.rows]
        return None not in stops and len(row.tokens) >= max(stop for stop in stops if stop is not None)

    def _columns(self, start: int, end: int) -> Any:
        """Output tokens ``start`` to ``end`` of all rows, int64 [B, end - start], stopped rows padded."""
        pad = self.config._pad_token_tensor
        pad_id = int(pad) if pad is not None else 0
        rows = [row.tokens[start:end] for row in self.rows]
        return torch.tensor(
            [tokens + [pad_id] * (end - start - len(tokens)) for tokens in rows], dtype=torch.long
        )

    def _stream(self) -> None:
        if self.streamer is None:
            return
        running = [len(row.tokens) for row in self.rows if not self._ended(row)]
        end = min(running) if running else self._new_tokens()
        for column in self._columns(self.streamed, end).unbind(1):
            self.streamer.put(column)
        self.streamed = max(end, self.streamed)
        if not running:
            self.streamer.end()

    def _new_tokens(self) -> int:
        return max(row.stop if row.stop is not None else len(row.tokens) for row in self.rows)

    def result(self) -> tuple[Any, dict[str, Any]]:
        """The sequences, int64 [B, L + new tokens], and the other fields of a result."""
        new = self._columns(0, self._new_tokens())
        sequences = torch.cat([self.input_ids, new.to(self.input_ids)], dim=1)
        cache = None
        if self.batch == 1 and (self.user_cache is not None or self.config.return_dict_in_generate):
            cache = self.cache.store(self.user_cache if self.user_cache is not None else DynamicCache())
        steps = sum(row.steps for row in self.rows)
        tokens = [row.tokens[: new.shape[1]] for row in self.rows]
        masks = [row.drafted_tokens[: new.shape[1]] for row in self.rows]
        accepted = tuple(sum(mask) for mask in masks)
        return sequences, {
            "scores": tuple(self.rows[0].scores) if self.record_scores else None,
            "logits": tuple(self.rows[0].logits) if self.record_logits else None,
            "cache": cache,
            "steps": steps,
            "drafted": sum(row.drafted for row in self.rows),
            "accepted": sum(accepted),
            "tokens_per_step": (sum(map(len, tokens)) - self.batch) / steps if steps else 0.0,
            "steps_per_row": tuple(row.steps for row in self.rows),
            "drafted_per_row": tuple(row.drafted for row in self.rows),
            "accepted_per_row": accepted,
            "accepted_mask": torch.tensor([mask + [False] * (new.shape[1] - len(mask)) for mask in masks]),
        }


def _pruned(tree: DraftTree, fits: Any) -> DraftTree:
    """The tree without nodes that do not fit, and without what hangs below them."""
    parents = tree.parents
    fits = fits.copy()
    for node, parent in enumerate(parents.tolist()):
        fits[node] &= parent < 0 or fits[parent]
    moved = np.cumsum(fits) - 1
    kept = parents[fits]
    return DraftTree(tree.token_ids[fits], np.where(kept < 0, -1, moved[kept]), tree.probs[fits])
