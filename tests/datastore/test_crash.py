"""Killed, interrupted and failing builds leave the old file or the new one.

``SSSD_KILLS`` sets the number of killed builds; their outcomes are logged.
"""

import errno
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sssd.datastore import Datastore, DatastoreBuilder

TOKENS = 400_000
BUILD = f"""
import sys
import numpy as np
from sssd.datastore import DatastoreBuilder
stream = np.random.default_rng(int(sys.argv[2])).integers(0, 1000, {TOKENS})
print("ready", flush=True)
with DatastoreBuilder(sys.argv[1], vocab_size=1000) as builder:
    builder.add_stream(stream, 0)
    if len(sys.argv) > 3:
        print("added", flush=True)
"""


def start(path: Path, seed: int, *flags: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(path), str(seed), *flags], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def built(path: Path, seed: int) -> bytes:
    process = start(path, seed)
    process.communicate()
    assert process.returncode == 0
    return path.read_bytes()


def test_a_killed_builder_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "store"
    contents = [built(path, seed) for seed in range(2)]
    process = start(path, 0)
    started = time.perf_counter()
    process.communicate()
    longest = time.perf_counter() - started
    chance = random.Random(1)
    outcomes = {"old": 0, "new": 0, "temporary left": 0}
    current = 0
    for _ in range(int(os.environ.get("SSSD_KILLS", "10"))):
        process = start(path, 1 - current)
        time.sleep(chance.uniform(0, longest))
        process.kill()
        process.communicate()
        found = path.read_bytes()
        assert found in contents
        with Datastore.open(path) as store:
            store.verify()
        replaced = found == contents[1 - current]
        outcomes["new" if replaced else "old"] += 1
        current = 1 - current if replaced else current
        for left in tmp_path.glob(".store.*.tmp"):
            outcomes["temporary left"] += 1
            left.unlink()
        assert list(tmp_path.iterdir()) == [path]
    logging.getLogger(__name__).info("%s", outcomes)


def test_ctrl_c_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "store"
    new, old = built(path, 1), built(path, 0)
    process = start(path, 1, "announce")
    assert process.stdout is not None
    assert process.stdout.readline() == b"added\n"
    process.send_signal(signal.SIGINT)
    process.communicate()
    # the signal may come when the file has just been replaced
    assert path.read_bytes() in (old, new)
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_in_the_progress_callback_stops_the_build(tmp_path: Path) -> None:
    builder = DatastoreBuilder(tmp_path / "store", vocab_size=1000)
    builder.add(np.random.default_rng(0).integers(0, 1000, 4_000_000))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builder.finish(stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [0, 4096, 100_000, 600_000, 1_200_000])
def test_a_failing_write_is_an_error_and_leaves_no_file(tmp_path: Path, limit: int) -> None:
    """With a limit on the size of files, the write that would exceed it fails."""

    def fail() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    path = tmp_path / "store"
    path.write_bytes(b"old")
    command = [sys.executable, "-c", BUILD, str(path), "0"]
    process = subprocess.run(command, preexec_fn=fail, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert f"OSError: [Errno {errno.EFBIG}]" in process.stderr
    assert str(path) in process.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error_and_leaves_no_file(small_disk: Callable[[str], Path]) -> None:
    folder = small_disk("1m")
    path = folder / "store"
    with (
        pytest.raises(OSError, match="No space left") as raised,
        DatastoreBuilder(path, vocab_size=1000) as builder,
    ):
        builder.add(np.random.default_rng(0).integers(0, 1000, TOKENS))
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(path)
    assert list(folder.iterdir()) == []


def test_finishing_syncs_the_file_before_the_rename_and_the_folder_after(tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    path, trace = tmp_path / "store", tmp_path / "trace"
    command = [strace, "-f", "-y", "-o", str(trace), "-e", "trace=fsync,fdatasync,rename,renameat,renameat2"]
    subprocess.run([*command, sys.executable, "-c", BUILD, str(path), "0"], check=True, capture_output=True)
    calls = re.findall(r"(fsync|rename\w*)\((.*)", trace.read_text())
    calls = [(name, arguments) for name, arguments in calls if str(tmp_path) in arguments]
    assert [name for name, _ in calls] in (
        ["fsync", rename, "fsync"] for rename in ("rename", "renameat", "renameat2")
    )
    assert ".tmp>" in calls[0][1]
    assert f"<{tmp_path}>" in calls[2][1]
