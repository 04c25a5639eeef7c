"""``python -m sssd corpus ACTION``: a corpus in a folder."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from sssd.cli.arguments import (
    add_build_arguments,
    add_memory_argument,
    add_selection_arguments,
    read_options,
)
from sssd.cli.build import selected
from sssd.cli.output import build_progress, notes, show
from sssd.corpus import Copied, Corpus, Manifest, Part, Removed, pull, push
from sssd.errors import InvalidArgumentError, OutputError, UsageError
from sssd.mini import records
from sssd.reading.options import shown
from sssd.reading.tokenizer import load_tokenizer

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.description = "Keeps a corpus in a folder of datastores, docs/corpora.md tells how."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=type(parser))
    for name, (purpose, arguments, _) in _ACTIONS.items():
        action = actions.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        if name not in ("pull", "select"):
            nargs = "?" if name == "export" else None
            action.add_argument("folder", metavar="FOLDER", nargs=nargs, help="the corpus")
        arguments(action)
        if name not in ("ls", "export", "verify", "select"):
            action.add_argument(
                "--wait",
                type=float,
                default=60.0,
                metavar="SECONDS",
                help="for another writer (default: %(default)g)",
            )


def run(arguments: argparse.Namespace) -> int | None:
    """Does what the action says."""
    result: int | None = _ACTIONS[arguments.action][2](arguments)
    return result


def _corpus(arguments: argparse.Namespace) -> Corpus:
    grace = getattr(arguments, "grace", 60.0)
    return Corpus(arguments.folder, timeout=getattr(arguments, "wait", 60.0), grace=grace)


def _say(text: str) -> None:
    Console().print(text, highlight=False, soft_wrap=True, markup=False)


def _totals(manifest: Manifest) -> str:
    count = len(manifest.segments)
    return f"{manifest.tokens:,} tokens in {count} segment{'s' * (count > 1)}"


def _origin_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", metavar="LABEL", help="label to delete it by (default: the input's name)")
    parser.add_argument(
        "--metadata",
        action="append",
        default=[],
        type=_pair,
        metavar="K=V",
        help="text for the manifest; repeatable",
    )
    parser.add_argument("--added", type=_time, metavar="TIME", help="when, in ISO 8601 (default: now)")


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-merge", action="store_true", help="leave segments as they are")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="file, folder, pattern or URL, - for standard input; also datastore files",
    )
    _origin_arguments(parser)
    parser.add_argument(
        "--id-field", metavar="NAME", help="field of each record that is its id, to delete it by"
    )
    parser.add_argument(
        "--deduplicate", action="store_true", help="leave out documents that are in the corpus or come twice"
    )
    _merge_arguments(parser)
    add_build_arguments(parser)


def _add(arguments: argparse.Namespace) -> None:
    with build_progress(quiet=arguments.quiet) as progress:
        added = _corpus(arguments).add(
            arguments.inputs,
            tokenizer=arguments.tokenizer,
            chat_template=arguments.chat_template,
            vocab_size=arguments.vocab_size,
            end_token_id=arguments.end_token,
            options=read_options(arguments),
            source=arguments.source,
            metadata=dict(arguments.metadata),
            id_field=arguments.id_field,
            added=arguments.added,
            deduplicate=arguments.deduplicate,
            merge=not arguments.no_merge,
            max_memory=arguments.max_memory,
            progress=progress,
        )
    if not arguments.quiet:
        notes(added.report)
    place = arguments.folder if arguments.shard is None else f"share of {arguments.folder}"
    if added.known:
        _say(f"{place}: nothing added, it is there already; {_totals(added.manifest)}")
        return
    duplicates = f", {added.duplicates:,} duplicates left out" if added.duplicates else ""
    skipped = f", {added.report.bad:,} bad records skipped" if added.report.bad else ""
    _say(
        f"{place}: {added.tokens:,} tokens in {added.documents:,} documents added{duplicates}{skipped}; "
        f"{_totals(added.manifest)}"
    )


def _adopt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="other corpora, and datastore files (default: the shares that `add --shard` has written)",
    )
    _origin_arguments(parser)
    _merge_arguments(parser)
    add_memory_argument(parser)


def _adopt(arguments: argparse.Namespace) -> None:
    added = _corpus(arguments).adopt(
        arguments.paths or None,
        source=arguments.source,
        metadata=dict(arguments.metadata),
        added=arguments.added,
        merge=not arguments.no_merge,
        max_memory=arguments.max_memory,
    )
    _say(
        f"{arguments.folder}: {added.tokens:,} tokens in {added.documents:,} documents taken over; "
        f"{_totals(added.manifest)}"
    )


def _ls_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _ls(arguments: argparse.Namespace) -> None:
    manifest = _corpus(arguments).manifest
    if arguments.json:
        segments = [
            {"file": segment.file, **asdict(segment), "bytes": segment.bytes} for segment in manifest.segments
        ]
        print(json.dumps({**asdict(manifest), "tokens": manifest.tokens, "segments": segments}, indent=1))  # noqa: T201
        return
    table = Table("segment", "tokens", "deleted", "documents", "bytes", "first added", "last added")
    for segment in manifest.segments:
        times = [part.added for part in segment.parts]
        table.add_row(
            segment.uuid,
            f"{segment.living:,}",
            f"{segment.dead_tokens:,}",
            f"{segment.documents - segment.dead_documents:,}",
            f"{segment.bytes:,}",
            *((_shown_time(min(times)), _shown_time(max(times))) if times else ("", "")),
        )
    show(table)
    show(_sources(manifest))


def _sources(manifest: Manifest) -> Table:
    """A row for each source, over all segments."""
    found: dict[str, list[Part]] = {}
    for segment in manifest.segments:
        for part in segment.parts:
            if part.documents > part.dead_documents:
                found.setdefault(part.source, []).append(part)
    table = Table("source", "tokens", "documents", "first added", "last added", "metadata")
    for source, parts in sorted(found.items()):
        about = dict.fromkeys(f"{name}={value}" for part in parts for name, value in part.metadata.items())
        table.add_row(
            shown(source),
            f"{sum(part.tokens - part.dead_tokens for part in parts):,}",
            f"{sum(part.documents - part.dead_documents for part in parts):,}",
            _shown_time(min(part.added for part in parts)),
            _shown_time(max(part.added for part in parts)),
            shown(" ".join(about)),
        )
    return table


def _merge_action_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="merge all segments into one")
    parser.add_argument(
        "--grace",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long files that are not needed any more stay for readers (default: %(default)g)",
    )
    add_memory_argument(parser)


def _merge(arguments: argparse.Namespace) -> None:
    with build_progress() as progress:
        manifest = _corpus(arguments).merge(
            whole=arguments.all, max_memory=arguments.max_memory, progress=progress
        )
    _say(f"{arguments.folder}: {_totals(manifest)}")


def _rm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source", action="append", metavar="LABEL", help="label or pattern, e.g. 'logs/*'; repeatable"
    )
    parser.add_argument("--before", type=_time, metavar="TIME", help="what was added earlier, in ISO 8601")
    parser.add_argument(
        "--id", action="append", metavar="ID", help="id of a document, see `add --id-field`; repeatable"
    )
    parser.add_argument("--ids-from", type=Path, metavar="FILE", help="ids, one a line")
    _merge_arguments(parser)


def _rm(arguments: argparse.Namespace) -> None:
    ids = arguments.id
    if arguments.ids_from is not None:
        ids = [*(ids or []), *arguments.ids_from.read_text(encoding="utf-8").splitlines()]
    if arguments.source is None and arguments.before is None and ids is None:
        raise UsageError("say what to delete: --source, --before, --id or --ids-from")
    removed = _corpus(arguments).remove(
        source=arguments.source, before=arguments.before, ids=ids, merge=not arguments.no_merge
    )
    _say_removed(arguments, removed)


def _say_removed(arguments: argparse.Namespace, removed: Removed) -> None:
    _say(
        f"{arguments.folder}: {removed.documents:,} documents of {removed.tokens:,} tokens deleted; "
        f"{_totals(removed.manifest)}"
    )


def _expire_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--older-than", type=_age, metavar="AGE", help="e.g. 30d (s, m, h, d, w)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="delete the oldest until N are left")
    _merge_arguments(parser)


def _expire(arguments: argparse.Namespace) -> None:
    if arguments.older_than is None and arguments.max_tokens is None:
        raise UsageError("say what to delete: --older-than or --max-tokens")
    removed = _corpus(arguments).expire(
        arguments.older_than, max_tokens=arguments.max_tokens, merge=not arguments.no_merge
    )
    _say_removed(arguments, removed)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="OUT", help="JSON Lines (default: standard output)")
    parser.add_argument(
        "--source", action="append", metavar="LABEL", help="label or pattern, e.g. 'logs/*'; repeatable"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="write texts instead of ids")
    parser.add_argument(
        "--mini", metavar="OUT", help="write the text of the mini store (docs/mini.md) to OUT, - for stdout"
    )


def _export(arguments: argparse.Namespace) -> None:
    if (arguments.mini is None) == (arguments.folder is None):
        raise UsageError("give the folder of a corpus, or --mini OUT")
    if arguments.mini is not None:
        texts = records()
        with _written(None if arguments.mini == "-" else arguments.mini) as out:
            for text in texts:
                out.write(json.dumps({"text": text["text"]}, ensure_ascii=False) + "\n")
        return
    tokenizer = load_tokenizer(arguments.tokenizer, "none") if arguments.tokenizer else None
    corpus = _corpus(arguments)
    if tokenizer is not None:
        print_ = corpus.manifest.fingerprint
        if print_ is not None and bytes.fromhex(print_) not in tokenizer.fingerprints:
            raise InvalidArgumentError(f"the corpus holds tokens of another tokenizer than {tokenizer.name}")
    with _written(arguments.output) as out:
        for document in corpus.documents(source=arguments.source):
            record: dict[str, Any] = {"source": document.source, "added": _shown_time(document.added)}
            if document.metadata:
                record["metadata"] = dict(document.metadata)
            if tokenizer is None:
                record["input_ids"] = document.ids.tolist()
            else:
                record["text"] = tokenizer.decode(document.ids.tolist())
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


@contextmanager
def _written(path: str | None) -> Iterator[TextIO]:
    """A new file, or standard output."""
    if path is None:
        yield sys.stdout
        return
    try:
        file = Path(path).open("x", encoding="utf-8")  # noqa: SIM115
    except FileExistsError:
        raise OutputError(f"{shown(Path(path))} is there already; choose another name") from None
    with file:
        yield file


def _select_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="file, folder, pattern or URL, - for standard input"
    )
    parser.add_argument("-o", "--output", metavar="OUT", help="JSON Lines (default: standard output)")
    add_selection_arguments(parser, required=True)
    add_build_arguments(parser)


def _select(arguments: argparse.Namespace) -> None:
    documents = selected(arguments, arguments.inputs)
    with _written(arguments.output) as out:
        for document in documents:
            held: dict[str, Any] = {"source": document.source}
            if document.text is None:
                held["input_ids"] = document.ids.tolist()
            else:
                held["text"] = document.text
            out.write(json.dumps(held, ensure_ascii=False) + "\n")


def _verify(arguments: argparse.Namespace) -> int:
    wrong = _corpus(arguments).verify()
    for line in wrong:
        Console().print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    if not wrong:
        _say(f"{arguments.folder}: intact ({_totals(_corpus(arguments).manifest)})")
    return 1 if wrong else 0


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="folder that fsspec can write to, e.g. s3://bucket/corpus")
    parser.add_argument("--force", action="store_true", help="replace a version that is there")


def _push(arguments: argparse.Namespace) -> None:
    copied = push(arguments.folder, arguments.url, force=arguments.force, timeout=arguments.wait)
    _say_copied(arguments.url, copied)


def _say_copied(place: str, copied: Copied) -> None:
    _say(f"{place}: {copied.files} files of {copied.bytes:,} bytes copied; {_totals(copied.manifest)}")


def _pull_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="where a corpus has been pushed to")
    parser.add_argument("folder", metavar="FOLDER", help="the copy")
    parser.add_argument("--force", action="store_true", help="replace a version that is here")


def _pull(arguments: argparse.Namespace) -> None:
    copied = pull(arguments.url, arguments.folder, force=arguments.force, timeout=arguments.wait)
    _say_copied(arguments.folder, copied)


def _none(_: argparse.ArgumentParser) -> None:
    pass


_ACTIONS: dict[str, tuple[str, Any, Any]] = {
    "add": ("add documents; makes the corpus if there is none", _add_arguments, _add),
    "adopt": (
        "take over shares of an array of jobs, corpora, datastores",
        _adopt_arguments,
        _adopt,
    ),
    "ls": ("list segments and sources", _ls_arguments, _ls),
    "merge": ("write segments with deleted documents anew", _merge_action_arguments, _merge),
    "rm": ("delete documents by source, age or id", _rm_arguments, _rm),
    "expire": ("delete what was added longest ago", _expire_arguments, _expire),
    "export": ("write documents as JSON Lines", _export_arguments, _export),
    "select": (
        "write those documents of inputs that are worth most for their number of tokens",
        _select_arguments,
        _select,
    ),
    "verify": ("compare every byte with its checksum", _none, _verify),
    "push": ("copy the corpus to shared or object storage", _push_arguments, _push),
    "pull": ("copy a corpus from shared or object storage", _pull_arguments, _pull),
}


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=TEXT, got {text!r}")
    return name, value


def _time(text: str) -> int:
    """Seconds since 1970, of a date or time in ISO 8601; in UTC unless it says otherwise."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a time such as 2026-11-27T18:00, got {text!r}") from None
    return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())


def _age(text: str) -> timedelta:
    unit = _SECONDS.get(text[-1:])
    try:
        if unit is None:
            raise ValueError
        return timedelta(seconds=float(text[:-1]) * unit)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected an age such as 30d or 12h, got {text!r}") from None


def _shown_time(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return str(seconds)
