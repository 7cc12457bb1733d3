"""Many requests at once, over both ports: each gets its own answer."""

from __future__ import annotations

import asyncio
from types import ModuleType

import grpc.aio
import httpx
import numpy as np

from tests.pictures import PHOTOGRAPHS, v1_request
from tests.servers import Server
from tests.test_grpc import image_request

ROUNDS = 4


async def test_every_one_of_many_requests_at_once_gets_the_answer_to_its_own_picture(
    server: Server, google: ModuleType
) -> None:
    pictures = list(PHOTOGRAPHS.values())
    alone = [server.predict(v1_request(picture)).json()["predictions"][0] for picture in pictures]

    async def by_rest(client: httpx.AsyncClient, picture: bytes) -> list[float]:
        response = await client.post("/v1/models/custom-model:predict", content=v1_request(picture))
        row: list[float] = response.json()["predictions"][0]
        return row

    async def by_grpc(channel: grpc.aio.Channel, picture: bytes) -> list[float]:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer"
        )
        message = await call(image_request(google, picture).SerializeToString(), timeout=60)
        return list(google.ModelInferResponse.FromString(message).outputs[0].contents.fp32_contents)

    async with (
        httpx.AsyncClient(base_url=server.url, timeout=60) as client,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        answers = await asyncio.gather(
            *(by_rest(client, picture) for picture in pictures * ROUNDS),
            *(by_grpc(channel, picture) for picture in pictures * ROUNDS),
        )

    np.testing.assert_array_equal(answers, alone * ROUNDS * 2)
