"""The target's most probable tokens against torch's."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from sssd import _core  # noqa: E402
from sssd.errors import InvalidArgumentError  # noqa: E402
from sssd.hf.choices import choices, most_probable, top_k  # noqa: E402


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 5, 64, 511, 512, 513, 3000, 49152]),
    st.sampled_from([0.1, 3.0, 12.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_tokens_and_probabilities_are_those_of_torch(seed, vocabulary, spread, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(2, 3, vocabulary, generator=generator) * spread + 5).to(dtype)
    ids, probs = top_k(logits)
    assert (ids.dtype, probs.dtype) == (np.int64, np.float32)
    assert ids.shape == probs.shape == (2, 3, min(8, vocabulary))
    right = logits.double().softmax(-1)
    # equals may change places
    values = logits.gather(-1, torch.from_numpy(ids)).float()
    assert torch.equal(values, logits.float().topk(ids.shape[-1], dim=-1).values)
    np.testing.assert_allclose(probs, right.gather(-1, torch.from_numpy(ids)).numpy(), rtol=1e-6, atol=1e-37)
    assert (probs.sum(-1) <= 1 + 1e-6).all()
    assert all(len(set(row)) == len(row) for row in ids.reshape(-1, ids.shape[-1]).tolist())
    targets, some_ids, some_probs = most_probable(logits, vocabulary)
    assert np.array_equal(targets, choices(logits))
    assert np.array_equal(some_ids, ids)
    assert np.array_equal(some_probs, probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_equals_is_chosen(dtype):
    logits = torch.zeros(1, 2, 2000, dtype=dtype)
    logits[0, 0, [1900, 700, 701]] = 3
    logits[0, 1, [0, 1999]] = 1
    targets, ids, _ = most_probable(logits, 2000)
    assert targets.tolist() == [[700, 0]] == choices(logits).tolist()
    assert ids[0, :, :3].tolist() == [[700, 701, 1900], [0, 1999, 1]]


def test_padding_of_the_vocabulary_may_be_chosen_and_teaches_nothing():
    logits = torch.zeros(1, 3, 600)
    logits[0, 0, 599] = 9
    targets, ids, probs = most_probable(logits, 500)
    assert targets.tolist() == [[599, 0, 0]]
    assert ids.max() < 500
    np.testing.assert_allclose(probs, 1 / 500, rtol=1e-6)


def test_logits_that_are_no_distribution_are_chosen_from_as_by_torch():
    logits = torch.randn(1, 5, 900)
    logits[0, 1, [400, 800]] = torch.nan
    logits[0, 2, 700] = torch.inf
    logits[0, 3] = -torch.inf
    targets, _, probs = most_probable(logits, 900)
    assert targets.tolist() == logits.argmax(-1).tolist()
    assert (probs[0, 1:4] == 0).all()
    assert (probs[0, [0, 4]] > 0).all()


def test_other_arrays_are_refused():
    good = np.zeros((2, 9), np.float32)
    for logits, k, message in (
        (good.astype(np.float64), 8, "must be a float32 array"),
        ([0.5], 8, "must be a float32 array"),
        (np.float32(1), 8, "must be a float32 array"),
        (good[:, ::2], 8, "last axis of logits must be contiguous"),
        (good[:, :0], 8, "vocabulary of logits is empty"),
        (good, 0, "k must be between 1 and 8"),
        (good, 9, "k must be between 1 and 8"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            _core.top_k(logits, k)
    ids, _ = _core.top_k(good[::2, :4], 8)
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert _core.top_k(good[:0], 3)[0].shape == (0, 3)
