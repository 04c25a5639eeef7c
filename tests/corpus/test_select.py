"""``sssd.corpus.select``: equal shares, clusters, and what helps given traffic, against slow counterparts."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sssd import Datastore
from sssd.cli import main
from sssd.corpus.select import WAYS, clusters, evenly, most_useful, select
from sssd.errors import EmptyCorpusError, InvalidArgumentError, SssdError

VOCABULARY = 50
documents = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 4)), min_size=1, max_size=60)


def words(seed, low, high, count):
    """Documents of ids from ``low`` to ``high``."""
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, rng.integers(5, 40)).astype(np.int32) for _ in range(count)]


def written(path, found):
    path.write_text("".join(json.dumps({"ids": ids.tolist()}) + "\n" for ids in found))
    return path


@settings(deadline=None, max_examples=200)
@given(documents, st.integers(1, 900))
def test_shares_are_equal_as_far_as_there_is_enough(found, total):
    sizes = np.array([size for size, _ in found])
    groups = np.array([group for _, group in found])
    chosen = evenly(sizes, groups, total)
    assert (np.diff(chosen) > 0).all()
    taken = {group: int(sizes[chosen][groups[chosen] == group].sum()) for group in set(groups.tolist())}
    assert sum(taken.values()) <= total
    # a group that is not taken whole lacks less than a document of what any other has
    for group, tokens in taken.items():
        whole = int(sizes[groups == group].sum())
        if tokens < whole:
            fair = min(total // len(taken), whole)
            assert tokens > fair - sizes[groups == group].max()


def test_each_group_is_spread_over_its_documents():
    sizes, groups = np.full(1000, 10), np.zeros(1000, np.int64)
    chosen = evenly(sizes, groups, 2000)
    assert len(chosen) == 200
    assert np.diff(np.concatenate([[-1], chosen, [1000]])).max() <= 12


def test_what_one_source_lacks_the_others_have(tmp_path):
    small = written(tmp_path / "small.jsonl", words(1, 0, 50, 2))
    large = [written(tmp_path / f"{name}.jsonl", words(name, 0, 50, 200)) for name in (2, 3)]
    found = select([small, *large], 2000, vocab_size=VOCABULARY)
    tokens = {path: sum(len(d.ids) for d in found if d.source == str(path)) for path in (small, *large)}
    assert tokens[small] == sum(len(ids) for ids in words(1, 0, 50, 2))
    rest = (2000 - tokens[small]) // 2
    assert all(rest - 40 < tokens[path] <= rest + 40 for path in large)


def test_clusters_hold_like_documents():
    kinds = [words(1, 0, 15, 90), words(2, 15, 30, 20), words(3, 30, 50, 40)]
    found = clusters([ids for kind in kinds for ids in kind], 3)
    labels = [set(part.tolist()) for part in np.split(found, [90, 110])]
    assert all(len(part) == 1 for part in labels)
    assert len(set.union(*labels)) == 3
    assert clusters([np.zeros(0, np.int32)], 3).tolist() == [0]


def test_clusters_get_equal_shares(tmp_path):
    rare = [ids for kind in range(8) for ids in words(kind, 15 + 4 * kind, 19 + 4 * kind, 10)]
    path = written(tmp_path / "a.jsonl", [*words(8, 0, 15, 300), *rare])
    found = select(path, 2000, by="cluster", vocab_size=VOCABULARY)
    tokens = sum(len(d.ids) for d in found)
    assert sum(len(d.ids) for d in found if d.ids[0] >= 15) / tokens > 0.4  # a fifth of the input


def slow_choice(found, traffic, total):
    """The greedy rule as it is said, looking at every document each time."""
    grams = [[tuple(ids[i : i + 3]) for i in range(len(ids) - 2)] for ids in found]
    worth = {}
    for ids in traffic:
        for i in range(len(ids) - 2):
            worth[tuple(ids[i : i + 3])] = worth.get(tuple(ids[i : i + 3]), 0) + 1
    chosen, open_ = [], list(range(len(found)))
    while open_:
        gains = {n: sum(worth.get(g, 0) for g in set(grams[n])) / len(found[n]) for n in open_}
        best = max(gains.values())
        number = min((n for n in open_ if gains[n] == best), key=lambda n: (n * 0x9E3779B97F4A7C15) % 2**64)
        open_.remove(number)
        if len(found[number]) <= total:
            chosen.append(number)
            total -= len(found[number])
            for gram in set(grams[number]):
                worth[gram] = worth.get(gram, 0) / 2
    return sorted(chosen)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1000), st.integers(1, 300))
@example(434, 67)  # gains that become equal
def test_traffic_is_covered_greedily(seed, total):
    found, traffic = words(seed, 0, 6, 25), words(seed + 1, 0, 6, 4)
    lists = [ids.tolist() for ids in found]
    assert most_useful(found, traffic, total).tolist() == slow_choice(
        lists, [t.tolist() for t in traffic], total
    )


def test_documents_like_the_traffic_are_taken(tmp_path):
    path = written(tmp_path / "a.jsonl", [*words(1, 0, 25, 300), *words(2, 25, 30, 60)])
    trace = tmp_path / "trace.jsonl"
    rows = [{"prompt_ids": [1], "response_ids": ids.tolist()} for ids in words(3, 25, 30, 20)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = select(path, 600, by="traffic", traffic=trace, vocab_size=VOCABULARY)
    assert found
    assert all(d.ids[0] >= 25 for d in found)


def test_commands_write_what_is_selected(tmp_path, capsys):
    paths = [str(written(tmp_path / f"{name}.jsonl", words(name, 0, 50, 50))) for name in (1, 2)]
    for by in ("source", "cluster"):
        found = select(paths, 500, by=by, vocab_size=VOCABULARY)
        out, store = tmp_path / f"{by}.jsonl", tmp_path / f"{by}.sssd"
        size = ["--take", "500", "--by", by, "--vocab-size", str(VOCABULARY)]
        assert not main(["corpus", "select", *paths, "-o", str(out), *size])
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["input_ids"] for row in rows] == [d.ids.tolist() for d in found]
        assert not main(["build", "-o", str(store), *paths, *size])
        with Datastore.open(store) as opened:
            assert [ids.tolist() for ids in opened.documents()] == [d.ids.tolist() for d in found]
    capsys.readouterr()
    assert main(["corpus", "select", *paths, *size]) in (None, 0)
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_token_arrays_are_cut_at_end_tokens(tmp_path):
    np.save(tmp_path / "a.npy", np.array([3, 4, 0, 5, 0, 6], np.int32))
    found = select(tmp_path / "a.npy", 100, vocab_size=VOCABULARY, end_token_id=0)
    assert [d.ids.tolist() for d in found] == [[3, 4, 0], [5, 0], [6]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"take": 0}, "at least 1"),
        ({"by": "size"}, "source, cluster, traffic"),
        ({"by": "traffic"}, "recorded requests"),
        ({"traffic": ["x"]}, "recorded requests"),
        ({"vocab_size": None}, "--vocab-size"),
        ({"vocab_size": 3}, "outside"),
    ],
)
def test_what_cannot_be_selected_is_refused(tmp_path, options, said):
    path = written(tmp_path / "a.jsonl", words(1, 5, 50, 3))
    options = {"take": 10, "vocab_size": VOCABULARY, **options}
    with pytest.raises(SssdError, match=said):
        select(path, options.pop("take"), **options)
    assert WAYS == ("source", "cluster", "traffic")


def test_nothing_to_select_from(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(EmptyCorpusError):
        select(tmp_path / "a.jsonl", 10, vocab_size=VOCABULARY)
    with pytest.raises(InvalidArgumentError):
        select(tmp_path / "a.jsonl", 10)
