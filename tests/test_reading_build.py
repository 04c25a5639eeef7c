"""Building, from Python and by command: what may be replaced, chats and templates, tokenizers compared."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sssd.cli import main
from sssd.datastore import Built, Datastore, DatastoreBuilder, build, check_output, check_tokenizer
from sssd.errors import (
    CorpusError,
    EmptyCorpusError,
    InvalidArgumentError,
    OutputError,
    SssdError,
    VocabularyMismatchError,
)
from sssd.reading import ChatTemplate, ReadOptions, load_tokenizer, tokenizer_fingerprint
from sssd.replay import read_trace

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<unk>", "<end>", "<user>", "<bot>", *(f"w{i}" for i in range(40))]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant'] %}{{ raise_exception('only two roles') }}{% endif %}"
    "{{ '<user> ' if message.role == 'user' else '<bot> ' }}"
    "{% generation %}{{ message.content }}{% endgeneration %} <end>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


def made(words: list[str] = WORDS, **changes: Any) -> Any:
    """A tokenizer that splits at white space."""
    found = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    found.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if changes.get("truncation"):
        found.enable_truncation(4)
    if changes.get("padding"):
        found.enable_padding(length=16, pad_id=0, pad_token="<unk>")
    if changes.get("lowercase"):
        found.normalizer = tokenizers.normalizers.Lowercase()
    return found


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def folder(path: Path, tokenizer: Any = None, template: Any = None) -> Path:
    """A model's folder with a tokenizer and perhaps a template."""
    path.mkdir(parents=True, exist_ok=True)
    (tokenizer or made()).save(str(path / "tokenizer.json"))
    if template is not None:
        settings = {"chat_template": template, "bos_token": {"content": "w39 "}, "eos_token": "<end>"}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder(tmp_path / "model")


def counts(built: Built | Path, *texts: str) -> list[int]:
    with Datastore.open(built.path if isinstance(built, Built) else built) as store:
        return [store.count(ids(text)) for text in texts]


class TestOutput:
    def test_what_is_no_datastore_is_never_replaced(self, tmp_path, model):
        corpus = jsonl(tmp_path / "a.jsonl", {"text": "w1 w2"})
        for name, data in (
            ("text", b"precious"),
            ("empty", b""),
            ("cut", bytes.fromhex("8953 5344 0d0a 1a")),
        ):
            path = tmp_path / name
            path.write_bytes(data)
            for force in (False, True):
                with pytest.raises(OutputError, match=f"{name} is there and no datastore"):
                    build(corpus, path, tokenizer=model, force=force)
            assert path.read_bytes() == data
        for path in (tmp_path, Path("/dev/null"), Path("-")):
            with pytest.raises(OutputError, match="name of a file"):
                build(corpus, path, tokenizer=model, force=True)
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]

    def test_datastores_are_replaced_if_that_is_asked_for(self, tmp_path, model):
        corpus, out = jsonl(tmp_path / "a.jsonl", {"text": "w1 w2"}), tmp_path / "out"
        build(corpus, out, tokenizer=model)
        before = out.read_bytes()
        jsonl(corpus, {"text": "w3 w4"})
        with pytest.raises(OutputError, match="--force"):
            build(corpus, out, tokenizer=model)
        assert out.read_bytes() == before
        assert counts(build(corpus, out, tokenizer=model, force=True), "w1 w2", "w3 w4") == [0, 1]
        with pytest.raises(CorpusError, match="not JSON"):
            build([corpus, tmp_path / "bad.jsonl"], out, tokenizer=model, force=True) if jsonl_bad(
                tmp_path
            ) else None
        assert counts(out, "w3 w4") == [1]

    def test_what_comes_while_building_is_not_replaced(self, tmp_path, model):
        out = tmp_path / "out"

        def intrude(name: str, done: int, total: int | None) -> None:
            out.write_bytes(b"precious")

        with pytest.raises(OutputError):
            build([[{"text": "w1"}]], out, tokenizer=model, progress=intrude)
        assert out.read_bytes() == b"precious"

    def test_links_stay_links(self, tmp_path, model):
        link, target = tmp_path / "link", tmp_path / "target"
        link.symlink_to(target)
        assert build([[{"text": "w1"}]], link, tokenizer=model).path == target
        build([[{"text": "w2"}]], link, tokenizer=model, force=True)
        assert link.is_symlink()
        assert counts(target, "w1", "w2") == [0, 1]

    def test_the_output_is_no_input(self, tmp_path, model):
        corpus = tmp_path / "corpus"
        corpus.mkdir()
        jsonl(corpus / "a.jsonl", {"text": "w1"})
        out = corpus / "out.bin"
        for force in (False, True):
            built = build(corpus, out, tokenizer=model, force=force)
            assert built.summary.documents == 1
            assert (str(out), "the output") in built.report.left_out or not force
        with pytest.raises(CorpusError, match="is the output as well"):
            build([corpus / "a.jsonl", out], out, tokenizer=model, force=True)
        with pytest.raises(CorpusError, match="is a datastore, not a corpus"):
            build(out, tmp_path / "other", tokenizer=model)

    def test_paths_that_are_free(self, tmp_path):
        assert check_output(tmp_path / "new", force=False) == tmp_path / "new"
        with pytest.raises(OSError, match="No such file"):
            build([[{"ids": [1]}]], tmp_path / "no/where", vocab_size=4)


def jsonl_bad(path: Path) -> bool:
    (path / "bad.jsonl").write_text('{"text": "w1"}\n{"text"')
    return True


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
        try:
            status = main([*map(str, arguments)])
        except SystemExit as exit:
            status = int(exit.code or 0)
        return (status, *capsys.readouterr())

    def test_the_old_order_says_what_to_write(self, tmp_path, model, capsys):
        a, b = (jsonl(tmp_path / name, {"text": "w1"}) for name in ("a.jsonl", "b.jsonl"))
        before = a.read_bytes()
        store, new = tmp_path / "store", tmp_path / "new"
        build(a, store, tokenizer=model)
        for arguments, wanted in (
            ([a, b, "--tokenizer", model], f"build -o OUT {a} {b} ..."),
            ([a, "--tokenizer", model, b], f"build -o OUT {a} {b} ..."),
            ([a], f"build -o OUT {a} ..."),
            ([new, "--tokenizer", model, a], f"build -o {new} {a} ..."),
            ([store, a, b], f"build -o {store} {a} {b} --force ..."),
            (["new store", a], f"build -o 'new store' {a} ..."),
        ):
            status, out, err = self.run(capsys, "build", *arguments)
            assert (status, out) == (2, "")
            assert "give the file to write with -o; it used to be the first argument" in err
            assert wanted in err
        assert a.read_bytes() == before

    def test_options_stand_anywhere(self, tmp_path, model, capsys):
        a, b = (jsonl(tmp_path / name, {"text": "w1"}) for name in ("a.jsonl", "b.jsonl"))
        out = tmp_path / "out"
        assert self.run(capsys, "build", a, "-o", out, b, "--tokenizer", model)[0] == 0
        assert counts(out, "w1") == [2]

    def test_summary_notes_and_quiet(self, tmp_path, model, capsys):
        data = tmp_path / "data"
        data.mkdir()
        jsonl(
            data / "a.jsonl",
            {"text": "w1 w2"},
            {"text": 3},
            {"text": None},
            {"messages": [{"role": "x", "content": "w3"}]},
        )
        (data / "README.md").write_text("w9")
        command = ("build", "-o", tmp_path / "out", data, "--tokenizer", model)
        status, out, err = self.run(capsys, *command)
        assert (status, out) == (1, "")
        assert err.startswith("error: ")
        assert f"{data}/a.jsonl, line 2: field 'text' must be text, not the number 3" in err
        status, out, err = self.run(capsys, *command, "--skip-bad")
        assert (status, "3 tokens in 2 documents, 1 bad records skipped" in out) == (0, True)
        for note in (
            "left out",
            "README.md",
            "skipped",
            "line 2",
            "1 bad records in all",
            "1 records without text",
        ):
            assert note in err
        assert "x (1)" in err
        status, out, err = self.run(capsys, *command, "--skip-bad", "--quiet", "--force")
        assert (status, err) == (0, "")
        assert "3 tokens" in out

    @pytest.mark.parametrize(
        "rows", [[], [{"text": None}], [{"text": ""}, {"messages": []}], [{"input_ids": []}]]
    )
    def test_nothing_to_build_is_an_error(self, tmp_path, model, capsys, rows):
        jsonl(tmp_path / "a.jsonl", *rows)
        before = sorted(os.listdir(tmp_path))
        command = (
            "build",
            "-o",
            tmp_path / "out",
            tmp_path / "a.jsonl",
            "--tokenizer",
            model,
            "--end-token",
            1,
        )
        status, out, err = self.run(capsys, *command)
        assert (status, out) == (2, "")
        assert "no document in the inputs (1): " in err
        assert sorted(os.listdir(tmp_path)) == before
        trace = self.run(capsys, "replay", tmp_path / "a.jsonl", "--tokenizer", model)
        assert trace[0] in (1, 2)

    def test_all_bad_is_nothing_too(self, tmp_path, model, capsys):
        jsonl(tmp_path / "a.jsonl", {"text": 3}, {"text": 4})
        jsonl(tmp_path / "b.jsonl", {"prompt": "w1", "response": "w2"})
        assert self.run(capsys, "replay", tmp_path / "b.jsonl", "--skip-bad")[0] == 2  # without a tokenizer
        command = (tmp_path / "a.jsonl", "--tokenizer", model, "--skip-bad")
        for start in (("build", "-o", tmp_path / "out"), ("replay",)):
            status, _, err = self.run(capsys, *start, *command)
            assert status == 2
            assert "skipped 2 bad records" in err

    def test_odd_names_are_printed(self, tmp_path, model):
        """Bytes that are no UTF-8, a new line, brackets that rich would take for markup."""
        where = os.fsencode(tmp_path) + b"/caf\xe9\n[red].jsonl"
        with open(where, "wb") as file:
            file.write(b'{"text": "w1"}\n{"text": 3}\n')
        command = [sys.executable, "-m", "sssd", "build", "-o", os.fsencode(tmp_path) + b"/\xe9out", where]
        command += ["--tokenizer", str(model)]
        for more, status in (([], 1), (["--skip-bad"], 0)):
            done = subprocess.run([*command, *more], capture_output=True, check=False)
            assert done.returncode == status, done.stderr
            assert rb"caf\xe9\n[red].jsonl, line 2" in done.stderr
            assert b"Traceback" not in done.stderr


class TestBuild:
    def test_a_function_does_what_the_command_does(self, tmp_path, model):
        jsonl(tmp_path / "a.jsonl", {"text": "w1 w2"}, {"text": "w1 w2"}, {"text": "w3"})
        np.save(tmp_path / "b.npy", np.array([5, 6, 1, 5], np.uint16))
        inputs = [tmp_path / "a.jsonl", str(tmp_path / "b.npy"), [{"input_ids": [7, 8]}]]
        seen: list[tuple[str, int, int | None]] = []
        built = build(
            inputs,
            tmp_path / "one",
            tokenizer=model,
            end_token_id=1,
            deduplicate=True,
            progress=lambda *step: seen.append(step),
        )
        assert (built.summary.tokens, built.summary.documents, built.summary.duplicates) == (8, 4, 2)
        assert {"reading"} <= {step[0] for step in seen} <= {"reading", "indexing"}
        jsonl(tmp_path / "c.jsonl", {"input_ids": [7, 8]})
        arguments = ["a.jsonl", "b.npy", "c.jsonl", "-o", "two", "--tokenizer", "model", "--end-token", "1"]
        done = subprocess.run(
            [sys.executable, "-m", "sssd", "build", *arguments, "--deduplicate"], cwd=tmp_path, check=False
        )
        assert done.returncode == 0
        assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()

    def test_documents_keep_their_order_and_places(self, tmp_path, model):
        rows: list[Any] = [
            {"text": f"w{i % 40}"} if i % 3 else {"input_ids": [i % 40]} for i in range(10_000)
        ]
        built = build([rows], tmp_path / "out", tokenizer=model)
        expected = DatastoreBuilder(
            tmp_path / "expected", vocab_size=44, fingerprint=tokenizer_fingerprint(made())
        )
        for row in rows:
            expected.add(ids(row["text"]) if "text" in row else row["input_ids"])
        expected.finish()
        assert built.path.read_bytes() == (tmp_path / "expected").read_bytes()
        rows[7777] = {"input_ids": [3, 44]}
        with pytest.raises(CorpusError, match="row 7778: token id 44"):
            build([rows], tmp_path / "bad", tokenizer=model)
        report = build([rows], tmp_path / "bad", tokenizer=model, options=ReadOptions(skip_bad=True)).report
        assert (report.bad, report.documents) == (1, 10_000)

    def test_documents_end_with_their_file(self, tmp_path):
        for name in ("a.npy", "b.npy"):
            np.save(tmp_path / name, np.array([2, 3, 1, 4, 5]))
        built = build(
            [tmp_path / "a.npy", tmp_path / "b.npy"], tmp_path / "out", vocab_size=9, end_token_id=1
        )
        assert built.summary.documents == 4
        with Datastore.open(built.path) as store:
            assert (store.count([2, 3, 1]), store.count([5, 2])) == (2, 0)

    def test_missing_arguments(self, tmp_path, model):
        np.save(tmp_path / "a.npy", np.arange(3))
        for inputs, options, message in (
            ([[{"text": "a"}]], {}, "give --vocab-size or --tokenizer"),
            ([[{"text": "a"}]], {"vocab_size": 9}, "give --tokenizer"),
            (tmp_path / "a.npy", {"vocab_size": 9}, "--end-token"),
            ({"text": "a"}, {"vocab_size": 9}, "an input must be"),
            ([[{"text": "a"}]], {"tokenizer": tmp_path}, "no tokenizer.json"),
            ([[{"text": "a"}]], {"tokenizer": model, "end_token_id": 44}, "end token 44 is outside 0..43"),
            ([[{"ids": [1]}]], {"vocab_size": -1}, "vocab_size must be between 1 and 16777216, not -1"),
            ([[{"ids": [1]}]], {"vocab_size": 2**40}, "vocab_size must be"),
            ([[{"ids": [1]}]], {"vocab_size": 9, "max_memory": -1}, "max_memory must be"),
            ([[{"text": "a"}]], {"tokenizer": 3}, "a tokenizer of tokenizers or transformers"),
        ):
            with pytest.raises(InvalidArgumentError, match=message):
                build(inputs, tmp_path / "out", **options)
        with pytest.raises(EmptyCorpusError):
            build([], tmp_path / "out", vocab_size=9)
        assert sorted(os.listdir(tmp_path)) == ["a.npy", "model"]

    def test_memory_does_not_grow_with_the_file(self, tmp_path, model):
        """A gzip file with 200 MB of JSON in one line."""
        code = f"""
import gzip, json, resource, sys
from sssd.reading import *
import itertools
piece = b'{{"text": "' + b"w1 w2 w3 " * 1000 + b'"}}, '
with gzip.open({str(tmp_path / "a.json.gz")!r}, "wb", 1) as file:
    file.write(b"[")
    for _ in range(24_000): file.write(piece)
    file.write(b"1]")
options, report = ReadOptions(skip_bad=True), ReadReport()
records = Records(options, report)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(one,) = find_inputs([{str(tmp_path / "a.json.gz")!r}], options, report)
count = sum(1 for _ in read(one, options, report, records.documents, wanted=()))
assert (count, report.bad) == (24_000, 1), (count, report.bad)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
assert grown < 60, grown
"""
        subprocess.run([sys.executable, "-c", code], check=True)


class TestChats:
    CHAT = (
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3 w4"},
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w6"},
    )
    SHAREGPT = tuple(
        {"from": "human" if message["role"] == "user" else "gpt", "value": message["content"]}
        for message in CHAT
    )

    @pytest.mark.parametrize(
        "row",
        [
            {"messages": CHAT},
            {"conversations": SHAREGPT},
            {"prompt": CHAT[:3], "completion": CHAT[3:]},
            {"prompt": CHAT[:3], "chosen": CHAT, "rejected": CHAT[:2]},
        ],
    )
    def test_answers_are_as_the_model_writes_them(self, tmp_path, row):
        where = folder(tmp_path / "m", template=TEMPLATE)
        path = jsonl(tmp_path / "a.jsonl", row)
        built = build(path, tmp_path / "out", tokenizer=where)
        several = "prompt" not in row
        assert counts(built, "w6 <end>", "w3 w4 <end>", "w5", "<bot>") == [1, int(several), 0, 0]
        whole = build(path, tmp_path / "whole", tokenizer=where, options=ReadOptions(chats="whole"))
        text = "w39 <user> w1 w2 <end> <bot> w3 w4 <end> <user> w5 <end> <bot> w6 <end>"
        assert counts(whole, text) == [1]

    @pytest.mark.parametrize("row", [{"messages": CHAT}, {"conversations": SHAREGPT}])
    def test_requests_are_as_the_model_reads_them(self, tmp_path, row):
        tokenizer = load_tokenizer(folder(tmp_path / "m", template=TEMPLATE))
        first, second = read_trace(jsonl(tmp_path / "a.jsonl", row), tokenizer)
        assert first.prompt_ids.tolist() == ids("w39 <user> w1 w2 <end> <bot>")
        assert first.response_ids.tolist() == ids("w3 w4 <end>")
        assert second.prompt_ids.tolist() == ids(
            "w39 <user> w1 w2 <end> <bot> w3 w4 <end> <user> w5 <end> <bot>"
        )
        assert second.response_ids.tolist() == ids("w6 <end>")

    def test_without_a_template(self, tmp_path, model):
        path = jsonl(tmp_path / "a.jsonl", {"messages": self.CHAT})
        assert counts(build(path, tmp_path / "out", tokenizer=model), "w3 w4", "<end>", "w1") == [1, 0, 0]
        first, _ = read_trace(path, load_tokenizer(model))
        assert first.response_ids.tolist() == ids("w3 w4")

    def test_where_templates_come_from(self, tmp_path):
        where, file = folder(tmp_path / "m", template="nothing"), tmp_path / "t.jinja"
        messages = [{"role": "user", "content": "w1"}]

        def rendered(**options: Any) -> str | None:
            template = load_tokenizer(where, **options).template
            return template and template.render(messages, add_generation_prompt=True)

        assert rendered() == "nothing"
        assert rendered(chat_template="none") is None
        file.write_text("from {{ messages[0].content }} {{ bos_token }}{{ eos_token }}")
        assert rendered(chat_template=str(file)) == "from w1 w39 <end>"
        (where / "chat_template.jinja").write_text("jinja")
        assert rendered() == "jinja"
        (where / "chat_template.jinja").write_bytes(b"\xff\xfe")
        with pytest.raises(InvalidArgumentError, match=r"chat_template\.jinja.*not UTF-8"):
            rendered()
        (where / "chat_template.jinja").unlink()
        several = [{"name": "tools", "template": "tools"}, {"name": "default", "template": "default"}]
        (where / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
        assert rendered() == "default"
        (where / "tokenizer_config.json").write_text("no json")
        with pytest.raises(InvalidArgumentError, match=r"tokenizer_config.json is not JSON"):
            rendered()

    def test_templates_that_refuse_are_named_by_line(self, tmp_path):
        where = folder(tmp_path / "m", template=TEMPLATE)
        good, bad = {"messages": self.CHAT}, {"messages": [{"role": "system", "content": "w1"}, *self.CHAT]}
        path = jsonl(tmp_path / "a.jsonl", good, bad)
        with pytest.raises(
            CorpusError, match=r"a\.jsonl, line 2: the chat template refuses .*only two roles"
        ):
            build(path, tmp_path / "out", tokenizer=where)
        built = build(path, tmp_path / "out", tokenizer=where, options=ReadOptions(skip_bad=True))
        assert (built.report.bad, built.summary.documents) == (1, 2)
        for source in ("{% for %}", "{{ unclosed"):
            with pytest.raises(InvalidArgumentError, match=r"template cannot be read"):
                ChatTemplate(source, {})
        for source in (
            "{{ messages[9].content.x.y }}",
            "{{ ''.__class__.__mro__ }}",
            "{{ messages | nofilter }}",
        ):
            with pytest.raises(SssdError):
                ChatTemplate(source, {}).render([], add_generation_prompt=False)

    def test_templates_that_write_earlier_turns_otherwise(self, tmp_path):
        """Those that leave out what was thought before; those whose prompt opens what the chat has not."""
        thinking = (
            "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}"
            "{% if loop.last or m.role == 'user' %}{{ m.content }}"
            "{% else %}{{ m.content.split(' ')[-1] }}{% endif %}"
            " <end>\n{% endfor %}{% if add_generation_prompt %}<bot> w30 {% endif %}"
        )
        tokenizer = load_tokenizer(folder(tmp_path / "m", template=thinking))
        path = jsonl(tmp_path / "a.jsonl", {"messages": self.CHAT})
        first, second = read_trace(path, tokenizer)
        assert first.response_ids.tolist() == ids("<bot> w3 w4 <end>")
        assert second.prompt_ids.tolist() == ids("<user> w1 w2 <end> <bot> w4 <end> <user> w5 <end>")

    def test_answers_without_a_word(self, tmp_path):
        tokenizer = load_tokenizer(folder(tmp_path / "m", template=TEMPLATE))
        empty = {"role": "assistant", "content": ""}
        path = jsonl(
            tmp_path / "a.jsonl", {"messages": [*self.CHAT, empty]}, {"messages": [self.CHAT[0], empty]}
        )
        assert len(list(read_trace(path, tokenizer))) == 2
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
        tools = load_tokenizer(folder(tmp_path / "t", template="{{ messages | tojson }}"))
        assert len(list(read_trace(jsonl(path, {"messages": [self.CHAT[0], call]}), tools))) == 1

    def test_half_surrogate_pairs_anywhere(self, tmp_path):
        tokenizer = load_tokenizer(folder(tmp_path / "m", template="{{ messages | tojson }}"))
        half = "\ud83d"
        message = {"role": "assistant" + half, "content": "w1 " + half, "name": half}
        path = jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": half}, message]})
        for one in (tokenizer, load_tokenizer(made())):
            (request,) = read_trace(path, one)
            assert len(request.response_ids)
            build(path, tmp_path / "out", tokenizer=one, force=True, options=ReadOptions(chats="whole"))

    def test_templates_know_what_transformers_knows(self):
        source = "{{ messages | tojson }}"
        source += "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}"
        source += "{{ strftime_now('%Y')[:2] }}{% if tools is not none %}tools{% endif %}"
        rendered = ChatTemplate(source, {}).render(
            [{"role": "é", "content": "<"}], add_generation_prompt=False
        )
        assert rendered == '[{"role": "é", "content": "<"}]20'


class TestTokenizers:
    def test_texts_are_taken_whole(self, tmp_path):
        text = " ".join(f"w{i % 40}" for i in range(100))
        rows = [{"text": text}, {"text": "w1"}]
        for changes in ({"truncation": True}, {"padding": True}, {"truncation": True, "padding": True}):
            tokenizer = made(**changes)
            for source in (tokenizer, folder(tmp_path / "m", tokenizer)):
                built = build([rows], tmp_path / "out", tokenizer=source, force=True)
                assert built.summary.tokens == 101
            assert (tokenizer.truncation is None, tokenizer.padding is None) == (
                "truncation" not in changes,
                "padding" not in changes,
            )
            assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(made())

    def test_fingerprints_tell_tokenizers_apart(self, tmp_path):
        other_ids = [*WORDS[:2], *reversed(WORDS[2:])]
        more = made()
        more.add_special_tokens(["<added>"])
        plain = tokenizers.AddedToken("<more>", normalized=False)
        other_more = made()
        other_more.add_tokens([plain])
        words = [*WORDS, "the", "The", "hello,", "HELLO,"]
        kinds = {
            "plain": made(),
            "order": made(other_ids),
            "fewer": made(WORDS[:-1]),
            "added": more,
            "added otherwise": other_more,
            "words": made(words),
            "the same words in small letters": made(words, lowercase=True),
        }
        found = {name: tokenizer_fingerprint(tokenizer) for name, tokenizer in kinds.items()}
        assert len(set(found.values())) == len(found)
        for name, tokenizer in kinds.items():
            for where in ("one", "two/snapshots/revision"):
                loaded = load_tokenizer(folder(tmp_path / where, tokenizer))
                assert loaded.fingerprints[0] == tokenizer_fingerprint(loaded) == found[name]

    def test_transformers_and_tokenizers_agree(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        bpe = trained()
        slow_words = {
            "[UNK]": 0,
            "[CLS]": 1,
            "[SEP]": 2,
            "[PAD]": 3,
            "[MASK]": 4,
            "the": 5,
            "qui": 6,
            "##ck": 7,
        }
        bert = transformers.BertTokenizer(vocab=slow_words)
        for tokenizer in (bpe, bert.backend_tokenizer):
            wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
            wrapped.save_pretrained(tmp_path / "m")
            again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "m")
            found = {
                tokenizer_fingerprint(one)
                for one in (tokenizer, wrapped, again, load_tokenizer(tmp_path / "m"))
            }
            assert len(found) == 1
        legacy = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
        (tmp_path / "vocab.txt").write_text("\n".join(slow_words))
        slow = legacy.BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
        assert tokenizer_fingerprint(slow) == tokenizer_fingerprint(bert)
        assert load_tokenizer(slow).encode("the quick") == load_tokenizer(bert).encode("the quick")

    def test_other_merges_make_another_one(self):
        """The vocabulary is the same, and so are the ids; texts are split otherwise."""
        vocabulary = {"q": 0, "u": 1, "i": 2, "qu": 3, "ui": 4}
        merges = [("q", "u"), ("u", "i")]
        one, other = (
            tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=order))
            for order in (merges, merges[::-1])
        )
        assert one.get_vocab() == other.get_vocab()
        assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)

    def test_stores_and_tokenizers_are_compared(self, tmp_path, capsys):
        one, two = (
            folder(tmp_path / "one"),
            folder(tmp_path / "two", made([*WORDS[:2], *reversed(WORDS[2:])])),
        )
        out = tmp_path / "out"
        build([[{"text": "w1 w2 w3 w4 w5"}]], out, tokenizer=one)
        trace = jsonl(tmp_path / "trace.jsonl", {"prompt": "w1 w2 w3", "response": "w4 w5 w1 w2"})
        with Datastore.open(out) as store:
            check_tokenizer(store, one)
            with pytest.raises(VocabularyMismatchError) as caught:
                check_tokenizer(store, two)
        prints = [tokenizer_fingerprint(load_tokenizer(where)).hex()[:16] for where in (one, two)]
        parts = [str(out), str(two), *prints, "--any-tokenizer", "check_tokenizer=False"]
        assert all(part in str(caught.value) for part in parts)
        curve = "h100-llama-3-8b-roofline"
        for command in (
            ["query", out, "--text", "w1 w2"],
            ["replay", trace, "--datastore", out, "--budgets", "4"],
            ["simulate", trace, "--datastore", out, "--cost", curve, "--batch", "1"],
        ):
            arguments = [*map(str, command), "--tokenizer"]
            assert main([*arguments, str(one)]) == 0
            capsys.readouterr()
            assert main([*arguments, str(two)]) == 1
            err = capsys.readouterr().err
            assert all(part in err for part in parts), err
            assert main([*arguments, str(two), "--any-tokenizer"]) == 0

    def test_stores_that_do_not_say_whose_they_are(self, tmp_path):
        from sssd.reading.tokenizer import vocabulary_fingerprint

        for number, fingerprint in enumerate((None, vocabulary_fingerprint(made()))):
            path = tmp_path / str(number)
            builder = DatastoreBuilder(path, vocab_size=44, fingerprint=fingerprint)
            builder.add([1, 2])
            builder.finish()
            with Datastore.open(path) as store:
                check_tokenizer(store, made())
                if fingerprint:
                    with pytest.raises(VocabularyMismatchError):
                        check_tokenizer(store, made(WORDS[:-1]))

    def test_wrong_files(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(InvalidArgumentError, match=r"tokenizer\.json is no tokenizer"):
            load_tokenizer(tmp_path)
        with pytest.raises(InvalidArgumentError, match=r"no tokenizer\.json at gpt2; give"):
            load_tokenizer("gpt2")


def trained() -> Any:
    """Byte pairs learned from a few words."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    found.train_from_iterator(
        ["the quick brown fox over the lazy dog", "hello world over there"] * 5, trainer
    )
    return found


def test_chats_of_traces_keep_what_was_recorded(tmp_path):
    """Records with ids have their probabilities; those without are texts."""
    row = {"prompt_ids": [1, 2], "response_ids": [3, 4], "topk_ids": [[3, 1], [4, 1]], "prediction_ids": [5]}
    row["topk_probs"] = [[0.5, 0.25], [0.5, 0.25]]
    (request,) = read_trace(jsonl(tmp_path / "a.jsonl", row))
    assert request.topk_ids is not None
    assert request.topk_ids.tolist() == row["topk_ids"]
    assert request.prediction_ids is not None
    assert request.prediction_ids.tolist() == [5]
    for change, part in (
        ({"topk_ids": [[1]]}, "topk_ids and topk_probs must both have shape"),
        ({"topk_ids": [[3, -1], [4, 1]]}, "topk_ids"),
        ({"topk_probs": [["a", 1], [2, 3]]}, "must both have shape"),
        ({"prediction_ids": "x"}, "prediction_ids"),
        ({"prompt_ids": None}, "prompt_ids"),
    ):
        path = jsonl(tmp_path / "b.jsonl", {**row, **change})
        with pytest.raises(CorpusError, match=rf"b\.jsonl, line 1.*{part}"):
            list(read_trace(path))
