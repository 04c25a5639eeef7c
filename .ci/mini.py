"""Gathers the text of the mini store (packages/mini) from recorded answers. Run by `make mini`.

    .venv/bin/python .ci/mini.py ../shared/traces

Takes equal shares, by bytes, of those sources whose licence lets the text be passed on, without the answers
of models whose terms do not. No document stays that holds much of a recorded answer of the dev split: the
figures are measured on these.
"""

import json
import lzma
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sssd.corpus.select import evenly

PACKAGE = Path(__file__).resolve().parent.parent / "packages/mini"
BYTES = 13_000_000
SOURCES = {
    "chat-en.arena-hard": ("lmarena/arena-hard-auto", "Apache-2.0"),
    "chat-ja.shaberi": ("shisa-ai/shaberi", "Apache-2.0"),
    "code.livecodebench": ("LiveCodeBench/submissions", "MIT"),
    "exam-zh.gaokao": ("OpenLMLab/GAOKAO-Bench", "Apache-2.0"),
    "math.tora-gsm8k": ("microsoft/ToRA", "MIT"),
    "reasoning.farel-bench": ("fairydreaming/farel-bench", "MIT"),
    "stem.dynamic-cheatsheet": ("suzgunmirac/dynamic-cheatsheet", "MIT"),
    "stem.mmlu-pro": ("TIGER-AI-Lab/MMLU-Pro", "MIT"),
    "translation.alma": ("fe1ixxu/ALMA", "MIT"),
}
"""Repository and licence of each file. alpaca_eval is for non-commercial use, and WildBench's terms (AI2
ImpACT) restrict what may be done with it.
"""
RESTRICTED = ("CohereForAI/", "mistralai/Mistral-Large", "Nexusflow/", "TowerInstruct")
"""Models whose licence restricts the use of what they write, or forbids a commercial one."""
WINDOW, STEP = 96, 16
"""Bytes that are compared at once, some 20 tokens; from an answer one such window is taken every 16 bytes."""
MOST_SHARED = 0.25
"""Of the windows of a recorded answer, those that a document may hold."""


def windows(text: bytes, step: int) -> NDArray[np.uint64]:
    """Hashes of windows of a text, by their polynomial in a base, modulo 2^64."""
    values = np.frombuffer(text, np.uint8).astype(np.uint64) + np.uint64(1)
    count = len(values) - WINDOW + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for start in range(WINDOW):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + values[start : start + count]
    return hashes[::step]


def rows(path: Path) -> Iterator[dict[str, object]]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def answers(record: dict) -> Iterator[str]:
    turns = record.get("turns") or [{"role": "assistant", "content": record["response"]}]
    yield from (turn["content"] for turn in turns if turn["role"] == "assistant")


class Recorded:
    """Windows of all recorded answers."""

    def __init__(self, folder: Path) -> None:
        pieces = [
            windows(answer.encode(), STEP)
            for path in sorted(folder.glob("*.jsonl.xz"))
            for record in rows(path)
            for answer in answers(record)
        ]
        self.answers = len(pieces)
        self.sizes = np.array([max(1, len(piece)) for piece in pieces])
        owners = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
        hashes = np.concatenate(pieces)
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.owners = hashes[order], owners[order]

    def shared(self, found: NDArray[np.uint64]) -> NDArray[np.float64]:
        """Of each answer the part that is among these windows, float64 [answers]."""
        found = np.unique(found)
        start, end = np.searchsorted(self.hashes, found), np.searchsorted(self.hashes, found, "right")
        hits = [np.empty(0, np.int64), *map(np.arange, start[end > start], end[end > start])]
        return np.bincount(self.owners[np.concatenate(hits)], minlength=self.answers) / self.sizes


def row(name: str, texts: list[str]) -> str:
    """What SOURCES.md says of a source."""
    size = sum(len(text.encode()) for text in texts)
    return f"| {name} | {' | '.join(SOURCES[name])} | {len(texts):,} | {size:,} |\n"


def main(traces: Path) -> None:
    recorded = Recorded(traces / "dev")
    documents: list[tuple[str, str]] = []
    left_out = dict.fromkeys(("restricted", "recorded"), 0)
    for name in SOURCES:
        for record in rows(traces / "datastore" / f"{name}.jsonl.xz"):
            text = str(record["text"])
            if any(part in str(record["model"]) for part in RESTRICTED):
                left_out["restricted"] += 1
            elif recorded.shared(windows(text.encode(), 1)).max() > MOST_SHARED:
                left_out["recorded"] += 1
            else:
                documents.append((name, text))
    sizes = np.array([len(text.encode()) for _, text in documents])
    groups = np.array([list(SOURCES).index(name) for name, _ in documents])
    chosen = [documents[place] for place in evenly(sizes, groups, BYTES)]
    lines = [json.dumps({"text": text, "source": name}, ensure_ascii=False) + "\n" for name, text in chosen]
    packed = lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)
    (PACKAGE / "src/sssd_mini/texts.jsonl.xz").write_bytes(packed)
    table = "".join(row(name, [text for source, text in chosen if source == name]) for name in SOURCES)
    told = (PACKAGE / "SOURCES.md").read_text()
    told = re.sub(r"(?<=\| --: \|\n)(\|.*\n)*", table, told, count=1)
    (PACKAGE / "SOURCES.md").write_text(told)
    print(table)
    every = recorded.shared(np.unique(np.concatenate([windows(text.encode(), 1) for _, text in chosen])))
    print(f"{len(packed):,} bytes; left out {left_out}; recorded answers: {recorded.answers:,}")
    print(
        f"shared by all documents together: mean {every.mean():.3%}, answers over half {(every > 0.5).sum()}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
