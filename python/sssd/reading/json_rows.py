"""JSON of any layout, a record at a time: objects one a line, in an array, or over several lines."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from sssd.errors import CorpusError
from sssd.reading.options import MAX_RECORD_BYTES, Bad
from sssd.reading.streams import Chained, damage, lines, peeked

_SNIFFED = 1 << 20
_BLANK = re.compile("[ \t\r\n\ufeff]*")


def json_rows(file: IO[bytes], name: str, bad: Bad) -> Iterator[tuple[str, Any]]:
    """Places (file and line, or element of an array) and values of the records.

    Args:
        file: plain contents in UTF-8.
        name: for messages.
        bad: told of records that cannot be read.

    Raises:
        CorpusError: what ``bad`` raises; or the rest of the file cannot be read.
    """
    with damage(name):
        head, file = peeked(file, _SNIFFED)
    first, newline, rest = head.lstrip(b" \t\r\n").partition(b"\n")
    whole = bool(newline) or len(head) < _SNIFFED
    try:
        value = loads(first.decode("utf-8", "replace")) if whole else None
        # an array in one line that is the only one holds the records
        several = value is not None and not (
            isinstance(value, list) and not rest.strip() and not is_chat(value)
        )
    except json.JSONDecodeError as error:
        several = not error.msg.startswith("Extra data") and not _cut_short(error, len(error.doc))
    except (ValueError, RecursionError):
        several = True
    if several or (not whole and first[:1] != b"["):
        yield from _line_rows(lines(file, name, bad), name, bad)
    else:
        yield from _Values(file, name, bad).rows()


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and item.keys() & {"role", "from"} for item in value)
        and any(item.keys() & {"content", "value"} for item in value)
    )


def loads(text: str) -> Any:
    """``json.loads``, but integers too long for Python become infinite, as they are in other languages."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _DECODER_OF_ANY_INTEGER.decode(text)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 4000 else float(digits)


_DECODER = json.JSONDecoder()
_DECODER_OF_ANY_INTEGER = json.JSONDecoder(parse_int=_integer)


def _line_rows(texts: Iterator[tuple[int, str]], name: str, bad: Bad) -> Iterator[tuple[str, Any]]:
    for number, text in texts:
        place = f"{name}, line {number}"
        text = text.lstrip("\ufeff")
        if not text.strip():
            continue
        try:
            value = loads(text)
        except json.JSONDecodeError as error:
            bad(CorpusError(f"{place}: not JSON ({error.msg} at character {error.pos + 1})"))
        except RecursionError:
            bad(CorpusError(f"{place}: nested too deeply"))
        else:
            yield place, value


def _cut_short(error: json.JSONDecodeError, length: int) -> bool:
    """Whether the text may be right and only end too early."""
    return error.msg.startswith("Unterminated string") or error.pos >= length - 16


class _Values:
    """JSON values one after another, and the elements of arrays, from pieces of a text."""

    def __init__(self, file: IO[bytes], name: str, bad: Bad) -> None:
        self.file, self.name, self.bad = file, name, bad
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.line = "", 0, 1
        self.ended = self.broken = False

    def rows(self) -> Iterator[tuple[str, Any]]:
        while self._skip_blank():
            if self.text[self.at] == "[":
                self.at += 1
                yield from self._elements()
                continue
            line = self.line
            try:
                value = self._value(f"{self.name}, line {line}")
            except CorpusError as error:
                self.bad(error)
                if not self.broken:
                    yield from self._lines_after(line)
                return
            yield f"{self.name}, line {line}", value

    def _elements(self) -> Iterator[tuple[str, Any]]:
        number = 0
        while True:
            if not self._skip_blank():
                raise CorpusError(f"{self.name}, line {self.line}: the array has no end")
            mark = self.text[self.at]
            if mark == "]":
                self.at += 1
                return
            if number:
                if mark != ",":
                    raise CorpusError(
                        f"{self.name}, line {self.line}: not JSON (no comma after element {number})"
                    )
                self.at += 1
                self._skip_blank()
            number += 1
            place = f"{self.name}, element {number} (line {self.line})"
            yield place, self._value(place)

    def _value(self, place: str) -> Any:
        decoder = _DECODER
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.ended or not _cut_short(error, len(self.text)):
                    raise CorpusError(
                        f"{place}: not JSON ({error.msg} at line {self._line_of(error.pos)})"
                    ) from None
            except ValueError:
                decoder = _DECODER_OF_ANY_INTEGER
                continue
            except RecursionError:
                raise CorpusError(f"{place}: nested too deeply") from None
            else:
                # a number may go on in the next piece
                if end < len(self.text) or self.ended or isinstance(value, str | list | dict):
                    self.line = self._line_of(end)
                    self.at = end
                    return value
            if len(self.text) - self.at > MAX_RECORD_BYTES:
                raise CorpusError(f"{place}: longer than {MAX_RECORD_BYTES >> 20} MiB")
            self._fill()

    def _line_of(self, at: int) -> int:
        return self.line + self.text.count("\n", self.at, at)

    def _skip_blank(self) -> bool:
        """Goes on to the next character that is none; whether there is one."""
        while True:
            end = _BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]
            self.line = self._line_of(end)
            self.at = end
            if end < len(self.text):
                return True
            if self.ended:
                return False
            self._fill()

    def _fill(self) -> None:
        """Takes more text, as much again as is left over, so that long values are not tried too often."""
        left = self.text[self.at :]
        place = f"{self.name}, after line {self._line_of(len(self.text))}"
        with damage(self.name, place.removeprefix(self.name)):
            data = self.file.read(max(_SNIFFED, len(left)))
        self.ended = not data
        try:
            self.text = left + self.decoder.decode(data, self.ended)
        except UnicodeDecodeError:
            self.broken = True
            raise CorpusError(f"{place}: not UTF-8; --encoding names another") from None
        self.at = 0

    def _lines_after(self, line: int) -> Iterator[tuple[str, Any]]:
        """What follows a line that was wrong, as objects one a line."""
        rest = self.text[self.at :].encode() + self.decoder.getstate()[0]
        numbered = lines(io.BufferedReader(Chained(rest, self.file)), self.name, self.bad)
        next(numbered, None)
        after = ((line - 1 + number, text) for number, text in numbered)
        yield from _line_rows(after, self.name, self.bad)
