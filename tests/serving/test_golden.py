"""Files that a release has written: read as what they were, and written again to the byte.

A change of the bytes is a new version of the format, and gets a new file beside the old one:
``python tests/serving/test_golden.py`` writes what is not there yet.
"""

import lzma
import struct
from pathlib import Path

import numpy as np
import pytest

from sssd import Drafter
from sssd.hardware import CostCurve, DraftCost

FOLDER = Path(__file__).parents[1] / "data" / "golden"
STATES = sorted(FOLDER.glob("state-*.xz"))
CURVES = sorted(FOLDER.glob("curve-*.json"))
FILE = "drafter.sssd-state"
DOCUMENT = [index * 7 % 1009 for index in range(600)]
"""Fits into the bytes of the live store, and not into those of the target's probabilities."""
OPTIONS = {"vocab_size": 2000, "end_token_ids": [1997, 1998], "live_bytes": 1 << 17, "soft_bytes": 1 << 13}
NAMES = ["", "ä"]
CURVE = {
    "packed": True,
    "ready": (1, 4, 9),
    "draft": DraftCost(1e-5, 2e-6, 3e-7, 2),
    "source": "measured",
    "device": "a device",
    "model": "ä model",
    "dtype": "float32",
    "attention": "an attention",
    "intensity": 123.5,
}


def taught():
    drafter = Drafter(**OPTIONS, threads=1)
    for number, name in enumerate(NAMES):
        drafter.begin(DOCUMENT, namespace=name).finish()
        with drafter.begin(DOCUMENT[number : number + 5], namespace=name) as sequence:
            for token in DOCUMENT[number + 5 : number + 12]:
                sequence.draft(8)
                sequence.extend([token], [[1990 + number, token]], [[0.5, 0.25]])
            sequence.finish()
    return drafter


def curve():
    seconds = np.arange(1, 13).reshape(2, 3, 2) / 1000
    return CostCurve([1, 8], [1, 4, 9], [0, 1000], seconds, **CURVE)


class Reader:
    """Reads the bytes of a state, as ``docs/serving.md`` describes them."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self):
        return struct.unpack("<Q", self.take(8))[0]

    def tokens(self):
        return np.frombuffer(self.take(4 * self.number()), "<u4").tolist()

    def state(self):
        """What the drafter is, and by namespace its weights, documents and entries."""
        state = {"vocab_size": self.number(), "end_token_ids": self.tokens()}
        state |= {"live_bytes": self.number(), "soft_bytes": self.number()}
        namespaces = {}
        while kind := self.take(1)[0]:
            if kind == 1:
                name = self.take(self.number()).decode()
                namespaces[name] = (self.take(self.number()), [], [])
                expected = self.number()
            elif kind == 2:
                used = struct.unpack("<I", self.take(4))[0]
                namespaces[name][1].append((used, self.tokens()))
            else:
                assert kind == 3
                namespaces[name][2].append(self.take(64))
                assert len(namespaces[name][2]) <= expected
        assert self.at == len(self.data)
        return state, namespaces


@pytest.mark.parametrize("path", STATES, ids=lambda path: path.name)
def test_a_state_of_a_release_is_read_as_what_it_was_and_written_again_to_the_byte(path, tmp_path):
    data = lzma.decompress(path.read_bytes())
    version = struct.unpack("<I", data[8:12])[0]
    assert path.name == f"state-{version}.xz"
    identity, namespaces = Reader(data[20:-8]).state()
    assert identity == OPTIONS
    assert list(namespaces) == NAMES
    (tmp_path / FILE).write_bytes(data)
    drafter = Drafter.load(tmp_path, threads=1)
    assert (drafter.vocab_size, drafter.end_token_ids.tolist()) == (2000, [1997, 1998])
    for number, name in enumerate(NAMES):
        weights, documents, feedback = namespaces[name]
        assert documents[0][1] == DOCUMENT
        assert any(used > 0 for used, _ in documents)
        assert feedback
        held = drafter.namespaces()[name]
        assert held["live_tokens"] == sum(len(tokens) for _, tokens in documents)
        with drafter.begin(DOCUMENT[100:104], namespace=name) as sequence:
            assert weights in sequence.state_dict().values()
            assert sequence.draft(1, min_prob=0).token_ids.tolist() == DOCUMENT[104:105]
            sequence.close()
        with drafter.begin(DOCUMENT[number : number + 8], namespace=name) as sequence:
            assert 1990 + number in sequence.draft(16, min_prob=0).token_ids, "what the target held probable"
            sequence.close()
    drafter.save(tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == data


@pytest.mark.parametrize("path", CURVES, ids=lambda path: path.name)
def test_a_curve_of_a_release_is_read_as_what_it_was_and_written_again_to_the_byte(path, tmp_path):
    loaded = CostCurve.load(path)
    expected = curve()
    for name in ("batches", "tokens", "contexts", "seconds"):
        assert np.array_equal(getattr(loaded, name), getattr(expected, name)), name
    assert {name: getattr(loaded, name) for name in CURVE} == CURVE
    assert path.name == f"curve-{loaded.to_json()['version']}.json"
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_the_versions_that_are_written_have_a_file(tmp_path):
    taught().save(tmp_path)
    version = struct.unpack("<I", (tmp_path / FILE).read_bytes()[8:12])[0]
    assert f"state-{version}.xz" in [path.name for path in STATES]
    assert f"curve-{curve().to_json()['version']}.json" in [path.name for path in CURVES]


def write(folder):
    taught().save(folder)
    written = folder / FILE
    data = written.read_bytes()
    written.unlink()
    state = FOLDER / f"state-{struct.unpack('<I', data[8:12])[0]}.xz"
    if not state.exists():
        state.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    path = FOLDER / f"curve-{curve().to_json()['version']}.json"
    if not path.exists():
        curve().save(path)


if __name__ == "__main__":
    write(FOLDER)
