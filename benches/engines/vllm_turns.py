"""vLLM with `sssd`, with Arctic's suffix decoding, with its own ngram, and plain, in turns inside one engine.

    make vllm && .venv-vllm/bin/python benches/engines/vllm_turns.py MODEL OUT.json [--prompts 30] [--k 8] ...

MODEL is a folder of SmolLM2 in safetensors (`make vllm` makes one). Prompts are the first short ones of the
dev traces: chat, rag, edits (code-edit, doc-edit), and `repeat`, the chats once more. One engine; who drafts
changes from turn to turn, so that all have the same load. Written: tokens per step, drafted, tokens/s of each
turn, times of `propose`, and how many texts equal plain decoding's.
"""

import argparse
import json
import lzma
import os
import statistics
import subprocess
import time
from collections import defaultdict
from pathlib import Path

from sssd.vllm import Proposer

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
}
TRACES = Path(os.environ.get("SSSD_TRACES", Path(__file__).parents[3] / "shared/traces"))
KINDS = {"chat": ("chat-en",), "rag": ("rag",), "edit": ("code-edit", "doc-edit")}
MODES = ("none", "ngram", "suffix", "sssd")


class Switch(Proposer):
    """A proposer that plays all others by turns."""

    def __init__(self, config):
        from vllm.v1.spec_decode.ngram_proposer import NgramProposer
        from vllm.v1.spec_decode.suffix_decoding import SuffixDecodingProposer

        super().__init__(config)
        spec = config.speculative_config
        spec.prompt_lookup_min, spec.prompt_lookup_max = 2, 4
        spec.suffix_decoding_max_tree_depth, spec.suffix_decoding_max_cached_requests = 24, 10_000
        spec.suffix_decoding_max_spec_factor, spec.suffix_decoding_min_token_prob = 1.0, 0.1
        self.config, self.suffix_class = config, SuffixDecodingProposer
        self.ngram, self.suffix = NgramProposer(config), SuffixDecodingProposer(config)
        self.mode = "none"
        self.start()

    def start(self):
        self.steps = self.drafted = self.sampled = 0
        self.seconds = []

    def forget(self):
        """From cold: nobody knows earlier requests."""
        self.clear()
        self.suffix = self.suffix_class(self.config)

    def propose(self, sampled, lengths, rows, slot_mappings=None):
        started = time.perf_counter()
        if self.mode == "none":
            drafts = [[] for _ in sampled]
        elif self.mode == "ngram":
            drafts = self.ngram.propose(self.k, sampled, lengths, rows)
        elif self.mode == "suffix":
            drafts = self.suffix.propose(self.k, self._step.runner.input_batch, sampled)
        else:
            drafts = super().propose(sampled, lengths, rows)
        self.seconds.append(time.perf_counter() - started)
        self.steps += sum(map(bool, sampled))
        self.sampled += sum(map(len, sampled))
        self.drafted += sum(map(len, drafts))
        return drafts


def prompts(tokenizer, count, longest):
    """Of each kind the first short prompts, as ids."""
    found = {}
    for kind, workloads in KINDS.items():
        found[kind] = []
        for workload in workloads:
            texts, wanted = [], -(-count // len(workloads))
            with lzma.open(TRACES / f"dev/{workload}.jsonl.xz", "rt", encoding="utf-8") as lines:
                for line in lines:
                    prompt = json.loads(line)["prompt"]
                    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
                    ids = tokenizer.apply_chat_template(
                        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
                    )
                    if len(ids) <= longest:
                        texts.append(ids)
                    if len(texts) == wanted:
                        break
            found[kind] += texts
    found["repeat"] = found["chat"]
    return found


def run(llm, switch, mode, rows, tokens, batch):
    """Decodes prompts, ``batch`` at a time; the figures and the texts."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens)
    switch.mode = mode
    switch.start()
    started, texts = time.perf_counter(), []
    for at in range(0, len(rows), batch):
        asked = [{"prompt_token_ids": row} for row in rows[at : at + batch]]
        texts += [list(one.outputs[0].token_ids) for one in llm.generate(asked, params, use_tqdm=False)]
    seconds = time.perf_counter() - started
    made = sum(map(len, texts))
    figures = {
        "tokens": made,
        "tokens_per_step": switch.sampled / switch.steps,
        "drafted": switch.drafted,
        "tokens_per_second": made / seconds,
        "propose_us": 1e6 * statistics.median(switch.seconds),
    }
    return figures, texts


def main():
    from vllm import LLM

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--longest", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    llm = LLM(
        model=args.model,
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        max_num_seqs=8,
        max_num_batched_tokens=1024,
        enable_prefix_caching=False,
        speculative_config={
            "method": "custom_class",
            "model": "vllm_turns.Switch",
            "num_speculative_tokens": args.k,
        },
    )
    switch = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter
    rows = prompts(llm.get_tokenizer(), args.prompts, args.longest)
    run(llm, switch, "ngram", rows["chat"][:1], 4, 1)  # numba compiles
    held = defaultdict(list)
    equal = {}
    for batch in args.batches:
        for turn in range(args.turns):
            for mode in MODES[turn % 4 :] + MODES[: turn % 4]:
                for state in ("cold", "warm"):
                    if state == "cold":
                        switch.forget()
                    for kind, asked in rows.items():
                        figures, texts = run(llm, switch, mode, asked, args.tokens, batch)
                        held[f"{batch} {state} {kind} {mode}"].append(figures)
                        plain = equal.setdefault(f"{batch} {kind}", texts if mode == "none" else None)
                        if plain is None:
                            plain = equal[f"{batch} {kind}"] = run(
                                llm, switch, "none", asked, args.tokens, batch
                            )[1]
                        figures["equal"] = sum(map(list.__eq__, plain, texts))
                        figures["of"] = len(texts)
            args.out.write_text(json.dumps(summary(args, held), indent=1) + "\n")
    print(args.out.read_text())


def summary(args, held):
    """Medians over the turns."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    rows = {}
    for name, turns in held.items():
        rows[name] = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        rows[name]["turns"] = len(turns)
    return {
        "command": f"benches/engines/vllm_turns.py MODEL OUT --prompts {args.prompts} --tokens {args.tokens} "
        f"--turns {args.turns} --k {args.k}",
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}",
        "rows": rows,
    }


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    main()
