"""sssd in llama-cpp-python; ``docs/llama.md``.

Llama(path, draft_model=sssd.llama.DraftModel(end_token_ids=[2]))
sssd.llama.TreeDecoder(Llama(path)).generate(tokens)
"""

from sssd.llama.draft_model import DraftModel, linear
from sssd.llama.tree import TreeDecoder

__all__ = ["DraftModel", "TreeDecoder", "linear"]
