"""README's table of accepted tokens, from recorded texts: tokens, the datastore, replays, the table.

``python benches/table.py TRACES [--write]`` with a folder of recorded requests (``dev/WORKLOAD.jsonl.xz``,
with ``prompt`` and ``response`` or ``turns``) and of texts for the datastore (``datastore/NAME.jsonl.xz``,
with ``text``). ``docs/traces.md`` says whose they are. Needs Llama 3's tokenizer, as ``make table`` does.
"""

import argparse
import base64
import json
import lzma
import platform
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
REFERENCE = RESULTS / "reference.json"
"""Tokens per step of the baselines on the same tokens, measured once with the code of others."""
BUDGETS = (4, 8, 16, 32, 64)
VOCAB_SIZE, END_TOKEN = 128_256, 128_009
TOKENS = 20_000
"""Response tokens after which a workload has enough records."""
PROMPT_TOKENS, RESPONSE_TOKENS = 8192, 2048
"""A prompt keeps its last tokens, a response its first."""
LEAST_PROMPT, LEAST_RESPONSE = 4, 8
"""Shorter ones say nothing."""
SEED = 7
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 splits text before it merges bytes."""

Encode = Callable[[str], list[int]]


def llama_3() -> Encode:
    """Llama 3's tokenizer without special tokens, from the package that carries its vocabulary."""
    import tiktoken

    package = find_spec("llama_models")
    if package is None or package.origin is None:
        raise SystemExit("the tokenizer is missing: pip install tiktoken; pip install --no-deps llama-models")
    lines = (Path(package.origin).parent / "llama3" / "tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in (line.split() for line in lines if line)}
    encoding = tiktoken.Encoding("llama3", pat_str=_WORDS, mergeable_ranks=ranks, special_tokens={})
    return encoding.encode_ordinary


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def exchanges(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the model saw and what it said, for each of its turns."""
    if not record.get("turns"):
        yield record["prompt"], record["response"]
        return
    history = ""
    for turn in record["turns"]:
        if turn["role"] == "assistant":
            yield history, turn["content"]
        history += f"<{turn['role']}>\n{turn['content']}\n"


def requests(records: list[dict[str, Any]], encode: Encode) -> Iterator[dict[str, list[int]]]:
    """Requests of a workload as tokens, in an order that is drawn once, until there are enough."""
    records = records.copy()
    random.Random(SEED).shuffle(records)
    total = 0
    for prompt, response in (exchange for record in records for exchange in exchanges(record)):
        if total >= TOKENS:
            return
        prompt_ids = encode(prompt)[-PROMPT_TOKENS:]
        response_ids = [*encode(response)[:RESPONSE_TOKENS], END_TOKEN]
        if len(prompt_ids) >= LEAST_PROMPT and len(response_ids) >= LEAST_RESPONSE:
            yield {"prompt_ids": prompt_ids, "response_ids": response_ids}
            total += len(response_ids)


def prepare(traces: Path, out: Path, encode: Encode) -> None:
    """Writes ``dev.WORKLOAD.jsonl`` and ``store.npy``, of which each is whole or not there."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted((traces / "dev").glob("*.jsonl.xz")):
        target = out / f"dev.{path.name.partition('.')[0]}.jsonl"
        if not target.exists():
            print(f"tokens of {path.name}", flush=True)
            rows = requests(list(read(path)), encode)
            _whole(
                target,
                lambda part, rows=rows: part.write_text("".join(f"{json.dumps(row)}\n" for row in rows)),
            )
    target = out / "store.npy"
    if not target.exists():
        documents = []
        for path in sorted((traces / "datastore").glob("*.jsonl.xz")):
            print(f"tokens of {path.name}", flush=True)
            documents += [np.array([*encode(row["text"]), END_TOKEN], np.uint32) for row in read(path)]
        with (out / "store.part").open("wb") as file:
            np.save(file, np.concatenate(documents))
        (out / "store.part").replace(target)


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    part = path.with_suffix(".part")
    write(part)
    part.replace(path)


def replay(out: Path, write: bool) -> dict[str, list[dict[str, Any]]]:
    """The rows of ``replay`` without and with the datastore."""
    sssd = [sys.executable, "-m", "sssd"]
    store = out / "store.sssd"
    if not store.exists():
        tokens = ["store.npy", "--vocab-size", str(VOCAB_SIZE), "--end-token", str(END_TOKEN)]
        subprocess.run([*sssd, "build", "-o", store.name, *tokens], cwd=out, check=True)
    traces = [path.name for path in sorted(out.glob("dev.*.jsonl"))]
    found = {}
    for name, options in (("replay-self", []), ("replay-store", ["--datastore", store.name])):
        arguments = ["--end-token-id", str(END_TOKEN), *options, "--json"]
        print(f"python -m sssd replay dev.*.jsonl {' '.join(arguments)} FILE", flush=True)
        command = [*sssd, "replay", *traces, *arguments, f"{name}.json"]
        subprocess.run(command, cwd=out, check=True, stdout=subprocess.DEVNULL)
        found[name] = json.loads((out / f"{name}.json").read_text())["results"]
        if write:
            shown = f"python -m sssd replay dev.*.jsonl {' '.join(arguments)} FILE"
            about = {"commit": _commit(), "machine": _machine(), "command": shown}
            (RESULTS / f"{name}.json").write_text(
                json.dumps({**about, "results": found[name]}, indent=1) + "\n"
            )
    return found


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _machine() -> str:
    import os

    return f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}"


def accepted(rows: list[dict[str, Any]], budget: int) -> dict[str, float]:
    """Accepted tokens per step at a budget, by workload."""
    at = {row["trace"]: row["accepted_per_step"] for row in rows if row["budget"] == budget}
    return {name.removeprefix("dev."): value for name, value in at.items()}


def markdown(own: list[dict[str, Any]], store: list[dict[str, Any]], reference: dict[str, Any]) -> str:
    """README's table: means over the workloads beside those of the baselines."""
    names = ("nodes", "no datastore", "baseline", "ratio", "30.9 M-token datastore", "baseline", "ratio")
    lines = [_line(names), _line(["---"] * len(names))]
    for budget in BUDGETS:
        cells = [str(budget)]
        for rows, peers in ((own, ("sssd_self", "arctic_self")), (store, ("sssd_store",))):
            figures = accepted(rows, budget)
            baseline = _baseline(reference, peers, budget)
            if figures.keys() != baseline.keys():
                raise SystemExit(
                    f"other workloads than the baselines': {sorted(figures.keys() ^ baseline.keys())}"
                )
            ours, theirs = mean(figures.values()), mean(baseline.values())
            cells += [f"{ours:.3f}", f"{theirs:.3f}", f"{ours / theirs:.2f}"]
        lines.append(_line(cells))
    return "\n".join(lines)


def _baseline(reference: dict[str, Any], peers: Iterable[str], budget: int) -> dict[str, float]:
    """Of each workload the best of the peers, in accepted tokens per step."""
    at = reference["budgets"].index(budget)
    workloads = reference["workloads"].items()
    return {name: max(figures[peer][at] for peer in peers) - 1 for name, figures in workloads}


def sources(traces: Path) -> str:
    """Whose texts the records are, by what they say of themselves."""
    counts: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for path in sorted((traces / "dev").glob("*.jsonl.xz")):
        for record in read(path):
            counts[record["repo"], record["license"]][record["workload"]] += 1
    stored: dict[str, int] = defaultdict(int)
    for path in sorted((traces / "datastore").glob("*.jsonl.xz")):
        for record in read(path):
            stored[record["source"]] += 1
    lines = [_line(("repository", "licence", "requests", "texts of the datastore")), _line(["---"] * 4)]
    for (repo, licence), workloads in sorted(counts.items()):
        held = ", ".join(f"{name} {count:,}" for name, count in sorted(workloads.items()))
        lines.append(_line((repo, licence, held, f"{stored.pop(repo, 0):,}")))
    lines += [_line((repo, "not on the record", "", f"{count:,}")) for repo, count in sorted(stored.items())]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Does what is not done yet, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", type=Path, metavar="TRACES")
    parser.add_argument("--out", type=Path, default=Path("target/table"), help="where tokens and results go")
    parser.add_argument("--write", action="store_true", help="into benches/results as well")
    parser.add_argument("--sources", action="store_true", help="print whose texts they are, and nothing else")
    arguments = parser.parse_args()
    if not (arguments.traces / "dev").is_dir():
        parser.error(f"{arguments.traces}/dev is no folder: give one with recorded requests (docs/traces.md)")
    if arguments.sources:
        print(sources(arguments.traces))
        return
    prepare(arguments.traces, arguments.out, llama_3())
    found = replay(arguments.out, arguments.write)
    print(markdown(found["replay-self"], found["replay-store"], json.loads(REFERENCE.read_text())))


if __name__ == "__main__":
    main()
