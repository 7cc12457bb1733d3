"""The server as a pod runs it: in a network of its own, where every port is free, with a model at /mnt/models."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.servers import PROJECT, Server, run_command

NAMESPACES = ("unshare", "--map-root-user", "--net", "--mount")
LOOPBACK_UP = (
    "import fcntl, socket, struct; SIOCSIFFLAGS, IFF_UP = 0x8914, 1; "
    "fcntl.ioctl(socket.socket(), SIOCSIFFLAGS, struct.pack('16sh', b'lo', IFF_UP))"
)
CHECK_HEALTH = (
    "import sys, grpc; channel = grpc.insecure_channel(sys.argv[1]); "
    "print(channel.unary_unary('/grpc.health.v1.Health/Check')(b'', timeout=10) == b'\\x08\\x01')"
)


@dataclass(frozen=True)
class Pod:
    """A ready server, whose network commands can enter."""

    server: Server

    def run(self, *command: str) -> str:
        """Run a command in the pod's network, and return what it prints. The command must succeed."""
        enter = ("nsenter", f"--target={self.server.process.pid}", "--user", "--net", "--preserve-credentials")
        return subprocess.run([*enter, *command], cwd=PROJECT, check=True, capture_output=True, text=True).stdout

    def get_status(self, port: int, path: str) -> int:
        """Return the status of a GET request."""
        return int(self.run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://localhost:{port}{path}"))

    def is_healthy(self, grpc_port: int) -> bool:
        """Return whether the server reports SERVING to Kubernetes' gRPC probe."""
        return self.run(sys.executable, "-c", CHECK_HEALTH, f"localhost:{grpc_port}").strip() == "True"


def skip_without_namespaces() -> None:
    """Skip the test where users may not create the namespaces of a pod."""
    done = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"namespaces cannot be created: {done.stderr.strip()}")


@contextmanager
def run_pod(arguments: Sequence[str], environment: Mapping[str, str], model: Path) -> Iterator[Pod]:
    """Run `app.py` with exactly these arguments, and `model`, a directory or a file, read-only at /mnt/models."""
    make_target = "mkdir /mnt/models" if model.is_dir() else "touch /mnt/models"
    script = (
        f"{sys.executable} -c {shlex.quote(LOOPBACK_UP)} && mount -t tmpfs tmpfs /mnt && {make_target} && "
        f"mount --bind -o ro {shlex.quote(str(model))} /mnt/models && exec {sys.executable} app.py "
        f"{shlex.join(arguments)}"
    )
    with run_command([*NAMESPACES, "sh", "-c", script], environment) as server:
        yield Pod(server)
