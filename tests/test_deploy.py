"""deploy/: every manifest is valid for KServe, and its container starts and answers with exactly its arguments."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pinnace.runtimes.onnx import CUDA
from tests.support.cuda import HAS_CUDA
from tests.support.pods import Pod, run_pod, skip_without_namespaces
from tests.support.servers import PROJECT

SCHEMAS = PROJECT.parent / "shared/schema"
MANIFESTS = sorted((PROJECT / "deploy").glob("*.yaml"))
Manifest = Mapping[str, Any]


def documents(file: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(file.read_text()))


def containers(file: Path) -> Iterator[tuple[dict[str, Any], Manifest]]:
    """Every container and the pod specification that it is in."""
    for document in documents(file):
        spec = document["spec"].get("predictor", document["spec"])
        for container in spec.get("containers", []):
            yield container, spec


def unknown_fields(value: Any, schema: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Return the fields that a cluster would drop silently."""
    if isinstance(value, dict) and "properties" in schema:
        for name, inner in value.items():
            if name not in schema["properties"]:
                yield f"{path}.{name}"
            else:
                yield from unknown_fields(inner, schema["properties"][name], f"{path}.{name}")
    elif isinstance(value, list) and "items" in schema:
        for count, inner in enumerate(value):
            yield from unknown_fields(inner, schema["items"], f"{path}[{count}]")


@pytest.fixture(scope="module")
def schemas() -> Mapping[str, Any]:
    if not SCHEMAS.is_dir():
        pytest.skip(f"KServe's schemas are not at {SCHEMAS}")
    return {file.name.partition(".")[0]: json.loads(file.read_text()) for file in SCHEMAS.glob("*.json")}


@pytest.fixture(scope="module", params=[file for file in MANIFESTS if file.stem != "gpu"], ids=lambda file: file.stem)
def started(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[tuple[Pod, Manifest]]:
    """A manifest's container, with what KServe and Knative add to it."""
    skip_without_namespaces()
    ((container, _),) = containers(request.param)
    container["args"] = [argument.replace("{{.Name}}", "resnet") for argument in container["args"]]
    with run_pod(container["args"], environment_of(container), model_dir) as it:
        yield it, container


def environment_of(container: Manifest) -> dict[str, str]:
    given = {variable["name"]: variable["value"] for variable in container.get("env", [])}
    knative = {"PORT": str(container["ports"][0]["containerPort"])}
    return {"PATH": os.environ["PATH"], **knative, **given}


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_kserve_accepts_a_manifest_and_knows_each_of_its_fields(file: Path, schemas: Mapping[str, Any]) -> None:
    for document in documents(file):
        schema = schemas[document["kind"]]
        jsonschema.Draft202012Validator(schema).validate(document)  # not the schema itself, which takes seconds
        assert list(unknown_fields(document["spec"], schema["properties"]["spec"])) == []


def test_a_field_that_kserve_does_not_know_is_found(schemas: Mapping[str, Any]) -> None:
    (document,) = documents(PROJECT / "deploy/custom.yaml")
    document["spec"]["predictor"]["containers"][0]["argz"] = []
    spec_schema = schemas["InferenceService"]["properties"]["spec"]

    assert list(unknown_fields(document["spec"], spec_schema)) == [".predictor.containers[0].argz"]


def test_a_container_is_ready_with_exactly_its_arguments(started: tuple[Pod, Manifest]) -> None:
    pod, container = started

    name = next(argument for argument in container["args"] if argument.startswith("--model_name=")).partition("=")[2]
    ports = {pod.server.http_port, pod.server.grpc_port}
    assert pod.get_status(pod.server.http_port, f"/v2/models/{name}/ready") == 200
    assert {port["containerPort"] for port in container["ports"]} <= ports


def test_a_containers_probes_are_answered(started: tuple[Pod, Manifest]) -> None:
    pod, container = started

    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container.get(kind, {})
        if "httpGet" in probe:
            assert pod.get_status(probe["httpGet"]["port"], probe["httpGet"]["path"]) == 200
        if "grpc" in probe:
            assert pod.is_healthy(probe["grpc"]["port"])


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_kubernetes_waits_for_the_servers_own_drain(file: Path) -> None:
    for container, spec in containers(file):
        slept = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert slept + 25 <= spec.get("terminationGracePeriodSeconds", 30)
        if "terminationGracePeriodSeconds" in spec:
            assert slept + 25 < spec["terminationGracePeriodSeconds"]


def pod_specs(value: Any) -> Iterator[Manifest]:
    """Every pod specification in a manifest: a predictor's, or a pod template's."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in ("predictor", "template"):
                yield inner.get("spec", inner)
            yield from pod_specs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pod_specs(inner)


@pytest.mark.parametrize("file", [*MANIFESTS, PROJECT / "deploy/ray/rayservice.yaml"], ids=lambda file: file.stem)
def test_every_pod_disables_service_links(file: Path) -> None:
    """Otherwise Kubernetes adds variables per Service, such as PINNACE_HTTP_PORT=tcp://…, the name of a setting."""
    specs = [spec for document in documents(file) for spec in pod_specs(document["spec"])]

    assert [spec["enableServiceLinks"] for spec in specs] == [False] * max(1, len(specs))


def test_the_gpus_container_starts_on_a_gpu(model_dir: Path) -> None:
    if not HAS_CUDA:
        pytest.skip(f"no {CUDA} in this onnxruntime: on a GPU this starts deploy/gpu.yaml's container")
    ((container, _),) = containers(PROJECT / "deploy/gpu.yaml")
    with run_pod(container["args"], environment_of(container), model_dir) as it:
        assert it.get_status(8080, "/v2/health/ready") == 200
