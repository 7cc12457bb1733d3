"""README.md: its commands run and give the answers shown, and its tables equal the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pinnace.errors import ServingError, StartupError
from pinnace.grpc.inference import InferenceService
from pinnace.http.app import ROUTERS
from pinnace.inference.dataplane import DataPlane
from pinnace.inference.repository import Repository
from pinnace.observability.metrics import Metrics
from pinnace.process.flags import default_text, environment_variable
from pinnace.settings import GROUPS, Settings
from tests.support.pictures import MODES
from tests.support.servers import PROJECT, Server, run_server

README = (PROJECT / "README.md").read_text()


def read_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def read_commands() -> list[str]:
    return [line for block in read_blocks("sh") for line in block.splitlines()]


def read_command(start: str) -> str:
    (found,) = [line for line in read_commands() if line.startswith(start)]
    return found


def read_table(heading: str) -> list[list[str]]:
    """Return the cells of the table that follows `heading`, row by row, without backticks and without the head."""
    _, _, rest = README.partition(heading)
    rows = rest.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split("|")] for row in rows]


def run_command(line: str, server: Server, **environment: str) -> str:
    """Run a command of the README with the server's address instead of localhost:8080, and return its output."""
    words = [word.replace("localhost:8080", server.url) for word in shlex.split(line)]
    words[0] = {".venv/bin/python": sys.executable, "python3": sys.executable}.get(words[0], words[0])
    done = subprocess.run(
        words, cwd=PROJECT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_the_first_request_gets_the_answer_shown(server: Server) -> None:
    answer = json.loads(run_command(read_command('curl -H "Content-Type: application/json"'), server))

    (shown,) = json.loads(read_blocks("json")[0])["predictions"]
    assert answer["predictions"] == [pytest.approx(shown, abs=1e-3)]


@pytest.mark.parametrize("name", ["grpc_client", "rest_client"])
def test_the_clients_print_the_classes_shown(name: str, server: Server) -> None:
    port = server.grpc_port if name == "grpc_client" else server.http_port

    (line,) = [line for line in read_commands() if f"clients.{name}" in line]
    printed = run_command(line, server, INGRESS_HOST="127.0.0.1", INGRESS_PORT=str(port))

    (shown,) = [block for block in read_blocks("text") if block.startswith("examples/picture.jpg")]
    assert printed.splitlines()[1:] == shown.splitlines()[1:]


def test_curl_sends_a_picture(server: Server) -> None:
    printed = run_command(read_command('curl -H "Content-Type: image/jpeg"'), server)

    assert len(json.loads(printed)["predictions"][0]) == 5


def test_make_input_makes_a_request_from_a_picture(server: Server) -> None:
    line, _, file = read_command("python3 clients/make_input.py").partition(" > ")

    request = run_command(line, server)

    assert file == "input.json"
    assert server.predict(request).json() == json.loads(
        run_command(read_command('curl -H "Content-Type: application/json"'), server)
    )


@pytest.fixture(scope="module")
def iris(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Follow the README's example in a new folder: train the model, and write the predictor."""
    folder = tmp_path_factory.mktemp("iris")
    making, predictor = read_blocks("python")
    (folder / "make_iris.py").write_text(making)
    python, *words = shlex.split(read_command(".venv/bin/python make_iris.py"))
    assert python == ".venv/bin/python"
    subprocess.run([sys.executable, "-W", "error", *words], cwd=folder, check=True, timeout=60)
    (folder / "iris.py").write_text(predictor)
    return folder


def read_flags(folder: Path, line: str) -> list[str]:
    """Return the flags of a command of the README, with the model's path in `folder`."""
    return [word.replace("iris.onnx", f"{folder}/iris.onnx") for word in shlex.split(line)[2:]]


def list_rows(answer: Any) -> Any:
    """Return rows of numbers of one shape, so that they can be compared."""
    return [[row["label"], *row["probabilities"]] for row in answer["predictions"]]


def test_the_example_predictor_gives_the_answer_shown(iris: Path) -> None:
    flags = read_flags(iris, read_command(".venv/bin/python app.py --model_name=iris"))

    with run_server(*flags, environment={**os.environ, "PYTHONPATH": str(iris)}) as server:
        answer = json.loads(run_command(read_command("curl localhost:8080/v1/models/iris"), server))
        refused = server.post("/v1/models/iris:predict", '{"instances": [[1, 2]]}')
        assert server.get("/v2/models/iris").json()["inputs"] == [{"name": "X", "datatype": "FP32", "shape": [-1, 4]}]

    np.testing.assert_allclose(list_rows(answer), list_rows(json.loads(read_blocks("json")[1])), atol=1e-3)
    assert (refused.status_code, refused.json()) == (400, {"error": "the input must be four numbers per row"})


def test_the_versions_that_the_example_installs_are_tested() -> None:
    pins = read_command(".venv/bin/python -m pip install scikit-learn").partition(" install ")[2].split()

    tested = (PROJECT / "requirements-test.txt").read_text().split()
    assert set(pins) <= set(tested)


def test_the_command_for_several_models_serves_them(model_dir: Path, iris: Path) -> None:
    line = read_command(".venv/bin/python app.py --model=pictures").replace("=model,", f"={model_dir},")

    with run_server(*read_flags(iris, line), environment={**os.environ, "PYTHONPATH": str(iris)}) as server:
        assert server.get("/v2/models").json() == {"models": ["pictures", "iris"]}
        answer = json.loads(run_command(read_command("curl localhost:8080/v1/models/iris"), server))
        assert [row["label"] for row in answer["predictions"]] == [0, 2]


def test_the_example_predictor_has_about_twenty_lines() -> None:
    assert len(read_blocks("python")[1].strip().splitlines()) <= 22


def test_the_error_texts_of_troubleshooting_are_in_the_code() -> None:
    code = "".join(file.read_text() for file in (PROJECT / "pinnace").rglob("*.py"))
    shown = [row[0] for row in re.findall(r"^\| (`.*?) \| (.*) \|$", README.partition("| what you see |")[2], re.M)]
    texts = [text for cell in shown for text in re.findall("`(.*?)`", cell)]

    texts = texts[: texts.index("an API key is required") + 1]  # the texts after it are not ours
    assert len(texts) > 10
    for text in texts:
        assert text in code, text


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{file.name}" for file in (PROJECT / "docs").glob("*.md"))])
def test_every_link_to_a_file_is_valid(page: str) -> None:
    text = (PROJECT / page).read_text()

    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (PROJECT / page).parent.joinpath(target).is_file(), target
    assert page == "README.md" or "```" not in text  # only the README's commands are run by tests


def test_every_other_command_is_run_by_ci() -> None:
    ran_here = [
        'curl -H "Content-Type: application/json"',
        'curl -H "Content-Type: image/jpeg"',
        "curl localhost:8080/v1/models/iris",
        "python3 clients/make_input.py",
        ".venv/bin/python -m clients",
        ".venv/bin/python -m pip install scikit-learn",  # installed with the test tools
        ".venv/bin/python make_iris.py",
        "python3 -m clients.rest_client",
        ".venv/bin/python app.py --model_name=iris",
        ".venv/bin/python app.py --model=pictures",
    ]
    ran_by_ci = [
        line for script in ("run", "serve", "package") for line in (PROJECT / ".ci" / script).read_text().splitlines()
    ]

    others = [line for line in read_commands() if not line.startswith(tuple(ran_here))]
    assert others
    for line in others:
        assert [run for run in ran_by_ci if line in run], line


def test_the_settings_table_equals_the_code() -> None:
    shown = read_table("A flag overrides its environment variable, which overrides the default.\n\n")

    starts = {shown[index + 1][0]: row[0] for index, row in enumerate(shown) if row[0].startswith("**")}
    assert starts == {f"--{first}": f"**{title}**" for first, title in GROUPS.items()}
    assert [row for row in shown if row[0].startswith("--")] == [
        [
            f"--{entry.name}",
            environment_variable(entry.name),
            default_text(entry.default),
            entry.metadata["help"],
        ]
        for entry in fields(Settings)
    ]


def test_the_table_of_manifests_names_every_file() -> None:
    assert {row[0] for row in read_table("that you built and pushed.\n\n")} == {
        file.name for file in (PROJECT / "deploy").glob("*.yaml")
    }


def test_the_rest_table_has_every_route_of_the_server() -> None:
    dataplane = DataPlane(Repository([], Metrics(), mutable=False), Settings(), Metrics())
    found = [route for router in ROUTERS for route in router.routes(dataplane)]

    shown = {row[0] for row in read_table("The HTTP port is 8080.\n\n")}
    assert shown == {f"{'POST' if 'POST' in route.methods else 'GET'} {route.path}" for route in found if route.methods}


def test_the_grpc_table_has_every_method_of_the_server() -> None:
    dataplane = DataPlane(Repository([], Metrics(), mutable=False), Settings(), Metrics())
    methods = InferenceService(dataplane).unary.keys()

    shown = {
        name for row in read_table("the service `inference.GRPCInferenceService`.\n\n") for name in row[0].split(", ")
    }
    assert shown == methods


def test_the_output_table_equals_the_model_metadata(server: Server) -> None:
    shown = [row[:2] for row in read_table("Outputs over V2 and gRPC:\n\n")]

    outputs = server.get("/v2/models/custom-model").json()["outputs"]
    assert shown == [[output["name"], f"{output['datatype']} [rows, {output['shape'][1]}]"] for output in outputs]


def test_the_metrics_table_equals_the_code() -> None:
    text, _ = Metrics().render("")
    families = list(text_string_to_metric_families(text.decode()))

    shown = [row[0] for row in read_table("\n## Metrics\n\n")]
    assert shown == [family.name for family in families if family.name.startswith(("request_", "pinnace_"))]


def test_the_error_table_has_every_status_of_the_code() -> None:
    shown = {(int(row[0]), row[1]) for row in read_table("with the same text over gRPC.\n\n")}

    assert shown == {(kind.http_status, kind.grpc_status) for kind in ServingError.__subclasses__()}


def test_the_table_of_exit_codes_equals_the_code() -> None:
    shown = {int(row[0]): row[1] for row in read_table("and an exit code per cause:\n\n")}

    meanings = {
        kind.exit_code: str(kind.__doc__).splitlines()[0].rstrip(".").lower() for kind in StartupError.__subclasses__()
    }
    assert {code: text.lower() for code, text in shown.items() if code} == meanings


def test_the_number_of_image_kinds_is_correct() -> None:
    assert f"{len(MODES)} kinds of image" in README


def test_the_direct_requirements_are_thirteen() -> None:
    pins = [
        line
        for name in ("requirements/base.txt", "requirements/cpu.txt")
        for line in (PROJECT / name).read_text().splitlines()
    ]

    assert len([line for line in pins if "==" in line]) == 13
