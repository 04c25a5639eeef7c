"""Measures what ``Drafter.reopen`` costs those who draft meanwhile.

``python benches/reopen.py [TOKENS]``: times of single drafts of 32 nodes by a thread of its own, while
nothing else happens, while files are merely replaced, and while they are replaced and reopened all the time;
and times of ``reopen`` with and without news. Prints JSON, in microseconds.
"""

import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, sleep

import numpy as np

from sssd import DatastoreBuilder, Drafter

SECONDS = 2.0


def build(path: Path, tokens: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    phrases = rng.integers(0, 50_000, size=(2000, 20), dtype=np.int32)
    with DatastoreBuilder(path, vocab_size=50_000) as builder:
        for _ in range(tokens // 1000):
            builder.add(phrases[rng.integers(0, 2000, size=50)].ravel())
    return path


def percentiles(seconds: list[float]) -> dict[str, float]:
    found = np.percentile(np.array(seconds) * 1e6, [50, 99, 99.9, 100])
    return dict(zip(["p50", "p99", "p99.9", "most"], found.round(1).tolist(), strict=True))


def measure(drafter: Drafter, prompt: list[int], meanwhile: Callable[[], object]) -> dict[str, float]:
    """Times of drafts by another thread, while ``meanwhile`` is done again and again."""
    times: list[float] = []
    done = threading.Event()

    def draft() -> None:
        sequence = drafter.begin(prompt)
        while not done.is_set():
            start = perf_counter()
            sequence.draft(32)
            times.append(perf_counter() - start)

    thread = threading.Thread(target=draft)
    thread.start()
    end = perf_counter() + SECONDS
    while perf_counter() < end:
        meanwhile()
    done.set()
    thread.join()
    return percentiles(times)


def main() -> None:
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000_000
    with tempfile.TemporaryDirectory() as folder:
        versions = [build(Path(folder) / f"version-{seed}", tokens, seed) for seed in range(2)]
        path, turn, swaps, same = Path(folder) / "store", 0, [], []

        def replace() -> None:
            nonlocal turn
            turn += 1
            shutil.copy(versions[turn % 2], path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)

        def swap() -> None:
            replace()
            for times in (swaps, same):
                start = perf_counter()
                drafter.reopen()
                times.append(perf_counter() - start)

        replace()
        drafter = Drafter(datastore=path, live_bytes=0, soft_bytes=0)
        prompt = np.random.default_rng(0).integers(0, 50_000, size=(2000, 20))[7, :8].tolist()
        results = {
            "tokens": tokens,
            "alone": measure(drafter, prompt, lambda: sleep(0.01)),
            "replaced": measure(drafter, prompt, replace),
            "reopened": measure(drafter, prompt, swap),
            "reopen": percentiles(swaps),
            "reopen_without_news": percentiles(same),
            "swaps": len(swaps),
        }
    sys.stdout.write(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
