"""A corpus in a folder: what its operations do, what they refuse, and what readers and other writers see."""

import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from folders import VOCABULARY, document, held, opened, records

from sssd import Drafter
from sssd.corpus import Corpus, files
from sssd.corpus import manifest as module
from sssd.corpus.manifest import Manifest, Part, Segment, manifest_from_bytes
from sssd.datastore import Datastore, DatastoreBuilder, build
from sssd.errors import (
    CorpusError,
    CorruptCorpusError,
    CorruptDatastoreError,
    DatastoreVersionError,
    EmptyCorpusError,
    InvalidArgumentError,
    InvalidTokenError,
    LockedError,
    VocabularyMismatchError,
)
from sssd.reading.options import ReadOptions


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path / "corpus", grace=0)


def add(corpus: Corpus, *serials: int, **options: object) -> object:
    return corpus.add(records(*serials), vocab_size=VOCABULARY, **{"id_field": "id", **options})  # type: ignore[arg-type]


def tokens(*serials: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(document(serial)) for serial in serials)


class TestAdding:
    def test_documents_come_back_with_what_was_said_of_them(self, corpus: Corpus) -> None:
        add(corpus, 1, 2, source="x", metadata={"lang": "en"}, added=7)
        found = list(corpus.documents())
        assert [(d.ids.tolist(), d.source, d.added, d.metadata) for d in found] == [
            (document(serial), "x", 7, {"lang": "en"}) for serial in (1, 2)
        ]
        assert found[0].ids.dtype == np.int32

    def test_files_folders_and_datastores(self, corpus: Corpus, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in/a.jsonl").write_text(json.dumps({"ids": document(1)}))
        np.array([*document(2), 11, *document(3), 11], np.uint16).tofile(tmp_path / "in/b.bin")
        with DatastoreBuilder(tmp_path / "c.sssd", vocab_size=VOCABULARY) as builder:
            builder.add(document(4))
            builder.add([])
        inputs = [tmp_path / "in", tmp_path / "c.sssd"]
        added = corpus.add(inputs, vocab_size=VOCABULARY, end_token_id=11)
        ended = [(*document(serial), 11) for serial in (2, 3)]
        assert held(corpus) == tokens(1, 4) + Counter(ended)
        names = [part.source for segment in added.manifest.segments for part in segment.parts]
        assert names == [str(tmp_path / name) for name in ("c.sssd", "in/a.jsonl", "in/b.bin")]

    def test_equal_additions_count_once(self, corpus: Corpus, tmp_path: Path) -> None:
        add(corpus, 1, 2)
        before = corpus.manifest
        assert add(corpus, 1, 2, source="other").known
        assert corpus.manifest == before
        with DatastoreBuilder(tmp_path / "c.sssd", vocab_size=VOCABULARY) as builder:
            builder.add(document(1))
            builder.add(document(2))
        assert corpus.add([tmp_path / "c.sssd"]).known
        assert corpus.adopt([tmp_path / "c.sssd"]).known
        corpus.remove(ids=[1], merge=False)
        assert not add(corpus, 1, 2).known
        assert held(corpus) == tokens(1, 2, 2)

    def test_equal_files_become_one(self, corpus: Corpus) -> None:
        """The contents of a segment of which something is deleted, once more."""
        add(corpus, 1, 2, merge=False)
        corpus.remove(ids=[1], merge=False)
        add(corpus, 1, 2, merge=False)
        assert held(corpus) == tokens(1, 2, 2)
        assert len({segment.uuid for segment in corpus.manifest.segments}) == len(corpus.manifest.segments)

    def test_known_documents_are_left_out_on_request(self, corpus: Corpus) -> None:
        add(corpus, 1, 2)
        add(corpus, 3, merge=False)
        assert add(corpus, 3, 4, 4, 1, deduplicate=True).duplicates == 3
        assert held(corpus) == tokens(1, 2, 3, 4)
        corpus.remove(ids=[1], merge=False)
        assert add(corpus, 1, deduplicate=True).documents == 1

    def test_at_most_four_segments_whatever_comes(self, corpus: Corpus) -> None:
        for serial in range(30):
            add(corpus, *range(serial * 7, serial * 7 + 1 + serial % 7))
            assert len(files(corpus.path)) <= 4

    def test_nothing_is_an_error_and_makes_no_corpus(self, corpus: Corpus) -> None:
        with pytest.raises(EmptyCorpusError):
            corpus.add([[{"ids": []}]], vocab_size=VOCABULARY)
        with pytest.raises(CorpusError, match="is no corpus"):
            _ = corpus.manifest

    def test_what_cannot_be_read_changes_nothing(self, corpus: Corpus) -> None:
        add(corpus, 1)
        before = corpus.manifest
        with pytest.raises((CorpusError, InvalidTokenError)):
            corpus.add([[{"ids": document(2)}, {"ids": [VOCABULARY]}]])
        with pytest.raises(CorpusError, match="'id' must be an id"):
            corpus.add([[{"ids": document(2)}]], id_field="id")
        assert corpus.manifest == before
        assert (
            corpus.add(
                [[{"ids": [VOCABULARY]}, {"ids": document(2)}]], options=ReadOptions(skip_bad=True)
            ).documents
            == 1
        )

    def test_its_own_files_are_no_input(self, corpus: Corpus, tmp_path: Path) -> None:
        add(corpus, 1)
        (tmp_path / "a.jsonl").write_text(json.dumps({"ids": document(2)}))
        assert corpus.add([tmp_path]).documents == 1
        with pytest.raises(CorpusError, match="is the output"):
            corpus.add([corpus.path / "manifest.json"])

    def test_other_vocabularies_and_tokenizers_are_refused(self, corpus: Corpus, tmp_path: Path) -> None:
        tokenizers = pytest.importorskip("tokenizers")

        def tokenizer(*words: str) -> object:
            vocabulary = {word: at for at, word in enumerate(words)}
            made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[0]))
            made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
            return made

        corpus.add([["b a"]], tokenizer=tokenizer("a", "b"))
        with pytest.raises(VocabularyMismatchError, match="another tokenizer"):
            corpus.add([["b a"]], tokenizer=tokenizer("b", "a"))
        with pytest.raises(VocabularyMismatchError, match="of 2 tokens, not of 3"):
            corpus.add([[{"ids": [1]}]], vocab_size=3)
        with DatastoreBuilder(tmp_path / "x.sssd", vocab_size=2, fingerprint=bytes(31) + b"1") as builder:
            builder.add([1])
        with pytest.raises(VocabularyMismatchError, match=r"x\.sssd"):
            corpus.add([tmp_path / "x.sssd"])
        with pytest.raises(VocabularyMismatchError, match=r"x\.sssd"):
            corpus.adopt([tmp_path / "x.sssd"])

    @pytest.mark.parametrize(
        "options",
        [{"added": -1}, {"metadata": {"a": "x" * 5000}}, {"source": "\ud800"}, {"max_memory": 0}],
    )
    def test_wrong_arguments(self, corpus: Corpus, options: dict[str, object]) -> None:
        with pytest.raises(InvalidArgumentError):
            add(corpus, 1, **options)


class TestDeleting:
    def test_a_source_is_gone_at_once_and_for_good(self, corpus: Corpus) -> None:
        secret = VOCABULARY
        for serial in range(12):
            text = document(serial)
            if serial % 3 == 1:  # what nobody else says
                text[5:7] = [secret, secret]
            corpus.add(
                [[{"ids": text}]],
                vocab_size=VOCABULARY + 1,
                source=f"user/{serial % 3}",
                merge=serial % 2 == 0,
            )

        def seen() -> tuple[int, set[int], set[int]]:
            """The secret's occurrences, what may follow the text before it, and what is drafted there."""
            with opened(corpus.path) as store:
                before = [document(serial)[:5] for serial in range(12)]
                follow = {
                    int(ids[0]) for text in before for ids in store.continuations(text[-2:], max_tokens=1)
                }
                drafter = Drafter(datastore=store)
                trees = [drafter.begin(text).draft(64) for text in before]
                return (
                    store.count([secret]),
                    follow,
                    {int(token) for tree in trees for token in tree.token_ids},
                )

        count, follow, drafted = seen()
        assert count == 8
        assert secret in follow & drafted
        manifest = corpus.remove(source="user/1", merge=False).manifest
        assert any(segment.dead for segment in manifest.segments)
        for whole in (False, True):
            if whole:
                corpus.merge(whole=True)
                names = os.listdir(corpus.path)
                assert not any(name.endswith((".dead.npy", ".tombstones")) for name in names)
                assert sum(name.endswith(".sssd") for name in names) == 1
            count, follow, drafted = seen()
            assert count == 0
            assert secret not in follow | drafted

    def test_a_segment_that_is_half_dead_is_written_anew(self, corpus: Corpus) -> None:
        add(corpus, 1, source="a")
        add(corpus, 2, 3, source="b", merge=False)
        corpus.merge(whole=True)
        assert corpus.remove(source="a").manifest.segments[0].dead is not None
        assert corpus.remove(source="b").manifest.segments[0].documents == 0
        assert held(corpus) == Counter()
        add(corpus, 4)
        assert held(corpus) == tokens(4)

    def test_by_age(self, corpus: Corpus) -> None:
        now = int(time.time())
        for days in (40, 20, 0):
            add(corpus, days, added=now - 86400 * days)
        assert corpus.expire(timedelta(days=30)).documents == 1
        assert corpus.remove(before=now - 86400).documents == 1
        assert held(corpus) == tokens(0)
        assert corpus.expire(max_tokens=0).documents == 1

    def test_something_must_be_said(self, corpus: Corpus) -> None:
        add(corpus, 1)
        for call in (corpus.remove, corpus.expire):
            with pytest.raises(InvalidArgumentError, match="say what"):
                call()
        with pytest.raises(InvalidArgumentError, match="several ids"):
            corpus.remove(ids="12")
        assert corpus.remove(source="nothing").documents == 0


def hold(path: Path, ready: "multiprocessing.synchronize.Event", seconds: float) -> None:
    with Corpus(path)._writing():
        ready.set()
        time.sleep(seconds)


class TestOthers:
    def test_two_writers_take_turns_and_a_dead_one_holds_nothing(self, corpus: Corpus) -> None:
        add(corpus, 1)
        spawn = multiprocessing.get_context("spawn")
        ready = spawn.Event()
        other = spawn.Process(target=hold, args=(corpus.path, ready, 60))
        other.start()
        assert ready.wait(60)
        with pytest.raises(LockedError, match="another process"):
            Corpus(corpus.path, timeout=0.1).add(records(2))
        other.kill()
        other.join()
        Corpus(corpus.path, timeout=5).add(records(2))
        threads = [threading.Thread(target=add, args=(corpus, serial)) for serial in range(3, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert held(corpus) == tokens(*range(1, 9))

    def test_readers_keep_their_version_and_open_whole_ones_during_merges(self, corpus: Corpus) -> None:
        for serial in range(4):
            add(corpus, serial, merge=False)
        first = opened(corpus.path)
        stop, failed = threading.Event(), []

        def read() -> None:
            while not stop.is_set():
                try:
                    with Datastore.open(corpus.path) as store:
                        assert store.count([]) % 9 == 0
                    assert sum(held(corpus).values()) >= 4
                except Exception as error:
                    failed.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        for serial in range(4, 30):
            add(corpus, serial)
            corpus.merge(whole=serial % 3 == 0)
        stop.set()
        reader.join()
        assert failed == []
        with first:
            assert first.count([]) == 36
            first.verify()

    def test_files_stay_for_slow_readers(self, tmp_path: Path) -> None:
        corpus = Corpus(tmp_path / "corpus", grace=60)
        add(corpus, 1)
        listed = files(corpus.path)
        for serial in range(2, 9):
            add(corpus, serial)
        assert corpus.manifest.retired
        assert all(path.exists() for path, _ in listed)
        Corpus(corpus.path, grace=0).merge()
        assert not any(path.exists() for path, _ in listed)
        assert not corpus.manifest.retired.keys() & set(os.listdir(corpus.path))

    def test_what_killed_writers_left_is_deleted_and_nothing_else(self, corpus: Corpus) -> None:
        add(corpus, 1)
        orphan = corpus.path / "00000000-0000-0000-0000-000000000000.sssd"
        mine = corpus.path / "notes.txt"
        for path in (orphan, mine, corpus.path / ".work/half"):
            path.write_text("x")
        assert any("belongs to no version" in line for line in corpus.verify())
        add(corpus, 2)
        assert not orphan.exists()
        assert mine.exists()
        assert not (corpus.path / ".work/half").exists()


class TestShards:
    @pytest.mark.parametrize("files_", [1, 5])
    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
    def test_shares_are_the_whole_in_any_order(
        self, tmp_path: Path, files_: int, order: tuple[int, ...]
    ) -> None:
        paths = [tmp_path / f"{at}.jsonl" for at in range(files_)]
        for at, path in enumerate(paths):
            path.write_text("\n".join(json.dumps({"ids": document(s)}) for s in range(at, 30, files_)))
        corpus = Corpus(tmp_path / "corpus")
        for share in order:
            options = ReadOptions(shard=(share, 3))
            corpus.add(paths, vocab_size=VOCABULARY, options=options, added=share)
            if share == order[0]:
                with pytest.raises(CorpusError, match="missing"):
                    corpus.adopt()
        added = corpus.adopt()
        assert held(corpus) == tokens(*range(30))
        assert not (corpus.path / "shards").exists()
        other = Corpus(tmp_path / "other")
        for share in range(3):
            other.add(paths, vocab_size=VOCABULARY, options=ReadOptions(shard=(share, 3)))
        assert [s.uuid for s in other.adopt().manifest.segments] == [s.uuid for s in added.manifest.segments]

    def test_token_arrays_are_shared_by_documents(self, tmp_path: Path) -> None:
        stream = [token for serial in range(20) for token in [*document(serial), 12]]
        np.array(stream, np.uint16).tofile(tmp_path / "a.bin")
        corpus = Corpus(tmp_path / "corpus")
        for share in range(4):
            corpus.add(
                [tmp_path / "a.bin"], vocab_size=13, end_token_id=12, options=ReadOptions(shard=(share, 4))
            )
        assert corpus.adopt().documents == 20

    def test_build_takes_shares_too(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"ids": document(s)}) for s in range(7)))
        for share in range(3):
            options = ReadOptions(shard=(share, 3))
            build(tmp_path / "a.jsonl", tmp_path / f"{share}.sssd", vocab_size=VOCABULARY, options=options)
        corpus = Corpus(tmp_path / "corpus")
        assert corpus.adopt(tmp_path.glob("*.sssd")).documents == 7
        assert held(corpus) == tokens(*range(7))

    def test_more_shares_than_documents(self, tmp_path: Path) -> None:
        corpus = Corpus(tmp_path / "corpus")
        for share in range(4):
            corpus.add(records(1, 2), vocab_size=VOCABULARY, options=ReadOptions(shard=(share, 4)))
        corpus.adopt()
        assert held(corpus) == tokens(1, 2)

    def test_corpora_are_taken_over_with_what_is_deleted(self, corpus: Corpus, tmp_path: Path) -> None:
        other = Corpus(tmp_path / "other")
        add(other, 1, 2, source="x")
        add(other, 3, 4, 5, source="y", merge=False)
        other.remove(ids=[4], merge=False)
        add(corpus, 6)
        assert corpus.adopt([other.path]).documents == 4
        assert held(corpus) == tokens(1, 2, 3, 5, 6)
        assert corpus.remove(source="x").documents == 2
        assert other.verify() == corpus.verify() == []


class TestManifest:
    def test_every_changed_byte_is_noticed(self, corpus: Corpus) -> None:
        add(corpus, 1, 2, source="é", metadata={"a": "b"})
        corpus.remove(ids=[1], merge=False)
        data = (corpus.path / "manifest.json").read_bytes()
        manifest = corpus.manifest
        assert manifest_from_bytes(manifest.to_bytes(), "x") == manifest
        for at in range(len(data)):
            changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            try:
                assert manifest_from_bytes(changed, "x") == manifest
            except (CorruptCorpusError, DatastoreVersionError):
                continue
            assert changed.split() == data.split() or data[at : at + 1].isspace()
        for end in range(0, len(data) - 2, 7):
            with pytest.raises(CorruptCorpusError):
                manifest_from_bytes(data[:end], "x")

    @pytest.mark.parametrize(
        "change",
        [
            {"uuid": "../../etc/passwd"},
            {"table": "/etc/passwd"},
            {"tokens": -1},
            {"tokens": 1 << 70},
            {"tokens": 1.5},
            {"documents": True},
            {"parts": "x"},
            {"dead": {"flags": "../x", "tombstones": "y"}},
            {"more": 1},
        ],
    )
    def test_forged_ones_are_refused(self, corpus: Corpus, change: dict[str, object]) -> None:
        add(corpus, 1)
        content = json.loads((corpus.path / "manifest.json").read_bytes())
        content["segments"][0].update(change)
        rest = {key: value for key, value in content.items() if key not in ("format", "version", "checksum")}
        content["checksum"] = module._checksum(rest)
        with pytest.raises(CorruptCorpusError, match="damaged"):
            manifest_from_bytes(json.dumps(content).encode(), "x")

    @pytest.mark.parametrize(
        "data", [b"", b"[]", b"{}", b"[" * 100_000, b'{"format": NaN}', b"\xff", b"1" * 5000]
    )
    def test_nonsense_is_refused(self, data: bytes) -> None:
        with pytest.raises(CorruptCorpusError):
            manifest_from_bytes(data, "x")

    def test_other_versions_are_refused(self) -> None:
        with pytest.raises(DatastoreVersionError, match="version 2"):
            manifest_from_bytes(b'{"format": "sssd corpus", "version": 2}', "x")

    def test_one_that_would_be_too_long_is_not_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_BYTES", 1 << 16)
        parts = (Part("x" * 4096, 0, 1, 1),) * 16
        segment = Segment("0" * 8, len(parts), len(parts), 0, 0, "", parts)
        with pytest.raises(CorpusError, match="--source"):
            Manifest("0" * 32, 0, 2, None, 0, (segment,)).to_bytes()


class TestVerify:
    @pytest.mark.parametrize("suffix", [".sssd", ".documents.npy", ".dead.npy", ".tombstones"])
    def test_damage_is_found_and_not_merged(self, corpus: Corpus, suffix: str) -> None:
        add(corpus, 1, 2, 3)
        corpus.remove(ids=[2], merge=False)
        assert corpus.verify() == []
        (path,) = corpus.path.glob(f"*{suffix}")
        data = bytearray(path.read_bytes())
        data[-5 if suffix != ".sssd" else 4096] ^= 1
        path.write_bytes(data)
        assert len(corpus.verify()) == 1
        if suffix != ".tombstones":
            with pytest.raises(CorruptDatastoreError):
                corpus.merge(whole=True)
        path.unlink()
        assert len(corpus.verify()) == 1

    def test_a_manifest_that_is_damaged_is_named(self, corpus: Corpus) -> None:
        add(corpus, 1)
        (corpus.path / "manifest.json").write_text("{")
        assert "manifest.json is damaged" in corpus.verify()[0]
