"""The whole API at random, by several threads, for minutes or hours: nothing wrong, lost or growing.

Usage: soak.py [TRACE.jsonl ...] [--minutes 30] [--threads 4] [--seed 0] [--json FILE]

Texts are stretches of the traces (token ids), or of made-up words. Two drafters are shared by all threads:

- `private` has a datastore and learns from nobody. Each request has a twin in a fresh single-threaded
  drafter, which gets the same in single calls, and every tree of either way must be equal. Prompts come in
  one piece, in two, in the background, with a predicted output or a greatest length; steps have a shared
  budget or none, by names (`sssd.requests`); requests are forked, truncated, prefilled, cut, finished and
  aborted.
- `learning` has a live store, the target's probabilities and namespaces that end. Its trees must be drafts.
  It is saved, loaded, frozen into datastores, its namespaces removed, and its requests closed by other
  threads. Live stores and weights that nobody adds to come through saving and loading.

Meanwhile datastores are built onto the path that others are opening, and limits on memory turn some requests
away. Resident memory is printed each minute. The run fails if a tree is wrong, a request, byte, file
descriptor or temporary file is left over, a thread stands still for three minutes, or, of three minutes or
more, the last third took more than 5 % more resident memory than the second.
"""

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import random
import tempfile
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sssd import Datastore, DatastoreBuilder, DraftBatch, Drafter, DraftTree, Sequence, _core
from sssd.errors import BatchError, ClosedError, InvalidArgumentError, MemoryLimitError
from sssd.replay import read_trace
from sssd.requests import Requests

PRIVATE_BYTES, LEARNING_BYTES = 64 << 20, 8 << 20
ROWS, HELD = 20, 10
"""Requests of a thread, of either drafter."""
STILL = 180
"""Seconds that a thread may stand still."""
GROWTH = 1.05
"""Resident memory of the last third, over that of the second; shorter runs still warm up."""
SETTLED = 180


class Texts:
    """Texts at random: pieces that come again and again, and single tokens."""

    def __init__(self, traces: list[Path]) -> None:
        rng = np.random.default_rng(0)
        if traces:
            requests = [request for path in traces for request in read_trace(path)]
            whole = [np.concatenate([one.prompt_ids, one.response_ids]).tolist() for one in requests]
            self.pieces = [text[at : at + 40] for text in whole for at in range(0, len(text), 40)]
        else:
            self.pieces = [rng.integers(0, 499, rng.integers(3, 20)).tolist() for _ in range(300)]
        largest = max(max(piece) for piece in self.pieces)
        self.end, self.vocab_size = largest + 1, largest + 2

    def take(self, chance: random.Random, count: int) -> list[int]:
        out: list[int] = []
        while len(out) < count:
            if chance.random() < 0.9:
                out += self.pieces[int(chance.expovariate(0.02)) % len(self.pieces)]
            else:
                out.append(chance.randrange(self.end))
        return out[:count]


@dataclass
class Row:
    """A request of the private drafter, and its twin."""

    sequence: Sequence
    twin: Sequence
    last: DraftTree | None = None

    def close(self) -> None:
        self.twin.close()


class World:
    """What the threads share."""

    def __init__(self, folder: Path, texts: Texts, seconds: float, threads: int) -> None:
        self.folder, self.texts = folder, texts
        self.path, self.state = folder / "store.sssd", folder / "state"
        self.build(random.Random(0))
        self.store = Datastore.open(self.path)
        self.kind: dict[str, Any] = {"vocab_size": texts.vocab_size, "end_token_ids": [texts.end]}
        self.private = Drafter(
            **self.kind, datastore=self.store, live_bytes=0, soft_bytes=0, threads=3, max_bytes=PRIVATE_BYTES
        )
        self.learning = Drafter(
            **self.kind,
            datastore=self.path,
            live_bytes=1 << 20,
            soft_bytes=1 << 18,
            threads=2,
            max_bytes=LEARNING_BYTES,
            namespace_ttl=0.5,
        )
        self.end = time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.lock = threading.Lock()
        self.workers = [Worker(self, number) for number in range(threads)]

    def count(self, name: str, more: int = 1) -> None:
        with self.lock:
            self.counts[name] += more

    def build(self, chance: random.Random) -> None:
        """Replaces the datastore."""
        builder = DatastoreBuilder(
            self.path, vocab_size=self.texts.vocab_size, deduplicate=chance.random() < 0.5
        )
        with builder:
            for _ in range(50):
                builder.add(self.texts.take(chance, 400))

    def twin_of(self, sequence: Sequence) -> Drafter:
        """A fresh drafter that knows what the sequence began with."""
        alone = Drafter(**self.kind, datastore=self.store, live_bytes=0, soft_bytes=0, threads=1)
        alone.load_state_dict(sequence.state_dict())
        return alone


def check_form(tree: DraftTree, most: int, end: int) -> None:
    probs, parents = tree.probs, tree.parents
    assert len(tree) <= most, "too many nodes"
    assert ((probs >= 0) & (probs <= 1)).all(), "no probabilities"
    assert (parents < np.arange(len(parents))).all(), "a parent after its child"
    assert (tree.token_ids <= end).all(), "an id outside the vocabulary"
    sums = np.bincount(parents + 1, weights=probs, minlength=len(probs) + 1)
    assert (sums <= np.append(1, probs) + 1e-4).all(), "siblings sum too high"
    assert not (tree.token_ids[parents[parents >= 0]] == end).any(), "something after an end token"


def check_equal(tree: DraftTree, expected: DraftTree) -> None:
    for name in ("token_ids", "parents", "depths", "probs"):
        if not np.array_equal(getattr(tree, name), getattr(expected, name)):
            raise AssertionError(f"not the twin's {name}:\n{tree.render()}\n{expected.render()}")


class Worker(threading.Thread):
    """A thread that does one thing after the other, drawn by weight."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(name=f"worker {number}")
        self.world, self.number = world, number
        self.chance = random.Random(number * 7919 + SEED)
        self.requests = Requests(world.private)
        self.rows: dict[str, Row] = {}
        self.held: list[Sequence] = []
        self.beats = self.serial = 0
        self.actions = {
            self.begin: 10,
            self.step: 25,
            self.draft: 15,
            self.truncate: 8,
            self.fork: 5,
            self.prefill: 2,
            self.end_one: 8,
            self.check_integrity: 3,
            self.begin_learning: 7,
            self.learn: 12,
            self.step_learning: 3,
            self.close_others: 1,
            self.look: 1,
            self.save: 0.5,
            self.load: 0.5,
            self.build: 0.2,
            self.open: 0.2,
            self.freeze: 0.2,
        }

    def run(self) -> None:
        actions, weights = list(self.actions), list(self.actions.values())
        try:
            while time.monotonic() < self.world.end and not self.world.problems:
                self.beats += 1
                act = self.chance.choices(actions, weights)[0]
                try:
                    act()
                    self.world.count(act.__name__)
                except MemoryLimitError:
                    self.world.count("turned away for memory")
                    self.make_room()
                except (ClosedError, BatchError) as failure:
                    # others close what this thread holds
                    failures = getattr(failure, "failures", {}).values()
                    if not all(isinstance(one, (ClosedError, MemoryLimitError)) for one in failures):
                        raise
                    self.held = [sequence for sequence in self.held if not sequence.closed]
            for name in list(self.rows):
                self.drop(name)
            for sequence in self.held:
                sequence.close()
        except BaseException as problem:
            traceback.print_exc()
            self.world.problems.append(f"{self.name}: {problem!r}")

    def text(self, *counts: int) -> list[int]:
        return self.world.texts.take(self.chance, self.chance.choice(counts))

    def one(self) -> tuple[str, Row]:
        return self.chance.choice(sorted(self.rows.items()))

    def drop(self, name: str) -> None:
        self.rows.pop(name).close()
        self.requests.abort(name)

    def make_room(self) -> None:
        if self.rows:
            self.drop(self.chance.choice(sorted(self.rows)))
        if self.held:
            self.held.pop().close()

    def begin(self) -> None:
        if len(self.rows) >= ROWS:
            return
        self.serial += 1
        name = f"{self.number}-{self.serial}"
        prompt = self.text(0, 1, 30, 300, 2000)
        way = self.chance.choice(("whole", "whole", "pieces", "background", "predicted", "bounded"))
        options: dict[str, Any] = {}
        if way == "predicted":
            options["prediction"] = self.text(50)
        if way == "bounded":
            options["max_length"] = len(prompt) + self.chance.randrange(80)
        first = prompt[: len(prompt) // 2] if way == "pieces" else prompt
        sequence = self.requests.begin(name, first, background=way == "background", **options)
        twin = self.world.twin_of(sequence).begin(prompt, **options)
        self.rows[name] = Row(sequence, twin)
        try:
            sequence.prefill(prompt[len(first) :])
        except BaseException:
            self.drop(name)
            raise

    def step(self) -> None:
        if not self.rows:
            return
        names = self.chance.sample(sorted(self.rows), self.chance.randint(1, len(self.rows)))
        tokens = [self.next_tokens(self.rows[name]) for name in names]
        nodes = self.chance.choice((1, 4, 16, 40))
        total = self.chance.choice((None, len(names), 3 * len(names)))
        out = self.chance.choice((None, DraftBatch(ROWS, ROWS * 40)))
        offsets = np.cumsum([0, *map(len, tokens)])
        flat = [token for some in tokens for token in some]
        try:
            batch = self.requests.step(names, flat, offsets, nodes, total_nodes=total, out=out)
        except BatchError as error:
            for index, failure in error.failures.items():
                if not isinstance(failure, MemoryLimitError):
                    raise
                self.drop(names[index])
            batch = error.batch
            self.world.count("rows turned away for memory", len(error.failures))
        for index, name in enumerate(names):
            if name in self.rows:
                row, tree = self.rows[name], batch[index]
                row.twin.extend(tokens[index])
                self.compare(row, tree, nodes)

    def next_tokens(self, row: Row) -> list[int]:
        """What the target has produced: often what was drafted."""
        if row.last is None or not len(row.last) or self.chance.random() < 0.4:
            return self.text(0, 1, 1, 2, 6)
        path, node = [], self.chance.randrange(len(row.last))
        while node >= 0:
            path.append(int(row.last.token_ids[node]))
            node = int(row.last.parents[node])
        return path[::-1] + self.text(1)

    def compare(self, row: Row, tree: DraftTree, nodes: int) -> None:
        check_form(tree, nodes, self.world.texts.end)
        expected = row.twin.draft(nodes)
        if len(expected) > len(tree):
            # as a shared budget cuts
            expected = row.twin.draft(len(tree))
        check_equal(tree, expected)
        row.last = tree
        self.world.count("drafts equal to the twins'")

    def draft(self) -> None:
        if not self.rows:
            return
        _, row = self.one()
        nodes = self.chance.choice((0, 1, 8, 32, 100))
        self.compare(row, row.sequence.draft(nodes), nodes)
        if self.chance.random() < 0.3:
            kept = self.chance.randint(0, nodes)
            row.sequence.cut_draft(kept)
            row.twin.cut_draft(kept)
        if self.chance.random() < 0.5:
            tokens = self.next_tokens(row)
            row.sequence.extend(tokens)
            row.twin.extend(tokens)
            row.last = None

    def truncate(self) -> None:
        if self.rows:
            _, row = self.one()
            length = len(row.sequence)
            length = self.chance.randint(max(0, length - 30), length)
            row.sequence.truncate(length)
            row.twin.truncate(length)
            row.last = None

    def fork(self) -> None:
        if self.rows and len(self.rows) < ROWS:
            name, row = self.one()
            self.serial += 1
            new = f"{self.number}-{self.serial}"
            self.rows[new] = Row(self.requests.fork(name, new), row.twin.fork())

    def prefill(self) -> None:
        if self.rows:
            _, row = self.one()
            tokens = self.text(5, 200)
            row.sequence.prefill(tokens)
            row.twin.prefill(tokens)
            row.last = None

    def end_one(self) -> None:
        if self.rows:
            name, row = self.one()
            if row.sequence.token_ids.tolist() != row.twin.token_ids.tolist():
                raise AssertionError("not the twin's tokens")
            if self.chance.random() < 0.5:
                self.drop(name)
            else:
                self.rows.pop(name).close()
                self.requests.finish(name)

    def check_integrity(self) -> None:
        for sequence in [row.sequence for row in self.rows.values()][:2] + self.held[:1]:
            sequence.check_integrity()

    def begin_learning(self) -> None:
        names = ("", "shared", f"own {self.number}", f"short {self.chance.randrange(40)}")
        prompt, background = self.text(5, 200, 1500), self.chance.random() < 0.3
        name = self.chance.choice(names)
        self.held.append(self.world.learning.begin(prompt, namespace=name, background=background))
        if len(self.held) > HELD:
            self.held.pop(self.chance.randrange(len(self.held))).finish()

    def learn(self) -> None:
        if not self.held:
            return
        sequence = self.chance.choice(self.held)
        tree = sequence.draft(24)
        check_form(tree, 24, self.world.texts.end)
        if self.chance.random() < 0.5:
            sequence.feedback(tree, *self.top_k(len(tree) + 1))
        tokens = self.text(3)
        sequence.extend(tokens, *(self.top_k(3) if self.chance.random() < 0.5 else ()))
        if self.chance.random() < 0.1:
            sequence.commit()

    def top_k(self, rows: int) -> tuple[Any, Any]:
        rng = np.random.default_rng(self.chance.getrandbits(32))
        return rng.integers(0, self.world.texts.end, (rows, 5)), rng.dirichlet(np.ones(6), rows)[:, :5]

    def step_learning(self) -> None:
        if not self.held:
            return
        count, rows = len(self.held), 17
        ids, probs = self.top_k(count * rows)
        batch = self.world.learning.step(
            self.held,
            self.text(count) if count else [],
            range(count + 1),
            16,
            total_nodes=self.chance.choice((None, 8 * count)),
            feedback_ids=ids.reshape(count, rows, 5),
            feedback_probs=probs.reshape(count, rows, 5),
        )
        for index in range(count):
            check_form(batch[index], 16, self.world.texts.end)

    def close_others(self) -> None:
        them = self.chance.choice(self.world.workers).held
        with contextlib.suppress(IndexError, ValueError):
            them[self.chance.randrange(len(them))].close()

    def look(self) -> None:
        world = self.world
        world.learning.remove_namespace(f"short {self.chance.randrange(40)}")
        for drafter in (world.private, world.learning):
            memory = drafter.memory
            assert memory["used"] <= memory["limit"], "beyond the limit"
            assert drafter.metrics["begun"] >= drafter.metrics["finished"]
            assert drafter.stats["drafts"] >= 0
            assert "" in drafter.namespaces()

    def save(self) -> None:
        self.world.learning.save(self.world.state)

    def load(self) -> None:
        if not (self.world.state / "drafter.sssd-state").exists():
            return
        with tempfile.TemporaryDirectory(dir=self.world.folder) as held:
            # what was saved while others learned may be more than there is room for
            before = Drafter.load(self.world.state)
            before.save(held)
            loaded = Drafter.load(held, datastore=self.world.store, threads=2)
        live = [
            {name: space["live_tokens"] for name, space in one.namespaces().items()}
            for one in (before, loaded)
        ]
        assert live[0] == live[1], "loaded and saved, a live store is another one"
        assert before.state_dict() == loaded.state_dict(), "loaded and saved, weights are others"
        with loaded.begin(self.text(100)) as sequence:
            check_form(sequence.draft(32), 32, self.world.texts.end)
            sequence.extend([1, 2])

    def build(self) -> None:
        self.world.build(self.chance)

    def open(self) -> None:
        with Datastore.open(self.world.path, load=self.chance.choice(("mmap", "ram"))) as store:
            store.verify()
            assert store.count(self.text(2)) >= 0
            store.continuations(self.text(1), max_tokens=5)

    def freeze(self) -> None:
        path = self.world.folder / f"frozen {self.number}.sssd"
        name = self.chance.choice([name for name in self.world.learning.namespaces() if "own" not in name])
        with DatastoreBuilder(path, vocab_size=self.world.texts.vocab_size) as builder:
            try:
                self.world.learning.freeze(builder, namespace=name)
            except InvalidArgumentError:
                # its time was up
                self.world.count("frozen too late")
        with Datastore.open(path) as store:
            store.verify()


def resident() -> float:
    """Resident memory of this process, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise SystemExit("needs /proc")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def watch(world: World, seconds: float) -> list[float]:
    """Samples of resident memory until all threads have ended."""
    start, samples, minute = time.monotonic(), [], 0
    beats, moved = [0] * len(world.workers), [start] * len(world.workers)
    while any(worker.is_alive() for worker in world.workers):
        time.sleep(min(2.0, seconds / 60))
        now = time.monotonic()
        # if Python itself stands still, this ends it
        faulthandler.dump_traceback_later(STILL, exit=True)
        if now < world.end:
            samples.append(resident())
        for index, worker in enumerate(world.workers):
            if worker.beats != beats[index] or not worker.is_alive():
                beats[index], moved[index] = worker.beats, now
            if now - moved[index] > STILL:
                faulthandler.dump_traceback()
                os._exit(1)
        if now - start >= 60 * (minute + 1):
            minute += 1
            drafts = world.counts["drafts equal to the twins'"]
            print(f"{minute:4} min {samples[-1]:8.1f} MiB resident, {drafts} drafts compared", flush=True)
    faulthandler.cancel_dump_traceback_later()
    return samples


def verdict(world: World, samples: list[float], before: int, seconds: float) -> dict[str, Any]:
    """The figures, with what is wrong."""
    gc.collect()
    drafters = {"private": world.private, "learning": world.learning}
    left = {name: one.memory["used"] - one.memory["shared"] for name, one in drafters.items()}
    running = {
        name: sum(space["sequences"] for space in one.namespaces().values()) for name, one in drafters.items()
    }
    temporary = [path.name for path in world.folder.rglob("*") if path.name.endswith(".tmp")]
    third = len(samples) // 3
    second, last = np.mean(samples[third : 2 * third]), np.mean(samples[2 * third :])
    problems = list(world.problems)
    problems += [f"{name}: {lost} bytes left over" for name, lost in left.items() if lost]
    problems += [f"{name}: {count} requests left over" for name, count in running.items() if count]
    problems += [f"beyond its limit: {name}" for name, one in drafters.items() if is_beyond(one)]
    problems += [f"temporary files: {temporary}"] if temporary else []
    problems += [f"{descriptors()} file descriptors, {before} before"] if descriptors() > before else []
    if seconds >= SETTLED and last > GROWTH * second:
        problems.append(
            f"resident memory grows: {second:.1f} MiB in the second third, {last:.1f} in the last"
        )
    return {
        "problems": problems,
        "threads": len(world.workers),
        "operations": sum(worker.beats for worker in world.workers),
        "counts": dict(sorted(world.counts.items())),
        "memory": {name: one.memory for name, one in drafters.items()},
        "resident_mib_second_third": round(float(second), 1),
        "resident_mib_last_third": round(float(last), 1),
        "resident_mib_peak": round(max(samples), 1),
        "file_descriptors": descriptors(),
        "cores": os.cpu_count(),
    }


def is_beyond(drafter: Drafter) -> bool:
    return drafter.memory["peak"] > drafter.memory["limit"]


def main() -> None:
    if _core.build_profile != "release":
        raise SystemExit("this is a debug build; run `maturin develop --release`")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path, help="JSON Lines files with token ids")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    global SEED
    SEED = arguments.seed
    with tempfile.TemporaryDirectory() as folder:
        seconds = 60 * arguments.minutes
        world = World(Path(folder), Texts(arguments.traces), seconds, arguments.threads)
        before = descriptors()
        for worker in world.workers:
            worker.start()
        samples = watch(world, seconds)
        figures = {
            "minutes": arguments.minutes,
            "seed": arguments.seed,
            **verdict(world, samples, before, seconds),
        }
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if figures["problems"]:
        raise SystemExit("; ".join(figures["problems"]))
    print("nothing wrong, nothing lost")


SEED = 0

if __name__ == "__main__":
    main()
