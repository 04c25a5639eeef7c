"""Cost curves, the rule that sizes drafts by them, and the simulator."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sssd import Drafter, DraftTree
from sssd.cli import main
from sssd.errors import InvalidArgumentError
from sssd.hardware import (
    DEVICES,
    CostCurve,
    CostCurveError,
    DraftCost,
    ModelShape,
    PassCosts,
    SizingRule,
    roofline,
)
from sssd.hardware.roofline import LLAMA_3_8B
from sssd.hardware.simulate import (
    FIXED_RULES,
    RULES,
    Adaptive,
    Autoregressive,
    Fixed,
    Paper,
    Perfect,
    sequences,
    simulate,
)
from sssd.replay import Replay, Request


def curve(**changes):
    """Twice as long for eight tokens, four times for sixty-four; longer with batch and context."""
    values = {
        "batches": [1, 8],
        "tokens": [1, 8, 64],
        "contexts": [0, 1000],
        "seconds": [[[1, 2], [2, 3], [4, 5]], [[2, 4], [6, 9], [20, 30]]],
        **changes,
    }
    return CostCurve(**values)


def chain(*probs):
    return DraftTree(list(range(len(probs))), list(range(-1, len(probs) - 1)), list(probs))


class TestCostCurve:
    def test_is_linear_between_points_and_goes_on_beyond(self):
        known = curve()
        assert known.time(1, 1, 0) == 1
        assert known.time(1, 8, 1000) == 3
        assert known.time(1, 4.5, 0) == pytest.approx(1.5)
        assert known.time(4.5, 1, 0) == pytest.approx(1.5)
        assert known.time(1, 1, 500) == pytest.approx(1.5)
        assert known.time(1, 1, 3000) == pytest.approx(4)
        assert known.time(1, 120, 0) == pytest.approx(6)
        assert known.time(15, 1, 0) == pytest.approx(3)

    def test_packed_curves_count_the_tokens_of_the_pass(self):
        packed = curve(packed=True)
        assert packed.time(8, 1, 0) == curve().time(8, 8, 0)

    def test_comes_back_from_a_file(self, tmp_path):
        known = curve(ready=(1, 8, 64), draft=DraftCost(1e-5, 2e-6, 3e-7, 4), device="d", intensity=200.0)
        known.save(tmp_path / "curve.json")
        again = CostCurve.load(tmp_path / "curve.json")
        assert again.to_json() == known.to_json()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "other"}, "not a cost curve"),
            ({"version": 2}, "version 2"),
            ({"seconds": None}, "seconds"),
            ({"seconds": [[[1, 2]]]}, "shape"),
            ({"seconds": [[[1, 2], [2, 3], [4, "x"]]] * 2}, "numbers"),
            ({"seconds": [[[1, 2], [2, 3], [4]]] * 2}, "numbers"),
            ({"seconds": [[[1, 2], [2, 3], [4, math.nan]]] * 2}, "nanosecond"),
            ({"seconds": [[[1, 2], [2, 3], [4, math.inf]]] * 2}, "nanosecond"),
            ({"seconds": [[[0, 2], [2, 3], [4, 5]]] * 2}, "nanosecond"),
            ({"seconds": [[[1, 2], [2, 3], [4, 1e9]]] * 2}, "less than a day"),
            ({"seconds": [[[5, 6], [2, 3], [4, 5]]] * 2}, "must not fall"),
            ({"batches": [8, 1]}, "rise"),
            ({"batches": [0, 1]}, "rise"),
            ({"batches": [1, 1e300]}, "rise"),
            ({"batches": []}, "list of numbers"),
            ({"batches": "1,2"}, "numbers"),
            ({"batches": [True, False]}, "numbers"),
            ({"tokens": [2, 8, 64]}, "begin with 1"),
            ({"contexts": [-1, 5]}, "rise"),
            ({"ready": [2, 4]}, "ready"),
            ({"ready": [1.5]}, "ready"),
            ({"ready": [1, 1 << 70]}, "ready"),
            ({"draft": {"step": -1}}, "draft"),
            ({"draft": {"step": "soon"}}, "draft"),
            ({"draft": {"threads": 0}}, "threads"),
            ({"draft": {"shell": 1}}, "draft"),
            ({"draft": 3}, "draft"),
            ({"layout": "round"}, "layout"),
            ({"device": ["x"]}, "device"),
            ({"intensity": -3}, "intensity"),
        ],
    )
    def test_absurd_and_hostile_files_are_refused(self, tmp_path, change, message):
        path = tmp_path / "curve.json"
        path.write_text(json.dumps({**curve().to_json(), **change}))
        with pytest.raises(CostCurveError, match=message) as caught:
            CostCurve.load(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize(
        "text", ["", "{", "[" * 100_000, "null", "[1]", '{"format": "sssd cost curve"}', "\ud800"]
    )
    def test_what_is_no_curve_is_refused(self, tmp_path, text):
        path = tmp_path / "curve.json"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(CostCurveError, match=r"curve\.json"):
            CostCurve.load(path)

    def test_a_file_too_large_for_a_curve_is_not_read(self, tmp_path):
        path = tmp_path / "curve.json"
        curve().save(path)
        with path.open("r+b") as file:
            file.seek(16 << 20)
            file.write(b" ")
        with pytest.raises(CostCurveError, match="too large"):
            CostCurve.load(path)

    def test_a_missing_file_is_named_with_what_there_is(self):
        with pytest.raises(CostCurveError, match="h100-llama-3-8b-roofline"):
            CostCurve.load("nowhere.json")

    def test_fit_is_monotone_and_close(self):
        rng = np.random.default_rng(0)
        smooth = np.cumsum(np.ones((3, 6, 4)), axis=1) + np.arange(3)[:, None, None] + np.arange(4)
        noisy = smooth * rng.uniform(0.8, 1.25, smooth.shape)
        fitted = CostCurve.fit([1, 2, 4], [1, 2, 4, 8, 16, 32], [0, 10, 100, 1000], noisy)
        assert all((np.diff(fitted.seconds, axis=axis) >= 0).all() for axis in range(3))
        assert np.abs(fitted.seconds / smooth - 1).max() < 0.25
        np.testing.assert_array_equal(
            CostCurve.fit([1, 2, 4], [1, 2, 4, 8, 16, 32], [0, 1, 2, 3], smooth).seconds, smooth
        )

    def test_shipped_curves_are_named_for_what_they_are(self):
        assert set(CostCurve.shipped()) >= {"h100-llama-3-8b-roofline", "h200-llama-3-8b-roofline"}
        for name in CostCurve.shipped():
            known = CostCurve.load(name)
            assert known.source == "roofline"
            assert "roofline" in name

    def test_roofline_is_bytes_until_arithmetic_takes_longer(self):
        device = DEVICES["NVIDIA H100"]
        known = roofline(device, LLAMA_3_8B)
        reading = LLAMA_3_8B.parameters * 2 / device.bandwidth
        assert known.time(1, 1, 0) == pytest.approx(reading, rel=1e-6)
        assert known.time(1, 64, 0) == pytest.approx(reading, rel=1e-6)
        assert known.time(1, 4096, 0) == pytest.approx(
            2 * LLAMA_3_8B.parameters * 4096 / device.flops, rel=0.01
        )
        assert known.time(8, 1, 8192) - known.time(8, 1, 0) == pytest.approx(
            8 * 8192 * 131072 / device.bandwidth, rel=1e-3
        )
        assert roofline(device, LLAMA_3_8B, packed=False).time(8, 4, 1024) == pytest.approx(
            known.time(8, 4, 1024), rel=1e-6
        )


class TestPassCosts:
    trees = st.lists(st.lists(st.integers(1, 999), max_size=8), max_size=5)

    @staticmethod
    def parts(rows, steps):
        probs = [sorted((p / 1000 for p in row), reverse=True) for row in rows]
        sizes, seconds = [0], [1.0]
        for size, second in steps:
            sizes.append(sizes[-1] + size)
            seconds.append(seconds[-1] + second / 100)
        return probs, sizes, seconds

    @staticmethod
    def value(probs, counts, sizes, seconds, packed, rate):
        size = sum(counts) if packed else max(counts, default=0)
        # a pass is as large as the next size that is ready
        time = next((t for s, t in zip(sizes, seconds, strict=True) if s >= size), math.inf)
        return sum(sum(row[:n]) for row, n in zip(probs, counts, strict=True)) - rate * (time - seconds[0])

    @settings(deadline=None, max_examples=150)
    @given(
        rows=trees,
        steps=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 100)), max_size=5),
        packed=st.booleans(),
    )
    def test_finds_the_best_within_the_limits(self, rows, steps, packed):
        probs, sizes, seconds = self.parts(rows, steps)
        trees = [chain(*row) if row else None for row in probs]
        counts = PassCosts(sizes, seconds, packed=packed).allocate(trees, 1.5)
        assert all(0 <= n <= len(row) for n, row in zip(counts, probs, strict=True))
        assert (sum(counts) if packed else max(counts, default=0)) <= sizes[-1]
        nodes = sorted(
            (
                (p, i)
                for i, row in enumerate(np.float32(probs[j]).tolist() for j in range(len(probs)))
                for p in row
            ),
            reverse=True,
        )
        best = 0.0
        for size in range(sizes[-1] + 1):
            if packed:
                taken = [sum(i == row for _, i in nodes[:size]) for row in range(len(probs))]
            else:
                taken = [min(size, len(row)) for row in probs]
            best = max(best, self.value(probs, taken, sizes, seconds, packed, 1.5))
        assert self.value(probs, counts, sizes, seconds, packed, 1.5) == pytest.approx(best, abs=1e-6)

    @settings(deadline=None, max_examples=200)
    @given(
        rows=st.lists(st.lists(st.integers(1, 999), min_size=1, max_size=8), min_size=1, max_size=4),
        steps=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 100)), max_size=5),
        packed=st.booleans(),
        lift=st.floats(1.001, 3.0),
    )
    def test_more_probable_nodes_are_never_drafted_less(self, rows, steps, packed, lift):
        probs, sizes, seconds = self.parts(rows, steps)
        costs = PassCosts(sizes, seconds, packed=packed)
        before = costs.allocate([chain(*row) for row in probs], 1.0)
        lifted = [[min(p * lift, 1.0) for p in probs[0]], *probs[1:]]
        assert costs.allocate([chain(*row) for row in lifted], 1.0)[0] >= before[0]

    @settings(deadline=None)
    @given(
        rows=trees,
        steps=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 100)), max_size=5),
        packed=st.booleans(),
    )
    def test_dearer_time_never_buys_more(self, rows, steps, packed):
        probs, sizes, seconds = self.parts(rows, steps)
        trees = [chain(*row) if row else None for row in probs]
        costs = PassCosts(sizes, seconds, packed=packed)
        assert sum(costs.allocate(trees, 2.0)) <= sum(costs.allocate(trees, 1.0))

    @pytest.mark.parametrize(
        ("sizes", "seconds"),
        [
            ([], []),
            ([0], []),
            ([1], [1.0]),
            ([0, 0], [1.0, 1.0]),
            ([0, -1], [1.0, 1.0]),
            ([0, 1], [2.0, 1.0]),
            ([0], [math.nan]),
            ([0], [0.0]),
        ],
    )
    def test_absurd_costs_are_refused(self, sizes, seconds):
        with pytest.raises(InvalidArgumentError):
            PassCosts(sizes, seconds)

    @pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf])
    def test_absurd_rates_are_refused(self, rate):
        with pytest.raises(InvalidArgumentError, match="rate"):
            PassCosts([0], [1.0]).allocate([], rate)


def test_first_is_the_tree_of_that_size():
    tree = DraftTree([5, 6, 7], [-1, 0, -1], [0.5, 0.4, 0.3])
    assert tree.first(2).token_ids.tolist() == [5, 6]
    assert tree.first(2).probs.tolist() == tree.probs[:2].tolist()
    assert len(tree.first(0)) == 0
    assert len(tree.first(1 << 80)) == 3
    with pytest.raises(InvalidArgumentError):
        tree.first(-1)


class TestSizingRule:
    @staticmethod
    def settled(known, **options):
        """A rule that has seen enough steps without drafts."""
        rule = SizingRule(known, **options)
        for _ in range(2):
            rule.observe(batch=1, size=0, context=0, seconds=known.time(1, 1, 0), tokens=1)
        return rule

    def test_sizes_drafts_by_their_probabilities(self):
        rule = self.settled(curve())
        assert rule.allocate([chain(0.9, 0.8, 0.7)], 0) == [3]
        assert rule.allocate([chain(0.1, 0.01)], 0) == [0]
        assert rule.allocate([None], 0) == [0]
        assert rule.allocate([], 0) == []

    def test_a_second_is_worth_what_plain_decoding_makes_of_it_at_least(self):
        rule = self.settled(curve())
        for _ in range(200):  # drafts that take long and bring nothing
            rule.observe(batch=1, size=8, context=0, seconds=curve().time(1, 9, 0), tokens=1)
        costs, rate = rule.costs(1, 0)
        assert rule.speedup < 0.9
        assert rate >= 0.999 / costs.seconds[0]

    @pytest.mark.parametrize("most", [0, 1, 5])
    def test_limits_hold(self, most):
        rule = self.settled(curve(), max_nodes=most)
        rows = [rule.pace(), rule.pace()]
        assert rule.limits(rows) == [min(most, 64)] * 2
        assert max(rule.allocate([chain(*[0.99] * 8)] * 2, 0, rows)) <= most

    def test_widths_are_those_that_are_ready(self):
        rule = self.settled(curve(ready=(1, 5)))
        assert rule.allocate([chain(*[0.99] * 20)], 0) == [4]

    def test_longer_contexts_count(self):
        known = curve(seconds=[[[1, 1], [1.1, 8], [1.2, 64]]] * 2)
        rule = self.settled(known)
        tree = chain(*[0.5] * 4)
        assert rule.allocate([tree], 0) == [4]
        assert rule.allocate([tree], 1000) == [0]

    @pytest.mark.parametrize("bad", [-1, 1024, 1.5, True, "8"])
    def test_absurd_limits_are_refused(self, bad):
        with pytest.raises(InvalidArgumentError, match="max_nodes"):
            SizingRule(curve(), max_nodes=bad)

    @pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
    def test_absurd_contexts_are_refused(self, bad):
        with pytest.raises(InvalidArgumentError, match="context"):
            self.settled(curve()).allocate([chain(0.5)], bad)

    def test_a_request_that_never_gains_is_drafted_for_less_and_less(self):
        rule = self.settled(curve(draft=DraftCost(request=0.1)))
        row = rule.pace()
        drafts = 0
        for _ in range(200):
            if rule.limits([row])[0]:
                drafts += 1
                rule.allocate([chain(0.01)], 0, [row])
        assert 5 < drafts < 30

    @settings(deadline=None, max_examples=200)
    @given(
        st.lists(
            st.tuples(
                st.integers(-3, 70),
                st.one_of(st.floats(), st.floats(1e-9, 1e9)),
                st.integers(-3, 100),
                st.floats(),
            ),
            max_size=60,
        )
    )
    def test_no_measurement_makes_it_worse_than_its_curve_without_drafts(self, steps):
        """Whatever times it is told, expected tokens per second never sink below plain decoding's."""
        rule = self.settled(curve())
        for size, seconds, tokens, drafting in steps:
            rule.observe(
                batch=1, size=max(size, 0), context=10, seconds=seconds, tokens=tokens, draft_seconds=drafting
            )
        costs, rate = rule.costs(1, 10)
        sizes, times = costs.sizes.tolist(), costs.seconds.tolist()
        assert all(0 < a <= b < math.inf for a, b in pairwise(times))
        assert rate >= 1 / times[0] * (1 - 1e-9)
        for tree in (chain(0.9, 0.8, 0.7), chain(0.3), chain(*[0.5] * 30)):
            (count,) = rule.allocate([tree], 10)
            expected = 1 + tree.first(count).expected_accepted
            assert count in sizes
            assert expected / times[sizes.index(count)] >= 1 / times[0] * (1 - 1e-6)

    @pytest.mark.parametrize("true_factor", [2.0, 10.0, 100.0])
    @pytest.mark.parametrize("promised", [0.05, 0.5, 0.9])
    def test_wrong_curves_and_wrong_probabilities_cost_little(self, true_factor, promised):
        """Drafts that cost far more than the curve says, and never come true: the loss stays bounded."""
        flat = curve(seconds=[[[1, 1], [1.01, 1.01], [1.02, 1.02]]] * 2)
        rule = SizingRule(flat)
        row = rule.pace()
        spent, steps = 0.0, 5000
        for _ in range(steps):
            limit = rule.limits([row])[0]
            tree = chain(*[promised] * min(limit, 16)) if limit else None
            (count,) = rule.allocate([tree], 100, [row])
            seconds = 1.0 if count == 0 else 1.0 * true_factor
            spent += seconds
            rule.observe(batch=1, size=count, context=100, seconds=seconds, tokens=1)
        assert spent / steps < 1.0 + 0.02 * true_factor

    def test_pauses_end_once_drafts_pay_again(self):
        """Nothing comes true for long, then everything does."""
        known = curve(seconds=[[[1, 1], [1.5, 1.5], [2, 2]]] * 2)
        rule = self.settled(known)
        row = rule.pace()
        drafted = []
        for step in range(6000):
            limit = rule.limits([row])[0]
            (count,) = rule.allocate([chain(*[0.9] * min(limit, 8)) if limit else None], 100, [row])
            drafted.append(count > 0)
            came_true = step >= 3000
            seconds = known.time(1, 1 + count, 100)
            tokens = 1 + (count if came_true else 0)
            rule.observe(batch=1, size=count, context=100, seconds=seconds, tokens=tokens)
        assert sum(drafted[:3000]) < 300
        assert sum(drafted[4000:]) > 1900

    def test_a_request_whose_drafts_seldom_hit_is_not_left_alone(self):
        """Copies come without notice: steps in which nothing is found are no reason to miss them."""
        rule = self.settled(curve(draft=DraftCost(request=1e-4)))
        row = rule.pace()
        drafted = 0
        for step in range(200):
            drafted += rule.limits([row])[0] > 0
            rule.allocate([chain(0.9, 0.8) if step % 20 == 0 else chain()], 0, [row])
        assert drafted == 200

    @pytest.mark.parametrize("per_node", [0.1, 1.0, 10.0])
    def test_a_curve_that_promises_too_much_is_tried_with_small_passes_first(self, per_node):
        flat = curve(seconds=[[[1, 1], [1, 1], [1, 1]]] * 2)
        rule = self.settled(flat)
        row, spent = rule.pace(), 0.0
        for _ in range(300):
            limit = rule.limits([row])[0]
            (count,) = rule.allocate([chain(*[0.05] * limit) if limit else None], 0, [row])
            spent += per_node * count
            rule.observe(batch=1, size=count, context=0, seconds=1 + per_node * count, tokens=1)
        assert spent < 30 * per_node

    def test_finds_out_that_wide_passes_are_cheap(self):
        """A curve that says drafting never pays is corrected once passes turn out cheap."""
        steep = curve(seconds=[[[1, 1], [7, 7], [60, 60]]] * 2)
        rule = self.settled(steep)
        assert rule.allocate([chain(*[0.3] * 8)], 0) == [0]
        for _ in range(20):
            rule.observe(batch=1, size=8, context=0, seconds=1.1, tokens=5)
        assert rule.allocate([chain(*[0.3] * 8)], 0) == [8]


class Machine:
    """One request on a machine whose speed changes, with a clock of its own.

    A pass over ``1 + n`` tokens takes ``pace * (1 + slope * n)`` seconds; the curve knows all but the pace.
    """

    def __init__(self, slope, pace=1.0):
        self.slope, self.pace = slope, pace
        flat = [[[1 + slope * n] * 2 for n in (0, 16)]] * 2
        self.rule = SizingRule(CostCurve([1, 64], [1, 17], [0, 1000], flat))
        self.state = self.rule.pace()
        self.steps = 0
        self.drafted = self.seconds = self.plain_seconds = 0.0

    def run(self, steps, probs, hiccup=lambda step, nodes: 1.0, prefill=lambda step: 0, told=True):
        """Drafts nodes of these probabilities, which come true; returns seconds over plain ones.

        Passes also read the prompt tokens of ``prefill``, 100 in the time of a plain pass, and the rule is
        told of them; of times where it is ``told``.
        """
        before = self.seconds, self.plain_seconds
        for _ in range(steps):
            limit = self.rule.limits([self.state])[0]
            tree = chain(*probs[:limit]) if limit else None
            (count,) = self.rule.allocate([tree], 100, [self.state])
            seconds = self.pace * (1 + self.slope * count) * hiccup(self.steps, count)
            # expectations in place of chance: fractions of tokens, as their mean over many steps
            tokens = 1 + (tree.first(count).expected_accepted if count else 0.0)
            read = prefill(self.steps)
            whole = seconds + self.pace * read / 100
            self.rule.observe(
                batch=1,
                size=count,
                context=100,
                seconds=whole if told else None,
                tokens=tokens,
                prefill_tokens=read,
            )
            self.seconds += seconds
            self.plain_seconds += self.pace * tokens
            self.drafted += count > 0
            self.steps += 1
        return (self.seconds - before[0]) / (self.plain_seconds - before[1])


class TestBusyMachine:
    """The online correction, with a clock that the test turns."""

    GOOD, FAIR, POOR = (0.9,) * 8, (0.08,) * 8, (0.04,) * 8

    @pytest.mark.parametrize("drafts", [GOOD, FAIR])
    @pytest.mark.parametrize("paces", [(2.0, 1.0), (1.0, 2.0), (1.4, 1.0), (1.0, 3.0, 1.0)])
    def test_poor_drafts_are_left_alone_after_the_machine_has_changed(self, paces, drafts):
        """Only drafts were verified when the speed changed, so no time of a plain step is of use."""
        machine = Machine(slope=0.05)
        for pace in paces:
            machine.pace = pace
            machine.run(100, drafts)
        assert machine.run(120, self.POOR) < 1.02

    @pytest.mark.parametrize("pace", [0.5, 0.7, 1.4, 2.0])
    def test_good_drafts_go_on_after_the_machine_has_changed(self, pace):
        machine = Machine(slope=0.05)
        machine.run(200, self.GOOD)
        machine.pace, before = pace, machine.drafted
        machine.run(300, self.GOOD)
        assert machine.drafted - before > 280

    @pytest.mark.parametrize("factor", [3.0, 10.0, 1000.0])
    def test_a_first_draft_that_meets_a_hiccup_is_not_the_last(self, factor):
        machine = Machine(slope=0.05)
        met = []

        def hiccup(step, nodes):
            if nodes and not met:
                met.append(step)
                return factor
            return 1.0

        machine.run(100, self.GOOD, hiccup)
        assert met
        assert machine.drafted > 80

    @pytest.mark.parametrize("factor", [3.0, 10.0, 1000.0])
    @pytest.mark.parametrize("which", [0, 1])
    def test_a_plain_step_that_meets_a_hiccup_makes_no_poor_draft_look_cheap(self, which, factor):
        machine = Machine(slope=0.05)
        machine.run(20, self.GOOD, lambda step, nodes: factor if step == which else 1.0)
        assert machine.run(300, self.POOR) < 1.005

    @pytest.mark.parametrize("seed", range(5))
    def test_on_a_machine_that_is_never_quiet_little_is_lost(self, seed):
        """Others come and go every fifty steps, and every pass meets noise."""
        rng = np.random.default_rng(seed)
        machine, drafts = Machine(slope=0.05), [self.GOOD, self.POOR]
        ratios = {drafts[0]: [], drafts[1]: []}
        for _ in range(60):
            machine.pace = float(rng.choice([1.0, 1.5, 2.0, 3.0]))
            probs = drafts[int(rng.integers(2))]
            ratios[probs].append(machine.run(50, probs, lambda *_: float(np.exp(rng.normal(0, 0.2)))))
        assert np.mean(ratios[self.GOOD]) < 0.2
        assert np.mean(ratios[self.POOR]) < 1.05


class TestUnknownMachine:
    """A request that seldom has much to draft from, on machines whose times scatter."""

    TOKENS, LENGTHS = 6000, (0, 1, 2, 4, 8, 16)

    def run(self, size, observe=lambda count, tokens: None):
        """Serves a text of places where nothing is known, guesses and copies. Nodes come true as often as
        their probabilities say: fractions of tokens in place of chance.

        Args:
            size: how many nodes are verified of a chain of these path probabilities.
            observe: is told of nodes and tokens of each step.

        Returns:
            Tokens, steps and nodes.
        """
        rng = np.random.default_rng(0)
        tokens, steps, nodes, left, prob = 0.0, 0, 0, 0.0, 0.0
        while tokens < self.TOKENS:
            if left < 1:
                kind = rng.random()
                prob = 0.0 if kind < 0.3 else rng.uniform(0.02, 0.7) if kind < 0.9 else rng.uniform(0.9, 0.99)
                left = rng.integers(10, 100) if kind > 0.9 else rng.integers(1, 4)
            probs = prob ** np.arange(1, 1 + min(16, left - 1)) if prob else np.empty(0)
            count = min(size(probs), len(probs))
            made = 1 + probs[:count].sum()
            observe(count, made)
            tokens, steps, nodes, left = tokens + made, steps + 1, nodes + count, left - made
        return tokens, steps, nodes

    @pytest.mark.parametrize("promised", [0.0, 0.3])
    @pytest.mark.parametrize("per_node", [0.003, 0.01, 0.03, 0.1, 0.3, 1.0])
    def test_it_is_as_fast_as_the_best_fixed_length_and_never_slower_than_plain_decoding(
        self, per_node, promised
    ):
        ends = [1.0] * 2, [1 + 16 * promised] * 2
        rule = SizingRule(CostCurve([1, 64], [1, 17], [0, 1000], [ends] * 2), max_nodes=16)
        rng, row = np.random.default_rng(1), rule.pace()

        def size(probs):
            limit = rule.limits([row])[0]
            worth = probs[:limit][probs[:limit] >= rule.min_prob]
            return rule.allocate([chain(*worth.tolist()) if limit else None], 100, [row])[0]

        def observe(count, tokens):
            hang = 3 if rng.random() < 0.01 else 1
            seconds = (1 + per_node * count) * np.exp(rng.normal(0, 0.1)) * hang
            rule.observe(batch=1, size=count, context=100, seconds=seconds, tokens=tokens)

        def rate(tokens, steps, nodes):
            return tokens / (steps + per_node * nodes)

        found = rate(*self.run(size, observe))
        best = max(rate(*self.run(lambda _, length=length: length)) for length in self.LENGTHS)
        assert found > 0.99
        assert found > 0.98 * best


class TestPrefills:
    """Engines read prompts in the same passes that verify drafts."""

    GOOD, POOR = TestBusyMachine.GOOD, TestBusyMachine.POOR

    @staticmethod
    def mixed(share, seed=0):
        rng = np.random.default_rng(seed)
        return lambda step: int(rng.integers(50, 4000)) if rng.random() < share else 0

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    @pytest.mark.parametrize("pace", [1.0, 3.0])
    def test_what_the_rule_makes_of_the_other_passes_is_what_it_makes_of_them_alone(self, share, pace):
        machine, alone = Machine(slope=0.05, pace=pace), Machine(slope=0.05, pace=pace)
        good = machine.run(400, self.GOOD, prefill=self.mixed(share))
        assert good == pytest.approx(alone.run(400, self.GOOD), rel=0.1)
        assert machine.run(400, self.POOR, prefill=self.mixed(share, 1)) < 1.02
        costs, _ = machine.rule.costs(1, 100)
        assert costs.seconds[0] == pytest.approx(pace, rel=0.02)

    def test_times_of_mixed_passes_would_mislead_it(self):
        """The same passes without a word of what they read: good drafts look dear."""
        machine = Machine(slope=0.05)
        reads = self.mixed(0.6)
        machine.run(400, self.GOOD, hiccup=lambda *_: 1 + reads(0) / 100)
        costs, _ = machine.rule.costs(1, 100)
        assert costs.seconds[8] > 2 * 1.4

    @pytest.mark.parametrize("told", [True, False])
    def test_where_no_pass_can_be_timed_the_curve_is_gone_by(self, told):
        machine = Machine(slope=0.05)
        before, _ = machine.rule.costs(1, 100)
        ratio = machine.run(200, self.GOOD, prefill=lambda _: 500 if told else 0, told=told)
        assert machine.drafted > 180
        assert ratio < 0.35
        after, _ = machine.rule.costs(1, 100)
        assert after.seconds.tolist()[: len(before.seconds)] == before.seconds.tolist()
        # what drafts bring in is still counted: those that never come true are given up
        lost = Machine(slope=1.0)
        for _ in range(3000):
            limit = lost.rule.limits([lost.state])[0]
            tree = chain(*[0.9] * min(limit, 8)) if limit else None
            (count,) = lost.rule.allocate([tree], 100, [lost.state])
            lost.rule.observe(batch=1, size=count, context=100, seconds=None, tokens=1)
            lost.drafted += count > 0
        assert lost.drafted < 100

    def test_a_machine_that_changes_is_noticed_between_prefills(self):
        machine = Machine(slope=0.05)
        machine.run(200, self.GOOD, prefill=self.mixed(0.5))
        machine.pace, before = 2.0, machine.drafted
        machine.run(300, self.GOOD, prefill=self.mixed(0.5, 1))
        assert machine.drafted - before > 240
        assert machine.rule.costs(1, 100)[0].seconds[0] == pytest.approx(2.0, rel=0.1)

    def test_bad_numbers_are_refused(self):
        with pytest.raises(InvalidArgumentError, match="prefill_tokens must not be negative"):
            Machine(0.1).rule.observe(batch=1, size=0, context=1, seconds=1, tokens=1, prefill_tokens=-1)


def requests(count=6, length=40, seed=0):
    """Responses that repeat their prompts in part."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        prompt = rng.integers(0, 50, 60).astype(np.int32)
        pieces = [prompt[start : start + 8] for start in rng.integers(0, 50, length // 8)]
        result.append(Request(prompt, np.concatenate(pieces).astype(np.int32)))
    return result


class TestSimulator:
    begin = staticmethod(sequences(live_bytes=0, soft_bytes=0))
    flat = CostCurve([1, 64], [1, 1024], [0, 1], np.full((2, 2, 2), 0.01), packed=True)

    def test_fixed_budgets_take_the_steps_of_replay(self):
        traces = requests()
        for rule in (4, 16):
            replay = Replay(rule)
            for request in traces:
                replay.run(Drafter(live_bytes=0, soft_bytes=0), request)
            outcome = simulate(traces, Fixed(rule, self.begin), self.flat, 1)
            assert (outcome.tokens, outcome.steps) == (replay.tokens, replay.steps)
            assert outcome.seconds == pytest.approx(0.01 * replay.steps)

    def test_without_drafts_every_step_gives_a_token(self):
        outcome = simulate(requests(), Autoregressive(), self.flat, 4)
        assert outcome.tokens_per_step == 1.0
        assert outcome.passes * 4 == outcome.steps

    def test_where_nodes_are_free_many_are_verified_and_where_they_are_dear_none(self):
        traces = requests()
        rule = Adaptive(self.begin, self.flat)
        free = simulate(traces, rule, self.flat, 4)
        assert free.tokens_per_step > 1.3
        dear = CostCurve(
            [1, 64], [1, 2, 1024], [0, 1], np.array([[[1] * 2, [100] * 2, [1e4] * 2]] * 2), packed=True
        )
        plain = simulate(traces, Autoregressive(), dear, 1)
        assert simulate(traces, Adaptive(self.begin, dear), dear, 1).rate == pytest.approx(plain.rate)

    def test_perfect_drafts_bound_every_rule(self):
        traces, known = requests(), CostCurve.load("h100-llama-3-8b-roofline")
        bound = simulate(traces, Perfect(known), known, 4).rate
        for rule in (Fixed(16, self.begin), Paper(self.begin, 295), Adaptive(self.begin, known)):
            assert simulate(traces, rule, known, 4).rate < bound

    def test_the_papers_rule_is_its_table(self):
        rule = Paper(self.begin, 295)
        table = {1: 32, 2: 32, 4: 24, 6: 16, 8: 32, 16: 16, 32: 8, 48: 5, 64: 4, 128: 2, 512: 1}
        assert {batch: rule.nodes(batch) + 1 for batch in table} == table
        assert Paper(self.begin, 3).nodes(1) == 0

    def test_requests_without_steps(self):
        nothing = [Request(np.array([1, 2], np.int32), np.array([3], np.int32))]
        assert simulate(nothing, Autoregressive(), self.flat, 4).tokens == 0
        assert simulate([], Autoregressive(), self.flat, 1).seconds == 0

    def test_command(self, tmp_path: Path, capsys):
        trace = tmp_path / "copy.jsonl"
        rows = [
            {"prompt_ids": r.prompt_ids.tolist(), "response_ids": r.response_ids.tolist()} for r in requests()
        ]
        trace.write_text("\n".join(map(json.dumps, rows)))
        out = tmp_path / "rows.json"
        command = [
            "simulate",
            str(trace),
            "--cost",
            "h100-llama-3-8b-roofline",
            "--batch",
            "1,4",
            "--json",
            str(out),
        ]
        assert main(command) == 0
        shown = capsys.readouterr().out
        assert "roofline, not measured" in shown
        assert "sssd/best fixed" in shown
        written = json.loads(out.read_text())
        results = written["results"]
        assert [(row["batch"], row["rule"]) for row in results] == [
            (b, rule) for b in (1, 4) for rule in RULES
        ]
        assert all(
            row["trace"] == "copy" and row["speedup"] > 0 and row["tokens_per_step"] >= 1 for row in results
        )
        for row in written["comparison"]:
            speedups = {one["rule"]: one["speedup"] for one in results if one["batch"] == row["batch"]}
            assert row["over_paper"] == speedups["sssd"] / speedups["paper"]
            assert row["over_best_fixed"] == speedups["sssd"] / max(speedups[rule] for rule in FIXED_RULES)

    def test_command_names_a_bad_curve(self, tmp_path, capsys):
        trace = tmp_path / "t.jsonl"
        trace.write_text("")
        bad = tmp_path / "bad.json"
        bad.write_text("{}")
        assert main(["simulate", str(trace), "--cost", str(bad)]) == 1
        assert "not a cost curve" in capsys.readouterr().err


def test_shape_of_a_model():
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    shape = ModelShape.of(LlamaForCausalLM(config))
    per_layer = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24 + 2 * 16
    assert shape.parameters == 2 * per_layer + 16 + 32 * 16
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.bytes) == (2, 4, 2, 4, 4)
    assert torch.get_default_dtype() is torch.float32
