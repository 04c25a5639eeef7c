"""``sssd.vllm.Proposer`` in a runner that does what vLLM's does."""

import fake_vllm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sssd.errors import VocabularyMismatchError
from sssd.vllm import Proposer

PROMPT = [*range(10, 30), *range(10, 30)]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    monkeypatch.delenv("SSSD_VLLM", raising=False)


@pytest.fixture
def make(monkeypatch):
    """A runner with its proposer."""
    runner_class = fake_vllm.install(monkeypatch)

    def made(seed=0, rows=8, **options):
        return runner_class(Proposer(fake_vllm.config(**options)), fake_vllm.Target(seed), rows)

    return made


def check(runner):
    """What holds after every step: the sequences are the requests, and drafts are what vLLM takes."""
    proposer = runner.drafter
    for name in proposer.requests:
        if name in runner.requests and name in runner.input_batch.req_ids:
            state = runner.requests[name]
            if state.read == len(state.tokens) - 1:
                assert proposer.requests[name].token_ids.tolist() == state.tokens
    for draft in runner.drafts.values():
        assert type(draft) is list
        assert len(draft) <= proposer.k
        assert all(type(token) is int and 0 <= token < 64 for token in draft)
    assert proposer.counts.failed == 0


def decode(runner, name, tokens):
    """Steps until a request has so many tokens more."""
    state = runner.requests[name]
    wanted, before = len(state.tokens) + tokens, runner.steps
    while len(state.tokens) < wanted:
        runner.execute_model([name], 1000)
        check(runner)
    return runner.steps - before


def plain(prompt, tokens, seed=0):
    text, target = list(prompt), fake_vllm.Target(seed)
    for _ in range(tokens):
        text.append(target.next(text))
    return text


def test_a_finished_text_is_drafted_for_the_next_request(make):
    runner = make(stop=False)
    runner.add("a", PROMPT)
    first = decode(runner, "a", 60)
    runner.end("a")
    runner.add("b", PROMPT)
    second = decode(runner, "b", 60)
    assert runner.requests["b"].tokens[:100] == plain(PROMPT, 60)[:100]
    assert second < first / 3
    assert runner.drafter.counts.ended == 1


def test_an_aborted_text_is_learned_unless_nothing_is_to_be(make):
    runner = make(stop=False, learn=False)
    runner.add("a", PROMPT)
    decode(runner, "a", 30)
    runner.end("a")
    runner.add("b", PROMPT)
    decode(runner, "b", 1)
    assert runner.drafter.drafter.live_tokens == 0


def test_a_prediction_is_drafted_at_once(make):
    runner = make(stop=False)
    truth = plain(PROMPT, 60)
    runner.add("a", PROMPT, sssd_prediction=truth[len(PROMPT) :])
    assert decode(runner, "a", 50) < 15
    for wrong in ([], "no tokenizer here", [-5, 10**12], {"a": 1}, [[1], [2]], [0.5], None):
        runner.add(f"wrong {wrong}", PROMPT[::-1], sssd_prediction=wrong)
        decode(runner, f"wrong {wrong}", 3)


def test_a_request_may_have_no_drafts(make):
    runner = make(stop=False)
    runner.add("a", PROMPT, sssd_off=1)
    assert decode(runner, "a", 40) == 40
    assert not list(runner.drafter.requests)


def test_namespaces_and_adapters_are_kept_apart(make):
    runner = make(stop=False)
    for name, extra in (("a", {"sssd_namespace": "x"}), ("b", {}), ("c", {"sssd_namespace": "x" * 10_000})):
        runner.add(name, PROMPT, **extra)
        if name == "b":
            runner.requests[name].lora_request = type("Adapter", (), {"lora_name": "adapter"})()
        decode(runner, name, 5)
    assert {"x", "adapter", "x" * 256} <= runner.drafter.drafter.namespaces().keys()


def test_nothing_is_drafted_beyond_the_end(make):
    runner = make(stop=False, max_length=60)
    runner.add("a", [1, 2] * 25)
    while len(runner.requests["a"].tokens) < 60:
        room = 60 - len(runner.requests["a"].tokens)
        runner.execute_model(["a"], 1000)
        assert len(runner.drafts["a"]) < room
    runner.add("b", PROMPT, most=3)
    runner.target = fake_vllm.Target(0)
    decode(runner, "b", 1)
    assert len(runner.drafts["b"]) <= 2


def test_errors_cost_drafts_and_nothing_else(make, monkeypatch, caplog):
    runner = make(stop=False)
    runner.add("a", PROMPT)
    decode(runner, "a", 10)
    healthy = runner.drafter.requests

    class Broken:
        def step(self, *args, **options):
            raise RuntimeError("broken")

        def __iter__(self):
            return iter(())

        def __contains__(self, name):
            return False

    runner.drafter.requests = Broken()
    runner.execute_model(["a"], 1000)
    runner.drafter.requests = Broken()
    runner.execute_model(["a"], 1000)
    assert runner.drafter.counts.failed == 2
    assert runner.drafts == {"a": []}
    assert sum("goes without drafts" in record.message for record in caplog.records) == 1
    assert runner.drafter.requests is not healthy
    runner.drafter.counts.failed = 0
    decode(runner, "a", 40)
    assert runner.requests["a"].tokens[: len(PROMPT) + 50] == plain(PROMPT, 50)


def test_requests_beyond_the_memory_go_without_drafts(make):
    runner = make(stop=False, max_bytes="3M", live_bytes="1M")
    for name in range(8):
        prompt = np.random.default_rng(name).integers(0, 64, 400).tolist()
        runner.add(str(name), prompt, most=100)
    for _ in range(30):
        runner.execute_model([str(name) for name in range(8)], 1000)
    assert runner.drafter.counts.failed == 0
    assert runner.drafter.drafter.memory["used"] <= 3 << 20


def test_another_runner_is_told_apart_by_rows(make, monkeypatch):
    runner = make(stop=False)
    monkeypatch.setattr("sssd.vllm.proposer._is_known", lambda step: False)
    runner.add("a", PROMPT)
    runner.add("b", PROMPT[::-1])
    for turn in range(80):
        names = ["a", "b"] if turn % 20 < 15 else ["b"]
        runner.execute_model(names, 1000)
        for place, name in enumerate(names):
            assert runner.drafter.requests[f"row {place}"].token_ids.tolist() == runner.requests[name].tokens
    assert runner.accepted > 40
    assert runner.drafter.counts.failed == 0
    for name, prompt in (("a", PROMPT), ("b", PROMPT[::-1])):
        assert runner.requests[name].tokens == plain(prompt, len(runner.requests[name].tokens) - len(prompt))


def test_other_ranks_draft_nothing(make, monkeypatch):
    monkeypatch.setattr("sssd.vllm.proposer._is_first_rank", lambda: False)
    runner = make(stop=False)
    runner.add("a", PROMPT)
    assert decode(runner, "a", 40) == 40


def test_drafts_stop_where_passes_cost_too_much(make, monkeypatch):
    runner = make(stop=True)
    clock = [0.0]
    monkeypatch.setattr("sssd.vllm.proposer.time.perf_counter", lambda: clock[0])
    inner = type(runner).propose_draft_token_ids

    def slow(self, output, sampled):
        clock[0] += 0.01 * (1 + 0.9 * (output.total_num_scheduled_tokens - len(sampled)))
        return inner(self, output, sampled)

    monkeypatch.setattr(type(runner), "propose_draft_token_ids", slow)
    random = np.random.default_rng(0)
    for name in range(6):  # texts that never repeat: every drafted token costs nine tenths of a pass
        runner.target = fake_vllm.Target(name)
        runner.add(str(name), random.integers(0, 64, 100).tolist(), most=300)
        decode(runner, str(name), 250)
        runner.end(str(name))
    late = runner.drafter.counts.drafted
    runner.target = fake_vllm.Target(99)
    runner.add("late", random.integers(0, 64, 100).tolist(), most=300)
    steps = decode(runner, "late", 60)
    assert runner.drafter.counts.drafted - late <= 0.5 * steps
    assert runner.drafter.counts.failed == 0


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 5), rule=st.booleans())
def test_whatever_is_scheduled_every_text_is_the_targets(data, seed, rule):
    with pytest.MonkeyPatch.context() as monkeypatch:
        runner_class = fake_vllm.install(monkeypatch)
        runner = runner_class(Proposer(fake_vllm.config(k=5, stop=rule)), fake_vllm.Target(seed, 20), 6)
        prompts, begun = {}, 0
        for _ in range(data.draw(st.integers(1, 40))):
            what = data.draw(st.sampled_from(["add", "step", "step", "step", "end", "preempt"]))
            running = sorted(runner.requests)
            if what == "add" and len(running) < 6:
                name = str(begun)
                begun += 1
                prompts[name] = data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=60))
                runner.add(name, prompts[name])
            elif what == "end" and running:
                runner.end(data.draw(st.sampled_from(running)))
            elif what == "preempt" and running:
                runner.preempt(data.draw(st.sampled_from(running)))
            elif what == "step" and running:
                few = data.draw(st.lists(st.sampled_from(running), min_size=1, unique=True))
                few = [name for name in few if len(runner.requests[name].tokens) < 400]
                runner.execute_model(few, data.draw(st.sampled_from([1, 7, 1000])))
                check(runner)
        for name, state in runner.requests.items():
            text, target = list(prompts[name]), fake_vllm.Target(seed, 20)
            while len(text) < len(state.tokens):
                text.append(target.next(text))
            assert state.tokens == text


def test_a_store_of_another_vocabulary_is_refused_at_the_start(make, tmp_path):
    from sssd import DatastoreBuilder

    path = tmp_path / "store.sssd"
    with DatastoreBuilder(path, vocab_size=1000) as builder:
        builder.add([1, 2, 3])
    with pytest.raises(VocabularyMismatchError):
        make(datastore=str(path))


def test_a_store_is_opened_as_asked(make, tmp_path):
    from sssd import DatastoreBuilder

    path = tmp_path / "store.sssd"
    with DatastoreBuilder(path, vocab_size=64) as builder:
        builder.add([1, 2, 3])
    for load in ("ram", "mmap-wait"):
        store = make(datastore=str(path), load=load).drafter.drafter.datastore
        assert store.__reduce__()[1][1] == load


def test_counters_stand_in_the_registry(make):
    client = pytest.importorskip("prometheus_client")

    def shown(name):
        return client.REGISTRY.get_sample_value(f"sssd_vllm_{name}") or 0.0

    before = shown("drafted_total"), shown("steps_total")
    for _ in range(2):
        runner = make(stop=False)
        runner.add("a", PROMPT, most=200)
        for _ in range(64):
            runner.execute_model(["a"], 1000)
        before = before[0] + runner.drafter.counts.drafted, before[1] + 64
        assert (shown("drafted_total"), shown("steps_total")) == before
    assert shown("memory_bytes") == runner.drafter.drafter.memory["used"]


def test_the_mini_store_is_that_of_the_models_tokenizer(make, monkeypatch):
    import sssd.vllm.proposer as module

    attached = []
    monkeypatch.setattr(module, "attach", lambda drafter, load: attached.append((drafter, load)))
    proposer = make().drafter
    assert attached == [(proposer.drafter, proposer._load_tokenizer)]
    assert proposer.drafter.datastore is None
    make(datastore=None)
    assert len(attached) == 1


def test_samples_of_a_prompt_draft_what_running_ones_have_said(make):
    """By the settings of docs/rollouts.md: the second one begins when the first is half done."""

    def passes(**options):
        runner = make(stop=False, **options)
        runner.add("a", PROMPT, most=200, sssd_namespace="p", sssd_policy=1)
        decode(runner, "a", 100)
        runner.add("b", PROMPT, most=200, sssd_namespace="p", sssd_policy=1)
        runner.execute_model(["a", "b"], 1000)
        return decode(runner, "b", 80)

    assert passes(commit_tokens=8) < passes() / 2


def test_texts_of_old_policies_are_forgotten(make):
    runner = make(stop=False, keep_policies=2)
    for number, policy in enumerate([1, 1, 2, 3, "no number", 3, 6]):
        name = f"request {number}"
        runner.add(name, PROMPT, sssd_namespace="p", sssd_policy=policy)
        decode(runner, name, 20)
        runner.end(name)
        runner.execute_model([], 1000)
        texts = runner.drafter.requests._groups["p"].texts
        assert {held for held, _ in texts} == {1: {1}, 2: {1, 2}, 3: {2, 3}, 6: {6}}[
            policy if isinstance(policy, int) else 3
        ]
