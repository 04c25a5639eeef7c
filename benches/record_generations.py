"""Records what SmolLM2-135M says with its most probable tokens at each position, and makes a store's tokens.

Usage: record_generations.py TRACES_FOLDER OUT_FOLDER [--prompts 48] [--greedy] [--no-store]

Texts are sampled at temperature 1 with top-p 0.95 (or greedy), at most 224 tokens each, of the first prompts
of TRACES_FOLDER's permissively licensed dev records in a random order, as many of each of five workloads;
long prompts are left out. OUT_FOLDER gets sampled.jsonl.xz (or greedy.jsonl.xz), requests as `replay` takes
them: the probabilities are those at temperature 1 before top-p. store.npy has the tokens of the texts of
TRACES_FOLDER/datastore in STORE, which are no answers to these prompts: 12 million, each text closed by
token 2. Equal versions of torch on equal processors give equal texts.
"""

import argparse
import json
import lzma
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from sssd.hf.smollm2 import load

PERMISSIVE = ("apache-2.0", "cc0-1.0", "mit")
STORE = ("chat-multi.wildbench", "chat-en.arena-hard", "stem.mmlu-pro", "stem.dynamic-cheatsheet")
WORKLOADS = ("chat-en", "code", "math", "rag", "reasoning-long")
LONGEST_PROMPT = 300
NEW_TOKENS = 224
TOP_K = 8
TOP_P = 0.95
END = 2
BATCH = 24


class Recorder(LogitsProcessor):  # type: ignore[misc]
    """Keeps the most probable tokens of each position."""

    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []
        self.probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probs, ids = torch.softmax(scores.float(), dim=-1).topk(TOP_K)
        self.ids.append(ids)
        self.probs.append(probs)
        return scores


def prompts(traces: Path, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """As many of each workload, in random order: their ids, and whose they are."""
    found: list[list[dict[str, Any]]] = []
    for workload in WORKLOADS:
        with lzma.open(traces / "dev" / f"{workload}.jsonl.xz", "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        random.Random(5).shuffle(records)
        found.append([])
        for record in records:
            text = record.get("prompt") or (record.get("turns") or [{}])[0].get("content", "")
            if not text or record["license"].lower() not in PERMISSIVE:
                continue
            message = [{"role": "user", "content": text}]
            ids = list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))
            if len(ids) <= LONGEST_PROMPT and all(ids != held["prompt_ids"] for held in found[-1]):
                whose = {"id": record["id"], "repo": record["repo"], "license": record["license"]}
                found[-1].append(whose | {"prompt_ids": ids})
            if len(found[-1]) == count:
                break
    mixed = [prompt for rank in range(count) for each in found for prompt in each[rank : rank + 1]]
    return mixed[:count]


def record(model: Any, batch: list[dict[str, Any]], sample: bool) -> list[dict[str, Any]]:
    """The answers to some prompts."""
    asked = [prompt["prompt_ids"] for prompt in batch]
    longest = max(map(len, asked))
    ids = torch.tensor([[END] * (longest - len(prompt)) + prompt for prompt in asked])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked])
    recorder = Recorder()
    how: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": TOP_P} if sample else {}
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=sample,
        repetition_penalty=1.0,
        eos_token_id=END,
        pad_token_id=END,
        logits_processor=[recorder],
        **how,
    )[:, longest:]
    top_ids, top_probs = torch.stack(recorder.ids, 1), torch.stack(recorder.probs, 1)
    rows = []
    for row, prompt in enumerate(batch):
        said = out[row].tolist()
        length = said.index(END) + 1 if END in said else len(said)
        rows.append(
            prompt
            | {
                "response_ids": said[:length],
                "topk_ids": top_ids[row, :length].tolist(),
                # rounded down: eight of them sum to at most 1
                "topk_probs": (np.floor(top_probs[row, :length].double().numpy() * 1e4) / 1e4).tolist(),
            }
        )
    return rows


def store(traces: Path, tokenizer: Any) -> np.ndarray[Any, Any]:
    """The texts' tokens, each text closed by the end token; uint32 [n]."""
    parts: list[np.ndarray[Any, Any]] = []
    for name in STORE:
        with lzma.open(traces / "datastore" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        for start in range(0, len(texts), 200):
            batch = tokenizer.backend_tokenizer.encode_batch(
                texts[start : start + 200], add_special_tokens=False
            )
            parts += [np.array([*text.ids, END], np.uint32) for text in batch]
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--greedy", action="store_true", help="the most probable token each time")
    parser.add_argument("--no-store", action="store_true", help="make no tokens for a store")
    given = parser.parse_args()
    torch.manual_seed(0)
    given.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load()
    asked = prompts(given.traces, tokenizer, given.prompts)
    with lzma.open(given.out / f"{'greedy' if given.greedy else 'sampled'}.jsonl.xz", "wt") as lines:
        for start in range(0, len(asked), BATCH):
            for row in record(model, asked[start : start + BATCH], not given.greedy):
                if len(row["response_ids"]) > 1:
                    lines.write(json.dumps(row, separators=(",", ":")) + "\n")
            print(f"{start + BATCH} of {len(asked)}", flush=True)
    if not given.no_store:
        tokens = store(given.traces, tokenizer)
        np.save(given.out / "store.npy", tokens)
        print(f"{len(tokens)} tokens in the store", flush=True)


if __name__ == "__main__":
    main()
