"""The mini store of a call, and of the server: drafts once it is ready, and the model's own output."""

import json
import sys
import threading
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")

from models import tiny_model  # noqa: E402

from sssd import Drafter, hf, mini  # noqa: E402
from sssd.errors import InvalidArgumentError  # noqa: E402

WORDS = ["<unk>", "<end>", *(f"w{i}" for i in range(62))]
PROMPT = torch.tensor([[5, 6, 7]])
OPTIONS = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 63}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its tokenizer."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("world")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tiny_model("llama", "sdpa", vocab_size=64).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>").save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def world(folder, monkeypatch, tmp_path):
    """The model, and what it says, which is the text of the mini store."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    output = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **OPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ModuleType("sssd_mini")
    texts.DIGEST, texts.lines = "0" * 64, lambda: iter([json.dumps({"text": tokenizer.decode(output[0])})])
    monkeypatch.setitem(sys.modules, "sssd_mini", texts)
    monkeypatch.setenv("SSSD_CACHE", str(tmp_path / "cache"))
    for name in ("_ready", "_waiting", "_said"):
        monkeypatch.setattr(mini, name, type(getattr(mini, name))())
    return model, tokenizer, output


def wait():
    for thread in threading.enumerate():
        if thread.name == "sssd-mini":
            thread.join()


def generate(model, **options):
    result = hf.generate(
        model,
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        return_dict_in_generate=True,
        **OPTIONS,
        **options,
    )
    wait()
    return result


def test_later_calls_draft_from_it_and_the_output_is_the_models_own(world):
    model, _, output = world
    plain = generate(model, max_nodes=8, datastore=None)
    assert not mini._ready
    results = [generate(model, max_nodes=8) for _ in range(2)]
    assert all(result.sequences.equal(output) for result in (plain, *results))
    assert results[1].accepted > 12 > plain.accepted
    assert generate(model, max_nodes=8, datastore=None).accepted == plain.accepted
    through = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), custom_generate=hf.generate, **OPTIONS
    )
    assert through.equal(output)


def test_a_drafter_of_ones_own_keeps_what_it_has(world):
    model, _, output = world
    drafter = Drafter(vocab_size=64)
    assert generate(model, max_nodes=8, drafter=drafter).sequences.equal(output)
    assert drafter.datastore is None
    with pytest.raises(InvalidArgumentError, match="not both"):
        generate(model, drafter=drafter, datastore="somewhere")


def test_who_drafts_nothing_builds_nothing(world):
    model, _, output = world
    assert generate(model, max_nodes=0).sequences.equal(output)
    assert not mini._ready


@pytest.mark.parametrize("datastore", ["mini", None])
def test_the_server_has_it_by_default(world, datastore):
    pytest.importorskip("starlette")
    from sssd.server import Engine

    model, tokenizer, _ = world
    engine = Engine(
        model, tokenizer, max_running=1, max_nodes=4, **({} if datastore else {"datastore": None})
    )
    try:
        wait()
        assert (engine.drafter.datastore is not None) == (datastore == "mini")
    finally:
        engine.close()


def test_the_command_waits_for_it(world, folder, capsys):
    from sssd.cli import main

    command = ["generate", str(folder), "--prompt", "w3 w4 w5", "--compare", "--max-new-tokens", "20"]
    said = []
    for more in ([], ["--datastore", "none"]):
        assert not main([*command, "--max-nodes", "8", *more])
        said.append(capsys.readouterr())
    assert "the mini store" in said[0].err
    assert "the mini store" not in said[1].err
    assert len(list(mini.cache_folder().glob("mini/*.sssd"))) == 1
