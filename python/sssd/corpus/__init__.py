"""Corpora that live: folders of datastore files that grow, are merged, and forget. ``docs/corpora.md`` is the
guide.
"""

from sssd.corpus.adding import Added
from sssd.corpus.corpus import Corpus, Document, files, opened
from sssd.corpus.deleting import Removed
from sssd.corpus.manifest import Dead, Manifest, Part, Segment
from sssd.corpus.remote import Copied, pull, push
from sssd.errors import CorruptCorpusError, LockedError

__all__ = [
    "Added",
    "Copied",
    "Corpus",
    "CorruptCorpusError",
    "Dead",
    "Document",
    "LockedError",
    "Manifest",
    "Part",
    "Removed",
    "Segment",
    "files",
    "opened",
    "pull",
    "push",
]
