"""Chains sized by the rule, against the best fixed length: tokens per cost of recorded requests.

Usage: chains.py TRACE.jsonl ... [--json FILE] [--batch 1] [--per-node 0.3] [--datastore FILE]

A pass over n tokens, of all requests, costs 1 + PER_NODE * (n - 1), as on a CPU, where every token of a
draft is paid for. Requests are served as `python -m sssd simulate` does it. The best fixed length is chosen
for each trace afterwards, of 0, 1, 2, 4, 8 and 16 nodes.
"""

import argparse
import json
import os
import platform
import subprocess
import sys

from sssd.hardware import CostCurve
from sssd.hardware.simulate import Adaptive, Autoregressive, Fixed, sequences, simulate
from sssd.replay import read_trace, trace_name

LENGTHS = (1, 2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--per-node", type=float, default=0.3)
    parser.add_argument("--datastore")
    arguments = parser.parse_args()
    most = 1 << 16
    seconds = [[[1.0], [1 + arguments.per_node * (most - 1)]]] * 2
    curve = CostCurve([1, 64], [1, most], [0], seconds, packed=True)
    store = {"datastore": arguments.datastore} if arguments.datastore else {}
    begin = sequences(end_token_ids=[128009], threads=1, **store)
    rows = []
    for path in arguments.traces:
        requests = list(read_trace(path))
        plain = simulate(requests, Autoregressive(), curve, arguments.batch).rate
        fixed = {0: 1.0}
        for length in LENGTHS:
            rule = Fixed(length, begin, "chain")
            fixed[length] = simulate(requests, rule, curve, arguments.batch).rate / plain
        outcome = simulate(requests, Adaptive(begin, curve, "chain"), curve, arguments.batch)
        best = max(fixed, key=fixed.__getitem__)
        row = {
            "trace": trace_name(path),
            "fixed": fixed,
            "best_fixed": best,
            "rule": outcome.rate / plain,
            "rule_over_best_fixed": outcome.rate / plain / fixed[best],
            "nodes_per_step": outcome.verified / max(outcome.steps, 1),
        }
        rows.append(row)
        print(
            f"{row['trace']:24} rule {row['rule']:.3f} best fixed {fixed[best]:.3f} ({best:2})"
            f" ratio {row['rule_over_best_fixed']:.4f}",
            flush=True,
        )
    print(f"least ratio {min(row['rule_over_best_fixed'] for row in rows):.4f}")
    if arguments.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        figures = {"command": f"python {' '.join(sys.argv)}", "commit": commit, "machine": machine}
        figures |= {"batch": arguments.batch, "per_node": arguments.per_node, "traces": rows}
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
