"""The traces that a command is given."""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from sssd.cli.arguments import read_options
from sssd.cli.output import notes
from sssd.errors import EmptyCorpusError, SssdError
from sssd.reading.inputs import find_inputs
from sssd.reading.options import ReadReport
from sssd.reading.tokenizer import load_tokenizer
from sssd.replay import Request, read_trace, trace_name


class Traces:
    """Names and requests of the files that the arguments name, a file at a time.

    Attributes:
        tokenizer: what the arguments name, or None.
        inputs: the files.
        failed: how many of them could not be read, of which the others know nothing.
    """

    failed = 0

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._options, self._quiet = read_options(arguments), arguments.quiet
        self._limit = arguments.limit
        self._report = ReadReport()
        path = arguments.tokenizer
        self.tokenizer = load_tokenizer(path, arguments.chat_template) if path else None
        self.inputs = find_inputs(arguments.traces, self._options, self._report)

    def __iter__(self) -> Iterator[tuple[str, list[Request]]]:
        for input in self.inputs:
            read = read_trace(input, self.tokenizer, options=self._options, report=self._report)
            try:
                requests = list(islice(read, self._limit))
            except (SssdError, OSError) as error:
                self.failed += 1
                Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
                continue
            yield trace_name(input.path or input.name), requests

    def end(self) -> int:
        """Says what was left out, and returns the exit status: 1 if a file could not be read.

        Raises:
            EmptyCorpusError: there was no request at all, though every file could be read.
        """
        if not self._report.documents and not self.failed:
            reasons = "; ".join(self._report.notes()) or "they are empty"
            raise EmptyCorpusError(f"no request in the inputs ({len(self.inputs)}): {reasons}")
        if not self._quiet:
            notes(self._report)
        return int(self.failed > 0)


def write_json(path: Path | None, contents: Any) -> None:
    """Writes figures into a file, if one is named."""
    if path:
        path.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
