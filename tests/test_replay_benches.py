"""Spec-Bench and long contexts: no answer is in what it is drafted from, and pages show what was measured."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from sssd import Datastore, DatastoreBuilder
from sssd.replay import Request

ROOT = Path(__file__).parent.parent


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benches/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def specbench():
    return loaded("specbench")


@pytest.fixture(scope="module")
def contexts():
    return loaded("long_contexts")


def request(prompt, response):
    return Request(np.array(prompt, np.int32), np.array(response, np.int32))


@pytest.mark.parametrize("name", ["specbench", "long_contexts"])
def test_the_pages_show_what_was_measured(name):
    figures = json.loads((ROOT / f"benches/results/{name.replace('_', '-')}.json").read_text())
    assert loaded(name).table(figures) in (ROOT / f"docs/{name.replace('_', '-')}.md").read_text()


def test_answers_in_the_datastore_are_found(specbench, tmp_path):
    random = np.random.default_rng(0)
    held, other = random.integers(3, 1000, (2, 40), np.int32)
    with DatastoreBuilder(tmp_path / "store.sssd", vocab_size=1000) as builder:
        builder.add([*random.integers(3, 1000, 20).tolist(), *held.tolist(), 2])
    store = Datastore.open(tmp_path / "store.sssd")
    short = request([5], held[:8])
    assert specbench.overlap([request([5], other), short], store) == {"share": 0, "largest": 0}
    # of 25 runs of each, all, none, and the first 5
    half = request([5], [*held[:20], *other[:20]])
    found = specbench.overlap([request([5], held), request([5], other), half], store)
    assert found == {"share": pytest.approx(30 / 75), "largest": 1}


def test_a_turn_has_the_turns_before_it_and_not_itself(contexts):
    fresh = iter(range(10_000))
    take = lambda count: [next(fresh) for _ in range(count)]  # noqa: E731
    traces = {
        "long": [request(take(40), take(10)) for _ in range(6)],
        "short": [request(take(7), take(5)) for _ in range(12)],
    }
    stream = contexts.joined(traces)
    # each trace in its order, and as far along as the other
    assert [[turn[1] for turn in stream.turns if turn[0] == name] for name in traces] == list(traces.values())
    assert [name for name, _, _ in stream.turns[:6]] == ["long", "short", "short", "long", "short", "short"]
    for turn, (_, asked, _) in enumerate(stream.turns):
        assert stream.prompt(turn, 0).tolist() == asked.prompt_ids.tolist()
        prompt = stream.prompt(turn, 200)
        assert (len(prompt), prompt[-len(asked.prompt_ids) :].tolist()) == (200, asked.prompt_ids.tolist())
        assert not set(prompt.tolist()) & set(asked.response_ids.tolist())
        # what stands before it is the answer to the turn before
        before = stream.turns[turn - 1][1].response_ids
        assert prompt[: -len(asked.prompt_ids)][-len(before) :].tolist() == before.tolist()


def test_turns_are_chosen_evenly_from_each_trace(contexts):
    traces = {"many": [request([1] * 9, [2] * 3)] * 50, "few": [request([3] * 9, [4] * 3)] * 2}
    stream = contexts.joined(traces)
    chosen = contexts.chosen(stream, 5)
    names = [stream.turns[turn][0] for turn in chosen]
    assert (names.count("many"), names.count("few"), chosen) == (5, 2, sorted(set(chosen)))
