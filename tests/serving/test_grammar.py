"""A JSON schema cuts drafts before they cost a node, and forced tokens extend them: with llguidance."""

import json

import pytest

from sssd import Drafter

llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed: pip install llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return llguidance.LLTokenizer("byte")


def matcher(tokenizer):
    grammar = llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps(SCHEMA), defaults={"whitespace_flexible": False}
    )
    return llguidance.LLMatcher(tokenizer, grammar)


def rule(state, tokenizer):
    """What the grammar allows after each path, asked with a state that is taken back."""
    import llguidance.numpy as masks

    def allowed(path):
        mask = masks.allocate_token_bitmask(1, tokenizer.vocab_size)
        assert state.consume_tokens(list(path))
        masks.fill_next_token_bitmask(state, mask, 0)
        assert state.rollback(len(path))
        return mask[0]

    return allowed


def replay(answer, grammar, tokenizer, draft):
    """Decodes ``answer`` with drafts, and returns the steps; every node has to fit the grammar."""
    drafter = Drafter(vocab_size=tokenizer.vocab_size, threads=1)
    sequence = drafter.begin(tokenizer.tokenize_str('Say it as {"town": "Oslo", "unit": "C"}.\n'))
    state = matcher(tokenizer)
    position = steps = 0
    while position < len(answer):
        tree = draft(sequence, rule(state, tokenizer)) if grammar else draft(sequence, None)
        path, node = [], -1
        while position + len(path) < len(answer):
            children = [at for at, parent in enumerate(tree.parents) if parent == node]
            agrees = [at for at in children if tree.token_ids[at] == answer[position + len(path)]]
            if not agrees:
                break
            node = agrees[0]
            path.append(int(tree.token_ids[node]))
        if grammar:
            for leaf in range(len(tree)):
                chain, at = [], leaf
                while at >= 0:
                    chain.insert(0, int(tree.token_ids[at]))
                    at = tree.parents[at]
                assert state.validate_tokens(chain) == len(chain)
        new = answer[position : position + len(path) + 1]
        assert state.consume_tokens(new)
        sequence.extend(new)
        position += len(new)
        steps += 1
    return steps


@pytest.mark.parametrize("shape", ["tree", "chain"])
def test_a_schema_cuts_and_extends_drafts(tokenizer, shape):
    answer = tokenizer.tokenize_str('{"city":"Bergen","unit":"fahrenheit"}')

    def draft(sequence, allowed):
        return sequence.draft(12, shape=shape, allowed=allowed)

    free = replay(answer, grammar=False, tokenizer=tokenizer, draft=draft)
    ruled = replay(answer, grammar=True, tokenizer=tokenizer, draft=draft)
    assert ruled < free / 2


def test_forced_tokens_are_certain(tokenizer):
    sequence = Drafter(vocab_size=tokenizer.vocab_size, threads=1).begin(tokenizer.tokenize_str("Answer:"))
    tree = sequence.draft(8, allowed=rule(matcher(tokenizer), tokenizer))
    assert bytes(tree.token_ids.tolist()) == b'{"city":'
    assert tree.probs.tolist() == [1] * 8
