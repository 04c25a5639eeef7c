"""Calls that may take long let other Python threads run meanwhile."""

import numpy as np
import pytest
from world import ticks_during

from sssd import DatastoreBuilder, Drafter

TOKENS = np.random.default_rng(0).integers(0, 50_000, 300_000, np.int32)
FEW = np.random.default_rng(1).integers(0, 30, 3000)


def unindexed():
    """A sequence whose prompt the next call has to index."""
    return Drafter(threads=1).begin(TOKENS, background=True)


def begun(**options):
    return Drafter(**options).begin(TOKENS)


def forked():
    sequence = begun()
    return sequence, sequence.fork()


def many():
    drafter = Drafter(threads=1)
    return drafter, [drafter.begin(FEW) for _ in range(8)]


def learned(folder):
    drafter = Drafter(vocab_size=50_000)
    drafter.begin(TOKENS).finish()
    drafter.save(folder / "saved")
    return drafter, DatastoreBuilder(folder / "frozen.sssd", vocab_size=50_000)


def repeatedly(act):
    for _ in range(300):
        act()


CALLS = {
    "begin": (Drafter, lambda drafter: drafter.begin(TOKENS)),
    "the first length after a begin in the background": (unindexed, len),
    "the first memory_bytes": (unindexed, lambda sequence: sequence.memory_bytes),
    "the first repr": (unindexed, repr),
    "the first short extend": (unindexed, lambda sequence: sequence.extend([1])),
    "the first state_dict": (unindexed, lambda sequence: sequence.state_dict()),
    "draft": (lambda: Drafter().begin(FEW), lambda sequence: repeatedly(lambda: sequence.draft(1024))),
    "extend": (begun, lambda sequence: sequence.extend(TOKENS)),
    "prefill": (begun, lambda sequence: sequence.prefill(TOKENS)),
    "truncate": (forked, lambda both: both[0].truncate(5)),
    "fork": (begun, lambda sequence: repeatedly(lambda: sequence.fork().close())),
    "finish": (begun, lambda sequence: sequence.finish()),
    "commit": (begun, lambda sequence: sequence.commit()),
    "check_integrity": (begun, lambda sequence: sequence.check_integrity()),
    "token_ids": (begun, lambda sequence: repeatedly(lambda: sequence.token_ids)),
    "step": (many, lambda held: held[0].step(held[1], np.resize(FEW, 80_000), np.arange(9) * 10_000)),
    "draft_batch": (many, lambda held: repeatedly(lambda: held[0].draft_batch(held[1], 64))),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_long_call_lets_other_threads_run(call):
    prepare, act = CALLS[call]
    held = prepare()
    assert ticks_during(lambda: act(held)) > 3


def test_saving_loading_and_freezing_let_other_threads_run(tmp_path):
    drafter, builder = learned(tmp_path)
    calls = {
        "save": lambda: drafter.save(tmp_path / "again"),
        "load": lambda: Drafter.load(tmp_path / "saved"),
        "freeze": lambda: [drafter.freeze(builder) for _ in range(20)],
        "finish of a build": builder.finish,
    }
    ticks = {name: ticks_during(call) for name, call in calls.items()}
    assert all(count > 3 for count in ticks.values()), ticks
