"""Corpora on shared and object storage: only what is missing is copied, and the manifest last."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sssd.corpus.folder import Folder, file_digest, replace_file, sync, writing
from sssd.corpus.manifest import MAX_BYTES, NAME, Manifest, Segment, is_own, manifest_from_bytes
from sssd.corpus.segments import open_segment
from sssd.errors import CorpusError, CorruptCorpusError, DatastoreError, InvalidArgumentError, OutputError
from sssd.reading.options import shown

_IN_STEP = ".remote.json"
_PARTIAL = ".pull"
_PIECE = 8 << 20
_VERSIONS = 10


@dataclass(frozen=True)
class Copied:
    """What :func:`push` or :func:`pull` has done.

    Attributes:
        manifest: that is now on both sides.
        files: that were copied.
        bytes: of these.
    """

    manifest: Manifest
    files: int
    bytes: int


def push(
    folder: str | os.PathLike[str],
    url: str,
    *,
    force: bool = False,
    timeout: float = 60.0,
    storage_options: dict[str, Any] | None = None,
) -> Copied:
    """Copies a corpus to a URL: the files that are not there, then the manifest. Readers there go from one
    whole version to the next. Files that neither this version nor the one before needs are deleted there.

    Args:
        folder: the corpus.
        url: a folder that fsspec can write to: ``s3://bucket/corpus``, ``file:///mnt/corpora/logs``, ...
        force: replace a version there that this one does not stem from.
        timeout: seconds to wait for a writer of the corpus.
        storage_options: what fsspec is told of the file system.

    Raises:
        OutputError: there is a version that this one does not stem from, or no corpus but other files.
        CorpusError: the folder is no corpus.
        LockedError: another process is writing to it.
        OSError: a file cannot be copied. Calling again goes on from there.
    """
    store = _Storage(url, storage_options)
    with writing(Path(folder), timeout=timeout, grace=float("inf")) as local:
        manifest = local.manifest
        assert manifest is not None
        there = store.manifest()
        if there is not None and not force and there.version not in (manifest.version, _in_step(local, url)):
            raise OutputError(
                f"{store.name} has a version that {shown(local.path)} does not stem from; pull it first, or "
                "replace it with --force (force=True)"
            )
        sizes = store.sizes()
        missing = [
            (segment, name, size)
            for segment in manifest.segments
            for name in segment.files
            if sizes.get(name) != (size := (local.path / name).stat().st_size)
        ]
        for segment, name, _ in missing:
            _check(local.path / name, name, segment)
            store.put(local.path / name, name)
        if there is None or there.version != manifest.version:
            store.put_manifest(manifest)
        _set_in_step(local, url, manifest)
        needed = manifest.files | (there.files if there else set())
        for name in sizes.keys() - needed:
            if is_own(name):
                store.delete(name)
        return Copied(manifest, len(missing), sum(size for *_, size in missing))


def pull(
    url: str,
    folder: str | os.PathLike[str],
    *,
    force: bool = False,
    timeout: float = 60.0,
    grace: float = 60.0,
    storage_options: dict[str, Any] | None = None,
) -> Copied:
    """Copies a corpus from a URL: the files that are not here, then the manifest. Every file is compared with
    its checksum before the manifest names it. A copy that was interrupted goes on in the middle of the file.

    Args:
        url: what :func:`push` was given.
        folder: of the copy, which is made if it is not there.
        force: replace what was added to or deleted from the copy since it was in step with the URL.
        timeout: seconds to wait for another process that writes to the folder.
        grace: see :class:`sssd.corpus.Corpus`.
        storage_options: what fsspec is told of the file system.

    Raises:
        OutputError: the folder holds what is not at the URL.
        CorpusError: there is no corpus at the URL.
        CorruptCorpusError: what is there is damaged; the folder is as it was.
        LockedError: another process is writing to the folder.
        OSError: a file cannot be copied. Calling again goes on from there.
    """
    store = _Storage(url, storage_options)
    with writing(Path(folder), timeout=timeout, grace=grace, create=True) as local:
        manifest = store.manifest()
        mine = local.manifest
        if manifest is None:
            raise CorpusError(f"{store.name} is no corpus: it has no {NAME}")
        if mine is not None and not force and mine.version not in (manifest.version, _in_step(local, url)):
            raise OutputError(
                f"{shown(local.path)} holds a version that {store.name} does not stem from; push it first, "
                "or replace it with --force (force=True)"
            )
        (local.path / _PARTIAL).mkdir(exist_ok=True)
        for _ in range(_VERSIONS):
            try:
                sizes = [
                    _fetch(store, local.path, segment, name)
                    for segment in manifest.segments
                    for name in segment.files
                ]
                break
            except FileNotFoundError:
                newer = store.manifest()
                if newer is None or newer.version == manifest.version:
                    raise
                manifest = newer
        else:
            raise CorpusError(f"{store.name} changes faster than it can be copied; try again later")
        for name in manifest.files & set(os.listdir(local.path / _PARTIAL)):
            local.place(local.path / _PARTIAL / name, name)
        if mine is None or mine.version != manifest.version:
            manifest = _switch(local, manifest)
        _set_in_step(local, url, manifest)
        shutil.rmtree(local.path / _PARTIAL, ignore_errors=True)
        return Copied(manifest, sum(size > 0 for size in sizes), sum(sizes))


def _switch(local: Folder, manifest: Manifest) -> Manifest:
    """Makes a manifest that was copied the folder's."""
    retired: dict[str, int] = {}
    if local.manifest is not None:
        gone = local.manifest.files - manifest.files
        kept = {name: at for name, at in local.manifest.retired.items() if name not in manifest.files}
        retired = {**dict.fromkeys(sorted(gone), int(time.time())), **kept}
    return local.commit(replace(manifest, retired=retired))


def _fetch(store: "_Storage", folder: Path, segment: Segment, name: str) -> int:
    """Copies a file that is not here to where it waits for the others. Returns its bytes, 0 if it is here."""
    partial = folder / _PARTIAL / name
    try:
        _check(folder / name, name, segment, whole=False)
        return 0
    except (FileNotFoundError, DatastoreError):
        pass
    resumed = partial.exists()
    store.get(name, partial)
    try:
        _check(partial, name, segment)
    except DatastoreError as error:
        partial.unlink()
        if resumed:
            return _fetch(store, folder, segment, name)
        raise CorruptCorpusError(f"{store.name}/{name} is damaged, or was on its way ({error})") from None
    return partial.stat().st_size


def _check(path: Path, name: str, segment: Segment, *, whole: bool = True) -> None:
    """Compares a file with what its name says of its contents.

    Raises:
        DatastoreError: it has others.
    """
    if name == segment.file:
        with open_segment(path.parent, segment) as found:
            if whole:
                found.verify()
    elif file_digest(path) != name.partition(".")[0]:
        raise CorruptCorpusError(f"{shown(path)} is damaged: its checksum is wrong")


def _in_step(local: Folder, url: str) -> str | None:
    """The version that the folder and the URL last had in common."""
    return _versions(local).get(url)


def _set_in_step(local: Folder, url: str, manifest: Manifest) -> None:
    data = json.dumps({**_versions(local), url: manifest.version}, indent=1).encode()
    replace_file(local.work / "remote", local.path / _IN_STEP, data)


def _versions(local: Folder) -> dict[str, str]:
    """The version that the folder has last had in common with each URL."""
    try:
        found = json.loads((local.path / _IN_STEP).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class _Storage:
    """The folder at a URL."""

    def __init__(self, url: str, options: dict[str, Any] | None) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise InvalidArgumentError("URLs need fsspec: pip install 'sssd[corpus]'") from None
        try:
            self._system, self._path = url_to_fs(str(url), **(options or {}))
        except (ValueError, ImportError) as error:  # no such protocol, or its package is missing
            raise InvalidArgumentError(f"{shown(url)}: {error}") from None
        self.name = shown(url)
        self._local = "file" in self._system.protocol

    @contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        """Whatever a file system raises, as an OSError."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{self.name}/{name} cannot be copied ({error})") from error

    def _at(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"

    def manifest(self) -> Manifest | None:
        """The manifest there, None without any."""
        with self._failing(NAME):
            self._system.invalidate_cache()
            try:
                with self._system.open(self._at(NAME), "rb") as file:
                    data = file.read(MAX_BYTES + 1)
            except FileNotFoundError:
                return None
        return manifest_from_bytes(data, f"{self.name}/{NAME}")

    def sizes(self) -> dict[str, int | None]:
        """The files there by name, with their bytes."""
        with self._failing(""):
            try:
                found = self._system.ls(self._path, detail=True)
            except FileNotFoundError:
                return {}
        return {entry["name"].rpartition("/")[2]: entry.get("size") for entry in found}

    def put(self, path: Path, name: str) -> None:
        """Copies a file there."""
        with self._failing(name):
            self._system.makedirs(self._path, exist_ok=True)
            self._system.put_file(str(path), self._at(name))
            self._sync(name)

    def put_manifest(self, manifest: Manifest) -> None:
        """Puts a manifest in the place of the one there, in one step."""
        with self._failing(NAME):
            work = f".{NAME}.new"
            self._system.pipe_file(self._at(work), manifest.to_bytes())
            self._sync(work)
            self._system.mv(self._at(work), self._at(NAME))
            if self._local:
                sync(Path(self._path))

    def _sync(self, name: str) -> None:
        """Makes a file durable where that is up to us."""
        if self._local:
            with Path(self._at(name)).open("rb") as file:
                os.fsync(file.fileno())

    def delete(self, name: str) -> None:
        """Deletes a file there."""
        with self._failing(name):
            self._system.rm_file(self._at(name))

    def get(self, name: str, target: Path) -> None:
        """Copies a file from there, on from the bytes that ``target`` has."""
        with self._failing(name), target.open("ab") as file, self._system.open(self._at(name), "rb") as there:
            there.seek(file.tell())
            while piece := there.read(_PIECE):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
