"""``python -m sssd simulate``: rules for the draft size, on recorded requests under a cost curve."""

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from sssd.cli.arguments import add_trace_arguments, open_datastore
from sssd.cli.output import check_writable, progress_bar, show
from sssd.cli.replay import PRIVATE_SOFT_BYTES
from sssd.cli.traces import Traces, write_json
from sssd.hardware import CostCurve
from sssd.hardware.simulate import FIXED_RULES, RULES, compare, sequences, simulate_rules


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.description = (
        "Replays recorded requests with continuous batching under a cost curve, without a model. Prints "
        "speed-ups over autoregressive decoding: of fixed budgets, of the SSSD paper's rule, of this "
        "package's rule (sssd), and of drafts that are always right (perfect)."
    )
    add_trace_arguments(parser)
    parser.add_argument(
        "--cost",
        required=True,
        metavar="FILE",
        help=f"cost curve made by `profile`, or one that ships: {', '.join(CostCurve.shipped())}",
    )
    parser.add_argument(
        "--batch", type=_batches, default=[1, 4, 16, 64], metavar="N,N", help="default: 1,4,16,64"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the speed-ups as heat maps: .png, .svg, .pdf"
    )


def run(arguments: argparse.Namespace) -> int:
    """Simulates every rule on each trace and prints a table for each batch size.

    Returns 1 if a file could not be read.
    """
    check_writable(arguments.json, arguments.plot)
    if arguments.plot:
        from sssd.hardware import plot

        plot.check_format(arguments.plot)
    curve = CostCurve.load(arguments.cost)
    traces = Traces(arguments)
    datastore = open_datastore(arguments.datastore, traces.tokenizer, arguments.any_tokenizer)
    begin = sequences(
        end_token_ids=arguments.end_token_id,
        datastore=datastore,
        live_bytes=0,
        soft_bytes=PRIVATE_SOFT_BYTES,
    )
    rows: list[dict[str, Any]] = []
    with progress_bar(quiet=arguments.quiet) as progress:
        task = progress.add_task("", total=len(traces.inputs) * len(arguments.batch) * len(RULES))
        for name, requests in traces:
            progress.update(task, description=name)
            rows += simulate_rules(
                name, requests, curve, arguments.batch, begin, lambda: progress.advance(task)
            )
    status = traces.end()
    kind = "measured" if curve.source == "measured" else f"{curve.source}, not measured"
    Console().print(
        f"{curve.model} on {curve.device} ({kind}): speed-up over autoregressive decoding", soft_wrap=True
    )
    comparison = compare(rows)
    for batch in arguments.batch if rows else ():
        at_batch = ([row for row in found if row["batch"] == batch] for found in (rows, comparison))
        show(_table(*at_batch))
    about = {name: getattr(curve, name) for name in ("source", "device", "model")}
    write_json(arguments.json, {"curve": about, "comparison": comparison, "results": rows})
    if arguments.plot:
        plot.draw_simulation(rows, arguments.plot, f"{curve.model} on {curve.device} ({kind})")
    return status


def _table(rows: list[dict[str, Any]], comparison: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column(f"batch {rows[0]['batch']}" if rows else "")
    traces: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        traces[row["trace"]][row["rule"]] = row["speedup"]
    for name in (*RULES, "sssd/paper", "sssd/best fixed"):
        table.add_column(name, justify="right")
    for (trace, speedups), ratios in zip(traces.items(), comparison, strict=True):
        values = [*(speedups[rule] for rule in RULES), ratios["over_paper"], ratios["over_best_fixed"]]
        table.add_row(trace, *(f"{value:.3f}" for value in values))
    if len(traces) > 1:
        means = {rule: mean(speedups[rule] for speedups in traces.values()) for rule in RULES}
        best = max(means[rule] for rule in FIXED_RULES)
        values = [*means.values(), means["sssd"] / means["paper"], means["sssd"] / best]
        table.add_row("mean", *(f"{value:.3f}" for value in values), style="bold")
    return table


def _batches(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers separated by commas, got {text!r}") from None
    if not all(1 <= value <= 1024 for value in values):
        raise argparse.ArgumentTypeError("batch sizes must be between 1 and 1024")
    return values
