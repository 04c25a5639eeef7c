"""Sampled output has the target's distribution, whatever the drafts."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
stats = pytest.importorskip("scipy.stats")

from models import tiny_model  # noqa: E402
from transformers import LogitsProcessorList  # noqa: E402
from transformers.generation import logits_process as processors  # noqa: E402
from trees import ScriptedDrafter  # noqa: E402

from sssd import hf  # noqa: E402

VOCAB = 7
PROMPT = [3, 4, 3, 5, 6, 3]
SAMPLE = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
SAMPLING = {
    "top_p": ({"top_p": 0.8}, [processors.TopPLogitsWarper(0.8)]),
    "temperature_top_k": (
        {"temperature": 0.6, "top_k": 4},
        [processors.TemperatureLogitsWarper(0.6), processors.TopKLogitsWarper(4)],
    ),
    "min_p": ({"min_p": 0.15}, [processors.MinPLogitsWarper(0.15)]),
    "penalty": (
        {"repetition_penalty": 1.8, "top_p": 0.9},
        [processors.RepetitionPenaltyLogitsProcessor(1.8), processors.TopPLogitsWarper(0.9)],
    ),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", "sdpa", seed=4, vocab_size=VOCAB, hidden_size=16)


def joint_distribution(model, warpers):
    """P(first three tokens), by enumerating every prefix."""
    warp = LogitsProcessorList(warpers)

    def next_token(prefix):
        with torch.no_grad():
            ids = torch.tensor([PROMPT + prefix])
            return torch.softmax(warp(ids, model(ids).logits[:, -1]), -1)[0].double().numpy()

    first = next_token([])
    second = [next_token([a]) for a in range(VOCAB)]
    joint = np.zeros((VOCAB,) * 3)
    for a, b in itertools.product(range(VOCAB), repeat=2):
        if first[a] * second[a][b] > 0:
            joint[a, b] = first[a] * second[a][b] * next_token([a, b])
    return joint / joint.sum()


def p_value(counts, joint):
    """Chi-square goodness of fit; cells with an expectation below 5 are pooled."""
    expected = joint * counts.sum()
    large = expected >= 5
    if counts[joint == 0].any():
        return 0.0
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    if wanted[-1] < 5:
        observed, wanted = (
            np.append(observed[:-2], observed[-2:].sum()),
            np.append(wanted[:-2], wanted[-2:].sum()),
        )
    assert len(wanted) >= 8, "too few cells to tell distributions apart"
    return stats.chisquare(observed, wanted).pvalue


def sample_counts(model, options, rows=400, rounds=10):
    counts = np.zeros((VOCAB,) * 3)
    ids = torch.tensor([PROMPT] * rows)
    accepted = 0
    for seed in range(rounds):
        torch.manual_seed(seed)
        # Trees of ten nodes over seven tokens: most walks go through accepted nodes.
        drafter = ScriptedDrafter([], VOCAB, 0.0, seed)
        settings = {**SAMPLE, "max_new_tokens": 4, "return_dict_in_generate": True, **options}
        result = hf.generate(model, ids, drafter, max_nodes=10, **settings)
        accepted += int(result.accepted_mask[:, 1:3].sum())
        np.add.at(counts, tuple(result.sequences[:, len(PROMPT) : len(PROMPT) + 3].T.numpy()), 1)
    assert accepted > 0.3 * counts.sum(), "the drafts should matter"
    return counts


@pytest.mark.parametrize("case", SAMPLING)
def test_joint_distribution_of_three_tokens(model, case):
    options, warpers = SAMPLING[case]
    counts = sample_counts(model, options)
    assert p_value(counts, joint_distribution(model, warpers)) > 1e-3
    # The test can tell: the same counts do not fit a slightly different temperature.
    other = joint_distribution(model, [processors.TemperatureLogitsWarper(0.9), *warpers])
    assert p_value(counts, other) < 1e-4


@pytest.mark.parametrize("case", SAMPLING)
def test_one_row_draws_like_the_model(model, case):
    """The same seed gives the same tokens: one draw per output token, in order."""
    options = {**SAMPLE, "max_new_tokens": 30, "eos_token_id": 1, **SAMPLING[case][0]}
    ids = torch.tensor([PROMPT])
    for seed in range(5):
        torch.manual_seed(seed)
        expected = model.generate(ids, **options)
        torch.manual_seed(seed)
        drafter = ScriptedDrafter([expected[0].tolist()], VOCAB, 0.8)
        assert torch.equal(hf.generate(model, ids, drafter, max_nodes=6, **options), expected)


def test_several_samples_of_one_prompt(model):
    torch.manual_seed(1)
    output = hf.generate(model, torch.tensor([PROMPT]), num_return_sequences=5, max_new_tokens=8, **SAMPLE)
    assert output.shape == (5, len(PROMPT) + 8)
    assert len({tuple(row) for row in output.tolist()}) > 1
