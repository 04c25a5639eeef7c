"""Learns the ranking stage's network, rust/sssd-core/src/ranking/network.bin, from recorded requests.

Usage: train_ranking.py TRACES_FOLDER STORE_FILE OUT

Replays permissively licensed records that are not in the dev streams with the datastore, which has tables
for ranking (`DatastoreBuilder(ranking=True)`), and learns from what the ranking stage sees at the nodes that
the target reaches (`rust/sssd-store/examples/train_ranking.rs`). TRACES_FOLDER holds dev/*.jsonl.xz and
prepare_tokens.py, which tokenises and says which records the dev streams have (needs tiktoken, llama-models).
OUT goes to network.bin, and what it was made from into network.toml beside it; then build again. Where
sources or features have changed, build with SSSD_UNTRAINED=1 first.
It takes 85 s of one core, two passes over 0.4 M nodes, after half a minute of tokenising.
"""

import glob
import importlib.util
import json
import lzma
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PERMISSIVE = ("apache-2.0", "cc0-1.0", "mit")
# of each workload: what the dev streams have, and what is learned from
DEV_TOKENS = 20_000
TOKENS_PER_WORKLOAD = 40_000
PASSES = 2


def prepared(traces: Path):
    spec = importlib.util.spec_from_file_location("prepare_tokens", traces / "prepare_tokens.py")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    return prepare


def unseen(path: str, prepare, encoding):
    """Prompts and responses of a workload's records after those of its dev stream."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    random.Random(7).shuffle(records)  # as prepare_tokens.py does
    dev = tokens = 0
    for record in records:
        new = dev >= DEV_TOKENS and record["license"].lower() in PERMISSIVE
        for context, response in prepare.exchanges(record):
            if dev >= DEV_TOKENS and not new:
                break
            prompt_ids = encoding.encode_ordinary(context)[-8192:]
            response_ids = [*encoding.encode_ordinary(response)[:2048], prepare.END]
            if len(prompt_ids) < 4 or len(response_ids) < 8:
                continue
            if not new:
                dev += len(response_ids)
            elif tokens < TOKENS_PER_WORKLOAD:
                tokens += len(response_ids)
                yield prompt_ids, response_ids
        if tokens >= TOKENS_PER_WORKLOAD:
            break
    print(f"{Path(path).name}: {tokens} tokens", flush=True)


def main(traces: str, store: str, out: str) -> None:
    prepare = prepared(Path(traces))
    encoding = prepare.encoding()
    requests = []
    for path in sorted(glob.glob(str(Path(traces) / "dev" / "*.jsonl.xz"))):
        for prompt_ids, response_ids in unseen(path, prepare, encoding):
            requests.append(np.array([len(prompt_ids), len(response_ids), *prompt_ids, *response_ids], "<u4"))
    with tempfile.TemporaryDirectory() as folder:
        recorded = Path(folder) / "requests.bin"
        recorded.write_bytes(np.concatenate(requests).tobytes())
        cargo = [
            "cargo",
            "run",
            "--release",
            "--locked",
            "-p",
            "sssd-store",
            "--example",
            "train_ranking",
            "--",
        ]
        arguments = [os.path.abspath(store), recorded, os.path.abspath(out), PASSES, prepare.END]
        subprocess.run(cargo + [str(argument) for argument in arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
