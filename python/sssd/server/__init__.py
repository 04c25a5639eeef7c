"""An OpenAI-compatible server over transformers, with drafts and continuous batching; ``docs/server.md``.

For trial, teaching and small deployments on a CPU. ``pip install 'sssd[hf,serve]'``.
"""

try:
    import pydantic  # noqa: F401
    import starlette  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"sssd.server needs starlette and pydantic: pip install 'sssd[hf,serve]' ({error})"
    ) from error

from sssd.server.app import Settings, create_app
from sssd.server.engine import Engine

__all__ = ["Engine", "Settings", "create_app"]
