"""The wheel: what it holds, that it works without this repository, and how it is released."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    maturin = [
        sys.executable,
        "-m",
        "maturin",
        "build",
        "--release",
        "--locked",
        "--strip",
        "--quiet",
        "--out",
        str(folder),
    ]
    subprocess.run(maturin, cwd=ROOT, check=True)
    (path,) = folder.iterdir()
    return path


@pytest.mark.slow
def test_one_wheel_serves_every_python(wheel: Path) -> None:
    assert "-cp311-abi3-" in wheel.name


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    source = ROOT / "python"
    tracked = subprocess.run(
        ["git", "ls-files", "."], cwd=source, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    packaged = {name for name in names if ".dist-info/" not in name and ".libs/" not in name}
    assert packaged == {*tracked, "sssd/_core.abi3.so"}
    for held in ("licenses/LICENSE", "licenses/THIRD-PARTY-NOTICES", "sboms/sssd-py.cyclonedx.json"):
        assert any(name.endswith(f".dist-info/{held}") for name in names), held
    with zipfile.ZipFile(wheel) as file:
        scripts = file.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert scripts.split() == [
        *("[console_scripts]", "sssd-tools=sssd.cli:main"),
        *("[sglang.srt.plugins]", "sssd=sssd.sglang:plugin"),
        *("[vllm.general_plugins]", "sssd=sssd.vllm.plugin:plugin"),
    ]


@pytest.mark.slow
def test_the_wheel_is_stripped(wheel: Path) -> None:
    assert wheel.stat().st_size < 2_000_000  # several times that with symbols


@pytest.mark.slow
def test_the_wheel_works_by_itself(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    code = f"""
import runpy, sssd
assert sssd.__file__.startswith({str(tmp_path)!r})
runpy.run_path({str(ROOT / ".ci/smoke.py")!r}, run_name="__main__")
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, check=True)


def test_every_crate_that_is_linked_in_has_its_licence_in_the_notices() -> None:
    if shutil.which("cargo") is None:
        pytest.skip("no cargo here")
    tree = ["cargo", "tree", "--locked", "--offline", "-p", "sssd-py", "-e", "no-dev,no-build,no-proc-macro"]
    listed = subprocess.run(
        [*tree, "--prefix", "none"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    crates = {tuple(line.split()[:2]) for line in listed.splitlines() if line and "(/" not in line}
    notices = (ROOT / "THIRD-PARTY-NOTICES").read_text()
    assert len(crates) > 20
    missing = {crate for crate in crates if f"  {crate[0]} {crate[1][1:]}\n" not in notices}
    assert not missing, "run `make notices`"


def test_the_sdist_holds_what_distributions_build_test_and_document_with(tmp_path: Path) -> None:
    maturin = [sys.executable, "-m", "maturin", "sdist", "--out", str(tmp_path)]
    subprocess.run(maturin, cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.iterdir()
    import tarfile

    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = "LICENSE README.md CHANGELOG.md Cargo.lock constraints.txt THIRD-PARTY-NOTICES pyproject.toml"
    wanted += " tests/test_repo.py tests/data/golden/state-3.xz docs/architecture.md docs/images/live.png"
    wanted += (
        " rust/sssd-core/src/predictor/weights.bin python/sssd/pictures/page.js examples/custom_decoder.py"
    )
    assert {*wanted.split()} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".so", ".pyc"))]


class TestRelease:
    """`.github/workflows/release.yml`: what is built is tried, and nothing else is published."""

    @pytest.fixture
    def jobs(self) -> dict:
        yaml = importlib.import_module("yaml")
        return yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]

    def test_every_wheel_is_tried_on_every_python(self, jobs: dict) -> None:
        built = {row["target"] for row in jobs["wheels"]["strategy"]["matrix"]["include"]}
        matrix = jobs["test"]["strategy"]["matrix"]
        musl = {row["target"] for row in jobs["test-musl"]["strategy"]["matrix"]["include"]}
        assert {*matrix["target"]} | musl == built
        assert {row["target"] for row in matrix["include"]} == {*matrix["target"]}
        classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
        versions = {found[1] for line in classifiers if (found := re.search(r":: (3\.\d+)$", line))}
        assert versions | {"3.14t"} == {*matrix["python"]}

    def test_wheels_are_locked_and_stripped_and_one_is_free_threaded(self, jobs: dict) -> None:
        builds = [step for step in jobs["wheels"]["steps"] if "maturin" in step.get("uses", "")]
        pythons = []
        for step in builds:
            arguments = step["with"]["args"].split()
            assert {"--release", "--locked", "--strip"} <= {*arguments}
            pythons.append(arguments[-1])
        assert pythons == ["python3.11", "python3.14t"]

    def test_only_what_was_tried_is_published_and_attested(self, jobs: dict) -> None:
        publish = jobs["publish"]
        assert {*publish["needs"]} == {*jobs} - {"publish", "wheels"}
        assert all(jobs[name]["needs"] == "wheels" for name in ("test", "test-musl"))
        assert publish["environment"] == "release"
        steps = [step.get("uses", step.get("run", "")) for step in publish["steps"]]
        attested = next(i for i, step in enumerate(steps) if "attest-build-provenance" in step)
        published = next(i for i, step in enumerate(steps) if "uv publish" in step)
        assert attested < published
        assert "--trusted-publishing always" in steps[published]

    def test_actions_are_of_a_version(self, jobs: dict) -> None:
        used = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", name) for name in used), used

    def test_the_version_is_the_same_everywhere(self) -> None:
        version = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
        assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
