"""The GPU measurements, rehearsed on tiny models without one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parent.parent
GPU = ROOT / "benches" / "gpu"


def test_every_stage_runs(tmp_path):
    command = [sys.executable, str(GPU / "measure.py"), "--rehearse", "--out", str(tmp_path)]
    environment = {**os.environ, "SSSD_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["failed"] == []
    replay = results["correct"]["graph_replay"]
    assert replay["bit_for_bit"] == replay["passes"] > 20
    assert results["width_ratio"]["ratio"] > 0
    ways = {row["way"]: row.get("tokens_per_second", row.get("error")) for row in results["generate"]}
    assert len(ways) == 6
    assert all(isinstance(ways[way], float) for way in ways if way.startswith(("sssd", "transformers"))), ways
    kernels = results["kernels"][0]
    assert kernels["sdpa, grouped queries"]["error"] < 1e-5
    assert (tmp_path / "curve.json").is_file()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_own_kernel_is_right_in_tritons_interpreter(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(GPU)!r})
import torch
from tree_attention import tree_attention
torch.manual_seed(0)
shapes = [(1, 2, 3, 5, 16, [100]), (2, 2, 4, 8, 32, [7, 190]), (1, 1, 1, 1, 16, [64])]
for batch, heads, group, nodes, dim, lengths in shapes:
    slots = max(lengths) + nodes + 20
    queries = torch.randn(batch, heads, group * nodes, dim)
    keys, values = (torch.randn(batch, heads, slots, dim) for _ in range(2))
    mask = torch.zeros(batch, nodes, slots, dtype=torch.bool)
    tree = torch.zeros(batch, nodes, nodes, dtype=torch.uint8)
    for b, length in enumerate(lengths):
        for node in range(nodes):
            if node:
                tree[b, node] = tree[b, torch.randint(node, ())]
            tree[b, node, node] = 1
        mask[b, :, :length] = True
        mask[b, :, length : length + nodes] = tree[b].bool()
    lengths = torch.tensor(lengths, dtype=torch.int32)
    mine = tree_attention(queries, keys, values, tree, lengths, 0.3, splits=4)
    mask = mask.repeat(1, group, 1)[:, None]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    theirs = sdpa(queries, keys, values, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
