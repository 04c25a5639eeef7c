"""Drafts for vLLM's model runner, as its speculative method ``custom_class``."""

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sssd._core import Datastore, DraftBatch, SizingRule
from sssd.errors import BatchError
from sssd.mini import MINI, attach
from sssd.options import MOST_PREDICTED, Options, request_options
from sssd.requests import Requests
from sssd.rollout import Rollouts
from sssd.vllm.curve import first_curve
from sssd.vllm.metrics import EVERY, Counts, Metrics

logger = logging.getLogger("vllm.sssd")


class Proposer:
    """What vLLM's runner asks for drafts after each pass: its ``custom_class``.

    Nothing that goes wrong while drafting reaches the engine: it decodes on without drafts. Per request, in
    ``SamplingParams.extra_args`` (``vllm_xargs`` over HTTP): ``sssd_prediction``, text or token ids that the
    output is expected to resemble; ``sssd_namespace``, whose learned texts it shares, by default the name of
    its LoRA adapter; ``sssd_policy``, the version of the policy that is trained; ``sssd_off``.

    Args:
        vllm_config: vLLM's.

    Attributes:
        drafter: the ``Drafter``.
        requests: its running sequences by vLLM's request ids.
        counts: what was done so far.

    Raises:
        SssdError: an option, the datastore or the cost curve cannot be used.
    """

    def __init__(self, vllm_config: Any) -> None:
        model = vllm_config.model_config
        extra = vllm_config.additional_config
        given = extra.get("sssd") if isinstance(extra, Mapping) else None
        self.options = Options.read("SSSD_VLLM", given)
        self.k = int(vllm_config.speculative_config.num_speculative_tokens)
        self._max_length = int(model.max_model_len)
        self._vocab_size = int(model.get_vocab_size())
        self._model = model
        self._is_first = _is_first_rank()
        if not self._is_first:
            self.options = replace(self.options, datastore=None)
        self.drafter = self.options.drafter(
            self._datastore(), vocab_size=self._vocab_size, end_token_ids=_end_tokens(model)
        )
        if self.options.datastore == MINI:
            attach(self.drafter, self._load_tokenizer)
        self.requests = self._new_requests()
        self.counts = Counts()
        self._metrics = Metrics(self.drafter)
        self._rule: SizingRule | None = None
        self._rows = int(getattr(vllm_config.scheduler_config, "max_num_seqs", 64))
        self._out = DraftBatch(self._rows, self._rows * self.k)
        self._step: _Step | None = None
        self._draft_seconds = 0.0
        _watch_runner()

    def load_model(self, *_args: Any, **_options: Any) -> None:
        """Called by vLLM; there is no model to load."""

    def _new_requests(self) -> Requests:
        commit_tokens, keep_policies = self.options.commit_tokens, self.options.keep_policies
        if commit_tokens or keep_policies is not None:
            return Rollouts(self.drafter, commit_tokens=commit_tokens, keep_policies=keep_policies)
        return Requests(self.drafter)

    def clear(self) -> None:
        """Forgets all requests and all that was learned."""
        self.requests.clear()
        self.drafter.clear()

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for the rows of a batch.

        Args:
            sampled_token_ids: of each row what was sampled; nothing for rows whose prompt is not read yet.
            num_tokens_no_spec: integers [rows or more], tokens of each row so far.
            token_ids_cpu: integers [rows or more, width], these tokens.
            slot_mappings: not looked at.

        Returns:
            Of each row at most k tokens.
        """
        started = time.perf_counter()
        step, self._step = self._step, None
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        try:
            if self._is_first:
                self._propose(step, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, drafts, started)
        except Exception:
            self._give_up()
            drafts = [[] for _ in sampled_token_ids]
        self._draft_seconds = time.perf_counter() - started
        self.counts.steps += 1
        self.counts.drafted += sum(map(len, drafts))
        self.counts.seconds += self._draft_seconds
        if self.counts.steps % EVERY == 0:
            self._metrics.update(self.counts)
        return drafts

    def _propose(
        self,
        step: "_Step | None",
        sampled: Sequence[Sequence[int]],
        lengths: Any,
        table: Any,
        drafts: list[list[int]],
        now: float,
    ) -> None:
        known, longest = self.requests, self._max_length
        states: Mapping[str, Any] = step.states if step else {}
        names = step.names if step else [f"row {place}" for place in range(len(sampled))]
        running = states if step else names
        ended = [name for name in known if name not in running]
        counts = lengths[: len(sampled)].tolist()
        if step and self.options.stop:
            self._observe(step, names, sampled, counts, now)
        ids: list[str | None] = [None] * len(sampled)
        rows: list[Any] = [()] * len(sampled)
        for place, (tokens, length) in enumerate(zip(sampled, counts, strict=True)):
            if not tokens or length + 1 >= longest:
                continue
            name = names[place]
            if name not in known and _extra(states.get(name)).get("sssd_off"):
                continue
            ids[place], rows[place] = name, table[place, :length]
        self.counts.ended += len(ended)
        prompts = step.prompts if step else lengths
        batch = self._draft(ids, rows, prompts, ended, states)
        if batch is None:
            return
        chains, start = batch.token_ids.tolist(), 0
        for place, end in enumerate(batch.offsets.tolist()[1:]):
            if end > start:
                drafts[place] = chains[start : min(end, start + longest - 1 - counts[place])]
                start = end

    def _draft(
        self,
        ids: list[str | None],
        rows: list[Any],
        prompts: Any,
        ended: list[str],
        states: Mapping[str, Any],
    ) -> DraftBatch | None:
        limits: dict[str, Any] = {"min_prob": self.options.min_prob}
        if self.options.stop and self._rule is not None:
            limits = {"rule": self._rule}
        if len(ids) > self._rows:
            self._rows = 2 * len(ids)
            self._out = DraftBatch(self._rows, self._rows * self.k)
        try:
            return self.requests.step(
                ids,
                max_nodes=self.k,
                rows=rows,
                prompt_lengths=prompts,
                options=lambda name: self._begin_options(states.get(name)),
                ended=ended,
                learn=self.options.learn,
                shape="chain",
                out=self._out,
                **limits,
            )
        except BatchError as some:
            logger.debug("sssd: some requests go on without drafts: %s", some)
            return some.batch

    def _observe(
        self,
        step: "_Step",
        names: Sequence[str],
        sampled: Sequence[Sequence[int]],
        lengths: list[int],
        now: float,
    ) -> None:
        """Tells the rule what the pass that is over has cost, and what it brought."""
        if self._rule is None:
            self._rule = SizingRule(first_curve(self.options.curve, step.runner), max_nodes=self.k)
        output = step.output
        drafts, scheduled = output.scheduled_spec_decode_tokens, output.num_scheduled_tokens
        requests, nodes, longest, tokens, context = 0, 0, 0, 0, 0
        for name, produced, length in zip(names, sampled, lengths, strict=False):
            drafted = len(drafts.get(name, ()))
            longest = max(longest, drafted)
            if produced and scheduled.get(name) == 1 + drafted:
                requests, nodes, tokens = requests + 1, nodes + drafted, tokens + len(produced)
                context += length
        if requests:
            self._rule.observe(
                batch=requests,
                size=nodes if self._rule.curve.packed else longest,
                context=context / requests,
                seconds=None if step.started is None else now - step.started,
                tokens=tokens,
                draft_seconds=self._draft_seconds,
                prefill_tokens=max(0, int(output.total_num_scheduled_tokens) - requests - nodes),
            )

    def _begin_options(self, state: Any) -> dict[str, Any]:
        """What a request that has not been seen is begun with."""
        extra, params = _extra(state), getattr(state, "sampling_params", None)
        adapter = getattr(state, "lora_request", None)
        if isinstance(text := extra.get("sssd_prediction"), str):
            extra = {**extra, "sssd_prediction": self._tokens(text)}
        policy = extra.get("sssd_policy")
        if isinstance(self.requests, Rollouts) and isinstance(policy, int) and policy > self.requests.policy:
            self.requests.policy = policy
        options = request_options(extra, adapter.lora_name if adapter else "")
        options["max_length"] = self._max_length
        prompt, most = getattr(state, "num_prompt_tokens", None), getattr(params, "max_tokens", None)
        if prompt is not None and most is not None:
            options["max_length"] = min(self._max_length, int(prompt) + int(most))
        if getattr(params, "ignore_eos", False):
            options["end_token_ids"] = []
        elif stops := getattr(params, "stop_token_ids", None):
            own = {*self.drafter.end_token_ids.tolist(), *stops}
            options["end_token_ids"] = sorted(token for token in own if 0 <= token < self._vocab_size)[:256]
        return options

    def _tokens(self, prediction: str) -> list[int]:
        """The tokens of a prediction; none where they cannot be had."""
        try:
            found = self._tokenizer(prediction[:MOST_PREDICTED], add_special_tokens=False)
            ids: list[int] = found["input_ids"]
        except Exception as problem:
            logger.warning("sssd: a prediction is left out: %s", problem)
            return []
        return ids

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return self._load_tokenizer()

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            self._model.tokenizer or self._model.model,
            revision=getattr(self._model, "tokenizer_revision", None),
            trust_remote_code=bool(getattr(self._model, "trust_remote_code", False)),
        )

    def _datastore(self) -> Datastore | None:
        held = self.options.datastore
        if held is None or held == MINI:
            return None
        from sssd.datastore import check_tokenizer

        paths = [Path(path) for path in ([held] if isinstance(held, str) else held)]
        store = Datastore.open(paths, load=self.options.load)
        if any(file.fingerprint is not None for file in store.info.files):
            check_tokenizer(store, self._tokenizer)
        return store

    def _give_up(self) -> None:
        """Goes on without what was known of the running requests, which may be what failed."""
        if self.counts.failed == 0:
            logger.exception("sssd: a step goes without drafts; later failures are counted, not logged")
        self.counts.failed += 1
        self.requests = self._new_requests()


@dataclass
class _Step:
    """What the runner knows of the pass that is over."""

    runner: Any
    output: Any
    started: float | None

    @property
    def states(self) -> Mapping[str, Any]:
        """The state of each request that is not over; those that wait for memory among them."""
        states: Mapping[str, Any] = self.runner.requests
        return states

    @property
    def names(self) -> Sequence[str]:
        names: Sequence[str] = self.runner.input_batch.req_ids
        return names

    @property
    def prompts(self) -> Any:
        """Tokens of each row that are its prompt, integers [rows or more]."""
        return self.runner.input_batch.num_prompt_tokens


def _watch_runner() -> None:
    """Has the model runner tell its proposer of each step: whose the rows are, and when the pass began.

    ``custom_class`` is handed rows without names. Where the runner is another than is known, rows are told
    apart by their place and contents.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    inner = getattr(GPUModelRunner, "propose_draft_token_ids", None)
    execute = getattr(GPUModelRunner, "execute_model", None)
    if inner is None or getattr(inner, "is_watched", False):
        return

    @functools.wraps(inner)
    def propose(self: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        if isinstance(self.drafter, Proposer):
            step = _Step(self, scheduler_output, getattr(self, "_sssd_started", None))
            self.drafter._step = step if _is_known(step) else None
        return inner(self, scheduler_output, *args, **options)

    propose.is_watched = True  # type: ignore[attr-defined]
    GPUModelRunner.propose_draft_token_ids = propose
    if execute is not None:

        @functools.wraps(execute)
        def timed(self: Any, *args: Any, **options: Any) -> Any:
            self._sssd_started = time.perf_counter()
            return execute(self, *args, **options)

        GPUModelRunner.execute_model = timed


def _is_known(step: _Step) -> bool:
    """Whether the runner has what a step is read from."""
    parts = (
        (step.runner, ("requests", "input_batch")),
        (getattr(step.runner, "input_batch", None), ("req_ids", "num_prompt_tokens")),
        (step.output, ("total_num_scheduled_tokens", "num_scheduled_tokens", "scheduled_spec_decode_tokens")),
    )
    return all(hasattr(part, name) for part, names in parts for name in names)


def _is_first_rank() -> bool:
    """Whether this worker's drafts are those that the scheduler takes: the others' are never looked at."""
    try:
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        return int(get_tensor_model_parallel_rank()) == 0
    except (ImportError, AssertionError):
        return True


def _extra(state: Any) -> Mapping[str, Any]:
    """The request's own settings."""
    extra = getattr(getattr(state, "sampling_params", None), "extra_args", None)
    return extra if isinstance(extra, Mapping) else {}


def _end_tokens(model: Any) -> list[int]:
    """The tokens that end this model's texts."""
    found: set[int] = set()
    configs = [getattr(model, "hf_text_config", None), getattr(model, "hf_config", None)]
    try:
        configs.append(model.try_get_generation_config())
    except Exception as problem:
        logger.debug("sssd: no generation config: %s", problem)
    for config in configs:
        values = config if isinstance(config, Mapping) else vars(config) if config is not None else {}
        held = values.get("eos_token_id")
        found.update([held] if isinstance(held, int) else held if isinstance(held, list | tuple) else [])
    vocab_size = int(model.get_vocab_size())
    return sorted(int(token) for token in found if isinstance(token, int) and 0 <= token < vocab_size)
