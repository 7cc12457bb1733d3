"""pinnace/proto/wire.py against google.protobuf: both decode and refuse the same messages."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pinnace.proto.generated import inference as pb
from pinnace.proto.wire import DecodeError, decode, first_text
from proto.generate import generate
from tests.support.servers import PROJECT

PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)

int32 = st.integers(-(2**31), 2**31 - 1)
int64 = st.integers(-(2**63), 2**63 - 1)
uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
fp32 = st.floats(width=32, allow_nan=False)

contents = st.fixed_dictionaries(
    {},
    optional={
        "bool_contents": st.lists(st.booleans()),
        "int_contents": st.lists(int32),
        "int64_contents": st.lists(int64),
        "uint_contents": st.lists(uint32),
        "uint64_contents": st.lists(uint64),
        "fp32_contents": st.lists(fp32),
        "fp64_contents": st.lists(st.floats(allow_nan=False)),
        "bytes_contents": st.lists(st.binary()),
    },
)
parameter: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries({"bool_param": st.booleans()}),
    st.fixed_dictionaries({"int64_param": int64}),
    st.fixed_dictionaries({"string_param": st.text()}),
    st.just({}),
)
tensor = st.fixed_dictionaries(
    {
        "name": st.text(),
        "datatype": st.text(),
        "shape": st.lists(int64),
        "parameters": st.dictionaries(st.text(), parameter),
    },
    optional={"contents": contents},
)
infer_request = st.fixed_dictionaries(
    {
        "model_name": st.text(),
        "id": st.text(),
        "parameters": st.dictionaries(st.text(), parameter),
        "inputs": st.lists(tensor, max_size=3),
        "raw_input_contents": st.lists(st.binary(), max_size=3),
    }
)


def make_google_request(google: ModuleType, values: dict[str, Any]) -> Any:
    request = google.ModelInferRequest(model_name=values["model_name"], id=values["id"])
    request.raw_input_contents.extend(values["raw_input_contents"])
    fill_parameters(google, request.parameters, values["parameters"])
    for given_tensor in values["inputs"]:
        target = request.inputs.add(
            name=given_tensor["name"], datatype=given_tensor["datatype"], shape=given_tensor["shape"]
        )
        fill_parameters(google, target.parameters, given_tensor["parameters"])
        if "contents" in given_tensor:
            target.contents.SetInParent()
            for field, numbers in given_tensor["contents"].items():
                getattr(target.contents, field).extend(numbers)
    return request


def fill_parameters(google: ModuleType, target: Any, parameters: dict[str, Any]) -> None:
    for name, choice in parameters.items():
        target[name].CopyFrom(google.InferParameter(**choice))


def to_values(message: Any) -> Any:
    """Return a message of either library as comparable values."""
    if hasattr(message, "DESCRIPTOR"):
        return {
            field.name: google_to_values(field, message)
            for field in message.DESCRIPTOR.fields
            if not field.has_presence or message.HasField(field.name)
        }
    fields = {name: ours_to_values(getattr(message, name)) for name in message._betterproto.meta_by_field_name}
    return {name: value for name, value in fields.items() if value is not None}


def google_to_values(field: Any, message: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type and field.message_type.GetOptions().map_entry:
        return {key: to_values(value[key]) for key in value}
    if field.is_repeated:
        return [to_values(item) if field.message_type else item for item in value]
    return to_values(value) if field.message_type else value


def ours_to_values(value: Any) -> Any:
    if isinstance(value, memoryview):
        return value.tolist()
    if isinstance(value, dict):
        return {key: to_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [ours_to_values(item) for item in value]
    return to_values(value) if hasattr(value, "_betterproto") else value


@PROPERTY
@given(values=infer_request)
def test_every_message_that_google_encodes_is_decoded_as_google_decodes_it(
    google: ModuleType, values: dict[str, Any]
) -> None:
    data = make_google_request(google, values).SerializeToString()

    assert to_values(decode(pb.ModelInferRequest, data)) == to_values(google.ModelInferRequest.FromString(data))


@PROPERTY
@given(values=infer_request, data=st.data())
def test_a_truncated_message_is_decoded_as_google_decodes_it(
    google: ModuleType, values: dict[str, Any], data: st.DataObject
) -> None:
    whole = make_google_request(google, values).SerializeToString()
    cut = whole[: data.draw(st.integers(0, len(whole)))]

    assert decode_or_error(cut) == google_decode_or_error(google, cut)


@PROPERTY
@given(values=infer_request, damage=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_message_is_decoded_as_google_decodes_it_or_refused(
    google: ModuleType, values: dict[str, Any], damage: list[tuple[int, int]]
) -> None:
    data = bytearray(make_google_request(google, values).SerializeToString()) or bytearray(1)
    for where, replacement in damage:
        data[where % len(data)] = replacement

    ours, googles = decode_or_error(bytes(data)), google_decode_or_error(google, bytes(data))
    if ours != "error":  # google skips groups, which we refuse
        np.testing.assert_equal(drop_maps(ours), drop_maps(googles))  # NaN included


def drop_maps(value: Any) -> Any:
    """Return `value` without its maps.

    upb, which google's Python uses, drops map entries with unknown fields; google's C++ and Java do not.
    """
    if isinstance(value, dict):
        return {key: drop_maps(item) for key, item in value.items() if key != "parameters"}
    return [drop_maps(item) for item in value] if isinstance(value, list) else value


@PROPERTY
@given(values=infer_request)
def test_first_text_finds_a_field_without_decoding_the_rest(google: ModuleType, values: dict[str, Any]) -> None:
    data = make_google_request(google, values).SerializeToString()

    assert first_text(data, 1) == values["model_name"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x0a\x05abc", "truncated field"),
        (b"\x0a\x01\xff", "not UTF-8"),
        (b"\x10\x01" * 1000 + b"\x0a\x01a", "field 1 is not among the first 1,000"),
    ],
)
def test_first_text_refuses_a_message_without_a_readable_field(data: bytes, problem: str) -> None:
    with pytest.raises(DecodeError, match=problem):
        first_text(data, 1)


def decode_or_error(data: bytes) -> Any:
    try:
        return to_values(decode(pb.ModelInferRequest, data))
    except DecodeError:
        return "error"


def google_decode_or_error(google: ModuleType, data: bytes) -> Any:
    from google.protobuf.message import DecodeError as GoogleDecodeError

    try:
        return to_values(google.ModelInferRequest.FromString(data))
    except GoogleDecodeError:
        return "error"


@PROPERTY
@given(data=st.binary(max_size=200))
def test_decoding_arbitrary_bytes_raises_only_decode_errors(data: bytes) -> None:
    decode_or_error(data)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x0a\x05abc", "truncated field"),
        (b"\x0a", "truncated varint"),
        (b"\x0a" + b"\xff" * 11, "varint too long"),
        (b"\x02\x00", "field number out of range"),
        (b"\x88\x80\x80\x80\x80\x00\x00", "field number out of range"),
        (b"\x0f", "wire type 7"),
        (b"\x0b\x0c", "wire type 3"),
        (b"\x0a\x01\xff", "a string that is not UTF-8"),
        (b"\x2a\x04\x2a\x02\x32\x03", "truncated field"),
        (b"\x2a\x07\x2a\x05\x32\x03abc", "packed numbers whose length is not a multiple of their size"),
        (b"\x2a\x03\x1a\x01\x80", "truncated varint"),
    ],
)
def test_a_damaged_message_is_refused_with_the_reason(data: bytes, problem: str) -> None:
    with pytest.raises(DecodeError, match=f"^{problem}$"):
        decode(pb.ModelInferRequest, data)


def test_a_number_in_a_string_field_is_an_unknown_field() -> None:
    assert decode(pb.ModelInferRequest, b"\x08\x05").model_name == ""


def test_unpacked_numbers_and_several_packed_runs_are_concatenated() -> None:
    message = decode(pb.InferTensorContents, b"\x10\x01\x12\x02\x02\x03\x10\x04")

    assert message.int_contents.tolist() == [1, 2, 3, 4]  # type: ignore[attr-defined]


def test_the_last_member_of_a_oneof_on_the_wire_wins() -> None:
    parameter = decode(pb.InferParameter, b"\x08\x01\x1a\x01a")

    assert (parameter.bool_param, parameter.string_param) == (None, "a")


def test_packed_floats_are_not_copied() -> None:
    data = bytes(pb.InferTensorContents(fp32_contents=[1.5, 2.5]))

    floats: Any = decode(pb.InferTensorContents, data).fp32_contents

    assert np.shares_memory(np.asarray(floats), np.frombuffer(data, np.uint8))
    assert floats.tolist() == [1.5, 2.5]


def test_decoded_messages_support_equality_and_truth() -> None:
    data = bytes(pb.InferTensorContents(fp32_contents=[1.5], int_contents=[7]))

    assert decode(pb.InferTensorContents, data)
    assert decode(pb.InferTensorContents, data) == decode(pb.InferTensorContents, data)


def test_generating_the_messages_again_changes_nothing(tmp_path: Path) -> None:
    generate(tmp_path)

    def read_generated(folder: Path) -> dict[Path, str]:
        return {file.relative_to(folder): file.read_text() for file in folder.rglob("*.py")}

    assert read_generated(tmp_path) == read_generated(PROJECT / "pinnace/proto/generated")
