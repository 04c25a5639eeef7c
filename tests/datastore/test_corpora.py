"""The datastores of a drafter: chosen by name for each sequence, and replaced under running ones."""

import gc
import os
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sssd import Datastore, DatastoreBuilder, Drafter, DraftTree, Sequence
from sssd._core import write_tombstones
from sssd.errors import CorruptDatastoreError, InvalidArgumentError, VocabularyMismatchError

OPTIONS: dict[str, Any] = {"live_bytes": 0, "soft_bytes": 0, "threads": 1}
NAMES = ["code", "de", "en"]
PROMPT = [1, 2, 3]


def build(path: Path, *documents: list[int], vocab_size: int = 100, fingerprint: bytes | None = None) -> Path:
    with DatastoreBuilder(path, vocab_size=vocab_size, fingerprint=fingerprint) as builder:
        for document in documents:
            builder.add(document)
    return path


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    """Stores, each of which goes on after the prompt in its own way."""
    return {name: build(tmp_path / name, [*PROMPT, 10 * n, 10 * n + 1]) for n, name in enumerate(NAMES, 1)}


def drafted(tree: DraftTree) -> tuple[list[int], list[int], list[float]]:
    return tree.token_ids.tolist(), tree.parents.tolist(), tree.probs.tolist()


def after(sequence: Sequence) -> set[int]:
    """The tokens drafted after the prompt."""
    tree = sequence.draft(32)
    return set(tree.token_ids[tree.parents == -1].tolist())


def test_a_sequence_matches_what_it_chooses(paths: dict[str, Path]) -> None:
    drafter = Drafter(datastore=paths, **OPTIONS)
    expected = {"code": 10, "de": 20, "en": 30}
    for names in (["code"], ["en", "de", "en"], [], NAMES, ("de",), {"code", "en"}):
        for background in (False, True):
            with drafter.begin(PROMPT, datastores=names, background=background) as sequence:
                while not sequence.ready:
                    pass
                assert after(sequence) == {expected[name] for name in names}, names
                assert after(sequence.fork()) == {expected[name] for name in names}, (
                    "forks inherit the choice"
                )
    assert after(drafter.begin(PROMPT)) == {10, 20, 30}
    with drafter.begin(PROMPT) as every, drafter.begin(PROMPT, datastores=["de"]) as one:
        trees = drafter.draft_batch([every, one], 32)
        assert [set(trees[at].token_ids[trees[at].parents == -1].tolist()) for at in (0, 1)] == [
            {10, 20, 30},
            {20},
        ]


def test_drafts_are_those_of_a_drafter_with_these_files_alone(paths: dict[str, Path]) -> None:
    chosen = Drafter(datastore=paths, **OPTIONS).begin(PROMPT, datastores=["en", "code"])
    alone = Drafter(datastore=[paths["code"], paths["en"]], **OPTIONS).begin(PROMPT)
    assert drafted(chosen.draft(32)) == drafted(alone.draft(32))


def test_names_that_are_none(paths: dict[str, Path]) -> None:
    drafter = Drafter(datastore=paths, **OPTIONS)
    with pytest.raises(InvalidArgumentError, match='no datastore "fr"; the drafter has "code", "de", "en"'):
        drafter.begin(PROMPT, datastores=["en", "fr"])
    with pytest.raises(InvalidArgumentError, match="the drafter has none"):
        Drafter().begin(PROMPT, datastores=["en"])
    for bad in ("en", 3, [3]):
        with pytest.raises(TypeError, match="name"):
            drafter.begin(PROMPT, datastores=bad)  # type: ignore[arg-type]
    single = Drafter(datastore=paths["de"], **OPTIONS)
    assert after(single.begin(PROMPT, datastores=[""])) == {20}
    assert after(single.begin(PROMPT, datastores=[])) == set()
    with pytest.raises(TypeError, match="name"):
        Drafter(datastore={3: paths["de"]})  # type: ignore[dict-item]


def test_the_open_stores_are_there_by_name(paths: dict[str, Path]) -> None:
    given = Datastore.open(paths["de"])
    drafter = Drafter(datastore={**paths, "de": given}, **OPTIONS)
    given.close()
    assert {name: store.info.files[0].path for name, store in drafter.datastores.items()} == paths
    whole = drafter.datastore
    assert whole is not None
    assert whole.count([]) == 15
    whole.close()
    drafter.datastores["de"].close()
    assert after(drafter.begin(PROMPT)) == {10, 20, 30}, "closing what the getters give closes nothing here"
    assert (Drafter().datastore, Drafter().datastores) == (None, {})
    assert after(drafter.begin(PROMPT).drafter.begin(PROMPT, datastores=["de"])) == {20}


def test_stores_that_do_not_go_together(tmp_path: Path, paths: dict[str, Path]) -> None:
    build(tmp_path / "small", [1], vocab_size=50)
    with pytest.raises(VocabularyMismatchError, match="a vocabulary of"):
        Drafter(datastore={**paths, "small": tmp_path / "small"})
    with pytest.raises(VocabularyMismatchError, match="the model only 60"):
        Drafter(datastore=paths, vocab_size=60)


def test_reopening_swaps_under_running_sequences(tmp_path: Path, paths: dict[str, Path]) -> None:
    drafter = Drafter(datastore=paths, **OPTIONS)
    every, some = drafter.begin(PROMPT), drafter.begin(PROMPT, datastores=["de"])
    assert drafter.reopen() is False
    assert (after(every), after(some)) == ({10, 20, 30}, {20})
    build(paths["de"], [*PROMPT, 77])
    assert (after(every), after(some)) == ({10, 20, 30}, {20}), "a reader keeps its version"
    assert drafter.reopen() is True
    assert drafter.reopen() is False
    assert (after(every), after(some), after(some.fork())) == ({10, 77, 30}, {77}, {77})
    assert drafter.reopen({"de": paths["en"], "fr": paths["code"]}) is True
    assert (after(every), after(some)) == ({10, 30}, {30})
    assert drafter.reopen({"fr": paths["code"]}) is True
    assert (after(every), after(some)) == ({10}, set()), "a name that is gone matches nothing"
    assert drafter.reopen(Datastore.open(paths["en"])) is True
    assert after(every) == {30}
    assert drafter.reopen({}) is True
    assert (after(every), drafter.datastore) == (set(), None)
    assert Drafter().reopen() is False


def test_tombstones_are_reopened_too(tmp_path: Path) -> None:
    path, dead = build(tmp_path / "store", [*PROMPT, 10], [*PROMPT, 20]), tmp_path / "dead"
    store = Datastore.open(path)
    write_tombstones(store, [False, False], dead)
    drafter = Drafter(datastore=Datastore.open(path, tombstones=[dead]), **OPTIONS)
    sequence = drafter.begin(PROMPT)
    assert after(sequence) == {10, 20}
    assert drafter.reopen() is False
    write_tombstones(store, [True, False], dead)
    assert drafter.reopen() is True
    assert after(sequence) == {20}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    old=st.lists(st.lists(st.integers(0, 4), max_size=20), max_size=5),
    new=st.lists(st.lists(st.integers(0, 4), max_size=20), max_size=5),
    history=st.lists(st.integers(0, 4), min_size=1, max_size=20),
)
def test_drafts_after_reopening_are_those_of_a_new_drafter(
    old: list[list[int]], new: list[list[int]], history: list[int], tmp_path: Path
) -> None:
    path = build(tmp_path / "store", *old, vocab_size=5)
    drafter = Drafter(datastore=path, **OPTIONS)
    running = drafter.begin(history[:1])
    running.extend(history[1:])
    build(path, *new, vocab_size=5)
    drafter.reopen()
    fresh = Drafter(datastore=path, **OPTIONS).begin(history[:1])
    fresh.extend(history[1:])
    assert drafted(running.draft(32)) == drafted(fresh.draft(32))


@pytest.mark.parametrize("damage", ["vocabulary", "tokenizer", "truncated", "missing"])
def test_wrong_stores_are_refused_and_the_old_one_stays(tmp_path: Path, damage: str) -> None:
    path = build(tmp_path / "store", [*PROMPT, 10], fingerprint=bytes(range(32)))
    drafter = Drafter(datastore=path, **OPTIONS)
    sequence = drafter.begin(PROMPT)
    wanted: dict[str, tuple[type[Exception], Callable[[], object]]] = {
        "vocabulary": (VocabularyMismatchError, lambda: build(path, [1], vocab_size=99)),
        "tokenizer": (VocabularyMismatchError, lambda: build(path, [1], fingerprint=bytes(32 * [7]))),
        "truncated": (
            CorruptDatastoreError,
            lambda: (
                (tmp_path / "part").write_bytes(path.read_bytes()[:-1]),
                (tmp_path / "part").rename(path),
            ),
        ),
        "missing": (FileNotFoundError, path.unlink),
    }
    raised, change = wanted[damage]
    change()
    for _ in range(2):
        with pytest.raises(raised):
            drafter.reopen()
        assert after(sequence) == {10}
        assert drafter.metrics["datastore_lost"] == 0


def test_each_draft_goes_by_one_version(tmp_path: Path) -> None:
    """Stores that differ everywhere: a draft of both would be neither's."""
    rng = np.random.default_rng(0)
    versions = [rng.integers(0, 50, size=4000).tolist() for _ in range(2)]
    path = build(tmp_path / "store", versions[0])
    context = [7]
    expected = []
    for version in versions:
        build(path, version)
        expected.append(drafted(Drafter(datastore=path, **OPTIONS).begin(context).draft(64)))
    assert expected[0] != expected[1]
    drafter = Drafter(datastore=path, **OPTIONS)
    seen: list[Any] = []
    done = threading.Event()

    def draft() -> None:
        sequence = drafter.begin(context)
        while not done.is_set():
            seen.append(drafted(sequence.draft(64)))
            with drafter.begin(context, datastores=[]) as other:
                assert len(other.draft(8)) == 0

    threads = [threading.Thread(target=draft) for _ in range(2)]
    threads += [threading.Thread(target=lambda: [drafter.reopen() for _ in range(20)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(60):
        build(path, versions[turn % 2])
        drafter.reopen()
    done.set()
    for thread in threads:
        thread.join()
    assert all(found in expected for found in seen)
    assert {expected.index(found) for found in seen} == {0, 1}


def mapped(path: Path) -> int:
    """How often a file is mapped, deleted or not."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(path) in line for line in lines)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_old_maps_go(tmp_path: Path) -> None:
    path = build(tmp_path / "store", [*PROMPT, 10])
    drafter = Drafter(datastore=path, **OPTIONS)
    sequences = [drafter.begin(PROMPT, datastores=choice) for choice in (None, [""], [])]
    once = mapped(path)
    assert once > 0
    for turn in range(5):
        build(path, [*PROMPT, 20 + turn])
        assert drafter.reopen()
        assert after(sequences[0]) == {20 + turn}
        assert mapped(path) == once
    del sequences, drafter
    gc.collect()
    assert mapped(path) == 0


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Stands in for ``sssd.corpus``: a folder holds what its file ``list`` names."""
    module = types.ModuleType("sssd.corpus")

    def opened(folder: str) -> list[tuple[Path, Path | None, None]]:
        lines = (Path(folder) / "list").read_text().split()
        return [(Path(folder) / line, None, None) for line in lines]

    module.opened = opened  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sssd.corpus", module)
    return module


def test_a_folder_is_a_corpus(
    tmp_path: Path, corpus: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, token in (("a", 10), ("b", 20), ("c", 30)):
        build(tmp_path / name, [*PROMPT, token])
    (tmp_path / "list").write_text("a b")
    monkeypatch.chdir(tmp_path)
    drafter = Drafter(datastore=".", **OPTIONS)
    monkeypatch.chdir("/")
    sequence = drafter.begin(PROMPT)
    assert after(sequence) == {10, 20}
    assert Datastore.open(tmp_path).count(PROMPT) == 2
    given = Drafter(datastore=Datastore.open(str(tmp_path)), **OPTIONS)
    (tmp_path / "list").write_text("b c")
    (tmp_path / "a").unlink()
    assert after(sequence) == {10, 20}, "what is open stays readable"
    assert drafter.reopen()
    assert given.reopen()
    assert drafter.datastores[""].info.documents == 2
    assert (after(sequence), after(given.begin(PROMPT))) == ({20, 30}, {20, 30})
    (tmp_path / "list").write_text("")
    assert drafter.reopen()
    assert (after(sequence), drafter.datastore, drafter.datastores) == (set(), None, {})
    with pytest.raises(InvalidArgumentError, match="no document"):
        Datastore.open(tmp_path)
    (tmp_path / "list").write_text("c")
    assert drafter.reopen()
    assert after(sequence) == {30}


def test_files_that_a_merge_takes_away_meanwhile(tmp_path: Path, corpus: types.ModuleType) -> None:
    build(tmp_path / "merged", [*PROMPT, 10])
    listed = []

    def opened(folder: str) -> list[tuple[Path, Path | None, None]]:
        listed.append(folder)
        return [(tmp_path / ("merged" if len(listed) % 7 == 0 else "gone"), None, None)]

    corpus.opened = opened  # type: ignore[attr-defined]
    assert after(Drafter(datastore=tmp_path, **OPTIONS).begin(PROMPT)) == {10}
    assert len(listed) == 7
    listed.clear()
    corpus.opened = lambda folder: [(Path(os.fspath(folder)) / "gone", listed.append(folder), None)]  # type: ignore[attr-defined]
    with pytest.raises(FileNotFoundError):
        Datastore.open(tmp_path)
    assert len(listed) == 10
