"""TensorFlow 2 object checkpoints, read without TensorFlow.

A checkpoint PREFIX has an index, `PREFIX.index`, which is a sorted table of names and positions (in LevelDB's
table format), and shards, `PREFIX.data-00000-of-00001`, with the tensors end to end. CRC-32C checksums cover
every byte, and all of them are checked.

Reference: tensorflow, `core/util/tensor_bundle/tensor_bundle.cc`, `core/protobuf/tensor_bundle.proto`,
`core/lib/io/format.cc`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from pix2seq.errors import InputError, shortened
from pix2seq.files import read_regular

FOOTER_SIZE = 48
TABLE_MAGIC = 0xDB4775248B80FB57
BLOCK_TRAILER_SIZE = 5  # compression, checksum
CHUNK = 16 << 20  # bytes per read
MAX_SHARDS = 100_000  # the names of shards have five digits
MAX_DIMENSIONS = 8  # of a tensor
STRING = 7
DTYPES = {1: np.float32, 2: np.float64, 3: np.int32, 4: np.uint8, 6: np.int8, 9: np.int64, 10: np.bool_, 19: np.float16}


@dataclass(frozen=True)
class Entry:
    """Position and type of a stored tensor."""

    dtype: int  # TensorFlow's number for it
    shape: tuple[int, ...]
    shard: int
    offset: int  # bytes
    size: int  # bytes
    checksum: int  # masked CRC-32C


class _Damaged(Exception):
    """A damaged part of a file; the caller adds the file's name."""


class TensorBundle:
    """The tensors of a checkpoint by name; `read` or `verify` one.

    Raises `InputError` if a file is missing, truncated, damaged or of another format.
    """

    def __init__(self, prefix: Path) -> None:
        self.index_path = prefix.with_name(prefix.name + ".index")
        try:
            data = read_regular(self.index_path)
        except FileNotFoundError:
            raise InputError(
                f"{self.index_path} does not exist; give a checkpoint as PREFIX, where PREFIX.index and "
                "PREFIX.data-00000-of-00001 lie side by side"
            ) from None
        except OSError as error:
            raise InputError(f"{self.index_path} cannot be read: {error}") from None
        try:
            table = dict(_read_table(data))
            num_shards = _read_header(table.pop("", b""))
            self.entries = {name: _read_entry(value) for name, value in table.items()}
        except (_Damaged, IndexError, struct.error, ValueError) as error:
            raise InputError(
                f"{self.index_path} is damaged or not a TensorFlow 2 checkpoint index ({error}); copy it again"
            ) from None
        self.shards = [
            prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{num_shards:05d}") for shard in range(num_shards)
        ]
        self._check_sizes()

    def read(self, name: str) -> NDArray[Any]:
        """Return the tensor `name` after checking its checksum."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise InputError(f"{name} in {self.index_path} has TensorFlow dtype {entry.dtype}, which is not supported")
        data = b"".join(self._chunks(name, entry))
        dtype = np.dtype(DTYPES[entry.dtype]).newbyteorder("<")
        if len(data) != dtype.itemsize * math.prod(entry.shape):
            raise InputError(f"{name} in {self.index_path} has {len(data)} bytes, wrong for its shape {entry.shape}")
        return np.frombuffer(data, dtype).reshape(entry.shape)

    def verify(self, name: str) -> None:
        """Check the checksum of a tensor of any dtype, without keeping its values."""
        entry = self.entries[name]
        if entry.dtype == STRING:
            self._verify_strings(name, entry)
        else:
            for _ in self._chunks(name, entry):
                pass

    def _chunks(self, name: str, entry: Entry) -> Iterator[bytes]:
        checksum, left = 0, entry.size
        with self._open(entry) as file:
            while left:
                chunk = file.read(min(CHUNK, left))
                if not chunk:
                    break
                left -= len(chunk)
                checksum = google_crc32c.extend(checksum, chunk)
                yield chunk
        if left or _mask(checksum) != entry.checksum:
            raise self._damaged(name, entry)

    def _verify_strings(self, name: str, entry: Entry) -> None:
        # Layout: lengths as varints, their checksum, the strings. The checksum covers lengths as fixed-width integers.
        with self._open(entry) as file:
            data = file.read(entry.size)
        try:
            position, lengths = 0, []
            for _ in range(math.prod(entry.shape)):
                length, position = _varint(data, position)
                lengths.append(length)
        except (IndexError, _Damaged):
            raise self._damaged(name, entry) from None
        checksum = 0
        for length in lengths:
            checksum = google_crc32c.extend(checksum, struct.pack("<I" if length < 1 << 32 else "<Q", length))
        stored = data[position : position + 4]
        if stored != struct.pack("<I", _mask(checksum)) or len(data) != position + 4 + sum(lengths):
            raise self._damaged(name, entry)
        if _mask(google_crc32c.extend(checksum, data[position:])) != entry.checksum:
            raise self._damaged(name, entry)

    def _open(self, entry: Entry) -> BinaryIO:
        file = self.shards[entry.shard].open("rb")
        file.seek(entry.offset)
        return file

    def _damaged(self, name: str, entry: Entry) -> InputError:
        return InputError(
            f"{self.shards[entry.shard]} is damaged: the checksum of {name} is wrong; copy the file again"
        )

    def _check_sizes(self) -> None:
        ends = dict.fromkeys(range(len(self.shards)), 0)
        for name, entry in self.entries.items():
            if entry.shard not in ends:
                raise InputError(f"{self.index_path} puts {name} in shard {entry.shard}, but has {len(ends)} shards")
            ends[entry.shard] = max(ends[entry.shard], entry.offset + entry.size)
        problems = []
        for path, end in zip(self.shards, ends.values(), strict=True):
            if not path.is_file():
                problems.append(f"{path} does not exist or cannot be read")
            elif (size := path.stat().st_size) != end:
                problems.append(f"{path} has {size} bytes, but its index expects {end}")
        if problems:
            raise InputError(f"{', '.join(shortened(problems))}; copy the files again, beside {self.index_path}")


def _mask(checksum: int) -> int:
    """Mask a CRC as it is stored: rotated and shifted, so that CRCs of data that contains CRCs stay reliable."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return an unsigned integer, stored in 7 bits per byte with low bits first, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise _Damaged("a varint is too long")


def _read_table(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the keys and values of a table of blocks."""
    if len(data) < FOOTER_SIZE or struct.unpack("<Q", data[-8:])[0] != TABLE_MAGIC:
        raise _Damaged("it has no table footer")
    footer = data[-FOOTER_SIZE:-8]
    meta_offset, position = _varint(footer, 0)
    meta_size, position = _varint(footer, position)
    offset, position = _varint(footer, position)
    size, position = _varint(footer, position)
    if any(footer[position:]):
        raise _Damaged("the padding of its footer is not zero")
    end = offset + size + BLOCK_TRAILER_SIZE
    if end != len(data) - FOOTER_SIZE or meta_offset + meta_size + BLOCK_TRAILER_SIZE != offset:
        raise _Damaged("its blocks do not fill the file")
    list(_read_block(data, meta_offset, meta_size))  # its content is not needed, but its checksum is checked
    for _, handle in _read_block(data, offset, size):
        block_offset, position = _varint(handle, 0)
        block_size, _ = _varint(handle, position)
        for key, value in _read_block(data, block_offset, block_size):
            yield key.decode("utf-8"), value


def _read_block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of one block; each key is stored as its difference from the previous key."""
    contents = data[offset : offset + size]
    trailer = data[offset + size : offset + size + BLOCK_TRAILER_SIZE]
    if len(trailer) != BLOCK_TRAILER_SIZE:
        raise _Damaged("a block ends beyond the file")
    if struct.unpack("<I", trailer[1:])[0] != _mask(google_crc32c.value(contents + trailer[:1])):
        raise _Damaged("the checksum of a block is wrong")
    if trailer[0] != 0:
        raise _Damaged("a block is compressed")
    num_restarts = struct.unpack("<I", contents[-4:])[0]
    end = size - 4 - 4 * num_restarts
    if end < 0:
        raise _Damaged("a block has more restarts than bytes")
    position, key = 0, b""
    while position < end:
        shared, position = _varint(contents, position)
        added, position = _varint(contents, position)
        length, position = _varint(contents, position)
        if shared > len(key) or position + added + length > end:
            raise _Damaged("an entry ends beyond its block")
        key = key[:shared] + contents[position : position + added]
        position += added
        yield key, contents[position : position + length]
        position += length


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield field numbers and values of a protocol buffer: integers as int, the rest as bytes."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            value: Any
            value, position = _varint(message, position)
        elif kind == 2:
            length, position = _varint(message, position)
            value = message[position : position + length]
            position += length
            if position > len(message):
                raise _Damaged("a field ends beyond its message")
        elif kind == 5:
            value = struct.unpack("<I", message[position : position + 4])[0]
            position += 4
        elif kind == 1:
            value = struct.unpack("<Q", message[position : position + 8])[0]
            position += 8
        else:
            raise _Damaged(f"a field has the unknown kind {kind}")
        yield tag >> 3, value


def _integers(message: bytes, *numbers: int) -> list[int]:
    """Return the integer fields of these numbers, the last of each; one that is left out is 0."""
    found = dict.fromkeys(numbers, 0)
    for number, value in _fields(message):
        if number in found:
            if not isinstance(value, int):
                raise _Damaged(f"field {number} holds bytes instead of a number")
            found[number] = value
    return list(found.values())


def _messages(message: bytes, number: int) -> Iterator[bytes]:
    """Yield the fields of this number, which hold messages of their own."""
    for found, value in _fields(message):
        if found == number:
            if not isinstance(value, bytes):
                raise _Damaged(f"field {number} holds a number instead of a message")
            yield value


def _read_header(value: bytes) -> int:
    """Return the number of shards from a `BundleHeaderProto`."""
    num_shards, endianness = _integers(value, 1, 2)
    if endianness != 0:
        raise _Damaged("it was written on a big-endian machine")
    if not 1 <= num_shards <= MAX_SHARDS:
        raise _Damaged(f"its header names {num_shards} shards")
    return num_shards


def _read_entry(value: bytes) -> Entry:
    """Parse a `BundleEntryProto`."""
    if any(number == 7 for number, _ in _fields(value)):
        raise _Damaged("a tensor is stored in slices")
    dtype, shard, offset, size, checksum = _integers(value, 1, 3, 4, 5, 6)
    shape = tuple(_integers(dim, 1)[0] for dims in _messages(value, 2) for dim in _messages(dims, 2))
    if len(shape) > MAX_DIMENSIONS or max(shape, default=0) >= 1 << 31 or max(offset, size) >= 1 << 62:
        raise _Damaged(f"a tensor has the shape {shape}, {size} bytes at {offset}")
    return Entry(dtype, shape, shard, offset, size, checksum)
