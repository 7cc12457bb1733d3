"""Errors of an export: each ends it with one line and an exit code of its own, and no model is left to load."""

from __future__ import annotations

from typing import ClassVar


class ExportError(Exception):
    """Base class. `str(error)` is the line that the user sees; it says what to do."""

    exit_code: ClassVar[int]


class UsageError(ExportError):
    """A flag's value makes no sense: an unknown architecture, or weights that do not fit it."""

    exit_code = 2


class WeightsUnavailable(ExportError):
    """The weights cannot be read or downloaded: no file, no network, or a wrong hash."""

    exit_code = 3


class VerificationError(ExportError):
    """The exported model's answers differ too much from the original's."""

    exit_code = 4


class DependencyMissing(ExportError):
    """A package that only the export needs, such as torch, is not installed."""

    exit_code = 12  # the server's exit code for a package that an extra installs


class OutputError(ExportError):
    """The model cannot be written: no permission, a full disk, or --output is not a directory."""

    exit_code = 6
