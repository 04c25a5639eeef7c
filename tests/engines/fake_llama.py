"""A llama-cpp-python whose model is a table: what ``sssd.llama`` touches of its cache and samplers."""

import ctypes
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

LENGTH = 256
BATCH = 512
SEQUENCES = 64


class Clock:
    """Passes take what ``sssd.llama.linear(0.01)`` says."""

    now = 0.0

    def perf_counter(self):
        return self.now


class ContextParams(ctypes.Structure):
    _fields_ = [("n_seq_max", ctypes.c_uint32), ("kv_unified", ctypes.c_bool)]


class Context:
    """A unified cache: cells of a position, a token and the sequences that they are in."""

    def __init__(self, *, model, params, verbose):
        self.target, self.params = model, params
        self.memory = self
        self.cells, self.logits = [], []
        self.fails = False
        self.leaves = 0

    def close(self):
        pass

    def kv_cache_clear(self):
        self.cells.clear()

    def text(self, sequences):
        """What a token of these sequences sees: one token a position, without gaps."""
        seen = sorted((place, token) for place, token, of in self.cells if of & sequences)
        assert [place for place, _ in seen] == list(range(len(seen)))
        return [token for _, token in seen]

    def decode(self, batch):
        self.logits = []
        clock.now += 0.02 * (1 + 0.01 * (batch.batch.n_tokens - 1))
        if self.fails:
            raise RuntimeError("llama_decode returned 1")
        lengths = Counter(sequence for cell in self.cells for sequence in cell[2])
        for token, place, sequences, is_asked in batch.rows():
            assert sequences
            assert max(sequences) < self.params.n_seq_max
            # each of its sequences holds all that is before it
            assert {lengths[sequence] for sequence in sequences} == {place}
            lengths.update(sequences)
            self.cells.append((place, token, set(sequences)))
            assert len(self.cells) <= self.target.length
            self.logits.append(self.target.next(self.text(set(sequences))) if is_asked else None)
            self.leaves = max(self.leaves, *sequences)


class Batch:
    def __init__(self, *, n_tokens, embd, n_seq_max, verbose):
        self.batch = SimpleNamespace(
            token=[0] * n_tokens,
            pos=[0] * n_tokens,
            logits=[False] * n_tokens,
            n_seq_id=[0] * n_tokens,
            seq_id=[[0] * n_seq_max for _ in range(n_tokens)],
            n_tokens=0,
        )

    def close(self):
        pass

    def set_batch(self, *, batch, n_past, logits_all):
        held = self.batch
        held.n_tokens = len(batch)
        for place, token in enumerate(batch):
            held.token[place], held.pos[place] = token, n_past + place
            held.n_seq_id[place], held.seq_id[place][0] = 1, 0
            held.logits[place] = logits_all or place == len(batch) - 1

    def rows(self):
        held = self.batch
        for place in range(held.n_tokens):
            sequences = set(held.seq_id[place][: held.n_seq_id[place]])
            yield held.token[place], held.pos[place], sequences, held.logits[place]


class Llama:
    """What is asked of the model: its table stands for its weights."""

    def __init__(self, target, *, vocab_size=64, length=LENGTH):
        self._model = SimpleNamespace(next=target.next, length=length)
        self.context_params = ContextParams()
        self.n_batch, self._length, self._vocab_size = BATCH, length, vocab_size

    def n_ctx(self):
        return self._length

    def n_vocab(self):
        return self._vocab_size

    def token_eos(self):
        return 2

    def _init_sampler(self, **options):
        return SimpleNamespace(sample=lambda context, place: context.logits[place], close=lambda: None)


clock = Clock()


def _copy(memory, source, target, start, end):
    start, end = max(start, 0), end if end >= 0 else 1 << 30
    for place, _, sequences in memory.cells:
        if source in sequences and start <= place < end:
            sequences.add(target)


def _remove(memory, sequence, start, end):
    start, end = max(start, 0), end if end >= 0 else 1 << 30
    for place, _, sequences in memory.cells:
        if start <= place < end:
            sequences.discard(sequence)
    memory.cells = [cell for cell in memory.cells if cell[2]]
    return True


def install(monkeypatch):
    """Puts modules in place of llama-cpp-python's; returns ``sssd.llama``."""
    package, internals = ModuleType("llama_cpp"), ModuleType("llama_cpp._internals")
    speculative = ModuleType("llama_cpp.llama_speculative")
    speculative.LlamaDraftModel = object
    internals.LlamaContext, internals.LlamaBatch = Context, Batch
    package._internals = internals
    package.llama_context_params = ContextParams
    package.llama_max_parallel_sequences = lambda: SEQUENCES
    package.llama_memory_seq_cp, package.llama_memory_seq_rm = _copy, _remove
    for module in (package, internals, speculative):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in [name for name in sys.modules if name.partition(".llama")[:2] == ("sssd", ".llama")]:
        monkeypatch.delitem(sys.modules, name)
    import sssd.llama

    for name in ("sssd.llama", "sssd.llama.draft_model", "sssd.llama.tree"):
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    monkeypatch.setattr(sssd.llama.tree, "time", clock)
    return sssd.llama


def sequences(decoder):
    """The text of each sequence that the decoder's cache holds."""
    context = decoder._context
    return {number: context.text({number}) for number in set().union(*(cell[2] for cell in context.cells))}


def most_leaves(decoder):
    """The most paths that a pass had."""
    return decoder._context.leaves
