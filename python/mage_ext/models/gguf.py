"""Reader of GGUF files (version 3): metadata, and tensors of the types F32, F16, Q8_0 and Q4_1 as float32 arrays.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Only what a Llama-type model needs is read; anything else is an error
that names it. Offsets and counts come from the file and are checked against its size before they are used.

Test: pytest tests/python/test_gguf.py
"""

import math
import struct
from pathlib import Path

import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# type number -> (name, values per block, bytes per block)
_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}


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
        self._data = np.memmap(self.path, dtype=np.uint8, mode="r")
        self._at = 0
        magic, version = self._bytes(4), self._scalar("I")
        if magic != b"GGUF" or version != 3:
            raise ValueError(f"gguf: {self.path.name} must be a GGUF file of version 3, got magic {magic!r}, version {version}")
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        self.metadata = {self._string(): self._value(self._scalar("I")) for _ in range(self._count(num_keys, 13))}
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        self._offsets: dict[str, tuple[int, int]] = {}
        for _ in range(self._count(num_tensors, 25)):
            name, rank = self._string(), self._scalar("I")
            if rank > 4:
                raise ValueError(f"gguf: rank of tensor {name!r} must be at most 4, got {rank}")
            shape = tuple(self._scalar("Q") for _ in range(rank))[::-1]
            kind, offset = self._scalar("I"), self._scalar("Q")
            if kind not in _TYPES:
                raise ValueError(f"gguf: type of tensor {name!r} must be one of F32, F16, Q4_1, Q8_0, got type number {kind}")
            label, block, block_bytes = _TYPES[kind]
            if shape and shape[-1] % block:
                raise ValueError(f"gguf: last dim of {label} tensor {name!r} must be a multiple of {block}, got {shape}")
            self.tensors[name] = (shape, label)
            self._offsets[name] = (offset, math.prod(shape) // block * block_bytes)
        alignment = self.metadata.get("general.alignment", 32)
        self._base = -(-self._at // alignment) * alignment
        for name, (offset, size) in self._offsets.items():
            if self._base + offset + size > self._data.size:
                raise ValueError(f"gguf: tensor {name!r} must end within the file ({self._data.size} bytes); the file is truncated")

    def tensor(self, name: str) -> np.ndarray:
        """Values of a tensor, float32, in row-major shape."""
        if name not in self.tensors:
            raise ValueError(f"gguf: {self.path.name} must hold tensor {name!r}, got none of that name")
        shape, label = self.tensors[name]
        offset, size = self._offsets[name]
        raw = self._data[self._base + offset : self._base + offset + size]
        if label == "F32":
            values = raw.view(np.float32)
        elif label == "F16":
            values = raw.view(np.float16).astype(np.float32)
        elif label == "Q8_0":  # per 32 values: fp16 scale, 32 int8; value = scale * q
            blocks = raw.reshape(-1, 34)
            values = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)
        else:  # Q4_1, per 32 values: fp16 scale, fp16 min, 16 bytes (low nibbles first); value = scale * q + min
            blocks = raw.reshape(-1, 20)
            scale_min = blocks[:, :4].copy().view(np.float16).astype(np.float32)
            nibbles = np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), axis=1)
            values = scale_min[:, :1] * nibbles + scale_min[:, 1:]
        return np.array(values, dtype=np.float32).reshape(shape)

    # Parsing

    def _bytes(self, count: int) -> bytes:
        if count < 0 or self._at + count > self._data.size:
            raise ValueError(f"gguf: {self.path.name} must hold {count} bytes at {self._at}, got a file of {self._data.size} bytes")
        piece = self._data[self._at : self._at + count].tobytes()
        self._at += count
        return piece

    def _scalar(self, code: str):
        return struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code)))[0]

    def _count(self, count: int, least_bytes: int) -> int:
        if count * least_bytes > self._data.size - self._at:
            raise ValueError(f"gguf: a count of {self.path.name} must fit in the file, got {count} entries at byte {self._at}")
        return count

    def _string(self) -> str:
        return self._bytes(self._scalar("Q")).decode("utf-8")

    def _value(self, kind: int):
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            of = self._scalar("I")
            return [self._value(of) for _ in range(self._count(self._scalar("Q"), 1))]
        raise ValueError(f"gguf: a metadata type of {self.path.name} must be 0..12, got {kind}")
