"""What verification costs on a GPU, and whether it is right there. Run by ``run.sh``; see its comment.

Stages, in this order, each skipped when the time is up; results are written after every figure:

correct   graph replay against eager passes, bit for bit; SmolLM2 in float32: greedy tokens against those of
          model.generate, logits against the CPU's, and its curve (where its file was carried)
curve     T(batch, width, context) of a Llama-3-8B-shaped model with random bfloat16 weights
kernels   one layer's attention of a tree: SDPA on copied keys, SDPA on grouped queries, own kernel,
          FlexAttention (which is compiled for every shape, and left out once that has taken a minute)
generate  tokens/s of that model against transformers' generate: plain, prompt lookup, static cache (compiled)

With ``--rehearse`` everything runs on tiny models, on the CPU too, in seconds: a test of this file.
"""

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "python")]

from sssd import DraftBatch, Drafter, DraftTree, PassBlock, hf  # noqa: E402
from sssd.hardware import CostCurve  # noqa: E402
from sssd.hf.fast import fast_pass  # noqa: E402
from sssd.hf.kernels.tree import Tree  # noqa: E402
from sssd.hf.profile import profile  # noqa: E402
from sssd.hf.static import WIDTHS, StaticStore  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def llama(rehearse: bool, dtype: Any) -> Any:
    """A Llama-3-8B-shaped model, or a tiny one, with random weights."""
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    config = LlamaConfig(
        **(tiny if rehearse else large),
        num_attention_heads=4 if rehearse else 32,
        num_key_value_heads=2 if rehearse else 8,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3 if rehearse else 0.02)
    return model.eval()


def random_block(rng: Any, lengths: list[int], width: int, vocab: int) -> tuple[Any, ...]:
    """What a store is filled with for random trees after texts of these lengths."""
    trees = []
    for _ in lengths:
        above = [int(rng.integers(max(-1, i - 5), i)) for i in range(width - 1)]
        trees.append(DraftTree(rng.permutation(vocab)[: width - 1], above))
    return DraftBatch.from_trees(trees), rng.integers(vocab, size=len(lengths)), lengths, width


def correct(options: Any, results: dict[str, Any]) -> None:
    """Graphs against eager passes; SmolLM2 against itself."""
    found: dict[str, Any] = {}
    results["correct"] = found
    model = llama(True, torch.float32)
    known = fast_pass(model)
    assert known is not None
    rng = np.random.default_rng(0)
    stores = [StaticStore(known, 2, 256), StaticStore(known, 2, 256, record=lambda function: function)]
    recorded = sum(stores[0].warm_up(2, WIDTHS[:6], accept) for accept in (True, False))
    stores[0].stack.zero_()
    lengths, equal, passes = [0, 0], 0, 0
    with torch.inference_mode():
        while max(lengths) < 150:
            block = random_block(rng, lengths, int(rng.choice(WIDTHS[:6])), 64)
            for store in stores:
                store.fill(*block)
            outputs = [store.launch(lengths, passes % 2 == 0)()[0] for store in stores]
            states = [torch.stack([torch.stack(layer) for layer in store.buffers]) for store in stores]
            equal += torch.equal(*outputs) and torch.equal(*states)
            passes += 1
            lengths = [length + int(rng.integers(1, 5)) for length in lengths]
    found["graph_replay"] = {"passes": passes, "bit_for_bit": equal, "recorded": recorded}
    found["by_kernels"] = known.by_kernels
    if options.smollm2 is None:
        found["smollm2"] = "not carried"
        return
    cpu = AutoModelForCausalLM.from_pretrained(
        options.smollm2.parent, gguf_file=options.smollm2.name, dtype=torch.float32
    ).eval()
    prompts = json.loads((HERE / "prompts.json").read_text())
    sample = torch.tensor([prompts[0]])
    with torch.inference_mode():
        reference = cpu(sample).logits
    model = cpu.to(DEVICE)
    with torch.inference_mode():
        difference = (model(sample.to(DEVICE)).logits.cpu() - reference).norm() / reference.norm()
    settings = {"max_new_tokens": 96, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    drafter, same, steps, tokens = Drafter(), 0, 0, 0
    for prompt in prompts:
        ids = torch.tensor([prompt], device=DEVICE)
        expected = model.generate(ids, **settings)
        for nodes in (None, 31):
            result = hf.generate(
                model, ids, drafter, max_nodes=nodes, return_dict_in_generate=True, **settings
            )
            same += torch.equal(result.sequences, expected)
            steps, tokens = steps + result.steps, tokens + 95
    found["smollm2"] = {
        "runs": 2 * len(prompts),
        "identical": same,
        "tokens_per_step": tokens / steps,
        "logits_against_cpu": float(difference),
    }
    results["smollm2_curve"] = profile(model, batches=(1, 16), contexts=(128, 2048), refresh=True).to_json()


def curve(options: Any, results: dict[str, Any]) -> None:
    """The cost of verify passes of the large model."""
    model = options.model = llama(options.rehearse, torch.bfloat16 if CUDA else torch.float32)
    if options.rehearse:
        grid: dict[str, Any] = {"batches": (1, 2), "contexts": (32, 64), "widths": (1, 2, 8), "repeats": 1}
    else:
        grid = {"batches": (1, 4, 16, 64), "contexts": (128, 2048), "repeats": 5}
    measured = profile(model, refresh=True, **grid)
    results["curve"] = measured.to_json()
    context = grid["contexts"][-1]
    widest = 8 if options.rehearse else 32
    results["width_ratio"] = {
        "batch": 1,
        "context": context,
        "width": widest,
        "ratio": measured.time(1, widest, context) / measured.time(1, 1, context),
    }


def generate(options: Any, results: dict[str, Any]) -> None:
    """Tokens per second, against transformers, on a text that repeats and one that does not."""
    model = options.model
    vocab, length, new = model.config.vocab_size, *((40, 8) if options.rehearse else (2048, 64))
    torch.manual_seed(0)
    block = torch.randint(1, vocab, (1, length // 8), device=DEVICE)
    prompts = {"repeated": block.repeat(1, 8), "random": torch.randint(1, vocab, (1, length), device=DEVICE)}
    plain = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    ways: dict[str, Callable[[Any], Any]] = {
        "transformers": lambda ids: model.generate(ids, **plain),
        "sssd": lambda ids: hf.generate(model, ids, Drafter(), **plain),
        "sssd, 31 nodes": lambda ids: hf.generate(model, ids, Drafter(), max_nodes=31, **plain),
        "sssd, no drafts": lambda ids: hf.generate(model, ids, Drafter(), max_nodes=0, **plain),
        "prompt lookup": lambda ids: model.generate(ids, prompt_lookup_num_tokens=10, **plain),
        "static cache": lambda ids: model.generate(
            ids, cache_implementation="static", disable_compile=options.rehearse, **plain
        ),
    }
    results["generate"] = []
    for way, call in ways.items():
        for name, ids in prompts.items():
            # a compilation cannot be stopped
            if options.left() < (150 if way == "static cache" and not options.rehearse else 60):
                return
            try:
                times = []
                for _ in range(1 if options.rehearse else 4):
                    started = time.perf_counter()
                    call(ids)
                    if CUDA:
                        torch.cuda.synchronize()
                    times.append(time.perf_counter() - started)
                # the first call compiles, records and warms up
                rate = new / median(times[1:] or times)
                results["generate"].append({"way": way, "text": name, "tokens_per_second": rate})
            except Exception as error:  # an old transformers may lack a way; the others still count
                results["generate"].append({"way": way, "text": name, "error": repr(error)[:300]})
            options.save()


def kernels(options: Any, results: dict[str, Any]) -> None:
    """Microseconds of one layer's attention over a tree, by kernel."""
    rng = np.random.default_rng(0)
    shapes = [(b, c, w) for b in (1, 16) for c in (2048, 8192) for w in (32, 1, 8, 64)]
    shapes += [(1, 32768, 32), (1, 32768, 1)]
    heads = (4, 2, 16) if options.rehearse else (32, 8, 128)
    results["kernels"] = []
    for batch, context, width in [(1, 64, 8)] if options.rehearse else shapes:
        if options.left() > 20:
            row = {"batch": batch, "context": context, "width": width}
            flex = options.flex_seconds < 60
            found = kernels_at(rng, batch, context, width, *heads, flex=flex)
            options.flex_seconds += found.pop("flex_seconds", 0.0)
            results["kernels"].append({**row, **found})
            options.save()


def kernels_at(
    rng: Any, batch: int, context: int, width: int, heads: int, kv_heads: int, dim: int, flex: bool
) -> dict[str, Any]:
    """Each kernel's time and its error against SDPA in float64."""
    group, dtype, slots = heads // kv_heads, torch.bfloat16 if CUDA else torch.float32, context + width
    queries = torch.randn(batch, kv_heads, group * width, dim, device=DEVICE, dtype=dtype)
    keys, values = (torch.randn(batch, kv_heads, slots, dim, device=DEVICE, dtype=dtype) for _ in range(2))
    trees, roots, lengths, _ = random_block(rng, [context] * batch, width, 1000)
    block = PassBlock()
    block.fill(trees, roots, lengths, width=width, mask=True, links=True)
    tree = torch.from_numpy(block.mask).to(DEVICE)
    mask = torch.ones(batch, 1, width, slots, dtype=torch.bool, device=DEVICE)
    mask[:, 0, :, context:] = tree
    additive = torch.zeros(mask.shape, dtype=dtype, device=DEVICE)
    additive.masked_fill_(~mask, torch.finfo(dtype).min)
    grouped = additive.repeat(1, 1, group, 1)
    spread = queries.view(batch, heads, width, dim)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    words, depths = block.ancestors.view(np.int64), block.depths
    reference = sdpa(queries.double(), keys.double(), values.double(), attn_mask=grouped.double())

    def copied() -> Any:
        copies = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        return sdpa(spread, *copies, attn_mask=additive)

    def compiled() -> Callable[[], Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def allowed(b: Any, h: Any, q: Any, k: Any) -> Any:
            return mask[b, 0, q, k]

        block = create_block_mask(allowed, batch, None, width, slots, device=DEVICE)
        run = torch.compile(flex_attention) if CUDA else flex_attention
        return lambda: run(spread, keys, values, block_mask=block, enable_gqa=True)

    def own() -> Callable[[], Any]:
        from sssd.hf.kernels.attention import tree_attention

        tree = Tree(*(torch.from_numpy(part).to(DEVICE) for part in (words, depths)), lengths, lengths * 0)
        # [node, head] to [key head, head of the group, node]
        order = (batch, width, kv_heads, group, dim), (0, 2, 3, 1, 4)
        return lambda: tree_attention(spread, keys, values, tree, dim**-0.5).view(order[0]).permute(order[1])

    candidates: dict[str, Callable[[], Callable[[], Any]]] = {
        "sdpa, keys copied": lambda: copied,
        "sdpa, grouped queries": lambda: lambda: sdpa(queries, keys, values, attn_mask=grouped),
        "own kernel": own,
        **({"flex": compiled} if flex else {}),
    }
    row: dict[str, Any] = {}
    for name, make in candidates.items():
        started = time.perf_counter()
        try:
            run = make()
            error = (run().reshape(reference.shape).double() - reference).norm() / reference.norm()
            row[name] = {"us": clock(run), "error": float(error)}
        except Exception as error:  # a kernel that is not there is told, not fatal
            row[name] = repr(error)[:200]
        if name == "flex":
            row["flex_seconds"] = time.perf_counter() - started
    return row


def clock(run: Callable[[], Any], repeats: int = 30) -> float:
    """Median microseconds of a call, by events on a GPU; several inputs would not fit its cache anyway."""
    if not CUDA:
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e6
    for _ in range(5):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument("--rehearse", action="store_true", help="tiny models, on the CPU too")
    parser.add_argument("--smollm2", type=Path, metavar="FILE", help="the GGUF file of SmolLM2")
    parser.add_argument(
        "--seconds", type=float, default=520.0, metavar="N", help="time for all (default: 520)"
    )
    options = parser.parse_args()
    if not CUDA and not options.rehearse:
        raise SystemExit("no CUDA device; --rehearse runs everything on tiny models")
    ends = time.perf_counter() + options.seconds
    options.left = lambda: ends - time.perf_counter()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else platform.processor() or "cpu",
        "rehearsal": options.rehearse,
        "torch": torch.__version__,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    text = lambda: json.dumps({**results, "failed": failed}, indent=1) + "\n"  # noqa: E731
    options.save = lambda: (options.out / "gpu.json").write_text(text())
    options.flex_seconds = 0.0
    for stage in (correct, curve, kernels, generate):
        if options.left() < 30:
            failed.append(f"{stage.__name__}: no time left")
            continue
        started = time.perf_counter()
        try:
            stage(options, results)
        except Exception:  # later stages do not need this one's figures
            failed.append(f"{stage.__name__}: {traceback.format_exc()}")
        results.setdefault("seconds", {})[stage.__name__] = time.perf_counter() - started
        options.save()
    if "curve" in results:
        measured = CostCurve.from_json(results["curve"])
        measured.save(options.out / "curve.json")
        try:
            from sssd.hardware.plot import draw_curve

            draw_curve(measured, options.out / "curve.png")
        except ImportError as error:
            print(error)
    for name in ("correct", "width_ratio", "generate", "kernels", "seconds"):
        print(name, json.dumps(results.get(name), indent=1))
    for reason in failed:
        print("FAILED", reason)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
