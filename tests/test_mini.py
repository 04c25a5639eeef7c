"""The mini store: built once for a tokenizer, in the background, and never in anybody's way."""

import importlib
import json
import logging
import os
import re
import stat
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from threading import Event
from types import ModuleType

import pytest

from sssd import Datastore, DatastoreBuilder, Drafter, mini
from sssd.cli import main
from sssd.errors import InvalidArgumentError, OutputError
from sssd.mini import attach, build_mini, mini_store
from sssd.options import Options
from sssd.reading import tokenizer_fingerprint

tokenizers = pytest.importorskip("tokenizers")
ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "packages/mini"
WORDS = ["<unk>", *(f"w{i}" for i in range(1, 41))]
TEXTS = ["w1 w2 w3 w4 w5 w6", "w7 w8 w9 w10 w11"]
needs_traces = pytest.mark.skipif(not (ROOT / "../shared/traces").is_dir(), reason="needs ../shared/traces")


@pytest.fixture
def texts(monkeypatch, tmp_path):
    """A text of two documents, and a cache of one's own."""
    module = ModuleType("sssd_mini")
    module.DIGEST, module.lines = "0" * 64, lambda: iter(json.dumps({"text": text}) for text in TEXTS)
    monkeypatch.setitem(sys.modules, "sssd_mini", module)
    monkeypatch.setenv("SSSD_CACHE", str(tmp_path / "cache"))
    for name in ("_ready", "_waiting", "_said"):
        monkeypatch.setattr(mini, name, type(getattr(mini, name))())
    return module


@pytest.fixture
def tokenizer(tmp_path):
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "w40"}')
    return path


@pytest.fixture
def made(monkeypatch):
    """The files that are built."""
    found = []
    make = mini._make
    monkeypatch.setattr(mini, "_make", lambda path, loaded: (found.append(path), make(path, loaded)))
    return found


def contents(path):
    with Datastore.open(path) as store:
        return [ids.tolist() for ids in store.documents()]


def drafts(sequence):
    return sequence.draft(8).token_ids.tolist()


def test_a_store_is_built_once_for_a_tokenizer(texts, tokenizer, made):
    path = mini_store(tokenizer)
    assert contents(path) == [[1, 2, 3, 4, 5, 6, 40], [7, 8, 9, 10, 11, 40]]
    assert mini_store(tokenizer.parent) == path
    assert made == [path]
    other = tokenizers.Tokenizer.from_file(str(tokenizer))
    other.add_tokens(["more"])
    assert mini_store(other) != path
    texts.DIGEST = "1" * 64  # another release of the text
    assert mini_store(tokenizer) != path
    assert len(made) == 3
    unended = mini_store(tokenizers.Tokenizer.from_file(str(tokenizer)))
    assert contents(unended) == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]


def test_only_the_owner_reads_it_and_nothing_else_is_left(texts, tokenizer):
    path = mini_store(tokenizer)
    path.unlink()
    for name in (f"{path.stem}.1.tmp", f".{path.stem}.1.tmp.a.tmp"):  # of a process that was killed
        (path.parent / name).touch()
    assert mini_store(tokenizer) == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".lock", ".sssd"]


@pytest.mark.parametrize("damage", [b"", b"no store", None])
def test_what_is_there_and_no_such_store_is_replaced(texts, tokenizer, made, damage):
    path = mini_store(tokenizer)
    if damage is None:
        path.unlink()
        with DatastoreBuilder(path, vocab_size=41) as builder:  # of nobody's tokenizer
            builder.add([1])
    else:
        path.write_bytes(damage)
    assert mini_store(tokenizer) == path
    assert len(contents(path)) == 2
    assert len(made) == 2


def test_a_build_that_fails_leaves_nothing(texts, tokenizer):
    texts.lines = lambda: iter(['{"text": "w1"}', "no JSON"])
    with pytest.raises(ValueError, match="Expecting value"):
        mini_store(tokenizer)
    assert not [
        file for file in (Path(os.environ["SSSD_CACHE"]) / "mini").iterdir() if file.suffix != ".lock"
    ]


def test_those_who_come_meanwhile_wait(texts, tokenizer, made):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(mini_store, [tokenizer] * 4))
    assert made == [*paths]


def test_two_processes_build_one(texts, tokenizer, tmp_path):
    (tmp_path / "sssd_mini.py").write_text(
        f"DIGEST = {'0' * 64!r}\nimport json, time\n"
        f"def lines():\n    time.sleep(1)\n    return iter(json.dumps({{'text': t}}) for t in {TEXTS!r})\n"
    )
    code = (
        "import logging, sys; logging.basicConfig(level='INFO', stream=sys.stdout)\n"
        "from sssd.mini import mini_store; mini_store(sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, "-c", code, str(tokenizer)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = "".join(one.communicate()[0] for one in running)
    assert [one.returncode for one in running] == [0, 0]
    assert said.count("tokenizing the mini store") == 1


def test_drafts_match_it_from_when_it_is_ready(texts, tokenizer, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "sssd.mini")
    go, make = Event(), mini._make
    monkeypatch.setattr(mini, "_make", lambda *arguments: (go.wait(30), make(*arguments)))
    first, second = Drafter(vocab_size=41), Drafter(vocab_size=41)
    sequence = first.begin([0, 1, 2])
    assert drafts(sequence) == []
    (thread,) = {attach(one, tokenizer) for one in (first, second)}
    go.set()
    thread.join()
    assert drafts(sequence)[:2] == [3, 4]
    assert drafts(second.begin([7, 8]))[:1] == [9]
    third = Drafter(vocab_size=41)
    assert attach(third, tokenizer) is None  # known by now
    assert drafts(third.begin([7, 8]))[:1] == [9]
    assert [text for text in caplog.messages if "switches it off" in text]
    assert sum("tokenizing" in text for text in caplog.messages) == 1


def test_a_call_may_give_the_tokenizer(texts, tokenizer):
    drafter = Drafter(vocab_size=41)
    attach(drafter, lambda: tokenizers.Tokenizer.from_file(str(tokenizer))).join()
    assert drafter.datastore is not None


def test_nobody_waits_for_it(texts, tokenizer, monkeypatch):
    go, make = Event(), mini._make
    monkeypatch.setattr(mini, "_make", lambda *arguments: (go.wait(30), make(*arguments)))
    drafter = Drafter(vocab_size=41)
    thread = attach(drafter, tokenizer)
    assert drafts(drafter.begin([1, 2])) == []
    assert thread.is_alive()
    go.set()
    thread.join()
    assert drafter.datastore is not None


def test_a_forked_child_makes_its_own(texts, tokenizer, monkeypatch):
    drafter = Drafter(vocab_size=41)
    go, make = Event(), mini._make
    monkeypatch.setattr(mini, "_make", lambda *arguments: (go.wait(30), make(*arguments)))
    thread = attach(drafter, tokenizer)
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a child
    other = attach(Drafter(vocab_size=41), tokenizer)
    assert other is not thread
    go.set()
    thread.join()
    other.join()


def test_a_datastore_stays(texts, tokenizer, tmp_path):
    with DatastoreBuilder(tmp_path / "own.sssd", vocab_size=41) as builder:
        builder.add([1, 2, 30])
    drafter = Drafter(datastore=tmp_path / "own.sssd")
    attach(drafter, tokenizer).join()
    assert drafts(drafter.begin([1, 2])) == [30]


@pytest.mark.parametrize("trouble", ["cache", "tokenizer", "vocabulary"])
def test_trouble_costs_the_store_and_is_said_once(texts, tokenizer, tmp_path, monkeypatch, caplog, trouble):
    if trouble == "cache":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SSSD_CACHE", str(tmp_path / "file"))
    given = tmp_path / "nowhere" if trouble == "tokenizer" else tokenizer
    for _ in range(2):
        drafter = Drafter(vocab_size=5 if trouble == "vocabulary" else 41)
        thread = attach(drafter, given)
        if thread is not None:
            thread.join()
        assert drafter.datastore is None
    assert sum("goes without its mini store" in text for text in caplog.messages) == 1


def test_a_cache_that_was_emptied_is_filled_again(texts, tokenizer):
    path = mini_store(tokenizer)
    attach(Drafter(vocab_size=41), tokenizer).join()
    path.unlink()
    drafter = Drafter(vocab_size=41)
    attach(drafter, tokenizer).join()
    assert drafter.datastore is not None


def test_without_the_package_there_is_none(tokenizer):
    drafter = Drafter(vocab_size=41)
    assert attach(drafter, tokenizer) is None
    assert drafter.datastore is None
    with pytest.raises(InvalidArgumentError, match=re.escape("pip install 'sssd[mini]'")):
        mini_store(tokenizer)


def test_engines_have_it_by_default(monkeypatch):
    monkeypatch.delenv("SSSD_ENGINE", raising=False)
    assert Options.read("SSSD_ENGINE").datastore == "mini"
    assert Options().drafter().datastore is None  # whoever knows the tokenizer attaches it
    monkeypatch.setenv("SSSD_ENGINE", '{"datastore": null}')
    assert Options.read("SSSD_ENGINE").datastore is None


def test_commands_write_its_text_and_build_it(texts, tokenizer, tmp_path, capsys):
    out = tmp_path / "text.jsonl"
    assert not main(["corpus", "export", "--mini", str(out)])
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"text": text} for text in TEXTS]
    assert not main(["corpus", "export", "--mini", "-"])
    assert capsys.readouterr().out == out.read_text()
    assert main(["corpus", "export", "--mini", str(out)]) == 1  # is there already
    assert main(["corpus", "export"]) == 2
    store = tmp_path / "mini.sssd"
    build = ["build", "-o", str(store), "--tokenizer", str(tokenizer), "--quiet"]
    assert not main([*build, "--mini"])
    assert contents(store) == contents(mini_store(tokenizer))
    more = tmp_path / "more.jsonl"
    more.write_text('{"text": "w20"}\n')
    assert not main([*build, "--mini", "--force", "--end-token", "0", str(more)])
    assert contents(store) == [[20, 0], [1, 2, 3, 4, 5, 6, 0], [7, 8, 9, 10, 11, 0]]
    assert main(build) == 2
    loaded = tokenizers.Tokenizer.from_file(str(tokenizer))
    built = build_mini(store, tokenizer=loaded, force=True)
    assert built.summary.tokens == 11
    with pytest.raises(OutputError):
        build_mini(store, tokenizer=loaded)
    with Datastore.open(store) as opened:
        assert opened.info.files[0].fingerprint == tokenizer_fingerprint(loaded)


def test_commands_take_it_for_a_datastore(texts, tokenizer, tmp_path, monkeypatch, capsys):
    trace, figures = tmp_path / "trace.jsonl", tmp_path / "figures.json"
    trace.write_text(json.dumps({"prompt_ids": [0], "response_ids": [1, 2, 3, 4, 5, 6]}) + "\n")
    replay = ["replay", str(trace), "--budgets", "4", "--json", str(figures), "--tokenizer", str(tokenizer)]

    def accepted(*options):
        assert not main([*replay, *options])
        return [row["accepted_per_step"] for row in json.loads(figures.read_text())["results"]]

    assert accepted() == accepted("--datastore", "none") == [0]
    assert accepted("--datastore", "mini")[0] > 0
    capsys.readouterr()
    assert main([*replay, "--datastore", "mini", "--datastore", "x"]) == 2
    assert "./mini" in capsys.readouterr().err
    assert main([*replay[:-2], "--datastore", "mini"]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main([*replay, "--datastore", "./mini"]) == 1  # a file, which is not there


@pytest.mark.skipif(not PACKAGE.is_dir(), reason="an sdist has no packages")
class TestPackage:
    """`packages/mini` itself."""

    @pytest.fixture
    def package(self, monkeypatch):
        monkeypatch.syspath_prepend(str(PACKAGE / "src"))
        monkeypatch.delitem(sys.modules, "sssd_mini")
        yield importlib.import_module("sssd_mini")
        sys.modules["sssd_mini"] = None

    @pytest.fixture
    def gathering(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / ".ci"))
        yield importlib.import_module("mini")
        sys.modules.pop("mini", None)

    def test_every_source_is_named_with_its_licence(self, package, gathering):
        said = (PACKAGE / "SOURCES.md").read_text()
        found: dict[str, list[int]] = {}
        for record in mini.records():
            assert record.keys() == {"text", "source"}
            assert record["text"].strip()
            found.setdefault(record["source"], []).append(len(record["text"].encode()))
        assert found.keys() == gathering.SOURCES.keys()
        for name, sizes in found.items():
            repository, licence = gathering.SOURCES[name]
            row = f"| {name} | {repository} | {licence} | {len(sizes):,} | {sum(sizes):,} |"
            assert row in said, row
            assert licence in ("Apache-2.0", "MIT")

    def test_shares_are_equal_as_far_as_texts_go(self, package, gathering):
        sizes: dict[str, int] = {}
        for record in mini.records():
            sizes[record["source"]] = sizes.get(record["source"], 0) + len(record["text"].encode())
        assert 0.97 * gathering.BYTES < sum(sizes.values()) <= gathering.BYTES
        assert max(sizes.values()) < 2 * gathering.BYTES / len(sizes)

    def test_it_is_small_and_of_its_version(self, package):
        file = PACKAGE / "src/sssd_mini/texts.jsonl.xz"
        assert file.stat().st_size < 6_000_000
        project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
        assert project["license"] == "Apache-2.0 AND MIT"
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert extras["mini"] == [f"sssd-mini>={package.__version__.partition('.')[0]}"]

    @needs_traces
    @pytest.mark.slow
    def test_it_holds_no_recorded_answer(self, package, gathering):
        recorded = gathering.Recorded(ROOT / "../shared/traces/dev")
        (planted,) = recorded_answer(gathering)
        assert recorded.shared(gathering.windows(planted.encode(), 1)).max() == 1
        step = 1 if "SSSD_FULL_TESTS" in os.environ else 16
        for record in islice(mini.records(), 0, None, step):
            shared = recorded.shared(gathering.windows(record["text"].encode(), 1))
            assert shared.max() <= gathering.MOST_SHARED


def recorded_answer(gathering):
    """A long answer of the dev split."""
    path = ROOT / "../shared/traces/dev/math.jsonl.xz"
    return [next(a for r in gathering.rows(path) for a in gathering.answers(r) if len(a.encode()) > 400)]
