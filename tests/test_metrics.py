"""What drafters count: why drafts are empty, and what Prometheus, OpenTelemetry and the board make of it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from sssd import Drafter
from sssd.errors import InvalidArgumentError
from sssd.hardware import CostCurve, DraftCost, SizingRule
from sssd.metrics import Drafters

ROOT = Path(__file__).parent.parent
PROMPT = [1, 2, 3, 4, 5, 1, 2, 3, 4, 6, 1, 2, 3]
NEW = [1, 2, 3, 4]
REASONS = ("budget", "unprofitable", "indexing", "no_match")


def private(**options):
    return Drafter(live_bytes=0, soft_bytes=0, **options)


def dear():
    """Costs by which no node pays."""
    times = [[[1.0, 1.0], [1000.0, 1000.0]]] * 2
    return CostCurve([1, 64], [1, 512], [0, 100], times, packed=True, draft=DraftCost(node=1e-4))


def undrafted(drafter):
    """Reasons that occurred, with their counts."""
    counts = drafter.metrics["undrafted"]
    assert tuple(counts) == REASONS
    return {reason: count for reason, count in counts.items() if count}


class TestWhyNothingWasDrafted:
    def test_a_single_draft(self):
        drafter = private()
        sequence, fresh = drafter.begin(PROMPT), drafter.begin(NEW)
        assert len(sequence.draft(4)) > 0
        assert undrafted(drafter) == {}
        sequence.draft(0)
        assert undrafted(drafter) == {"budget": 1}
        fresh.draft(4)
        sequence.draft(4, max_depth=0)
        assert undrafted(drafter) == {"budget": 1, "no_match": 2}
        sequence.draft(4, cost=dear())
        assert undrafted(drafter) == {"budget": 1, "unprofitable": 1, "no_match": 2}

    def test_a_prompt_that_is_still_read(self):
        drafter = private()
        sequence = drafter.begin(np.tile(PROMPT, 20_000), background=True)
        empty = 0
        while not len(sequence.draft(4)):
            empty += 1
        assert undrafted(drafter) == ({"indexing": empty} if empty else {})

    def test_a_step(self):
        drafter = private()
        sequences = [drafter.begin(prompt) for prompt in (PROMPT, NEW, PROMPT, PROMPT)]
        batch = drafter.draft_batch(sequences, [4, 4, 0, 4])
        assert np.diff(batch.offsets).astype(bool).tolist() == [True, False, False, True]
        assert undrafted(drafter) == {"budget": 1, "no_match": 1}

    def test_a_budget_that_others_took(self):
        drafter = private()
        sequences = [drafter.begin(PROMPT) for _ in range(3)]
        batch = drafter.draft_batch(sequences, 4, total_nodes=1)
        assert batch.offsets[-1] == 1
        assert undrafted(drafter) == {"budget": 2}
        drafter.draft_batch(sequences[:1], 4, total_nodes=0)
        assert undrafted(drafter) == {"budget": 3}

    def test_a_rule_to_which_nothing_pays(self):
        drafter, rule = private(), SizingRule(dear())
        sequences = [drafter.begin(prompt) for prompt in (PROMPT, PROMPT, NEW)]
        # once the rule knows them it has them not even tried
        for turn in range(1, 4):
            batch = drafter.step(sequences, [1, 1, 9 + turn], range(4), 16, rule=rule)
            assert batch.offsets[-1] == 0
            counts = undrafted(drafter)
            assert sum(counts.values()) == 3 * turn
            assert counts["unprofitable"] >= 2 * turn

    def test_errors_and_extensions_are_no_empty_drafts(self):
        drafter = private()
        sequences = [drafter.begin(PROMPT), drafter.begin(PROMPT)]
        drafter.extend_batch(sequences, [1, 1], [0, 1, 2])
        sequences[1].close()
        with pytest.raises(Exception, match="closed"):
            drafter.draft_batch(sequences, 4)
        assert undrafted(drafter) == {}


def scraped(registry):
    """Values by name and labels."""
    import prometheus_client.parser

    text = prometheus_client.generate_latest(registry).decode()
    families = list(prometheus_client.parser.text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)  # each has one HELP
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def worked(count=4):
    drafter = private()
    sequences = [drafter.begin(PROMPT) for _ in range(count)]
    drafter.step(sequences, [4] * count, range(count + 1), 8)
    drafter.step(sequences, [5] * count, range(count + 1), 8)
    return drafter


class TestPrometheus:
    @pytest.fixture(autouse=True)
    def client(self):
        return pytest.importorskip("prometheus_client")

    def test_it_reads_the_counts(self, client):
        from sssd.metrics import Collector

        drafter, registry = worked(), client.CollectorRegistry()
        registry.register(Collector(drafter))
        read, metrics = scraped(registry), drafter.metrics
        assert read["sssd_begun_total",] == 4
        assert read["sssd_batch_sequences_count",] == 2
        assert read["sssd_nodes_sum",] == metrics["nodes"]["sum"] > 0
        assert read["sssd_accepted_sum",] == metrics["accepted"]["sum"]
        for reason in REASONS:
            assert read["sssd_undrafted_total", ("reason", reason)] == metrics["undrafted"][reason]
        for source, held in drafter.stats["sources"].items():
            assert read["sssd_source_drafted_total", ("source", source)] == held["drafted"]

    def test_bounds_never_change_and_counts_rise(self, client):
        from sssd.metrics import Collector

        registries = []
        for drafter in (private(), worked()):
            registries.append(client.CollectorRegistry())
            registries[-1].register(Collector(drafter))
        fresh, used = map(scraped, registries)
        assert {*fresh} >= {key for key in used if key[0] not in ("sssd_source_drafted_total",)}
        for name in ("nodes", "accepted", "draft_seconds", "batch_seconds", "batch_sequences"):
            buckets = [
                (float(key[1][1]), value) for key, value in used.items() if key[0] == f"sssd_{name}_bucket"
            ]
            bounds, counts = zip(*buckets, strict=True)
            assert list(bounds) == sorted(bounds)
            assert list(counts) == sorted(counts)
            assert (bounds[-1], counts[-1]) == (float("inf"), used[f"sssd_{name}_count",])
            assert 10 <= len(bounds) <= 20

    def test_values_lie_below_their_bounds(self, client):
        from sssd.metrics import Collector

        registry, drafter = client.CollectorRegistry(), private()
        registry.register(Collector(drafter))
        for count in (1, 3, 4):  # at bounds, and one above
            drafter.draft_batch([drafter.begin(PROMPT) for _ in range(count)], 4)
        read = scraped(registry)
        counts = [read["sssd_batch_sequences_bucket", ("le", f"{bound}.0")] for bound in (0, 1, 3, 7)]
        assert counts == [0, 1, 2, 3]

    def test_two_drafters_are_told_apart(self, client):
        from sssd.metrics import Collector

        registry = client.CollectorRegistry()
        collector = Collector(worked(4), labels={"model": "one"})
        collector.add(worked(2), labels={"model": "two"})
        registry.register(collector)
        read = scraped(registry)
        assert read["sssd_begun_total", ("model", "one")] == 4
        assert read["sssd_begun_total", ("model", "two")] == 2
        assert read["sssd_undrafted_total", ("model", "two"), ("reason", "budget")] == 0
        with pytest.raises(ValueError, match="Duplicated timeseries"):
            registry.register(Collector(private(), labels={"model": "three"}))
        registry.register(Collector(private(), "other"))
        assert scraped(registry)["other_begun_total",] == 0

    def test_the_largest_namespaces_are_shown_where_wanted(self, client):
        from sssd.metrics import Collector

        drafter = Drafter(live_bytes=1 << 20, soft_bytes=0)
        for name, length in (("small", 10), ("large", 20_000), ("mid\nline", 5000)):
            drafter.learn(np.arange(length) % 1000, namespace=name)
        for most, shown in ((0, set()), (2, {"large", "mid\nline"})):
            registry = client.CollectorRegistry()
            registry.register(Collector(drafter, namespaces=most))
            read = scraped(registry)
            names = {dict(key[1:])["namespace"] for key in read if key[0] == "sssd_namespace_live_tokens"}
            assert names == shown


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"tier": "x"}, "the same labels"),
        ({"model": "x", "tier": "y"}, "the same labels"),
        ({}, "the same labels"),
        ({"model": "one"}, "already"),
    ],
)
def test_drafters_that_cannot_be_told_apart_are_refused(labels, message):
    drafters = Drafters(private(), labels={"model": "one"})
    with pytest.raises(InvalidArgumentError, match=message):
        drafters.add(private(), labels=labels)


@pytest.mark.parametrize("name", ["source", "le", "reason", "namespace", "two words"])
def test_labels_that_metrics_use_are_refused(name):
    with pytest.raises(InvalidArgumentError, match="cannot be a label"):
        Drafters(private(), labels={name: "x"})


def test_opentelemetry_reads_what_prometheus_does():
    client = pytest.importorskip("prometheus_client")
    sdk = pytest.importorskip("opentelemetry.sdk.metrics")
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    from sssd.metrics import Collector, Instruments

    drafters = {"one": worked(4), "two": worked(2)}
    reader, registry = InMemoryMetricReader(), client.CollectorRegistry()
    provider = sdk.MeterProvider([reader])
    instruments = Instruments(provider.get_meter("sssd"), drafters["one"], labels={"model": "one"})
    instruments.add(drafters["two"], labels={"model": "two"})
    collector = Collector(drafters["one"], labels={"model": "one"})
    collector.add(drafters["two"], labels={"model": "two"})
    registry.register(collector)
    (resource,) = reader.get_metrics_data().resource_metrics
    (scope,) = resource.scope_metrics
    read = {}
    for metric in scope.metrics:
        for point in metric.data.data_points:
            labels = sorted((name, str(value)) for name, value in point.attributes.items())
            read[metric.name.replace(".", "_"), *labels] = point.value
    units = {metric.name: metric.unit for metric in scope.metrics}
    assert (units["sssd.memory_used_bytes"], units["sssd.draft_seconds.sum"]) == ("By", "s")
    wanted = {(re.sub("_total$", "", key[0]), *key[1:]): value for key, value in scraped(registry).items()}
    assert read == wanted
    assert len(read) > 150
    provider.shutdown()


def exported():
    """Names that Prometheus sees of a drafter, a replica and the server, with their labels."""
    pytest.importorskip("prometheus_client")
    from collections import Counter
    from types import SimpleNamespace

    from sssd.metrics import Collector

    counts = {"lag_seconds": 0.0, "failing": 0, "published": 0}
    collectors = [
        Collector(private(), labels={"model": "m"}, namespaces=1, replica=SimpleNamespace(metrics=counts))
    ]
    if pytest.importorskip("torch") and pytest.importorskip("starlette"):
        from sssd.server.metrics import EngineCollector

        engine = SimpleNamespace(counts=Counter(stop=1), running=0, waiting=0, cache=SimpleNamespace(bytes=0))
        collectors.append(EngineCollector(engine, "m"))
    names = {}
    for collector in collectors:
        for family in collector.collect():
            for sample in family.samples:
                names.setdefault(sample.name, set()).update(sample.labels)
    return names


def test_the_board_shows_what_is_exported():
    board = json.loads((ROOT / "docs/grafana.json").read_text())
    names = exported()
    expressions = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    assert len(expressions) > 20
    used = set()
    for expression in expressions:
        asked = set(re.findall(r"sssd_\w+", expression))
        assert asked <= {*names}, expression
        labels = {
            name
            for group in re.findall(r"by \(([^)]*)\)|\{(\w+)=", expression)
            for name in re.findall(r"\w+", " ".join(group))
        }
        for name in asked:
            assert labels <= names[name], expression
        assert expression.count("(") == expression.count(")")
        used |= asked
    assert {"sssd_undrafted_total", "sssd_accepted_sum", "sssd_batch_seconds_bucket"} <= used
    (variable,) = (one for one in board["templating"]["list"] if one["name"] == "model")
    assert re.search(r"sssd_\w+", variable["query"])[0] in names


def test_the_page_names_every_metric():
    text = (ROOT / "docs/metrics.md").read_text()
    for family in Drafters(private(), namespaces=1).families():
        assert f"`{family.name}`" in text, family.name
        for label in family.labels:
            assert f"`{label}`" in text
    assert all(f"| `{reason}` |" in text for reason in REASONS)
