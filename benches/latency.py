"""Draft and append times, begin time and memory by context length.

Usage: latency.py [TOKENS.npy] [--json FILE]

Tokens come from a .npy array of ids (a datastore corpus, say), or are Zipf-distributed random ids: few long
matches and many short ones. Times are of 2,000 steps of one token each, 32 nodes, one thread.
"""

import argparse
import json
from time import perf_counter_ns

import numpy as np

from sssd import Drafter, _core

CONTEXTS = (1024, 4096, 16384, 131072)
STEPS = 2000
NODES = 32


def measure(tokens: np.ndarray, context: int) -> dict[str, float]:
    begin = []
    for _ in range(5):
        start = perf_counter_ns()
        sequence = Drafter().begin(tokens[:context])
        begin.append(perf_counter_ns() - start)
    bytes_per_token = sequence.memory_bytes / context
    draft, extend = [], []
    for token in tokens[context : context + STEPS]:
        start = perf_counter_ns()
        sequence.draft(NODES)
        drafted = perf_counter_ns()
        sequence.extend([int(token)])
        draft.append(drafted - start)
        extend.append(perf_counter_ns() - drafted)
    return {
        "context": context,
        "begin_ms": np.median(begin) / 1e6,
        "bytes_per_token": bytes_per_token,
        "draft_us_p50": np.percentile(draft, 50) / 1e3,
        "draft_us_p99": np.percentile(draft, 99) / 1e3,
        "extend_us_p50": np.percentile(extend, 50) / 1e3,
    }


def main() -> None:
    if _core.build_profile != "release":
        raise SystemExit("this is a debug build; run `maturin develop --release`")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", nargs="?", help=".npy array of token ids")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    count = max(CONTEXTS) + STEPS
    if arguments.tokens:
        tokens = np.array(np.load(arguments.tokens, mmap_mode="r")[:count])
    else:
        tokens = np.random.default_rng(0).zipf(1.2, count) % 50_000
    rows = [measure(tokens, context) for context in CONTEXTS]
    for row in rows:
        print("  ".join(f"{name} {value:.2f}" for name, value in row.items()))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"command": "python benches/latency.py", "results": rows}, file, indent=1)


if __name__ == "__main__":
    main()
