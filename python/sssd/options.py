"""What can be set where an engine makes the drafter: in a file, the environment, or its configuration."""

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sssd._core import Drafter
from sssd.errors import InvalidArgumentError
from sssd.mini import MINI

MOST_PREDICTED = 1 << 20
"""Characters or tokens of a prediction that are looked at."""
_MOST_NAME = 256
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Options:
    """Options of the adapters for engines.

    Attributes:
        datastore: a datastore file, a corpus folder, or several files that are one store; ``"mini"`` for the
            mini store of the model's tokenizer (``docs/mini.md``), None for none.
        load: ``"mmap"`` or ``"ram"``, see ``Drafter``.
        live_bytes: what each namespace may learn from finished requests.
        max_bytes: what the drafter may hold in all. Requests beyond it are decoded without drafts.
        threads: for the drafting of a step.
        namespace_ttl: seconds after which a namespace that nobody uses is forgotten.
        ranking: whether candidates are ranked by the datastore's tables, where it has some.
        learn: whether later requests learn from finished ones.
        stop: whether drafts that do not pay are left out, by the times of the engine's own steps.
        curve: file of a cost curve to begin with (``python -m sssd profile``); by default by the model's
            shape and the device's data sheet.
        min_prob: the least probability of a drafted token where ``stop`` is off.
        commit_tokens: running requests hand on what they have said every so many tokens, to others of their
            namespace, as samples of one prompt want it (``docs/rollouts.md``); 0: only when they finish.
        keep_policies: what is learned is forgotten after so many versions of the policy, as ``sssd_policy``
            of requests says; None: never.
    """

    datastore: str | list[str] | None = MINI
    load: Literal["mmap", "mmap-wait", "ram"] = "mmap"
    live_bytes: int | str = "256M"
    max_bytes: int | str = "2G"
    threads: int = 1
    namespace_ttl: float | None = 3600.0
    ranking: bool = True
    learn: bool = True
    stop: bool = True
    curve: str | None = None
    min_prob: float = 0.02
    commit_tokens: int = 0
    keep_policies: int | None = None

    @classmethod
    def read(cls, variable: str, given: Any = None) -> "Options":
        """The options in force: what is given, and over it what the environment says.

        Args:
            variable: the environment variable that holds options as JSON, or names a .json or .toml file.
            given: a mapping of the engine's configuration; None for nothing.

        Raises:
            InvalidArgumentError: an option is unknown or no such value, or the file cannot be read.
        """
        values = {**_mapping(given, "the options of sssd"), **_environment(variable)}
        known = {field.name: field for field in fields(cls)}
        if unknown := sorted(values.keys() - known.keys()):
            names = ", ".join(map(str, unknown))
            raise InvalidArgumentError(
                f"there is no option {names} for engines; there are {', '.join(known)}"
            )
        for name, value in values.items():
            kind = "str" if name == "load" else known[name].type  # the drafter knows which
            _check(name, value, kind.__name__ if isinstance(kind, type) else str(kind))
        return cls(**values)

    def drafter(self, datastore: Any = None, **options: Any) -> Drafter:
        """A drafter with these limits.

        Args:
            datastore: as in ``Drafter(datastore=...)``; by default the option, but for the mini store, which
                needs a tokenizer.
            options: what else ``Drafter`` takes.

        Raises:
            What ``Drafter`` raises.
        """
        named = None if self.datastore == MINI else self.datastore
        return Drafter(
            datastore=named if datastore is None else datastore,
            load=self.load,
            live_bytes=self.live_bytes,
            max_bytes=self.max_bytes,
            threads=self.threads,
            namespace_ttl=self.namespace_ttl,
            ranking=self.ranking,
            **options,
        )


def request_options(extra: Any, namespace: str = "") -> dict[str, Any]:
    """What a request's own settings come to, which anybody may have written, for ``Drafter.begin``.

    Args:
        extra: a mapping with ``sssd_namespace`` and ``sssd_prediction`` (token ids), both of which may be
            missing; what is none of these is left out.
        namespace: where none is named.
    """
    held = extra if isinstance(extra, Mapping) else {}
    options: dict[str, Any] = {"namespace": str(held.get("sssd_namespace", namespace))[:_MOST_NAME]}
    prediction = held.get("sssd_prediction")
    if isinstance(prediction, list | tuple) and prediction:
        try:
            ids = np.asarray(prediction[:MOST_PREDICTED])
        except ValueError:  # lists of several lengths
            return options
        if ids.ndim == 1 and ids.dtype.kind in "iu":
            options["prediction"] = ids
    return options


def _check(name: str, value: Any, kind: str) -> None:
    """Refuses a value that is not what an option's annotation says."""
    allowed = kind.split(" | ")
    found = type(value).__name__
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        found = "list[str]"
    found = {"NoneType": "None", "int": "int" if "int" in allowed else "float"}.get(found, found)
    if found not in allowed:
        raise InvalidArgumentError(f"the option {name} of sssd must be {kind}, got {value!r}")


def _environment(variable: str) -> Mapping[str, Any]:
    text = os.environ.get(variable, "").strip()
    if text in ("", "0", "1"):
        return {}
    if text.startswith("{"):
        return _parsed(text, f"the environment variable {variable}")
    path = Path(text)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InvalidArgumentError(f"{path}, named by {variable}, is too large for options")
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        message = f"{variable} must hold JSON or name a .json or .toml file that can be read: {problem}"
        raise InvalidArgumentError(message) from problem
    return _parsed(content, str(path), is_toml=path.suffix == ".toml")


def _parsed(text: str, place: str, *, is_toml: bool = False) -> Mapping[str, Any]:
    try:
        value = tomllib.loads(text) if is_toml else json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise InvalidArgumentError(f"{place}: {problem}") from problem
    return _mapping(value, place)


def _mapping(value: Any, place: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(f"{place} must be a table of options, got {type(value).__name__}")
    return value
