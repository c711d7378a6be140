"""One saved conversation as a file: a small head, which is read to find it, and the state that an engine made of it.

    fixed part | its tokens | padding to `ALIGNMENT` | the state

The head is read without the state. Head and state each have a checksum, since what is restored goes into an engine's
memory as it is: a file that is cut off, overwritten or foreign is a `BadEntry`, never an answer.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]

#: What entries' names end with. Another format gets another name, so that two versions of the pool can share a folder.
SUFFIX = ".kv1"
#: Where a state begins is a multiple of this, for the copies of its tensors.
ALIGNMENT = 4096
FINGERPRINT_BYTES = 32
#: No sequence is longer; a head that says so is not believed.
MOST_TOKENS = 1 << 24

#: Magic, fingerprint, number of tokens, the state's bytes and checksum; the head's own checksum follows.
_FIXED = struct.Struct("<8s32sIQI")
_CHECKSUM = struct.Struct("<I")
_MAGIC = b"slotkv1\n"
#: A state's checksum is made of those of its pieces of so many bytes.
_PIECE = 1 << 22


class BadEntry(ValueError):
    """The file is no whole entry; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Head:
    """What is known of an entry without its state. `fingerprint` tells which engines can use it."""

    fingerprint: bytes
    tokens: Tokens
    state_bytes: int
    state_checksum: int

    @property
    def state_at(self) -> int:
        """Where the state begins."""
        return state_offset(len(self.tokens))

    def packed(self) -> bytes:
        fixed = _FIXED.pack(_MAGIC, self.fingerprint, len(self.tokens), self.state_bytes, self.state_checksum)
        tokens = self.tokens.astype("<i4").tobytes()
        return fixed + _CHECKSUM.pack(zlib.crc32(tokens, zlib.crc32(fixed))) + tokens

    @classmethod
    def read(cls, file: BinaryIO) -> Head:
        """The head of an entry that is open at its beginning. Raises `BadEntry`, `OSError`."""
        fixed = file.read(_FIXED.size)
        checksum = file.read(_CHECKSUM.size)
        if len(fixed) < _FIXED.size or len(checksum) < _CHECKSUM.size:
            raise BadEntry("it ends in its head")
        magic, fingerprint, count, state_bytes, state_checksum = _FIXED.unpack(fixed)
        if magic != _MAGIC or count > MOST_TOKENS:
            raise BadEntry("it does not begin as one")
        tokens = file.read(4 * count)
        if (zlib.crc32(tokens, zlib.crc32(fixed)),) != _CHECKSUM.unpack(checksum):
            raise BadEntry("its head is damaged")
        head = cls(fingerprint, np.frombuffer(tokens, "<i4").astype(np.int32), state_bytes, state_checksum)
        size = os.fstat(file.fileno()).st_size
        if size != head.state_at + state_bytes:
            raise BadEntry(f"it has {size} bytes instead of {head.state_at + state_bytes}")
        return head


def state_offset(tokens: int) -> int:
    """Where the state of an entry with so many tokens begins."""
    return -(-(_FIXED.size + _CHECKSUM.size + 4 * tokens) // ALIGNMENT) * ALIGNMENT


def checksum(state: memoryview) -> int:
    """The checksum of a state: of its pieces', which several cores compute at once."""
    pieces = [state[at : at + _PIECE] for at in range(0, len(state), _PIECE)]
    with ThreadPoolExecutor(min(4, max(1, len(pieces)))) as pool:
        return zlib.crc32(b"".join(_CHECKSUM.pack(each) for each in pool.map(zlib.crc32, pieces)))


def as_tokens(tokens: Sequence[int]) -> Tokens:
    return np.asarray(tokens, np.int32)


def common_prefix(left: Tokens, right: Tokens) -> int:
    """With how many equal tokens both begin."""
    length = min(len(left), len(right))
    differs = left[:length] != right[:length]
    return int(differs.argmax()) if differs.any() else length
