"""Settings that must hold before torch and transformers are imported."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Two OpenMP threads that spin on a busy machine can make torch thirty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a test means by no datastore is none; those of the mini store bring a text of their own.
sys.modules["sssd_mini"] = None  # type: ignore[assignment]


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that has system calls fail, to be preloaded."""
    compiler = shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs gcc and a system that preloads libraries")
    library = tmp_path_factory.mktemp("shim") / "fault.so"
    source = Path(__file__).with_name("datastore") / "fault.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of a size."""
    mounted = []

    def mount(size: str) -> Path:
        program = shutil.which("mount")
        if program is None or os.geteuid() != 0:
            pytest.skip("mounting a small disk needs root")
        command = [program, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", tmp_path]
        if subprocess.run(command, check=False).returncode:
            pytest.skip("this system does not let root mount a small disk")
        mounted.append(tmp_path)
        return tmp_path

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)
