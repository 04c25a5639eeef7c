"""Measures corpora in folders: what merging writes, what drafts cost beside one file, what size is worth.

``python benches/corpus.py STREAMS OUT.json`` with the folder that holds ``store.npy`` (30.9 M tokens) and
``dev.*.jsonl``; ``--work`` names a folder for 2 GB of files, ``--only`` one of the parts.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from sssd import Drafter
from sssd.corpus import Corpus, files
from sssd.datastore import Datastore, DatastoreBuilder
from sssd.reading.inputs import find_inputs
from sssd.reading.options import ReadOptions, ReadReport
from sssd.replay import Replay, read_trace

VOCAB_SIZE, END_TOKEN = 128_256, 128_009
NODES = 32


def written() -> int:
    """Bytes that this process has handed to the system for writing."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def add(corpus: Corpus, part: np.ndarray, work: Path, day: int) -> int:
    """Adds a stretch as a file of its own; returns the bytes that the corpus has written."""
    path = work / "day.npy"
    np.save(path, part)
    before = written()
    corpus.add([path], vocab_size=VOCAB_SIZE, end_token_id=END_TOKEN, source=f"day {day}", added=day)
    return written() - before


def daily(stream: np.ndarray, work: Path, utf8_per_token: float) -> dict[str, Any]:
    """365 additions of 0.1 M tokens."""
    corpus = Corpus(work / "daily", grace=0)
    additions, size = 365, 100_000
    total, most, started, cpu = 0, 0, perf_counter(), process_time()
    for day in range(additions):
        start = day * size % (len(stream) - size) + day // (len(stream) // size)
        total += add(corpus, stream[start : start + size], work, day)
        most = max(most, len(files(corpus.path)))
        if day % 30 == 29:
            print(day + 1, f"{total / ((day + 1) * size):.1f} bytes a token", flush=True)
    manifest = corpus.manifest
    tokens = additions * size
    kept = sum(segment.bytes for segment in manifest.segments)
    shutil.rmtree(corpus.path)
    return {
        "additions": additions,
        "tokens": tokens,
        "most_segments": most,
        "tokens_written_per_token": manifest.written / tokens,
        "bytes_written": total,
        "bytes_written_per_token": total / tokens,
        "over_ids_of_4_bytes": total / (4 * tokens),
        "over_utf8": total / (utf8_per_token * tokens),
        "utf8_bytes_per_token": utf8_per_token,
        "over_the_datastore_at_the_end": total / kept,
        "wall_s": perf_counter() - started,
        "cpu_s": process_time() - cpu,
    }


def beside_one_file(stream: np.ndarray, streams: Path, work: Path, requests: int) -> dict[str, Any]:
    """60 additions of 0.5 M tokens, and one file of the same documents."""
    corpus = Corpus(work / "corpus", grace=0)
    size = 500_000
    for day in range(60):
        add(corpus, stream[day * size : (day + 1) * size], work, day)
    single = work / "single.sssd"
    with DatastoreBuilder(single, vocab_size=VOCAB_SIZE) as builder:
        for day in range(60):
            builder.add_stream(stream[day * size : (day + 1) * size], END_TOKEN)
            builder.end_stream()
    stores = {"one file": Datastore.open(single), "corpus": Datastore.open(corpus.path)}
    found: dict[str, Any] = {"segments": [segment.tokens for segment in corpus.manifest.segments]}
    ratios, accepted = [], []
    for name in ("chat-en", "code", "rag", "reasoning-long"):
        replays = {kind: Replay(NODES) for kind in stores}
        [input] = find_inputs([streams / f"dev.{name}.jsonl"], ReadOptions(), ReadReport())
        for request in itertools.islice(read_trace(input), requests):
            for kind, store in stores.items():  # in turns, for what else the machine does
                drafter = Drafter(
                    datastore=store, live_bytes=0, soft_bytes=1 << 20, end_token_ids=[END_TOKEN]
                )
                replays[kind].run(drafter, request)
        rows = {kind: replay.row(name) for kind, replay in replays.items()}
        found[name] = {
            kind: {key: row[key] for key in ("draft_us_p50", "draft_us_p99", "accepted_per_step")}
            for kind, row in rows.items()
        }
        ratios.append(rows["corpus"]["draft_us_p50"] / rows["one file"]["draft_us_p50"])
        accepted.append(rows["corpus"]["accepted_per_step"] / rows["one file"]["accepted_per_step"])
        print(name, found[name], flush=True)
    found["draft_us_p50_ratio"] = statistics.mean(ratios)
    found["accepted_ratio"] = statistics.mean(accepted)
    return found


def by_size(stream: np.ndarray, streams: Path, work: Path, requests: int) -> dict[str, Any]:
    """Accepted tokens by the size of the store: documents at random, each store holding the smaller ones."""
    ends = np.flatnonzero(stream == END_TOKEN) + 1
    starts = np.concatenate([[0], ends[:-1]])
    order = np.random.default_rng(0).permutation(len(ends))
    after = np.cumsum((ends - starts)[order])
    stores: dict[int, Datastore | None] = {0: None}
    for wanted in (300_000, 1_000_000, 3_000_000, 10_000_000, len(stream)):
        chosen = order[: np.searchsorted(after, wanted) + 1]
        path = work / f"{wanted}.sssd"
        with DatastoreBuilder(path, vocab_size=VOCAB_SIZE) as builder:
            for document in np.sort(chosen):
                builder.add(stream[starts[document] : ends[document]])
        store = Datastore.open(path)
        stores[store.info.tokens] = store
    rows = []
    for path in sorted(streams.glob("dev.*.jsonl")):
        [input] = find_inputs([path], ReadOptions(), ReadReport())
        recorded = list(itertools.islice(read_trace(input), requests))
        for tokens, store in stores.items():
            replay = Replay(NODES)
            for request in recorded:
                drafter = Drafter(
                    datastore=store, live_bytes=0, soft_bytes=1 << 20, end_token_ids=[END_TOKEN]
                )
                replay.run(drafter, request)
            row = replay.row(path.name.split(".")[1])
            rows.append(
                {"trace": row["trace"], "tokens": tokens, "accepted_per_step": row["accepted_per_step"]}
            )
        print(rows[-len(stores) :], flush=True)
    means = {
        tokens: statistics.mean(row["accepted_per_step"] for row in rows if row["tokens"] == tokens)
        for tokens in stores
    }
    sizes = [tokens for tokens in stores if tokens]
    slope, start = np.polyfit(np.log10(sizes), [means[tokens] for tokens in sizes], 1)
    law = {"per_tenfold": float(slope), "at_1_M": float(start + 6 * slope)}
    return {"nodes": NODES, "requests_per_trace": requests, "means": means, "law": law, "rows": rows}


def draw(found: dict[str, Any], path: Path) -> None:
    """Accepted tokens by the size of the store, each trace in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained", dpi=110)
    axes = figure.subplots()
    for trace in dict.fromkeys(row["trace"] for row in found["rows"]):
        own = [row for row in found["rows"] if row["trace"] == trace and row["tokens"]]
        axes.plot(
            [r["tokens"] for r in own], [r["accepted_per_step"] for r in own], color="0.75", linewidth=0.8
        )
    sizes = [int(tokens) for tokens in found["means"] if int(tokens)]
    means = [found["means"][tokens] for tokens in found["means"] if int(tokens)]
    axes.plot(sizes, means, "o-", color="C0", label="mean of the traces")
    without = next(mean for tokens, mean in found["means"].items() if not int(tokens))
    axes.axhline(without, linestyle="--", color="C1", label="mean without a store")
    axes.set_ylim(0, 1.6 * max(means))  # document editing, far above, copies from its prompt
    axes.set_xscale("log")
    axes.set_xlabel("tokens in the store")
    axes.set_ylabel(f"accepted tokens a step, {found['nodes']} nodes")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("streams", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", choices=("daily", "beside", "sizes"))
    parser.add_argument("--requests", type=int, default=20, help="of each trace")
    parser.add_argument(
        "--utf8-per-token", type=float, default=4.29, help="bytes of the text (default: %(default)s)"
    )
    arguments = parser.parse_args()
    stream = np.load(arguments.streams / "store.npy", mmap_mode="r")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    results: dict[str, Any] = {
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}",
        "command": "python benches/corpus.py STREAMS OUT.json",
    }
    if arguments.output.exists():
        results = {**json.loads(arguments.output.read_text()), **results}
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        if arguments.only in (None, "beside"):
            results["beside_one_file"] = beside_one_file(stream, arguments.streams, work, arguments.requests)
        if arguments.only in (None, "daily"):
            results["daily"] = daily(stream, work, arguments.utf8_per_token)
        if arguments.only in (None, "sizes"):
            results["sizes"] = by_size(stream, arguments.streams, work, arguments.requests)
            draw(results["sizes"], arguments.output.with_suffix(".png"))
    finally:
        shutil.rmtree(work)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
