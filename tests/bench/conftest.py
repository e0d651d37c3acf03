from __future__ import annotations

import pytest

from bench.scenarios.helper import Helper
from tests.limits import TIMEOUT
from tests.load.helpers import wait_long

LIMITS = {
    "curves.tokens": ["TIMEOUT"],
    "peers.calls": ["SLICE_S", "START_S"],
    "peers.measure": ["END_S", "START_S", "TIMEOUT_S"],
    "requirements.measures": ["MICRO_TIMEOUT_S", "TIMEOUT_S"],
    "scenarios.accelerator_fuzz": ["START_S"],
    "scenarios.churning_clients": ["DISCONNECT_S"],
    "scenarios.failover": ["FAILED_OVER_S", "IN_ORDER_S"],
    "scenarios.harness": ["ANSWER_S", "LAST_ANSWERS_S"],
    "scenarios.helper": ["END_S"],
    "scenarios.matrix_cells": ["ATTEMPT_S", "PROBE_S", "RETRY_S"],
    "scenarios.matrix_site": ["RECOVER_S"],
    "scenarios.outages": ["NEWS_S", "RECOVER_S"],
    "scenarios.readers": ["DELIVERY_S"],
    "scenarios.rolling_restart": ["RESTART_S"],
    "scenarios.rotation": ["CONNECTION_S", "GONE_S"],
    "scenarios.sessions": ["RETRY_S"],
    "scenarios.soak": ["GONE_S", "RECOVER_S", "SEEN_S"],
    "scenarios.soak_clients": ["NO_ANSWER_S", "SERVER_S"],
    "scenarios.storm_clients": ["DISCONNECT_S"],
    "scenarios.worker_kills": ["GONE_S"],
    "server_process": ["_START_S"],
    "valkey": ["_START_S"],
}
"""Constants of `bench` that bound how long something may take that must happen."""

IN_HELPERS = (
    "bench.scenarios.harness.CALL_S",
    "bench.scenarios.harness.LAST_ANSWERS_S",
    "zcproto.load.caller.TIMEOUT",
)
"""Those for processes of clients."""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scenarios wait for all that must happen, however slow the machine is."""
    wait_long(monkeypatch)
    for module, names in LIMITS.items():
        for name in names:
            monkeypatch.setattr(f"bench.{module}.{name}", TIMEOUT)
    monkeypatch.setattr(Helper, "constants", dict.fromkeys(IN_HELPERS, TIMEOUT))
