"""Every probability of a draft, and everything learned from its outcome, against ``reference.py``.

The examples are always the same (``derandomize``): learned cells are chosen by rounding, and a probability
that lies within a rounding error of an edge would now and then teach the neighbouring cell.
"""

import random

import numpy as np
import pytest
import world
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import paths
from reference import WHOLE, Knowledge, Request, Weights, best
from reference_ranking import Ranking

from sssd import SOURCES, Datastore, Drafter

END = 499
NEAR, RANKED_NEAR = 1e-5, 3e-5  # ranking takes exponentials to 1e-5


@pytest.fixture(scope="module")
def datastore(tmp_path_factory):
    return Datastore.open(world.store(tmp_path_factory.mktemp("reference") / "store.sssd"))


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """A datastore with tables for ranking, and the twin's ranking by them."""
    path = world.store(tmp_path_factory.mktemp("ranked") / "store.sssd", ranking=True)
    return Datastore.open(path), Ranking(path)


def check_tree(reference, tree, max_nodes, min_prob=0.001):
    """The tree has the reference's probabilities and sources, and the most probable nodes."""
    near = RANKED_NEAR if reference.ranking else NEAR
    nodes = paths(tree)
    for node, prob, source in zip(nodes, tree.probs.tolist(), tree.sources.tolist(), strict=True):
        evidence = reference.expand(node[:-1])
        candidate = evidence.candidates[node[-1]]
        assert abs(candidate.path - prob) <= near, f"{node}: {candidate.path} in the reference"
        parts = {s: p * evidence.weights[s] for s, p in candidate.probs.items()}
        assert parts.get(source, 0.0) >= max(parts.values()) - near, f"{node}: {SOURCES[source]} of {parts}"
    full = len(nodes) == max_nodes
    least = tree.probs[-1] if full else min_prob
    for node in [(), *nodes[: max_nodes - 1]]:
        if (node or reference.tokens[-1:])[-1] != END:
            for token, candidate in reference.expand(node).candidates.items():
                assert candidate.path <= least + near or (*node, token) in nodes, (
                    f"{(*node, token)} is missing"
                )


def check_weights(reference, sequence):
    """What was learned: counted things exactly, the others to a rounding error."""
    learned = Weights(sequence.state_dict()["weights.v2"]).tables()
    for name, table in reference.weights.tables().items():
        if name in ("escapes", "refinements"):
            np.testing.assert_array_equal(table, learned[name], name)
        else:
            np.testing.assert_allclose(table, learned[name], rtol=0, atol=1e-5, err_msg=name)


def output(rng, tree, source, count):
    """What the target says next: a drafted path as often as not, then something else."""
    drafted = paths(tree)
    said = list(rng.choice(drafted)) if drafted and rng.random() < 0.7 else []
    return [*said, *(source(rng, count) if rng.random() < 0.8 else [rng.randrange(END)])]


def few(rng, length):
    """Texts of few tokens, in which everything has followed everything."""
    return [min(int(rng.expovariate(0.4)), 9) for _ in range(length)]


@pytest.mark.parametrize(
    "kind",
    ["request", "datastore", "feedback", "live", "prediction", "all", "datastore+ranking", "all+ranking"],
)
@given(seed=st.integers(0, 2**32), source=st.sampled_from([world.text, few]))
@settings(deadline=None, max_examples=20, derandomize=True, database=None)
def test_drafts_and_what_they_teach(kind, seed, source, datastore, ranked):
    def has(name):
        return name in kind.split("+") or (kind.startswith("all") and name != "ranking")

    rng = random.Random(seed)
    store, ranking = datastore if has("datastore") else None, None
    if has("ranking"):
        store, ranking = ranked
    drafter = Drafter(
        vocab_size=world.VOCABULARY,
        end_token_ids=[END],
        datastore=store,
        live_bytes=1 << 20 if has("live") else 0,
        soft_bytes=1 << 20 if has("feedback") else 0,
        threads=1,
    )
    knowledge = Knowledge()
    for _ in range(rng.randrange(1, 12) if has("live") else 0):
        # runs of 32 tokens would be looked for among those that are there
        knowledge.documents.append(source(rng, rng.randrange(3, 32)))
        drafter.begin(knowledge.documents[-1]).finish()
    prompt = source(rng, rng.choice([1, 30, 200]))
    prediction = source(rng, 40) if has("prediction") else []
    sequence = drafter.begin(prompt, prediction)
    reference = Request(
        sequence.state_dict()["weights.v2"], prompt, prediction, knowledge, store, (END,), ranking
    )
    for step in range(8):
        budget = rng.choice([1, 2, 8, 24])
        tree = sequence.draft(budget)
        reference.draft()
        if reference.followed is None:
            assert len(tree) == 0
        else:
            check_tree(reference, tree, budget)
        places = {node: place for place, node in enumerate(paths(tree))}
        if has("feedback") and rng.random() < 0.3:
            rows = [world.distribution(rng, token) for token in [1, *tree.token_ids.tolist()]]
            sequence.feedback(tree, *zip(*rows, strict=True))
            for node, row in zip([(), *places], rows, strict=True):
                knowledge.insert([*reference.tokens[reference.predicted :], *node], best(*row))
        said = prediction[step * 4 :][:4] if has("prediction") and rng.random() < 0.5 else []
        tokens = said or output(rng, tree, source, rng.randrange(1, 4))
        topk = [world.distribution(rng, token) for token in tokens] if has("feedback") else None
        if rng.random() < 0.2:
            topk = None
        sequence.extend(tokens, *(zip(*topk, strict=True) if topk else ()))
        reference.extend(tokens, topk, places, budget)
        check_weights(reference, sequence)
    sequence.close()


@pytest.mark.parametrize("length", [WHOLE - 4, WHOLE + 60])
def test_short_contexts_in_texts_as_long_as_the_weights_know_and_longer(length):
    rng = random.Random(length)
    # tokens and pairs that have occurred at the beginning alone, and all the time
    rare = [100 + rng.randrange(300) for _ in range(600)]
    prompt = [*rare, *few(rng, length - 640), *rare[20:60]]
    sequence = Drafter(vocab_size=world.VOCABULARY, live_bytes=0, soft_bytes=0).begin(prompt)
    reference = Request(sequence.state_dict()["weights.v2"], prompt, [], Knowledge())
    for _ in range(4):
        tree = sequence.draft(8)
        reference.draft()
        check_tree(reference, tree, 8)
        places = {node: place for place, node in enumerate(paths(tree))}
        tokens = [rng.choice(rare), *output(rng, tree, few, 1)][-2:]
        sequence.extend(tokens)
        reference.extend(tokens, None, places, 8)
        check_weights(reference, sequence)
    sequence.close()


def test_a_quarter_of_what_requests_learn_is_handed_on():
    drafter = Drafter(live_bytes=0, soft_bytes=0)
    rng = random.Random(0)
    expected = Weights(drafter.state_dict()["weights.v2"]).tables()
    sequences = [drafter.begin(world.text(rng, 300)) for _ in range(2)]
    start = Weights(drafter.state_dict()["weights.v2"]).tables()
    for sequence in sequences:
        for _ in range(40):
            tree = sequence.draft(16)
            sequence.extend(output(rng, tree, world.text, 2))
        learned = Weights(sequence.state_dict()["weights.v2"]).tables()
        sequence.finish()
        for name, table in expected.items():
            changed = learned[name] != start[name]
            if name in ("escapes", "refinements"):
                changed = changed.any(-1)
                table, after = table[..., 0], learned[name][..., 0]
                table[changed] += np.trunc((after - table)[changed] / 4).astype(int)
            else:
                table[changed] += (learned[name] - table)[changed] / 4
            assert changed.any()
    handed_on = Weights(drafter.state_dict()["weights.v2"]).tables()
    for name, table in expected.items():
        np.testing.assert_allclose(handed_on[name], table, rtol=0, atol=1e-6, err_msg=name)
