"""Learns the predictor's shipped weights, rust/sssd-core/src/weights.bin, from recorded requests.

Usage: train_weights.py TRACES_FOLDER STORE_FILE OUT

Requests of permissively licensed records are replayed in random order, with and without the datastore; what
one request learns is handed on to the next. The weights are averaged over the second half of the run.
TRACES_FOLDER holds dev/*.jsonl.xz and prepare_tokens.py, which tokenises.
"""

import glob
import importlib.util
import json
import lzma
import random
import sys
from pathlib import Path

import numpy as np

from sssd import Datastore, Drafter
from sssd.replay import Replay, Request

PERMISSIVE = ("apache-2.0", "cc0-1.0", "mit")
TOKENS_PER_WORKLOAD = 20_000
BUDGET = 32
RATES = 3 * 12 * 8 * 5 + 9 * 5 * 2 * 2 * 18
"""Cells of (value, count) before the gates; see Model.to_bytes."""
# old experience must not outweigh what a request shows
MOST_COUNT = 30


def requests(traces: Path):
    spec = importlib.util.spec_from_file_location("prepare_tokens", traces / "prepare_tokens.py")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    encoding = prepare.encoding()
    for path in sorted(glob.glob(str(traces / "dev" / "*.jsonl.xz"))):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        random.Random(11).shuffle(records)
        tokens = 0
        for record in records:
            if record["license"].lower() not in PERMISSIVE:
                continue
            for context, response in prepare.exchanges(record):
                prompt_ids = encoding.encode_ordinary(context)[-8192:]
                response_ids = [*encoding.encode_ordinary(response)[:2048], prepare.END]
                if tokens < TOKENS_PER_WORKLOAD and len(prompt_ids) >= 4 and len(response_ids) >= 8:
                    tokens += len(response_ids)
                    yield (
                        Request(np.array(prompt_ids, np.int32), np.array(response_ids, np.int32)),
                        prepare.END,
                    )
        print(f"{Path(path).name}: {tokens} tokens", flush=True)


def unpack(weights: bytes):
    rates = np.frombuffer(weights, "<u2", 2 * RATES).reshape(-1, 2).astype(float)
    return rates[:, 0], rates[:, 1], np.frombuffer(weights, "<f4", offset=4 * RATES).astype(float)


def main(traces: str, store: str, out: str) -> None:
    datastore = Datastore.open(store)
    order = list(requests(Path(traces)))
    random.Random(3).shuffle(order)
    weights, values, gates, snapshots = None, 0.0, 0.0, 0
    for index, (request, end) in enumerate(order):
        for source in (datastore, None):
            drafter = Drafter(end_token_ids=[end], datastore=source, weights=weights)
            with drafter.begin(request.prompt_ids) as sequence:
                Replay(BUDGET).follow(sequence, request)
                weights = sequence.weights
        if index >= len(order) // 2:
            value, count, gate = unpack(weights)
            values, gates, snapshots = values + value, gates + gate, snapshots + 1
    rates = np.stack([values / snapshots, np.minimum(count, MOST_COUNT)], axis=1)
    Path(out).write_bytes(rates.round().astype("<u2").tobytes() + (gates / snapshots).astype("<f4").tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
