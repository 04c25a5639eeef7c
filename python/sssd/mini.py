"""The mini store: some 3 million tokens of many kinds, which drafts match where no datastore is configured.

Its text is the package ``sssd-mini``, ``docs/mini.md`` tells of it. It is tokenized once for each tokenizer,
in the background, and kept in the user's cache.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from sssd._core import Datastore, Drafter
from sssd.caching import cache_folder
from sssd.datastore import Built, Progress, build
from sssd.errors import DatastoreError, InvalidArgumentError, SssdError
from sssd.locking import wait_for_lock
from sssd.reading.tokenizer import LoadedTokenizer, load_tokenizer

MINI: Final = "mini"
"""What stands for the mini store where a datastore may be named. (A file of that name is ``./mini``.)"""

_WAIT_SECONDS = 120.0
"""How long one process waits for another's store, before it makes its own."""

_logger = logging.getLogger(__name__)
_lock = threading.Lock()
_ready: dict[Any, Path | None] = {}
"""By process, tokenizer file and time of its last change: the store, None where there can be none."""
_waiting: dict[Any, tuple[threading.Thread, list[Drafter]]] = {}
"""The thread that makes a store, and the drafters that wait for it."""
_said: set[str] = set()


def is_installed() -> bool:
    """Whether the package with the text is here."""
    try:
        import sssd_mini  # noqa: F401
    except ImportError:
        return False
    return True


def records() -> Iterator[dict[str, str]]:
    """The text, document by document: ``{"text": ..., "source": ...}``.

    Raises:
        InvalidArgumentError: the package is not installed.
    """
    return map(json.loads, _texts().lines())


def build_mini(
    output: str | os.PathLike[str],
    *,
    tokenizer: Any,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Built:
    """Builds the mini store of a tokenizer.

    Args:
        output, tokenizer, force, threads, progress: as for :func:`sssd.datastore.build`. Documents end with
            the token that ends the model's texts, if the tokenizer, or a file beside it, says which.

    Raises:
        InvalidArgumentError: the package with the text is not installed, or an argument is out of range.
        What else ``build`` raises.
    """
    loaded = load_tokenizer(tokenizer, "none")
    return build(
        [records()],
        output,
        tokenizer=loaded,
        end_token_id=loaded.end_token_id,
        force=force,
        threads=threads,
        progress=progress,
    )


def mini_store(tokenizer: Any) -> Path:
    """The file of a tokenizer's mini store, which is built if it is not there: some ten seconds of a
    core, once.

    Args:
        tokenizer: as for :func:`sssd.datastore.build`.

    Raises:
        InvalidArgumentError: the package with the text is not installed.
        OSError, SssdError: the store cannot be built or kept.
    """
    digest = _texts().DIGEST
    loaded = load_tokenizer(tokenizer, "none")
    folder = cache_folder() / "mini"
    path = folder / f"{loaded.fingerprints[0].hex()[:32]}-{loaded.end_token_id}-{digest[:16]}.sssd"
    if _is_usable(path, loaded):
        return path
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone(path.with_suffix(".lock")):
        if not _is_usable(path, loaded):
            for left in folder.glob(f"*{path.stem}*.tmp"):  # by a process that was killed
                left.unlink(missing_ok=True)
            _make(path, loaded)
    return path


def new_drafter(datastore: Any, tokenizer: str | Path | Callable[[], Any] | None, **options: Any) -> Drafter:
    """A drafter whose datastore may be the mini store of a tokenizer, if one is given.

    Args:
        datastore: as in ``Drafter``, or :data:`MINI`.
        tokenizer: as in :func:`attach`.
        options: what else ``Drafter`` takes.

    Raises:
        What ``Drafter`` raises.
    """
    is_mini = isinstance(datastore, str) and datastore == MINI
    drafter = Drafter(datastore=None if is_mini else datastore, **options)
    if is_mini and tokenizer is not None:
        attach(drafter, tokenizer)
    return drafter


def attach(drafter: Drafter, tokenizer: str | Path | Callable[[], Any]) -> threading.Thread | None:
    """Has a drafter without a datastore match the mini store of a tokenizer. Nobody waits: from the next
    draft on if the store is known in this process, otherwise from when a thread has opened or built it. What
    fails is logged, once, and costs the store.

    Args:
        drafter: left alone if it has a datastore, now or by then.
        tokenizer: a tokenizer.json or its folder; or a call that gives a tokenizer, which the thread makes.
            Nothing else may use that tokenizer meanwhile.

    Returns:
        The thread, which the end of the interpreter waits for; None if there is nothing to wait for.
    """
    if not is_installed():
        _logger.debug("no mini store: pip install 'sssd[mini]' brings one")
        return None
    key = _key(tokenizer)
    with _lock:
        if key in _waiting:
            thread, drafters = _waiting[key]
            drafters.append(drafter)
            return thread
        path = _ready.get(key)
        if key not in _ready or (path is not None and not path.is_file()):
            thread = threading.Thread(target=_serve, args=(key, tokenizer), name="sssd-mini")
            _waiting[key] = thread, [drafter]
            thread.start()
            return thread
    if path is not None:
        _use(drafter, path)
    return None


def _key(tokenizer: str | Path | Callable[[], Any]) -> Any:
    if callable(tokenizer):
        return id(tokenizer)
    path = Path(tokenizer)
    file = path / "tokenizer.json" if path.is_dir() else path
    changed = 0
    with suppress(OSError):
        changed = file.stat().st_mtime_ns
    return os.getpid(), str(file), changed  # a forked child has no thread that it could wait for


def _serve(key: Any, tokenizer: str | Path | Callable[[], Any]) -> None:
    """Makes a store, and has those who wait use it."""
    path = None
    try:
        path = mini_store(tokenizer() if callable(tokenizer) else tokenizer)
        _logger.info("drafts match the mini store %s; datastore=None switches it off", path)
    except Exception as problem:  # whatever a tokenizer of others raises
        _warn(problem)
    with _lock:
        _, drafters = _waiting.pop(key)
        if isinstance(key, tuple):
            _ready[key] = path
    if path is not None:
        for drafter in drafters:
            _use(drafter, path)


def _use(drafter: Drafter, path: Path) -> None:
    try:
        if drafter.datastore is None:
            drafter.reopen(path)
    except (SssdError, OSError) as problem:
        _warn(problem)


def _warn(problem: Exception) -> None:
    text = str(problem)
    if text not in _said:
        _said.add(text)
        _logger.warning("sssd goes without its mini store: %s", text)


def _texts() -> Any:
    try:
        import sssd_mini
    except ImportError:
        raise InvalidArgumentError("the mini store's text is a package: pip install 'sssd[mini]'") from None
    return sssd_mini


def _is_usable(path: Path, tokenizer: LoadedTokenizer) -> bool:
    try:
        with Datastore.open(path) as store:
            return store.info.files[0].fingerprint == tokenizer.fingerprints[0]
    except FileNotFoundError:
        return False
    except (DatastoreError, OSError) as problem:
        _logger.info("the mini store is built anew: %s", problem)
        return False


def _make(path: Path, tokenizer: LoadedTokenizer) -> None:
    _logger.info("tokenizing the mini store for %s, once, into %s", tokenizer.name, path)
    work = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        started = time.monotonic()
        built = build_mini(work, tokenizer=_OneByOne(tokenizer), threads=1, force=True)
        work.chmod(0o600)
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)
    seconds = time.monotonic() - started
    _logger.info("the mini store of %s tokens was built in %.0f s", f"{built.summary.tokens:,}", seconds)


class _OneByOne(LoadedTokenizer):
    """Tokenizes text by text: on one thread, as the others are the engine's, and without the GIL, which only
    calls with several texts give back.
    """

    def __init__(self, tokenizer: LoadedTokenizer) -> None:
        self.__dict__.update(tokenizer.__dict__)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [super(_OneByOne, self).encode_batch([text])[0] for text in texts]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Has the other processes wait meanwhile, for some time; without locks two make the same file."""
    try:
        import fcntl
    except ImportError:  # not on every system
        yield
        return
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        wait_for_lock(lock, _WAIT_SECONDS)
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)  # a forked child has the file open too
        os.close(lock)
