"""Attacks at full strength beside a steady client: its predictions take at most 2 s, its probes at most 0.25 s."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks import Attack, calls, connections, frames, pictures
from tests.support.clients import make_v1_request
from tests.support.pictures import CAT
from tests.support.servers import run_server
from tests.support.steady_client import good_service

BODY = make_v1_request(CAT).encode()
ATTACKS = {
    "nothing": Attack(lambda _: None),
    **pictures.ATTACKS,
    **calls.ATTACKS,
    **frames.ATTACKS,
    **connections.ATTACKS,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_a_steady_client_is_served_in_time_during_an_attack_and_after_it(
    name: str, model_dir: Path, tmp_path: Path
) -> None:
    attack = ATTACKS[name]
    with run_server(f"--model_dir={model_dir}", *attack.flags) as server:
        with good_service(server, BODY, tmp_path):
            attack.run(server)
        assert server.stop() in (0, 8)
    assert "Traceback" not in (log := "".join(server.log)), log
