"""Lossless speculative decoding for Hugging Face models: ``sssd.hf.generate``.

Needs torch and transformers: ``pip install 'sssd[hf]'``.
"""

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f"sssd.hf needs torch and transformers: pip install 'sssd[hf]' ({error})") from error

from sssd.hf.contract import cache_argument
from sssd.hf.generate import GenerateResult, generate
from sssd.hf.passes import warm_up

__all__ = ["GenerateResult", "cache_argument", "generate", "warm_up"]
