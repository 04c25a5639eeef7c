"""Once more on fixed buffers, as on a GPU, what may depend on them: ``SSSD_TEST_FIXED_BUFFERS=1``."""

import os

import interpreter  # noqa: F401
import pytest

NO_PASSES = {"test_architectures.py", "test_conversion.py", "test_kernels.py"}
"""Tests that run no pass of ``sssd.hf.passes``."""
ONE_OF_EACH = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "mamba"}
"""Of all architectures: the fast path, which has the buffers, and each of the other two ways."""


def once_is_enough(item):
    """Whether a test does the same with ``SSSD_TEST_FIXED_BUFFERS=1`` as without."""
    if item.path.name == "test_every_architecture.py":
        return item.callspec.params["name"] not in ONE_OF_EACH if hasattr(item, "callspec") else True
    return item.path.name in NO_PASSES or bool({"static", "growing"} & set(item.fixturenames))


def pytest_collection_modifyitems(config, items):
    if os.environ.get("SSSD_TEST_FIXED_BUFFERS"):
        config.hook.pytest_deselected(items=[item for item in items if once_is_enough(item)])
        items[:] = [item for item in items if not once_is_enough(item)]


@pytest.fixture(autouse=True)
def fixed_buffers(monkeypatch):
    if os.environ.get("SSSD_TEST_FIXED_BUFFERS"):
        monkeypatch.setattr("sssd.hf.passes.STATIC_DEVICES", {"cpu", "cuda"})


@pytest.fixture
def static(monkeypatch):
    """Fixed buffers on the CPU too, where nothing is recorded but everything else is as on a GPU."""
    monkeypatch.setattr("sssd.hf.passes.STATIC_DEVICES", {"cpu", "cuda"})


@pytest.fixture
def growing(monkeypatch):
    """Buffers that grow, on a GPU too."""
    monkeypatch.setattr("sssd.hf.passes.STATIC_DEVICES", set())


@pytest.fixture
def by_kernels(static, monkeypatch):
    """Passes by the Triton kernels on the CPU, as on a GPU."""
    pytest.importorskip("triton", reason="needs triton")
    monkeypatch.setattr("sssd.hf.kernels.DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr("sssd.hf.fast._should_pack", lambda model: False)
