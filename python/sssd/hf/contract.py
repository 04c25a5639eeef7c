"""What transformers' ``generate`` hands to a decoding loop, and which of it can be verified.

Decoding is transformers' own contract: its ``generate`` prepares inputs, cache, processors and criteria and
calls a loop. :func:`why_not` says why a call cannot be decoded with draft trees, and
:meth:`Call.decode_plainly` runs the loop that ``generate`` itself would have chosen, on the same arguments.
"""

import inspect
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch.nn.modules import module as torch_module
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import (
    EosTokenCriteria,
    GenerationMixin,
    GenerationMode,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import logits_process as processors
from transformers.generation import utils as generation

from sssd.errors import UnsupportedModelError
from sssd.hf.probe import NEWEST_TESTED, mixes_tokens
from sssd.hf.stock import is_stock, replaced
from sssd.hf.verify import implementation_of

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
"""Processors without state that treat every row alike, whatever the others hold."""

_PLACED = {
    processors.EncoderNoRepeatNGramLogitsProcessor,
    processors.EncoderRepetitionPenaltyLogitsProcessor,
    processors.EpsilonLogitsWarper,
    processors.EtaLogitsWarper,
    processors.ExponentialDecayLengthPenalty,
    processors.ForcedBOSTokenLogitsProcessor,
    processors.ForcedEOSTokenLogitsProcessor,
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
    processors.NoBadWordsLogitsProcessor,
    processors.RepetitionPenaltyLogitsProcessor,
    processors.SequenceBiasLogitsProcessor,
    processors.SuppressTokensAtBeginLogitsProcessor,
    processors.TopHLogitsWarper,
    processors.TypicalLogitsWarper,
    processors.WatermarkLogitsProcessor,
}
"""Processors without state that are shown each row at its own place, for they may look up the row number."""

_ROWWISE_CRITERIA = {EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria}

_PREPARED = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prefill", "_sample")
"""Methods of the loop that a model may override, to do in them what a verify pass would leave out."""

_HARMLESS = {
    f"transformers.models.{place}.prepare_inputs_for_generation"
    for place in (
        "ctrl.modeling_ctrl.CTRLLMHeadModel",
        "gemma3.modeling_gemma3.Gemma3ForConditionalGeneration",
        "gemma4.modeling_gemma4.Gemma4ForConditionalGeneration",
        "gemma4_unified.modeling_gemma4_unified.Gemma4UnifiedForConditionalGeneration",
        "roc_bert.modeling_roc_bert.RoCBertForCausalLM",
    )
}
"""Overrides that do nothing to text."""

_CACHE_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", DynamicLayer)}
"""Layers that hold keys and values, or share those of another layer."""

_OURS = ("sssd.", "transformers.", "torch.", "peft.", "contextlib")
_warned: set[tuple[type, str]] = set()

_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose frequencies depend on the largest position of a pass."""


@dataclass
class Call:
    """A call of the decoding loop.

    Attributes:
        model: The model.
        input_ids: Int64 [B, L].
        config: The prepared ``GenerationConfig``.
        processors: A ``LogitsProcessorList``.
        criteria: A ``StoppingCriteriaList``.
        streamer: What ``put`` and ``end`` are called on, or None.
        synced_gpus: Whether the processes of a model spread by FSDP or ZeRO go on in step.
        mode_inputs: What only some decoding modes take: ``assistant_model``, ``tokenizer``,
            ``assistant_tokenizer``, ``inputs_tensor``.
        inputs: Everything else: what the model's ``forward`` takes.
    """

    model: Any
    input_ids: Any
    config: Any
    processors: Any
    criteria: Any
    streamer: Any = None
    synced_gpus: bool = False
    mode_inputs: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def end_ids(self) -> set[int]:
        """Tokens that end a row."""
        ends = (criterion for criterion in self.criteria if type(criterion) is EosTokenCriteria)
        return {token for criterion in ends for token in criterion.eos_token_id.tolist()}

    @property
    def other_criteria(self) -> StoppingCriteriaList:
        """What ends rows beside end tokens and the length."""
        plain = (EosTokenCriteria, MaxLengthCriteria)
        return StoppingCriteriaList(one for one in self.criteria if type(one) not in plain)

    @property
    def mode(self) -> GenerationMode:
        """How to decode: greedy, by sampling, with beams, ..."""
        return self.config.get_generation_mode(self.mode_inputs.get("assistant_model"))

    @property
    def cache(self) -> Any:
        """The prepared cache, or None."""
        return self.inputs.get(cache_argument(self.model))

    @property
    def user_cache(self) -> Any:
        """The cache, if the caller passed one."""
        return self.cache if getattr(self.cache, "_is_user_defined", False) else None

    @property
    def lengths(self) -> tuple[int, int]:
        """The length of the text with what a user's cache holds, and how many tokens of it are not there."""
        mask, given = self.inputs.get("attention_mask"), self.input_ids.shape[1]
        total = mask.shape[1] if mask is not None else getattr(self.config, "_mask_length", given)
        past = self.user_cache.get_seq_length() if self.user_cache is not None else 0
        # shorter than the mask, the ids are those beyond the cache
        return total, given - past if total == given else given

    def decode_plainly(self) -> Any:
        """Runs the loop that ``model.generate`` would have run."""
        mode, loop = self.mode, generation.GENERATION_MODES_MAPPING[self.mode]
        streamer = {} if self.streamer is None else {"streamer": self.streamer}
        self.model._validate_generation_mode(mode, self.config, {**self.mode_inputs, **streamer})
        if "/" in loop:  # moved out of transformers: says where to and how to call it
            self.model._get_deprecated_gen_repo(mode, False, None)
        method = getattr(type(self.model), loop)
        known = inspect.signature(method).parameters
        return method(
            self.model,
            self.input_ids,
            logits_processor=self.processors,
            stopping_criteria=self.criteria,
            generation_config=self.config,
            synced_gpus=self.synced_gpus,
            **streamer,
            **{name: value for name, value in self.mode_inputs.items() if name in known},
            **self.inputs,
        )


def forward(model: Any, ids: Any, mask: Any, positions: Any, cache: Any) -> Any:
    """Logits of a pass by the model itself, whose states go to ``cache``."""
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        return_dict=True,
        **{cache_argument(model): cache},
    ).logits


def cache_argument(model: Any) -> str:
    """The name under which the model's ``forward`` takes its cache: ``cache`` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class LoopSignature(inspect.Signature):
    """A signature by which a ``custom_generate`` function gets every argument of the call.

    transformers takes arguments of decoding modes (``tokenizer``, ``streamer``, ...) away before it looks at
    the function's signature, and drops them. While it looks, this puts them back: a tokenizer, or it would
    refuse stop strings, and under ``withheld`` those that cannot be passed by name.
    """

    @property
    def parameters(self) -> Any:
        """The parameters; for transformers' eyes with those of decoding modes."""
        named = super().parameters
        frame = sys._getframe(1)
        if frame.f_globals.get("__name__") != generation.__name__:
            return named
        names = ["tokenizer", "assistant_tokenizer", "assistant_model", "inputs_tensor", "withheld"]
        found, arguments = (frame.f_locals.get(name) for name in ("generation_mode_kwargs", "kwargs"))
        if frame.f_code.co_name == "_extract_generation_mode_kwargs" and isinstance(arguments, dict):
            found = dict(found or {})
            arguments["withheld"] = {name: found.pop(name, None) for name in ("streamer", "synced_gpus")}
            arguments |= found
        hidden = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        return {**named, **{parameter.name: parameter for parameter in hidden if parameter.name not in named}}


def warn_once(kind: type, message: str) -> None:
    """Warns the caller of sssd, once for each kind of model and message."""
    if (kind, message) not in _warned:
        _warned.add((kind, message))
        # past sssd and transformers, to whoever called either
        depth, frame = 2, sys._getframe(1)
        while frame.f_back is not None and frame.f_globals["__name__"].startswith(_OURS):
            depth, frame = depth + 1, frame.f_back
        warnings.warn(message, stacklevel=depth)


def why_not(call: Call) -> str | None:
    """Why a call cannot be decoded with draft trees; None if it can."""
    try:
        return (
            _why_not_mode(call) or why_not_model(call.model) or _why_not_inputs(call) or _why_not_rows(call)
        )
    except Exception as error:
        # whatever this model is like, transformers may know how to decode it
        return f"it cannot be examined ({type(error).__name__}: {error})"


def _why_not_mode(call: Call) -> str | None:
    config = call.config
    if call.mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"only greedy search and sampling can be drafted, not {call.mode.value.replace('_', ' ')}"
    if call.synced_gpus:
        return "synced_gpus is set"
    if config.output_attentions or config.output_hidden_states:
        return "output_attentions or output_hidden_states is asked for"
    return None


def check_model(model: Any) -> None:
    """Raises :class:`UnsupportedModelError` if the model cannot verify draft trees losslessly."""
    reason = why_not_model(model)
    if reason is not None:
        raise UnsupportedModelError(f"{type(model).__name__} cannot verify draft trees: {reason}")


def why_not_model(model: Any) -> str | None:
    """Why a model's passes cannot verify draft trees; None if they can."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return "encoder-decoder models are not supported"
    if getattr(config, "is_decoder", True) is False:
        return "its attention is bidirectional; set is_decoder=True in the config"
    if cannot_roll_back(model):
        return "it has recurrent layers, whose state cannot be rolled back"
    implementation = implementation_of(config)
    if implementation not in ("sdpa", "eager"):
        return (
            f"attention {implementation!r} cannot express a tree mask; "
            "call model.set_attn_implementation('sdpa') or 'eager' first"
        )
    parameters = inspect.signature(model.forward).parameters
    missing = {"attention_mask", "position_ids", cache_argument(model)} - parameters.keys()
    if missing or not getattr(model, "_supports_attention_backend", False):
        return (
            "it takes no 4D attention mask with explicit positions "
            f"(transformers {transformers.__version__}; tested with 5.18 to {NEWEST_TESTED})"
        )
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown or (
        getattr(config, "attention_chunk_size", None) is not None and not hasattr(config, "layer_types")
    ):
        kinds = ", ".join(sorted(unknown)) or "chunked_attention"
        return f"no tree mask is known for layers of type {kinds}"
    return _why_not_code(model)


def _why_not_code(model: Any) -> str | None:
    """Code of the model's own or of its user's that a pass over several tokens may not do justice to."""
    for name in _PREPARED:
        own, common = getattr(type(model), name, None), getattr(GenerationMixin, name, None)
        harmless = f"{type(model).__module__}.{getattr(own, '__qualname__', None)}" in _HARMLESS
        if name in vars(model) or (own is not common and not harmless):
            return f"{name} is overridden"
        if common is not None and not is_stock(own):
            return f"{name} is replaced"
    if model.training:
        return "it is in training mode"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "hooks are registered for all modules"
    quantized = getattr(model, "hf_quantizer", None) is not None
    for path, module in model.named_modules():
        if has_hooks(module):
            return f"{path or 'the model'} has forward hooks"
        forward = vars(module).get("forward")
        if forward is None or hasattr(forward, "_torchdynamo_orig_callable") or hasattr(module, "_hf_hook"):
            continue  # a class's own, a compiled one, one that moves states between devices
        if not (quantized and path):
            return f"{path or 'the model'} has a forward of its own"
    attention = implementation_of(model.config.get_text_config(decoder=True))
    code = replaced(map(type, model.modules()), attention)
    if code is not None:
        return f"{code} is replaced"
    if mixes_tokens(model, cache_argument(model)):
        return "its logits depend on what else is in a pass"
    return None


def has_hooks(module: Any) -> bool:
    """Whether a module has hooks around its ``forward``, but for those by which transformers looks on."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


def cannot_roll_back(model: Any) -> bool:
    """Whether the model has recurrent layers (state space, linear attention, short convolution).

    Their state mixes all tokens of a pass: siblings cannot share one, and a rejected draft stays in it.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ()
    return bool(getattr(model, "_is_stateful", False)) or any(
        kind == "linear_attention" or not kind.endswith("attention") for kind in kinds
    )


def _why_not_inputs(call: Call) -> str | None:
    cache, positions = call.cache, call.inputs.get("position_ids")
    if cache is None or call.inputs.get("use_cache") is False:
        return "it is decoded without a key-value cache"
    layers = {type(layer) for layer in getattr(cache, "layers", ())}
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        offloaded = " that is offloaded" if getattr(cache, "offloading", False) else ""
        return f"a {type(cache).__name__}{offloaded} cannot be verified in, only a DynamicCache"
    if call.user_cache is not None and layers - {DynamicLayer}:
        return "the cache passed drops states; pass DynamicCache() made without config, or nothing"
    if layers - _CACHE_LAYERS:
        kinds = ", ".join(sorted(kind.__name__ for kind in layers))
        return f"its cache holds more than keys and values ({kinds})"
    known = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position"}
    known.add(cache_argument(call.model))
    other = sorted(name for name, value in call.inputs.items() if name not in known and not _is_absent(value))
    if other:
        return f"there are inputs beside text: {', '.join(other)}"
    if call.lengths[1] <= 0:
        return "the prompt is empty, or in the cache as a whole"
    if positions is not None and positions.dim() != 2:
        return "its position ids have several dimensions"
    limit = frequency_limit(call.model)
    if limit is not None and (call.criteria.max_length is None or _last_position(call) + 1 >= limit):
        return f"its rotary frequencies depend on the length from {limit} tokens on"
    return None


def _is_absent(value: Any) -> bool:
    # an empty dict stands for no picture and no sound
    return value is None or (isinstance(value, dict) and not value)


def _last_position(call: Call) -> int:
    """The largest position that the call may reach."""
    positions, length = call.inputs.get("position_ids"), call.input_ids.shape[1]
    start = length - 1 if positions is None else int(positions.max())
    return start + max(0, call.criteria.max_length - length)  # type: ignore[no-any-return]


def _why_not_rows(call: Call) -> str | None:
    batch, config = call.input_ids.shape[0], call.config
    if batch == 1:
        return None
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        return "scores or logits of several rows are asked for"
    if call.user_cache is not None:
        return "a cache is passed for several rows"
    for kinds, found in (
        (_ROWWISE | _PLACED, call.processors),
        (_ROWWISE_CRITERIA, call.criteria),
    ):
        for one in found:
            if type(one) not in kinds:
                return (
                    f"{type(one).__name__} may have a state or look at other rows, "
                    "and the rows of a batch advance at different speeds"
                )
    return None


def must_stand_in_place(call: Call) -> bool:
    """Whether a processor may look up the row number."""
    return call.input_ids.shape[0] > 1 and any(type(one) in _PLACED for one in call.processors)


def frequency_limit(model: Any) -> int | None:
    """The length up to which rotary frequencies do not depend on it; None if they never do."""
    config = model.config.get_text_config(decoder=True)
    limits = []
    for parameters in _rope_parameters(config):
        if any(kind in str(parameters.get("rope_type")) for kind in _LENGTH_DEPENDENT):
            limits.append(int(config.max_position_embeddings))
            limits.append(int(parameters.get("original_max_position_embeddings") or limits[-1]))
    return min(limits, default=None)


def position_limit(model: Any) -> int | None:
    """The number of positions that a model has learned one by one; None for computed ones."""
    config = model.config.get_text_config(decoder=True)
    if _rope_parameters(config):
        return None
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """The rotary parameters of a config: one set, or one for each type of layers."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, Mapping):
        return []
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or [parameters]
