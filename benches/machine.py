"""The state machine of tests/serving/test_machine.py at length.

Usage: machine.py [--operations 1000000] [--first-seed 1] [--json FILE]

One run of pytest after the other, each with the next seed, until so many operations are done. A failure is
counted, its output shown, and the next seed goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

TEST = Path(__file__).parents[1] / "tests" / "serving" / "test_machine.py"
SHARED_MEMORY = Path("/dev/shm")


def run(seed: int, folder: Path) -> tuple[bool, dict]:
    """Whether a seed's run passed, and what it did."""
    done = folder / "counts.json"
    done.unlink(missing_ok=True)
    environment = {**os.environ, "SSSD_FULL_TESTS": "1", "SSSD_MACHINE_COUNTS": str(done)}
    if SHARED_MEMORY.is_dir():
        # states are saved and loaded thousands of times
        environment["TMPDIR"] = str(SHARED_MEMORY)
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(TEST), f"--hypothesis-seed={seed}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        print(result.stdout[-40000:], result.stderr[-2000:], flush=True)
    return result.returncode == 0, json.loads(done.read_text()) if done.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    by_rule: Counter = Counter()
    checks: Counter = Counter()
    seeds, failed, seconds = [], [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        while by_rule.total() < arguments.operations and len(failed) < 5:
            seed = arguments.first_seed + len(seeds)
            seeds.append(seed)
            passed, counts = run(seed, Path(folder))
            failed += [] if passed else [seed]
            seconds += counts.pop("cpu_seconds", 0.0)
            checks.update(counts.pop("checks", {}))
            counts.pop("operations", None)
            counts.pop("finished", None)
            by_rule.update(counts)
            print(
                f"seed {seed}: {'passed' if passed else 'FAILED'}, {by_rule.total()} operations", flush=True
            )
    result = {
        "operations": by_rule.total(),
        "seeds": seeds,
        "failures": failed,
        "cpu_seconds": round(seconds),
        "compared": dict(checks.most_common()),
        "by_rule": dict(by_rule.most_common()),
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
