"""The decoding loop: draft, verify, accept, row by row, until every row has stopped."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from sssd._core import Datastore, DraftBatch, Drafter, DraftTree, Pace, Sequence, SizingRule
from sssd.errors import BatchError
from sssd.hf.choices import BatchSampler, choices, most_probable, top_k
from sssd.hf.contract import Call, cache_argument, must_stand_in_place, position_limit
from sssd.hf.passes import Passes
from sssd.hf.static import Answer

_EXPECTED_TOKENS, _TREE_ROOM = 4096, 64

Walk = Iterator[tuple[int, int, bool]]
"""A path from the root: entries of the pass, the token chosen after each, and whether it was drafted."""


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
        self.criteria = call.other_criteria
        self.max_length = call.criteria.max_length
        self.end_ids = call.end_ids
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

    def begin(self, drafter: Any, stack: ExitStack, datastore: Datastore | None = None) -> None:
        """Opens one drafting sequence per row."""
        if drafter is None:
            drafter = Drafter(
                vocab_size=self.vocab_size, end_token_ids=sorted(self.end_ids), datastore=datastore
            )
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
        self.news: tuple[list[int], Any] = [], [0]
        """Tokens of the last step that the sequences have not seen, and where those of each row begin."""
        self.feedback: dict[str, Any] = {}
        self.has_drafted, self.drafts_whole = False, True

    def run(self, max_nodes: int | None, rule: SizingRule | None) -> None:
        """Decodes until every row has stopped, with ``max_nodes`` a tree or as ``rule`` says."""
        most = (max_nodes or 0) if rule is None else rule.max_nodes
        self.trees = DraftBatch(self.batch, 0)
        if self.drafter is not None:
            self.drafts = DraftBatch(self.batch, self.batch * most)
        # who drafts nothing need not know what else was probable
        self.feeds_back = self.drafter is not None and most > 0
        if rule is not None and self.drafter is None:
            for row in self.rows:
                row.pace = rule.pace()
        self._advance(self._prefill(), None)
        # What no pass depends on is done while a device works on the next one, else at once.
        settle: Callable[[], None] = self._stream
        while self.active:
            if not self.passes.overlaps:
                settle()
            rows, batch = self.active, len(self.active)
            context = sum(self.cache.lengths) / batch
            before = sum(len(row.tokens) for row in rows)
            started = perf_counter()
            self.trees = (
                self._draft(most, rule) if self.drafter is not None else self._ask(most, rule, context)
            )
            drafted = perf_counter()
            finish = self._launch()
            if self.passes.overlaps:
                settle()
            self._advance(*finish())
            step = {
                "batch": batch,
                "size": self.passes.block.ids.shape[1] - 1,
                "context": context,
                "seconds": perf_counter() - drafted,
                "tokens": sum(len(row.tokens) for row in rows) - before,
                "draft_seconds": drafted - started if self.has_drafted else 0.0,
            }
            # a pass that was recorded, or not yet, takes longer than those that the rule has to judge
            settle = partial(self._settle, rule if self.passes.settled else None, step)
        settle()

    def _settle(self, rule: SizingRule | None, step: dict[str, Any]) -> None:
        """Shows the tokens of a step, and tells the rule what came of it."""
        self._stream()
        if rule is not None:
            rule.observe(**step)

    def _draft(self, most: int, rule: SizingRule | None) -> DraftBatch:
        """Hands the last step to the drafter and drafts for the next one, all rows in one call."""
        assert self.drafter is not None
        try:
            trees = self.drafter.step(
                [row.sequence for row in self.active],
                *self.news,
                most,
                max_depth=self._depths(),
                rule=rule,
                out=self.drafts,
                **self.feedback,
            )
        except BatchError as error:
            raise next(iter(error.failures.values())) from error
        self.has_drafted = trees.drafted_sequences > 0
        self.drafts_whole = not self.may_draft_others or bool((trees.token_ids < self.vocab_size).all())
        if self.drafts_whole:
            return trees
        fitting = [self._fitting(trees[i], row) for i, row in enumerate(self.active)]
        return DraftBatch.from_trees(fitting)

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

    def _ask(self, most: int, rule: SizingRule | None, context: float) -> DraftBatch:
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
        if rule is not None:
            counts = rule.allocate(trees, context, paces)
            trees = [
                None if tree is None else tree.first(count) for tree, count in zip(trees, counts, strict=True)
            ]
        return DraftBatch.from_trees(trees)

    def _fitting(self, tree: DraftTree, row: Row) -> DraftTree | None:
        """What of a draft the model can look at."""
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
        self.passes.fill(None, [0] * self.batch, [0] * self.batch)
        return logits

    def _launch(self) -> Callable[[], tuple[Any, Answer | None]]:
        """Begins the pass over the last token and every node; see :meth:`Passes.launch`."""
        for row, nodes in zip(self.active, np.diff(self.trees.offsets).tolist(), strict=True):
            row.steps += 1
            row.drafted += nodes
        self.passes.fill(
            self.trees,
            [row.tokens[-1] for row in self.active],
            [row.position for row in self.active],
        )
        return self.passes.launch(accept=not self.picks_alone)

    def _advance(self, logits: Any, answer: Answer | None) -> None:
        """Appends what the target chose, commits it to cache and drafter, and drops finished rows.

        Args:
            logits: [B, 1 + nodes or more, vocabulary] after the last token and every node.
            answer: What the device makes of them, if it does.
        """
        targets, topk = self._chosen(logits, answer)
        walks = self._walks(logits) if targets is None else self._accepted(targets)
        kept, offsets = [], [0]
        for row, walk in zip(self.active, walks, strict=True):
            for entry, token, drafted in walk:
                kept.append(entry)
                self._append(row, token, drafted)
                if self._ended(row):
                    break
            offsets.append(len(kept))
        self.cache.commit(np.array(kept), np.array(offsets))
        left = [i for i, row in enumerate(self.active) if not self._ended(row)]
        if left and len(left) < len(self.active):
            self.cache.select(left)
        self._teach(topk, left, [offsets[i + 1] - offsets[i] for i in left])
        self.active = [self.active[i] for i in left]
        if self.sampler is not None and left:
            self.sampler.forget(min(len(row.tokens) for row in self.active))

    def _teach(self, topk: Any, left: list[int], counts: list[int]) -> None:
        """Has the drafter learn from the rows that go on: in the call that drafts, where it can.

        Args:
            topk: What the target held most probable, ids and probabilities [B, T, k], if the drafter learns.
            left: The rows that go on.
            counts: How many tokens each of them has got.
        """
        rows = [self.active[i] for i in left]
        news = [row.tokens[len(row.tokens) - count :] for row, count in zip(rows, counts, strict=True)]
        if self.drafter is None:
            for row, tokens in zip(rows, news, strict=True):
                row.sequence.extend(tokens)
            return
        self.news = [token for tokens in news for token in tokens], np.cumsum([0, *counts])
        self.feedback = {}
        if topk is None:
            return
        if self.drafts_whole:
            ids, probs = (part if len(left) == len(part) else part[left] for part in topk)
            self.feedback = {"feedback_ids": ids, "feedback_probs": probs}
            return
        for i, row in zip(left, rows, strict=True):
            tree = self.trees[i]
            row.sequence.feedback(tree, *(part[i, : len(tree) + 1] for part in topk))

    def _chosen(self, logits: Any, answer: Answer | None) -> tuple[Any, Any]:
        """What the target chooses, if logits alone tell, and what teaches the drafter, if it learns."""
        if answer is not None:
            targets, topk = answer.targets, (answer.topk_ids, answer.topk_probs)
            # padding of the vocabulary is no token to the drafter
            if self.feeds_back and self.draft_vocab_size < self.vocab_size:
                topk = top_k(logits[..., : self.draft_vocab_size])
        elif not self.feeds_back:
            return (None if self.picks_alone else choices(logits)), None
        elif self.picks_alone:
            targets, topk = None, top_k(logits[..., : self.draft_vocab_size])
        else:
            targets, ids, probs = most_probable(logits, self.draft_vocab_size)
            topk = ids, probs
        return targets, topk if self.feeds_back else None

    def _accepted(self, targets: Any) -> Iterator[Walk]:
        """The accepted path of each row under known choices."""
        kept, tokens, offsets = (array.tolist() for array in self.passes.block.accept(targets))
        for start, end in pairwise(offsets):
            drafted = [True] * (end - start - 1) + [False]
            yield zip(kept[start:end], tokens[start:end], drafted, strict=True)

    def _walks(self, logits: Any) -> Iterator[Walk]:
        """The same where tokens are picked one by one as plain decoding would, each after those before it."""
        block = self.passes.block
        for i, row in enumerate(self.active):
            links = (array[i].tolist() for array in (block.ids, block.first_child, block.next_sibling))
            yield self._walk(row, logits[i], *links)

    def _walk(
        self, row: Row, logits: Any, ids: list[int], first_child: list[int], next_sibling: list[int]
    ) -> Walk:
        entry = 0
        while entry >= 0:
            token = self._pick(row, logits[entry])
            child = first_child[entry]
            while child >= 0 and ids[child] != token:
                child = next_sibling[child]
            yield entry, token, child >= 0
            entry = child

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
        for place, column in enumerate(self._columns(self.streamed, end).unbind(1), self.streamed):
            drafted = [place < len(row.tokens) and row.drafted_tokens[place] for row in self.rows]
            self.streamer.put_output(column, drafted)
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
