"""What a drafter learns: from the target's probabilities, from other requests, from predicted outputs."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check_form, paths

from sssd import SOURCES, Drafter, DraftTree
from sssd.errors import ClosedError, InvalidArgumentError, InvalidTokenError

TEXT = np.random.default_rng(5).permutation(1000)


def first_tokens(tree):
    return [path[0] for path in paths(tree) if len(path) == 1]


class TestFeedback:
    def test_tokens_that_the_target_held_probable_are_drafted_in_the_same_context(self):
        sequence = Drafter().begin([1, 2, 3])
        sequence.extend([4], [[4, 50, 60]], [[0.5, 0.3, 0.1]])
        sequence.extend([9, 1, 2, 3])
        tree = sequence.draft(16)
        assert {4, 50, 60} <= set(first_tokens(tree))
        kinds = {path[0]: SOURCES[source] for path, source in zip(paths(tree), tree.sources, strict=True)}
        assert kinds[50] == "soft"

    def test_fewer_probabilities_than_are_kept_stand_for_no_token(self):
        sequence = Drafter().begin([7] * 5)
        sequence.extend([7], [[12, 10]], [[0.4, 0.4]])
        sequence.extend([7])
        assert set(first_tokens(sequence.draft(16, min_prob=0.0, max_depth=1))) == {7, 10, 12}

    def test_rejected_nodes_teach_as_well(self):
        sequence = Drafter().begin([1, 2, 3])
        tree = DraftTree([7, 8], [-1, 0])
        sequence.feedback(tree, [[5, 6], [70, 71], [80, 81]], [[0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
        sequence.extend([5])
        sequence.extend([1, 2, 3, 7])
        assert {70, 71} <= set(first_tokens(sequence.draft(16)))
        sequence.extend([8])
        assert {80, 81} <= set(first_tokens(sequence.draft(16)))

    def test_what_was_lately_probable_is_drafted_anywhere(self):
        sequence = Drafter().begin([1, 2, 3])
        sequence.extend([4], [[4, 50]], [[0.6, 0.4]])
        assert 50 in first_tokens(sequence.draft(16))

    def test_other_requests_profit(self):
        drafter = Drafter()
        drafter.begin([1, 2, 3]).extend([4], [[4, 50]], [[0.6, 0.4]])
        assert {4, 50} <= set(first_tokens(drafter.begin([7, 1, 2, 3]).draft(16)))
        assert len(Drafter(soft_bytes=0).begin([7, 1, 2, 3]).draft(16)) == 0

    @pytest.mark.parametrize(
        ("ids", "probs", "message"),
        [
            ([[1, 2]], None, "belong together"),
            (None, [[0.5, 0.5]], "belong together"),
            ([[1, 2]], [[0.5]], "columns"),
            ([[1, 2], [3, 4]], [[0.5, 0.5]], "shape"),
            ([1, 2], [0.5, 0.5], "shape"),
            ([[1, 2]], [[1, 2]], "shape"),
            ([[0.5, 2]], [[0.5, 0.2]], "shape"),
            ([[1, 2]], [[np.nan, 0.1]], "between 0 and 1"),
            ([[1, 2]], [[-0.1, 0.1]], "between 0 and 1"),
            ([[1, 2]], [[np.inf, 0.1]], "between 0 and 1"),
            ([[1, 2]], [[0.8, 0.7]], "sum to at most 1"),
            ([[1, [2]]], [[0.5, 0.5]], "shape"),
            ("ab", "cd", "shape"),
        ],
    )
    def test_hostile_feedback_is_refused_and_changes_nothing(self, ids, probs, message):
        sequence = Drafter(vocab_size=100).begin([1, 2, 3])
        with pytest.raises(InvalidArgumentError, match=message):
            sequence.extend([4], ids, probs)
        assert sequence.token_ids.tolist() == [1, 2, 3]
        if ids is not None and probs is not None:
            with pytest.raises(InvalidArgumentError, match=message):
                sequence.feedback(DraftTree([], []), ids, probs)
        assert len(sequence.draft(16)) == 0

    @pytest.mark.parametrize("token", [-1, 100, 2**40])
    def test_ids_outside_the_vocabulary_are_refused(self, token):
        sequence = Drafter(vocab_size=100).begin([1, 2, 3])
        with pytest.raises(InvalidTokenError):
            sequence.extend([4], [[4, token]], [[0.5, 0.1]])
        with pytest.raises(InvalidTokenError):
            sequence.feedback(DraftTree([], []), [[4, token]], [[0.5, 0.1]])
        assert len(sequence) == 3
        assert len(sequence.draft(16)) == 0

    def test_half_precision_empty_rows_and_more_than_eight_tokens_are_taken(self):
        sequence = Drafter().begin([1, 2, 3])
        sequence.extend([4], np.zeros((1, 0), np.int64), np.zeros((1, 0), np.float32))
        probs = np.full((1, 20), 0.0501, np.float16)
        probs[0, 19] = 0.04
        sequence.extend([5], np.arange(100, 120)[None], probs)
        sequence.extend([])
        assert len(set(first_tokens(sequence.draft(32)))) == 8

    @settings(deadline=None, max_examples=50)
    @given(st.data())
    def test_trees_keep_their_form_under_any_feedback(self, data):
        drafter = Drafter(vocab_size=30)
        sequence = drafter.begin(data.draw(st.lists(st.integers(0, 29), max_size=20)))
        for _ in range(8):
            tree = sequence.draft(24, min_prob=0.0)
            check_form(tree, 24)
            k = data.draw(st.integers(0, 10))
            seed = data.draw(st.integers(0, 2**31))
            rng = np.random.default_rng(seed)
            ids = rng.integers(0, 30, (len(tree) + 1, k))
            probs = rng.dirichlet(np.full(k + 1, 0.3), len(tree) + 1)[:, :k]
            sequence.feedback(tree, ids, probs)
            sequence.extend(rng.integers(0, 30, 2), ids[:1].repeat(2, 0), probs[:1].repeat(2, 0))


class TestLiveStore:
    def test_finished_requests_are_drafted_from(self):
        drafter = Drafter()
        with drafter.begin(TEXT[:100]) as sequence:
            sequence.extend(TEXT[100:140])
        tree = drafter.begin([5000, *TEXT[50:60]]).draft(20)
        assert paths(tree)[-1] == tuple(TEXT[60:80])
        assert {SOURCES[source] for source in tree.sources} == {"live"}
        assert drafter.live_tokens == 140

    def test_closed_and_failed_requests_are_not(self):
        drafter = Drafter()
        drafter.begin(TEXT[:100]).close()
        with pytest.raises(KeyError), drafter.begin(TEXT[:100]):
            raise KeyError
        assert drafter.live_tokens == 0

    def test_committing_shares_a_running_request_once(self):
        drafter = Drafter()
        sequence = drafter.begin(TEXT[:100])
        sequence.commit()
        assert len(drafter.begin(TEXT[10:20]).draft(8)) == 8
        sequence.extend(TEXT[100:110])
        sequence.commit()
        sequence.finish()
        assert paths(drafter.begin(TEXT[97:102]).draft(8))[-1] == tuple(TEXT[102:110])
        assert drafter.live_tokens <= 100 + 10 + 8
        with pytest.raises(ClosedError):
            sequence.commit()
        sequence.finish()

    def test_a_text_is_learned_as_if_it_had_finished_here(self):
        there, here = Drafter(vocab_size=1000), Drafter(vocab_size=1000)
        long = np.random.default_rng(0).integers(0, 1000, 40_000)
        for text in (TEXT, [*TEXT[:20], -1, *TEXT[5:30], 1000, 7], long, [], [3]):
            there.begin(text, namespace="a").finish()
            here.learn(text, namespace="a")
        for text in (TEXT[:10], TEXT[5:12], long[500:520]):
            trees = [one.begin(text, namespace="a").draft(64) for one in (there, here)]
            assert trees[0].token_ids.tolist() == trees[1].token_ids.tolist() != []
            assert trees[0].probs.tolist() == trees[1].probs.tolist()
        assert here.namespaces()["a"]["live_tokens"] == there.namespaces()["a"]["live_tokens"]
        assert (here.live_tokens, here.metrics["finished"]) == (0, 0)
        assert here.begin([1], namespace="a").fork().namespace == "a"
        with pytest.raises(InvalidTokenError):
            here.learn([0.5])

    def test_memory_is_bounded_and_newer_requests_displace_older_ones(self):
        drafter = Drafter(live_bytes=1 << 18)
        rng = np.random.default_rng(0)
        for _ in range(100):
            last = rng.integers(0, 10**6, 500)
            drafter.begin(last).finish()
            assert drafter.memory_bytes < (1 << 18) + (1 << 17)
        assert len(drafter.begin(last[:10]).draft(8)) == 8

    def test_nothing_is_kept_without_memory(self):
        drafter = Drafter(live_bytes=0)
        drafter.begin(TEXT[:100]).finish()
        assert (drafter.live_tokens, len(drafter.begin(TEXT[:10]).draft(8))) == (0, 0)

    @pytest.mark.parametrize("size", [-1, 2**41])
    def test_impossible_sizes_are_refused(self, size):
        with pytest.raises(InvalidArgumentError, match="live_bytes"):
            Drafter(live_bytes=size)
        with pytest.raises(InvalidArgumentError, match="soft_bytes"):
            Drafter(soft_bytes=size)

    def test_threads_finish_and_draft_at_once(self):
        drafter = Drafter(live_bytes=1 << 18)
        problems = []

        def work(seed):
            rng = np.random.default_rng(seed)
            try:
                for _ in range(40):
                    sequence = drafter.begin(rng.integers(0, 50, 200))
                    for _ in range(10):
                        check_form(sequence.draft(16), 16)
                        sequence.extend(rng.integers(0, 50, 3))
                    sequence.finish()
            except BaseException as problem:
                problems.append(problem)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
        assert not problems
        assert drafter.stats["drafts"] == 4 * 40 * 10


class TestPrediction:
    def test_a_prediction_is_followed_from_the_start(self):
        sequence = Drafter().begin([1, 2, 3], prediction=TEXT[:200])
        assert len(sequence) == 3
        assert paths(sequence.draft(10))[-1] == tuple(TEXT[:10])
        sequence.extend(TEXT[:1])
        assert paths(sequence.draft(10))[-1] == tuple(TEXT[1:11])

    def test_it_is_found_again_after_every_kind_of_edit(self):
        for edit in ([2000], [2000, 2001, 2002], []):
            sequence = Drafter().begin([1, 2, 3], prediction=TEXT[:200])
            sequence.extend([*TEXT[:20], *edit, *TEXT[23:25]])
            assert tuple(TEXT[25:28]) in paths(sequence.draft(16))

    def test_a_wrong_prediction_costs_no_drafts_for_long(self):
        sequence = Drafter().begin([1, 2, 3], prediction=TEXT[:500])
        for token in range(2000, 2100):
            tree = sequence.draft(32)
            sequence.extend([token])
        assert tree.expected_accepted < 0.2

    def test_ids_are_checked(self):
        with pytest.raises(InvalidTokenError):
            Drafter(vocab_size=10).begin([1], prediction=[1.5])

    def test_the_prediction_is_not_shared(self):
        drafter = Drafter()
        drafter.begin([1, 2, 3], prediction=TEXT[:200]).finish()
        assert len(drafter.begin(TEXT[:10]).draft(8)) == 0


class TestState:
    def learned(self, drafter):
        rng = np.random.default_rng(1)
        with drafter.begin(rng.integers(0, 20, 100)) as sequence:
            for _ in range(50):
                sequence.draft(16)
                sequence.extend(rng.integers(0, 20, 2))

    def test_state_round_trips_exactly(self):
        drafter = Drafter()
        shipped = drafter.state_dict()
        self.learned(drafter)
        state = drafter.state_dict()
        assert state != shipped
        other = Drafter()
        other.load_state_dict(state)
        assert other.state_dict() == state
        history = np.random.default_rng(2).integers(0, 20, 200)
        trees = [d.begin(history).draft(32) for d in (Drafter(), drafter, other)]
        live = Drafter(live_bytes=0)
        live.load_state_dict(state)
        assert live.begin(history).draft(32).probs.tolist() == other.begin(history).draft(32).probs.tolist()
        assert trees[0].probs.tolist() != trees[2].probs.tolist()
        drafter.reset()
        assert drafter.state_dict() == shipped

    def test_learning_is_deterministic(self):
        drafters = [Drafter(), Drafter()]
        [self.learned(drafter) for drafter in drafters]
        assert drafters[0].state_dict() == drafters[1].state_dict()
        assert drafters[0].stats == drafters[1].stats

    @pytest.mark.parametrize(
        "damage", [lambda w: w[:-1], lambda w: w[:-4] + b"\xff\xff\xff\xff", lambda w: None]
    )
    def test_other_states_are_refused_and_change_nothing(self, damage):
        drafter = Drafter()
        state = drafter.state_dict()
        ((name, weights),) = state.items()
        with pytest.raises(InvalidArgumentError, match="state"):
            drafter.load_state_dict({name: damage(weights)})
        with pytest.raises(InvalidArgumentError, match="state"):
            drafter.load_state_dict({})
        assert drafter.state_dict() == state


class TestStats:
    def test_counts_add_up(self):
        drafter = Drafter()
        rng = np.random.default_rng(3)
        drafted = accepted = 0
        expected = 0.0
        with drafter.begin(rng.integers(0, 8, 300)) as sequence:
            for _ in range(200):
                tree = sequence.draft(8)
                drafted += len(tree)
                expected += tree.expected_accepted
                token = int(rng.integers(0, 8))
                accepted += token in first_tokens(tree)
                sequence.extend([token])
        stats = drafter.stats
        assert stats["drafts"] == 200
        assert list(stats["sources"]) == list(SOURCES)
        assert sum(source["drafted"] for source in stats["sources"].values()) == drafted
        assert sum(source["accepted"] for source in stats["sources"].values()) == accepted
        assert sum(s["predicted"] for s in stats["sources"].values()) == pytest.approx(expected, rel=1e-3)

    def test_drafts_without_outcome_do_not_count(self):
        drafter = Drafter()
        sequence = drafter.begin([1, 2, 1, 2, 1])
        sequence.draft(4)
        sequence.draft(4)
        sequence.finish()
        assert drafter.stats["drafts"] == 0


class TestMinProb:
    def test_unlikely_nodes_are_left_out(self):
        sequence = Drafter().begin(np.random.default_rng(0).integers(0, 12, 400))
        sizes = [len(sequence.draft(1000, min_prob=prob)) for prob in (0.0, 0.001, 0.01, 0.1, 1.0)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[1] < sizes[0]
        assert sizes[-1] == 0
        assert (sequence.draft(1000, min_prob=0.01).probs >= 0.01).all()

    @pytest.mark.parametrize("prob", [-0.1, 1.1, float("nan")])
    def test_impossible_probabilities_are_refused(self, prob):
        with pytest.raises(InvalidArgumentError, match="min_prob"):
            Drafter().begin([1]).draft(8, min_prob=prob)
