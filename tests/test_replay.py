"""Replay: the rule, the files, the command."""

import csv
import gzip
import json
import lzma

import numpy as np
import pytest

from sssd import Drafter, DraftTree
from sssd.cli import main
from sssd.replay import (
    Replay,
    Request,
    Sampling,
    TraceError,
    accepted_path,
    bootstrap,
    count_accepted,
    reached,
    read_trace,
    trace_name,
)

PASSAGE = list(range(10, 30))
RECORD = {"prompt_ids": [*PASSAGE, 1], "response_ids": PASSAGE}


def write(path, *records):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def test_the_rule_on_a_copied_passage():
    """19 tokens follow the first; each full step takes 4 drafted tokens and one more: 5, 5, 5, 4."""
    replay = Replay(4)
    replay.run(Drafter(), Request(np.array(RECORD["prompt_ids"]), np.array(PASSAGE)))
    row = replay.row("copy")
    assert (row["tokens"], row["steps"], row["requests"]) == (19, 4, 1)
    assert row["tokens_per_step"] == 19 / 4
    assert row["accepted_per_step"] == (4 + 4 + 4 + 4) / 4
    assert 0 < row["drafted_per_step"] <= 4
    assert 0 < row["expected_accepted_per_step"] <= row["drafted_per_step"]


def test_nothing_to_match_takes_a_step_a_token():
    replay = Replay(8)
    replay.run(Drafter(), Request(np.array([1]), np.array([2, 3, 4, 5])))
    assert (replay.tokens, replay.steps, replay.accepted) == (3, 3, 0)


def test_short_responses_take_no_step():
    replay = Replay(8)
    for response in ([], [7]):
        replay.run(Drafter(), Request(np.array([1]), np.array(response, np.int32)))
    assert (replay.requests, replay.tokens, replay.steps) == (2, 0, 0)
    assert replay.row("x")["tokens_per_step"] == 0


def test_acceptance_stops_at_the_end_of_the_recording():
    tree = DraftTree([5, 0, 0], [-1, 0, 1])
    assert count_accepted(tree, np.array([5])) == 1
    assert count_accepted(tree, np.array([5, 0, 7])) == 2
    assert count_accepted(tree, np.array([4])) == 0


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_traces_are_read(tmp_path, suffix):
    path = write(tmp_path / f"dev.copy.jsonl{suffix}", RECORD, RECORD)
    assert trace_name(path) == "dev.copy"
    first, _ = read_trace(path)
    assert first.prompt_ids.tolist() == RECORD["prompt_ids"]
    assert first.response_ids.dtype == np.int32


def test_texts_are_tokenised(tmp_path):
    path = write(tmp_path / "t.jsonl", {"prompt": "ab", "response": "c"})
    (request,) = read_trace(path, lambda text: [ord(letter) for letter in text])
    assert (request.prompt_ids.tolist(), request.response_ids.tolist()) == ([97, 98], [99])
    with pytest.raises(TraceError, match="--tokenizer"):
        list(read_trace(path))


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"prompt_ids": [1.5], "response_ids": []}',
        '{"prompt_ids": [-1], "response_ids": []}',
    ],
)
def test_broken_lines_are_named(tmp_path, line):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + line + "\n")
    with pytest.raises(TraceError, match=r"broken.jsonl, line 2: "):
        list(read_trace(path))


def test_broken_archives_are_named(tmp_path):
    path = write(tmp_path / "cut.jsonl.xz", RECORD)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TraceError, match=r"cut\.jsonl\.xz cannot be read"):
        list(read_trace(path))


def test_the_command_writes_a_table_and_json(tmp_path, capsys):
    path, out = write(tmp_path / "copy.jsonl", RECORD), tmp_path / "out.json"
    assert main(["replay", str(path), "--budgets", "1,4", "--end-token-id", "29", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["results"]
    assert [(row["trace"], row["budget"]) for row in rows] == [("copy", 1), ("copy", 4)]
    assert set(rows[0]) == {
        *("trace", "budget", "requests", "tokens", "steps", "tokens_per_step", "accepted_per_step"),
        *(
            "tokens_per_step_interval",
            "drafted_per_step",
            "expected_accepted_per_step",
            "draft_us_p50",
            "draft_us_p99",
            "append_us_per_token",
            "sources",
            "reliability",
        ),
    }
    assert "copy" in capsys.readouterr().out


def test_the_command_names_what_is_missing(tmp_path, capsys):
    assert main(["replay", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["replay", "x", "--budgets", "2000"])


def test_a_datastore_is_matched(tmp_path):
    """The store knows the passage that the prompt does not."""
    from sssd import DatastoreBuilder

    store = tmp_path / "store.sssd"
    builder = DatastoreBuilder(store, vocab_size=100)
    builder.add(PASSAGE)
    builder.finish()
    request = Request(np.array([1, 2]), np.array(PASSAGE))
    with_store, without = Replay(8), Replay(8)
    with_store.run(Drafter(datastore=store), request)
    without.run(Drafter(), request)
    assert without.accepted == 0
    assert with_store.accepted >= 14


class TestSampling:
    """A target that samples, replayed from what it held probable."""

    def request(self, length=400, probs=(0.5, 0.3, 0.2)):
        random = np.random.default_rng(3)
        ids = np.array([random.permutation(50)[: len(probs)] for _ in range(length)], np.int32)
        return Request(
            np.arange(5, dtype=np.int32), ids[:, 0].copy(), ids, np.tile(np.float32(probs), (length, 1))
        )

    @pytest.mark.parametrize(
        ("sampling", "expected"),
        [
            (Sampling(), (0.5, 0.3, 0.2)),
            (Sampling(0.5), (0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38)),
            (Sampling(top_p=0.7), (0.625, 0.375, 0)),
            (Sampling(top_p=0.4), (1, 0, 0)),
            (Sampling(0.01), (1, 0, 0)),
        ],
    )
    def test_draws_are_as_frequent_as_they_are_probable(self, sampling, expected):
        request = self.request(20_000)
        drawn = request.topk_ids == sampling.draws(request)[:, None]
        np.testing.assert_allclose(drawn.mean(0), expected, atol=0.015)
        shuffled = Request(
            request.prompt_ids, request.response_ids, request.topk_ids[:, ::-1], request.topk_probs[:, ::-1]
        )
        assert np.array_equal(sampling.draws(request), sampling.draws(shuffled))

    def test_draws_are_the_same_for_the_same_seed_and_request(self):
        request = self.request()
        assert np.array_equal(Sampling().draws(request), Sampling().draws(request))
        assert not np.array_equal(Sampling().draws(request), Sampling(seed=1).draws(request))

    def test_a_sure_target_is_replayed_as_recorded(self):
        request = self.request(probs=(1.0, 0.0, 0.0))
        sampled, recorded = Replay(8, Sampling()), Replay(8)
        for replay in (sampled, recorded):
            replay.run(Drafter(), request)
        assert (sampled.accepted, sampled.steps) == (recorded.accepted, recorded.steps)

    def test_the_text_stays_the_recording_and_draws_end_steps(self):
        request, replay, texts = self.request(), Replay(8, Sampling()), []
        sequence = Drafter().begin(request.prompt_ids)
        replay.follow(sequence, request, lambda *_: texts.append(sequence.token_ids))
        whole = np.concatenate([request.prompt_ids, request.response_ids])
        assert all(np.array_equal(text, whole[: len(text)]) for text in texts)
        # at half of the positions another token is drawn
        assert replay.steps > 150
        assert np.array_equal(sequence.token_ids, whole)

    def test_nodes_are_counted_whose_parents_were_reached(self):
        tree = DraftTree([5, 6, 7, 8, 9], [-1, -1, 0, 1, 2])
        for path, recording, counted in (
            ([0, 2], [5, 7, 1], [True, True, True, False, True]),
            # what follows a draw that was not recorded is not known
            ([0, 2], [5, 8, 1], [True, True, True, False, False]),
            ([1], [5, 7, 1], [True, True, False, False, False]),
            ([], [4], [True, True, False, False, False]),
            ([0], [5], [True, True, False, False, False]),
        ):
            found = reached(tree, np.array(path, np.int64), np.array(recording))
            assert found.tolist() == counted

    def test_right_probabilities_are_found_right(self):
        """Of a drafter that knows the distribution, what is expected is what is accepted."""
        random, request = np.random.default_rng(0), self.request()
        accepted = expected = 0.0
        for _ in range(4000):
            at = random.integers(0, len(request.response_ids) - 3)
            ids, said = request.topk_ids[at : at + 3], request.response_ids[at : at + 3]
            drawn = [row[random.choice(3, p=[0.5, 0.3, 0.2])] for row in ids]
            # the first two tokens, and what follows the one that was recorded
            tree = DraftTree([ids[0, 0], ids[0, 1], ids[1, 0], ids[1, 1]], [-1, -1, 0, 0])
            known = next((n + 1 for n in range(3) if drawn[n] != said[n]), 3)
            path = accepted_path(tree, np.array(drawn[:known], np.int32))
            found = reached(tree, path, said)
            accepted += len(path)
            expected += np.array([0.5, 0.3, 0.5, 0.3])[found].sum()
        assert expected == pytest.approx(accepted, rel=0.04)

    def test_recordings_without_probabilities_are_refused(self, tmp_path, capsys):
        path = write(tmp_path / "x.jsonl", RECORD)
        assert main(["replay", str(path), "--temperature", "1"]) == 1
        assert "topk_probs" in capsys.readouterr().err
        for options in (["--temperature", "0"], ["--temperature", "1", "--top-p", "2"]):
            with pytest.raises(SystemExit):
                main(["replay", str(path), *options])


class TestForResearchers:
    """What survives, is limited, is shared out, and can be published."""

    @pytest.fixture
    def folder(self, tmp_path):
        random = np.random.default_rng(5)
        for name in ("a", "b"):
            records = []
            for _ in range(6):
                prompt = random.integers(0, 30, 30)
                response = np.where(random.random(30) < 0.2, random.integers(0, 30, 30), prompt)
                records.append({"prompt_ids": prompt.tolist(), "response_ids": response.tolist()})
            write(tmp_path / f"{name}.jsonl", *records)
        return tmp_path

    def rows(self, folder, *options, traces=("a", "b")):
        out = folder / "out.json"
        files = [str(folder / f"{name}.jsonl") for name in traces]
        status = main(["replay", *files, "--budgets", "2,8", "--json", str(out), "--quiet", *options])
        return status, json.loads(out.read_text())["results"]

    def test_a_bad_file_is_named_and_the_others_are_replayed(self, folder, capsys):
        (folder / "bad.jsonl").write_text(json.dumps(RECORD) + "\n{\n")
        status, rows = self.rows(folder, traces=("a", "bad", "b"))
        assert status == 1
        assert [row["trace"] for row in rows] == ["a", "a", "b", "b"]
        assert "bad.jsonl, line 2" in capsys.readouterr().err

    def test_where_results_go_is_looked_at_first(self, folder, capsys, monkeypatch):
        monkeypatch.setattr("sssd.replay.Replay.run", None)
        for option in ("--json", "--plot"):
            for place in (folder / "none/out.svg", folder):
                assert main(["replay", str(folder / "a.jsonl"), option, str(place)]) == 1
                assert str(place) in capsys.readouterr().err

    def test_limit_takes_the_first_requests(self, folder):
        _, rows = self.rows(folder, "--limit", "2")
        assert [row["requests"] for row in rows] == [2] * 4
        with (folder / "a.jsonl").open("a") as file:
            file.write("{")
        assert self.rows(folder, "--limit", "6")[0] == 0, "what is beyond the limit is not read"

    def test_jobs_change_nothing_but_the_time(self, folder):
        timed = ("draft_us_p50", "draft_us_p99", "append_us_per_token")
        single, shared = self.rows(folder), self.rows(folder, "--jobs", "2")
        for _, rows in (single, shared):
            for row in rows:
                assert all(row.pop(name) > 0 for name in timed)
        assert shared == single

    def test_tables_for_papers_and_programs(self, folder, capsys):
        _, rows = self.rows(folder, "--table", "csv")
        lines = list(csv.DictReader(capsys.readouterr().out.splitlines()))
        assert [float(line["tokens_per_step"]) for line in lines] == [row["tokens_per_step"] for row in rows]
        low, high = rows[0]["tokens_per_step_interval"]
        assert (float(lines[0]["tokens_per_step_low"]), float(lines[0]["tokens_per_step_high"])) == (
            low,
            high,
        )
        self.rows(folder, "--table", "markdown")
        table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert [cell.strip() for cell in table[0].split("|")[1:4]] == ["trace", "budget", "tokens/step"]
        assert set(table[1]) <= set("|-: ")
        assert table[2].split("|")[1].strip() == "a"

    def test_the_plot_has_its_format_by_name_and_no_backend_is_switched(self, folder, capsys):
        matplotlib = pytest.importorskip("matplotlib")
        matplotlib.use("svg")
        for name, start in (("out.svg", b"<?xml"), ("out.png", b"\x89PNG")):
            assert self.rows(folder, "--plot", str(folder / name), traces=("a",))[0] == 0
            assert (folder / name).read_bytes().startswith(start)
        assert matplotlib.get_backend() == "svg"
        assert main(["replay", str(folder / "a.jsonl"), "--plot", str(folder / "out.xyz")]) == 1
        assert "ends with its format" in capsys.readouterr().err

    def test_a_plot_of_simulate(self, folder):
        pytest.importorskip("matplotlib")
        curve, out = "h100-llama-3-8b-roofline", folder / "out.svg"
        command = ["simulate", str(folder / "a.jsonl"), "--cost", curve, "--batch", "1,4", "--plot", str(out)]
        assert main([*command, "--quiet"]) == 0
        assert out.read_text().count("<svg") == 1


class TestBootstrap:
    def test_equal_requests_leave_no_doubt_and_one_says_nothing(self):
        assert bootstrap([(10, 5)] * 8) == (2.0, 2.0)
        assert bootstrap([(10, 5)]) is None
        assert bootstrap([(10, 5), (0, 0)]) is None
        assert bootstrap([]) is None

    def test_it_covers_the_truth_about_as_often_as_it_says(self):
        """Requests of 1 to 40 steps whose rates differ; the truth is the ratio of means."""
        random, covered = np.random.default_rng(7), 0
        for _ in range(100):
            steps = random.integers(1, 41, 60)
            tokens = steps * random.gamma(4.0, 0.5, 60)
            low, high = bootstrap(list(zip(tokens, steps, strict=True)))
            covered += low <= 2.0 <= high
        assert 85 <= covered <= 100

    def test_requests_are_drawn_as_wholes(self):
        """A long request counts for more than a short one, and few give a wider interval than many."""
        few = bootstrap([(10, 10), (40, 10)] * 3)
        many = bootstrap([(10, 10), (40, 10)] * 60)
        assert few[0] < many[0] < 2.5 < many[1] < few[1]
