"""Corpora on other file systems: what is copied, when it is seen, and what interrupted copies leave."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import VOCABULARY, held, records

from sssd.corpus import Corpus, pull, push
from sssd.corpus.manifest import is_own
from sssd.errors import CorpusError, CorruptCorpusError, InvalidArgumentError, OutputError

fsspec = pytest.importorskip("fsspec")
COUNTER = itertools.count()


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://corpus-{next(COUNTER)}" if request.param == "memory" else f"file://{tmp_path}/remote"


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    corpus = Corpus(tmp_path / "corpus", grace=0)
    add(corpus, range(20), "a")
    add(corpus, range(20, 24), "b")
    return corpus


def add(corpus: Corpus, serials: range, source: str) -> None:
    corpus.add(records(*serials), vocab_size=VOCABULARY, source=source, id_field="id")


def names(url: str) -> set[str]:
    system, path = fsspec.core.url_to_fs(url)
    return {Path(name).name for name in system.ls(path, detail=False)}


def test_only_what_is_missing_is_copied(corpus: Corpus, url: str, tmp_path: Path) -> None:
    copy = Corpus(tmp_path / "copy", grace=0)
    assert push(corpus.path, url).files == len(corpus.manifest.files)
    assert push(corpus.path, url).files == 0
    assert pull(url, copy.path).files == len(corpus.manifest.files)
    assert pull(url, copy.path).files == 0
    corpus.remove(source="b", merge=False)
    assert push(corpus.path, url).files == pull(url, copy.path).files == 2
    assert copy.manifest.version == corpus.manifest.version
    assert held(copy) == held(corpus)
    add(corpus, range(30, 31), "c")
    push(corpus.path, url), pull(url, copy.path, grace=0)
    assert held(copy) == held(corpus)
    assert copy.verify() == []
    assert copy.manifest.files == {p.name for p in copy.path.iterdir() if is_own(p.name)}
    # what the version before last has needed is gone
    for serial in range(31, 36):
        add(corpus, range(serial, serial + 1), "c")
        push(corpus.path, url)
    assert len(names(url)) <= 1 + 2 * 8


def test_versions_that_do_not_stem_from_one_another_are_kept(
    corpus: Corpus, url: str, tmp_path: Path
) -> None:
    copy = Corpus(tmp_path / "copy", grace=0)
    push(corpus.path, url), pull(url, copy.path)
    add(copy, range(50, 51), "here")
    with pytest.raises(OutputError, match="does not stem from"):
        pull(url, copy.path)
    add(corpus, range(60, 61), "there")
    push(corpus.path, url)
    with pytest.raises(OutputError, match="does not stem from"):
        push(copy.path, url)
    assert push(copy.path, url, force=True).files > 0
    pull(url, corpus.path)  # which has nothing that it has not pushed
    assert held(corpus) == held(copy)
    add(corpus, range(70, 71), "there")
    push(corpus.path, url), pull(url, copy.path)
    assert held(corpus) == held(copy)


class Failing:
    """Fails at a call of a file system, counted over those that move bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, url: str, at: int) -> None:
        system, _ = fsspec.core.url_to_fs(url)
        self.calls, self.at = 0, at
        for name in ("put_file", "pipe_file", "mv", "open", "rm_file", "ls"):
            monkeypatch.setattr(system, name, self.wrapped(getattr(system, name)))

    def wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls > self.at:
                raise RuntimeError("the network is down")
            return real(*arguments, **named)

        return run


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_copy_that_breaks_off_leaves_the_old_version_and_goes_on(
    corpus: Corpus, url: str, tmp_path: Path, direction: str
) -> None:
    copy, check = tmp_path / "copy", tmp_path / "check"
    push(corpus.path, url), pull(url, copy)
    old = held(corpus)
    corpus.remove(source="b", merge=False)
    add(corpus, range(40, 60), "c")
    new = held(corpus)
    if direction == "pull":
        push(corpus.path, url)
    outcomes = []
    for at in range(40):
        with pytest.MonkeyPatch.context() as monkeypatch:
            failing = Failing(monkeypatch, url, at)
            try:
                push(corpus.path, url) if direction == "push" else pull(url, copy)
            except OSError as error:
                raised = str(error)
            else:
                assert failing.calls <= at
                break
            assert "the network is down" in raised
        if direction == "push":
            shutil.rmtree(check, ignore_errors=True)
            pull(url, check)
        outcomes.append(held(Corpus(check if direction == "push" else copy)))
        assert outcomes[-1] in (old, new)
    assert outcomes[0] == old
    pull(url, copy)
    assert held(Corpus(copy)) == new
    assert Corpus(copy).verify() == []


def test_a_pull_goes_on_in_the_middle_of_a_file(corpus: Corpus, tmp_path: Path) -> None:
    url = f"memory://corpus-{next(COUNTER)}"
    push(corpus.path, url)
    (tmp_path / "copy/.pull").mkdir(parents=True)
    segment = corpus.manifest.segments[0].file
    data = (corpus.path / segment).read_bytes()
    for start in (data[:1000], b"x" * 1000):  # its beginning, and something else
        (tmp_path / "copy/.pull" / segment).write_bytes(start)
        pull(url, tmp_path / "copy")
        assert held(Corpus(tmp_path / "copy")) == held(corpus)
        assert not (tmp_path / "copy/.pull").exists()
        shutil.rmtree(tmp_path / "copy")
        (tmp_path / "copy/.pull").mkdir(parents=True)


@pytest.mark.parametrize("suffix", [".sssd", ".documents.npy", ".tombstones", "manifest.json"])
def test_damage_on_the_way_is_noticed_before_it_is_seen(corpus: Corpus, tmp_path: Path, suffix: str) -> None:
    url, copy = f"memory://corpus-{next(COUNTER)}", tmp_path / "copy"
    push(corpus.path, url), pull(url, copy)
    old = held(corpus)
    corpus.remove(ids=[21], merge=False)
    corpus.add(records(*range(40, 60)), source="c", merge=False)
    push(corpus.path, url)
    system, path = fsspec.core.url_to_fs(url)
    names_there = [name for name in system.ls(path, detail=False) if name.endswith(suffix)]
    for name in names_there:
        data = bytearray(system.cat_file(name))
        data[len(data) // 2] ^= 1
        system.pipe_file(name, bytes(data))
    with pytest.raises(CorruptCorpusError):
        pull(url, copy)
    assert held(Corpus(copy)) == old
    assert Corpus(copy).verify() == []


def test_damage_is_not_pushed(corpus: Corpus, url: str) -> None:
    path = corpus.path / corpus.manifest.segments[0].table
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptCorpusError):
        push(corpus.path, url)
    with pytest.raises(CorpusError, match="is no corpus"):
        pull(url, corpus.path.with_name("copy"))


def test_urls_that_are_none(corpus: Corpus) -> None:
    with pytest.raises(InvalidArgumentError, match="nothing"):
        push(corpus.path, "nothing://x")
