"""pinnace/grpc/health.py and reflection.py, called with google.protobuf's messages."""

from __future__ import annotations

import importlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import h2.events
import pytest
from google.protobuf.descriptor_pool import DescriptorPool

from pinnace.proto.generated.descriptors import SERVICES
from tests.support.clients import predict_over_rest
from tests.support.raw_grpc import RawConnection
from tests.support.servers import Server, run_gated_server, run_server
from tests.support.waiting import wait_for

ECHO = "--predictor=tests.support.predictors:Echo"
WATCH = "/grpc.health.v1.Health/Watch"
INFERENCE = "inference.GRPCInferenceService"
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


@pytest.fixture(scope="module")
def health(google: ModuleType) -> ModuleType:
    return import_generated(google, "health_pb2")


@pytest.fixture(scope="module")
def reflection(google: ModuleType) -> ModuleType:
    return import_generated(google, "reflection_pb2")


def import_generated(google: ModuleType, name: str) -> ModuleType:
    """Import another module that google's protoc has generated beside `google`."""
    assert google.__file__
    sys.path.insert(0, str(Path(google.__file__).parent))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def reflecting() -> Iterator[Server]:
    with run_server(ECHO, "--enable_grpc_reflection=true") as server:
        yield server


PORTS = ["grpc_port", "http_port"]


def open_channel(server: Server, port: str) -> grpc.Channel:
    """Open a channel to one of the two ports, which both answer every service."""
    return grpc.insecure_channel(f"127.0.0.1:{getattr(server, port)}")


def check_health(server: Server, health: ModuleType, service: str, port: str = "grpc_port") -> int:
    with open_channel(server, port) as channel:
        call: grpc.UnaryUnaryMultiCallable[Any, Any] = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=health.HealthCheckResponse.FromString,
        )
        status: int = call(health.HealthCheckRequest(service=service), timeout=10).status
        return status


def watch_health(channel: grpc.Channel, health: ModuleType, service: str) -> Iterator[int]:
    call: grpc.UnaryStreamMultiCallable[Any, Any] = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=health.HealthCheckResponse.FromString,
    )
    for response in call(health.HealthCheckRequest(service=service), timeout=60):
        yield response.status


def send_reflection_requests(
    server: Server, reflection: ModuleType, version: str, *requests: Any, port: str = "grpc_port"
) -> list[Any]:
    with open_channel(server, port) as channel:
        call: grpc.StreamStreamMultiCallable[Any, Any] = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reflection.ServerReflectionResponse.FromString,
        )
        return list(call(iter(requests), timeout=10))


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("service", ["", INFERENCE, "custom-model"])
def test_a_ready_server_is_serving(service: str, port: str, server: Server, health: ModuleType) -> None:
    assert check_health(server, health, service, port) == SERVING


def test_the_health_of_an_unknown_service_is_not_found(server: Server, health: ModuleType) -> None:
    with pytest.raises(grpc.RpcError) as error:
        check_health(server, health, "nope")

    assert error.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize(
    ("service", "before", "after"),
    [("", SERVING, [NOT_SERVING]), ("custom-model", SERVING, [NOT_SERVING]), ("nope", SERVICE_UNKNOWN, [])],
)
def test_a_watcher_gets_not_serving_before_the_last_answer_of_a_stop(
    service: str,
    before: int,
    after: list[int],
    port: str,
    health: ModuleType,
    tmp_path: Path,
    make_gate: Callable[[str], Path],
) -> None:
    held = make_gate("held")
    with (
        run_gated_server(tmp_path) as server,
        ThreadPoolExecutor() as clients,
        open_channel(server, port) as channel,
    ):
        statuses = watch_health(channel, health, service)
        assert next(statuses) == before
        answer = clients.submit(predict_over_rest, server, "held")
        with held.open("wb"):
            server.process.send_signal(signal.SIGTERM)
            assert list(statuses) == after
        assert answer.result().status_code == 200
        assert server.wait() == 0


@pytest.mark.parametrize("port", PORTS)
def test_a_client_has_at_most_100_watchers_and_they_do_not_hold_up_a_stop(port: str) -> None:
    with run_server(ECHO) as server, ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(RawConnection(getattr(server, port)))
            for _ in range(25):
                connection.wait_for(h2.events.DataReceived, connection.call(WATCH, b""))
        refused = connection.call(WATCH, b"")
        assert connection.wait_for_status(refused) is grpc.StatusCode.RESOURCE_EXHAUSTED

        connection.h2.reset_stream(49)  # one of the 25
        connection.flush()
        wait_for(lambda: watches(connection), "a free place")
        assert server.stop() == 0


def watches(connection: RawConnection) -> bool:
    """Return whether a further watcher is admitted."""
    stream = connection.call(WATCH, b"")
    headers: Any = connection.wait_for(h2.events.ResponseReceived, stream).headers
    is_refused = "grpc-status" in dict(headers)  # the gRPC port refuses in the headers
    return not is_refused and isinstance(connection.wait_for(h2.events.Event, stream), h2.events.DataReceived)


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("service", ["", "custom-model"])
def test_a_watcher_gets_the_status_after_an_unload_and_after_a_load(
    service: str, port: str, health: ModuleType
) -> None:
    with run_server(ECHO, "--enable_model_repository=true") as server, open_channel(server, port) as channel:
        statuses = watch_health(channel, health, service)
        assert next(statuses) == SERVING
        server.post("/v2/repository/models/custom-model/unload", "")
        assert next(statuses) == NOT_SERVING
        server.post("/v2/repository/models/custom-model/load", "")
        assert next(statuses) == SERVING


def test_without_the_flag_there_is_no_reflection(server: Server, reflection: ModuleType) -> None:
    with pytest.raises(grpc.RpcError) as error:
        send_reflection_requests(server, reflection, "v1", reflection.ServerReflectionRequest(list_services=""))

    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_every_service(version: str, port: str, reflecting: Server, reflection: ModuleType) -> None:
    request = reflection.ServerReflectionRequest(list_services="*", host="here")

    (response,) = send_reflection_requests(reflecting, reflection, version, request, port=port)

    assert [service.name for service in response.list_services_response.service] == SERVICES
    assert INFERENCE in SERVICES
    assert (response.valid_host, response.original_request) == ("here", request)


@pytest.mark.parametrize("port", PORTS)
def test_a_long_stream_holds_only_one_message_in_memory(port: str, reflection: ModuleType) -> None:
    request = reflection.ServerReflectionRequest(list_services="*", host="h" * 100_000)
    with run_server(ECHO, "--enable_grpc_reflection=true", "--max_queue_bytes=500000") as server:
        assert len(send_reflection_requests(server, reflection, "v1", *[request] * 20, port=port)) == 20


@pytest.mark.parametrize(
    ("symbol", "file"),
    [
        (INFERENCE, "grpc_predict_v2.proto"),
        (f"{INFERENCE}.ModelInfer", "grpc_predict_v2.proto"),
        ("inference.ModelInferRequest.InferInputTensor", "grpc_predict_v2.proto"),
        ("grpc.health.v1.HealthCheckResponse.ServingStatus", "health.proto"),
        ("grpc.reflection.v1.ServerReflection", "reflection.proto"),
    ],
)
def test_reflection_returns_the_file_of_every_symbol(
    symbol: str, file: str, reflecting: Server, reflection: ModuleType, google: ModuleType
) -> None:
    by_symbol, by_name = send_reflection_requests(
        reflecting,
        reflection,
        "v1",
        reflection.ServerReflectionRequest(file_containing_symbol=symbol),
        reflection.ServerReflectionRequest(file_by_filename=file),
    )

    (descriptor,) = by_symbol.file_descriptor_response.file_descriptor_proto
    assert list(by_name.file_descriptor_response.file_descriptor_proto) == [descriptor]
    pool = DescriptorPool()
    pool.AddSerializedFile(descriptor)
    expected = import_generated(google, file.replace(".proto", "_pb2")).DESCRIPTOR
    assert describe(pool.FindFileByName(file)) == describe(expected)


def describe(file: Any) -> dict[str, list[tuple[Any, ...]]]:
    """Return the fields of the messages and the methods of the services of a file descriptor."""
    messages = {
        message.full_name: [(field.name, field.number, field.type) for field in message.fields]
        for message in file.message_types_by_name.values()
    }
    services = {
        service.full_name: [(method.name, method.input_type.full_name) for method in service.methods]
        for service in file.services_by_name.values()
    }
    return {**messages, **services}


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("file_containing_symbol", "no.Such", 5),
        ("file_by_filename", "no.proto", 5),
        ("all_extension_numbers_of_type", "inference.ModelInferRequest", 12),
    ],
)
def test_reflection_answers_an_unknown_name_with_an_error_code(
    field: str, value: str, code: int, reflecting: Server, reflection: ModuleType
) -> None:
    (response,) = send_reflection_requests(
        reflecting, reflection, "v1", reflection.ServerReflectionRequest(**{field: value})
    )

    assert response.error_response.error_code == code


def test_neither_service_imports_google_protobuf(health: ModuleType, reflection: ModuleType) -> None:
    with run_server(ECHO, "--enable_grpc_reflection=true", python_flags=["-X", "importtime"]) as server:
        check_health(server, health, "")
        send_reflection_requests(server, reflection, "v1", reflection.ServerReflectionRequest(list_services=""))
        assert server.stop() == 0

    assert not [line for line in server.log if re.search(r"\| +google", line)]
