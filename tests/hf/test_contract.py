"""``custom_generate=sssd.hf.generate`` never fails, and never differs, where ``model.generate`` works."""

import functools
import threading
import warnings
from functools import partial

import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from models import tiny_model  # noqa: E402
from transformers import (  # noqa: E402
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    WatermarkingConfig,
)
from trees import ScriptedDrafter  # noqa: E402

import sssd  # noqa: E402
from sssd import hf  # noqa: E402
from sssd.errors import InvalidArgumentError, UnsupportedModelError  # noqa: E402
from sssd.hf import contract, fast, probe  # noqa: E402

VOCAB = 64
PROMPT = torch.tensor([[5, 9, 33, 12, 5, 9, 33, 40, 8]])
BATCH = torch.tensor(
    [[0, 0, 0, 5, 9, 33, 12, 5, 9], [7, 7, 3, 41, 22, 7, 7, 3, 41], [0, 0, 0, 0, 0, 0, 0, 0, 50]]
)
MASK = (BATCH != 0).long()
GREEDY = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0}
SAMPLE = {**GREEDY, "do_sample": True, "top_k": 0}
CACHE = contract.cache_argument(tiny_model("llama"))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", "sdpa")


@pytest.fixture(autouse=True)
def warn_anew(monkeypatch):
    monkeypatch.setattr(contract, "_warned", set())


def tokens(output):
    return output if torch.is_tensor(output) else output.sequences


def made(options):
    """The options, those made by a function anew: processors, criteria and caches remember calls."""
    return {name: value() if isinstance(value, Anew) else value for name, value in options.items()}


class Anew:
    def __init__(self, make):
        self.make = make

    def __call__(self):
        return self.make()


def ways(model, drafter, **own):
    """Both ways of calling sssd, as functions like ``model.generate``."""
    return [
        lambda ids, **options: hf.generate(model, ids, drafter(), **own, **options),
        lambda ids, **options: model.generate(
            ids, custom_generate=hf.generate, drafter=drafter(), **own, **options
        ),
    ]


def reasons(record):
    return [str(w.message) for w in record if "without drafts" in str(w.message)]


def check(model, ids, options, plain=None, drafted=True, seed=11):
    """Compares with the plain call, or its error; returns why it was decoded without drafts, if it was."""

    def run(generate):
        torch.manual_seed(seed)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            contract._warned.clear()
            try:
                return generate(ids, **made(options)), None, reasons(record)
            except Exception as error:
                return None, error, reasons(record)

    expected, failed, _ = run(plain or model.generate)
    texts = []
    if failed is None:
        mask = options.get("attention_mask")
        rows = tokens(expected).tolist()
        padding = [0] * len(rows)
        if mask is not None and len(mask) == len(rows):
            padding = [int((keep == 0).sum()) for keep in mask]
        texts = [row[skip:] for row, skip in zip(rows, padding, strict=True)]
    found = []
    for drafter, own in (
        (partial(ScriptedDrafter, texts, VOCAB, 0.8), {"max_nodes": 9}),
        (partial(sssd.Drafter, vocab_size=VOCAB), {}),
    ):
        for way in ways(model, drafter, **own):
            got, error, why = run(way)
            if failed is not None:
                assert type(error) is type(failed), (error, failed)
                continue
            assert error is None, repr(error)
            assert type(got) is type(expected) or isinstance(got, type(expected))
            assert torch.equal(tokens(got), tokens(expected))
            for field in ("scores", "logits"):
                if not torch.is_tensor(expected) and getattr(expected, field, None) is not None:
                    torch.testing.assert_close(
                        getattr(got, field), getattr(expected, field), atol=1e-3, rtol=1e-3
                    )
            found.append(why)
    assert all(why == found[0] for why in found)
    return found[0][0] if found and found[0] else None


class Counting(LogitsProcessor):
    """Remembers how often it was called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores = scores.clone()
        scores[:, self.calls * 7 % VOCAB] += 3
        return scores


class Grammar(LogitsProcessor):
    """Keeps a state for each row."""

    def __init__(self):
        self.states = None

    def __call__(self, input_ids, scores):
        last = input_ids[:, -1].tolist()
        self.states = [
            (state * 3 + token) % 61
            for state, token in zip(self.states or [0] * len(last), last, strict=True)
        ]
        scores = scores.clone()
        for row, state in enumerate(self.states):
            scores[row, state] = -float("inf")
            scores[row, state + 2] += 5
        return scores


class OtherRows(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores - 100 * torch.nn.functional.one_hot(input_ids[:, -1].roll(1), VOCAB)


class AnyRow(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), bool((input_ids[:, 14:] < 10).any()))


def processor(kind):
    return Anew(lambda: LogitsProcessorList([kind()]))


B = {"attention_mask": MASK}
DRAFTED = {
    "greedy": (PROMPT, GREEDY),
    "padded batch": (BATCH, {**GREEDY, **B}),
    "sample": (PROMPT, SAMPLE),
    "sample a batch": (BATCH, {**SAMPLE, **B, "temperature": 0.8, "top_p": 0.9}),
    "sample a batch that ends": (BATCH, {**SAMPLE, **B, "eos_token_id": [3, 17, 41]}),
    "samples of one prompt": (PROMPT, {**SAMPLE, "num_return_sequences": 3}),
    "typical, epsilon, eta, top_h": (
        BATCH,
        {**SAMPLE, **B, "typical_p": 0.9, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "top_h": 0.9},
    ),
    "repetition penalty": (BATCH, {**GREEDY, **B, "repetition_penalty": 1.3}),
    "penalties by the prompt": (
        BATCH,
        {**GREEDY, **B, "encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
    ),
    "biases": (BATCH, {**GREEDY, **B, "sequence_bias": [[[15], -8.0], [[12, 33], 5.0]]}),
    "bad words": (BATCH, {**GREEDY, **B, "bad_words_ids": [[15], [12, 33]]}),
    "forced tokens": (
        BATCH,
        {**GREEDY, **B, "eos_token_id": 2, "forced_bos_token_id": 7, "forced_eos_token_id": 2},
    ),
    "decay of the length": (
        BATCH,
        {**GREEDY, **B, "eos_token_id": 2, "exponential_decay_length_penalty": (5, 1.3)},
    ),
    "watermark": (BATCH, {**GREEDY, **B, "watermarking_config": WatermarkingConfig(bias=2.0)}),
    "watermark of itself": (
        PROMPT,
        {**GREEDY, "watermarking_config": WatermarkingConfig(bias=2.0, seeding_scheme="selfhash")},
    ),
    "max_time": (BATCH, {**GREEDY, **B, "max_time": 100.0}),
    "renormalized": (BATCH, {**SAMPLE, **B, "renormalize_logits": True, "remove_invalid_values": True}),
    "a counting processor, one row": (PROMPT, {**GREEDY, "logits_processor": processor(Counting)}),
    "a processor with a state, one row": (PROMPT, {**SAMPLE, "logits_processor": processor(Grammar)}),
    "criteria of one row": (
        PROMPT,
        {**GREEDY, "stopping_criteria": Anew(lambda: StoppingCriteriaList([AnyRow()]))},
    ),
    "guidance": (PROMPT, {**GREEDY, "guidance_scale": 1.5}),
    "SynthID": (
        PROMPT,
        {**SAMPLE, "watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5, 7], ngram_len=3)},
    ),
    "scores": (
        PROMPT,
        {**GREEDY, "output_scores": True, "output_logits": True, "return_dict_in_generate": True},
    ),
    "a hybrid cache": (PROMPT, {**GREEDY, "cache_implementation": "hybrid"}),
    "a cache of the caller's": (PROMPT, {**GREEDY, CACHE: Anew(DynamicCache)}),
    "shifted positions": (PROMPT, {**GREEDY, "position_ids": torch.arange(9)[None] + 7}),
    "a hole in the mask": (PROMPT, {**GREEDY, "attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 1]])}),
    "a float mask": (BATCH, {**GREEDY, "attention_mask": MASK.float()}),
    "prefill in chunks": (BATCH, {**GREEDY, **B, "prefill_chunk_size": 4}),
    "a config": (
        PROMPT,
        {
            "generation_config": GenerationConfig(
                max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0, repetition_penalty=1.2
            )
        },
    ),
}

STATIC = Anew(lambda: StaticCache(config=tiny_model("llama").config, max_cache_len=80))
# transformers asks the driver for a stream
needs_driver = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PLAIN = {
    "beams": (PROMPT, {**GREEDY, "num_beams": 3}, "greedy search and sampling"),
    "sampled beams": (PROMPT, {**SAMPLE, "num_beams": 3}, "greedy search and sampling"),
    "beams of a batch": (
        BATCH,
        {**GREEDY, **B, "num_beams": 2, "return_dict_in_generate": True, "output_scores": True},
        "greedy search and sampling",
    ),
    "prompt lookup": (PROMPT, {**GREEDY, "prompt_lookup_num_tokens": 3}, "greedy search and sampling"),
    "an assistant": (
        PROMPT,
        {**GREEDY, "assistant_model": tiny_model("llama", "sdpa", seed=3)},
        "greedy search and sampling",
    ),
    "attentions": (
        PROMPT,
        {**GREEDY, "output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states",
    ),
    "no cache": (PROMPT, {**GREEDY, "use_cache": False}, "without a key-value cache"),
    "a static cache": (PROMPT, {**GREEDY, "cache_implementation": "static"}, "StaticCache"),
    "a static cache passed": (PROMPT, {**GREEDY, CACHE: STATIC}, "StaticCache"),
    "an offloaded cache": pytest.param(
        PROMPT, {**GREEDY, "cache_implementation": "offloaded"}, "offloaded", marks=needs_driver
    ),
    "a cache for a batch": (BATCH, {**GREEDY, **B, CACHE: Anew(DynamicCache)}, "several rows"),
    "scores of a batch": (
        BATCH,
        {**GREEDY, **B, "output_scores": True, "return_dict_in_generate": True},
        "several rows",
    ),
    "embeddings": (
        None,
        {**GREEDY, "inputs_embeds": tiny_model("llama").get_input_embeddings()(PROMPT).detach()},
        "inputs beside text",
    ),
    "a counting processor": (BATCH, {**GREEDY, **B, "logits_processor": processor(Counting)}, "Counting"),
    "a processor with a state": (BATCH, {**SAMPLE, **B, "logits_processor": processor(Grammar)}, "Grammar"),
    "a processor of other rows": (
        BATCH,
        {**GREEDY, **B, "logits_processor": processor(OtherRows)},
        "OtherRows",
    ),
    "criteria of other rows": (
        BATCH,
        {**GREEDY, **B, "stopping_criteria": Anew(lambda: StoppingCriteriaList([AnyRow()]))},
        "AnyRow",
    ),
    "a prefix function": (
        BATCH,
        {
            **GREEDY,
            **B,
            "prefix_allowed_tokens_fn": lambda row, ids: [i for i in range(3, 64) if (i + row) % 3],
        },
        "PrefixConstrained",
    ),
    "SynthID of a batch": (
        BATCH,
        {**SAMPLE, **B, "watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5, 7], ngram_len=3)},
        "SynthID",
    ),
    "guidance of a batch": (BATCH, {**GREEDY, **B, "guidance_scale": 1.5}, "Guidance"),
}
PLAIN_CASES = [
    pytest.param(*case.values, id=name, marks=case.marks)
    if hasattr(case, "marks")
    else pytest.param(*case, id=name)
    for name, case in PLAIN.items()
]
ERRORS = {
    "groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "several greedy samples": {"num_return_sequences": 2},
    "no new tokens": {"max_new_tokens": 0},
    "a typo": {"max_new_tokns": 3},
    "a streamer of beams": {"num_beams": 2, "streamer": TextIteratorStreamer(None)},
    "stop strings without a tokenizer": {"stop_strings": ["a"]},
    "an assistant for a batch": {"prompt_lookup_num_tokens": 3, "input_ids": BATCH},
}


@pytest.mark.parametrize("case", DRAFTED)
def test_what_can_be_verified_is_drafted(model, case):
    ids, options = DRAFTED[case]
    assert check(model, ids, options) is None


@pytest.mark.parametrize(("ids", "options", "reason"), PLAIN_CASES)
def test_everything_else_is_decoded_plainly_with_the_reason(model, ids, options, reason):
    assert reason in check(model, ids, options)
    for way in ways(model, lambda: None, on_unsupported="raise"):
        with pytest.raises(UnsupportedModelError, match=reason):
            way(ids, **made(options))


@pytest.mark.parametrize("case", ERRORS)
def test_what_the_model_refuses_is_refused_alike(model, case):
    options = {**GREEDY, **ERRORS[case]}
    check(model, options.pop("input_ids", PROMPT), options)
    with pytest.raises(Exception):  # noqa: B017, PT011
        model.generate(PROMPT, **options) if case != "an assistant for a batch" else model.generate(
            BATCH, **options
        )


def test_the_reason_is_given_once(model):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(3):
            hf.generate(model, PROMPT, **GREEDY, num_beams=2)
    assert len(reasons(record)) == 1
    assert reasons(record)[0].startswith("LlamaForCausalLM is decoded without drafts: ")
    assert record[0].filename == __file__


def test_on_unsupported_is_checked(model):
    with pytest.raises(InvalidArgumentError, match="on_unsupported"):
        hf.generate(model, PROMPT, on_unsupported="ignore", **GREEDY)


def test_the_message_about_a_model_names_versions():
    bloom = tiny_model("bloom", "eager", n_head=4)
    with pytest.raises(UnsupportedModelError, match=f"transformers {transformers.__version__}; tested with"):
        hf.generate(bloom, PROMPT, on_unsupported="raise", **GREEDY)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("cache", ["hybrid", "static", "sliding_window", "dynamic_full"])
def test_checkpoints_that_name_a_cache_are_decoded(name, cache):
    model = tiny_model(name, "eager")
    model.generation_config.cache_implementation = cache
    check(model, PROMPT, GREEDY)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("bloom", {"n_head": 4}, "4D"),
        ("bert", {"is_decoder": False}, "bidirectional"),
        ("llama4_text", {}, "chunked_attention"),
        ("mamba", {"state_size": 4, "expand": 2}, "recurrent"),
        (
            "falcon_h1",
            {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
            "recurrent",
        ),
        ("phi3", {}, "prepare_inputs_for_generation is overridden"),
    ],
)
def test_models_that_cannot_be_verified_are_decoded_plainly(name, changes, reason):
    assert reason in check(tiny_model(name, "eager", **changes), PROMPT, GREEDY)


def test_results_of_plain_decoding_count_no_drafts():
    model = tiny_model("mamba", "eager", state_size=4, expand=2)
    with pytest.warns(UserWarning, match="recurrent"):
        result = hf.generate(model, PROMPT, return_dict_in_generate=True, **GREEDY)
    assert (result.steps, result.drafted, result.tokens_per_step) == (29, 0, 1.0)


def test_encoder_decoder_models_are_decoded_plainly():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    for options in (GREEDY, {**GREEDY, "num_beams": 2}, {**GREEDY, "return_dict_in_generate": True}):
        assert "encoder-decoder" in check(model, PROMPT, options) or "beam" in check(model, PROMPT, options)


# What a model's user or a library puts around it


def scaled_embeddings(model):
    original = model.prepare_inputs_for_generation

    def prepare(*args, **kwargs):
        inputs = original(*args, **kwargs)
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")) * 1.5
        return inputs

    model.prepare_inputs_for_generation = prepare


def subclassed(model):
    class Mine(type(model)):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            inputs = super().prepare_inputs_for_generation(*args, **kwargs)
            inputs["input_ids"] = inputs["input_ids"].flip(0)
            return inputs

    model.__class__ = Mine


def steered_at_the_last_token(model):
    def steer(module, args, output):
        output = output.clone()
        output[:, -1] += 3
        return output

    model.model.layers[0].mlp.register_forward_hook(steer)


def patched(model):
    forward, calls = model.lm_head.forward, []

    def every_third(hidden):
        calls.append(1)
        return forward(hidden) * (-1 if len(calls) % 3 == 0 else 1)

    model.lm_head.forward = every_third


class Own(torch.nn.Module):
    """A linear layer as quantizers make them: without ``weight``, or with activations scaled together."""

    def __init__(self, linear, together):
        super().__init__()
        self.qweight = torch.nn.Buffer(linear.weight.data.clone())
        self.together = together

    def forward(self, x):
        scale = x.abs().amax() if self.together else x.abs().amax(-1, keepdim=True)
        return torch.nn.functional.linear((x / scale * 15).round() * scale / 15, self.qweight)


def foreign_subclass(model):
    """A class of one's own, as remote code brings it: a pass tells whether it can be verified."""

    class Mine(type(model)):
        @functools.wraps(type(model).forward)
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    model.__class__ = Mine


def quantized(model, together):
    for layer in model.model.layers:
        layer.mlp.up_proj = Own(layer.mlp.up_proj, together)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (scaled_embeddings, "prepare_inputs_for_generation is overridden"),
        (subclassed, "prepare_inputs_for_generation is overridden"),
        (steered_at_the_last_token, "model.layers.0.mlp has forward hooks"),
        (patched, "lm_head has a forward of its own"),
        (lambda model: model.train(), "training mode"),
        (foreign_subclass, None),
        (partial(quantized, together=True), "what else is in a pass"),
        (partial(quantized, together=False), None),
    ],
)
def test_code_around_a_model_counts(change, reason):
    model = tiny_model("llama", "sdpa")
    change(model)
    found = check(model, PROMPT, GREEDY)
    assert found is None if reason is None else reason in found


def last_token(function):
    """Does something else with the last token of a pass, under the name of what it replaces."""

    @functools.wraps(function)
    def other(*args, **kwargs):
        output = function(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        first = getattr(first, "logits", first)
        first[:, -1] *= 1.5
        return output

    return other


@pytest.mark.parametrize("place", ["class", "model", "attention", "rotary", "torch"])
def test_replaced_code_counts(place, monkeypatch):
    from transformers.models.llama import modeling_llama

    targets = {
        "class": (modeling_llama.LlamaMLP, "forward"),
        "model": (modeling_llama.LlamaForCausalLM, "forward"),
        "rotary": (modeling_llama, "apply_rotary_pos_emb"),
        "torch": (torch.nn.functional, "scaled_dot_product_attention"),
    }
    model = tiny_model("llama", "sdpa")
    assert check(model, PROMPT, GREEDY) is None
    if place == "attention":
        known = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
        monkeypatch.setitem(known._global_mapping, "sdpa", last_token(known["sdpa"]))
    else:
        owner, name = targets[place]
        monkeypatch.setattr(owner, name, last_token(getattr(owner, name)))
    assert "is replaced" in check(model, PROMPT, GREEDY)
    monkeypatch.undo()
    assert check(model, PROMPT, GREEDY) is None


@pytest.mark.parametrize("ids", [PROMPT, BATCH])
def test_a_drafter_of_a_smaller_vocabulary_serves(model, ids):
    options = {**GREEDY, "attention_mask": (ids != 0).long()}
    expected = model.generate(ids, **options)
    drafter = sssd.Drafter(vocab_size=20)
    assert (expected >= 20).any()
    for nodes in (16, None):
        for _ in range(2):
            assert torch.equal(hf.generate(model, ids, drafter, max_nodes=nodes, **options), expected)


def test_hooks_for_all_modules_count(model):
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: -output if module is model.lm_head else None
    )
    try:
        assert "all modules" in check(model, PROMPT, GREEDY)
    finally:
        handle.remove()
    assert check(model, PROMPT, GREEDY) is None


@pytest.mark.parametrize("newer", [False, True])
def test_newer_transformers_are_tried_out(monkeypatch, newer):
    """Their models may be written otherwise than those that were tested."""
    tried, agrees = [], probe._agrees
    monkeypatch.setattr(probe, "_agrees", lambda *arguments: (tried.append(1), agrees(*arguments))[1])
    if newer:
        monkeypatch.setattr(probe, "NEWEST_TESTED", "5.17")
    model = tiny_model("qwen3", "sdpa")
    assert check(model, PROMPT, GREEDY) is None
    assert len(tried) == newer


def test_what_cannot_be_examined_is_decoded_plainly(monkeypatch):
    def fails(*arguments):
        raise KeyError("layer_types")

    monkeypatch.setattr(contract, "frequency_limit", fails)
    assert "cannot be examined (KeyError" in check(tiny_model("qwen3", "sdpa"), PROMPT, GREEDY)


def test_dynamic_quantization_mixes_tokens():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(
            tiny_model("llama", "sdpa"), {torch.nn.Linear}, dtype=torch.qint8
        )
    assert "what else is in a pass" in check(model, PROMPT, GREEDY)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_are_drafted(whole):
    model = tiny_model("llama", "sdpa")
    expected = model.generate(PROMPT, **GREEDY)
    if whole:
        wrapped = torch.compile(model, backend="eager")
    else:
        wrapped = model
        model.forward = torch.compile(model.forward, backend="eager")
    drafter = ScriptedDrafter(expected.tolist(), VOCAB, 0.8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        result = hf.generate(wrapped, PROMPT, drafter, max_nodes=5, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(result.sequences, expected)
    assert result.accepted > 5


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize(
    "mode", ["autocast", "inference", "grad", "deterministic", "double", "default double"]
)
def test_modes_of_torch(mode, fast_path, monkeypatch):
    model = tiny_model("llama", "sdpa")
    if mode == "double":
        model = model.double()
    if mode == "deterministic":
        torch.use_deterministic_algorithms(True)
    if mode == "default double":
        torch.set_default_dtype(torch.float64)
    context = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "inference": torch.inference_mode,
    }.get(mode, torch.enable_grad)
    try:
        with context():
            expected = model.generate(PROMPT, **GREEDY)
            drafter = ScriptedDrafter(expected.tolist(), VOCAB, 0.8)
            with warnings.catch_warnings(record=True) as record:
                warnings.simplefilter("always")
                output = hf.generate(model, PROMPT, drafter, max_nodes=5, fast_path=fast_path, **GREEDY)
        assert torch.equal(output, expected)
        assert bool(reasons(record)) == (mode == "autocast")
        # whoever comes afterwards finds everything usable
        assert torch.equal(
            hf.generate(model, PROMPT, max_nodes=5, **GREEDY), model.generate(PROMPT, **GREEDY)
        )
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)


# Positions and rotary frequencies

ROPE = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 32,
        "factor": 4.0,
    },
}


@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.parametrize("new_tokens", [8, 22, 23, 24, 40])
def test_drafts_never_change_rotary_frequencies(kind, new_tokens):
    """Below the border drafts change nothing; a call that may cross it is decoded plainly."""
    limit = 32 if kind == "dynamic" else 256
    model = tiny_model("llama", "sdpa", rope_parameters=ROPE[kind], max_position_embeddings=limit)
    found = check(model, PROMPT, {**GREEDY, "max_new_tokens": new_tokens})
    crosses = PROMPT.shape[1] + new_tokens >= 32
    assert ("rotary frequencies" in found) if crosses else (found is None)
    # frequencies that an earlier call has stretched are reset by the next short one, drafted or not
    assert check(model, PROMPT, {**GREEDY, "max_new_tokens": 8}) is None
    assert check(model, BATCH, {**GREEDY, **B, "max_new_tokens": 8}) is None


def test_the_border_of_dynamic_frequencies_is_the_models(model):
    """An original length, which other kinds go by, does not move it."""
    parameters = {**ROPE["dynamic"], "original_max_position_embeddings": 4096}
    model = tiny_model("llama", "sdpa", rope_parameters=parameters, max_position_embeddings=28)
    assert "rotary frequencies" in check(model, PROMPT, GREEDY)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_bigcode"])
def test_drafts_end_where_a_table_of_positions_does(name):
    changes = {"n_positions": 48} if name == "gpt2" else {}
    model = tiny_model(name, "eager", max_position_embeddings=48, n_embd=32, n_layer=2, n_head=4, **changes)
    ids = torch.tensor([[5, 6, 7, 8] * 7])
    options = {**GREEDY, "max_new_tokens": 20}
    expected = model.generate(ids, **options)
    texts = [expected[0].tolist() + [9] * 40]
    for drafter in (ScriptedDrafter(texts, VOCAB, 1.0), sssd.Drafter(vocab_size=VOCAB)):
        for _ in range(3):
            assert torch.equal(hf.generate(model, ids, drafter, max_nodes=30, **options), expected)


def test_the_drafter_is_told_how_long_the_text_may_be(model, monkeypatch):
    lengths = []

    class Noted:
        def __init__(self):
            self.drafter = sssd.Drafter(vocab_size=VOCAB)

        def begin(self, prompt, max_length):
            lengths.append((len(prompt), max_length))
            return self.drafter.begin(prompt, max_length=max_length)

    monkeypatch.setattr("sssd.hf.decoder.Drafter", Noted)
    hf.generate(model, BATCH, Noted(), attention_mask=MASK, **GREEDY)
    assert lengths == [(6, 36), (9, 39), (1, 31)]


# Random numbers


@pytest.mark.parametrize("kept", [1 << 27, 1])
def test_samples_depend_on_the_seed_alone(model, kept, monkeypatch):
    """For a batch too, whatever is drafted and learned; the generator ends where the model's loop ends."""
    monkeypatch.setattr("sssd.hf.choices._KEPT_BYTES", kept)
    options = {**SAMPLE, **B, "eos_token_id": [3, 17, 41]}
    drafter = sssd.Drafter(vocab_size=VOCAB)
    for seed in range(4):
        torch.manual_seed(seed)
        expected = model.generate(BATCH, **options)
        following = torch.rand(3)
        texts = [row[skip:] for row, skip in zip(expected.tolist(), (3, 0, 8), strict=True)]
        for one, nodes in (
            (drafter, 16),
            (drafter, None),
            (drafter, 0),
            (ScriptedDrafter(texts, VOCAB, 0.9), 16),
            (ScriptedDrafter(texts[:1], VOCAB, 1.0), 16),
        ):
            torch.manual_seed(seed)
            assert torch.equal(hf.generate(model, BATCH, one, max_nodes=nodes, **options), expected)
            assert torch.equal(torch.rand(3), following)


def test_the_fast_path_draws_no_random_numbers():
    model = tiny_model("llama", "sdpa")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert fast.fast_pass(model) is not None
    assert torch.equal(torch.rand(4), expected)


# Streams and stop strings


class Down:
    vocab_size = None

    def begin(self, prompt):
        raise RuntimeError("the drafter is down")


@pytest.mark.parametrize("custom", [False, True])
def test_a_streamer_is_ended_when_decoding_fails(model, custom):
    """Or whoever reads it would wait for ever."""
    events = []

    class Streamer:
        def put(self, value):
            events.append("put")

        def end(self):
            events.append("end")

    call = ways(model, Down)[custom]
    with pytest.raises(RuntimeError, match="down"):
        call(PROMPT, streamer=Streamer(), **GREEDY)
    assert events.count("end") == 1
    assert events[-1] == "end"
    if not custom:
        # transformers' own refusals, before sssd is asked
        events.clear()
        with pytest.raises(ValueError, match="model_kwargs"):
            call(PROMPT, streamer=Streamer(), max_new_tokns=3, **GREEDY)
        assert events == ["end"]


def test_a_reader_in_another_thread_is_released(model):
    tokenizer = letters()
    streamer = TextIteratorStreamer(tokenizer, timeout=20)
    failed = []

    def decode():
        try:
            hf.generate(model, PROMPT, Down(), streamer=streamer, **GREEDY)
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=decode)
    thread.start()
    # without an end, reading raises queue.Empty at the timeout
    assert "".join(streamer) is not None
    thread.join()
    assert failed


def letters():
    """A tokenizer of letters, which the texts that it decodes to can be found in."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    names = [chr(97 + i) for i in range(26)] + [chr(65 + i) for i in range(26)] + list("0123456789")
    inner = Tokenizer(BPE({"<unk>": 0, "<end>": 1, **{name: i + 2 for i, name in enumerate(names)}}, []))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("batch", [False, True])
def test_stop_strings(model, custom, batch):
    tokenizer = letters()
    ids, more = (BATCH, B) if batch else (PROMPT, {})
    free = model.generate(ids, **GREEDY, **more)
    new = tokenizer.decode(free[0, ids.shape[1] :])
    for stop in (new[3:5], new[11], new[20:23], "not there"):
        options = {**GREEDY, **more, "tokenizer": tokenizer, "stop_strings": [stop]}
        expected = model.generate(ids, **options)
        texts = [row[skip:] for row, skip in zip(free.tolist(), (3, 0, 8) if batch else (0,), strict=True)]
        call = ways(model, lambda texts=texts: ScriptedDrafter(texts, VOCAB, 1.0))[custom]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert torch.equal(call(ids, max_nodes=9, **options), expected)


# Adapters


def perturb(model, scale=0.05):
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapped", [True, False])
def test_adapters_added_switched_and_merged_between_calls(dtype, wrapped):
    lib = pytest.importorskip("peft")
    model = tiny_model("llama", "sdpa").to(dtype)
    model.name_or_path = "tiny"
    options = {**GREEDY, "max_new_tokens": 20}

    def same(outer):
        expected = model.generate(PROMPT, **options)
        if dtype == torch.bfloat16:
            # near-ties may break either way; every token must be the adapted model's within rounding
            text = hf.generate(outer, PROMPT, max_nodes=0, **options)
            logits = model(text).logits[0, PROMPT.shape[1] - 1 : -1].float()
            chosen = logits.gather(1, text[0, PROMPT.shape[1] :, None])[:, 0]
            assert ((logits.amax(-1) - chosen) <= 0.02 * logits.abs().amax(-1)).all()
        else:
            assert torch.equal(hf.generate(outer, PROMPT, max_nodes=0, **options), expected)
            drafter = ScriptedDrafter(expected.tolist(), VOCAB, 0.8)
            result = hf.generate(outer, PROMPT, drafter, max_nodes=9, return_dict_in_generate=True, **options)
            assert torch.equal(result.sequences, expected)
            assert result.accepted > 3
        return expected

    base = same(model)
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj", "o_proj"]
    config = lib.LoraConfig(r=4, lora_alpha=4, target_modules=targets)
    if wrapped:
        outer = lib.get_peft_model(model, config)
        perturb(model)
        outer.eval()
        assert not torch.equal(same(outer), base)
        outer.merge_adapter()
        same(outer)
        outer.unmerge_adapter()
        with outer.disable_adapter():
            same(outer)
        merged = outer.merge_and_unload()
        same(merged)
        assert fast.fast_pass(merged) is not None
    else:
        try:
            model.add_adapter(config)
        except ValueError as error:  # transformers may want a peft that is not out yet
            pytest.skip(str(error))
        perturb(model)
        model.eval()
        assert not torch.equal(same(model), base)
        model.disable_adapters()
        assert torch.equal(same(model), base)
        model.enable_adapters()
        same(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_soft_prompts_are_honoured(kind):
    lib = pytest.importorskip("peft")
    model = tiny_model("llama", "sdpa")
    model.name_or_path = "tiny"
    base = model.generate(PROMPT, **GREEDY)
    config = getattr(lib, kind)(task_type=lib.TaskType.CAUSAL_LM, num_virtual_tokens=4)
    outer = lib.get_peft_model(model, config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = outer.generate(input_ids=PROMPT, **GREEDY)
        for output in (
            hf.generate(outer, PROMPT, **GREEDY),
            hf.generate(outer, input_ids=PROMPT, **GREEDY),
            outer.generate(input_ids=PROMPT, custom_generate=hf.generate, **GREEDY),
        ):
            assert torch.equal(output, expected)
    if torch.equal(expected, base):
        pytest.skip("this peft's soft prompts do nothing with this transformers")
