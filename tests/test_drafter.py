"""What drafters and sequences take, and what they refuse."""

import array

import numpy as np
import pytest
from oracle import paths

from sssd import Drafter
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


@pytest.mark.parametrize("dtype", ["i8", "i4", "u4", "u8", "i2", "u2", "i1", "u1"])
def test_integer_arrays_are_taken(dtype):
    ids = np.array(IDS, dtype)
    ids.flags.writeable = False
    assert Drafter().begin(ids).token_ids.tolist() == IDS
    assert Drafter().begin(np.repeat(ids, 2)[::2]).token_ids.tolist() == IDS
    assert Drafter().begin(ids[::-1]).token_ids.tolist() == IDS[::-1]


def test_tensors_are_taken():
    torch = pytest.importorskip("torch")
    assert Drafter().begin(torch.tensor(IDS)).token_ids.tolist() == IDS


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([-1], "token id -1 at index 0"),
        ([0, 100], "token id 100 at index 1 is outside the vocabulary of 100 tokens"),
        ([2**31], "outside the vocabulary"),
        ([2**200], "outside the vocabulary"),
        (np.array([5, -3]), "token id -3 at index 1"),
        (np.array([2**63], np.uint64), "outside the vocabulary"),
        ([1.0], "integers"),
        (np.array([1.0]), "integers"),
        (np.array([True]), "integers"),
        ([True], "integers, got <class 'bool'>"),
        (np.array([1], ">i4"), "integers, got an array of >i4"),
        (np.array([1], object), "integers, got an array of object"),
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
        Drafter().begin([2**31])


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
