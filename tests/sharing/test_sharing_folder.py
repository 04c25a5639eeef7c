"""The log in a folder: torn and damaged files, rotation, expiry, writers that are killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sssd.errors import InvalidArgumentError
from sssd.sharing import MAX_RECORD_BYTES, FolderLog
from sssd.sharing import folder as module


def files(folder):
    return sorted(folder.glob("*.log"), key=lambda path: (path.stat().st_mtime_ns, path.name))


def test_each_reads_what_all_others_wrote(tmp_path):
    logs = [FolderLog(tmp_path) for _ in range(3)]
    for number in range(10):
        for log in logs:
            log.publish(b"%d" % number)
    for log in logs:
        assert sorted(log.poll()) == sorted([b"%d" % number for number in range(10)] * 2)
        assert list(log.poll()) == []
    late = FolderLog(tmp_path)
    assert sorted(late.poll()) == sorted([b"%d" % number for number in range(10)] * 3)
    logs[0].publish(b"more")
    assert [list(log.poll()) for log in (*logs, late)] == [[], [b"more"], [b"more"], [b"more"]]
    assert {path.stat().st_mode & 0o777 for path in files(tmp_path)} == {0o600}


def test_who_stops_in_the_middle_gets_the_rest_next_time(tmp_path):
    log, reader = FolderLog(tmp_path), FolderLog(tmp_path)
    for number in range(5):
        log.publish(b"%d" % number)
    records = reader.poll()
    assert [next(records), next(records)] == [b"0", b"1"]
    del records
    assert list(reader.poll()) == [b"2", b"3", b"4"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=8), st.data())
def test_a_torn_file_gives_its_whole_records_whatever_its_length(tmp_path_factory, records, data):
    folder = tmp_path_factory.mktemp("log")
    log, reader = FolderLog(folder), FolderLog(folder)
    for record in records:
        log.publish(record)
    (path,) = files(folder)
    whole = path.read_bytes()
    ends = [0]
    for record in records:
        ends.append(ends[-1] + 12 + len(record))
    found = []
    for length in sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5))):
        path.write_bytes(whole[:length])
        found += reader.poll()
        assert found == [record for record, end in zip(records, ends[1:], strict=True) if end <= length]
    path.write_bytes(whole)
    assert found + list(reader.poll()) == records
    assert reader.damaged == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=30))
def test_damaged_records_are_passed_over_and_the_others_read(tmp_path_factory, place, rubbish):
    folder = tmp_path_factory.mktemp("log")
    log = FolderLog(folder)
    records = [b"record %d " % number * 5 for number in range(20)]
    for record in records:
        log.publish(record)
    log._end_file()
    log.publish(b"in the next file")
    old, _ = files(folder)
    whole = bytearray(old.read_bytes())
    place %= len(whole) - len(rubbish)
    changed = whole[place : place + len(rubbish)] != rubbish
    whole[place : place + len(rubbish)] = rubbish
    old.write_bytes(whole)
    reader = FolderLog(folder)
    found = list(reader.poll())
    ends = [sum(12 + len(record) for record in records[: n + 1]) for n in range(20)]
    intact = [
        record
        for record, end in zip(records, ends, strict=True)
        if end <= place or end - 12 - len(record) >= place + len(rubbish)
    ]
    assert set(intact) <= set(found) <= {*records, b"in the next file"}
    assert b"in the next file" in found
    assert (reader.damaged > 0) == (len(found) < 21) or not changed


def test_what_may_yet_become_whole_is_waited_for(tmp_path, monkeypatch):
    """As NFS shows it: the length first, zeros for the bytes."""
    log, reader = FolderLog(tmp_path), FolderLog(tmp_path)
    log.publish(b"first")
    log.publish(b"second")
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:17] + bytes(len(whole) - 17))
    assert list(reader.poll()) == [b"first"]
    path.write_bytes(whole)
    assert list(reader.poll()) == [b"second"]
    # and what never does is passed over in time
    log.publish(b"third")
    log.publish(b"fourth")
    whole = bytearray(path.read_bytes())
    whole[36] ^= 1
    path.write_bytes(whole)
    assert list(reader.poll()) == []
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    assert list(reader.poll()) == [b"fourth"]
    assert reader.damaged == 1


def test_a_write_that_fails_leaves_nothing_behind_it(tmp_path, monkeypatch):
    log, reader = FolderLog(tmp_path), FolderLog(tmp_path)
    log.publish(b"first")
    write = os.write

    def fail(file, data):
        write(file, data[: len(data) // 2])
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(module.os, "write", fail)
    for _ in range(5):
        with pytest.raises(OSError, match="no space"):
            log.publish(b"second")
    monkeypatch.setattr(module.os, "write", lambda file, data: write(file, data[:-1]))
    with pytest.raises(OSError, match="in part"):
        log.publish(b"second")
    monkeypatch.undo()
    log.publish(b"second")
    assert list(reader.poll()) == [b"first", b"second"]
    assert len(files(tmp_path)) == 2
    log.close()
    assert list(FolderLog(tmp_path).poll()) == [b"first", b"second"]


def test_files_follow_one_another_and_the_oldest_go(tmp_path):
    log = FolderLog(tmp_path, file_bytes=1000, keep_bytes=5000)
    reader = FolderLog(tmp_path)
    found = []
    for number in range(200):
        log.publish(b"%03d" % number * 30)
        if number % 7 == 0:
            found += reader.poll()
    found += reader.poll()
    assert found == [b"%03d" % number * 30 for number in range(200)]
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 6000
    kept = list(FolderLog(tmp_path).poll())
    assert kept == found[-len(kept) :]
    assert len(kept) > 30


def test_old_files_go_whoever_wrote_them(tmp_path):
    dead = FolderLog(tmp_path)
    dead.publish(b"of a replica that is no more")
    dead.close()
    (path,) = files(tmp_path)
    os.utime(path, (time.time() - 7200,) * 2)
    (tmp_path / "notes.txt").write_text("not ours")
    log = FolderLog(tmp_path, keep_seconds=3600)
    log.publish(b"new")
    assert not path.exists()
    assert (tmp_path / "notes.txt").exists()
    # whoever's file is deleted under it begins another
    files(tmp_path)[0].unlink()
    log.publish(b"newer")
    assert list(FolderLog(tmp_path).poll()) == [b"newer"]


def test_what_is_no_file_of_a_log_is_left_alone(tmp_path):
    for name in ("0123456789abcdef-1.log", "x-00000001.log", ".0123456789abcdef-00000001.log"):
        (tmp_path / name).write_bytes(b"x" * 100)
    os.mkfifo(tmp_path / "0123456789abcdef-00000001.log")
    (tmp_path / "0123456789abcdef-00000002.log").symlink_to("/dev/zero")
    (tmp_path / "0123456789abcdef-00000003.log").mkdir()
    (tmp_path / "0123456789abcdef-00000004.log").write_bytes(os.urandom(3 << 20))
    (tmp_path / "0123456789abcdef-00000005.log").write_bytes(b"\x89SSF" * 500_000)
    log = FolderLog(tmp_path)
    for _ in range(3):
        assert list(log.poll()) == []


def test_sizes_are_checked(tmp_path):
    log = FolderLog(tmp_path)
    for record in (b"", bytes(MAX_RECORD_BYTES + 1)):
        with pytest.raises(InvalidArgumentError):
            log.publish(record)
    log.publish(bytes(MAX_RECORD_BYTES))
    assert list(FolderLog(tmp_path).poll()) == [bytes(MAX_RECORD_BYTES)]
    for options in ({"file_bytes": 0}, {"keep_bytes": -1}, {"keep_seconds": 0}):
        with pytest.raises(InvalidArgumentError):
            FolderLog(tmp_path, **options)


def test_killed_writers_leave_whole_records(tmp_path):
    """Processes that write as fast as they can are killed; readers get a prefix of what each wrote."""
    code = f"""
import itertools, os, sys
from sssd.sharing import FolderLog
log = FolderLog({str(tmp_path)!r}, file_bytes=50_000)
print("ready", flush=True)
for number in itertools.count():
    log.publish(b"%s %d " % (sys.argv[1].encode(), number) * (1 + number % 300))
"""
    reader, found = FolderLog(tmp_path), []
    for life in range(6):
        process = subprocess.Popen([sys.executable, "-c", code, str(life)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.05 * life)
        found += reader.poll()
        process.kill()
        process.communicate()
    found += reader.poll()
    numbers = {}
    for record in found:
        life, number = map(int, record.split()[:2])
        assert record == b"%d %d " % (life, number) * (1 + number % 300)
        numbers.setdefault(life, []).append(number)
    assert all(seen == list(range(len(seen))) for seen in numbers.values())
    assert len(numbers) > 3
    assert reader.damaged <= 6


def test_a_folder_that_goes_and_comes_back(tmp_path):
    folder = Path(tmp_path / "log")
    log, reader = FolderLog(folder), FolderLog(folder)
    log.publish(b"first")
    assert list(reader.poll()) == [b"first"]
    files(folder)[0].unlink()
    folder.rmdir()
    with pytest.raises(OSError, match="log"):
        list(reader.poll())
    with pytest.raises(OSError, match="log"):
        log.publish(b"lost")
    folder.mkdir()
    log.publish(b"second")
    assert list(reader.poll()) == [b"second"]
