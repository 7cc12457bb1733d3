"""Tensors of the Open Inference Protocol, and their encodings: typed values, raw bytes and nested lists.

The protocol: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pinnace.errors import InvalidInput

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
DATATYPES = {dtype: datatype for datatype, dtype in DTYPES.items()}
ACCEPTED_KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}
"""The kinds of numpy dtypes whose values a kind of datatype accepts. Floats accept whole numbers: JSON has one type."""
MAX_DIMENSIONS = 16


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The name, datatype and shape of an input or output. A dimension of -1 can have any size.

    `datatype` is one of the Open Inference Protocol: BOOL, INT8 to INT64, UINT8 to UINT64, FP16, FP32, FP64 or BYTES.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named array. BYTES is an object array of `bytes`; every other datatype has the numpy dtype of that name."""

    name: str
    array: NDArray[Any]

    @classmethod
    def from_values(cls, name: str, datatype: str, shape: Iterable[int], values: Sequence[Any]) -> Tensor:
        """Return a tensor with the given values in row-major order.

        Args:
            name: The tensor's name.
            datatype: A datatype of the Open Inference Protocol.
            shape: The tensor's shape; an empty one is a scalar.
            values: `bytes` for BYTES; for other datatypes numbers, flat or in lists nested as the shape says.

        Raises:
            InvalidInput: The datatype is unknown, or the values do not fit it or the shape.
        """
        dtype = _get_dtype(name, datatype)
        if datatype == "BYTES":
            array = np.empty(len(values), object)
            array[:] = values
        else:
            array = _to_numbers(name, datatype, dtype, values)
        return cls(name, _reshape(name, array, shape))

    @classmethod
    def from_raw(cls, name: str, datatype: str, shape: Iterable[int], raw: bytes | memoryview) -> Tensor:
        """Return a tensor with the values in `raw`, little-endian.

        An array of numbers is a view of `raw`, read-only if `raw` is. An empty shape is a scalar. Each element of BYTES
        is preceded by its length, a uint32, as in Triton's binary data extension
        (https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md).

        Raises:
            InvalidInput: The datatype is unknown, or the bytes do not fit it or the shape.
        """
        dtype = _get_dtype(name, datatype)
        if datatype == "BYTES":
            return cls.from_values(name, datatype, shape, _split_elements(name, raw))
        if len(raw) % dtype.itemsize:
            raise InvalidInput(f"input '{name}': {len(raw)} bytes are not a whole number of {datatype} values")
        return cls(name, _reshape(name, np.frombuffer(raw, dtype), shape))

    @classmethod
    def from_lists(cls, name: str, lists: Sequence[Any]) -> Tensor:
        """Return a tensor with one row per item: INT64, UINT64, FP64, BOOL or BYTES.

        Args:
            name: The tensor's name.
            lists: `bytes` objects, or numbers or booleans in nested JSON lists.

        Raises:
            InvalidInput: The lists are ragged, or mix kinds of values.
        """
        if all(isinstance(item, bytes) for item in lists):
            return cls.from_values(name, "BYTES", [len(lists)], lists)
        try:
            array = np.asarray(lists)
        except (ValueError, OverflowError):  # ragged, or an integer beyond 64 bits
            raise InvalidInput(f"'{name}': the instances are not numbers in lists of one shape") from None
        if array.dtype not in (np.int64, np.uint64, np.float64, np.bool_):
            raise InvalidInput(f"'{name}': the instances are not all numbers, or not all of one kind")
        return cls(name, array)

    @property
    def datatype(self) -> str:
        """Return the datatype of the Open Inference Protocol. Raises TypeError if the dtype has none."""
        try:
            return DATATYPES[self.array.dtype]
        except KeyError:
            raise TypeError(f"tensor '{self.name}': the protocol has no datatype for {self.array.dtype}") from None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the array."""
        return self.array.shape

    @property
    def num_rows(self) -> int:
        """Return the number of rows: the elements of BYTES, else the size of the first axis; a scalar is one row."""
        return self.array.size if self.datatype == "BYTES" else self.shape[0] if self.shape else 1

    def to_raw(self) -> bytes:
        """Return the values as little-endian bytes: the inverse of `from_raw`."""
        if self.datatype == "BYTES":
            return b"".join(struct.pack("<I", len(element)) + element for element in self.array.flat)
        return self.array.tobytes()


def _get_dtype(name: str, datatype: str) -> np.dtype[Any]:
    try:
        return DTYPES[datatype]
    except KeyError:
        raise InvalidInput(f"input '{name}': its datatype is not one of {', '.join(DTYPES)}") from None


def _to_numbers(name: str, datatype: str, dtype: np.dtype[Any], values: Sequence[Any]) -> NDArray[Any]:
    try:
        # Without an explicit dtype numpy makes floats of small and huge whole numbers side by side.
        is_huge = dtype == np.uint64 and isinstance(values, list) and all(type(value) is int for value in values)
        given = np.asarray(values, np.uint64 if is_huge else None).reshape(-1)
    except (ValueError, OverflowError):  # ragged, or an integer beyond 64 bits
        raise InvalidInput(f"input '{name}': its values are not {datatype} in lists of one shape") from None
    if given.dtype == dtype or given.size == 0:
        return given.astype(dtype, copy=False)
    if given.dtype.kind not in ACCEPTED_KINDS[dtype.kind]:
        raise InvalidInput(f"input '{name}': its values are not {datatype}")
    with np.errstate(over="ignore"):
        array = given.astype(dtype, copy=False)
    if not (_is_in_range(given, dtype) if dtype.kind in "iu" else np.array_equal(np.isinf(array), np.isinf(given))):
        raise InvalidInput(f"input '{name}': a value lies outside {datatype}")
    return array


def _is_in_range(array: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    limits = np.iinfo(dtype)
    return bool(limits.min <= array.min() and array.max() <= limits.max)


def _reshape(name: str, array: NDArray[Any], shape: Iterable[int]) -> NDArray[Any]:
    """Give a flat array its shape. An empty shape is a scalar: proto3 clients omit the shape of a single image."""
    dimensions = list(shape)
    if len(dimensions) > MAX_DIMENSIONS or any(size < 0 for size in dimensions):
        raise InvalidInput(
            f"input '{name}': its shape must have at most {MAX_DIMENSIONS} dimensions, none of them negative"
        )
    if math.prod(dimensions) != array.size:
        raise InvalidInput(f"input '{name}': its shape does not match the {array.size} values that were sent")
    try:
        return array.reshape(dimensions)
    except ValueError:  # a zero beside a dimension that numpy cannot count
        raise InvalidInput(f"input '{name}': its shape is out of range") from None


def _split_elements(name: str, raw: bytes | memoryview) -> list[bytes]:
    elements, start = [], 0
    while start < len(raw):
        if start + 4 > len(raw):
            raise InvalidInput(f"input '{name}': its raw BYTES are truncated")
        end = start + 4 + struct.unpack_from("<I", raw, start)[0]
        if end > len(raw):
            raise InvalidInput(f"input '{name}': its raw BYTES are truncated")
        elements.append(bytes(raw[start + 4 : end]))
        start = end
    return elements
