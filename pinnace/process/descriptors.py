"""The limit on open files and sockets (RLIMIT_NOFILE), and how many connections it leaves room for."""

from __future__ import annotations

import os
import resource
from dataclasses import replace

from pinnace.errors import ConfigurationError
from pinnace.settings import Settings

MIN_DESCRIPTORS = 64
DESCRIPTORS_PER_WORKER = 4  # in the supervisor: a control socket, the process, and the pipe of its start
# Kept free beside the connections: for grpc, which opens 9 when it listens; for up to 16 connections that wait to be
# admitted; for those that are accepted and not counted yet, or closed and not gone yet; and for files.
RESERVED_DESCRIPTORS = 44


def raise_fd_limit() -> int:
    """Raise the limit on open files and sockets to the highest allowed, and return it.

    The default of most shells is 1,024.
    """
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    return hard_limit


def check_fd_limit(settings: Settings) -> None:
    """Raise the limit as `raise_fd_limit` does. Raises ConfigurationError if it is too low to start."""
    limit = raise_fd_limit()
    needed = MIN_DESCRIPTORS + (DESCRIPTORS_PER_WORKER * settings.workers if settings.workers > 1 else 0)
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise ConfigurationError(
            f"the limit on open files is {limit}, and the server needs {needed}: raise it (ulimit -n, RLIMIT_NOFILE)"
        )


def fit_max_connections(settings: Settings) -> Settings:
    """Return the settings with max_connections lowered to what the limit on open files leaves for each port.

    Call it when the models are loaded and the gRPC port does not listen yet. Raises ConfigurationError if nothing is
    left.
    """
    limit = raise_fd_limit()
    if limit == resource.RLIM_INFINITY:
        return settings
    num_open = len(os.listdir("/proc/self/fd"))
    num_ports = 2 if settings.enable_grpc else 1
    per_port = (limit - num_open - RESERVED_DESCRIPTORS) // num_ports
    if per_port < 1:
        raise ConfigurationError(
            f"the limit on open files is {limit} and {num_open} are open, which leaves none for connections: "
            "raise it (ulimit -n, RLIMIT_NOFILE)"
        )
    return replace(settings, max_connections=min(settings.max_connections, per_port))
