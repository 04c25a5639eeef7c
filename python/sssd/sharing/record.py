"""The text of a finished request as bytes, and back. What is read is trusted in nothing."""

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sssd.errors import InvalidArgumentError, SharingError
from sssd.sharing.log import MAX_RECORD_BYTES

_MAGIC = bytes.fromhex("89 53 53 52")
_VERSION = 1
# magic, version, bytes of the namespace, vocabulary size, tokens, place of the first token in the request,
# number of the record, time, origin, fingerprint
_HEADER = struct.Struct("<4sHHIIQQd16s32s")
_DIGEST = 16

MAX_NAMESPACE_BYTES = 1024
"""The most bytes of a namespace's name."""

MAX_TOKENS = (MAX_RECORD_BYTES - _HEADER.size - MAX_NAMESPACE_BYTES - _DIGEST) // 4
"""The most tokens of a record."""


@dataclass(frozen=True)
class Record:
    """A finished request, or the end of a long one.

    Attributes:
        origin: who published it, 16 bytes, another one after each start.
        number: counts the records of an origin.
        time: when the request finished, seconds since 1970 by the origin's clock.
        namespace: whose it is.
        vocab_size: number of token ids, 0 if unknown.
        fingerprint: of the tokenizer, 32 bytes, or None if unknown.
        start: place of the first of its tokens in the request.
        token_ids: int32 [n]; -1 is a placeholder.
    """

    origin: bytes
    number: int
    time: float
    namespace: str
    vocab_size: int
    fingerprint: bytes | None
    start: int
    token_ids: NDArray[np.int32]

    def encode(self, key: bytes | None = None) -> bytes:
        """The record as bytes: little-endian, with a BLAKE2b of everything before at its end, keyed if there
        is a ``key``.

        Raises:
            InvalidArgumentError: the namespace's name or the text is too long.
        """
        name = self.namespace.encode()
        if len(name) > MAX_NAMESPACE_BYTES or len(self.token_ids) > MAX_TOKENS:
            raise InvalidArgumentError(
                f"a record has at most {MAX_NAMESPACE_BYTES} bytes of a namespace's name and {MAX_TOKENS} "
                f"tokens, not {len(name)} and {len(self.token_ids)}"
            )
        header = _HEADER.pack(
            *(_MAGIC, _VERSION, len(name), self.vocab_size, len(self.token_ids), self.start, self.number),
            *(self.time, self.origin, self.fingerprint or bytes(32)),
        )
        body = header + name + self.token_ids.astype("<i4", copy=False).tobytes()
        return body + _digest(body, key)

    @staticmethod
    def decode(data: bytes, key: bytes | None = None) -> "Record":
        """The record that ``encode`` made these bytes of.

        Raises:
            SharingError: they are none, or damaged, or another key's or version's.
        """
        if not _HEADER.size + _DIGEST <= len(data) <= MAX_RECORD_BYTES:
            raise SharingError(f"a record has {_HEADER.size} to {MAX_RECORD_BYTES} bytes, not {len(data)}")
        magic, version, name_bytes, vocab_size, tokens, start, number, time, origin, fingerprint = (
            _HEADER.unpack_from(data)
        )
        if magic != _MAGIC:
            raise SharingError("no record of a finished request")
        if version != _VERSION:
            raise SharingError(f"a record of version {version}; this release reads version {_VERSION}")
        body = data[:-_DIGEST]
        if _digest(body, key) != data[-_DIGEST:]:
            raise SharingError("a record is damaged, or of who has another key")
        if name_bytes > MAX_NAMESPACE_BYTES or len(body) != _HEADER.size + name_bytes + 4 * tokens:
            raise SharingError("a record's lengths do not fit together")
        ids = np.frombuffer(body, "<i4", tokens, _HEADER.size + name_bytes).astype(np.int32, copy=False)
        most = (vocab_size or 1 << 31) - 1
        if tokens and (ids.min() < -1 or ids.max() > most):
            raise SharingError(f"a record has token ids outside 0..{most}")
        try:
            namespace = body[_HEADER.size : _HEADER.size + name_bytes].decode()
        except UnicodeDecodeError:
            raise SharingError("a record's namespace is no UTF-8") from None
        known = fingerprint if any(fingerprint) else None
        return Record(origin, number, time, namespace, vocab_size, known, start, ids)


def _digest(body: bytes, key: bytes | None) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST, key=key or b"").digest()
