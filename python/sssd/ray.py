"""Corpora built by many machines with Ray Data: ``pip install 'sssd[ray]'``."""

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from sssd.corpus import Added, Corpus
from sssd.datastore import build as build_datastore
from sssd.errors import CorpusError, EmptyCorpusError, InvalidArgumentError, SssdError
from sssd.reading.options import ReadOptions

if TYPE_CHECKING:
    import ray.data  # workers need not have it loaded

_ROWS = 1024


def build(
    dataset: "ray.data.Dataset",
    folder: str | os.PathLike[str],
    *,
    shards: int,
    source: str | None = None,
    merge: bool = True,
    **options: Any,
) -> Added:
    """Adds a dataset to a corpus: its shards are tokenized and sorted by themselves, wherever Ray has room,
    and taken into the corpus at the end, all at once.

    Args:
        dataset: rows as ``python -m sssd build`` reads them (``docs/reading.md``): texts, chats, token ids.
        folder: of the corpus, made if need be; every machine must reach it by this path. Nothing in it
            changes if the build fails, but for a folder ``.ray-*`` if the driver is killed.
        shards: segments to make. The same dataset and number make equal segments, whatever the machines.
        source: label of what is added.
        merge: merge segments if the corpus's policy says so.
        options: as of :func:`build_segments`.

    Returns:
        What ``sssd.corpus.Corpus.adopt`` returns.

    Raises:
        As :func:`build_segments` and ``sssd.corpus.Corpus.adopt``.
    """
    corpus = Corpus(folder)
    work = Path(folder).resolve() / f".ray-{uuid.uuid4().hex}"
    try:
        segments = build_segments(dataset, work, shards=shards, **options)
        return corpus.adopt(segments, source=source, merge=merge)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def build_segments(
    dataset: "ray.data.Dataset",
    folder: str | os.PathLike[str],
    *,
    shards: int,
    tokenizer: Any = None,
    chat_template: str | None = None,
    vocab_size: int | None = None,
    end_token_id: int | None = None,
    options: ReadOptions | None = None,
    deduplicate: bool = False,
    max_memory: int | None = None,
    num_cpus: float = 1,
    max_retries: int = 3,
) -> list[Path]:
    """Makes a datastore file of each shard of a dataset, in tasks of Ray. A worker that dies costs its shard
    only, which another one does again.

    Shards are runs of rows in the dataset's order, equally long; no more rows are moved than that takes.

    Args:
        dataset: rows as ``python -m sssd build`` reads them.
        folder: where the files go (``shard-00000.sssd`` and so on), made if need be; every machine must
            reach it by this path.
        shards: files to make; fewer where there are fewer rows.
        tokenizer, chat_template: as in ``sssd.datastore.build``. Paths must be there on every machine.
        vocab_size, end_token_id, options, max_memory: as in ``sssd.datastore.build``, for each shard.
        deduplicate: leave out documents that are in their shard already.
        num_cpus: cores that Ray is to keep free for each shard.
        max_retries: how often a shard is begun again when its worker dies.

    Returns:
        The files, in the dataset's order.

    Raises:
        CorpusError: a row cannot be read; the message names shard and row.
        EmptyCorpusError: there is no document.
        InvalidArgumentError: an argument is out of range or missing.
        ray.exceptions.RayError: a shard's workers died again and again.
        OSError: a file cannot be written.
    """
    if shards < 1:
        raise InvalidArgumentError(f"shards must be at least 1, not {shards}")
    target = Path(folder).resolve()
    target.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer": tokenizer,
        "chat_template": chat_template,
        "vocab_size": vocab_size,
        "end_token_id": end_token_id,
        "options": options,
        "deduplicate": deduplicate,
        "max_memory": max_memory,
    }
    shared = ray.put(settings)
    task = ray.remote(num_cpus=num_cpus, max_retries=max_retries)(_build_shard)
    pending = [
        task.remote(rows, number, target, shared) for number, rows in enumerate(_shards_of(dataset, shards))
    ]
    running = list(pending)
    try:
        while running:
            done, running = ray.wait(running)
            ray.get(done)
    except ray.exceptions.RayTaskError as failure:
        # what a worker raised, without the stack of its process
        raise failure.cause if isinstance(failure.cause, SssdError | OSError) else failure from None
    finally:
        for left in running:
            ray.cancel(left, force=True)
    files = [path for path in ray.get(pending) if path is not None]
    if not files:
        raise EmptyCorpusError("no document in the dataset")
    return files


def _shards_of(dataset: "ray.data.Dataset", shards: int) -> list[Any]:
    """References to the rows of each shard, as tables of Arrow."""
    execution = dataset.context.execution_options
    before, execution.preserve_order = execution.preserve_order, True
    try:
        return list(dataset.repartition(shards).to_arrow_refs())
    finally:
        execution.preserve_order = before


def _build_shard(table: Any, number: int, folder: Path, settings: dict[str, Any]) -> Path | None:
    """What a worker does. What an earlier one may have left is replaced."""
    path = folder / f"shard-{number:05d}.sssd"
    try:
        build_datastore([_records(table)], path, force=True, **settings)
    except EmptyCorpusError:
        path.unlink(missing_ok=True)
        return None
    except CorpusError as error:
        raise CorpusError(f"shard {number}: {error}") from None
    return path


def _records(table: Any) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=_ROWS):
        yield from batch.to_pylist()
