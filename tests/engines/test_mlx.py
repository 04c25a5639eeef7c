"""``sssd.mlx`` in mlx-lm itself, on the CPU: ``make mlx``."""

import os
from pathlib import Path

import pytest

mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm: make mlx")
import mlx.core as mx  # noqa: E402

from sssd.errors import InvalidArgumentError  # noqa: E402
from sssd.mlx import Cache, DraftModel  # noqa: E402

MODEL = Path(os.environ.get("SSSD_MLX_MODEL", "nowhere"))
PROMPTS = [
    "List the numbers from one to twenty in words.",
    "Repeat three times: the quick brown fox jumps over the lazy dog.",
    "Copy this line five times: name, age, city, country",
    "What are three good habits for learning a new language?",
    "Write a short story about a fox who finds a clock in the forest.",
    "Explain how a bicycle stays upright.",
    "Write the days of the week twice.",
    "What are three good habits for learning a new language?",
]


@pytest.fixture(scope="module")
def loaded():
    if not (MODEL / "config.json").is_file():
        pytest.skip("SSSD_MLX_MODEL names no folder of SmolLM2 in safetensors")
    return mlx_lm.load(str(MODEL))


def decode(loaded, prompt, draft_model=None, tokens=24):
    """Tokens of a text, and how many of them were drafted."""
    model, tokenizer = loaded
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    more = {} if draft_model is None else {"draft_model": draft_model, "num_draft_tokens": 6}
    out = list(mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=tokens, **more))
    return [one.token for one in out], sum(bool(one.from_draft) for one in out)


def test_texts_are_the_models_and_drafts_come_true(loaded):
    drafter = DraftModel(loaded[0].args.vocab_size, end_token_ids=sorted(loaded[1].eos_token_ids))
    accepted = []
    for prompt in PROMPTS:
        plain, _ = decode(loaded, prompt)
        text, drafted = decode(loaded, prompt, drafter)
        assert text == plain
        accepted.append(drafted)
    assert sum(accepted) > 30
    assert accepted[-1] > accepted[3]  # the same prompt again is known
    assert drafter.failed == 0


def test_chains_follow_what_is_handed_over():
    model = DraftModel(50)
    (cache,) = model.make_cache()
    base = list(range(10)) * 3
    said = []
    model(mx.array([base[:-1]]), cache=[cache])
    token = base[-1]
    for _ in range(5):
        token = int(mx.argmax(model(mx.array([[token]]), cache=[cache])[0, -1]))
        said.append(token)
    assert said == [0, 1, 2, 3, 4]
    assert cache.trim(3) == 3
    assert cache.row == [*base, 0]
    assert int(mx.argmax(model(mx.array([[7]]), cache=[cache])[0, -1])) == 8
    assert model._sequence.token_ids.tolist() == cache.row
    model.make_cache()
    assert model.drafter.live_tokens == 32


def test_bad_sizes_are_refused():
    for sizes in ((0, 4), (5, 0)):
        with pytest.raises(InvalidArgumentError):
            DraftModel(sizes[0], max_tokens=sizes[1])
    assert Cache().trim(5) == 0
