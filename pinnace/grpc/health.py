"""The standard gRPC health service, for Kubernetes' gRPC probes and load balancers.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from pinnace.errors import ModelNotFound
from pinnace.grpc.inference import SERVICE
from pinnace.grpc.service import Metadata, Service, parse
from pinnace.inference.dataplane import DataPlane
from pinnace.proto.generated.grpc.health.v1 import (
    HealthCheckRequest,
    HealthCheckResponse,
    HealthCheckResponseServingStatus,
)

Status = HealthCheckResponseServingStatus


class HealthService(Service):
    """Reports the whole server, under "" or the name of the inference service, and each model under its own name."""

    names = ("grpc.health.v1.Health",)

    def __init__(self, dataplane: DataPlane) -> None:
        self._dataplane = dataplane
        self.unary = {"Check": self._check}
        self.streams = {"Watch": self._watch}

    async def _check(self, message: bytes, _: Metadata) -> bytes:
        return bytes(HealthCheckResponse(status=self._status(parse(HealthCheckRequest, message).service)))

    async def _watch(self, messages: AsyncIterator[bytes], _: Metadata) -> AsyncIterator[bytes]:
        """Yield each change of the status, and end when the server drains: an open stream would hold up its stop."""
        service = parse(HealthCheckRequest, await anext(messages, b"")).service
        last_status = None
        while True:
            changed = self._dataplane.repository.changed  # taken first, so that no change is missed
            try:
                status = self._status(service)
            except ModelNotFound:
                status = Status.SERVICE_UNKNOWN
            if status != last_status:
                yield bytes(HealthCheckResponse(status=status))
                last_status = status
            if self._dataplane.repository.is_draining:
                return
            await changed.wait()

    def _status(self, service: str) -> Status:
        """Return the status of the server or a model. Raises ModelNotFound."""
        repository = self._dataplane.repository
        ready = repository.is_ready(None if service in ("", SERVICE) else service)
        return Status.SERVING if ready else Status.NOT_SERVING
