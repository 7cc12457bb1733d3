"""Calls the server with KServe's SDK, as its tutorial does, and prints the results as JSON. Runs in .venv-kserve."""

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from kserve import InferInput, InferRequest
from kserve.inference_client import InferenceGRPCClient, InferenceRESTClient, RESTConfig
from kserve.protocol.infer_type import RequestedOutput


def to_dict(response: Any) -> Any:
    return {
        "id": response.id,
        "model_name": response.model_name,
        "outputs": [
            {
                "name": output.name,
                "shape": list(output.shape),
                "datatype": output.datatype,
                "data": output.as_numpy().ravel().tolist(),
            }
            for output in response.outputs
        ],
    }


async def call_over_grpc(address: str, image: bytes, pixels: Any) -> dict[str, Any]:
    """Call every method of the SDK's gRPC client."""
    # SERVICE_HOSTNAME is unset in the tutorial's local run, which makes the authority empty.
    empty_authority = [("grpc.ssl_target_name_override", "")]
    answers: dict[str, Any] = {}
    async with InferenceGRPCClient(url=address, channel_args=empty_authority, timeout=60) as client:
        answers["live"] = await client.is_server_live()
        answers["ready"] = await client.is_server_ready()
        answers["model ready"] = await client.is_model_ready("custom-model")
        for name, shape in (("shape [1]", [1]), ("no shape", [])):
            tensor = InferInput(name="input-0", shape=shape, datatype="BYTES", data=[image])
            infer = InferRequest(model_name="custom-model", infer_inputs=[tensor])
            answers[name] = to_dict(await client.infer(infer_request=infer))
        for name, binary in (("typed", False), ("raw", True)):
            infer = InferRequest(model_name="custom-model", infer_inputs=[make_tensor_input(pixels, binary)])
            answers[name] = to_dict(await client.infer(infer_request=infer))
    return answers


async def call_over_rest(url: str, request: Any, text: str, pixels: Any) -> dict[str, Any]:
    """Call every method of the SDK's REST client, except explain."""
    answers: dict[str, Any] = {}
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as client:
        answers["v1"] = await client.infer(url, request, model_name="custom-model")
        answers["v1 live"] = await client.is_server_live(url)
        answers["v1 model ready"] = await client.is_model_ready(url, "custom-model")
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        answers["v2 live"] = await client.is_server_live(url)
        answers["v2 ready"] = await client.is_server_ready(url)
        answers["v2 model ready"] = await client.is_model_ready(url, "custom-model")
        tensor = InferInput(name="input-0", shape=[1], datatype="BYTES", data=[text])
        infer = InferRequest(model_name="custom-model", infer_inputs=[tensor], request_id="mine")
        answers["v2 image"] = to_dict(await client.infer(url, infer, model_name="custom-model"))
        for name, binary in (("v2 JSON", False), ("v2 binary", True)):
            infer = InferRequest(
                model_name="custom-model",
                infer_inputs=[make_tensor_input(pixels[:2], binary)],  # four in JSON would exceed max_body_bytes
                request_outputs=[RequestedOutput(name="output-0", parameters={"binary_data": binary})],
            )
            answers[name] = to_dict(await client.infer(url, infer, model_name="custom-model"))
    return answers


def make_tensor_input(pixels: Any, binary: bool) -> Any:
    tensor = InferInput(name="INPUT__0", shape=list(pixels.shape), datatype="FP32")
    tensor.set_data_from_numpy(pixels, binary_data=binary)
    return tensor


async def main(rest_url: str, grpc_addresses: list[str], request: Any) -> None:
    text = request["instances"][0]["image"]["b64"]
    pixels = np.random.default_rng(0).standard_normal((4, 3, 224, 224)).astype(np.float32)
    answers = {
        "grpc": [await call_over_grpc(address, base64.b64decode(text), pixels) for address in grpc_addresses],
        "rest": await call_over_rest(rest_url, request, text, pixels),
    }
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2].split(","), json.loads(Path(sys.argv[3]).read_text())))
