"""The house: every room on its floor, using only those below; small files; a server that knows no export."""

from __future__ import annotations

import ast
import tokenize
from pathlib import Path

import pytest

from tests.servers import PROJECT

FLOORS = {
    "app": 10,
    "serving.ray_app": 10,
    "serving.healthcheck": 9,
    "serving.lifecycle": 9,
    "serving.supervisor": 9,
    "serving.check": 9,
    "serving.summary": 5,
    "serving.transports": 8,
    "serving.dataplane": 6,
    "serving.admission": 2,
    "serving.credentials": 2,
    "serving.models": 8,
    "serving.ray_engine": 7,
    "serving.ray_replica": 7,
    "serving.local_model": 6,
    "serving.repository": 5,
    "serving.model": 4,
    "serving.classifier": 4,
    "serving.batching": 5,
    "serving.runs": 4,
    "serving.latency": 3,
    "serving.threads": 3,
    "serving.predictor": 3,
    "serving.command_line": 2,
    "serving.engine": 2,
    "serving.image": 2,
    "serving.logs": 2,
    "serving.model_card": 2,
    "serving.tensors": 2,
    "serving.cpus": 1,
    "serving.errors": 1,
    "serving.metrics": 1,
    "serving.settings": 1,
    "serving.directory_lock": 0,
    "serving.shared_weights": 1,
    "serving.storage": 2,
    "serving.sockets": 1,
    "proto": 1,
    "serving.memory": 0,
    "serving": 0,
}
# On one floor, these few lean on a neighbour.
NEIGHBOURS = {
    ("serving.ray_engine", "serving.ray_replica"),
    ("serving.check", "serving.lifecycle"),
    ("serving.shared_weights", "serving.errors"),
    ("serving.sockets", "serving.errors"),
    ("serving.transports", "serving.transports"),
    ("proto", "proto"),
}
LONGEST_FILE_LINES = 250
MOST_LINES = 4800
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}

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


def code_lines(file: Path) -> set[int]:
    """As the usual counters count: neither blank, nor comment, nor docstring."""
    docstrings = {
        line
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    with file.open("rb") as text:
        tokens = [token for token in tokenize.tokenize(text.readline) if token.type not in NO_CODE]
    return {line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings


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
    assert sum(len(code_lines(file)) for file in RUNTIME) <= MOST_LINES
