"""Reads the header of a GGUF file: its metadata and the sizes of its tensors, without the engine and without reading
the weights.

The file comes from outside, so every length in it is checked against the file before it is believed, and a header is
never read beyond `HEADER_LIMIT`. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2, 3).
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

#: The longest header that is read, in bytes. Real ones, vocabulary included, have some ten million.
HEADER_LIMIT = 1 << 29
#: Strings and arrays above these lengths are skipped: vocabularies, templates.
LONGEST_TEXT = 1 << 10
LONGEST_ARRAY = 1 << 12

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

#: ggml's tensor types: number -> (elements of a block, bytes of a block).
TENSOR_TYPES = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    15: (256, 292),  # Q8_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
    40: (64, 36),  # NVFP4
    41: (128, 18),  # Q1_0
}


class GgufError(ValueError):
    """The file is not a whole GGUF file; the message says what is wrong with it and names the file alone."""


class GgufCutOffError(GgufError):
    """The file ends within its header, of which the rest would tell more."""


class _EndsTooEarly(ValueError):
    """A length leads beyond the end."""


@dataclass
class GgufHeader:
    """`metadata` has all scalars, short strings and short arrays; `lengths` the length of every array."""

    metadata: dict[str, Any] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    tensor_bytes: int = 0

    def of_architecture(self, key: str, default: Any = None) -> Any:
        """The value of `key` under the model's own architecture, such as `llama.block_count`."""
        return self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}", default)


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file; of a split model (`…-00001-of-00003.gguf`) with the tensors of all parts.

    Blocks for milliseconds. Raises `GgufError`.
    """
    header = _read_one(path)
    match = re.search(r"-00001-of-(\d{5})\.gguf$", path.name)
    for part in range(2, int(match[1]) + 1 if match else 0):
        name = re.sub(r"-00001-of-", f"-{part:05}-of-", path.name)
        header.tensor_bytes += _read_one(path.with_name(name)).tensor_bytes
    return header


def _read_one(path: Path) -> GgufHeader:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except (OSError, ValueError, struct.error, IndexError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        kind = GgufCutOffError if isinstance(error, _EndsTooEarly) else GgufError
        raise kind(f"{path.name} is not a whole GGUF file: {reason}") from None


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._end = min(len(data), HEADER_LIMIT)

    def header(self) -> GgufHeader:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with the letters GGUF")
        self._at = 4
        (version,) = self._take("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not known")
        tensors, pairs = self._take("QQ")
        header = GgufHeader()
        for _ in range(pairs):
            key = self._text()
            (kind,) = self._take("I")
            self._value(header, key.decode("utf-8", "replace"), kind)
        sizes = [self._tensor() for _ in range(tensors)]
        alignment = int(header.metadata.get("general.alignment", 32)) or 32
        start = -(-self._at // alignment) * alignment
        end = max((offset + (size or 0) for offset, size in sizes), default=0)
        if start + end > len(self._data):
            raise ValueError(f"its tensors need {start + end} bytes, it has {len(self._data)}")
        known = [size for _, size in sizes if size is not None]
        # Where a type is newer than the table, the file itself says how much its tensors take.
        header.tensor_bytes = sum(known) if len(known) == len(sizes) else len(self._data) - start
        return header

    def _take(self, kinds: str) -> tuple[Any, ...]:
        layout = "<" + kinds
        values = struct.unpack_from(layout, self._data, self._skip(struct.calcsize(layout)))
        return values

    def _skip(self, length: int) -> int:
        """Move on by `length` bytes; the place where they begin."""
        start = self._at
        if length > self._end - start:
            raise _EndsTooEarly("its header ends too early")
        self._at = start + length
        return start

    def _text(self) -> bytes:
        (length,) = self._take("Q")
        start = self._skip(length)
        return self._data[start : start + min(length, LONGEST_TEXT)]

    def _value(self, header: GgufHeader, key: str, kind: int) -> None:
        if kind == _STRING:
            header.metadata[key] = self._text().decode("utf-8", "replace")
        elif kind == _ARRAY:
            element, length = self._take("IQ")
            header.lengths[key] = length
            if element == _STRING:
                self._skip_texts(length)
            elif element not in _SCALARS:
                raise ValueError(f"{key} is an array of an unknown kind ({element})")
            elif length <= LONGEST_ARRAY:
                header.metadata[key] = list(self._take(f"{length}{_SCALARS[element]}"))
            else:
                self._skip(length * struct.calcsize("<" + _SCALARS[element]))
        elif kind in _SCALARS:
            (header.metadata[key],) = self._take(_SCALARS[kind])
        else:
            raise ValueError(f"{key} is of an unknown kind ({kind})")

    def _skip_texts(self, count: int) -> None:
        # Vocabularies have hundreds of thousands: this loop is the cost of reading a header.
        data, at, end = self._data, self._at, self._end
        length_of = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end:
                raise _EndsTooEarly("its header ends too early")
            at += 8 + length_of(data, at)[0]
        self._at = at
        self._skip(0)

    def _tensor(self) -> tuple[int, int | None]:
        """Offset and size of the next tensor; no size if its type is not known."""
        self._text()
        (dimensions,) = self._take("I")
        if dimensions > 8:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        shape = self._take(f"{dimensions}Q")
        kind, offset = self._take("IQ")
        if kind not in TENSOR_TYPES:
            return offset, None
        block, size = TENSOR_TYPES[kind]
        return offset, -(-prod(shape) // block) * size
