"""Prompts through a model, with drafts and without: what ``generate`` and ``demo`` share."""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sssd._core import Datastore
from sssd.cli.arguments import at_least
from sssd.errors import InvalidArgumentError

Show = Callable[[str, bool], None]
"""Is given the text that a token completed, and whether it had been drafted."""


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that both commands take."""
    parser.add_argument(
        "--max-new-tokens", type=at_least(1), default=128, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--max-nodes",
        type=at_least(0),
        metavar="N",
        help="draft tree size (default: what pays on this machine)",
    )


def prepare_torch() -> None:
    """Settings that must precede the import of torch. Call before importing torch or transformers."""
    # Threads that spin while they wait slow a shared machine down many times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a model's folder, or of ``smollm2``.

    Raises:
        InvalidArgumentError: There is none.
    """
    from transformers import AutoTokenizer

    if folder == "smollm2":
        from sssd.hf import smollm2

        folder = str(smollm2.folder())
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidArgumentError(f"{folder} holds no tokenizer that can be loaded: {reason}") from None


@dataclass(frozen=True)
class Decoding:
    """How prompts are decoded.

    Attributes:
        max_new_tokens: Most tokens of an output.
        max_nodes: Nodes of a draft tree; None for what pays.
        chat: Whether a prompt is a turn of a chat.
        compare: Whether it is decoded by ``model.generate`` alone first.
        sampling: ``temperature``, ``top_p``, ``top_k``; greedy if empty.
        seed: Of both ways of decoding, when sampling.
        datastore: What to match beside the prompt.
    """

    max_new_tokens: int
    max_nodes: int | None = None
    chat: bool = True
    compare: bool = True
    sampling: dict[str, float | int] = field(default_factory=dict)
    seed: int = 0
    datastore: Datastore | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What ``model.generate`` is told; what the model's folder says of sampling is left out."""
        plain = {"temperature": None, "top_p": None, "top_k": None}
        sampled = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **self.sampling}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": bool(self.sampling),
            **(sampled if self.sampling else plain),
        }


@dataclass
class Outcome:
    """One prompt, decoded with drafts and perhaps without."""

    name: str
    prompt: list[int]
    pieces: list[tuple[str, bool]]
    """The output text in pieces, with True for accepted drafts."""
    tokens: list[int]
    seconds: float
    tokens_per_step: float
    accepted: int
    plain_tokens: list[int] | None = None
    plain_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second with drafts."""
        return len(self.tokens) / self.seconds

    @property
    def plain_rate(self) -> float:
        """Tokens a second without."""
        return len(self.plain_tokens or ()) / self.plain_seconds

    @property
    def ratio(self) -> float:
        """How many times faster than autoregressive decoding, tokens per second over tokens per second."""
        return self.rate / self.plain_rate


class _Streamer:
    """What ``model.generate`` takes as one. A token's text is shown when the next one comes, or the end."""

    def __init__(self, tokenizer: Any, show: Show) -> None:
        from sssd.hf.text import Piece, TextStream

        self._text, self._piece, self._show = TextStream(tokenizer), Piece, show
        self._held: Any = None

    def put(self, value: Any) -> None:
        if value.dim() == 1:  # the prompt comes as rows
            self.put_output(value, [False])

    def put_output(self, value: Any, accepted: list[bool]) -> None:
        self._release()
        self._held = self._piece(int(value[0]), "", accepted[0])

    def end(self) -> None:
        self._release(last=True)

    def _release(self, last: bool = False) -> None:
        held, self._held = self._held, None
        for piece in self._text.add(held, last) if held else ():
            if piece.text:
                self._show(piece.text, piece.accepted)


def decode(
    model: Any,
    tokenizer: Any,
    name: str,
    prompt: str,
    how: Decoding,
    *,
    show: Show | None = None,
    show_plain: Show | None = None,
) -> Outcome:
    """Decodes one prompt with drafts and, if asked, first with ``model.generate`` alone.

    Args:
        model: Of transformers.
        tokenizer: The model's.
        name: What the prompt is called.
        prompt: Its text.
        how: How to decode.
        show: Is given the text as it comes.
        show_plain: Likewise that of ``model.generate`` alone.
    """
    from sssd import hf

    inputs = _inputs(model, tokenizer, prompt, how.chat)
    start = inputs["input_ids"].shape[1]
    plain_tokens, plain_seconds = None, 0.0
    if how.compare:
        streamer = _Streamer(tokenizer, show_plain or _ignore)
        output, plain_seconds = _timed(
            lambda: model.generate(**inputs, **how.options, streamer=streamer), how.seed
        )
        plain_tokens = output[0, start:].tolist()
    pieces: list[tuple[str, bool]] = []

    def keep(text: str, accepted: bool) -> None:
        pieces.append((text, accepted))
        if show:
            show(text, accepted)

    result, seconds = _timed(
        lambda: hf.generate(
            model,
            **inputs,
            **how.options,
            max_nodes=how.max_nodes,
            datastore=how.datastore,
            check_tokenizer=False,  # by whoever opened it
            streamer=_Streamer(tokenizer, keep),
            return_dict_in_generate=True,
        ),
        how.seed,
    )
    return Outcome(
        name,
        inputs["input_ids"][0].tolist(),
        pieces,
        result.sequences[0, start:].tolist(),
        seconds,
        result.tokens_per_step,
        result.accepted,
        plain_tokens,
        plain_seconds,
    )


def _inputs(model: Any, tokenizer: Any, prompt: str, chat: bool) -> dict[str, Any]:
    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    return {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}


def _timed(call: Callable[[], Any], seed: int) -> tuple[Any, float]:
    import torch

    torch.manual_seed(seed)
    start = time.perf_counter()
    output = call()
    return output, time.perf_counter() - start


def _ignore(text: str, accepted: bool) -> None:
    """Shows nothing."""


def table(outcomes: list[Outcome], mark: str) -> Table:
    """One line per prompt; ``mark`` says how accepted text is shown."""
    compared = all(outcome.plain_tokens is not None for outcome in outcomes)
    columns = ["tokens", *(["plain tok/s"] if compared else []), "sssd tok/s"]
    columns += [*(["ratio"] if compared else []), "tokens per step", "accepted"]
    caption = f"tokens/s with the prompt's pass; accepted: share of the output that had been drafted ({mark})"
    result = Table(caption=Text(caption, "table.caption"), box=SIMPLE_HEAD, pad_edge=False)
    result.add_column("prompt", no_wrap=True)
    for column in columns:
        result.add_column(column, justify="right")
    for outcome in outcomes:
        tokens = len(outcome.tokens)
        row = [outcome.name, str(tokens)]
        if compared:
            row.append(f"{outcome.plain_rate:.1f}")
        row.append(f"{outcome.rate:.1f}")
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
