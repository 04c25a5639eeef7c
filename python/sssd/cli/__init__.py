"""The command line, ``python -m sssd COMMAND``. One module per command, with ``add_parser`` and ``run``."""

import argparse
import importlib
import sys

COMMANDS = ("demo", "generate", "replay", "profile", "simulate", "build", "info", "verify", "query")
"""Modules of this package, in the order in which ``--help`` lists them."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, or 1 after an error, which goes to stderr."""
    from sssd import SssdError, __version__

    parser = argparse.ArgumentParser(prog="python -m sssd", description="Training-free speculative decoding.")
    parser.add_argument("--version", action="version", version=f"sssd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        try:
            module = importlib.import_module(f"sssd.cli.{name}")
        except ModuleNotFoundError as missing:
            parser.error(f"the command line needs {missing.name}: pip install 'sssd[cli]'")
        module.add_parser(commands).set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130
    except (SssdError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
