"""Replicas and their log: a model of many with every fault there is, and the real thread."""

import gc
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from sssd import Drafter
from sssd.errors import InvalidArgumentError, InvalidTokenError, MemoryLimitError
from sssd.requests import Requests
from sssd.sharing import Record, Replica
from sssd.sharing.exchange import Allowance, Exchange, Limits, Window

TEXT = [7, 3, 9, 4, 1, 8, 2, 6, 5, 11, 10, 13, 12, 14, 15, 17, 16, 19, 18, 20]


class MemoryLog:
    """A log in memory. ``faults`` are exceptions, and records that come twice, to be met one after the
    other.
    """

    def __init__(self, records, faults=None):
        self.records, self.faults, self.place, self.is_closed = (
            records,
            faults if faults is not None else [],
            0,
            False,
        )

    def publish(self, record):
        fault = self.faults.pop() if self.faults else None
        if fault == "lost":
            raise OSError("lost on the way")
        self.records.append(record)
        if fault == "unanswered":
            raise TimeoutError("written, and no answer")

    def poll(self):
        while self.place < len(self.records):
            fault = self.faults.pop() if self.faults else None
            if fault in ("lost", "unanswered"):
                raise OSError("no answer")
            if fault == "again":
                self.place = max(self.place - 3, 0)
            self.place += 1
            yield self.records[self.place - 1]

    def close(self):
        self.is_closed = True


class Learned:
    """In place of a drafter: what it was told."""

    vocab_size = 1000

    def __init__(self):
        self.texts = []

    def learn(self, token_ids, *, namespace=""):
        self.texts.append((namespace, *token_ids.tolist()))


def exchange(drafter, log, namespaces=frozenset({"", "a"}), key=None, **limits):
    given = {
        "max_tokens": 50,
        "queue_bytes": 1 << 20,
        "learn_share": 1.0,
        "learn_bytes": 1e12,
        "interval": 1e-9,
    }
    return Exchange(drafter, log, namespaces, None, key, Limits(**{**given, **limits}))


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


class Deployment(RuleBasedStateMachine):
    """Replicas that finish requests, start anew and meet faults. In the end each has learned, once, all that
    was published and is not its own.
    """

    replicas = st.integers(0, 3)

    def __init__(self):
        super().__init__()
        self.records, self.count = [], 0
        self.faults = [[] for _ in range(4)]
        self.lives = [[] for _ in range(4)]
        for place in range(4):
            self.begin(place)

    def begin(self, place):
        drafter = Learned()
        self.lives[place] = [drafter, exchange(drafter, MemoryLog(self.records, self.faults[place])), []]

    @rule(place=replicas, namespace=st.sampled_from(["", "a"]), length=st.integers(1, 80))
    def finish(self, place, namespace, length):
        _, one, own = self.lives[place]
        self.count += 1
        text = [*range(length), *divmod(self.count, 1000)]
        one.put(namespace, np.int32(text))
        own.append((namespace, *text[-50:]))

    @rule(place=replicas)
    def turn(self, place):
        self.lives[place][1].turn()

    @rule(
        place=replicas, faults=st.lists(st.sampled_from(["lost", "unanswered", "again", "none"]), max_size=6)
    )
    def break_down(self, place, faults):
        self.faults[place].extend(faults)

    @rule(place=replicas)
    def restart(self, place):
        """What was not published yet is lost."""
        self.begin(place)

    @rule(place=replicas, bytes=st.binary(max_size=200))
    def write_rubbish(self, place, bytes):
        self.records.append(bytes)

    @invariant()
    def nothing_is_learned_twice(self):
        for drafter, _, _ in self.lives:
            assert len(drafter.texts) == len(set(drafter.texts))

    def teardown(self):
        for faults in self.faults:
            faults.clear()
        for _ in range(2):
            for _, one, _ in self.lives:
                one.turn()
                time.sleep(1e-8)
        published = set()
        for data in self.records:
            try:
                record = Record.decode(data)
            except Exception:
                continue
            published.add((record.namespace, *record.token_ids.tolist()))
        for drafter, _, own in self.lives:
            assert set(own) <= published
            assert set(drafter.texts) | set(own) == published
            assert len(drafter.texts) == len(set(drafter.texts))


def test_replicas_end_with_the_same_texts_whatever_breaks():
    full = "SSSD_FULL_TESTS" in os.environ
    run_state_machine_as_test(
        Deployment,
        settings=settings(
            max_examples=2000 if full else 60,
            stateful_step_count=40,
            deadline=None,
            # a smaller example takes minutes to find
            phases=Phase if full else [Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_what_comes_twice_is_learned_once():
    records, drafter = [], Learned()
    sender = exchange(Learned(), MemoryLog(records, ["unanswered"]))
    reader = exchange(drafter, MemoryLog(records, ["again"]))
    sender.put("", np.int32(TEXT))
    for _ in range(3):
        sender.turn()
        reader.turn()
    assert len(records) == 2
    assert drafter.texts == [("", *TEXT)]
    assert (reader.metrics["duplicate"], sender.metrics["errors"], sender.metrics["own"]) == (1, 1, 2)


def test_what_is_lost_is_sent_again():
    records = []
    sender = exchange(Learned(), MemoryLog(records, ["lost", "lost"]))
    sender.put("", np.int32(TEXT))
    for _ in range(4):
        sender.turn()
    assert [Record.decode(record).token_ids.tolist() for record in records] == [TEXT]
    assert (sender.metrics["published"], sender.metrics["dropped"], sender.metrics["failing"]) == (1, 0, 0)


@example([1024, 0])
@given(st.lists(st.integers(0, 3000)))
def test_a_window_takes_each_number_once(numbers):
    window, seen, highest = Window(), set(), -1
    for number in numbers:
        highest = max(highest, number)
        assert window.take(number) == (number not in seen and highest - number < 1024)
        seen.add(number)


def test_a_window_costs_nothing_for_any_number():
    window = Window()
    assert window.take(2**64 - 1)
    assert not window.take(0)


def test_an_allowance_is_paid_back():
    allowance = Allowance(1000.0)
    assert allowance.wait() == 0
    allowance.spend(3000)
    assert 1.5 < allowance.wait() <= 2


def test_only_what_may_be_learned_is_learned():
    records = []
    drafter = Learned()
    sender = exchange(drafter, MemoryLog(records), {"", "secret", "a"})
    for namespace in ("", "secret", "a"):
        sender.put(namespace, np.int32(TEXT))
    sender.turn()
    ours = Record.decode(records[0])
    for change in (
        *(
            {"vocab_size": 999},
            {"fingerprint": bytes(31) + b"1"},
            {"vocab_size": 0, "token_ids": np.int32([1000])},
        ),
        {"vocab_size": 0, "token_ids": np.int32([1, -1, 5]), "fingerprint": None},
    ):
        fields = {**vars(ours), "origin": os.urandom(16), **change}
        records.append(Record(**fields).encode())
    records.append(Record(**{**vars(ours), "number": 9}).encode(key=b"another's"))
    reader = Exchange(
        drafter, MemoryLog(records), {"", "a"}, bytes(31) + b"2", None, Limits(50, 1 << 20, 1.0, 1e12, 1e-9)
    )
    reader.turn()
    assert drafter.texts == [("", *TEXT), ("a", *TEXT), ("", 1, -1, 5)]
    assert (reader.metrics["refused"], reader.metrics["damaged"], reader.metrics["learned"]) == (4, 1, 3)
    sender.turn()
    assert sender.metrics["own"] == 3


def test_with_a_key_only_what_was_written_with_it_is_learned():
    records = []
    for key in (b"ours", b"theirs", None):
        sender = exchange(Learned(), MemoryLog(records), key=key)
        sender.put("", np.int32(TEXT))
        sender.turn()
    drafter = Learned()
    reader = exchange(drafter, MemoryLog(records), key=b"ours")
    reader.turn()
    assert drafter.texts == [("", *TEXT)]
    assert reader.metrics["damaged"] == 2


def test_what_does_not_fit_into_memory_is_refused_and_the_next_is_learned():
    records = []
    sender = exchange(Learned(), MemoryLog(records))
    sender.put("", np.int32(TEXT))
    sender.put("a", np.int32(TEXT))
    sender.turn()

    class Full(Learned):
        def learn(self, token_ids, *, namespace=""):
            if not namespace:
                raise MemoryLimitError("full")
            super().learn(token_ids, namespace=namespace)

    drafter = Full()
    reader = exchange(drafter, MemoryLog(records))
    reader.turn()
    assert drafter.texts == [("a", *TEXT)]
    assert (reader.metrics["refused"], reader.metrics["errors"]) == (1, 0)


def test_the_queue_is_bounded_and_the_oldest_go():
    records = []
    one = exchange(Learned(), MemoryLog(records), queue_bytes=400)
    for number in range(10):
        one.put("", np.int32([number] * 100))
        assert one.metrics["queued_bytes"] <= 400
    one.turn()
    sent = [Record.decode(record) for record in records]
    assert [record.token_ids[0] for record in sent] == [8, 9]
    assert all(record.start == 50 and len(record.token_ids) == 50 for record in sent)
    assert one.metrics["dropped"] == 8


def test_a_record_that_the_log_will_never_take_keeps_nobody_waiting(monkeypatch):
    class Picky(MemoryLog):
        def publish(self, record):
            if Record.decode(record).token_ids[0] == 1:
                raise InvalidArgumentError("not this one")
            if Record.decode(record).token_ids[0] == 2:
                raise OSError("never")
            super().publish(record)

    records = []
    one = exchange(Learned(), Picky(records))
    for number in range(4):
        one.put("", np.int32([number] * 5))
    one.turn()
    assert (len(records), one.metrics["dropped"], one.metrics["errors"]) == (1, 1, 1)
    monkeypatch.setattr("sssd.sharing.exchange._GIVE_UP", 0.0)
    one.turn()
    one.turn()
    assert (len(records), one.metrics["dropped"], one.metrics["queued_bytes"]) == (2, 2, 0)


def test_learning_keeps_to_its_bytes_a_second():
    records = []
    sender = exchange(Learned(), MemoryLog(records))
    for _ in range(100):
        sender.put("", np.int32([1] * 50))
    sender.turn()
    size = len(records[0])
    drafter = Learned()
    reader = exchange(drafter, MemoryLog(records), learn_bytes=10.0 * size)
    pause = reader.turn()
    assert 10 <= len(drafter.texts) <= 12
    assert pause > 0


class StuckLog:
    """A log whose calls do not return until they may. It notes the threads that had to wait."""

    def __init__(self):
        self.go_on, self.waited = threading.Event(), set()

    def publish(self, record):
        self.waited.add(threading.current_thread().name)
        # a minute in all, should `finish` wait as well
        if not self.go_on.wait(60):
            self.go_on.set()

    def poll(self):
        self.publish(b"")
        return []

    def close(self):
        pass


def test_a_log_that_hangs_keeps_neither_finish_nor_drafts_nor_close_waiting():
    log, drafter = StuckLog(), Drafter(vocab_size=100)
    replica = Replica(drafter, log, namespaces={""}, max_tokens=20, queue_bytes=800)
    for _ in range(50):
        sequence = drafter.begin(TEXT)
        replica.finish(sequence)
        assert sequence.closed
    assert drafter.begin(TEXT[:6]).draft().token_ids.tolist()[:3] == TEXT[6:9]
    assert replica.metrics["dropped"] >= 38
    replica.close(timeout=0.01)
    assert replica.closed
    replica.finish(drafter.begin(TEXT))
    assert log.waited == {"sssd-sharing"}
    log.go_on.set()


def test_what_one_has_finished_the_others_draft():
    records = []
    drafters = [Drafter(vocab_size=100) for _ in range(3)]
    replicas = [Replica(one, MemoryLog(records), namespaces={"a"}) for one in drafters]
    requests = Requests(drafters[0], replicas[0])
    requests.begin("1", TEXT[:5], namespace="a").extend(TEXT[5:])
    requests.finish("1")
    # a namespace that is not shared stays at home
    replicas[0].finish(drafters[0].begin([40, 41, 42, 43, 44]))
    for drafter, replica in zip(drafters[1:], replicas[1:], strict=True):
        wait_until(lambda replica=replica: replica.metrics["learned"] == 1)
        tree = drafter.begin(TEXT[:6], namespace="a").draft()
        assert tree.token_ids.tolist()[:3] == TEXT[6:9]
        assert len(drafter.begin(TEXT[:6]).draft()) == 0
        assert replica.metrics["learned_tokens"] == len(TEXT)
    assert len(records) == 1
    for replica in replicas:
        replica.close()
    assert replicas[0].metrics["published"] == 1


def test_closing_publishes_what_waits_and_closes_the_log():
    log = MemoryLog([])
    with Replica(Drafter(vocab_size=100), log, namespaces={""}) as replica:
        for _ in range(100):
            replica.share(TEXT)
    assert (len(log.records), log.is_closed, replica.closed) == (100, True, True)
    replica.close()
    replica.share(TEXT)
    assert len(log.records) == 100


def test_a_replica_that_nobody_holds_ends_its_thread():
    log = MemoryLog([])
    replica = Replica(Drafter(vocab_size=100), log, namespaces={""})
    (thread,) = (one for one in threading.enumerate() if one.name == "sssd-sharing")
    replica.share(TEXT)
    del replica
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
    assert (len(log.records), log.is_closed) == (1, True)


def test_the_end_of_the_interpreter_publishes_what_waits_and_a_fork_shares_nothing(tmp_path):
    code = f"""
import os, sys, sssd
from sssd.sharing import FolderLog, Replica
replica = Replica(sssd.Drafter(vocab_size=100), FolderLog({str(tmp_path)!r}), namespaces={{""}})
child = os.fork()
text = {TEXT} if child else [1, 2, 3, 4]
replica.finish(replica.drafter.begin(text))
assert replica.closed == (not child)
if child:
    assert os.waitpid(child, 0)[1] == 0
sys.exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code],
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    from sssd.sharing import FolderLog

    records = [Record.decode(data) for data in FolderLog(tmp_path).poll()]
    assert [record.token_ids.tolist() for record in records] == [TEXT]


def test_nothing_happens_at_import():
    code = """
import sys, threading, sssd, sssd.sharing
assert threading.active_count() == 1
assert not {"redis", "ray"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], timeout=60, check=True)


def test_prometheus_reads_what_is_counted():
    pytest.importorskip("prometheus_client")
    from sssd.metrics import SHARING_GAUGES, Collector

    with Replica(Drafter(vocab_size=100), MemoryLog([]), namespaces={""}) as replica:
        replica.share(TEXT)
        wait_until(lambda: replica.metrics["published"] == 1)
        families = {family.name: family for family in Collector(replica.drafter, replica=replica).collect()}
        for name, value in replica.metrics.items():
            family = families[f"sssd_sharing_{name}"]
            assert family.type == ("gauge" if name in SHARING_GAUGES else "counter")
            assert family.samples[0].value == value


def test_wrong_arguments_are_refused():
    drafter, log = Drafter(vocab_size=100), MemoryLog([])
    for options in (
        *({"namespaces": "tenant"}, {"namespaces": None}, {"fingerprint": b"short"}, {"key": b""}),
        *({"key": bytes(65)}, {"max_tokens": 0}, {"max_tokens": 1 << 20}, {"queue_bytes": 4}),
        *({"learn_share": 0.0}, {"learn_share": 1.5}, {"learn_bytes": 0}, {"interval": 0.0}),
    ):
        with pytest.raises(InvalidArgumentError):
            Replica(drafter, log, **{"namespaces": {""}, **options})
    with Replica(drafter, log, namespaces={""}) as replica, pytest.raises(InvalidTokenError):
        replica.share([0.5, 1.0])
    assert not [one for one in threading.enumerate() if one.name == "sssd-sharing"]
