"""Packages that are missing: every command says in a line what to install, or does without."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sssd import DatastoreBuilder
from sssd.cli import COMMANDS, main
from sssd.cli.missing import EXTRAS, REQUIRED, hint

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HF = {"torch", "transformers", "platformdirs", "xxhash"}
NEEDS = {
    ("demo",): HF,
    ("generate", "MODEL", "--prompt", "x"): HF,
    ("serve", "MODEL"): HF | {"starlette", "uvicorn", "pydantic"},
    ("profile", "MODEL"): HF,
    ("replay", "trace.jsonl"): set(),
    ("replay", "trace.jsonl", "--plot", "out.svg"): {"matplotlib"},
    ("replay", "trace.jsonl", "--tokenizer", "tokenizer.json"): {"tokenizers"},
    ("report", "trace.jsonl", "-o", "out.html"): set(),
    ("simulate", "trace.jsonl", "--cost", "h100-llama-3-8b-roofline", "--batch", "1"): set(),
    ("build", "-o", "new.sssd", "--force", "ids.npy", "--vocab-size", "9", "--end-token", "0"): set(),
    ("build", "-o", "new.sssd", "--force", "chat.parquet", "--vocab-size", "9"): {"pyarrow"},
    ("corpus", "add", "corpus", "ids.npy", "--vocab-size", "9", "--end-token", "0"): set(),
    ("info", "store.sssd"): set(),
    ("verify", "store.sssd"): set(),
    ("query", "store.sssd", "--ids", "1"): set(),
    ("doctor", "--json"): set(),
    ("completion", "bash"): {"shtab"},
}
"""What commands need beside numpy and rich."""
RUN = """
import contextlib, io, json, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from sssd.cli import main
done = []
for command in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            status = main(command)
        except SystemExit as end:
            status = end.code
    done.append((status, said.getvalue()))
print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands read."""
    import numpy as np

    folder = tmp_path_factory.mktemp("extras")
    record = {"prompt_ids": [1, 2, 3, 1], "response_ids": [2, 3, 4]}
    (folder / "trace.jsonl").write_text(json.dumps(record))
    (folder / "chat.parquet").write_bytes(b"PAR1")
    (folder / "tokenizer.json").write_text(
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'
    )
    np.save(folder / "ids.npy", np.array([1, 2, 3, 0], np.int32))
    with DatastoreBuilder(folder / "store.sssd", vocab_size=9) as builder:
        builder.add([1, 2, 3])
    return folder


def run(folder, missing, commands):
    """Exit status and words of each command where packages are missing."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, ",".join(missing)],
        cwd=folder,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def packages(extra):
    """The names to import of what an extra brings."""
    return [name for name, held in EXTRAS.items() if held == extra]


@pytest.mark.parametrize("extra", sorted({*EXTRAS.values()} - {"demo"}))
def test_every_command_names_the_extra_that_it_lacks(folder, extra):
    missing = packages(extra)
    # with all that a model needs, it would be loaded
    commands = [command for command, needs in NEEDS.items() if extra == "hf" or not needs & HF]
    for command, (status, said) in zip(commands, run(folder, missing, commands), strict=True):
        assert "Traceback" not in said
        if command[0] == "doctor":  # names them all
            assert status == 0
        elif NEEDS[command] & {*missing}:
            assert status in (1, 2), (command, said)
            assert said.count("pip install") == 1, (command, said)
            assert f"pip install 'sssd[{extra}]'" in said, (command, said)
        else:
            assert "pip install" not in said, (command, said)
            assert status == 0 or "chat.parquet" in command, (command, said)


@pytest.mark.parametrize("package", ["torch", "transformers", pytest.param("xxhash", marks=pytest.mark.slow)])
def test_a_single_package_of_an_extra_is_named(folder, package):
    if package == "xxhash":
        pytest.importorskip("transformers")
    command = ("generate", "MODEL", "--prompt", "x")
    ((status, said),) = run(folder, [package], [command])
    assert status == 2
    assert package in said
    assert "pip install 'sssd[hf]'" in said


def test_without_what_every_command_needs(folder):
    for package in REQUIRED:
        commands = [("replay", "trace.jsonl"), ("info", "store.sssd")]
        for status, said in run(folder, [package], commands[: 2 if package == "rich" else 1]):
            assert status == 2
            assert said.strip().endswith(f"pip install {package}")


def test_every_command_was_tried():
    assert {command[0] for command in NEEDS} == {*COMMANDS}


def test_hints_are_those_of_pyproject():
    extras = PROJECT["optional-dependencies"]
    brought = {}
    for extra in {*EXTRAS.values()}:
        for line in map(Requirement, extras[extra]):
            if line.name != "sssd":
                module = line.name.replace("-", "_").partition(".")[0].removesuffix("_api")
                brought[module] = extra
    assert brought == EXTRAS
    assert {Requirement(line).name for line in PROJECT["dependencies"]} == {*REQUIRED}


def test_all_brings_every_extra_for_users():
    (line,) = map(Requirement, PROJECT["optional-dependencies"]["all"])
    assert line.name == "sssd"
    # mini is a package of its own, which may come to a registry later
    assert {*EXTRAS.values()} - {"demo", "mini"} <= line.extras <= {*PROJECT["optional-dependencies"]}


def test_bugs_are_not_taken_for_missing_packages():
    assert hint(ModuleNotFoundError("No module named 'sssd.nothing'", name="sssd.nothing")) is None
    assert hint(ImportError("cannot import name 'x' from 'sssd'", name="sssd")) is None
    said = hint(ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint in PyTorch."))
    assert "sssd[hf]" in said


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [(["relpay"], "replay"), (["replay", "x", "--budgte", "3"], "--budgets"), (["simulat", "x"], "simulate")],
)
def test_what_was_meant_is_said(capsys, arguments, meant):
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_what_nobody_meant_is_not_guessed(capsys):
    with pytest.raises(SystemExit):
        main(["xyzzy"])
    assert "did you mean" not in capsys.readouterr().err


def test_completion_knows_commands_and_options(capsys, tmp_path):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    ask = f"source {script}; COMP_WORDS=(sssd-tools {{}}); COMP_CWORD={{}}; _shtab_sssd_tools; "
    ask += "echo ${{COMPREPLY[@]}}"
    for words, place, wanted in (("re", 1, {"replay", "report"}), ("replay --bud", 2, {"--budgets"})):
        done = subprocess.run(
            ["bash", "-c", ask.format(words, place)], capture_output=True, text=True, check=True
        )
        assert wanted == set(re.split(r"\s+", done.stdout.strip()))
