"""Tokens per second of the server with many clients, against transformers on the same requests.

Usage: server.py TRACE... [--clients 8] [--prompts 2] [--new-tokens 64] [--longest 512] [--rounds 2]
                 [--json FILE]

TRACE are JSON Lines files with "prompt" texts (shared/traces/dev/*.jsonl.xz). The first prompts of each that
are not too long are decoded greedily by SmolLM2-135M-Instruct four ways, in turn:

one by one   model.generate, one request after the other
padded       model.generate, as many requests as there are clients in one left-padded batch
plain        the server with all clients at once, without drafts: what continuous batching brings
drafted      the same with drafts; every round with a new drafter, which has learned nothing

The server is asked by the openai client over loopback. Texts are compared with those of the first way.

tokens_per_second  tokens of all requests over the time from the first to the last; the median of the rounds
accepted           share of the output that had been drafted
same               requests whose text is that of model.generate alone
load               processes that wanted to run on the machine in the minute before
"""

import argparse
import json
import lzma
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import openai
import torch
import uvicorn
from transformers.utils import logging

from sssd.hf import smollm2
from sssd.server import Engine, Settings, create_app


def prompts_of(path: Path, tokenizer: Any, count: int, longest: int) -> list[list[int]]:
    """Token ids of the first prompts that are short enough, as a chat."""
    found: list[list[int]] = []
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if len(found) == count:
                break
            record = json.loads(line)
            text = record.get("prompt") or record["turns"][0]["content"]
            messages = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            if len(ids) <= longest:
                found.append(ids)
    return found


@contextmanager
def served(model: Any, tokenizer: Any, clients: int) -> Any:
    """A client of a server on loopback with a new drafter, and its engine."""
    engine = Engine(model, tokenizer, max_running=clients)
    config = uvicorn.Config(create_app(engine, tokenizer, Settings("smollm2")), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", timeout=3600) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def by_server(
    model: Any, tokenizer: Any, prompts: list[Any], options: argparse.Namespace, speculate: bool
) -> Any:
    """Texts, seconds, tokens and accepted tokens of all requests."""
    with served(model, tokenizer, options.clients) as client, ThreadPoolExecutor(options.clients) as pool:

        def ask(prompt: list[int]) -> Any:
            return client.completions.create(
                model="smollm2",
                prompt=prompt,
                max_tokens=options.new_tokens,
                temperature=0,
                extra_body={"speculate": speculate},
            )

        ask([1, 2, 3])  # connections, and the first passes
        started = time.perf_counter()
        answers = list(pool.map(ask, prompts))
        seconds = time.perf_counter() - started
    usages = [answer.usage for answer in answers]
    accepted = sum(usage.completion_tokens_details.accepted_prediction_tokens for usage in usages)
    return [a.choices[0].text for a in answers], seconds, sum(u.completion_tokens for u in usages), accepted


def by_generate(
    model: Any, tokenizer: Any, prompts: list[Any], options: argparse.Namespace, batch: int
) -> Any:
    """The same by ``model.generate``, so many requests at a time."""
    texts, tokens, pad = [], 0, tokenizer.pad_token_id or 0
    started = time.perf_counter()
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        width = max(map(len, part))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in part])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part])
        output = model.generate(ids, attention_mask=mask, max_new_tokens=options.new_tokens, do_sample=False)
        for row in output[:, width:].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            tokens += end
            texts.append(tokenizer.decode(row[:end], skip_special_tokens=True))
    return texts, time.perf_counter() - started, tokens, 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    model, tokenizer = smollm2.load()
    prompts = [
        ids
        for path in options.traces
        for ids in prompts_of(path, tokenizer, options.prompts, options.longest)
    ]
    ways = {
        "one by one": lambda: by_generate(model, tokenizer, prompts, options, 1),
        "padded": lambda: by_generate(model, tokenizer, prompts, options, options.clients),
        "plain": lambda: by_server(model, tokenizer, prompts, options, speculate=False),
        "drafted": lambda: by_server(model, tokenizer, prompts, options, speculate=True),
    }
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    expected: list[str] = []
    for turn in range(options.rounds):
        for name, way in ways.items():
            load = os.getloadavg()[0]
            texts, seconds, tokens, accepted = way()
            expected = expected or texts
            figure = {
                "tokens_per_second": tokens / seconds,
                "tokens": tokens,
                "accepted": accepted / tokens,
                "same": sum(a == b for a, b in zip(texts, expected, strict=True)),
                "load": load,
            }
            figures[name].append(figure)
            print(turn, name, figure, flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "model": "SmolLM2-135M-Instruct float32",
        "requests": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "ways": {
            name: {"tokens_per_second": median(one["tokens_per_second"] for one in rounds), "rounds": rounds}
            for name, rounds in figures.items()
        },
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
