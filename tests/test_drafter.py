"""What drafters and sequences take, and what they refuse."""

import array
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import paths

from sssd import SOURCES, Drafter
from sssd.errors import ClosedError, InvalidArgumentError, InvalidTokenError, SssdError

IDS = [1, 2, 3, 1, 2]


@pytest.mark.parametrize(
    "make", [list, tuple, lambda ids: array.array("q", ids), lambda ids: array.array("i", ids)]
)
def test_sequences_of_integers_are_taken(make):
    assert Drafter().begin(make(IDS)).token_ids.tolist() == IDS


def test_range_and_numpy_integers_are_taken():
    assert Drafter().begin(range(3)).token_ids.tolist() == [0, 1, 2]
    assert Drafter().begin([np.int64(4), np.uint8(5)]).token_ids.tolist() == [4, 5]


ORDERED = [order + kind for order in "<>" for kind in ("i8", "i4", "u4", "u8", "i2", "u2")]


@pytest.mark.parametrize("dtype", [*ORDERED, "i1", "u1", "O", np.longlong, np.ulonglong])
def test_integer_arrays_are_taken(dtype):
    ids = np.array(IDS, dtype)
    ids.flags.writeable = False
    assert Drafter().begin(ids).token_ids.tolist() == IDS
    assert Drafter().begin(np.repeat(ids, 2)[::2]).token_ids.tolist() == IDS
    assert Drafter().begin(ids[::-1]).token_ids.tolist() == IDS[::-1]


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, MemoryError, ZeroDivisionError])
@pytest.mark.parametrize("kind", [list, tuple, lambda items: np.array(items, object)])
def test_what_goes_wrong_in_an_integer_is_passed_on(raised, kind):
    class Index:
        def __index__(self):
            raise raised("here")

    sequence = Drafter().begin([1])
    with pytest.raises(raised, match="here"):
        sequence.extend(kind([1, Index()]))
    assert len(sequence) == 1


def test_tensors_are_taken():
    torch = pytest.importorskip("torch")
    assert Drafter().begin(torch.tensor(IDS)).token_ids.tolist() == IDS


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1.0], "integers"),
        (np.array([1.0]), "integers"),
        (np.array([True]), "integers"),
        ([True], "integers, got <class 'bool'>"),
        (np.array([1, 2.0], object), "integers, got <class 'float'>"),
        (np.array([1, [2]], object), "integers, got <class 'list'>"),
        ([np.array(1.5)], "integers, got <class 'numpy.ndarray'>"),
        ([[1]], "integers"),
        (np.array([[1]]), "2 dimensions"),
        (np.array(1), "0 dimensions"),
        ("12", "integers, got <class 'str'>"),
        (b"12", "integers, got <class 'bytes'>"),
        ({1, 2}, "integers, got <class 'set'>"),
        ((id for id in IDS), "integers, got <class 'generator'>"),
        (["1"], "integers"),
        (None, "integers"),
        ([None], "integers"),
        (7, "integers"),
        ({1: 2}, "integers"),
    ],
)
def test_other_ids_are_refused_and_change_nothing(ids, message):
    drafter = Drafter(vocab_size=100)
    sequence = drafter.begin(IDS)
    for call in (drafter.begin, sequence.extend):
        with pytest.raises(InvalidTokenError, match=message):
            call(ids)
    assert sequence.token_ids.tolist() == IDS


def test_the_largest_id_is_taken():
    assert Drafter().begin([2**31 - 1]).token_ids.tolist() == [2**31 - 1]
    assert Drafter(vocab_size=2**31).begin([2**31 - 1]).token_ids.tolist() == [2**31 - 1]
    with pytest.raises(InvalidTokenError, match=r"outside 0\.\.=2147483647"):
        Drafter(end_token_ids=[2**31])


FOREIGN = [-1, 100, 2**31, 2**63, 2**200, -(2**200)]


@pytest.mark.parametrize("foreign", [*FOREIGN, np.array([-3]), np.array([2**63], np.uint64)])
def test_ids_outside_the_vocabulary_are_held(foreign):
    """As placeholders, by every way in which tokens come."""
    foreign = list(foreign) if isinstance(foreign, np.ndarray) else [foreign]
    drafter = Drafter(vocab_size=100)
    sequence = drafter.begin([*IDS, *foreign, *IDS[:2]])
    assert sequence.token_ids.tolist() == [*IDS, -1, *IDS[:2]]
    sequence.extend([*foreign, 7])
    sequence.prefill(foreign)
    assert sequence.token_ids.tolist() == [*IDS, -1, *IDS[:2], -1, 7, -1]
    drafter.step([sequence], [*foreign, 8], [0, 2], max_nodes=4)
    drafter.begin([1], prediction=foreign).close()
    fork = sequence.fork()
    fork.truncate(len(IDS) + 1)
    assert fork.token_ids.tolist() == [*IDS, -1]


def test_one_foreign_id_stops_no_other_request():
    drafter = Drafter(vocab_size=100)
    good, odd = drafter.begin([5, 6, 7, 5, 6]), drafter.begin([5, 6, 7, 5, 6])
    batch = drafter.step([good, odd], [7, 999], [0, 1, 2], max_nodes=8)
    assert batch[0].token_ids.tolist()[:2] == [5, 6]
    assert len(batch[1]) == 0


def test_placeholders_match_nothing_and_are_never_drafted():
    drafter = Drafter(vocab_size=50, live_bytes=1 << 20)
    # what followed one is not drafted after another, nor found through one
    for prompt in ([5, -1, 6, -1], [1, 2, -1, 3, 4, 1, 2, -1], [7, 99, 8, 7, 10**12], [-1, -1, -1]):
        sequence = drafter.begin(prompt)
        assert len(sequence.draft(16)) == 0
        assert len(sequence.fork().draft(16)) == 0
    # matches begin anew behind them, and end before them
    sequence = drafter.begin([1, 2, 3, 4, -1, 9, 1, 2])
    assert paths(sequence.draft(16)) == [(3,), (3, 4)]
    sequence.extend([3, 4, -1])
    assert len(sequence.draft(16)) == 0
    # nor by what other requests hold
    sequence.finish()
    assert paths(drafter.begin([1, 2]).draft(16))[0] == (3,)
    # nor by the target's own probabilities, which are known by the tokens before
    sequence = drafter.begin([5, -1])
    sequence.extend([6], [[6, 7]], [[0.9, 0.1]])
    assert len(drafter.begin([9, -1]).draft(16)) == 0


TOKENS = st.lists(st.integers(-1, 6), max_size=60)


@given(TOKENS, st.lists(st.tuples(TOKENS, st.integers(0, 12)), max_size=8))
@settings(max_examples=150, deadline=None)
def test_no_history_with_placeholders_drafts_one(prompt, steps):
    """And taking tokens back and forks leave what a new request would hold."""
    drafter = Drafter(vocab_size=7, live_bytes=1 << 16)
    history, sequence = list(prompt), drafter.begin(prompt)
    for step, cut in steps:
        sequence.extend(step)
        history += step
        keep = max(0, len(history) - cut)
        del history[keep:]
        sequence.truncate(keep)
        assert sequence.token_ids.tolist() == history
        tree = sequence.draft(16)
        assert all(0 <= token < 7 for token in tree.token_ids.tolist())
        # the way behind the root is known: the first node followed the last token somewhere
        if history and history[-1] >= 0:
            pairs = set(itertools.pairwise(history))
            first = [
                int(token)
                for token, parent, source in zip(tree.token_ids, tree.parents, tree.sources, strict=True)
                if parent < 0 and SOURCES[source] == "request"
            ]
            assert all((history[-1], token) in pairs for token in first)
    drafter.begin(history).finish()
    later = drafter.begin([token for token in history if token >= 0])
    assert all(0 <= token < 7 for token in later.draft(32).token_ids.tolist())


@pytest.mark.parametrize("size", [0, -1, 2**31 + 1])
def test_impossible_vocabularies_are_refused(size):
    with pytest.raises(InvalidArgumentError, match="vocab_size"):
        Drafter(vocab_size=size)


def test_end_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(InvalidTokenError):
        Drafter(vocab_size=10, end_token_ids=[10])
    assert Drafter(end_token_ids=np.array([3])).end_token_ids.tolist() == [3]


@pytest.mark.parametrize("weights", [b"", b"x" * 20256])
def test_other_weights_are_refused(weights):
    with pytest.raises(InvalidArgumentError, match="state"):
        Drafter().load_state_dict({"weights.v2": weights})


def test_weights_carry_over():
    sequence = Drafter().begin([1, 2, 3, 1, 2, 4, 1, 2])
    for _ in range(20):
        sequence.draft()
        sequence.extend([4, 1, 2])
    drafter = Drafter()
    assert drafter.begin(IDS).state_dict() != sequence.state_dict()
    drafter.load_state_dict(sequence.state_dict())
    assert drafter.begin(IDS).state_dict() == sequence.state_dict()


@pytest.mark.parametrize("budget", [-1, 1025, 10**9, 10**30])
def test_impossible_budgets_are_refused(budget):
    with pytest.raises(InvalidArgumentError, match="max_nodes must be between 0 and 1024"):
        Drafter().begin(IDS).draft(budget)
    with pytest.raises(TypeError):
        Drafter().begin(IDS).draft(1.5)


def test_nothing_is_drafted_for_nothing():
    assert len(Drafter().begin(IDS).draft(0)) == 0
    assert len(Drafter().begin([]).draft(8)) == 0
    assert len(Drafter().begin([1]).draft(8)) == 0


def test_nothing_follows_an_end_token():
    drafter = Drafter(end_token_ids=[3])
    assert paths(drafter.begin(IDS).draft(8)) == [(3,)]
    assert len(drafter.begin([1, 3, 1, 3]).draft(8)) == 0


def test_a_closed_sequence_refuses_work():
    with Drafter().begin(IDS) as sequence:
        assert not sequence.closed
    sequence.close()
    assert sequence.closed
    assert "closed" in repr(sequence)
    for call in (
        lambda: sequence.draft(),
        lambda: sequence.extend([1]),
        lambda: sequence.token_ids,
        lambda: sequence.memory_bytes,
        lambda: sequence.state_dict(),
        lambda: len(sequence),
    ):
        with pytest.raises(ClosedError, match="closed"):
            call()


def test_errors_have_one_base():
    assert issubclass(InvalidTokenError, (SssdError, ValueError))
    assert issubclass(ClosedError, (SssdError, RuntimeError))


def test_memory_is_bounded_per_token():
    ids = np.random.default_rng(0).zipf(1.3, 50_000) % 30_000
    sequence = Drafter().begin(ids)
    sequence.draft(64)
    assert 60 * len(ids) < sequence.memory_bytes < 150 * len(ids)
