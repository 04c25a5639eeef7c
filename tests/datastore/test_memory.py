"""A system that has no memory to give: MemoryError, and nothing torn or left."""

import subprocess
import sys
from pathlib import Path

import forge
import pytest

from sssd.datastore import Datastore

SETUP = """
import os, resource, sys
import numpy as np
from sssd.datastore import Datastore, DatastoreBuilder
folder = sys.argv[1]
path = folder + "/store"
array = np.arange(1_500_000, dtype=np.int32) % 5000
def limited(megabytes, act):
    used = int(open("/proc/self/statm").read().split()[0]) * 4096
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(megabytes * (1 << 20)), hard))
    try:
        act()
        return True
    except MemoryError as error:
        assert "memory" in str(error), error
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, hard))
outcomes = []
"""
BUILD = """
for megabytes in [0, 0.1, 0.5, 1, 2, 3, 4, 6, 7, 8, 10, 11.5, 12, 12.5, 13, 14, 16, 20, 32, 64, 200]:
    builder = DatastoreBuilder(path, vocab_size=5000)
    added = limited(megabytes, lambda: builder.add(array))
    outcomes.append(added and limited(megabytes, builder.finish))
    builder.close()
    assert os.listdir(folder) == (["store"] if outcomes[-1] else []), (megabytes, os.listdir(folder))
    if outcomes[-1]:
        with Datastore.open(path) as store:
            store.verify()
        os.remove(path)
assert outcomes[0] is False and outcomes[-1] is True, outcomes
"""
OPEN = """
for load in ("mmap", "ram"):
    for megabytes in [0, 1, 8, 32, 60, 63, 64, 65, 66, 70, 80, 200]:
        outcomes.append(limited(megabytes, lambda: Datastore.open(folder + "/sparse", load=load)))
    assert outcomes[0] is False and outcomes[-1] is True, outcomes
    outcomes.clear()
store = Datastore.open(folder + "/sparse")
for megabytes in [0, 0.5, 1, 2, 200]:
    outcomes.append(limited(megabytes, store.verify))
# it may do with what it has
assert outcomes[-1] is True, outcomes
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("name", ["BUILD", "OPEN"])
def test_without_memory(tmp_path: Path, name: str) -> None:
    if name == "OPEN":
        forge.sparse(tmp_path / "sparse", 64 << 20)
    code = SETUP + {"BUILD": BUILD, "OPEN": OPEN}[name]
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_without_room_for_a_thread(tmp_path: Path) -> None:
    code = "builder = DatastoreBuilder(path, vocab_size=50); builder.add(range(50))\n"
    code += "assert limited(1, builder.finish)"
    subprocess.run([sys.executable, "-c", SETUP + code, str(tmp_path)], check=True)
    with Datastore.open(tmp_path / "store") as store:
        store.verify()
        assert store.count([]) == 50
