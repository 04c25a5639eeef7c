"""``sssd.llama`` in llama.cpp itself, with SmolLM2 on the CPU: ``make llama``."""

import os
from pathlib import Path

import numpy as np
import pytest

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make llama")
import sssd.llama  # noqa: E402

pytestmark = pytest.mark.slow
MODEL = Path(os.environ.get("SSSD_LLAMA_MODEL", "nowhere"))
TASKS = [
    "Repeat three times: the quick brown fox jumps over the lazy dog.",
    "Copy this line five times: name, age, city, country",
    "List the numbers from one to thirty in words.",
    "What are three good habits for learning a new language?",
    "Write the days of the week twice.",
    "Explain how a bicycle stays upright.",
    "Repeat three times: the quick brown fox jumps over the lazy dog.",
]
TOKENS = 48
LOOSE, CLOSE = 1.5, 0.2
"""How far logits of a pass over several tokens are from those of single ones, at most and in the mean.
Those of a node that sees another path are further off."""


@pytest.fixture(scope="module")
def model():
    if not MODEL.is_file():
        pytest.skip("SSSD_LLAMA_MODEL names no GGUF file of SmolLM2")
    defaults = llama_cpp.llama_model_default_params

    def params():
        found = defaults()
        # passes over several tokens crash with AMX buffers in some virtual machines
        found.use_extra_bufts = False
        return found

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", params)
        monkeypatch.setattr(llama_cpp, "llama_model_default_params", params)
        yield llama_cpp.Llama(str(MODEL), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, seed=1)


def tokens_of(model, task):
    text = f"<|im_start|>user\n{task}<|im_end|>\n<|im_start|>assistant\n"
    return model.tokenize(text.encode(), add_bos=False, special=True)


class Watched:
    """A sampler that notes the logits of each token that it takes."""

    def __init__(self, inner, size, noted):
        self.inner, self.size, self.noted = inner, size, noted

    def sample(self, context, place):
        values = llama_cpp.llama_get_logits_ith(context.ctx, place)
        logits = np.ctypeslib.as_array(values, (self.size,)).copy()
        token = self.inner.sample(context, place)
        self.noted.append((token, logits))
        return token

    def close(self):
        self.inner.close()


@pytest.fixture
def noted(model, monkeypatch):
    found = []
    make = model._init_sampler

    def watched(**options):
        return Watched(make(**options), model.n_vocab(), found)

    monkeypatch.setattr(model, "_init_sampler", watched)
    return found


def plain_logits(model, prompt, text):
    """The logits before each token of a text, of passes over one token each."""
    context = llama_cpp._internals.LlamaContext(
        model=model._model, params=model.context_params, verbose=False
    )
    batch = llama_cpp._internals.LlamaBatch(n_tokens=512, embd=0, n_seq_max=1, verbose=False)
    found, past = [], 0
    for piece in [prompt, *([token] for token in text[:-1])]:
        batch.set_batch(batch=piece, n_past=past, logits_all=False)
        context.decode(batch)
        past += len(piece)
        values = llama_cpp.llama_get_logits_ith(context.ctx, -1)
        found.append(np.ctypeslib.as_array(values, (model.n_vocab(),)).copy())
    batch.close()
    context.close()
    return np.array(found)


def test_each_token_is_the_most_probable_of_its_pass_which_sees_the_text_alone(model, noted):
    decoder = sssd.llama.TreeDecoder(model, curve=sssd.llama.linear(0.02))
    most = 0
    fill = decoder._fill

    def counted(root, tree):
        nonlocal most
        leaves = fill(root, tree)
        most = max(most, leaves)
        return leaves

    decoder._fill = counted
    passes = []
    for task in TASKS:
        prompt, before = tokens_of(model, task), decoder.passes
        noted.clear()
        text = list(decoder.generate(prompt, max_tokens=TOKENS))
        passes.append(decoder.passes - before)
        assert [token for token, _ in noted] == text
        assert all(token == logits.argmax() for token, logits in noted)
        off = np.abs(np.array([logits for _, logits in noted]) - plain_logits(model, prompt, text))
        assert off.max() < LOOSE
        assert off.mean() < CLOSE
    assert most > 1
    assert decoder.accepted > TOKENS
    assert passes[-1] < passes[0]
    assert decoder.failed == 0
    decoder.close()


def test_what_is_sampled_is_sampled_from_the_pass_that_verified_it(model, noted):
    decoder = sssd.llama.TreeDecoder(model, curve=sssd.llama.linear(0.02))
    for task in TASKS[:3]:
        prompt = tokens_of(model, task)
        noted.clear()
        text = list(decoder.generate(prompt, max_tokens=TOKENS, temp=0.8, top_k=20, top_p=1.0, min_p=0.0))
        assert [token for token, _ in noted] == text
        assert all((logits > logits[token]).sum() < 20 for token, logits in noted)
        off = np.abs(np.array([logits for _, logits in noted]) - plain_logits(model, prompt, text))
        assert off.max() < LOOSE
    assert decoder.accepted > 0
    assert any(token != logits.argmax() for token, logits in noted)
    decoder.close()


def test_chains_in_its_own_loop_are_verified_too(model):
    draft = sssd.llama.DraftModel(vocab_size=model.n_vocab(), end_token_ids=[model.token_eos()])
    drafting = llama_cpp.Llama(
        str(MODEL), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, draft_model=draft
    )
    for task in TASKS[:2]:
        text = []
        for token in drafting.generate(tokens_of(model, task), temp=0.0, repeat_penalty=1.0):
            text.append(token)
            if token == model.token_eos() or len(text) == TOKENS:
                break
    assert draft.accepted > 0
    assert draft.failed == 0
