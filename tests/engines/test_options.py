"""``sssd.options``: what can be set where an engine makes the drafter."""

import json

import pytest

from sssd.errors import InvalidArgumentError
from sssd.options import Options


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    monkeypatch.delenv("SSSD_ENGINE", raising=False)


def test_the_environment_goes_before_the_configuration(monkeypatch, tmp_path):
    assert Options.read("SSSD_ENGINE", {"threads": 3}).threads == 3
    monkeypatch.setenv("SSSD_ENGINE", '{"threads": 4, "stop": false}')
    assert Options.read("SSSD_ENGINE", {"threads": 3, "learn": False}) == Options(
        threads=4, stop=False, learn=False
    )
    for name, text in (
        ("a.json", json.dumps({"datastore": ["x", "y"]})),
        ("a.toml", 'datastore = ["x", "y"]'),
    ):
        (tmp_path / name).write_text(text)
        monkeypatch.setenv("SSSD_ENGINE", str(tmp_path / name))
        assert Options.read("SSSD_ENGINE").datastore == ["x", "y"]


@pytest.mark.parametrize(
    "value",
    [
        {"threds": 2},
        {"threads": "2"},
        {"threads": True},
        {"threads": None},
        {"stop": 1},
        {"datastore": [1]},
        {"datastore": {}},
        {"min_prob": "0.1"},
        {"curve": 3},
        [],
        "text",
    ],
)
def test_what_is_no_option_is_refused(value):
    with pytest.raises(InvalidArgumentError, match=r"option"):
        Options.read("SSSD_ENGINE", value)


@pytest.mark.parametrize("text", ["{", "{]", "[1]", "/no/such/file.json", "no toml = ="])
def test_unreadable_settings_are_refused(monkeypatch, tmp_path, text):
    if "toml" in text:
        (tmp_path / "a.toml").write_text(text)
        text = str(tmp_path / "a.toml")
    monkeypatch.setenv("SSSD_ENGINE", text)
    with pytest.raises(InvalidArgumentError):
        Options.read("SSSD_ENGINE")


@pytest.mark.parametrize("value", [0.5, 1])
def test_numbers_may_be_whole(value):
    assert Options.read("SSSD_ENGINE", {"min_prob": value}).min_prob == value
