"""README's table: it is what the results say, and the tokens are made as they were."""

import importlib.util
import json
import lzma
import random
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("table", ROOT / "benches/table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name):
    return json.loads((ROOT / f"benches/results/{name}.json").read_text())["results"]


def test_the_readme_shows_what_was_measured(table):
    reference = json.loads(table.REFERENCE.read_text())
    text = table.markdown(rows("replay-self"), rows("replay-store"), reference)
    assert text in (ROOT / "README.md").read_text()


def test_another_set_of_workloads_is_compared_with_nothing(table):
    reference = json.loads(table.REFERENCE.read_text())
    own = [row for row in rows("replay-self") if row["trace"] != "dev.rag"]
    with pytest.raises(SystemExit, match="rag"):
        table.markdown(own, rows("replay-store"), reference)


def record(number, **other):
    return {"repo": "some/texts", "license": "MIT", "workload": "chat", "prompt": f"prompt {number}", **other}


@pytest.fixture
def traces(tmp_path):
    """Two workloads, one of chats of several turns, and a text for the datastore."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "datastore").mkdir()
    turns = [
        {"role": "user", "content": "question one"},
        {"role": "assistant", "content": "answer one"},
        {"role": "user", "content": "and two"},
        {"role": "assistant", "content": "answer two"},
    ]
    files = {
        "dev/chat": [record(number, response=f"response {number}") for number in range(50)],
        "dev/talk": [record(0, turns=turns, workload="talk"), record(1, response="no")],
        "datastore/some": [{"text": "one text", "source": "some/texts"}, {"text": "x", "source": "other"}],
    }
    for name, records in files.items():
        with lzma.open(tmp_path / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(one)}\n" for one in records)
    return tmp_path


def encode(text):
    return [ord(letter) for letter in text]


def decode(ids):
    return "".join(map(chr, ids))


def prepared(table, traces, workload):
    out = traces / "out"
    table.prepare(traces, out, encode)
    return [json.loads(line) for line in (out / f"dev.{workload}.jsonl").read_text().splitlines()]


def test_records_come_in_an_order_drawn_once_until_there_are_enough(table, traces, monkeypatch):
    monkeypatch.setattr(table, "TOKENS", 100)
    found = prepared(table, traces, "chat")
    order = list(range(50))
    random.Random(7).shuffle(order)
    assert [decode(row["prompt_ids"]) for row in found] == [
        f"prompt {number}" for number in order[: len(found)]
    ]
    lengths = [len(row["response_ids"]) for row in found]
    assert sum(lengths[:-1]) < 100 <= sum(lengths)
    assert all(row["response_ids"][-1] == table.END_TOKEN for row in found)


def test_every_turn_is_a_request_with_all_before_it(table, traces):
    found = prepared(table, traces, "talk")  # the answer "no" is too short
    assert [decode(row["response_ids"][:-1]) for row in found] == ["answer one", "answer two"]
    assert decode(found[1]["prompt_ids"]) == (
        "<user>\nquestion one\n<assistant>\nanswer one\n<user>\nand two\n"
    )


def test_long_prompts_keep_their_end_and_long_responses_their_start(table, monkeypatch):
    monkeypatch.setattr(table, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(table, "RESPONSE_TOKENS", 8)
    (row,) = table.requests([record(123, response="abcdefghijkl")], encode)
    assert (decode(row["prompt_ids"]), decode(row["response_ids"][:-1])) == (" 123", "abcdefgh")


def test_texts_of_the_datastore_are_closed(table, traces):
    prepared(table, traces, "chat")
    end = table.END_TOKEN
    store = np.load(traces / "out/store.npy")
    assert (store.dtype, store.tolist()) == (np.uint32, [*encode("one text"), end, *encode("x"), end])


def test_what_is_there_is_not_made_again(table, traces, capsys):
    prepared(table, traces, "chat")
    assert "tokens of chat" in capsys.readouterr().out
    prepared(table, traces, "chat")
    assert capsys.readouterr().out == ""
    assert not list((traces / "out").glob("*.part"))


def test_sources_and_licences_are_named(table, traces):
    text = table.sources(traces)
    assert "| some/texts | MIT | chat 51, talk 1 | 1 |" in text
    assert "| other | not on the record |  | 1 |" in text
    page = (ROOT / "docs/traces.md").read_text()
    # each source of the texts behind the figures that ship stands on the page
    assert page.count("\n| ") > 15
    assert "CC-BY-NC" in page
