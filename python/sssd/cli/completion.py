"""``sssd-tools completion``: completes commands and options in a shell."""

import argparse
import sys

_FILES = ("FILE", "PATH", "OUT", "INPUT", "TRACE", "MODEL", "MODEL_DIR", "FOLDER")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.description = (
        "Prints a script that completes commands, options and files of sssd-tools. In bash: "
        'eval "$(sssd-tools completion bash)".'
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def run(arguments: argparse.Namespace) -> None:
    """Prints the script."""
    import shtab

    from sssd.cli import COMMANDS, make_parser

    parser = make_parser(COMMANDS)
    for subparsers in parser._subparsers._group_actions if parser._subparsers else ():
        for command in subparsers.choices.values():  # type: ignore[union-attr]
            for action in command._actions:
                if action.metavar in _FILES:
                    action.complete = shtab.FILE
    sys.stdout.write(shtab.complete(parser, arguments.shell) + "\n")
