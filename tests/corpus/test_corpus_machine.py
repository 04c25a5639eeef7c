"""Whatever is done to a corpus, and whenever a writer is killed, it holds what a list of documents holds.

``SSSD_EXAMPLES`` sets the number of runs.
"""

import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from folders import VOCABULARY, document, held, occurrences, opened, records
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sssd.corpus import Corpus
from sssd.corpus.policy import MAX_SEGMENTS

SOURCES = ("a/1", "a/2", "b")
CALLS = ("replace", "fsync", "unlink", "open")


@dataclass(frozen=True)
class Held:
    """A document of the oracle."""

    serial: int
    source: str
    added: int

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(document(self.serial))


class CorpusMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        memory = "/dev/shm"  # nothing here takes the power away, and syncing takes time
        self.folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
        self.corpus = Corpus(self.folder / "corpus", grace=0)
        self.serial = self.time = 0
        self.model: list[Held] = []
        self.last: tuple[list[int], str] | None = None
        self.merged = True
        self.chance = random.Random(0)
        self.new(["a/1"], merge=True, deduplicate=False)

    def teardown(self) -> None:
        # what a killed writer has left is named, and the next writer deletes it
        assert all("a writer was killed" in problem for problem in self.corpus.verify())
        self.corpus.merge()
        assert self.corpus.verify() == []
        shutil.rmtree(self.folder)

    def add(self, serials: list[int], source: str, **options: bool) -> None:
        self.corpus.add(
            records(*serials), vocab_size=VOCABULARY, source=source, id_field="id", added=self.time, **options
        )

    @rule(
        sources=st.lists(st.sampled_from(SOURCES), min_size=1, max_size=3),
        merge=st.booleans(),
        deduplicate=st.booleans(),
    )
    def new(self, sources: list[str], merge: bool, deduplicate: bool) -> None:
        """Documents that are new."""
        for source in sources:
            count = self.chance.randint(1, 4)
            serials = list(range(self.serial, self.serial + count))
            self.serial, self.time = self.serial + count, self.time + 1
            self.add(serials, source, merge=merge, deduplicate=deduplicate)
            self.model += [Held(serial, source, self.time) for serial in serials]
            self.last, self.merged = (serials, source), merge

    @precondition(lambda self: self.model)
    @rule(source=st.sampled_from(SOURCES))
    def some_known(self, source: str) -> None:
        """A document that is there and one that is not, without what is known."""
        known = self.chance.choice(self.model).serial
        self.time += 1
        self.add([known, self.serial], source, deduplicate=True)
        self.model.append(Held(self.serial, source, self.time))
        self.serial, self.last, self.merged = self.serial + 1, None, True

    @rule()
    def again(self) -> None:
        """The last addition once more."""
        if self.last and {one.serial for one in self.model} >= set(self.last[0]):
            before = self.corpus.manifest
            self.add(*self.last)
            assert self.corpus.manifest == before

    @rule(pattern=st.sampled_from(["a/1", "a/*", "b", "nothing"]), merge=st.booleans())
    def remove_source(self, pattern: str, merge: bool) -> None:
        gone = [one for one in self.model if fnmatchcase(one.source, pattern)]
        assert self.corpus.remove(source=pattern, merge=merge).documents == len(gone)
        self.forget(gone, merge)

    @precondition(lambda self: self.model)
    @rule(merge=st.booleans())
    def remove_ids(self, merge: bool) -> None:
        gone = self.chance.sample(self.model, min(len(self.model), 2))
        found = self.corpus.remove(ids=[one.serial for one in gone], merge=merge)
        assert found.documents == len(gone)
        self.forget(gone, merge)

    @rule(back=st.integers(0, 6), source=st.sampled_from([None, "a/*"]), merge=st.booleans())
    def remove_before(self, back: int, source: str | None, merge: bool) -> None:
        before = max(self.time - back, 0)
        gone = [one for one in self.model if one.added < before and (source is None or "a/" in one.source)]
        assert self.corpus.remove(before=before, source=source, merge=merge).documents == len(gone)
        self.forget(gone, merge)

    @rule(tokens=st.integers(0, 200), merge=st.booleans())
    def expire(self, tokens: int, merge: bool) -> None:
        gone: list[Held] = []
        left = list(self.model)
        for added in sorted({one.added for one in self.model}):
            if sum(len(one.tokens) for one in left) <= tokens:
                break
            gone += [one for one in left if one.added == added]
            left = [one for one in left if one.added != added]
        assert self.corpus.expire(max_tokens=tokens, merge=merge).documents == len(gone)
        self.forget(gone, merge)

    def forget(self, gone: list[Held], merge: bool) -> None:
        self.model = [one for one in self.model if one not in gone]
        self.merged = self.merged or merge

    @rule(whole=st.booleans())
    def merge(self, whole: bool) -> None:
        manifest = self.corpus.merge(whole=whole)
        assert not any(segment.dead for segment in manifest.segments)
        assert len(manifest.segments) == 1 or not whole
        self.merged = True

    @rule(what=st.sampled_from(["add", "remove", "merge"]), call=st.integers(0, 25))
    def killed(self, what: str, call: int) -> None:
        """A writer is killed before a system call: what it did is done, or not at all."""
        serials = [self.serial, self.serial + 1]
        self.serial, self.time, self.last = self.serial + 2, self.time + 1, None
        work: dict[str, Callable[[], object]] = {
            "add": lambda: self.add(serials, "b"),
            "remove": lambda: self.corpus.remove(source="b"),
            "merge": lambda: self.corpus.merge(whole=True),
        }
        after = {
            "add": self.model + [Held(serial, "b", self.time) for serial in serials],
            "remove": [one for one in self.model if one.source != "b"],
            "merge": self.model,
        }[what]
        in_a_child(work[what], call)
        found = held(self.corpus)
        outcomes = [model for model in (self.model, after) if found == tokens_of(model)]
        assert outcomes
        self.model = outcomes[-1]

    @invariant()
    def reads_as_the_model(self) -> None:
        assert held(self.corpus) == tokens_of(self.model)
        documents = [list(one.tokens) for one in self.model]
        manifest = self.corpus.manifest
        assert manifest.tokens == sum(map(len, documents))
        if self.merged:
            assert len(manifest.segments) <= MAX_SEGMENTS
        queries = [[self.chance.randrange(6) for _ in range(length)] for length in (1, 1, 2, 3)]
        queries += [document(self.chance.randrange(self.serial + 1))[-length:] for length in (1, 3, 5)]
        with opened(self.corpus.path) as store:
            assert store.count([]) == manifest.tokens
            for query in queries:
                assert store.count(query) == occurrences(documents, query)


def tokens_of(model: list[Held]) -> Counter[tuple[int, ...]]:
    return Counter(one.tokens for one in model)


def in_a_child(work: Callable[[], object], call: int) -> None:
    """Does it in another process, which dies before one of its calls to the system, or after all of them."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return
    calls = 0

    def deadly(real: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls > call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return run

    try:
        for name in CALLS:
            setattr(os, name, deadly(getattr(os, name)))
        work()
        os._exit(0)
    finally:
        os._exit(1)


CorpusMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("SSSD_EXAMPLES", "20")),
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestCorpusMachine = CorpusMachine.TestCase
