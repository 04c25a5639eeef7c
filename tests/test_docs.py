"""What the pages show runs: blocks of Python, page by page, and commands as far as their arguments go."""

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from sssd import DatastoreBuilder, Drafter
from sssd.cli import COMMANDS

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = [5, 6, 7, 8, 9, 5, 6, 7]


def blocks(page):
    """First line, text and shown output (or None) of each block of Python.

    Those after `<!-- not run: REASON -->` are left out.
    """
    text = page.read_text()
    output = r'(?:\n\n```text title="output"\n(.*?)^```$)?'
    for found in re.finditer(
        rf"(<!-- not run: \S.*? -->\n)?^```python\n(.*?)^```${output}", text, re.M | re.S
    ):
        if not found[1]:
            yield text[: found.start(2)].count("\n"), found[2], found[3]


def same(output):
    """An output without what a better predictor changes: probabilities, and how wide they are."""
    return re.sub(r"\d+\.\d+", "#", output)


def readme():
    """A target that repeats a text, a request for a batch, and a model in transformers."""
    torch = pytest.importorskip("torch")
    sys.path.append(str(ROOT / "tests/hf"))
    model = importlib.import_module("models").tiny_model("llama", attention="sdpa")
    inputs = {"input_ids": torch.tensor([TEXT]), "attention_mask": torch.ones(1, len(TEXT), dtype=torch.long)}
    return {
        "prompt_ids": TEXT,
        "longest": 40,
        "verify": lambda _, tree: [8, *(token % 5 + 5 for token in tree.token_ids)],
        "model": model,
        "inputs": {**inputs, "max_new_tokens": 12, "do_sample": False},
        "prompts": [TEXT],
        "token_ids": [8],
        "offsets": [0, 1],
    }


def hardware():
    """A model in transformers, and two requests of a serving engine."""
    names = {**readme(), **serving()}
    return {**names, "ids": names["inputs"]["input_ids"]}


def serving():
    """Two requests, of which the target said three tokens and one, and datastores."""
    folder = Path(tempfile.mkdtemp())
    stores = {"code_store": folder / "code.sssd", "german_store": folder / "de.sssd"}
    for path in stores.values():
        with DatastoreBuilder(path, vocab_size=10) as builder:
            builder.add(TEXT)
    return {
        **stores,
        "V": 10,
        "eos": 2,
        "prompts": [TEXT, TEXT],
        "token_ids": np.array([8, 9, 5, 8]),
        "offsets": [0, 3, 4],
    }


def reading():
    """A folder with a chat, records, and a model's folder."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = Path(tempfile.mkdtemp())
    (folder / "chats.jsonl").write_text(
        '{"chat": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}'
    )
    (folder / "model").mkdir()
    words = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(folder / "model/tokenizer.json"))
    names = {"dataset": [{"chat": None}], "output": folder / "out.sssd", "model_folder": folder / "model"}
    return {"folder": folder, **names}


def corpora():
    """A folder with logs and a model's, and names of folders to make."""
    names = reading()
    logs = names["folder"] / "logs.jsonl"
    logs.write_text("".join(f'{{"id": {number}, "text": "a b a b"}}\n' for number in range(6, 10)))
    made = {"os": os, "logs": logs, "copy": names["folder"] / "copy", "folder": names["folder"] / "corpus"}
    return {**names, **made}


def replicas():
    """A model's vocabulary, and a request."""
    return {"V": 10, "prompt_ids": TEXT, "shared_folder": tempfile.mkdtemp()}


def metrics():
    """Two drafters."""
    pytest.importorskip("prometheus_client")
    pytest.importorskip("opentelemetry")
    return {"drafter": Drafter(), "other": Drafter()}


def rollouts():
    """A vocabulary, a prompt with its first token, and a folder."""
    return {"V": 10, "prompt_ids": TEXT, "token_id": 8, "snapshot_folder": tempfile.mkdtemp()}


NAMES = {
    "README.md": readme,
    "corpora.md": corpora,
    "replicas.md": replicas,
    "rollouts.md": rollouts,
    "reading.md": reading,
    "hardware.md": hardware,
    "serving.md": serving,
    "metrics.md": metrics,
}
"""What a page takes for granted, where it has blocks of Python."""


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=lambda page: page.name)
def test_blocks_of_python_run(page, capsys):
    names = NAMES.get(page.name, dict)()
    shown = 0
    for line, block, output in blocks(page):
        capsys.readouterr()
        exec(compile("\n" * line + block, page, "exec"), names)
        if output is not None:
            shown += 1
            assert same(capsys.readouterr().out) == same(output), f"line {line}"
    assert shown == page.read_text().count('title="output"')
    if page.name == "README.md":
        assert names["output"].equal(names["model"].generate(**names["inputs"]))
        assert len(names["trees"][0]) > 0
    if page.name == "reading.md":
        assert names["built"].summary.tokens == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path):
    """Cell by cell, as a kernel would, which shows what stands last in a cell."""
    notebook = json.loads(path.read_text())
    names, shown = {}, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert not cell["outputs"], "clear the outputs"
        code = ast.parse("".join(cell["source"]), path.name)
        last = code.body.pop() if code.body and isinstance(code.body[-1], ast.Expr) else None
        exec(compile(code, path.name, "exec"), names)
        value = last and eval(compile(ast.Expression(last.value), path.name, "eval"), names)
        if hasattr(value, "_repr_html_"):
            assert "<" in value._repr_html_()
            shown += 1
    assert shown > 0


def commands(page):
    """Every command of a page, from code in the text and in blocks."""
    text = page.read_text()
    for found in re.finditer(r"(?:`|^ *)((?:make|python(?: -m sssd)?) [\w/.-][^`\n]*)(?:`|$)", text, re.M):
        yield shlex.split(re.sub(r"[\[\]]", "", found[1]), comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_and_take_what_is_shown(page, capsys):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for command in commands(page):
        match command:
            case ["make", target, *_]:
                assert target in targets
            case ["python", "-m", "sssd", "COMMAND"]:
                pass
            case ["python", "-m", "sssd", name, *arguments]:
                assert name in COMMANDS
                parser = argparse.ArgumentParser()
                importlib.import_module(f"sssd.cli.{name}").add_arguments(parser)
                # text names a command; a block or a line of its own shows how it is called
                if arguments:
                    try:
                        parser.parse_args(arguments)
                    except SystemExit:
                        pytest.fail(f"{shlex.join(command)}: {capsys.readouterr().err}")
            case ["python", script, *_]:
                assert (ROOT / script).is_file()
            case _:
                pytest.fail(shlex.join(command))


def test_commands_are_found():
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) > 25
    assert ["make", "demo"] in found
    assert any(command[:6] == ["python", "-m", "sssd", "build", "-o", "answers.sssd"] for command in found)


def test_promises_are_numbered_in_order_and_held_by_tests_that_exist():
    text = (ROOT / "docs/guarantees.md").read_text()
    numbers = re.findall(r"^\| ([A-Z])(\d+) \|", text, re.M)
    for letter in dict(numbers):
        found = [int(number) for held, number in numbers if held == letter]
        assert found == list(range(found[0], found[0] + len(found))), letter
    assert len(numbers) > 40

    files = [path for folder in ("tests", "rust", "benches") for path in (ROOT / folder).rglob("*")]
    named = set()
    for row in text.splitlines():
        file = None
        for path, name in re.findall(r"`([\w/-]+\.(?:py|rs))?(?:::(\w+))?`", row):
            file = path or file
            if file:
                named.add((file, name))
    assert len(named) > 60
    for file, name in named:
        paths = [path for path in files if path.as_posix().endswith(f"/{file}")]
        assert paths, file
        defined = rf"\b(def|class|fn) {name}\b" if name else ""
        assert any(re.search(defined, path.read_text()) for path in paths), f"{file}::{name}"
