"""Domains of a corpus: which documents are of which, and that drafts go by them."""

import numpy as np
import pytest

from sssd import Datastore, Drafter
from sssd.corpus import Corpus, opened
from sssd.errors import InvalidArgumentError

VOCABULARY = 64


def texts(rng, first, count):
    """Documents over tokens from ``first`` on, in which the same token always follows another."""
    starts = rng.integers(0, 8, count).tolist()
    return [{"ids": [first + (start + n) % 8 for n in range(20)]} for start in starts]


@pytest.fixture
def corpus(tmp_path):
    return Corpus(tmp_path / "corpus")


def add(corpus, source, documents, **kwargs):
    return corpus.add([documents], vocab_size=VOCABULARY, source=source, **kwargs)


def domains(corpus):
    return [runs for _, _, runs in opened(corpus.path)]


def test_sources_are_domains_the_largest_first_and_survive_merges(corpus):
    rng = np.random.default_rng(0)
    add(corpus, "small", texts(rng, 0, 3))
    add(corpus, "large", texts(rng, 8, 9), merge=False)
    assert domains(corpus) == [[(3, 60, 1)], [(9, 180, 0)]]
    corpus.merge(whole=True)
    [runs] = domains(corpus)
    assert sorted(runs) == [(3, 60, 1), (9, 180, 0)]
    with Datastore.open(corpus.path) as store:
        [document] = store.continuations([0], limit=1, max_tokens=1)
        assert document.tolist() == [1]


def test_what_is_deleted_is_no_domain(corpus):
    rng = np.random.default_rng(0)
    add(corpus, "gone", texts(rng, 0, 9))
    add(corpus, "kept", texts(rng, 8, 3), merge=False)
    corpus.remove(source="gone", merge=False)
    assert all(domain == 0 for runs in domains(corpus) for _, _, domain in runs)


@pytest.mark.parametrize(
    ("sources", "count"),
    [
        ([f"logs/{n}" for n in range(16)], 16),
        ([f"logs/{n}" for n in range(17)], 1),
        ([f"{'code' if n % 2 else 'chat'}/{n}" for n in range(20)], 2),
        ([f"{n}/{n}" for n in range(17)], 1),
    ],
)
def test_too_many_sources_are_taken_together_by_folder(corpus, sources, count):
    rng = np.random.default_rng(0)
    for n, source in enumerate(sources):
        add(corpus, source, texts(rng, n, 1))
    assert len({domain for runs in domains(corpus) for _, _, domain in runs}) == count


def test_a_request_learns_which_domain_it_is_like(tmp_path):
    """After each context one domain goes on in twenty ways, each three times, another once."""
    large = [[n, 150 + n, 300 + (n + way) % 100] for n in range(100) for way in range(20) for _ in range(3)]
    small = [[n, 150 + n, 400 + n] for n in range(100)]
    corpus = Corpus(tmp_path / "corpus")
    for source, documents in (("large", large), ("small", small)):
        corpus.add([[{"ids": ids} for ids in documents]], vocab_size=500, source=source)
    corpus.merge(whole=True)
    [(path, _, runs)] = opened(corpus.path)
    whole = [(len(large) + len(small), sum(tokens for _, tokens, _ in runs), 0)]
    probs = {}
    for kind, given in (("together", whole), ("apart", runs)):
        drafter = Drafter(datastore=Datastore.open([path], domains=[given]), live_bytes=0, soft_bytes=0)
        sequence = drafter.begin([0, 150])
        for n in range(30):
            tree = sequence.draft(64)
            sequence.extend([400 + n, n + 1, 151 + n])
        tree = sequence.draft(64)
        ids = tree.token_ids.tolist()
        probs[kind] = float(tree.probs[ids.index(430)]) if 430 in ids else 0.0
    assert probs["apart"] > probs["together"] + 0.2, probs


@pytest.mark.parametrize(
    "given",
    [[], [[], []], [[(1, 2, 0)]], [[(2, 40, 16)]], [[(2, 40, 0), (1 << 63, 1 << 63, 1)]]],
)
def test_domains_that_are_not_those_of_the_documents_are_refused(corpus, given):
    add(corpus, "all", texts(np.random.default_rng(0), 0, 2))
    [(path, _, runs)] = opened(corpus.path)
    with pytest.raises(InvalidArgumentError):
        Datastore.open([path], domains=given)
    for nonsense in (3, [3], [[(1, 2)]], [[(-1, 2, 0)]], [[(1, 2, 256)]], [None]):
        with pytest.raises(TypeError, match="documents, tokens, domain"):
            Datastore.open([path], domains=nonsense)
    Datastore.open([path], domains=[runs]).close()
