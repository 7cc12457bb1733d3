"""pinnace/http/health.py and app.py: metadata, errors of routing, CORS and HTTP/2 over REST."""

from __future__ import annotations

import json
import subprocess

import httpx
import pytest

from tests.support.servers import Server, run_server


def test_the_metadata_of_a_seeded_model_warns(server: Server) -> None:
    assert server.get("/v2/models/custom-model").json() == {
        "name": "custom-model",
        "versions": None,
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "input-0", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": "output-0", "datatype": "FP32", "shape": [-1, 5]},
            {"name": "indices", "datatype": "INT64", "shape": [-1, 5]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 5]},
            {"name": "labels", "datatype": "BYTES", "shape": [-1, 5]},
            {"name": "logits", "datatype": "FP32", "shape": [-1, 1000]},
        ],
        "properties": {"architecture": "alexnet", "weights": "seeded:0", "precision": "fp32", "device": "cpu"},
        "warning": "UNTRAINED WEIGHTS (seeded:0): the answers are meaningless, for tests and benchmarks only",
    }


@pytest.mark.parametrize("path", ["/v1/models/nope", "/v2/models/nope", "/v1/models/custom-model:predict"])
def test_an_unknown_model_is_404(path: str, server: Server) -> None:
    response = server.get(path)

    name = path.rpartition("/")[2]
    assert (response.status_code, response.json()) == (404, {"error": f"Model with name {name} does not exist."})


@pytest.mark.parametrize("path", ["/", "/v1/models", "/v1/models/custom-model", "/v2/health/ready"])
def test_a_wrong_method_is_405_and_names_the_right_ones(path: str, server: Server) -> None:
    response = server.post(path, "{}")

    assert (response.status_code, response.json()) == (405, {"error": "Method Not Allowed"})
    assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_without_the_flag_there_are_no_cors_headers(server: Server) -> None:
    response = httpx.get(server.url, headers={"origin": "https://example.com"})

    assert "access-control-allow-origin" not in response.headers
    assert httpx.options(server.url, headers={"origin": "https://example.com"}).status_code == 405


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        ("*", "https://example.com", True),
        ("https://example.com, https://example.org", "https://example.org", True),
        ("https://example.com", "https://example.org", False),
    ],
)
def test_cors_headers_allow_only_the_configured_origins(origins: str, origin: str, allowed: bool) -> None:
    preflight_headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "x-mine",
    }
    with run_server("--predictor=tests.support.predictors:Echo", f"--cors_allow_origins={origins}") as server:
        url = f"{server.url}/v1/models/custom-model:predict"
        preflight = httpx.options(url, headers=preflight_headers)
        answer = httpx.post(url, json={"instances": [1]}, headers={"origin": origin})
        error = httpx.post(url, json={}, headers={"origin": origin})

    assert (preflight.status_code == 200) is allowed
    for response in (preflight, answer, error):
        assert (response.headers.get("access-control-allow-origin") in (origin, "*")) is allowed
    if allowed:
        assert preflight.headers["access-control-allow-headers"] == "x-mine"
        assert answer.headers["access-control-allow-credentials"] == "true"


def test_there_is_no_server_header(server: Server) -> None:
    assert "server" not in server.get("/").headers


def test_http_2_is_served_to_clients_with_prior_knowledge(server: Server) -> None:
    done = subprocess.run(
        [
            "curl",
            "-sS",
            "-m",
            "10",
            "--http2-prior-knowledge",
            "-w",
            "\n%{http_version}",
            f"{server.url}/v2/health/ready",
        ],
        capture_output=True,
        text=True,
        check=True,
    )

    body, version = done.stdout.split("\n")
    assert (json.loads(body), version) == ({"ready": True}, "2")


def test_one_http_2_connection_serves_more_than_a_thousand_requests(server: Server) -> None:
    with httpx.Client(http1=False, http2=True) as client:
        statuses = [client.get(f"{server.url}/v2/health/live").status_code for _ in range(1100)]

    assert statuses == [200] * 1100
