"""What each part of the predictor is worth: accepted tokens on dev streams with it switched off.

Usage: ablations.py FOLDER STREAMS --store FILE [--topk TRACE] [--parts NAMES] [--tokens 5000]
                    [--budgets 16,32,64] [--json FILE]

FOLDER is a copy of this repository that may be changed (`git worktree add --detach FOLDER`): switches are
put into its code, which follow SSSD_WITHOUT, and one build has all of them. STREAMS holds dev.*.jsonl, STORE
is a datastore of these tokens with tables for ranking, TOPK a recording with the target's probabilities. The
weights are those that ship, learned with the whole: a part is worth less than its row says where others would
learn to make up for it. Draft times are medians of the workloads' medians, for comparison within a run.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from calibration import LEAST_ACCEPTED, Mode, first, replayed, write
from given import rounded

from sssd import Datastore
from sssd.replay import trace_name

CORE = "rust/sssd-core/src"
SWITCH = """
/// Whether a part is switched off.
pub fn without(part: &str) -> bool {
    static OFF: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    OFF.get_or_init(|| std::env::var("SSSD_WITHOUT").unwrap_or_default()) == part
}
"""


@dataclass(frozen=True)
class Edit:
    """A line that gets a switch; it is there once."""

    file: str
    line: str
    instead: str


@dataclass(frozen=True)
class Part:
    what: str
    edits: tuple[Edit, ...]
    settings: tuple[str, ...] = ("alone", "store")


def edit(file: str, line: str, instead: str) -> Edit:
    return Edit(f"{CORE}/{file}", line, instead)


LEARN = "predictor/learn.rs"
PARTS = {
    "training": Part(
        "escapes and gates that were learned (fixed formulas instead)",
        (
            edit(
                "predictor/weights.rs",
                "        if UNTRAINED { None } else { Self::from_tables(SHIPPED).ok() }"
                ".unwrap_or_else(Self::untrained)",
                "        let mut model = Self::from_tables(SHIPPED).ok().unwrap_or_else(Self::untrained);\n"
                '        if crate::without("training") {\n'
                "            let plain = Self::untrained();\n"
                "            for words in [0..REFINEMENTS_AT, GATES_AT..AGES_AT] {\n"
                "                model.words[words.clone()].copy_from_slice(&plain.words[words]);\n"
                "            }\n"
                "        }\n"
                "        model",
            ),
        ),
    ),
    "blend": Part(
        "shorter matches beside the longest (no escapes)",
        (
            edit(
                "predictor/blend.rs",
                "        let escape = model.escape(cell);\n        if count < 1.0",
                '        let escape = if crate::without("blend") { 0.0 } else { model.escape(cell) };\n'
                "        if count < 1.0",
            ),
        ),
    ),
    "mix": Part(
        "weights of sources (all alike)",
        (
            edit(
                "predictor/mix.rs",
                "            *weight = model.gate(cell).exp();",
                '            *weight = if crate::without("mix") { 1.0 } else { model.gate(cell).exp() };',
            ),
        ),
    ),
    "refinement": Part(
        "refinement by support",
        (
            edit(
                "predictor/refine.rs",
                "            candidate.refined = inputs.model.refine(support.row(), candidate.mixed);",
                '            candidate.refined = if crate::without("refinement") { candidate.mixed } else '
                "{ inputs.model.refine(support.row(), candidate.mixed) };",
            ),
        ),
    ),
    "occurrence": Part(
        "occurrence in the request",
        (
            edit(
                "predictor/refine.rs",
                "            candidate.occurrence = occurrence(candidate, inputs);",
                '            candidate.occurrence = if crate::without("occurrence") { Occurrence::Never }'
                " else { occurrence(candidate, inputs) };",
            ),
        ),
    ),
    "successors": Part(
        "successors from the datastore",
        (
            edit(
                "predictor/gather.rs",
                "    let Some(store) = inputs.store else { return };",
                '    let store = inputs.store.filter(|_| !crate::without("successors"));\n'
                "    let Some(store) = store else { return };",
            ),
        ),
        ("store",),
    ),
    "matches": Part(
        "matches in the datastore (its successors stay)",
        (
            edit(
                "predictor/gather.rs",
                "                corpus.matches(context, longest, samples, &mut matches);",
                '                if source != crate::sources::STORE || !crate::without("matches") {\n'
                "                    corpus.matches(context, longest, samples, &mut matches);\n"
                "                }",
            ),
        ),
        ("store",),
    ),
    "lower": Part(
        "short contexts at nodes",
        (
            edit(
                "predictor/gather.rs",
                "    if child.path >= WORTH_LOWER { lower",
                '    if child.path >= WORTH_LOWER && !crate::without("lower") { lower',
            ),
        ),
    ),
    "aligned": Part(
        "aligned copies",
        (
            edit(
                "predictor/gather.rs",
                "    inputs.aligned.continuations(inputs.index, |at| {",
                "    inputs.aligned.continuations(inputs.index, |at| {\n"
                '        if crate::without("aligned") { return; }',
            ),
        ),
    ),
    "depth": Part(
        "depth beyond 8",
        (
            edit(
                "predictor/mod.rs",
                "        if usize::from(depth) >= inputs.limits.max_depth ||",
                '        let deepest = if crate::without("depth") { 8 } else { usize::MAX };\n'
                "        if usize::from(depth) >= inputs.limits.max_depth.min(deepest) ||",
            ),
        ),
    ),
    "correction": Part(
        "correction within the request",
        (
            edit(
                "predictor/correct.rs",
                "        for knot in self.knots.iter_mut().filter(|knot| knot.pending > 0.0) {",
                '        if crate::without("correction") { return; }\n'
                "        for knot in self.knots.iter_mut().filter(|knot| knot.pending > 0.0) {",
            ),
        ),
        ("alone", "store", "ranking"),
    ),
    "learning": Part(
        "learning of weights within the request",
        (
            edit(
                LEARN,
                "model.learn_gate(cell, gradient));",
                'if !crate::without("learning") { model.learn_gate(cell, gradient) });',
            ),
            edit(
                LEARN,
                "            model.learn_escape(cell, escaped);",
                '            if !crate::without("learning") { model.learn_escape(cell, escaped); }',
            ),
            edit(
                LEARN,
                "        model.learn_refinement(support.row(), candidate.mixed, came_true);",
                '        if !crate::without("learning") {\n'
                "            model.learn_refinement(support.row(), candidate.mixed, came_true);\n        }",
            ),
            edit(
                LEARN,
                "        model.learn_age(age, support.kind(), error);",
                '        if !crate::without("learning") { model.learn_age(age, support.kind(), error); }',
            ),
        ),
    ),
    "ages": Part(
        "biases by age of the output",
        (
            edit(
                "predictor/correct.rs",
                "            let new = kind.centred + bias;",
                '            let bias = if crate::without("ages") { 0.0 } else { *bias };\n'
                "            let new = kind.centred + bias;",
            ),
        ),
    ),
    "recent": Part(
        "recently probable tokens",
        (
            edit(
                "predictor/mod.rs",
                "blend::blend_feedback(&found, &inputs.recent.tokens, model",
                'let recent = if crate::without("recent") { &[][..] } else { &inputs.recent.tokens };\n'
                "            blend::blend_feedback(&found, recent, model",
            ),
        ),
        ("soft",),
    ),
    "score": Part(
        "the log-bilinear score",
        (
            edit(
                "ranking/features.rs",
                "    row[SCORE] = bounded(said.score * 0.4);",
                '    row[SCORE] = if crate::without("score") { 0.0 } else { bounded(said.score * 0.4) };',
            ),
        ),
        ("ranking",),
    ),
    "topic": Part(
        "its topic",
        (
            edit(
                "ranking/bilinear.rs",
                "            self.mean = tables.mean(&text[end.saturating_sub(TOPIC)..end]);",
                '            self.mean = if crate::without("topic") { [0.0; DIMENSIONS] } else '
                "{ tables.mean(&text[end.saturating_sub(TOPIC)..end]) };",
            ),
        ),
        ("ranking",),
    ),
    "luck": Part(
        "what sources lately gave to the tokens that came",
        (
            edit(
                "predictor/correct.rs",
                "            *luck += LUCK_RATE *",
                '            *luck += if crate::without("luck") { 0.0 } else { LUCK_RATE } *',
            ),
        ),
        ("ranking",),
    ),
}
SETTINGS = {
    "alone": Mode("alone"),
    "store": Mode("store", store="store"),
    "ranking": Mode("ranking", store="store", ranking=True),
    "soft": Mode("soft", "topk"),
}


def build(folder: Path) -> None:
    """The extension with all switches."""
    for part in PARTS.values():
        for change in part.edits:
            path = folder / change.file
            whole = path.read_text()
            if change.instead not in whole:
                if whole.count(change.line) != 1:
                    raise SystemExit(
                        f"{change.file} has this {whole.count(change.line)} times: {change.line}"
                    )
                path.write_text(whole.replace(change.line, change.instead))
    root = folder / CORE / "lib.rs"
    if SWITCH not in root.read_text():
        root.write_text(root.read_text() + SWITCH)
    maturin = str(Path(sys.executable).parent / "maturin")
    environment = os.environ | {"CARGO_TARGET_DIR": str(folder / "target"), "VIRTUAL_ENV": sys.prefix}
    command = [maturin, "develop", "--release", "--skip-install"]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def here(given: argparse.Namespace, setting: str) -> list[dict[str, Any]]:
    """Replays in this process, which has the switches of its environment."""
    mode = SETTINGS[setting]
    paths = [given.topk] if mode.traces == "topk" else sorted(given.streams.glob("dev.*.jsonl"))
    store = Datastore.open(given.store) if mode.store else None
    rows = []
    for path in paths:
        requests = first(path, given.tokens)
        for nodes in given.budgets:
            found = replayed(mode, requests, nodes, store).row(trace_name(path))
            rows.append(
                {
                    name: found[name]
                    for name in (
                        "trace",
                        "budget",
                        "accepted_per_step",
                        "expected_accepted_per_step",
                        "draft_us_p50",
                    )
                }
            )
    return rows


def measured(given: argparse.Namespace, setting: str, part: str) -> list[dict[str, Any]]:
    """The same in a process of its own with the folder's build."""
    environment = os.environ | {"PYTHONPATH": str(given.folder / "python"), "SSSD_WITHOUT": part}
    command = [sys.executable, *sys.argv, "--here", setting]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def summary(
    setting: str, part: str, rows: list[dict[str, Any]], whole: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each number of nodes: means over traces, and what is lost against the whole."""
    found = []
    for nodes in dict.fromkeys(row["budget"] for row in rows):
        own, all_of_it = ([row for row in each if row["budget"] == nodes] for each in (rows, whole))
        accepted, before = (
            float(np.mean([row["accepted_per_step"] for row in each])) for each in (own, all_of_it)
        )
        sums = [
            row["expected_accepted_per_step"] / row["accepted_per_step"]
            for row in own
            if row["accepted_per_step"] >= LEAST_ACCEPTED
        ]
        found.append(
            {
                "without": part,
                "setting": setting,
                "budget": nodes,
                "accepted": accepted,
                "change": accepted / before - 1,
                "least_sum": min(sums),
                "largest_sum": max(sums),
                "draft_us": float(np.median([row["draft_us_p50"] for row in own])),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("streams", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--topk", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tokens", type=int, default=5000, help="response tokens of each trace, about")
    parser.add_argument(
        "--budgets", type=lambda text: [int(nodes) for nodes in text.split(",")], default=[16, 32, 64]
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", choices=SETTINGS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(here(given, given.here)))
        return
    given.folder = given.folder.resolve()
    build(given.folder)
    rows, whole = [], {}
    for setting in SETTINGS:
        if setting != "soft" or given.topk:
            whole[setting] = measured(given, setting, "")
            rows += summary(setting, "", whole[setting], whole[setting])
    for name in given.parts.split(","):
        for setting in PARTS[name].settings:
            if setting in whole:
                rows += summary(setting, name, measured(given, setting, name), whole[setting])
                for row in rows[-len(given.budgets) :]:
                    print(json.dumps(rounded(row)), flush=True)
    if given.json:
        write(given.json, rows, "without", ["", *PARTS])


if __name__ == "__main__":
    main()
