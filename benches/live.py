"""Speed of sssd.hf.generate against model.generate, on real prompts, SmolLM2-135M-Instruct on a CPU.

Usage: live.py TRACE... [--prompts 8] [--new-tokens 128] [--json FILE] [--plot FILE]

TRACE are JSON Lines files with "prompt" texts (shared/traces/dev/*.jsonl.xz). Of each, the first prompts that
fit are decoded greedily three ways, one after the other and in turn: autoregressively by transformers, by
sssd with the rule that is its default, and by sssd without drafts. The tokens of all three must be equal.
Every prompt gives --new-tokens tokens, past an end token if one comes earlier.

speedup     tokens/s after the first token, over autoregressive decoding by transformers
drafting    the same over sssd without drafts: what speculation alone brings
whole_call  as speedup, with the prompt's pass, which is transformers' own in all three
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
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers.utils import logging

from sssd import Drafter, hf
from sssd.hf import smollm2
from sssd.replay import trace_name


def prompts_of(path: Path, tokenizer: Any, count: int, limit: int) -> list[Any]:
    """Token ids [1, n] of the first prompts of at most ``limit`` tokens."""
    found = []
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            text = (
                record["turns"][0]["content"]
                if record.get("turns") and not record.get("prompt")
                else record["prompt"]
            )
            # far too long to tokenize for nothing
            if not isinstance(text, str) or not text or len(text) > 16 * limit:
                continue
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )["input_ids"]
            if ids.shape[1] <= limit:
                found.append(ids)
            if len(found) == count:
                break
    return found


class Clock:
    """A streamer that notes when the first new token came."""

    def __init__(self) -> None:
        self.calls, self.first = 0, 0.0

    def put(self, value: Any) -> None:
        self.calls += 1
        # the first call shows the prompt
        if self.calls == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        pass


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
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    decoding: dict[str, list[float]] = {name: [] for name in ways}
    tokens, steps, different = 0, 0, 0
    for turn, ids in enumerate(prompts):
        outputs = {}
        names = list(ways)
        # whoever comes first may find other clocks and caches
        for name in names[turn % 3 :] + names[: turn % 3]:
            clock = Clock()
            started = time.perf_counter()
            outputs[name] = ways[name](ids, attention_mask=torch.ones_like(ids), streamer=clock)
            ended = time.perf_counter()
            seconds[name].append(ended - started)
            decoding[name].append(ended - clock.first)
        made = outputs["plain"].sequences
        different += sum(not torch.equal(outputs[name].sequences, made) for name in ("sssd", "undrafted"))
        tokens += made.shape[1] - ids.shape[1]
        steps += outputs["sssd"].steps
    total = {name: sum(times) for name, times in seconds.items()}
    after = {name: sum(times) for name, times in decoding.items()}
    after_first = tokens - len(prompts)
    return {
        "prompts": len(prompts),
        "prompt_tokens": sum(ids.shape[1] for ids in prompts),
        "tokens": tokens,
        "plain_tokens_per_second": after_first / after["plain"],
        "tokens_per_second": after_first / after["sssd"],
        "speedup": after["plain"] / after["sssd"],
        "speedup_median": median(a / b for a, b in zip(decoding["plain"], decoding["sssd"], strict=True)),
        "drafting": after["undrafted"] / after["sssd"],
        "drafting_median": median(
            a / b for a, b in zip(decoding["undrafted"], decoding["sssd"], strict=True)
        ),
        "whole_call": total["plain"] / total["sssd"],
        "tokens_per_step": after_first / max(steps, 1),
        "identical": different == 0,
    }


def write(path: Path, arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The rows so far, with what they were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads",
        "model": f"SmolLM2-135M-Instruct {arguments.dtype}",
        "new_tokens": arguments.new_tokens,
    }
    path.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="of each trace (default: 8)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=4096, metavar="N", help="longest (default: 4096)"
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
    model, tokenizer = smollm2.load(dtype=getattr(torch, arguments.dtype))
    new = lambda: Drafter(vocab_size=len(tokenizer))  # noqa: E731
    # the reordering of weights and the first times of steps belong to no prompt
    warm = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    for _ in range(2):
        measure(model, [warm], 16, new)
    rows = []
    for path in arguments.traces:
        prompts = prompts_of(path, tokenizer, arguments.prompts, arguments.prompt_tokens)
        if not prompts:
            print(f"{trace_name(path)}: no prompt fits", flush=True)
            continue
        shared = new()
        row = measure(model, prompts, arguments.new_tokens, (lambda: shared) if arguments.share else new)  # noqa: B023
        rows.append({"workload": trace_name(path), **row})
        print(
            "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()),
            flush=True,
        )
        if arguments.json:
            write(arguments.json, arguments, rows)
    if arguments.plot:
        from sssd.hardware.plot import draw_live

        draw_live(rows, arguments.plot, "SmolLM2-135M-Instruct, 2 CPU cores")
    if not all(row["identical"] for row in rows):
        raise SystemExit("tokens differ")


if __name__ == "__main__":
    main()
