"""``python -m sssd replay``: accepted tokens and draft times on recorded requests."""

import argparse
import json
from dataclasses import replace
from typing import Any

from rich.table import Table

from sssd import SOURCES, Datastore, Drafter
from sssd.cli.arguments import add_trace_arguments, budgets, open_datastore
from sssd.cli.output import progress_bar, show
from sssd.cli.traces import Traces
from sssd.replay import Replay

PRIVATE_SOFT_BYTES = 1 << 20
"""Room for one request's distributions, where every request has a drafter of its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.description = (
        "Replays recorded requests without a model. Every request is fresh and nothing is shared, unless "
        "--share says so. Recorded top-k probabilities (topk_ids, topk_probs) and predicted outputs "
        "(prediction_ids) are handed to the drafter."
    )
    add_trace_arguments(parser)
    parser.add_argument("--budgets", type=budgets, default=[4, 8, 16, 32, 64], help="node budgets, e.g. 4,16")
    parser.add_argument(
        "--share",
        choices=["nothing", "live"],
        default="nothing",
        help="live: requests of a trace learn from those before them, in file order",
    )
    parser.add_argument("--no-feedback", action="store_true", help="ignore recorded top-k probabilities")
    parser.add_argument(
        "--reliability", action="store_true", help="also print how far probabilities came true"
    )


def run(arguments: argparse.Namespace) -> None:
    """Replays each trace at each budget and prints a table."""
    traces = Traces(arguments)
    datastore = open_datastore(arguments.datastore, traces.tokenizer, arguments.any_tokenizer)
    rows: list[dict[str, Any]] = []
    with progress_bar(quiet=arguments.quiet) as progress:
        for name, requests in traces:
            if arguments.no_feedback:
                requests = [replace(request, topk_ids=None, topk_probs=None) for request in requests]
            task = progress.add_task(name, total=len(requests) * len(arguments.budgets))
            for budget in arguments.budgets:
                replay = Replay(budget)
                live = arguments.share == "live"
                drafter = None
                for request in requests:
                    if drafter is None or not live:
                        drafter = _drafter(arguments.end_token_id, datastore, live)
                    replay.run(drafter, request)
                    progress.advance(task)
                rows.append(replay.row(name))
            progress.remove_task(task)
    traces.end()
    tables = [_table(rows), _sources(rows)]
    if arguments.reliability:
        tables.append(_reliability(rows))
    for table in tables:
        show(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"results": rows}, indent=1) + "\n", encoding="utf-8")


def _drafter(end_token_ids: list[int] | None, datastore: Datastore | None, live: bool) -> Drafter:
    if live:
        return Drafter(end_token_ids=end_token_ids, datastore=datastore)
    return Drafter(
        end_token_ids=end_token_ids, datastore=datastore, live_bytes=0, soft_bytes=PRIVATE_SOFT_BYTES
    )


def _sources(rows: list[dict[str, Any]]) -> Table:
    """Which source carried the nodes, over all traces, by budget."""
    table = _counts_table("Nodes by the source that carried them", "source")
    for budget in dict.fromkeys(row["budget"] for row in rows):
        parts = [row["sources"] for row in rows if row["budget"] == budget]
        for source in SOURCES:
            _add_counts(table, [source, str(budget)], [part[source] for part in parts if source in part])
    return table


def _reliability(rows: list[dict[str, Any]]) -> Table:
    """Predicted against measured shares of accepted nodes, over all traces, by budget."""
    table = _counts_table("Reliability of node probabilities", "probability")
    for budget in dict.fromkeys(row["budget"] for row in rows):
        tables = [row["reliability"] for row in rows if row["budget"] == budget]
        for bins in zip(*tables, strict=True):
            _add_counts(table, [f"{bins[0]['from']:.2f} to {bins[0]['to']:.2f}", str(budget)], list(bins))
    return table


def _counts_table(title: str, first: str) -> Table:
    table = Table(box=None, header_style="bold", title=title, title_justify="left")
    table.add_column(first)
    for name in ("budget", "drafted", "accepted", "expected", "accepted %"):
        table.add_column(name, justify="right")
    return table


def _add_counts(table: Table, names: list[str], parts: list[dict[str, float]]) -> None:
    drafted, accepted, predicted = (
        sum(part[key] for part in parts) for key in ("drafted", "accepted", "predicted")
    )
    if drafted:
        share = f"{100 * accepted / drafted:.1f}"
        table.add_row(*names, f"{drafted:.0f}", f"{accepted:.0f}", f"{predicted:.0f}", share)


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
