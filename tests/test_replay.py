"""Replay: the rule, the files, the command."""

import gzip
import json
import lzma

import numpy as np
import pytest

from sssd import Drafter, DraftTree
from sssd.cli import main
from sssd.replay import Replay, Request, TraceError, count_accepted, read_trace, trace_name

PASSAGE = list(range(10, 30))
RECORD = {"prompt_ids": [*PASSAGE, 1], "response_ids": PASSAGE}


def write(path, *records):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def test_the_rule_on_a_copied_passage():
    """19 tokens follow the first; each full step takes 4 drafted tokens and one more: 5, 5, 5, 4."""
    replay = Replay(4)
    replay.run(Drafter(), Request(np.array(RECORD["prompt_ids"]), np.array(PASSAGE)))
    row = replay.row("copy")
    assert (row["tokens"], row["steps"], row["requests"]) == (19, 4, 1)
    assert row["tokens_per_step"] == 19 / 4
    assert row["accepted_per_step"] == (4 + 4 + 4 + 4) / 4
    assert 0 < row["drafted_per_step"] <= 4
    assert 0 < row["expected_accepted_per_step"] <= row["drafted_per_step"]


def test_nothing_to_match_takes_a_step_a_token():
    replay = Replay(8)
    replay.run(Drafter(), Request(np.array([1]), np.array([2, 3, 4, 5])))
    assert (replay.tokens, replay.steps, replay.accepted) == (3, 3, 0)


def test_short_responses_take_no_step():
    replay = Replay(8)
    for response in ([], [7]):
        replay.run(Drafter(), Request(np.array([1]), np.array(response, np.int32)))
    assert (replay.requests, replay.tokens, replay.steps) == (2, 0, 0)
    assert replay.row("x")["tokens_per_step"] == 0


def test_acceptance_stops_at_the_end_of_the_recording():
    tree = DraftTree([5, 0, 0], [-1, 0, 1])
    assert count_accepted(tree, np.array([5])) == 1
    assert count_accepted(tree, np.array([5, 0, 7])) == 2
    assert count_accepted(tree, np.array([4])) == 0


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_traces_are_read(tmp_path, suffix):
    path = write(tmp_path / f"dev.copy.jsonl{suffix}", RECORD, RECORD)
    assert trace_name(path) == "dev.copy"
    first, _ = read_trace(path)
    assert first.prompt_ids.tolist() == RECORD["prompt_ids"]
    assert first.response_ids.dtype == np.int32


def test_texts_are_tokenised(tmp_path):
    path = write(tmp_path / "t.jsonl", {"prompt": "ab", "response": "c"})
    (request,) = read_trace(path, lambda text: [ord(letter) for letter in text])
    assert (request.prompt_ids.tolist(), request.response_ids.tolist()) == ([97, 98], [99])
    with pytest.raises(TraceError, match="--tokenizer"):
        list(read_trace(path))


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"prompt_ids": [1.5], "response_ids": []}',
        '{"prompt_ids": [-1], "response_ids": []}',
    ],
)
def test_broken_lines_are_named(tmp_path, line):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + line + "\n")
    with pytest.raises(TraceError, match=r"broken.jsonl, line 2: "):
        list(read_trace(path))


def test_broken_archives_are_named(tmp_path):
    path = write(tmp_path / "cut.jsonl.xz", RECORD)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TraceError, match=r"cut\.jsonl\.xz cannot be read"):
        list(read_trace(path))


def test_the_command_writes_a_table_and_json(tmp_path, capsys):
    path, out = write(tmp_path / "copy.jsonl", RECORD), tmp_path / "out.json"
    assert main(["replay", str(path), "--budgets", "1,4", "--end-token-id", "29", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["results"]
    assert [(row["trace"], row["budget"]) for row in rows] == [("copy", 1), ("copy", 4)]
    assert set(rows[0]) == {
        *("trace", "budget", "requests", "tokens", "steps", "tokens_per_step", "accepted_per_step"),
        *(
            "drafted_per_step",
            "expected_accepted_per_step",
            "draft_us_p50",
            "draft_us_p99",
            "append_us_per_token",
            "sources",
            "reliability",
        ),
    }
    assert "copy" in capsys.readouterr().out


def test_the_command_names_what_is_missing(tmp_path, capsys):
    assert main(["replay", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["replay", "x", "--budgets", "2000"])


def test_a_datastore_is_matched(tmp_path):
    """The store knows the passage that the prompt does not."""
    from sssd import DatastoreBuilder

    store = tmp_path / "store.sssd"
    builder = DatastoreBuilder(store, vocab_size=100)
    builder.add(PASSAGE)
    builder.finish()
    request = Request(np.array([1, 2]), np.array(PASSAGE))
    with_store, without = Replay(8), Replay(8)
    with_store.run(Drafter(datastore=store), request)
    without.run(Drafter(), request)
    assert without.accepted == 0
    assert with_store.accepted >= 14
