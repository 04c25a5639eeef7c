"""vLLM with `sssd`, with Arctic's suffix decoding, with its own ngram, and plain, in turns inside one engine.

    make vllm && .venv-vllm/bin/python benches/engines/vllm_turns.py MODEL OUT.jsonl [--seconds 840] ...

MODEL is a folder of SmolLM2 in safetensors (`make vllm` makes one). Prompts are short ones of the dev traces:
chat, rag, edits (code-edit), and copy, texts of chats that are to be written out again, changed or not. One
engine; who drafts, how many tokens at most and how many requests run side by side changes from turn to turn,
so that all have the same load. A turn is a few prompts of one kind from cold (nobody knows earlier requests)
and then, warm, once more; what was seen before is what other benchmarks call repeats. Side by side means
that so many run and as many wait: one that ends is followed by the next, as in a server. Where none follows
any more drafts bring nothing, as the slowest decides when all have ended: tokens/s are also those while all
places were taken and no prompt was read (`full`).

Each turn is appended to OUT.jsonl when it is over; kinds and batches come in equal shares, however far it
goes. What is there already is not measured again: run the same command in as many idle windows as the prompts
take (of `--seconds` each, starting the engine not counted); a change of the code needs another OUT.jsonl.
Printed are, over what is there, tokens per step, tokens/s as the median share of plain decoding's, what was
drafted, times of `propose`, how many texts equal plain decoding's, and the table of docs/vllm.md.
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
KINDS = {"chat": "chat-en", "rag": "rag", "edit": "code-edit", "copy": "chat-en"}
COPIES = (
    "Write this text out again, word for word:",
    "Correct the mistakes in this text and write it out again:",
    "Write this text out again and put a title above it:",
)
COPIED = 160
"""Tokens of a text that is to be written out again."""
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
        self.start(1)

    def play(self, mode, k):
        """Becomes another one, with what the rule has learned at that k."""
        self.rules[self.k] = self._rule
        self.mode, self.k = mode, k or self.longest
        self.ngram.k = self.suffix.num_speculative_tokens = self.k
        self._rule = self.rules.get(self.k)

    def start(self, places):
        """Counts anew, of so many requests side by side."""
        self.places = places
        self.steps = self.drafted = self.sampled = 0
        self.seconds = []
        self.full = {"tokens": 0, "seconds": 0.0}
        self.last = time.perf_counter()

    def forget(self):
        """From cold: nobody knows earlier requests."""
        self.clear()
        self.suffix = self.suffix_class(self.config)
        self.suffix.num_speculative_tokens = self.k

    def _decodes(self):
        """Whether the pass that is over has read no prompt."""
        output, rows = self._output, self._output.num_scheduled_tokens
        drafted = sum(map(len, output.scheduled_spec_decode_tokens.values()))
        return output.total_num_scheduled_tokens == len(rows) + drafted

    def propose(self, sampled, lengths, rows, slot_mappings=None):
        started = time.perf_counter()
        self._output = self._step.output
        if self.mode == "none":
            drafts = [[] for _ in sampled]
        elif self.mode == "ngram":
            drafts = self.ngram.propose(self.k, sampled, lengths, rows)
        elif self.mode == "suffix":
            drafts = self.suffix.propose(self.k, self._step.runner.input_batch, sampled)
        else:
            drafts = super().propose(sampled, lengths, rows)
        now = time.perf_counter()
        self.seconds.append(now - started)
        if len(sampled) == self.places and self._decodes():
            self.full["tokens"] += sum(map(len, sampled))
            self.full["seconds"] += now - self.last
        self.last = now
        self.steps += sum(map(bool, sampled))
        self.sampled += sum(map(len, sampled))
        self.drafted += sum(map(len, drafts))
        return drafts


def question(kind, record, tokenizer, number):
    """What a record of a kind asks for; None where it has no such thing."""
    prompt, response = record["prompt"], record["response"]
    if kind != "copy":
        return prompt if isinstance(prompt, str) else prompt[-1]["content"]
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return (
        f"{COPIES[number % len(COPIES)]}\n\n{tokenizer.decode(ids[:COPIED])}"
        if len(ids) > COPIED // 2
        else None
    )


def prompts(tokenizer, longest, count):
    """Of each kind the first short prompts, as ids."""
    found = {kind: [] for kind in KINDS}
    for kind, workload in KINDS.items():
        rows = found[kind]
        with lzma.open(TRACES / f"dev/{workload}.jsonl.xz", "rt", encoding="utf-8") as lines:
            for line in lines:
                text = question(kind, json.loads(line), tokenizer, len(rows))
                if text is None:
                    continue
                said = [{"role": "user", "content": text}]
                ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
                if len(ids) <= longest and ids not in rows:
                    rows.append(ids)
                if len(rows) == count:
                    break
        if len(rows) < count:
            print(f"there are {len(rows)} prompts of {kind}, not {count}", file=sys.stderr)
    return found


def decode(llm, switch, rows, tokens, batch):
    """Decodes prompts, so many side by side; the figures and the texts."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens)
    switch.start(batch)
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
        "full": switch.full,
        "propose_us": 1e6 * statistics.median(switch.seconds),
    }
    return figures, texts


def rounds(rows, batches):
    """Batch, kind, number of the first prompt and prompts of each round, kinds and batches in equal shares of
    it however far one goes."""
    found = []
    for batch in batches:
        # as many wait as run
        many = 1 if batch == 1 else 2 * batch
        for kind, held in rows.items():
            starts = range(0, len(held) - many + 1, batch)
            for number, first in enumerate(starts):
                share = (number + 0.5) / len(starts)
                found.append((share, batch, kind, first, held[first : first + many]))
    return [one[1:] for one in sorted(found, key=lambda one: one[:4])]


def turns(rows, ks, batches):
    """Every turn: what it is called, what it is, and its prompts. All play one round before the next."""
    for number, (batch, kind, first, held) in enumerate(rounds(rows, batches)):
        players = [(mode, k) for k in ks for mode in MODES[1:]]
        turn = number % len(players)
        for mode, k in [("none", 0), *players[turn:], *players[:turn]]:
            yield f"batch {batch} {kind} {first} {mode} k {k}", (batch, kind, mode, k), held


def play(llm, switch, turn, rows, tokens, plain):
    """One turn, from cold and then warm; plain decoding knows no difference."""
    batch, kind, mode, k = turn
    switch.play(mode, k)
    switch.forget()
    line = {"batch": batch, "kind": kind, "mode": mode, "k": k}
    for state in ("plain",) if mode == "none" else ("cold", "warm"):
        line[state], texts = decode(llm, switch, rows, tokens, batch)
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
    parser.add_argument("--longest", type=int, default=800, help="tokens of a prompt")
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
    decode(llm, switch, rows["chat"][:1], 4, 1)  # numba compiles
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
    rows = list(summary(held.values()))
    for row in rows:
        print(json.dumps(row))
    print("\n".join(table(rows)))


def rate(turn, state="seconds"):
    """Tokens per second, of the turn or of the part of it in which all places decoded."""
    part = turn["full"] if state == "full" else turn
    return part["tokens"] / part["seconds"] if part["seconds"] else None


def summary(lines):
    """Of each batch, state, drafter and k, by kind and over all kinds."""
    plain, found = {}, defaultdict(list)
    for line in lines:
        where = line["name"].split(f" {line['mode']} ")[0]
        if line["mode"] == "none":
            plain[where] = line["plain"]
            continue
        for state in ("cold", "warm"):
            for kind in (line["kind"], "all"):
                found[line["batch"], state, kind, line["k"], line["mode"]].append((line[state], plain[where]))
    for (batch, state, kind, k, mode), held in sorted(found.items()):
        of = {
            key: sum(turn[key] for turn, _ in held) for key in ("sampled", "steps", "drafted", "equal", "of")
        }
        full = [rate(turn, "full") / rate(base, "full") for turn, base in held if turn["full"]["seconds"]]
        yield {
            "batch": batch,
            "state": state,
            "kind": kind,
            "k": k,
            "mode": mode,
            "turns": len(held),
            "tokens_per_step": round(of["sampled"] / of["steps"], 3),
            "of_plain": round(statistics.median(rate(turn) / rate(base) for turn, base in held), 3),
            "of_plain_full": round(statistics.median(full), 3) if full else None,
            "drafted": of["drafted"],
            "equal": f"{of['equal']}/{of['of']}",
            "propose_us": round(statistics.median(turn["propose_us"] for turn, _ in held), 1),
        }


def table(rows):
    """The table of docs/vllm.md: over all kinds, and the kind that fares worst."""
    yield f"| batch | texts | k | {' | '.join(MODES[:0:-1])} | sssd's least kind |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    found = {tuple(row[key] for key in ("batch", "state", "k", "kind", "mode")): row for row in rows}
    for batch, state, k in sorted({where[:3] for where in found}):
        where, of_plain = (batch, state, k), "of_plain" if batch == 1 else "of_plain_full"
        cells = []
        for mode in MODES[:0:-1]:
            row = found.get((*where, "all", mode))
            cells.append(f"{row[of_plain]:.2f} ({row['tokens_per_step']:.2f})" if row else "")
        kinds = [
            (found[*where, kind, "sssd"][of_plain], kind) for kind in KINDS if (*where, kind, "sssd") in found
        ]
        least = "{:.2f} {}".format(*min(kinds)) if kinds else ""
        seen = "new" if state == "cold" else "seen before"
        yield f"| {batch} | {seen} | {k} | {' | '.join(cells)} | {least} |"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
