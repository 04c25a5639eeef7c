"""Corpus readers and the commands build, info, verify and query."""

import gzip
import io
import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sssd.cli import main
from sssd.datastore import (
    CorpusError,
    Datastore,
    corpus_files,
    corpus_format,
    read_documents,
    read_tokens,
    tokenizer_fingerprint,
)
from sssd.errors import InvalidArgumentError

ROWS: list[dict[str, Any]] = [{"text": "one two"}, {"text": ""}, {"text": "drei 四"}]
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "more"},
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}],
    },
]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstandard(data: bytes) -> bytes:
    module = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    return bytes(pytest.importorskip(module).compress(data))


def read(data: bytes, name: str, **options: Any) -> list[Any]:
    found = read_documents(io.BytesIO(data), name, **options)
    return [document if isinstance(document, str) else document.tolist() for document in found]


@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard)]
)
def test_compressed_json_lines(suffix: str, compress: Any) -> None:
    data = compress(jsonl(ROWS))
    assert read(data, "corpus.jsonl" + suffix) == [row["text"] for row in ROWS]
    if suffix:
        with pytest.raises(CorpusError, match=r"corpus\.jsonl.*damaged"):
            read(data[: len(data) // 2], "corpus.jsonl" + suffix)


def test_fields() -> None:
    assert read(jsonl([{"messages": CHAT}]), "a.jsonl") == ["hi", "ab"]
    assert read(jsonl([{"conversations": [{"from": "gpt", "value": "x"}]}]), "a.jsonl") == ["x"]
    assert read(jsonl([{"input_ids": [1, 2]}, {"input_ids": []}]), "a.jsonl") == [[1, 2], []]
    assert read(jsonl([{"text": "no", "body": "yes"}]), "a.jsonl", field="body") == ["yes"]
    assert read(jsonl([{"text": None}]) + b"\n\n", "a.jsonl") == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"text": "a"}\n{"text"\n', "a.jsonl: line 2 is not JSON"),
        (b"[1]\n", "line 1 is not a JSON object"),
        (b'{"other": 1}\n', "no field with a document; choose one with --field .fields: other"),
        (b'{"text": 3}\n', "field 'text' is neither text"),
        (b'{"text": [1.5]}\n', "field 'text' is neither text"),
    ],
)
def test_bad_json_lines(data: bytes, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        read(data, "a.jsonl")


def test_parquet_and_arrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"id": [1, 2, 3], "messages": [CHAT[:2], None, CHAT[:2]]})
    parquet.write_table(table, tmp_path / "chat.parquet")
    for kind in ("new_file", "new_stream"):
        with getattr(pyarrow.ipc, kind)(tmp_path / f"{kind}.arrow", table.schema) as writer:
            writer.write_table(table)
    for file in ("chat.parquet", "new_file.arrow", "new_stream.arrow"):
        assert read((tmp_path / file).read_bytes(), file) == ["hi", "hi"]
        with pytest.raises(CorpusError, match=file):
            read((tmp_path / file).read_bytes()[:50], file)
    with pytest.raises(CorpusError, match="no field 'body'"):
        read((tmp_path / "chat.parquet").read_bytes(), "chat.parquet", field="body")


def test_plain_text_is_cut_at_line_ends() -> None:
    line = "0123456789" * 100 + "\n"
    documents = read((line * 3000).encode(), "a.txt")
    assert "".join(documents) == line * 3000
    assert len(documents) == 3
    assert all(document.endswith("\n") for document in documents)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
def test_token_arrays(dtype: str) -> None:
    tokens = np.arange(3_000_000) % 60_000
    binary = tokens.astype(f"<{dtype[0]}{np.dtype(dtype).itemsize}").tobytes()
    file = io.BytesIO()
    np.save(file, tokens.astype(dtype))
    assert np.array_equal(np.concatenate(list(read_tokens(io.BytesIO(binary), "a.bin", dtype=dtype))), tokens)
    assert np.array_equal(np.concatenate(list(read_tokens(io.BytesIO(file.getvalue()), "a.npy"))), tokens)


def test_bad_token_arrays() -> None:
    def saved(array: Any) -> io.BytesIO:
        file = io.BytesIO()
        np.save(file, array)
        return io.BytesIO(file.getvalue())

    for file, name, message in (
        (saved(np.zeros((2, 2), int)), "a.npy", "shape"),
        (saved(np.zeros(3)), "a.npy", "integers"),
        (io.BytesIO(b"no array"), "a.npy", "not a .npy file"),
        (io.BytesIO(b"123"), "a.bin", "wrong --dtype"),
    ):
        with pytest.raises(CorpusError, match=message):
            list(read_tokens(file, name))


def test_formats_and_folders(tmp_path: Path) -> None:
    assert corpus_format(Path("a.JSONL.gz")) == "jsonl"
    assert corpus_format(Path("a.gz")) is None
    with pytest.raises(InvalidArgumentError, match="--format"):
        read(b"", "a.csv")
    (tmp_path / "part").mkdir()
    for name in ("part/b.jsonl", "a.txt", "notes.csv"):
        (tmp_path / name).touch()
    assert corpus_files(tmp_path) == [tmp_path / "a.txt", tmp_path / "part/b.jsonl"]
    (tmp_path / "part/state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    assert corpus_files(tmp_path) == [tmp_path / "part/data.arrow"]
    with pytest.raises(FileNotFoundError):
        corpus_files(tmp_path / "nothing")
    (tmp_path / "bare").mkdir()
    with pytest.raises(CorpusError, match="known format"):
        corpus_files(tmp_path / "bare")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Splits at spaces; knows a few words."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "one": 1, "two": 2, "three": 3, "[END]": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def test_build_verify_and_query(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, corpus = str(tmp_path / "out.sssd"), tmp_path / "corpus.jsonl.gz"
    corpus.write_bytes(
        gzip.compress(jsonl([{"text": "one two three"}, {"text": "one two"}, {"text": "one two"}]))
    )
    ids = tmp_path / "ids.jsonl"
    ids.write_bytes(jsonl([{"input_ids": [1, 2, 2]}]))
    arguments = ["--tokenizer", str(tokenizer), "--end-token", "4", "--deduplicate", "--max-memory", "1G"]
    assert main(["build", out, str(corpus), str(ids), *arguments]) == 0
    assert "10 tokens in 3 documents, 1 duplicates left out" in capsys.readouterr().out
    from tokenizers import Tokenizer

    fingerprint = tokenizer_fingerprint(Tokenizer.from_file(str(tokenizer)))
    with Datastore.open(out, vocab_size=5, fingerprint=fingerprint) as store:
        assert sorted(rest.tolist() for rest in store.continuations([1, 2])) == [[2], [3, 4], [4]]
    assert main(["verify", out]) == 0
    assert "intact" in capsys.readouterr().out
    assert main(["info", out]) == 0
    assert fingerprint.hex()[:16] in capsys.readouterr().out
    assert main(["query", out, "--text", "one two", "--tokenizer", str(tokenizer)]) == 0
    shown = capsys.readouterr().out
    assert "33%  3  'three'" in shown
    assert main(["query", out, "--ids", "3, 1"]) == 0
    Path(out).write_bytes(Path(out).read_bytes()[:-1])
    assert main(["verify", out]) == 1
    assert "bytes long instead of" in capsys.readouterr().out


def test_build_from_token_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = np.array([1, 2, 0, 3, 0, 1, 2], np.uint16)
    stream.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "b.npy", stream)
    out = tmp_path / "out.sssd"
    inputs = [str(tmp_path / "a.bin"), str(tmp_path / "b.npy")]
    assert main(["build", str(out), *inputs, "--vocab-size", "4", "--end-token", "0"]) == 0
    with Datastore.open(out) as store:
        assert store.info.documents == 6
        assert sorted(rest.tolist() for rest in store.continuations([1, 2])) == [[], [], [0], [0]]


def test_errors_of_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": "x"}]))
    (tmp_path / "ids.jsonl").write_bytes(jsonl([{"ids": [7]}]))
    np.save(tmp_path / "a.npy", np.arange(3))
    before = sorted(tmp_path.iterdir())
    for name, arguments, message in (
        ("a.jsonl", [], "give --vocab-size or --tokenizer"),
        ("a.jsonl", ["--vocab-size", "4"], "the corpus is text; give --tokenizer"),
        ("ids.jsonl", ["--vocab-size", "4"], "ids.jsonl: token id 7"),
        ("a.npy", ["--vocab-size", "4"], "--end-token"),
        ("b.npy", ["--vocab-size", "4"], "No such file"),
        ("a.npy", ["--vocab-size", "4", "--end-token", "0", "--max-memory", "1K"], "max_memory is too small"),
    ):
        assert main(["build", str(tmp_path / "out"), str(tmp_path / name), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_runs_as_a_module(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sssd", "info", str(tmp_path / "no")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: [Errno 2] No such file")
