"""Measuring the verify pass, and where curves are kept."""

import json
import logging

import pytest

torch = pytest.importorskip("torch")

from models import tiny_model  # noqa: E402

from sssd import hardware, hf  # noqa: E402
from sssd.cli import main  # noqa: E402
from sssd.errors import InvalidArgumentError, UnsupportedModelError  # noqa: E402
from sssd.hardware import CostCurve  # noqa: E402
from sssd.hf import profile as profiling  # noqa: E402

SMALL = {"batches": (1, 2), "widths": (1, 2, 8), "contexts": (16, 64), "repeats": 1}
PROMPT = torch.tensor([[5, 9, 33, 12] * 5])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSSD_CACHE", str(tmp_path))
    return tmp_path


def test_measures_once_and_is_used_from_then_on(caplog):
    model = tiny_model("llama", "sdpa")
    seen = []
    curve = hardware.profile(model, progress=lambda done, total: seen.append((done, total)), **SMALL)
    assert curve.source == "measured"
    assert curve.seconds.shape == (2, 3, 2)
    assert seen == [(done, 24) for done in range(25)]
    assert profiling.cache_file(model).is_file()
    again = hardware.profile(model, progress=lambda done, total: pytest.fail("measured again"))
    assert again.to_json() == CostCurve.load(profiling.cache_file(model)).to_json()
    with caplog.at_level(logging.INFO, "sssd.hf.profile"):
        hf.generate(model, PROMPT, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert "sized by a measured curve" in caplog.text
    (rule,) = profiling._rules[model].values()
    assert rule.curve.source == "measured"


def test_other_axes_are_measured_anew():
    model = tiny_model("llama", "sdpa")
    first = hardware.profile(model, **SMALL)
    unasked = lambda done, total: pytest.fail("measured again")  # noqa: E731
    assert hardware.profile(model, contexts=(16, 64), progress=unasked).to_json() == first.to_json()
    assert hardware.profile(model, **{**SMALL, "widths": (1, 4)}).tokens.tolist() == [1, 4]
    assert hardware.profile(model, progress=unasked).tokens.tolist() == [1, 4]


def test_without_measurements_an_estimate_serves():
    model = tiny_model("llama", "sdpa")
    hf.generate(model, PROMPT, max_new_tokens=4, do_sample=False, pad_token_id=0)
    (rule,) = profiling._rules[model].values()
    assert rule.curve.source == "roofline"


def test_curves_are_told_apart_by_what_matters():
    files = {
        profiling.cache_file(model, fast_path)
        for model in (tiny_model("llama", "sdpa"), tiny_model("llama", "eager"), tiny_model("qwen2", "sdpa"))
        for fast_path in (True, False)
    }
    files.add(profiling.cache_file(tiny_model("llama", "sdpa").bfloat16()))
    files.add(profiling.cache_file(tiny_model("llama", "sdpa", num_hidden_layers=3)))
    assert len(files) == 8
    assert profiling.cache_file(tiny_model("llama", "sdpa", seed=5)) in files


@pytest.mark.parametrize("content", ["", "{}", '{"format": "sssd cost curve", "version": 1}'])
def test_a_damaged_curve_is_put_aside_with_a_warning(content, caplog):
    model = tiny_model("llama", "sdpa")
    path = profiling.cache_file(model)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with caplog.at_level(logging.WARNING, "sssd.hf.profile"):
        hf.generate(model, PROMPT, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert str(path) in caplog.text
    assert hardware.profile(model, **SMALL).source == "measured"


@pytest.mark.parametrize(
    "change",
    [
        {"batches": ()},
        {"batches": (2, 1)},
        {"widths": (2, 4)},
        {"contexts": (0, 5)},
        {"contexts": (300,)},
        {"widths": ()},
        {"contexts": (256,)},
        {"repeats": 0},
        {"batches": (10**7,)},
    ],
)
def test_absurd_grids_are_refused(change):
    with pytest.raises(InvalidArgumentError):
        hardware.profile(tiny_model("llama", "sdpa"), **{**SMALL, **change})


def test_models_that_cannot_be_verified_are_refused():
    model = tiny_model("llama", "sdpa")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError):
        hardware.profile(model, **SMALL)


def test_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "model"
    tiny_model("llama", "sdpa").save_pretrained(folder)
    out, plot = tmp_path / "curve.json", tmp_path / "curve.png"
    command = ["profile", str(folder), "--batch", "1", "--width", "1,4", "--context", "16"]
    assert main([*command, "--out", str(out), "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "ms" in shown
    assert "12 passes in" in shown
    assert main(["profile", str(folder)]) == 0
    assert "--refresh measures anew" in capsys.readouterr().out
    for option in (
        ["--dtype", "int8"],
        ["--dtype", "nonsense"],
        ["--device", "nowhere"],
        ["--batch", "999999"],
    ):
        assert main(["profile", str(folder), *option]) == 1
        assert "error: " in capsys.readouterr().err
    for numbers in ("0", "1,x", "", "99999999"):
        with pytest.raises(SystemExit):
            main(["profile", str(folder), "--width", numbers])
    assert json.loads(out.read_text())["source"] == "measured"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["profile", str(tmp_path / "nothing")]) == 1
    assert "no model folder" in capsys.readouterr().err
