"""Every causal language model of transformers: the same tokens as ``model.generate``, drafted or not."""

import pytest

torch = pytest.importorskip("torch")

from architectures import (  # noqa: E402
    CALLS,
    GREEDY,
    TYPES,
    UNDECODABLE,
    build,
    documented,
    examine,
    generate,
    table,
)
from transformers import __version__  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of old models about their own code


@pytest.mark.parametrize("name", [name for name in TYPES if name not in UNDECODABLE])
def test_tokens_are_those_of_generate(name):
    examine(name)


@pytest.mark.parametrize("name", [name for name in TYPES if name in UNDECODABLE])
def test_what_generate_refuses_is_refused_alike(name):
    words, _ = UNDECODABLE[name]
    with pytest.raises(Exception, match=words) as plain:
        build(name)[0].generate(CALLS[0][0], **GREEDY)
    with pytest.raises(plain.type, match=words):
        generate(build(name)[0], *CALLS[0])


def test_the_documentation_says_how_each_is_decoded():
    version, text = documented()
    if version != __version__:
        pytest.skip(f"the table is of transformers {version}")
    assert text == table()
