"""Measures stores of 10^6 to 10^9 tokens: building on one core and on two, drafts whatever is in memory.

``python benches/large_store.py all STREAMS OUT.json --folder FOLDER`` with the folder that holds
``store.npy`` and ``dev.*.jsonl``. Needs 11 GB of disk, 8 GB of memory and a writable cgroup (v1 or v2). The
other commands are its steps: ``build`` and ``drafts`` print a line of JSON.

The larger texts are that of ``store.npy`` over and over, in each copy other tokens substituted by ones drawn
from it.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter_ns, thread_time_ns
from typing import Any

import numpy as np

from sssd import Drafter
from sssd.datastore import Datastore, DatastoreBuilder
from sssd.replay import accepted_path, extend, read_trace

NODES = 32
VOCAB_SIZE, END_TOKEN = 128_256, 128_009
SUBSTITUTED = 0.15
LIMIT = 4 << 30
MAX_MEMORY = 3 << 30
SIZES = (1_000_000, 3_000_000, 10_000_000, 30_852_252, 10 * 30_852_252, 33 * 30_852_252)
ROOT = Path(__file__).parent.parent


def text(source: Path, size: int) -> Any:
    """The text of so many tokens, in pieces."""
    tokens = np.load(source, mmap_mode="r")
    random = np.random.default_rng(1)
    for copy in range(-(-size // len(tokens))):
        part = np.array(tokens[: size - copy * len(tokens)])
        if copy:
            places = np.flatnonzero((random.random(len(part)) < SUBSTITUTED) & (part != END_TOKEN))
            drawn = part[random.integers(0, len(part), len(places))]
            part[places] = np.where(drawn == END_TOKEN, 0, drawn)
        yield part


def build(store: Path, source: Path, size: int, threads: int) -> dict[str, Any]:
    """Builds a store."""
    start = perf_counter_ns()
    builder = DatastoreBuilder(store, vocab_size=VOCAB_SIZE, max_memory=MAX_MEMORY, threads=threads)
    for part in text(source, size):
        builder.add_stream(part, END_TOKEN)
    added = perf_counter_ns()
    before = resource.getrusage(resource.RUSAGE_SELF)
    summary = builder.finish()
    used = resource.getrusage(resource.RUSAGE_SELF)
    end = perf_counter_ns()
    return {
        "tokens": summary.tokens,
        "segments": summary.segments,
        "threads": threads,
        "file_bytes_per_token": round(summary.file_bytes / summary.tokens, 3),
        "adding_s": round((added - start) / 1e9, 1),
        "finish_s": round((end - added) / 1e9, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "finish_cpu_s": round(used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_bytes": 1024 * used.ru_maxrss,
        "load": os.getloadavg()[0],
    }


def drafts(stores: list[Path], streams: Path, each: int, rounds: int, load: str) -> list[dict[str, Any]]:
    """Replays some requests of each trace in every round: times, faults of its thread, accepted tokens."""
    traces = sorted(streams.glob("dev.*.jsonl"))
    played = [request for trace in traces for _, request in zip(range(each), read_trace(trace), strict=False)]
    store = Datastore.open(stores, load=load)  # type: ignore[arg-type]
    return [replay(store, played) for _ in range(rounds)]


def replay(store: Datastore, played: list[Any]) -> dict[str, Any]:
    drafter = Drafter(end_token_ids=[END_TOKEN], datastore=store, live_bytes=0)
    times, cpu, minor, major, accepted = [], [], [], [], 0
    for request in played:
        with drafter.begin(request.prompt_ids) as sequence:
            response, position = request.response_ids, 1
            extend(sequence, request, 0, 1)
            while position < len(response):
                before = resource.getrusage(resource.RUSAGE_THREAD)
                busy, start = thread_time_ns(), perf_counter_ns()
                tree = sequence.draft(NODES)
                times.append(perf_counter_ns() - start)
                cpu.append(thread_time_ns() - busy)
                after = resource.getrusage(resource.RUSAGE_THREAD)
                minor.append(after.ru_minflt - before.ru_minflt)
                major.append(after.ru_majflt - before.ru_majflt)
                path = accepted_path(tree, response[position:])
                accepted += len(path)
                end = min(position + len(path) + 1, len(response))
                extend(sequence, request, position, end)
                position = end
    wall, own = (np.percentile(values, [50, 90, 99]) / 1e3 for values in (times, cpu))
    return {
        "drafts": len(times),
        "accepted_per_step": round(accepted / len(times), 4),
        **dict(zip(("us_p50", "us_p90", "us_p99"), wall.round(1).tolist(), strict=True)),
        **dict(zip(("cpu_us_p50", "cpu_us_p90", "cpu_us_p99"), own.round(1).tolist(), strict=True)),
        "minor_faults": round(float(np.mean(minor)), 2),
        "major_faults": round(float(np.mean(major)), 3),
        "major_faults_p99": int(np.percentile(major, 99)),
        "load": os.getloadavg()[0],
    }


class Group:
    """A cgroup whose processes share a memory limit, page cache included."""

    def __init__(self) -> None:
        v1 = Path("/sys/fs/cgroup/memory")
        self.path = (v1 if v1.exists() else Path("/sys/fs/cgroup")) / f"sssd-large-{os.getpid()}"
        self.path.mkdir()
        self.limit = self.path / ("memory.limit_in_bytes" if v1.exists() else "memory.max")

    def run(self, *arguments: Any, limit: int | None = None) -> Any:
        """Runs one of the steps of this script."""
        if limit:
            self.limit.write_text(str(limit))

        def enter() -> None:
            if limit:
                (self.path / "cgroup.procs").write_text(str(os.getpid()))

        command = [sys.executable, __file__, *map(str, arguments)]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter, check=True).stdout
        print(*arguments, out, sep="\n", flush=True)
        return json.loads(out)


def forget(path: Path) -> None:
    """Drops a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def everything(streams: Path, folder: Path) -> dict[str, Any]:
    group, source = Group(), streams / "store.npy"
    results: dict[str, Any] = {"sizes": []}
    for size in SIZES[:-1]:
        store = folder / f"{size}.sssd"
        row = group.run("build", store, source, size, 1)
        row["drafts"] = group.run("drafts", store, streams, 2, 2, "mmap")[-1]
        results["sizes"].append(row)
        store.unlink()
    store, size = folder / "large.sssd", SIZES[-1]
    builds = [group.run("build", store, source, size, threads, limit=LIMIT) for threads in (1, 2)]
    results["large"] = large = {"builds": builds}
    large["in_memory"] = group.run("drafts", store, streams, 2, 2, "mmap")
    for load in ("mmap", "mmap-wait"):
        forget(store)
        large[f"in_4_GiB_{load}"] = group.run("drafts", store, streams, 2, 4, load, limit=LIMIT)
    group.path.rmdir()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    all_of_it, one_build, some_drafts = map(commands.add_parser, ("all", "build", "drafts"))
    all_of_it.add_argument("streams", type=Path)
    all_of_it.add_argument("out", type=Path)
    all_of_it.add_argument("--folder", type=Path, required=True)
    one_build.add_argument("store", type=Path)
    one_build.add_argument("source", type=Path)
    one_build.add_argument("size", type=int)
    one_build.add_argument("threads", type=int)
    some_drafts.add_argument("store", type=lambda paths: [Path(path) for path in paths.split(",")])
    some_drafts.add_argument("streams", type=Path)
    some_drafts.add_argument("each", type=int)
    some_drafts.add_argument("rounds", type=int)
    some_drafts.add_argument("load")
    arguments = parser.parse_args()
    if arguments.command == "build":
        print(json.dumps(build(arguments.store, arguments.source, arguments.size, arguments.threads)))
    elif arguments.command == "drafts":
        values = (arguments.store, arguments.streams, arguments.each, arguments.rounds, arguments.load)
        print(json.dumps(drafts(*values)))
    else:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
        results = {
            "commit": commit,
            "command": "python benches/large_store.py all STREAMS OUT --folder FOLDER",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            **everything(arguments.streams, arguments.folder),
        }
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
