"""Where inputs are: files, folders, patterns, pipes, URLs, datasets. And what is left out of folders."""

import errno
import glob
import io
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any, cast

from sssd.errors import CorpusError, InvalidArgumentError
from sssd.reading.options import ReadOptions, ReadReport, shown
from sssd.reading.streams import COMPRESSIONS, Chained

DATASTORE_MAGIC = bytes.fromhex("89 53 53 44 0d 0a 1a 0a")
"""The first bytes of a datastore file."""

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".npy": "npy",
    ".bin": "bin",
}
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_NO_CORPUS = (
    *("readme*", "license*", "licence*", "copying*", "notice*", "changelog*", "contributing*", "citation*"),
    *("*config.json", "*_config_*.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "*.index.json", "trainer_state.json"),
    *("pytorch_model*.bin", "adapter_model*.bin", "model*.bin", "training_args.bin", "optimizer*.bin"),
    *(
        "dataset_info.json",
        "dataset_infos.json",
        "dataset_dict.json",
        "state.json",
        "_metadata*",
        "_common_metadata",
    ),
    *("_success*", "requirements*.txt", "croissant.json", "package.json", "package-lock.json"),
)
"""Names, in small letters, of what stands in folders beside the corpus."""

Item = Any
"""What a caller may give as an input: a path, pattern or URL, ``-``, a ``datasets`` dataset, or an iterable
of records.
"""


@dataclass(frozen=True)
class Input:
    """One file, stream or dataset.

    Attributes:
        name: for messages.
        format: by option or name, None if the contents must show it.
        compression: by name, None if it tells none.
        size: bytes, None if unknown.
        open: opens it in binary mode; None for a dataset.
        records: the records of a dataset.
        path: the file, where it is one.
        shard: (i, n): of its records only every n-th is wanted, from number i on.
    """

    name: str
    format: str | None = None
    compression: str | None = None
    size: int | None = None
    open: Callable[[], IO[bytes]] | None = None
    records: Callable[[], Iterable[Any]] | None = None
    path: Path | None = None
    shard: tuple[int, int] | None = None


def format_of(name: str) -> tuple[str | None, str | None]:
    """Format and compression that the name of a file tells, None where it tells none."""
    path = PurePosixPath(name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    if compression:
        path = path.with_suffix("")
    return _SUFFIXES.get(path.suffix), compression


def find_inputs(
    items: Iterable[Item], options: ReadOptions, report: ReadReport, *, output: Path | None = None
) -> list[Input]:
    """The inputs at the given places, each file once, in the given order and by name in folders.

    Args:
        items: paths, patterns, URLs, ``-`` for standard input, datasets, iterables of records.
        options: the format, and which files of folders are wanted.
        report: takes note of what is left out.
        output: the file that is going to be written, or the folder of files, which is left out of folders.

    Raises:
        FileNotFoundError: there is nothing at a path.
        CorpusError: a folder or pattern has no input, or ``output`` is one.
        InvalidArgumentError: an item is no place and no dataset, or a package is missing.
    """
    found: list[Input] = []
    seen: set[Any] = set()
    for number, item in enumerate(items):
        for one in _inputs_at(item, number, options, report, output):
            key = _identity(one)
            if output is not None and one.path is not None and _same(one.path, output):
                raise CorpusError(f"{one.name}: is the output as well; write to another file")
            if key in seen:
                report.left_out.append((one.name, "the same file again"))
                continue
            seen.add(key)
            found.append(one)
    return _share(found, options.shard)


def _share(inputs: list[Input], shard: tuple[int, int] | None) -> list[Input]:
    """Every n-th file, or of each file every n-th record if the files are too few."""
    if shard is None:
        return inputs
    if len(inputs) >= shard[1]:
        return inputs[shard[0] :: shard[1]]
    return [replace(input, shard=shard) for input in inputs]


def _inputs_at(
    item: Item, number: int, options: ReadOptions, report: ReadReport, output: Path | None
) -> Iterator[Input]:
    if isinstance(item, str | os.PathLike | bytes):
        text = os.fsdecode(item)
        if re.match(r"[a-z][a-z0-9+.-]+://|[a-z0-9+]+::", text) and not os.path.exists(text):
            yield from _at_url(text, options, report)
        elif text == "-":
            yield Input("standard input", options.format, open=_standard_input)
        elif not os.path.lexists(text) and glob.has_magic(text):
            matches = sorted(glob.glob(text, recursive=True))
            if not matches:
                raise CorpusError(f"{shown(Path(text))}: no file matches")
            for match in matches:
                yield from _at_path(Path(match), options, report, output)
        else:
            yield from _at_path(Path(text), options, report, output)
    else:
        yield from _datasets(item, f"dataset {number + 1}")


def _standard_input() -> IO[bytes]:
    """Standard input, which stays open when this is closed."""
    return io.BufferedReader(Chained(b"", sys.stdin.buffer))


def _at_path(path: Path, options: ReadOptions, report: ReadReport, output: Path | None) -> Iterator[Input]:
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), shown(path))
    if not path.is_dir():
        yield _file(path, options)
        return
    before = len(report.left_out)
    names = [*_below(path, report)]
    chosen = _chosen(names, _saved_files(path, names), lambda name: shown(path / name), options, report)
    taken = 0
    for name in chosen:
        file = path / name
        if output is not None and _same(file, output):
            report.left_out.append((shown(file), "the output"))
        elif not file.exists():
            report.left_out.append((shown(file), "a link to nothing"))
        elif not file.is_file():
            report.left_out.append((shown(file), "no regular file"))
        else:
            taken += 1
            yield _file(file, options)
    if not taken:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.left_out[before:][:5])
        raise CorpusError(f"{shown(path)}: no input below this folder ({reasons or 'it is empty'})")


def _file(path: Path, options: ReadOptions) -> Input:
    format, compression = format_of(path.name)
    if path.suffix.lower() in _ARCHIVES or path.name.lower().endswith(
        (".tar.gz", ".tar.xz", ".tar.zst", ".tar.bz2")
    ):
        raise CorpusError(f"{shown(path)}: an archive; unpack it first")
    mode = path.stat()
    size = mode.st_size if stat.S_ISREG(mode.st_mode) else None
    return Input(shown(path), options.format or format, compression, size, lambda: path.open("rb"), path=path)


def _below(folder: Path, report: ReadReport) -> Iterator[PurePath]:
    """Files below a folder, in the order of their paths; hidden ones are left out."""

    def failed(error: OSError) -> None:
        raise error

    for where, folders, files in os.walk(folder, onerror=failed):
        for names in (folders, files):
            for name in sorted(names):
                path = Path(where, name)
                if name.startswith("."):
                    report.left_out.append((shown(path), "hidden"))
                elif names is folders and path.is_symlink():
                    report.left_out.append((shown(path), "a link to a folder"))
                elif names is files:
                    yield path.relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _chosen(
    names: list[PurePath],
    saved: dict[PurePath, set[PurePath]],
    show: Callable[[PurePath], str],
    options: ReadOptions,
    report: ReadReport,
) -> list[PurePath]:
    """The files of a folder that are inputs; the others are left out with the reason."""
    chosen = []
    for name in sorted(names):
        reason = _why_not(name, saved, options)
        if reason:
            report.left_out.append((show(name), reason))
        else:
            chosen.append(name)
    return chosen


def _why_not(name: PurePath, saved: dict[PurePath, set[PurePath]], options: ReadOptions) -> str | None:
    def matches(patterns: Iterable[str]) -> bool:
        return any(fnmatch(name.as_posix(), pattern) or fnmatch(name.name, pattern) for pattern in patterns)

    if matches(options.exclude):
        return "by --exclude"
    if options.include:
        return None if matches(options.include) else "not in --include"
    if name.parent in saved:
        return None if name in saved[name.parent] else "not of the dataset saved there"
    if any(fnmatch(name.name.lower(), pattern) for pattern in _NO_CORPUS):
        return "no corpus by its name; --include takes it"
    return None if format_of(name.name)[0] else "no known format by its name; --include and --format take it"


def _saved_files(folder: Path, names: list[PurePath]) -> dict[PurePath, set[PurePath]]:
    """The files of datasets saved by the library datasets, by the folders that they are in."""
    saved = {}
    for name in names:
        if name.name != "state.json":
            continue
        try:
            state = json.loads((folder / name).read_bytes())
            files = {entry["filename"] for entry in state["_data_files"]}
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # of another program
        if not files:
            continue
        if state.get("_indices_data_files"):
            raise CorpusError(
                f"{shown(folder / name)}: a selection of a dataset; load it with datasets and pass it"
            )
        for file in files:
            if not isinstance(file, str) or PurePath(file).name != file:
                raise CorpusError(f"{shown(folder / name)}: names a file outside its folder: {shown(file)}")
            if not (folder / name.parent / file).is_file():
                raise CorpusError(f"{shown(folder / name)}: the dataset lacks {shown(file)}")
        saved[name.parent] = {name.parent / file for file in files}
    return saved


def _at_url(url: str, options: ReadOptions, report: ReadReport) -> Iterator[Input]:
    try:
        import fsspec
    except ImportError:
        raise InvalidArgumentError(f"{url}: URLs need fsspec: pip install 'sssd[corpus]'") from None
    try:
        system, path = fsspec.core.url_to_fs(url)
        if glob.has_magic(path):
            found = [_remote(system, file, options) for file in sorted(system.glob(path))]
        elif system.isdir(path):
            found = [
                _remote(system, file, options) for file in _below_url(system, path, url, options, report)
            ]
        else:
            system.info(path)  # says so if there is none
            found = [_remote(system, path, options)]
    except (CorpusError, OSError):
        raise
    except Exception as error:  # each file system has its own
        raise InvalidArgumentError(f"{shown(url)}: cannot be opened ({error})") from None
    if not found:
        raise CorpusError(f"{shown(url)}: no input there")
    yield from found


def _below_url(system: Any, path: str, url: str, options: ReadOptions, report: ReadReport) -> Iterator[str]:
    root = PurePosixPath(path)
    names: list[PurePath] = []
    for file in sorted(system.find(path)):
        name: PurePath = PurePosixPath(file).relative_to(root)
        if any(part.startswith(".") for part in name.parts):
            report.left_out.append((shown(f"{url}/{name}"), "hidden"))
        else:
            names.append(name)
    for name in _chosen(names, {}, lambda name: shown(f"{url}/{name}"), options, report):
        yield str(root / name)


def _remote(system: Any, path: str, options: ReadOptions) -> Input:
    format, compression = format_of(path)
    name = shown(system.unstrip_protocol(path))

    def open_it() -> IO[bytes]:
        try:
            return cast(IO[bytes], system.open(path, "rb"))
        except OSError:
            raise
        except Exception as error:
            raise CorpusError(f"{name}: cannot be opened ({error})") from None

    try:
        size = system.size(path)
    except (OSError, NotImplementedError):
        size = None
    return Input(name, options.format or format, compression, size, open_it)


def _datasets(item: Any, name: str) -> Iterator[Input]:
    """A dataset, each split of several, or an iterable of records."""
    if isinstance(item, Mapping) and item and all(_is_dataset(value) for value in item.values()):
        for split, dataset in item.items():
            yield from _datasets(dataset, f"{name} {shown(split)}")
    elif _is_dataset(item):
        plain = item.with_format(None) if hasattr(item, "with_format") else item
        yield Input(name, records=lambda: plain)
    elif isinstance(item, list | tuple | Iterator):
        yield Input(name, records=lambda: cast(Iterable[Any], item))
    else:
        raise InvalidArgumentError(
            f"an input must be a path, a URL, a dataset or a list of records, not {type(item).__name__}"
        )


def _is_dataset(item: Any) -> bool:
    """Whether it is one of the library datasets, which need not be installed."""
    return hasattr(item, "features") and hasattr(item, "column_names") and hasattr(item, "__iter__")


def _identity(one: Input) -> Any:
    if one.path is None:
        return one.name
    try:
        found = one.path.stat()
    except OSError:
        return str(one.path)
    return (found.st_dev, found.st_ino)


def _same(path: Path, output: Path) -> bool:
    try:
        if output.is_dir():
            return output.resolve() in path.resolve().parents
        return path.samefile(output)
    except OSError:
        return False
