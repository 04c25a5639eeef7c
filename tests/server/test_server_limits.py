"""Wrong, huge, unwelcome and abandoned requests get a status in OpenAI's form, and harm no other."""

import http.client
import inspect
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import make_model, serving

from sssd.server import Engine

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0}
TEXT = {"model": "tiny", "prompt": "abc", "max_tokens": 2, "temperature": 0}


def post(address, path, body, headers=None):
    """Status and parsed answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def get(address, path, headers=None):
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


WRONG = [
    (CHAT, {"temperature": 3}, "temperature"),
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"temperature": 0.001}, "temperature"),
    (CHAT, {"temperature": True}, "temperature"),
    (CHAT, {"top_p": 0}, "top_p"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 129}, "max_tokens"),
    (CHAT, {"seed": 1 << 70}, "seed"),
    (CHAT, {"n": 2}, "n"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"presence_penalty": 0.5}, "presence_penalty"),
    (CHAT, {"beams": 4}, "beams"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"stop": ["a"] * 5}, "stop"),
    (CHAT, {"stop": [""]}, "stop.0"),
    (CHAT, {"stop": ""}, "stop"),
    (CHAT, {"logit_bias": {"999": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"5": 101}}, "logit_bias"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": "refuse"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
    (CHAT, {"prediction": {"type": "content"}}, "prediction.content"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": [1 << 20]}, None),
    (TEXT, {"prompt": ["a", "b"]}, "prompt"),
    (TEXT, {"prompt": "a" * 300}, None),
    (TEXT, {"echo": True}, "echo"),
    (TEXT, {"best_of": 2}, "best_of"),
    (TEXT, {"suffix": "x"}, "suffix"),
]


@pytest.mark.parametrize(("base", "change", "param"), WRONG, ids=lambda part: json.dumps(part)[:40])
def test_wrong_fields_are_named(address, base, change, param):
    status, answer = post(
        address, "/v1/completions" if "prompt" in base else "/v1/chat/completions", base | change
    )
    error = answer["error"]
    assert status == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert error["param"] == param if param is None else (error["param"] or "").startswith(param), error


def test_what_asks_for_nothing_is_taken(address):
    extra = {
        "n": 1,
        "tools": [],
        "presence_penalty": 0,
        "user": "me",
        "store": False,
        "stop": None,
        "logprobs": False,
    }
    status, answer = post(address, "/v1/chat/completions", CHAT | extra)
    assert status == 200, answer


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"model": NaN}',
        b"[" * 5000,
        b'{"model":"\\ud800"}',
        b'{"a":1e999}',
    ],
)
def test_bodies_that_are_no_request(address, body):
    status, answer = post(address, "/v1/completions", body)
    assert status == 400
    assert answer["error"]["message"]


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_FIELDS = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "logit_bias",
    "prediction",
    "stream_options",
]
_FIELDS += [
    "logprobs",
    "top_logprobs",
    "n",
    "messages",
    "prompt",
    "max_tokens",
    "tools",
    "repetition_penalty",
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chat=st.booleans(), change=st.dictionaries(st.sampled_from(_FIELDS), _VALUES, min_size=1, max_size=2))
def test_no_body_is_an_internal_error(address, chat, change):
    path = "/v1/chat/completions" if chat else "/v1/completions"
    status, answer = post(address, path, {**(CHAT if chat else TEXT), "max_tokens": 2, **change})
    assert status in (200, 400), answer


def test_other_paths_methods_and_types(address):
    for method, path, expected in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405)):
        connection = http.client.HTTPConnection(urlsplit(address).netloc)
        connection.request(method, path)
        answer = connection.getresponse()
        assert answer.status == expected
        assert json.loads(answer.read())["error"]["type"] == "invalid_request_error"
        connection.close()
    # what a browser sends from another site without asking
    assert post(address, "/v1/completions", TEXT, {"Content-Type": "text/plain"})[0] == 415


def test_long_bodies_are_refused_before_they_are_read(address):
    status, answer = post(address, "/v1/completions", TEXT | {"prompt": "a" * 30_000})
    assert status == 413
    assert "20000 bytes" in answer["error"]["message"]


@pytest.fixture(scope="module")
def slow(tokenizer):
    """A server that takes one request and lets one wait, and wants a key; passes take 20 ms."""
    model = make_model("gpt2")  # without a fast path: passes go by its own forward
    forward = type(model).forward

    def slowly(*arguments, **options):
        time.sleep(0.02)
        return forward(model, *arguments, **options)

    slowly.__signature__ = inspect.signature(model.forward)
    engine = Engine(model, tokenizer, max_running=1, max_nodes=4)
    engine.model.forward = slowly
    limits = {"max_waiting": 1, "max_tokens": 200, "timeout": 3.0}
    hosts = ("127.0.0.1",)
    with serving(engine, tokenizer, api_keys=("first", "second"), allowed_hosts=hosts, **limits) as address:
        yield address, engine


LONG = {"model": "tiny", "prompt": "abc", "max_tokens": 200, "logit_bias": {"2": -100}, "temperature": 0}
KEY = {"Authorization": "Bearer first"}


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def idle(engine):
    return engine.running == 0 and engine.waiting == 0


def test_keys(slow):
    address, _ = slow
    for headers in (
        {},
        {"Authorization": "Bearer third"},
        {"Authorization": "Basic first"},
        {"Authorization": "x"},
    ):
        status, answer = post(address, "/v1/completions", TEXT, headers)
        assert (status, answer["error"]["type"]) == (401, "authentication_error")
        for path in ("/v1/models", "/metrics"):
            assert get(address, path, headers)[0] == 401
    for key in ("first", "second"):
        with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client:
            assert client.completions.create(**TEXT).usage.completion_tokens
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.completions.create(**TEXT)


def test_keys_have_namespaces_of_their_own(slow):
    address, engine = slow
    for key in ("first", "second"):
        assert post(address, "/v1/completions", TEXT, {"Authorization": f"Bearer {key}"})[0] == 200
    wait_until(lambda: idle(engine))
    names = set(engine.drafter.namespaces()) - {""}
    assert len(names) == 2
    assert not any("first" in name or "second" in name for name in names)


def test_other_hosts_are_refused(slow):
    address, _ = slow
    assert get(address, "/health", {"Host": "evil.example"})[0] == 400


def test_a_full_queue(slow):
    address, engine = slow
    outcomes = []
    threads = [
        threading.Thread(
            target=lambda: outcomes.append(post(address, "/v1/completions", LONG | {"speculate": False}, KEY))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: engine.running == 1 and engine.waiting == 1)
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="first", max_retries=0) as client,
        pytest.raises(openai.RateLimitError, match="come again"),
    ):
        client.completions.create(**TEXT)
    for thread in threads:
        thread.join()
    # a request that runs, and one that waits, are given up when their time is over
    assert [(status, answer["error"]["code"]) for status, answer in outcomes] == [(504, "timeout")] * 2
    wait_until(lambda: idle(engine))
    assert post(address, "/v1/completions", TEXT, KEY)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_is_dropped(slow, stream):
    address, engine = slow
    before = engine.counts["cancelled"]
    data = json.dumps(LONG | {"speculate": False, "stream": stream}).encode()
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port)) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer first\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        wait_until(lambda: engine.running == 1)
        if stream:
            assert b"200 OK" in connection.recv(4096)
    wait_until(lambda: idle(engine), 2)
    assert engine.counts["cancelled"] == before + 1
    assert engine.cache.bytes == 0
    assert engine.drafter.memory["sequences"] == 0
    assert post(address, "/v1/completions", TEXT, KEY)[0] == 200


def test_a_stream_tells_that_time_is_over(slow):
    address, _ = slow
    with openai.OpenAI(base_url=f"{address}/v1", api_key="first", max_retries=0) as client:
        stream = client.completions.create(**LONG, extra_body={"speculate": False}, stream=True)
        with pytest.raises(openai.APIError, match="longer than the server allows"):
            for _ in stream:
                pass
