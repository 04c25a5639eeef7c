"""The web application: routes, keys, limits, and answers in one or as a stream."""

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from sssd.server.engine import Engine
from sssd.server.errors import ApiError, bad_request, closing, too_busy
from sssd.server.protocol import Answer, ChatBody, CompletionBody, event, parse, predicted
from sssd.server.request import Request, Update

_logger = logging.getLogger(__name__)

_KEEP_ALIVE_SECONDS = 15.0
"""How long a stream may be silent before it shows that it is there."""
_BODY_SECONDS = 30.0
"""How long a body may take to come."""

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Settings:
    """How the server is to be used.

    Attributes:
        model_name: What clients call the model.
        api_keys: Keys of which a client must show one; without any, everybody is served.
        allowed_hosts: Names by which the server may be called, ``"*"`` for any.
        max_waiting: Most requests beside those that run; more are told to come again.
        max_tokens: Most tokens of an output.
        max_body: Most bytes of a body.
        timeout: Seconds after which a request is given up.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ("*",)
    max_waiting: int = 64
    max_tokens: int = 4096
    max_body: int = 1 << 20
    timeout: float = 600.0
    created: int = field(default_factory=lambda: int(time.time()))


def create_app(engine: Engine, tokenizer: Any, settings: Settings) -> Starlette:
    """Makes the application; at its end the engine is closed.

    Args:
        engine: Decodes.
        tokenizer: The model's; the application is its only user.
        settings: Names, keys and limits.
    """
    server = _Server(engine, tokenizer, settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)
        server.reader.shutdown(wait=False, cancel_futures=True)

    routes = [
        Route("/", server.page),
        Route("/health", server.health),
        Route("/metrics", server.metrics),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.model),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.completions, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {ApiError: _refuse, HTTPException: _refuse_http, Exception: _fail}
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(settings.allowed_hosts))
    return Starlette(routes=routes, middleware=[hosts], exception_handlers=handlers, lifespan=lifespan)


class _Server:
    """What the routes do."""

    def __init__(self, engine: Engine, tokenizer: Any, settings: Settings) -> None:
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.key_digests = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        self.open = 0
        """Requests that are being answered."""
        self.most_open = engine.max_running + settings.max_waiting
        self.reader = ThreadPoolExecutor(1, "sssd-reading")
        """Where prompts become tokens: a tokenizer serves one thread, and long texts take a while."""
        self.default_top_k = engine.model.generation_config.top_k
        self.spelling = engine.tokenizer  # of single tokens, which takes nothing that can be held by others
        self.page_text = (resources.files("sssd") / "server" / "page.html").read_text(encoding="utf-8")

    # --- what is asked about the server

    async def page(self, _: HttpRequest) -> Response:
        """The page that shows text as it comes."""
        return HTMLResponse(self.page_text, headers=_PAGE_HEADERS)

    async def health(self, _: HttpRequest) -> Response:
        """Whether requests are taken."""
        if not self.engine.alive:
            return JSONResponse({"status": "shutting down"}, status_code=503)
        return JSONResponse({"status": "ok", "running": self.engine.running, "waiting": self.engine.waiting})

    async def metrics(self, request: HttpRequest) -> Response:
        """Counters for Prometheus."""
        self._namespace(request)
        try:
            from sssd.server.metrics import render
        except ModuleNotFoundError:
            message = "metrics need prometheus-client: pip install 'sssd[prometheus]'"
            raise ApiError(501, message, code="not_installed") from None
        body, kind = await asyncio.to_thread(render, self.engine, self.settings.model_name)
        return Response(body, media_type=kind)

    async def models(self, request: HttpRequest) -> Response:
        """The models: this one."""
        self._namespace(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Response:
        """One model."""
        self._namespace(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self.settings.created,
            "owned_by": "sssd",
            "max_model_len": self.engine.max_length,
        }

    def _check_model(self, name: str) -> None:
        if name != self.settings.model_name:
            message = f"there is no model {name[:128]!r}; this server has {self.settings.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _namespace(self, request: HttpRequest) -> str:
        """Whose texts a client may learn from: its key's.

        Raises:
            ApiError: It shows no key that is known, if keys are.
        """
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        key = key.strip() if kind.lower() == "bearer" else ""
        digest = hashlib.sha256(key.encode()).digest()
        # each of them, lest time tell which
        matches = [hmac.compare_digest(digest, known) for known in self.key_digests]
        if matches and not any(matches):
            raise ApiError(
                401,
                "this server wants a key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return digest.hex()[:32] if key else ""

    # --- completions

    async def chat(self, request: HttpRequest) -> Response:
        """A turn of a chat."""
        return await self._complete(request, ChatBody)

    async def completions(self, request: HttpRequest) -> Response:
        """A text that goes on."""
        return await self._complete(request, CompletionBody)

    async def _complete(self, request: HttpRequest, kind: type[ChatBody] | type[CompletionBody]) -> Response:
        namespace = self._namespace(request)
        if not self.engine.alive:
            raise closing()
        if self.open >= self.most_open:
            raise too_busy(f"{self.open} requests are being served or wait; come again in a moment")
        self.open += 1
        job, streams = None, False
        try:
            # from here on time counts
            deadline = time.monotonic() + self.settings.timeout
            body = parse(kind, await self._body(request))
            self._check_model(body.model)
            job = _Job(self, Answer(body, self.settings.model_name, self._spell))
            loop = asyncio.get_running_loop()
            job.request = await loop.run_in_executor(
                self.reader, self._prepare, body, namespace, deadline, job
            )
            self.engine.submit(job.request)
            if body.stream:
                streams = True
                return _Stream(job)
            return JSONResponse(await job.answer_to(request))
        except ClientDisconnect:
            return Response(status_code=499)  # to nobody
        finally:
            if not streams:
                self.end(job)

    def end(self, job: "_Job | None") -> None:
        """Makes room for another request; what nobody waits for is dropped."""
        self.open -= 1
        if job is not None and job.request is not None:
            job.request.cancelled = True

    async def _body(self, request: HttpRequest) -> bytes:
        """Reads the body, and no more of it than is allowed.

        Raises:
            ApiError: It is too long, too slow, or no JSON by its header.
        """
        # JSON alone: browsers send no other site's page that without asking first
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
        data = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > self.settings.max_body:
                        message = (
                            f"the body is longer than the {self.settings.max_body} bytes that are allowed"
                        )
                        raise ApiError(413, message, headers={"Connection": "close"})
        except TimeoutError:
            raise ApiError(408, "the body did not come in time", headers={"Connection": "close"}) from None
        return bytes(data)

    def _prepare(
        self, body: ChatBody | CompletionBody, namespace: str, deadline: float, job: "_Job"
    ) -> Request:
        """Turns a body into a request; in a thread of its own."""
        engine = self.engine
        prompt = self._chat_ids(body) if isinstance(body, ChatBody) else self._ids(body.one_prompt)
        if not prompt:
            raise bad_request("the prompt is empty", "prompt")
        if max(prompt) >= engine.vocab_size:
            raise bad_request(
                f"the prompt has ids of {engine.vocab_size} and more, the size of the vocabulary"
            )
        most = engine.max_length - len(prompt)
        if most < 1:
            raise bad_request(
                f"the prompt has {len(prompt)} tokens; with the output there may be {engine.max_length}",
                code="context_length_exceeded",
            )
        wanted = body.most_tokens
        if wanted is not None and wanted > self.settings.max_tokens:
            raise bad_request(f"the output may have at most {self.settings.max_tokens} tokens", "max_tokens")
        options = body.options(engine.vocab_size, self.default_top_k)
        options["max_new_tokens"] = min(wanted or self.settings.max_tokens, most)
        text = predicted(body)
        try:
            call = engine.prepare(prompt, options)
        except ValueError as error:
            raise bad_request(str(error).strip().splitlines()[0]) from None
        return Request(
            call,
            job.deliver,
            seed=secrets.randbits(63) if body.seed is None else body.seed,
            stops=body.stops,
            top_logprobs=body.count_logprobs,
            prediction=self._ids(text, special=False) if text else None,
            namespace=namespace,
            speculate=body.speculate is not False,
            deadline=deadline,
        )

    def _ids(self, prompt: str | list[int], special: bool = True) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        return list(self.tokenizer(prompt, add_special_tokens=special)["input_ids"])

    def _chat_ids(self, body: ChatBody) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise bad_request("the model has no chat template; use /v1/completions", "messages")
        messages = [message.plain for message in body.messages]
        try:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # whatever the template makes of these messages
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise bad_request(
                f"the model's chat template refuses these messages: {reason}", "messages"
            ) from None
        return list(ids["input_ids"])

    def _spell(self, token: int) -> str:
        return str(self.spelling.decode([token]))


class _Job:
    """One completion on its way to a client."""

    def __init__(self, server: _Server, answer: Answer) -> None:
        self.server, self.answer = server, answer
        self.request: Request | None = None
        self._loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[Update] = asyncio.Queue()

    def deliver(self, update: Update) -> None:
        """Takes an update, in the decoding thread."""
        self._loop.call_soon_threadsafe(self._updates.put_nowait, update)

    async def answer_to(self, request: HttpRequest) -> dict[str, Any]:
        """The whole answer.

        Raises:
            ApiError: The request failed, or the client has gone.
        """
        gone = asyncio.ensure_future(_gone(request))
        pieces = []
        try:
            while True:
                news = asyncio.ensure_future(self._updates.get())
                await asyncio.wait({gone, news}, return_when=asyncio.FIRST_COMPLETED)
                if not news.done():
                    news.cancel()
                    raise ClientDisconnect()
                update = news.result()
                if update.error is not None:
                    raise update.error
                pieces += update.pieces
                if update.finish is not None:
                    return self.answer.whole(pieces, update.finish, update.usage)
        finally:
            gone.cancel()

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        opening = self.answer.opening()
        if opening is not None:
            yield event(opening)
        while True:
            try:
                async with asyncio.timeout(_KEEP_ALIVE_SECONDS):
                    update = await self._updates.get()
            except TimeoutError:
                yield b": still here\n\n"
                continue
            if update.error is not None:
                yield event(update.error.body)
                return
            yield event(self.answer.part(update.pieces, update.finish, update.usage))
            if update.finish is not None:
                break
        closing = self.answer.closing(update.usage)
        if closing is not None:
            yield event(closing)
        yield b"data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """A job's answer as it comes; the job ends with it, also when the client goes before the first word."""

    def __init__(self, job: _Job) -> None:
        super().__init__(job.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.server.end(self.job)


async def _gone(request: HttpRequest) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refuse(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _refuse_http(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:128]}: {error.detail}"
    return JSONResponse(
        ApiError(error.status_code, message).body, status_code=error.status_code, headers=error.headers
    )


async def _fail(_: HttpRequest, error: Exception) -> Response:
    _logger.error("a request failed", exc_info=error)
    return JSONResponse(ApiError(500, "internal error; the server's log says what", code="failed").body, 500)
