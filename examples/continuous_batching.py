"""Continuous batching with speculation: requests join and leave a running batch, one drafter call per step.

A custom engine in small: a pool of cache slots, requests that wait for one, a prefill when one is free, and
one verify pass per step over the last token and the draft tree of every running request, each at its own
length. The tokens accepted in one step are handed to the drafter together with the call that drafts for the
next.

Greedy, for decoder-only models of transformers; what matters for losslessness is told in
docs/verification.md, the contract with the drafter in docs/serving.md.

    python examples/continuous_batching.py
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

import sssd
from sssd.hf import cache_argument, smollm2

SLOTS = 8
CAPACITY = 512
"""Tokens of a slot."""
NODES = 40
"""Nodes of all trees of a step."""

PROMPTS = [
    "Write this again in capitals: the cat sat on the mat, the cat sat on the mat.",
    "Repeat three times: never odd or even.",
    "List the months of the year, one per line.",
    "Count from 1 to 20, separated by commas.",
    "Write a Python function that returns the square of a number.",
    "What is the capital of France? Answer in one sentence.",
    "Name five fruits, separated by commas.",
    "Say hello in English, French and German.",
    "Rename x to value: def f(x): return x * x + x",
    "Complete: one two three four one two three four one two",
    "Write the alphabet, separated by spaces.",
    "Give three synonyms of 'fast'.",
]


class SlotLayer(DynamicLayer):
    """One layer's keys and values: a buffer with a row for each slot."""

    def __init__(self, pool: "SlotPool") -> None:
        super().__init__()
        self.pool, self.buffers = pool, []

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.buffers:
            shape = (SLOTS, key_states.shape[1], CAPACITY, key_states.shape[3])
            self.buffers = [states.new_zeros(shape) for states in (key_states, value_states)]
        rows, places, end = self.pool.writing
        out = []
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[rows[:, None], :, places] = states.transpose(1, 2)
            out.append(buffer[rows, :, :end])
        return tuple(out)


class SlotPool(Cache):
    """The caches of all slots; a pass reads and writes some of them, each at its own length."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(self))
        self.lengths = torch.zeros(SLOTS, dtype=torch.long)

    def select(self, slots: list[int], width: int) -> torch.Tensor:
        """Prepares a pass of ``width`` entries for each slot; returns the slots' lengths."""
        rows = torch.tensor(slots)
        lengths = self.lengths[rows]
        self.writing = rows, lengths[:, None] + torch.arange(width), int(lengths.max()) + width
        return lengths

    def keep(self, kept: np.ndarray, offsets: np.ndarray) -> None:
        """Keeps, of what the last pass wrote to its slots, the entries of the accepted paths."""
        counts = np.diff(offsets)
        places = np.arange(len(kept)) - np.repeat(offsets[:-1], counts)
        slots, counts = self.writing[0], torch.from_numpy(counts)
        rows = slots.repeat_interleave(counts)
        starts = self.lengths[rows]
        to, origin = starts + torch.from_numpy(places), starts + torch.from_numpy(kept)
        for layer in self.layers:
            for buffer in layer.buffers:
                buffer[rows, :, to] = buffer[rows, :, origin]
        self.lengths[slots] += counts


@dataclass
class Request:
    """A request and where it stands."""

    prompt_ids: list[int]
    max_new_tokens: int
    output: list[int] = field(default_factory=list)
    slot: int = -1
    sequence: sssd.Sequence | None = None
    accepted: list[int] = field(default_factory=list)
    """Tokens that the drafter has not been given."""


class Engine:
    """Decodes requests in a running batch."""

    def __init__(self, model, end_id: int, vocab_size: int) -> None:
        self.model, self.end_id = model, end_id
        self.drafter = sssd.Drafter(vocab_size=vocab_size, end_token_ids=[end_id])
        self.pool, self.free = SlotPool(), list(range(SLOTS))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.trees, self.block = sssd.DraftBatch(SLOTS, NODES), sssd.PassBlock()
        self.passes = self.most_running = 0

    def submit(self, request: Request) -> None:
        """Puts a request into the queue."""
        self.waiting.append(request)

    @torch.no_grad()
    def step(self) -> None:
        """Admits what fits, drafts for all, verifies all in one pass."""
        while self.waiting and self.free:
            self.admit(self.waiting.popleft())
        if not self.running:
            return
        self.most_running = max(self.most_running, len(self.running))
        # one call: the tokens of the last step in, all trees out; the nodes go where they are worth most
        offsets = np.append(0, np.cumsum([len(request.accepted) for request in self.running]))
        trees = self.drafter.step(
            [request.sequence for request in self.running],
            [token for request in self.running for token in request.accepted],
            offsets,
            max_nodes=16,
            total_nodes=NODES,
            out=self.trees,
        )
        kept, tokens, offsets = self.block.accept(self.verify(trees))
        self.pool.keep(kept, offsets)
        for request, start, end in zip(list(self.running), offsets, offsets[1:], strict=False):
            self.take(request, tokens[start:end].tolist())

    def admit(self, request: Request) -> None:
        """Prefills a request's prompt into a free slot; its first token comes of it."""
        request.slot = self.free.pop()
        self.pool.lengths[request.slot] = 0
        # the drafter indexes the prompt while the model reads it, and drafts nothing beyond the last token
        request.sequence = self.drafter.begin(
            request.prompt_ids, max_length=len(request.prompt_ids) + request.max_new_tokens, background=True
        )
        width = len(request.prompt_ids)
        self.pool.select([request.slot], width)
        logits = self.model(
            torch.tensor([request.prompt_ids]),
            attention_mask=torch.ones(width, width, dtype=torch.bool).tril()[None, None],
            position_ids=torch.arange(width)[None],
            logits_to_keep=1,
            **{cache_argument(self.model): self.pool},
        ).logits
        self.pool.lengths[request.slot] = width
        self.running.append(request)
        self.take(request, [int(logits[0, -1].argmax())])

    def verify(self, trees: sssd.DraftBatch) -> np.ndarray:
        """The model's own token after each entry of the pass, [requests, width]."""
        rows, width = len(self.running), int(np.diff(trees.offsets).max()) + 1
        lengths = self.pool.select([request.slot for request in self.running], width)
        roots = [request.output[-1] for request in self.running]
        self.block.fill(trees, roots, lengths.numpy(), mask=True)
        mask = torch.zeros(rows, width, int(lengths.max()) + width, dtype=torch.bool)
        for row, length in enumerate(lengths.tolist()):
            mask[row, :, :length] = True
            mask[row, :, length : length + width] = torch.from_numpy(self.block.mask[row])
        ids, positions = map(torch.from_numpy, (self.block.ids, self.block.positions))
        states = {cache_argument(self.model): self.pool}
        logits = self.model(ids, attention_mask=mask[:, None], position_ids=positions, **states).logits
        self.passes += 1
        return logits.argmax(-1).numpy()

    def take(self, request: Request, tokens: list[int]) -> None:
        """Adds accepted tokens to the output, and ends the request if it is complete."""
        tokens = tokens[: request.max_new_tokens - len(request.output)]
        if self.end_id in tokens:
            tokens = tokens[: tokens.index(self.end_id) + 1]
        request.output += tokens
        request.accepted = tokens
        if request.output[-1] == self.end_id or len(request.output) == request.max_new_tokens:
            request.sequence.extend(tokens)
            request.sequence.finish()  # later requests learn from it
            self.running.remove(request)
            self.free.append(request.slot)


def main() -> None:
    model, tokenizer = smollm2.load()
    engine = Engine(model, tokenizer.eos_token_id, len(tokenizer))
    requests = []
    for number, prompt in enumerate(PROMPTS):
        messages = [{"role": "user", "content": prompt}]
        prompt_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        requests.append(Request(prompt_ids, 24 + 2 * number))
        engine.submit(requests[-1])
    while engine.waiting or engine.running:
        engine.step()
    equal = 0
    for request in requests:
        inputs = torch.tensor([request.prompt_ids])
        expected = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
        )
        equal += expected[0, len(request.prompt_ids) :].tolist() == request.output
    tokens = sum(len(request.output) for request in requests)
    alone = max(len(request.output) for request in requests)
    print(f"{tokens} tokens of {len(requests)} requests in {engine.passes} verify passes (longest: {alone});")
    print(f"{engine.most_running} requests at a time;")
    print(f"equal to model.generate: {equal} of {len(requests)}")


if __name__ == "__main__":
    main()
