"""The exceptions that sssd raises. All derive from :class:`SssdError`; I/O failures stay :class:`OSError`."""

TYPE_CHECKING = False  # as in typing, whose import takes longer than all of this package

if TYPE_CHECKING:
    from sssd._core import DraftBatch


class SssdError(Exception):
    """Base class of every error that sssd raises on purpose."""


class InvalidTokenError(SssdError, ValueError):
    """Token ids are negative, too large, not integers, or not one-dimensional."""


class InvalidArgumentError(SssdError, ValueError):
    """An argument other than token ids is outside its documented range."""


class CostCurveError(SssdError, ValueError):
    """A cost curve, or the file of one, cannot be used."""


class ClosedError(SssdError, RuntimeError):
    """A sequence or datastore was used after ``close()``."""


class UnsupportedModelError(SssdError):
    """The model, cache or generation option cannot be verified losslessly."""


class CorpusError(SssdError, ValueError):
    """An input does not hold what its format demands; the message names file, line and field."""


class EmptyCorpusError(CorpusError):
    """The inputs hold no document. The command line ends with exit code 2."""


class UsageError(SssdError):
    """The arguments on the command line do not make a command, which then ends with exit code 2."""


class OutputError(SssdError, ValueError):
    """The file to write may not be replaced: it is no datastore, or one that was not to be replaced."""


class DatastoreError(SssdError):
    """A datastore file cannot be used."""


class CorruptDatastoreError(DatastoreError):
    """A datastore file is damaged, truncated, or not a datastore."""


class CorruptCorpusError(CorruptDatastoreError):
    """The manifest of a corpus, or a file that it names, is damaged or missing."""


class DatastoreChangedError(DatastoreError):
    """A datastore file has been changed in place since it was opened, or replaced since it was pickled."""


class DatastoreVersionError(DatastoreError):
    """A datastore file was written in a format version that this release cannot read."""


class VocabularyMismatchError(DatastoreError, ValueError):
    """A datastore was built for another vocabulary size or another tokenizer."""


class LockedError(SssdError, RuntimeError):
    """Another process is writing to the corpus."""


class MemoryLimitError(SssdError, MemoryError):
    """What was asked for does not fit into the drafter's limits or the system's memory: nothing changed."""


class StateError(SssdError):
    """What a drafter has saved cannot be used."""


class CorruptStateError(StateError):
    """A saved state is damaged, truncated, or none."""


class StateVersionError(StateError):
    """A saved state was written by another release."""


class SharingError(SssdError):
    """A record of a finished request is damaged, or not for this replica."""


class BatchError(SssdError):
    """Some sequences of a batch failed; the others were served.

    ``failures`` maps places in the batch to exceptions. ``batch`` has the trees of the others; None if none
    were asked for.
    """

    failures: "dict[int, SssdError]"
    batch: "DraftBatch | None"


class InternalError(SssdError, RuntimeError):
    """A bug in sssd. Only the request that met it is affected; please report it."""
