"""Measures stores from 10^6 to 10^9 tokens: building on one and two cores, and drafts whatever is in memory.

``python benches/large_store.py STREAMS OUT.json --folder FOLDER`` with the folder that holds ``store.npy`` and
``dev.*.jsonl``. Needs about 11 GB of disk, 8 GB of memory and a writable cgroup (v1 or v2).

``… drafts STORES STREAMS`` measures the drafts of one process: what the first runs, in a cgroup.
"""

import argparse
import json
import resource
from pathlib import Path
from time import perf_counter_ns, thread_time_ns
from typing import Any

import numpy as np

from sssd import Drafter
from sssd.datastore import Datastore
from sssd.replay import accepted_path, extend, read_trace

NODES = 32


def requests(streams: Path, each: int) -> list[Any]:
    return [
        request
        for trace in sorted(streams.glob("dev.*.jsonl"))
        for _, request in zip(range(each), read_trace(trace), strict=False)
    ]


def drafts(stores: list[Path], streams: Path, each: int, rounds: int, load: str) -> list[dict[str, float]]:
    """Replays some requests of each trace on one drafter a round: times, faults of the drafting thread, and accepted
    tokens."""
    played = requests(streams, each)
    rows = []
    store = Datastore.open(stores, load=load)
    for _ in range(rounds):
        drafter = Drafter(end_token_ids=[128_009], datastore=store, live_bytes=0)
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
        p50, p90, p99, p999 = np.percentile(times, [50, 90, 99, 99.9]) / 1e3
        rows.append(
            {
                "drafts": len(times),
                "accepted": accepted,
                "accepted_per_step": round(accepted / len(times), 4),
                "us_p50": round(p50, 1),
                "us_p90": round(p90, 1),
                "us_p99": round(p99, 1),
                "us_p999": round(p999, 1),
                "cpu_us_p50": round(np.percentile(cpu, 50) / 1e3, 1),
                "cpu_us_p99": round(np.percentile(cpu, 99) / 1e3, 1),
                "minor_faults": round(float(np.mean(minor)), 2),
                "major_faults": round(float(np.mean(major)), 2),
                "major_faults_p99": int(np.percentile(major, 99)),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["drafts"])
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--streams", type=Path, default=Path("/tmp/tok"))
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--load", default="mmap")
    a = parser.parse_args()
    drafts(a.stores, a.streams, a.each, a.rounds, a.load)
