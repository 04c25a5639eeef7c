"""``python -m sssd replay``: accepted tokens and draft times on recorded requests."""

import argparse
import csv
import signal
import sys
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN, Box
from rich.table import Table

from sssd import SOURCES, Datastore, Drafter
from sssd.cli.arguments import above_zero, add_trace_arguments, at_least, budgets, open_datastore
from sssd.cli.output import check_writable, progress_bar, show
from sssd.cli.traces import Traces, write_json
from sssd.replay import Replay, Request, Sampling

PRIVATE_SOFT_BYTES = 1 << 20
"""Room for one request's distributions, where every request has a drafter of its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.description = (
        "Replays recorded requests without a model. Every request is fresh and nothing is shared, unless "
        "--share says so. A file that cannot be read is named and left out; the exit code is then 1. "
        "Recorded top-k probabilities (topk_ids, topk_probs) and predicted outputs "
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
        "--no-ranking", action="store_true", help="do not rank candidates by the datastore's tables"
    )
    parser.add_argument(
        "--temperature",
        type=above_zero(),
        metavar="T",
        help="replay a target that samples: draws from the recorded top-k probabilities at this temperature",
    )
    parser.add_argument(
        "--top-p",
        type=above_zero(1),
        default=1.0,
        metavar="P",
        help="with --temperature: the share drawn from",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="with --temperature: of the draws")
    parser.add_argument(
        "--reliability", action="store_true", help="also print how far probabilities came true"
    )
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=1,
        metavar="N",
        help="processes; more than the machine has cores to spare make draft times longer (default: 1)",
    )
    parser.add_argument(
        "--table", choices=("text", "markdown", "csv"), default="text", help="how tables are printed"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw tokens per step as a heat map: .png, .svg, .pdf"
    )


def run(arguments: argparse.Namespace) -> int:
    """Replays each trace at each budget and prints a table; returns 1 if a file could not be read."""
    check_writable(arguments.json, arguments.plot)
    sampling = None
    if arguments.temperature is not None:
        sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed)
    if arguments.plot:
        from sssd.hardware import plot

        plot.check_format(arguments.plot)
    traces = Traces(arguments)
    datastore = open_datastore(arguments.datastore, traces.tokenizer, arguments.any_tokenizer)
    found: list[tuple[str, Future[Replay]]] = []
    with progress_bar(quiet=arguments.quiet) as progress, _workers(arguments.jobs) as workers:
        task = progress.add_task("replaying", total=len(traces.inputs) * len(arguments.budgets))
        for name, requests in traces:
            progress.update(task, description=name)
            for budget in arguments.budgets:
                replay = Replay(budget, sampling, feedback=not arguments.no_feedback)
                call = (requests, replay, arguments.end_token_id, datastore, arguments.share == "live")
                future = workers.submit(_replayed, *call, not arguments.no_ranking)
                future.add_done_callback(lambda _: progress.advance(task))
                found.append((name, future))
        rows = [future.result().row(name) for name, future in found]
    status = traces.end()
    if arguments.table == "csv":
        _write_csv(rows)
    else:
        box = MARKDOWN if arguments.table == "markdown" else None
        tables = [_table(rows, box), _sources(rows, box)]
        if arguments.reliability:
            tables.append(_reliability(rows, box))
        for table in tables if rows else ():
            show(table)
    write_json(arguments.json, {"results": rows})
    if arguments.plot:
        plot.draw_replay(rows, arguments.plot)
    return status


class _Here(Executor):
    """Does work at once, where it is handed in."""

    def submit(self, call: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*arguments, **options))
        return future


def _workers(jobs: int) -> Executor:
    if jobs == 1:
        return _Here()
    # a drafter's threads do not survive a fork; Ctrl-C ends workers without a word
    return ProcessPoolExecutor(
        jobs, get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
    )


def _replayed(
    requests: list[Request],
    replay: Replay,
    end_token_ids: list[int] | None,
    datastore: Datastore | None,
    live: bool,
    ranking: bool = True,
) -> Replay:
    """All requests of a trace, counted in ``replay``."""
    drafter = Drafter(end_token_ids=end_token_ids, datastore=datastore, ranking=ranking) if live else None
    for request in requests:
        replay.run(drafter or fresh_drafter(end_token_ids, datastore, ranking), request)
    return replay


def fresh_drafter(
    end_token_ids: list[int] | None, datastore: Datastore | None, ranking: bool = True
) -> Drafter:
    """A drafter for one request that shares nothing with others."""
    return Drafter(
        end_token_ids=end_token_ids,
        datastore=datastore,
        ranking=ranking,
        live_bytes=0,
        soft_bytes=PRIVATE_SOFT_BYTES,
    )


def _write_csv(rows: list[dict[str, Any]]) -> None:
    """The figures as comma-separated values, without those by source and by probability."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    names = [name for name in rows[0] if name not in ("sources", "reliability")] if rows else []
    at = names.index("tokens_per_step_interval") if rows else 0
    writer.writerow([*names[:at], "tokens_per_step_low", "tokens_per_step_high", *names[at + 1 :]])
    for row in rows:
        values = [row[name] for name in names]
        writer.writerow([*values[:at], *(values[at] or ("", "")), *values[at + 1 :]])


def _sources(rows: list[dict[str, Any]], box: Box | None) -> Table:
    """Which source carried the nodes, over all traces, by budget."""
    table = _counts_table("Nodes by the source that carried them", "source", box)
    for budget in dict.fromkeys(row["budget"] for row in rows):
        parts = [row["sources"] for row in rows if row["budget"] == budget]
        for source in SOURCES:
            _add_counts(table, [source, str(budget)], [part[source] for part in parts if source in part])
    return table


def _reliability(rows: list[dict[str, Any]], box: Box | None) -> Table:
    """Predicted against measured shares of accepted nodes, over all traces, by budget."""
    table = _counts_table("Reliability of node probabilities", "probability", box)
    for budget in dict.fromkeys(row["budget"] for row in rows):
        tables = [row["reliability"] for row in rows if row["budget"] == budget]
        for bins in zip(*tables, strict=True):
            _add_counts(table, [f"{bins[0]['from']:.2f} to {bins[0]['to']:.2f}", str(budget)], list(bins))
    return table


def _counts_table(title: str, first: str, box: Box | None) -> Table:
    table = Table(box=box, header_style="bold", title=title, title_justify="left")
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


def _table(rows: list[dict[str, Any]], box: Box | None) -> Table:
    caption = "95 %: where the figure lies when requests are drawn anew (bootstrap)"
    table = Table(box=box, header_style="bold", caption=caption, caption_justify="left")
    table.add_column("trace")
    for name in (
        "budget",
        "tokens/step",
        "95 %",
        "accepted",
        "expected",
        "drafted",
        "p50 us",
        "p99 us",
        "append us",
    ):
        table.add_column(name, justify="right")
    counts = ("accepted_per_step", "expected_accepted_per_step")
    times = ("drafted_per_step", "draft_us_p50", "draft_us_p99")
    for row in rows:
        table.add_row(
            row["trace"],
            str(row["budget"]),
            f"{row['tokens_per_step']:.3f}",
            "{:.3f}–{:.3f}".format(*row["tokens_per_step_interval"])
            if row["tokens_per_step_interval"]
            else "–",
            *(f"{row[key]:.3f}" for key in counts),
            *(f"{row[key]:.1f}" for key in times),
            f"{row['append_us_per_token']:.2f}",
        )
    return table
