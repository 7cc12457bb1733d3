"""How an export ends when it fails: one line, a distinct exit code, and nothing left that a server would load."""

from __future__ import annotations

from typing import ClassVar


class ExportError(Exception):
    """`str(error)` is the one line that says what to do."""

    exit_code: ClassVar[int]


class BadRequest(ExportError):
    """A wrong flag, an unknown architecture, or weights that do not fit it."""

    exit_code = 2


class WeightsMissing(ExportError):
    """The weights cannot be had: no network, no file, a wrong hash."""

    exit_code = 3


class PackageMissing(ExportError):
    """A package that the export needs, such as torch, is not installed."""

    exit_code = 12  # as the server's


class Mismatch(ExportError):
    """The exported model does not answer what the original answers."""

    exit_code = 4
