"""A mapped store that is not in memory: drafts do not wait for it, and find it later."""

import mmap
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sssd import Drafter
from sssd.datastore import Datastore, DatastoreBuilder

VOCAB = 5_000

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is in memory")


@pytest.fixture
def store(tmp_path: Path) -> tuple[Path, np.ndarray]:
    tokens = np.random.default_rng(1).zipf(1.3, 1_000_000) % VOCAB
    with DatastoreBuilder(tmp_path / "store", vocab_size=VOCAB) as builder:
        for document in np.split(tokens, 1000):
            builder.add(document)
    return tmp_path / "store", tokens


def forget(path: Path) -> None:
    """Drops a file from memory, or skips the test where the system will not."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        # what the header's page says
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            faults = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
            mapped[len(mapped) // 2]
            if resource.getrusage(resource.RUSAGE_THREAD).ru_majflt == faults:
                pytest.skip("the file system keeps files in memory")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def drafts(drafter: Drafter, tokens: np.ndarray) -> tuple[list[list[int]], int]:
    """Trees after several contexts, and how often the thread waited for a page meanwhile."""
    contexts = [tokens[at : at + 20] for at in range(5_000, 200_000, 9_973)]
    sequences = [drafter.begin(context) for context in contexts]
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
    trees = [sequence.draft(16) for sequence in sequences]
    waited = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt - before
    return [tree.token_ids.tolist() for tree in trees], waited


def test_drafts_do_not_wait_and_find_it_later(store: tuple[Path, np.ndarray]) -> None:
    path, tokens = store
    with Datastore.open(path, load="ram") as whole:
        expected, _ = drafts(Drafter(datastore=whole), tokens)
    assert sum(map(len, expected)) > 100
    forget(path)
    drafter = Drafter(datastore=path)
    first, waited = drafts(drafter, tokens)
    assert waited == 0
    assert first != expected  # some of it was missing
    deadline = time.monotonic() + 20
    while drafts(drafter, tokens) != (expected, 0):
        assert time.monotonic() < deadline, "what was asked for has not come"
        time.sleep(0.01)


def test_drafts_wait_if_told_to(store: tuple[Path, np.ndarray]) -> None:
    path, tokens = store
    with Datastore.open(path, load="ram") as whole:
        expected, _ = drafts(Drafter(datastore=whole), tokens)
    forget(path)
    found, waited = drafts(Drafter(datastore=path, load="mmap-wait"), tokens)
    assert found == expected
    assert waited > 0


def test_counts_always_wait(store: tuple[Path, np.ndarray]) -> None:
    path, tokens = store
    forget(path)
    with Datastore.open(path) as opened:
        query = tokens[5_000:5_003]
        pairs = np.lib.stride_tricks.sliding_window_view(tokens.reshape(1000, 1000), 3, axis=1)
        assert opened.count(query) == int((pairs == query).all(axis=-1).sum())
        assert len(opened.continuations(query, limit=5)) > 0
