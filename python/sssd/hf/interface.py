"""The tree kernel as transformers' attention: passes on fixed buffers by any model's own modules.

transformers lets a model's modules look up their attention by name. While a pass runs here, that name is
ours: queries, keys and values go to :func:`sssd.hf.kernels.attention.tree_attention`, with the trees from a
context variable, and the cache writes to fixed buffers by lengths on the device. So no shape depends on a
length, and the model's ``forward`` can be recorded, whatever else it does.

It is taken only if such a pass over a small tree has given what the model's own forward gives, on the model
as it is now.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sssd.hf import kernels
from sssd.hf.compare import NotKnown, as_kernels_read, check_choices, compare
from sssd.hf.contract import forward
from sssd.hf.kernels.tree import Tree
from sssd.hf.static import StaticStore
from sssd.hf.verify import TREE, AttentionMasks, TreeCache, implementation_of

_IGNORED = {
    *("dropout", "is_causal", "sliding_window", "position_ids", "cache_position", "position_embeddings"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("cache", "past_key_values", "logits_to_keep"),
}
"""What attention functions are told beside, and what a pass in evaluation mode needs none of: windows are
those of the masks."""

_logger = logging.getLogger(__name__)


class _Attention:
    """What attention functions do while a pass runs.

    Args:
        tree: The trees of the pass.
        windows: Sliding windows by where the masks lie that stand for them.
    """

    def __init__(self, tree: Tree, windows: dict[int, int | None]) -> None:
        self.tree, self.windows = tree, windows

    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Any = None,
        **options: Any,
    ) -> tuple[Any, None]:
        from sssd.hf.kernels.attention import tree_attention

        unknown = {name for name, given in options.items() if given is not None} - _IGNORED
        if unknown:
            raise NotKnown(f"its attention takes {', '.join(sorted(unknown))}")
        place = None if mask is None else mask.untyped_storage().data_ptr()
        if place not in self.windows:
            raise NotKnown("its layers change the mask")
        if (
            key.shape != value.shape
            or key.stride() != value.stride()
            or key.stride()[2:] != (key.shape[3], 1)
        ):
            raise NotKnown("its attention does not look at what is cached")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        queries = query if query.stride(3) == 1 else query.contiguous()
        mixed = tree_attention(queries, key, value, self.tree, scale, self.windows[place], softcap, s_aux)
        return mixed, None


_running: ContextVar[_Attention | None] = ContextVar("sssd_tree", default=None)


def _register(name: str) -> None:
    """Makes our attention known under a name; who meets it in another thread gets the one it stands for."""

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        running = _running.get()
        if running is not None:
            return running(query, key, value, attention_mask, **options)
        if name == "eager":
            own = sys.modules[type(module).__module__].eager_attention_forward
        else:
            own = ALL_ATTENTION_FUNCTIONS[name]
        return own(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(TREE + name, attend)
    AttentionMaskInterface.register(TREE + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


for _name in ("sdpa", "eager"):
    _register(_name)


class _PassCache(TreeCache):
    """The cache of a running pass: states go to a store. Says nothing of lengths, which the device knows."""

    def __init__(self, store: StaticStore, batch: int) -> None:
        super().__init__(batch)
        self._store = store

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> Any:
        return self._store.update(key_states, value_states, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class ModelPass:
    """Runs verify passes of one model by its own modules, on fixed buffers.

    Args:
        model: A model that :func:`sssd.hf.contract.check_model` lets pass.

    Raises:
        NotKnown: It cannot be run so, or gives something else then.
    """

    def __init__(self, model: Any) -> None:
        # the model is the key by which this is found, and must not be kept alive by it
        self._model = ref(model)
        self.device, self.dtype = model.device, model.dtype
        self.by_kernels = True
        self.stores: list[Any] = []
        self._lock = RLock()
        if len({weight.device for weight in model.parameters()}) != 1:
            raise NotKnown("it is spread over devices")
        windows = AttentionMasks(model).windows
        self._per_kind = isinstance(windows, dict)
        self._windows = windows if isinstance(windows, dict) else {"": windows}
        form = self.dtype if implementation_of(model.config) == "eager" else torch.bool
        with torch.inference_mode(False):
            self._signs = {kind: torch.zeros(1, dtype=form, device=self.device) for kind in self._windows}
        check_choices(*compare(model, self._run, (11,))[0], self.dtype)

    @property
    def model(self) -> Any:
        """The model, while it is in use."""
        return self._model()

    def _run(self, ids: Any, positions: Any, cache: TreeCache, *shape: Any) -> Any:
        tree, held = as_kernels_read(cache, *shape)
        parts, _, self.kv_heads, slots, self.head_dim = held.shape
        self.layer_count = parts // 2
        reason = kernels.why_not(self.device, held.dtype, self.head_dim)
        if reason is not None:
            raise NotKnown(reason)
        # how large logits are is not known before
        self.vocab_size = 0
        store = StaticStore(self, 1, slots, record=lambda function: function)
        store.stack.copy_(held)
        store.begin(tree.lengths, ids.shape[1], slots)
        with kernels.on(self.device):
            logits = self.tree_pass(ids, positions, tree, store)
        if held.dtype != self.dtype or logits.dtype != self.dtype:
            raise NotKnown("its states or logits are of another type than its weights")
        self.vocab_size = logits.shape[-1]
        return logits

    def tree_pass(self, ids: Any, positions: Any, tree: Tree, store: StaticStore, out: Any = None) -> Any:
        """As :meth:`sssd.hf.fast.FastPass.tree_pass`."""
        batch, count = ids.shape
        signs = {kind: sign.expand(batch, 1, count, count) for kind, sign in self._signs.items()}
        places = {sign.data_ptr(): self._windows[kind] for kind, sign in self._signs.items()}
        # one pass at a time: it changes what the modules look up
        with self._lock, _looked_up(self.model):
            token = _running.set(_Attention(tree, places))
            try:
                logits = self(ids, positions, store, signs if self._per_kind else signs[""])
            finally:
                _running.reset(token)
        return logits if out is None else out.copy_(logits.flatten(0, 1)).view(batch, count, -1)

    def __call__(self, ids: Any, positions: Any, store: StaticStore, mask: Any) -> Any:
        """As :meth:`sssd.hf.fast.FastPass.__call__`, on the buffers of a store."""
        return forward(self.model, ids, mask, positions, _PassCache(store, len(ids)))


@contextmanager
def _looked_up(model: Any) -> Iterator[None]:
    """Has a model's modules look up our attention."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation_internal) for config in configs]
    try:
        for config, name in before:
            if name in ("sdpa", "eager"):
                config._attn_implementation_internal = TREE + name
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


_kept: "WeakKeyDictionary[Any, tuple[Any, ModelPass | None]]" = WeakKeyDictionary()


def model_pass(model: Any) -> ModelPass | None:
    """How a model's own modules run on fixed buffers, made and checked when it is new; None if they cannot.

    The reason is logged once for each state of the model, at level INFO.
    """
    if model.device.type not in kernels.DEVICES:
        return None
    state = _state(model)
    known = _kept.get(model)
    if known is None or known[0] != state:
        try:
            known = state, ModelPass(model)
        except Exception as error:
            known = state, None
            _log(model, error)
        _kept[model] = known
    return known[1]


def give_up_kernels(model: Any, reason: str) -> None:
    """Takes the kernels from a model for as long as it stays as it is."""
    _log(model, reason)
    _kept[model] = _state(model), None


def _log(model: Any, reason: object) -> None:
    _logger.info("%s: verified without fixed buffers: %s", type(model).__name__, reason)


def _state(model: Any) -> list[Any]:
    """What a recording of the model's modules is bound to, beside the contents of tensors."""
    plain: tuple[type, ...] = (bool, int, float, str, type(None), FunctionType)
    state: list[Any] = []
    settings: Callable[[Any], Any] = lambda thing: [  # noqa: E731
        (name, value)
        for name, value in vars(thing).items()
        if isinstance(value, plain) and name != "_attn_implementation_internal"
    ]
    for path, module in model.named_modules():
        # the model itself keeps account of other things
        state.append((path, type(module).forward, id(module), settings(module) if path else None))
    state.append([(tensor.data_ptr(), tensor.dtype) for tensor in (*model.parameters(), *model.buffers())])
    state.append([settings(config) for config in (model.config, model.config.get_text_config(decoder=True))])
    state.append(implementation_of(model.config.get_text_config(decoder=True)))
    return state
