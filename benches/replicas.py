"""What replicas gain by sharing finished requests, and how soon.

Usage: replicas.py TRACE... [--replicas 1,2,4] [--max-nodes 16] [--json FILE]
       replicas.py --latency redis|folder [--json FILE]

TRACE are JSON Lines files of token ids, as `python -m sssd replay` reads them. Requests are dealt to the
replicas in turn, in file order, and replayed without a datastore. `alone`: each replica learns from its own
requests only; `shared`: from those of all, through records and the learning of `sssd.sharing`. As replicas
work at the same time, a request sees of the others' only what was finished before the last n - 1 of all
requests began. One replica is one drafter that sees all; `per_step` is accepted tokens a step, `of_one` its
share of that drafter's.

--latency makes two replicas over a Redis server of its own, or a folder, and measures 200 times how long it
takes from `Replica.finish` of 1,000 tokens in one until the other drafts them; then `finish` and drafts
while a third one, which starts anew, catches up with a log of 2,000 requests of 8,192 tokens in the same
process.
"""

import argparse
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from sssd import Drafter, _core
from sssd.replay import Replay, Request, read_trace, trace_name
from sssd.sharing import FolderLog, Log, Replica
from sssd.sharing.exchange import Exchange, Limits

TRIALS = 200
TOKENS = 1000
BACKLOG, LONG = 2000, 8192
VOCABULARY = 100_000


class Between:
    """A log in this process, of which readers see as much as they are let."""

    def __init__(self, records: list[bytes]) -> None:
        self.records, self.place, self.seen = records, 0, 0

    def publish(self, record: bytes) -> None:
        self.records.append(record)

    def poll(self) -> Iterator[bytes]:
        while self.place < min(self.seen, len(self.records)):
            self.place += 1
            yield self.records[self.place - 1]

    def close(self) -> None:
        pass


def replay(requests: list[Request], replicas: int, max_nodes: int, shared: bool) -> Replay:
    """Replays requests on replicas in turn."""
    records: list[bytes] = []
    limits = Limits(8192, 1 << 30, 1.0, 1e15, 1e-9)
    logs = [Between(records) for _ in range(replicas)]
    drafters = [Drafter() for _ in range(replicas)]
    exchanges = [
        Exchange(drafter, log, {""}, None, None, limits) for drafter, log in zip(drafters, logs, strict=True)
    ]
    result = Replay(max_nodes)
    for number, request in enumerate(requests):
        place = number % replicas
        logs[place].seen = max(number - (replicas - 1), 0)
        if shared:
            exchanges[place].turn()
        sequence = drafters[place].begin(request.prompt_ids, request.prediction_ids)
        result.follow(sequence, request)
        if shared:
            exchanges[place].put("", sequence.token_ids)
            exchanges[place].turn()
        sequence.finish()
    for exchange in exchanges:
        assert not exchange.metrics["errors"]
    return result


def shares(paths: list[Path], counts: list[int], max_nodes: int) -> list[dict[str, Any]]:
    """A row for each trace, number of replicas, and way."""
    rows = []
    for path in paths:
        requests = list(read_trace(path))
        one = None
        for replicas in counts:
            for shared in (False, True) if replicas > 1 else (False,):
                result = replay(requests, replicas, max_nodes, shared)
                per_step = result.accepted / result.steps
                one = per_step if one is None else one
                rows.append(
                    {
                        "trace": trace_name(path),
                        "requests": len(requests),
                        "replicas": replicas,
                        "how": "one" if replicas == 1 else "shared" if shared else "alone",
                        "per_step": round(per_step, 4),
                        "of_one": round(per_step / one, 4),
                    }
                )
                print(rows[-1], flush=True)
    return rows


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """A server on this machine; gives its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        time.sleep(1)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def log(kind: str, where: str, name: str) -> Log:
    """A log of a kind."""
    if kind == "folder":
        return FolderLog(Path(where) / name, keep_bytes=1 << 30)
    from sssd.sharing.redis import RedisLog

    return RedisLog(where, name)


def text(rng: np.random.Generator, tokens: int = TOKENS) -> Any:
    """Tokens that were never there."""
    return rng.integers(0, VOCABULARY, tokens)


def latencies(kind: str, where: str) -> dict[str, Any]:
    """How soon the other drafts it; what `finish` and drafts take meanwhile."""
    rng = np.random.default_rng(0)
    drafters = [Drafter(vocab_size=VOCABULARY) for _ in range(2)]
    one, two = (Replica(drafter, log(kind, where, "a"), namespaces={""}) for drafter in drafters)
    seconds, finishes, plain = [], [], []
    for _ in range(TRIALS):
        ids = text(rng)
        sequence = drafters[0].begin(ids)
        start = perf_counter()
        one.finish(sequence)
        finishes.append(perf_counter() - start)
        while len(drafters[1].begin(ids[:100]).draft(8)) == 0:
            time.sleep(0.001)
        seconds.append(perf_counter() - start)
        time.sleep(rng.random() * 0.1)
        sequence = drafters[0].begin(text(rng))
        start = perf_counter()
        sequence.finish()
        plain.append(perf_counter() - start)
    one.close()
    two.close()
    return {
        "log": kind,
        "seconds_to_the_other": percentiles(seconds, 1.0),
        "finish_us": percentiles(finishes, 1e6),
        "finish_us_of_sequence": percentiles(plain, 1e6),
        **catching_up(kind, where, rng),
    }


def catching_up(kind: str, where: str, rng: np.random.Generator) -> dict[str, Any]:
    """Drafts before and while a replica learns as fast as it may."""
    writer = Replica(
        Drafter(vocab_size=VOCABULARY), log(kind, where, "b"), namespaces={""}, queue_bytes=1 << 30
    )
    for _ in range(BACKLOG):
        writer.share(text(rng, LONG))
    writer.close(timeout=600)
    drafter = Drafter(vocab_size=VOCABULARY)
    sequence = drafter.begin(rng.zipf(1.2, 4096) % 5000)
    calm = drafts(sequence, 3.0)
    late = Replica(drafter, log(kind, where, "b"), namespaces={""})
    start = perf_counter()
    busy = drafts(sequence, 20.0)
    learned = late.metrics["learned_tokens"]
    took = perf_counter() - start
    late.close()
    return {
        "draft_us_calm": calm,
        "draft_us_catching_up": busy,
        "learned_tokens_per_second": round(learned / took),
    }


def drafts(sequence: Any, seconds: float) -> dict[str, float]:
    """Times of drafts, a millisecond apart, us."""
    times = []
    end = perf_counter() + seconds
    while perf_counter() < end:
        start = perf_counter()
        sequence.draft(16)
        times.append(perf_counter() - start)
        time.sleep(0.001)
    return percentiles(times, 1e6)


def percentiles(values: list[float], unit: float) -> dict[str, float]:
    """Of some times."""
    names = {"p50": 50, "p99": 99, "max": 100}
    return {name: round(float(np.percentile(values, at)) * unit, 4) for name, at in names.items()}


def main() -> None:
    if _core.build_profile != "release":
        raise SystemExit("this is a debug build; run `maturin develop --release`")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--replicas", default="1,2,4")
    parser.add_argument("--max-nodes", type=int, default=16)
    parser.add_argument("--latency", choices=["redis", "folder"])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    rows = shares(
        arguments.traces, [int(count) for count in arguments.replicas.split(",")], arguments.max_nodes
    )
    if arguments.latency == "redis":
        with redis_server(folder) as url:
            rows.append(latencies("redis", url))
    elif arguments.latency:
        rows.append(latencies("folder", str(folder)))
    shutil.rmtree(folder)
    if arguments.json:
        arguments.json.write_text(json.dumps({"results": rows}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows[-1], indent=1))


if __name__ == "__main__":
    main()
