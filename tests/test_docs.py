"""pinnace/http/docs.py: the OpenAPI document and its page."""

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
from tests.support.browser import needs_browser, open_page
from tests.support.servers import Server, run_server

OPERATIONS = [
    (method, path)
    for path, entry in yaml.safe_load(DOCUMENT.read_text())["paths"].items()
    for method in entry
    if method in ("get", "post")
]


@pytest.fixture(scope="module")
def documented(model_dir: Path) -> Iterator[Server]:
    with run_server(f"--model_dir={model_dir}", "--enable_docs_url=true", "--enable_model_repository=true") as server:
        yield server


@pytest.fixture(scope="module")
def document(documented: Server) -> Any:
    return documented.get("/openapi.json").json()


def test_the_document_is_valid_openapi_and_names_the_models(document: Any) -> None:
    validate(document)

    assert document["info"]["version"] == __version__
    assert document["components"]["parameters"]["Model"]["schema"]["enum"] == ["custom-model"]


def test_the_document_is_always_served_and_the_page_only_with_the_flag(server: Server) -> None:
    assert server.get("/openapi.json").headers["content-type"] == "application/json"
    assert [server.get(path).status_code for path in ("/docs", "/docs/swagger-ui.css", "/redoc")] == [404, 404, 404]


def test_the_document_has_every_route_of_the_server() -> None:
    dataplane = DataPlane(Repository([], Metrics(), mutable=False), Settings(), Metrics())
    routes = [route for router in ROUTERS for route in router.routes(dataplane)]

    found = {("post" if "POST" in (route.methods or ()) else "get", route.path) for route in routes}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_response_to_each_operations_example_matches_its_schema(
    method: str, path: str, documented: Server, document: Any
) -> None:
    operation = document["paths"][path][method]
    address = documented.url + path.replace("{model}", "custom-model").replace("{version}", "1")
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")

    answer = httpx.request(method, address, json=resolve(document, body).get("example") if body else None, timeout=60)

    status = str(answer.status_code)
    assert status in operation["responses"], answer.text
    content = resolve(document, operation["responses"][status])["content"]
    schema = content[answer.headers["content-type"].partition(";")[0]]["schema"]
    if answer.headers["content-type"] == "application/json":
        OAS30Validator({**document, **schema}).validate(answer.json())  # its $refs refer to the document
        if path.endswith("/unload"):
            documented.post("/v2/repository/models/custom-model/load", "")


def resolve(document: Any, node: Any) -> Any:
    """Return `node`, or what its $ref refers to."""
    if "$ref" not in node:
        return node
    for name in node["$ref"].removeprefix("#/").split("/"):
        document = document[name]
    return document


@needs_browser
def test_the_page_shows_the_api_and_sends_requests_without_internet(documented: Server) -> None:
    with open_page(f"{documented.url}/docs") as (page, problems):
        predict = page.locator(".opblock", has_text=":predict")
        predict.locator(".opblock-summary").click()
        predict.get_by_role("button", name="Try it out").click()
        predict.get_by_role("button", name="Execute").click()

        answer = predict.locator(".live-responses-table .response-col_status").nth(1)  # below the head of the table
        answer.wait_for()
        assert answer.inner_text() == "200"
        assert problems == []
