"""Spec-Bench against trained drafters, by replay of recorded answers of vicuna-7b-v1.3.

Usage: specbench.py SPECBENCH TEXTS [--out FOLDER] [--budgets 25,26,64] [--json FILE]

SPECBENCH has the questions of each group, ``specbench.GROUP.jsonl.xz`` (a line for each turn, whose prompt
holds the turns before it), the model's ``tokenizer.json.xz``, and ``reference.json``: tokens per step of
trained drafters on the same questions. TEXTS has answers of other models, ``NAME.jsonl.xz`` with "text", for
the datastore, which is built once in FOLDER (some minutes). That it holds none of the answers is measured
first: the share of their runs of 16 tokens that it has, and the largest share of one answer.

Each way drafts every question at each number of nodes. Where requests share ("live"), those of a group learn
from the ones before them, in file order. Tokens per step are accepted tokens and one; "overall" is over the
tokens of all groups together. ``docs/specbench.md`` has the figures.
"""

import argparse
import json
import lzma
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sssd import Datastore, Drafter
from sssd.cli.replay import fresh_drafter
from sssd.datastore import build
from sssd.replay import Replay, Request, bootstrap, read_trace

GROUPS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
END_TOKEN = 2
RUN = 16
"""Tokens of the runs by which answers are looked for in the datastore."""
TRAINED = {"eagle1_26_nodes": ("EAGLE-1", "26"), "sps_68m": ("draft model, 68 M weights", "")}
"""What was recorded on the same questions, in ``reference.json``: what it is called here, and its nodes."""
PUBLISHED = {
    "prompt lookup": (1.75, "10"),
    "REST": (1.82, "64"),
    "Token Recycling": (2.73, "80"),
    "EAGLE-2": (4.34, "60"),
}
"""Spec-Bench's leaderboard of April 2025 for Vicuna-7B, over all 480 questions, and the nodes of a draft."""

Ways = dict[str, Callable[[], Drafter]]


def prepared(specbench: Path, texts: Path, out: Path) -> Datastore:
    """The datastore of the texts in the model's tokens, built if it is not there."""
    out.mkdir(parents=True, exist_ok=True)
    store = out / "store.sssd"
    if not store.exists():
        model = out / "model"
        model.mkdir(exist_ok=True)
        packed = (specbench / "tokenizer.json.xz").read_bytes()
        (model / "tokenizer.json").write_bytes(lzma.decompress(packed))
        inputs = sorted(texts.glob("*.jsonl.xz"))
        if not inputs:
            raise SystemExit(f"{texts} has no texts (*.jsonl.xz)")
        print(f"building {store} from {len(inputs)} files", flush=True)
        build(inputs, store, tokenizer=model, end_token_id=END_TOKEN, ranking=True)
    return Datastore.open(store, load="mmap-wait")


def questions(specbench: Path) -> dict[str, list[Request]]:
    """The requests of each group, in file order."""
    return {group: list(read_trace(specbench / f"specbench.{group}.jsonl.xz")) for group in GROUPS}


def overlap(requests: list[Request], store: Datastore) -> dict[str, float]:
    """Of the answers' runs the share that the datastore has, and the largest share of one answer."""
    shares = []
    for request in requests:
        answer = request.response_ids
        runs = np.lib.stride_tricks.sliding_window_view(answer, RUN) if len(answer) >= RUN else answer[:0]
        if len(runs):
            shares.append((sum(store.count(run) > 0 for run in runs), len(runs)))
    found, number = np.sum(shares, axis=0)
    return {"share": float(found / number), "largest": max(found / number for found, number in shares)}


def ways(store: Datastore) -> Ways:
    """How drafters are made: with what they have to go by."""
    ends = [END_TOKEN]
    return {
        "no store": lambda: fresh_drafter(ends, None),
        "no store, live": lambda: Drafter(end_token_ids=ends, datastore=None),
        "store, not ranked": lambda: fresh_drafter(ends, store, ranking=False),
        "store, not ranked, live": lambda: Drafter(end_token_ids=ends, datastore=store, ranking=False),
        "store": lambda: fresh_drafter(ends, store),
        "store, live": lambda: Drafter(end_token_ids=ends, datastore=store),
    }


def measure(
    way: str, make: Callable[[], Drafter], nodes: int, groups: dict[str, list[Request]]
) -> dict[str, Any]:
    """A row: tokens per step of each group and overall, with intervals, calibration and draft times."""
    row: dict[str, Any] = {"way": way, "nodes": nodes, "tokens_per_step": {}, "interval": {}}
    row |= {"expected_over_accepted": {}, "draft_us_p50": {}}
    outcomes = []
    for group, requests in groups.items():
        replay = Replay(nodes)
        shared = make() if way.endswith("live") else None
        for request in requests:
            replay.run(shared or make(), request)
        row["tokens_per_step"][group] = replay.tokens / replay.steps
        row["interval"][group] = replay.interval
        row["expected_over_accepted"][group] = replay.expected / max(replay.accepted, 1)
        row["draft_us_p50"][group] = float(np.median(replay.draft_ns)) / 1e3
        outcomes += replay.outcomes
    tokens, steps = np.sum(outcomes, axis=0)
    row["tokens_per_step"]["overall"] = float(tokens / steps)
    row["interval"]["overall"] = bootstrap(outcomes)
    return row


def table(figures: dict[str, Any]) -> str:
    """All drafters' tokens per step in Markdown: trained ones, ours, and what was published."""
    columns = (*GROUPS, "overall")
    lines = [_line(("drafter", "nodes", *columns)), _line(["---", *["--:"] * (1 + len(columns))])]
    for name, (shown, nodes) in TRAINED.items():
        rates = figures["trained"][name]
        lines.append(_line((shown, nodes, *(f"{rates[column]:.2f}" for column in columns))))
    for row in figures["rows"]:
        rates = row["tokens_per_step"]
        lines.append(_line((row["way"], row["nodes"], *(f"{rates[column]:.2f}" for column in columns))))
    for name, (rate, nodes) in PUBLISHED.items():
        lines.append(_line((f"{name}, published", nodes, *[""] * len(GROUPS), f"{rate:.2f}")))
    return "\n".join(lines)


def _line(cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _about(store: Datastore) -> dict[str, Any]:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": git.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
        "store": {
            "tokens": store.info.tokens,
            "documents": store.info.documents,
            "bytes": store.info.file_bytes,
        },
    }


def rounded(value: Any) -> Any:
    """The same with floats of four digits after the point."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    """Builds what is not there, replays, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("specbench", type=Path, metavar="SPECBENCH")
    parser.add_argument("texts", type=Path, metavar="TEXTS")
    parser.add_argument("--out", type=Path, default=Path("target/specbench"), metavar="FOLDER")
    parser.add_argument("--budgets", default="25,26,64", help="nodes (default: 25,26,64)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    store = prepared(arguments.specbench, arguments.texts, arguments.out)
    groups = questions(arguments.specbench)
    held = {group: overlap(requests, store) for group, requests in groups.items()}
    for group, shares in held.items():
        print(
            f"{group}: {shares['share']:.2%} of runs in the datastore, of one answer {shares['largest']:.2%}"
        )
    rows = []
    for way, make in ways(store).items():
        for nodes in map(int, arguments.budgets.split(",")):
            rows.append(measure(way, make, nodes, groups))
            print(f"{way}, {nodes} nodes: {rows[-1]['tokens_per_step']['overall']:.3f}", flush=True)
    trained = json.loads((arguments.specbench / "reference.json").read_text())
    figures = _about(store) | {"in_store": held, "trained": {name: trained[name] for name in TRAINED}}
    print(table(figures | {"rows": rows}))
    if arguments.json:
        lines = ",\n ".join(json.dumps(rounded(row)) for row in rows)
        about = json.dumps(rounded(figures), indent=1)
        arguments.json.write_text(f'{about[:-2]},\n "rows": [\n {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
