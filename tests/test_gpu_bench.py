"""The GPU measurements, rehearsed on tiny models without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parent.parent
GPU = ROOT / "benches" / "gpu"


def test_every_stage_runs(tmp_path):
    command = [sys.executable, str(GPU / "measure.py"), "--rehearse", "--out", str(tmp_path)]
    environment = {**os.environ, "SSSD_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["failed"] == []
    replay = results["correct"]["graph_replay"]
    assert replay["bit_for_bit"] == replay["passes"] > 20
    assert results["width_ratio"]["ratio"] > 0
    ways = {row["way"]: row.get("tokens_per_second", row.get("error")) for row in results["generate"]}
    assert len(ways) == 6
    assert all(isinstance(ways[way], float) for way in ways if way.startswith(("sssd", "transformers"))), ways
    kernels = results["kernels"][0]
    assert kernels["sdpa, grouped queries"]["error"] < 1e-5
    assert (tmp_path / "curve.json").is_file()
