"""The standard gRPC reflection service, v1 and v1alpha: with it tools such as grpcurl need no .proto files.

https://github.com/grpc/grpc/blob/master/doc/server-reflection.md
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from pinnace.grpc.service import Metadata, Service, parse
from pinnace.proto.generated.descriptors import FILES, SERVICES, SYMBOLS
from pinnace.proto.generated.grpc.reflection.v1 import (
    ErrorResponse,
    FileDescriptorResponse,
    ListServiceResponse,
    ServerReflectionRequest,
    ServerReflectionResponse,
    ServiceResponse,
)

NOT_FOUND = 5
UNIMPLEMENTED = 12


class ReflectionService(Service):
    """Describes the services in proto/, as they were when pinnace/proto/generated was made."""

    names = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")

    def __init__(self) -> None:
        self.unary = {}
        self.streams = {"ServerReflectionInfo": self._info}

    async def _info(self, messages: AsyncIterator[bytes], _: Metadata) -> AsyncIterator[bytes]:
        async for message in messages:
            request = parse(ServerReflectionRequest, message)
            response = _describe(request)
            response.valid_host, response.original_request = request.host, request
            yield bytes(response)


def _describe(request: ServerReflectionRequest) -> ServerReflectionResponse:
    if request.list_services is not None:
        services = [ServiceResponse(name=name) for name in SERVICES]
        return ServerReflectionResponse(list_services_response=ListServiceResponse(service=services))
    file = request.file_by_filename or SYMBOLS.get(request.file_containing_symbol or "", "")
    if file in FILES:
        descriptor = FileDescriptorResponse(file_descriptor_proto=[FILES[file]])
        return ServerReflectionResponse(file_descriptor_response=descriptor)
    if request.file_containing_extension is not None or request.all_extension_numbers_of_type is not None:
        return _error(UNIMPLEMENTED, "proto3 has no extensions")
    return _error(NOT_FOUND, "no such file or symbol")


def _error(code: int, text: str) -> ServerReflectionResponse:
    return ServerReflectionResponse(error_response=ErrorResponse(error_code=code, error_message=text))
