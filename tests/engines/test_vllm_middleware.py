"""``sssd.vllm.Middleware``: bodies that it changes, and all others."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sssd.vllm import Middleware
from sssd.vllm.middleware import MOST_BYTES


def through(body, pieces=1, path="/v1/chat/completions", method="POST", kind="http", left_out=False):
    """What the server gets of a body: scope and body."""
    got = {}

    async def app(scope, receive, send):
        got["scope"], parts, more = scope, [], True
        while more:
            message = await receive()
            got["last"] = message["type"]
            parts.append(message.get("body", b""))
            more = message.get("more_body", False) and message["type"] == "http.request"
        got["body"] = b"".join(parts)

    step = max(1, -(-len(body) // pieces))
    cut = [body[at : at + step] for at in range(0, len(body), step)] or [b""]
    messages = [
        {"type": "http.request", "body": part, "more_body": left_out or place + 1 < len(cut)}
        for place, part in enumerate(cut)
    ]
    messages.append({"type": "http.disconnect"})

    async def receive():
        return messages.pop(0)

    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "headers": [(b"Content-Length", b"1"), (b"x", b"y")],
    }
    asyncio.run(Middleware(app)(scope, receive, None))
    return got


def changed(request, **options):
    got = through(json.dumps(request).encode(), **options)
    assert dict(got["scope"]["headers"])[b"content-length"] == str(len(got["body"])).encode()
    assert (b"x", b"y") in got["scope"]["headers"]
    return json.loads(got["body"])


@pytest.mark.parametrize("pieces", [1, 2, 7])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions/", "/prefix/v1/completions"])
def test_a_prediction_becomes_an_extra_argument(pieces, path):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    for content, text in (("one two", "one two"), (parts, "one two"), ("ümläut\ud83d", "ümläut\ud83d")):
        request = {
            "model": "m",
            "prediction": {"type": "content", "content": content},
            "vllm_xargs": {"a": 1},
        }
        expected = {"model": "m", "vllm_xargs": {"sssd_prediction": text, "a": 1}}
        assert changed(request, pieces=pieces, path=path) == expected


def test_what_the_caller_says_goes_first():
    request = {"prediction": {"type": "content", "content": "x"}, "vllm_xargs": {"sssd_prediction": "y"}}
    assert changed(request) == {"vllm_xargs": {"sssd_prediction": "y"}}
    assert changed({"sssd_off": True}) == {"vllm_xargs": {"sssd_off": 1}}
    assert changed({"prediction": {"type": "content", "content": ""}, "n": 1}) == {"n": 1}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prediction": ',
        b'["prediction"]',
        b'{"prediction": 3}',
        b'{"prediction": {"type": "other", "content": "x"}}',
        b'{"prediction": {"content": [{"type": "image"}]}}',
        b'{"prediction": {"content": [1]}}',
        b'{"prediction": {"content": "x"}, "vllm_xargs": 3}',
        b'{"prediction":' + b"[" * 100_000,
        b'{"model": "m"}',
        b"\xff\xfe prediction",
    ],
)
def test_what_is_not_understood_goes_on_unchanged(body):
    got = through(body, pieces=3)
    assert got["body"] == body
    assert dict(got["scope"]["headers"])[b"Content-Length"] == b"1"


def test_other_requests_go_on_unread():
    body = json.dumps({"prediction": {"type": "content", "content": "x"}}).encode()
    for options in ({"path": "/v1/models"}, {"method": "GET"}, {"kind": "websocket"}):
        assert through(body, **options)["body"] == body
    assert through(body, left_out=True)["last"] == "http.disconnect"
    large = body[:-1] + b" " * MOST_BYTES + b"}"
    assert through(large, pieces=4)["body"] == large


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["prediction", "vllm_xargs", "sssd_off", "model"]), json_values),
    st.integers(1, 5),
)
def test_any_body_reaches_the_server(request, pieces):
    got = json.loads(through(json.dumps(request).encode(), pieces=pieces)["body"])
    kept = {key: value for key, value in request.items() if key == "model"}
    assert kept.items() <= got.items()
    assert got == request or "prediction" not in got or "sssd_off" not in got
