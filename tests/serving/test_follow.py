"""``follow``: sequences that become whole rows, singly, in batches, in steps, and by request id."""

import array
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sssd.requests
from sssd import DraftBatch, Drafter, Requests
from sssd.errors import BatchError, ClosedError, InvalidArgumentError, InvalidTokenError, MemoryLimitError

PROMPT = [1, 2, 3, 4, 5, 1, 2, 3, 4, 6, 1, 2, 3]
FORMS = [
    list,
    tuple,
    lambda row: np.array(row, np.int32),
    lambda row: np.array(row, np.int64),
    lambda row: np.array(row, ">i4"),
    lambda row: np.repeat(np.array(row, np.int32), 2)[::2],
    lambda row: array.array("i", row),
    lambda row: memoryview(array.array("q", row)),
]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["grow", "shrink", "change", "stay", "other", "first"]),
        st.integers(0, 90),
        st.lists(st.integers(0, 6), max_size=70),
    ),
    max_size=8,
)


def private(**options):
    return Drafter(live_bytes=0, soft_bytes=0, threads=1, **options)


def edited(row, kind, count, tokens):
    """A row as an engine may have it next: changed at its end, but for the last two kinds."""
    if kind == "grow":
        return row + tokens
    if kind == "shrink":
        return row[: max(len(row) - count, 0)]
    if kind == "change":
        return row[: max(len(row) - count, 0)] + tokens
    if kind == "other":
        return tokens
    if kind == "first":
        return [*tokens[:1], *row[1:]]
    return row


def kept(before, row, compare):
    """How many are: all of both if the last ``compare`` of them agree, else those before a difference."""
    overlap = min(len(before), len(row))
    start = 0 if compare is None else max(overlap - compare, 0)
    if before[start:overlap] == row[start:overlap]:
        return overlap
    return next(at for at in range(overlap) if before[at] != row[at])


@settings(deadline=None, max_examples=150)
@given(
    prompt=st.lists(st.integers(0, 6), max_size=200),
    edits=EDITS,
    form=st.sampled_from(FORMS),
    compare=st.sampled_from([None, 0, 1, 8, 64]),
)
def test_a_sequence_becomes_its_row(prompt, edits, form, compare):
    """And drafts as one that was cut and extended by hand, or begun anew."""
    drafter, held = private(), prompt
    sequence, twin = drafter.begin(prompt), drafter.begin(prompt)
    for kind, count, tokens in edits:
        row = edited(held, kind, count, tokens)
        keep = kept(held, row, compare)
        sequence.follow(form(row), compare=compare)
        if keep == 0:
            twin.clear()
            twin.prefill(row)
        else:
            if keep < len(held):
                twin.truncate(keep)
            twin.extend(row[keep:])
        held = held[:keep] + row[keep:]
        assert sequence.token_ids.tolist() == held
        sequence.check_integrity()
        one, two = sequence.draft(12), twin.draft(12)
        assert one.token_ids.tolist() == two.token_ids.tolist()
        assert one.probs.tolist() == two.probs.tolist()
    assert sequence.state_dict() == twin.state_dict()


def test_what_was_accepted_of_the_last_draft_is_told():
    row = PROMPT * 3
    text = PROMPT * 9
    for right in (0, 1, 3, 5):
        sequence = private().begin(row)
        tree = sequence.draft(16)
        made = [*text[len(row) :][:right], 0]
        targets = [made[depth] if depth <= right else 0 for depth in [0, *tree.depths]]
        nodes, tokens = tree.accept(targets)
        assert sequence.follow([*row, *tokens]) == len(nodes) == min(right, len(nodes))
        assert right == 0 or len(nodes) > 0
        assert sequence.follow([*row, *tokens]) == 0


def test_only_the_end_is_compared_unless_all_is_asked_for():
    row = list(range(200))
    sequence = private().begin(row)
    changed = [7, *row[1:], 5]
    sequence.follow(changed)
    assert sequence.token_ids[0] == 0
    sequence.follow(changed, compare=None)
    assert sequence.token_ids.tolist() == changed
    # what differs within the end makes all be compared
    changed[3], changed[-2] = 99, 99
    sequence.follow(changed)
    assert sequence.token_ids.tolist() == changed


def test_another_text_begins_anew_and_the_old_one_is_learned_where_asked():
    for learn in (False, True):
        drafter = Drafter(threads=1)
        sequence = drafter.begin(PROMPT * 5, namespace="a", max_length=70, end_token_ids=[4])
        sequence.follow([9, 8, 7, 6], learn=learn)
        assert sequence.token_ids.tolist() == [9, 8, 7, 6]
        assert (drafter.namespaces()["a"]["live_tokens"] > 0) == learn
        assert drafter.namespaces()["a"]["sequences"] == 1
        sequence.follow([4])
        assert len(sequence.draft(8)) == 0
        sequence.close()
        assert drafter.memory["sequences"] == 0


@pytest.mark.parametrize("learn", [False, True])
def test_a_cleared_sequence_is_like_a_new_one(learn):
    drafter = Drafter(threads=1)
    sequence = drafter.begin(PROMPT * 5, [1, 2, 3], max_length=99)
    sequence.draft(8)
    sequence.extend([4, 5])
    sequence.clear(learn=learn)
    assert len(sequence) == 0
    assert (drafter.live_tokens > 0) == learn
    twin = drafter.begin([], max_length=99)
    for each in (sequence, twin):
        each.prefill(PROMPT * 2)
    assert sequence.draft(8).probs.tolist() == twin.draft(8).probs.tolist()
    assert sequence.state_dict() == twin.state_dict()
    sequence.close()
    with pytest.raises(ClosedError):
        sequence.clear()


def test_a_drafter_forgets_all_that_it_has_learned():
    drafter = Drafter(threads=1)
    for name in ("", "a", "b"):
        with drafter.begin(PROMPT * 5, namespace=name) as sequence:
            sequence.draft(8)
            sequence.extend([4, 5], [[4], [5]], [[1.0], [1.0]])
    running = drafter.begin(PROMPT, namespace="a")
    fresh, learned = Drafter().state_dict(), drafter.state_dict()
    drafter.clear()
    assert fresh == drafter.state_dict() != learned
    assert (drafter.live_tokens, list(drafter.namespaces())) == (0, [""])
    running.extend([4])
    running.finish()
    assert drafter.begin([], namespace="a").drafter.namespaces()["a"]["live_tokens"] == 0


def test_end_tokens_of_one_request():
    drafter = private(end_token_ids=[4])
    own, none, usual = (
        drafter.begin(PROMPT, **options) for options in ({"end_token_ids": [5]}, {"end_token_ids": []}, {})
    )
    text = PROMPT * 4
    for sequence, ends, goes_on in (
        (own, 5, {4}),
        (none, None, {4, 5}),
        (usual, 4, {3}),
        (own.fork(), 5, {4}),
    ):
        sequence.extend(text[len(sequence) - len(PROMPT) :])
        tree = sequence.draft(64)
        inner = set(tree.token_ids[[parent for parent in tree.parents if parent >= 0]].tolist())
        assert ends not in inner
        assert ends in tree.token_ids or ends is None
        assert inner >= goes_on
    for ends in ([-1], [1 << 31], ["a"]):
        with pytest.raises(InvalidTokenError):
            drafter.begin(PROMPT, end_token_ids=ends)
    with pytest.raises(InvalidArgumentError, match="at most 256"):
        drafter.begin(PROMPT, end_token_ids=range(257))
    with pytest.raises(InvalidTokenError):
        private(vocab_size=8).begin([1], end_token_ids=[8])


class TestBatches:
    def test_rows_in_a_step_are_follow_and_draft_of_each(self):
        rng = np.random.default_rng(0)
        drafter, alone = Drafter(live_bytes=0, soft_bytes=0, threads=3), private()
        rows = [[*PROMPT, *range(i % 4)] for i in range(12)]
        sequences, twins = ([each.begin(row) for row in rows] for each in (drafter, alone))
        out = DraftBatch(12, 120)
        for turn in range(20):
            kinds = rng.choice(["grow", "grow", "change", "stay", "other"], 12)
            rows = [
                edited(row, kind, int(rng.integers(0, 5)), rng.integers(0, 7, rng.integers(1, 4)).tolist())
                for row, kind in zip(rows, kinds, strict=True)
            ]
            accepted = [twin.follow(row) for twin, row in zip(twins, rows, strict=True)]
            if turn % 2:
                batch = drafter.step(sequences, rows=rows, max_nodes=10, out=out)
                assert batch.accepted.tolist() == accepted
            else:
                assert drafter.follow_batch(sequences, list(map(np.array, rows))).tolist() == accepted
                batch = drafter.draft_batch(sequences, 10)
                assert len(batch.accepted) == 0
            for tree, twin, sequence, row in zip(batch, twins, sequences, rows, strict=True):
                assert sequence.token_ids.tolist() == row
                assert tree.probs.tolist() == twin.draft(10).probs.tolist()

    def test_bad_rows_change_nothing(self):
        drafter = private()
        sequences = [drafter.begin(PROMPT) for _ in range(2)]
        for rows, problem in (
            ([[1]], InvalidArgumentError),
            ([[1]] * 3, InvalidArgumentError),
            ([[*PROMPT, 1], ["a"]], InvalidTokenError),
            ([[*PROMPT, 1], [*PROMPT, 1.5]], InvalidTokenError),
            ([[*PROMPT, 1], "text"], InvalidTokenError),
            ([[*PROMPT, 1], np.zeros((3, 3), int)], InvalidTokenError),
            ([[*PROMPT, 1], {1: 2}], InvalidTokenError),
            ([[*PROMPT, 1], None], InvalidTokenError),
            ([[*PROMPT, 1], 7], InvalidTokenError),
        ):
            with pytest.raises(problem):
                drafter.step(sequences, rows=rows)
            with pytest.raises(problem):
                drafter.follow_batch(sequences, rows)
        rows = [[*PROMPT, 1]] * 2
        for options in (
            {"compare": -1},
            {"token_ids": [1, 2], "offsets": [0, 1, 2]},
            {"topk_ids": [[1]], "topk_probs": [[1.0]]},
            {"offsets": [0, 1, 2]},
        ):
            with pytest.raises(InvalidArgumentError):
                drafter.step(sequences, rows=rows, **options)
        with pytest.raises(InvalidArgumentError, match="give token_ids and offsets, or rows"):
            drafter.step(sequences)
        with pytest.raises(InvalidArgumentError, match="compare must not be negative"):
            sequences[0].follow(PROMPT, compare=-1)
        assert [len(sequence) for sequence in sequences] == [len(PROMPT)] * 2

    def test_failures_and_places_without_a_sequence(self):
        drafter = private(max_sequence_bytes=400_000)
        sequences = [drafter.begin(PROMPT) for _ in range(4)]
        sequences[1].close()
        rows = [[*PROMPT, 4], PROMPT, PROMPT + list(range(20_000)), [*PROMPT, 5], PROMPT]
        with pytest.raises(BatchError, match="sequences 1, 2 of the batch failed") as caught:
            drafter.step([*sequences, None], rows=rows, max_nodes=8)
        kinds = {place: type(failure) for place, failure in caught.value.failures.items()}
        assert kinds == {1: ClosedError, 2: MemoryLimitError}
        assert (np.diff(caught.value.batch.offsets) > 0).tolist() == [True, False, False, True, False]
        assert [len(sequences[i]) for i in (0, 2, 3)] == [14, 13, 14]
        batch = drafter.step([None, sequences[0], None], [5], [0, 0, 1, 1], 8)
        assert (np.diff(batch.offsets) > 0).tolist() == [False, True, False]
        with pytest.raises(MemoryLimitError):
            sequences[2].follow(rows[2])
        assert sequences[2].token_ids.tolist() == PROMPT
        sequences[2].check_integrity()

    def test_a_long_row_is_followed_while_others_run(self):
        drafter = private()
        long = np.random.default_rng(0).integers(0, 50, 400_000)
        sequence, other = drafter.begin(long), drafter.begin(PROMPT)
        turned = long.copy()
        turned[200_000] = 51
        done = threading.Event()
        thread = threading.Thread(target=lambda: (sequence.follow(turned, compare=None), done.set()))
        thread.start()
        turns = 0
        while not done.is_set():
            other.draft(4)
            turns += 1
            time.sleep(0.001)
        thread.join()
        assert turns > 3
        assert len(sequence) == 400_000
        assert sequence.token_ids[200_000] == 51


class TestRequests:
    def test_the_old_name_is_the_new_one(self):
        assert sssd.requests.Requests is Requests

    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 1 << 30), shape=st.sampled_from(["tree", "chain"]), learn=st.booleans())
    def test_an_engine_hands_over_its_rows_and_nothing_else(self, seed, shape, learn):
        """Requests come, grow, pause, are taken back, replaced and end; each is held as it is."""
        rng = np.random.default_rng(seed)
        drafter = Drafter(threads=1, vocab_size=64)
        requests, rows, prompts, asked, born = Requests(drafter), {}, {}, [], 0

        def options(name):
            asked.append(name)
            return {"namespace": name[-1], "max_length": 500, "prediction": PROMPT}

        for _ in range(40):
            for name, row in rows.items():
                if rng.random() < 0.8:
                    kind = rng.choice(["grow", "change", "other"], p=[0.85, 0.1, 0.05])
                    tokens = rng.integers(0, 9, rng.integers(1, 6)).tolist()
                    rows[name] = edited(row, kind, int(rng.integers(0, 4)), tokens) or [1]
            while len(rows) < 6 and rng.random() < 0.5:
                name, born = f"r{born}", born + 1
                prompts[name] = rng.integers(0, 9, rng.integers(1, 40)).tolist()
                rows[name] = prompts[name] + [3]
            ended = [name for name in rows if rng.random() < 0.05]
            for name in ended:
                del rows[name]
            scheduled: list[str | None] = [name for name in rows if rng.random() < 0.8]
            scheduled.insert(int(rng.integers(len(scheduled) + 1)), None)
            batch = requests.step(
                scheduled,
                rows=[np.array(rows.get(name, []), np.int32) for name in scheduled],
                prompt_lengths=[len(prompts.get(name, [])) for name in scheduled],
                options=options,
                ended=[*ended, "never seen"],
                learn=learn,
                max_nodes=8,
                shape=shape,
            )
            assert len(batch) == len(scheduled)
            for name, tree in zip(scheduled, batch, strict=True):
                if name is None:
                    assert len(tree) == 0
                else:
                    assert requests[name].token_ids.tolist() == rows[name]
                    requests[name].check_integrity()
            assert set(requests) <= set(rows)
        assert len(asked) == len(set(asked))
        assert requests.keep(list(rows)[:1]) >= 0
        assert set(requests) <= set(list(rows)[:1])
        requests.clear()
        assert len(requests) == 0
        assert drafter.memory["sequences"] == 0
        learned = sum(space["live_tokens"] for space in drafter.namespaces().values())
        assert learned > 0 or not learn

    def test_prompts_are_no_output_and_predictions_go_by_place(self):
        drafter = private()
        requests, twin = Requests(drafter), drafter.begin(PROMPT, [7, 8, 9])
        twin.extend([3, 4])
        batch = requests.step(
            ["a"],
            rows=[[*PROMPT, 3, 4]],
            prompt_lengths=[len(PROMPT)],
            options=lambda _: {"prediction": [7, 8, 9]},
            max_nodes=8,
        )
        assert batch[0].probs.tolist() == twin.draft(8).probs.tolist()
        assert requests.begin("b", PROMPT, [7, 8, 9]).draft(8).probs.tolist() == (
            drafter.begin(PROMPT, [7, 8, 9]).draft(8).probs.tolist()
        )

    def test_what_does_not_fit_is_left_without_drafts_until_it_ends(self):
        drafter = private(max_sequence_bytes=400_000)
        requests, long = Requests(drafter), np.arange(20_000)
        ids, rows = ["a", "long", "b"], [PROMPT, long, PROMPT]
        with pytest.raises(BatchError, match="requests 1 of the batch could not be begun") as caught:
            requests.step(ids, rows=rows, max_nodes=8)
        assert [type(failure) for failure in caught.value.failures.values()] == [MemoryLimitError]
        assert (np.diff(caught.value.batch.offsets) > 0).tolist() == [True, False, True]
        batch = requests.step(ids, rows=rows, max_nodes=8)
        assert (np.diff(batch.offsets) > 0).tolist() == [True, False, True]
        # one that outgrows its memory, and one that somebody else has closed
        requests["b"].close()
        with pytest.raises(BatchError) as caught:
            requests.step(["a", "b", "c"], rows=[np.append(PROMPT, long), PROMPT, PROMPT], max_nodes=8)
        assert list(caught.value.failures) == [0, 1]
        assert list(requests) == ["c"]
        assert len(requests.step(["a"], rows=[PROMPT], max_nodes=8)[0]) == 0
        assert len(requests.step(["a"], rows=[PROMPT], ended=["a"], max_nodes=8)[0]) > 0
        assert len(requests.begin("b", PROMPT).draft(4)) > 0

    def test_bad_input_is_refused(self):
        requests = Requests(private())
        requests.begin("a", PROMPT)
        with pytest.raises(InvalidArgumentError, match="rows must hold the tokens of each of 2 requests"):
            requests.step(["a", "b"], rows=[PROMPT])
        with pytest.raises(InvalidArgumentError, match="twice"):
            requests.step(["a", "a"], rows=[PROMPT, PROMPT])
        with pytest.raises(InvalidTokenError):
            requests.step(["a"], rows=[["x"]])
        with pytest.raises(InvalidArgumentError, match="no request 'z'"):
            requests.step(["z"], [1], [0, 1])
        assert len(requests["a"]) == len(PROMPT)
