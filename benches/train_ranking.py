"""Learns the ranking stage's network, rust/sssd-core/src/ranking/network.bin, from recorded requests.

Usage: train_ranking.py TRACES_FOLDER STORES OUT

Replays permissively licensed records that are not in the dev streams with the datastores (their files, with
commas between), which have tables for ranking (`DatastoreBuilder(ranking=True)`), some of them beside a live
store, and learns from what the ranking stage sees at the nodes that the target reaches
(`rust/sssd-store/examples/train_ranking.rs`). TRACES_FOLDER holds dev/*.jsonl.xz and prepare_tokens.py, which
tokenises and says which records the dev streams have (needs tiktoken, llama-models). OUT goes to network.bin;
network.toml beside it is written to say what it was made from. Then build again. Where sources or features
have changed, build with SSSD_UNTRAINED=1 first. It takes two minutes of a core.
"""

import glob
import hashlib
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
TOKENS_PER_WORKLOAD = 60_000
# a workload of fewer tokens is learned from several times
FEW_TOKENS = 16_000
MOST_REPEATS = 4


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


def requests(path: str, prepare, encoding) -> list[np.ndarray]:
    """A workload's requests: lengths of prompt and response, then their tokens."""
    found = [
        np.array([len(prompt_ids), len(response_ids), *prompt_ids, *response_ids], "<u4")
        for prompt_ids, response_ids in unseen(path, prepare, encoding)
    ]
    tokens = sum(int(request[1]) for request in found)
    return found * min(MOST_REPEATS, max(1, round(FEW_TOKENS / max(tokens, 1))))


def digest(paths: list[str]) -> str:
    """The hash of files' contents, one after the other."""
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()


def provenance(traces: str, out: str) -> str:
    """What network.toml says of a network."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    data = {
        name: digest(sorted(glob.glob(str(Path(traces) / name))))
        for name in ("dev/*.jsonl.xz", "datastore/*.jsonl.xz")
    }
    hashes = "".join(f'"{name}, in order of name" = "{found}"\n' for name, found in data.items())
    return f"""# Where network.bin comes from, written by benches/train_ranking.py; a test compares the hash.

sha256 = "{digest([out])}"
command = "python benches/train_ranking.py TRACES STORES OUT"
# The predictor that learned it, or the one before it.
commit = "{head.stdout.strip()}"

# Hashes of what was in TRACES. STORES were made of datastore/, which `prepare_tokens.py` in TRACES
# tokenises, by `DatastoreBuilder(vocab_size=128256, ranking=True).add_stream(tokens, end_token_id=128009)`:
# the first of all documents, the second of every eighth.
[data]
{hashes}"""


def main(traces: str, stores: str, out: str) -> None:
    prepare = prepared(Path(traces))
    encoding = prepare.encoding()
    paths = sorted(glob.glob(str(Path(traces) / "dev" / "*.jsonl.xz")))
    found = [request for path in paths for request in requests(path, prepare, encoding)]
    with tempfile.TemporaryDirectory() as folder:
        recorded = Path(folder) / "requests.bin"
        recorded.write_bytes(np.concatenate(found).tobytes())
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
        files = ",".join(os.path.abspath(store) for store in stores.split(","))
        arguments = [files, recorded, os.path.abspath(out), prepare.END]
        subprocess.run(cargo + [str(argument) for argument in arguments], cwd=ROOT, check=True)
    Path(out).with_name("network.toml").write_text(provenance(traces, out), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
