"""Attacks on a server at full strength: what one hostile client, or two, can do to it. One module per kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.support.servers import Server


@dataclass(frozen=True)
class Attack:
    """An attack, and the flags of the server that it needs. `run` returns when the attack has ended."""

    run: Callable[[Server], None]
    flags: tuple[str, ...] = ()
