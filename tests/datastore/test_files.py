"""Opening, closing, replacing and refusing datastore files."""

import errno
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sssd import errors
from sssd.datastore import Datastore, DatastoreBuilder


def build(
    path: Path, documents: list[list[int]] | None = None, vocab_size: int = 10, **options: object
) -> Path:
    with DatastoreBuilder(path, vocab_size=vocab_size, **options) as builder:  # type: ignore[arg-type]
        for document in [[1, 2, 3, 4], [1, 2, 5], [9]] if documents is None else documents:
            builder.add(document)
    return path


def test_info(tmp_path: Path) -> None:
    path = build(tmp_path / "store", fingerprint=bytes(range(32)))
    with Datastore.open([path, str(path)]) as store:
        info = store.info
        assert (info.vocab_size, info.tokens, info.documents, info.segments) == (10, 16, 6, 2)
        assert info.file_bytes == 2 * path.stat().st_size
        file = info.files[0]
        assert (file.path, file.version, file.tokens, file.documents) == (path, 1, 8, 3)
        assert file.fingerprint == bytes(range(32))
        assert not file.deduplicated
        assert file.uuid == info.files[1].uuid
        assert store.count([1, 2]) == 4
        assert repr(store) == f"Datastore({path}, {path})"


def test_a_store_without_documents(tmp_path: Path) -> None:
    with Datastore.open(build(tmp_path / "store", [])) as store:
        store.verify()
        assert store.count([]) == store.count([1]) == 0
        assert store.continuations([1]) == []
        assert [len(array) for array in store.successors(1)] == [0, 0]


def test_successors(tmp_path: Path) -> None:
    with Datastore.open(build(tmp_path / "store", [[0, 1], [0, 1], [0, 2], [0]])) as store:
        ids, shares = store.successors(0)
        assert (ids.dtype, shares.dtype) == (np.int32, np.float32)
        assert ids.tolist() == [1, 2]
        assert shares == pytest.approx([0.5, 0.25], rel=0.03)


def test_closed(tmp_path: Path) -> None:
    store = Datastore.open(build(tmp_path / "store"))
    assert not store.closed
    store.close()
    store.close()
    assert store.closed
    for call in (store.verify, lambda: store.count([1]), lambda: store.info, lambda: store.successors(1)):
        with pytest.raises(errors.ClosedError):
            call()


@pytest.mark.parametrize("ids", [[10], [-1], [0.5], ["a"], [[1]], [2**70]])
def test_invalid_tokens(tmp_path: Path, ids: list[object]) -> None:
    path = build(tmp_path / "store")
    with Datastore.open(path) as store:
        for call in (store.count, store.continuations):
            with pytest.raises(errors.InvalidTokenError):
                call(ids)
    builder = DatastoreBuilder(tmp_path / "other", vocab_size=10)
    with pytest.raises(errors.InvalidTokenError):
        builder.add(ids)
    builder.add([9])
    assert builder.finish().tokens == 1


def test_invalid_arguments(tmp_path: Path) -> None:
    path = build(tmp_path / "store")
    with (
        Datastore.open(path) as store,
        pytest.raises(errors.InvalidArgumentError, match="at least one token"),
    ):
        store.continuations([])
    for arguments in ({"vocab_size": 0}, {"vocab_size": 2**24 + 1}, {"vocab_size": 9, "max_memory": 1000}):
        with pytest.raises(errors.InvalidArgumentError):
            DatastoreBuilder(tmp_path / "other", **arguments)
    with pytest.raises(errors.InvalidArgumentError, match="32 bytes"):
        DatastoreBuilder(tmp_path / "other", vocab_size=9, fingerprint=b"short")
    with pytest.raises(errors.InvalidArgumentError, match="load"):
        Datastore.open(path, load="disk")  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgumentError):
        Datastore.open([])
    with pytest.raises(TypeError):
        Datastore.open(3)  # type: ignore[arg-type]
    assert sorted(tmp_path.iterdir()) == [path]


def test_wrong_model_is_refused(tmp_path: Path) -> None:
    path = build(tmp_path / "store", fingerprint=bytes([1] * 32))
    other = build(tmp_path / "other", fingerprint=bytes([2] * 32))
    larger = build(tmp_path / "larger", vocab_size=11)
    Datastore.open(path, vocab_size=10, fingerprint=bytes([1] * 32)).close()
    with pytest.raises(errors.VocabularyMismatchError, match="10 tokens, but the model has 11"):
        Datastore.open(path, vocab_size=11)
    with pytest.raises(errors.VocabularyMismatchError, match=r"another tokenizer.*build the datastore again"):
        Datastore.open(path, fingerprint=bytes([2] * 32))
    for pair in ([path, other], [path, larger]):
        with pytest.raises(errors.VocabularyMismatchError):
            Datastore.open(pair)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = build(tmp_path / "store")
    data = bytearray(path.read_bytes())
    with pytest.raises(FileNotFoundError, match="nothing"):
        Datastore.open(tmp_path / "nothing")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("text" * 2000)
    for wrong in (tmp_path / "empty", tmp_path / "text"):
        with pytest.raises(errors.CorruptDatastoreError, match="not a datastore"):
            Datastore.open(wrong)
    # a folder that is no corpus, or that nobody can read as one
    with pytest.raises((errors.CorpusError, errors.InvalidArgumentError), match="corpus"):
        Datastore.open(tmp_path)
    data[8] = 3
    path.with_name("newer").write_bytes(data)
    with pytest.raises(
        errors.DatastoreVersionError, match="version 3, but this release reads version 2; upgrade"
    ):
        Datastore.open(tmp_path / "newer")


@pytest.mark.parametrize("load", ["mmap", "ram"])
def test_verify_names_the_changed_bytes(tmp_path: Path, load: str) -> None:
    stream = np.random.default_rng(1).integers(0, 10, 2_000_000)
    path = build(tmp_path / "store", [stream])  # type: ignore[list-item]
    with path.open("r+b") as file:
        file.seek(4096 + (1 << 20) + 17)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with (
        Datastore.open(path, load=load) as store,  # type: ignore[arg-type]
        pytest.raises(errors.CorruptDatastoreError, match=r"bytes changed in 1052672\.\.2101248"),
    ):
        store.verify()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs the counts of Linux")
def test_opening_reads_little(tmp_path: Path) -> None:
    """Neither by calls nor by touching pages; the kernel maps 16 for each that is touched."""
    path = build(tmp_path / "store", [np.arange(3_000_000) % 10])  # type: ignore[list-item]
    script = (
        "import re, sys; from pathlib import Path; from sssd.datastore import Datastore\n"
        "count = lambda: int(re.search(r'rchar: (\\d+)', Path('/proc/self/io').read_text())[1])\n"
        "before = count(); store = Datastore.open(sys.argv[1]); print(count() - before)\n"
        "maps = Path('/proc/self/smaps').read_text()\n"
        "found = re.findall(re.escape(sys.argv[1]) + r'\\n(?:.*\\n)*?Rss: *(\\d+) kB', maps)\n"
        "assert found; print(sum(map(int, found)))"
    )
    printed = subprocess.check_output([sys.executable, "-c", script, str(path)])
    read, resident = map(int, printed.split())
    assert path.stat().st_size > 9 << 20
    assert read < 32_000
    assert resident <= 64


def test_equal_input_gives_equal_bytes_from_any_number_of_threads(tmp_path: Path) -> None:
    stream = np.random.default_rng(2).integers(0, 1000, 100_000)

    def built(index: int) -> bytes:
        return build(tmp_path / str(index), [stream[:50_000], stream[50_000:]], 1000).read_bytes()  # type: ignore[list-item]

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(built, range(16)))) == 1


def test_equal_input_gives_equal_bytes_in_any_process(tmp_path: Path) -> None:
    script = (
        "import sys; from sssd.datastore import DatastoreBuilder\n"
        "with DatastoreBuilder(sys.argv[1], vocab_size=10) as builder: builder.add([1, 2, 3])"
    )
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_replacing_a_file_leaves_its_readers_alone(tmp_path: Path) -> None:
    path = build(tmp_path / "store")
    with Datastore.open(path) as old:
        build(path, [[7, 7, 7]] * 1000)
        with Datastore.open(path) as new:
            assert (old.count([1, 2]), new.count([1, 2])) == (2, 0)
            assert (old.count([7]), new.count([7])) == (0, 3000)
        old.verify()


def test_many_threads_share_a_store(tmp_path: Path) -> None:
    documents = [[index % 7, index % 5, 9] for index in range(500)]
    with Datastore.open(build(tmp_path / "store", documents)) as store:
        expected = [store.count([token]) for token in range(10)]
        barrier = threading.Barrier(8)

        def ask(_: int) -> bool:
            barrier.wait()
            return all([store.count([token]) for token in range(10)] == expected for _ in range(200))

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(8)))


def test_a_builder_used_wrongly(tmp_path: Path) -> None:
    builder = DatastoreBuilder(tmp_path / "store", vocab_size=3)
    builder.finish()
    for call in (lambda: builder.add([1]), builder.finish, lambda: builder.symbols):
        with pytest.raises(errors.ClosedError):
            call()
    builder.close()
    with pytest.raises(RuntimeError, match="mine"), DatastoreBuilder(tmp_path / "other", vocab_size=3):
        raise RuntimeError("mine")
    with pytest.raises(OSError, match="missing"):
        DatastoreBuilder(tmp_path / "missing" / "store", vocab_size=3)
    with pytest.raises(OSError, match="name of a file"):
        DatastoreBuilder(tmp_path, vocab_size=3)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "store"]


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    for path in (*before, tmp_path, Path("/dev/zero")):
        for load in ("mmap", "ram"):
            refused = errors.SssdError if path.is_dir() else errors.CorruptDatastoreError
            with pytest.raises(refused, match="corpus" if path.is_dir() else "not a datastore file"):
                Datastore.open(path, load=load)  # type: ignore[arg-type]
        with pytest.raises(OSError, match="not the name of a file") as raised:
            DatastoreBuilder(path, vocab_size=3)
        assert raised.value.errno == (errno.EISDIR if path.is_dir() else errno.EINVAL)
        assert raised.value.filename == str(path)
    assert sorted(tmp_path.iterdir()) == before
    listening.close()


def test_errors_of_the_system_keep_their_number(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, number in ((tmp_path / "missing/store", errno.ENOENT), (tmp_path / "file/x", errno.ENOTDIR)):
        with pytest.raises(OSError, match=str(path)) as built:
            DatastoreBuilder(path, vocab_size=3)
        with pytest.raises(OSError, match=str(path)) as opened:
            Datastore.open(path)
        assert built.value.errno == opened.value.errno == number


def test_arrays_that_start_at_any_byte(tmp_path: Path) -> None:
    ids = np.arange(1000) % 7
    with Datastore.open(build(tmp_path / "plain", [ids.tolist()])) as store:
        for kind in ("<i8", "<i4", "<u4", "<u2", ">i8", ">i2"):
            array = np.frombuffer(b"x" + ids.astype(kind).tobytes(), kind, offset=1)
            assert array.flags.aligned is False
            odd = build(tmp_path / "odd", [array])  # type: ignore[list-item]
            assert odd.read_bytes() == (tmp_path / "plain").read_bytes()
            assert store.count(array[:9]) == store.count(ids[:9]) > 0
            assert len(store.continuations(array[:3], limit=5)) == 5
            with DatastoreBuilder(tmp_path / "stream", vocab_size=10) as builder:
                builder.add_stream(array, 9)
            assert (tmp_path / "stream").read_bytes() == odd.read_bytes()


def test_the_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert build(tmp_path / "store").stat().st_mode == (tmp_path / "plain").stat().st_mode
