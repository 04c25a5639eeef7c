"""The Triton kernels against plain PyTorch, in Triton's interpreter, and what they compile to for sm_90."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

pytest.importorskip("triton", reason="needs triton")

from interpreter import DEVICE  # noqa: E402

from sssd.hf.kernels import attention, layers, tree  # noqa: E402

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


def distance(mine, theirs):
    return float((mine.double() - theirs).norm() / theirs.norm())


def random_trees(nodes, lengths, starts=None):
    """A tree for each row; every other one is narrow and deep."""
    words = -(-nodes // 64)
    ancestors = torch.zeros(len(lengths), nodes, words, dtype=torch.int64)
    depths = torch.zeros(len(lengths), nodes, dtype=torch.int64)
    for row in range(len(lengths)):
        for node in range(nodes):
            if node:
                parent = node - 1 if row % 2 else int(torch.randint(node, ()))
                ancestors[row, node] = ancestors[row, parent]
                depths[row, node] = depths[row, parent] + 1
            bit = 1 << node % 64
            ancestors[row, node, node // 64] |= bit - (1 << 64) if bit >> 63 else bit
    if words == 1:
        ancestors = ancestors[..., 0]
    starts = starts or [0] * len(lengths)
    columns = (torch.tensor(column, dtype=torch.int32) for column in (lengths, starts))
    return tree.Tree(*(part.to(DEVICE) for part in (ancestors, depths, *columns)))


def states(batch, kv_heads, group, nodes, dim, slots, dtype, lengths):
    queries = torch.randn(batch, nodes, kv_heads * group, dim).to(dtype).transpose(1, 2)
    keys, values = (torch.randn(batch, kv_heads, slots, dim).to(dtype) for _ in range(2))
    for row, length in enumerate(lengths):
        # what lies behind the tree was never written
        keys[row, :, length + nodes :] = values[row, :, length + nodes :] = float("nan")
    return [part.to(DEVICE) for part in (queries, keys, values)]


def agrees(dtype, kv_heads, group, nodes, dim, lengths, starts=None, splits=4, **options):
    torch.manual_seed(0)
    slots = max(lengths) + nodes + 5
    given = states(len(lengths), kv_heads, group, nodes, dim, slots, dtype, lengths)
    trees = random_trees(nodes, lengths, starts)
    mine = attention.tree_attention(*given, trees, dim**-0.5, splits=splits, **options)
    theirs = tree.tree_attention(*(part.double() for part in given), trees, dim**-0.5, **options)
    assert mine.shape == (len(lengths), nodes, kv_heads * group, dim)
    assert not mine.isnan().any()
    assert distance(mine, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("nodes", [1, 32, 64, 100, 128])
def test_attention_of_trees_of_every_size(dtype, nodes):
    agrees(dtype, 1, 1, nodes, 32, [0, 150], splits=2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_attention_of_heads_of_every_size(dtype, dim):
    agrees(dtype, 1, 2, 7, dim, [3, 100], splits=2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_attention_of_groups_of_every_size(dtype, group):
    agrees(dtype, 2, group, 5, 32, [70])


@pytest.mark.parametrize(("dtype", "splits"), [(torch.float32, 1), (torch.float32, 4), (torch.float16, 4)])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 40}, {"window": 3}, {"softcap": 2.0}, {"sinks": [0.3, -1.0, 4.0, 2.0]},
     {"window": 90, "softcap": 30.0, "sinks": [1.0, 9.0, 0.0, -40.0]}],
)  # fmt: skip
def test_attention_with_windows_caps_sinks_and_padding(dtype, options, splits):
    """Padding of whole tiles, of a part, and of the whole prefix."""
    if "sinks" in options:
        options = {**options, "sinks": torch.tensor(options["sinks"], device=DEVICE)}
    agrees(dtype, 2, 2, 12, 32, [200, 150, 9], [70, 131, 9], splits, **options)


def test_attention_over_a_long_context():
    agrees(torch.float32, 1, 1, 3, 64, [32_768], [5], splits=8)


def test_attention_does_not_depend_on_the_number_of_splits_that_is_chosen():
    assert [attention.splits_of(tiles, 132) for tiles in (1, 8, 16, 100, 512)] == [64, 32, 16, 2, 1]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [32, 96, 1000])
@pytest.mark.parametrize("adds", [True, False])
def test_residual_and_norm(dtype, size, adds):
    torch.manual_seed(0)
    x, more = (torch.randn(2, 3, size, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(size, device=DEVICE).to(dtype)
    given = x, more if adds else None, weight, 1e-5
    hidden, normed = layers.add_norm(*given)
    expected = tree.add_norm(*given)
    assert torch.equal(hidden, expected[0])
    assert distance(normed, expected[1].double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (7, 1, 64), (6, 3, 80)])
@pytest.mark.parametrize("norms", [True, False])
def test_rope_split_and_write(dtype, heads, kv_heads, dim, norms):
    torch.manual_seed(0)
    trees = random_trees(3, [5, 0, 9])
    qkv = torch.randn(3, 3, (heads + 2 * kv_heads) * dim, device=DEVICE).to(dtype)
    cos, sin = (torch.rand(3, 3, dim, device=DEVICE).to(dtype) for _ in range(2))
    weights = [torch.randn(dim, device=DEVICE).to(dtype) for _ in range(2)]
    cache = torch.randn(2, 4, kv_heads, 20, dim, device=DEVICE).to(dtype)
    mine, theirs = cache.clone(), cache.clone()
    options = qkv, cos, sin, (*weights, 1e-6) if norms else None, trees
    queries = layers.rope_and_write(*options, *mine[:, :3])
    expected = tree.rope_and_write(*options, *theirs[:, :3])
    assert distance(queries, expected.double()) < TOLERANCE[dtype]
    assert distance(mine, theirs.double()) < TOLERANCE[dtype]
    assert torch.equal(mine[:, 3], cache[:, 3])
    if not norms:
        assert torch.equal(queries, expected)
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [48, 1500])
def test_gate_times_up(dtype, size):
    torch.manual_seed(0)
    gate_up = torch.randn(2, 3, 2 * size, device=DEVICE).to(dtype) * 3
    mine, theirs = layers.silu_gate(gate_up), tree.silu_gate(gate_up.double())
    assert distance(mine, theirs) < TOLERANCE[dtype]


def test_accepted_paths_are_found_and_moved():
    """Random trees whose choices lead somewhere, on entries that lie apart, the 64th among them."""
    rng = np.random.default_rng(0)
    moved = longest = 0
    for nodes in (1, 2, 7, 64, 64):
        lengths = torch.tensor([3, 0, 11], device=DEVICE)
        parents = torch.tensor(
            [[-1, *(rng.integers(max(0, i - 3), i) for i in range(1, nodes))] for _ in range(3)]
        )
        ids = torch.from_numpy(np.stack([rng.permutation(nodes) for _ in range(3)]))
        ancestors = torch.zeros(3, nodes, dtype=torch.int64)
        targets = torch.full((3, nodes), 99)
        for row in range(3):
            for node in range(nodes):
                bit = 1 << node
                above = int(ancestors[row, parents[row, node]]) if node else 0
                ancestors[row, node] = above | (bit - (1 << 64) if bit >> 63 else bit)
                if node and (row or rng.random() < 0.8):
                    targets[row, parents[row, node]] = ids[row, node]
        stack = torch.randn(4, 5, 2, 90, 80, device=DEVICE)
        mine, theirs = stack.clone(), stack.clone()
        given = [part.to(DEVICE) for part in (ids, targets, parents, ancestors)]
        counts = layers.accept_and_move(*given, lengths, mine)
        assert torch.equal(counts.cpu(), tree.accept_and_move(*given, lengths, theirs))
        for row, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
            assert torch.equal(mine[:, row, :, : length + count], theirs[:, row, :, : length + count])
        assert torch.equal(mine[:, 3:], stack[:, 3:])
        moved += not torch.equal(mine, stack)
        longest = max(longest, *counts.tolist())
    assert moved >= 3
    assert longest > 10


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [8, 64, 4097, 20_000])
def test_the_most_probable_tokens(dtype, size):
    """Of equal ones those of the smallest ids, as choices are; impossible ones never before others."""
    torch.manual_seed(0)
    logits = (torch.randn(2, 3, size, device=DEVICE) * 4).to(dtype).round(decimals=1)
    logits[0, 1, 5:] = float("-inf")
    logits[1, 2] = 0
    logits[1, 0, -1] = 30
    mine, theirs = (torch.zeros(2, 5, 17, dtype=torch.int32, device=DEVICE) for _ in range(2))
    targets = layers.tell(logits, mine[:, :3], 8)
    assert torch.equal(targets, tree.tell(logits, theirs[:, :3], 8))
    assert torch.equal(targets, logits.argmax(-1))
    assert torch.equal(mine[..., :9], theirs[..., :9])
    probs = [part[..., 9:].contiguous().view(torch.float32) for part in (mine, theirs)]
    torch.testing.assert_close(*probs, rtol=1e-5, atol=1e-7)


def test_no_launch_spills_registers():
    """What each kernel takes on an H100, as compiled here; all types and sizes with ``SSSD_FULL_TESTS=1``."""
    command = [sys.executable, str(Path(__file__).parent / "compiled.py"), "layers"]
    check_resources(command)


@pytest.mark.slow
def test_no_launch_of_the_attention_spills_registers():
    command = [sys.executable, str(Path(__file__).parent / "compiled.py"), "attention"]
    check_resources(command + ["full"] * bool(os.environ.get("SSSD_FULL_TESTS")))


def check_resources(command):
    tools = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin"
    if not (tools / "ptxas").exists() or not (tools / "cuobjdump").exists():
        pytest.skip("this triton has no ptxas and cuobjdump")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) > 5
    assert not [row for row in rows if row["stack"] or row["spills"]]
    assert max(row["shared"] for row in rows) < 227 * 1024
    assert all(row["tensor_cores"] for row in rows if row["name"].startswith("split"))
