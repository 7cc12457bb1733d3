"""The house: every room on its floor, using only those below; small files; a server that knows no export."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.servers import PROJECT

FLOORS = {
    "app": 8,
    "serving.lifecycle": 7,
    "serving.transports": 6,
    "serving.dataplane": 5,
    "serving.models": 4,
    "serving.classifier": 4,
    "serving.predictor": 3,
    "serving.engine": 2,
    "serving.image": 2,
    "serving.logs": 2,
    "serving.model_card": 2,
    "serving.tensors": 2,
    "serving.cpus": 1,
    "serving.errors": 1,
    "serving.metrics": 1,
    "serving.settings": 1,
    "proto": 1,
    "serving": 0,
}
# On one floor, these few lean on a neighbour.
NEIGHBOURS = {("serving.settings", "serving.errors"), ("serving.transports", "serving.transports"), ("proto", "proto")}
LONGEST_FILE_LINES = 250
MOST_LINES = 3000

RUNTIME = [PROJECT / "app.py", *(PROJECT / "serving").rglob("*.py"), PROJECT / "proto/wire.py"]


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str | None:
    """The room that a module of ours belongs to; None for other people's."""
    while module and module not in FLOORS:
        module = module.rpartition(".")[0]
    return module or None


def imported_by(file: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("file", RUNTIME, ids=module_of)
def test_a_room_uses_only_the_floors_below(file: Path) -> None:
    room = room_of(module_of(file))
    assert room is not None, f"{file} is on no floor"

    for module in imported_by(file):
        used = room_of(module)
        if used is not None and (room, used) not in NEIGHBOURS:
            assert FLOORS[used] < FLOORS[room], f"{room} uses {used}"


@pytest.mark.parametrize("file", RUNTIME, ids=module_of)
def test_the_server_knows_neither_the_export_nor_torch(file: Path) -> None:
    imported = {module.partition(".")[0] for module in imported_by(file)}

    assert not imported & {"model_export", "torch", "torchvision", "onnx", "clients", "tests"}


@pytest.mark.parametrize("file", RUNTIME, ids=module_of)
def test_a_file_is_read_in_one_sitting(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST_FILE_LINES


def test_the_whole_runtime_stays_small() -> None:
    lines = [line.strip() for file in RUNTIME for line in file.read_text().splitlines()]

    assert len([line for line in lines if line and not line.startswith("#")]) <= MOST_LINES
