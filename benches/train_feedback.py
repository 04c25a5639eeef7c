"""Learns what the weights know of feedback beside a datastore; all else stays as it is, word by word.

Usage: train_feedback.py TRACES_FOLDER OUT [ORDERS]

TRACES_FOLDER holds smollm2-topk.jsonl.xz, requests with the target's most probable tokens, and datastore/,
of whose texts in STORE every third goes into a datastore of the same tokens (4.0 million). The requests are
replayed in random order, as recorded and as if the target sampled: with all of the datastore, with parts of
it, and in drafters that they share. Of what each has learned are handed on the refinements of tokens where
feedback and a datastore speak, so that no other draft changes; all in the first half of a run, little in the
second. The mean of the last quarter over several orders is taken. Learning starts from the build's weights.
"""

import json
import lzma
import random
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from train_weights import HEADER, MAX_NODES, MOST_COUNT, PRIVATE, SHARE

from sssd import Datastore, DatastoreBuilder, Drafter
from sssd.hf.smollm2 import folder
from sssd.replay import Replay, Request, Sampling, read_trace

END = 2
STORE = ("chat-multi.wildbench", "chat-en.arena-hard", "stem.mmlu-pro", "stem.dynamic-cheatsheet")
REPEATS = 4
SETTLING = 2
# every n-th document
PARTS = (1, 4, 20)
# rows of refinements where only text speaks, then by live, aligned, feedback, request, datastore (support.rs)
TEXTS, OTHERS = 216, (3, 4, 7, 4, 4)


class Tables:
    """Weights as arrays."""

    def __init__(self) -> None:
        ((self.name, self.start),) = Drafter().state_dict().items()
        shapes = HEADER.unpack_from(self.start)[2:]
        self.at = HEADER.size + 4 * (int(np.prod(shapes[:4])) + TEXTS * shapes[5])
        assert shapes[4] == TEXTS + np.prod(OTHERS)
        self.rows = self.read(self.start)
        """Of the refinements where feedback and a datastore speak, value and count, float64 [..., 2]."""

    def read(self, state: bytes) -> np.ndarray:
        steps = HEADER.unpack_from(state)[7]
        rows = np.frombuffer(state, "<u2", 2 * int(np.prod(OTHERS)) * steps, self.at)
        return rows.reshape(*OTHERS, steps, 2)[:, :, 1:, :, 1:].astype(float)

    def state(self) -> dict[str, bytes]:
        out = np.frombuffer(self.start, np.uint8).copy()
        rows = out[self.at :].view("<u2")[: 2 * int(np.prod(OTHERS)) * self.rows.shape[-2]]
        rows.reshape(*OTHERS, -1, 2)[:, :, 1:, :, 1:] = self.rows.round()
        return {self.name: out.tobytes()}

    def follow(self, state: bytes, share: float) -> None:
        """Moves a share of the way to what a request has learned."""
        rows = self.read(state)
        self.rows[..., 0] += share * (rows - self.rows)[..., 0]
        # as low as in the shipped weights, so that requests learn as fast as later
        self.rows[..., 1] = np.minimum(rows[..., 1], MOST_COUNT)


def tokenized(texts: Path) -> np.ndarray:
    """Tokens of every third text, each closed by the end token, uint32 [n]."""
    tokenizer = Tokenizer.from_file(str(Path(folder()) / "tokenizer.json"))
    out = []
    for name in STORE:
        with lzma.open(texts / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
            held = [json.loads(line)["text"] for number, line in enumerate(lines) if number % 3 == 0]
        for start in range(0, len(held), 200):
            encoded = tokenizer.encode_batch(held[start : start + 200], add_special_tokens=False)
            out += [np.array([*text.ids, END], np.uint32) for text in encoded]
    return np.concatenate(out)


def parts(tokens: np.ndarray, where: Path) -> list[Datastore]:
    """Datastores of every n-th document, the whole first."""
    documents = np.split(tokens, np.flatnonzero(tokens == END) + 1)
    stores = []
    for part in PARTS:
        path = where / f"{part}.sssd"
        with DatastoreBuilder(path, vocab_size=int(tokens.max()) + 1) as builder:
            builder.add_stream(np.concatenate(documents[::part]), end_token_id=END)
        stores.append(Datastore.open(path, load="mmap-wait"))
    return stores


def settings(
    requests: list[Request], stores: list[Datastore], rng: random.Random
) -> list[tuple[Request, Replay, Callable[[], Drafter]]]:
    """Requests in random order, each with how it is replayed and what makes its drafter."""
    order: list[tuple[Request, Replay, Callable[[], Drafter]]] = []
    for seed in range(REPEATS):
        # no drafter sees a request twice: what it taught would help with itself
        shared = [Drafter(end_token_ids=[END], datastore=store) for store in stores]
        for request in requests:
            for store in (stores[0], rng.choice(stores[1:])):
                alone = partial(Drafter, end_token_ids=[END], datastore=store, **PRIVATE)
                order.append((request, replay(seed, rng), alone))
            order.append((request, replay(seed, rng), among(rng.choice(shared))))
    rng.shuffle(order)
    return order


def among(drafter: Drafter) -> Callable[[], Drafter]:
    return lambda: drafter


def replay(seed: int, rng: random.Random) -> Replay:
    """As recorded, or one time in three as if the target sampled."""
    return Replay(MAX_NODES, Sampling(seed=seed) if rng.random() < 1 / 3 else None)


def learned(order: list[tuple[Request, Replay, Callable[[], Drafter]]]) -> np.ndarray:
    """The rows from one run."""
    tables, mean, last = Tables(), 0.0, len(order) - len(order) * 3 // 4
    for index, (request, replay, make) in enumerate(order):
        drafter = make()
        drafter.load_state_dict(tables.state())
        with drafter.begin(request.prompt_ids) as sequence:
            replay.follow(sequence, request)
            (state,) = sequence.state_dict().values()
        tables.follow(state, 1.0 if index < len(order) // 2 else SHARE)
        if index >= len(order) - last:
            mean = mean + tables.rows / last
    return np.asarray(mean)


def settle(tables: Tables, requests: list[Request], store: Datastore) -> None:
    """Shifts the odds of refined probabilities towards a sum that is right.

    Nodes are drafted because they look probable, so those drafted look better than they are.
    """
    for _ in range(SETTLING):
        replays = Replay(MAX_NODES), Replay(MAX_NODES, Sampling())
        for request in requests:
            for replay in replays:
                drafter = Drafter(end_token_ids=[END], datastore=store, **PRIVATE)
                drafter.load_state_dict(tables.state())
                replay.run(drafter, request)
        factor = sum(replay.accepted for replay in replays) / sum(replay.expected for replay in replays)
        print(f"expected / accepted {1 / factor:.3f}", flush=True)
        values = tables.rows[..., 0]
        odds = values / (65536 - values) * factor
        tables.rows[..., 0] = np.minimum(65536 * odds / (1 + odds), 65535)


def learn(requests: list[Request], tokens: np.ndarray, orders: int) -> bytes:
    """The weights after learning from these requests."""
    rng, tables = random.Random(3), Tables()
    with tempfile.TemporaryDirectory() as made:
        stores = parts(tokens, Path(made))
        runs = []
        for _ in range(orders):
            runs.append(learned(settings(requests, stores, rng)))
            print(f"{len(runs)} of {orders} orders", flush=True)
        tables.rows = np.mean(runs, axis=0)
        settle(tables, requests, stores[0])
    return tables.state()[tables.name]


def main(traces: str, out: str, orders: str = "2") -> None:
    requests = list(read_trace(Path(traces) / "smollm2-topk.jsonl.xz"))
    Path(out).write_bytes(learn(requests, tokenized(Path(traces) / "datastore"), int(orders)))


if __name__ == "__main__":
    main(*sys.argv[1:])
