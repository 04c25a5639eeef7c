"""OpenAI's ``prediction`` for vLLM's server, which does not know it."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BYTES = 32 << 20
"""Larger bodies go on as they are."""

_PATHS = ("/v1/chat/completions", "/v1/completions")


class Middleware:
    """An ASGI middleware: ``vllm serve ... --middleware sssd.vllm.Middleware``.

    In bodies for chats and completions it turns ``prediction`` (OpenAI's ``{"type": "content", "content":
    ...}``, text or parts of it) and ``sssd_off`` into ``vllm_xargs``, where :class:`sssd.vllm.Proposer` finds
    them. What it does not understand goes on unchanged, for the server to judge.

    Args:
        app: what handles the request.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request or connection, as ASGI says."""
        path = str(scope.get("path", "")).rstrip("/")
        if scope["type"] != "http" or scope.get("method") != "POST" or not path.endswith(_PATHS):
            await self.app(scope, receive, send)
            return
        messages, body = await _read(receive)
        changed = None if body is None else _translated(body)
        if changed is not None:
            headers = [pair for pair in scope["headers"] if pair[0].lower() != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(changed)).encode())]}
            messages = [{"type": "http.request", "body": changed, "more_body": False}]

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)


async def _read(receive: Receive) -> tuple[list[Message], bytes | None]:
    """The messages of a body, and the body itself if it is there whole and not too large."""
    messages: list[Message] = []
    size = 0
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request":
            return messages, None
        size += len(message.get("body", b""))
        if size > MOST_BYTES:
            return messages, None
        if not message.get("more_body", False):
            return messages, b"".join(message.get("body", b"") for message in messages)


def _translated(body: bytes) -> bytes | None:
    """The body with the fields moved, or None if there are none."""
    if b'"prediction"' not in body and b'"sssd_off"' not in body:
        return None
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(request, dict):
        return None
    held = request.get("vllm_xargs")
    if held is not None and not isinstance(held, dict):
        return None
    extra: dict[str, Any] = {}
    content = _content(request.get("prediction"))
    if content is not None:
        del request["prediction"]
        if content:
            extra["sssd_prediction"] = content
    if "sssd_off" in request:
        extra["sssd_off"] = int(bool(request.pop("sssd_off")))
    if content is None and not extra:
        return None
    if extra:
        request["vllm_xargs"] = {**extra, **(held or {})}
    return json.dumps(request).encode()


def _content(prediction: Any) -> str | None:
    """The text of a prediction; None if it is not what OpenAI's reference describes."""
    if not isinstance(prediction, dict) or prediction.get("type", "content") != "content":
        return None
    content = prediction.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = [part.get("text") if isinstance(part, dict) else None for part in content]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
