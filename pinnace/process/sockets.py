"""Listening sockets, bound by this process or inherited from the supervisor."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pinnace.errors import PortInUse

SOCKETS_ENV = "PINNACE_INHERITED_SOCKETS"
# Messages on a control socket, of one byte each: READY comes from the worker, once it is ready and as the answer to
# each PING; the others come from the supervisor.
READY, PING, STOP, FORCE_EXIT = b"R", b"P", b"S", b"A"
ALL_INTERFACES = ("::", "0.0.0.0")  # noqa: S104 what an empty --host means


@dataclass(frozen=True, slots=True)
class WorkerSockets:
    """The sockets that a worker inherits: its control socket, closed if the supervisor ends, and the HTTP sockets."""

    control_socket: socket.socket
    http: Sequence[socket.socket]


def worker_sockets(environment: Mapping[str, str]) -> WorkerSockets | None:
    """Return the sockets inherited from the supervisor; None in a process that no supervisor started."""
    if SOCKETS_ENV not in environment:
        return None
    control_socket, *http = (socket.socket(fileno=int(number)) for number in environment[SOCKETS_ENV].split(","))
    return WorkerSockets(control_socket, http)


def bind_http(host: str, port: int) -> list[socket.socket]:
    """Bind a socket to each address of `host`; an empty host means all IPv4 and IPv6 interfaces of the machine.

    The bound sockets reserve the port; connections are refused until they listen. Raises PortInUse.
    """
    sockets: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in sorted(addresses):  # IPv4 first; for port 0, IPv6 takes IPv4's port
            chosen_port = port or (sockets[0].getsockname()[1] if sockets else 0)
            try:
                sockets.append(_bind(family, (address[0], chosen_port, *address[2:])))
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except OSError as error:
        for listener in sockets:
            listener.close()
        where = f"port {port}" + (f" of {host}" if host else "")
        raise PortInUse(f"HTTP cannot listen on {where} ({error.strerror}): choose another with --http_port") from None
    return sockets


def reserve_grpc(host: str, port: int) -> socket.socket:
    """Reserve a port for the workers, which each bind a socket of their own to it; never listen on it.

    Raises PortInUse.
    """
    for address in [host] if host else ALL_INTERFACES:
        try:
            family, _, _, _, resolved = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            exclusive = _bind(family, resolved, dual_stack=True)  # fails if another process already shares the port
            bound = exclusive.getsockname()
            exclusive.close()
            return _bind(family, bound, dual_stack=True, shared=True)
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                break
    raise PortInUse(f"gRPC cannot listen on port {port}: choose another with --grpc_port")


def _bind(family: int, address: tuple[Any, ...], dual_stack: bool = False, shared: bool = False) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual_stack)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
