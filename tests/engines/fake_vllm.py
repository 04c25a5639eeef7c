"""A model runner like vLLM's whose target is a table: what ``sssd.vllm`` touches of it, and no more."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np

WIDTH = 512


def install(monkeypatch):
    """Puts modules in place of vLLM's; returns the runner's class."""

    class GPUModelRunner(Runner):
        pass

    module = ModuleType("vllm.v1.worker.gpu_model_runner")
    module.GPUModelRunner = GPUModelRunner
    for name in ("vllm", "vllm.v1", "vllm.v1.worker", "vllm.distributed"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    parallel = ModuleType("vllm.distributed.parallel_state")
    parallel.get_tensor_model_parallel_rank = lambda: 0
    monkeypatch.setitem(sys.modules, parallel.__name__, parallel)
    return GPUModelRunner


def config(k=8, vocab_size=64, max_length=WIDTH, end=(), **options):
    """vLLM's configuration."""
    model = SimpleNamespace(
        max_model_len=max_length,
        get_vocab_size=lambda: vocab_size,
        hf_config=SimpleNamespace(eos_token_id=list(end)),
        hf_text_config=None,
        try_get_generation_config=dict,
        tokenizer="none",
        model="none",
    )
    return SimpleNamespace(
        model_config=model,
        speculative_config=SimpleNamespace(num_speculative_tokens=k),
        scheduler_config=SimpleNamespace(max_num_seqs=2),
        additional_config={"sssd": options},
    )


class Target:
    """Continues a text by what followed its last two tokens, at random but the same each time."""

    def __init__(self, seed, vocab_size=64):
        self.seed, self.vocab_size = seed, vocab_size

    def next(self, tokens):
        last = tuple(tokens[-2:])
        return hash((self.seed, *map(int, last))) % self.vocab_size


class Runner:
    """Schedules what its test says, verifies drafts and keeps a table of rows, as vLLM's V1 runner does."""

    def __init__(self, drafter, target, rows=8):
        self.drafter, self.target = drafter, target
        self.requests = {}
        self.drafts = {}
        self.input_batch = SimpleNamespace(
            req_ids=[],
            num_prompt_tokens=np.zeros(rows, np.int32),
            token_ids_cpu=np.zeros((rows, WIDTH), np.int32),
        )
        self.accepted = self.steps = 0

    def add(self, name, prompt, most=64, **extra):
        """A new request."""
        params = SimpleNamespace(
            extra_args=extra or None, max_tokens=most, ignore_eos=False, stop_token_ids=None
        )
        self.requests[name] = SimpleNamespace(
            sampling_params=params,
            lora_request=None,
            num_prompt_tokens=len(prompt),
            tokens=list(prompt),
            read=0,
        )

    def end(self, name):
        """A request that is finished or aborted."""
        del self.requests[name]
        self.drafts.pop(name, None)

    def preempt(self, name):
        """Its cache is gone: it is to be read again, drafts are dropped."""
        self.requests[name].read = 0
        self.drafts.pop(name, None)

    def execute_model(self, names, piece):
        """One pass: prompts are read ``piece`` tokens at a time, the others decode."""
        batch, sampled = self.input_batch, []
        counts, spec = {}, {}
        for name in names:
            state = self.requests[name]
            draft = self.drafts.pop(name, [])
            left = len(state.tokens) - state.read
            if left > 1:
                counts[name] = min(piece, left)
                state.read += counts[name]
                if state.read < len(state.tokens):
                    sampled.append([])
                    continue
                draft = []
            else:
                counts[name], spec[name] = 1 + len(draft), draft
            produced = []
            for token in [*draft, None]:
                truth = self.target.next(state.tokens)
                state.tokens.append(truth)
                produced.append(truth)
                if token != truth:
                    break
            self.accepted += len(produced) - 1
            state.read = len(state.tokens) - 1
            sampled.append(produced)
        self.steps += 1
        batch.req_ids = list(names)
        for place, name in enumerate(names):
            state = self.requests[name]
            batch.token_ids_cpu[place, : len(state.tokens)] = state.tokens
            batch.num_prompt_tokens[place] = state.num_prompt_tokens
        output = SimpleNamespace(
            total_num_scheduled_tokens=sum(counts.values()),
            num_scheduled_tokens=counts,
            scheduled_spec_decode_tokens={name: draft for name, draft in spec.items() if draft},
        )
        drafts = self.propose_draft_token_ids(output, sampled)
        self.drafts = {**self.drafts, **dict(zip(names, drafts, strict=True))}
        return sampled

    def propose_draft_token_ids(self, scheduler_output, sampled):
        """What vLLM calls its proposer with."""
        lengths = np.array([len(self.requests[name].tokens) for name in self.input_batch.req_ids], np.int32)
        return self.drafter.propose(sampled, lengths, self.input_batch.token_ids_cpu, slot_mappings=None)
