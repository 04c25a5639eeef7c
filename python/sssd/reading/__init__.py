"""Reading corpora and traces: one reader for all that ``build``, ``replay``, ``simulate`` and Python take.

Files are found (:func:`find_inputs`), opened and taken apart into records (:func:`read`), and each
record into documents or requests (:class:`Records`). Nothing is held in memory but a record or a stretch of
a text.
"""

from sssd.reading.inputs import Input, find_inputs
from sssd.reading.options import DTYPES, FORMATS, ReadOptions, ReadReport
from sssd.reading.reader import Stretch, read
from sssd.reading.records import Exchange, Records
from sssd.reading.template import ChatTemplate
from sssd.reading.tokenizer import LoadedTokenizer, load_tokenizer, tokenizer_fingerprint

__all__ = [
    "DTYPES",
    "FORMATS",
    "ChatTemplate",
    "Exchange",
    "Input",
    "LoadedTokenizer",
    "ReadOptions",
    "ReadReport",
    "Records",
    "Stretch",
    "find_inputs",
    "load_tokenizer",
    "read",
    "tokenizer_fingerprint",
]
