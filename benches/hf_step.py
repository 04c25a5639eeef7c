"""What a step of sssd.hf.generate takes outside the forward pass: drafts, inputs of the pass, choices, cache.

Usage: hf_step.py [--rows 1 16] [--nodes 0 32] [--new-tokens 96] [--threads 1] [--runs 3] [--json FILE]
                  [--against CHECKOUT]

SmolLM2-135M-Instruct on a CPU, greedy, by the fast path. A step is timed from the end of one forward pass to
the beginning of the next, so the states that the pass itself writes do not count. Rows decode after different
lengths of one text. --against runs the same, turn by turn, with the package of another checkout whose
extension is built.

nodes      mean drafted nodes of a row; accepted: mean tokens of a row and step
ms         median over all steps of all runs; best: the least median of a run
cpu_ms     the median by the CPU time of the thread, which others on the machine change less; with one thread
           of torch it is all that there is
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]

TEXT = (
    "Write this class again and add a method that returns the perimeter.\n"
    "class Rectangle:\n"
    "    def __init__(self, width, height):\n"
    "        if width < 0 or height < 0:\n"
    "            raise ValueError('negative size')\n"
    "        self.width = width\n"
    "        self.height = height\n"
    "    def area(self):\n"
    "        return self.width * self.height\n"
    "class Square(Rectangle):\n"
    "    def __init__(self, width):\n"
    "        super().__init__(width, width)\n"
    "    def area(self):\n"
    "        return self.width * self.width\n"
)


def outside(model: Any, ids: Any, nodes: int, new_tokens: int) -> tuple[list[tuple[float, float]], Any]:
    """Seconds and CPU seconds of each step outside the forward pass, and the result."""
    from sssd import hf
    from sssd.hf.fast import FastPass

    original, seconds, last = FastPass.__call__, [], [(0.0, 0.0)]

    def timed(self: Any, *arguments: Any) -> Any:
        now, (wall, cpu) = (perf_counter(), thread_time()), last[0]
        if wall:
            seconds.append((now[0] - wall, now[1] - cpu))
        logits = original(self, *arguments)
        last[0] = perf_counter(), thread_time()
        return logits

    FastPass.__call__ = timed  # type: ignore[method-assign]
    try:
        result = hf.generate(
            model,
            ids,
            max_nodes=nodes,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
    finally:
        FastPass.__call__ = original  # type: ignore[method-assign]
    return seconds, result


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One run of every case, in this process."""
    import torch
    from transformers.utils import logging

    from sssd.hf import smollm2

    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = smollm2.load()
    text = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    found = []
    for rows in arguments.rows:
        width = len(text) - (rows - 1)
        ids = torch.stack([text[row : row + width] for row in range(rows)])
        for nodes in arguments.nodes:
            outside(model, ids, nodes, 8)
            seconds, result = outside(model, ids, nodes, arguments.new_tokens)
            found.append(
                {
                    "rows": rows,
                    "max_nodes": nodes,
                    "nodes": result.drafted / result.steps,
                    "accepted": result.tokens_per_step,
                    "seconds": seconds,
                }
            )
    return found


def run(arguments: argparse.Namespace, checkout: Path) -> list[dict[str, Any]]:
    """One run in a process of its own, on the package of a checkout."""
    options = ["--rows", *arguments.rows, "--nodes", *arguments.nodes, "--new-tokens", arguments.new_tokens]
    command = [sys.executable, __file__, "--child", *options, "--threads", arguments.threads]
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": str(checkout / "python")},
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, marked where files differ from it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--nodes", nargs="+", type=int, default=[0, 32])
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments)))
        return
    checkouts = [ROOT] if arguments.against is None else [ROOT, arguments.against.resolve()]
    runs: dict[Path, list[list[dict[str, Any]]]] = {checkout: [] for checkout in checkouts}
    for _ in range(arguments.runs):
        for checkout in checkouts:
            runs[checkout].append(run(arguments, checkout))
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {arguments.threads} torch threads",
        "model": "SmolLM2-135M-Instruct float32",
        "load": os.getloadavg()[0],
        "results": [],
    }
    for checkout in checkouts:
        for cases in zip(*runs[checkout], strict=True):
            row = {"commit": commit_of(checkout), **cases[0]}
            row["steps"] = sum(len(case["seconds"]) for case in cases)
            row["ms"] = 1e3 * median(wall for case in cases for wall, _ in case["seconds"])
            row["best"] = 1e3 * min(median(wall for wall, _ in case["seconds"]) for case in cases)
            row["cpu_ms"] = 1e3 * median(cpu for case in cases for _, cpu in case["seconds"])
            del row["seconds"]
            about["results"].append(row)
            print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
