"""Every causal language model of transformers: the same tokens as ``model.generate``, drafted or not."""

import pytest

torch = pytest.importorskip("torch")

import architectures  # noqa: E402
from architectures import CALLS, GREEDY, TYPES, UNDECODABLE, build, examine, generate  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of old models about their own code


@pytest.mark.parametrize("name", [name for name in TYPES if name not in UNDECODABLE])
def test_tokens_are_those_of_generate(name):
    examine(name)


@pytest.mark.parametrize("name", [name for name in TYPES if name in UNDECODABLE])
def test_what_generate_refuses_is_refused_alike(name):
    error, words, _ = UNDECODABLE[name]
    with pytest.raises(error, match=words):
        build(name)[0].generate(CALLS[0][0], **GREEDY)
    with pytest.raises(error, match=words):
        generate(build(name)[0], *CALLS[0])
