"""Requests that mean no good, one by one: each is refused as what it is, and costs no memory."""

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
from pinnace.grpc.service import PROBES
from pinnace.models.image import decode, image_bytes
from tests.hostile import COMPRESSED_BOMB, HOSTILE, MESSAGES, V1, V2, Hostile
from tests.pictures import CAT, MODES, v1_request
from tests.servers import Server, running
from tests.test_grpc_over_http import frame, raw_call

PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
MOST_MIB = 48  # the largest of them is 8 MiB, which is held as it came and as text

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
text = st.binary(max_size=300) | st.just(v1_request(CAT).encode())
picture = st.sampled_from(sorted(MODES)).map(MODES.__getitem__)


@pytest.fixture(scope="module")
def victim(model_dir: Path) -> Iterator[Server]:
    with running(f"--model_dir={model_dir}") as server:
        for _ in range(20):
            assert server.predict(v1_request(CAT)).status_code == 200
        yield server
        assert server.stop() == 0
        assert not [line for line in server.log if re.search("ERROR|Traceback", line)]


class Memory:
    """How much more the server has taken at its highest than before."""

    def __init__(self, server: Server) -> None:
        self._status = Path(f"/proc/{server.process.pid}/status")
        Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the highest is what it is now
        self._before = self._mib()

    @property
    def grown_mib(self) -> float:
        return self._mib() - self._before

    def _mib(self) -> float:
        found = re.search(r"VmHWM:\s+(\d+) kB", self._status.read_text())
        assert found
        return int(found[1]) / 1024


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_over_rest_it_is_a_4xx_in_flat_memory(hostile: Hostile, victim: Server) -> None:
    memory = Memory(victim)

    response = httpx.post(victim.url + hostile.path, content=hostile.body, headers=hostile.headers, timeout=30)

    assert response.status_code == hostile.status, response.text
    assert response.json().keys() == {"error"}
    assert memory.grown_mib < MOST_MIB


@pytest.mark.parametrize("port", ["gRPC port", "HTTP port"])
@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_over_grpc_it_is_an_invalid_argument_in_flat_memory(port: str, message: bytes, victim: Server) -> None:
    memory = Memory(victim)
    with grpc.insecure_channel(f"127.0.0.1:{victim.grpc_port if port == 'gRPC port' else victim.http_port}") as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer"
        )
        with pytest.raises(grpc.RpcError) as error:
            call(message, timeout=30)

    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert memory.grown_mib < MOST_MIB


@pytest.mark.parametrize("port", ["gRPC port", "HTTP port"])
@pytest.mark.parametrize("method", sorted(PROBES))
def test_a_probe_of_many_fields_is_not_read_to_its_end(method: str, port: str, victim: Server) -> None:
    """It is read on the event loop, and needs no key: 99,000 fields kept everybody waiting for 88 ms."""
    number = victim.grpc_port if port == "gRPC port" else victim.http_port
    with grpc.insecure_channel(f"127.0.0.1:{number}") as channel, pytest.raises(grpc.RpcError) as error:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
        call(b"\x78\x01" * 1000, timeout=30)

    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "more than 1,000 fields" in (error.value.details() or "")


@pytest.mark.parametrize("port", ["gRPC port", "HTTP port"])
def test_a_compressed_message_is_not_unpacked_beyond_the_limit(port: str, victim: Server) -> None:
    memory = Memory(victim)
    number = victim.grpc_port if port == "gRPC port" else victim.http_port

    trailers = raw_call(victim, frame(COMPRESSED_BOMB, compressed=True), port=number, grpc_encoding="gzip")

    assert trailers["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    assert memory.grown_mib < MOST_MIB


@PROPERTY
@given(body=v1_body | json_value)
def test_whatever_json_v1_is_sent_is_answered_or_refused(body: Any, victim: Server) -> None:
    assert victim.post(V1, json.dumps(body)).status_code in (200, 400, 413)


@PROPERTY
@given(body=v2_body | json_value)
def test_whatever_json_v2_is_sent_is_answered_or_refused(body: Any, victim: Server) -> None:
    assert victim.post(V2, json.dumps(body)).status_code in (200, 400, 413, 501)


@PROPERTY
@given(body=text, where=st.integers(0), octet=st.binary(max_size=3))
def test_damaged_text_is_answered_or_refused(body: bytes, where: int, octet: bytes, victim: Server) -> None:
    at = where % (len(body) + 1)

    assert victim.post(V1, body[:at] + octet + body[at + len(octet) :]).status_code in (200, 400, 413)


@PROPERTY
@given(data=picture, damage=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_picture_is_a_picture_or_refused(data: bytes, damage: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for where, octet in damage:
        damaged[where % min(len(data), 2000)] = octet

    with suppress(InvalidInput, TooLarge):
        assert isinstance(decode(bytes(damaged), 1_000_000), Image.Image)


@PROPERTY
@given(data=st.binary())
def test_arbitrary_bytes_are_no_picture_and_no_base64_that_raises_anything_else(data: bytes) -> None:
    assert isinstance(image_bytes(data), bytes)
    for read in (lambda: decode(data, 1_000_000), lambda: from_base64(data)):
        with suppress(InvalidInput, TooLarge):
            read()
