"""Test that the profile `long` applies to the state machines."""

from __future__ import annotations

import subprocess
import sys

PRINT_EXAMPLES = """
import tests.conftest
from hypothesis import settings
settings.load_profile({profile!r})
from tests.alerts.test_properties import TestAlerts
from tests.properties.test_both_ends import TestBothEnds
from tests.properties.test_server_conversation import TestServer
from tests.properties.test_session_registry import TestRegistry
machines = TestAlerts, TestBothEnds, TestRegistry, TestServer
print([(each.settings.max_examples, each.settings.deadline) for each in machines])
"""


def examples(profile: str) -> str:
    code = PRINT_EXAMPLES.format(profile=profile)
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_long_profile_replaces_the_settings_of_every_state_machine() -> None:
    assert examples("long") == str([(5_000, None)] * 4)
    assert examples("patient") == str([(count, None) for count in (40, 200, 40, 40)])
