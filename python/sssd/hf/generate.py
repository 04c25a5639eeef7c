"""Generation with draft trees: the target model's own output in fewer forward passes."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from sssd._core import Drafter, SizingRule
from sssd.errors import InvalidArgumentError, UnsupportedModelError
from sssd.hardware.curve import CostCurve
from sssd.hf.contract import Call, LoopSignature, cache_argument, warn_once, why_not
from sssd.hf.corpus import attach_mini, compare_tokenizer, open_datastore
from sssd.hf.decoder import Decoder
from sssd.hf.profile import rule_of
from sssd.mini import MINI

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


@dataclass(frozen=True)
class _Options:
    """What of a call is sssd's own; see :func:`generate`."""

    drafter: Any
    max_nodes: int | None
    cost: CostCurve | None
    fast_path: bool
    on_unsupported: str
    datastore: Any
    check_tokenizer: bool

    def __post_init__(self) -> None:
        nodes, cost = self.max_nodes, self.cost
        if nodes is not None and (not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 0):
            raise InvalidArgumentError(f"max_nodes must be an integer >= 0, not {nodes!r}")
        if cost is not None and not isinstance(cost, CostCurve):
            raise InvalidArgumentError(f"cost must be a sssd.hardware.CostCurve, not {type(cost).__name__}")
        if cost is not None and nodes is not None:
            raise InvalidArgumentError("give max_nodes or cost, not both")
        if self.drafter is not None and self.datastore not in (None, MINI):
            raise InvalidArgumentError("give drafter or datastore, not both; a drafter can hold a datastore")
        if self.on_unsupported not in ("fallback", "raise"):
            raise InvalidArgumentError(
                f"on_unsupported must be 'fallback' or 'raise', not {self.on_unsupported!r}"
            )


def generate(
    model: Any,
    input_ids: Any = None,
    drafter: Any = None,
    *,
    max_nodes: int | None = None,
    cost: CostCurve | None = None,
    fast_path: bool = True,
    on_unsupported: Literal["fallback", "raise"] = "fallback",
    datastore: Any = MINI,
    check_tokenizer: bool = True,
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
    distribution is exact. Random numbers come from torch's global generator of the device, as
    ``model.generate`` would draw them: the same seed gives the same tokens, for a batch as for one row,
    whatever was drafted.

    What cannot be verified losslessly (``docs/verification.md`` has the list) is decoded by transformers' own
    loop, with one warning that gives the reason.

    Args:
        model: A transformers model, with the text that it continues drafted where it is decoder-only, with
            eager or sdpa attention.
        input_ids: Int64 [B, L] prompt tokens, padded on the left with ``attention_mask`` given as usual.
        drafter: An ``sssd.Drafter``; by default a new one for this call. Tokens that it proposes outside the
            model's vocabulary are left out.
        max_nodes: Nodes of each row's draft tree; 0 decodes without drafts. By default each step's trees are
            as large as pays by the times of verify passes on this machine (``docs/hardware.md``), and nothing
            is drafted where nothing pays.
        cost: Those times. By default what ``python -m sssd profile`` measured for the model on this machine,
            or an estimate; corrected by the times of steps in any case. Not together with ``max_nodes``.
        fast_path: Whether verify passes of known models may run on sssd's own code (``sssd.hf.fast``), which
            on a CPU holds a second, reordered copy of the weights.
        on_unsupported: ``"fallback"`` decodes what cannot be verified plainly, ``"raise"`` refuses it.
        datastore: A corpus to match as well, for a new drafter: a path, several paths, or an open
            ``sssd.Datastore``; None for none. By default the mini store (``docs/mini.md``) of the
            tokenizer.json beside the model, from when it is ready. No other together with ``drafter``, whose
            stores are its own.
        check_tokenizer: Whether ``datastore``, or those of ``drafter``, must have been built with the model's
            tokenizer: ``tokenizer``, if given, or the tokenizer.json beside the model. Without either,
            nothing is compared.
        generation_config: As in ``model.generate``.
        logits_processor: As in ``model.generate``. Called on the walk only, with each token's own prefix.
        stopping_criteria: As in ``model.generate``. Evaluated after every token; nothing follows a stop.
        streamer: As in ``model.generate``: one ``put`` per token, and ``end`` whatever happens. One with a
            method ``put_output(token_ids, accepted)`` is given verified output by that: int64 [B], and a list
            of B that says which had been drafted.
        **kwargs: Everything else that ``model.generate`` takes.

    Returns:
        Int64 [B, L + new tokens], or a :class:`GenerateResult` with ``return_dict_in_generate=True``; what
        ``model.generate`` returns where it decodes with beams or an encoder.

    Raises:
        InvalidArgumentError: ``max_nodes`` is not an integer >= 0, ``cost`` is no cost curve, both are given,
            ``on_unsupported`` is none of the two, or ``drafter`` comes with ``datastore``.
        VocabularyMismatchError: ``datastore``, or one of ``drafter``, holds another tokenizer's tokens.
        OSError, DatastoreError: ``datastore`` cannot be opened.
        UnsupportedModelError: The call cannot be verified and ``on_unsupported`` is ``"raise"``.
    """
    options = _Options(drafter, max_nodes, cost, fast_path, on_unsupported, datastore, check_tokenizer)
    if hasattr(generation_config, "_eos_token_tensor"):  # transformers calls, everything is prepared
        return _decode(
            model,
            input_ids,
            options=options,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            **kwargs,
        )
    for name in {"cache", "past_key_values"} - {cache_argument(model)}:
        if name in kwargs:
            kwargs[cache_argument(model)] = kwargs.pop(name)
    inputs = [] if input_ids is None else [input_ids]
    if inputs and model.main_input_name in kwargs:  # the text goes beside a picture or sound
        kwargs["input_ids"] = inputs.pop()
    loop = partial(_decode, options=options)
    loop.__signature__ = LoopSignature.from_callable(loop)  # type: ignore[attr-defined]
    stream = _Stream(streamer)
    with stream:
        return model.generate(
            *inputs,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=None if streamer is None else stream,
            custom_generate=loop,
            **kwargs,
        )


generate.__signature__ = LoopSignature.from_callable(generate)  # type: ignore[attr-defined]


class _Stream:
    """A streamer that is ended whatever happens, or its reader would wait for ever."""

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.ended = streamer, streamer is None

    def put(self, value: Any) -> None:
        self.streamer.put(value)

    def put_output(self, value: Any, accepted: list[bool]) -> None:
        put = getattr(self.streamer, "put_output", None)
        if put is None:
            self.streamer.put(value)
        else:
            put(value, accepted)

    def end(self) -> None:
        self.ended = True
        self.streamer.end()

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.ended:
            self.end()


def _decode(
    model: Any,
    input_ids: Any,
    *,
    options: _Options,
    generation_config: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    streamer: Any = None,
    withheld: dict[str, Any] | None = None,
    **inputs: Any,
) -> Any:
    """The decoding loop, with arguments that ``model.generate`` has prepared."""
    names = ("tokenizer", "assistant_tokenizer", "assistant_model", "inputs_tensor")
    mode_inputs = {name: inputs.pop(name) for name in names if name in inputs}
    withheld = withheld or {}
    with _Stream(streamer or withheld.get("streamer")) as stream:
        call = Call(
            model=model,
            input_ids=input_ids,
            config=generation_config,
            processors=logits_processor,
            criteria=stopping_criteria,
            streamer=None if stream.streamer is None else stream,
            synced_gpus=bool(withheld.get("synced_gpus")),
            mode_inputs=mode_inputs,
            inputs=inputs,
        )
        reason = why_not(call)
        if reason is None:
            return _decode_with_drafts(call, options)
        message = f"{type(model).__name__} is decoded without drafts: {reason}"
        if options.on_unsupported == "raise":
            raise UnsupportedModelError(message)
        warn_once(type(model), message)
        output = call.decode_plainly()
    return _plain_result(output, input_ids) if type(output) is GenerateDecoderOnlyOutput else output


def _decode_with_drafts(call: Call, options: _Options) -> Any:
    with ExitStack() as stack:
        decoder = Decoder(call, stack, options.fast_path)
        rule = None
        if options.cost is not None:
            rule = SizingRule(options.cost)
        elif options.max_nodes is None:
            rule = rule_of(call.model, decoder.passes)
        store = options.datastore
        given = call.mode_inputs.get("tokenizer")
        if isinstance(options.drafter, Drafter) and options.check_tokenizer:
            compare_tokenizer(options.drafter.datastores.values(), call.model, given)
        is_mini = isinstance(store, str) and store == MINI
        if is_mini:
            store = None
        if store is not None:
            store = open_datastore(store, call.model, given, check_tokenizer=options.check_tokenizer)
        decoder.begin(options.drafter, stack, store)
        if is_mini and options.drafter is None and options.max_nodes != 0 and decoder.drafter is not None:
            attach_mini(decoder.drafter, call.model)
        decoder.run(options.max_nodes, rule)
        sequences, fields = decoder.result()
    if not call.config.return_dict_in_generate:
        return sequences
    cache = fields.pop("cache")
    return GenerateResult(sequences=sequences, **fields, **{_CACHE_FIELD: cache})


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
