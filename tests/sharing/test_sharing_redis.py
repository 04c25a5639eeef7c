"""Replicas over a real Redis server, which is paused, killed, emptied and started again."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest

from sssd import Drafter
from sssd.errors import InvalidArgumentError
from sssd.sharing import MAX_RECORD_BYTES, Replica

redis = pytest.importorskip("redis", reason="needs the package redis: pip install 'sssd[redis]'")
SERVER = shutil.which("redis-server")
if SERVER is None:
    pytest.skip("needs redis-server: apt-get install redis-server", allow_module_level=True)

from sssd.sharing.redis import RedisLog  # noqa: E402

TEXT = list(range(50))


class Server:
    """A server of the test's own, on this machine only."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.url = folder, f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self):
        options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self.folder)]
        self.process = subprocess.Popen(
            [SERVER, "--port", str(self.port), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        client = redis.Redis.from_url(self.url)
        for _ in range(600):
            with contextlib.suppress(redis.ConnectionError):
                client.ping()
                client.close()
                return
            time.sleep(0.05)
        pytest.fail("redis-server did not start")

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def server(shared_server):
    with redis.Redis.from_url(shared_server.url) as client:
        client.flushall()
    return shared_server


def replica(server, drafter=None, **options):
    drafter = drafter or Drafter(vocab_size=100)
    return Replica(drafter, RedisLog(server.url, timeout=0.5), namespaces={""}, **options)


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def drafts(one, start):
    return one.drafter.begin(TEXT[start : start + 5]).draft().token_ids.tolist()[:3]


def test_a_log_gives_out_what_was_published_in_its_order(server):
    writer, reader = RedisLog(server.url), RedisLog(server.url)
    records = [b"%d" % number for number in range(100)]
    for record in records:
        writer.publish(record)
    some = reader.poll()
    assert [next(some) for _ in range(3)] == records[:3]
    assert list(reader.poll()) == records[3:]
    assert list(reader.poll()) == []
    assert list(writer.poll()) == records
    with redis.Redis.from_url(server.url, decode_responses=False) as client:
        client.xadd("sssd:finished", {"other": "field"})
        writer.publish(b"more")
        assert list(reader.poll()) == [b"more"]
        client.delete("sssd:finished")
        client.set("sssd:finished", "no stream")
        with pytest.raises(redis.ResponseError):
            list(reader.poll())
        with pytest.raises(redis.ResponseError):
            writer.publish(b"more")
    writer.close()
    reader.close()


def test_the_stream_is_bounded(server):
    log = RedisLog(server.url, max_records=100)
    for _ in range(1000):
        log.publish(b"x")
    assert 100 <= len(list(log.poll())) < 400
    old = RedisLog(server.url, "old", keep_seconds=3600)
    with redis.Redis.from_url(server.url) as client:
        client.xadd("old", {"record": "old"}, id="1-1")
        old.publish(b"new")
        assert [fields for _, fields in client.xrange("old")] == [{b"record": b"new"}]
    log.close()
    old.close()


def test_what_one_has_finished_the_other_drafts_and_who_starts_anew_catches_up(server):
    with replica(server) as one, replica(server) as two:
        one.finish(one.drafter.begin(TEXT))
        wait_until(lambda: two.metrics["learned"])
        assert drafts(two, 10) == TEXT[15:18]
        two.finish(two.drafter.begin(TEXT[::-1]))
        wait_until(lambda: one.metrics["learned"])
    with replica(server) as late:
        wait_until(lambda: late.metrics["learned"] == 2)
        assert drafts(late, 10) == TEXT[15:18]
        assert late.metrics["errors"] == 0


def test_a_server_that_hangs_or_dies_keeps_nobody_waiting(server):
    with replica(server) as one, replica(server) as two:
        server.signal(signal.SIGSTOP)
        try:
            # each of these would wait for the half second that the client waits
            for _ in range(300):
                one.finish(one.drafter.begin(TEXT))
                assert drafts(one, 10) == TEXT[15:18]
            wait_until(lambda: one.metrics["failing"])
        finally:
            server.signal(signal.SIGCONT)
        wait_until(lambda: two.metrics["learned"] == 300)
        server.kill()
        one.finish(one.drafter.begin([60, 61, 62, 63, 64, 65]))
        wait_until(lambda: one.metrics["failing"] and two.metrics["failing"])
        assert two.metrics["learned"] == 300
        # the new one has none of the old one's data
        server.start()
        wait_until(lambda: two.metrics["learned"] == 301)
        assert not two.metrics["failing"]
        assert two.drafter.begin([60, 61, 62]).draft().token_ids.tolist()[:2] == [63, 64]
        assert (one.metrics["dropped"], two.metrics["damaged"]) == (0, 0)


def test_a_server_that_counts_from_below_is_read_from_its_start(server):
    reader = RedisLog(server.url)
    with redis.Redis.from_url(server.url) as client:
        client.xadd("sssd:finished", {"record": "old"}, id="99999999999999-1")
        assert list(reader.poll()) == [b"old"]
        server.kill()
        with pytest.raises(redis.ConnectionError):
            list(reader.poll())
        server.start()
    writer = RedisLog(server.url)
    writer.publish(b"new")
    assert list(reader.poll()) == [b"new"]
    reader.close()
    writer.close()


def test_wrong_arguments_are_refused(server):
    for options in ({"max_records": 0}, {"keep_seconds": 0}, {"timeout": 0}):
        with pytest.raises(InvalidArgumentError):
            RedisLog(server.url, **options)
    with (
        redis.Redis.from_url(server.url, decode_responses=True) as client,
        pytest.raises(InvalidArgumentError),
    ):
        RedisLog(client)
    with redis.Redis.from_url(server.url) as client:
        log = RedisLog(client)
        for record in (b"", bytes(MAX_RECORD_BYTES + 1)):
            with pytest.raises(InvalidArgumentError):
                log.publish(record)
        log.publish(bytes(MAX_RECORD_BYTES))
        assert list(log.poll()) == [bytes(MAX_RECORD_BYTES)]


def test_a_forked_child_leaves_the_connection_alone(server):
    with replica(server) as one, replica(server) as two:
        one.finish(one.drafter.begin(TEXT))
        wait_until(lambda: two.metrics["learned"] == 1)
        child = os.fork()
        if not child:
            one.finish(one.drafter.begin([1, 2, 3, 4]))
            one.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        one.finish(one.drafter.begin(TEXT[::-1]))
        wait_until(lambda: two.metrics["learned"] == 2)
        assert two.metrics["errors"] == one.metrics["errors"] == 0
