"""Training-free speculative decoding: draft trees from the prompt, the output and a corpus on disk."""

from sssd import errors
from sssd._core import (
    SOURCES,
    Datastore,
    DatastoreBuilder,
    DraftBatch,
    Drafter,
    DraftTree,
    PassBlock,
    Sequence,
    __version__,
)
from sssd.errors import SssdError
from sssd.requests import Requests

__all__ = [
    "SOURCES",
    "Datastore",
    "DatastoreBuilder",
    "DraftBatch",
    "DraftTree",
    "Drafter",
    "PassBlock",
    "Requests",
    "Sequence",
    "SssdError",
    "__version__",
    "errors",
]
