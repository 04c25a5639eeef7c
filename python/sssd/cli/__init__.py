"""The command line, ``sssd-tools COMMAND`` or ``python -m sssd COMMAND``.

A module per command, with ``add_arguments`` and ``run``.
"""

import argparse
import importlib
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

COMMANDS = {
    "demo": "compare speculative with autoregressive decoding on a real model",
    "generate": "generate with a Hugging Face model and draft trees",
    "serve": "serve a Hugging Face model by OpenAI's interface, with draft trees",
    "replay": "measure accepted tokens and draft times on recorded requests",
    "report": "replay recorded requests into a page that shows every tree",
    "profile": "measure what a verify pass costs on this machine",
    "simulate": "compare rules for the draft size on recorded requests under a cost curve",
    "build": "build a datastore from corpus files",
    "corpus": "keep a corpus in a folder: add, delete, merge, distribute",
    "info": "show what a datastore holds",
    "verify": "compare every byte of a datastore with its checksums",
    "query": "show how often token ids occur and what follows them",
    "doctor": "show which engines and extras are here, and what is missing",
    "completion": "print what completes commands and options in a shell",
}
"""Modules of this package and what they do, in the order in which ``--help`` lists them."""

PROGRAM = "sssd-tools"
"""The name of the installed script. Plain ``sssd`` belongs to the System Security Services Daemon."""


class _Parser(argparse.ArgumentParser):
    """A parser of a command whose options may stand between its arguments, and who knows what was meant."""

    _nested = False
    words: Collection[str] = ()
    """Commands and options that may have been meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._nested or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._nested = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._nested = False

    def error(self, message: str) -> NoReturn:
        import difflib
        import re

        tried = re.search(r"(?:invalid choice: '|unrecognized arguments: )([\w-]+)", message)
        close = difflib.get_close_matches(tried[1], self.words, 1) if tried else []
        super().error(f"{message}; did you mean {close[0]}?" if close else message)


def make_parser(wanted: Collection[str], program: str = PROGRAM) -> argparse.ArgumentParser:
    """A parser that lists all commands and knows the arguments of those that are ``wanted``.

    Raises:
        ImportError: what a command needs is not installed.
    """
    from sssd import __version__

    parser = _Parser(prog=program, description="Training-free speculative decoding.")
    parser.add_argument("--version", action="version", version=f"sssd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    parser.words = [*COMMANDS]
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        # the other commands' modules may be slow to import
        if name in wanted:
            module = importlib.import_module(f"sssd.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
            parser.words += [option for action in command._actions for option in action.option_strings]
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, or 1 after an error, which goes to stderr; 2 if the
    arguments make no command, a package is missing, or the inputs hold no document.
    """
    from sssd.errors import EmptyCorpusError, SssdError, UsageError

    argv = sys.argv[1:] if argv is None else argv
    program = PROGRAM if Path(sys.argv[0]).stem == PROGRAM else "python -m sssd"
    try:
        arguments = make_parser(argv[:1], program).parse_args(argv)
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130
    except ImportError as error:
        from sssd.cli.missing import hint

        if not (said := hint(error)):
            raise
        print(f"error: {said}", file=sys.stderr)  # noqa: T201
        return 2
    except (SssdError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2 if isinstance(error, EmptyCorpusError | UsageError) else 1
