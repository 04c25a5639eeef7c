"""The steps of a replayed request, to be looked at one by one."""

import base64
import gzip
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd._core import DraftTree
from sssd.pictures.svg import plain, source_class
from sssd.pictures.trees import Decode, draw_tree
from sssd.replay import Request

_PROMPT_SHOWN = 120
_AROUND = 3
"""Tokens before one that may change how it is written (spaces, characters of several tokens)."""


@dataclass
class Steps:
    """Watches a request that is replayed (``Replay.run(watch=)``), and keeps what a page shows of it.

    Args:
        name: What to call the request.
        request: The request.
        decode: Turns a list of token ids into text; ids are shown without it.
        most: Steps to keep.
    """

    name: str
    request: Request
    decode: Decode | None = None
    most: int = 100
    steps: list[dict[str, Any]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    """How each token of the response is coloured, as far as the steps go."""

    def __call__(self, position: int, tree: DraftTree, path: NDArray[np.int64]) -> None:
        """Takes one step."""
        if len(self.steps) >= self.most:
            return
        response = self.request.response_ids
        end = min(position + len(path) + 1, len(response))
        bonus = int(response[end - 1]) if end - position > len(path) else None
        last = response[position - 1] if position else (*self.request.prompt_ids, 0)[-1]
        nodes = path.tolist()
        picture = draw_tree(
            tree,
            self.decode,
            root=self._text([int(last)]),
            accepted=nodes,
            bonus=bonus,
            styled=False,
        )
        self.sources += [""] * (position - len(self.sources))
        self.sources += [source_class(source) for source in tree.sources[path].tolist()]
        self.steps.append({"from": position, "to": end, "svg": picture, "why": self._why(tree, nodes, bonus)})

    def _why(self, tree: DraftTree, path: list[int], bonus: int | None) -> str:
        """What was accepted, and why no more."""
        if not len(tree):
            return "Nothing was drafted: no source knew a continuation that is likely enough."
        drafted = (
            f"{len(tree)} nodes drafted, {tree.expected_accepted:.2f} expected to be accepted, "
            f"{len(path)} accepted"
        )
        if bonus is None:
            return f"{drafted}; the recording ends here."
        last = path[-1] if path else -1
        after = f"after {self._shown(tree.token_ids[last])}" if path else "at the root"
        there = np.flatnonzero(tree.parents == last).tolist()
        said = f"the target said {self._shown(bonus)} {after}"
        if not there:
            return f"{drafted}: all of this branch; {said}, where the tree goes no further."
        others = ", ".join(
            f"{self._shown(tree.token_ids[node])} {tree.probs[node]:.2f}" for node in there[:4]
        )
        return f"{drafted}; {said}, where the draft has {others}{', …' if len(there) > 4 else ''}."

    def _text(self, ids: list[int]) -> str:
        return self.decode(ids) if self.decode else " ".join(map(str, ids))

    def _shown(self, token: int) -> str:
        return f"“{plain(self._text([int(token)]))}”"

    def packed(self) -> str:
        """Everything as JSON, gzipped, in base64: no text of a trace stands in the page as it is."""
        prompt = [int(token) for token in self.request.prompt_ids[-_PROMPT_SHOWN:]]
        end = self.steps[-1]["to"] if self.steps else 0
        response = [int(token) for token in self.request.response_ids[:end]]
        data = {
            "prompt": ("… " if len(self.request.prompt_ids) > len(prompt) else "") + self._text(prompt),
            "tokens": self._pieces(prompt, response),
            "sources": [*self.sources, ""][:end],
            "steps": self.steps,
            "left": len(self.request.response_ids) - end,
        }
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), mtime=0)).decode()

    def _pieces(self, prompt: list[int], response: list[int]) -> list[str]:
        """The text of each token of the response where it stands."""
        if not self.decode:
            return [f" {token}" for token in response]
        ids, pieces = [*prompt, *response], []
        for place in range(len(prompt), len(ids)):
            before = ids[max(place - _AROUND, 0) : place]
            known = self.decode(before) if before else ""
            both = self.decode([*before, ids[place]])
            pieces.append(both[len(known) :] if both.startswith(known) else self.decode([ids[place]]))
        return pieces
