"""Datastore files that the builder does not write, as `docs/format.md` describes them."""

import zlib
from pathlib import Path

from xxhash import xxh3_64_intdigest, xxh3_128_intdigest

PAGE, BLOCK, ENTRY, TRAILER, MAGIC = 4096, 1 << 20, 128, 40, b"\x89SSD\r\n\x1a\n"


def words(data: bytes) -> list[int]:
    """Its 8-byte numbers."""
    return [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]


def packed(*numbers: int) -> bytes:
    """Numbers of 8 bytes."""
    return b"".join(number.to_bytes(8, "little") for number in numbers)


def segments(path: Path) -> list[tuple[list[int], list[bytes]]]:
    """Counts and sections of each segment of a file."""
    data = path.read_bytes()
    (table,) = words(data[120:128])
    found = []
    for at in range(table, len(data) - TRAILER, ENTRY):
        entry = words(data[at : at + ENTRY])
        places = zip(entry[4::2], entry[5::2], strict=True)
        found.append((entry[:4], [data[start:end] for start, end in places]))
    return found


def seal(path: Path, vocab_size: int, parts: list[tuple[list[int], list[bytes]]]) -> None:
    """Writes segments as one file, with checksums that are right."""
    body, table = bytearray(), b""
    for counts, sections in parts:
        entry = packed(*counts)
        for section in sections:
            body += bytes(-len(body) % PAGE)
            entry += packed(PAGE + len(body), PAGE + len(body) + len(section))
            body += section
        table += entry
    blocks = [bytes(body[at : at + BLOCK]) for at in range(0, len(body), BLOCK)]
    sums = packed(*map(xxh3_64_intdigest, blocks))
    table_at = PAGE + len(body) + len(sums)
    tokens, documents = (sum(counts[index] for counts, _ in parts) for index in (2, 1))
    length = table_at + len(table) + TRAILER

    def header(uuid: bytes) -> bytes:
        start = MAGIC + (1).to_bytes(4, "little") + vocab_size.to_bytes(4, "little") + uuid + bytes(32)
        start += packed(tokens, documents, 1 << 16, 0, length, PAGE + len(body), xxh3_64_intdigest(sums))
        return (start + packed(table_at, len(parts), xxh3_64_intdigest(table))).ljust(PAGE - 4, b"\0")

    uuid = xxh3_128_intdigest(header(bytes(16))).to_bytes(16, "little")
    head = header(uuid)
    trailer = uuid + packed(length) + MAGIC
    head += zlib.crc32(head).to_bytes(4, "little")
    path.write_bytes(head + body + sums + table + trailer + packed(xxh3_64_intdigest(trailer)))
