"""The traces that a command is given."""

import argparse
from collections.abc import Iterator

from sssd.cli.arguments import read_options
from sssd.cli.output import notes
from sssd.errors import EmptyCorpusError
from sssd.reading.inputs import find_inputs
from sssd.reading.options import ReadReport
from sssd.reading.tokenizer import load_tokenizer
from sssd.replay import Request, read_trace, trace_name


class Traces:
    """Names and requests of the files that the arguments name, a file at a time.

    Attributes:
        tokenizer: what the arguments name, or None.
        inputs: the files.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._options, self._quiet = read_options(arguments), arguments.quiet
        self._report = ReadReport()
        path = arguments.tokenizer
        self.tokenizer = load_tokenizer(path, arguments.chat_template) if path else None
        self.inputs = find_inputs(arguments.traces, self._options, self._report)

    def __iter__(self) -> Iterator[tuple[str, list[Request]]]:
        for input in self.inputs:
            requests = read_trace(input, self.tokenizer, options=self._options, report=self._report)
            yield trace_name(input.path or input.name), list(requests)

    def end(self) -> None:
        """Says what was left out.

        Raises:
            EmptyCorpusError: there was no request at all.
        """
        if not self._report.documents:
            reasons = "; ".join(self._report.notes()) or "they are empty"
            raise EmptyCorpusError(f"no request in the inputs ({len(self.inputs)}): {reasons}")
        if not self._quiet:
            notes(self._report)
