"""pinnace/tensors.py: decoding and encoding of every datatype, and the errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pinnace.errors import InvalidInput
from pinnace.tensors import DTYPES, Tensor

numeric = st.sampled_from([dtype for name, dtype in DTYPES.items() if name != "BYTES"])
array = numeric.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0)))


@given(array)
def test_numbers_of_every_datatype_are_unchanged_after_raw_encoding(values: Any) -> None:
    tensor = Tensor("x", values)

    again = Tensor.from_raw("x", tensor.datatype, tensor.shape, tensor.to_raw())

    assert again.array.dtype == values.dtype
    np.testing.assert_array_equal(again.array, values)


@given(st.lists(st.binary()))
def test_bytes_elements_are_unchanged_after_raw_encoding(elements: list[bytes]) -> None:
    tensor = Tensor.from_values("x", "BYTES", [len(elements)], elements)

    assert Tensor.from_raw("x", "BYTES", [len(elements)], tensor.to_raw()).array.tolist() == elements


def test_raw_numbers_are_not_copied() -> None:
    raw = np.arange(6, dtype=np.float32).tobytes()

    assert not Tensor.from_raw("x", "FP32", [2, 3], raw).array.flags.owndata


def test_an_empty_shape_is_one_element() -> None:
    assert Tensor.from_values("x", "BYTES", [], [b"image"]).array.item() == b"image"
    assert Tensor.from_raw("x", "FP32", [], b"\0\0\x80?").array.item() == 1.0


@pytest.mark.parametrize(
    ("datatype", "shape", "rows"), [("BYTES", [], 1), ("BYTES", [2, 1], 2), ("FP32", [], 1), ("FP32", [2, 1], 2)]
)
def test_rows_are_the_elements_of_bytes_and_the_first_axis_of_numbers(
    datatype: str, shape: list[int], rows: int
) -> None:
    values = [b"a", b"b"] if datatype == "BYTES" else [1.0, 2.0]

    assert Tensor.from_values("x", datatype, shape, values[:rows]).num_rows == rows


@pytest.mark.parametrize(
    ("datatype", "shape", "values", "problem"),
    [
        ("FP31", [1], [1.0], "its datatype is not one of BOOL"),
        ("fp32", [1], [1.0], "its datatype is not one of BOOL"),
        ("FP32", [2], [1.0], "does not match the 1 values that were sent"),
        ("FP32", [-1], [1.0], "at most 16 dimensions, none of them negative"),
        ("FP32", [1] * 17, [1.0], "at most 16 dimensions, none of them negative"),
        ("FP32", [2**40, 2**40], [1.0], "does not match the 1 values that were sent"),
        ("FP32", [0, 2**63 - 1, 2**63 - 1], [], "out of range"),
        ("INT8", [1], [128], "a value lies outside INT8"),
        ("UINT16", [1], [65536], "a value lies outside UINT16"),
    ],
)
def test_values_that_do_not_match_datatype_or_shape_are_refused(
    datatype: str, shape: list[int], values: list[Any], problem: str
) -> None:
    with pytest.raises(InvalidInput, match=problem):
        Tensor.from_values("x", datatype, shape, values)


@pytest.mark.parametrize(
    ("datatype", "raw", "problem"),
    [
        ("FP32", b"\0" * 7, "7 bytes are not a whole number of FP32 values"),
        ("BYTES", b"\1\0", "truncated"),
        ("BYTES", b"\5\0\0\0abcd", "truncated"),
        ("BYTES", b"\xff\xff\xff\xffabcd", "truncated"),
    ],
)
def test_truncated_raw_bytes_are_refused(datatype: str, raw: bytes, problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem):
        Tensor.from_raw("x", datatype, [1], raw)


@pytest.mark.parametrize(
    ("lists", "datatype", "shape"),
    [
        ([1, 2], "INT64", (2,)),
        ([1.5, 2], "FP64", (2,)),
        ([True, False], "BOOL", (2,)),
        ([[1.0], [2.0], [3.0]], "FP64", (3, 1)),
        ([b"a", b"b"], "BYTES", (2,)),
        ([2**63], "UINT64", (1,)),
    ],
)
def test_json_lists_become_the_widest_datatype_of_their_kind(
    lists: list[Any], datatype: str, shape: tuple[int, ...]
) -> None:
    tensor = Tensor.from_lists("x", lists)

    assert (tensor.datatype, tensor.shape) == (datatype, shape)


@pytest.mark.parametrize(
    "lists", [[[1], [1, 2]], [1, "a"], [b"a", 1], [None], [{}], [["a"]], [2**64], [[[1]], [1]], [1, None]]
)
def test_lists_that_are_ragged_or_mixed_are_refused(lists: list[Any]) -> None:
    with pytest.raises(InvalidInput):
        Tensor.from_lists("x", lists)
