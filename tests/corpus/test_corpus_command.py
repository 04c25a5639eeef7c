"""``python -m sssd corpus``, and the other commands on the folder of a corpus."""

import json
from pathlib import Path

import pytest
from folders import document

from sssd.cli import main
from sssd.corpus import Corpus

pytest.importorskip("rich")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, serials in {"a": range(3), "b": range(3, 8)}.items():
        lines = [json.dumps({"key": f"k{serial}", "ids": document(serial)}) for serial in serials]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    path = tmp_path / "corpus"
    for name in "ab":
        command = ["corpus", "add", str(path), str(tmp_path / f"{name}.jsonl"), "--vocab-size", "12"]
        command += ["--source", f"log/{name}", "--metadata", "lang=en", "--id-field", "key", "--quiet"]
        assert main([*command, "--added", f"2026-01-0{1 + 'ab'.index(name)}"]) == 0
    return path


def test_add_and_ls(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "8 documents" not in capsys.readouterr().out
    assert main(["corpus", "ls", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "log/a" in shown
    assert "lang=en" in shown
    assert "2026-01-02T00:00:00Z" in shown
    assert main(["corpus", "ls", str(folder), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["tokens"] == 72
    assert sum(part["documents"] for segment in content["segments"] for part in segment["parts"]) == 8
    assert (folder / content["segments"][0]["file"]).is_file()


def test_rm_expire_merge_and_verify(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("k4\nk5\n")
    assert main(["corpus", "rm", str(folder), "--id", "k3", "--ids-from", str(tmp_path / "ids")]) == 0
    assert "3 documents of 27 tokens deleted" in capsys.readouterr().out
    assert main(["corpus", "rm", str(folder), "--source", "log/*", "--before", "2026-01-02"]) == 0
    assert "3 documents" in capsys.readouterr().out
    assert main(["corpus", "merge", str(folder), "--all", "--grace", "0"]) == 0
    assert "18 tokens in 1 segment" in capsys.readouterr().out
    assert main(["corpus", "verify", str(folder)]) == 0
    assert "intact" in capsys.readouterr().out
    assert main(["corpus", "expire", str(folder), "--max-tokens", "100"]) == 0
    assert "0 documents" in capsys.readouterr().out
    assert main(["corpus", "expire", str(folder), "--older-than", "30d"]) == 0
    assert "2 documents" in capsys.readouterr().out
    (folder / "manifest.json").write_text("x")
    assert main(["corpus", "verify", str(folder)]) == 1


def test_export(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["corpus", "export", str(folder), "--source", "log/a", "-o", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["input_ids"] for row in rows] == [document(serial) for serial in range(3)]
    assert rows[0]["source"] == "log/a"
    assert main(["corpus", "export", str(folder), "-o", str(out)]) == 1
    assert "choose another name" in capsys.readouterr().err
    assert main(["corpus", "add", str(tmp_path / "again"), str(out), "--vocab-size", "12"]) == 0
    assert sum(1 for _ in Corpus(tmp_path / "again").documents()) == 3


def test_shares_push_and_pull(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    other = str(tmp_path / "other")
    for share in ("1/2", "0/2"):
        assert main(["corpus", "add", other, *inputs, "--shard", share, "--vocab-size", "12"]) == 0
    assert main(["corpus", "adopt", other]) == 0
    assert "8 documents taken over" in capsys.readouterr().out
    assert main(["corpus", "push", other, f"file://{tmp_path}/there"]) == 0
    assert main(["corpus", "pull", f"file://{tmp_path}/there", str(tmp_path / "copy")]) == 0
    assert main(["corpus", "pull", f"file://{tmp_path}/there", str(folder)]) == 1
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["rm", "FOLDER"], 2, "say what to delete"),
        (["expire", "FOLDER"], 2, "say what to delete"),
        (["ls", "FOLDER/nothing"], 1, "is no corpus"),
        (["rm", "FOLDER/nothing", "--source", "x"], 1, "is no corpus"),
        (["add", "FOLDER", "FOLDER/nothing.jsonl"], 1, "No such file"),
        (["add", "FOLDER", "a.jsonl", "--vocab-size", "13"], 1, "not of 13"),
    ],
)
def test_errors(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    says: str,
) -> None:
    monkeypatch.chdir(folder.parent)
    assert main(["corpus", *(argument.replace("FOLDER", str(folder)) for argument in arguments)]) == status
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["add", "F", "x", "--shard", "2/2"],
        ["add", "F", "x", "--added", "y"],
        ["expire", "F", "--older-than", "3"],
    ],
)
def test_arguments_that_are_none(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["corpus", *arguments])
    assert raised.value.code == 2


def test_other_commands_take_the_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(json.dumps({"prompt_ids": document(1)[:4], "response_ids": document(1)[4:]}))
    assert main(["info", str(folder)]) == 0
    assert "tokens" in capsys.readouterr().out
    assert main(["verify", str(folder)]) == 0
    assert "intact" in capsys.readouterr().out
    assert main(["query", str(folder), "--ids", ",".join(map(str, document(1)[:3]))]) == 0
    replay = ["replay", str(trace), "--datastore", str(folder), "--budgets", "4", "--quiet"]
    assert main(replay) == 0
    assert "accepted" in capsys.readouterr().out
