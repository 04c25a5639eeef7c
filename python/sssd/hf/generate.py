"""Generation with draft trees: the target model's own output in fewer forward passes."""

import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import logits_process as processors

from sssd._core import Drafter, DraftTree, Sequence
from sssd.errors import InvalidArgumentError, InvalidTokenError, UnsupportedModelError
from sssd.hardware.budget import Budget, RowBudget
from sssd.hardware.curve import CostCurve
from sssd.hf.passes import Passes
from sssd.hf.profile import budget_of
from sssd.hf.static import TOP_K, Answer
from sssd.hf.verify import Block, cache_argument, cannot_roll_back, check_model

_ROWWISE = {
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
    processors.MinPLogitsWarper,
    processors.NoRepeatNGramLogitsProcessor,
    processors.SuppressTokensLogitsProcessor,
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
}
"""Processors that treat every row alike. Any other may look up the row number (a prefix function, the padding
of the prompt), so it has to see each row at its own place in the batch."""

_STATEFUL = (
    processors.SynthIDTextWatermarkLogitsProcessor,
    processors.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
"""Processors that remember earlier calls of the whole batch, whose rows therefore must not drift apart."""

_warned: set[type] = set()

_EXPECTED_TOKENS, _TREE_ROOM = 4096, 64
_PIECE = 64
"""Tokens of the vocabulary that are looked at together."""
_EMPTY = DraftTree([], [])
_CACHE_FIELD = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"


@dataclass
class GenerateResult(GenerateDecoderOnlyOutput):  # type: ignore[misc]
    """What :func:`generate` returns with ``return_dict_in_generate=True``.

    A ``GenerateDecoderOnlyOutput`` (``sequences`` int64 [B, L], ``scores``, ``logits``, ``past_key_values``;
    the last three for one row only) with the counts of speculative decoding. The first token of a row comes
    from the prefill and costs no step.

    Attributes:
        steps: Verify passes, summed over the rows that took part in each.
        drafted: Draft tree nodes verified.
        accepted: Draft tree nodes that became output.
        tokens_per_step: Output tokens after the first of each row, per step (mean acceptance length); 1.0 is
            autoregressive decoding. 0.0 without steps.
        steps_per_row: ``steps`` of each row, B integers; likewise ``drafted_per_row``, ``accepted_per_row``.
        accepted_mask: Bool [B, new tokens], True where the token had been drafted.
    """

    # transformers' ModelOutput insists on None as the default of every field but the first.
    steps: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    tokens_per_step: float | None = None
    steps_per_row: tuple[int, ...] | None = None
    drafted_per_row: tuple[int, ...] | None = None
    accepted_per_row: tuple[int, ...] | None = None
    accepted_mask: Any = None


def generate(
    model: Any,
    input_ids: Any = None,
    drafter: Any = None,
    *,
    max_nodes: int | None = None,
    cost: CostCurve | None = None,
    fast_path: bool = True,
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    streamer: Any = None,
    **kwargs: Any,
) -> Any:
    """Generates like ``model.generate``, verifying draft trees on the way; the output is the same.

    Two ways to call it::

        sssd.hf.generate(model, input_ids, drafter, max_new_tokens=200)
        model.generate(input_ids, custom_generate=sssd.hf.generate, drafter=drafter, max_new_tokens=200)

    Greedy output equals that of ``model.generate`` token by token, up to the rounding of a pass over several
    tokens. Sampling draws each token from the target model's processed distribution and follows the drafted
    child that equals it (the point-mass case of speculative sampling, arXiv 2302.01318), so the output
    distribution is exact. It uses torch's global generator of the device, one draw of ``torch.multinomial``
    per output token: with one row the same seed gives the same tokens as ``model.generate``.

    Args:
        model: A decoder-only transformers model with eager or sdpa attention. Models with recurrent layers
            are decoded without drafts, with one warning.
        input_ids: Int64 [B, L] prompt tokens, padded on the left with ``attention_mask`` given as usual.
        drafter: An ``sssd.Drafter``; by default a new one for this call.
        max_nodes: Nodes of each row's draft tree; 0 decodes without drafts. By default each step's trees are
            as large as pays by the times of verify passes on this machine (``docs/hardware.md``), and nothing
            is drafted where nothing pays.
        cost: Those times. By default what ``python -m sssd profile`` measured for the model on this machine,
            or an estimate; corrected by the times of steps in any case. Not together with ``max_nodes``.
        fast_path: Whether verify passes of known models may run on sssd's own code (``sssd.hf.fast``), which
            on a CPU holds a second, reordered copy of the weights.
        generation_config: As in ``model.generate``.
        logits_processor: As in ``model.generate``. Called on the walk only, with each token's own prefix.
        stopping_criteria: As in ``model.generate``. Evaluated after every token; nothing follows a stop.
        streamer: As in ``model.generate``: one ``put`` per token.
        **kwargs: Everything else that ``model.generate`` takes.

    Returns:
        Int64 [B, L + new tokens], or a :class:`GenerateResult` with ``return_dict_in_generate=True``.

    Raises:
        InvalidArgumentError: ``max_nodes`` is not an integer >= 0, ``cost`` is no cost curve, or both are
            given.
        UnsupportedModelError: The model, its cache or an option (beam search, assisted decoding, attention or
            hidden state outputs, static or quantized caches, scores of several rows) cannot be verified.
        InvalidTokenError: The drafter proposed tokens outside the model's vocabulary.
    """
    if max_nodes is not None and (
        not isinstance(max_nodes, int) or isinstance(max_nodes, bool) or max_nodes < 0
    ):
        raise InvalidArgumentError(f"max_nodes must be an integer >= 0, not {max_nodes!r}")
    if cost is not None and not isinstance(cost, CostCurve):
        raise InvalidArgumentError(f"cost must be a sssd.hardware.CostCurve, not {type(cost).__name__}")
    if cost is not None and max_nodes is not None:
        raise InvalidArgumentError("give max_nodes or cost, not both")
    own = {"drafter": drafter, "max_nodes": max_nodes, "cost": cost, "fast_path": fast_path}
    if hasattr(generation_config, "_eos_token_tensor"):  # transformers calls, everything is prepared
        withheld = _withheld_arguments(model)
        return _decode(
            model,
            input_ids,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer or withheld.pop("streamer", None),
            **own,
            **withheld,
            **kwargs,
        )
    for name in ("assistant_model", "synced_gpus"):
        if kwargs.get(name):
            raise UnsupportedModelError(f"{name} is not supported")
    tokenizer, stop_strings = kwargs.pop("tokenizer", None), kwargs.pop("stop_strings", None)
    if stop_strings is not None:
        # transformers hands no tokenizer to the criteria when decoding is not its own.
        if tokenizer is None:
            raise InvalidArgumentError("stop_strings needs tokenizer=")
        criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings)
        stopping_criteria = StoppingCriteriaList([*(stopping_criteria or ()), criterion])
    return model.generate(
        input_ids,
        generation_config=generation_config,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        streamer=streamer,
        custom_generate=partial(_decode, streamer=streamer, **own),
        **kwargs,
    )


def _withheld_arguments(model: Any) -> dict[str, Any]:
    """The arguments that the running ``model.generate`` does not hand to a ``custom_generate`` callable.

    Without them a streamer's reader would wait for ever.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "generate" and frame.f_locals.get("self") is model:
            return {name: frame.f_locals.get(name) for name in ("streamer", "assistant_model", "synced_gpus")}
    return {}


def _decode(
    model: Any,
    input_ids: Any,
    *,
    generation_config: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    streamer: Any,
    drafter: Any,
    max_nodes: int | None,
    cost: CostCurve | None,
    fast_path: bool,
    assistant_model: Any = None,
    synced_gpus: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decodes with arguments that ``model.generate`` has prepared."""
    if assistant_model is not None or generation_config.get_generation_mode() not in (
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
    ):
        raise UnsupportedModelError("only greedy search and sampling are supported, no beams, no assistants")
    if synced_gpus:
        raise UnsupportedModelError("synced_gpus is not supported")
    if cannot_roll_back(model):
        if type(model) not in _warned:
            _warned.add(type(model))
            warnings.warn(
                f"{type(model).__name__} has recurrent layers, whose state cannot be rolled back: "
                "decoding without drafts",
                stacklevel=2,
            )
        output = type(model)._sample(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            streamer=streamer,
            **model_kwargs,
        )
        return _plain_result(output, input_ids) if generation_config.return_dict_in_generate else output
    check_model(model)
    with ExitStack() as stack:
        decoder = _Decoder(
            model,
            input_ids,
            generation_config,
            logits_processor,
            stopping_criteria,
            streamer,
            model_kwargs,
            fast_path,
        )
        stack.callback(decoder.passes.close)
        budget = None
        if max_nodes is None:
            budget = Budget(cost) if cost is not None else budget_of(model, decoder.passes)
        decoder.begin(drafter, stack)
        decoder.run(max_nodes, budget)
    return decoder.result()


def _plain_result(output: Any, input_ids: Any) -> GenerateResult:
    batch, length = output.sequences.shape
    new = length - input_ids.shape[1]
    return GenerateResult(
        **output,
        steps=batch * (new - 1),
        drafted=0,
        accepted=0,
        tokens_per_step=1.0 if new > 1 else 0.0,
        steps_per_row=(new - 1,) * batch,
        drafted_per_row=(0,) * batch,
        accepted_per_row=(0,) * batch,
        accepted_mask=torch.zeros(batch, new, dtype=torch.bool),
    )


@dataclass
class _Row:
    """One sequence of the batch."""

    index: int
    prompt: list[int]
    position: int
    """Position id of the newest token once there is one; that of the last prompt token before."""
    ids: Any
    """Int64 [1, length] of prompt and output; follows the output only if somebody looks at it."""
    sequence: Any = None
    budget: RowBudget = field(default_factory=RowBudget)
    tokens: list[int] = field(default_factory=list)
    drafted_tokens: list[bool] = field(default_factory=list)
    scores: list[Any] = field(default_factory=list)
    logits: list[Any] = field(default_factory=list)
    steps: int = 0
    drafted: int = 0
    stop: int | None = None
    """Number of output tokens at which a stopping criterion held."""


class _Decoder:
    """The decoding loop. ``active`` lists the rows still in the batch, in the order of the cache's rows."""

    def __init__(
        self,
        model: Any,
        input_ids: Any,
        config: Any,
        logits_processor: Any,
        criteria: Any,
        streamer: Any,
        inputs: Any,
        fast_path: bool,
    ) -> None:
        self.model, self.config, self.streamer, self.input_ids = model, config, streamer, input_ids
        self.batch = input_ids.shape[0]
        self.processors = logits_processor or LogitsProcessorList()
        self.record_scores = bool(config.return_dict_in_generate and config.output_scores)
        self.record_logits = bool(config.return_dict_in_generate and config.output_logits)
        cache = inputs.get(cache_argument(model))
        self.user_cache = cache if getattr(cache, "_is_user_defined", False) else None
        self._refuse_options(inputs)
        self.criteria = StoppingCriteriaList(
            criterion
            for criterion in criteria
            if type(criterion) not in (EosTokenCriteria, MaxLengthCriteria)
        )
        self.max_length = criteria.max_length
        self.end_ids = {
            token
            for criterion in criteria
            if type(criterion) is EosTokenCriteria
            for token in criterion.eos_token_id.tolist()
        }
        # Without an end token, transformers lets a stopped row run on until the last one stops.
        self.rows_end_alone = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.picks_alone = (
            bool(self.processors) or config.do_sample or self.record_scores or self.record_logits
        )
        self.needs_ids = self.picks_alone or bool(self.criteria)
        rowwise = all(type(processor) in _ROWWISE for processor in self.processors)
        self.needs_batch = self.batch > 1 and not rowwise
        self.vocab_size = model.config.get_text_config(decoder=True).vocab_size
        self.streamed = 0
        self._prepare(inputs, fast_path)

    def _refuse_options(self, inputs: dict[str, Any]) -> None:
        config = self.config
        if config.output_attentions or config.output_hidden_states:
            raise UnsupportedModelError("output_attentions and output_hidden_states are not supported")
        if self.batch > 1 and (self.record_scores or self.record_logits):
            raise UnsupportedModelError("output_scores and output_logits are supported for one row only")
        if self.batch > 1 and any(isinstance(processor, _STATEFUL) for processor in self.processors):
            raise UnsupportedModelError(
                "SynthID watermarks and classifier-free guidance are supported for one row only"
            )
        if inputs.get("use_cache") is False or config.cache_implementation not in (None, "dynamic"):
            raise UnsupportedModelError(
                "verification needs a dynamic key-value cache: use_cache=True, no cache_implementation"
            )
        if self.batch > 1 and self.user_cache is not None:
            raise UnsupportedModelError("past_key_values is supported for one row only")
        known = {
            "attention_mask",
            "position_ids",
            cache_argument(self.model),
            "use_cache",
            "logits_to_keep",
            "cache_position",
        }
        other = sorted(name for name, value in inputs.items() if name not in known and value is not None)
        if other:
            raise UnsupportedModelError(f"model inputs beside text are not supported: {', '.join(other)}")

    def _prepare(self, inputs: dict[str, Any], fast_path: bool) -> None:
        """Sets up cache, positions and rows."""
        ids, mask, positions = self.input_ids, inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None and bool(mask.all()):
            mask = None
        past = self.user_cache.get_seq_length() if self.user_cache is not None else 0
        total = mask.shape[1] if mask is not None else getattr(self.config, "_mask_length", ids.shape[1])
        self.fresh = ids[:, past:] if total == ids.shape[1] else ids
        if self.fresh.shape[1] == 0:
            raise InvalidArgumentError(
                "past_key_values already covers the whole prompt; nothing is left to decode from"
            )
        if positions is None:
            counts = (
                torch.ones(1, total, dtype=torch.long, device=ids.device) if mask is None else mask.long()
            )
            positions = (counts.cumsum(-1) - 1).clamp(min=0)
        if positions.dim() != 2:
            raise UnsupportedModelError("position ids of several dimensions are not supported")
        self.positions = positions[:, -self.fresh.shape[1] :].expand(self.batch, -1)
        self.mask = mask
        self.logits_to_keep = {"logits_to_keep": 1} if inputs.get("logits_to_keep") is not None else {}
        # room for the whole text and a tree, unless the length is a mere bound
        room = total + min((self.max_length or total) - ids.shape[1], _EXPECTED_TOKENS) + _TREE_ROOM
        self.passes = Passes(self.model, self.batch, None if mask is None else mask.bool(), room, fast_path)
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
        self.rows = [_Row(i, prompts[i], last[i], ids[i : i + 1]) for i in range(self.batch)]
        self.active = list(self.rows)

    def begin(self, drafter: Any, stack: ExitStack) -> None:
        """Opens one drafting sequence per row."""
        if drafter is None:
            drafter = Drafter(vocab_size=self.vocab_size, end_token_ids=sorted(self.end_ids))
        for row in self.rows:
            row.sequence = stack.enter_context(drafter.begin(row.prompt))
        # the target's probabilities teach the drafter; made-up sequences need not know how
        self.feeds_back = all(isinstance(row.sequence, Sequence) for row in self.rows)
        self.draft_vocab_size = getattr(drafter, "vocab_size", None) or self.vocab_size

    def run(self, max_nodes: int | None, budget: Budget | None) -> None:
        """Decodes until every row has stopped, with ``max_nodes`` a tree or as ``budget`` says."""
        if budget is not None:
            for row in self.rows:
                row.budget = budget.row()
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
            if budget is None:
                trees = [self._draft(row, max_nodes or 0) for row in rows]
            else:
                trees = self._sized(budget, context)
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
                "draft_seconds": drafted - started,
            }
            settle = partial(self._settle, budget, step)
        settle()

    def _settle(self, budget: Budget | None, step: dict[str, Any]) -> None:
        """Shows the tokens of a step, and tells the rule what came of it."""
        self._stream()
        if budget is not None:
            budget.observe(**step)

    def _sized(self, budget: Budget, context: float) -> list[DraftTree | None]:
        """Drafts as large as pays."""
        states = [row.budget for row in self.active]
        limits = budget.limits(states, context)
        options = {"min_prob": budget.min_prob} if self.feeds_back else {}
        trees = [self._draft(row, limit, **options) for row, limit in zip(self.active, limits, strict=True)]
        counts = budget.allocate(trees, context, states)
        return [
            tree.first(count) if tree is not None and count else None
            for tree, count in zip(trees, counts, strict=True)
        ]

    def _prefill(self) -> Any:
        total = self.fresh.shape[1]
        past = self.cache.lengths[0]
        logits = None
        for start in range(0, total, self.config.prefill_chunk_size or total):
            end = min(start + (self.config.prefill_chunk_size or total), total)
            logits = self.model(
                input_ids=self.fresh[:, start:end],
                attention_mask=None if self.mask is None else self.mask[:, : past + end],
                position_ids=self.positions[:, start:end],
                use_cache=True,
                return_dict=True,
                **{cache_argument(self.model): self.cache},
                **self.logits_to_keep,
            ).logits[:, -1:]
            self.cache.lengths = [past + end] * self.batch
        # The last prompt token is the root of an empty tree, which `_advance` commits.
        self.cache.lengths = [past + total - 1] * self.batch
        return logits

    def _draft(self, row: _Row, max_nodes: int, **options: float) -> DraftTree | None:
        if max_nodes == 0 or self._is_full(row, more=1):
            return None
        tree: DraftTree = row.sequence.draft(max_nodes, **options)
        if len(tree) == 0:
            return None
        if tree.token_ids.max() >= self.vocab_size or tree.token_ids.min() < 0:
            raise InvalidTokenError("the drafter proposed tokens outside the model's vocabulary")
        return tree

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
            targets = _choices(logits)
        if self.feeds_back:
            # padding of the vocabulary is no token to the drafter
            if answer is not None and self.draft_vocab_size >= self.vocab_size:
                topk = answer.topk_ids, answer.topk_probs
            else:
                topk = _topk(logits[..., : self.draft_vocab_size])
        kept = []
        for i, (row, tree) in enumerate(zip(self.active, trees, strict=True)):
            before = len(row.tokens)
            walk = self._walk(row, tree, logits[i]) if targets is None else _accept(tree, targets[i])
            offsets = []
            for offset, token, drafted in walk:
                offsets.append(offset)
                self._append(row, token, drafted)
                if self._ended(row):
                    break
            kept.append(offsets)
            if not self._ended(row):
                if topk is not None:
                    size = 1 if tree is None else len(tree) + 1
                    row.sequence.feedback(tree or _EMPTY, topk[0][i, :size], topk[1][i, :size])
                row.sequence.extend(row.tokens[before:])
        self.cache.commit(kept)
        left = [i for i, row in enumerate(self.active) if not self._ended(row)]
        if left and len(left) < len(self.active):
            self.cache.select(left)
        self.active = [self.active[i] for i in left]

    def _walk(self, row: _Row, tree: DraftTree | None, logits: Any) -> Iterable[tuple[int, int, bool]]:
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

    def _pick(self, row: _Row, logits: Any) -> int:
        """The target's choice after the row's present tokens, through its own processors."""
        logits = logits[None].to(device=row.ids.device, dtype=torch.float32, copy=True)
        if self.needs_batch:
            scores = self.processors(row.ids.repeat(self.batch, 1), logits.repeat(self.batch, 1))
            scores = scores[row.index : row.index + 1]
        else:
            scores = self.processors(row.ids, logits.clone() if self.record_logits else logits)
        if self.record_scores:
            row.scores.append(scores)
        if self.record_logits:
            row.logits.append(logits)
        if self.config.do_sample:
            return int(torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1))
        return int(scores.argmax(-1))

    def _append(self, row: _Row, token: int, drafted: bool) -> None:
        row.tokens.append(token)
        row.drafted_tokens.append(drafted)
        row.position += 1
        if self.needs_ids:
            row.ids = torch.cat([row.ids, row.ids.new_tensor([[token]])], dim=1)
        if row.stop is None and self._stops(row, token):
            row.stop = len(row.tokens)

    def _stops(self, row: _Row, token: int) -> bool:
        stopped = token in self.end_ids or self._is_full(row)
        if not self.criteria:
            return stopped
        # Each row at its own place, for criteria that look up the row number.
        scores = tuple(row.scores) if self.record_scores else None
        return stopped | bool(self.criteria(row.ids.expand(self.batch, -1), scores)[row.index])

    def _is_full(self, row: _Row, more: int = 0) -> bool:
        """Whether the row reaches its maximal length with ``more`` further tokens."""
        length = self.input_ids.shape[1] + len(row.tokens) + more
        return self.max_length is not None and length >= self.max_length

    def _ended(self, row: _Row) -> bool:
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

    def result(self) -> Any:
        """The sequences, or everything that was asked for."""
        new = self._columns(0, self._new_tokens())
        sequences = torch.cat([self.input_ids, new.to(self.input_ids)], dim=1)
        cache = None
        if self.batch == 1 and (self.user_cache is not None or self.config.return_dict_in_generate):
            cache = self.cache.store(self.user_cache if self.user_cache is not None else DynamicCache())
        if not self.config.return_dict_in_generate:
            return sequences
        steps = sum(row.steps for row in self.rows)
        tokens = [row.tokens[: new.shape[1]] for row in self.rows]
        masks = [row.drafted_tokens[: new.shape[1]] for row in self.rows]
        accepted = tuple(sum(mask) for mask in masks)
        return GenerateResult(
            sequences=sequences,
            scores=tuple(self.rows[0].scores) if self.record_scores else None,
            logits=tuple(self.rows[0].logits) if self.record_logits else None,
            **{_CACHE_FIELD: cache},
            steps=steps,
            drafted=sum(row.drafted for row in self.rows),
            accepted=sum(accepted),
            tokens_per_step=(sum(map(len, tokens)) - self.batch) / steps if steps else 0.0,
            steps_per_row=tuple(row.steps for row in self.rows),
            drafted_per_row=tuple(row.drafted for row in self.rows),
            accepted_per_row=accepted,
            accepted_mask=torch.tensor([mask + [False] * (new.shape[1] - len(mask)) for mask in masks]),
        )


def _choices(logits: Any) -> NDArray[np.int64]:
    """The most probable token at every position, the first of equals; int64 [B, T]."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # ten times as fast as torch's
        return np.asarray(logits.numpy().argmax(-1))
    return np.asarray(logits.argmax(-1).cpu().numpy())


def _topk(logits: Any) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The target's most probable tokens, int64 [B, T, k], and their probabilities, float32 [B, T, k]."""
    ids = _largest(logits, min(TOP_K, logits.shape[-1]))
    # on a CPU this takes half the time of logsumexp
    probs = logits.log_softmax(-1, dtype=torch.float32).gather(-1, ids).exp_().clamp_(max=1.0)
    # rounding may lift a sum above 1
    probs /= probs.sum(-1, keepdim=True).clamp_(min=1.0)
    both = torch.cat([ids.double(), probs.double()], dim=-1).cpu().numpy()
    k = ids.shape[-1]
    return both[..., :k].astype(np.int64), both[..., k:].astype(np.float32)


def _largest(logits: Any, k: int) -> Any:
    """As ``logits.topk(k).indices``, but for the order of equals.

    The k largest lie in those k pieces of the vocabulary whose maxima are largest: reading every number once
    is faster than selecting among all.
    """
    size = logits.shape[-1]
    if size % _PIECE or size < 2 * k * _PIECE:
        return logits.topk(k, dim=-1).indices
    pieces = logits.unflatten(-1, (-1, _PIECE))
    best = pieces.amax(-1).topk(k, dim=-1).indices
    found = pieces.gather(-2, best[..., None].expand(*best.shape, _PIECE)).flatten(-2)
    places = found.topk(k, dim=-1).indices
    return best.gather(-1, places // _PIECE) * _PIECE + places % _PIECE


def _accept(tree: DraftTree | None, targets: Any) -> Iterable[tuple[int, int, bool]]:
    """The accepted path under known choices, as (offset of the choice, token, whether it was drafted)."""
    if tree is None:
        return [(0, int(targets[0]), False)]
    nodes, tokens = tree.accept(targets[: len(tree) + 1])
    offsets = [0, *(nodes + 1).tolist()]
    drafted = [True] * len(nodes) + [False]
    return zip(offsets, tokens.tolist(), drafted, strict=True)
