"""Pickles and copies of what the datastore hands out."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sssd import errors
from sssd.datastore import Datastore, DatastoreBuilder

COPIES: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))]


def build(path: Path, documents: list[list[int]]) -> Path:
    with DatastoreBuilder(path, vocab_size=10) as builder:
        for document in documents:
            builder.add(document)
    return path


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("load", ["mmap", "ram"])
def test_a_copied_store_opens_the_same_files(tmp_path: Path, load: str, copied: Callable[[Any], Any]) -> None:
    paths = [build(tmp_path / name, [[1, 2, 3]]) for name in "ab"]
    with Datastore.open(paths, load=load) as store:  # type: ignore[arg-type]
        other = copied(store)
        assert other is not store
        store.close()
        assert other.count([1, 2]) == 2
        assert [file.path for file in other.info.files] == paths
        assert other.__reduce__()[1][1] == load
        paths[0].unlink()
        with pytest.raises(FileNotFoundError, match=str(paths[0])):
            copied(other)
        build(paths[0], [[1, 2, 4]])
        with pytest.raises(errors.DatastoreChangedError, match=f"{paths[0]}: another datastore"):
            copied(other)
    with pytest.raises(errors.ClosedError):
        copied(store)


def test_a_pickle_goes_to_another_process_with_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "store", [[1, 2, 3]])
    monkeypatch.chdir(tmp_path)
    with Datastore.open("store") as store:
        os.chdir("/")
        (tmp_path / "pickle").write_bytes(pickle.dumps(store))
    code = "import pickle, sys; assert pickle.load(open(sys.argv[1], 'rb')).count([1, 2]) == 1"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "pickle")], check=True)


@pytest.mark.parametrize("copied", COPIES)
def test_descriptions_are_plain_data(tmp_path: Path, copied: Callable[[Any], Any]) -> None:
    builder = DatastoreBuilder(
        tmp_path / "store", vocab_size=10, fingerprint=bytes(range(32)), deduplicate=True
    )
    builder.add([1, 2])
    builder.add([1, 2])
    summary = builder.finish()
    with Datastore.open(tmp_path / "store") as store:
        info = store.info
    for held, fields in (
        (summary, ("tokens", "documents", "duplicates", "segments", "file_bytes")),
        (info, ("vocab_size", "tokens", "documents", "segments", "file_bytes", "files")),
        (
            info.files[0],
            ("path", "version", "uuid", "fingerprint", "tokens", "documents", "segments", "deduplicated"),
        ),
    ):
        other = copied(held)
        assert other == held
        assert hash(other) == hash(held)
        assert [getattr(other, field) for field in fields] == [getattr(held, field) for field in fields]
    assert (summary.duplicates, info.files[0].deduplicated) == (1, True)


@pytest.mark.parametrize("copied", COPIES)
def test_a_builder_says_what_to_do_instead(tmp_path: Path, copied: Callable[[Any], Any]) -> None:
    builder = DatastoreBuilder(tmp_path / "store", vocab_size=10)
    with pytest.raises(TypeError, match="open the finished file by its path"):
        copied(builder)
    builder.close()
