"""One drafter, many threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sssd import Drafter
from sssd.errors import ClosedError

THREADS = 8


def decode(drafter, seed):
    """Trees of a request whose tokens depend on the seed alone."""
    tokens = np.random.default_rng(seed).integers(0, 12, 2000)
    trees = []
    with drafter.begin(tokens[:500]) as sequence:
        for start in range(500, 2000, 3):
            tree = sequence.draft(16)
            trees.append((tree.token_ids.tolist(), tree.probs.tolist()))
            sequence.extend(tokens[start : start + 3])
    return trees


def test_threads_do_not_see_each_other():
    drafter = Drafter()
    expected = [decode(drafter, seed) for seed in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(lambda seed: decode(drafter, seed), range(THREADS))) == expected


def test_begin_lets_other_threads_run():
    tokens = np.random.default_rng(0).integers(0, 50_000, 2_000_000)
    drafter, counted, done = Drafter(), [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    try:
        before = counted[0]
        drafter.begin(tokens)
        assert counted[0] > before + 1000
    finally:
        done.set()
        counter.join()


def test_closing_while_others_draft_is_an_error_not_a_crash():
    sequence = Drafter().begin(list(range(50)) * 20)
    barrier = threading.Barrier(THREADS + 1)

    def work():
        barrier.wait()
        try:
            while True:
                sequence.draft(32)
                sequence.extend([1, 2, 3])
        except ClosedError:
            return "closed"

    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(work) for _ in range(THREADS)]
        barrier.wait()
        sequence.close()
        assert [future.result(timeout=60) for future in futures] == ["closed"] * THREADS
