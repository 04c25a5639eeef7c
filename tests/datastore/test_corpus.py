"""The commands build, info, verify and query. What is read, and how, is tested in ``test_reading.py``."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sssd.cli import main
from sssd.datastore import Datastore, tokenizer_fingerprint


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


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
    assert main(["build", "-o", out, str(corpus), str(ids), *arguments]) == 0
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
    assert main(["build", "-o", str(out), *inputs, "--vocab-size", "4", "--end-token", "0"]) == 0
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
        ("ids.jsonl", ["--vocab-size", "4"], "ids.jsonl, line 1: token id 7"),
        ("a.npy", ["--vocab-size", "4"], "--end-token"),
        ("b.npy", ["--vocab-size", "4"], "No such file"),
        ("a.npy", ["--vocab-size", "4", "--end-token", "0", "--max-memory", "1K"], "max_memory is too small"),
    ):
        assert main(["build", "-o", str(tmp_path / "out"), str(tmp_path / name), *arguments]) == 1
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
