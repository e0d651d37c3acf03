"""Commands that change files themselves are in the audit trail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.audit_trail import lines_of
from zcproto.cli import main


@pytest.fixture
def trail(home: Path) -> Path:
    home.mkdir(0o700)
    trail = home / "audit"
    (home / "config.toml").write_text(f'[log]\naudit_file = "{trail}"\n')
    return trail


def shown(trail: Path) -> list[tuple[Any, ...]]:
    lines = lines_of(trail)
    assert {(line["uid"], line["pid"]) for line in lines} == {(os.getuid(), os.getpid())}
    keys = ("event", "what", "user", "device", "roles", "sessions")
    return [tuple(line.get(key) for key in keys) for line in lines]


def test_changes_without_a_server_are_recorded_with_their_outcome(trail: Path, tmp_path: Path) -> None:
    assert main(["user", "add", "ada", "--role", "billing"]) == 0
    assert main(["user", "add", "ada"]) == 2
    assert main(["user", "disable", "ada"]) == 0
    assert main(["user", "add", "robot", "--count", "3", "--out", str(tmp_path / "keys")]) == 0
    assert main(["device", "remove", "laptop"]) == 1
    assert main(["session", "revoke", "--user", "ada"]) == 0
    assert main(["session", "list"]) == 0
    assert shown(trail) == [
        ("command.done", "users.add", "ada", None, ["billing"], None),
        ("command.failed", "users.add", "ada", None, None, None),
        ("command.done", "users.disable", "ada", None, None, 0),
        ("command.done", "users.add", "robot-1 to robot-3", None, [], None),
        ("command.failed", "devices.remove", None, "laptop", None, None),
        ("command.done", "sessions.revoke", "ada", None, None, 0),
    ]


def test_pairing_code_is_recorded_without_the_code(trail: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["user", "add", "ada", "--no-key"])
    capsys.readouterr()
    assert main(["pair"]) == 0
    assert shown(trail)[1:] == [("command.done", "pair", "ada", None, None, None)]
    assert capsys.readouterr().out.split()[0] not in trail.read_text()


def test_client_certificates_are_recorded(trail: Path) -> None:
    assert main(["cert", "issue-client", "ada"]) == 0
    assert main(["cert", "revoke-client", "ada"]) == 0
    assert [line[:3] for line in shown(trail)] == [
        ("command.done", "certificates.issue_client", "ada"),
        ("command.done", "certificates.revoke_client", "ada"),
    ]


def test_nothing_is_changed_without_the_trail(
    home: Path, trail: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trail.mkdir()
    assert main(["user", "add", "ada"]) == 2
    assert "log.audit_file" in capsys.readouterr().err
    assert not (home / "users.toml").exists()
