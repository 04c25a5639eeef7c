"""What holds for the package and the repository as a whole."""

import argparse
import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import sssd
from sssd import _core
from sssd.cli import COMMANDS

ROOT = Path(__file__).parent.parent


def test_import_is_light_and_quiet():
    code = (
        "import os, sys, numpy\n"
        "threads = os.listdir('/proc/self/task') if os.path.exists('/proc/self/task') else []\n"
        "import sssd\n"
        "heavy = {'torch', 'transformers', 'rich', 'tokenizers', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not threads or os.listdir('/proc/self/task') == threads\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_nothing_that_git_ignores_is_committed():
    listed = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == []


def test_package_is_typed_and_versioned():
    package = resources.files("sssd")
    assert package.joinpath("py.typed").is_file()
    assert package.joinpath("_core.pyi").is_file()
    assert metadata.version("sssd") == sssd.__version__
    assert metadata.metadata("sssd")["License-Expression"] == "Apache-2.0"
    assert [r for r in metadata.requires("sssd") or [] if "extra" not in r] == ["numpy>=1.26", "rich>=13"]


def test_the_stub_has_the_docstrings_of_the_extension():
    spec = importlib.util.spec_from_file_location("stubs", ROOT / ".ci/stubs.py")
    stubs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stubs)
    shown = {
        name: ast.get_docstring(node)
        for name, node in stubs.definitions(ast.parse(stubs.STUB.read_text())).items()
    }
    said = {name: stubs.documentation(_core, name) for name in shown}
    assert shown == said, "run `make stubs`"
    bare = {name for name, text in said.items() if not text and not name.rpartition(".")[2].startswith("__")}
    assert not bare, "document these in rust/sssd-py, then run `make stubs`"
    assert len(shown) > 100


def test_the_stub_shows_real_defaults():
    """stubtest compares those that both sides name."""
    assert not re.search(r"= \.\.\.", (ROOT / "python/sssd/_core.pyi").read_text())
    assert inspect.signature(sssd.Drafter).parameters["live_bytes"].default == 64 << 20


def test_tests_run_on_a_release_build():
    """But for those of `make debug`."""
    assert _core.build_profile == os.environ.get("SSSD_TEST_PROFILE", "release")


def test_everything_compiled_is_public_somewhere():
    from sssd import datastore, hardware

    names = {name for name in dir(_core) if isinstance(getattr(_core, name), type)}
    assert names <= set(sssd.__all__) | set(datastore.__all__) | set(hardware.__all__)


def test_classes_are_frozen():
    for file in (ROOT / "rust/sssd-py/src").glob("*.rs"):
        for arguments in re.findall(r"#\[pyclass\((.*?)\)\]", file.read_text(), re.S):
            assert "frozen" in arguments, f"{file.name}: {arguments}"


def test_no_program_is_called_sssd():
    """That name belongs to the System Security Services Daemon."""
    scripts = metadata.distribution("sssd").entry_points.select(group="console_scripts")
    assert [entry.name for entry in scripts] == ["sssd-tools"]


def test_help_and_info_import_only_what_they_show():
    code = (
        "import sys\n"
        "from sssd.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'sssd.replay', 'sssd.hardware', 'sssd.datastore'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["info", "--help"]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "show what a datastore holds" in done.stdout or "FILE" in done.stdout
    help_lines = subprocess.run(
        [sys.executable, "-m", "sssd", "--help"], capture_output=True, text=True, check=True
    )
    assert all(f"    {name}" in help_lines.stdout for name in COMMANDS)


def test_every_command_can_be_run_and_describes_itself():
    for name in COMMANDS:
        module = importlib.import_module(f"sssd.cli.{name}")
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        assert callable(module.run)
        assert parser.format_help()


def test_tables_are_never_cut(monkeypatch, capsys):
    from rich.table import Table

    from sssd.cli.output import show

    monkeypatch.setenv("COLUMNS", "30")
    table = Table()
    for i in range(12):
        table.add_column(f"column {i}", justify="right")
    table.add_row(*(f"{i}.123456" for i in range(12)))
    show(table)
    shown = capsys.readouterr().out
    assert all(f"column {i}" in shown and f"{i}.123456" in shown for i in range(12))


def test_the_weights_that_ship_are_those_that_their_provenance_names():
    folder = ROOT / "rust/sssd-core/src/predictor"
    provenance = tomllib.loads((folder / "weights.toml").read_text())
    weights = (folder / "weights.bin").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == provenance["sha256"]
    assert sssd.Drafter().state_dict() == {"weights.v2": weights}


def test_the_network_that_ships_is_that_of_its_provenance():
    folder = ROOT / "rust/sssd-core/src/ranking"
    provenance = tomllib.loads((folder / "network.toml").read_text())
    assert hashlib.sha256((folder / "network.bin").read_bytes()).hexdigest() == provenance["sha256"]


def test_readers_load_what_they_need_when_they_need_it():
    code = (
        "import sys\n"
        "import sssd.datastore, sssd.reading, sssd.replay\n"
        "heavy = {'pyarrow', 'fsspec', 'jinja2', 'tokenizers', 'transformers', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
