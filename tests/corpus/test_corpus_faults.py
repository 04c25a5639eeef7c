"""Writers of a corpus that die or fail at every call to the system, and at any moment.

``SSSD_KILLS`` sets the number of kills at random moments; what they found is logged.
"""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SETUP = f"""
import ctypes, errno, os, random, shutil, signal, sys, time
from collections import Counter
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from folders import VOCABULARY, held, opened, records
from sssd.corpus import Corpus
from sssd.corpus.manifest import is_own
from sssd import Drafter
from sssd.errors import SssdError
base, folder, kind = Path(sys.argv[1]) / "base", Path(sys.argv[1]) / "corpus", sys.argv[2]
corpus = Corpus(folder, grace=0)
def fresh():
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
def add(serials, source):
    return corpus.add(records(*serials), vocab_size=VOCABULARY, source=source, id_field="id", added=1)
add(range(0, 40), "a"), add(range(40, 52), "b"), add(range(52, 55), "a"), corpus.remove(ids=[3], merge=False)
os.rename(folder, base)
work = {{
    "add": lambda: add(range(60, 62), "c"),
    "remove": lambda: corpus.remove(source="b", merge=False),
    "merge": lambda: corpus.merge(whole=True),
    "again": lambda: corpus.remove(source="a"),
}}[kind]
fresh()
old = held(corpus)
work()
new = held(corpus)
def whole():
    found = held(corpus)
    assert found in (old, new), found
    with opened(folder) as store:
        store.verify()
        assert store.count([]) == sum(len(ids) * times for ids, times in found.items())
    return found
def clean():
    "The next writer leaves only what is named."
    corpus.merge()
    left = {{name for name in os.listdir(folder) if is_own(name)}}
    assert left == corpus.manifest.files, left
    assert not os.listdir(folder / ".work")
    assert corpus.verify() == []
def killed(before):
    child = os.fork()
    if not child:
        try:
            before()
            work()
        finally:
            os._exit(0)
    return child
"""
EVERY_CALL = """
shim = ctypes.CDLL(None)
shim.fault_calls.restype = ctypes.c_char_p
def arm(call=-1, error=0, sticky=False):
    shim.fault_arm(os.fsencode(folder), call, error, sticky)
fresh(), arm(), work()
calls = shim.fault_calls().decode().split()
outcomes = Counter()
for call in range(len(calls)):
    fresh()
    _, status = os.waitpid(killed(lambda: arm(call)), 0)
    assert os.WIFSIGNALED(status), (call, calls[call])
    outcomes["new" if whole() == new else "old"] += 1
    clean()
assert old == new or len(outcomes) == 2, outcomes
failed = 0
for call in range(len(calls)):
    error = (errno.EIO, errno.ENOSPC, errno.EACCES)[call % 3]
    fresh(), arm(call, error, error == errno.ENOSPC)
    try:
        work()
    except (OSError, SssdError):
        failed += 1
    finally:
        arm()
    whole(), clean()
print(*calls)
print(failed)
"""
ANY_MOMENT = """
def tokens(found):
    return sum(len(ids) * times for ids, times in found.items())
def reading():
    "Another process that reopens the corpus without end; it ends by itself only if it meets something else."
    child = os.fork()
    if not child:
        try:
            drafter = Drafter(datastore=folder)
            sequence = drafter.begin([1, 2, 3])
            while True:
                drafter.reopen()
                store = drafter.datastore
                assert (store.count([]) if store else 0) in (tokens(old), tokens(new))
                sequence.draft(8)
        except BaseException as error:
            print("reader:", repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    return child
fresh()
reader, started = reading(), time.perf_counter()
os.waitpid(killed(lambda: None), 0)
longest = 1.2 * (time.perf_counter() - started)
os.kill(reader, signal.SIGKILL), os.waitpid(reader, 0)
chance, outcomes = random.Random(1), Counter()
for _ in range(int(sys.argv[3])):
    fresh()
    reader = reading()
    child = killed(lambda: None)
    time.sleep(chance.uniform(0, longest))
    for process in chance.sample([child, reader], 2):
        os.kill(process, signal.SIGKILL)
    os.waitpid(child, 0)
    _, status = os.waitpid(reader, 0)
    assert os.WIFSIGNALED(status), "the reader met neither"
    outcomes["new" if whole() == new else "old"] += 1
    clean()
print(dict(outcomes))
"""
KINDS = ["add", "remove", "merge", "again"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a folder: no test here takes the power away, and syncing takes time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


def run(folder: Path, code: str, *arguments: str, preload: Path | None = None) -> list[str]:
    environment = {**os.environ, "LD_PRELOAD": str(preload)} if preload else None
    command = [sys.executable, "-c", SETUP + code, str(folder), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("kind", KINDS[:3])
def test_every_call_that_fails_or_is_the_last_leaves_old_or_new(folder: Path, shim: Path, kind: str) -> None:
    calls, failed = run(folder, EVERY_CALL, kind, preload=shim)
    assert {"open64", "fsync", "rename"} <= set(calls.split())
    # a failure to tidy up is none
    assert int(failed) >= len(calls.split()) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_writer_killed_at_any_moment_leaves_and_shows_readers_old_or_new(folder: Path, kind: str) -> None:
    outcomes = run(folder, ANY_MOMENT, kind, os.environ.get("SSSD_KILLS", "10"))
    logging.getLogger(__name__).info("%s: %s", kind, outcomes)


def test_a_full_disk_leaves_the_corpus_as_it_was(small_disk: Callable[[str], Path]) -> None:
    from folders import VOCABULARY, held, records

    from sssd.corpus import Corpus

    corpus = Corpus(small_disk("256k") / "corpus")
    corpus.add(records(*range(30)), vocab_size=VOCABULARY)
    before = held(corpus)
    with pytest.raises(OSError, match="No space left"):
        corpus.add([[{"ids": [serial % 12, 1, 2] * 40_000} for serial in range(3)]])
    assert held(corpus) == before
    assert corpus.add(records(90)).documents == 1
    assert corpus.verify() == []
