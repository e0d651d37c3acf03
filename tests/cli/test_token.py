from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.audit_trail import lines_of
from zcproto.auth.tokens import TokenFile
from zcproto.cli import main
from zcproto.sessions.token import digest_of, token_from_text

Capture = pytest.CaptureFixture[str]


def test_create_prints_only_the_token_to_stdout_and_stores_its_digest(home: Path, capsys: Capture) -> None:
    assert main(["token", "create", "prometheus", "--scope", "metrics"]) == 0
    out, err = capsys.readouterr()
    token = token_from_text(out.removesuffix("\n"))
    assert token is not None
    assert "prometheus has a token until " in err
    assert out.strip() not in (home / "tokens.toml").read_text()
    file = TokenFile(home / "tokens.toml")
    file.load()
    entry = file.entries["prometheus"]
    assert (entry.digest, entry.scopes) == (digest_of(token), ("metrics",))
    assert entry.expires - entry.added == timedelta(days=90)


@pytest.mark.parametrize(("mode", "is_warned"), [("token", False), ("session", True)])
def test_scope_that_the_configuration_does_not_use_is_a_warning(
    mode: str, is_warned: bool, home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCPROTO_HTTP__METRICS", mode)
    for scope in ("metrics", "status"):
        assert main(["token", "create", scope, "--scope", scope]) == 0
        warning = (
            f'zcproto: http.metrics = "{mode}": /metrics takes no machine token; set it to "token" and run'
            " zcproto reload"
        )
        assert (warning in capsys.readouterr().err) is (is_warned and scope == "metrics")
    monkeypatch.setenv("ZCPROTO_HTTP__ENABLED", "false")
    assert main(["token", "create", "unread", "--scope", "status"]) == 0
    warning = (
        "zcproto: http.enabled = false: the server has nothing to read by a token; set it to true and restart"
    )
    assert warning in capsys.readouterr().err


def test_token_goes_to_a_private_file(home: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "token"
    scopes = ["--scope", "metrics", "--scope", "status"]
    create = ["token", "create", *scopes, "--expires", "12h", "--out", str(out)]
    assert main([*create, "a", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["name"], printed["scopes"], printed["file"]) == ("a", ["metrics", "status"], str(out))
    assert out.stat().st_mode & 0o777 == 0o600
    assert token_from_text(out.read_text().strip()) is not None
    before = out.read_text()
    assert main([*create, "b"]) == 1
    assert out.read_text() == before
    assert main([*create, "b", "--force"]) == 0
    assert out.read_text() != before
    assert capsys.readouterr().out == ""


def test_json_has_the_token_once(home: Path, capsys: Capture) -> None:
    assert main(["token", "create", "a", "--scope", "status", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert token_from_text(printed["token"]) is not None
    assert main(["token", "list", "--json"]) == 0
    out = capsys.readouterr().out
    assert printed["token"] not in out
    (listed,) = json.loads(out)
    shown = ("name", "scopes", "last_used", "expired")
    assert [listed[key] for key in shown] == ["a", ["status"], None, False]


def test_list_shows_use_and_expiry(home: Path, capsys: Capture) -> None:
    home.mkdir(0o700)
    file = TokenFile(home / "tokens.toml")
    now = datetime.now(UTC)
    file.add("valid", ("metrics", "status"), now, now + timedelta(days=1))
    file.add("over", ("metrics",), now - timedelta(days=2), now - timedelta(days=1))
    file.load()
    file.mark_used({"over": (file.entries["over"].digest, datetime(2026, 1, 2, 8, 30, tzinfo=UTC))})
    assert main(["token", "list"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["TOKEN", "SCOPES"]
    assert first.split()[:3] == ["valid", "metrics,", "status"]
    assert first.split()[-2:] == ["-", "valid"]
    assert "2026-01-02 08h UTC" in second
    assert second.split()[-1] == "expired"


def test_revoked_token_is_gone(home: Path, capsys: Capture) -> None:
    main(["token", "create", "a", "--scope", "status"])
    assert main(["token", "revoke", "a"]) == 0
    assert "a is revoked." in capsys.readouterr().err
    assert main(["token", "revoke", "a"]) == 1
    assert "zcproto token list" in capsys.readouterr().err


@pytest.mark.parametrize("time", ["", "0s", "59s", "398d", "10 years", "nan", "9" * 400 + "d"])
def test_lifetime_is_bounded(home: Path, capsys: Capture, time: str) -> None:
    assert main(["token", "create", "a", "--scope", "status", "--expires", time]) == 2
    assert "from 1m to 397d" in capsys.readouterr().err
    assert not (home / "tokens.toml").exists()


def test_scope_is_required_and_known(home: Path, capsys: Capture) -> None:
    assert main(["token", "create", "a"]) == 2
    assert main(["token", "create", "a", "--scope", "everything"]) == 2
    assert "metrics" in capsys.readouterr().err


def test_creation_and_revocation_are_in_the_audit_trail(home: Path, capsys: Capture) -> None:
    home.mkdir(0o700)
    (home / "config.toml").write_text(f'[log]\naudit_file = "{home / "audit"}"\n')
    main(["token", "create", "a", "--scope", "status"])
    main(["token", "revoke", "a"])
    main(["token", "revoke", "a"])
    assert capsys.readouterr().out.strip() not in (home / "audit").read_text()
    assert [(line["event"], line["what"], line["machine"]) for line in lines_of(home / "audit")] == [
        ("command.done", "tokens.create", "a"),
        ("command.done", "tokens.revoke", "a"),
        ("command.failed", "tokens.revoke", "a"),
    ]
