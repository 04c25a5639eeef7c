"""Documents of a datastore that are dead: passed over by all that is looked up, and left out of a merge."""

import itertools
import lzma
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sssd import Datastore, DatastoreBuilder, Drafter
from sssd._core import write_tombstones
from sssd.errors import (
    ClosedError,
    CorruptDatastoreError,
    DatastoreVersionError,
    InvalidArgumentError,
)

DATA = Path(__file__).parent.parent / "data"
GOLDEN = DATA / "golden" / "tombstones-1.xz"
STORE = DATA / "datastore-v1.sssd.xz"
DEAD = [False, True, False, True, False, False, True]
"""Of the documents of ``STORE``."""
PAGE = 4096


def build(path: Path, documents: Iterable[Iterable[int]], vocab_size: int = 5) -> Path:
    with DatastoreBuilder(path, vocab_size=vocab_size) as builder:
        for document in documents:
            builder.add(list(document))
    return path


def bury(path: Path, dead: list[bool]) -> Path:
    target = path.with_suffix(".dead")
    with Datastore.open(path) as store:
        write_tombstones(store, np.array(dead, bool), target)
    return target


def golden_store(folder: Path) -> Path:
    path = folder / "store"
    path.write_bytes(lzma.decompress(STORE.read_bytes()))
    return path


def test_the_bytes_of_the_format_stay_the_same(tmp_path: Path) -> None:
    path = golden_store(tmp_path)
    golden = lzma.decompress(GOLDEN.read_bytes())
    assert bury(path, DEAD).read_bytes() == golden
    (tmp_path / "old.dead").write_bytes(golden)
    with Datastore.open(path, tombstones=[tmp_path / "old.dead"]) as store:
        assert store.count([]) == 259 - 1 - 200 - 1
        assert store.count([299]) == 1
        assert [ids is None for ids in store.documents()] == DEAD


def unpack(data: bytes, count: int, bits: int) -> list[int]:
    number = int.from_bytes(data, "little")
    return [number >> (index * bits) & ((1 << bits) - 1) for index in range(count)]


def test_the_bytes_are_what_the_description_says(tmp_path: Path) -> None:
    """Read by ``docs/format.md``."""
    data = lzma.decompress(GOLDEN.read_bytes())
    magic, version, vocab_size = struct.unpack_from("<8sII", data)
    uuid = data[16:32]
    documents, dead, dead_tokens, length, checksums_at, segments, _ = struct.unpack_from("<7Q", data, 32)
    store = Datastore.open(golden_store(tmp_path))
    assert (magic, version, vocab_size) == (b"\x89SSX\r\n\x1a\n", 1, 300)
    assert uuid.hex() == store.info.files[0].uuid.replace("-", "")
    assert (documents, dead, dead_tokens, length, segments) == (7, 3, 202, len(data), 1)
    assert unpack(data[PAGE : PAGE + 8], 7, 1) == DEAD
    suffixes, living, successors = struct.unpack_from("<3Q", data, len(data) - 24)
    assert (suffixes, living) == (259, 57)
    at = PAGE + 64
    before, *words = struct.unpack_from("<8Q", data, at)
    assert (before, sum(word.bit_count() for word in words)) == (0, living)
    at += 64
    bits = max(successors.bit_length(), 1)
    index = unpack(data[at : at + ((vocab_size + 1) * bits + 7) // 8], vocab_size + 1, bits)
    at += -(-(((vocab_size + 1) * bits + 7) // 8 + 7) // 64) * 64
    entries = unpack(data[at : at + (successors * 17 + 7) // 8], successors, 17)
    assert checksums_at == at + -(-((successors * 17 + 7) // 8 + 7) // 64) * 64
    text = [
        list(ids) for ids, dead in zip(store.documents(), DEAD, strict=True) if ids is not None and not dead
    ]
    followers = {after for ids in text for token, after in itertools.pairwise(ids) if token == 5}
    assert {(entry >> 8) - 1 for entry in entries[index[5] : index[6]]} == followers


def answers(store: Datastore, queries: list[list[int]]) -> list[object]:
    found: list[object] = [store.count([])]
    for query in queries:
        rest = store.continuations(query, limit=1000, max_tokens=100)
        found.append((store.count(query), sorted(ids.tolist() for ids in rest)))
    for token in range(5):
        ids, shares = store.successors(token)
        found.append((ids.tolist(), shares.tolist()))
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=12), st.booleans()), max_size=12),
    queries=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), max_size=8),
)
def test_answers_are_those_of_a_store_of_the_living(
    documents: list[tuple[list[int], bool]], queries: list[list[int]], tmp_path: Path
) -> None:
    path = build(tmp_path / "all", [ids for ids, _ in documents])
    tombstones = bury(path, [dead for _, dead in documents])
    living = Datastore.open(build(tmp_path / "living", [ids for ids, dead in documents if not dead]))
    store = Datastore.open(path, tombstones=[tombstones])
    expected = answers(living, queries)
    assert answers(store, queries) == expected
    assert answers(pickle.loads(pickle.dumps(store)), queries) == expected
    with DatastoreBuilder(tmp_path / "merged", vocab_size=5) as builder:
        assert builder.add_datastore(store).tolist() == [not dead for _, dead in documents]
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "living").read_bytes()
    trees = []
    for one in (store, living):
        with Drafter(datastore=one, live_bytes=0, soft_bytes=0).begin(
            [0, 1, 2, *itertools.chain(*queries)]
        ) as sequence:
            tree = sequence.draft(16)
            trees.append((tree.token_ids.tolist(), tree.parents.tolist(), tree.probs.tolist()))
    assert trees[0] == trees[1], "drafts see the living alone"


def test_the_dead_stay_dead(tmp_path: Path) -> None:
    path = build(tmp_path / "store", [[0, 1], [2, 3], [4]])
    store = Datastore.open(path, tombstones=[bury(path, [True, False, False])])
    assert write_tombstones(store, [False, True, False], tmp_path / "more") == 4
    with Datastore.open([path, path], tombstones=[tmp_path / "more", None]) as both:
        assert both.count([]) == 6
        assert [None if ids is None else ids.tolist() for ids in both.documents()] == [
            None,
            None,
            [4],
            [0, 1],
            [2, 3],
            [4],
        ]


def test_samples_are_spread_evenly_over_the_living(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    documents: NDArray[np.int64] = rng.integers(0, 3, size=(100, 200))
    dead = (rng.random(100) < 0.4) | (np.arange(100) // 10 == 6)
    path = build(tmp_path / "store", documents.tolist())
    store = Datastore.open(path, tombstones=[bury(path, dead.tolist())])
    every = [ids.tolist() for ids in store.continuations([1], limit=1 << 20, max_tokens=200)]
    assert len(every) == (documents[~dead] == 1).sum()
    few = [ids.tolist() for ids in store.continuations([1], limit=100, max_tokens=200)]
    assert few == [every[(2 * index + 1) * len(every) // 200] for index in range(100)]


def test_what_is_refused(tmp_path: Path) -> None:
    path, other = build(tmp_path / "store", [[0, 1], []]), build(tmp_path / "other", [[0, 1]])
    tombstones = bury(path, [True, False])
    with pytest.raises(InvalidArgumentError, match="another datastore"):
        Datastore.open(other, tombstones=[tombstones])
    for bad in ([], [None, None]):
        with pytest.raises(InvalidArgumentError, match="one path or None for each of the 1 files"):
            Datastore.open(path, tombstones=bad)
    with pytest.raises(TypeError, match="sequence of paths and None"):
        Datastore.open(path, tombstones=[3])  # type: ignore[list-item]
    with pytest.raises(FileNotFoundError):
        Datastore.open(path, tombstones=[tmp_path / "missing"])
    with pytest.raises(CorruptDatastoreError, match="not a file of tombstones"):
        Datastore.open(path, tombstones=[path])
    data = bytearray(tombstones.read_bytes())
    data[PAGE] ^= 2
    tombstones.write_bytes(data)
    with pytest.raises(CorruptDatastoreError, match="checksum"):
        Datastore.open(path, tombstones=[tombstones])
    data[8] = 7
    tombstones.write_bytes(data)
    with pytest.raises(DatastoreVersionError, match="version 7"):
        Datastore.open(path, tombstones=[tombstones])
    store = Datastore.open([path, other])
    with pytest.raises(InvalidArgumentError, match="of one file"):
        write_tombstones(store, [True] * 3, tmp_path / "out")
    with pytest.raises(InvalidArgumentError, match="one bool for each"):
        write_tombstones(Datastore.open(path), [True], tmp_path / "out")
    with pytest.raises(IsADirectoryError):
        write_tombstones(Datastore.open(path), [True, True], tmp_path)
    store.close()
    with pytest.raises(ClosedError):
        write_tombstones(store, [True] * 3, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_writing_reports_and_leaves_the_old_file_when_interrupted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # enough for a while of writing
    path = build(tmp_path / "store", rng.integers(0, 5000, size=(1600, 5000)), 5000)
    target = bury(path, [False] * 1600)
    before = target.read_bytes()
    store, seen = Datastore.open(path), []

    def stop(*report: int) -> None:
        seen.append(report)
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        write_tombstones(store, [True] * 1600, target, progress=stop)
    assert target.read_bytes() == before
    assert seen[0][0] <= seen[0][1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["store", "store.dead"]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_bytes(lzma.compress(bury(golden_store(Path(folder)), DEAD).read_bytes()))
