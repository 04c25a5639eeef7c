"""``python -m sssd report``: replays recorded requests into a page that shows every tree."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from sssd import __version__
from sssd.cli.arguments import add_trace_arguments, at_least, budgets, open_datastore
from sssd.cli.output import check_writable, progress_bar
from sssd.cli.replay import fresh_drafter
from sssd.cli.traces import Traces, write_json
from sssd.pictures.page import page
from sssd.pictures.steps import Steps
from sssd.replay import Replay, Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.description = (
        "Replays recorded requests without a model, as replay does, and writes one HTML page that needs no "
        "network: tokens per step with intervals, reliability, sources, draft times, and requests to step "
        "through, tree by tree. With --tokenizer it shows texts. The page holds texts of the requests shown."
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the page to write")
    add_trace_arguments(parser)
    parser.add_argument(
        "--budgets", type=budgets, default=[4, 16, 64], help="node budgets (default: 4,16,64)"
    )
    parser.add_argument("--title", default="Drafts, step by step", help="heading of the page")
    parser.add_argument(
        "--requests", type=at_least(0), default=2, metavar="N", help="requests of each trace to step through"
    )
    parser.add_argument(
        "--steps", type=at_least(1), default=60, metavar="N", help="steps of each of them (default: 60)"
    )
    parser.add_argument(
        "--nodes", type=at_least(0), metavar="N", help="budget of the trees shown (default: the middle one)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Replays and writes the page."""
    check_writable(arguments.output, arguments.json)
    traces = Traces(arguments)
    decode = traces.tokenizer.decode if traces.tokenizer else None
    datastore = open_datastore(arguments.datastore, traces.tokenizer, arguments.any_tokenizer)
    nodes = sorted(arguments.budgets)[len(arguments.budgets) // 2]
    nodes = nodes if arguments.nodes is None else arguments.nodes
    rows: list[dict[str, Any]] = []
    shown: list[Steps] = []
    with progress_bar(quiet=arguments.quiet) as progress:
        for name, requests in traces:
            task = progress.add_task(name, total=len(requests) * len(arguments.budgets))
            for budget in arguments.budgets:
                replay = Replay(budget)
                for request in requests:
                    replay.run(fresh_drafter(arguments.end_token_id, datastore), request)
                    progress.advance(task)
                rows.append(replay.row(name))
            progress.remove_task(task)
            for number, request in enumerate(_worth_showing(requests, arguments.requests), 1):
                steps = Steps(f"{name}, request {number}, {nodes} nodes", request, decode, arguments.steps)
                Replay(nodes).run(fresh_drafter(arguments.end_token_id, datastore), request, steps)
                shown.append(steps)
    status = traces.end()
    about = (
        f"sssd {__version__}; {sum(row['requests'] for row in rows) // len(arguments.budgets):,} requests of "
        f"{len(rows) // len(arguments.budgets)} traces, each on its own; "
        + (
            "datastore: " + ", ".join(Path(name).name for name in arguments.datastore)
            if datastore
            else "no datastore"
        )
    )
    arguments.output.write_text(page(arguments.title, about, rows, shown), encoding="utf-8")
    write_json(arguments.json, {"results": rows})
    size = arguments.output.stat().st_size
    Console().print(
        f"{arguments.output}: {len(rows)} figures, {len(shown)} requests to step through, {size:,} bytes",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return status


def _worth_showing(requests: list[Request], most: int) -> list[Request]:
    """The first requests that take steps."""
    return [request for request in requests if len(request.response_ids) > 1][:most]
