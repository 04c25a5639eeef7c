"""``python -m sssd serve``: an OpenAI-compatible server over the user's model."""

import argparse
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sssd.cli.arguments import add_datastore_arguments, at_least, open_datastore
from sssd.mini import MINI

if TYPE_CHECKING:
    from sssd.server import Engine

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.description = (
        "Serves a model of transformers by OpenAI's interface (/v1/chat/completions, /v1/completions), with "
        "draft trees, all requests in one running batch, and a page at / that shows accepted tokens. For "
        "trial, teaching and small deployments on a CPU; for more, use a serving engine (docs/serving.md)."
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder with a transformers model and tokenizer, or smollm2"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=at_least(0), default=8000, help="0 takes a free one (default: 8000)")
    add_datastore_arguments(parser, "mini, if sssd[mini] is installed")
    parser.add_argument("--model-name", metavar="NAME", help="what clients call it (default: the folder's)")
    parser.add_argument(
        "--dtype", default="auto", help="weight dtype, e.g. float32 or bfloat16 (default: the folder's)"
    )
    parser.add_argument("--device", default="cpu", help="e.g. cuda (default: %(default)s)")
    parser.add_argument(
        "--max-nodes", type=at_least(0), metavar="N", help="draft tree size (default: what pays here)"
    )
    _add_access_arguments(parser.add_argument_group("access"))
    _add_limits(parser.add_argument_group("limits"))


def _add_access_arguments(access: Any) -> None:
    access.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="serve only who shows a key; repeatable, or in $SSSD_API_KEYS with commas between",
    )
    access.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name by which it may be called; repeatable (default: any, on a loopback address localhost)",
    )


def _add_limits(limits: Any) -> None:
    for name, default, text in (
        ("--max-running", 8, "most requests in the batch"),
        ("--max-waiting", 64, "most requests beside them; more get status 429"),
        ("--max-tokens", 4096, "most tokens of an output"),
        ("--max-body", 1 << 20, "most bytes of a request's body"),
        ("--timeout", 600, "seconds until a request is given up"),
        ("--grace", 30, "seconds that requests have to finish after SIGTERM or Ctrl-C"),
    ):
        limits.add_argument(
            name,
            type=at_least(0 if name == "--grace" else 1),
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    limits.add_argument(
        "--max-length",
        type=at_least(2),
        metavar="N",
        help="most tokens of prompt and output (default: the model's)",
    )
    limits.add_argument(
        "--drafter-memory",
        default="1G",
        metavar="SIZE",
        help="most memory for drafting (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal comes."""
    import uvicorn

    from sssd.cli.decoding import prepare_torch

    prepare_torch()
    from sssd.server import Settings, create_app

    engine, tokenizer = _load(arguments)
    keys = [*arguments.api_key, *filter(None, os.environ.get("SSSD_API_KEYS", "").split(","))]
    local = arguments.host in _LOOPBACK
    settings = Settings(
        model_name=arguments.model_name or Path(arguments.model).resolve().name,
        api_keys=tuple(keys),
        allowed_hosts=tuple(arguments.allowed_host) or (_LOOPBACK if local else ("*",)),
        max_waiting=arguments.max_waiting,
        max_tokens=arguments.max_tokens,
        max_body=arguments.max_body,
        timeout=arguments.timeout,
    )

    class Server(uvicorn.Server):
        """Ends requests before connections."""

        async def shutdown(self, sockets: Any = None) -> None:
            engine.drain(arguments.grace)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        create_app(engine, tokenizer, settings),
        host=arguments.host,
        port=arguments.port,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=arguments.grace + 10,
    )
    # uvicorn raises the signal again when all is over, which would end the process by it
    signal.signal(signal.SIGTERM, lambda *_: None)
    server = Server(config)
    try:
        server.run()
    finally:
        engine.close()
    return 0 if server.started else 1


def _load(arguments: argparse.Namespace) -> "tuple[Engine, Any]":
    """The engine over the model, and the tokenizer."""
    from sssd.cli.decoding import load_tokenizer
    from sssd.hf.profile import load_model
    from sssd.server import Engine

    model = load_model(arguments.model, arguments.dtype, arguments.device)
    tokenizer = load_tokenizer(arguments.model)
    engine = Engine(
        model,
        tokenizer,
        datastore=MINI
        if arguments.datastore is None
        else open_datastore(arguments.datastore, tokenizer, arguments.any_tokenizer),
        max_running=arguments.max_running,
        max_length=arguments.max_length,
        max_nodes=arguments.max_nodes,
        drafter_bytes=arguments.drafter_memory,
    )
    return engine, tokenizer
