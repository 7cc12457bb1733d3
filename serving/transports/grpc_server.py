"""The gRPC port: grpc.aio, in the event loop of the HTTP port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio

from serving.errors import PortInUse
from serving.settings import Settings
from serving.transports.grpc_messages import Service, Stream, Unary, status_of

Context = grpc.aio.ServicerContext[Any, Any]

NEVER = float(10**6)  # seconds; the lifecycle has the deadline


class GrpcServer:
    """One listener; every method answers its errors with the status that their class declares."""

    def __init__(self, services: Sequence[Service], settings: Settings) -> None:
        self._settings = settings
        self._services = services
        self.port = settings.grpc_port

    async def start(self) -> None:
        """Listen and answer. Raises PortInUse."""
        settings = self._settings
        options = [
            ("grpc.max_receive_message_length", settings.grpc_max_receive_message_length),
            ("grpc.max_send_message_length", settings.grpc_max_send_message_length),
            ("grpc.so_reuseport", 0),  # else a second server shares the port, unnoticed
        ]
        self._server = grpc.aio.server(options=options)
        for service in self._services:
            handlers = {name: _unary(method) for name, method in service.unary.items()}
            handlers |= {name: _stream(method) for name, method in service.streams.items()}
            generic = [grpc.method_handlers_generic_handler(name, handlers) for name in service.names]
            self._server.add_generic_rpc_handlers(generic)
        host = settings.host or "::"
        address = f"[{host}]:{settings.grpc_port}" if ":" in host else f"{host}:{settings.grpc_port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            raise PortInUse(
                f"gRPC cannot listen on port {settings.grpc_port}: choose another with --grpc_port"
            ) from None
        await self._server.start()

    async def serve(self, stop: asyncio.Event) -> None:
        """Answers until `stop`, then refuses new calls and answers what is in flight, however long it takes."""
        await stop.wait()
        await self._server.stop(NEVER)


def _unary(method: Unary) -> Any:
    async def answer(message: bytes, context: Context) -> bytes:
        try:
            return await method(message, _metadata(context))
        except Exception as error:
            failure = error
        return await context.abort(*status_of(failure))

    # No deserializer: grpc would answer what it raises with UNKNOWN and its text.
    return grpc.unary_unary_rpc_method_handler(answer)


def _stream(method: Stream) -> Any:
    """Also for methods of one request: on the wire they are streams as well."""

    async def answer(messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        try:
            async for message in method(messages, _metadata(context)):
                yield message
        except Exception as error:
            await context.abort(*status_of(error))

    return grpc.stream_stream_rpc_method_handler(answer)


def _metadata(context: Context) -> dict[str, str]:
    """The call's metadata without binary entries."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
