"""The audit trail of a running server: several processes, and a disk without space."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

from tests.audit_trail import lines_of
from tests.server.conftest import Serve
from tests.server.helpers import eventually
from tests.server.process import ServerProcess
from zcproto.alerts import AlertKind
from zcproto.cli import main
from zcproto.config.model import LogConfig
from zcproto.observe.log import configure_logging

TRAIL = """
[certificates]
key_types = ["ecdsa-p256"]

[log]
level = "error"
audit_file = "{trail}"
"""


def test_workers_write_one_trail_of_whole_lines_through_a_rotation(home: Path, certs: Path, key: str) -> None:
    trail, moved = home.with_name("audit"), home.with_name("audit.1")
    (home / "config.toml").write_text(TRAIL.format(trail=trail))
    with ServerProcess(home, certs, "--workers", "2") as server:
        for _ in range(8):
            with server.client("ada", key) as client:
                client.call("session.close")
        eventually(lambda: trail.read_text().count("session.closed") == 8)
        trail.rename(moved)
        server.signal(signal.SIGHUP)
        eventually(lambda: trail.exists() and "config.reloaded" in trail.read_text() + moved.read_text())
        assert main(["user", "disable", "ada", "--home", str(home)]) == 0
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    lines = [*lines_of(moved), *lines_of(trail)]
    counts = Counter(line["event"] for line in lines)
    assert counts["session.opened"] == counts["session.closed"] == 8
    assert {line["worker"] for line in lines} == {"coordinator", "1", "2"}
    (asked,) = [line for line in lines if line["event"] == "control.asked"]
    assert (asked["what"], asked["user"]) == ("users.disable", "ada")
    assert counts["users.changed"] == 1
    assert counts["user.gone"] == 1
    assert [line["event"] for line in lines_of(trail)][-1] == "server.ended"


def test_full_disk_stops_nothing_and_raises_an_alert(serve: Serve) -> None:
    configure_logging(LogConfig(level="error", audit_file=Path("/dev/full")))
    server = serve()

    def alert() -> str | None:
        found = server.in_loop(server.server.parts.alerts.center.open_alerts)
        return next((each.title for each in found if each.kind is AlertKind.AUDIT_NOT_WRITTEN), None)

    with server.client("ada") as client:
        eventually(alert)
        client.echo()
    assert "lines of the audit trail could not be written" in str(alert())
