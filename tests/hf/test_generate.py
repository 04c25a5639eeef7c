"""sssd.hf.generate against model.generate, on tiny random models."""

import subprocess
import sys
import warnings
from contextlib import nullcontext
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")

from models import tiny_model  # noqa: E402
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria  # noqa: E402
from trees import ScriptedDrafter  # noqa: E402

import sssd  # noqa: E402
from sssd import hf  # noqa: E402
from sssd.errors import InvalidArgumentError  # noqa: E402
from sssd.hf import passes  # noqa: E402
from sssd.hf.contract import cache_argument  # noqa: E402
from sssd.hf.decoder import Decoder  # noqa: E402
from sssd.hf.passes import Passes  # noqa: E402

VOCAB = 64
PROMPT = torch.tensor([[5, 9, 33, 12, 5, 9, 33, 40, 8]])
BATCH = torch.tensor(
    [[0, 0, 0, 5, 9, 33, 12, 5, 9], [7, 7, 3, 41, 22, 7, 7, 3, 41], [0, 0, 0, 0, 0, 0, 0, 0, 50]]
)
BATCH_MASK = (BATCH != 0).long()
CACHE = cache_argument(tiny_model("llama"))
GREEDY = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", "sdpa")


@pytest.fixture(autouse=True)
def warn_anew(monkeypatch):
    monkeypatch.setattr("sssd.hf.contract._warned", set())


def decoded_plainly(match="without drafts"):
    return pytest.warns(UserWarning, match=match)


def plain(model, ids, **options):
    return model.generate(ids, **{**GREEDY, **options})


def known_texts(sequences, prompts, mask=None):
    rows = sequences.tolist()
    skip = [0] * len(rows) if mask is None else (mask == 0).sum(1).tolist()
    return [row[n:] for row, n in zip(rows, skip, strict=True)]


def scripted(sequences, mask=None, right=0.8, seed=0):
    return ScriptedDrafter(known_texts(sequences, None, mask), VOCAB, right, seed)


@pytest.mark.parametrize("right", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("max_nodes", [1, 8, 32])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy_output_is_that_of_the_model(attention, max_nodes, right):
    model = tiny_model("llama", attention)
    expected = plain(model, PROMPT)
    drafter = scripted(expected, right=right)
    result = hf.generate(model, PROMPT, drafter, max_nodes=max_nodes, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(result.sequences, expected)
    assert result.steps * max_nodes - result.drafted in (0, max_nodes), (
        "all but a last step of one token draft"
    )
    if right == 1.0:
        assert result.tokens_per_step > 1.9
    if right == 0.0 and max_nodes == 1:
        assert result.tokens_per_step < 1.2


def test_greedy_output_with_the_real_drafter(model):
    expected = plain(model, PROMPT, max_new_tokens=120)
    options = {**GREEDY, "max_new_tokens": 120}
    result = hf.generate(model, PROMPT, sssd.Drafter(), return_dict_in_generate=True, **options)
    assert torch.equal(result.sequences, expected)
    assert torch.equal(hf.generate(model, PROMPT, **options), expected)
    assert torch.equal(hf.generate(model, PROMPT, max_nodes=0, **options), expected)


def test_as_custom_generate(model):
    expected = plain(model, PROMPT)
    drafter = scripted(expected)
    output = model.generate(PROMPT, custom_generate=hf.generate, drafter=drafter, max_nodes=8, **GREEDY)
    assert torch.equal(output, expected)
    assert all(sequence.closed for sequence in drafter.sequences)
    output = model.generate(PROMPT, custom_generate=hf.generate, **GREEDY)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("right", [0.0, 0.7])
def test_batch_with_left_padding(name, right):
    model = tiny_model(name, "sdpa")
    expected = plain(model, BATCH, attention_mask=BATCH_MASK)
    drafter = scripted(expected, BATCH_MASK, right)
    result = hf.generate(
        model, BATCH, drafter, attention_mask=BATCH_MASK, max_nodes=7, return_dict_in_generate=True, **GREEDY
    )
    assert torch.equal(result.sequences, expected)
    if right:
        lengths = {tuple(row) for row in result.accepted_mask.tolist()}
        assert len(lengths) == len(BATCH), "rows should advance at different speeds"
    output = hf.generate(model, BATCH, attention_mask=BATCH_MASK, max_nodes=0, **GREEDY)
    assert torch.equal(output, expected)
    for row in range(len(BATCH)):
        alone = BATCH[row][BATCH_MASK[row].bool()][None]
        output = hf.generate(model, alone, scripted(expected, BATCH_MASK, right), max_nodes=7, **GREEDY)
        assert torch.equal(output[0, alone.shape[1] :], expected[row, BATCH.shape[1] :])


class Favour(LogitsProcessor):
    """Adds to one token's score, another one at every call and row: knows its row and its history."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores = scores.clone()
        for row in range(len(scores)):
            scores[row, (self.calls * 7 + row * 11) % VOCAB] += 3.0
        return scores


class FavourByRow(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row in range(len(scores)):
            scores[row, (input_ids.shape[1] * 5 + row * 11) % VOCAB] += 3.0
        return scores


PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 20, "eos_token_id": [7, 9, 11]},
    "bad_words_ids": {"bad_words_ids": [[15], [3, 52]]},
    "suppress": {"begin_suppress_tokens": [32, 6], "suppress_tokens": [12]},
    "encoder_no_repeat": {"encoder_no_repeat_ngram_size": 1},
    "encoder_repetition": {"encoder_repetition_penalty": 1.4},
    "prefix_allowed": {
        "prefix_allowed_tokens_fn": lambda row, ids: [i for i in range(3, VOCAB) if (i + row) % 3]
    },
    "forced_eos": {"forced_eos_token_id": 2},
    "watermark": {"watermarking_config": {"bias": 2.0, "seeding_scheme": "lefthash"}},
}


@pytest.mark.parametrize("case", PROCESSORS)
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_processors_see_each_token_s_own_path(model, case, batch):
    options = {**GREEDY, **PROCESSORS[case]}
    ids = PROMPT if batch == 1 else BATCH
    if batch > 1:
        options["attention_mask"] = BATCH_MASK
    expected = model.generate(ids, **options)
    assert not torch.equal(expected, plain(model, ids, attention_mask=options.get("attention_mask")))
    drafter = scripted(expected, BATCH_MASK if batch > 1 else None)
    # a function of the user's may remember calls
    alone = batch > 1 and case == "prefix_allowed"
    with decoded_plainly("may have a state") if alone else nullcontext():
        assert torch.equal(hf.generate(model, ids, drafter, max_nodes=9, **options), expected)


def test_custom_logits_processors(model):
    def options(processor):
        return {**GREEDY, "logits_processor": LogitsProcessorList([processor])}

    expected = model.generate(PROMPT, **options(Favour()))
    favour = Favour()
    assert torch.equal(hf.generate(model, PROMPT, scripted(expected), **options(favour)), expected)
    assert favour.calls == 40
    expected = model.generate(BATCH, attention_mask=BATCH_MASK, **options(FavourByRow()))
    drafter = scripted(expected, BATCH_MASK)
    with decoded_plainly("FavourByRow may have a state or look at other rows"):
        output = hf.generate(model, BATCH, drafter, attention_mask=BATCH_MASK, **options(FavourByRow()))
    assert torch.equal(output, expected)


def test_end_tokens_and_lengths(model):
    free = plain(model, PROMPT)[0, PROMPT.shape[1] :].tolist()
    for end_ids in ([free[13]], [free[25], free[17]], free[0]):
        options = {**GREEDY, "eos_token_id": end_ids}
        expected = model.generate(PROMPT, **options)
        for right in (0.0, 1.0):
            drafter = scripted(plain(model, PROMPT), right=right)
            assert torch.equal(hf.generate(model, PROMPT, drafter, **options), expected)
            drafter = scripted(plain(model, PROMPT), right=right)
            output = model.generate(PROMPT, custom_generate=hf.generate, drafter=drafter, **options)
            assert torch.equal(output, expected)
    for limit in ({"max_new_tokens": 1}, {"max_new_tokens": 2}, {"max_length": 14, "max_new_tokens": None}):
        expected = plain(model, PROMPT, **limit)
        drafter = scripted(plain(model, PROMPT), right=1.0)
        assert torch.equal(hf.generate(model, PROMPT, drafter, **{**GREEDY, **limit}), expected)


def test_nothing_is_drafted_for_a_last_token(model):
    options = {**GREEDY, "max_new_tokens": 2, "return_dict_in_generate": True}
    result = hf.generate(model, PROMPT, scripted(plain(model, PROMPT)), **options)
    assert (result.steps, result.drafted) == (1, 0)


def test_rows_that_end_early_are_padded(model):
    free = plain(model, BATCH, attention_mask=BATCH_MASK)
    new = free[:, BATCH.shape[1] :]
    options = {**GREEDY, "eos_token_id": [int(new[0, 4]), int(new[1, 20])], "attention_mask": BATCH_MASK}
    expected = model.generate(BATCH, **options)
    assert (expected[:, -1] == 0).any(), "one row should end early"
    for right in (0.0, 0.8):
        output = hf.generate(model, BATCH, scripted(free, BATCH_MASK, right), **options)
        assert torch.equal(output, expected)


class Recorder(StoppingCriteria):
    """Stops a row when its tokens sum to a multiple of ``divisor``, and remembers what it was shown."""

    def __init__(self, divisor):
        self.divisor, self.seen = divisor, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((input_ids.tolist(), None if scores is None else len(scores)))
        return input_ids.sum(-1) % self.divisor == 0


def test_stopping_criteria_are_asked_after_every_token(model):
    for divisor in (7, 23, 1000003):
        mine, theirs = Recorder(divisor), Recorder(divisor)
        expected = plain(model, PROMPT, stopping_criteria=[theirs])
        drafter = scripted(plain(model, PROMPT), right=1.0)
        output = hf.generate(model, PROMPT, drafter, stopping_criteria=[mine], **GREEDY)
        assert torch.equal(output, expected)
        assert mine.seen == theirs.seen


@pytest.mark.parametrize("end_ids", [None, 2])
def test_stopping_criteria_of_a_batch(model, end_ids):
    options = {**GREEDY, "eos_token_id": end_ids, "attention_mask": BATCH_MASK}
    free = plain(model, BATCH, attention_mask=BATCH_MASK)
    for divisor in (5, 9, 14):
        theirs = Recorder(divisor)
        expected = model.generate(BATCH, stopping_criteria=[theirs], **options)
        for right in (0.0, 0.9):
            drafter, mine = scripted(free, BATCH_MASK, right), Recorder(divisor)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                output = hf.generate(model, BATCH, drafter, stopping_criteria=[mine], **options)
            assert torch.equal(output, expected)
            assert mine.seen == theirs.seen


class Streamed:
    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(value.tolist())

    def end(self):
        self.events.append("end")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("custom_generate", [False, True])
def test_streamers_get_what_the_model_would_send(model, batch, custom_generate):
    ids = PROMPT if batch == 1 else BATCH
    options = {**GREEDY, "eos_token_id": 2}
    free = plain(model, ids)
    if batch > 1:
        options["attention_mask"] = BATCH_MASK
        free = plain(model, ids, attention_mask=BATCH_MASK)
        options["eos_token_id"] = int(free[0, BATCH.shape[1] + 6])
    theirs, mine = Streamed(), Streamed()
    model.generate(ids, streamer=theirs, **options)
    drafter = scripted(free, BATCH_MASK if batch > 1 else None)
    if custom_generate:
        model.generate(ids, streamer=mine, custom_generate=hf.generate, drafter=drafter, **options)
    else:
        hf.generate(model, ids, drafter, streamer=mine, **options)
    assert mine.events == theirs.events


class Told(Streamed):
    """A streamer that wants to know what had been drafted."""

    def put_output(self, value, accepted):
        self.put(value)
        self.accepted = [*getattr(self, "accepted", ()), accepted]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("custom_generate", [False, True])
def test_streamers_that_ask_are_told_what_had_been_drafted(model, batch, custom_generate):
    ids, mask = (PROMPT, None) if batch == 1 else (BATCH, BATCH_MASK)
    options = {**GREEDY, **({} if mask is None else {"attention_mask": mask})}
    drafter = scripted(plain(model, ids, **({} if mask is None else {"attention_mask": mask})), mask)
    told = Told()
    options |= {"streamer": told, "drafter": drafter, "max_nodes": 8, "return_dict_in_generate": True}
    if custom_generate:
        result = model.generate(ids, custom_generate=hf.generate, **options)
    else:
        result = hf.generate(model, ids, **options)
    assert told.accepted == result.accepted_mask.T.tolist()
    assert any(map(any, told.accepted))
    output = result.sequences[:, ids.shape[1] :].T.tolist()
    assert told.events == [ids.tolist(), *output, "end"]


def test_tokens_are_streamed_in_the_step_that_accepts_them(model):
    drafter, streamer = scripted(plain(model, PROMPT)), Streamed()
    draft = drafter.draft
    # a device works by itself: meanwhile tokens are streamed that were known before
    overlaps = model.device.type in passes.STATIC_DEVICES
    known = [[]]

    def check(token_ids, max_nodes):
        known.append(token_ids[PROMPT.shape[1] :])
        shown = known[-2] if overlaps else known[-1]
        assert streamer.events == [PROMPT.tolist(), *([token] for token in shown)]
        return draft(token_ids, max_nodes)

    drafter.draft = check
    hf.generate(model, PROMPT, drafter, max_nodes=8, streamer=streamer, **GREEDY)
    assert len(known) > 5
    assert streamer.events[-1] == "end"


def test_result_counts(model):
    expected = plain(model, PROMPT)
    result = hf.generate(
        model, PROMPT, scripted(expected, right=1.0), max_nodes=6, return_dict_in_generate=True, **GREEDY
    )
    new = result.sequences.shape[1] - PROMPT.shape[1]
    assert result.steps == sum(result.steps_per_row)
    assert result.accepted == int(result.accepted_mask.sum()) == sum(result.accepted_per_row)
    assert result.drafted == sum(result.drafted_per_row) >= result.accepted
    assert result.tokens_per_step == pytest.approx((new - 1) / result.steps)
    assert result.accepted_mask.shape == (1, new)
    # Every step yields one token that was not drafted, but for the last one if a draft ended the text.
    assert new - 1 - result.accepted in (result.steps, result.steps - 1)
    assert not bool(result.accepted_mask[0, 0])


def test_scores_and_logits(model):
    options = {
        **GREEDY,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.3,
    }
    expected = model.generate(PROMPT, **options)
    result = hf.generate(model, PROMPT, scripted(expected.sequences), **options)
    assert torch.equal(result.sequences, expected.sequences)
    assert len(result.scores) == len(result.logits) == 40
    torch.testing.assert_close(result.scores, expected.scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.logits, expected.logits, atol=1e-4, rtol=1e-4)
    expected = model.generate(BATCH, attention_mask=BATCH_MASK, **options)
    with decoded_plainly("several rows"):
        result = hf.generate(model, BATCH, attention_mask=BATCH_MASK, **options)
    assert torch.equal(result.sequences, expected.sequences)
    torch.testing.assert_close(result.scores, expected.scores)


def test_logits_that_a_processor_spoils_are_returned_spoilt(model):
    """As transformers does, which shows processors the very tensor that it returns."""

    class InPlace(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, int(input_ids[0, -1])] -= 5
            return scores

    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(PROMPT, logits_processor=LogitsProcessorList([InPlace()]), **options)
    drafter = scripted(expected.sequences)
    result = hf.generate(model, PROMPT, drafter, logits_processor=LogitsProcessorList([InPlace()]), **options)
    torch.testing.assert_close(result.logits, expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("own", [False, True])
def test_the_cache_can_be_continued(model, own, name):
    """The returned cache, or the caller's own, continues like the model's, under its old and new name."""
    whole = plain(model, PROMPT, max_new_tokens=60)
    cache = DynamicCache() if own else None
    first = hf.generate(
        model, PROMPT, scripted(whole), return_dict_in_generate=True, **{name: cache},
        **{**GREEDY, "max_new_tokens": 30},
    )  # fmt: skip
    if own:
        assert first[CACHE] is cache
    cache = first[CACHE]
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    rest = hf.generate(
        model, first.sequences, scripted(whole), **{**GREEDY, "max_new_tokens": 15, name: cache}
    )
    assert cache.get_seq_length() == rest.shape[1] - 1
    assert torch.equal(plain(model, rest, max_new_tokens=15, **{CACHE: cache}), whole)


def test_options_that_change_nothing_in_the_output(model):
    expected = plain(model, PROMPT)
    assert torch.equal(
        hf.generate(model, PROMPT, scripted(expected), prefill_chunk_size=4, **GREEDY), expected
    )
    assert torch.equal(
        hf.generate(
            model,
            drafter=scripted(expected),
            input_ids=PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            **GREEDY,
        ),
        expected,
    )


@pytest.mark.parametrize("value", [-1, 1.5, True, "8"])
def test_max_nodes_is_checked(model, value):
    with pytest.raises(InvalidArgumentError, match="max_nodes"):
        hf.generate(model, PROMPT, max_nodes=value, **GREEDY)


def test_what_is_drafted_outside_the_vocabulary_is_left_out(model):
    """With everything that hangs below it; the rest of the tree counts."""
    expected = plain(model, PROMPT)
    drafter = ScriptedDrafter(known_texts(expected, None), 200, 0.9)
    result = hf.generate(model, PROMPT, drafter, max_nodes=16, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(result.sequences, expected)
    assert 0 < result.drafted < 16 * result.steps
    assert result.accepted > 5
    assert [sequence.closed for sequence in drafter.sequences] == [True]


def test_import_without_torch_names_the_extra():
    code = "import sys; sys.modules['torch'] = None; import sssd; import sssd.hf"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "pip install 'sssd[hf]'" in run.stderr
    code = "import sys, sssd; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


OVERLAPPED = {("launch", "observe"), ("observe", "finish"), ("finish", "launch")}
IN_TURN = {("launch", "finish"), ("finish", "observe"), ("observe", "launch")}


@pytest.mark.parametrize("overlaps", [False, True])
def test_what_no_pass_waits_for_is_done_while_a_device_works(overlaps, monkeypatch):
    """Streaming and learning follow the launch of the next pass where that runs by itself."""
    monkeypatch.setattr("sssd.hf.passes.STATIC_DEVICES", {"cpu"} if overlaps else set())
    events = []

    def noted(name, function):
        def call(*arguments, **options):
            events.append(name)
            return function(*arguments, **options)

        return call

    launch = Passes.launch
    monkeypatch.setattr(
        Passes, "launch", noted("launch", lambda *args, **kw: noted("finish", launch(*args, **kw)))
    )
    monkeypatch.setattr(Decoder, "_settle", noted("observe", Decoder._settle))

    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            events.append("put")
            self.tokens += value.flatten().tolist()

        def end(self):
            events.append("end")

    model, streamer = tiny_model("llama", "sdpa"), Streamer()
    prompt = torch.tensor([[5, 9, 33, 12] * 6])
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    result = hf.generate(model, prompt, streamer=streamer, **options)
    assert torch.equal(result, expected)
    assert streamer.tokens == expected[0].tolist()
    between = 0
    for event, following in pairwise(event for event in events if event in ("launch", "finish", "observe")):
        assert (event, following) in (
            # the first pass finds nothing to learn from, the last one nothing to wait for
            {*OVERLAPPED, ("launch", "finish"), ("finish", "observe")} if overlaps else IN_TURN
        )
        between += (event, following) == ("launch", "observe")
    passes = events.count("launch")
    assert between == (passes - 1 if overlaps else 0)
    assert events.count("observe") == passes
    assert events[-1] == "end" or events[-2] == "end"


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precisions_choose_what_the_model_does_but_for_ties(dtype, fast_path):
    """Every token is the model's most probable one after those before it, or as good within rounding."""
    model = tiny_model("llama", "sdpa").to(dtype)
    prompt = torch.tensor([[5, 9, 33, 12] * 6])
    options = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(prompt, **options)
    runs = [
        (sssd.Drafter(), {}),
        (sssd.Drafter(), {"max_nodes": 16}),
        (ScriptedDrafter(plain.tolist(), 64, 0.8), {"max_nodes": 12}),
        (ScriptedDrafter(plain.tolist(), 64, 0.0), {"max_nodes": 12}),
    ]
    accepted = 0
    for drafter, more in runs:
        result = hf.generate(
            model, prompt, drafter, fast_path=fast_path, return_dict_in_generate=True, **more, **options
        )
        accepted += result.accepted
        text = result.sequences
        assert text.shape == plain.shape
        logits = model(input_ids=text).logits[0, prompt.shape[1] - 1 : -1].float()
        chosen = logits.gather(1, text[0, prompt.shape[1] :, None])[:, 0]
        # rounding errors of a few layers, in units of the last place of the logits' scale
        scale = logits.abs().amax(-1)
        assert ((logits.amax(-1) - chosen) <= 8 * torch.finfo(dtype).eps * scale).all()
    assert accepted > 10
