"""Rollouts by replay: tokens per step where prompts come again, beside Arctic's suffix decoding.

Usage: rollouts.py TOKENIZER [--max-nodes 16] [--streams trials,reasoning,siblings] [--json FILE]

    /work/envs/vllm/bin/python benches/rollouts.py /work/envs/smol/tokenizer.json

TOKENIZER is a tokenizer.json; needs `tokenizers`, and `arctic-inference` for Arctic's rows. No model runs:
recorded texts of the dev traces are what the target says, requests take their steps as `sssd.replay` has it.

trials:    tau-bench, all tasks once, then all tasks again: every turn of the agent is a request, one by one.
reasoning: prompts of which one model has written two texts or more: all first samples, then all second ones.
siblings:  the samples of a prompt side by side, in groups of 2, 4 and 8. Groups of 2 are one model's; there
           are too few larger ones of one model, so that theirs are of several.

`sssd`: `sssd.rollout.Rollouts`, all requests in one namespace (`one`) or each prompt's in its own (`own`),
handing on what running ones have said every 8 tokens. `arctic`: the shipped caps and floor (`default`), and
the best of the floors 0 and 0.02 with caps lifted (`lifted`), trees of the same number of nodes;
running requests share there by themselves. `alone`: each request by itself. `gain`: accepted tokens beyond
those of Arctic lifted, as a share.
"""

import argparse
import json
import lzma
import os
import subprocess
import time
from collections import defaultdict
from itertools import count, pairwise
from pathlib import Path

import numpy as np

from sssd import Drafter
from sssd.rollout import Rollouts

TRACES = Path(os.environ.get("SSSD_TRACES", Path(__file__).parents[2] / "shared/traces"))
PROMPT, RESPONSE = 8192, 2048
FLOORS = (0.0, 0.02)
NUMBERS = count()


class Waves:
    """Requests that run side by side, wave after wave: (group, prompt, response) each."""

    def __init__(self, tokenizer):
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.held = defaultdict(list)

    def add(self, name, wave):
        found = []
        for group, prompt, response in wave:
            ids = np.array(self.encode(response)[:RESPONSE], np.int32)
            if len(ids) > 8:
                found.append((group, np.array(self.encode(prompt)[-PROMPT:], np.int32), ids))
        if found:
            self.held[name].append(found)


def records(workload):
    with lzma.open(TRACES / f"dev/{workload}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def turns(record):
    """Every turn of the model with what precedes it."""
    history = ""
    for turn in record["turns"]:
        if turn["role"] == "assistant":
            yield history, turn["content"]
        history += f"<{turn['role']}>\n{turn['content']}\n"


def trials(waves, most):
    groups = defaultdict(list)
    for record in records("agentic"):
        if record["repo"] == "sierra-research/tau-bench":
            groups[record["group"]].append(record)
    for trial in range(4):
        for group, of in list(groups.items())[:most]:
            for prompt, response in turns(of[trial]):
                waves.add(f"trials {trial}", [(group, prompt, response)])


def reasoning(waves, most):
    groups = defaultdict(list)
    for record in records("reasoning-long"):
        groups[record["prompt"], record["model"]].append(record["response"])
    repeated = dict([item for item in groups.items() if len(item[1]) > 1][:most])
    for sample in range(2):
        for (prompt, _), texts in repeated.items():
            waves.add(f"reasoning {sample + 1}", [(prompt, prompt, texts[sample])])


def siblings(waves, most):
    alike, prompts = defaultdict(list), defaultdict(list)
    for record in records("reasoning-long"):
        alike[record["prompt"], record["model"]].append(record["response"])
        prompts[record["prompt"]].append(record["response"])
    for (prompt, _), texts in [item for item in alike.items() if len(item[1]) > 1][:most]:
        waves.add("siblings 2", [(prompt, prompt, text) for text in texts[:2]])
    for size in (2, 4, 8):
        for prompt, texts in [item for item in prompts.items() if len(item[1]) >= 8][:most]:
            waves.add(f"siblings {size}, models mixed", [(prompt, prompt, text) for text in texts[:size]])


def walk(token_ids, parents, recording):
    """How many nodes of the tree the recording takes."""
    children = {
        (parent, token): node for node, (token, parent) in enumerate(zip(token_ids, parents, strict=True))
    }
    node = -1
    for place, token in enumerate(recording):
        node = children.get((node, token))
        if node is None:
            return place
    return len(recording)


class Sssd:
    """Rollouts as a host runs them."""

    def __init__(self, max_nodes, *, own, alone=False, commit_tokens=8):
        memory = 0 if alone else "256M"
        self.rollouts = Rollouts(
            Drafter(live_bytes=memory, soft_bytes=0, threads=1), commit_tokens=0 if alone else commit_tokens
        )
        self.max_nodes, self.own, self.alone = max_nodes, own, alone

    def begin(self, number, group, prompt):
        self.rollouts.begin(str(number), prompt, group=group[-200:] if self.own else "")

    def step(self, produced):
        """Trees of the requests that have produced tokens, which are a mapping by number."""
        offsets = np.cumsum([0, *map(len, produced.values())])
        batch = self.rollouts.step(
            list(map(str, produced)), np.concatenate(list(produced.values())), offsets, self.max_nodes
        )
        bounds = batch.offsets.tolist()
        ids, parents = batch.token_ids.tolist(), batch.parents.tolist()
        return [(ids[a:b], parents[a:b]) for a, b in pairwise(bounds)]

    def end(self, number, last):
        self.rollouts[str(number)].extend(last)
        (self.rollouts.abort if self.alone else self.rollouts.finish)(str(number))


class Arctic:
    """Suffix decoding as vLLM runs it; ``floor`` None: as it ships."""

    def __init__(self, max_nodes, floor):
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self.cache = SuffixDecodingCache(max_tree_depth=24 if floor is None else 64, max_cached_requests=-1)
        self.options = {"max_spec_tokens": max_nodes, "use_tree_spec": True}
        if floor is not None:
            self.options |= {"max_spec_offset": 1e6, "min_token_prob": floor}
        self.depth = self.cache.max_tree_depth
        self.texts = {}

    def begin(self, number, _group, prompt):
        self.cache.start_request(number, prompt)
        self.texts[number] = prompt[-self.depth :]

    def step(self, produced):
        trees = []
        for number, tokens in produced.items():
            self.cache.add_active_response(number, tokens)
            self.texts[number] = np.concatenate([self.texts[number], tokens])[-self.depth :]
        for number in produced:
            draft = self.cache.speculate(number, self.texts[number], **self.options)
            trees.append((list(draft.token_ids), list(draft.parents)))
        return trees

    def end(self, number, last):
        self.cache.add_active_response(number, last)
        self.cache.stop_request(number)
        del self.texts[number]


def replay(drafter, waves):
    """Tokens, steps and seconds of drafting for all waves of a stream."""
    tokens = steps = 0
    seconds = 0.0
    for wave in waves:
        running = {}
        for group, prompt, response in wave:
            # never twice: Arctic forgets what a request of the same number has said
            number = next(NUMBERS)
            drafter.begin(number, group, prompt)
            running[number] = (response, 1, response[:1])
        while running:
            started = time.perf_counter()
            trees = drafter.step({name: new for name, (_, _, new) in running.items()})
            seconds += time.perf_counter() - started
            for (name, (response, place, _)), tree in zip(list(running.items()), trees, strict=True):
                end = min(place + walk(*tree, response[place:].tolist()) + 1, len(response))
                tokens, steps = tokens + end - place, steps + 1
                running[name] = (response, end, response[place:end])
                if end == len(response):
                    drafter.end(name, response[place:end])
                    del running[name]
    return tokens, steps, seconds


def measure(streams, make):
    """Of each stream tokens per step and microseconds a draft; those that belong together share a drafter."""
    rows, drafter, family = {}, None, None
    for name, waves in streams.items():
        if name.split()[0] != family or family == "siblings":
            drafter, family = make(), name.split()[0]
        tokens, steps, seconds = replay(drafter, waves)
        rows[name] = {"per_step": tokens / steps, "us": 1e6 * seconds / steps, "tokens": tokens}
    return rows


def rows(streams, max_nodes):
    """A row for each stream."""
    found = {
        "sssd alone": measure(streams, lambda: Sssd(max_nodes, own=False, alone=True)),
        "sssd one": measure(streams, lambda: Sssd(max_nodes, own=False)),
        "sssd own": measure(streams, lambda: Sssd(max_nodes, own=True)),
    }
    try:
        found["arctic default"] = measure(streams, lambda: Arctic(max_nodes, None))
        lifted = [measure(streams, lambda floor=floor: Arctic(max_nodes, floor)) for floor in FLOORS]
        found["arctic lifted"] = {
            name: max((run[name] for run in lifted), key=lambda row: row["per_step"]) for name in streams
        }
    except ImportError:
        print("without Arctic's rows: there is no arctic-inference here")
    for stream, waves in streams.items():
        row = {"stream": stream, "requests": sum(map(len, waves))}
        row |= {how: round(measured[stream]["per_step"], 3) for how, measured in found.items()}
        row |= {f"{how} us": round(measured[stream]["us"], 1) for how, measured in found.items()}
        for how in ("one", "own"):
            accepted = row[f"sssd {how}"] - 1
            row[f"sharing {how}"] = round(accepted / (row["sssd alone"] - 1) - 1, 3)
            if "arctic lifted" in row:
                row[f"gain {how}"] = round(accepted / (row["arctic lifted"] - 1) - 1, 3)
        yield row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer")
    parser.add_argument("--max-nodes", type=int, default=16)
    parser.add_argument("--streams", default="trials,reasoning,siblings")
    parser.add_argument("--prompts", type=int, default=1000, help="tasks, or prompts, of a stream")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from tokenizers import Tokenizer

    tokenizer, table = Tokenizer.from_file(args.tokenizer), []
    for name in args.streams.split(","):
        waves = Waves(tokenizer)
        {"trials": trials, "reasoning": reasoning, "siblings": siblings}[name](waves, args.prompts)
        for row in rows(waves.held, args.max_nodes):
            table.append(row)
            print(json.dumps(row), flush=True)
    if args.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        args.json.write_text(
            json.dumps(
                {
                    "max_nodes": args.max_nodes,
                    "prompts": args.prompts,
                    "commit": commit.stdout.strip(),
                    "rows": table,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
