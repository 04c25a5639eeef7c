"""Speed of sssd.hf.generate against model.generate, on real prompts, SmolLM2-135M-Instruct on a CPU.

Usage: live.py TRACE... [--prompts 8] [--new-tokens 128] [--json FILE] [--plot FILE]

TRACE are JSON Lines files with "prompt" texts (shared/traces/dev/*.jsonl.xz). Of each, the first prompts that
leave room for the new tokens in the model's context are decoded greedily three ways, one after the other and
in turn: autoregressively by transformers, by sssd with the rule that is its default, and by sssd without
drafts. The tokens of all three must be equal. Every prompt gives --new-tokens tokens, past an end token if
one comes earlier. The prompt but for its last token is read once, by the model itself, and each way starts
from a copy of these states. JSON and plot are written after each trace: what stops early keeps what it has.

prompts     how many were decoded; skipped: prompts passed over as too long
speedup     tokens/s after the first token, over autoregressive decoding by transformers; speedups: by prompt
drafting    the same over sssd without drafts: what speculation alone brings
.._cpu      the same by the CPU time of the process, which others on the machine change little
whole_call  as speedup, with the prompt's pass, which is transformers' own in all three
load        processes that wanted to run on the machine in the minute before
"""

import argparse
import json
import lzma
import os
import platform
import shlex
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers import DynamicCache
from transformers.utils import logging

from sssd import Drafter, hf
from sssd.hf import smollm2
from sssd.replay import trace_name


def prompts_of(path: Path, tokenizer: Any, count: int, limit: int) -> tuple[list[Any], int]:
    """Token ids [1, n] of the first prompts of at most ``limit`` tokens, and how many longer ones were passed
    over for them.
    """
    found, skipped = [], 0
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if len(found) == count:
                break
            record = json.loads(line)
            text = (
                record["turns"][0]["content"]
                if record.get("turns") and not record.get("prompt")
                else record["prompt"]
            )
            if not isinstance(text, str) or not text:
                continue
            # far too long to tokenize for nothing
            if len(text) <= 16 * limit:
                ids = tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}],
                    add_generation_prompt=True,
                    return_tensors="pt",
                    return_dict=True,
                )["input_ids"]
                if ids.shape[1] <= limit:
                    found.append(ids)
                    continue
            skipped += 1
    return found, skipped


class Clock:
    """A streamer that notes when the first new token came, and the last."""

    def __init__(self) -> None:
        self.calls, self.first, self.last = 0, 0.0, 0.0
        self.cpu_seconds = 0.0

    def put(self, value: Any) -> None:
        self.calls += 1
        # the first call shows the prompt
        if self.calls == 2:
            self.first, self.cpu_seconds = time.perf_counter(), -time.process_time()

    def end(self) -> None:
        self.last = time.perf_counter()
        self.cpu_seconds += time.process_time()


def measure(model: Any, prompts: list[Any], new_tokens: int, drafter: Any) -> dict[str, Any]:
    options = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    ways = {
        "plain": lambda ids, **more: model.generate(ids, **options, **more),
        "sssd": lambda ids, **more: hf.generate(model, ids, drafter(), **options, **more),
        "undrafted": lambda ids, **more: hf.generate(model, ids, drafter(), max_nodes=0, **options, **more),
    }
    calls: dict[str, list[float]] = {name: [] for name in ways}
    decoding: dict[str, list[float]] = {name: [] for name in ways}
    cpu = dict.fromkeys(ways, 0.0)
    steps, different, reading = 0, 0, 0.0
    for turn, ids in enumerate(prompts):
        started = time.perf_counter()
        states = DynamicCache()
        with torch.inference_mode():
            model.model(ids[:, :-1], use_cache=True, **{hf.cache_argument(model): states})
        reading += time.perf_counter() - started
        outputs = {}
        names = list(ways)
        # whoever comes first may find other clocks and caches
        for name in names[turn % 3 :] + names[: turn % 3]:
            clock, copy = Clock(), deepcopy(states)
            started = time.perf_counter()
            outputs[name] = ways[name](
                ids, attention_mask=torch.ones_like(ids), streamer=clock, **{hf.cache_argument(model): copy}
            )
            calls[name].append(clock.last - started)
            decoding[name].append(clock.last - clock.first)
            cpu[name] += clock.cpu_seconds
        made = outputs["plain"].sequences
        different += sum(not torch.equal(outputs[name].sequences, made) for name in ("sssd", "undrafted"))
        steps += outputs["sssd"].steps
    whole = {name: reading + sum(times) for name, times in calls.items()}
    after = {name: sum(times) for name, times in decoding.items()}
    speedups, drafting = (
        [a / b for a, b in zip(decoding[name], decoding["sssd"], strict=True)]
        for name in ("plain", "undrafted")
    )
    after_first = len(prompts) * (new_tokens - 1)
    return {
        "prompts": len(prompts),
        "prompt_tokens": sum(ids.shape[1] for ids in prompts),
        "tokens": len(prompts) * new_tokens,
        "plain_tokens_per_second": after_first / after["plain"],
        "tokens_per_second": after_first / after["sssd"],
        "speedup": after["plain"] / after["sssd"],
        "speedup_median": median(speedups),
        "speedup_cpu": cpu["plain"] / cpu["sssd"],
        "speedups": [round(ratio, 3) for ratio in speedups],
        "drafting": after["undrafted"] / after["sssd"],
        "drafting_median": median(drafting),
        "drafting_cpu": cpu["undrafted"] / cpu["sssd"],
        "whole_call": whole["plain"] / whole["sssd"],
        "tokens_per_step": after_first / max(steps, 1),
        "identical": different == 0,
        "load": os.getloadavg()[0],
    }


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]], commit: str) -> None:
    """The rows so far, with what they were measured on, and their picture."""
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads",
        "model": f"SmolLM2-135M-Instruct {arguments.dtype}",
        "new_tokens": arguments.new_tokens,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")
    if arguments.plot:
        from sssd.hardware.plot import draw_live

        draw_live(rows, arguments.plot, f"{about['model']}, {about['machine']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="of each trace (default: 8)")
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="longest (default: what the model's context has room for)",
    )
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--share", action="store_true", help="one drafter for all prompts of a trace")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: its own choice)")
    parser.add_argument("--dtype", default="float32", help="default: float32")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # as it was when the run began
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    model, tokenizer = smollm2.load(dtype=getattr(torch, arguments.dtype))
    limit = arguments.prompt_tokens or model.config.max_position_embeddings - arguments.new_tokens
    new = lambda: Drafter(vocab_size=len(tokenizer))  # noqa: E731
    # the reordering of weights and the first times of steps belong to no prompt
    warm = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    for _ in range(2):
        measure(model, [warm], 16, new)
    rows: list[dict[str, Any]] = []
    for path in arguments.traces:
        began = time.perf_counter()
        prompts, skipped = prompts_of(path, tokenizer, arguments.prompts, limit)
        if not prompts:
            print(f"{trace_name(path)}: none of {skipped} prompts fits", flush=True)
            continue
        shared = new()
        row = measure(model, prompts, arguments.new_tokens, (lambda: shared) if arguments.share else new)  # noqa: B023
        taken = time.perf_counter() - began
        rows.append({"workload": trace_name(path), **row, "skipped": skipped, "seconds": taken})
        print(
            "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()),
            flush=True,
        )
        write(arguments, rows, git.stdout.strip())
    if not all(row["identical"] for row in rows):
        raise SystemExit("tokens differ")


if __name__ == "__main__":
    main()
