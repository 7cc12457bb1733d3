"""The gRPC port: grpc.aio, in the event loop of the HTTP port."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before the import: its C core would log beside us

import grpc
import grpc.aio

from serving.errors import InternalError, PortInUse, ServingError
from serving.settings import Settings
from serving.transports.grpc_service import SERVICE, InferenceService, Method

logger = logging.getLogger(__name__)

NEVER = float(10**6)  # seconds; the lifecycle has the deadline


class GrpcServer:
    """One listener; every method answers its errors with the status that their class declares."""

    def __init__(self, service: InferenceService, settings: Settings) -> None:
        self._settings = settings
        self._service = service
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
        handlers = {name: _handler(method) for name, method in self._service.methods.items()}
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
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


def _handler(method: Method) -> Any:
    async def answer(message: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            return await method(message, _headers(context))
        except ServingError as error:
            failure = error
        except Exception:
            logger.exception("a gRPC call failed")
            failure = InternalError()
        await context.abort(grpc.StatusCode[failure.grpc_status], str(failure))
        raise failure  # not reached: abort raises

    # No deserializer: grpc would answer what it raises with UNKNOWN and its text.
    return grpc.unary_unary_rpc_method_handler(answer)


def _headers(context: grpc.aio.ServicerContext[bytes, bytes]) -> dict[str, str]:
    """The call's metadata without binary entries."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
