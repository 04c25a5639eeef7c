"""The command line, ``python -m sssd COMMAND``. A module per command, with ``add_arguments`` and ``run``."""

import argparse
import importlib
import sys
from typing import Any

COMMANDS = {
    "demo": "compare speculative with autoregressive decoding on a real model",
    "generate": "generate with a Hugging Face model and draft trees",
    "serve": "serve a Hugging Face model by OpenAI's interface, with draft trees",
    "replay": "measure accepted tokens and draft times on recorded requests",
    "profile": "measure what a verify pass costs on this machine",
    "simulate": "compare rules for the draft size on recorded requests under a cost curve",
    "build": "build a datastore from corpus files",
    "info": "show what a datastore holds",
    "verify": "compare every byte of a datastore with its checksums",
    "query": "show how often token ids occur and what follows them",
}
"""Modules of this package and what they do, in the order in which ``--help`` lists them."""


class _Parser(argparse.ArgumentParser):
    """A parser of a command whose options may stand between its arguments."""

    _nested = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._nested:
            return super().parse_known_args(args, namespace)
        self._nested = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._nested = False


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, or 1 after an error, which goes to stderr; 2 if the
    arguments make no command, or the inputs hold no document.
    """
    from sssd import SssdError, __version__
    from sssd.errors import EmptyCorpusError, UsageError

    parser = argparse.ArgumentParser(prog="python -m sssd", description="Training-free speculative decoding.")
    parser.add_argument("--version", action="version", version=f"sssd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    argv = sys.argv[1:] if argv is None else argv
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        # the other commands' modules may be slow to import
        if name in argv[:1]:
            try:
                module = importlib.import_module(f"sssd.cli.{name}")
            except ModuleNotFoundError as missing:
                parser.error(f"the command line needs {missing.name}: pip install 'sssd[cli]'")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130
    except (SssdError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2 if isinstance(error, EmptyCorpusError | UsageError) else 1
