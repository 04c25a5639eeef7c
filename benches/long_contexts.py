"""Long contexts by replay: what a history of 32k to 128k tokens does to the drafts of a turn.

Usage: long_contexts.py TRACE.jsonl ... [--datastore STORE] [--contexts 32768,65536,131072]
       [--budgets 16,32,64] [--requests 60] [--json FILE]

The requests of the traces are joined into one stream of turns, in which each trace is as far along as the
others. A turn is then replayed alone, and with so much of the stream before it that its prompt and what
precedes it have the tokens of each context. Every replay has a drafter of its own and shares nothing.

Of a request all contexts are replayed one after the other, in an order that rotates from request to request,
so that their times are of the same minutes: what is told of times is the ratio of medians.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd import Datastore
from sssd.cli.replay import fresh_drafter
from sssd.replay import Replay, Request, read_trace, trace_name


@dataclass
class Stream:
    """Turns one after another: trace, request and where its prompt ends in ``tokens``, int32 [n]."""

    tokens: NDArray[np.int32]
    turns: list[tuple[str, Request, int]]

    def prompt(self, turn: int, length: int) -> NDArray[np.int32]:
        """The ``length`` tokens before a turn's response, its own prompt last; the stream is a circle."""
        _, request, end = self.turns[turn]
        length = max(length, len(request.prompt_ids))
        return np.take(self.tokens, np.arange(end - length, end), mode="wrap")


def joined(traces: dict[str, list[Request]]) -> Stream:
    """The turns of all traces, each trace in its order."""
    queues = {name: list(reversed(requests)) for name, requests in traces.items()}
    sizes = {name: sum(map(_length, requests)) for name, requests in traces.items()}
    done = dict.fromkeys(queues, 0)
    parts: list[NDArray[np.int32]] = []
    turns, end = [], 0
    while left := [name for name, queue in queues.items() if queue]:
        name = min(left, key=lambda name: done[name] / sizes[name])
        request = queues[name].pop()
        parts += [request.prompt_ids, request.response_ids]
        turns.append((name, request, end + len(request.prompt_ids)))
        end += _length(request)
        done[name] += _length(request)
    return Stream(np.concatenate(parts).astype(np.int32), turns)


def _length(request: Request) -> int:
    return len(request.prompt_ids) + len(request.response_ids)


def chosen(stream: Stream, most: int) -> list[int]:
    """Of each trace at most so many turns, evenly spread."""
    places = defaultdict(list)
    for turn, (name, _, _) in enumerate(stream.turns):
        places[name].append(turn)
    found = [
        turns[i]
        for turns in places.values()
        for i in np.linspace(0, len(turns) - 1, min(most, len(turns)), dtype=int)
    ]
    return sorted(found)


@dataclass
class Figures:
    """Of one trace at one context and number of nodes."""

    replay: Replay
    prompt_tokens: int = 0
    begin_ns: int = 0
    sequence_bytes: int = 0


def measure(
    stream: Stream, turns: list[int], contexts: list[int], budgets: list[int], store: Datastore | None
) -> Any:
    """Figures by trace, nodes and context; context 0 is the turn alone."""
    found: dict[tuple[str, int, int], Figures] = {}
    for count, turn in enumerate(turns):
        name, request, _ = stream.turns[turn]
        turned = count % len(contexts)
        for nodes in budgets:
            for context in contexts[turned:] + contexts[:turned]:
                figures = found.setdefault((name, nodes, context), Figures(Replay(nodes)))
                prompt = stream.prompt(turn, context)
                start = perf_counter_ns()
                with fresh_drafter(None, store).begin(prompt) as sequence:
                    figures.begin_ns += perf_counter_ns() - start
                    figures.replay.follow(sequence, request)
                    figures.sequence_bytes = max(figures.sequence_bytes, sequence.memory_bytes)
                figures.prompt_tokens += len(prompt)
        if count % 20 == 19:
            print(f"{count + 1} of {len(turns)} turns", file=sys.stderr, flush=True)
    return found


def rows_of(found: dict[tuple[str, int, int], Figures], store: bool) -> list[dict[str, Any]]:
    """The figures beside those of the same turns alone."""
    rows = []
    for (name, nodes, context), figures in sorted(found.items()):
        alone, replay = found[name, nodes, 0].replay, figures.replay
        accepted, before = (one.accepted / max(one.steps, 1) for one in (replay, alone))
        p50, p50_before = (float(np.median(one.draft_ns)) / 1e3 for one in (replay, alone))
        p99, p99_before = (float(np.percentile(one.draft_ns, 99)) / 1e3 for one in (replay, alone))
        rows.append(
            {
                "trace": name,
                "datastore": store,
                "nodes": nodes,
                "context": context,
                "turns": replay.requests,
                "accepted_per_step": accepted,
                "over_alone": accepted / before,
                "expected_over_accepted": replay.expected / max(replay.accepted, 1),
                "draft_us_p50": p50,
                "p50_over_alone": p50 / p50_before,
                "draft_us_p99": p99,
                "p99_over_alone": p99 / p99_before,
                "append_over_alone": replay.append_ns / alone.append_ns * alone.tokens / replay.tokens,
                "begin_us_per_token": figures.begin_ns / 1e3 / figures.prompt_tokens,
                "sequence_bytes": figures.sequence_bytes,
            }
        )
    return rows


def table(figures: dict[str, Any]) -> str:
    """Accepted tokens per step alone, and at each context over that, with the ratio of median draft times."""
    rows = figures["rows"]
    contexts = sorted({row["context"] for row in rows} - {0})
    lines = ["| | nodes | alone | " + " | ".join(f"{context // 1024}k" for context in contexts) + " |"]
    lines.append("| --- " + "| --: " * (2 + len(contexts)) + "|")
    at = {(row["trace"], row["datastore"], row["nodes"], row["context"]): row for row in rows}
    for name, store, nodes in dict.fromkeys(key[:3] for key in at):
        cells = [
            f"{at[name, store, nodes, context]['over_alone'] - 1:+.1%}, "
            f"{at[name, store, nodes, context]['p50_over_alone']:.2f}x"
            for context in contexts
        ]
        alone = at[name, store, nodes, 0]["accepted_per_step"]
        shown = f"{name}, datastore" if store else name
        lines.append(f"| {shown} | {nodes} | {alone:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Replays without and with the datastore, and prints a row for each trace, context and budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("--datastore", type=Path, metavar="STORE", help="measure beside this as well")
    parser.add_argument("--contexts", default="32768,65536,131072", help="tokens (default: %(default)s)")
    parser.add_argument("--budgets", default="16,32,64", help="nodes (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=60, help="of each trace (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    contexts = [0, *map(int, arguments.contexts.split(","))]
    budgets = [int(nodes) for nodes in arguments.budgets.split(",")]
    stream = joined(
        {trace_name(path).removeprefix("dev."): list(read_trace(path)) for path in arguments.traces}
    )
    turns = chosen(stream, arguments.requests)
    if max(contexts) + max(len(turn[1].response_ids) for turn in stream.turns) > len(stream.tokens):
        parser.error(f"the stream has {len(stream.tokens):,} tokens: give more traces, or shorter contexts")
    print(
        f"{len(turns)} of {len(stream.turns)} turns in a stream of {len(stream.tokens):,} tokens", flush=True
    )
    rows = []
    for store in [
        None,
        *([Datastore.open(arguments.datastore, load="mmap-wait")] if arguments.datastore else []),
    ]:
        rows += rows_of(measure(stream, turns, contexts, budgets, store), store is not None)
    print(table({"rows": rows}))
    if arguments.json:
        git = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        about = {
            "command": shlex.join(["python", *sys.argv]),
            "commit": git.stdout.strip(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
        }
        short = [
            {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()} for row in rows
        ]
        lines = ",\n ".join(map(json.dumps, short))
        arguments.json.write_text(f'{json.dumps(about, indent=1)[:-2]},\n "rows": [\n {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
