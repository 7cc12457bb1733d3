"""Attacks with gRPC calls: floods of watchers, of calls without time, and of calls whose answers nobody reads."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress

import grpc
import grpc.aio
from PIL import Image

from pinnace.proto.generated import inference as pb
from tests.attacks import Attack
from tests.support.raw_grpc import RawConnection
from tests.support.servers import PROJECT

LIVE = "/inference.GRPCInferenceService/ServerLive"
WATCH = "/grpc.health.v1.Health/Watch"
INFER = "/inference.GRPCInferenceService/ModelInfer"
CONNECTIONS, CALLS_PER_CONNECTION = 20, 1000
CALLERS, PROCESSES, SECONDS = 120, 2, 5
UNREAD_CALLS, BURSTS = 100, 5


def watch_20_000_times(port: int) -> None:
    """Open 1,000 watchers on each of 20 connections, and keep them for a while."""
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            connection = stack.enter_context(RawConnection(port))
            for _ in range(CALLS_PER_CONNECTION):
                connection.call(WATCH, b"", flush=False)
            with suppress(OSError):
                connection.flush()
        threading.Event().wait(SECONDS)


def call_without_time(port: int) -> None:
    """Send calls with a deadline of 1 ms from 120 callers, in processes of their own.

    They stand for other machines, so they have a low priority: the server must not wait for its cores because of them.
    """
    command = ["nice", "-n", "10", sys.executable, "-m", "tests.attacks.calls", str(port)]
    for process in [subprocess.Popen(command, cwd=PROJECT) for _ in range(PROCESSES)]:
        process.wait(60)


def leave_answers_unread(port: int) -> None:
    """Send 100 calls of less than 1 kB with a picture, and take none of their answers of all logits."""
    message = make_message()
    with RawConnection(port, window_bytes=0) as connection:
        for _ in range(BURSTS):  # a hundred at once would be a queue of two seconds, which is everybody's turn
            for _ in range(UNREAD_CALLS // BURSTS):
                connection.call(INFER, message, flush=False)
            connection.flush()
            threading.Event().wait(SECONDS / BURSTS)


def make_message() -> bytes:
    """Return a ModelInferRequest with one tiny picture that asks for all logits."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    request = pb.ModelInferRequest(
        model_name="custom-model",
        inputs=[
            pb.ModelInferRequestInferInputTensor(
                name="input-0",
                datatype="BYTES",
                shape=[1],
                contents=pb.InferTensorContents(bytes_contents=[picture.getvalue()]),
            )
        ],
        outputs=[pb.ModelInferRequestInferRequestedOutputTensor(name="logits")],
    )
    return bytes(request)


async def _keep_calling(port: int) -> None:
    async def call_repeatedly() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            live: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(LIVE)
            while True:
                with suppress(grpc.aio.AioRpcError):
                    await live(b"", timeout=0.001)

    with suppress(TimeoutError):
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as tasks:
            for _ in range(CALLERS // PROCESSES):
                tasks.create_task(call_repeatedly())


ATTACKS = {
    "20,000 watchers on the HTTP port": Attack(lambda server: watch_20_000_times(server.http_port)),
    "20,000 watchers on the gRPC port": Attack(lambda server: watch_20_000_times(server.grpc_port)),
    "calls of 1 ms on the HTTP port": Attack(lambda server: call_without_time(server.http_port)),
    "calls of 1 ms on the gRPC port": Attack(lambda server: call_without_time(server.grpc_port)),
    "answers that nobody reads on the gRPC port": Attack(lambda server: leave_answers_unread(server.grpc_port)),
}

if __name__ == "__main__":
    asyncio.run(_keep_calling(int(sys.argv[1])))
