"""``sssd.sglang`` under the NGRAM worker: its own source (`make sglang`), and a few lines in its place."""

import ast
import inspect
import os
from array import array
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sssd.errors import InvalidArgumentError
from sssd.sglang import NgramCorpus, _see_requests, plugin

SOURCE = Path(os.environ.get("SSSD_SGLANG_SOURCE", "nowhere")) / "sglang/srt"
needs_source = pytest.mark.skipif(not SOURCE.is_dir(), reason="needs SGLang's source: make sglang")
WIDTH, TAIL = 12, 18


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    monkeypatch.delenv("SSSD_SGLANG", raising=False)


def prepare(worker, batch):
    """Hands over the ends of requests, as ``NGRAMWorker._prepare_draft_tokens`` does."""
    tails, totals = [], []
    for place, request in enumerate(batch.reqs):
        late = []
        if worker.enable_overlap:
            start = place * worker.draft_token_num
            late = batch.spec_info.accept_tokens[start : start + batch.spec_info.accept_lens[place]].tolist()
        row = [*request.origin_input_ids_unpadded, *request.output_ids, *late]
        tails.append(row[-worker.max_trie_depth :])
        totals.append(len(row))
    return worker.ngram_corpus.batch_get([request.rid for request in batch.reqs], tails, totals)


def links(mask, count, width):
    """Each node's first child and next sibling, as ``_derive_tree_links``."""
    tree = mask.reshape(count, width, width)
    child, sibling = np.full((count, width), -1), np.full((count, width), -1)
    for row in range(count):
        for node in range(width - 1, 0, -1):
            parent = max(above for above in range(node) if tree[row, node, above])
            sibling[row, node], child[row, parent] = child[row, parent], node
    return child, sibling


def from_source():
    """The same two of SGLang's own source; nothing of it is imported."""
    torch = pytest.importorskip("torch")
    tree = ast.parse((SOURCE / "speculative/ngram_worker.py").read_text())
    worker = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "NGRAMWorker")
    wanted = {"_prepare_draft_tokens", "_efficient_concat_last_n", "_derive_tree_links"}
    found = [node for node in [*tree.body, *worker.body] if getattr(node, "name", None) in wanted]
    assert {node.name for node in found} == wanted
    names = {"np": np, "torch": torch, "List": list, "ScheduleBatch": object}
    exec(compile(ast.Module(found, []), "ngram_worker", "exec"), names)

    def prepared(worker, batch):
        worker._efficient_concat_last_n = lambda *given: names["_efficient_concat_last_n"](worker, *given)
        return names["_prepare_draft_tokens"](worker, batch)

    return prepared, names["_derive_tree_links"]


def request(rid, text, at, **params):
    return SimpleNamespace(
        rid=rid,
        origin_input_ids_unpadded=array("q", text[: at - 1]),
        output_ids=array("q", text[at - 1 : at]),
        sampling_params=SimpleNamespace(custom_params=params or None),
        lora_id=None,
        at=at,
        last=[],
        text=text,
    )


def decode(corpus, requests, steps, *, overlap=False, how=(prepare, links)):
    """Decodes known texts and checks every tree; returns tokens accepted per step."""
    import torch

    worker = SimpleNamespace(
        draft_token_num=WIDTH, max_trie_depth=TAIL, enable_overlap=overlap, ngram_corpus=corpus
    )
    accepted = taken = 0
    for _ in range(steps):
        batch = SimpleNamespace(reqs=requests, grammar_needs_sync=lambda: False)
        if overlap:  # the last step's tokens are not in the output yet
            tokens = torch.zeros(len(requests) * WIDTH, dtype=torch.int64)
            for place, one in enumerate(requests):
                tokens[place * WIDTH : place * WIDTH + len(one.last)] = torch.tensor(
                    one.last, dtype=torch.int64
                )
            lengths = torch.tensor([len(one.last) for one in requests])
            batch.spec_info = SimpleNamespace(accept_tokens=tokens, accept_lens=lengths)
        drafts, mask = _see_requests(how[0], worker, batch)
        assert (drafts.dtype, mask.dtype) == (np.int64, np.bool_)
        child, sibling = how[1](mask, len(requests), WIDTH)
        for place, one in enumerate(list(requests)):
            ids = drafts.reshape(-1, WIDTH)[place]
            ancestors = mask.reshape(-1, WIDTH, WIDTH)[place]
            assert ids[0] == one.text[one.at - 1]
            if one.rid in corpus.requests:
                assert corpus.requests[one.rid].token_ids.tolist() == one.text[: one.at]
            assert not np.triu(ancestors, 1).any()
            assert ancestors.diagonal().all()
            assert ancestors[:, 0].all()
            node, got = 0, []
            while one.at + len(got) < len(one.text) - 1:
                node = int(child[place, node])
                while node != -1 and ids[node] != one.text[one.at + len(got)]:
                    node = int(sibling[place, node])
                if node == -1:
                    break
                got.append(int(ids[node]))
            got.append(one.text[one.at + len(got)])
            taken, accepted = taken + 1, accepted + len(got) - 1
            one.output_ids.extend(one.last if overlap else got)
            one.last, one.at = got, one.at + len(got)
            if one.at >= len(one.text) - 1:
                requests.remove(one)
                corpus.erase_match_state([one.rid])
        if not requests:
            break
    return accepted / taken


def texts(seed, count):
    random = np.random.default_rng(seed)
    for number in range(count):
        base = random.integers(3, 60, 25).tolist()
        start = (base * 4)[: 40 + number % 30]
        yield start + random.integers(3, 60, 5).tolist() + base * 3


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "how", [lambda: (prepare, links), pytest.param(from_source, marks=needs_source)], ids=["here", "source"]
)
def test_trees_are_what_the_worker_verifies(how, overlap):
    corpus = NgramCorpus(draft_token_num=WIDTH, max_trie_depth=TAIL, match_type="BFS")
    requests = [request(f"r{number}", text, 46) for number, text in enumerate(texts(5, 12))]
    assert decode(corpus, requests, 200, overlap=overlap, how=how()) > 4
    assert (corpus.failed, corpus.rebuilt, len(corpus.requests)) == (0, 0, 0)
    assert corpus.drafter.live_tokens > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_that_run_already_are_taken_over_whole(overlap):
    requests = [request(f"r{number}", text, 46) for number, text in enumerate(texts(5, 6))]
    decode(NgramCorpus(draft_token_num=WIDTH, max_trie_depth=TAIL), requests, 3, overlap=overlap)
    corpus = NgramCorpus(draft_token_num=WIDTH, max_trie_depth=TAIL)
    assert decode(corpus, requests, 200, overlap=overlap) > 4
    assert (corpus.failed, corpus.rebuilt) == (0, 0)


def test_requests_that_were_not_seen_begin_with_their_ends():
    corpus = NgramCorpus(draft_token_num=WIDTH)
    for total in (5, 6, 50, 51, 3):
        ids, mask = corpus.batch_get(["a"], [[1, 2, 1, 2, 1]], [total])
        assert ids.shape == (WIDTH,)
        assert mask.shape == (WIDTH * WIDTH,)
    assert corpus.failed == 0


def test_errors_cost_drafts_and_nothing_else(caplog, monkeypatch):
    corpus = NgramCorpus(draft_token_num=4)
    monkeypatch.setattr(corpus, "_draft", lambda *given: 1 / 0)
    for _ in range(2):
        ids, mask = corpus.batch_get(["a", "b"], [[5], [6, 7]], [1, 2])
    assert ids.tolist() == [5, 0, 0, 0, 7, 0, 0, 0]
    alone = np.eye(4, dtype=bool)
    alone[:, 0] = True
    assert (mask.reshape(2, 4, 4) == alone).all()
    assert corpus.failed == 2
    assert len(caplog.records) == 1


def test_memory_and_settings(monkeypatch):
    monkeypatch.setenv("SSSD_SGLANG", '{"max_bytes": "2M", "live_bytes": "1M", "learn": false}')
    corpus = NgramCorpus(draft_token_num=WIDTH)
    requests = [
        request(f"r{number}", [*range(100, 4000), *text], 3960) for number, text in enumerate(texts(1, 8))
    ]
    decode(corpus, requests, 30)
    assert corpus.failed == 0
    assert corpus.drafter.memory["used"] <= 2 << 20
    assert corpus.drafter.live_tokens == 0
    monkeypatch.setenv("SSSD_SGLANG", '{"speed": 9}')
    with pytest.raises(InvalidArgumentError, match="speed"):
        NgramCorpus()


def test_predictions_and_namespaces():
    corpus = NgramCorpus(draft_token_num=WIDTH)
    text = np.random.default_rng(3).integers(0, 1000, 200).tolist()
    plain = decode(corpus, [request("a", text, 20, sssd_namespace="x")], 300)
    told = decode(corpus, [request("b", text, 20, sssd_prediction=text[20:], sssd_namespace="y")], 300)
    again = decode(corpus, [request("c", text, 20, sssd_namespace="x")], 300)
    assert plain < 1 < min(told, again)
    for wrong in ([], "text", [0.5], [[1]], {"a": 1}):
        decode(corpus, [request(f"wrong {wrong}", text, 20, sssd_prediction=wrong)], 2)
    assert corpus.failed == 0


def test_external_corpora_are_matched_until_they_are_removed():
    corpus = NgramCorpus(draft_token_num=WIDTH, external_corpus_max_tokens=300)
    text = np.random.default_rng(4).integers(0, 1000, 200).tolist()

    def gain(name):
        return decode(corpus, [request(name, text, 20, sssd_namespace=name)], 300)

    before = gain("before")
    loaded = corpus.load_external_corpus_named("c", [text[:100], text[90:]])
    corpus.commit_external_corpus_load("c", loaded)
    assert corpus.list_external_corpora() == {"c": 210}
    assert corpus.remaining_token_budget == 90
    assert gain("with") > 3 > 1 > before
    for name, chunks in (("c", [[1]]), ("", [[1]]), ("d", [text])):
        with pytest.raises(ValueError, match=r"corpus|corpora"):
            corpus.load_external_corpus_named(name, chunks)
    corpus.remove_external_corpus("c")
    corpus.remove_external_corpus("never there")
    assert gain("after") < 1
    assert corpus.remaining_token_budget == 300
    corpus.reset()
    assert (corpus.drafter.live_tokens, corpus.failed) == (0, 0)


def test_nothing_is_hooked_unless_it_is_asked_for(monkeypatch):
    for value in ("", "0", " "):
        monkeypatch.setenv("SSSD_SGLANG", value)
        plugin()  # or it would import SGLang


def functions(path, name=None):
    """Functions of a file of SGLang's, or of a class in it, by name."""
    body = ast.parse((SOURCE / path).read_text()).body
    if name is not None:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


@needs_source
def test_the_interface_is_that_of_the_source():
    own = {name: part for name, part in vars(NgramCorpus).items() if inspect.isfunction(part)}
    theirs = functions("speculative/cpp_ngram/ngram_corpus.py", "NgramCorpus")
    worker = ast.parse((SOURCE / "speculative/ngram_worker.py").read_text())
    used = {
        node.attr
        for node in ast.walk(worker)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "ngram_corpus"
    }
    assert used
    assert used <= set(dir(NgramCorpus))
    for name in used & own.keys():
        arguments = [argument.arg for argument in theirs[name].args.args]
        assert list(inspect.signature(own[name]).parameters) == arguments
    init = {argument.arg for argument in theirs["__init__"].args.args}
    assert {"max_trie_depth", "draft_token_num", "external_corpus_max_tokens"} <= init
    assert "register" in functions("plugins/hook_registry.py", "HookRegistry")
    assert '"sglang.srt.plugins"' in (SOURCE / "plugins/__init__.py").read_text()
    assert "_prepare_draft_tokens" in functions("speculative/ngram_worker.py", "NGRAMWorker")
    assert "NgramCorpus" in {
        alias.name for node in worker.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_the_mini_store_is_that_of_the_requests_tokenizer(monkeypatch, tmp_path):
    import sssd.sglang

    attached = []
    monkeypatch.setattr(sssd.sglang, "attach", lambda drafter, load: attached.append((drafter, load)))
    monkeypatch.setattr(sssd.sglang, "_load_tokenizer", lambda name: f"loaded {name}")
    corpus = NgramCorpus(draft_token_num=WIDTH)
    corpus.see([SimpleNamespace(rid="a", tokenizer=None)])
    assert attached == []
    for _ in range(2):
        corpus.see([SimpleNamespace(rid="b", tokenizer=SimpleNamespace(name_or_path="model"))])
    ((drafter, load),) = attached
    assert drafter == corpus.drafter
    assert load() == "loaded model"
    monkeypatch.setenv("SSSD_SGLANG", '{"datastore": null}')
    NgramCorpus(draft_token_num=WIDTH).see([SimpleNamespace(rid="b", tokenizer=load)])
    assert len(attached) == 1


def test_external_corpora_stand_beside_the_mini_store(tmp_path):
    from sssd import DatastoreBuilder

    with DatastoreBuilder(tmp_path / "mini.sssd", vocab_size=64) as builder:
        builder.add([1, 2, 3])
    corpus = NgramCorpus(draft_token_num=WIDTH)
    corpus.drafter.reopen(tmp_path / "mini.sssd")
    corpus.load_external_corpus_named("more", [[4, 5, 6]])
    assert set(corpus.drafter.datastores) == {"", "more"}
    corpus.remove_external_corpus("more")
    assert set(corpus.drafter.datastores) == {""}
