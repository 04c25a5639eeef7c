"""The wheel: what it holds, and that it works without this repository."""

import os
import subprocess
import sys
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
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not any(name.endswith("entry_points.txt") for name in names)


@pytest.mark.slow
def test_the_wheel_works_by_itself(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    code = f"""
import sssd
assert sssd.__file__.startswith({str(tmp_path)!r})
assert sssd.Drafter().begin([1, 2, 1]).draft().token_ids.tolist()[0] == 2
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, check=True)
