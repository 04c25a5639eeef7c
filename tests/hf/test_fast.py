"""The fast path against the model's own forward, and when it is not taken."""

import logging

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models import tiny_model  # noqa: E402
from trees import ScriptedDrafter, random_tree  # noqa: E402

import sssd  # noqa: E402
from sssd import hf  # noqa: E402
from sssd.hardware import CostCurve  # noqa: E402
from sssd.hf import fast  # noqa: E402
from sssd.hf.passes import Passes  # noqa: E402
from sssd.hf.verify import TreeCache  # noqa: E402

KNOWN = ["llama", "mistral", "qwen2", "qwen3"]
PROMPT = torch.tensor([[5, 9, 33, 12, 5, 9, 33, 40, 8]])
BATCH = torch.tensor(
    [[0, 0, 0, 5, 9, 33, 12, 5, 9], [7, 7, 3, 41, 22, 7, 7, 3, 41], [0, 0, 0, 0, 0, 0, 0, 0, 50]]
)
GREEDY = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}


def block(rng, rows, nodes):
    """A verify pass over random trees: ids, depths, mask."""
    ids = rng.integers(64, size=(rows, nodes + 1))
    depths = np.zeros((rows, nodes + 1), np.int64)
    masks = np.zeros((rows, nodes + 1, nodes + 1), np.bool_)
    for row in range(rows):
        tree = random_tree(rng, nodes, 64)
        ids[row, 1:], depths[row, 1:], masks[row] = tree.token_ids, tree.depths, tree.attention_mask()
    return ids, depths, masks


@pytest.mark.parametrize("nodes", [0, 1, 7, 30])
@pytest.mark.parametrize("lengths", [[9], [9, 9], [4, 9, 7]])
@pytest.mark.parametrize("name", KNOWN)
def test_logits_and_states_are_those_of_the_model(name, lengths, nodes):
    model = tiny_model(name, "sdpa")
    rng = np.random.default_rng(nodes)
    ids, depths, masks = block(rng, len(lengths), nodes)
    positions = np.array(lengths)[:, None] + depths
    outputs, caches = [], []
    with torch.inference_mode():
        for fast_path in (True, False):
            cache = TreeCache(len(lengths))
            model(input_ids=torch.arange(9).expand(len(lengths), -1), past_key_values=cache, use_cache=True)
            cache.lengths = list(lengths)
            passes = Passes(model, cache, fast_path)
            assert (passes.fast is not None) == fast_path
            outputs.append(passes.run(ids, depths, positions, masks))
            caches.append(cache)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        for a, b in zip(mine.buffers, theirs.buffers, strict=True):
            for row, length in enumerate(lengths):
                end = length + nodes + 1
                torch.testing.assert_close(a[row, :, :end], b[row, :, :end], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("right", [0.0, 0.7])
def test_output_is_that_of_the_model(name, right):
    model = tiny_model(name, "sdpa")
    expected = model.generate(PROMPT, **GREEDY)
    drafter = ScriptedDrafter(expected.tolist(), 64, right)
    for max_nodes in (0, 1, 6, 32):
        result = hf.generate(model, PROMPT, drafter, max_nodes=max_nodes, **GREEDY)
        assert torch.equal(result, expected)


def test_output_of_a_padded_batch_is_that_of_the_model():
    model = tiny_model("llama", "sdpa")
    mask = (BATCH != 0).long()
    expected = model.generate(BATCH, attention_mask=mask, **GREEDY)
    texts = [row[(keep == 0).sum() :].tolist() for row, keep in zip(expected, mask, strict=True)]
    for right in (0.0, 0.8):
        drafter = ScriptedDrafter(texts, 64, right)
        assert torch.equal(
            hf.generate(model, BATCH, drafter, attention_mask=mask, max_nodes=9, **GREEDY), expected
        )


class WidthSwitcher(ScriptedDrafter):
    """Drafts of another size at every step."""

    def draft(self, token_ids, max_nodes):
        return super().draft(token_ids, int(self.rng.choice([1, 2, 3, 5, 8, 13, 21, 34])))


@pytest.mark.parametrize("fast_path", [True, False])
def test_switching_widths_in_the_middle_of_a_request_changes_nothing(fast_path):
    model = tiny_model("llama", "sdpa")
    expected = model.generate(PROMPT, **GREEDY)
    for seed in range(5):
        drafter = WidthSwitcher(expected.tolist(), 64, 0.7, seed)
        assert torch.equal(
            hf.generate(model, PROMPT, drafter, max_nodes=40, fast_path=fast_path, **GREEDY), expected
        )


@pytest.mark.parametrize("fast_path", [True, False])
def test_the_rule_changes_no_token(fast_path):
    """Whatever the curve says, also one that makes drafts as large as they get."""
    model = tiny_model("llama", "sdpa")
    prompt = torch.tensor([[5, 9, 33, 12] * 8])
    expected = model.generate(prompt, **GREEDY)
    for seconds in ([1, 1, 1], [1, 2, 64]):
        cost = CostCurve(
            [1, 2], [1, 2, 64], [0, 1], np.repeat([[seconds]], 2, 0).reshape(2, 3, 1).repeat(2, 2)
        )
        result = hf.generate(
            model,
            prompt,
            sssd.Drafter(),
            cost=cost,
            fast_path=fast_path,
            return_dict_in_generate=True,
            **GREEDY,
        )
        assert torch.equal(result.sequences, expected)
    for _ in range(3):
        assert torch.equal(hf.generate(model, prompt, fast_path=fast_path, **GREEDY), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_do_not_depend_on_the_number_of_rows(dtype):
    """Reordered weights give a row the same sums in any company, but for the row that is alone in float32."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    torch.manual_seed(0)
    weight, rows = (torch.randn(96, 64) * 0.1).to(dtype), torch.randn(40, 64).to(dtype)
    module = torch.nn.Linear(64, 96, bias=False).to(dtype)
    module.weight.data.copy_(weight)
    product = fast._Linear([module], packed=True)
    with torch.inference_mode():
        whole = product(rows)
        torch.testing.assert_close(whole, module(rows))
        for count in (2, 3, 8, 17, 33):
            assert torch.equal(product(rows[:count]), whole[:count])


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "sssd.hf.fast")
    return caplog


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("gpt2", None, "GPT2LMHeadModel is not one of"),
        ("qwen2_mixed", None, "mixes kinds of attention"),
        ("llama", lambda model: model.set_attn_implementation("eager"), "not sdpa"),
        ("llama", lambda model: model.model.layers[0].register_forward_hook(lambda *_: None), "hooks"),
        (
            "llama",
            lambda model: setattr(model.model.layers[0].mlp, "forward", model.model.layers[0].mlp.forward),
            "forward of its own",
        ),
        ("llama", lambda model: model.model.layers[1].half(), "differ in type"),
        ("llama", lambda model: model.train(), "training"),
        ("llama", lambda model: torch.nn.utils.parametrizations.weight_norm(model.lm_head), "Parametrized"),
    ],
)
def test_models_that_are_not_known_take_the_general_path_and_say_so_once(name, change, reason, log):
    model = tiny_model(name, "sdpa")
    if change is not None:
        change(model)
    assert fast.fast_pass(model) is None
    assert fast.fast_pass(model) is None
    messages = [record.getMessage() for record in log.records]
    assert len(messages) == 1
    assert reason in messages[0]


def test_a_model_whose_forward_computes_something_else_is_noticed(monkeypatch, log):
    model = tiny_model("llama", "sdpa")
    original = type(model.model.layers[0].mlp).forward
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: 2 * original(self, x))
    assert fast.fast_pass(model) is None
    assert "differ from the model's own" in log.records[-1].getMessage()


@pytest.mark.parametrize("change", ["write", "replace", "load"])
def test_changed_weights_are_noticed(change):
    model = tiny_model("llama", "sdpa")
    before = fast.fast_pass(model)
    assert before is not None
    layer = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        if change == "write":
            layer.weight.mul_(-3)
        elif change == "replace":
            layer.weight = torch.nn.Parameter(layer.weight * -3)
        else:
            model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})
    expected = model.generate(PROMPT, **GREEDY)
    assert torch.equal(hf.generate(model, PROMPT, max_nodes=4, **GREEDY), expected)
    assert fast.fast_pass(model) is not before


def test_a_hook_that_comes_later_is_noticed():
    model = tiny_model("llama", "sdpa")
    assert fast.fast_pass(model) is not None
    handle = model.lm_head.register_forward_hook(lambda module, args, output: -output)
    expected = model.generate(PROMPT, **GREEDY)
    assert torch.equal(hf.generate(model, PROMPT, max_nodes=4, **GREEDY), expected)
    handle.remove()
    assert torch.equal(hf.generate(model, PROMPT, max_nodes=4, **GREEDY), model.generate(PROMPT, **GREEDY))


def test_weights_are_not_doubled_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(fast, "_available_bytes", lambda: 0)
    model = tiny_model("llama", "sdpa")
    passes = fast.fast_pass(model)
    assert passes is not None
    assert not passes.packed
    assert torch.equal(hf.generate(model, PROMPT, max_nodes=4, **GREEDY), model.generate(PROMPT, **GREEDY))


@pytest.mark.parametrize("options", [{"max_nodes": 4, "cost": "h100"}, {"cost": 3}, {"max_nodes": "auto"}])
def test_bad_options_are_refused(options):
    with pytest.raises(sssd.errors.InvalidArgumentError):
        hf.generate(tiny_model("llama"), PROMPT, **options)
