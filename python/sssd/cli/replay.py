"""``python -m sssd replay``: accepted tokens and draft times on recorded requests."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sssd import Datastore, Drafter
from sssd.cli.arguments import budgets, tokenizer
from sssd.replay import Replay, read_trace, trace_name


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Adds this command's arguments."""
    parser = commands.add_parser(
        "replay",
        help="measure accepted tokens and draft times on recorded requests",
        description="Replays recorded requests without a model. Every request is fresh; nothing is shared.",
    )
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="JSON Lines, plain, .gz or .xz")
    parser.add_argument("--budgets", type=budgets, default=[4, 8, 16, 32, 64], help="node budgets, e.g. 4,16")
    parser.add_argument("--tokenizer", help="tokenizer.json or model folder, for traces that hold text")
    parser.add_argument("--end-token-id", type=int, action="append", help="draft nothing after this")
    parser.add_argument("--datastore", type=Path, action="append", help="datastore file; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Replays each trace at each budget and prints a table."""
    tokenize = tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    datastore = Datastore.open(arguments.datastore) if arguments.datastore else None
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for path in arguments.traces:
            requests = list(read_trace(path, tokenize))
            task = progress.add_task(trace_name(path), total=len(requests) * len(arguments.budgets))
            for budget in arguments.budgets:
                replay = Replay(budget)
                for request in requests:
                    drafter = Drafter(end_token_ids=arguments.end_token_id, datastore=datastore)
                    replay.run(drafter, request)
                    progress.advance(task)
                rows.append(replay.row(trace_name(path)))
            progress.remove_task(task)
    console = Console()
    console.print(_table(rows), width=max(console.width, 100), soft_wrap=not console.is_terminal)
    if arguments.json:
        arguments.json.write_text(json.dumps({"results": rows}, indent=1) + "\n", encoding="utf-8")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("trace")
    for name in ("budget", "tokens/step", "accepted", "expected", "drafted", "p50 us", "p99 us", "append us"):
        table.add_column(name, justify="right")
    counts = ("tokens_per_step", "accepted_per_step", "expected_accepted_per_step")
    times = ("drafted_per_step", "draft_us_p50", "draft_us_p99")
    for row in rows:
        table.add_row(
            row["trace"],
            str(row["budget"]),
            *(f"{row[key]:.3f}" for key in counts),
            *(f"{row[key]:.1f}" for key in times),
            f"{row['append_us_per_token']:.2f}",
        )
    return table
