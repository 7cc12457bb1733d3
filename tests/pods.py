"""The server as a pod has it: a network of its own, in which every port is free, and a model mounted at /mnt/models."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers import PROJECT, Server

NAMESPACES = ("unshare", "--map-root-user", "--net", "--mount")
LOOPBACK_UP = (
    "import fcntl, socket, struct; SIOCSIFFLAGS, IFF_UP = 0x8914, 1; "
    "fcntl.ioctl(socket.socket(), SIOCSIFFLAGS, struct.pack('16sh', b'lo', IFF_UP))"
)
ASK_HEALTH = (
    "import sys, grpc; channel = grpc.insecure_channel(sys.argv[1]); "
    "print(channel.unary_unary('/grpc.health.v1.Health/Check')(b'', timeout=10) == b'\\x08\\x01')"
)


@dataclass(frozen=True)
class Pod:
    """A server that is ready, and clients beside it."""

    server: Server

    def run(self, *command: str) -> str:
        """What a command in the pod's network prints; it must succeed."""
        inside = ("nsenter", f"--target={self.server.process.pid}", "--user", "--net", "--preserve-credentials")
        return subprocess.run([*inside, *command], cwd=PROJECT, check=True, capture_output=True, text=True).stdout

    def status(self, port: int, path: str) -> int:
        """Of a GET."""
        return int(self.run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://localhost:{port}{path}"))

    def is_healthy(self, grpc_port: int) -> bool:
        """What Kubernetes' gRPC probe is told."""
        return self.run(sys.executable, "-c", ASK_HEALTH, f"localhost:{grpc_port}").strip() == "True"


def skip_without_namespaces() -> None:
    """Which a pod is made of; not every machine lets its users have them."""
    done = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no namespaces of our own: {done.stderr.strip()}")


@contextmanager
def pod(arguments: Sequence[str], environment: Mapping[str, str], model: Path) -> Iterator[Pod]:
    """`app.py` with exactly these arguments; `model`, a directory or a file, is read-only at /mnt/models."""
    place = "mkdir /mnt/models" if model.is_dir() else "touch /mnt/models"
    script = (
        f"{sys.executable} -c {shlex.quote(LOOPBACK_UP)} && mount -t tmpfs tmpfs /mnt && {place} && "
        f"mount --bind -o ro {shlex.quote(str(model))} /mnt/models && exec {sys.executable} app.py "
        f"{shlex.join(arguments)}"
    )
    with subprocess.Popen(
        [*NAMESPACES, "sh", "-c", script],
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        if process.stderr is None:
            raise RuntimeError
        server = Server(process, process.stderr)
        try:
            server.wait_until_ready()
            yield Pod(server)
        finally:
            server.end()
