"""Measures whether small domains drown: a workload's own source alone, all but it, all together, by domain.

``python benches/domains.py STREAMS TRACES OUT.json --work FOLDER`` with the folder that holds ``store.npy``
(30.9 M tokens) and ``dev.*.jsonl``, the one with ``datastore/NAME.jsonl.xz``, whose texts ``store.npy`` holds
in the order of the names, and one for up to 2 GB of stores, which are built once.
"""

import argparse
import json
import lzma
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd import Drafter
from sssd.datastore import Datastore, DatastoreBuilder
from sssd.reading.inputs import find_inputs
from sssd.reading.options import ReadOptions, ReadReport
from sssd.replay import Replay, Request, read_trace

VOCAB_SIZE, END_TOKEN = 128_256, 128_009
BUDGETS = (16, 32, 64)
OWN = {
    "chat-en": "chat-en.alpaca_eval",
    "chat-ja": "chat-ja.shaberi",
    "code": "code.livecodebench",
    "doc-edit": "stem.dynamic-cheatsheet",
    "exam-zh": "exam-zh.gaokao",
    "math": "math.tora-gsm8k",
    "reasoning-long": "reasoning.farel-bench",
    "translation": "translation.alma",
}
"""The source that a workload's responses are of, where the datastore has it (other prompts of it)."""


def sources(traces: Path, stream: NDArray[np.uint32]) -> dict[str, tuple[int, int, int]]:
    """Of each source where its texts begin and end in the stream, and how many they are."""
    ends = np.flatnonzero(stream == END_TOKEN) + 1
    found, start, documents = {}, 0, 0
    for path in sorted((traces / "datastore").glob("*.jsonl.xz")):
        with lzma.open(path) as file:
            count = sum(1 for _ in file)
        documents += count
        end = int(ends[documents - 1])
        found[path.name.removesuffix(".jsonl.xz")] = (start, end, count)
        start = end
    if start != len(stream):
        raise SystemExit(f"{traces} has other texts than the stream")
    return found


def build(path: Path, stream: NDArray[np.uint32], parts: Sequence[tuple[int, int]], ranking: bool) -> Path:
    """A store of stretches of the stream, unless it is there."""
    if not path.exists():
        print("building", path.name, flush=True)
        with DatastoreBuilder(path, vocab_size=VOCAB_SIZE, ranking=ranking) as builder:
            for start, end in parts:
                builder.add_stream(stream[start:end], END_TOKEN)
                builder.end_stream()
            builder.finish()
    return path


def replay(store: Datastore, requests: Sequence[Request], budgets: Sequence[int]) -> list[dict[str, float]]:
    """Each request alone; a row for each budget."""
    rows = []
    for budget in budgets:
        measured = Replay(budget)
        for request in requests:
            drafter = Drafter(datastore=store, live_bytes=0, soft_bytes=1 << 20, end_token_ids=[END_TOKEN])
            measured.run(drafter, request)
        row = measured.row("")
        rows.append(
            {
                "nodes": budget,
                "requests": len(requests),
                "accepted": row["accepted_per_step"],
                "expected": measured.expected / max(measured.accepted, 1),
                "p50_us": row["draft_us_p50"],
                "p99_us": row["draft_us_p99"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("streams", type=Path)
    parser.add_argument("traces", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--arms", default="own,others,one,domains", help="(default: %(default)s)")
    parser.add_argument("--workloads", help="some of them, by commas")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--requests", type=int, default=None, help="of each workload")
    parser.add_argument("--ranking", action="store_true", help="learn tables for ranking")
    arguments = parser.parse_args()
    stream = np.load(arguments.streams / "store.npy", mmap_mode="r")
    places = sources(arguments.traces, stream)
    budgets = [int(budget) for budget in arguments.budgets.split(",")]
    arms, found = arguments.arms.split(","), {}
    work, ranking = arguments.work, arguments.ranking
    if arguments.output.exists():
        found = json.loads(arguments.output.read_text())["workloads"]
    every = build(work / f"all-{ranking:d}.sssd", stream, [(0, len(stream))], ranking)
    runs = [(count, end - start, n) for n, (start, end, count) in enumerate(places.values())]
    for path in sorted(arguments.streams.glob("dev.*.jsonl")):
        name = path.name.split(".")[1]
        if arguments.workloads and name not in arguments.workloads.split(","):
            continue
        [input] = find_inputs([path], ReadOptions(), ReadReport())
        requests = list(read_trace(input))[: arguments.requests]
        own = places.get(OWN.get(name, ""))
        row = found.setdefault(name, {})
        for arm in arms:
            if arm == "one":
                store = Datastore.open(every)
            elif arm == "domains":
                store = Datastore.open([every], domains=[runs])
            elif own is None:
                continue
            else:
                parts = [own[:2]] if arm == "own" else [(0, own[0]), (own[1], len(stream))]
                parts = [part for part in parts if part[0] < part[1]]
                store = Datastore.open(build(work / f"{arm}-{name}-{ranking:d}.sssd", stream, parts, ranking))
            row[arm] = replay(store, requests, budgets)
        print(name, {arm: [round(r["accepted"], 3) for r in row[arm]] for arm in row}, flush=True)
        write(arguments.output, places, found)


def write(output: Path, places: dict[str, Any], found: dict[str, Any]) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    content = {
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}",
        "command": "python benches/domains.py STREAMS TRACES OUT.json --work FOLDER",
        "tokens": {name: end - start for name, (start, end, _) in places.items()},
        "workloads": found,
    }
    output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
