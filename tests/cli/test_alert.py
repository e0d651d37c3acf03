"""`zcproto alert`, without a server."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path

import pytest

from tests.alerts.receiver import Receiver, answer
from tests.conftest import ServerPairs
from zcproto.alerts.sinks import sign
from zcproto.cli import main
from zcproto.common.secret import Secret

SECRET = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "webhook.secret"
    path.write_text(f"{SECRET}\n")
    path.chmod(0o600)
    return path


def configure(home: Path, *lines: str) -> None:
    home.mkdir(mode=0o700, exist_ok=True)
    (home / "config.toml").write_text("\n".join(["[alerts]", *lines]))


def test_test_alert_is_sent_to_all_sinks(
    home: Path,
    secret_file: Path,
    server_pairs: ServerPairs,
    ca_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "got"
    pair = server_pairs.ecdsa
    with Receiver((pair.certificate, pair.key)) as receiver:
        configure(
            home,
            f'webhook = "{receiver.url}"',
            f'webhook_secret_file = "{secret_file}"',
            f'webhook_ca_file = "{ca_file}"',
            f'command = ["/bin/sh", "-c", "cat > {place}; echo paged ops"]',
        )
        assert main(["alert", "test"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert rows[1][:3] == ["webhook", f"localhost:{receiver.port}", "arrived"]
    assert rows[2][:3] == ["command", "/bin/sh", "arrived"]
    assert out.rstrip().endswith("exit code 0: paged ops")
    (request,) = receiver.received
    assert place.read_bytes() == request.body + b"\n"
    message = json.loads(request.body)
    assert (message["alert"]["kind"], message["phase"]) == ("alerts.test", "began")
    assert SECRET not in out
    assert "/hook" not in out, "the address may be a secret"
    # The received message can be verified.
    signature = request.headers["zcproto-signature"]
    body = tmp_path / "body"
    body.write_bytes(request.body)
    assert main(["alert", "verify", "--signature", signature, str(body)]) == 0
    assert capsys.readouterr().out.startswith("valid")


def test_failed_sink_is_reported_and_the_other_still_tried(
    home: Path, server_pairs: ServerPairs, ca_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = server_pairs.ecdsa
    with Receiver((pair.certificate, pair.key), answer(401)) as receiver:
        configure(
            home,
            f'webhook = "{receiver.url}"',
            f'webhook_ca_file = "{ca_file}"',
            'command = ["/bin/true"]',
        )
        assert main(["alert", "test", "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert (first["sink"], first["arrived"], first["said"]) == ("webhook", False, "localhost answered 401")
    assert (second["sink"], second["arrived"], second["said"]) == ("command", True, "exit code 0")
    assert len(receiver.received) == 1, "one try"


def test_alert_test_without_sinks_fails(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.mkdir(0o700)
    assert main(["alert", "test"]) == 1
    assert "set alerts.webhook or alerts.command in" in capsys.readouterr().out
    assert main(["alert", "test", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == []


def test_invalid_alert_configuration_is_reported(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(home, 'command = ["/no/such/program"]')
    assert main(["alert", "test"]) == 2
    assert "alerts.command: /no/such/program cannot be run" in capsys.readouterr().err
    configure(home, 'webhook = "http://alerts.example.com/"')
    assert main(["alert", "test"]) == 2
    assert "alerts.webhook" in capsys.readouterr().err


# --- verify -------------------------------------------------------------------------------------------------


def wall() -> int:
    return time.time_ns() // 1_000_000


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def verify(secret_file: Path, signature: str) -> int:
    return main(["alert", "verify", "--signature", signature, "--secret-file", str(secret_file)])


def test_webhook_signature_is_verified(
    home: Path, secret_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signature = sign(Secret(SECRET), b"{}", wall())
    stdin(monkeypatch, b"{}")
    assert verify(secret_file, signature) == 0
    stdin(monkeypatch, b"{} ")
    assert verify(secret_file, signature) == 1
    stdin(monkeypatch, b"{}")
    assert verify(secret_file, sign(Secret(SECRET), b"{}", wall() - 3_600_000)) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "valid: signed with the secret, and recent"
    assert out[1] == "the signature does not match: wrong secret or changed body"
    assert "s old: 300 s are allowed" in out[2]


def test_verify_needs_a_secret_and_a_message_of_bounded_size(
    home: Path, secret_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home.mkdir(0o700)
    assert main(["alert", "verify", "--signature", "x", os.devnull]) == 2
    assert "use --secret-file" in capsys.readouterr().err
    stdin(monkeypatch, bytes(1_048_577))
    assert verify(secret_file, "x") == 2
    secret_file.chmod(0o644)
    assert verify(secret_file, "x") == 2
    err = capsys.readouterr().err
    assert "has more than 1048576 bytes" in err
    assert "others can read or change this file" in err
