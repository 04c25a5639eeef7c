"""Training-free speculative decoding: draft trees from the prompt, the output and a corpus on disk."""

from typing import Any

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

__all__ = [
    "SOURCES",
    "Datastore",
    "DatastoreBuilder",
    "DraftBatch",
    "DraftTree",
    "Drafter",
    "PassBlock",
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
_shown: Any
for _shown, _show in ((DraftTree, _show_tree), (Datastore, _show_store)):
    _shown._repr_html_ = _show
del _shown, _show
