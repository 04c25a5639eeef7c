"""Namespaces, limits, and what is saved."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sssd import Datastore, DatastoreBuilder, Drafter
from sssd.errors import (
    CorpusError,
    CorruptDatastoreError,
    CorruptStateError,
    InvalidArgumentError,
    MemoryLimitError,
    StateVersionError,
    VocabularyMismatchError,
)

FILE = "drafter.sssd-state"
SECRET = [11, 12, 13, 14, 15, 16, 17, 18, 19]


def learn(drafter, tokens=SECRET, **options):
    drafter.begin(tokens, **options).finish()


def drafted(drafter, prompt, **options):
    with drafter.begin(prompt, **options) as sequence:
        tree = sequence.draft(64, min_prob=0)
        sequence.close()
        return tree.token_ids.tolist()


def test_nothing_leaks_from_one_namespace_to_another():
    drafter = Drafter()
    with drafter.begin(SECRET, namespace="a") as sequence:
        for token in SECRET:
            sequence.draft(8)
            sequence.extend([token], [[77]], [[0.9]])
    assert drafted(drafter, SECRET[:4], namespace="a")
    fresh = Drafter()
    for other in ("", "b"):
        for prompt in (SECRET[:4], SECRET[-1:], [*SECRET, *SECRET]):
            assert drafted(drafter, prompt, namespace=other) == drafted(fresh, prompt)
        one, two = drafter.begin(SECRET, namespace=other), fresh.begin(SECRET)
        assert one.state_dict() == two.state_dict(), "the weights are the namespace's own"
        one.close()
        two.close()
    assert drafter.live_tokens == 0


def test_a_fork_stays_in_its_namespace():
    drafter = Drafter()
    drafter.begin(SECRET, namespace="a").fork().finish()
    assert drafter.namespaces()["a"]["live_tokens"] == len(SECRET)
    assert drafter.namespaces()[""]["live_tokens"] == 0


def test_namespaces_are_listed_removed_and_forgotten():
    drafter = Drafter(namespace_ttl=0.05)
    learn(drafter, namespace="a")
    running = drafter.begin(SECRET, namespace="b")
    time.sleep(0.1)
    listed = drafter.namespaces()
    assert set(listed) == {"", "b"}
    assert listed["b"]["sequences"] == 1
    assert drafter.remove_namespace("b")
    assert not drafter.remove_namespace("b")
    running.extend([1])
    running.finish()
    assert drafted(drafter, SECRET[:4], namespace="b") == []
    with pytest.raises(InvalidArgumentError, match="namespace_ttl"):
        Drafter(namespace_ttl=-1)


def test_the_largest_id_survives_save_and_load(tmp_path):
    largest = 2**31 - 1
    drafter = Drafter()
    drafter.begin([1, 2, 3]).extend([largest], [[largest, 7]], [[0.6, 0.3]])
    drafter.begin([4, 5, 6, largest, 8]).finish()
    expected = drafted(drafter, [9, 2, 3]), drafted(drafter, [5, 6])
    assert largest in expected[0]
    assert largest in expected[1]
    drafter.save(tmp_path)
    loaded = Drafter.load(tmp_path)
    assert (drafted(loaded, [9, 2, 3]), drafted(loaded, [5, 6])) == expected


def test_memory_is_counted_and_limited():
    drafter = Drafter(live_bytes=1 << 20, soft_bytes=1 << 20, max_bytes=8 << 20)
    shared = drafter.memory["shared"]
    assert 0 < shared == drafter.memory["used"] < 1 << 17
    prompt, sequences = np.random.default_rng(0).integers(0, 1000, 4000), []

    def until_full(act):
        for _ in range(1000):
            act()

    with pytest.raises(MemoryLimitError, match="drafter's limit of 8388608 bytes"):
        until_full(lambda: sequences.append(drafter.begin(prompt)))
    assert len(sequences) > 8
    with pytest.raises(MemoryLimitError):
        until_full(lambda: sequences.append(sequences[0].fork()))
    with pytest.raises(MemoryLimitError):
        until_full(lambda: sequences[0].extend(prompt[:500]))
    for name in range(10):
        with pytest.raises(MemoryLimitError):
            drafter.begin([1], namespace=str(name)).extend(prompt)
    memory = drafter.memory
    assert memory["refused"] >= 3
    assert memory["used"] <= memory["peak"] <= memory["limit"] == 8 << 20
    # what is full still drafts, or gives an empty tree
    for sequence in sequences:
        sequence.draft(64)
        sequence.check_integrity()
        assert drafter.memory["used"] <= 8 << 20
        sequence.close()
    assert drafter.memory["used"] == drafter.memory["shared"]


def test_no_room_for_what_is_shared_is_refused():
    with pytest.raises(MemoryLimitError):
        Drafter(max_bytes=1000)


def test_a_saved_drafter_is_loaded_by_another_process(tmp_path):
    drafter = Drafter(vocab_size=100, end_token_ids=[9], live_bytes=1 << 20)
    learn(drafter)
    with drafter.begin([1, 2], namespace="ä") as sequence:
        sequence.draft()
        sequence.extend([3, 4, 5], [[7, 8]] * 3, [[0.5, 0.25]] * 3)
    drafter.save(tmp_path / "new")
    code = f"""
from sssd import Drafter
drafter = Drafter.load({str(tmp_path / "new")!r}, threads=1)
assert drafter.vocab_size == 100 and drafter.end_token_ids.tolist() == [9]
assert set(drafter.namespaces()) == {{"", "ä"}}
print(drafter.begin({SECRET[:4]}).draft(64).token_ids.tolist())
print(drafter.begin([1, 2], namespace="ä").draft(64).probs.tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    expected = [
        drafter.begin(SECRET[:4]).draft(64).token_ids.tolist(),
        drafter.begin([1, 2], namespace="ä").draft(64).probs.tolist(),
    ]
    assert done.stdout.splitlines() == [str(line) for line in expected]
    assert 15 in expected[0]
    assert len(expected[1]) >= 2
    again = Drafter.load(tmp_path / "new", soft_bytes=1 << 20)
    assert again.begin([1, 2], namespace="ä").draft(64).probs.tolist() == expected[1]
    without = Drafter.load(tmp_path / "new", soft_bytes=0)
    assert without.begin([1, 2], namespace="ä").draft(64).probs.tolist() != expected[1]
    with pytest.raises(VocabularyMismatchError, match="100 token ids, not 200"):
        Drafter.load(tmp_path / "new", vocab_size=200)
    with pytest.raises(MemoryLimitError):
        Drafter.load(tmp_path / "new", max_bytes=10_000)


def test_saving_syncs_the_file_before_the_rename_and_the_folder_after(tmp_path):
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    trace, folder = tmp_path / "trace", tmp_path / "state"
    command = [strace, "-f", "-y", "-o", str(trace), "-e", "trace=fsync,fdatasync,rename,renameat,renameat2"]
    code = f"from sssd import Drafter; Drafter().save({str(folder)!r})"
    subprocess.run([*command, sys.executable, "-c", code], check=True, capture_output=True)
    calls = [
        (name, arguments)
        for name, arguments in re.findall(r"(fsync|rename)\w*\((.*)", trace.read_text())
        if str(folder) in arguments
    ]
    assert [name for name, _ in calls] == ["fsync", "rename", "fsync"]
    assert ".tmp>" in calls[0][1]
    assert f"<{folder}>" in calls[2][1]


def test_damaged_states_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        Drafter.load(tmp_path)
    Drafter().save(tmp_path)
    data = (tmp_path / FILE).read_bytes()
    for damaged in (b"", b"x" * 100, data[:-1], data + b"x", data[:50] + b"\xff" + data[51:]):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(CorruptStateError, match=FILE):
            Drafter.load(tmp_path)
    (tmp_path / FILE).write_bytes(data[:8] + b"\x01" + data[9:])
    with pytest.raises(StateVersionError, match="version 1"):
        Drafter.load(tmp_path)
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        Drafter().save(blocked)


SAVER = """
import sys
import numpy as np
from sssd import Drafter
folder, drafter = sys.argv[1], Drafter(live_bytes=1 << 26, soft_bytes=0)
for number in range(10**9):
    drafter.begin(np.random.default_rng(number).integers(0, 1000, 2000)).finish()
    drafter.save(folder)
    print(number, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_save_leaves_the_old_state_or_the_new(tmp_path):
    """The saver is killed at random moments; what is there is whole, and no older than what it reported."""
    kills = 200 if os.environ.get("SSSD_FULL_TESTS") else 12
    chance = random.Random(0)
    seen = set()
    for number in range(kills):
        folder = tmp_path / str(number % 4)
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(folder)], stdout=subprocess.PIPE, text=True
        ) as saver:
            first = int(saver.stdout.readline())
            time.sleep(chance.random() * 0.05)
            saver.send_signal(signal.SIGKILL)
            reported = [first, *map(int, saver.stdout.read().split())]
        drafter = Drafter.load(folder)
        saved = drafter.live_tokens
        # states hold 2000 tokens for each save
        assert saved in {2000 * (reported[-1] + extra) for extra in (1, 2)}
        seen.add(saved)
        assert len(list(folder.iterdir())) <= 1 + number // 4 + 1
    assert len(seen) > 1


def test_a_live_store_becomes_a_datastore(tmp_path):
    drafter = Drafter(vocab_size=100)
    learn(drafter)
    learn(drafter, [1, 2, 3], namespace="other")
    with DatastoreBuilder(tmp_path / "live.sssd", vocab_size=100) as builder:
        assert drafter.freeze(builder) == 1
        with pytest.raises(InvalidArgumentError, match="no namespace 'x'"):
            drafter.freeze(builder, namespace="x")
    with Datastore.open(tmp_path / "live.sssd") as store:
        store.verify()
        assert (store.info.documents, store.info.tokens) == (1, len(SECRET))
        assert store.continuations(SECRET[:3], max_tokens=3)[0].tolist() == SECRET[3:6]
    assert drafted(Drafter(datastore=tmp_path / "live.sssd"), SECRET[:4])[0] == SECRET[4]


def test_a_full_disk_has_its_number(tmp_path):
    """Whoever serves must be able to tell it from other errors."""
    code = f"""
import resource, numpy as np
from sssd import Drafter
drafter = Drafter(live_bytes=1 << 20, soft_bytes=0)
drafter.begin(np.arange(5000) % 999).finish()
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
try:
    drafter.save({str(tmp_path)!r})
except OSError as error:
    print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == f"{errno.EFBIG}\n", done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_at_once(kind, tmp_path):
    path = tmp_path / "drafter.sssd-state"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(OSError, match=re.escape(str(path))):
        Drafter.load(tmp_path)
    # a folder may be a corpus, and is none
    with pytest.raises((CorruptDatastoreError, OSError, CorpusError, InvalidArgumentError)):
        Datastore.open(path)


def test_what_users_have_said_is_for_the_owner_alone(tmp_path):
    drafter = Drafter()
    learn(drafter)
    with DatastoreBuilder(tmp_path / "learned.sssd", vocab_size=1000) as builder:
        drafter.freeze(builder)
        modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    drafter.save(tmp_path)
    modes |= {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {0o600}
