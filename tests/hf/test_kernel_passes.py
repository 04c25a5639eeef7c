"""Passes by the Triton kernels against the model's own forward, in Triton's interpreter; recordings."""

import logging
import subprocess
import sys
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models import EAGER_ONLY, tiny_model  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from trees import ScriptedDrafter, random_tree  # noqa: E402

from sssd import DraftBatch, hf  # noqa: E402
from sssd.errors import InvalidArgumentError  # noqa: E402
from sssd.hf import fast, interface  # noqa: E402
from sssd.hf.contract import cache_argument  # noqa: E402
from sssd.hf.passes import Passes  # noqa: E402
from sssd.hf.static import StaticStore, bucket_of  # noqa: E402

PROMPT = torch.tensor([[5, 9, 33, 12, 5, 9, 33, 40, 8]])
BATCH = torch.tensor(
    [[0, 0, 0, 5, 9, 33, 12, 5, 9], [7, 7, 3, 41, 22, 7, 7, 3, 41], [0, 0, 0, 0, 0, 0, 0, 0, 50]]
)
GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def kernel_runs(by_kernels, monkeypatch):
    """The kernels that have run, by name."""
    runtime = pytest.importorskip("triton.runtime.interpreter")
    runs, run = [], runtime.InterpretedFunction.run

    def counted(self, *arguments, **options):
        runs.append(self.fn.__name__)
        with _disable_current_modes():
            return run(self, *arguments, **options)

    monkeypatch.setattr(runtime.InterpretedFunction, "run", counted)
    return runs


@pytest.fixture
def recorded(monkeypatch):
    """What is recorded, where nothing can be: the function itself, and that it was."""
    found, make = [], StaticStore.__init__

    def record(function):
        found.append(function)
        function()
        return function

    monkeypatch.setattr(
        StaticStore, "__init__", lambda self, *given, **options: make(self, *given, record=record, **options)
    )
    return found


def scripted(expected, ids):
    texts = [row[int((start == 0).sum()) :].tolist() for row, start in zip(expected, ids, strict=True)]
    return ScriptedDrafter(texts, 64, 0.8)


def started(model, lengths, kind):
    passes = Passes(model, len(lengths), None, 40, fast_path=kind != "general")
    text = torch.arange(9).expand(len(lengths), -1)
    model(input_ids=text, use_cache=True, **{cache_argument(model): passes.cache})
    passes.cache.lengths = list(lengths)
    return passes


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_oss", "opt"])
def test_logits_and_states_are_those_of_the_model(kernel_runs, name):
    """Three rows, and a dead fourth one; the fast path, or the model's own modules."""
    model = tiny_model(name, "eager" if name in EAGER_ONLY else "sdpa")
    rng, lengths = np.random.default_rng(0), [4, 9, 7]
    trees = DraftBatch.from_trees([random_tree(rng, 6, 64) for _ in lengths])
    outputs, caches = [], []
    with torch.inference_mode():
        for kind in ("kernels", "general"):
            passes = started(model, lengths, kind)
            kernel_runs.clear()
            passes.fill(trees, rng.integers(64, size=3) * 0 + 7, lengths, 8 if kind == "kernels" else 7)
            outputs.append(passes.launch()()[0][:, :7].clone())
            assert ("split_kernel" in kernel_runs) == (kind == "kernels")
            assert ("rope_kernel" in kernel_runs) == (kind == "kernels" and passes.fast is not None)
            caches.append(passes.cache)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        for a, b in zip(mine.buffers, theirs.buffers, strict=True):
            for row, length in enumerate(lengths):
                end = length + 7
                torch.testing.assert_close(a[row, :, :end], b[row, :, :end], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_output_is_that_of_the_model(kernel_runs, name):
    """Padded rows that end one after the other, windows, caps and sinks; trees that are walked and moved."""
    model = tiny_model(name, "eager" if name in EAGER_ONLY else "sdpa")
    mask = (BATCH != 0).long()
    options = {**GREEDY, "eos_token_id": [9, 20, 33]}
    expected = model.generate(BATCH, attention_mask=mask, **options)
    kernel_runs.clear()
    result = hf.generate(model, BATCH, scripted(expected, BATCH), attention_mask=mask, max_nodes=7, **options)
    assert torch.equal(result, expected)
    assert {"split_kernel", "walk_kernel", "move_kernel"} <= set(kernel_runs)


def test_padding_elsewhere_than_in_front_is_left_to_masks(kernel_runs):
    model = tiny_model("llama", "sdpa")
    mask = torch.ones_like(PROMPT)
    mask[0, 3] = 0
    expected = model.generate(PROMPT, attention_mask=mask, **GREEDY)
    assert fast.fast_pass(model).by_kernels
    kernel_runs.clear()
    drafter = scripted(expected, PROMPT)
    assert torch.equal(
        hf.generate(model, PROMPT, drafter, attention_mask=mask, max_nodes=3, **GREEDY), expected
    )
    assert not kernel_runs


VIEWS = {
    *(
        "view",
        "transpose",
        "slice",
        "select",
        "unsqueeze",
        "expand",
        "permute",
        "detach",
        "alias",
        "t",
        "split",
    ),
    *("_unsafe_view", "as_strided", "unbind", "empty", "empty_like", "new_empty", "lift_fresh", "chunk"),
    *("split_with_sizes", "empty_strided", "reshape"),
}


class Operations(TorchDispatchMode):
    """Counts torch's operations that are no views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.split("::")[1]
        if name not in VIEWS:
            self.names.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_layer_is_few_kernels(kernel_runs, name):
    """Launches of Triton's and torch's own, of two layers more."""
    counts = []
    for layers in (2, 4):
        model = tiny_model(name, "sdpa", num_hidden_layers=layers)
        with torch.inference_mode():
            passes = started(model, [9], "kernels")
            assert passes.fast.by_kernels
            passes.fill(None, [7], [9], 8)
            kernel_runs.clear()
            with Operations() as operations:
                passes.launch(accept=True)()
        counts.append(len(operations.names) + len(kernel_runs))
    # norm, product, rope, attention and its merge, product; norm, product, gate, product
    assert counts[1] - counts[0] <= 2 * 10
    assert counts[0] - 2 * 10 < 60


def test_weights_lie_end_to_end_and_stay_the_models_own(by_kernels, tmp_path):
    model, twin = (tiny_model("qwen2", "sdpa") for _ in range(2))
    passes = fast.fast_pass(model)
    layer = model.model.layers[1].self_attn
    assert passes.layers[1].qkv.weight.data_ptr() == layer.q_proj.weight.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), twin.parameters(), strict=True))
    # an update in place is seen, a new tensor noticed, and what lies right is left where it is
    with torch.no_grad():
        layer.k_proj.weight.mul_(-2)
    start = layer.q_proj.weight.shape[0]
    assert torch.equal(passes.layers[1].qkv.weight[start : start + 16], layer.k_proj.weight)
    place = layer.q_proj.weight.data_ptr()
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight * 2)
    renewed = fast.fast_pass(model)
    assert renewed is not passes
    assert layer.q_proj.weight.data_ptr() == place == renewed.layers[1].qkv.weight.data_ptr()
    layer.k_proj.weight = torch.nn.Parameter(layer.k_proj.weight * 3)
    renewed = fast.fast_pass(model)
    assert torch.equal(renewed.layers[1].qkv.weight[start : start + 16], layer.k_proj.weight)


def test_kernels_that_fail_leave_the_rest_of_the_fast_path(by_kernels, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "sssd.hf.fast")
    monkeypatch.setattr("sssd.hf.kernels.layers.add_norm", lambda *_: 1 / 0)
    model = tiny_model("llama", "sdpa")
    expected = model.generate(PROMPT, **GREEDY)
    for _ in range(2):
        drafter = scripted(expected, PROMPT)
        assert torch.equal(hf.generate(model, PROMPT, drafter, max_nodes=3, **GREEDY), expected)
    assert fast.fast_pass(model) is not None
    assert [r.getMessage().count("without its own kernels (division") for r in caplog.records] == [1]


def test_kernels_that_are_wrong_are_not_taken(by_kernels, monkeypatch):
    from sssd.hf.kernels import attention

    right = attention.tree_attention
    monkeypatch.setattr(attention, "tree_attention", lambda *given, **options: 1.5 * right(*given, **options))
    assert not fast.fast_pass(tiny_model("llama", "sdpa")).by_kernels
    assert interface.model_pass(tiny_model("opt", "sdpa")) is None


def test_models_whose_settings_change_are_run_anew(by_kernels):
    model = tiny_model("opt", "sdpa")
    first = interface.model_pass(model)
    assert first is interface.model_pass(model)
    model.model.decoder.layers[0].self_attn.scaling *= 0.5
    second = interface.model_pass(model)
    assert second is not first
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    assert interface.model_pass(model) is not second


def test_other_threads_keep_the_models_own_attention_meanwhile(by_kernels):
    for name, attention in (("opt", "sdpa"), ("gemma2", "eager")):
        model = tiny_model(name, attention)
        expected = model(PROMPT).logits
        with interface._looked_up(model):
            assert model.config._attn_implementation != attention
            found = []
            thread = threading.Thread(target=lambda m=model, f=found: f.append(m(PROMPT).logits))
            thread.start()
            thread.join()
        assert torch.equal(found[0], expected)
        assert model.config._attn_implementation == attention


def test_rows_that_end_apart_record_few_passes(static, recorded):
    """Sixteen rows, each with its own length: one recording for 16, 8, 4, 2 and 1."""
    model = tiny_model("llama", "sdpa")
    torch.manual_seed(0)
    ids = torch.randint(3, 64, (16, 9))
    options = {**GREEDY, "max_new_tokens": 120, "eos_token_id": [5, 9]}
    expected = model.generate(ids, **options)
    lengths = {int((row != 0).sum()) for row in expected}
    assert len(lengths) > 8
    assert torch.equal(hf.generate(model, ids, max_nodes=3, **options), expected)
    store = fast.fast_pass(model).stores[-1]
    assert len(recorded) == len(store._recorded)
    by_width = [[shape.batch for shape in store._recorded if shape.width == width] for width in (1, 4)]
    assert all(len(batches) == len(set(batches)) <= 5 for batches in by_width)
    assert {batch for batches in by_width for batch in batches} <= {1, 2, 4, 8, 16}
    assert [bucket_of(rows) for rows in (1, 2, 3, 4, 5, 16, 17, 64)] == [1, 2, 4, 4, 8, 16, 32, 64]


def test_passes_are_recorded_when_they_come_again_and_told_to_nobody_before(static, recorded, monkeypatch):
    """Two passes kernel by kernel, one that is recorded; the rule hears of those after."""
    model = tiny_model("llama", "sdpa")
    settled, told = [], []
    run = StaticStore._run
    monkeypatch.setattr(
        StaticStore, "_run", lambda self, shape: (run(self, shape), settled.append(self.settled))[0]
    )
    monkeypatch.setattr(
        "sssd.hf.decoder.Decoder._settle",
        lambda self, rule, step: (told.append(rule is not None), self._stream()),
    )
    cost = sssd_curve()
    expected = model.generate(PROMPT, **GREEDY)
    assert torch.equal(hf.generate(model, PROMPT, cost=cost, **GREEDY), expected)
    shapes = fast.fast_pass(model).stores[-1]._uses
    assert settled == told
    assert settled.count(False) == sum(min(uses, 3) for uses in shapes.values())
    assert any(settled)
    assert len(recorded) == sum(uses >= 3 for uses in shapes.values()) > 0


def sssd_curve():
    from sssd.hardware import CostCurve

    return CostCurve([1, 2], [1, 64], [0, 1], np.ones((2, 2, 2)), ready=(1, 8))


def test_passes_are_recorded_ahead(static, recorded):
    model = tiny_model("llama", "sdpa")
    with torch.inference_mode():
        passes = started(model, [9], "static")
        before = [part.clone() for part in passes.store.stack[:, 0, :, :9]]
        assert passes.warm_up((1, 8)) == len(recorded) == 2
        assert passes.warm_up((1, 8)) == 0
        assert all(map(torch.equal, before, passes.store.stack[:, 0, :, :9]))
        passes.close()


def test_a_warm_model_records_nothing_more(static, recorded):
    model = tiny_model("llama", "sdpa")
    assert hf.warm_up(model, batch=3, length=60, widths=(1, 4)) == len(recorded) == 6
    mask = (BATCH != 0).long()
    options = {**GREEDY, "max_new_tokens": 40, "eos_token_id": [9, 20]}
    expected = model.generate(BATCH, attention_mask=mask, **options)
    assert torch.equal(hf.generate(model, BATCH, attention_mask=mask, max_nodes=3, **options), expected)
    assert {shape.width for shape in fast.fast_pass(model).stores[-1]._recorded} == {1, 4}
    assert len(recorded) == 6
    for bad in ({"batch": 0}, {"length": 0}, {"widths": (1, 3)}):
        with pytest.raises(InvalidArgumentError):
            hf.warm_up(model, **bad)


def test_a_recording_that_fails_is_left_and_said_once(static, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "sssd.hf.static")
    tried, make = [], StaticStore.__init__

    def record(function):
        tried.append(function)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(
        StaticStore, "__init__", lambda *given, **options: make(*given, record=record, **options)
    )
    model = tiny_model("llama", "sdpa")
    expected = model.generate(PROMPT, **GREEDY)
    assert torch.equal(hf.generate(model, PROMPT, max_nodes=0, **GREEDY), expected)
    assert len(tried) == 1
    assert [record.getMessage().count("not permitted") for record in caplog.records] == [1]
    assert fast.fast_pass(model) is not None
    assert fast.fast_pass(model).stores[-1].settled


def test_importing_the_package_imports_no_kernel():
    code = """
import sys
import torch, transformers, transformers.modeling_utils, transformers.generation, transformers.masking_utils
before = "triton" in sys.modules
import sssd.hf, sssd.hf.interface
assert ("triton" in sys.modules) == before
assert not {"sssd.hf.kernels.attention", "sssd.hf.kernels.layers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
