"""The datastore of a call, compared with the model's tokenizer."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from sssd._core import Datastore, Drafter
from sssd.datastore import check_tokenizer as refuse_others
from sssd.mini import attach
from sssd.reading.tokenizer import LoadedTokenizer, load_tokenizer


def open_datastore(source: Any, model: Any, tokenizer: Any, *, check_tokenizer: bool) -> Datastore:
    """The store that a call names.

    Args:
        source: a path, several paths, or an open store.
        model: whose tokens it should hold.
        tokenizer: the model's, if it was given; by default the tokenizer.json beside the model.
        check_tokenizer: whether to compare. Without any tokenizer nothing is compared.

    Raises:
        VocabularyMismatchError: the store was built with another tokenizer.
        OSError, DatastoreError: it cannot be opened.
    """
    store = source if isinstance(source, Datastore) else Datastore.open(source)
    if check_tokenizer:
        compare_tokenizer([store], model, tokenizer)
    return store


def attach_mini(drafter: Drafter, model: Any) -> None:
    """Has a drafter match the mini store of the tokenizer.json beside a model; without one, none."""
    if (file := _file_beside(model)) is not None:
        attach(drafter, file)


def compare_tokenizer(stores: Iterable[Datastore], model: Any, tokenizer: Any) -> None:
    """Refuses stores that do not hold a model's tokens.

    Args:
        stores: open stores.
        model: whose tokens they should hold.
        tokenizer: the model's, if it was given; by default the tokenizer.json beside the model. Without
            either, nothing is compared.

    Raises:
        VocabularyMismatchError: a store was built with another tokenizer.
    """
    if tokenizer is None and (file := _file_beside(model)) is not None:
        tokenizer = _loaded(str(file), file.stat().st_mtime_ns)
    if tokenizer is not None:
        for store in stores:
            refuse_others(store, tokenizer)


def _file_beside(model: Any) -> Path | None:
    """The tokenizer.json in the folder, or in the snapshot of the hub, that a model comes from."""
    name = getattr(model, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    if Path(name).is_dir():
        file = Path(name) / "tokenizer.json"
        return file if file.is_file() else None
    try:
        found = try_to_load_from_cache(
            name, "tokenizer.json", revision=getattr(model.config, "_commit_hash", None)
        )
    except ValueError:  # no name of the hub
        return None
    return Path(found) if isinstance(found, str) else None


@lru_cache(maxsize=4)
def _loaded(file: str, changed: int) -> LoadedTokenizer:
    """A tokenizer, which keeps its fingerprint, until its file changes."""
    return load_tokenizer(file, "none")
