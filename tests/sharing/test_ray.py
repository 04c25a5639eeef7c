"""Replicas and builds on a real Ray with several worker processes, some of which are killed."""

import collections
import contextlib
import logging
import os
import sys
import time

import pytest

from sssd import Datastore, Drafter
from sssd.corpus import Corpus
from sssd.datastore import build as build_datastore
from sssd.errors import CorpusError, EmptyCorpusError, InvalidArgumentError
from sssd.rollout import Rollouts
from sssd.sharing import MAX_RECORD_BYTES, Replica

ray = pytest.importorskip("ray", reason="needs the package ray: pip install 'sssd[ray]'")
pytest.importorskip("ray.data", reason="needs Ray Data: pip install 'sssd[ray]'")

from sssd.ray import build, build_segments  # noqa: E402
from sssd.sharing.ray import Keeper, RayLog  # noqa: E402

# Ray's own threads, pipes and deprecations are not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = list(range(50))


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=2,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        configure_logging=False,
        _node_ip_address="127.0.0.1",
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray").setLevel("ERROR")
    logging.getLogger("ray.data").setLevel("ERROR")
    # workers do not find the modules of tests
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def words(count, start=0):
    return [{"ids": [(n * n + k) % 90 for k in range(5 + n % 7)]} for n in range(start, start + count)]


class Splitter:
    """A tokenizer of a letter a token, which kills its process at a text that says so, once."""

    def __init__(self, folder):
        self.folder = folder

    def get_vocab(self):
        return {chr(code): code for code in range(128)}

    def encode(self, text, add_special_tokens=False):
        if text.startswith("note"):
            with (self.folder / "encoded").open("a") as file:
                file.write(f"{text}\n")
        if text.startswith("kill"):
            with contextlib.suppress(FileExistsError):
                (self.folder / "killed").touch(exist_ok=False)
                os.kill(os.getpid(), 9)
        return [ord(letter) for letter in text if ord(letter) < 128]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids))


def uuids(paths):
    return [Datastore.open(path).info.files[0].uuid for path in paths]


def test_segments_are_equal_whatever_the_workers(tmp_path):
    rows = words(103)
    made = {}
    for blocks, cores in ((1, 1), (7, 1), (20, 2)):
        dataset = ray.data.from_items(rows, override_num_blocks=blocks)
        paths = build_segments(
            dataset, tmp_path / f"{blocks}", shards=4, vocab_size=100, end_token_id=99, num_cpus=cores
        )
        made[blocks] = [path.read_bytes() for path in paths]
    assert made[1] == made[7] == made[20]
    assert len(set(made[1])) == 4
    # and are those of a build here
    single = build_datastore([rows], tmp_path / "all.sssd", vocab_size=100, end_token_id=99)
    with Datastore.open(sorted((tmp_path / "1").iterdir())) as shards, Datastore.open(single.path) as whole:
        assert shards.info.documents == whole.info.documents == 103
        for ids in ([1, 2], [4, 5, 6], [99], [40, 41, 42, 43]):
            assert shards.count(ids) == whole.count(ids)
    (first, *_) = build_segments(
        ray.data.from_items(rows[:25]), tmp_path / "first", shards=1, vocab_size=100, end_token_id=99
    )
    assert first.read_bytes() == made[1][0]


def test_a_killed_worker_costs_its_shard_only(tmp_path):
    texts = [f"note {n} and what it says" for n in range(40)]
    texts[25] = "kill"
    dataset = ray.data.from_items([{"text": text} for text in texts])
    paths = build_segments(dataset, tmp_path / "killed.d", shards=4, tokenizer=Splitter(tmp_path))
    assert (tmp_path / "killed").exists()
    # a batch of texts is begun again with its shard, and no other
    times = collections.Counter(
        int(line.split()[1]) for line in (tmp_path / "encoded").read_text().splitlines()
    )
    assert {n for n, count in times.items() if count > 1} <= set(range(20, 30))
    assert times[20] == 2
    again = build_segments(dataset, tmp_path / "again.d", shards=4, tokenizer=Splitter(tmp_path))
    assert uuids(paths) == uuids(again)
    assert Datastore.open(paths).info.documents == 40
    assert sorted(path.name for path in (tmp_path / "again.d").iterdir()) == [path.name for path in again]


def test_bad_rows_are_named_and_nothing_is_returned(tmp_path):
    rows = [{"text": str(n)} for n in range(10)]
    bad = [{"ids": [n]} for n in range(10)]
    bad[7] = {"ids": [200]}
    with pytest.raises(CorpusError, match=r"shard 1: .*row 3"):
        build_segments(ray.data.from_items(bad), tmp_path / "bad", shards=2, vocab_size=100)
    with pytest.raises(EmptyCorpusError):
        build_segments(
            ray.data.from_items([{"text": ""}]), tmp_path / "none", shards=3, tokenizer=Splitter(tmp_path)
        )
    with pytest.raises(InvalidArgumentError):
        build_segments(ray.data.from_items(rows), tmp_path / "text", shards=2, vocab_size=100)
    with pytest.raises(InvalidArgumentError):
        build_segments(ray.data.from_items(rows), tmp_path / "zero", shards=0, vocab_size=100)


def test_a_corpus_takes_all_segments_or_none(tmp_path):
    corpus = Corpus(tmp_path)
    dataset = ray.data.from_items(words(103))
    added = build(dataset, tmp_path, shards=6, vocab_size=100, source="today", merge=False)
    assert (added.documents, len(corpus.manifest.segments)) == (103, 6)
    before = sorted(tmp_path.iterdir())
    bad = ray.data.from_items([*words(20), {"ids": [200]}])
    with pytest.raises(CorpusError, match="shard 1"):
        build(bad, tmp_path, shards=2, vocab_size=100)
    assert sorted(tmp_path.iterdir()) == before
    # what is there already is not there twice
    assert build(dataset, tmp_path, shards=6, vocab_size=100, source="today", merge=False).documents == 0
    with Datastore.open(tmp_path) as store:
        assert store.info.documents == 103


@ray.remote(num_cpus=0)
class Worker:
    """A replica in a process of its own."""

    def __init__(self, log):
        self.drafter = Drafter(vocab_size=100)
        self.replica = Replica(self.drafter, RayLog(log), namespaces={""})

    def finish(self, text):
        self.replica.finish(self.drafter.begin(text))

    def draft(self, prompt):
        return self.drafter.begin(prompt).draft().token_ids.tolist()[:3]

    def metrics(self):
        return self.replica.metrics


def test_what_a_replica_has_finished_other_processes_draft():
    workers = [Worker.remote("one") for _ in range(3)]
    ray.get(workers[0].finish.remote(TEXT))
    ray.get(workers[1].finish.remote(TEXT[::-1]))
    for worker in workers:
        wait_until(lambda worker=worker: ray.get(worker.draft.remote(TEXT[10:15])) == TEXT[15:18])
        wait_until(lambda worker=worker: ray.get(worker.draft.remote([20, 19, 18, 17])) == [16, 15, 14])
    # a replica that is killed and started anew catches up
    ray.kill(workers[0])
    late = Worker.remote("one")
    wait_until(lambda: ray.get(late.metrics.remote())["learned"] == 2)
    assert ray.get(late.draft.remote(TEXT[10:15])) == TEXT[15:18]
    # so does everyone when the log itself is killed, for good even
    ray.kill(ray.get_actor("one", namespace="sssd"))
    ray.get(late.finish.remote([60, 61, 62, 63, 64, 65]))
    wait_until(lambda: ray.get(workers[1].draft.remote([60, 61, 62])) == [63, 64, 65])


def test_rollouts_draft_what_other_workers_have_finished():
    drafters = [Drafter(vocab_size=100) for _ in range(2)]
    workers = [
        Rollouts(drafter, Replica(drafter, RayLog("rollouts"), namespaces={"p"})) for drafter in drafters
    ]
    workers[0].begin("a", TEXT[:10], group="p").extend(TEXT[10:])
    workers[0].finish("a")
    asked = drafters[1].begin(TEXT[10:15], namespace="p")
    wait_until(lambda: asked.draft().token_ids.tolist()[:3] == TEXT[15:18])
    for worker in workers:
        worker.replica.close()


def test_the_log_is_bounded_and_gives_out_the_rest():
    writer, reader = RayLog("two", max_bytes=1000), RayLog("two", max_bytes=1000)
    for number in range(20):
        writer.publish(b"%d" % number * 50)
    found = reader.poll()
    first = next(found)
    rest = list(reader.poll())
    assert [first, *rest] == [b"%d" % number * 50 for number in range(10, 20)]
    assert list(reader.poll()) == []
    for record in (b"", bytes(MAX_RECORD_BYTES + 1)):
        with pytest.raises(InvalidArgumentError):
            writer.publish(record)
    with pytest.raises(InvalidArgumentError):
        RayLog(timeout=0)
    writer.close()


def test_the_actor_keeps_what_it_may(monkeypatch):
    keeper = Keeper(10_000_000, 3600.0)
    for number in range(9):
        keeper.publish(bytes([number]) * (1 << 20))
    life, place, found = keeper.read(b"another life", 77)
    assert (place, [record[0] for record in found]) == (0, [0, 1, 2, 3])
    assert [record[0] for record in keeper.read(life, 4)[2]] == [4, 5, 6, 7]
    keeper.publish(bytes(2 << 20))
    assert keeper.read(life, 0)[1] == 2
    assert keeper.read(life, 10)[2] == []
    later = time.monotonic() + 7200
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert keeper.read(life, 0)[1:] == (10, [])
