"""Compiles kernels for sm_90, without a GPU, and prints what each takes: registers, stack and local memory.

Run as a program, as triton either interprets kernels in a process or compiles them:

    python tests/hf/compiled.py attention|layers [full]
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


def resources(kernel, types, constants, warps, stages):
    """What a kernel takes with these arguments.

    Args:
        kernel: A function under ``triton.jit``.
        types: Triton's names of its arguments' types; ``i32`` where left out.
        constants: Those that are constants.
        warps: Warps of a program.
        stages: Loads under way at once.
    """
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names
    }
    # pointers and row sizes are multiples of 16 in every launch, as the JIT finds out
    aligned = [
        n for n, kind in signature.items() if kind.startswith("*") or n.split("_")[0] in ("query", "key")
    ]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {
        "registers": int(used[1]),
        "stack": int(used[2]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "tensor_cores": len(re.findall(r"\bH?G?MMA\b|\bHGMMA\b|\bHMMA\b", text)),
        "shared": done.metadata.shared,
    }


ONE = {"nodes": 1, "group": 1, "kv_heads": 1}
"""Arguments of which triton makes constants where they are 1."""


def attention(full):
    """The split kernel plain and with everything it can do, and the merge."""
    from sssd.hf.kernels.attention import merge_kernel, merge_warps, split_kernel, tiles_of

    dims = (64, 80, 96, 128, 256) if full else (64, 96, 128, 256)
    kinds = TYPES if full else ("bf16", "fp32")
    for kind, dim, rows in product(kinds, dims, (16, 32, 64)):
        tiles = tiles_of(rows, dim, TYPES[kind])
        if tiles.rows != rows:
            continue
        padded = max(16, triton.next_power_of_2(dim))
        types = dict.fromkeys(("queries", "keys", "values", "result", "sinks"), f"*{kind}")
        types |= {"ancestors": "*i64", "depths": "*i64", "lengths": "*i64", "starts": "*i64"}
        types |= {"parts": "*fp32", "sums": "*fp32", "scale": "fp32", "cap": "fp32"}
        for splits, words, extra in [
            (16, 1, False),
            (1, 2, True),
            *([(16, 2, True), (1, 1, False)] if full else []),
        ]:
            constants = {
                "SPLITS": splits, "WORDS": words, "FULL": kind == "fp32",
                "ROWS": tiles.rows, "KEYS": tiles.keys,
                "DIM": dim, "PADDED": padded, "CAPPED": extra, "WINDOWED": extra, "SUNK": extra,
            }  # fmt: skip
            yield (
                f"split {kind} {dim} {tiles} {splits} {words} {extra}",
                (split_kernel, types, constants, tiles.warps, tiles.stages),
            )
            if dim == 128 and rows == 16:
                name = f"split {kind} of one node, {splits} {extra}"
                yield name, (split_kernel, types, {**constants, **ONE, "WORDS": 1}, tiles.warps, tiles.stages)
    for kind, dim, splits in product(kinds, dims, (2, 64) if full else (64,)):
        padded = max(16, triton.next_power_of_2(dim))
        constants = {"SPLITS": splits, "DIM": dim, "PADDED": padded}
        types = {"parts": "*fp32", "sums": "*fp32", "result": f"*{kind}"}
        yield f"merge {kind} {dim} {splits}", (merge_kernel, types, constants, merge_warps(splits, padded), 2)


def layers(full):
    """The kernels between the products, for sizes of models from 0.1 to 70 billion parameters."""
    from sssd.hf.kernels import layers as found

    for kind in TYPES if full else ("bf16", "fp32"):
        tensor, flag = f"*{kind}", kind == "fp32"
        for size in (576, 4096, 8192, 16384):
            padded = triton.next_power_of_2(size)
            types = dict.fromkeys(("x", "residual", "weight", "hidden", "normed"), tensor) | {
                "epsilon": "fp32"
            }
            constants = {"SIZE": padded, "ADDS": True, "PLAIN": flag}
            yield f"norm {kind} {size}", (found.norm_kernel, types, constants, found.norm_warps(padded), 2)
        for dim in (64, 80, 128, 256):
            padded = triton.next_power_of_2(dim)
            names = ("qkv", "cos", "sin", "q_weight", "k_weight", "queries", "keys", "values")
            types = dict.fromkeys(names, tensor) | {"lengths": "*i64", "epsilon": "fp32"}
            constants = {"DIM": dim, "PADDED": padded, "HEADS": 512 // padded, "NORMS": True, "PLAIN": flag}
            yield f"rope {kind} {dim}", (found.rope_kernel, types, constants, 2, 2)
            constants |= {"heads": 1, "kv_heads": 1, "nodes": 1}
            yield f"rope {kind} {dim} of one", (found.rope_kernel, types, constants, 2, 2)
            types = {"stack": tensor, "origin": "*i32", "counts": "*i32", "lengths": "*i64"}
            types |= dict.fromkeys(("part_stride", "batch_stride", "head_stride"), "i64")
            constants = {"DIM": dim, "PADDED": padded}
            yield f"move {kind} {dim}", (found.move_kernel, types, constants, 1, 2)
            yield f"move {kind} {dim} of one", (found.move_kernel, types, {**constants, "kv_heads": 1}, 1, 2)
        types = {"gate_up": tensor, "result": tensor}
        yield f"gate {kind}", (found.gate_kernel, types, {"BLOCK": 1024}, 4, 2)
        types = {"logits": tensor, "best": "*fp32", "places": "*i32", "sums": "*fp32"}
        constants = {"TOP": 8, "BLOCK": found.VOCABULARY_BLOCK}
        yield f"candidates {kind}", (found.candidates_kernel, types, constants, 4, 2)
    types = {"best": "*fp32", "places": "*i32", "sums": "*fp32", "targets": "*i64", "answer": "*i32"}
    for parts in (1, 32, 64):
        constants = {"TOP": 8, "PARTS": parts, **({"parts": 1, "nodes": 1} if parts == 1 else {})}
        yield f"choose {parts}", (found.choose_kernel, types, constants, 2, 2)
    types = dict.fromkeys(("ids", "targets", "parents", "ancestors"), "*i64") | {
        "origin": "*i32",
        "counts": "*i32",
    }
    for nodes in (2, 64):
        one = {"nodes": 1} if nodes == 2 else {}
        yield f"walk {nodes}", (found.walk_kernel, types, {"NODES": nodes, **one}, 1, 2)


if __name__ == "__main__":
    launches = {"attention": attention, "layers": layers}[sys.argv[1]]("full" in sys.argv)
    for name, launch in launches:
        sys.stdout.write(json.dumps({"name": name, **resources(*launch)}) + "\n")
