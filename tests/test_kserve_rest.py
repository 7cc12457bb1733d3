"""KServe's REST API (SDK 0.20.0, observed on the wire), row by row. `differs` says why we differ."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.clients import make_v1_request
from tests.support.pictures import CAT
from tests.support.servers import Server, read_until, run_server

MODEL = "custom-model"
PREDICT, INFER = f"POST /v1/models/{MODEL}:predict", f"POST /v2/models/{MODEL}/infer"
LOAD, UNLOAD = (f"POST /v2/repository/models/{MODEL}/{verb}" for verb in ("load", "unload"))
LENGTH = "inference-header-content-length"
NO_MODEL = {"error": "Model with name nope does not exist."}
NOT_READY = {"error": f"Model with name {MODEL} is not ready."}
NO_VERSIONS = {"error": "Model versioning not supported yet."}
MALFORMED = "Unrecognized request format: unexpected character"
EMPTY = "Unrecognized request format: Input is a zero-length, empty document"
PIXELS = np.zeros((1, 3, 224, 224), np.float32)
B64 = base64.b64encode(CAT).decode()


def make_v2_request(**changes: Any) -> dict[str, Any]:
    """Return the tutorial's V2 request, with changes to its input."""
    return {"inputs": [{"name": "input-0", "shape": [1], "datatype": "BYTES", "data": [B64], **changes}]}


def make_v1_image_request(value: Any) -> dict[str, Any]:
    return {"instances": [{"image": value}]}


def make_binary_request(header: Mapping[str, Any], *tail: bytes, length: str = "") -> dict[str, Any]:
    """Return body and headers of a request of the binary extension."""
    text = json.dumps(header).encode()
    return {"body": b"".join([text, *tail]), "headers": {LENGTH: length or str(len(text))}}


@dataclass(frozen=True)
class Row:
    """A request. `answer` is the whole body of the response, the beginning of an error's text, or a check."""

    name: str
    call: str
    answer: Mapping[str, Any] | str | Callable[[httpx.Response], bool]
    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    differs: str = ""

    def send(self, server: Server) -> httpx.Response:
        method, _, path = self.call.partition(" ")
        body = self.body if isinstance(self.body, str | bytes | None) else json.dumps(self.body)
        return httpx.request(method, server.url + path, content=body, headers=self.headers, timeout=60)

    def check(self, response: httpx.Response) -> None:
        assert response.status_code == self.status, response.text
        if isinstance(self.answer, str):
            assert response.json().keys() == {"error"}
            assert response.json()["error"].startswith(self.answer)
        elif callable(self.answer):
            assert self.answer(response)
        else:
            assert response.json() == self.answer
            assert response.headers["content-type"] == "application/json"


def with_ids(rows: list[Row]) -> dict[str, Any]:
    return {"argvalues": rows, "ids": [row.name for row in rows]}


def has_one_row(response: httpx.Response) -> bool:
    """Return whether this is V1's answer to one picture: a row of five descending logits."""
    (row,) = response.json()["predictions"]
    return len(row) == 5 and row == sorted(row, reverse=True)


def has_one_output(response: httpx.Response) -> bool:
    """Return whether this is V2's answer to one picture."""
    (output,) = response.json()["outputs"]
    return (output["name"], output["datatype"], output["shape"], len(output["data"])) == ("output-0", "FP32", [1, 5], 5)


KSERVE_500 = "KServe says 500 with the exception's name: a client's mistake is 400 here"
KSERVE_422 = "KServe says 422 with FastAPI's detail, which its own clients do not read: 400 with error, as V2 specifies"
ACCEPT_OPENMETRICS = {"accept": "application/openmetrics-text"}

ROUTES = [
    Row("GET /", "GET /", {"status": "alive"}),
    Row(
        "GET /metrics",
        "GET /metrics",
        lambda r: r.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8",
    ),
    Row(
        "GET /metrics as OpenMetrics",
        "GET /metrics",
        lambda r: (
            r.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0") and "# EOF" in r.text
        ),
        headers=ACCEPT_OPENMETRICS,
    ),
    Row("GET /docs when off", "GET /docs", {"error": "Not Found"}, 404, differs="KServe says detail"),
    Row("GET /redoc", "GET /redoc", {"error": "Not Found"}, 404, differs="KServe says detail"),
    Row("GET /openapi.json", "GET /openapi.json", lambda r: r.json()["openapi"].startswith("3.")),
    Row("GET /v1/models", "GET /v1/models", {"models": [MODEL]}),
    Row("GET /v1/models/{m}", f"GET /v1/models/{MODEL}", {"name": MODEL, "ready": True}),
    Row("POST :predict", PREDICT, has_one_row, body=make_v1_request(CAT)),
    Row(
        "POST :explain",
        PREDICT.replace("predict", "explain"),
        {"error": "Could not find explainer_host."},
        501,
        make_v1_image_request(1),
    ),
    Row(
        "GET /v2",
        "GET /v2",
        lambda r: (
            r.json().keys() == {"name", "version", "extensions"} and "binary_tensor_data" in r.json()["extensions"]
        ),
        differs="KServe does not list the binary extension that it has, and always lists the repository: off here",
    ),
    Row("GET /v2/health/live", "GET /v2/health/live", {"live": True}),
    Row("GET /v2/health/ready", "GET /v2/health/ready", {"ready": True}),
    Row("GET /v2/models", "GET /v2/models", {"models": [MODEL]}),
    Row(
        "GET /v2/models/{m}",
        f"GET /v2/models/{MODEL}",
        lambda r: (
            r.json()["inputs"] == [{"name": "input-0", "datatype": "BYTES", "shape": [-1]}]
            and r.json()["versions"] is None
            and r.json()["outputs"][0] == {"name": "output-0", "datatype": "FP32", "shape": [-1, 5]}
        ),
    ),
    Row("GET /v2/models/{m}/ready", f"GET /v2/models/{MODEL}/ready", {"name": MODEL, "ready": True}),
    Row("POST /v2/models/{m}/infer", INFER, has_one_output, body=make_v2_request()),
    Row("versions", f"GET /v2/models/{MODEL}/versions/1", NO_VERSIONS, 501),
    Row("versions: ready", f"GET /v2/models/{MODEL}/versions/1/ready", NO_VERSIONS, 501),
    Row("versions: infer, of no model", "POST /v2/models/nope/versions/1/infer", NO_VERSIONS, 501, make_v2_request()),
    Row("load when off", LOAD, "The model repository is off", 501, differs="KServe lets any client unload its models"),
    Row("unload when off", UNLOAD, "The model repository is off", 501, differs="the same"),
    Row(
        "index when off",
        "POST /v2/repository/index",
        "The model repository is off",
        501,
        differs="not routed in KServe",
    ),
]

ONLY_EXACT = (
    "KServe reads JSON for four exact types only, and passes anything else to the model as bytes, which gives 500"
)
PREDICTIONS = [
    *(
        Row(
            f"type {kind or 'absent'}",
            PREDICT,
            has_one_row,
            body=make_v1_request(CAT),
            headers={"content-type": kind} if kind else {},
        )
        for kind in ("", "application/json", "application/ld+json", "application/octet-stream")
    ),
    *(
        Row(f"type {kind}", PREDICT, has_one_row, 200, make_v1_request(CAT), {"content-type": kind}, ONLY_EXACT)
        for kind in ("application/json; charset=utf-8", "application/x-www-form-urlencoded", "text/plain")
    ),
    Row(
        "type image/*", PREDICT, has_one_row, 200, CAT, {"content-type": "image/png"}, "an extension: one encoded image"
    ),
    Row("inputs for instances", PREDICT, has_one_row, body={"inputs": [{"image": {"b64": B64}}]}),
    Row("a transformer's tensor", PREDICT, has_one_row, body={"instances": [{"data": PIXELS[0].tolist()}]}),
    Row("the encoded colon", f"POST /v1/models/{MODEL}%3Apredict", has_one_row, body=make_v1_request(CAT)),
    Row(
        "the predictor's header",
        PREDICT,
        lambda r: re.fullmatch(r"\d+\.\d{1,9}", r.headers["prediction-time-latency"]) is not None,
        body=make_v1_request(CAT),
    ),
]

ERRORS = [
    Row("unknown model, V1", "POST /v1/models/nope:predict", NO_MODEL, 404, make_v1_image_request(1)),
    Row("unknown model, V2", "POST /v2/models/nope/infer", NO_MODEL, 404, make_v2_request()),
    Row(
        "unknown model and bad body, V2", "POST /v2/models/nope/infer", NO_MODEL, 404, "{", {}, "KServe: the body first"
    ),
    Row("malformed JSON, V1", PREDICT, MALFORMED, 400, "{bad"),
    Row("malformed JSON, V2", INFER, MALFORMED, 400, "{bad", {}, KSERVE_422),
    Row("empty body, V1", PREDICT, EMPTY, 400),
    Row("empty body, V2", INFER, EMPTY, 400, "", {}, KSERVE_422),
    Row("missing instances", PREDICT, '"instances" is missing', 400, {}, {}, KSERVE_500),
    Row(
        "missing inputs",
        INFER,
        '"inputs" is missing or empty',
        400,
        {},
        {},
        f"{KSERVE_422}; KServe's echoes the request",
    ),
    Row("instances not a list", PREDICT, {"error": 'Expected "instances" to be a list'}, 400, {"instances": 5}),
    Row("data not a list", INFER, "inputs[0].data must be a list", 400, make_v2_request(data="a"), {}, KSERVE_422),
    Row("no instances", PREDICT, '"instances" is empty', 400, {"instances": []}, {}, KSERVE_500),
    Row("no inputs", INFER, '"inputs" is missing or empty', 400, {"inputs": []}, {}, KSERVE_500),
    Row("missing b64", PREDICT, "instances[0].image must be", 400, make_v1_image_request({}), {}, KSERVE_500),
    Row(
        "missing data",
        INFER,
        f"'data' field is missing for input 'input-0' for model '{MODEL}'",
        400,
        make_v2_request(data=None),
    ),
    Row(
        "bad base64: padding, V1",
        PREDICT,
        "instances[0].image.b64: not valid base64",
        400,
        make_v1_image_request({"b64": "abc"}),
        {},
        KSERVE_500,
    ),
    Row(
        "bad base64: characters, V1",
        PREDICT,
        "instances[0].image.b64: not valid base64",
        400,
        make_v1_image_request({"b64": "@@@@"}),
        {},
        KSERVE_500,
    ),
    Row("bad base64, V2", INFER, "input 'input-0', row 0: ", 400, make_v2_request(data=["@@@@"]), {}, KSERVE_500),
    Row(
        "no image",
        PREDICT,
        "input 'image', row 0: neither an image",
        400,
        make_v1_image_request({"b64": "aGVsbG8="}),
        {},
        KSERVE_500,
    ),
    Row(
        "wrong shape",
        INFER,
        "input 'input-0': its shape does not match",
        400,
        make_v2_request(shape=[1, 3], datatype="FP32", data=[1.0]),
        {},
        KSERVE_500,
    ),
    Row(
        "wrong element type",
        INFER,
        "input 'input-0': ",
        400,
        make_v2_request(datatype="FP32", data=["a"]),
        {},
        KSERVE_500,
    ),
    Row(
        "unknown datatype",
        INFER,
        "input 'input-0': its datatype is not one of",
        400,
        make_v2_request(datatype="FP8"),
        {},
        KSERVE_500,
    ),
    Row(
        "FP16 in JSON",
        INFER,
        "Sending FP16 data via JSON is not supported.",
        400,
        make_v2_request(datatype="FP16", data=[1.0]),
    ),
    Row(
        "unknown requested output",
        INFER,
        {"error": f"Unexpected inference output 'foo' for model '{MODEL}'"},
        400,
        {**make_v2_request(), "outputs": [{"name": "foo"}]},
    ),
    Row("no JSON, V1", PREDICT, "the body must be", 415, "a", {"content-type": "video/mp4"}, KSERVE_500),
    Row(
        "no JSON, V2",
        INFER,
        "the body must be",
        415,
        "a",
        {"content-type": "video/mp4"},
        "KServe misses the header of the extension",
    ),
    Row(
        "no type, V2",
        INFER,
        has_one_output,
        body=make_v2_request(),
        differs="KServe, since a change of FastAPI, does not read it",
    ),
    Row("wrong method", "POST /v1/models", {"error": "Method Not Allowed"}, 405, {}, {}, "KServe says detail"),
    Row("GET on :predict", f"GET /v1/models/{MODEL}:predict", f"Model with name {MODEL}:predict does", 404),
    Row("GET on infer", INFER.replace("POST", "GET"), {"error": "Method Not Allowed"}, 405),
    Row("unknown verb", PREDICT.replace("predict", "frob"), {"error": "Method Not Allowed"}, 405, {}),
    Row("unknown path", "GET /v3", {"error": "Not Found"}, 404, None, {}, "KServe says detail"),
    Row(
        "oversized body",
        PREDICT,
        "the body exceeds max_body_bytes",
        413,
        b" " * (17 * 2**20 + 1),
        {},
        "KServe has no limit",
    ),
]

FAILURES = [
    Row(
        "handler raises",
        PREDICT,
        {"error": "Internal server error"},
        500,
        {"instances": ["RuntimeError"]},
        {},
        "KServe returns the text of the exception",
    ),
    Row("InvalidInput", PREDICT, {"error": "the secret of the text"}, 400, {"instances": ["InvalidInput"]}),
    Row("NotSupported", PREDICT, {"error": "the secret of the text"}, 501, {"instances": ["NotSupported"]}),
    Row(
        "NotImplementedError",
        PREDICT,
        {"error": "Internal server error"},
        500,
        {"instances": ["NotImplementedError"]},
        differs="501 in KServe: here a predictor raises NotSupported for that, and this is an unexpected exception",
    ),
]

UNREADY = [
    Row("V1 predict", PREDICT, NOT_READY, 503, {"instances": [1]}),
    Row("V1 ready", f"GET /v1/models/{MODEL}", NOT_READY, 503),
    Row("V1 explain", PREDICT.replace("predict", "explain"), NOT_READY, 503, {}),
    Row("V2 infer", INFER, NOT_READY, 503, make_v2_request()),
    Row("V2 ready", f"GET /v2/models/{MODEL}/ready", NOT_READY, 503),
    Row("V2 metadata: readiness not required", f"GET /v2/models/{MODEL}", lambda r: r.json()["name"] == MODEL),
    Row(
        "server ready",
        "GET /v2/health/ready",
        {"ready": False},
        503,
        None,
        {},
        "KServe is ready even with no model at all",
    ),
    Row("server live", "GET /v2/health/live", {"live": True}),
    Row("unload of an unknown model", UNLOAD.replace(MODEL, "nope"), NO_MODEL, 404),
    Row("load of an unknown model", LOAD.replace(MODEL, "nope"), NO_MODEL, 404, None, {}, "503 in KServe"),
    Row("load", LOAD, {"name": MODEL, "load": True}, 200, None, {}, "KServe cannot load what it has unloaded"),
    Row("unload", UNLOAD, {"name": MODEL, "unload": True}),
]

RAW_IMAGE = struct.pack("<I", len(CAT)) + CAT
RAW_TEXT = struct.pack("<I", len(B64)) + B64.encode()


def make_binary_input(size: int, **changes: Any) -> dict[str, Any]:
    entry = {"name": "i", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
    return {"inputs": [{**entry, **changes}]}


def has_binary_output(response: httpx.Response) -> bool:
    """Return whether five FP32 values follow the JSON, whose output has only the parameter binary_data_size."""
    length = int(response.headers[LENGTH])
    (output,) = json.loads(response.content[:length])["outputs"]
    return "data" not in output and output["parameters"] == {"binary_data_size": 20} == {
        "binary_data_size": len(response.content) - length
    }


TENSORS = [
    Row(
        "key order and nulls",
        INFER,
        lambda r: (
            list(r.json()) == ["model_name", "model_version", "id", "parameters", "outputs"]
            and list(r.json()["outputs"][0]) == ["name", "shape", "datatype", "parameters", "data"]
        ),
        body=make_v2_request(),
    ),
    Row(
        "floats widened to double",
        INFER,
        lambda r: all(float(np.float32(x)) == x for x in r.json()["outputs"][0]["data"]),
        body=make_v2_request(),
    ),
    Row("id echoed", INFER, lambda r: r.json()["id"] == "abc", body={**make_v2_request(), "id": "abc"}),
    Row("id empty", INFER, lambda r: len(r.json()["id"]) == 36, body={**make_v2_request(), "id": ""}),
    Row("id absent", INFER, lambda r: len(r.json()["id"]) == 36, body=make_v2_request()),
    Row(
        "parameters not echoed",
        INFER,
        lambda r: r.json()["parameters"] is None,
        body={**make_v2_request(), "parameters": {"a": 1}},
    ),
    Row("extra keys ignored", INFER, has_one_output, body={**make_v2_request(), "model_name": "other", "more": 1}),
    Row("input name ignored", INFER, has_one_output, body=make_v2_request(name="INPUT__0")),
    Row(
        "data nested",
        INFER,
        has_one_output,
        body=make_v2_request(shape=[1, 3, 224, 224], datatype="FP32", data=PIXELS.tolist()),
    ),
    Row(
        "data flat, as the transformer sends it",
        INFER,
        has_one_output,
        body=make_v2_request(
            name="INPUT__0", shape=[1, 3, 224, 224], datatype="FP32", data=PIXELS.reshape(-1).tolist()
        ),
    ),
    Row(
        "shape of floats",
        INFER,
        "inputs[0].shape must be a list of whole numbers",
        400,
        make_v2_request(shape=[1.0]),
        {},
        KSERVE_422,
    ),
    Row(
        "shape negative",
        INFER,
        "input 'input-0': its shape must have at most 16 dimensions, none of them negative",
        400,
        make_v2_request(shape=[-1]),
        {},
        "KServe accepts it",
    ),
    Row("BYTES in JSON are base64", INFER, has_one_output, body=make_v2_request()),
    Row(
        "outputs in the order of the request",
        INFER,
        lambda r: [o["name"] for o in r.json()["outputs"]] == ["labels", "output-0"],
        body={**make_v2_request(), "outputs": [{"name": "labels"}, {"name": "output-0"}]},
    ),
]

IMAGE = make_binary_input(len(RAW_IMAGE))
ALL_BINARY = {"parameters": {"binary_data_output": True}}
ONE_BINARY = {"outputs": [{"name": "output-0", "parameters": {"binary_data": True}}]}
FP32 = make_binary_input(PIXELS.nbytes, shape=[1, 3, 224, 224], datatype="FP32")
UTF8 = "KServe decodes raw BYTES as UTF-8 text, and answers 500 with the whole text in it"
IGNORED = "KServe ignores binary_data_output where outputs are named; Triton and KServe's documentation do not"

BINARY = [
    Row("BYTES raw", INFER, has_one_output, **make_binary_request(IMAGE, RAW_IMAGE), differs=UTF8),
    Row(
        "BYTES of base64 text", INFER, has_one_output, **make_binary_request(make_binary_input(len(RAW_TEXT)), RAW_TEXT)
    ),
    Row("FP32", INFER, has_one_output, **make_binary_request(FP32, PIXELS.tobytes())),
    Row("binary_data_output", INFER, has_binary_output, **make_binary_request({**IMAGE, **ALL_BINARY}, RAW_IMAGE)),
    Row(
        "binary_data of one output", INFER, has_binary_output, **make_binary_request({**IMAGE, **ONE_BINARY}, RAW_IMAGE)
    ),
    Row(
        "an output without binary_data inherits binary_data_output",
        INFER,
        has_binary_output,
        **make_binary_request({**IMAGE, **ALL_BINARY, "outputs": [{"name": "output-0"}]}, RAW_IMAGE),
        differs=IGNORED,
    ),
    Row(
        "header no number",
        INFER,
        LENGTH,
        400,
        **make_binary_request(make_v2_request(), length="many"),
        differs=KSERVE_500,
    ),
    Row(
        "header of zero",
        INFER,
        "Unrecognized request format",
        400,
        **make_binary_request(make_v2_request(), length="0"),
    ),
    Row("header too long", INFER, LENGTH, 400, **make_binary_request(make_v2_request(), length="999999")),
    Row(
        "no inputs", INFER, '"inputs" is missing or empty', 400, **make_binary_request({}, b"1234"), differs=KSERVE_500
    ),
    Row(
        "short tensor",
        INFER,
        "inputs[0].parameters.binary_data_size is 8, and 4 bytes follow",
        400,
        **make_binary_request(make_binary_input(8), b"1234"),
        differs=KSERVE_500,
    ),
    Row(
        "bytes left over",
        INFER,
        "4 bytes follow the last binary input",
        400,
        **make_binary_request(IMAGE, RAW_IMAGE, b"more"),
        differs="KServe ignores them: a wrong length should be reported",
    ),
]


@pytest.fixture(scope="module")
def failing() -> Iterator[Server]:
    with run_server("--predictor=tests.support.predictors:Failing") as server:
        yield server


@pytest.fixture(scope="module")
def unloaded() -> Iterator[Server]:
    with run_server("--predictor=tests.support.predictors:Echo", "--enable_model_repository=true") as server:
        server.post(f"/v2/repository/models/{MODEL}/unload", "")
        yield server


@pytest.mark.parametrize("row", **with_ids(ROUTES))
def test_route(row: Row, server: Server) -> None:
    row.check(row.send(server))


@pytest.mark.parametrize("row", **with_ids(PREDICTIONS))
def test_v1_prediction(row: Row, server: Server) -> None:
    row.check(row.send(server))


@pytest.mark.parametrize("row", **with_ids(ERRORS))
def test_error(row: Row, server: Server) -> None:
    row.check(row.send(server))


@pytest.mark.parametrize("row", **with_ids(FAILURES))
def test_error_of_the_handler(row: Row, failing: Server) -> None:
    row.check(row.send(failing))


@pytest.mark.parametrize("row", **with_ids(UNREADY))
def test_model_not_ready(row: Row, unloaded: Server) -> None:
    row.check(row.send(unloaded))


@pytest.mark.parametrize("row", **with_ids(TENSORS))
def test_v2_inference(row: Row, server: Server) -> None:
    row.check(row.send(server))


@pytest.mark.parametrize("kind", ["application/octet-stream", "application/json"])
@pytest.mark.parametrize("row", **with_ids(BINARY))
def test_v2_binary(row: Row, kind: str, server: Server) -> None:
    """KServe answers 422 to all of them as application/json. Here the length header suffices."""
    response = replace(row, headers={**row.headers, "content-type": kind}).send(server)

    row.check(response)
    if row.answer is has_binary_output:  # KServe sends neither
        assert response.headers["content-type"] == "application/octet-stream"
        assert int(response.headers["content-length"]) == len(response.content)


@pytest.mark.parametrize("call", ["GET /v1/models", PREDICT, INFER, "GET /v2/models/nope"])
def test_json_is_compact_has_its_length_and_no_charset(call: str, server: Server) -> None:
    body = make_v1_request(CAT) if call == PREDICT else make_v2_request() if call == INFER else None

    response = Row("", call, "", body=body).send(server)

    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) == len(response.content)
    assert json.dumps(response.json(), separators=(",", ":")) == response.text


def test_a_trailing_slash_is_redirected_to_an_absolute_url(server: Server) -> None:
    for path in ("/v1/models", "/v2"):
        response = server.get(f"{path}/")

        assert (response.status_code, response.content) == (307, b"")
        assert response.headers["location"] == server.url + path


def test_a_client_that_expects_100_continue_gets_it(server: Server) -> None:
    with server.connect() as connection:
        head = f"{PREDICT} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
        connection.sendall(head.encode())
        assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"{}")
        assert read_until(connection, b'is missing"}').startswith(b"HTTP/1.1 400 ")


def test_there_is_no_server_header_as_uvicorn_sends_it(server: Server) -> None:
    """Naming the server would only help attackers."""
    response = server.get("/")

    assert "server" not in response.headers
    assert "date" in response.headers


def test_options_is_405_unless_cors_is_enabled(server: Server) -> None:
    Row("", f"OPTIONS /v1/models/{MODEL}:predict", {"error": "Method Not Allowed"}, 405).check(
        httpx.options(f"{server.url}/v1/models/{MODEL}:predict")
    )


def test_head_is_answered_unlike_in_kserve(server: Server) -> None:
    """Probes use HEAD."""
    assert httpx.head(f"{server.url}/v2/health/ready").status_code == 200
