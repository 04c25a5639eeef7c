"""Breaks the predictor one line at a time and asks the tests whether they notice.

Usage: mutants.py FOLDER OUT.md

FOLDER is a copy of this repository that may be broken (`git worktree add --detach FOLDER`); builds are made
there, hardly optimised. A mutant that does not apply is an error: the list follows the code.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CORE = "rust/sssd-core/src"
TESTS = ("tests/test_reference.py", "tests/test_properties.py", "tests/test_learning.py")


@dataclass(frozen=True)
class Mutant:
    what: str
    file: str
    line: str
    instead: str


MUTANTS = [
    Mutant(
        "samples keep their length as they descend",
        f"{CORE}/predictor/vote.rs",
        "Length::PlusOne => sample.length + 1",
        "Length::PlusOne => sample.length",
    ),
    Mutant(
        "a longer context's escape is not passed on to the shorter ones",
        f"{CORE}/predictor/blend.rs",
        "        rest *= escape;\n        contexts.push((class as u8, cell));",
        "        contexts.push((class as u8, cell));",
    ),
    Mutant(
        "votes of shorter contexts are not added to nested ones",
        f"{CORE}/predictor/blend.rs",
        "values[class] += shorter;",
        "values[class] += 0.0 * shorter;",
    ),
    Mutant(
        "all sources weigh alike",
        f"{CORE}/predictor/mix.rs",
        "model.gate(cell).exp()",
        "(0.0 * model.gate(cell)).exp()",
    ),
    Mutant(
        "escapes are learned past the context that held the truth",
        f"{CORE}/predictor/learn.rs",
        "            if !escaped {\n                break;",
        "            if false {\n                break;",
    ),
    Mutant(
        "gates learn with the wrong sign",
        f"{CORE}/predictor/mix.rs",
        "weight * prob / truth.mixed - weight",
        "weight - weight * prob / truth.mixed",
    ),
    Mutant(
        "refinements learn the opposite outcome",
        f"{CORE}/predictor/learn.rs",
        "model.learn_refinement(support.row(), candidate.mixed, came_true)",
        "model.learn_refinement(support.row(), candidate.mixed, !came_true)",
    ),
    Mutant(
        "the outcome of a draft is not noted for the request",
        f"{CORE}/predictor/learn.rs",
        "candidate.refined, came_true)",
        "candidate.refined, false)",
    ),
    Mutant(
        "feedback learns by a longer class than was said",
        f"{CORE}/predictor/learn.rs",
        "map_or(NO_CLASS, |said| said.2)",
        "map_or(NO_CLASS, |said| said.2 + 1)",
    ),
    Mutant(
        "feedback passes no escape on",
        f"{CORE}/predictor/blend.rs",
        "            rest *= escape;\n            contexts.push((class, cell));",
        "            contexts.push((class, cell));",
    ),
    Mutant(
        "escapes of nested sources see each length's own votes",
        f"{CORE}/predictor/blend.rs",
        "if nested { count + tally.counts[source][class] }",
        "if false { count + tally.counts[source][class] }",
    ),
    Mutant(
        "a candidate counts at every context it followed",
        f"{CORE}/predictor/vote.rs",
        "tally.distinct[source][usize::from(*held)] -= 1;",
        "tally.distinct[source][usize::from(*held)] -= 0;",
    ),
    Mutant(
        "siblings are not scaled to their parent",
        f"{CORE}/predictor/refine.rs",
        "above / total.max(1.0)",
        "above / total.max(9.0) * 9.0",
    ),
    Mutant(
        "tokens in a short context count as recent ones too",
        f"{CORE}/predictor/refine.rs",
        "|| candidate.classes[LOWER] != NO_CLASS",
        "&& candidate.classes[LOWER] != NO_CLASS",
    ),
    Mutant(
        "lists are offered by their probability, not their path's",
        f"{CORE}/predictor/mix.rs",
        "if reach * prob >= WORTH_OFFERING",
        "if weight * prob >= WORTH_OFFERING",
    ),
    Mutant(
        "a cut draft teaches what its last node would not",
        f"{CORE}/predictor/mod.rs",
        "self.budget as i32 - 1",
        "self.budget as i32",
    ),
    Mutant(
        "short contexts are looked up at every node",
        f"{CORE}/predictor/gather.rs",
        "if child.path >= WORTH_LOWER {",
        "if child.path >= 0.0 {",
    ),
    Mutant(
        "short contexts are looked up in copies as well",
        f"{CORE}/predictor/gather.rs",
        "&& !copied {",
        "&& (!copied || copied) {",
    ),
    Mutant(
        "a sample of the datastore stands for itself alone",
        f"{CORE}/predictor/arena.rs",
        "weight: found.weight",
        "weight: 1.0",
    ),
    Mutant(
        "the age is that of the first token",
        f"{CORE}/predictor/mod.rs",
        "(max_nodes, inputs.age)",
        "(max_nodes, 0)",
    ),
    Mutant(
        "a class has one length more",
        f"{CORE}/sources/mod.rs",
        "0, 0, 1, 2, 3, 4, 5, 6, 6, 7,",
        "0, 0, 1, 2, 3, 4, 5, 6, 6, 6,",
    ),
    Mutant(
        "fewer samples of shorter lengths",
        f"{CORE}/sources/request.rs",
        "const SHORTER_SAMPLES: usize = 16",
        "const SHORTER_SAMPLES: usize = 15",
    ),
    Mutant(
        "requests hand on half of what they learn",
        f"{CORE}/predictor/weights.rs",
        "i32::from(own.value)) / 4)",
        "i32::from(own.value)) / 2)",
    ),
    Mutant(
        "a recent token counts as long ago",
        f"{CORE}/predictor/support.rs",
        "0..64 => Self::Just",
        "0..63 => Self::Just",
    ),
    Mutant(
        "refinements are not interpolated",
        f"{CORE}/predictor/weights.rs",
        "let above = scale - step as f32;",
        "let above = 0.0 * (scale - step as f32);",
    ),
    Mutant(
        "ages learn with the wrong sign",
        f"{CORE}/predictor/weights.rs",
        "AGE_RATE * gradient",
        "-AGE_RATE * gradient",
    ),
    Mutant(
        "the noise of a bias is not taken off",
        f"{CORE}/predictor/correct.rs",
        "bias.value - 0.5 *",
        "bias.value - 0.0 *",
    ),
    Mutant(
        "outcomes do not fade",
        f"{CORE}/predictor/correct.rs",
        "const FADING: f32 = 0.998",
        "const FADING: f32 = 1.0",
    ),
    Mutant(
        "a copy found again counts as any match",
        f"{CORE}/sources/aligned.rs",
        "1..=4 => 4,",
        "1..=4 => length + 1,",
    ),
    Mutant(
        "a copy is given up at once",
        f"{CORE}/sources/aligned.rs",
        "const PATIENCE: u16 = 16",
        "const PATIENCE: u16 = 1",
    ),
    Mutant(
        "what came stays among the lately probable",
        f"{CORE}/sources/feedback.rs",
        "self.tokens.retain(|held| held.0 != came);",
        "self.tokens.retain(|held| held.0 != came || held.1 > 0.0);",
    ),
    Mutant(
        "live matches of the shortest length are left out",
        f"{CORE}/sources/live.rs",
        "(ORDERS[order]..longer).contains(&length) &&",
        "(ORDERS[order] + 1..longer).contains(&length) &&",
    ),
    Mutant(
        "weights of another layout are taken",
        f"{CORE}/predictor/weights.rs",
        "} else if version != VERSION.to_le_bytes() {",
        "} else if version == [0xff; 4] {",
    ),
]


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def build(folder: Path) -> None:
    profile = {"LTO": "off", "CODEGEN_UNITS": "16", "INCREMENTAL": "true", "OPT_LEVEL": "1", "DEBUG": "0"}
    environment = {f"CARGO_PROFILE_RELEASE_{name}": value for name, value in profile.items()}
    environment |= {"CARGO_TARGET_DIR": str(folder / "target"), "CARGO_BUILD_JOBS": "2"}
    maturin = str(Path(sys.executable).parent / "maturin")
    built = run(folder, maturin, "develop", "--release", "--skip-install", **environment)
    if built.returncode:
        raise SystemExit(f"a mutant does not compile:\n{built.stderr[-2000:]}")


def killers(folder: Path) -> list[str]:
    """The unit tests that fail, and the first test in Python that does."""
    rust = run(folder, "cargo", "test", "--locked", "--lib", "-p", "sssd-core")
    found = set(re.findall(r"^test (\S+) \.\.\. FAILED$", rust.stdout, re.MULTILINE))
    command = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS)
    tests = run(folder, *command, PYTHONPATH=str(folder / "python"))
    failed = re.findall(r"^FAILED \S+?::([^\s\[]+)", tests.stdout, re.MULTILINE)
    if (rust.returncode and not found) or (tests.returncode and not failed):
        raise SystemExit(f"the tests did not run:\n{rust.stderr[-2000:]}{tests.stdout[-2000:]}")
    return sorted(found | set(failed))


def main(folder: Path, out: Path) -> None:
    build(folder)
    if broken := killers(folder):
        raise SystemExit(f"tests fail without any mutant: {broken}")
    rows = []
    for mutant in MUTANTS:
        path = folder / mutant.file
        whole = path.read_text()
        if whole.count(mutant.line) != 1:
            raise SystemExit(f"{mutant.file} has this {whole.count(mutant.line)} times: {mutant.line}")
        try:
            path.write_text(whole.replace(mutant.line, mutant.instead))
            build(folder)
            found = killers(folder)
        finally:
            path.write_text(whole)
            # failures that proptest remembers would be laid to the next mutants
            run(folder, "git", "clean", "-qfd", "rust")
        killed = ", ".join(f"`{name}`" for name in found) or "**nothing**"
        rows.append(f"| {mutant.what} | `{mutant.file.removeprefix(CORE + '/')}` | {killed} |")
        print(rows[-1], flush=True)
    commit = run(folder, "git", "rev-parse", "--short", "HEAD").stdout.strip()
    killed = sum("**nothing**" not in row for row in rows)
    head = [
        "# Mutants of the predictor",
        "",
        f"`python benches/mutants.py` at {commit}: {killed} of {len(rows)} one-line mutants are noticed by",
        f"the unit tests of sssd-core or {', '.join(f'`{test}`' for test in TESTS)}.",
        "",
        "| mutant | file | noticed by |",
        "| --- | --- | --- |",
    ]
    out.write_text("\n".join([*head, *rows]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
