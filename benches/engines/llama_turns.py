"""llama-cpp-python plain, with its own look-up, with chains and trees of `sssd`, in turns in one process.

    make llama && .venv-llama/bin/python benches/engines/llama_turns.py MODEL.gguf OUT.jsonl [--prompts 24]

Prompts are the first short ones of the dev traces: chat, rag, edits (code-edit, doc-edit), and `repeat`, the
chats once more. Each prompt is decoded by all, one after another, greedily; who begins changes from prompt to
prompt. Only decoding is timed, from the first token on. What each has learned it keeps from prompt to prompt.

`lookup 10` and `lookup 2` are its LlamaPromptLookupDecoding, as it comes and as its manual says for CPUs;
`chain` is `sssd.llama.DraftModel` in its loop, `tree` `sssd.llama.TreeDecoder`. Each prompt is appended to
OUT.jsonl when all have decoded it; what is there already is not measured again. Printed are tokens/s and
tokens per CPU second as shares of plain decoding's, over all prompts and by kind, tokens per pass, and how
many texts equal plain decoding's, which llama.cpp promises for no speculation.
"""

import argparse
import json
import lzma
import os
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

import sssd.llama

TRACES = Path(os.environ.get("SSSD_TRACES", Path(__file__).parents[3] / "shared/traces"))
KINDS = {"chat": ("chat-en",), "rag": ("rag",), "edit": ("code-edit", "doc-edit")}
NAMES = ("plain", "lookup 10", "lookup 2", "chain", "tree")


class Counted:
    """A draft model whose calls and drafts are counted."""

    def __init__(self, inner):
        self.inner, self.calls, self.drafted = inner, 0, 0

    def __call__(self, input_ids, /, **kwargs):
        found = self.inner(input_ids, **kwargs)
        self.calls, self.drafted = self.calls + 1, self.drafted + len(found)
        return found


def load(path, threads, context):
    """Two models of one file: one without a draft model, and one for draft models, which keeps all logits."""
    defaults = llama_cpp.llama_model_default_params

    def params():
        found = defaults()
        # passes over several tokens crash with AMX buffers in some virtual machines
        found.use_extra_bufts = False
        return found

    llama_cpp.llama_model_default_params = llama_cpp.llama_cpp.llama_model_default_params = params
    options = {"n_ctx": context, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    plain = llama_cpp.Llama(path, **options)
    return plain, llama_cpp.Llama(path, **options, draft_model=lambda ids, **_: ids[:0])


def prompts(model, count, longest):
    """Of each kind the first short prompts, as ids."""
    found = {}
    for kind, workloads in KINDS.items():
        found[kind] = []
        for workload in workloads:
            wanted = len(found[kind]) + -(-count // (len(KINDS) + 1) // len(workloads))
            with lzma.open(TRACES / f"dev/{workload}.jsonl.xz", "rt", encoding="utf-8") as lines:
                for line in lines:
                    prompt = json.loads(line)["prompt"]
                    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
                    said = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
                    ids = model.tokenize(said.encode(), add_bos=False, special=True)
                    if len(ids) <= longest:
                        found[kind].append(ids)
                    if len(found[kind]) >= wanted:
                        break
    found["repeat"] = found["chat"]
    return [(kind, ids) for kind, rows in found.items() for ids in rows]


class Players:
    """Everybody that decodes."""

    def __init__(self, args):
        self.plain, self.drafting = load(args.model, args.threads, args.longest + args.tokens + 32)
        options = {"end_token_ids": [self.plain.token_eos()]}
        self.drafts = {
            "lookup 10": Counted(LlamaPromptLookupDecoding(num_pred_tokens=10)),
            "lookup 2": Counted(LlamaPromptLookupDecoding(num_pred_tokens=2)),
            "chain": Counted(sssd.llama.DraftModel(vocab_size=self.plain.n_vocab(), **options)),
        }
        self.tree = sssd.llama.TreeDecoder(self.plain, **options)
        self.tokens = args.tokens

    def decode(self, name, ids):
        """Decodes a prompt; the text and the figures."""
        counter = self.drafts.get(name)
        if name == "tree":
            before = self.tree.passes, self.tree.drafted
            stream = self.tree.generate(ids, max_tokens=self.tokens)
        else:
            model = self.plain if counter is None else self.drafting
            model.draft_model = counter
            if counter is not None:
                counter.calls = counter.drafted = 0
            model.reset()
            stream = model.generate(ids, temp=0.0, repeat_penalty=1.0)
        text, wall, cpu = [], 0.0, 0.0
        for token in stream:
            if not text:
                wall, cpu = time.perf_counter(), time.process_time()
            text.append(token)
            if token == self.plain.token_eos() or len(text) == self.tokens:
                break
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if name == "tree":
            passes, drafted = self.tree.passes - before[0] - 1, self.tree.drafted - before[1]
            next(stream, None)  # it ends, and is learned from
        elif counter is not None:
            passes, drafted = counter.calls, counter.drafted
        else:
            passes, drafted = len(text) - 1, 0
        if name == "chain":
            counter.inner.end()
        return text, {"tokens": len(text) - 1, "passes": passes, "drafted": drafted, "wall": wall, "cpu": cpu}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--longest", type=int, default=400, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    players = Players(args)
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    for number, (kind, ids) in enumerate(prompts(players.plain, args.prompts, args.longest)):
        if number < len(lines):
            continue
        first = number % len(NAMES)
        line = {"prompt": number, "kind": kind, "commit": commit.stdout.strip(), "load": os.getloadavg()[0]}
        texts = {}
        for name in NAMES[first:] + NAMES[:first]:
            texts[name], line[name] = players.decode(name, ids)
        for name in NAMES:
            line[name]["equal"] = texts[name] == texts["plain"]
        lines.append(line)
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
    for row in summary(lines):
        print(json.dumps(row))


def summary(lines):
    """Of each name the sums over all prompts, and its speed over plain decoding's by kind."""
    for name in NAMES:
        sums = defaultdict(float)
        for line in lines:
            for kind in ("all", line["kind"]):
                for key, value in line[name].items():
                    sums[kind, key] += value
                for key in ("wall", "cpu", "tokens"):
                    sums[kind, "plain", key] += line["plain"][key]

        def share(kind, clock, sums=sums):
            own = sums[kind, "tokens"] / sums[kind, clock]
            return round(own / (sums[kind, "plain", "tokens"] / sums[kind, "plain", clock]), 3)

        kinds = sorted({line["kind"] for line in lines})
        yield {
            "name": name,
            "prompts": len(lines),
            "tokens_per_second": round(sums["all", "tokens"] / sums["all", "wall"], 1),
            "tokens_per_pass": round(sums["all", "tokens"] / sums["all", "passes"], 3),
            "drafted": int(sums["all", "drafted"]),
            "of_plain": share("all", "wall"),
            "of_plain_by_cpu": share("all", "cpu"),
            "by_kind": {kind: share(kind, "wall") for kind in kinds},
            "by_kind_by_cpu": {kind: share(kind, "cpu") for kind in kinds},
            "equal": f"{int(sums['all', 'equal'])}/{len(lines)}",
        }


if __name__ == "__main__":
    main()
