"""Listening sockets: bound here, or handed down from a supervisor to its workers."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pinnace.errors import PortInUse

VARIABLE = "PINNACE_INHERITED_SOCKETS"
READY, STOP, FORCE_EXIT = b"R", b"S", b"A"  # what is said on the line: the first by the worker, the others to it
ANYWHERE = ("::", "0.0.0.0")  # noqa: S104 as --host="" says


@dataclass(frozen=True, slots=True)
class WorkerSockets:
    """What a worker has from its supervisor: a line to it, closed when it is gone, and the sockets of the HTTP port."""

    supervisor: socket.socket
    http: Sequence[socket.socket]


def raise_fd_limit() -> None:
    """As many connections and files as the system lets this process have; a shell's default is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def worker_sockets(environment: Mapping[str, str]) -> WorkerSockets | None:
    """None in a process that no supervisor has started."""
    if VARIABLE not in environment:
        return None
    line, *http = (socket.socket(fileno=int(number)) for number in environment[VARIABLE].split(","))
    return WorkerSockets(line, http)


def bind_http(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of `host`; for none, one for IPv4 and one for IPv6, so far as the machine has them.

    Bound, they keep the port; nobody is connected before they listen. Raises PortInUse.
    """
    sockets: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in sorted(addresses):  # IPv4 first: the port that 0 becomes is then IPv6's, too
            taken = port or (sockets[0].getsockname()[1] if sockets else 0)
            try:
                sockets.append(_bound(family, (address[0], taken, *address[2:])))
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
    """Keeps a port that workers share, each with a socket of its own; never listens itself. Raises PortInUse."""
    for address in [host] if host else ANYWHERE:
        try:
            family, _, _, _, found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            alone = _bound(family, found, dual=True)  # where somebody shares the port already, this fails
            taken = alone.getsockname()
            alone.close()
            return _bound(family, taken, dual=True, shared=True)
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                break
    raise PortInUse(f"gRPC cannot listen on port {port}: choose another with --grpc_port")


def _bound(family: int, address: tuple[Any, ...], dual: bool = False, shared: bool = False) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
