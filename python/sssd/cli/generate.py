"""``python -m sssd generate``: one prompt through the user's model, with drafts and, to compare, without."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sssd import SssdError
from sssd._core import Datastore
from sssd.cli.arguments import add_datastore_arguments, at_least, open_datastore
from sssd.cli.output import status
from sssd.errors import InvalidArgumentError
from sssd.mini import MINI, is_installed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.description = (
        "Generates greedily and verifies draft trees on the way; accepted tokens are coloured."
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL_DIR", help="folder with a transformers model and tokenizer"
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the prompt")
    prompt.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="read the prompt from FILE, - for stdin"
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument(
        "--compare", action="store_true", help="decode autoregressively too and compare the tokens"
    )
    parser.add_argument(
        "--dtype", default="auto", help="weight dtype, e.g. float32 or bfloat16 (default: the folder's)"
    )
    parser.add_argument("--device", default="cpu", help="e.g. cuda (default: %(default)s)")
    add_datastore_arguments(parser, "mini, if sssd[mini] is installed")
    add_generation_arguments(parser)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that ``generate`` and ``demo`` share."""
    parser.add_argument(
        "--max-new-tokens", type=at_least(1), default=128, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--max-nodes",
        type=at_least(0),
        metavar="N",
        help="draft tree size (default: what pays on this machine)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Generates, and returns 1 if ``--compare`` found another token."""
    prepare_torch()
    from transformers import AutoTokenizer

    from sssd.hf.profile import load_model

    prompt = _prompt(arguments)
    model = load_model(str(arguments.model), arguments.dtype, arguments.device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidArgumentError(
            f"{arguments.model} holds no tokenizer that can be loaded: {reason}"
        ) from None
    if arguments.chat and tokenizer.chat_template is None:
        raise SssdError("the tokenizer has no chat template; leave out --chat")
    outcome = decode(
        model,
        tokenizer,
        "prompt",
        prompt,
        arguments.chat,
        arguments.max_new_tokens,
        arguments.max_nodes,
        arguments.compare,
        _datastore(arguments, tokenizer),
    )
    console = Console()
    console.print(outcome.text())
    console.print(table([outcome]))
    return report_differences([outcome], tokenizer.decode, console)


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
        elif str(arguments.prompt_file) == "-":
            prompt = sys.stdin.read()
        else:
            prompt = arguments.prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"the prompt in {arguments.prompt_file} is not UTF-8 ({error})") from None
    if not prompt:
        raise InvalidArgumentError("the prompt is empty; give at least a word")
    return prompt


def prepare_torch() -> None:
    """Settings that must precede the import of torch. Call before importing torch or transformers."""
    # Threads that spin while they wait slow a shared machine down many times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from transformers.utils import logging

    logging.disable_progress_bar()


@dataclass
class Outcome:
    """One prompt, decoded with drafts and perhaps without."""

    name: str
    pieces: list[tuple[str, bool]]
    """The output text in pieces, with True for accepted drafts."""
    tokens: list[int]
    seconds: float
    tokens_per_step: float
    accepted: int
    plain_tokens: list[int] | None
    plain_seconds: float

    def text(self) -> Text:
        """The output with accepted tokens coloured."""
        return Text.assemble(*((piece, "green" if accepted else "") for piece, accepted in self.pieces))

    @property
    def ratio(self) -> float:
        """How many times faster than autoregressive decoding, tokens per second over tokens per second."""
        plain = len(self.plain_tokens or ()) / self.plain_seconds
        return len(self.tokens) / self.seconds / plain


def decode(
    model: Any,
    tokenizer: Any,
    name: str,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    max_nodes: int | None,
    compare: bool,
    datastore: Datastore | None = None,
) -> Outcome:
    """Decodes one prompt greedily with drafts and, if asked, first with ``model.generate`` alone."""
    from sssd import hf

    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    start = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    plain_tokens, plain_seconds = None, 0.0
    if compare:
        output, plain_seconds = _timed(lambda: model.generate(**inputs, **options))
        plain_tokens = output[0, start:].tolist()
    result, seconds = _timed(
        lambda: hf.generate(
            model,
            **inputs,
            **options,
            max_nodes=max_nodes,
            datastore=datastore,
            check_tokenizer=False,  # by whoever opened it
            return_dict_in_generate=True,
        )
    )
    tokens = result.sequences[0, start:].tolist()
    return Outcome(
        name,
        _pieces(tokens, result.accepted_mask[0].tolist(), tokenizer),
        tokens,
        seconds,
        result.tokens_per_step,
        result.accepted,
        plain_tokens,
        plain_seconds,
    )


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    output = call()
    return output, time.perf_counter() - start


def _pieces(tokens: list[int], accepted: list[bool], tokenizer: Any) -> list[tuple[str, bool]]:
    """Splits the text where accepted tokens begin and end; decodes prefixes, as characters span tokens."""
    pieces = []
    done = ""
    for i, flag in enumerate(accepted):
        if i + 1 < len(accepted) and accepted[i + 1] == flag:
            continue
        text = tokenizer.decode(tokens[: i + 1], skip_special_tokens=True)
        if i + 1 < len(accepted):
            text = text.rstrip("\ufffd")
        pieces.append((text[len(done) :], flag))
        done = text
    return pieces


def table(outcomes: list[Outcome]) -> Table:
    """One line per prompt, and a last one for all of them."""
    compared = all(outcome.plain_tokens is not None for outcome in outcomes)
    columns = ["tokens", *(["plain tok/s"] if compared else []), "sssd tok/s"]
    columns += [*(["ratio"] if compared else []), "tokens per step", "accepted"]
    caption = "tokens/s with the prompt's pass; accepted: share of the output that had been drafted (green)"
    result = Table(caption=caption, box=SIMPLE_HEAD, pad_edge=False)
    result.add_column("prompt", no_wrap=True)
    for column in columns:
        result.add_column(column, justify="right")
    for outcome in outcomes:
        tokens = len(outcome.tokens)
        row = [outcome.name, str(tokens)]
        if compared:
            row.append(f"{len(outcome.plain_tokens or ()) / outcome.plain_seconds:.1f}")
        row.append(f"{tokens / outcome.seconds:.1f}")
        if compared:
            row.append(f"{outcome.ratio:.2f}x")
        row += [f"{outcome.tokens_per_step:.2f}", f"{outcome.accepted / max(tokens, 1):.0%}"]
        result.add_row(*row)
    return result


def report_differences(
    outcomes: list[Outcome], detokenize: Callable[[list[int]], str], console: Console
) -> int:
    """Compares token by token, says what it found, and returns the exit status."""
    status = 0
    compared = [outcome for outcome in outcomes if outcome.plain_tokens is not None]
    for outcome in compared:
        plain = outcome.plain_tokens or []
        if outcome.tokens != plain:
            status = 1
            pairs = enumerate(zip(outcome.tokens, plain, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(outcome.tokens), len(plain)))
            mine, theirs = (detokenize(tokens[at : at + 1]) for tokens in (outcome.tokens, plain))
            message = f"{outcome.name}: differs at token {at}: {mine!r} with drafts, {theirs!r} without"
            console.print(Text(message, style="red"))
    if compared and status == 0:
        total = sum(len(outcome.tokens) for outcome in compared)
        console.print(f"All {total} tokens equal those of autoregressive decoding.")
    return status
