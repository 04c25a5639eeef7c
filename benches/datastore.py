"""Measures the datastore: building, size, opening, verifying, look-up, and a store larger than its memory.

``python benches/datastore.py STREAMS OUT.json`` with the folder that holds ``store.npy`` and ``dev.*.jsonl``.
Needs about 6 GB of disk. The memory limits take a writable cgroup (v1 or v2); without one, the address space
of the build is limited and the page faults are left out.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
from rich.console import Console

from sssd.datastore import Datastore

VOCAB_SIZE, END_TOKEN = 128_256, 128_009
COPIES, SUBSTITUTED = 7, 0.15
BUILD_LIMIT = 4 << 30
SMALL_MEMORY = "128M"
ROOT = Path(__file__).parent.parent


class Group:
    """A cgroup whose processes share a memory limit, page cache included."""

    def __init__(self) -> None:
        v1 = Path("/sys/fs/cgroup/memory")
        self.path = (v1 if v1.exists() else Path("/sys/fs/cgroup")) / f"sssd-bench-{os.getpid()}"
        self.limit_file = "memory.limit_in_bytes" if v1.exists() else "memory.max"
        self.path.mkdir()

    def run(self, limit: int, command: list[str]) -> tuple[str, dict[str, float]]:
        (self.path / self.limit_file).write_text(str(limit))
        return run(command, lambda: (self.path / "cgroup.procs").write_text(str(os.getpid())))


@contextlib.contextmanager
def group() -> Iterator[Group | None]:
    try:
        made = Group()
    except OSError:
        yield None
        return
    try:
        yield made
    finally:
        made.path.rmdir()


def run(command: list[str], before: Any = None) -> tuple[str, dict[str, float]]:
    """Output, CPU seconds, peak memory and major faults of a command."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=before, cwd=ROOT)
    assert process.stdout is not None
    # `ru_maxrss` would start from this process's own peak
    status_file = Path(f"/proc/{process.pid}/status")
    peak, waited = 0, 0
    while not waited:
        for line in status_file.read_text().splitlines():
            if line.startswith("VmHWM"):
                peak = max(peak, 1024 * int(line.split()[1]))
        sleep(0.005)
        waited, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return process.stdout.read(), {
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_bytes": peak,
        "major_faults": usage.ru_majflt,
    }


def build(store: Path, tokens: Path, *options: str, limited: Any = run) -> dict[str, float]:
    command = [sys.executable, "-m", "sssd", "build", str(store), str(tokens), *options]
    _, used = limited([*command, "--vocab-size", str(VOCAB_SIZE), "--end-token", str(END_TOKEN)])
    with Datastore.open(store) as opened:
        count, size, segments = opened.info.tokens, opened.info.file_bytes, opened.info.segments
    return {
        "tokens": count,
        "segments": segments,
        "build_cpu_s": round(used["cpu_s"], 2),
        "build_tokens_per_cpu_s": round(count / used["cpu_s"]),
        "build_peak_bytes": used["peak_bytes"],
        "build_peak_bytes_per_token": round(used["peak_bytes"] / count, 2),
        "file_bytes": size,
        "file_bytes_per_token": round(size / count, 3),
    }


def best(repeats: int, work: Any) -> float:
    """Least seconds of several runs."""
    times = []
    for _ in range(repeats):
        started = perf_counter()
        work()
        times.append(perf_counter() - started)
    return min(times)


def enlarge(source: Path, target: Path) -> None:
    """All documents over and over, each copy with other tokens substituted by ones drawn from the corpus."""
    tokens = np.load(source, mmap_mode="r")
    random = np.random.default_rng(1)
    target.unlink(missing_ok=True)
    out = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint32, shape=(COPIES * len(tokens),))
    for copy in range(COPIES):
        part = np.array(tokens)
        if copy:
            places = np.flatnonzero((random.random(len(part)) < SUBSTITUTED) & (part != END_TOKEN))
            drawn = part[random.integers(0, len(part), len(places))]
            part[places] = np.where(drawn == END_TOKEN, 0, drawn)
        out[copy * len(tokens) : (copy + 1) * len(tokens)] = part
    out.flush()


def contexts(streams: Path, target: Path) -> None:
    """The development streams, one after the other, as little-endian uint32."""
    with target.open("wb") as file:
        for trace in sorted(streams.glob("dev.*.jsonl")):
            for line in trace.read_text("utf-8").splitlines():
                request = json.loads(line)
                ids = request["prompt_ids"][-64:] + request["response_ids"]
                file.write(np.array(ids, "<u4").tobytes())


def forget(path: Path) -> None:
    """Drops a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def lookup(store: Path, tokens: Path, queries: int, load: str, limited: Any = run) -> dict[str, float]:
    command = [str(ROOT / "target/release/examples/lookup"), str(store), str(tokens), str(queries), load]
    output, used = limited(command)
    return {**json.loads(output), "major_faults_per_query": round(used["major_faults"] / queries, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("streams", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, help="where the stores go (a temporary folder if left out)")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    cargo = ["cargo", "build", "--release", "-q", "-p", "sssd-store", "--example", "lookup"]
    subprocess.run(cargo, cwd=ROOT, check=True)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    results: dict[str, Any] = {
        "commit": commit,
        "command": "python benches/datastore.py STREAMS OUT",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, group() as memory:
        small, large, tokens = (Path(folder) / name for name in ("small.sssd", "large.sssd", "contexts.bin"))
        contexts(arguments.streams, tokens)

        console.print("store.npy")
        results["store"] = row = build(small, arguments.streams / "store.npy")
        row["open_ms"] = round(1e3 * best(20, lambda: Datastore.open(small).close()), 3)
        with Datastore.open(small) as store:
            row["verify_mb_per_s"] = round(row["file_bytes"] / 1e6 / best(3, store.verify))
        for load in ("ram", "mmap"):
            row[f"lookup_{load}"] = lookup(small, tokens, 100_000, load)

        console.print("store.npy in segments")
        options = ("--max-memory", SMALL_MEMORY)
        results["segmented"] = row = build(
            Path(folder) / "segmented.sssd", arguments.streams / "store.npy", *options
        )
        row["lookup_ram"] = lookup(Path(folder) / "segmented.sssd", tokens, 100_000, "ram")

        console.print("enlarged")
        enlarge(arguments.streams / "store.npy", Path(folder) / "large.npy")

        def in_limit(command: list[str]) -> tuple[str, dict[str, float]]:
            if memory:
                return memory.run(BUILD_LIMIT, command)
            return run(command, lambda: resource.setrlimit(resource.RLIMIT_AS, (BUILD_LIMIT, BUILD_LIMIT)))

        results["large"] = row = build(large, Path(folder) / "large.npy", limited=in_limit)
        row["build_limit_bytes"] = BUILD_LIMIT
        row["open_ms"] = round(1e3 * best(20, lambda: Datastore.open(large).close()), 3)
        for load in ("ram", "mmap"):
            row[f"lookup_{load}"] = lookup(large, tokens, 100_000, load)
        row["p50_growth"] = round(
            row["lookup_ram"]["matches_ns_p50"] / results["store"]["lookup_ram"]["matches_ns_p50"], 2
        )
        if memory:
            console.print("less memory than the store")
            for share in (2, 4, 8):
                limit = int(row["file_bytes"]) // share
                forget(large)
                found = lookup(
                    large, tokens, 5_000, "mmap", lambda command, limit=limit: memory.run(limit, command)
                )
                row[f"lookup_in_1/{share}_of_its_size"] = {"limit_bytes": limit, **found}
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
