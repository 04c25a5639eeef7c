"""The fast path against the model's own forward, and when it is not taken."""

import functools
import gc
import logging
import weakref
from itertools import chain

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models import tiny_model  # noqa: E402
from transformers import DynamicCache, modeling_utils  # noqa: E402
from trees import ScriptedDrafter, random_tree  # noqa: E402

import sssd  # noqa: E402
from sssd import DraftBatch, DraftTree, hf  # noqa: E402
from sssd.hardware import CostCurve  # noqa: E402
from sssd.hf import fast  # noqa: E402
from sssd.hf.contract import cache_argument  # noqa: E402
from sssd.hf.passes import Passes  # noqa: E402
from sssd.hf.profile import profile  # noqa: E402
from sssd.hf.static import WIDTHS, StaticStore, span_of  # noqa: E402

KNOWN = ["llama", "mistral", "qwen2", "qwen3"]
PROMPT = torch.tensor([[5, 9, 33, 12, 5, 9, 33, 40, 8]])
BATCH = torch.tensor(
    [[0, 0, 0, 5, 9, 33, 12, 5, 9], [7, 7, 3, 41, 22, 7, 7, 3, 41], [0, 0, 0, 0, 0, 0, 0, 0, 50]]
)
GREEDY = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "sssd.hf.fast")
    return caplog


def block(rng, lengths, nodes, width=None):
    """What a pass verifies of random trees after texts of these lengths, filled up to a width."""
    trees = [random_tree(rng, nodes, 64) for _ in lengths]
    return trees, rng.integers(64, size=len(lengths)), lengths, width or nodes + 1


def launch(passes, block, accept=False):
    """A pass over a block."""
    trees, *rest = block
    passes.fill(DraftBatch.from_trees(trees), *rest)
    return passes.launch(accept)()


def started(model, lengths, path):
    """Passes of a kind, over rows that hold parts of a text."""
    passes = Passes(model, len(lengths), None, 64, fast_path=path != "general")
    text = torch.arange(9).expand(len(lengths), -1)
    model(input_ids=text, use_cache=True, **{cache_argument(model): passes.cache})
    passes.cache.lengths = list(lengths)
    assert (passes.fast is not None, passes.store is not None) == (path != "general", path == "static")
    return passes


@pytest.mark.parametrize("nodes", [0, 1, 7, 30])
@pytest.mark.parametrize("lengths", [[9], [9, 9], [4, 9, 7]])
@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("path", ["fast", "static"])
def test_logits_and_states_are_those_of_the_model(path, name, lengths, nodes, request):
    request.getfixturevalue("static" if path == "static" else "growing")
    model = tiny_model(name, "sdpa")
    width = next(known for known in WIDTHS if known > nodes) if path == "static" else nodes + 1
    trees = block(np.random.default_rng(nodes), lengths, nodes, width)
    outputs, caches = [], []
    with torch.inference_mode():
        for kind in (path, "general"):
            passes = started(model, lengths, kind)
            outputs.append(launch(passes, trees)[0][:, : nodes + 1].clone())
            caches.append(passes.cache)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        for a, b in zip(mine.buffers, theirs.buffers, strict=True):
            for row, length in enumerate(lengths):
                end = length + nodes + 1
                torch.testing.assert_close(a[row, :, :end], b[row, :, :end], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [[9], [4, 9, 7]])
def test_a_static_pass_accepts_and_moves_as_the_host_would(static, lengths):
    """The walk on the device against ``DraftTree.accept``, and the states it moves against ``commit``."""
    model = tiny_model("llama", "sdpa")
    rng = np.random.default_rng(3)
    moved = 0
    with torch.inference_mode():
        for _ in range(30):
            trees = block(rng, lengths, 12, 16)
            one, two = started(model, lengths, "static"), started(model, lengths, "general")
            guess = launch(two, trees)[0].argmax(-1).numpy()
            # make the target's choices part of the trees, on entries that lie apart
            for row, tree in enumerate(trees[0]):
                ids, parents = tree.token_ids, tree.parents
                for node in rng.permutation(12)[:8]:
                    wanted = guess[row, parents[node] + 1]
                    if not (ids[parents == parents[node]] == wanted).any():
                        ids[node] = wanted
                trees[0][row] = DraftTree(ids, parents)
            targets = launch(two, trees)[0].argmax(-1).numpy()
            kept, _, offsets = two.block.accept(targets)
            paths = [tree.accept(row[:13])[0] + 1 for tree, row in zip(trees[0], targets, strict=True)]
            assert kept.tolist() == [entry for path in paths for entry in (0, *path)]
            moved += sum((path != np.arange(len(path)) + 1).any() for path in paths)
            _, answer = launch(one, trees, accept=True)
            assert np.array_equal(answer.targets[:, :13], targets[:, :13])
            one.cache.commit(kept, offsets)
            two.cache.commit(kept, offsets)
            assert one.cache.lengths == two.cache.lengths
            for mine, theirs in zip(one.cache.layers, two.cache.layers, strict=True):
                for a, b in zip(mine.buffers, theirs.buffers, strict=True):
                    for row, length in enumerate(one.cache.lengths):
                        torch.testing.assert_close(
                            a[row, :, :length], b[row, :, :length], rtol=1e-4, atol=1e-4
                        )
            one.close()
    assert moved > 5


def test_the_answer_holds_the_most_probable_tokens(static):
    model = tiny_model("llama", "sdpa")
    trees = block(np.random.default_rng(0), [9], 3, 4)
    with torch.inference_mode():
        passes = started(model, [9], "static")
        logits, answer = launch(passes, trees, accept=True)
        probs, tokens = logits.softmax(-1).topk(8)
    assert np.array_equal(answer.topk_ids, tokens.numpy())
    np.testing.assert_allclose(answer.topk_probs, probs.numpy(), rtol=1e-4, atol=1e-6)


def test_calls_of_two_shapes_take_turns_without_new_buffers(static, monkeypatch):
    made, make = [], StaticStore.__init__
    monkeypatch.setattr(
        StaticStore, "__init__", lambda self, *a, **k: (made.append(a), make(self, *a, **k))[1]
    )
    model = tiny_model("llama", "sdpa")
    for _ in range(3):
        hf.generate(model, PROMPT, max_nodes=3, **{**GREEDY, "max_new_tokens": 260})
        hf.generate(model, BATCH, attention_mask=(BATCH != 0).long(), max_nodes=3, **GREEDY)
    assert len(made) == 2


@pytest.mark.parametrize("fails", ["prefill", "begin", "draft", "stream", "load"])
def test_fixed_buffers_are_given_back_whatever_fails(static, fails, monkeypatch):
    model = tiny_model("llama", "sdpa")
    hf.generate(model, PROMPT, max_nodes=3, **GREEDY)

    class Failing(ScriptedDrafter):
        def begin(self, prompt):
            if fails == "begin":
                raise RuntimeError("down")
            return super().begin(prompt)

        def draft(self, token_ids, max_nodes):
            raise RuntimeError("down")

    class Stream:
        def put(self, value):
            if fails == "stream" and value.numel() == 1:
                raise RuntimeError("down")

        def end(self):
            pass

    options = {"drafter": Failing([], 64, 0.0) if fails in ("begin", "draft") else None, "streamer": Stream()}
    if fails == "prefill":
        # the model's own forward fails, not the fast path
        monkeypatch.setattr("sssd.hf.decoder.Decoder._prefill", lambda self: 1 / 0)
    if fails == "load":
        monkeypatch.setattr("sssd.hf.verify.TreeCache.load", lambda self, cache: 1 / 0)
        options[cache_argument(model)] = DynamicCache()
    for _ in range(4):
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            hf.generate(model, PROMPT, max_nodes=3, **options, **GREEDY)
    assert [store.busy for store in fast.fast_pass(model).stores] == [False]


@pytest.mark.parametrize("first", ["generate", "profile"])
def test_buffers_made_in_inference_mode_serve_everyone(static, first, monkeypatch, tmp_path):
    monkeypatch.setenv("SSSD_CACHE", str(tmp_path))
    model = tiny_model("llama", "sdpa")
    if first == "profile":
        profile(model, batches=(1, 2), widths=(1, 2, 4), contexts=(16, 128), repeats=1)
    else:
        with torch.inference_mode():
            hf.generate(model, PROMPT, max_nodes=7, **GREEDY)
    expected = model.generate(PROMPT, **GREEDY)
    drafter = ScriptedDrafter(expected.tolist(), 64, 0.8)
    assert torch.equal(hf.generate(model, PROMPT, drafter, max_nodes=7, **GREEDY), expected)


@pytest.mark.parametrize("path", ["static", "growing"])
def test_a_fast_path_that_fails_is_left_in_the_middle_of_a_call(path, request, monkeypatch, log):
    """The pass is run again by the model's own forward, and the reason logged once."""
    request.getfixturevalue(path)
    model = tiny_model("llama", "sdpa")
    expected = model.generate(PROMPT, **GREEDY)
    assert fast.fast_pass(model) is not None
    calls, run = [], fast.FastPass.__call__

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("no kernel for this")
        return run(self, *arguments)

    monkeypatch.setattr(fast.FastPass, "__call__", failing)
    for _ in range(2):
        drafter = ScriptedDrafter(expected.tolist(), 64, 0.8)
        assert torch.equal(hf.generate(model, PROMPT, drafter, max_nodes=9, **GREEDY), expected)
    assert len(calls) == 5
    assert [record.getMessage().count("no kernel for this") for record in log.records] == [1]
    # new weights, new luck
    monkeypatch.setattr(fast.FastPass, "__call__", run)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert fast.fast_pass(model) is not None


def test_reported_probabilities_are_rounded_in_float32(static):
    model = tiny_model("llama", "sdpa", vocab_size=4096).to(torch.bfloat16)
    model.lm_head.weight.data.mul_(4)
    assert fast.fast_pass(model) is not None
    with torch.inference_mode():
        passes = started(model, [9], "static")
        trees = block(np.random.default_rng(0), [9], 15, 16)
        logits, answer = launch(passes, trees, accept=True)
        right = logits.float().softmax(-1).gather(-1, torch.from_numpy(answer.topk_ids))
    np.testing.assert_allclose(answer.topk_probs, right.numpy(), rtol=1e-4, atol=1e-6)


def test_fixed_buffers_are_used_again_by_the_next_call_and_not_by_two_at_once(static):
    model = tiny_model("llama", "sdpa")
    with torch.inference_mode():
        first, second = started(model, [9], "static"), started(model, [9, 9], "static")
        assert first.store is not second.store
        store = first.store
        first.close()
        second.close()
        assert started(model, [4], "static").store in (store, second.store, *fast.fast_pass(model).stores)
    assert len(fast.fast_pass(model).stores) == 2


def test_spans_grow_in_few_steps():
    spans = [span_of(slots, 10_000) for slots in range(1, 10_001)]
    assert all(span >= slots or span == 10_000 for slots, span in enumerate(spans, 1))
    assert sorted(set(spans)) == [256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 10_000]


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("right", [0.0, 0.7])
def test_static_output_is_that_of_the_model(static, name, right):
    model = tiny_model(name, "sdpa")
    expected = model.generate(PROMPT, **GREEDY)
    for seed in range(4):
        drafter = WidthSwitcher(expected.tolist(), 64, right, seed)
        assert torch.equal(hf.generate(model, PROMPT, drafter, max_nodes=40, **GREEDY), expected)


def test_static_batches_shrink_and_end_as_the_models_do(static):
    """Rows with padding that stop one after the other, by an end token."""
    model = tiny_model("llama", "sdpa")
    mask = (BATCH != 0).long()
    for end in range(3, 64, 6):
        options = {**GREEDY, "eos_token_id": end}
        expected = model.generate(BATCH, attention_mask=mask, **options)
        texts = [row[(keep == 0).sum() :].tolist() for row, keep in zip(expected, mask, strict=True)]
        drafter = ScriptedDrafter(texts, 64, 0.8)
        result = hf.generate(model, BATCH, drafter, attention_mask=mask, max_nodes=9, **options)
        assert torch.equal(result, expected)


def test_static_sampling_uses_the_models_random_numbers(static):
    model = tiny_model("llama", "sdpa")
    options = {**GREEDY, "do_sample": True}
    torch.manual_seed(1)
    expected = model.generate(PROMPT, **options)
    torch.manual_seed(1)
    drafter = ScriptedDrafter(expected.tolist(), 64, 0.7)
    assert torch.equal(hf.generate(model, PROMPT, drafter, max_nodes=9, **options), expected)


def test_texts_longer_than_the_fixed_buffers_go_on_elsewhere(static, monkeypatch):
    monkeypatch.setattr("sssd.hf.decoder._EXPECTED_TOKENS", 0)
    monkeypatch.setattr("sssd.hf.decoder._TREE_ROOM", 0)
    monkeypatch.setattr("sssd.hf.static._SMALLEST_SPAN", 16)
    model = tiny_model("llama", "sdpa")
    expected = model.generate(PROMPT, **GREEDY)
    drafter = ScriptedDrafter(expected.tolist(), 64, 0.7)
    assert torch.equal(hf.generate(model, PROMPT, drafter, max_nodes=9, **GREEDY), expected)


def test_static_rule_changes_no_token(static):
    model = tiny_model("llama", "sdpa")
    prompt = torch.tensor([[5, 9, 33, 12] * 8])
    expected = model.generate(prompt, **GREEDY)
    for _ in range(3):
        assert torch.equal(hf.generate(model, prompt, **GREEDY), expected)
    ready = CostCurve([1, 2], [1, 64], [0, 1], np.ones((2, 2, 2)), ready=WIDTHS)
    result = hf.generate(model, prompt, cost=ready, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(result.sequences, expected)
    assert result.tokens_per_step > 1.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graph_replay_equals_eager_bit_for_bit():
    from sssd.hf.static import StaticStore

    model = tiny_model("llama", "sdpa").cuda()
    known = fast.fast_pass(model)
    rng = np.random.default_rng(0)
    with torch.inference_mode():
        stores = [StaticStore(known, 2, 256), StaticStore(known, 2, 256, record=lambda function: function)]
        assert sum(stores[0].warm_up(2, WIDTHS[:5], accept) for accept in (True, False)) == 10
        stores[0].stack.zero_()
        lengths = [0, 0]
        for step in range(40):
            width = int(rng.choice(WIDTHS[:5]))
            trees, *rest = block(rng, lengths, width - 1, width)
            for store in stores:
                store.fill(DraftBatch.from_trees(trees), *rest)
            results = [store.launch(lengths, step % 2 == 0)() for store in stores]
            assert torch.equal(results[0][0], results[1][0])
            for a, b in zip(*(chain.from_iterable(store.buffers) for store in stores), strict=True):
                assert torch.equal(a, b)
            lengths = [length + int(rng.integers(1, 4)) for length in lengths]


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


def test_what_is_counted_as_drafted_was_verified():
    """Though the drafter proposed more than the rule let pass."""
    model = tiny_model("llama", "sdpa")
    prompt = torch.tensor([[5, 9, 33, 12] * 8])
    cost = CostCurve(
        [1, 2], [1, 2, 64], [0, 1], np.repeat([[[1, 1.2, 4]]], 2, 0).reshape(2, 3, 1).repeat(2, 2)
    )
    drafter = sssd.Drafter(vocab_size=64)
    result = hf.generate(model, prompt, drafter, cost=cost, return_dict_in_generate=True, **GREEDY)
    counts = drafter.stats["sources"].values()
    drafted, accepted = (sum(source[name] for source in counts) for name in ("drafted", "accepted"))
    assert 0 < accepted <= drafted <= result.drafted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_do_not_depend_on_the_number_of_rows(dtype):
    """Reordered weights give a row the same sums in any company, but for the row that is alone in float32."""
    if not fast.can_reorder(dtype):
        pytest.skip("this processor or torch cannot reorder weights of this type")
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
    assert "LlamaMLP.forward is replaced" in log.records[-1].getMessage()


def other(model):
    return tiny_model("llama", "sdpa", seed=3).model.layers[0].mlp.down_proj.weight.detach()


def down(model):
    return model.model.layers[0].mlp.down_proj


def write(model):
    with torch.no_grad():
        down(model).weight.mul_(-3)


def replace(model):
    down(model).weight = torch.nn.Parameter(down(model).weight * -3)


def load(model):
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def write_data(model):
    down(model).weight.data.copy_(other(model))


def write_one_number(model):
    down(model).weight.data[3, 5] += 2.0


def exchange_rows(model):
    down(model).weight.data[:] = down(model).weight.data.flip(0)


def replace_data(model):
    down(model).weight.data = other(model).clone()


def write_by_numpy(model):
    down(model).weight.detach().numpy()[:] = other(model).numpy()


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    model(PROMPT, labels=PROMPT).loss.backward()
    optimizer.step()


def write_norm(model):
    model.model.norm.weight.data.mul_(torch.linspace(-1, 2, 32))


def replace_norm(model):
    model.model.layers[1].input_layernorm = tiny_model("llama", "sdpa").model.norm
    model.model.layers[1].input_layernorm.weight.data.mul_(torch.linspace(-1, 2, 32))


def write_embedding(model):
    model.model.embed_tokens.weight.data.copy_(model.model.embed_tokens.weight.data.flip(0))


def replace_mlp(model):
    model.model.layers[0].mlp = tiny_model("llama", "sdpa", seed=3).model.layers[0].mlp


def activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def scaling(model):
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.05


def epsilon(model):
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 3.0


def frequencies(model):
    model.model.rotary_emb.inv_freq.mul_(3.0)


def eager(model):
    model.set_attn_implementation("eager")


def adapter(model):
    """A layer like those of adapters, which keeps the weight's name."""

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.05 * x.sum(-1, keepdim=True)

    down(model).__class__ = Adapted


CHANGES = [
    write, replace, load, write_data, write_one_number, exchange_rows, replace_data, write_by_numpy, step,
    write_norm, replace_norm, write_embedding, replace_mlp, activation, scaling, epsilon, frequencies, eager,
    adapter,
]  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_between_calls_is_noticed(change, packed, monkeypatch):
    """With a reordered copy of the weights and, as on a GPU, without one."""
    if not packed:
        monkeypatch.setattr(fast, "_should_pack", lambda model: False)
    model = tiny_model("llama", "sdpa")
    before = model.generate(PROMPT, **GREEDY)
    assert fast.fast_pass(model) is not None
    assert torch.equal(hf.generate(model, PROMPT, max_nodes=4, **GREEDY), before)
    change(model)
    expected = model.generate(PROMPT, **GREEDY)
    if change is not eager:
        assert not torch.equal(expected, before)
    for nodes in (0, 4):
        assert torch.equal(hf.generate(model, PROMPT, max_nodes=nodes, **GREEDY), expected)


@pytest.mark.parametrize("place", ["class", "function", "attention"])
@pytest.mark.parametrize("late", [True, False])
def test_patched_code_is_noticed(place, late, monkeypatch):
    """A class, a function of its module or the attention, replaced before or after the first call.

    By the comparison with the model's own forward too, were the replacement not seen.
    """
    from transformers.models.llama import modeling_llama

    for module in ("contract", "fast"):
        monkeypatch.setattr(f"sssd.hf.{module}.replaced", lambda kinds, attention: None)

    def patch():
        if place == "class":
            forward = modeling_llama.LlamaMLP.forward
            patched = functools.wraps(forward)(lambda self, x: 2 * forward(self, x))
            monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", patched)
        elif place == "function":
            rotate = modeling_llama.apply_rotary_pos_emb
            patched = functools.wraps(rotate)(
                lambda q, k, cos, sin, *rest: rotate(q * 1.5, k, cos, sin, *rest)
            )
            monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", patched)
        else:
            attend = modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]

            def patched(*arguments, **options):
                output, weights = attend(*arguments, **options)
                return output * 1.5, weights

            monkeypatch.setitem(modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", patched)

    model = tiny_model("llama", "sdpa")
    if not late:
        patch()
    before = hf.generate(model, PROMPT, max_nodes=4, **GREEDY)
    if late:
        patch()
    expected = model.generate(PROMPT, **GREEDY)
    assert torch.equal(before, expected) != late
    assert torch.equal(hf.generate(model, PROMPT, max_nodes=4, **GREEDY), expected)


def test_equal_weights_keep_the_copy():
    """Written to, but as they were: nothing is reordered anew."""
    model = tiny_model("llama", "sdpa")
    before = fast.fast_pass(model)
    with torch.no_grad():
        down(model).weight.mul_(1.0)
    assert fast.fast_pass(model) is before


def test_a_model_that_is_no_longer_used_is_freed(static):
    model = tiny_model("llama", "sdpa")
    hf.generate(model, PROMPT, max_new_tokens=4, do_sample=False, pad_token_id=0)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_hook_that_comes_later_is_noticed():
    model = tiny_model("llama", "sdpa")
    assert fast.fast_pass(model) is not None
    handle = model.lm_head.register_forward_hook(lambda module, args, output: -output)
    assert fast.fast_pass(model) is None
    handle.remove()
    assert fast.fast_pass(model) is not None
    assert torch.equal(hf.generate(model, PROMPT, max_nodes=4, **GREEDY), model.generate(PROMPT, **GREEDY))


def test_weights_are_not_doubled_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(fast, "available_bytes", lambda: 0)
    model = tiny_model("llama", "sdpa")
    passes = fast.fast_pass(model)
    assert passes is not None
    assert not passes.packed
    assert torch.equal(hf.generate(model, PROMPT, max_nodes=4, **GREEDY), model.generate(PROMPT, **GREEDY))


@pytest.mark.parametrize("options", [{"max_nodes": 4, "cost": "h100"}, {"cost": 3}, {"max_nodes": "auto"}])
def test_bad_options_are_refused(options):
    with pytest.raises(sssd.errors.InvalidArgumentError):
        hf.generate(tiny_model("llama"), PROMPT, **options)
