"""Whether a model's pass over several tokens gives what passes over single ones give.

Verification rests on that. transformers' own models are held to it by the tests, up to a version. Newer
ones may be written otherwise, and a quantized, wrapped or foreign model may mix the tokens of a pass, where
activations are scaled together, say; nothing shows it.
"""

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import transformers

from sssd.hf.verify import AttentionMasks, TreeCache

NEWEST_TESTED = "5.24"
_STOCK = ("torch.nn.modules.", "transformers.models.", "transformers.activations", "transformers.modeling_")
_probed: "WeakKeyDictionary[Any, tuple[Any, bool]]" = WeakKeyDictionary()


def mixes_tokens(model: Any, cache_argument: str) -> bool:
    """Whether the tokens of a pass change one another's logits, by an experiment that is made once.

    Args:
        model: A model that takes tree masks.
        cache_argument: The name under which its ``forward`` takes the cache.
    """
    modules = [type(module) for module in model.modules()]
    kinds = [type(weight.data) for weight in model.parameters()]
    tested = _version(transformers.__version__) <= _version(NEWEST_TESTED)
    stock = all(kind.__module__.startswith(_STOCK) for kind in modules) and set(kinds) <= {torch.Tensor}
    if tested and stock:
        return False
    known = _probed.get(model)
    if known is None or known[0] != (modules, kinds):
        known = (modules, kinds), not _agrees(model, cache_argument)
        _probed[model] = known
    return known[1]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _agrees(model: Any, cache_argument: str) -> bool:
    device = model.device
    rounding = torch.finfo(model.dtype).eps if model.dtype.is_floating_point else 1e-7
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    tokens = (torch.arange(1, 17, device=device) * 7919 % vocab_size)[None]
    # a chain, and beside it a branch that must not show
    width, chain = 8, 5
    tree = torch.eye(width, dtype=torch.bool, device=device)[None]
    tree[0, :chain, :chain] = torch.ones(chain, chain, dtype=torch.bool, device=device).tril()
    tree[0, chain:, 0] = True
    depths = torch.tensor([[*range(chain), *[1] * (width - chain)]], device=device)
    masks = AttentionMasks(model)

    def run(cache: TreeCache, ids: Any, tree: Any, depths: Any) -> Any:
        mask = masks.build(cache, tree, depths)
        positions = depths + cache.lengths[0]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, cache_argument: cache}
        return model(**inputs, use_cache=True).logits.float()

    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        caches = TreeCache(1), TreeCache(1)
        prefix = tokens[:, :width]
        for cache in caches:
            text = torch.arange(width, device=device)[None]
            model(input_ids=prefix, position_ids=text, use_cache=True, **{cache_argument: cache})
            cache.lengths = [width]
        together = run(caches[0], tokens[:, width:], tree, depths)[:, :chain]
        alone = []
        one, zero = tree[:, :1, :1], depths[:, :1]
        for index in range(width, width + chain):
            alone.append(run(caches[1], tokens[:, index : index + 1], one, zero))
            caches[1].commit(np.zeros(1, np.int64), np.array([0, 1]))
    apart = torch.cat(alone, dim=1)
    error = float((together - apart).norm() / apart.norm().clamp(min=1e-9))
    return error <= max(1e-4, 4 * rounding)
