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
    totals = [sum(counts[index] for counts, _ in parts) for index in (2, 1)]
    sums = packed(*map(xxh3_64_intdigest, blocks))
    head, tail = ends(vocab_size, (totals[0], totals[1]), PAGE + len(body), sums, table)
    path.write_bytes(head + body + tail)


def ends(
    vocab_size: int, totals: tuple[int, int], body_end: int, sums: bytes, table: bytes
) -> tuple[bytes, bytes]:
    """The header, and what follows the body."""
    table_at = body_end + len(sums)
    length = table_at + len(table) + TRAILER

    def header(uuid: bytes) -> bytes:
        start = MAGIC + (1).to_bytes(4, "little") + vocab_size.to_bytes(4, "little") + uuid + bytes(32)
        start += packed(*totals, 1 << 16, 0, length, body_end, xxh3_64_intdigest(sums), table_at)
        return (start + packed(len(table) // ENTRY, xxh3_64_intdigest(table))).ljust(PAGE - 4, b"\0")

    uuid = xxh3_128_intdigest(header(bytes(16))).to_bytes(16, "little")
    head = header(uuid)
    trailer = uuid + packed(length) + MAGIC
    head += zlib.crc32(head).to_bytes(4, "little")
    return head, sums + table + trailer + packed(xxh3_64_intdigest(trailer))


def sparse(path: Path, size: int) -> Path:
    """A sound file without tokens of about this size, next to nothing of it on disk."""
    vocab_size, bits = (1 << 24) - 1, 24
    symbols = size * 8 // bits
    index = -(-(vocab_size + 1) // 8) + 7
    lengths = [-(-symbols * bits // 8) + 7, 7, index, 0, index, 7]
    entry, end = packed(symbols, symbols, 0, 0), PAGE
    for length in lengths:
        start = -(-end // PAGE) * PAGE
        end = start + length
        entry += packed(start, end)
    blocks, rest = divmod(end - PAGE, BLOCK)
    sums = packed(xxh3_64_intdigest(bytes(BLOCK))) * blocks
    sums += packed(xxh3_64_intdigest(bytes(rest))) if rest else b""
    head, tail = ends(vocab_size, (0, symbols), end, sums, entry)
    with path.open("wb") as file:
        file.write(head)
        file.seek(end)
        file.write(tail)
    return path
