"""``sssd.llama.DraftModel`` in a loop like llama-cpp-python's, ``TreeDecoder`` over a cache like its."""

import fake_llama
import fake_vllm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sssd import Drafter
from sssd.errors import InvalidArgumentError


@pytest.fixture(scope="module")
def llama():
    """The module, over a llama-cpp-python of tables."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield fake_llama.install(monkeypatch)


class Clock:
    """Passes take what a curve says."""

    def __init__(self, monkeypatch, llama, slope):
        self.now, self.slope = 0.0, slope
        monkeypatch.setattr(llama.draft_model.time, "perf_counter", lambda: self.now)

    def run(self, tokens):
        self.now += 0.02 * (1 + self.slope * (tokens - 1))


def decode(model, target, prompt, tokens, clock=None, keep=None):
    """Decodes as ``Llama.generate``; returns the text and the number of passes."""
    text = np.zeros(len(prompt) + 4 * tokens + 64, np.intc)
    text[: len(prompt)] = prompt
    length, draft, passes = len(prompt), [], 0
    while length < len(prompt) + tokens:
        passes += 1
        if clock is not None:
            clock.run(1 + len(draft))
        for token in [*draft, None]:
            text[length] = target.next(text[:length])
            length += 1
            if token != text[length - 1]:
                break
        draft = model(text[:length])
        assert draft.dtype == np.intc
        assert len(draft) <= model.max_tokens
        draft = draft.tolist()
    return text[:length].tolist(), passes


def plain(target, prompt, tokens):
    text = list(prompt)
    for _ in range(tokens):
        text.append(target.next(text))
    return text


PROMPT = [*range(10, 40)]


@pytest.mark.parametrize("slope", [0.0, 0.02, 0.3])
def test_texts_are_the_targets_and_repeated_ones_take_few_passes(llama, monkeypatch, slope):
    clock, target = Clock(monkeypatch, llama, slope), fake_vllm.Target(1)
    model = llama.DraftModel(vocab_size=64, curve=llama.linear(max(slope, 0.01)))
    first, passes = decode(model, target, PROMPT, 120, clock)
    assert first[:150] == plain(target, PROMPT, 120)
    # a text that shares no more than a beginning ends the one before
    decode(model, fake_vllm.Target(2), PROMPT, 30, clock)
    again, fewer = decode(model, target, PROMPT, 120, clock)
    assert again[:150] == first[:150]
    assert fewer < passes
    assert (model.failed, model.accepted > 0) == (0, True)


def test_drafts_stop_where_they_do_not_pay(llama, monkeypatch):
    clock = Clock(monkeypatch, llama, 0.95)
    model = llama.DraftModel(vocab_size=1000)
    random = np.random.default_rng(0)
    for number in range(6):
        decode(model, fake_vllm.Target(number, 1000), random.integers(0, 1000, 100).tolist(), 150, clock)
    drafted = model.drafted
    _, passes = decode(model, fake_vllm.Target(99, 1000), random.integers(0, 1000, 100).tolist(), 100, clock)
    assert model.drafted - drafted <= passes / 4


def test_what_was_taken_back_is_forgotten(llama):
    model = llama.DraftModel(vocab_size=64)
    text = np.array(plain(fake_vllm.Target(3), PROMPT, 80), np.intc)
    for length in (40, 60, 55, 56, 90, 91, 20, 21):
        model(text[:length])
        assert model._sequence.token_ids.tolist() == text[:length].tolist()
    assert model.drafter.live_tokens == 91  # 20 of 91 tokens are the beginning of another text


def test_the_same_prompt_again_is_another_text(llama, monkeypatch):
    clock, target = Clock(monkeypatch, llama, 0.02), fake_vllm.Target(5, 1000)
    model = llama.DraftModel(vocab_size=1000, curve=llama.linear(0.02))
    _, first = decode(model, target, PROMPT, 60, clock)
    _, again = decode(model, target, PROMPT, 60, clock)
    assert again < first / 2


def test_one_may_learn_at_once_or_never(llama):
    model = llama.DraftModel(vocab_size=64)
    decode(model, fake_vllm.Target(1), PROMPT, 40)
    model.end()
    model.end()
    assert model.drafter.live_tokens > 0
    silent = llama.DraftModel(vocab_size=64, learn=False)
    decode(silent, fake_vllm.Target(1), PROMPT, 40)
    silent.end()
    assert silent.drafter.live_tokens == 0


def test_errors_cost_drafts_only(llama, caplog):
    model = llama.DraftModel(drafter=Drafter(vocab_size=64, max_bytes="200K", live_bytes=0, soft_bytes=0))
    for _ in range(3):
        assert len(model(np.arange(200_000, dtype=np.intc) % 64)) == 0
    assert model.failed == 3
    assert len(caplog.records) == 1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(0, 9), min_size=1, max_size=40)),
        min_size=1,
        max_size=5,
    )
)
def test_any_texts_in_turn(llama, turns):
    model = llama.DraftModel(vocab_size=64)
    for seed, prompt in turns:
        target = fake_vllm.Target(seed, 10)
        text, _ = decode(model, target, prompt, 40)
        assert text == plain(target, prompt, len(text) - len(prompt))
    assert model.failed == 0


def test_the_mini_store_needs_a_tokenizer(llama, monkeypatch):
    attached = []
    note = lambda drafter, tokenizer: attached.append((drafter, tokenizer))  # noqa: E731
    monkeypatch.setattr("sssd.mini.attach", note)
    llama.DraftModel(vocab_size=64)
    llama.DraftModel(vocab_size=64, tokenizer="tokenizer.json", datastore=None)
    llama.DraftModel(drafter=Drafter(vocab_size=64), tokenizer="tokenizer.json")
    assert attached == []
    model = llama.DraftModel(vocab_size=64, tokenizer="tokenizer.json")
    assert attached == [(model.drafter, "tokenizer.json")]


def test_trees_are_verified_and_nothing_else_is_left_in_the_cache(llama):
    target = fake_vllm.Target(4)
    model = fake_llama.Llama(target)
    decoder = llama.TreeDecoder(model, end_token_ids=[], curve=llama.linear(0.01))
    text = plain(target, PROMPT, 100)
    assert [*decoder.generate(PROMPT, max_tokens=100)] == text[len(PROMPT) :]
    assert fake_llama.sequences(decoder) == {0: text[:-1]}
    passes = decoder.passes
    assert [*decoder.generate(PROMPT, max_tokens=100)] == text[len(PROMPT) :]
    assert decoder.passes - passes < 25
    assert decoder.drafted > decoder.accepted > 75
    assert decoder.failed == 0
    assert fake_llama.most_leaves(decoder) > 1


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 5),
    max_nodes=st.integers(1, 40),
    max_leaves=st.integers(1, 9),
    turns=st.lists(
        st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 60)),
        min_size=1,
        max_size=4,
    ),
)
def test_whatever_the_trees_every_text_is_the_targets(llama, seed, max_nodes, max_leaves, turns):
    """Few tokens, so that much is drafted and much is wrong; texts share beginnings; some end early."""
    target = fake_vllm.Target(seed, 10)
    decoder = llama.TreeDecoder(
        fake_llama.Llama(target, vocab_size=10),
        max_nodes=max_nodes,
        max_leaves=max_leaves,
        end_token_ids=[3],
        curve=llama.linear(0.001),
    )
    for prompt, most in turns:
        wanted = plain(target, prompt, min(most, fake_llama.LENGTH - len(prompt)))[len(prompt) :]
        if 3 in wanted:
            wanted = wanted[: wanted.index(3) + 1]
        assert [*decoder.generate(prompt, max_tokens=most)] == wanted
        assert fake_llama.sequences(decoder).keys() <= {0}
    assert decoder.failed == 0
    assert fake_llama.most_leaves(decoder) <= max_leaves


def test_a_text_ends_with_the_context_and_bad_prompts_are_refused(llama):
    target = fake_vllm.Target(1)
    decoder = llama.TreeDecoder(fake_llama.Llama(target), end_token_ids=[])
    text = plain(target, PROMPT, fake_llama.LENGTH - len(PROMPT))
    assert [*decoder.generate(PROMPT)] == text[len(PROMPT) :]
    for prompt in ([], [1] * fake_llama.LENGTH):
        with pytest.raises(InvalidArgumentError):
            next(decoder.generate(prompt))
    for sizes in ((0, 4), (512, 4), (8, 0), (8, 1000)):
        with pytest.raises(InvalidArgumentError):
            llama.TreeDecoder(fake_llama.Llama(target), max_nodes=sizes[0], max_leaves=sizes[1])


def test_a_pass_that_fails_leaves_a_clean_cache(llama):
    target = fake_vllm.Target(1)
    decoder = llama.TreeDecoder(fake_llama.Llama(target), end_token_ids=[], curve=llama.linear(0.01))
    text = decoder.generate(PROMPT, max_tokens=50)
    first = [next(text) for _ in range(10)]
    decoder._context.fails = True
    with pytest.raises(RuntimeError, match="llama_decode"):
        list(text)
    decoder._context.fails = False
    assert fake_llama.sequences(decoder) == {}
    assert [*decoder.generate(PROMPT, max_tokens=10)] == first


def test_texts_go_on_without_memory_for_drafts(llama, caplog):
    target = fake_vllm.Target(1)
    drafter = Drafter(vocab_size=64, max_bytes="200K", live_bytes=0, soft_bytes=0)
    decoder = llama.TreeDecoder(fake_llama.Llama(target, length=6000), drafter=drafter, end_token_ids=[])
    prompt = (np.arange(5000) % 64).tolist()
    for _ in range(2):
        assert [*decoder.generate(prompt, max_tokens=5)] == plain(target, prompt, 5)[5000:]
    assert decoder.failed == 2
    assert len(caplog.records) == 1
