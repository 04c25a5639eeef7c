"""A datastore of a call: drafts from it, the model's own output, and no other tokenizer's tokens."""

import pytest

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")

from models import tiny_model  # noqa: E402

import sssd  # noqa: E402
from sssd import hf  # noqa: E402
from sssd.cli import main  # noqa: E402
from sssd.datastore import build  # noqa: E402
from sssd.errors import InvalidArgumentError, VocabularyMismatchError  # noqa: E402

WORDS = ["<unk>", "<end>", *(f"w{i}" for i in range(62))]
OPTIONS = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 63}


def tokenizer(words):
    from transformers import PreTrainedTokenizerFast

    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model in a folder with its tokenizer, its answer to a prompt, stores of that by two tokenizers."""
    folder = tmp_path_factory.mktemp("world")
    mine, other = tokenizer(WORDS), tokenizer([*WORDS[:2], *reversed(WORDS[2:])])
    tiny_model("llama", "sdpa", vocab_size=64).save_pretrained(folder / "model")
    mine.save_pretrained(folder / "model")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    prompt = torch.tensor([[5, 6, 7]])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **OPTIONS)
    text = mine.decode(output[0])
    stores = {}
    for name, one in (("mine", mine), ("other", other)):
        stores[name] = build([[{"text": text}]], folder / name, tokenizer=one).path
    return {
        "model": model,
        "prompt": prompt,
        "output": output,
        "mine": mine,
        "other": other,
        "stores": stores,
    }


def generate(world, store, **options):
    return hf.generate(
        world["model"],
        world["prompt"],
        attention_mask=torch.ones_like(world["prompt"]),
        max_nodes=8,
        datastore=world["stores"].get(store, store),
        return_dict_in_generate=True,
        **OPTIONS,
        **options,
    )


def test_drafts_come_from_the_store_and_the_output_is_the_models_own(world):
    result = generate(world, "mine")
    assert result.sequences.equal(world["output"])
    assert result.accepted > 12
    with sssd.Datastore.open(world["stores"]["mine"]) as store:
        assert generate(world, store).accepted == result.accepted
    output = world["model"].generate(
        world["prompt"],
        attention_mask=torch.ones_like(world["prompt"]),
        custom_generate=hf.generate,
        datastore=world["stores"]["mine"],
        **OPTIONS,
    )
    assert output.equal(world["output"])


def test_stores_of_another_tokenizer_are_refused(world):
    with pytest.raises(VocabularyMismatchError, match=r"tokenizer\.json .fingerprint"):
        generate(world, "other")
    with pytest.raises(VocabularyMismatchError, match="check_tokenizer=False"):
        generate(world, "mine", tokenizer=world["other"])
    assert generate(world, "other", tokenizer=world["other"]).sequences.equal(world["output"])
    for given in (None, world["mine"]):
        result = generate(world, "other", check_tokenizer=False, tokenizer=given)
        assert result.sequences.equal(world["output"])


def test_stores_of_a_drafter_are_compared_too(world):
    def generate_with(drafter, **options):
        return hf.generate(
            world["model"],
            world["prompt"],
            drafter=drafter,
            attention_mask=torch.ones_like(world["prompt"]),
            max_nodes=8,
            **OPTIONS,
            **options,
        )

    mine = sssd.Drafter(datastore={"answers": world["stores"]["mine"]})
    other = sssd.Drafter(datastore=world["stores"]["other"])
    assert generate_with(mine).equal(world["output"])
    with pytest.raises(VocabularyMismatchError, match="check_tokenizer=False"):
        generate_with(other)
    with pytest.raises(VocabularyMismatchError, match="check_tokenizer=False"):
        generate_with(mine, tokenizer=world["other"])
    assert generate_with(other, check_tokenizer=False).equal(world["output"])


def test_a_model_from_nowhere_is_not_compared(world, monkeypatch):
    monkeypatch.setattr(world["model"].config, "_name_or_path", "")
    monkeypatch.setattr(world["model"], "name_or_path", "")
    assert generate(world, "other").sequences.equal(world["output"])
    for name in ("some/model", "not a name!", "/nowhere"):
        monkeypatch.setattr(world["model"], "name_or_path", name)
        assert generate(world, "other").sequences.equal(world["output"])


def test_a_drafter_has_a_store_of_its_own(world):
    with pytest.raises(InvalidArgumentError, match="drafter or datastore"):
        generate(world, "mine", drafter=sssd.Drafter())
    with pytest.raises(FileNotFoundError):
        generate(world, "nothing")


def test_the_command(world, capsys):
    folder = str(world["model"].name_or_path)
    prompt = world["mine"].decode(world["prompt"][0])
    command = [
        "generate",
        folder,
        "--prompt",
        prompt,
        "--max-new-tokens",
        "12",
        "--max-nodes",
        "8",
        "--compare",
    ]
    for store, more, status in (("mine", [], 0), ("other", [], 1), ("other", ["--any-tokenizer"], 0)):
        assert main([*command, "--datastore", str(world["stores"][store]), *more]) == status
        out, err = capsys.readouterr()
        assert ("All 12 tokens equal" in out) == (status == 0)
        assert ("--any-tokenizer" in err) == (status == 1)
