"""Records: what is written is read, and nothing else is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sssd.errors import InvalidArgumentError, SharingError
from sssd.sharing import MAX_RECORD_BYTES, Record
from sssd.sharing.record import MAX_TOKENS


def record(**changes):
    fields = {
        "origin": bytes(range(16)),
        "number": 3,
        "time": 1.5,
        "namespace": "tenant-7",
        "vocab_size": 100,
        "fingerprint": bytes(31) + b"x",
        "start": 12,
        "token_ids": np.int32([1, 2, -1, 99]),
    }
    return Record(**{**fields, **changes})


@given(
    namespace=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    ids=st.lists(st.integers(-1, 99)),
    number=st.integers(0, 2**64 - 1),
    start=st.integers(0, 2**64 - 1),
    key=st.none() | st.binary(min_size=1, max_size=64),
    fingerprint=st.none() | st.just(bytes(range(32))),
)
def test_what_is_written_is_read(namespace, ids, number, start, key, fingerprint):
    one = record(
        namespace=namespace, token_ids=np.int32(ids), number=number, start=start, fingerprint=fingerprint
    )
    read = Record.decode(one.encode(key), key)
    assert read.token_ids.tolist() == ids
    assert {**vars(read), "token_ids": None} == {**vars(one), "token_ids": None}


def test_the_bytes_stay_as_they_are():
    """A record of this release is read by the next ones, or its version changes."""
    expected = (
        "89535352 0100 0800 64000000 04000000 0c00000000000000 0300000000000000 000000000000f83f"
        "000102030405060708090a0b0c0d0e0f" + "00" * 31 + "78"
        "74656e616e742d37 01000000 02000000 ffffffff 63000000"
    )
    data = record().encode()
    assert data[:-16] == bytes.fromhex(expected)
    assert data[-16:].hex() == "48938da1b4e285cefb27abda9ccfb90a"


@pytest.mark.parametrize("key", [None, b"secret"])
def test_every_changed_byte_is_noticed(key):
    data = record().encode(key)
    for at in range(len(data)):
        for change in (1, 0x80):
            with pytest.raises(SharingError):
                Record.decode(data[:at] + bytes([data[at] ^ change]) + data[at + 1 :], key)
    for length in range(len(data)):
        with pytest.raises(SharingError):
            Record.decode(data[:length], key)
    with pytest.raises(SharingError):
        Record.decode(data + b"x", key)


@given(st.binary(max_size=300))
def test_rubbish_is_refused(data):
    with pytest.raises(SharingError):
        Record.decode(data)


def test_lengths_that_lie_are_refused():
    """Well signed, by a writer that means harm."""
    import hashlib

    body = bytearray(record().encode()[:-16])
    for at, size in ((6, 2), (12, 4)):
        for value in (0, 1, 9, 255 << 8 * (size - 1)):
            forged = bytes(body[:at]) + value.to_bytes(size, "little") + bytes(body[at + size :])
            forged += hashlib.blake2b(forged, digest_size=16).digest()
            if value != int.from_bytes(body[at : at + size], "little"):
                with pytest.raises(SharingError, match="lengths"):
                    Record.decode(forged)
    for ids in ([100], [-2], [2**31 - 1]):
        with pytest.raises(SharingError, match="outside"):
            Record.decode(record(token_ids=np.int32(ids)).encode())
    name = record(namespace="xx").encode()[:-16].replace(b"xx", b"\xff\xff")
    with pytest.raises(SharingError, match="UTF-8"):
        Record.decode(name + hashlib.blake2b(name, digest_size=16).digest())
    newer = bytes(body[:4]) + b"\2\0" + bytes(body[6:])
    with pytest.raises(SharingError, match="version 2"):
        Record.decode(newer + hashlib.blake2b(newer, digest_size=16).digest())


def test_records_have_a_largest_size():
    largest = record(namespace="n" * 1024, token_ids=np.zeros(MAX_TOKENS, np.int32)).encode()
    assert MAX_RECORD_BYTES - 4 < len(largest) <= MAX_RECORD_BYTES
    for changes in ({"namespace": "n" * 1025}, {"token_ids": np.zeros(MAX_TOKENS + 1, np.int32)}):
        with pytest.raises(InvalidArgumentError):
            record(**changes).encode()
    with pytest.raises(SharingError, match="bytes"):
        Record.decode(largest + bytes(4))
