"""Asks the server with KServe's own SDK, as its tutorial does; run by .venv-kserve, prints what came back as JSON."""

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from kserve import InferInput, InferRequest
from kserve.inference_client import InferenceGRPCClient, InferenceRESTClient, RESTConfig


def plain(response: Any) -> Any:
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


async def main(rest_url: str, grpc_address: str, request: Any) -> None:
    image = base64.b64decode(request["instances"][0]["image"]["b64"])
    # SERVICE_HOSTNAME is unset in the tutorial's local run, which makes the authority empty.
    empty_authority = [("grpc.ssl_target_name_override", "")]
    answers: dict[str, Any] = {}
    async with InferenceGRPCClient(url=grpc_address, channel_args=empty_authority, timeout=60) as client:
        answers["live"] = await client.is_server_live()
        answers["ready"] = await client.is_server_ready()
        answers["model ready"] = await client.is_model_ready("custom-model")
        for name, shape in (("shape [1]", [1]), ("no shape", [])):
            tensor = InferInput(name="input-0", shape=shape, datatype="BYTES", data=[image])
            infer = InferRequest(model_name="custom-model", infer_inputs=[tensor])
            answers[name] = plain(await client.infer(infer_request=infer))
        pixels = np.random.default_rng(0).standard_normal((4, 3, 224, 224)).astype(np.float32)
        for name, binary in (("typed", False), ("raw", True)):
            tensor = InferInput(name="INPUT__0", shape=[4, 3, 224, 224], datatype="FP32")
            tensor.set_data_from_numpy(pixels, binary_data=binary)
            infer = InferRequest(model_name="custom-model", infer_inputs=[tensor])
            answers[name] = plain(await client.infer(infer_request=infer))
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as client:
        answers["v1"] = await client.infer(rest_url, request, model_name="custom-model")
        answers["v1 live"] = await client.is_server_live(rest_url)
        answers["v1 model ready"] = await client.is_model_ready(rest_url, "custom-model")
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text())))
