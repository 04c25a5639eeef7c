"""Breaks a part of the code, one line at a time, and asks all tests of that part whether they notice.

Usage: mutants.py predictor|sizing|engine FOLDER OUT.md

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
ENGINE = "rust/sssd-engine"


@dataclass(frozen=True)
class Mutant:
    what: str
    file: str
    line: str
    instead: str


PREDICTOR = [
    Mutant(
        "samples keep their length as they descend",
        f"{CORE}/predictor/vote.rs",
        "Length::PlusOne => sample.length + 1",
        "Length::PlusOne => sample.length",
    ),
    Mutant(
        "a longer context's escape is not passed on to the shorter ones",
        f"{CORE}/predictor/blend.rs",
        "        rest *= escape;\n        push(contexts, (class as u8, cell));",
        "        push(contexts, (class as u8, cell));",
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
        "            rest *= escape;\n            push(contexts, (class, cell));",
        "            push(contexts, (class, cell));",
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
        "self.max_nodes as i32 - 1",
        "self.max_nodes as i32",
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
        "i32::from(self.value)) / 4)",
        "i32::from(self.value)) / 2)",
    ),
    Mutant(
        "a recent token counts as long ago",
        f"{CORE}/predictor/support.rs",
        "0..64 => Self::Just",
        "0..63 => Self::Just",
    ),
    Mutant(
        "refinements are not interpolated",
        f"{CORE}/predictor/overlay.rs",
        "let above = scale - step as f32;",
        "let above = 0.0 * (scale - step as f32);",
    ),
    Mutant(
        "a changed word moves those after it on its page to no other place",
        f"{CORE}/predictor/overlay.rs",
        "page.before[at / 8 + 1..].iter_mut().for_each(|before| *before += 1);",
        "page.before[at / 8 + 1..].iter_mut().for_each(|before| *before += 0);",
    ),
    Mutant(
        "what a kind of evidence says is kept as it was at first",
        f"{CORE}/predictor/correct.rs",
        "if *sum != new {",
        "if *sum == 0.0 {",
    ),
    Mutant(
        "ages learn with the wrong sign",
        f"{CORE}/predictor/overlay.rs",
        "AGE_RATE * gradient",
        "-AGE_RATE * gradient",
    ),
    Mutant(
        "the noise of a bias is not taken off",
        f"{CORE}/predictor/correct.rs",
        "self.value - 0.5 *",
        "self.value - 0.0 *",
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

SIZING = [
    Mutant(
        "a single draft is cut for its caller only",
        f"{ENGINE}/src/engine.rs",
        "sequence.end_draft(nodes).clone()",
        "sequence.end_draft(limits.max_nodes).first(nodes)",
    ),
    Mutant(
        "trees of a batch are cut for their caller only",
        f"{ENGINE}/src/batch.rs",
        "sequence.end_draft(slot.nodes)",
        "sequence.end_draft(usize::MAX)",
    ),
    Mutant(
        "a draft that is cut keeps its limit",
        f"{CORE}/predictor/mod.rs",
        "self.max_nodes = nodes;",
        "",
    ),
    Mutant(
        "a draft that is given out whole is cut all the same",
        f"{CORE}/predictor/mod.rs",
        "if nodes >= self.tree.len() {",
        "if nodes > self.tree.len() {",
    ),
    Mutant(
        "a draft of which nothing is left is awaited",
        f"{CORE}/predictor/mod.rs",
        "if nodes == 0 {",
        "if nodes == usize::MAX {",
    ),
    Mutant(
        "nodes that were cut off are accepted",
        f"{CORE}/predictor/mod.rs",
        "&& node < self.tree.len()\n            {\n                accepted += 1;",
        "{\n                accepted += 1;\n                if node >= self.tree.len() { continue; }",
    ),
    Mutant(
        "a draft is counted at every extension after it",
        f"{CORE}/predictor/mod.rs",
        "(self.followed? == 0).then(|| self.tree.len())",
        "self.followed.map(|_| self.tree.len())",
    ),
    Mutant(
        "all tokens beyond the first are accepted",
        f"{ENGINE}/src/engine.rs",
        "self.metrics.outcomes(outcome);",
        "let accepted = tokens.len().max(1) - 1;\n"
        "self.metrics.outcomes(outcome.map(|told| sssd_core::Outcome { accepted, ..told }));",
    ),
    Mutant(
        "the least that a request may have is not given",
        f"{ENGINE}/src/batch.rs",
        "slot.nodes = count.max(plan.min_nodes.min(slot.tree.len()));",
        "slot.nodes = count.min(count + plan.min_nodes);",
    ),
    Mutant(
        "a second is worth what one request makes of it",
        f"{ENGINE}/src/sizing/costs.rs",
        "requests as f64 / self.seconds[0]",
        "requests.min(1) as f64 / self.seconds[0]",
    ),
    Mutant(
        "padding stays empty",
        f"{ENGINE}/src/sizing/costs.rs",
        "tree.len().min(best.1)",
        "tree.len().min(best.1.saturating_sub(1))",
    ),
    Mutant(
        "the price of a pass is that of the size before",
        f"{ENGINE}/src/sizing/costs.rs",
        "(self.seconds[index] - self.seconds[0]) * rate",
        "(self.seconds[index.saturating_sub(1)] - self.seconds[0]) * rate",
    ),
    Mutant(
        "trees of the step before are priced too",
        f"{ENGINE}/src/sizing/costs.rs",
        "        self.trees.clear();",
        "",
    ),
    Mutant(
        "a step prices in new memory",
        f"{ENGINE}/src/batch.rs",
        "allocation.clear();",
        "*allocation = Allocation::default();",
    ),
    Mutant(
        "the rule forgets what it has learned of a request",
        f"{ENGINE}/src/batch.rs",
        "        *request.pace() = pace;\n",
        "",
    ),
    Mutant(
        "requests that were not drafted for are judged",
        f"{ENGINE}/src/batch.rs",
        "if plan.limits.max_nodes == 0 || slot.drafted.is_none() {",
        "if false {",
    ),
    Mutant(
        "rows of a draft that is gone teach",
        f"{CORE}/sequence.rs",
        "        self.drafted_at = usize::MAX;\n",
        "",
    ),
    Mutant(
        "the rule drafts before it knows plain steps",
        f"{ENGINE}/src/sizing/rule.rs",
        "(due == 0).then_some(",
        "true.then_some(",
    ),
    Mutant(
        "the rate may sink below plain decoding's",
        f"{ENGINE}/src/sizing/rule.rs",
        "costs.plain_rate(batch) * self.speedup.max(1.0)",
        "costs.plain_rate(batch) * self.speedup",
    ),
    Mutant(
        "drafting that loses goes on",
        f"{ENGINE}/src/sizing/rule.rs",
        "} else if self.account < -options.debt {",
        "} else if false {",
    ),
    Mutant(
        "what a draft cost is not held against it",
        f"{ENGINE}/src/sizing/rule.rs",
        "(gain - self.rate * spent - pace.worth)",
        "(gain - 0.0 * spent - pace.worth)",
    ),
    Mutant(
        "a change of the machine's speed goes unnoticed",
        f"{ENGINE}/src/sizing/clock.rs",
        "self.has_changed |= surprise.abs() > options.change;",
        "",
    ),
    Mutant(
        "corrected times may fall with the width",
        f"{ENGINE}/src/sizing/clock.rs",
        "*time = (above + below) / 2.0;",
        "let _ = (above, below);",
    ),
    Mutant(
        "curves end where they were measured",
        f"{ENGINE}/src/sizing/curve.rs",
        "low + share * (values(index + 1) - low)",
        "low + share.min(1.0) * (values(index + 1) - low)",
    ),
    Mutant(
        "trees of a batch have no sources",
        "rust/sssd-py/src/draft_batch.rs",
        "*to = from as i8;",
        "*to = from as i8 | -1;",
    ),
    Mutant(
        "a node of a written-to buffer may be its own parent",
        f"{CORE}/tree.rs",
        "if parent < ROOT || parent >= node as i32 {",
        "if parent < ROOT || parent > node as i32 {",
    ),
]


ENGINE_MUTANTS = [
    Mutant(
        "a new namespace begins with what the default one has learned",
        f"{ENGINE}/src/tenants.rs",
        "        let (number, namespace) = (held.made, Arc::new(namespace));",
        'if let Some(first) = held.by_name.get("")'
        "&& let Ok(bytes) = first.namespace.with_model(sssd_core::Model::to_bytes)"
        "{ let _ = namespace.set_weights(&bytes); }"
        "let (number, namespace) = (held.made, Arc::new(namespace));",
    ),
    Mutant(
        "names that differ in case are one",
        f"{ENGINE}/src/tenants.rs",
        "if let Some(tenant) = held.by_name.get_mut(name) {",
        "if let Some((_, tenant)) = held.by_name.iter_mut().find(|one| one.0.eq_ignore_ascii_case(name)) {",
    ),
    Mutant(
        "time to live counts from the last begin",
        f"{ENGINE}/src/tenants.rs",
        "self.used.max(self.namespace.last_end()).checked_add(ttl)",
        "self.used.checked_add(ttl)",
    ),
    Mutant(
        "what is restored comes on top of what was there",
        f"{ENGINE}/src/engine.rs",
        "            self.remove_namespace(&name);\n",
        "",
    ),
    Mutant(
        "nobody may interrupt a long prompt",
        f"{ENGINE}/src/engine.rs",
        "sequence.prefill(piece)?;\n                if piece.len() == PIECE && interrupted() {",
        "sequence.prefill(piece)?;\n                if piece.len() > PIECE && interrupted() {",
    ),
    Mutant(
        "a fork is not counted",
        f"{ENGINE}/src/engine.rs",
        "        Metrics::count(&self.metrics.begun, 1);\n        Ok(Arc::new(Request::new(fork)))",
        "        Ok(Arc::new(Request::new(fork)))",
    ),
    Mutant(
        "a panic is not counted",
        f"{ENGINE}/src/engine.rs",
        "        if let Err(RequestError::Failed(_)) = &done {",
        "        if let Err(RequestError::Closed) = &done {",
    ),
    Mutant(
        "a request that is there twice is served twice",
        f"{ENGINE}/src/request.rs",
        "self.batch.swap(batch, Ordering::Relaxed) != batch",
        "self.batch.swap(batch, Ordering::Relaxed) <= batch",
    ),
    Mutant(
        "a prompt in the background comes backwards",
        f"{ENGINE}/src/request.rs",
        "            self.backlog[rest..].reverse();\n",
        "",
    ),
    Mutant(
        "a prompt that is indexed stays charged",
        f"{ENGINE}/src/request.rs",
        "            self.reservation = None;\n",
        "",
    ),
    Mutant(
        "a prompt that does not fit leaves its request half indexed",
        f"{ENGINE}/src/request.rs",
        "if indexing || unwound => Self::end(state, full.clone()),",
        "if unwound => Self::end(state, full.clone()),",
    ),
    Mutant(
        "a request that panicked goes on",
        f"{ENGINE}/src/request.rs",
        "Err(failure @ RequestError::Failed(_)) => Self::end(state, failure.clone()),",
        "Err(RequestError::Failed(_)) => {}",
    ),
    Mutant(
        "a shared budget is one node larger",
        f"{ENGINE}/src/batch.rs",
        "            keys.truncate(left);",
        "            keys.truncate(left + 1);",
    ),
    Mutant(
        "trees that could grow are left as they are",
        f"{ENGINE}/src/batch.rs",
        "if stopped && slot.nodes == slot.tree.len() && slot.nodes > 0 {",
        "if stopped && slot.nodes > slot.tree.len() {",
    ),
    Mutant(
        "what went wrong in a step is said of the next one too",
        f"{ENGINE}/src/batch.rs",
        "(slot.failure, slot.outcome, slot.nodes, slot.drafted) = (None, None, 0, None);",
        "(slot.outcome, slot.nodes, slot.drafted) = (None, 0, None);",
    ),
    Mutant(
        "values are counted one power of two too high",
        f"{ENGINE}/src/metrics.rs",
        "(u64::BITS - value.leading_zeros()) as usize)",
        "(u64::BITS - value.leading_zeros()) as usize + 1)",
    ),
    Mutant(
        "how often documents were of use is not saved",
        f"{ENGINE}/src/state.rs",
        "self.put(&used.to_le_bytes())?;",
        "self.put(&(used & 0).to_le_bytes())?;",
    ),
    Mutant(
        "two fields of the saved state are swapped",
        f"{ENGINE}/src/state.rs",
        "writer.number(identity.live_bytes)?;\n        writer.number(identity.soft_bytes)?;",
        "writer.number(identity.soft_bytes)?;\n        writer.number(identity.live_bytes)?;",
    ),
    Mutant(
        "a state is not written out before it takes the old one's place",
        f"{ENGINE}/src/state.rs",
        "            file.sync_all()?;\n",
        "",
    ),
    Mutant(
        "a state is written over the old one",
        f"{ENGINE}/src/state.rs",
        "path.persist(folder.join(FILE)).map_err(|failure| failure.error)?;",
        "std::fs::copy(&path, folder.join(FILE))?;",
    ),
    Mutant(
        "the checksum of a state is not compared",
        f"{ENGINE}/src/state.rs",
        "if self.array()? != hash.digest().to_le_bytes() {",
        "if self.array::<8>()? == [0; 8] {",
    ),
    Mutant(
        "nothing is kept for requests that run",
        f"{CORE}/memory.rs",
        "if entering { self.limit - self.limit / KEPT }",
        "if entering { self.limit - self.limit / usize::MAX }",
    ),
    Mutant(
        "bytes that are handed over are held twice",
        f"{CORE}/memory.rs",
        "        self.bytes -= bytes;\n        let Self { ref pool, limit, entering, shared, .. } = *self;",
        "        let Self { ref pool, limit, entering, shared, .. } = *self;",
    ),
    Mutant(
        "uses of documents are not restored",
        f"{CORE}/sources/live.rs",
        "self.append(part, used, &mut lock(&self.paid));",
        "self.append(part, used & 0, &mut lock(&self.paid));",
    ),
    Mutant(
        "a tree that is cut keeps its sources",
        f"{CORE}/tree.rs",
        "        self.probs.truncate(nodes);\n        self.sources.truncate(nodes);",
        "        self.probs.truncate(nodes);",
    ),
    Mutant(
        "one node too deep is drafted at the end of a request",
        f"{CORE}/sequence.rs",
        "self.predicted + 1);",
        "self.predicted);",
    ),
    Mutant(
        "what an output copies is not taken back with its tokens",
        f"{CORE}/sequence.rs",
        "                self.aligned = aligned;",
        "                drop(aligned);",
    ),
    Mutant(
        "a fork holds no memory of its own",
        f"{CORE}/sequence.rs",
        "        fork.reserve()?;\n",
        "        fork.reservation.try_resize(0)?;\n",
    ),
    Mutant(
        "a draft keeps the GIL while it waits",
        "rust/sssd-py/src/sequence.rs",
        "let tree = call(py, true, || self.engine.draft_with(",
        "let tree = call(py, false, || self.engine.draft_with(",
    ),
]


@dataclass(frozen=True)
class Part:
    mutants: list[Mutant]
    rust: tuple[str, ...]
    tests: tuple[str, ...]
    both: bool = True
    """Whether the tests in Python are asked even when those in Rust have noticed."""


PARTS = {
    "predictor": Part(
        PREDICTOR,
        ("--lib", "-p", "sssd-core"),
        ("tests/test_reference.py", "tests/test_properties.py", "tests/test_learning.py"),
    ),
    "sizing": Part(
        SIZING,
        (
            *("--no-fail-fast", "-p", "sssd-core", "-p", "sssd-engine", "--lib"),
            *("--test", "batches", "--test", "allocation"),
        ),
        ("tests/test_cost.py", "tests/test_rule.py", "tests/test_hardware.py", "tests/serving/test_batch.py"),
        both=False,
    ),
    "engine": Part(
        ENGINE_MUTANTS,
        (
            *("--no-fail-fast", "-p", "sssd-core", "-p", "sssd-engine", "--lib"),
            *("--test", "batches", "--test", "engine"),
        ),
        ("tests/serving/test_state.py", "tests/test_threads.py"),
        both=False,
    ),
}


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


def killers(folder: Path, part: Part) -> list[str]:
    """The tests in Rust that fail, and the first one in Python that does."""
    rust = run(folder, "cargo", "test", "--locked", *part.rust)
    found = set(re.findall(r"^test (\S+) \.\.\. FAILED$", rust.stdout, re.MULTILINE))
    if found and not part.both:
        return sorted(found)
    build(folder)
    command = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *part.tests)
    tests = run(folder, *command, PYTHONPATH=str(folder / "python"))
    failed = re.findall(r"^FAILED \S+?::([^\s\[]+)", tests.stdout, re.MULTILINE)
    if (rust.returncode and not found) or (tests.returncode and not failed):
        raise SystemExit(f"the tests did not run:\n{rust.stderr[-2000:]}{tests.stdout[-2000:]}")
    return sorted(found | set(failed))


def main(name: str, folder: Path, out: Path) -> None:
    part = PARTS[name]
    if broken := killers(folder, part):
        raise SystemExit(f"tests fail without any mutant: {broken}")
    rows = []
    for mutant in part.mutants:
        path = folder / mutant.file
        whole = path.read_text()
        if whole.count(mutant.line) != 1:
            raise SystemExit(f"{mutant.file} has this {whole.count(mutant.line)} times: {mutant.line}")
        try:
            path.write_text(whole.replace(mutant.line, mutant.instead))
            found = killers(folder, part)
        finally:
            path.write_text(whole)
            # failures that proptest remembers would be laid to the next mutants
            run(folder, "git", "clean", "-qfd", "rust")
        killed = ", ".join(f"`{name}`" for name in found) or "**nothing**"
        rows.append(
            f"| {mutant.what} | `{mutant.file.removeprefix(CORE + '/').removeprefix('rust/')}` | {killed} |"
        )
        print(rows[-1], flush=True)
    commit = run(folder, "git", "rev-parse", "--short", "HEAD").stdout.strip()
    killed = sum("**nothing**" not in row for row in rows)
    head = [
        f"# Mutants of the {name}",
        "",
        f"`python benches/mutants.py {name}` at {commit}: {killed} of {len(rows)} one-line mutants are",
        f"noticed by `cargo test {' '.join(part.rust)}` or {', '.join(f'`{test}`' for test in part.tests)}.",
        "",
        "| mutant | file | noticed by |",
        "| --- | --- | --- |",
    ]
    out.write_text("\n".join([*head, *rows]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve(), Path(sys.argv[3]))
