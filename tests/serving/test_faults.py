"""Every system call of saving and loading fails once, with several errors, or the process is killed there."""

import contextlib
import ctypes
import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FILE = "drafter.sssd-state"
MARK = 54321
KILL = 0
NAMES = {0: "read", 1: "write", 3: "close", 74: "fsync", 75: "fsync", 83: "mkdir", 257: "open", 332: "stat"}
NAMES |= dict.fromkeys((82, 264, 316), "rename")
ERRORS = {
    "EIO": errno.EIO,
    "ENOSPC": errno.ENOSPC,
    "EINTR": errno.EINTR,
    "EMFILE": errno.EMFILE,
    "killed": KILL,
}


class Call(ctypes.Structure):
    _fields_ = (("number", ctypes.c_long), ("path", ctypes.c_char * 512))


class Faults:
    """Runs what is asked in forked children, with and without faults."""

    def __init__(self, library: str, folder: str) -> None:
        # not before: this class lives in a process of its own
        from sssd import Drafter

        self.loaded = Drafter.load
        self.library = ctypes.CDLL(library)
        self.root = Path(folder)
        self.old, self.new = self.learned(1), self.learned(3)
        self.problems: list[str] = []

    @staticmethod
    def learned(documents):
        from sssd import Drafter

        drafter = Drafter(vocab_size=1000, live_bytes=1 << 20, soft_bytes=1 << 12, threads=1)
        for number in range(documents):
            drafter.begin([(number + 7 * index * index) % 1000 for index in range(500)]).finish()
        return drafter

    def child(self, act, at, error, sticky):
        """Acts in a child. Returns what it made of it (none if it was killed), and its calls."""
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            told = None
            try:
                if self.library.follow_me():
                    os._exit(3)
                self.mark()
                try:
                    act()
                except OSError as failure:
                    told = failure.errno
                except BaseException as failure:
                    told = repr(failure)
                finally:
                    self.mark()
                os.write(write, json.dumps([told]).encode())
            finally:
                os._exit(0)
        os.close(write)
        log, status = (Call * 256)(), ctypes.c_int()
        count = self.library.trace(pid, at, error, sticky, log, ctypes.byref(status))
        with open(read) as pipe:
            told = pipe.read()
        if count < 0 or (not told and not os.WIFSIGNALED(status.value)):
            raise SystemExit("skip: this machine lets no process be traced")
        calls = [(NAMES.get(call.number, str(call.number)), call.path.decode()) for call in log[:count]]
        return (json.loads(told)[0] if told else "killed"), calls

    def mark(self):
        with contextlib.suppress(OSError):
            os.close(MARK)

    def tokens(self, folder):
        """How many tokens the state in a folder holds, or what is wrong with it."""
        try:
            return self.loaded(folder, threads=1).live_tokens if (folder / FILE).exists() else 0
        except Exception as failure:
            return repr(failure)

    def run(self, case):
        """All faults of a case; its calls, and how many faults there were."""
        before, _ = CASES[case]
        calls, faults = [], 0
        for name, error in [("none", -1), *ERRORS.items()]:
            for at in range(len(calls)) if calls else [-1]:
                with tempfile.TemporaryDirectory(dir=self.root) as held:
                    folder = Path(held) / "state"
                    if before:
                        self.old.save(folder)
                    told, seen = self.child(
                        lambda folder=folder: CASES[case][1](self, folder), at, error, name == "ENOSPC"
                    )
                    if at < 0:
                        assert told is None, told
                        calls = seen
                        continue
                    faults += 1
                    if calls[at][0] == "stat" and told == errno.EEXIST:
                        # std says what is in the way if it cannot see whether that is a folder
                        told = error
                    if problem := self.wrong(case, folder, told, error):
                        self.problems.append(f"{case}, {name} at call {at} {calls[at]}: {problem}")
        return calls, faults

    def wrong(self, case, folder, told, error):
        """What is not as it must be after a fault."""
        before = self.old.live_tokens if CASES[case][0] else 0
        found, after = self.tokens(folder), self.new.live_tokens
        if case == "load":
            return None if found == before and told in (None, error, "killed") else f"{told}, {found} tokens"
        if found not in (before, after) or (told is None and found != after):
            return f"{told}, {found} tokens are there"
        if told not in (None, error, "killed"):
            return f"{told!r} instead of the error's number"
        names = [path.name for path in folder.iterdir() if path.name != FILE] if folder.exists() else []
        if told != "killed" and names:
            return f"left behind: {names}"
        self.new.save(folder)
        return None if self.tokens(folder) == after else "a second try does not help"

    def load(self, folder):
        if self.loaded(folder, threads=1).live_tokens != self.old.live_tokens:
            raise AssertionError("another state")


CASES = {
    "save over another": (True, lambda faults, folder: faults.new.save(folder)),
    "save in a new folder": (False, lambda faults, folder: faults.new.save(folder)),
    "load": (True, Faults.load),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("needs x86-64 Linux")
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    folder = tmp_path_factory.mktemp("faults")
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    compiler = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(source)]
    subprocess.run(compiler, check=True)
    done = subprocess.run(
        [sys.executable, __file__, str(library), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.stderr.startswith("skip: "):
        pytest.skip(done.stderr[6:].strip())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_whatever_call_fails_the_old_state_or_the_new_is_there_whole(results):
    """Errors keep their number, leave no temporary file, and a second try works."""
    assert results["problems"] == []
    assert {case: faults >= 5 * 5 for case, (_, faults) in results["cases"].items()} == dict.fromkeys(
        CASES, True
    )
    assert {"write", "fsync", "rename"} <= {name for name, _ in results["cases"]["save over another"][0]}


def test_the_file_is_synced_before_it_is_renamed_and_the_folder_after(results):
    calls = results["cases"]["save over another"][0]
    order = [(name, path) for name, path in calls if name in ("write", "fsync", "rename")]
    names = [name for name, _ in order]
    assert names[-3:] == ["fsync", "rename", "fsync"]
    assert set(names[:-3]) == {"write"}, "nothing is written once the file is synced"
    assert {path for _, path in order[:-2]} == {order[0][1]}
    assert order[0][1].endswith(".tmp")
    assert order[-1][1] == str(Path(order[0][1]).parent)


if __name__ == "__main__":
    faults = Faults(*sys.argv[1:])
    cases = {case: faults.run(case) for case in CASES}
    json.dump({"cases": cases, "problems": faults.problems}, sys.stdout)
