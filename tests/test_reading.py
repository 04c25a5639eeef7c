"""Reading corpora and traces: every form gives its documents, or is refused by file, line and field."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sssd.errors import CorpusError, InvalidArgumentError
from sssd.reading import ReadOptions, ReadReport, Records, Stretch, find_inputs, read
from sssd.reading.options import shown

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "more"},
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}],
    },
]


def zstd() -> Any:
    return pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def documents(
    *items: Any, report: ReadReport | None = None, vocab_size: int = 100, **options: Any
) -> list[Any]:
    """Texts, and ids as lists; of token arrays each stretch."""
    chosen, report = ReadOptions(**options), report or ReadReport()
    records = Records(chosen, report)
    found = []
    for one in find_inputs(items, chosen, report):
        pieces = read(one, chosen, report, records.documents, wanted=records.wanted, vocab_size=vocab_size)
        for _, _, piece in pieces:
            piece = piece.ids if isinstance(piece, Stretch) else piece
            found.append(piece if isinstance(piece, str) else piece.tolist())
    return found


def flat(stretches: list[list[int]]) -> list[int]:
    return [token_id for stretch in stretches for token_id in stretch]


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(name: str, data: bytes | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return write


def refused(path: Path, *parts: str, **options: Any) -> None:
    """It is refused with all these parts, the file's name among them; skipping bad records, it is counted."""
    with pytest.raises(CorpusError) as caught:
        documents(path, **options)
    message = str(caught.value)
    assert all(part in message for part in (path.name, *parts)), message
    assert "\n" not in message
    report = ReadReport()
    documents(path, report=report, skip_bad=True, **options)
    assert report.bad >= 1
    assert str(report.errors[0]) == message


class TestJson:
    ROWS = ({"text": "one two"}, {"text": "drei 四"}, {"text": "a\nb"})
    TEXTS = ("one two", "drei 四", "a\nb")

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson"])
    @pytest.mark.parametrize("indent", [None, 0, 3])
    @pytest.mark.parametrize("array", [True, False])
    def test_layouts(self, write, name, indent, array):
        dumped = [json.dumps(row, indent=indent) for row in self.ROWS]
        text = json.dumps(list(self.ROWS), indent=indent) if array else "\n".join(dumped)
        for data in (text, text + "\n", "\n\n " + text, text.replace("\n", "\r\n"), "\ufeff" + text):
            assert documents(write(name, data)) == list(self.TEXTS)

    def test_other_ends_of_lines_and_none(self, write):
        dumped = [json.dumps(row) for row in self.ROWS]
        for end in ("\r", "", " ", "\t"):
            assert documents(write("a.jsonl", end.join(dumped))) == list(self.TEXTS)
        assert documents(write("a.jsonl", "\n".join("\ufeff" + line for line in dumped))) == list(self.TEXTS)

    @given(
        rows=st.lists(
            st.dictionaries(
                st.sampled_from(["text", "id", "x"]),
                st.recursive(
                    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                    max_leaves=6,
                ),
            ),
            max_size=5,
        ),
        indent=st.sampled_from([None, 0, 1]),
        array=st.booleans(),
        ascii=st.booleans(),
    )
    @settings(max_examples=300, deadline=None)
    def test_any_values_in_any_layout(self, tmp_path_factory, rows, indent, array, ascii):
        """What is in the records comes out, or is refused; nothing else comes out."""
        # an empty object is a line of its own, and so must the others be
        assume(array or indent is None or not rows or rows[0])
        path = tmp_path_factory.mktemp("json") / "a.json"
        options: Any = {"indent": indent, "ensure_ascii": ascii}
        dumped = [json.dumps(row, **options) for row in rows]
        text = json.dumps(rows, **options) if array else "\n".join(dumped)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        report = ReadReport()
        found = documents(path, report=report, skip_bad=True, text_field="text")
        texts = [row["text"] for row in rows if isinstance(row.get("text"), str) and row["text"].strip()]
        wrong = [row for row in rows if "text" not in row or not isinstance(row["text"], str | None)]
        if not any("\ud800" <= letter <= "\udfff" for letter in text):
            assert found == [
                text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts
            ]
            assert report.bad == len(wrong)

    @pytest.mark.parametrize(
        ("data", "parts"),
        [
            ('{"text": "a"}\n{"text"\n', ["line 2", "not JSON"]),
            ('{"text": "a"}\n{"text": "b"} trailing\n', ["line 2", "Extra data"]),
            ('{"text": "a"} trailing\n', ["line 1", "not JSON"]),
            ('{"text": "a"}\n[1]x\n', ["line 2", "not JSON"]),
            ("1\n", ["line 1", "an object, not the number 1"]),
            ('"a"\ntrue\n', ["line 2", "not true"]),
            (
                '{"other": 1}\n',
                ["line 1", "no field that is known to hold a document", "--text-field", "fields: other"],
            ),
            ('{"text": 3}\n', ["line 1", "field 'text'", "the number 3"]),
            ('{"text": NaN}\n', ["line 1", "field 'text'", "the number nan"]),
            ('{"text": {"a": 1}}\n', ["line 1", "field 'text'", "an object"]),
            ('{"text": ["a"]}\n', ["line 1", "field 'text'", "a list with text in it"]),
            ('{"text": 1' + "0" * 5000 + "}\n", ["line 1", "field 'text'", "the number inf"]),
            ('{"text": 1' + "0" * 400 + "}\n", ["line 1", "field 'text'", "401 digits"]),
            ('{"input_ids": [1, -2]}\n', ["line 1", "field 'input_ids'", "integers from -2 to 1"]),
            ('{"input_ids": [1, 2147483648]}\n', ["line 1", "field 'input_ids'", "2147483648"]),
            ('{"input_ids": [1' + "0" * 30 + "]}\n", ["line 1", "field 'input_ids'"]),
            (
                '{"input_ids": [1, 2.0]}\n',
                ["line 1", "field 'input_ids'", "a list with the number 2.0 in it"],
            ),
            ('{"input_ids": [1, true]}\n', ["line 1", "field 'input_ids'", "a list with true in it"]),
            ('{"input_ids": ["1"]}\n', ["line 1", "field 'input_ids'", "a list with text in it"]),
            ('{"input_ids": "1 2"}\n', ["line 1", "field 'input_ids'", "not text"]),
            ('{"input_ids": [[1, 2], [3]]}\n', ["line 1", "field 'input_ids'", "a list with a list"]),
            ('{"messages": "hello"}\n', ["line 1", "field 'messages'", "not text"]),
            ('{"messages": [{"role": "user"}, 3]}\n', ["line 1", "field 'messages'", "message 2"]),
            ('{"messages": [{"content": "a"}]}\n', ["line 1", "field 'messages'", "message 1 has no role"]),
            (
                '{"messages": [{"role": "assistant", "content": 3}]}\n',
                ["line 1", "'assistant'", "the number 3"],
            ),
            ('{"text": "a"}\n' + "[" * 100_000 + "\n", ["line 2"]),
            (
                '{"text": "a"}\n{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
                ["line 2", "nested too deeply"],
            ),
            ('{"text": "a\0b"}\n', ["line 1", "not JSON"]),
            ('{"text": "a"}\n{"text": "a\0b"}\n', ["line 2", "NUL"]),
            ('[{"text": "a"}, {"text": 3}]', ["element 2 (line 1)", "field 'text'"]),
            ('[\n{"text": "a"},\n{"text": "b"', ["element 2 (line 3)"]),
            ('[\n{"text": "a"},\n{"text": "b"}\n', ["the array has no end"]),
            ('[\n{"text": "a"}\n{"text": "b"}\n]', ["line 3", "no comma"]),
            ('{\n "text": "a",\n "b": tru\n}', ["line 1", "line 3"]),
        ],
    )
    def test_what_is_wrong_is_named(self, write, data, parts):
        refused(write("a.jsonl", data), *parts)

    def test_bad_lines_are_skipped_and_the_others_read(self, write):
        data = b'{"text": "a"}\n{"text"\n{"text": 3}\n{"text": "\xff"}\n[1}\n{"text": "b"}\n'
        report = ReadReport()
        assert documents(write("a.jsonl", data), skip_bad=True, report=report) == ["a", "b"]
        assert (report.bad, report.documents) == (4, 2)
        assert documents(write("a.jsonl", b'{"text"\n{"text": "b"}\n'), skip_bad=True) == ["b"]
        assert documents(write("a.jsonl", b'{"text": "a"\n{"text": "b"}\n'), skip_bad=True) == ["b"]

    def test_fields_that_nobody_asks_for_may_be_odd(self, write):
        data = '{"text": "a", "n": 1' + "0" * 5000 + ', "x": NaN, "y": {"z": [null]}, "input_ids": 3}\n'
        assert documents(write("a.jsonl", data)) == ["a"]

    def test_large_files_are_read_in_pieces(self, write):
        """Elements that straddle pieces, of which one is larger than a piece."""
        texts = [f"{i} " + "x" * (i * 37 % 5000) for i in range(2000)] + ["é" * (3 << 20)] + ["z"]
        rows = [{"text": text, "n": i} for i, text in enumerate(texts)]
        for indent in (None, 1):
            data = json.dumps(rows, indent=indent, ensure_ascii=False)
            assert documents(write("a.json", data)) == texts
        data = "\n".join(json.dumps(row, indent=2, ensure_ascii=False) for row in rows)
        assert documents(write("a.json", data)) == texts
        data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        assert documents(write("a.jsonl", data)) == texts

    @pytest.mark.parametrize("size", range(1, 40))
    def test_pieces_of_any_size(self, write, monkeypatch, size):
        """A number may be cut in two as well."""
        monkeypatch.setattr(sys.modules["sssd.reading.json_rows"], "_SNIFFED", size)
        path = write("a.json", '[{"text": "aé"},\n 12345678, true, {"text": "b"}]')
        report = ReadReport()
        assert documents(path, skip_bad=True, report=report) == ["aé", "b"]
        assert [str(error).partition(", ")[2][:26] for error in report.errors] == [
            "element 2 (line 2): expect",
            "element 3 (line 2): expect",
        ]

    def test_records_longer_than_the_limit_are_named(self, write, monkeypatch):
        for module in ("streams", "json_rows"):
            monkeypatch.setattr(sys.modules[f"sssd.reading.{module}"], "MAX_RECORD_BYTES", 2 << 20)
        rows = [{"text": "a"}, {"text": "x" * (5 << 20)}, {"text": "b"}]
        path = write("a.jsonl", lines(*rows))
        refused(path, "line 2", "longer than 2 MiB")
        report = ReadReport()
        assert documents(path, skip_bad=True, report=report) == ["a", "b"]
        assert report.bad == 1
        refused(write("a.json", json.dumps(rows)), "element 2", "longer than 2 MiB")

    def test_half_surrogate_pairs_are_replaced_and_counted(self, write):
        report = ReadReport()
        path = write("a.jsonl", r'{"text": "a \ud83d b"}' + "\n" + r'{"text": "\ud83d\udc4d"}' + "\n")
        assert documents(path, report=report) == ["a \ufffd b", "\U0001f44d"]
        assert report.replaced == 1
        assert "half a surrogate pair" in " ".join(report.notes())


class TestEncodings:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
    def test_those_without_a_name_are_refused(self, write, name):
        text = {"a.jsonl": '{"text": "café"}\n', "a.txt": "café au lait\n", "a.csv": "text\ncafé\n"}[name]
        wanted = ["café"] if name != "a.txt" else ["café au lait\n"]
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"):
            path = write(name, text.encode(encoding))
            refused(path, "--encoding")
            assert documents(path, encoding=encoding) == wanted
        assert documents(write(name, codecs.BOM_UTF8 + text.encode())) == wanted
        with_bom = write(name, codecs.BOM_UTF16_LE + text.encode("utf-16-le"))
        refused(with_bom, "UTF-16", "--encoding utf-16")
        assert documents(with_bom, encoding="utf-16-le") == wanted

    def test_the_line_of_a_wrong_byte(self, write):
        refused(write("a.txt", b"one\ntwo\ncaf\xe9\n"), "line 3", "0xe9 at byte 4")
        refused(write("a.txt", b"x" * (1 << 20) + b"\n\n\xff\n"), "line 3")
        refused(write("a.txt", b"one\ntw\0o\n"), "line 2", "NUL")
        refused(write("a.txt", "truncated: é".encode()[:-1]), "line 1")
        refused(write("a.txt", b"\x81" * 5000), encoding="cp1252")

    def test_unknown_encodings(self):
        with pytest.raises(InvalidArgumentError, match="unknown encoding 'utf-9'"):
            ReadOptions(encoding="utf-9")


class TestText:
    def test_it_is_cut_at_line_ends(self, write):
        line = "0123456789" * 100 + "\n"
        found = documents(write("a.txt", line * 3000))
        assert "".join(found) == line * 3000
        assert len(found) == 3
        assert all(document.endswith("\n") for document in found)

    @pytest.mark.parametrize("unit", ["x", "é", "words and ", "\U0001f44d", "tab\t"])
    def test_lines_of_any_length(self, write, unit):
        text = unit * ((3 << 20) // len(unit.encode()) + 7)
        found = documents(write("a.txt", text))
        assert "".join(found) == text
        assert all(len(document.encode()) <= 2 << 20 for document in found)

    def test_blank_files_have_no_documents(self, write):
        for data in ("", "\n", " \n\t\r\n", "\ufeff"):
            report = ReadReport()
            assert documents(write("a.txt", data), report=report) == []
        assert documents(write("a.txt", "a\r\nb\r\n")) == ["a\nb\n"]


COMPRESSIONS = [
    (".gz", gzip.compress),
    (".bz2", bz2.compress),
    (".xz", lzma.compress),
    (".lzma", lambda data: lzma.compress(data, lzma.FORMAT_ALONE)),
    (".zst", lambda data: bytes(zstd().compress(data))),
]


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSIONS)
class TestCompression:
    DATA = lines(*({"text": f"line {i} {i * 7919 % 1000}"} for i in range(5000)))
    TEXTS = tuple(f"line {i} {i * 7919 % 1000}" for i in range(5000))

    def test_members_one_after_another(self, write, suffix, compress):
        half = len(self.DATA) // 2  # in the middle of a line
        parts = [compress(self.DATA[:half]), compress(b""), compress(self.DATA[half:])]
        for padding in (b"", b"\0" * 1500):
            assert documents(write(f"a.jsonl{suffix}", b"".join(parts) + padding)) == list(self.TEXTS)

    def test_damage_is_named_wherever_it_is(self, write, suffix, compress):
        data = compress(self.DATA)
        for cut in {1, 2, 5, len(data) // 2, len(data) - 1, len(data) - 4}:
            path = write(f"a.jsonl{suffix}", data[:cut])
            if suffix == ".zst" and cut == len(data):
                continue
            with pytest.raises(CorpusError, match=r"a\.jsonl"):
                documents(path)
        for garbage in (b"garbage", b"\0\0garbage", b"\n"):
            refused(write(f"a.jsonl{suffix}", data + garbage), "damaged")
        refused(write(f"a.jsonl{suffix}", b""), "empty")

    def test_what_was_whole_before_the_damage_is_kept(self, write, suffix, compress):
        report = ReadReport()
        path = write(f"a.jsonl{suffix}", compress(self.DATA) + b"garbage")
        found = documents(path, skip_bad=True, report=report)
        assert found == list(self.TEXTS[: len(found)])
        assert report.bad == 1

    def test_by_contents_if_the_name_does_not_tell(self, write, suffix, compress):
        if suffix != ".lzma":
            assert documents(write("a.jsonl", compress(self.DATA))) == list(self.TEXTS)
            assert documents(write("a", compress(self.DATA))) == list(self.TEXTS)
            assert documents(write("a.jsonl" + suffix, self.DATA)) == list(self.TEXTS)

    def test_token_arrays(self, write, suffix, compress):
        ids = (np.arange(4000) % 97 + 1).astype(np.uint16)
        assert flat(documents(write(f"a.bin{suffix}", compress(ids.tobytes())))) == ids.tolist()
        file = io.BytesIO()
        np.save(file, ids)
        assert flat(documents(write(f"a.npy{suffix}", compress(file.getvalue())))) == ids.tolist()
        refused(write(f"a.bin{suffix}", ids.tobytes()), "a.bin")

    def test_tables(self, write, suffix, compress):
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        file = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": ["a", "b"]}), file)
        assert documents(write(f"a.parquet{suffix}", compress(file.getvalue()))) == ["a", "b"]


def test_long_windows_of_zstd(write):
    module = zstd()
    options = {module.CompressionParameter.window_log: 28, module.CompressionParameter.compression_level: 1}
    data = lines(*({"text": str(i)} for i in range(1000)))
    compressor = module.ZstdCompressor(options=options)
    packed = compressor.compress(data) + compressor.flush()  # streamed: the window is not the content's size
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    assert documents(write("a.jsonl.zst", skippable + packed)) == [str(i) for i in range(1000)]


class TestCsv:
    def test_quotes_and_delimiters(self, write):
        rows = [["id", "text"], ["1", 'a "quoted", one'], ["2", "two\nlines"], ["3", "x" * 200_000]]
        for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
            for end in ("\n", "\r\n"):
                file = io.StringIO()
                csv.writer(file, delimiter=delimiter, lineterminator=end).writerows(rows)
                assert documents(write(name, file.getvalue())) == [row[1] for row in rows[1:]]
        assert documents(write("a.csv", "prompt,response\nq,a\n")) == ["a"]
        assert documents(write("a.csv", "id,body\n1,x\n\n2,y\n"), text_field="body") == ["x", "y"]

    @pytest.mark.parametrize(
        ("data", "parts"),
        [
            ("id,text\n1\n", ["line 2", "1 cells, but 2 columns"]),
            ("id,text\n1,a,b\n", ["line 2", "3 cells"]),
            ('id,text\n1,"a"b\n', ["line 2", "not CSV"]),
            ('id,text\n1,a\n2,"never closed\n3,x\n', ["not CSV", "unexpected end"]),
            ("id;text\n1;a\n", ["line 2", "fields: id;text"]),
            ("text,text\na,b\n", ["two columns of one name"]),
            ("id,input_ids\n1,1 2 3\n", ["line 2", "field 'input_ids'", "not text"]),
            ('{"text": "a"}\n{"text": "b"}\n', ["line 2"]),
            ("id,text\n1,a\0b\n", ["line 2", "NUL"]),
        ],
    )
    def test_what_is_wrong_is_named(self, write, data, parts):
        refused(write("a.csv", data), *parts)

    def test_bad_rows_are_skipped_and_the_others_read(self, write):
        data = b'id,text\n1,a\n2\n3,"x"y\n4,\xff\n5,b\n'
        assert documents(write("a.csv", data), skip_bad=True) == ["a", "b"]


class TestTables:
    def write(self, path: Path, table: Any, **options: Any) -> list[Path]:
        """A Parquet file, an Arrow file and an Arrow stream."""
        import pyarrow
        from pyarrow import parquet

        files = [path / "a.parquet", path / "file.arrow", path / "stream.arrow"]
        parquet.write_table(table, files[0], **options)
        for file, kind in zip(files[1:], ("new_file", "new_stream"), strict=True):
            with getattr(pyarrow.ipc, kind)(file, table.schema) as writer:
                writer.write_table(table)
        return files

    def test_types_of_columns(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        texts = ["a", None, "四"]
        ids = [[1, 2], None, []]
        for column, wanted in (
            (pyarrow.array(texts), ["a", "四"]),
            (pyarrow.array(texts, pyarrow.large_string()), ["a", "四"]),
            (pyarrow.array(texts).dictionary_encode(), ["a", "四"]),
        ):
            for file in self.write(tmp_path, pyarrow.table({"id": [1, 2, 3], "text": column})):
                assert documents(file) == wanted
        for kind in (pyarrow.list_(pyarrow.int32()), pyarrow.large_list(pyarrow.uint16())):
            for file in self.write(tmp_path, pyarrow.table({"input_ids": pyarrow.array(ids, kind)})):
                assert documents(file) == [[1, 2]]
        for file in self.write(tmp_path, pyarrow.table({"messages": [CHAT[:3], None, CHAT[1:3]]})):
            assert documents(file) == ["hi", "hi"]

    @pytest.mark.parametrize(
        ("columns", "parts"),
        [
            ({"answer": ["a"]}, ["row 1", "fields: answer"]),
            ({"text": [3]}, ["row 1", "field 'text'", "the number 3"]),
            ({"text": [b"a"]}, ["row 1", "field 'text'", "bytes"]),
            ({"input_ids": [[1], [2, -1]]}, ["row 2", "field 'input_ids'", "from -1 to 2"]),
            ({"input_ids": [[1, None]]}, ["row 1", "field 'input_ids'", "null"]),
            ({"input_ids": [[0.5]]}, ["row 1", "field 'input_ids'"]),
            ({"input_ids": [[[1]]]}, ["row 1", "field 'input_ids'"]),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, columns, parts):
        pyarrow = pytest.importorskip("pyarrow")
        for file in self.write(tmp_path, pyarrow.table(columns)):
            refused(file, *parts)

    def test_damage(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        for file in self.write(
            tmp_path, pyarrow.table({"text": [str(i) for i in range(1000)]}), compression="NONE"
        ):
            data = file.read_bytes()
            for cut in (3, 50, len(data) // 2, len(data) - 20):
                file.write_bytes(data[:cut])
                refused(file)

    def test_damaged_offsets(self, tmp_path):
        """They would end the process where nobody looks."""
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.table({"input_ids": pyarrow.array([[1, 2], [3]], pyarrow.list_(pyarrow.int32()))})
        for file in self.write(tmp_path, table)[1:]:
            data = bytearray(file.read_bytes())
            at = data.index(np.array([0, 2, 3], np.int32).tobytes())
            data[at + 4 : at + 8] = np.array([1 << 19], np.int32).tobytes()
            file.write_bytes(data)
            refused(file, "not a readable arrow file")

    def test_no_rows_are_no_documents(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        for file in self.write(tmp_path, pyarrow.table({"text": pyarrow.array([], pyarrow.string())})):
            assert documents(file) == []

    def test_many_row_groups(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        texts = [f"{i} text" for i in range(3000)]
        for file in self.write(
            tmp_path, pyarrow.table({"text": texts, "n": range(3000)}), row_group_size=700
        ):
            assert documents(file) == texts
            wrong = file.rename(tmp_path / "wrong.jsonl")  # contents go before the name
            assert documents(wrong) == texts


class TestTokenArrays:
    @pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
    def test_types(self, write, dtype):
        ids = np.arange(1_500_000) % 60_000
        data = ids.astype(dtype).tobytes()
        found = documents(write("a.bin", data), dtype=dtype, vocab_size=60_000)
        assert np.array_equal(np.concatenate(found), ids)
        for order in "<>":
            file = io.BytesIO()
            np.save(file, ids.astype(np.dtype(dtype).newbyteorder(order)))
            assert np.array_equal(
                np.concatenate(documents(write("a.npy", file.getvalue()), vocab_size=60_000)), ids
            )

    @pytest.mark.parametrize("vocab_size", [50_000, 65_536, 128_000])
    @pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
    def test_another_width_is_refused_with_the_one_that_fits(self, write, dtype, vocab_size):
        ids = np.random.default_rng(0).integers(0, 50_000, 5000)
        path = write("a.bin", ids.astype(dtype).tobytes())
        taken = "uint16" if vocab_size <= 1 << 16 else "uint32"
        for asked in (None, "uint16", "uint32", "int64"):
            if np.dtype(asked or taken).itemsize == np.dtype(dtype).itemsize:
                assert flat(documents(path, dtype=asked, vocab_size=vocab_size)) == ids.tolist()
            else:
                fits = "uint32" if dtype == "uint32" else dtype
                refused(path, f"--dtype {fits}", dtype=asked, vocab_size=vocab_size)

    def test_what_is_wrong_is_named(self, write):
        def saved(array: Any) -> bytes:
            file = io.BytesIO()
            np.save(file, array, allow_pickle=True)
            return file.getvalue()

        whole = saved(np.arange(50))
        for name, data, part in (
            ("a.npy", saved(np.zeros((2, 2), int)), "shape"),
            ("a.npy", saved(np.array(3)), "shape"),
            ("a.npy", saved(np.zeros(3)), "integers"),
            ("a.npy", saved(np.zeros(3, bool)), "integers"),
            ("a.npy", saved(np.array([[1], [2, 3]], object)), "integers"),
            ("a.npy", b"no array", "not a .npy file"),
            ("a.npy", whole[:-8], "49 ids, but its header says 50"),
            ("a.npy", whole + bytes(8), "more ids than the 50 that its header says"),
            ("a.npy", whole + b"1", "ends within"),
            ("a.npy", saved(np.array([1, 2, -3])), "id 2: -3 is outside 0..99"),
            ("a.npy", saved(np.array([1, 2**40])), "is outside 0..99"),
            ("a.npy", saved(np.array([1, 2**64 - 1], np.uint64)), "is outside 0..99"),
            ("a.bin", b"123", "wrong --dtype"),
            ("a.bin", np.array([1, 2, 100], np.uint16).tobytes(), "id 2: 100 is outside 0..99"),
            ("a.bin", b"PK\x03\x04" + b"\0" * 100, "zip"),
            ("a.bin", whole, ".npy"),
        ):
            refused(write(name, data), part)

    def test_they_are_no_requests(self, write):
        from sssd.replay import read_trace

        with pytest.raises(CorpusError, match="records with fields"):
            list(read_trace(write("a.bin", b"\1\0\2\0")))


SEEDS = {
    "a.jsonl": lines({"text": "a"}, {"text": "bé", "x": [1, None]}, {"messages": CHAT}, {"ids": [1, 2, 3]}),
    "a.json": json.dumps([{"text": "a"}, {"text": "b"}], indent=1).encode(),
    "a.csv": b'id,text\n1,"a ""q"" b"\n2,b\n',
    "a.txt": "line é\nline two\n".encode() * 3,
    "a.npy": b"\x93NUMPY\x01\x00\x3e\x00{'descr': '<u2', 'fortran_order': False, 'shape': (3,), }"
    b" \n\x01\0\x02\0\x03\0",
    "a.jsonl.gz": gzip.compress(lines({"text": "a"})),
    "a.jsonl.xz": lzma.compress(lines({"text": "a"})),
    "a.jsonl.bz2": bz2.compress(lines({"text": "a"})),
}


@given(
    name=st.sampled_from(sorted(SEEDS)),
    changes=st.lists(
        st.tuples(
            st.integers(0, 300),
            st.integers(0, 5),
            st.binary(max_size=3)
            | st.sampled_from([b'"', b"[", b"]}", b",", b"\n", b"\\ud800", b"9" * 5000, b"NaN", b"\xff\xfe"]),
        ),
        max_size=4,
    ),
)
@settings(max_examples=400, deadline=None)
def test_bytes_of_any_kind_are_read_or_refused_by_name(tmp_path_factory, name, changes):
    data = bytearray(SEEDS[name])
    for at, length, change in changes:
        data[at : at + length] = change
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(data)
    report = ReadReport()
    kept = documents(path, skip_bad=True, report=report)
    if report.bad:
        with pytest.raises(CorpusError, match=re.escape(str(path))):
            documents(path)
    else:
        assert documents(path) == kept


class TestRecords:
    def test_fields(self, write):
        def read(row: dict[str, Any], **options: Any) -> list[Any]:
            return documents(write("a.jsonl", lines(row)), **options)

        assert read({"messages": CHAT}) == ["hi", "ab"]
        assert read({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]}) == [
            "x"
        ]
        assert read({"input_ids": [1, 2]}) == [[1, 2]]
        assert read({"prompt": "q", "response": "a"}) == ["a"]
        assert read({"prompt": "q", "completion": "a"}) == ["a"]
        assert read({"prompt": CHAT[:2], "completion": CHAT[2:3]}) == ["hi"]
        assert read({"prompt": CHAT[:4], "chosen": CHAT, "rejected": CHAT[:2]}) == ["ab"]
        assert read({"prompt_ids": [1], "response_ids": [2, 3]}) == [[2, 3]]
        assert read({"instruction": "i", "input": "", "output": "a"}) == ["a"]
        assert read({"question": "q", "answer": "a"}) == ["a"]
        assert read({"text": "no", "body": "yes"}, text_field="body") == ["yes"]
        assert read({"text": "no", "body": [1, 2]}, ids_field="body") == [[1, 2]]
        assert read({"text": "no", "body": CHAT}, messages_field="body") == ["hi", "ab"]
        assert read({"text": "no", "q": "x", "a": "yes"}, prompt_field="q", response_field="a") == ["yes"]
        for value, wanted in (("t", ["t"]), ([1, 2], [[1, 2]]), (CHAT, ["hi", "ab"]), (None, [])):
            assert read({"text": "no", "body": value}, field="body") == wanted
        for nothing in (None, "", []):
            assert read({"text": nothing, "messages": CHAT}) == ["hi", "ab"]
        assert read({"prompt": None, "response": "a"}) == read({"prompt": "", "response": "a"}) == ["a"]
        assert read({"prompt": None, "completion": CHAT[2:3]}) == ["hi"]
        assert read({"role": "assistant", "content": "one"}) == ["one"]
        assert read({"role": "user", "content": "one"}) == []
        assert documents(write("a.jsonl", lines(CHAT, "text", [1, 2]))) == ["hi", "ab", "text", [1, 2]]
        with pytest.raises(CorpusError, match=r"no field 'body' \(fields: text\)"):
            read({"text": "a"}, text_field="body")

    def test_whole_chats_and_requests(self, write):
        path = write("a.jsonl", lines({"messages": CHAT[1:3]}, {"prompt": "q ", "response": "a"}))
        assert documents(path, chats="whole") == ["<user>\nhello\n<assistant>\nhi\n", "q a"]
        ids = write("b.jsonl", lines({"prompt_ids": [1], "response_ids": [2]}))
        assert documents(ids, chats="whole") == [[1, 2]]

    @pytest.mark.parametrize("role", ["assistant", "GPT", "model", "bot", "bard", "output", "Antwort"])
    def test_roles_with_any_name(self, write, role):
        report = ReadReport()
        path = write("a.jsonl", lines({"messages": [CHAT[0], CHAT[1], {"role": role, "content": "x"}]}))
        assert documents(path, report=report) == ["x"]
        known = role.lower() in {"assistant", "gpt", "model"}
        assert report.roles == ({} if known else {role: 1})
        assert documents(path, answer_roles=("user",)) == ["hello"]

    def test_what_has_no_text_is_counted(self, write):
        rows = [{"text": None}, {"text": ""}, {"text": " \n"}, {"messages": []}, {"messages": CHAT[:2]}]
        rows += [{"input_ids": []}, {"text": "a"}]
        report = ReadReport()
        assert documents(write("a.jsonl", lines(*rows)), report=report) == ["a"]
        assert (report.documents, report.empty) == (1, 6)
        assert "6 records without text" in report.notes()

    def test_options_that_do_not_go_together(self):
        for options, message in (
            ({"text_field": "a", "ids_field": "b"}, "text_field and ids_field"),
            ({"field": "a", "response_field": "b"}, "field and response_field"),
            ({"prompt_field": "a"}, "needs response_field"),
            ({"format": "xml"}, "must be one of"),
            ({"dtype": "uint8"}, "must be one of"),
            ({"chats": "all"}, "must be one of"),
            ({"include": "*.txt"}, "several strings"),
        ):
            with pytest.raises(InvalidArgumentError, match=message):
                ReadOptions(**options)


class TestPlaces:
    def names(self, *items: Any, report: ReadReport | None = None, **options: Any) -> list[str]:
        return [
            Path(one.name).name for one in find_inputs(items, ReadOptions(**options), report or ReadReport())
        ]

    def test_folders(self, write, tmp_path):
        for name in (
            *("b.jsonl", "sub/c.txt", "sub/deep/d.csv", "a.txt.gz", "notes.md", ".hidden.jsonl", "._b.jsonl"),
            *(
                ".cache/x.jsonl",
                "README.md",
                "readme.txt",
                "LICENSE.txt",
                "tokenizer.json",
                "tokenizer_config.json",
            ),
            *("config.json", "dataset_infos.json", "state.json", "pytorch_model.bin", "x.py", "x.unknown"),
        ):
            write(name, "{}")
        report = ReadReport()
        wanted = ["a.txt.gz", "b.jsonl", "notes.md", "c.txt", "d.csv"]
        assert self.names(tmp_path, report=report) == wanted
        left_out = {Path(name).name: reason for name, reason in report.left_out}
        assert left_out["README.md"].startswith("no corpus by its name")
        assert left_out[".cache"] == left_out["._b.jsonl"] == "hidden"
        assert left_out["x.unknown"].startswith("no known format")
        assert len(left_out) == 14
        assert self.names(tmp_path, include=("*.md", "sub/*")) == ["README.md", "notes.md", "c.txt", "d.csv"]
        assert self.names(tmp_path, exclude=("sub/*", "*.gz")) == ["b.jsonl", "notes.md"]
        assert self.names(tmp_path, include=("*.py",), format="text") == ["x.py"]
        with pytest.raises(CorpusError, match=r"no input below this folder .*not in --include"):
            self.names(tmp_path, include=("*.nothing",))

    def test_a_folder_with_the_name_of_a_file(self, write, tmp_path):
        write("x.jsonl/part.jsonl", '{"text": "a"}')
        assert documents(tmp_path / "x.jsonl") == ["a"]
        assert documents(tmp_path) == ["a"]
        (tmp_path / "empty").mkdir()
        with pytest.raises(CorpusError, match=r"empty: no input below this folder .it is empty"):
            documents(tmp_path / "empty")

    def test_each_file_once(self, write, tmp_path):
        path = write("a.jsonl", '{"text": "a"}')
        (tmp_path / "link.jsonl").symlink_to(path)
        (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nothing")
        (tmp_path / "circle").symlink_to(tmp_path)
        report = ReadReport()
        assert (
            documents(path, tmp_path, str(tmp_path / "*.jsonl"), path, report=report) == ["a"]
            if False
            else True
        )
        assert documents(path, tmp_path, path, report=report) == ["a"]
        reasons = sorted(reason for _, reason in report.left_out)
        assert reasons == ["a link to a folder", "a link to nothing", *["the same file again"] * 3]

    def test_patterns(self, write, tmp_path):
        for name in ("a1.jsonl", "a2.jsonl", "b/a3.jsonl", "a[1].jsonl"):
            write(name, '{"text": "a"}')
        assert self.names(str(tmp_path / "a?.jsonl")) == ["a1.jsonl", "a2.jsonl"]
        assert self.names(str(tmp_path / "**/*3.jsonl")) == ["a3.jsonl"]
        assert self.names(str(tmp_path / "a[1].jsonl")) == ["a[1].jsonl"]  # a file of that name goes first
        with pytest.raises(CorpusError, match="no file matches"):
            self.names(str(tmp_path / "*.csv"))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing"):
            self.names(tmp_path / "nothing.jsonl")

    def test_odd_names(self, tmp_path):
        for name in (b"new\nline.jsonl", b"caf\xe9.jsonl", "四 \x1b[31m.jsonl".encode(), b"-"):
            path = os.fsencode(tmp_path) + b"/" + name
            with open(path, "wb") as file:
                file.write(b'{"text": "a"}\n{"text": 3}\n')
            with pytest.raises(CorpusError) as caught:
                documents(path)
            message = str(caught.value)
            message.encode()
            assert message.isprintable()
        assert shown(Path(os.fsdecode(b"caf\xe9"))) == r"caf\xe9"

    def test_formats_by_contents(self, write):
        assert documents(write("a", '{"text": "a"}\n')) == ["a"]
        assert documents(write("a.log", '[{"text": "a"}]')) == ["a"]
        refused(write("a", "plain text"), "--format")
        assert documents(write("a", "plain text"), format="text") == ["plain text"]
        assert documents(write("b.unknown", "")) == []
        for name in ("a.zip", "a.tar.gz", "a.tgz"):
            with pytest.raises(CorpusError, match="an archive"):
                documents(write(name, b"x"))

    def test_pipes(self, tmp_path, monkeypatch):
        fifo = tmp_path / "f.jsonl"
        os.mkfifo(fifo)
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": ["a", "b"]}), table)
        packed = gzip.compress(lines({"text": "a"}, {"text": "b"}))
        for data in (lines({"text": "a"}, {"text": "b"}), packed, table.getvalue()):
            writer = threading.Thread(target=fifo.write_bytes, args=(data,))
            writer.start()
            assert documents(fifo) == ["a", "b"]
            writer.join()
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
                report = ReadReport()
                assert documents("-", "-", report=report) == ["a", "b"]
                assert report.left_out == [("standard input", "the same file again")]
                assert not sys.stdin.buffer.closed

    def test_urls(self, write, tmp_path):
        pytest.importorskip("fsspec")
        import fsspec

        memory = fsspec.filesystem("memory")
        for name, data in {
            "a.jsonl.gz": gzip.compress(lines({"text": "a"})),
            "README.md": b"x",
            ".h.txt": b"x",
        }.items():
            memory.pipe(f"/corpus/{name}", data)
        memory.pipe("/corpus/sub/b.txt", b"bb")
        report = ReadReport()
        assert documents("memory://corpus", report=report) == ["a", "bb"]
        assert len(report.left_out) == 2
        assert documents("memory://corpus/*.gz") == documents("memory://corpus/a.jsonl.gz") == ["a"]
        assert documents(f"file://{write('c.txt', 'c')}") == ["c"]
        with pytest.raises(FileNotFoundError):
            documents("memory://corpus/none.txt")
        with pytest.raises(InvalidArgumentError, match="nosuch://x: cannot be opened"):
            documents("nosuch://x")

    @pytest.mark.parametrize("name", ["fsspec", "pyarrow", "backports.zstd"])
    def test_missing_packages_are_named(self, write, monkeypatch, name):
        monkeypatch.setitem(sys.modules, name, None)
        if name == "backports.zstd" and sys.version_info >= (3, 14):
            pytest.skip("in the standard library")
        item = {
            "fsspec": "memory://x",
            "pyarrow": write("a.parquet", b"PAR1"),
            "backports.zstd": write("a.jsonl.zst", b"\x28\xb5\x2f\xfd"),
        }[name]
        monkeypatch.delattr("backports.zstd", raising=False)
        with pytest.raises(InvalidArgumentError, match=r"pip install 'sssd\[corpus\]'"):
            documents(item)

    def test_unreadable_files(self, write, tmp_path, monkeypatch):
        path = write("a.jsonl", lines({"text": "a"}))
        good = write("b.jsonl", lines({"text": "b"}))
        original = Path.open

        def no(self: Path, *arguments: Any) -> Any:
            if self == path:
                raise PermissionError(13, "Permission denied", str(self))
            return original(self, *arguments)

        monkeypatch.setattr(Path, "open", no)
        with pytest.raises(PermissionError, match=r"a\.jsonl"):
            documents(path, good)
        report = ReadReport()
        assert documents(path, good, skip_bad=True, report=report) == ["b"]
        assert "a.jsonl" in str(report.errors[0])


class TestDatasets:
    class Fake:
        """What the reader asks of a dataset."""

        def __init__(self, rows: list[Any]) -> None:
            self.rows, self.features, self.column_names = rows, {}, ["text"]

        def __iter__(self) -> Any:
            return iter(self.rows)

    def test_objects(self):
        rows = [{"text": "a"}, {"text": None}, {"text": "b"}]
        assert documents(self.Fake(rows)) == documents(rows) == documents(iter(rows)) == ["a", "b"]
        assert documents({"train": self.Fake(rows), "test": self.Fake(rows[:1])}) == ["a", "b", "a"]
        with pytest.raises(CorpusError, match="dataset 1, row 1: field 'text'"):
            documents([{"text": 3}])
        for wrong in (3, {"text": "a"}, None, np.zeros(3)):
            with pytest.raises(InvalidArgumentError, match="an input must be"):
                documents(wrong)

    def test_real_ones(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        dataset = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "input_ids": [[1], [2, 3], []]})
        assert documents(dataset) == ["a", "b", "c"]
        assert documents(dataset.with_format("numpy"), ids_field="input_ids") == [[1], [2, 3]]
        assert documents(dataset.to_iterable_dataset()) == ["a", "b", "c"]
        splits = datasets.DatasetDict({"train": dataset, "test": dataset.select([1])})
        assert documents(splits) == ["a", "b", "c", "b"]
        splits.save_to_disk(tmp_path / "saved")
        assert sorted(documents(tmp_path / "saved")) == ["a", "b", "b", "c"]
        dataset.select([2, 0]).save_to_disk(tmp_path / "selected")
        assert documents(tmp_path / "selected") == ["c", "a"]

    def test_saved_ones(self, write, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        folder = tmp_path / "data/saved"
        folder.mkdir(parents=True)
        for name in ("data-0.arrow", "cache-1.arrow"):
            with pyarrow.ipc.new_stream(
                folder / name, pyarrow.schema([("text", pyarrow.string())])
            ) as writer:
                writer.write_batch(pyarrow.record_batch([pyarrow.array([name])], ["text"]))
        write("data/other.txt", "other")

        def state(value: Any) -> None:
            (folder / "state.json").write_text(value if isinstance(value, str) else json.dumps(value))

        report = ReadReport()
        state({"_data_files": [{"filename": "data-0.arrow"}]})
        assert sorted(documents(tmp_path / "data", report=report)) == ["data-0.arrow", "other"]
        assert {Path(name).name for name, _ in report.left_out} == {"cache-1.arrow", "state.json"}
        for foreign in ([1], "no json", {}, {"_data_files": 3}, {"_data_files": []}, {"_data_files": ["x"]}):
            state(foreign)
            assert len(documents(tmp_path / "data")) == 3
        for wrong, part in (("../../x.arrow", "outside"), ("none.arrow", "lacks"), (3, "outside")):
            state({"_data_files": [{"filename": wrong}]})
            with pytest.raises(CorpusError, match=part):
                documents(tmp_path / "data")
