"""Threads, forks, signals and shutdown, each with a time-out."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from world import ticks_during

from sssd import Drafter
from sssd.errors import BatchError, ClosedError, SssdError

SECONDS = 60 if os.environ.get("SSSD_FULL_TESTS") else 3
THREADS = 8


def run(code, timeout=60, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


@pytest.mark.slow
def test_many_threads_on_one_drafter():
    """Threads step batches of their own and of shared sequences, begin, fork and read; each private result is
    what one thread alone gets, and the GIL is free meanwhile."""
    drafter, alone = Drafter(live_bytes=0, soft_bytes=0, threads=3), Drafter(live_bytes=0, soft_bytes=0)
    shared = [drafter.begin(np.arange(300) % 17) for _ in range(8)]
    end, counted, problems, rounds = time.monotonic() + SECONDS, [0], [], [0] * THREADS

    def count():
        while time.monotonic() < end:
            counted[0] += 1
            time.sleep(1e-4)

    def work(number):
        rng = np.random.default_rng(number)
        try:
            while time.monotonic() < end:
                prompts = rng.integers(0, 12, (12, 200))
                own = [drafter.begin(prompt) for prompt in prompts]
                twins = [alone.begin(prompt) for prompt in prompts]
                own.append(own[0].fork())
                twins.append(twins[0].fork())
                for _ in range(10):
                    tokens = rng.integers(0, 12, 26)
                    batch = drafter.step(own, tokens, np.arange(14) * 2, 12)
                    for index, twin in enumerate(twins):
                        twin.extend(tokens[2 * index :][:2])
                        tree = twin.draft(12)
                        assert batch[index].token_ids.tolist() == tree.token_ids.tolist()
                        assert batch[index].probs.tolist() == tree.probs.tolist()
                    drafter.step(shared, tokens[:8], range(9), 6, total_nodes=30)
                    assert drafter.memory["used"] >= 0
                    assert drafter.metrics["begun"] > 0
                for sequence in own:
                    sequence.close()
                rounds[number] += 1
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    threads.append(threading.Thread(target=count))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 120)
    assert not problems
    assert all(rounds)
    assert counted[0] > 10 * SECONDS
    for sequence in shared:
        sequence.check_integrity()
    lengths = {len(sequence) for sequence in shared}
    assert lengths == {300 + 10 * sum(rounds)}


def test_a_batch_lets_other_threads_run():
    drafter = Drafter(threads=1)
    sequences = [drafter.begin(np.random.default_rng(i).integers(0, 40, 3000)) for i in range(64)]
    assert ticks_during(lambda: [drafter.draft_batch(sequences, 64) for _ in range(20)]) > 0


def test_closing_while_a_batch_runs_is_an_error_for_one():
    drafter = Drafter(threads=2)
    sequences = [drafter.begin([1, 2, 3] * 50) for _ in range(16)]
    stop, failures = threading.Event(), []

    def close():
        for sequence in sequences[:8]:
            time.sleep(0.005)
            sequence.close()
        stop.set()

    closer = threading.Thread(target=close)
    closer.start()
    while not stop.is_set():
        try:
            drafter.step(sequences, [1] * 16, range(17), 8)
        except BatchError as problem:
            failures.append(problem.failures)
    closer.join()
    for failed in failures:
        assert set(failed) <= set(range(8))
        assert all(isinstance(failure, ClosedError) for failure in failed.values())
    with pytest.raises(BatchError) as caught:
        drafter.draft_batch(sequences)
    assert set(caught.value.failures) == set(range(8))


FORK = """
import os, threading, traceback
import numpy as np
from sssd import Drafter
drafter = Drafter(threads=3)
sequences = [drafter.begin(np.arange(500) % 23) for _ in range(32)]
def step():
    return drafter.step(sequences, [1] * 32, range(33), 8).probs.tolist()
step()
stop = threading.Event()
def busy(own):
    while not stop.is_set():
        drafter.step(own, [1] * 32, range(33), 8)
        own[0].fork().finish()
        drafter.begin(np.arange(3000), background=True).close()
threads = []
for _ in range(4):
    own = [drafter.begin([1, 2, 1]) for _ in range(32)]
    threads.append(threading.Thread(target=busy, args=(own,)))
    threads[-1].start()
children = []
for _ in range(30):
    child = os.fork()
    if not child:
        status = 1
        try:
            drafter.extend_batch(sequences, [1] * 32, range(33))
            expected = [sequence.fork() for sequence in sequences]
            for sequence in expected:
                sequence.extend([1])
            assert step() == [prob for sequence in expected for prob in sequence.draft(8).probs.tolist()]
            background = drafter.begin(np.arange(20000), background=True)
            background.extend([1])
            for sequence in sequences:
                sequence.check_integrity()
                sequence.finish()
            assert drafter.live_tokens > 0
            grandchild = os.fork()
            if not grandchild:
                expected[0].draft(8)
                drafter.draft_batch(expected)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    children.append(child)
stop.set()
for thread in threads:
    thread.join()
for child in children:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
step()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.slow
def test_forked_children_work_while_the_parents_threads_are_busy():
    done = run(
        FORK.replace("import os,", "import warnings; warnings.simplefilter('ignore')\nimport os,"), 120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
@pytest.mark.slow
def test_ctrl_c_ends_a_long_begin():
    code = """
import numpy as np, signal, time
from sssd import Drafter
signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background inherit none
drafter = Drafter()
ids = np.random.default_rng(0).integers(0, 50_000, 20_000_000, np.int32)
print("go", flush=True)
start = time.monotonic()
try:
    drafter.begin(ids)
except KeyboardInterrupt:
    assert drafter.memory["used"] == drafter.memory["shared"], drafter.memory
    drafter.begin([1, 2, 1]).draft()
    print("stopped", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "go\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == ("stopped\n", 0)


@pytest.mark.slow
def test_the_interpreter_ends_with_work_in_flight():
    code = """
import sys, threading, time
import numpy as np
from sssd import Drafter
class Slow:
    def __del__(self):
        time.sleep(0.3)  # the others go on while the interpreter ends
sys.slow = Slow()
drafter = Drafter(threads=3)
def work():
    sequences = [drafter.begin(np.arange(2000) % 91) for _ in range(64)]
    while True:
        drafter.step(sequences, [1] * 64, range(65), 64)
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
for _ in range(8):
    drafter.begin(np.arange(1_000_000), background=True)
time.sleep(0.5)
"""
    for _ in range(3):
        done = run(code)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_full_memory_never_hangs_threads():
    drafter = Drafter(live_bytes=0, soft_bytes=0, max_bytes=1_500_000, threads=2)
    held, problems = drafter.begin(np.random.default_rng(9).integers(0, 5000, 4000)), []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(40):
            try:
                with drafter.begin(rng.integers(0, 50, 2000)) as sequence:
                    sequence.extend(rng.integers(0, 5000, 6000))
                    sequence.draft(32)
            except SssdError as problem:
                problems.append(type(problem).__name__)
            if drafter.memory["used"] > 1_500_000:
                problems.append("limit")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    held.close()
    assert set(problems) == {"MemoryLimitError"}
    assert drafter.memory["used"] == drafter.memory["shared"]


@pytest.mark.parametrize(
    "end", ["sys.exit(0)", "raise RuntimeError('child')", "os._exit(0)", "builder.finish()"]
)
def test_a_build_survives_the_end_of_a_forked_child(end, tmp_path):
    """The child has a copy of the builder, and must leave its file alone: what is buffered there, too."""
    code = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
from sssd import Datastore, DatastoreBuilder
with DatastoreBuilder({str(tmp_path / "x.sssd")!r}, vocab_size=100) as builder:
    builder.add(range(50))
    pid = os.fork()
    if pid == 0:
        {end}
    os.waitpid(pid, 0)
    builder.add(range(50))
print(Datastore.open({str(tmp_path / "x.sssd")!r}).info.tokens)
"""
    done = run(code)
    assert "100" in done.stdout.split(), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.sssd"]
