"""`zcproto session open`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.admin.test_https import ask, bearer
from tests.server.conftest import Serve, certs, serve, shared
from tests.server.helpers import KEY, ServerThread
from zcproto.cli import main
from zcproto.cli.connect import KEY_VARIABLE
from zcproto.sessions.token import token_from_text

__all__ = ["certs", "serve", "shared"]

Capture = pytest.CaptureFixture[str]


def command(server: ServerThread, *more: str, user: str = "ada") -> list[str]:
    ca = str(server.home / "certs" / "ca.crt")
    return ["session", "open", f"127.0.0.1:{server.port}", "--user", user, "--ca", ca, *more]


def key_file(folder: Path, key: str = KEY) -> str:
    path = folder / "key"
    path.write_text(key + "\n")
    path.chmod(0o600)
    return str(path)


def test_open_prints_only_a_valid_token(serve: Serve, tmp_path: Path, home: Path, capsys: Capture) -> None:
    server = serve()
    assert main(command(server, "--key-file", key_file(tmp_path))) == 0
    out, err = capsys.readouterr()
    token = token_from_text(out.removesuffix("\n"))
    assert token is not None
    assert ask(server, "/status.json", headers=bearer(token)).status == 200
    (record,) = server.in_loop(lambda: server.server.state.registry.records("ada", 10))
    assert record.client.startswith("zcproto-python/")
    assert err.startswith("session ")
    assert err.endswith(" UTC\n")
    assert out.strip() not in err


def test_open_reads_the_key_from_the_environment(
    serve: Serve, home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert main(command(serve())) == 0
    assert token_from_text(capsys.readouterr().out.strip()) is not None


def test_wrong_key_prints_no_token(shared: ServerThread, tmp_path: Path, home: Path, capsys: Capture) -> None:
    assert main(command(shared, "--key-file", key_file(tmp_path, "the wrong key"))) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "UNAUTHENTICATED" in err


def test_key_is_not_sent_to_an_untrusted_server(
    shared: ServerThread, tmp_path: Path, home: Path, capsys: Capture
) -> None:
    before = shared.stats["requests"]
    wrong = f"sha256/{'A' * 43}="
    assert main([*command(shared), "--pin", wrong, "--key-file", key_file(tmp_path)]) == 3
    assert "no connection" in capsys.readouterr().err
    assert shared.stats["requests"] == before


def test_missing_user_or_key_sends_nothing(shared: ServerThread, home: Path, capsys: Capture) -> None:
    assert main(["session", "open", f"127.0.0.1:{shared.port}"]) == 2
    assert "--user" in capsys.readouterr().err
    assert main(command(shared)) == 2
    assert "holds no key" in capsys.readouterr().err
