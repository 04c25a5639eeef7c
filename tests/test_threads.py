"""One drafter, many threads."""

import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from world import ticks_during

from sssd import Drafter
from sssd.errors import ClosedError

THREADS = 8


def decode(drafter, seed):
    """Trees of a request whose tokens depend on the seed alone."""
    tokens = np.random.default_rng(seed).integers(0, 12, 2000)
    trees = []
    sequence = drafter.begin(tokens[:500])
    for start in range(500, 2000, 3):
        tree = sequence.draft(16)
        trees.append((tree.token_ids.tolist(), tree.probs.tolist()))
        sequence.extend(tokens[start : start + 3])
    # closed, not finished: nobody learns from it
    sequence.close()
    return trees


def test_threads_do_not_see_each_other():
    drafter = Drafter()
    expected = [decode(drafter, seed) for seed in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(lambda seed: decode(drafter, seed), range(THREADS))) == expected


def test_begin_lets_other_threads_run():
    tokens, drafter = np.random.default_rng(0).integers(0, 50_000, 2_000_000), Drafter()
    assert ticks_during(lambda: drafter.begin(tokens)) > 0


def test_a_draft_that_waits_lets_other_threads_run():
    """It waits for a prompt that another thread is indexing."""
    sequence, counted, done = Drafter().begin([1, 2, 1]), [0], threading.Event()

    def count():
        while not done.wait(1e-4):
            counted[0] += 1

    tokens = np.random.default_rng(0).integers(0, 50_000, 2_000_000)
    prefill = threading.Thread(target=sequence.prefill, args=(tokens,))
    counter = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    counter.start()
    try:
        prefill.start()
        time.sleep(0.1)
        # from here on a thread runs only when this one gives the lock away
        sys.setswitchinterval(1000)
        before = counted[0]
        sequence.draft()
        after = counted[0]
    finally:
        sys.setswitchinterval(interval)
        done.set()
        counter.join()
        prefill.join()
    assert after > before + 10


def test_threads_take_turns_on_one_sequence():
    ids = [1, 2, 3, 1, 2, 4, 1, 2]
    sequence, barrier = Drafter().begin(ids), threading.Barrier(THREADS)
    expected = Drafter().begin(ids).draft(16).probs.tolist()

    def draft():
        barrier.wait()
        return [sequence.draft(16).probs.tolist() for _ in range(200)]

    def extend(token):
        barrier.wait()
        for _ in range(200):
            sequence.extend([token] * 3)

    with ThreadPoolExecutor(THREADS) as pool:
        drafts = [pool.submit(draft) for _ in range(THREADS)]
        assert all(draft.result() == [expected] * 200 for draft in drafts)
        list(pool.map(extend, range(THREADS)))
    # extensions are whole: the tokens of one call stay together
    added = sequence.token_ids[len(ids) :].reshape(-1, 3)
    assert (added == added[:, :1]).all()
    assert np.bincount(added[:, 0]).tolist() == [200] * THREADS


def test_a_forked_child_drafts_on():
    code = """
import os
from sssd import Drafter
drafter = Drafter()
sequence = drafter.begin([1, 2, 1])
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
sequence.extend([2, 1])
assert sequence.draft().token_ids[0] == drafter.begin([1, 2, 1]).draft().token_ids[0] == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


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


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs free-threaded CPython")
def test_free_threaded_python_stays_so():
    code = "import sys, sssd; sssd.Drafter().begin([1, 2, 1]).draft(); print(sys._is_gil_enabled())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
