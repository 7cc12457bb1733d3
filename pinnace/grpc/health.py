"""The standard health service: what Kubernetes' gRPC probes and load balancers ask."""

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
    """Knows the whole server, as "" or as the inference service, and each model by its name."""

    names = ("grpc.health.v1.Health",)

    def __init__(self, dataplane: DataPlane) -> None:
        self._dataplane = dataplane
        self.unary = {"Check": self._check}
        self.streams = {"Watch": self._watch}

    async def _check(self, message: bytes, _: Metadata) -> bytes:
        return bytes(HealthCheckResponse(status=self._status(parse(HealthCheckRequest, message).service)))

    async def _watch(self, messages: AsyncIterator[bytes], _: Metadata) -> AsyncIterator[bytes]:
        """Ends when the server stops: a stream that stayed open would keep it from stopping."""
        service = parse(HealthCheckRequest, await anext(messages, b"")).service
        told = None
        while True:
            changed = self._dataplane.repository.changed  # of now: what changes while the status is told is not missed
            try:
                status = self._status(service)
            except ModelNotFound:
                status = Status.SERVICE_UNKNOWN
            if status != told:
                yield bytes(HealthCheckResponse(status=status))
                told = status
            if self._dataplane.repository.draining:
                return
            await changed.wait()

    def _status(self, service: str) -> Status:
        """Raises ModelNotFound."""
        repository = self._dataplane.repository
        ready = repository.ready if service in ("", SERVICE) else repository.is_ready(service)
        return Status.SERVING if ready else Status.NOT_SERVING
