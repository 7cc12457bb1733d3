"""pinnace/http/cloudevents.py: V1 requests that are CloudEvents."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx
import pytest

from tests.support.pictures import CAT
from tests.support.servers import Server, run_server

PREDICT = "/v1/models/custom-model:predict"
STRUCTURED = "application/cloudevents+json"
DATA = {"instances": [1.5, 2.5]}
ANSWER = {"predictions": [1.5, 2.5]}
EVENT = {
    "specversion": "1.0",
    "id": "36077800",
    "source": "https://example.com/camera",
    "type": "com.example.picture",
    "time": "2026-01-01T00:00:00Z",
    "data": DATA,
}
HEADERS = {f"ce-{name}": str(EVENT[name]) for name in ("specversion", "id", "source", "type")}


@pytest.fixture(scope="module")
def echo() -> Iterator[Server]:
    with run_server("--predictor=tests.support.predictors:Echo") as server:
        yield server


def post(server: Server, content: Any, **headers: str) -> httpx.Response:
    return httpx.post(server.url + PREDICT, content=json.dumps(content), headers=headers)


def test_a_structured_event_is_answered_with_a_structured_event(echo: Server) -> None:
    response = post(echo, EVENT, **{"content-type": STRUCTURED})

    event = response.json()
    assert response.headers["content-type"] == STRUCTURED
    assert event.keys() == EVENT.keys()
    assert (event["specversion"], event["data"]) == ("1.0", ANSWER)
    assert (event["source"], event["type"]) == ("io.kserve.inference.custom-model", "io.kserve.inference.response")
    assert len(event["id"]) == 36
    assert datetime.fromisoformat(event["time"]).tzinfo is not None


def test_a_structured_event_with_another_content_type_gets_a_plain_response(echo: Server) -> None:
    response = post(echo, EVENT, **{"content-type": "application/json"})

    assert (response.headers["content-type"], response.json()) == ("application/json", ANSWER)


def test_an_event_in_headers_is_answered_with_an_event_in_headers(echo: Server) -> None:
    response = post(echo, DATA, **HEADERS, **{"content-type": "application/json"})

    assert (response.headers["content-type"], response.json()) == ("application/json", ANSWER)
    assert response.headers["ce-source"] == "io.kserve.inference.custom-model"
    assert response.headers["ce-type"] == "io.kserve.inference.response"
    assert response.headers["ce-specversion"] == "1.0"
    assert len(response.headers["ce-id"]) == 36
    assert datetime.fromisoformat(response.headers["ce-time"]).tzinfo is not None


@pytest.fixture(scope="module")
def merging() -> Iterator[Server]:
    variables = {"CE_MERGE": "true", "CE_TYPE": "com.example.answer", "CE_SOURCE": "https://example.com/server"}
    with run_server("--predictor=tests.support.predictors:Echo", environment={**os.environ, **variables}) as server:
        yield server


def test_kserves_variables_set_type_and_source_of_the_response_and_merge_the_requests_attributes(
    merging: Server,
) -> None:
    event = {**EVENT, "subject": "cat.jpg", "partition": 7, "datacontenttype": "application/json"}

    answer = post(merging, event, **{"content-type": STRUCTURED}).json()

    assert (answer["type"], answer["source"]) == ("com.example.answer", "https://example.com/server")
    assert answer.keys() == {*EVENT, "subject", "partition"}
    assert (answer["subject"], answer["partition"], answer["data"]) == ("cat.jpg", 7, ANSWER)
    assert answer["id"] != EVENT["id"]
    assert answer["time"] != EVENT["time"]


def test_merged_attributes_of_an_event_in_headers_are_in_the_response_headers(merging: Server) -> None:
    response = post(merging, DATA, **HEADERS, **{"content-type": "application/json", "ce-subject": "cat.jpg"})

    assert response.json() == ANSWER
    assert (response.headers["ce-type"], response.headers["ce-subject"]) == ("com.example.answer", "cat.jpg")
    assert response.headers["ce-id"] != EVENT["id"]


def test_a_picture_can_be_sent_as_an_event_in_headers(server: Server) -> None:
    response = httpx.post(server.url + PREDICT, content=CAT, headers={**HEADERS, "content-type": "image/jpeg"})

    assert len(response.json()["predictions"]) == 1
    assert response.headers["ce-type"] == "io.kserve.inference.response"


def test_a_request_with_some_of_the_event_headers_is_a_plain_request(echo: Server) -> None:
    response = post(echo, DATA, **{"ce-id": "1", "content-type": "application/json"})

    assert response.json() == ANSWER
    assert not [name for name in response.headers if name.startswith("ce-")]


@pytest.mark.parametrize("missing", ["specversion", "id", "source", "type", "data"])
def test_an_event_that_lacks_an_attribute_is_refused(missing: str, echo: Server) -> None:
    event = {name: value for name, value in EVENT.items() if name != missing}

    response = post(echo, event, **{"content-type": STRUCTURED})

    assert (response.status_code, response.json()) == (400, {"error": f'not a CloudEvent: "{missing}" is missing'})


@pytest.mark.parametrize("version", ["2.0", 1, None])
def test_an_event_of_another_version_is_refused(version: Any, echo: Server) -> None:
    response = post(echo, {**EVENT, "specversion": version}, **{"content-type": STRUCTURED})

    error = 'not a CloudEvent: "specversion" must be one of 1.0, 0.3'
    assert (response.status_code, response.json()) == (400, {"error": error})


def test_the_error_of_an_event_is_no_event(echo: Server) -> None:
    response = post(echo, {**EVENT, "data": {}}, **{"content-type": STRUCTURED})

    assert (response.status_code, response.json()) == (400, {"error": '"instances" is missing'})
    assert response.headers["content-type"] == "application/json"
