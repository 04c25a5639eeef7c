"""Files of every format version stay readable, and a builder that writes other bytes has to say so.

``tests/data/datastore-v1.sssd.xz`` was written once and is not to be written again: a change of the bytes is
a new version, with a file of its own.
"""

import lzma
from pathlib import Path

import numpy as np
import pytest

from sssd.datastore import Datastore, DatastoreBuilder

DATA = Path(__file__).parent.parent / "data"
VERSION = 1


def build(path: Path) -> None:
    """Documents with every section in use, more than two fences, an empty and a repeated document."""
    with DatastoreBuilder(path, vocab_size=300, fingerprint=bytes(range(32)), deduplicate=True) as builder:
        for length in (0, 1, 50, 200, 50):
            builder.add([index * index % 17 + (index * 7) % 3 for index in range(length)])
        builder.add_stream([299, 5, 6, 0, 7, 8, 0, 9], 0)


def test_the_builder_writes_the_bytes_of_its_version(tmp_path: Path) -> None:
    build(tmp_path / "store")
    golden = lzma.decompress((DATA / f"datastore-v{VERSION}.sssd.xz").read_bytes())
    assert (tmp_path / "store").read_bytes() == golden


@pytest.mark.parametrize("file", sorted(DATA.glob("datastore-v*.sssd.xz")), ids=lambda file: file.name)
def test_a_file_of_every_version_is_read(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "store"
    path.write_bytes(lzma.decompress(file.read_bytes()))
    with Datastore.open(path, vocab_size=300, fingerprint=bytes(range(32))) as store:
        store.verify()
        info = store.info.files[0]
        assert f"datastore-v{info.version}.sssd.xz" == file.name
        assert (info.tokens, info.documents, info.segments, info.deduplicated) == (259, 7, 1, True)
        assert store.count([5, 6, 0]) == 1
        assert [rest.tolist() for rest in store.continuations([299])] == [[5, 6, 0]]
        assert store.count([0]) == 8
        ids, shares = store.successors(5)
        assert ids[shares.argmax()] == ids[0]
        assert np.all(np.diff(shares) <= 0)
