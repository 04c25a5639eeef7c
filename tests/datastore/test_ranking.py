"""Tables for ranking: who makes them, who uses them, and that nothing changes without them."""

import lzma
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import world

from sssd import Datastore, DatastoreBuilder, Drafter
from sssd.datastore import build
from sssd.errors import InvalidArgumentError

DATA = Path(__file__).parent.parent / "data"
END = 499


def trees(path: Path | None, ranking: bool = True, load: str = "ram") -> list[tuple[list[int], ...]]:
    """Drafts along a text."""
    drafter = Drafter(end_token_ids=[END], datastore=path, ranking=ranking, load=load)
    ids = world.text(random.Random(5), 300)
    found = []
    with drafter.begin(ids[:100]) as sequence:
        for at in range(100, 300, 3):
            tree = sequence.draft(max_nodes=24)
            found.append((tree.token_ids.tolist(), tree.parents.tolist(), tree.probs.tolist()))
            sequence.extend(ids[at : at + 3])
    return found


def test_without_ranking_drafts_are_those_of_a_store_without_tables(tmp_path: Path) -> None:
    plain, ranked = (
        world.store(tmp_path / "plain", ranking=False),
        world.store(tmp_path / "ranked", ranking=True),
    )
    without = trees(plain)
    assert trees(plain, ranking=False) == trees(ranked, ranking=False) == without
    with_tables = trees(ranked)
    assert with_tables != without
    assert with_tables == trees(ranked) == trees(ranked, load="mmap-wait")


def test_small_stores_have_tables_only_if_asked(tmp_path: Path) -> None:
    for ranking, tokens in ((None, None), (False, None), (True, 20_000)):
        with Datastore.open(world.store(tmp_path / "store", ranking=ranking)) as opened:
            (file,) = opened.info.files
            assert (file.ranking_tokens, file.version) == (tokens, 2 if tokens else 1)
            opened.verify()


def test_a_memory_that_does_not_suffice_is_refused(tmp_path: Path) -> None:
    arguments = {"vocab_size": 128_256, "max_memory": 1 << 27}
    with pytest.raises(InvalidArgumentError, match=r"tables for ranking: at least \d+ MiB"):
        DatastoreBuilder(tmp_path / "store", ranking=True, **arguments)
    DatastoreBuilder(tmp_path / "store", **arguments).close()


def test_the_builder_writes_the_tables_of_its_version(tmp_path: Path) -> None:
    """Written once, as the files of ``test_format.py``."""
    with DatastoreBuilder(tmp_path / "store", vocab_size=20, ranking=True) as builder:
        for length in (0, 1, 50, 200, 50):
            builder.add([index * index % 17 + (index * 7) % 3 for index in range(length)])
    golden = lzma.decompress((DATA / "golden" / "ranking-2.xz").read_bytes())
    assert (tmp_path / "store").read_bytes() == golden


def test_progress_comes_to_its_total(tmp_path: Path) -> None:
    builder = DatastoreBuilder(tmp_path / "store", vocab_size=world.VOCABULARY, ranking=True, threads=1)
    for ids in world.documents():
        builder.add(ids)
    seen: list[tuple[int, int]] = []
    symbols = builder.symbols
    builder.finish(lambda done, total: seen.append((done, total)))
    assert all(done <= total == 2 * symbols for done, total in seen)


def test_the_command_and_build_pass_it_on(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(1000, dtype=np.uint32) % 90)
    arguments = [
        "--vocab-size",
        "100",
        "--end-token",
        "89",
        "-o",
        str(tmp_path / "out"),
        "--quiet",
        "--ranking",
    ]
    command = [sys.executable, "-m", "sssd", "build", *arguments, str(tmp_path / "ids.npy")]
    subprocess.run(command, check=True, capture_output=True)
    built = tmp_path / "built"
    build(tmp_path / "ids.npy", built, vocab_size=100, end_token_id=89, ranking=False)
    found = [Datastore.open(path).info.files[0].ranking_tokens for path in (tmp_path / "out", built)]
    assert found == [1000, None]
