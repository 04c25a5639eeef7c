"""Requests that join, leave and fail in a running batch: each gets what ``model.generate`` gives it alone."""

import os
import queue
import random
import time

import pytest
import torch
from served import CHARACTERS, make_model

from sssd.server import Engine
from sssd.server.errors import ApiError
from sssd.server.request import Request


class Client:
    """Submits one request, and gathers what comes."""

    def __init__(self, engine, prompt, options, **more):
        self.prompt, self.options, self.seed = prompt, options, more.get("seed", 0)
        self.updates = queue.Queue()
        self.request = Request(engine.prepare(prompt, options), self.updates.put, **more)
        engine.submit(self.request)

    def outcome(self):
        """Tokens, and how it ended."""
        tokens = []
        while True:
            update = self.updates.get(timeout=120)
            tokens += [piece.token for piece in update.pieces]
            if update.error is not None:
                return tokens, update.error.code
            if update.finish is not None:
                assert update.usage.output == len(tokens) + (update.finish == "stop")
                assert update.usage.accepted <= update.usage.drafted
                return tokens, update.finish

    def expected(self, model):
        torch.manual_seed(self.seed)
        inputs = torch.tensor([self.prompt])
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), **self.options)
        tokens = output[0, len(self.prompt) :].tolist()
        return tokens[:-1] if tokens[-1] == 2 else tokens


def anything(rng):
    """A prompt and options."""
    part = [rng.randrange(3, len(CHARACTERS) + 3) for _ in range(rng.randrange(1, 20))]
    prompt = (part * 3)[: rng.randrange(1, 60)]
    options = {"max_new_tokens": rng.randrange(1, 60), "do_sample": rng.random() < 0.5}
    if options["do_sample"]:
        options |= {"temperature": rng.choice([0.3, 0.8, 1.5]), "top_p": rng.choice([0.9, 1.0]), "top_k": 0}
    if rng.random() < 0.2:
        options["repetition_penalty"] = 1.2
    return prompt, options


def settled(engine):
    """Waits for the engine to be idle, and checks that nothing is left."""
    end = time.monotonic() + 30
    while engine.running or engine.waiting:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert engine.cache.bytes == 0
    assert engine.drafter.memory["sequences"] == 0


@pytest.fixture
def engines():
    made = []

    def make(model, tokenizer, **options):
        made.append(Engine(model, tokenizer, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


# rotary and learned positions, with and without a fast path, windows, shared layers of two kinds
@pytest.mark.parametrize("name", ["llama", "qwen2_mixed", "gpt2", "mistral"])
def test_every_text_is_that_of_generate(engines, tokenizer, name):
    model = make_model(name)
    engine = engines(model, tokenizer, max_running=4, max_nodes=5, prefill_tokens=16)
    rng = random.Random(name)
    clients, cancelled = [], set()
    for number in range(24):
        prompt, options = anything(rng)
        clients.append(Client(engine, prompt, options, seed=number, speculate=rng.random() < 0.9))
        if rng.random() < 0.2:
            cancelled.add(number)
            clients[-1].request.cancelled = True
        elif rng.random() < 0.3:
            time.sleep(rng.random() * 0.02)
    for number, client in enumerate(clients):
        tokens, end = client.outcome()
        expected = client.expected(model)
        if end == "cancelled":
            assert number in cancelled
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected, (number, client.options)
    settled(engine)
    assert engine.counts["passes"] < engine.counts["output_tokens"]
    assert (engine.passes.fast is not None) == (name in ("llama", "mistral"))


@pytest.mark.slow
def test_many_clients_for_long(engines, tokenizer):
    """64 clients at random with aborts: ten minutes with SSSD_FULL_TESTS, else some seconds."""
    model = make_model("llama")
    engine = engines(model, tokenizer, max_running=8, prefill_tokens=32)
    rng = random.Random(7)
    end = time.monotonic() + (600 if os.environ.get("SSSD_FULL_TESTS") else 8)
    running, served, number, rss = [], 0, 0, []
    while time.monotonic() < end or running:
        while len(running) < 64 and time.monotonic() < end:
            prompt, options = anything(rng)
            number += 1
            more = {"namespace": str(rng.randrange(8)), "prediction": rng.choice([None, prompt])}
            running.append(Client(engine, prompt, options, seed=number, **more))
        for client in running:
            client.request.cancelled |= rng.random() < 0.02
        client = running.pop(rng.randrange(min(8, len(running))))
        tokens, finish = client.outcome()
        served += 1
        if finish == "cancelled":
            assert client.request.cancelled
            assert tokens == client.expected(model)[: len(tokens)]
        else:
            assert tokens == client.expected(model)
        if served % 200 == 0:
            rss.append(resident())
    settled(engine)
    assert served == number > 64
    if len(rss) > 10:
        assert max(rss[len(rss) // 2 :]) < max(rss[: len(rss) // 2]) * 1.1, rss


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_failing_request_harms_no_other(engines, model, tokenizer):
    engine = engines(model, tokenizer, max_running=4, max_nodes=4)

    class Failing:
        def __init__(self):
            self.calls = 0

        def __call__(self, ids, scores):
            self.calls += 1
            if self.calls == 5:
                raise RuntimeError("as was to be expected")
            return scores

    clients = [
        Client(engine, [5, 6, 7, 8, 5, 6, 7], {"max_new_tokens": 30, "do_sample": False}) for _ in range(3)
    ]
    call = engine.prepare([9, 9, 9], {"max_new_tokens": 30, "do_sample": False})
    call.processors.append(Failing())
    bad, updates = queue.Queue(), []
    engine.submit(Request(call, bad.put))
    while not updates or (updates[-1].error is None and updates[-1].finish is None):
        updates.append(bad.get(timeout=60))
    assert (updates[-1].error.status, updates[-1].error.code) == (500, "failed")
    assert "expected" not in updates[-1].error.message
    for client in clients:
        assert client.outcome()[0] == client.expected(model)
    settled(engine)


def test_a_failing_pass_ends_its_requests_and_not_the_engine(engines, model, tokenizer, monkeypatch):
    engine = engines(model, tokenizer, max_nodes=4)
    launch, failures = engine.passes.launch, [RuntimeError("no memory")]
    monkeypatch.setattr(
        engine.passes, "launch", lambda: launch() if not failures else (_ for _ in ()).throw(failures.pop())
    )
    options = {"max_new_tokens": 20, "do_sample": False}
    assert Client(engine, [5, 6, 7], options).outcome()[1] == "failed"
    client = Client(engine, [5, 6, 7], options)
    assert client.outcome()[0] == client.expected(model)
    settled(engine)


def test_without_memory_requests_are_decoded_without_drafts(engines, model, tokenizer):
    engine = engines(model, tokenizer, max_nodes=4, drafter_bytes="40K", max_running=4)
    clients = [
        Client(engine, [5, 6, 7] * 60, {"max_new_tokens": 40, "do_sample": False}, namespace=str(i))
        for i in range(12)
    ]
    for client in clients:
        assert client.outcome()[0] == client.expected(model)
    assert engine.counts["undrafted"] > 0
    settled(engine)


def test_draining_lets_requests_finish_and_ends_the_rest(engines, tokenizer):
    model = make_model("llama")
    engine = engines(model, tokenizer, max_running=1, max_nodes=0)
    options = {"max_new_tokens": 30, "do_sample": False}
    clients = [Client(engine, [5, 6, 7], options) for _ in range(3)]
    engine.drain(60)
    with pytest.raises(ApiError, match="shutting down"):
        Client(engine, [5, 6, 7], options)
    assert not engine.alive
    for client in clients:
        assert client.outcome()[0] == client.expected(model)
    engine.close()
    other = engines(model, tokenizer, max_running=1, max_nodes=0)
    clients = [Client(other, [5, 6, 7], options | {"max_new_tokens": 150}) for _ in range(9)]
    other.drain(0)
    assert {client.outcome()[1] for client in clients} == {"shutting_down"}
    other.close()


def test_who_cannot_be_served_is_refused(tokenizer):
    from sssd.errors import InvalidArgumentError, UnsupportedModelError

    model = make_model()
    with pytest.raises(InvalidArgumentError, match="at most 1024, got 8, 512 and 2000"):
        Engine(model, tokenizer, max_nodes=2000)
    model.train()
    with pytest.raises(UnsupportedModelError, match="training mode"):
        Engine(model, tokenizer)
