"""pinnace/rest_docs.py: the API described, for machines and for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openapi_schema_validator import OAS30Validator
from openapi_spec_validator import validate

from pinnace.http.app import ROUTERS
from pinnace.http.docs import DOCUMENT
from pinnace.inference.dataplane import DataPlane
from pinnace.inference.repository import Repository
from pinnace.observability.metrics import Metrics
from pinnace.settings import Settings
from pinnace.version import __version__
from tests.browser import needs_browser, opened
from tests.servers import Server, running

OPERATIONS = [
    (method, path)
    for path, entry in yaml.safe_load(DOCUMENT.read_text())["paths"].items()
    for method in entry
    if method in ("get", "post")
]


@pytest.fixture(scope="module")
def documented(model_dir: Path) -> Iterator[Server]:
    with running(f"--model_dir={model_dir}", "--enable_docs_url=true", "--enable_model_repository=true") as server:
        yield server


@pytest.fixture(scope="module")
def document(documented: Server) -> Any:
    return documented.get("/openapi.json").json()


def test_the_document_is_valid_openapi_and_knows_the_models(document: Any) -> None:
    validate(document)

    assert document["info"]["version"] == __version__
    assert document["components"]["parameters"]["Model"]["schema"]["enum"] == ["custom-model"]


def test_the_document_is_there_and_the_page_is_not_unless_it_is_wished_for(server: Server) -> None:
    assert server.get("/openapi.json").headers["content-type"] == "application/json"
    assert [server.get(path).status_code for path in ("/docs", "/docs/swagger-ui.css", "/redoc")] == [404, 404, 404]


def test_the_document_has_every_route_of_the_server() -> None:
    dataplane = DataPlane(Repository([], Metrics(), mutable=False), Settings(), Metrics())
    routes = [route for room in ROUTERS for route in room.routes(dataplane)]

    found = {("post" if "POST" in (route.methods or ()) else "get", route.path) for route in routes}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_operation_answers_its_example_as_described(
    method: str, path: str, documented: Server, document: Any
) -> None:
    operation = document["paths"][path][method]
    address = documented.url + path.replace("{model}", "custom-model").replace("{version}", "1")
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")

    answer = httpx.request(method, address, json=resolved(document, body).get("example") if body else None, timeout=60)

    status = str(answer.status_code)
    assert status in operation["responses"], answer.text
    content = resolved(document, operation["responses"][status])["content"]
    schema = content[answer.headers["content-type"].partition(";")[0]]["schema"]
    if answer.headers["content-type"] == "application/json":
        OAS30Validator({**document, **schema}).validate(answer.json())  # its references lead into the document
        if path.endswith("/unload"):
            documented.post("/v2/repository/models/custom-model/load", "")


def resolved(document: Any, node: Any) -> Any:
    """The same, or what its $ref points to."""
    if "$ref" not in node:
        return node
    for name in node["$ref"].removeprefix("#/").split("/"):
        document = document[name]
    return document


@needs_browser
def test_the_page_shows_the_api_and_lets_people_try_it_out_with_no_internet(documented: Server) -> None:
    with opened(f"{documented.url}/docs") as (page, troubles):
        predict = page.locator(".opblock", has_text=":predict")
        predict.locator(".opblock-summary").click()
        predict.get_by_role("button", name="Try it out").click()
        predict.get_by_role("button", name="Execute").click()

        answer = predict.locator(".live-responses-table .response-col_status").nth(1)  # below the head of the table
        answer.wait_for()
        assert answer.inner_text() == "200"
        assert troubles == []
