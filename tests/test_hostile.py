"""Hostile requests, one by one: each gets its own error, and costs no memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pinnace.base64_text import from_base64
from pinnace.errors import InvalidInput, TooLarge
from pinnace.grpc.service import PUBLIC_METHODS
from pinnace.models.image import decode, image_bytes
from tests.support.clients import PREDICT, frame_message, make_v1_request, send_raw_call
from tests.support.hostile import COMPRESSED_BOMB, HOSTILE_MESSAGES, HOSTILE_REQUESTS, V2_INFER, HostileRequest
from tests.support.pictures import CAT, MODES
from tests.support.servers import Server, run_server

PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
MAX_MIB = 48  # the largest request has 8 MiB, and is held as bytes and as text

json_value: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
instance = json_value | st.fixed_dictionaries({"image": json_value}) | st.fixed_dictionaries({"b64": json_value})
v1_body = st.fixed_dictionaries({"instances": st.lists(instance, max_size=4) | json_value})
v2_tensor = st.fixed_dictionaries(
    {"name": json_value, "datatype": st.sampled_from(["BYTES", "FP32", "INT64", "UINT64", "BOOL", "FP16", ""])},
    optional={"shape": st.lists(st.integers()) | json_value, "data": json_value, "parameters": json_value},
)
v2_body = st.fixed_dictionaries(
    {"inputs": st.lists(v2_tensor, max_size=3) | json_value}, optional={"outputs": json_value, "id": json_value}
)
text = st.binary(max_size=300) | st.just(make_v1_request(CAT).encode())
picture = st.sampled_from(sorted(MODES)).map(MODES.__getitem__)


@pytest.fixture(scope="module")
def victim(model_dir: Path) -> Iterator[Server]:
    with run_server(f"--model_dir={model_dir}") as server:
        for _ in range(20):
            assert server.predict(make_v1_request(CAT)).status_code == 200
        yield server
        assert server.stop() == 0
        assert not [line for line in server.log if re.search("ERROR|Traceback", line)]


class PeakMemory:
    """The growth of the server's peak memory since this object was made."""

    def __init__(self, server: Server) -> None:
        self._status = Path(f"/proc/{server.process.pid}/status")
        Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # resets the peak to the current value
        self._before = self._mib()

    @property
    def growth_mib(self) -> float:
        return self._mib() - self._before

    def _mib(self) -> float:
        found = re.search(r"VmHWM:\s+(\d+) kB", self._status.read_text())
        assert found
        return int(found[1]) / 1024


@pytest.mark.parametrize("hostile", HOSTILE_REQUESTS.values(), ids=HOSTILE_REQUESTS)
def test_a_hostile_rest_request_gets_its_4xx_status_and_costs_no_memory(
    hostile: HostileRequest, victim: Server
) -> None:
    memory = PeakMemory(victim)

    response = httpx.post(victim.url + hostile.path, content=hostile.body, headers=hostile.headers, timeout=30)

    assert response.status_code == hostile.status, response.text
    assert response.json().keys() == {"error"}
    assert memory.growth_mib < MAX_MIB


@pytest.mark.parametrize("port", ["gRPC port", "HTTP port"])
@pytest.mark.parametrize("message", HOSTILE_MESSAGES.values(), ids=HOSTILE_MESSAGES)
def test_a_hostile_grpc_message_gets_invalid_argument_and_costs_no_memory(
    port: str, message: bytes, victim: Server
) -> None:
    memory = PeakMemory(victim)
    with grpc.insecure_channel(f"127.0.0.1:{victim.grpc_port if port == 'gRPC port' else victim.http_port}") as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer"
        )
        with pytest.raises(grpc.RpcError) as error:
            call(message, timeout=30)

    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert memory.growth_mib < MAX_MIB


@pytest.mark.parametrize("port", ["gRPC port", "HTTP port"])
@pytest.mark.parametrize("method", sorted(PUBLIC_METHODS))
def test_a_probe_with_many_fields_is_refused_early(method: str, port: str, victim: Server) -> None:
    """A probe is decoded on the event loop and needs no key: 99,000 fields blocked the loop for 88 ms."""
    number = victim.grpc_port if port == "gRPC port" else victim.http_port
    with grpc.insecure_channel(f"127.0.0.1:{number}") as channel, pytest.raises(grpc.RpcError) as error:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
        call(b"\x78\x01" * 1000, timeout=30)

    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "more than 1,000 fields" in (error.value.details() or "")


@pytest.mark.parametrize("port", ["gRPC port", "HTTP port"])
def test_a_compressed_message_is_not_decompressed_beyond_the_limit(port: str, victim: Server) -> None:
    memory = PeakMemory(victim)
    number = victim.grpc_port if port == "gRPC port" else victim.http_port

    trailers = send_raw_call(victim, frame_message(COMPRESSED_BOMB, compressed=True), port=number, grpc_encoding="gzip")

    assert trailers["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    assert memory.growth_mib < MAX_MIB


@PROPERTY
@given(body=v1_body | json_value)
def test_any_json_sent_to_v1_is_answered_or_refused(body: Any, victim: Server) -> None:
    assert victim.post(PREDICT, json.dumps(body)).status_code in (200, 400, 413)


@PROPERTY
@given(body=v2_body | json_value)
def test_any_json_sent_to_v2_is_answered_or_refused(body: Any, victim: Server) -> None:
    assert victim.post(V2_INFER, json.dumps(body)).status_code in (200, 400, 413, 501)


@PROPERTY
@given(body=text, where=st.integers(0), replacement=st.binary(max_size=3))
def test_damaged_text_is_answered_or_refused(body: bytes, where: int, replacement: bytes, victim: Server) -> None:
    at = where % (len(body) + 1)

    assert victim.post(PREDICT, body[:at] + replacement + body[at + len(replacement) :]).status_code in (200, 400, 413)


@PROPERTY
@given(data=picture, damage=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_picture_is_decoded_or_refused(data: bytes, damage: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for where, replacement in damage:
        damaged[where % min(len(data), 2000)] = replacement

    with suppress(InvalidInput, TooLarge):
        assert isinstance(decode(bytes(damaged), 1_000_000), Image.Image)


@PROPERTY
@given(data=st.binary())
def test_decoding_arbitrary_bytes_raises_no_other_error(data: bytes) -> None:
    assert isinstance(image_bytes(data), bytes)
    for read in (lambda: decode(data, 1_000_000), lambda: from_base64(data)):
        with suppress(InvalidInput, TooLarge):
            read()
