"""Files with very many segments: what a look-up and an opening may cost."""

import resource
import statistics
import time
from pathlib import Path

import forge
import numpy as np
import pytest

from sssd import Drafter, errors
from sssd.datastore import Datastore, DatastoreBuilder

VOCAB = 100


def one(folder: Path, tokens: list[int]) -> tuple[list[int], list[bytes]]:
    path = folder / "one"
    with DatastoreBuilder(path, vocab_size=VOCAB) as builder:
        builder.add(tokens)
    return forge.segments(path)[0]


def drafting(path: Path) -> float:
    """Seconds of a draft, of the calling thread."""
    drafter = Drafter(vocab_size=VOCAB, datastore=path, threads=1, live_bytes=0, soft_bytes=0)
    sequence = drafter.begin([1, 2, 3, 1, 2, 3, 1, 2])
    times = []
    for _ in range(100):
        start = time.thread_time()
        sequence.draft(16)
        times.append(time.thread_time() - start)
    return statistics.median(times)


def test_the_forger_writes_what_the_builder_does(tmp_path: Path) -> None:
    part = one(tmp_path, [1, 2, 3, 1, 2])
    forge.seal(tmp_path / "forged", VOCAB, [part, part])
    with Datastore.open(tmp_path / "forged") as store:
        store.verify()
        assert store.info.segments == 2
        assert store.count([1, 2]) == 4


def test_the_most_segments_cost_a_few_times_what_one_costs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = [one(tmp_path, rng.integers(0, VOCAB, 50).tolist()) for _ in range(64)]
    for name, chosen in (("one.sssd", parts[:1]), ("most", parts)):
        forge.seal(tmp_path / name, VOCAB, chosen)
        Datastore.open(tmp_path / name).verify()
    for _ in range(3):
        single, many = (drafting(tmp_path / name) for name in ("one.sssd", "most"))
        if many < 12 * single:
            return
    pytest.fail(f"{many * 1e6:.0f} us against {single * 1e6:.0f} us")


def test_more_segments_are_refused(tmp_path: Path) -> None:
    part = one(tmp_path, [1, 2, 3])
    for count in (65, 1000):
        forge.seal(tmp_path / "many", VOCAB, [part] * count)
        with pytest.raises(errors.CorruptDatastoreError, match=f"{count} segments with tokens, more than"):
            Datastore.open(tmp_path / "many")


def test_empty_segments_cost_nothing(tmp_path: Path) -> None:
    part, empty = one(tmp_path, [1, 2, 3, 1, 2, 3]), one(tmp_path, [])
    assert empty[0][2] == 0
    sizes = {}
    for count in (1, 10_000):
        path = tmp_path / f"{count}.sssd"
        forge.seal(path, VOCAB, [part] + [empty] * count)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with Datastore.open(path) as store:
            assert store.count([1, 2]) == 2
            assert store.info.segments == count + 1
        sizes[count] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert drafting(path) < 1e-3
    assert sizes[10_000] < 10_000  # kB; the table takes 1280


def test_the_builder_says_that_there_is_too_little_memory(tmp_path: Path) -> None:
    builder = DatastoreBuilder(tmp_path / "store", vocab_size=10, max_memory=10 << 20)
    for _ in range(20):
        builder.add(np.arange(200_000) % 10)
    with pytest.raises(errors.InvalidArgumentError, match="more than the 64 segments"):
        builder.add(np.arange(10_000_000) % 10)
    with pytest.raises(errors.ClosedError):
        builder.add([1])
    assert list(tmp_path.iterdir()) == []
