"""vLLM with `sssd`, with Arctic's suffix decoding, with its own ngram, and plain, in turns inside one engine.

    make vllm && .venv-vllm/bin/python benches/engines/vllm_turns.py MODEL OUT.jsonl [--seconds 840] ...

MODEL is a folder of SmolLM2 in safetensors (`make vllm` makes one). Prompts are the first short ones of the
dev traces: chat, rag, edits (code-edit, doc-edit). One engine; who drafts, how many tokens at most and how
many requests run side by side changes from turn to turn, so that all have the same load. A turn is a few
prompts of one kind from cold (nobody knows earlier requests) and then, warm, once more.

Each turn is appended to OUT.jsonl when it is over. What is there already is not measured again: run the same
command in as many idle windows as the prompts take (of `--seconds` each, starting the engine not counted).
Printed are, over what is there, tokens per step, tokens/s as the median share of plain decoding's, what was
drafted, times of `propose`, and how many texts equal plain decoding's.
"""

import argparse
import json
import lzma
import os
import statistics
import subprocess
import sys
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
        self.longest, self.rules = self.k, {}
        self.start()

    def play(self, mode, k):
        """Becomes another one, with what the rule has learned at that k."""
        self.rules[self.k] = self._rule
        self.mode, self.k = mode, k or self.longest
        self.ngram.k = self.suffix.num_speculative_tokens = self.k
        self._rule = self.rules.get(self.k)

    def start(self):
        self.steps = self.drafted = self.sampled = 0
        self.seconds = []

    def forget(self):
        """From cold: nobody knows earlier requests."""
        self.clear()
        self.suffix = self.suffix_class(self.config)
        self.suffix.num_speculative_tokens = self.k

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


def prompts(tokenizer, longest, count):
    """Of each kind the first short prompts, as ids."""
    found = {}
    for kind, workloads in KINDS.items():
        held = []
        for workload in workloads:
            texts = []
            with lzma.open(TRACES / f"dev/{workload}.jsonl.xz", "rt", encoding="utf-8") as lines:
                for line in lines:
                    prompt = json.loads(line)["prompt"]
                    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
                    ids = tokenizer.apply_chat_template(
                        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
                    )
                    if len(ids) <= longest:
                        texts.append(ids)
                    if len(texts) == count:
                        break
            held.append(texts)
        # of several workloads in turn
        found[kind] = [text for texts in zip(*held, strict=False) for text in texts][:count]
    return found


def decode(llm, switch, rows, tokens):
    """Decodes prompts side by side; the figures and the texts."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens)
    switch.start()
    started = time.perf_counter()
    done = llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
    seconds = time.perf_counter() - started
    texts = [list(one.outputs[0].token_ids) for one in done]
    figures = {
        "tokens": sum(map(len, texts)),
        "steps": switch.steps,
        "sampled": switch.sampled,
        "drafted": switch.drafted,
        "seconds": seconds,
        "propose_us": 1e6 * statistics.median(switch.seconds),
    }
    return figures, texts


def turns(rows, ks, batches):
    """Every turn, those of the first prompts first: what it is called, and its prompts."""
    most = max(map(len, rows.values()))
    for start in range(0, most, max(batches)):
        for batch in sorted(batches, reverse=True):
            for first in range(start, min(start + max(batches), most), batch):
                for number, (kind, held) in enumerate(rows.items()):
                    if not held[first : first + batch]:
                        continue
                    players = [(mode, k) for k in ks for mode in MODES[1:]]
                    turn = (first // batch + number) % len(players)
                    for mode, k in [("none", 0), *players[turn:], *players[:turn]]:
                        name = f"batch {batch} {kind} {first} {mode} k {k}"
                        yield name, (batch, kind, mode, k), held[first : first + batch]


def play(llm, switch, turn, rows, tokens, plain):
    """One turn, from cold and then warm; plain decoding knows no difference."""
    batch, kind, mode, k = turn
    switch.play(mode, k)
    switch.forget()
    line = {"batch": batch, "kind": kind, "mode": mode, "k": k}
    for state in ("plain",) if mode == "none" else ("cold", "warm"):
        line[state], texts = decode(llm, switch, rows, tokens)
        if mode == "none":
            line["texts"] = texts
        else:
            line[state]["equal"] = sum(map(list.__eq__, plain, texts))
            line[state]["of"] = len(texts)
    return line


def main():
    from vllm import LLM

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=32, help="of each kind")
    parser.add_argument("--longest", type=int, default=500, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=840.0, help="after which no turn is begun")
    args = parser.parse_args()
    llm = LLM(
        model=args.model,
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        max_num_seqs=max(args.batches),
        max_num_batched_tokens=1024,
        enable_prefix_caching=False,
        speculative_config={
            "method": "custom_class",
            "model": "vllm_turns.Switch",
            "num_speculative_tokens": max(args.k),
        },
    )
    switch = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter
    rows = prompts(llm.get_tokenizer(), args.longest, args.prompts)
    switch.play("ngram", max(args.k))
    decode(llm, switch, rows["chat"][:1], 4)  # numba compiles
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    held = {line["name"]: line for line in lines}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    end = time.monotonic() + args.seconds
    for name, turn, asked in turns(rows, args.k, args.batches):
        if name in held:
            continue
        if time.monotonic() > end:
            print("there is more to measure: run it again", file=sys.stderr)
            break
        plain = held.get(" ".join([*name.split()[:4], "none", "k", "0"]), {}).get("texts")
        line = play(llm, switch, turn, asked, args.tokens, plain)
        held[name] = {"name": name, **line, "commit": commit.stdout.strip(), "load": os.getloadavg()[0]}
        with args.out.open("a") as file:
            file.write(json.dumps(held[name]) + "\n")
    for row in summary(held.values()):
        print(json.dumps(row))


def summary(lines):
    """Of each batch, state, drafter and k, by kind and over all kinds."""
    plain, found = {}, defaultdict(list)
    for line in lines:
        where = line["name"].split(f" {line['mode']} ")[0]
        if line["mode"] == "none":
            plain[where] = line["plain"]
            continue
        base = plain[where]["tokens"] / plain[where]["seconds"]
        for state in ("cold", "warm"):
            turn = line[state]
            share = turn["tokens"] / turn["seconds"] / base
            for kind in (line["kind"], "all"):
                found[line["batch"], state, kind, line["k"], line["mode"]].append((turn, share))
    for (batch, state, kind, k, mode), held in sorted(found.items()):
        of = {
            key: sum(turn[key] for turn, _ in held) for key in ("sampled", "steps", "drafted", "equal", "of")
        }
        yield {
            "batch": batch,
            "state": state,
            "kind": kind,
            "k": k,
            "mode": mode,
            "turns": len(held),
            "tokens_per_step": round(of["sampled"] / of["steps"], 3),
            "of_plain": round(statistics.median(share for _, share in held), 3),
            "drafted": of["drafted"],
            "equal": f"{of['equal']}/{of['of']}",
            "propose_us": round(statistics.median(turn["propose_us"] for turn, _ in held), 1),
        }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
