"""The fast path: the decoder of known models, run on its own weights without their modules' overhead.

What it gains, all without changing what is computed but for the rounding of sums:

- On a CPU, weights reordered once for oneDNN's kernels. A product with one row then reads every weight once,
  and one with sixteen rows takes hardly longer; the kernels behind ``torch.nn.functional.linear`` take twice
  as long for two rows as for one in float32.
- Grouped-query attention without copies of keys and values: the query heads of a group lie along the query
  axis.
- One product for queries, keys and values, one for gate and up; one additive mask for all layers.

A model that is not known, or is changed by hooks, adapters or quantization, is decoded by its own
``forward``.
"""

import logging
import os
import weakref
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

from sssd.hf.verify import AttentionMasks, TreeCache, cache_argument

_KNOWN = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_PACKED_ROWS = 16
"""Rows that the reordering of weights is told to expect; good from 1 to 64."""

_logger = logging.getLogger(__name__)
_passes: "WeakKeyDictionary[Any, FastPass | str]" = WeakKeyDictionary()


class NotKnown(Exception):
    """The fast path does not fit the model; the message says why."""


def fast_pass(model: Any) -> "FastPass | None":
    """The fast path of a model, made and checked at first use; None where there is none.

    The reason is logged once per model, at level INFO.
    """
    known = _passes.get(model)
    if isinstance(known, FastPass) and known.is_current():
        return known
    if known is None or isinstance(known, FastPass):
        try:
            known = FastPass(model)
            known.check()
        except NotKnown as reason:
            known = str(reason)
            _logger.info("%s: verified by the model's own forward: %s", type(model).__name__, reason)
        _passes[model] = known
    return known if isinstance(known, FastPass) and known.is_current() else None


class _Linear:
    """Products with the weights of one or more ``nn.Linear`` that take the same input."""

    def __init__(self, modules: list[nn.Linear], packed: bool) -> None:
        self.modules = modules
        self.packed: Any = None
        self.bias: Any = None
        if packed:
            weight = (
                torch.cat([module.weight for module in modules]) if len(modules) > 1 else modules[0].weight
            )
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_ROWS)
            if any(module.bias is not None for module in modules):
                parts = [
                    module.weight.new_zeros(module.out_features) if module.bias is None else module.bias
                    for module in modules
                ]
                self.bias = torch.cat(parts).detach()

    def __call__(self, x: Any) -> Any:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        if len(self.modules) == 1:
            return linear(x, self.modules[0].weight, self.modules[0].bias)
        return torch.cat([linear(x, module.weight, module.bias) for module in self.modules], dim=-1)


class _Layer:
    """One decoder layer's parts."""

    def __init__(self, layer: Any, packed: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.qkv = _Linear([attention.q_proj, attention.k_proj, attention.v_proj], packed)
        self.out = _Linear([attention.o_proj], packed)
        self.gate_up = _Linear([mlp.gate_proj, mlp.up_proj], packed)
        self.down = _Linear([mlp.down_proj], packed)
        self.activation = mlp.act_fn
        self.scaling = attention.scaling


class FastPass:
    """Runs verify passes of one model.

    Args:
        model: A Hugging Face model.

    Raises:
        NotKnown: Its class, weights, options or device are not those that this path was written for.
    """

    def __init__(self, model: Any) -> None:
        self._refuse(model)
        config, decoder = model.config, model.model
        # the model is the key by which this is found, and must not be kept alive by it
        self._model = weakref.ref(model)
        self.rotary, self.final_norm = decoder.rotary_emb, decoder.norm
        self.embedding = decoder.embed_tokens
        first = decoder.layers[0].self_attn
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = first.head_dim
        weight = self.embedding.weight
        self.dtype, self.device = weight.dtype, weight.device
        self.packed = _should_pack(model)
        self._stamps = _stamps(model)
        try:
            with torch.no_grad():
                self.layers = [_Layer(layer, self.packed) for layer in decoder.layers]
                self.head = _Linear([model.lm_head], self.packed)
        except (AttributeError, RuntimeError, NotImplementedError) as error:
            raise NotKnown(f"its weights cannot be prepared ({error})") from None
        # in lower precisions the models round between the two factors, and the tokens should be theirs
        self.stores: list[Any] = []
        self._plain_norm = self.dtype == torch.float32 and hasattr(self.final_norm, "variance_epsilon")

    @property
    def model(self) -> Any:
        """The model, while it is in use."""
        return self._model()

    @staticmethod
    def _refuse(model: Any) -> None:
        name = type(model).__name__
        if name not in _KNOWN or not type(model).__module__.startswith("transformers.models."):
            raise NotKnown(f"{name} is not one of {', '.join(sorted(_KNOWN))}")
        config = model.config
        if config._attn_implementation != "sdpa":
            raise NotKnown("its attention is not sdpa")
        if len(set(getattr(config, "layer_types", None) or ())) > 1:
            raise NotKnown("it mixes kinds of attention")
        if model.training:
            raise NotKnown("it is in training mode")
        if getattr(model, "hf_device_map", None) or getattr(model, "_tp_plan_applied", False):
            raise NotKnown("it is spread over devices")
        weights = list(model.parameters())
        if (
            len({(weight.dtype, weight.device) for weight in weights}) != 1
            or not weights[0].is_floating_point()
        ):
            raise NotKnown("its weights differ in type or device")
        if weights[0].device.type not in ("cpu", "cuda"):
            raise NotKnown(f"its device is {weights[0].device.type}")
        for path, module in model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                raise NotKnown(f"{path or name} has hooks or a forward of its own")
            if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
                raise NotKnown(f"{path} is a {type(module).__name__}")
            if hasattr(module, "parametrizations"):
                raise NotKnown(f"{path} is parametrized")

    def is_current(self) -> bool:
        """Whether the model still is as it was: same weights in the same places, no hooks since."""
        try:
            self._refuse(self.model)
        except NotKnown:
            return False
        return self._stamps == _stamps(self.model)

    def check(self) -> None:
        """Compares a pass over a small tree with the model's own forward.

        Raises:
            NotKnown: They differ by more than rounding.
        """
        vocab = self.embedding.num_embeddings
        tokens = torch.arange(1, 12, device=self.device)[None] * 7919 % vocab
        # two branches below the third token
        parents = [-1, 0, 1, 2, 3, 2, 5, 6, 4, 7, 9]
        mask = torch.zeros(1, 11, 11, dtype=torch.bool, device=self.device)
        depths = [0] * 11
        for i, parent in enumerate(parents):
            if parent >= 0:
                mask[0, i] = mask[0, parent]
                depths[i] = depths[parent] + 1
            mask[0, i, i] = True
        positions = torch.tensor([depths], device=self.device)
        masks, name = AttentionMasks(self.model), cache_argument(self.model)
        own, mine = TreeCache(1), TreeCache(1)
        pairs = []
        with torch.inference_mode():
            for cache in (own, mine):
                text = torch.arange(11, device=self.device)[None]
                self.model(input_ids=tokens, use_cache=True, position_ids=text, **{name: cache})
                cache.lengths = [11]
            for count in (1, 11):
                block = tokens[:, :count], positions[:, :count] + 11
                shape = mask[:, :count, :count], positions[:, :count]
                theirs = self.model(
                    input_ids=block[0],
                    attention_mask=masks.build(own, *shape),
                    position_ids=block[1],
                    use_cache=True,
                    **{name: own},
                ).logits
                ours = self(*block, mine, masks.build(mine, *shape, windows=False))
                pairs.append((ours.float(), theirs.float()))
        error = max(float((ours - theirs).norm() / theirs.norm().clamp(min=1e-9)) for ours, theirs in pairs)
        if not error < (1e-4 if self.dtype == torch.float32 else 5e-2):
            raise NotKnown(f"its logits differ from the model's own by {error:.1e}")

    def __call__(self, ids: Any, positions: Any, cache: Any, mask: Any) -> Any:
        """Logits [B, T, vocabulary] of T tokens of each row, whose keys and values are written to the cache.

        Args:
            ids: Int64 [B, T].
            positions: Int64 [B, T].
            cache: The rows' states, a :class:`TreeCache` or what updates like one. Its lengths stay as they
                are.
            mask: Bool [B, 1, T, S + T], True = attend, or None for one token that attends to everything.
        """
        batch, count = ids.shape
        group = self.heads // self.kv_heads
        additive = None
        if mask is not None:
            additive = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device)
            additive.masked_fill_(~mask, torch.finfo(self.dtype).min)
            additive = additive.repeat(1, 1, group, 1)
        hidden = self.embedding(ids)
        cos, sin = self.rotary(hidden, positions)
        cos, sin = cos[:, :, None], _signed(sin)[:, :, None]
        half = self.head_dim // 2
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(self._norm(layer.norm, hidden)).view(batch, count, -1, self.head_dim)
            queries_keys = qkv[:, :, : self.heads + self.kv_heads]
            if layer.q_norm is not None and layer.k_norm is not None:
                queries_keys = torch.cat(
                    [layer.q_norm(qkv[:, :, : self.heads]), layer.k_norm(queries_keys[:, :, self.heads :])],
                    dim=2,
                )
            queries_keys = queries_keys * cos + queries_keys.roll(half, -1) * sin
            keys, values = cache.update(
                queries_keys[:, :, self.heads :].transpose(1, 2),
                qkv[:, :, self.heads + self.kv_heads :].transpose(1, 2),
                index,
            )
            # a group's heads one after the other along the query axis
            queries = queries_keys[:, :, : self.heads].view(batch, count, self.kv_heads, group, self.head_dim)
            queries = queries.permute(0, 2, 3, 1, 4).reshape(
                batch, self.kv_heads, group * count, self.head_dim
            )
            mixed = scaled_dot_product_attention(
                queries, keys, values, attn_mask=additive, scale=layer.scaling
            )
            mixed = mixed.view(batch, self.kv_heads, group, count, self.head_dim).permute(0, 3, 1, 2, 4)
            hidden = hidden + layer.out(mixed.reshape(batch, count, -1))
            gate, up = layer.gate_up(self._norm(layer.mlp_norm, hidden)).chunk(2, dim=-1)
            hidden = hidden + layer.down(layer.activation(gate) * up)
        return self.head(self._norm(self.final_norm, hidden))

    def _norm(self, module: Any, x: Any) -> Any:
        if self._plain_norm:
            return rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)
        return module(x)


def _signed(sin: Any) -> Any:
    """The sine with its first half negated: ``rotate_half(x) * sin`` is ``x.roll(half) * signed``."""
    low, high = sin.chunk(2, dim=-1)
    return torch.cat([-low, high], dim=-1)


def _stamps(model: Any) -> list[tuple[int, int]]:
    """Where each weight lies and how often it was written to."""
    return [(weight.data_ptr(), weight._version) for weight in model.parameters()]


def _should_pack(model: Any) -> bool:
    """Whether to hold a second copy of the weights, in oneDNN's order."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size > available_bytes() // 2:
        _logger.info("%s: weights are not reordered, too little memory is free", type(model).__name__)
        return False
    return True


def available_bytes() -> int:
    """Memory that can still be had, as far as the system tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, AttributeError):
        return 1 << 62
