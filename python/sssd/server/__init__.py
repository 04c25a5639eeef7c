"""An OpenAI-compatible server over transformers, with drafts and continuous batching; ``docs/server.md``.

For trial, teaching and small deployments on a CPU. ``pip install 'sssd[hf,serve]'``.
"""

from sssd.server.app import Settings, create_app
from sssd.server.engine import Engine

__all__ = ["Engine", "Settings", "create_app"]
