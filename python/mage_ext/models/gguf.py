"""Reader of GGUF files (version 3): metadata, and tensors of the types F32, F16, Q8_0 and Q4_1 as float32 arrays.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Only what a Llama-type model needs is read; anything
else is an error that names it. Offsets and counts come from the file and are checked against its size before their use.

Test: pytest tests/python/test_gguf.py
"""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# type number -> (name, values per block, bytes per block)
_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}
# Least bytes: string (its length), metadata entry (key, type, a byte), tensor entry (name, rank, a dim, type, offset).
_STRING_BYTES, _KEY_BYTES, _TENSOR_BYTES = 8, 13, 32
_REQUIRED = object()


class GGUFFile:
    """An opened GGUF file.

    Attributes:
        metadata: key -> int, float, bool, str or list of them.
        tensors: name -> (shape in row-major order, type name).
    Raises:
        ValueError: the file is not GGUF version 3, is truncated, or holds a type that is not read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"gguf: path must be a GGUF file, got {str(path)!r}, which is not a file")
        if self.path.stat().st_size < 24:
            raise ValueError(f"gguf: {self.path.name} must be a GGUF file, got one of {self.path.stat().st_size} bytes")
        self._data = np.memmap(self.path, dtype=np.uint8, mode="r")
        self._view = memoryview(self._data)
        self._at = 0
        magic, version = self._bytes(4), self._scalar("I")
        if magic != b"GGUF" or version != 3:
            raise ValueError(
                f"gguf: {self.path.name} must be a GGUF file of version 3, got magic {magic!r}, version {version}"
            )
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        self._check_count("number of metadata keys", num_keys, _KEY_BYTES)
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string("a metadata key")
            if key in self.metadata:
                raise ValueError(f"gguf: metadata key {key!r} must stand once, got it twice")
            self.metadata[key] = self._value(key, self._scalar("I"))
        self._check_count("number of tensors", num_tensors, _TENSOR_BYTES)
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        self._offsets: dict[str, tuple[int, int]] = {}
        for _ in range(num_tensors):
            self._tensor_entry()
        alignment = self.value("general.alignment", int, 32)
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"gguf: general.alignment must be a power of two, got {alignment}")
        self._base = -(-self._at // alignment) * alignment
        for name, (offset, size) in self._offsets.items():
            if offset % alignment:
                raise ValueError(f"gguf: offset of tensor {name!r} must be a multiple of {alignment}, got {offset}")
            if self._base + offset + size > self._data.size:
                raise ValueError(
                    f"gguf: tensor {name!r} must end within the file ({self._data.size} bytes), "
                    f"got an end at {self._base + offset + size}; the file is truncated"
                )

    def value(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The metadata value of a key.

        Args:
            key: its name. kind: int, float or str. default: for a file without the key.
        Raises:
            ValueError: there is no such key and no default, or the value is of another type.
        """
        value = self.metadata.get(key, default)
        if value is _REQUIRED:
            raise ValueError(f"gguf: {self.path.name} must hold metadata key {key!r}, got none of that name")
        if value is not default and type(value) is not kind:
            raise ValueError(f"gguf: metadata key {key!r} must be of type {kind.__name__}, got {type(value).__name__}")
        return value

    def values(self, key: str, kind: type) -> list[Any]:
        """The metadata list of a key, every entry of type `kind`. Raises ValueError as `value` does."""
        found = self.value(key, list)
        wrong = next((entry for entry in found if type(entry) is not kind), None)
        if wrong is not None:
            raise ValueError(
                f"gguf: metadata key {key!r} must be a list of {kind.__name__}, got an entry of {type(wrong).__name__}"
            )
        return found

    def tensor(self, name: str) -> np.ndarray:
        """Values of a tensor, float32, in row-major shape."""
        if name not in self.tensors:
            raise ValueError(f"gguf: {self.path.name} must hold tensor {name!r}, got none of that name")
        shape, label = self.tensors[name]
        offset, size = self._offsets[name]
        raw = self._data[self._base + offset : self._base + offset + size]
        if label == "F32":
            values = raw.view("<f4")
        elif label == "F16":
            values = raw.view("<f2")
        elif label == "Q8_0":  # per 32 values: fp16 scale, 32 int8; value = scale * q
            blocks = raw.reshape(-1, 34)
            values = blocks[:, :2].copy().view("<f2").astype(np.float32) * blocks[:, 2:].view(np.int8)
        else:  # Q4_1, per 32 values: fp16 scale, fp16 min, 16 bytes (low nibbles first); value = scale * q + min
            blocks = raw.reshape(-1, 20)
            scale_min = blocks[:, :4].copy().view("<f2").astype(np.float32)
            nibbles = np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), axis=1)
            values = scale_min[:, :1] * nibbles + scale_min[:, 1:]
        return np.array(values, dtype=np.float32).reshape(shape)

    # Parsing

    def _tensor_entry(self) -> None:
        name, rank = self._string("a tensor's name"), self._scalar("I")
        if name in self.tensors:
            raise ValueError(f"gguf: tensor {name!r} must stand once, got it twice")
        if not 1 <= rank <= 4:
            raise ValueError(f"gguf: rank of tensor {name!r} must be in 1..4, got {rank}")
        shape = tuple(self._scalar("Q") for _ in range(rank))[::-1]
        if not all(shape):
            raise ValueError(f"gguf: dims of tensor {name!r} must be positive, got {shape}")
        kind, offset = self._scalar("I"), self._scalar("Q")
        if kind not in _TYPES:
            names = ", ".join(sorted(entry[0] for entry in _TYPES.values()))
            raise ValueError(f"gguf: type of tensor {name!r} must be one of {names}, got type number {kind}")
        label, block, block_bytes = _TYPES[kind]
        if shape[-1] % block:
            raise ValueError(f"gguf: last dim of {label} tensor {name!r} must be a multiple of {block}, got {shape}")
        self.tensors[name] = (shape, label)
        self._offsets[name] = (offset, math.prod(shape) // block * block_bytes)

    def _bytes(self, count: int) -> bytes:
        if self._at + count > self._data.size:
            raise ValueError(
                f"gguf: {self.path.name} must hold {count} bytes at {self._at}, got a file of {self._data.size} bytes"
            )
        self._at += count
        return self._view[self._at - count : self._at].tobytes()

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code)))[0]

    def _check_count(self, what: str, count: int, least_bytes: int) -> None:
        if count * least_bytes > self._data.size - self._at:
            raise ValueError(f"gguf: {what} must fit in {self.path.name}, got {count} at byte {self._at}")

    def _string(self, what: str) -> str:
        at, raw = self._at, self._bytes(self._scalar("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"gguf: {what} must be UTF-8, got byte {raw[error.start]:#04x} at {at + 8 + error.start}"
            ) from None

    def _value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string(f"metadata key {key!r}")
        if kind != _ARRAY:
            raise ValueError(f"gguf: type of metadata key {key!r} must be in 0..12, got {kind}")
        of, count = self._scalar("I"), self._scalar("Q")
        if of == _STRING:
            self._check_count(f"number of entries of {key!r}", count, _STRING_BYTES)
            return [self._string(f"metadata key {key!r}") for _ in range(count)]
        if of not in _SCALARS:
            raise ValueError(f"gguf: entries of metadata key {key!r} must be scalars or strings, got type {of}")
        size = struct.calcsize("<" + _SCALARS[of])
        self._check_count(f"number of entries of {key!r}", count, size)
        return list(struct.unpack(f"<{count}{_SCALARS[of]}", self._bytes(count * size)))
