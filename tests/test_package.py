"""The package: what the wheel holds, and that it serves where it is installed, without the checkout."""

from __future__ import annotations

import email.message
import email.parser
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

import pinnace
from pinnace.version import __version__
from tests.support.servers import PROJECT, run_command

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
EXTRAS = {"cpu", "gpu", "export", "ray", "storage"}
DOUBLER = """
from pinnace import Arrays, InvalidInput, Predictor, Request, Response, Tensor, TensorSpec


class Doubler(Predictor):
    inputs = (TensorSpec("x", "FP64", (-1,)),)

    def preprocess(self, request: Request) -> Arrays:
        if request.input.datatype != "FP64":
            raise InvalidInput("numbers are wanted")
        return {"x": request.input.array}

    def predict(self, rows: Arrays) -> Arrays:
        return {"y": 2 * rows["x"]}

    def postprocess(self, predictions: Arrays, request: Request) -> Response:
        return Response([Tensor("y", predictions["y"])])
"""


@dataclass(frozen=True)
class Installation:
    """An environment with the wheel in it, and a directory, which is not the checkout, to work in."""

    environment: Path
    directory: Path

    @property
    def python(self) -> str:
        return str(self.environment / "bin/python")

    @property
    def command(self) -> str:
        return str(self.environment / "bin/pinnace")

    @property
    def packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", vars={"base": str(self.environment)}))

    def run(self, *command: str, shadow: Path | None = None) -> tuple[int, str, str]:
        """Exit code, standard output and standard error; modules in `shadow` come before installed ones."""
        environment = {**clean_environment(), **({"PYTHONPATH": str(shadow)} if shadow else {})}
        done = subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        return done.returncode, done.stdout, done.stderr


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, as a clone would be."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (PROJECT / name).is_file():  # and not removed since
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if find_spec("setuptools") else []
    command = [*PIP, "wheel", "--quiet", "--no-deps", *isolation, "--wheel-dir", str(folder), str(clone)]
    subprocess.run(command, check=True, timeout=120)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"pinnace-{__version__}.dist-info/METADATA").decode()
    return email.parser.Parser().parsestr(text)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel in a new environment, which finds the requirements in the environment of the tests."""
    installation = Installation(tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("directory"))
    venv.create(installation.environment)
    command = [*PIP, "--python", installation.python, "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, timeout=120)
    (installation.packages / "requirements.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (installation.directory / "doubler.py").write_text(DOUBLER)
    return installation


def listed(folder: str) -> set[str]:
    return {str(file.relative_to(PROJECT)) for file in (PROJECT / folder).rglob("*.py")}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_the_wheel_holds_the_two_packages_with_their_files_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}

    pages = {"pinnace/http/page.html", "pinnace/http/openapi.yaml"}
    typed = {"pinnace/py.typed", "pinnace/proto/generated/py.typed"}
    assert names == listed("pinnace") | listed("model_export") | pages | typed


def test_the_metadata_name_the_version_the_licence_and_the_extras(metadata: email.message.Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("pinnace", __version__)
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS


def test_the_requirements_are_those_of_the_files_that_pip_reads_and_no_engine_is_among_them(
    metadata: email.message.Message,
) -> None:
    requirements = metadata.get_all("Requires-Dist", [])
    pins = {
        name: {line.split("#")[0].strip() for line in file.read_text().splitlines() if "==" in line}
        for name, file in {file.stem: file for file in (PROJECT / "requirements").iterdir()}.items()
    }

    assert pins.keys() == {"base", *EXTRAS}
    assert {line for line in requirements if ";" not in line} == pins["base"]
    for extra in EXTRAS:
        assert {line.split(";")[0] for line in requirements if line.endswith(f'extra == "{extra}"')} == pins[extra]
    assert not [line for line in pins["base"] if line.startswith("onnxruntime")]


def test_every_requirement_has_its_reason_beside_it() -> None:
    lines = [line for file in (PROJECT / "requirements").iterdir() for line in file.read_text().splitlines()]

    assert [line for line in lines if "==" in line and not re.search(r"  # \w", line)] == []


def test_the_constraints_pin_and_say_nothing_of_where_packages_come_from() -> None:
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    recipe = (PROJECT / "Makefile").read_text().partition("\nconstraints:")[2].partition("\n\n")[0]
    made_by = next(line for line in lines if "uv pip compile" in line).strip("# ")

    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; .+)?", line)] == []
    assert set(made_by.split()) <= set(recipe.replace("$(VENV)/bin/", "").split())
    for name in ("base", "cpu", "ray", "storage"):
        direct = re.findall(r"^[\w-]+", (PROJECT / f"requirements/{name}.txt").read_text(), re.MULTILINE)
        assert {package.lower() for package in direct} <= {line.partition("==")[0] for line in pins}


@pytest.mark.parametrize("command", [["pinnace"], ["python", "-m", "pinnace"]], ids=" ".join)
def test_the_installed_command_and_module_say_their_version(command: Sequence[str], installed: Installation) -> None:
    path = str(installed.environment / "bin" / command[0])

    assert installed.run(path, *command[1:], "--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("started_as", ["pinnace serve", "python -m pinnace serve", "python CLONE/app.py"])
def test_a_predictor_in_the_working_directory_is_served(
    started_as: str, workers: int, installed: Installation, clone: Path
) -> None:
    program, *words = started_as.replace("CLONE", str(clone)).split()
    port = free_port()
    flags = ["--predictor=doubler:Doubler", "--host=127.0.0.1", f"--http_port={port}", "--grpc_port=0"]
    command = [str(installed.environment / "bin" / program), *words, *flags, f"--workers={workers}"]

    with run_command(command, clean_environment(), installed.directory) as server:
        answer = server.predict('{"instances": [1.5, 2.5]}')
        refused = server.predict('{"instances": [1]}')
        healthy = installed.run(installed.python, "-m", "pinnace.process.healthcheck", str(server.process.pid))
        assert server.stop() == 0

    assert answer.json() == {"predictions": [3.0, 5.0]}
    assert (refused.status_code, refused.json()) == (400, {"error": "numbers are wanted"})
    assert healthy == (0, "", "")


def test_a_check_says_what_would_be_served(installed: Installation) -> None:
    code, shown, said = installed.run(installed.command, "check", "--predictor=doubler:Doubler")

    assert (code, said) == (0, "")
    assert shown.startswith("custom-model: ready\n")


def test_a_model_is_looked_for_in_the_working_directory(installed: Installation, model_dir: Path) -> None:
    link = installed.directory / "model"
    link.symlink_to(model_dir)
    try:
        code, shown, _ = installed.run(installed.command, "check")
    finally:
        link.unlink()

    assert code == 0
    assert shown.startswith("custom-model: architecture alexnet, ")


def test_app_py_looks_for_a_model_beside_itself_from_any_directory(
    clone: Path, installed: Installation, model_dir: Path
) -> None:
    link = clone / "model"
    link.symlink_to(model_dir)
    try:
        code, shown, _ = installed.run(installed.python, str(clone / "app.py"), "--check")
    finally:
        link.unlink()

    assert code == 0
    assert shown.startswith("custom-model: architecture alexnet, ")


def test_no_model_is_looked_for_beside_installed_packages(installed: Installation, model_dir: Path) -> None:
    link, app = installed.packages / "model", installed.packages / "app.py"
    link.symlink_to(model_dir)
    app.touch()
    try:
        code, shown, said = installed.run(installed.command, "check")
    finally:
        link.unlink()
        app.unlink()

    assert (code, shown, len(said.splitlines())) == (4, "", 1)
    assert said.startswith("pinnace: no model in /mnt/models nor in model/: export one with `pinnace export`")


@pytest.fixture
def missing(tmp_path: Path) -> Path:
    """A directory whose modules hide ONNX Runtime and torch, as if neither were installed."""
    for name in ("onnxruntime", "torch"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('No module named {name}')\n")
    return tmp_path


@pytest.mark.parametrize("command", ["serve", "check"])
def test_without_an_engine_a_start_ends_in_one_line_that_says_what_to_install(
    command: str, installed: Installation, missing: Path
) -> None:
    ended = installed.run(installed.command, command, f"--model_dir={missing}", "--http_port=0", shadow=missing)

    assert ended == (
        12,
        "",
        "pinnace: ONNX Runtime cannot be imported (No module named onnxruntime): run `pip install 'pinnace[cpu]'`, or "
        "`pip install 'pinnace[gpu]'` for an NVIDIA GPU\n",
    )


def test_a_predictor_that_needs_no_engine_is_served_without_one(installed: Installation, missing: Path) -> None:
    assert installed.run(installed.command, "check", "--predictor=doubler:Doubler", shadow=missing)[0] == 0


def test_without_its_extra_an_export_ends_in_one_line_that_says_what_to_install(
    installed: Installation, missing: Path
) -> None:
    (missing / "onnxruntime.py").unlink()

    code, _, said = installed.run(installed.command, "export", "--weights=seeded:0", shadow=missing)

    assert (code, len(said.splitlines())) == (12, 1)
    assert said.startswith("pinnace: the export needs torch")
    assert "`pip install 'pinnace[cpu,export]'`" in said


def test_importing_pinnace_imports_no_library(installed: Installation) -> None:
    code = "import json, sys, pinnace; print(json.dumps([*sys.modules]))"
    _, printed, _ = installed.run(installed.python, "-c", code)

    imported = {name.partition(".")[0] for name in json.loads(printed)}
    libraries = {"onnxruntime", "PIL", "numpy", "starlette", "hypercorn", "grpc", "betterproto2", "asyncio", "logging"}
    assert "pinnace" in imported
    assert not imported & libraries


def test_importing_every_module_leaves_the_process_as_it_was(installed: Installation) -> None:
    """Ray's modules apart: they need Ray, which is not installed everywhere."""
    code = """
import importlib, os, pkgutil, signal, sys, pinnace
before = dict(os.environ), [*sys.path], signal.getsignal(signal.SIGTERM)
for module in pkgutil.walk_packages(pinnace.__path__, "pinnace."):
    if ".ray_" not in module.name:
        importlib.import_module(module.name)
after = dict(os.environ), [*sys.path], signal.getsignal(signal.SIGTERM)
print(before == after, "pinnace.http.server" in sys.modules, "onnxruntime" in sys.modules)
"""
    assert installed.run(installed.python, "-c", code) == (0, "True True False\n", "")


@pytest.mark.parametrize("name", pinnace.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(pinnace, name)

    assert name in dir(pinnace)
    assert name == "__version__" or value.__doc__


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pinnace' has no attribute 'Batcher'"):
        pinnace.Batcher  # type: ignore[attr-defined]  # noqa: B018
