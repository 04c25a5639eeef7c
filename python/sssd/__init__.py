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


def _show_tree(tree: DraftTree) -> str:
    from sssd.pictures import tree_html

    return tree_html(tree)


def _show_store(store: Datastore) -> str:
    from sssd.pictures import store_html

    return store_html(store)


# what notebooks ask for; how things look is no business of the extension
DraftTree._repr_html_ = _show_tree  # type: ignore[attr-defined]
Datastore._repr_html_ = _show_store  # type: ignore[attr-defined]
