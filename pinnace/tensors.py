"""Tensors of the Open Inference Protocol and their encodings: typed values, raw bytes and nested lists."""

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
KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}
"""Kinds of numbers that a kind of datatype takes: whole ones are FP32 as well, since JSON does not tell them apart."""
MAX_DIMENSIONS = 16


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model takes or gives; a dimension of -1 has any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named array. BYTES is an object array of `bytes`; every other datatype has its numpy dtype."""

    name: str
    array: NDArray[Any]

    @property
    def datatype(self) -> str:
        try:
            return DATATYPES[self.array.dtype]
        except KeyError:
            raise TypeError(f"tensor '{self.name}': the protocol has no datatype for {self.array.dtype}") from None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def rows(self) -> int:
        """Instances in it: elements of BYTES, else the first axis; a scalar is one."""
        return self.array.size if self.datatype == "BYTES" else self.shape[0] if self.shape else 1


def tensor_of_values(name: str, datatype: str, shape: Iterable[int], values: Sequence[Any]) -> Tensor:
    """From values in row-major order: elements of BYTES, or numbers, flat or in lists as deep as the shape.

    Raises InvalidInput.
    """
    dtype = _dtype(name, datatype)
    if datatype == "BYTES":
        array = np.empty(len(values), object)
        array[:] = values
    else:
        array = _numbers(name, datatype, dtype, values)
    return Tensor(name, _shaped(name, array, shape))


def tensor_of_raw(name: str, datatype: str, shape: Iterable[int], raw: bytes | memoryview) -> Tensor:
    """From little-endian bytes, without copying numbers; BYTES elements each stand behind a uint32 length.

    Raises InvalidInput.
    """
    dtype = _dtype(name, datatype)
    if datatype == "BYTES":
        return tensor_of_values(name, datatype, shape, _split(name, raw))
    if len(raw) % dtype.itemsize:
        raise InvalidInput(f"input '{name}': {len(raw)} bytes are no whole number of {datatype} values")
    return Tensor(name, _shaped(name, np.frombuffer(raw, dtype), shape))


def tensor_of_lists(name: str, lists: Sequence[Any]) -> Tensor:
    """From nested JSON lists of numbers, booleans or bytes, one item a row: INT64, FP64, BOOL or BYTES.

    Raises InvalidInput where the lists are ragged or mix kinds.
    """
    if all(isinstance(item, bytes) for item in lists):
        return tensor_of_values(name, "BYTES", [len(lists)], lists)
    try:
        array = np.asarray(lists)
    except (ValueError, OverflowError):  # ragged, or an integer beyond 64 bits
        raise InvalidInput(f"'{name}': the instances are not numbers in lists of one shape") from None
    if array.dtype not in (np.int64, np.uint64, np.float64, np.bool_):
        raise InvalidInput(f"'{name}': the instances are not all numbers, or not all of one kind")
    return Tensor(name, array)


def raw_of_tensor(tensor: Tensor) -> bytes:
    """The inverse of tensor_of_raw."""
    if tensor.datatype == "BYTES":
        return b"".join(struct.pack("<I", len(element)) + element for element in tensor.array.flat)
    return tensor.array.tobytes()


def _dtype(name: str, datatype: str) -> np.dtype[Any]:
    try:
        return DTYPES[datatype]
    except KeyError:
        raise InvalidInput(f"input '{name}': its datatype is none of {', '.join(DTYPES)}") from None


def _numbers(name: str, datatype: str, dtype: np.dtype[Any], values: Sequence[Any]) -> NDArray[Any]:
    try:
        # Alone, numpy makes floats of small and huge whole numbers side by side.
        huge = dtype == np.uint64 and isinstance(values, list) and all(type(value) is int for value in values)
        given = np.asarray(values, np.uint64 if huge else None).reshape(-1)
    except (ValueError, OverflowError):  # ragged, or an integer beyond 64 bits
        raise InvalidInput(f"input '{name}': its values are not {datatype} in lists of one shape") from None
    if given.dtype == dtype or given.size == 0:
        return given.astype(dtype, copy=False)
    if given.dtype.kind not in KINDS[dtype.kind]:
        raise InvalidInput(f"input '{name}': its values are not {datatype}")
    with np.errstate(over="ignore"):
        array = given.astype(dtype, copy=False)
    if not (_fits(given, dtype) if dtype.kind in "iu" else np.array_equal(np.isinf(array), np.isinf(given))):
        raise InvalidInput(f"input '{name}': a value lies outside {datatype}")
    return array


def _fits(array: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    limits = np.iinfo(dtype)
    return bool(limits.min <= array.min() and array.max() <= limits.max)


def _shaped(name: str, array: NDArray[Any], shape: Iterable[int]) -> NDArray[Any]:
    """Give a flat array its shape. An empty shape is a scalar: proto3 clients leave out the shape of one image."""
    dimensions = list(shape)
    if len(dimensions) > MAX_DIMENSIONS or any(size < 0 for size in dimensions):
        raise InvalidInput(f"input '{name}': its shape has a negative or more than {MAX_DIMENSIONS} dimensions")
    if math.prod(dimensions) != array.size:
        raise InvalidInput(f"input '{name}': its shape asks for another number of values than the {array.size} sent")
    try:
        return array.reshape(dimensions)
    except ValueError:  # a zero beside a dimension that numpy cannot count
        raise InvalidInput(f"input '{name}': its shape is out of range") from None


def _split(name: str, raw: bytes | memoryview) -> list[bytes]:
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
