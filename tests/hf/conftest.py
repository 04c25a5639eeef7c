"""The whole suite once more on fixed buffers, as on a GPU: ``SSSD_TEST_FIXED_BUFFERS=1``."""

import os

import pytest


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
