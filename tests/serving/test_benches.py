"""The serving benches run, and the soak finds nothing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHES = Path(__file__).parents[2] / "benches"


def run(script, *arguments):
    command = [sys.executable, str(BENCHES / script), *map(str, arguments)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)


@pytest.mark.slow
def test_the_soak(tmp_path):
    rng, trace, figures = np.random.default_rng(0), tmp_path / "trace.jsonl", tmp_path / "figures.json"
    with trace.open("w") as lines:
        for _ in range(20):
            passage = rng.integers(0, 200, 300)
            response = np.where(rng.random(300) < 0.05, rng.integers(0, 200, 300), passage)
            record = {"prompt_ids": passage.tolist(), "response_ids": response.tolist()}
            lines.write(json.dumps(record) + "\n")
    run("soak.py", trace, "--minutes", 0.1, "--json", figures)
    found = json.loads(figures.read_text())
    assert found["problems"] == []
    assert found["counts"]["drafts equal to the twins'"] > 100


@pytest.mark.slow
def test_the_step_benchmark(tmp_path):
    figures = tmp_path / "figures.json"
    run("serving.py", "--json", figures, "--batch", 8, "--context", 200, "--steps", 60)
    found = json.loads(figures.read_text())
    assert all(found[f"step_ms_{way}"] > 0 for way in ("one_thread", "two_threads", "single_calls"))


def test_calibration_tells_what_is_outside_and_keeps_other_modes(tmp_path):
    rng, figures = np.random.default_rng(0), tmp_path / "figures.json"
    with (tmp_path / "dev.copies.jsonl").open("w") as lines:
        for _ in range(3):
            passage = rng.integers(0, 200, 100)
            record = {"prompt_ids": passage.tolist(), "response_ids": passage.tolist()}
            lines.write(json.dumps(record) + "\n")
    for modes in ("alone; store", "live"):
        run("calibration.py", tmp_path, "--budgets", "4,64", "--modes", modes, "--json", figures)
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["mode"], row["budget"]) for row in rows] == [
        ("alone", 4),
        ("alone", 64),
        ("live", 4),
        ("live", 64),
    ]
    for row in rows:
        low, high = (0.92, 1.1) if row["budget"] == 4 else (0.9, 1.12)
        assert row["accepted_per_step"] > 0.2
        assert row["within"] is (low <= row["sum_over_accepted"] <= high)
