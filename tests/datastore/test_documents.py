"""Documents out of a datastore, and into another."""

import itertools
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sssd import Datastore, DatastoreBuilder
from sssd.errors import (
    ClosedError,
    CorruptDatastoreError,
    InvalidArgumentError,
    VocabularyMismatchError,
)

DOCUMENTS = [[1, 2, 3], [], [4], [1, 2, 3], list(range(100)), []]


def build(path: Path, documents: list[list[int]], vocab_size: int = 100) -> Path:
    with DatastoreBuilder(path, vocab_size=vocab_size) as builder:
        for document in documents:
            builder.add(document)
    return path


def listed(store: Datastore, start: int = 0, stop: int | None = None) -> list[list[int] | None]:
    return [None if ids is None else ids.tolist() for ids in store.documents(start, stop)]


def test_documents_are_read_in_their_order(tmp_path: Path) -> None:
    first, second = build(tmp_path / "1", DOCUMENTS), build(tmp_path / "2", DOCUMENTS[::-1])
    with Datastore.open([first, second]) as store:
        both = DOCUMENTS + DOCUMENTS[::-1]
        assert store.info.documents == len(both)
        for start, stop in itertools.product([0, 1, 5, 6, 11, 12, 99], [None, 0, 3, 7, 12, 1 << 70]):
            assert listed(store, start, stop) == both[start:stop], (start, stop)
        ids = next(store.documents())
        assert ids is not None
        assert ids.dtype == np.int32
        held = store.documents()
        for bad in [(-1, None), (0, -1)]:
            with pytest.raises(InvalidArgumentError, match="must not be negative"):
                store.documents(*bad)
    assert len(list(held)) == len(both), "an iterator outlives the store"
    with pytest.raises(ClosedError):
        store.documents()


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 3) | st.integers(0, 200_000), max_size=8))
def test_long_documents_are_read_whole(lengths: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    documents = [np.arange(length, dtype=np.int32) % 1000 for length in lengths]
    path = tmp_path_factory.mktemp("long") / "store"
    with DatastoreBuilder(path, vocab_size=1000) as builder:
        for document in documents:
            builder.add(document)
    found = list(Datastore.open(path).documents())
    assert len(found) == len(documents)
    assert all(
        np.array_equal(one, other) for one, other in zip(found, documents, strict=True) if one is not None
    )


def test_a_store_is_added_to_another(tmp_path: Path) -> None:
    store = Datastore.open([build(tmp_path / "1", DOCUMENTS), build(tmp_path / "2", DOCUMENTS)])
    keep = np.arange(12) != 2
    with DatastoreBuilder(tmp_path / "all", vocab_size=100) as builder:
        assert builder.add_datastore(store).tolist() == [True] * 12
    with DatastoreBuilder(tmp_path / "some", vocab_size=100, deduplicate=True) as builder:
        builder.add([4])
        added = builder.add_datastore(store, keep)
        assert added.dtype == bool
        assert added.tolist() == [True, True, False, False, True] + [False] * 7
        assert not builder.add_datastore(store, keep.tolist()).any()
    assert listed(Datastore.open(tmp_path / "all")) == DOCUMENTS * 2
    assert listed(Datastore.open(tmp_path / "some")) == [[4], [1, 2, 3], [], list(range(100))]


def test_what_cannot_be_added(tmp_path: Path) -> None:
    path = build(tmp_path / "1", DOCUMENTS)
    store = Datastore.open(path)
    builder = DatastoreBuilder(tmp_path / "out", vocab_size=100)
    for bad in [np.ones(5, bool), np.ones((6, 1), bool), np.ones(6, np.int32), [0, 1], "all"]:
        with pytest.raises(InvalidArgumentError, match="one bool for each of the 6 documents"):
            builder.add_datastore(store, bad)
    with pytest.raises(VocabularyMismatchError):
        builder.add_datastore(Datastore.open(build(tmp_path / "2", [[1]], vocab_size=50)))
    damaged = bytearray(path.read_bytes())
    damaged[4096] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(CorruptDatastoreError, match=r"bytes changed in 4096"):
        builder.add_datastore(Datastore.open(tmp_path / "damaged"))
    assert builder.symbols == 0
    builder.add_datastore(store)
    builder.finish()
    with pytest.raises(ClosedError):
        builder.add_datastore(store)
    store.close()
    with pytest.raises(ClosedError):
        DatastoreBuilder(tmp_path / "out", vocab_size=100).add_datastore(store)


def test_adding_reports_and_can_be_interrupted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with DatastoreBuilder(tmp_path / "large", vocab_size=50_000) as builder:
        for document in rng.integers(50_000, size=(3000, 4000), dtype=np.int32):
            builder.add(document)
        store_total = builder.symbols
    store = Datastore.open(tmp_path / "large")
    seen: list[tuple[int, int]] = []
    builder = DatastoreBuilder(tmp_path / "out", vocab_size=50_000)
    builder.add([1])
    builder.add_datastore(store, progress=lambda *report: seen.append(report))
    assert seen, "12 million tokens take longer than a fiftieth of a second"
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {store_total}
    builder.close()

    def stop(*_: int) -> None:
        raise RuntimeError("enough")

    for interrupt in [stop, lambda *_: os.kill(os.getpid(), signal.SIGINT)]:
        builder = DatastoreBuilder(tmp_path / "out", vocab_size=50_000)
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            builder.add_datastore(store, progress=interrupt)
        builder.close()
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["large"], "no temporary file is left"


def test_others_run_while_documents_are_added_and_read(tmp_path: Path) -> None:
    store = Datastore.open(build(tmp_path / "1", [list(range(100))] * 50))
    found: list[list[list[int] | None]] = []
    threads = [threading.Thread(target=lambda: found.append(listed(store))) for _ in range(4)]
    shared = store.documents()
    counts: list[int] = []
    threads += [threading.Thread(target=lambda: counts.append(len(list(shared)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[list(range(100))] * 50] * 4
    assert sum(counts) == 50, "each document is given to one of those who share an iterator"
