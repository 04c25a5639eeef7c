"""The store against a brute-force search. ``SSSD_EXAMPLES`` sets the number of corpora of each test."""

import os
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sssd.datastore import Datastore, DatastoreBuilder

EXAMPLES = settings(max_examples=int(os.environ.get("SSSD_EXAMPLES", "50")), deadline=None)


class Oracle:
    """Counts and continuations by looking at every place of every document."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents = documents

    def continuations(self, query: list[int]) -> list[tuple[int, ...]]:
        return sorted(
            tuple(document[start + len(query) :])
            for document in self.documents
            for start in range(len(document))
            if document[start : start + len(query)] == query
        )


@st.composite
def corpora(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """Few distinct tokens, with 0 and the largest id among them; empty, one-token and repeated documents."""
    vocab_size = draw(st.sampled_from([1, 2, 3, 255, 256, 65_535, 65_536, 128_256, 1 << 24]))
    token = st.sampled_from(sorted({0, vocab_size // 2, vocab_size - 1}))
    documents = draw(st.lists(st.lists(token, max_size=40), max_size=12))
    repeated = draw(st.lists(st.sampled_from(documents), max_size=4)) if documents else []
    return vocab_size, documents + repeated


def build(folder: str, vocab_size: int, documents: list[list[int]], files: int = 1) -> list[Path]:
    paths = [Path(folder) / f"{index}.sssd" for index in range(files)]
    for index, path in enumerate(paths):
        with DatastoreBuilder(path, vocab_size=vocab_size) as builder:
            for document in documents[index::files]:
                builder.add(document)
    return paths


@EXAMPLES
@given(corpora(), st.data(), st.integers(1, 3), st.sampled_from(["mmap", "ram"]))
def test_counts_and_continuations(
    corpus: tuple[int, list[list[int]]], data: st.DataObject, files: int, load: str
) -> None:
    vocab_size, documents = corpus
    oracle = Oracle(documents)
    stretches = [
        d[i : i + n] for d in documents for i in range(len(d)) for n in (1, 2, 5, 9) if i + n <= len(d)
    ]
    absent = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=12)
    query = absent if not stretches else st.one_of(st.sampled_from(stretches), absent)
    queries = data.draw(st.lists(query, max_size=20))
    with tempfile.TemporaryDirectory() as folder:
        paths = build(folder, vocab_size, documents, files)
        with Datastore.open(paths, load=load) as store:  # type: ignore[arg-type]
            store.verify()
            assert store.info.documents == len(documents)
            assert store.count([]) == store.info.tokens == sum(map(len, documents))
            for ids in queries:
                expected = oracle.continuations(ids)
                assert store.count(ids) == len(expected)
                found = store.continuations(ids, limit=10_000, max_tokens=100)
                assert sorted(tuple(rest.tolist()) for rest in found) == expected


@EXAMPLES
@given(corpora(), st.integers(1, 20))
def test_samples_are_evenly_spread(corpus: tuple[int, list[list[int]]], limit: int) -> None:
    vocab_size, documents = corpus
    with (
        tempfile.TemporaryDirectory() as folder,
        Datastore.open(build(folder, vocab_size, documents)) as store,
    ):
        expected = Oracle(documents).continuations([0])
        found = [tuple(rest.tolist()) for rest in store.continuations([0], limit=limit, max_tokens=100)]
        count = len(expected)
        taken = min(limit, count)
        assert found == [expected[(2 * sample + 1) * count // (2 * taken)] for sample in range(taken)]


@EXAMPLES
@given(corpora(), st.integers(1, 50))
def test_a_stream_is_its_documents(corpus: tuple[int, list[list[int]]], stretch: int) -> None:
    vocab_size, documents = corpus
    end = vocab_size - 1
    documents = [[token for token in document if token != end] + [end] for document in documents]
    stream = np.array([token for document in documents for token in document], np.uint32)
    with tempfile.TemporaryDirectory() as folder:
        (path,) = build(folder, vocab_size, documents)
        with DatastoreBuilder(Path(folder) / "stream", vocab_size=vocab_size) as builder:
            for start in range(0, len(stream), stretch):
                builder.add_stream(stream[start : start + stretch], end)
        assert path.read_bytes() == (Path(folder) / "stream").read_bytes()


@EXAMPLES
@given(corpora())
def test_deduplication_keeps_the_first_of_equal_documents(corpus: tuple[int, list[list[int]]]) -> None:
    vocab_size, documents = corpus
    unique = [list(ids) for ids in dict.fromkeys(map(tuple, documents))]
    with tempfile.TemporaryDirectory() as folder:
        builder = DatastoreBuilder(Path(folder) / "store", vocab_size=vocab_size, deduplicate=True)
        for document in documents:
            builder.add(document)
        summary = builder.finish()
        assert (summary.documents, summary.duplicates) == (len(unique), len(documents) - len(unique))
        with Datastore.open(Path(folder) / "store") as store:
            oracle = Oracle(unique)
            for ids in unique:
                if ids:
                    assert store.count(ids) == len(oracle.continuations(ids))
