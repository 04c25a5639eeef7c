"""The fast path: the decoder of known models, run on its own weights without their modules' overhead.

What it gains, all without changing what is computed but for the rounding of sums:

- On a CPU, weights reordered once for oneDNN's kernels. A product with one row then reads every weight once,
  and one with sixteen rows takes hardly longer; the kernels behind ``torch.nn.functional.linear`` take twice
  as long for two rows as for one in float32.
- Grouped-query attention without copies of keys and values: the query heads of a group lie along the query
  axis.
- One product for queries, keys and values, one for gate and up; one additive mask for all layers.
- On a GPU with triton, :meth:`FastPass.tree_pass`: ten kernels a layer and no mask. The weights of those
  products then lie end to end, where the model's own modules go on using them.

It is taken only while every module, function and setting of the model is exactly what this code was written
for, and while reordered weights equal the model's own, bit for bit: all of that is looked at again in each
call. Whatever is not known, or fails, is decoded by the model's own ``forward``.
"""

import copy
import logging
import os
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention
from transformers import modeling_utils
from transformers.activations import ACT2FN, SiLUActivation

from sssd.hf import kernels
from sssd.hf.compare import NotKnown, as_kernels_read, check_choices, compare, distance
from sssd.hf.contract import has_hooks
from sssd.hf.kernels.tree import Tree
from sssd.hf.stock import functions, replaced
from sssd.hf.verify import AttentionMasks, TreeCache

_KNOWN = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
"""What their modules are called, after the name of the family."""
_ROPE_KINDS = {"default", "linear", "yarn", "llama3"}
"""Rotary embeddings whose frequencies do not depend on the length of the text."""
_SETTINGS = (bool, int, float, str, type(None))
"""Types of what modules are set by."""
_PACKED_ROWS = 16
"""Rows that the reordering of weights is told to expect; good from 1 to 64."""

_logger = logging.getLogger(__name__)


class _Kept:
    """What is remembered of a model from one call to the next."""

    def __init__(self) -> None:
        self.fast: FastPass | None = None
        self.failed: Any = None
        """The stamp of the model when its fast path failed."""
        self.logged: set[str] = set()


_kept: "WeakKeyDictionary[Any, _Kept]" = WeakKeyDictionary()


def fast_pass(model: Any) -> "FastPass | None":
    """The fast path of a model as it is now, made and checked when it is new; None where there is none.

    Each reason is logged once per model, at level INFO.
    """
    kept = _kept.setdefault(model, _Kept())
    try:
        structure = _structure(model)
    except Exception as reason:
        _log(model, f"verified by the model's own forward: {reason}")
        return None
    if kept.failed is not None and kept.failed == (structure, _Weights(model.parameters())):
        return None
    try:
        if kept.fast is not None and not kept.fast.is_current(structure):
            # before the next one is made: both copies of the weights may be too much
            kept.fast = None
        if kept.fast is None:
            fast = FastPass(model, structure)
            fast.check()
            kept.fast = fast
    except Exception as reason:
        give_up(model, str(reason) if isinstance(reason, NotKnown) else f"it cannot be prepared ({reason})")
    return kept.fast


def give_up(model: Any, reason: str) -> None:
    """Takes the fast path from a model for as long as it stays as it is."""
    _log(model, f"verified by the model's own forward: {reason}")
    kept = _kept.setdefault(model, _Kept())
    kept.fast = None
    try:
        kept.failed = _structure(model), _Weights(model.parameters())
    except Exception:
        kept.failed = None


def _log(model: Any, reason: str) -> None:
    kept = _kept.setdefault(model, _Kept())
    if reason not in kept.logged:
        kept.logged.add(reason)
        _logger.info("%s: %s", type(model).__name__, reason)


class _Weights:
    """Weights as they were: where they lie, how often torch wrote to them and, if ``hashed``, every bit.

    torch counts its own writes only: ``.data``, numpy views and other processes change weights behind it.
    """

    def __init__(self, weights: Iterable[Any], hashed: bool = False) -> None:
        self.weights = [weight.detach() for weight in weights]
        self.places = self._places()
        self.digests = self._digests() if hashed else None

    def _places(self) -> list[tuple[int, int]]:
        return [(w.data_ptr(), -1 if w.is_inference() else w._version) for w in self.weights]

    def _digests(self) -> list[bytes]:
        # as fast as the weights can be read; the hash leaves the GIL to the other threads
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return list(pool.map(_digest, self.weights))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Weights):
            return NotImplemented
        if self.digests is not None and other.digests is not None:
            return self.digests == other.digests
        return self.places == other.places

    __hash__ = None  # type: ignore[assignment]


def _digest(weight: Any) -> bytes:
    flat = weight.reshape(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_128_digest(flat)


class _Linear:
    """Products with the weights of one or more ``nn.Linear`` that take the same input.

    Args:
        modules: Those.
        packed: Whether to make a copy of the weights, in oneDNN's order.
        joined: Whether to lay the weights end to end, for one product.
    """

    def __init__(self, modules: list[nn.Linear], packed: bool, joined: bool = False) -> None:
        self.modules = modules
        self.packed: Any = None
        self.weight: Any = None
        self.bias: Any = None
        if joined and len(modules) > 1:
            self.weight, self.bias = _joined([m.weight for m in modules]), _joined([m.bias for m in modules])
            if self.bias is None and any(module.bias is not None for module in modules):
                self.weight = None
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
        if self.weight is not None:
            return linear(x, self.weight, self.bias)
        if len(self.modules) == 1:
            return linear(x, self.modules[0].weight, self.modules[0].bias)
        return torch.cat([linear(x, module.weight, module.bias) for module in self.modules], dim=-1)


def _joined(parts: list[Any]) -> Any:
    """One tensor of which the weights are parts from now on, one after the other; None where that cannot be.

    What is theirs stays theirs: parameters, values and memory taken. What was made of them before, by
    ``detach()`` say, keeps the old values.
    """
    if any(part is None for part in parts) or len(set(map(id, parts))) < len(parts):
        return None
    if any(part.is_inference() or not part.is_contiguous() for part in parts):
        return None
    ends = [part.data_ptr() + part.nbytes for part in parts]
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    storage = parts[0].untyped_storage()
    if all(
        part.data_ptr() == end and part.untyped_storage().data_ptr() == storage.data_ptr()
        for part, end in zip(parts[1:], ends[:-1], strict=True)
    ):
        # as an earlier call has left them
        return parts[0].detach().as_strided(shape, parts[0].stride())
    whole = torch.cat([part.detach() for part in parts])
    for part, place in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = place
    return whole


class _Layer:
    """One decoder layer's parts."""

    def __init__(self, layer: Any, packed: bool, joined: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.qkv = _Linear([attention.q_proj, attention.k_proj, attention.v_proj], packed, joined)
        self.out = _Linear([attention.o_proj], packed)
        self.gate_up = _Linear([mlp.gate_proj, mlp.up_proj], packed, joined)
        self.down = _Linear([mlp.down_proj], packed)
        self.activation = mlp.act_fn
        self.gates_by_silu = isinstance(mlp.act_fn, nn.SiLU | SiLUActivation)
        self.scaling = attention.scaling
        self.head_norms: Any = None
        if self.q_norm is not None and self.k_norm is not None:
            self.head_norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.variance_epsilon


class FastPass:
    """Runs verify passes of one model.

    Args:
        model: A Hugging Face model.
        structure: What :func:`_structure` says of it.

    Attributes:
        by_kernels: Whether :meth:`tree_pass` may be used.

    Raises:
        NotKnown: Its weights are not those that this path was written for.
    """

    def __init__(self, model: Any, structure: Any) -> None:
        config, decoder = model.config, model.model
        # the model is the key by which this is found, and must not be kept alive by it
        self._model = weakref.ref(model)
        self._made_of = structure
        self.rotary, self.final_norm = decoder.rotary_emb, decoder.norm
        self.embedding = decoder.embed_tokens
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = decoder.layers[0].self_attn.head_dim
        weight = self.embedding.weight
        self.dtype, self.device = weight.dtype, weight.device
        self.packed = _should_pack(model)
        self.vocab_size, self.layer_count = self.embedding.num_embeddings, len(decoder.layers)
        self.stores: list[Any] = []
        self.window: Any = AttentionMasks(model).windows
        reason = kernels.why_not(self.device, self.dtype, self.head_dim)
        self.by_kernels = reason is None and not self.packed
        if reason is not None and self.device.type in kernels.DEVICES:
            _log(model, f"without its own kernels ({reason})")
        # in lower precisions the models round between the two factors, and the tokens should be theirs
        self._plain_norm = self.dtype == torch.float32
        # what outlives a call must not be made of inference tensors, which nobody may write to afterwards
        with torch.inference_mode(False), torch.no_grad():
            self.layers = [_Layer(layer, self.packed, self.by_kernels) for layer in decoder.layers]
            self.head = _Linear([model.lm_head], self.packed)
        if self.by_kernels and self.device.type == "cuda":
            # the places where the weights were, which nothing else fits into
            torch.cuda.empty_cache()
        self._weights = self._as_they_are()

    @property
    def model(self) -> Any:
        """The model, while it is in use."""
        return self._model()

    def is_current(self, structure: Any = None) -> bool:
        """Whether the model still is as it was: modules, settings, and the weights that were copied."""
        if structure is None:
            try:
                structure = _structure(self.model)
            except NotKnown:
                return False
        return structure == self._made_of and self._as_they_are() == self._weights

    def _as_they_are(self) -> "list[int] | _Weights":
        # without a copy of the weights, new values are seen in the old places
        if not self.packed:
            return [weight.data_ptr() for weight in self.model.parameters()]
        products = [[layer.qkv, layer.out, layer.gate_up, layer.down] for layer in self.layers]
        modules = [module for part in [*chain.from_iterable(products), self.head] for module in part.modules]
        weights = [module.weight for module in modules]
        weights += [module.bias for module in modules if module.bias is not None]
        return _Weights(weights, hashed=True)

    def check(self) -> None:
        """Compares passes over small trees with the model's own forward.

        The formulas are compared in float32, on a small model of the same kind, to the rounding of sums; the
        model itself by its choices, which may differ where two tokens are as good within rounding.

        Raises:
            NotKnown: They differ by more.
        """
        twin = _twin(self.model)
        error = max(distance(*pair) for pair in FastPass(twin, None)._compare())
        if not error < 1e-5:
            raise NotKnown(f"the logits of a small model of its kind differ by {error:.1e}")
        for pair in self._compare():
            check_choices(*pair, self.dtype)
        if self.by_kernels:
            try:
                check_choices(*compare(self.model, self._run_tree, (11,))[0], self.dtype)
            except Exception as error:  # no compiler for their launchers, say
                self.by_kernels = False
                _log(self.model, f"without its own kernels ({error})")

    def _compare(self) -> list[tuple[Any, Any]]:
        masks = AttentionMasks(self.model)
        return compare(
            self.model,
            lambda ids, positions, cache, *shape: self(ids, positions, cache, masks.build(cache, *shape)),
        )

    def _run_tree(self, ids: Any, positions: Any, cache: TreeCache, *shape: Any) -> Any:
        tree, cache.stack = as_kernels_read(cache, *shape)
        with kernels.on(self.device):
            return self.tree_pass(ids, positions, tree, cache)

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

    def tree_pass(self, ids: Any, positions: Any, tree: Tree, store: Any, out: Any = None) -> Any:
        """The same by kernels that read the trees themselves. No shape depends on a length.

        Args:
            ids: Int64 [B, T].
            positions: Int64 [B, T].
            tree: The trees of the rows, T entries each.
            store: What has the cached keys and values: ``store.stack``, [2 * layers, B or more, key heads,
                slots, dim], those of each layer in turn. Those of the T tokens are written behind each row's
                prefix.
            out: Where to write the logits, [B * T, vocabulary]; by default a new tensor.
        """
        from sssd.hf.kernels.attention import tree_attention
        from sssd.hf.kernels.layers import add_norm, rope_and_write, silu_gate

        batch, count = ids.shape
        branch, hidden = self.embedding(ids), None
        cos, sin = (part.contiguous() for part in self.rotary(branch, positions))
        for index, layer in enumerate(self.layers):
            keys, values = store.stack[2 * index : 2 * index + 2, :batch]
            hidden, normed = add_norm(branch, hidden, layer.norm.weight, layer.norm.variance_epsilon)
            queries = rope_and_write(layer.qkv(normed), cos, sin, layer.head_norms, tree, keys, values)
            mixed = tree_attention(
                queries.transpose(1, 2), keys, values, tree, layer.scaling, window=self.window
            )
            weight, epsilon = layer.mlp_norm.weight, layer.mlp_norm.variance_epsilon
            hidden, normed = add_norm(layer.out(mixed.view(batch, count, -1)), hidden, weight, epsilon)
            gate_up = layer.gate_up(normed)
            if layer.gates_by_silu:
                gated = silu_gate(gate_up)
            else:
                gate, up = gate_up.chunk(2, dim=-1)
                gated = layer.activation(gate) * up
            branch = layer.down(gated)
        _, normed = add_norm(branch, hidden, self.final_norm.weight, self.final_norm.variance_epsilon)
        if out is None:
            return self.head(normed)
        head = self.head.modules[0]
        torch.mm(normed.flatten(0, 1), head.weight.t(), out=out)
        if head.bias is not None:
            out += head.bias
        return out.view(batch, count, -1)

    def _norm(self, module: Any, x: Any) -> Any:
        if self._plain_norm:
            return rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)
        return module(x)


def _signed(sin: Any) -> Any:
    """The sine with its first half negated: ``rotate_half(x) * sin`` is ``x.roll(half) * signed``."""
    low, high = sin.chunk(2, dim=-1)
    return torch.cat([-low, high], dim=-1)


def _structure(model: Any) -> Any:
    """Everything but weights that the model's output depends on, to be compared with another time's.

    Raises:
        NotKnown: It is not what this path was written for.
    """
    name, config = type(model).__name__, model.config
    if name not in _KNOWN:
        raise NotKnown(f"{name} is not one of {', '.join(sorted(_KNOWN))}")
    if config._attn_implementation != "sdpa":
        raise NotKnown("its attention is not sdpa")
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        raise NotKnown("it mixes kinds of attention")
    if getattr(config, "quantization_config", None) is not None or getattr(model, "hf_quantizer", None):
        raise NotKnown("it is quantized")
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        raise NotKnown("it has adapters")
    if model.training:
        raise NotKnown("it is in training mode")
    if getattr(model, "hf_device_map", None) or getattr(model, "_tp_plan_applied", False):
        raise NotKnown("it is spread over devices")
    if torch.is_autocast_enabled(model.device.type):
        raise NotKnown("autocast is on")
    if model.device.type not in ("cpu", "cuda"):
        raise NotKnown(f"its device is {model.device.type}")
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        raise NotKnown("hooks are registered for all modules")
    weights = list(model.parameters())
    if any(type(w) is not nn.Parameter or type(w.data) is not torch.Tensor for w in weights):
        raise NotKnown("its weights are no plain tensors")
    if len({(w.dtype, w.device) for w in weights}) != 1 or not weights[0].is_floating_point():
        raise NotKnown("its weights differ in type or device")
    code = replaced(map(type, model.modules()), config._attn_implementation)
    if code is not None:
        raise NotKnown(f"{code} is replaced")
    attend = modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
    parts = {f"{name.removesuffix('ForCausalLM')}{part}" for part in _PARTS}
    activation = ACT2FN[config.hidden_act]
    modules = []
    for path, module in model.named_modules():
        kind = type(module)
        of_family = kind.__name__ in parts and kind.__module__ == f"transformers.models.{_family(name)}"
        if not of_family and kind not in (nn.Linear, nn.Embedding, nn.ModuleList, type(activation)):
            raise NotKnown(f"{path or name} is a {kind.__name__}")
        if has_hooks(module) or "forward" in vars(module):
            raise NotKnown(f"{path or name} has hooks or a forward of its own")
        if set(module._buffers) - {"inv_freq", "original_inv_freq"}:
            raise NotKnown(f"{path or name} has buffers that are not known")
        settings = [(key, value) for key, value in vars(module).items() if isinstance(value, _SETTINGS)]
        if path:  # the model itself must not be kept alive, and keeps account of other things
            modules.append((path, module, kind.forward, settings))
    if model.model.rotary_emb.rope_type not in _ROPE_KINDS:
        raise NotKnown(f"its rotary embedding is {model.model.rotary_emb.rope_type}")
    return weights[0].dtype, weights[0].device, attend, functions(type(model)), modules


def _family(name: str) -> str:
    family = name.removesuffix("ForCausalLM").lower()
    return f"{family}.modeling_{family}"


def _twin(model: Any) -> Any:
    """A small model of the same kind with random weights, float32, on the CPU."""
    config = copy.deepcopy(model.config)
    small = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "pad_token_id": None,
    }
    for name, value in small.items():
        if value is None or hasattr(config, name):
            setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * 2)[:2]
    if getattr(config, "sliding_window", None):
        config.sliding_window = 6
    config._attn_implementation = "sdpa"
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        twin = type(model)(config).float().eval()
        for weight in twin.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.1, generator=generator)
    return twin


def can_reorder(dtype: Any) -> bool:
    """Whether this processor and this torch can reorder weights of a type."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), _PACKED_ROWS)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


def _should_pack(model: Any) -> bool:
    """Whether to hold a second copy of the weights, in oneDNN's order."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not can_reorder(weight.dtype):
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
