"""Breaks what `docs/guarantees.md` promises, one line at a time, and asks the one test that is to notice.

Usage: promises.py [--promise P] [--seconds S]

`promises.toml` names the lines and the tests. The code is broken in copies of the last commit, under
`target/mutants`, one for each of at most four cores. A run takes 20 minutes at most; the next one at the
same commit goes on where it ended: `target/mutants/verdicts.json` keeps what was found. Ends with 0 once
none is left and at least 95 % were noticed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mutants import PARTS, Mutant, build, run

ROOT = Path(__file__).parent.parent
COPIES = ROOT / "target/mutants"
WORKERS = max(1, min(4, os.cpu_count() or 1))
LONGEST = float(os.environ.get("SSSD_MUTANTS_LONGEST", "240"))
"""Seconds that the test of a mutant may take: what hangs has been noticed. More where the cores are busy."""
SCORE = 0.95


@dataclass(frozen=True)
class Row:
    """A mutant of promised behaviour, and the test that must notice."""

    promise: str
    mutant: Mutant
    test: str

    @property
    def is_python(self) -> bool:
        return self.test.startswith("tests/")

    @property
    def needs_extension(self) -> bool:
        return self.is_python and self.mutant.file.endswith(".rs")


def read_rows() -> list[Row]:
    """The rows of `promises.toml`: those in Rust first, those that need the extension built last."""
    known = {mutant.what: mutant for part in PARTS.values() for mutant in part.mutants}
    table = tomllib.loads((ROOT / "benches/promises.toml").read_text(encoding="utf-8"))
    rows = []
    for row in table["mutant"]:
        promise, what, test = row.pop("promise"), row.pop("what"), row.pop("test")
        rows.append(Row(promise, Mutant(what, **row) if row else known[what], test))
    return sorted(rows, key=lambda row: (row.needs_extension, row.is_python, row.mutant.file))


def ask(folder: Path, tests: list[str], longest: float) -> tuple[str, str]:
    """Runs tests: ``"passed"``, ``"failed"`` or ``"no test ran"``, and what they printed."""
    if tests[0].startswith("tests/"):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    else:
        command = ["cargo", "test", "--locked", "-p", *tests[0].split()]
    environment = os.environ | {
        "PYTHONPATH": str(folder / "python"),
        "CARGO_PROFILE_DEV_DEBUG": "0",
        "CARGO_TARGET_DIR": str(folder / "target"),
        "SSSD_FUZZ_FILES": "3000",
    }
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=longest)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "failed", f"nothing within {longest:.0f} s"
    ran = any(map(int, re.findall(r"(\d+) (?:passed|failed)", output)))
    if not ran and "(signal: " not in output:  # a test that ends its process has noticed
        return "no test ran", output
    return ("failed" if process.returncode else "passed"), output


def judge(folder: Path, row: Row) -> str:
    """Whether the test of a row notices its mutant."""
    path = folder / row.mutant.file
    whole = path.read_text()
    if whole.count(row.mutant.line) != 1:
        return f"does not apply: its line is there {whole.count(row.mutant.line)} times"
    try:
        path.write_text(whole.replace(row.mutant.line, row.mutant.instead))
        if row.needs_extension:
            build(folder)
        told, output = ask(folder, [row.test], LONGEST)
    except SystemExit as problem:
        told, output = "no test ran", str(problem)
    finally:
        path.write_text(whole)
        # failures that proptest remembers would be laid to the next mutants
        run(folder, "git", "clean", "-qfd", "rust")
    last = " | ".join(output.strip().splitlines()[-3:])
    return {"failed": "noticed", "passed": "**survived**"}.get(told, f"{told}: {last}")


def without_mutants(folder: Path, tests: list[str]) -> dict[str, bool]:
    """Whether tests pass in a copy as it is."""
    build(folder)
    passed = {}
    for test in tests:
        if not test.startswith("tests/"):
            passed[test] = ask(folder, [test], 4 * LONGEST)[0] == "passed"
    if python := [test for test in tests if test.startswith("tests/")]:
        told, output = ask(folder, python, 4 * LONGEST)
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        if told != "passed" and not failed:
            raise SystemExit(f"the tests did not run:\n{output[-2000:]}")
        passed |= {test: not any(name.startswith(test) for name in failed) for test in python}
    return passed


class Verdicts:
    """What was found at one commit, kept from run to run."""

    def __init__(self, commit: str) -> None:
        self.path, self.commit = COPIES / "verdicts.json", commit
        held = json.loads(self.path.read_text()) if self.path.exists() else {}
        found = held if held.get("commit") == commit else {}
        self.tests: dict[str, bool] = found.get("tests", {})
        self.rows: dict[str, str] = found.get("rows", {})
        self.lock = threading.Lock()

    def save(self) -> None:
        held = {"commit": self.commit, "tests": self.tests, "rows": self.rows}
        self.path.write_text(json.dumps(held, indent=1))


def copies(commit: str) -> list[Path]:
    """Worktrees of a commit, one for each worker."""
    run(ROOT, "git", "worktree", "prune")
    folders = [COPIES / str(worker) for worker in range(WORKERS)]
    for folder in folders:
        if not folder.exists():
            run(ROOT, "git", "worktree", "add", "--quiet", "--detach", str(folder), commit)
        done = run(folder, "git", "checkout", "--quiet", "--force", "--detach", commit)
        if done.returncode:
            raise SystemExit(done.stderr)
    return folders


def together(folders: list[Path], work) -> None:
    """Calls ``work(index, folder)`` for each folder, in threads."""
    problems = []

    def guarded(index: int, folder: Path) -> None:
        try:
            work(index, folder)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=guarded, args=pair) for pair in enumerate(folders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


def judge_all(rows: list[Row], verdicts: Verdicts, seconds: float) -> None:
    """Finds the missing verdicts, as far as the time goes."""
    started = time.monotonic()
    folders = copies(verdicts.commit)
    untried = [test for test in dict.fromkeys(row.test for row in rows) if test not in verdicts.tests]

    def try_tests(index: int, folder: Path) -> None:
        passed = without_mutants(folder, untried[index :: len(folders)])
        with verdicts.lock:
            verdicts.tests |= passed
            verdicts.save()

    def break_lines(_: int, folder: Path) -> None:
        while time.monotonic() - started < seconds:
            with verdicts.lock:
                if not left:
                    return
                row = left.pop(0)
            told = judge(folder, row) if verdicts.tests[row.test] else "its test fails without it"
            with verdicts.lock:
                verdicts.rows[row.mutant.what] = told
                verdicts.save()
                print(
                    f"{time.monotonic() - started:6.0f} s | {row.promise} | {row.mutant.what} | {told}",
                    flush=True,
                )

    together(folders, try_tests)
    left = [row for row in rows if row.mutant.what not in verdicts.rows]
    together(folders, break_lines)


def report(rows: list[Row], verdicts: Verdicts) -> bool:
    """Writes the table; whether enough were noticed."""
    score, total, lines = Counter(), Counter(), []
    names = sorted({row.promise for row in rows}, key=lambda name: (name[0], int(name[1:])))
    for row in sorted(rows, key=lambda row: names.index(row.promise)):
        told = verdicts.rows.get(row.mutant.what, "not run yet")
        score[row.promise] += told == "noticed"
        total[row.promise] += 1
        lines.append(f"| {row.promise} | {row.mutant.what} | `{row.test}` | {told} |")
    scores = ", ".join(f"{name} {score[name]}/{total[name]}" for name in names)
    summary = f"{score.total()} of {total.total()} are noticed by the test named"
    head = [
        "# Mutants of promises",
        "",
        f"`make mutants` at {verdicts.commit[:7]}: {summary}.",
        f"{scores}.",
        "",
        "| promise | mutant | test | |",
        "| --- | --- | --- | --- |",
    ]
    (COPIES / "report.md").write_text("\n".join([*head, *lines]) + "\n")
    unjudged = sum(row.mutant.what not in verdicts.rows for row in rows)
    print(f"{summary}, {unjudged} not run yet ({COPIES / 'report.md'}): {scores}")
    return not unjudged and score.total() >= SCORE * total.total()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--promise", default="", help="only the mutants of this row of docs/guarantees.md")
    parser.add_argument("--seconds", type=float, default=20 * 60, help="the time that a run may take")
    args = parser.parse_args()
    COPIES.mkdir(parents=True, exist_ok=True)
    rows = [row for row in read_rows() if args.promise in ("", row.promise)]
    verdicts = Verdicts(run(ROOT, "git", "rev-parse", "HEAD").stdout.strip())
    judge_all(rows, verdicts, args.seconds)
    if not report(rows, verdicts):
        raise SystemExit("mutants were not noticed, or not run yet (the next run goes on)")


if __name__ == "__main__":
    main()
