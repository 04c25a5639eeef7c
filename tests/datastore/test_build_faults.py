"""Every system call of a build and of an opening fails once, or the process is killed before it.

Afterwards the old file or the new one is there, whole; an error has left no temporary file; a retry works.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sssd.datastore import Datastore

SETUP = """
import ctypes, errno, os, sys
from pathlib import Path
import numpy as np
from sssd.datastore import Datastore, DatastoreBuilder
path, kind = Path(sys.argv[1]) / "store", sys.argv[2]
shim = ctypes.CDLL(None)
shim.fault_calls.restype = ctypes.c_char_p
stream = np.random.default_rng(0).integers(0, 1000, 500_000)
def arm(call=-1, error=0, sticky=False):
    shim.fault_arm(os.fsencode(path.parent), call, error, sticky)
def build(documents):
    with DatastoreBuilder(path, vocab_size=1000) as builder:
        for index in range(documents):
            builder.add(stream[index * 100_000 : (index + 1) * 100_000])
def whole():
    with Datastore.open(path) as store:
        store.verify()
        return store.info.documents
work = {
    "build": lambda: build(5),
    "mmap": lambda: Datastore.open(path).verify(),
    "ram": lambda: Datastore.open(path, load="ram").verify(),
}[kind]
build(1)
arm()
"""
FAIL = """
old = path.read_bytes()
arm()
work()
calls = shim.fault_calls().decode().split()
print(*calls)
failed = 0
for call, name in enumerate(calls):
    for error in (errno.EIO, errno.ENOSPC, errno.EINTR, errno.ENOMEM):
        path.write_bytes(old)
        arm(call, error, error == errno.ENOSPC)
        try:
            work()
        except OSError as raised:
            failed += 1
            assert raised.errno == error, (call, name, raised)
        except MemoryError:
            failed += 1
            assert error == errno.ENOMEM, (call, name)
        else:
            assert error == errno.EINTR, (call, name, error)
        arm()
        left = os.listdir(path.parent)
        assert left == ["store"], (call, name, error, left)
        assert whole() in (1, 5)
    work()
    arm()
    assert whole() == (5 if kind == "build" else 1)
print(failed)
"""


def run(shim: Path, folder: Path, kind: str, code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SETUP + code, str(folder), kind]
    environment = {**os.environ, "LD_PRELOAD": str(shim)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["build", "mmap", "ram"])
def test_every_call_that_fails_is_an_error_that_leaves_a_whole_file(
    tmp_path: Path, shim: Path, kind: str
) -> None:
    result = run(shim, tmp_path, kind, FAIL)
    assert result.returncode == 0, result.stdout + result.stderr
    calls, failed = result.stdout.splitlines()
    wanted = {"build": {"open64", "write", "fsync", "rename"}, "mmap": {"open64", "pread64", "mmap64"}}
    assert wanted.get(kind, {"pread64"}) <= set(calls.split())
    assert int(failed) >= 3 * len(calls.split()) - 3


def test_a_builder_killed_before_any_call_leaves_a_whole_file(tmp_path: Path, shim: Path) -> None:
    calls = run(shim, tmp_path, "build", "work(); print(shim.fault_calls().decode())").stdout.split()
    outcomes = set()
    for call in range(len(calls)):
        result = run(shim, tmp_path, "build", f"arm({call}); work()")
        assert result.returncode == -9, result.stderr
        with Datastore.open(tmp_path / "store") as store:
            store.verify()
            outcomes.add(store.info.documents)
        for left in tmp_path.glob(".store.*.tmp"):
            left.unlink()
        assert os.listdir(tmp_path) == ["store"]
    assert outcomes == {1, 5}
