"""Texts with something to predict: words said again and again with strangers between; a datastore of them."""

import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sssd import DatastoreBuilder

VOCABULARY = 500
_rng = random.Random(0)
WORDS = [[_rng.randrange(VOCABULARY) for _ in range(_rng.randrange(3, 20))] for _ in range(300)]


def text(rng: random.Random, length: int) -> list[int]:
    """Words, a few of them often, and now and then a token from anywhere."""
    out: list[int] = []
    while len(out) < length:
        common = min(int(rng.expovariate(0.02)), len(WORDS) - 1)
        out += WORDS[common] if rng.random() < 0.9 else [rng.randrange(VOCABULARY)]
    return out[:length]


def documents(count: int = 50, length: int = 400) -> list[list[int]]:
    """The documents of ``store``."""
    rng = random.Random(1)
    return [text(rng, length) for _ in range(count)]


def store(path: Path, texts: Sequence[Sequence[int]] | None = None, *, ranking: bool | None = None) -> Path:
    """A datastore of ``texts``, by default of ``documents()``; with tables for ranking if asked for."""
    with DatastoreBuilder(path, vocab_size=VOCABULARY, ranking=ranking) as builder:
        for ids in documents() if texts is None else texts:
            builder.add(ids)
    return path


def distribution(rng: random.Random, token: int) -> tuple[list[int], list[float]]:
    """What a target may hold probable that says ``token``: ids [8] and their probabilities [8]."""
    ids = [token, *rng.sample(range(VOCABULARY), 7)]
    weights = sorted((rng.random() ** 3 + 0.01 for _ in ids), reverse=True)
    total = sum(weights) * (1 + 0.3 * rng.random())
    return ids, [weight / total for weight in weights]


def ticks_during(act: Callable[[], object]) -> int:
    """How often another thread runs while this one is in a call. It runs only when this one lets it."""
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.wait(1e-4):
            ticks[0] += 1

    ticker = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    ticker.start()
    try:
        while ticks[0] == 0:
            time.sleep(1e-3)
        sys.setswitchinterval(1000)
        before = ticks[0]
        act()
        after = ticks[0]
    finally:
        sys.setswitchinterval(interval)
        done.set()
        ticker.join()
    return after - before
