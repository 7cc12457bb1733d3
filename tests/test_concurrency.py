"""Concurrent requests over both ports: each gets its own answer."""

from __future__ import annotations

import asyncio
from types import ModuleType

import grpc.aio
import httpx
import numpy as np
import pytest

from tests.support.clients import make_image_request, make_v1_request
from tests.support.pictures import PHOTOGRAPHS
from tests.support.servers import Server

ROUNDS = 4


async def test_each_of_many_concurrent_requests_gets_the_answer_to_its_own_picture(
    server: Server, google: ModuleType
) -> None:
    pictures = list(PHOTOGRAPHS.values())
    alone = [server.predict(make_v1_request(picture)).json()["predictions"][0] for picture in pictures]

    async def predict_by_rest(client: httpx.AsyncClient, picture: bytes) -> list[float]:
        response = await client.post("/v1/models/custom-model:predict", content=make_v1_request(picture))
        row: list[float] = response.json()["predictions"][0]
        return row

    async def infer_by_grpc(channel: grpc.aio.Channel, picture: bytes) -> list[float]:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer"
        )
        message = await call(make_image_request(google, picture).SerializeToString(), timeout=60)
        return list(google.ModelInferResponse.FromString(message).outputs[0].contents.fp32_contents)

    async with (
        httpx.AsyncClient(base_url=server.url, timeout=60) as client,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        answers = await asyncio.gather(
            *(predict_by_rest(client, picture) for picture in pictures * ROUNDS),
            *(infer_by_grpc(channel, picture) for picture in pictures * ROUNDS),
        )

    np.testing.assert_array_equal(answers, alone * ROUNDS * 2)


async def test_answers_beside_bad_cancelled_and_timed_out_requests_are_bit_equal_to_answers_alone(
    server: Server, google: ModuleType
) -> None:
    pictures = list(PHOTOGRAPHS.values())
    alone = [server.predict(make_v1_request(picture)).json()["predictions"] for picture in pictures]

    async with (
        httpx.AsyncClient(base_url=server.url, timeout=60) as client,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer"
        )

        async def send_request(number: int) -> None:
            index = number % len(pictures)
            if number % 10 == 1:
                damaged = await client.post("/v1/models/custom-model:predict", content=make_v1_request(b"\xff\xd8\xff"))
                assert damaged.status_code == 400
            elif number % 10 == 2:
                with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
                    await call(make_image_request(google, pictures[index]).SerializeToString(), timeout=0.02)
            elif number % 10 == 3:
                leaving = asyncio.create_task(client.post("/v1/models/custom-model:predict", content=requests[index]))
                await asyncio.wait({leaving}, timeout=0.02)
                leaving.cancel()
                await asyncio.wait({leaving})
            else:
                answer = await client.post("/v1/models/custom-model:predict", content=requests[index])
                assert answer.json()["predictions"] == alone[index]

        requests = [make_v1_request(picture) for picture in pictures]
        await asyncio.gather(*map(send_request, range(150)))
