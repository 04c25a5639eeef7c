"""Whether a model runs on torch's and transformers' own code, or on something put in its place."""

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any

import torch
import transformers
from torch.nn import functional
from transformers import modeling_utils

_FILES = tuple(f"{Path(package.__file__).parent}/" for package in (torch, transformers))
_FUNCTIONS = (
    "apply_rotary_pos_emb",
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "eager_attention_forward",
    "repeat_kv",
    "rotate_half",
)
"""What else of a family's module its layers are made of."""


def is_stock(function: Any) -> bool:
    """Whether a function, and what it is wrapped around, is written in torch's or transformers' files.

    A name would not tell: ``functools.wraps`` gives a replacement the name of what it replaces.
    """
    while function is not None:
        code = getattr(inspect.unwrap(function, stop=lambda f: hasattr(f, "__code__")), "__code__", None)
        if code is None or not code.co_filename.startswith(_FILES):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def replaced(kinds: Iterable[Any], attention: str) -> str | None:
    """What of transformers' or torch's code behind a model's layers has been replaced, if anything.

    Args:
        kinds: The classes of its modules. Those of others than torch and transformers are left alone.
        attention: Its implementation, ``"sdpa"`` or ``"eager"``.
    """
    for name in ("linear", "scaled_dot_product_attention"):
        if not isinstance(getattr(functional, name), BuiltinFunctionType):
            return f"torch.nn.functional.{name}"
    if attention == "sdpa" and not is_stock(modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]):
        return "transformers' sdpa attention"
    for kind in set(kinds):
        if not kind.__module__.startswith(("torch.nn.modules.", "transformers.models.")):
            continue
        if not (is_stock(kind.forward) and is_stock(kind.__call__)):
            return f"{kind.__name__}.forward"
        for name, function in functions(kind):
            if not is_stock(function):
                return f"{kind.__module__}.{name}"
    return None


def functions(kind: type) -> list[tuple[str, Any]]:
    """The functions that stand beside a class in its module, by name."""
    family = vars(sys.modules[kind.__module__])
    return [(name, family[name]) for name in _FUNCTIONS if name in family]
