"""Mapped files that are changed in place under their readers: an error, never the end of the process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sssd import Drafter, errors
from sssd.datastore import Datastore, DatastoreBuilder

SETUP = """
import os, sys
import numpy as np
from sssd import Datastore, Drafter
from sssd.errors import DatastoreChangedError
path, size = sys.argv[1], int(sys.argv[2])
store = Datastore.open(path)
drafter = Drafter(vocab_size=5000, datastore=store, live_bytes=0)
request = [1, 2, 3, 1, 2, 3, 1]
sequences = [drafter.begin(request) for _ in range(8)]
alone = Drafter(vocab_size=5000, live_bytes=0).begin(request).draft()
def changed(call):
    try:
        call()
    except DatastoreChangedError as error:
        assert "renaming" in str(error) and 'load="ram"' in str(error), error
    else:
        raise AssertionError("no error")
os.truncate(path, size)
"""
USES = {
    "draft": "assert (sequences[0].draft().token_ids == alone.token_ids).all()",
    "draft_batch": "trees = drafter.draft_batch(sequences)\n"
    "assert all((tree.token_ids == alone.token_ids).all() for tree in trees)",
    "step": "drafter.step(sequences, [2] * 8, range(9)); drafter.step(sequences, [3] * 8, range(9))",
    "verify": "changed(store.verify)",
    "count": "changed(lambda: store.count([1, 2]))",
    "continuations": "changed(lambda: store.continuations([1]))",
    "successors": "changed(lambda: store.successors(1))",
    "info": "assert store.info.tokens == 800_000; repr(store)",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("built") / "store"
    rng = np.random.default_rng(0)
    with DatastoreBuilder(path, vocab_size=5000) as builder:
        for _ in range(40):
            builder.add(rng.integers(0, 5000, 20_000))
    return path.read_bytes()


@pytest.mark.parametrize("cut", ["half", "all", "page"])
def test_a_shortened_file_ends_nothing(tmp_path: Path, built: bytes, cut: str) -> None:
    path = tmp_path / "store"
    path.write_bytes(built)
    size = {"half": len(built) // 2, "all": 0, "page": len(built) - 4096}[cut]
    # each use in a process of its own, for the first one marks the store
    code = (
        SETUP
        + f"""
for name, use in {USES!r}.items():
    child = os.fork()
    if child == 0:
        exec(use)
        assert drafter.metrics["datastore_lost"] == 1
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, (name, status)
"""
    )
    subprocess.run([sys.executable, "-c", code, str(path), str(size)], check=True)


def test_a_file_in_ram_may_be_shortened(tmp_path: Path, built: bytes) -> None:
    path = tmp_path / "store"
    path.write_bytes(built)
    with Datastore.open(path, load="ram") as store:
        os.truncate(path, 0)
        store.verify()
        assert store.count([]) == 800_000
        assert Drafter(datastore=store).metrics["datastore_lost"] == 0


def test_another_store_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    for first, path in enumerate(paths):
        with DatastoreBuilder(path, vocab_size=100) as builder:
            builder.add([first, 2] * 5_000)
    assert paths[0].stat().st_size == paths[1].stat().st_size
    with Datastore.open(paths[0]) as store, paths[0].open("r+b") as file:
        drafter = Drafter(datastore=store)
        assert drafter.metrics["datastore_lost"] == 0
        file.write(paths[1].read_bytes())
        file.flush()
        os.utime(paths[0], ns=(1, 1))  # whatever the clock's step
        for call in (lambda: store.count([1]), store.verify):
            with pytest.raises(errors.DatastoreChangedError, match="overwritten in place"):
                call()
        assert drafter.metrics["datastore_lost"] == 1
        file.seek(0)
        file.write(b"\0")


def test_a_file_that_is_only_touched_or_replaced_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with DatastoreBuilder(path, vocab_size=10) as builder:
        builder.add([1, 2, 3])
    with Datastore.open(path) as store:
        os.utime(path, ns=(1, 1))
        path.chmod(0o600)
        assert store.count([1, 2]) == 1
        os.utime(path)
        path.rename(tmp_path / "moved")
        path.write_bytes(b"another")
        assert store.count([1, 2]) == 1
        (tmp_path / "moved").unlink()
        store.verify()
        assert Drafter(datastore=store).metrics["datastore_lost"] == 0
