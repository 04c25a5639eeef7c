"""Learns the predictor's shipped weights, rust/sssd-core/src/predictor/weights.bin, from recorded requests.

Usage: train_weights.py TRACES_FOLDER STORE_FILE OUT

Requests of permissively licensed records are replayed in random order, with and without the datastore, with
and without earlier requests, some with a predicted output. In the first half of the run, what one request
learns is handed on to the next whole; in the second half a small share of it, so that the weights settle
where requests that start from them are right in the mean. They are averaged over the last quarter, and over
runs in several orders: of one order, accepted tokens differ by 0.2 % from those of another.
TRACES_FOLDER holds dev/*.jsonl.xz and prepare_tokens.py, which tokenises. OUT goes to weights.bin, and what
it was made from into weights.toml beside it. Where tables have changed their shape, build with
SSSD_UNTRAINED=1 first.
"""

import glob
import importlib.util
import json
import lzma
import math
import random
import struct
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from sssd import Datastore, Drafter
from sssd.replay import Replay, Request, read_trace

PERMISSIVE = ("apache-2.0", "cc0-1.0", "mit")
TOKENS_PER_WORKLOAD = 20_000
MAX_NODES = 32
# old experience must not outweigh what a request shows
MOST_COUNT = 150
SHARE = 0.1
# magic, version, then the shapes of escapes [4], refinements [2], gates [3] and ages [2]; see weights.rs
HEADER = struct.Struct("<8s12I")
SETTLING = 1000
# there are few recorded generations with probabilities
REPEATS = 4
ORDERS = 4
PRIVATE = {"live_bytes": 0, "soft_bytes": 1 << 20}


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


def edited(response: np.ndarray, rng: random.Random) -> np.ndarray:
    """A predicted output: the response with passages replaced, left out or added; now and then all wrong."""
    out, at = [], 0
    every = rng.choice([8, 20, 50, 200])
    while at < len(response):
        run = 1 + int(rng.expovariate(1 / every))
        out.extend(response[at : at + run])
        at += run + rng.choice([0, 1, 1, 2, 5])
        out.extend(rng.choice(response) for _ in range(rng.choice([0, 1, 1, 2, 5])))
    if rng.random() < 0.15:
        rng.shuffle(out)
    return np.array(out, np.int32)


def learned(
    texts: list[tuple[Request, int]],
    generations: list[tuple[Request, int]],
    datastore: Datastore,
    rng: random.Random,
) -> tuple[np.ndarray, np.ndarray]:
    """The tables from one run: rates (value and count) and biases."""
    # each setting with its own drafter where requests share, else with a new one for each request
    shared = {store: Drafter(end_token_ids=[128009], datastore=store) for store in (datastore, None)}
    warm = Drafter(end_token_ids=[2])
    order = []
    for request, end in texts:
        for source in (datastore, None):
            order.append(
                (request, lambda s=source, e=end: Drafter(end_token_ids=[e], datastore=s, **PRIVATE))
            )
        some = shared[rng.choice([datastore, None])]
        order.append((request, lambda drafter=some: drafter))
        if rng.random() < 0.2:
            predicted = replace(request, prediction_ids=edited(request.response_ids, rng))
            order.append((predicted, lambda e=end: Drafter(end_token_ids=[e], **PRIVATE)))
    # what a request has just taught must not help with the same request
    rng.shuffle(order)
    step = len(order) // (2 * len(generations) * REPEATS)
    for at, (request, end) in enumerate(generations * REPEATS):
        order.insert(2 * at * (step + 1), (request, lambda e=end: Drafter(end_token_ids=[e], **PRIVATE)))
        order.insert(2 * at * (step + 1) + step, (request, lambda: warm))
    ((name, start),) = warm.state_dict().items()
    header = start[: HEADER.size]
    _, _, *shapes = HEADER.unpack(header)
    cells = math.prod(shapes[:4]) + math.prod(shapes[4:6])
    rates, floats, mean = None, None, 0.0
    for index, (request, make) in enumerate(order):
        drafter = make()
        if rates is not None:
            drafter.load_state_dict({name: header + packed(rates, floats)})
        with drafter.begin(request.prompt_ids, request.prediction_ids) as sequence:
            Replay(MAX_NODES).follow(sequence, request)
            (state,) = sequence.state_dict().values()
        after = np.frombuffer(state, "<u2", 2 * cells, HEADER.size).reshape(-1, 2).astype(float)
        biases = np.frombuffer(state, "<f4", offset=HEADER.size + 4 * cells).astype(float)
        share = 1.0 if index < len(order) // 2 else SHARE
        if rates is None:
            rates, floats = after, biases
        rates[:, 0] += share * (after[:, 0] - rates[:, 0])
        # as low as in the shipped weights, so that requests learn as fast as later
        rates[:, 1] = np.minimum(after[:, 1], MOST_COUNT)
        floats += share * (biases - floats)
        if index >= len(order) * 3 // 4:
            mean = mean + np.concatenate([rates[:, 0], floats])
    mean /= len(order) - len(order) * 3 // 4
    rates[:, 0] = mean[: len(rates)]
    return rates, mean[len(rates) :]


def main(traces: str, store: str, out: str) -> None:
    datastore = Datastore.open(store)
    texts = list(requests(Path(traces)))
    rng = random.Random(3)
    rng.shuffle(texts)
    with tempfile.TemporaryDirectory() as folder:
        soft = Path(folder) / "soft.jsonl"
        soft.write_bytes(lzma.decompress((Path(traces) / "smollm2-topk.jsonl.xz").read_bytes()))
        generations = [(request, 2) for request in read_trace(soft)]
    runs = [learned(texts, generations, datastore, rng) for _ in range(ORDERS)]
    ((name, start),) = Drafter().state_dict().items()
    header = start[: HEADER.size]
    rates, floats = (np.mean(tables, axis=0) for tables in zip(*runs, strict=True))
    n_ages, n_kinds = HEADER.unpack(header)[-2:]
    # nodes are drafted because they look probable, so those drafted look better than they are
    ages = floats[-n_ages * n_kinds :].reshape(n_ages, n_kinds // 3, 3)
    sample = rng.sample(texts, min(SETTLING, len(texts)))
    for _ in range(2):
        for source, kinds in ((None, slice(0, 1)), (datastore, slice(1, 3))):
            replay = Replay(MAX_NODES)
            for request, end in sample:
                drafter = Drafter(end_token_ids=[end], datastore=source, **PRIVATE)
                drafter.load_state_dict({name: header + packed(rates, floats)})
                replay.run(drafter, request)
            print(f"expected / accepted {replay.expected / replay.accepted:.3f}", flush=True)
            ages[:, :, kinds] += np.log(replay.accepted / replay.expected)
    Path(out).write_bytes(header + packed(rates, floats))


def packed(rates: np.ndarray, floats: np.ndarray) -> bytes:
    return rates.round().astype("<u2").tobytes() + floats.astype("<f4").tobytes()


if __name__ == "__main__":
    main(*sys.argv[1:])
