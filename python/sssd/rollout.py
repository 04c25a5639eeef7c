"""Rollouts of reinforcement learning and agents: samples of a prompt that learn from one another as they run.

``docs/rollouts.md``.
"""

import contextlib
import json
import os
import tempfile
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sssd._core import DraftBatch, Drafter, Sequence
from sssd.errors import CorruptStateError, InvalidArgumentError, SssdError
from sssd.requests import Requests

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from sssd.sharing import Replica

_FILE = "rollouts.npz"


@dataclass
class _Rollout:
    """What is known of one that runs: its group, and its tokens when it last handed on what it has said."""

    group: str
    committed: int = 0


@dataclass
class _Group:
    """A prompt group: how many of its rollouts run, and the texts of those that are over, oldest first, each
    with the version of the policy at its end. Stale: its namespace holds texts that are gone from here."""

    running: int = 0
    stale: bool = False
    texts: deque[tuple[int, NDArray[np.int32]]] = field(default_factory=deque)


class Rollouts(Requests):
    """Running rollouts by id. Each prompt group is a namespace: what its samples have said is drafted for its
    other samples, those that still run included, and for those of later epochs.

    As ``Requests``, but for ``begin``, which takes a ``group``, and for what is handed on while a rollout
    runs. Not for use from several threads at once.

    Args:
        drafter: What starts the sequences. Its ``live_bytes`` limit what each group may learn.
        replica: What shares rollouts that finish with other machines, see ``sssd.sharing``.
        commit_tokens: A running rollout hands on what it has said once it is so many tokens longer; 0: only
            when it finishes.
        keep_policies: Texts that ended under an earlier version of the policy than the last so many are
            forgotten, once a rollout of their group begins and no other of it runs, together with the
            weights that the group has learned. Texts are held a second time for that, 4 bytes a token. None
            keeps all, as far as ``live_bytes`` go.

    Raises:
        InvalidArgumentError: ``commit_tokens`` is negative, or ``keep_policies`` less than 1.
    """

    def __init__(
        self,
        drafter: Drafter,
        replica: "Replica | None" = None,
        *,
        commit_tokens: int = 8,
        keep_policies: int | None = None,
    ) -> None:
        super().__init__(drafter, replica)
        if commit_tokens < 0:
            raise InvalidArgumentError(f"commit_tokens must be at least 0, not {commit_tokens}")
        if keep_policies is not None and keep_policies < 1:
            raise InvalidArgumentError(f"keep_policies must be at least 1, or None, not {keep_policies}")
        self.commit_tokens, self.keep_policies = commit_tokens, keep_policies
        self._policy = 0
        self._groups: dict[str, _Group] = {}
        self._running: dict[str, _Rollout] = {}

    @property
    def policy(self) -> int:
        """Version of the policy that rollouts are sampled from; set by who trains."""
        return self._policy

    @policy.setter
    def policy(self, version: int) -> None:
        self._policy = version
        if self.keep_policies is None:
            return
        for name, group in list(self._groups.items()):
            while group.texts and group.texts[0][0] <= version - self.keep_policies:
                group.texts.popleft()
                group.stale = True
            if not group.texts and not group.running:
                self.drafter.remove_namespace(name)
                del self._groups[name]

    def begin(
        self,
        request_id: str,
        prompt_ids: "ArrayLike",
        prediction: "ArrayLike | None" = None,
        *,
        group: str | None = None,
        **options: Any,
    ) -> Sequence:
        """Starts a rollout; else as ``Requests.begin``.

        Args:
            request_id: Of the rollout.
            prompt_ids: Tokens of the prompt.
            prediction: As in ``Drafter.begin``.
            group: The name of its prompt group, which becomes its ``namespace``.
            **options: What else ``Drafter.begin`` takes.

        Raises:
            As ``Requests.begin``.
        """
        if group is not None:
            options["namespace"] = group
        self._renew(options.get("namespace", ""))
        sequence = super().begin(request_id, prompt_ids, prediction, **options)
        self._enter(request_id, sequence)
        return sequence

    def fork(self, request_id: str, new_id: str) -> Sequence:
        """As ``Requests.fork``: samples of one prompt may share the index of its tokens."""
        sequence = super().fork(request_id, new_id)
        self._enter(new_id, sequence)
        return sequence

    def step(self, request_ids: SequenceABC[str | None], *args: Any, **options: Any) -> DraftBatch:
        """As ``Requests.step``; then rollouts that have become longer hand on what they have said."""
        try:
            return super().step(request_ids, *args, **options)
        finally:
            self.commit(request_ids)

    def commit(self, request_ids: Iterable[str | None] | None = None) -> None:
        """Has rollouts hand on what they have said, where it is ``commit_tokens`` more than before.

        Args:
            request_ids: Which; by default all that run.
        """
        if not self.commit_tokens:
            return
        for request_id in self if request_ids is None else request_ids:
            if request_id is None or request_id not in self._running:
                continue
            rollout, sequence = self._running[request_id], self[request_id]
            length = len(sequence)
            if length >= rollout.committed + self.commit_tokens:
                rollout.committed = length
                # one that has failed says so in its next step
                with contextlib.suppress(SssdError):
                    sequence.commit()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a snapshot, such as one for each epoch: what the drafter has learned, as ``Drafter.save``
        does, and which policy each text is of.

        Args:
            folder: Made if need be. It may hold one snapshot; whatever happens, each of its two files is the
                old or the new one.

        Raises:
            OSError: The folder cannot be written.
        """
        self.drafter.save(folder)
        held = [(name, *text) for name, group in self._groups.items() for text in group.texts]
        names = sorted({name for name, _, _ in held})
        place = {name: number for number, name in enumerate(names)}
        texts = [text for _, _, text in held]
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            try:
                np.savez(
                    file,
                    names=np.frombuffer(json.dumps(names).encode(), np.uint8),
                    groups=np.array([place[name] for name, _, _ in held], np.int64),
                    policies=np.array([policy for _, policy, _ in held], np.int64),
                    offsets=np.cumsum([0, *map(len, texts)], dtype=np.int64),
                    token_ids=np.concatenate(texts) if texts else np.zeros(0, np.int32),
                )
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, Path(folder) / _FILE)
            except BaseException:
                os.unlink(file.name)
                raise

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], *, options: Mapping[str, Any] | None = None, **settings: Any
    ) -> "Rollouts":
        """Rollouts that go on from a snapshot; ``policy`` is that of its newest text.

        Args:
            folder: As given to ``save``.
            options: What ``Drafter.load`` takes.
            **settings: Of the rollouts, as in ``Rollouts(...)``.

        Raises:
            OSError: A file cannot be read.
            CorruptStateError: One is damaged, or no snapshot.
            As ``Drafter.load``.
        """
        rollouts = cls(Drafter.load(folder, **(options or {})), **settings)
        for name, policy, text in _read(Path(folder) / _FILE):
            rollouts._groups.setdefault(name, _Group()).texts.append((policy, text))
            rollouts._policy = max(rollouts._policy, policy)
        return rollouts

    def _enter(self, request_id: str, sequence: Sequence) -> None:
        self._running[request_id] = _Rollout(sequence.namespace)
        self._groups.setdefault(sequence.namespace, _Group()).running += 1

    def _remove(self, request_id: str) -> Sequence | None:
        rollout = self._running.pop(request_id, None)
        if rollout is not None:
            group = self._groups[rollout.group]
            group.running -= 1
            if not group.running and self.keep_policies is None:
                del self._groups[rollout.group]
        return super()._remove(request_id)

    def _finish(self, sequence: Sequence) -> None:
        if self.keep_policies is not None:
            group = self._groups.setdefault(sequence.namespace, _Group())
            group.texts.append((self.policy, sequence.token_ids))
        super()._finish(sequence)

    def _renew(self, name: str) -> None:
        """Teaches a group anew, without the texts that it is to forget."""
        group = self._groups.get(name)
        if group is None or group.running or not group.stale:
            return
        group.stale = False
        self.drafter.remove_namespace(name)
        for _, text in group.texts:
            self.drafter.learn(text, namespace=name)


def _read(path: Path) -> Iterator[tuple[str, int, NDArray[np.int32]]]:
    """The texts of a snapshot, each with the name of its group and its version of the policy."""
    try:
        with zipfile.ZipFile(path) as file:
            # it was written without compression: what claims to be more would only take memory
            if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed")
        with np.load(path, allow_pickle=False) as arrays:
            names = json.loads(arrays["names"].tobytes())
            groups, policies, offsets, token_ids = (
                arrays[name] for name in ("groups", "policies", "offsets", "token_ids")
            )
    except OSError:
        raise
    except Exception as problem:  # of zipfile, numpy and json, for bytes that anybody may have written
        raise CorruptStateError(f"{path} is no snapshot of rollouts: {problem}") from problem
    if not (
        all(array.dtype.kind == "i" and array.ndim == 1 for array in (groups, policies, offsets, token_ids))
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and len(groups) == len(policies) == len(offsets) - 1
        and all((groups >= 0) & (groups < len(names)))
        and offsets[0] == 0
        and offsets[-1] == len(token_ids)
        and all(np.diff(offsets) >= 0)
    ):
        raise CorruptStateError(f"{path} is no snapshot of rollouts: its arrays do not fit one another")
    for number, policy, start, end in zip(groups, policies, offsets, offsets[1:], strict=False):
        yield names[number], int(policy), token_ids[start:end].astype(np.int32)
