"""Tests that `make test` leaves to a command of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest


def only_with(variable: str, reason: str, timeout_seconds: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a test as slow, and skips it unless the environment has the variable."""

    def mark(test: Callable[..., Any]) -> Callable[..., Any]:
        for one in (
            pytest.mark.skipif(variable not in os.environ, reason=reason),
            pytest.mark.slow,
            pytest.mark.timeout(timeout_seconds),
        ):
            test = one(test)
        return test

    return mark


needs_ray = only_with("TEST_RAY", "slow, and needs Ray: `make test-ray` runs it", 300)
"""Three minutes in all, and 450 MB to install."""

chaos = only_with("TEST_CHAOS", "slow: `make chaos` runs it", 900)
"""Several minutes in all."""
