"""What drafts are worth on recorded requests: nothing else notices a predictor that is sound and worse.

A change for the better fails as well. Then look at `python -m sssd replay` on longer traces, and write down
the new figures here.
"""

from functools import cache
from pathlib import Path

import pytest

from sssd import Datastore, DatastoreBuilder, Drafter
from sssd.replay import Replay, read_trace

END = 128009
REQUESTS = list(read_trace(Path(__file__).parent / "data" / "requests.jsonl.xz"))


@pytest.fixture(scope="module")
def datastore(tmp_path_factory):
    """The requests with an odd number, which are replayed by nobody who uses it."""
    path = tmp_path_factory.mktemp("acceptance") / "store.sssd"
    with DatastoreBuilder(path, vocab_size=END + 1) as builder:
        for request in REQUESTS[1::2]:
            builder.add(request.prompt_ids)
            builder.add(request.response_ids)
    return Datastore.open(path)


@pytest.fixture(scope="module")
def replayed(datastore):
    """The replay of a setting with so many nodes, made once."""

    @cache
    def replay(setting, nodes):
        made, shared = Replay(nodes), Drafter(end_token_ids=[END])
        for request in REQUESTS[::2] if setting == "datastore" else REQUESTS:
            store = datastore if setting == "datastore" else None
            alone = Drafter(end_token_ids=[END], datastore=store, live_bytes=0, soft_bytes=0)
            made.run(shared if setting == "shared" else alone, request)
        return made

    return replay


@pytest.mark.parametrize(
    ("setting", "nodes", "accepted", "expected"),
    [
        ("alone", 16, 0.6114, 0.6451),
        ("alone", 64, 0.6657, 0.6972),
        ("datastore", 16, 0.5860, 0.6168),
        ("datastore", 64, 0.6670, 0.6808),
        ("shared", 16, 0.6574, 0.6928),
        ("shared", 64, 0.7215, 0.7588),
    ],
)
def test_accepted_tokens_and_their_sum_of_probabilities_per_step(
    setting, nodes, accepted, expected, replayed
):
    replay = replayed(setting, nodes)
    assert replay.accepted / replay.steps == pytest.approx(accepted, rel=0.005)
    assert replay.expected / replay.steps == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("nodes", [16, 64])
@pytest.mark.parametrize("setting", ["alone", "datastore", "shared"])
def test_probabilities_come_true(setting, nodes, replayed):
    replay = replayed(setting, nodes)
    assert replay.expected == pytest.approx(replay.accepted, rel=0.1)
    bins = replay.row("")["reliability"]
    for low, high in ((0.05, 0.2), (0.2, 0.5), (0.5, 1.0)):
        held = [counts for counts in bins if low <= counts["from"] < high]
        accepted = sum(counts["accepted"] for counts in held)
        assert accepted > 300
        assert sum(counts["predicted"] for counts in held) == pytest.approx(accepted, rel=0.25)
