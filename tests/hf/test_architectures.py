"""Logits of tree verification against uncached passes over every path, for many architectures."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models import ARCHITECTURES, EAGER_ONLY, tiny_model  # noqa: E402
from trees import paths_of, random_tree  # noqa: E402

from sssd import DraftBatch, PassBlock  # noqa: E402
from sssd.hf.contract import cache_argument  # noqa: E402
from sssd.hf.verify import AttentionMasks, TreeCache  # noqa: E402

VOCAB = 64
CASES = [
    (name, attention)
    for name in ARCHITECTURES
    for attention in ("eager", "sdpa")
    if attention == "eager" or name not in EAGER_ONLY
]


def reference(model, token_ids):
    with torch.no_grad():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0, -1]


def verify_rows(model, prompts, rounds, nodes, seed):
    """Runs tree passes over rows of different lengths; returns the largest error of any logit of any node."""
    rng = np.random.default_rng(seed)
    batch, width = len(prompts), max(map(len, prompts))
    padding = torch.tensor([[i >= width - len(p) for i in range(width)] for p in prompts])
    cache = TreeCache(batch, None if bool(padding.all()) else padding)
    masks = AttentionMasks(model)
    rows = [list(p) for p in prompts]
    block, worst = PassBlock(), 0.0
    with torch.no_grad():
        ids = torch.tensor([[3] * (width - len(p)) + list(p) for p in prompts])[:, :-1]
        positions = (padding.long().cumsum(-1) - 1).clamp(min=0)[:, :-1]
        mask = None if cache.padding is None else padding[:, :-1]
        model(
            ids, attention_mask=mask, position_ids=positions, use_cache=True, **{cache_argument(model): cache}
        )
        cache.lengths = [width - 1] * batch
        for _ in range(rounds):
            trees = [random_tree(rng, int(rng.integers(1, nodes + 1)), VOCAB) for _ in rows]
            block.fill(
                DraftBatch.from_trees(trees),
                [row[-1] for row in rows],
                [len(row) - 1 for row in rows],
                mask=True,
            )
            ids, positions, depths = map(torch.from_numpy, (block.ids, block.positions, block.depths))
            logits = model(
                ids,
                attention_mask=masks.build(cache, torch.from_numpy(block.mask), depths),
                position_ids=positions,
                use_cache=True,
                **{cache_argument(model): cache},
            ).logits
            kept, offsets = [], [0]
            for b, tree in enumerate(trees):
                paths = [[], *paths_of(tree)]
                for entry, path in enumerate(paths):
                    expected = reference(model, rows[b] + [int(tree.token_ids[i]) for i in path])
                    worst = max(worst, float((logits[b, entry] - expected).abs().max()))
                path = paths[int(rng.integers(len(paths)))]
                kept += [0, *(i + 1 for i in path)]
                offsets.append(len(kept))
                rows[b] += [*(int(tree.token_ids[i]) for i in path), int(rng.integers(VOCAB))]
            cache.commit(np.array(kept), np.array(offsets))
    return worst


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_tree_logits_equal_plain_logits(name, attention):
    model = tiny_model(name, attention)
    prompt = np.random.default_rng(1).integers(3, VOCAB, 14).tolist()
    # Trees deeper than the window, so that ancestors fall out of it.
    assert verify_rows(model, [prompt], rounds=3, nodes=28, seed=2) < 1e-4


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_tree_logits_with_left_padding_and_rows_at_different_speeds(name, attention):
    model = tiny_model(name, attention)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, VOCAB, n).tolist() for n in (3, 14, 9)]
    assert verify_rows(model, prompts, rounds=4, nodes=9, seed=4) < 1e-4
