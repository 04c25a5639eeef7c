"""Many requests through one drafter: memory, drift, and every draft checked.

Usage: soak.py TRACE.jsonl ... [--requests 100000] [--json FILE]

64 requests run at a time, drawn at random from the traces (token ids; long prompts and responses are cut).
Each step is one `Drafter.step` call with a shared budget of nodes. On the way requests are forked, truncated
and aborted at random, live in one of a few namespaces, finish and teach the next ones their weights, and
namespaces are removed. A limit on memory turns some requests and forks away.

Every draft is compared with that of a fresh single-threaded drafter to which the same history was given in
single calls, started with the weights that the request started with. Sources are private (no live store).
Where the shared budget cuts a tree, the single call asks for the size that came of it.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sssd import DraftBatch, Drafter, DraftTree, Sequence, _core
from sssd.errors import BatchError, MemoryLimitError
from sssd.replay import Request, count_accepted, read_trace

BATCH = 64
MAX_NODES = 16
TOTAL_NODES = 600
PROMPT, RESPONSE = 1000, 64
MAX_BYTES = 12 << 20
NAMES = ["", "a", "b", "c"]


@dataclass
class Row:
    """A running request: its sequence, its twin, and what is still to come."""

    sequence: Sequence
    twin: Sequence
    rest: np.ndarray
    """Tokens of the response that have not been appended."""
    produced: np.ndarray
    """What the next step appends."""
    drafted: int = 0


def begin(drafter: Drafter, request: Request, name: str) -> Row:
    prompt, response = request.prompt_ids[-PROMPT:], request.response_ids[:RESPONSE]
    sequence = drafter.begin(prompt, namespace=name)
    alone = Drafter(live_bytes=0, soft_bytes=0, threads=1)
    alone.load_state_dict(sequence.state_dict())
    return Row(sequence, alone.begin(prompt), response[1:], response[:1])


def check(row: Row, tree: DraftTree) -> None:
    """Drafts with the twin what the batch drafted, or fails."""
    expected = row.twin.draft(MAX_NODES)
    if len(expected) > len(tree):
        expected = row.twin.draft(len(tree))
    for name in ("token_ids", "parents", "depths", "probs"):
        if not np.array_equal(getattr(expected, name), getattr(tree, name)):
            raise SystemExit(
                f"a draft differs from the twin's in {name}: {tree.render()}\n{expected.render()}"
            )


def disturb(row: Row, chance: random.Random) -> None:
    """Forks or truncates now and then, the twin as well."""
    if chance.random() < 0.02:
        old, old_twin = row.sequence, row.twin
        with contextlib.suppress(MemoryLimitError):
            row.sequence = old.fork()
            row.twin = old_twin.fork()
            old.close()
            old_twin.close()
    if chance.random() < 0.02:
        length = len(row.sequence)
        taken = chance.randint(0, min(20, length))
        again = row.sequence.token_ids[length - taken :]
        for sequence in (row.sequence, row.twin):
            sequence.truncate(length - taken)
            sequence.extend(again)


def main() -> None:
    if _core.build_profile != "release":
        raise SystemExit("this is a debug build; run `maturin develop --release`")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path, help="JSON Lines files with token ids")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    chance = random.Random(0)
    traces = [list(read_trace(path)) for path in arguments.traces]
    drafter = Drafter(live_bytes=0, soft_bytes=0, max_bytes=MAX_BYTES, threads=2)
    out = DraftBatch(BATCH, BATCH * MAX_NODES)
    rows: list[Row] = []
    begun = ended = aborted = turned_away = drafts = nodes = peak_rss = 0
    cpu: list[float] = []
    start = time.monotonic()
    while ended + aborted < arguments.requests:
        while len(rows) < BATCH and begun < arguments.requests:
            try:
                rows.append(begin(drafter, chance.choice(chance.choice(traces)), chance.choice(NAMES)))
            except MemoryLimitError:
                turned_away += 1
                break
            begun += 1
        offsets = np.append(0, np.cumsum([len(row.produced) for row in rows]))
        tokens = np.concatenate([row.produced for row in rows])
        sequences = [row.sequence for row in rows]
        before = time.process_time()
        full: set[int] = set()
        try:
            drafter.step(sequences, tokens, offsets, MAX_NODES, total_nodes=TOTAL_NODES, out=out)
        except BatchError as failed:
            full = set(failed.failures)
            if not all(isinstance(failure, MemoryLimitError) for failure in failed.failures.values()):
                raise
        cpu.append((time.process_time() - before) / len(rows))
        running = []
        for index, (row, tree) in enumerate(zip(rows, out, strict=True)):
            if index in full:
                row.sequence.close()
                row.twin.close()
                turned_away, aborted = turned_away + 1, aborted + 1
                continue
            row.twin.extend(row.produced)
            check(row, tree)
            drafts, nodes = drafts + 1, nodes + len(tree)
            accepted = count_accepted(tree, row.rest)
            row.produced, row.rest = row.rest[: accepted + 1], row.rest[accepted + 1 :]
            if chance.random() < 0.002:
                row.sequence.close()
                aborted += 1
            elif len(row.produced) == 0:
                row.sequence.finish()
                ended += 1
            else:
                disturb(row, chance)
                running.append(row)
                continue
            row.twin.close()
        rows = running
        if chance.random() < 0.001:
            drafter.remove_namespace(chance.choice(NAMES))
        peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if len(cpu) % 5000 == 0:
            print(f"{ended + aborted} requests, {drafts} drafts, {drafter.memory}", flush=True)
    memory, tenth = drafter.memory, max(len(cpu) // 10, 1)
    first, last = np.median(cpu[:tenth]), np.median(cpu[-tenth:])
    figures = {
        "requests": begun,
        "finished": ended,
        "aborted": aborted,
        "turned_away_for_memory": turned_away,
        "steps": len(cpu),
        "drafts_equal_to_the_twins": drafts,
        "nodes_per_draft": nodes / drafts,
        "memory_limit": memory["limit"],
        "memory_peak": memory["peak"],
        "memory_left_over": memory["used"] - memory["shared"],
        "peak_rss_mib": peak_rss / 1024,
        "cpu_us_per_sequence_first_tenth": first * 1e6,
        "cpu_us_per_sequence_last_tenth": last * 1e6,
        "last_to_first": last / first,
        "seconds": time.monotonic() - start,
        "cores": os.cpu_count(),
    }
    for name, value in figures.items():
        print(f"{name:32} {value:.3f}" if isinstance(value, float) else f"{name:32} {value}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=1)
    if begun != ended + aborted or memory["used"] != memory["shared"] or memory["peak"] > memory["limit"]:
        raise SystemExit("requests or memory were lost")


if __name__ == "__main__":
    main()
