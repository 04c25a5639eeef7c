"""``python -m sssd generate``: one prompt through the user's model, with drafts and, to compare, without."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from sssd import SssdError
from sssd._core import Datastore
from sssd.cli.arguments import add_datastore_arguments, at_least, open_datastore
from sssd.cli.decoding import (
    Decoding,
    add_generation_arguments,
    decode,
    load_tokenizer,
    prepare_torch,
    report_differences,
    table,
)
from sssd.cli.live_text import Printer, mark_name
from sssd.cli.output import status
from sssd.errors import InvalidArgumentError, UsageError
from sssd.mini import MINI, is_installed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.description = (
        "Generates and verifies draft trees on the way, greedily unless told to sample. Accepted tokens are "
        "green, or between marks where there are no colours."
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder with a transformers model and tokenizer, or smollm2"
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="the prompt (default: standard input)")
    prompt.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="read the prompt from FILE, - for standard input"
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--compare", action="store_true", help="decode without drafts first and compare the tokens"
    )
    output.add_argument("--text", action="store_true", help="print the text alone, without marks and figures")
    parser.add_argument(
        "--dtype", default="auto", help="weight dtype, e.g. float32 or bfloat16 (default: the folder's)"
    )
    parser.add_argument("--device", default="cpu", help="e.g. cuda (default: %(default)s)")
    add_datastore_arguments(parser, "mini, if sssd[mini] is installed")
    add_generation_arguments(parser)
    sampling = parser.add_argument_group("sampling (greedy without any of the first three)")
    sampling.add_argument(
        "--temperature", type=_number(0), metavar="T", help="0 is greedy (default: 1 when sampling)"
    )
    sampling.add_argument(
        "--top-p", type=_number(0, 1), metavar="P", help="sample from the most probable tokens that make up P"
    )
    sampling.add_argument(
        "--top-k", type=at_least(1), metavar="K", help="sample from the K most probable tokens"
    )
    sampling.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="the text is this seed's (default: 0)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Generates, and returns 1 if ``--compare`` found another token."""
    prepare_torch()
    from sssd.hf.profile import load_model

    prompt = _prompt(arguments)
    model = load_model(arguments.model, arguments.dtype, arguments.device)
    tokenizer = load_tokenizer(arguments.model)
    if arguments.chat and tokenizer.chat_template is None:
        raise SssdError("the tokenizer has no chat template; leave out --chat")
    how = Decoding(
        arguments.max_new_tokens,
        arguments.max_nodes,
        chat=arguments.chat,
        compare=arguments.compare,
        sampling=_sampling(arguments),
        seed=arguments.seed,
        datastore=_datastore(arguments, tokenizer),
    )
    console = Console()
    printer = Printer(console, marks=not arguments.text)
    outcome = decode(model, tokenizer, "prompt", prompt, how, show=printer if arguments.stream else None)
    if not arguments.stream:
        for piece in outcome.pieces:
            printer(*piece)
    printer.end()
    if arguments.text:
        return 0
    console.print(table([outcome], mark_name(console)))
    return report_differences([outcome], tokenizer.decode, console)


def _sampling(arguments: argparse.Namespace) -> dict[str, float | int]:
    """What was asked for; nothing for greedy decoding."""
    if arguments.temperature == 0:
        return {}
    names = ("temperature", "top_p", "top_k")
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _datastore(arguments: argparse.Namespace, tokenizer: Any) -> Datastore | None:
    names = arguments.datastore
    if names is None and is_installed():
        with status(Console(stderr=True), "the mini store (tokenized the first time, which takes seconds)"):
            return open_datastore([MINI], tokenizer, arguments.any_tokenizer)
    return open_datastore(names, tokenizer, arguments.any_tokenizer)


def _prompt(arguments: argparse.Namespace) -> str:
    try:
        if arguments.prompt is not None:
            prompt = str(arguments.prompt)
        elif arguments.prompt_file is None and sys.stdin.isatty():
            raise UsageError("no prompt: give --prompt or --prompt-file, or pipe one in")
        elif arguments.prompt_file is None or str(arguments.prompt_file) == "-":
            prompt = sys.stdin.read()
        else:
            prompt = arguments.prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        source = arguments.prompt_file or "standard input"
        raise InvalidArgumentError(f"the prompt in {source} is not UTF-8 ({error})") from None
    if not prompt:
        raise InvalidArgumentError("the prompt is empty; give at least a word")
    return prompt


def _number(least: float, most: float = float("inf")) -> Callable[[str], float]:
    """A type of arguments: numbers from ``least`` to ``most``; without 0 where there is a ``most``."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not least <= value <= most or value == float("inf") or (value == 0 and most < float("inf")):
            above = f"above {least:g} and at most {most:g}" if most < float("inf") else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"must be {above}, got {text}")
        return value

    return number
