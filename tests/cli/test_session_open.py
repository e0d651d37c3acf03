"""`zcproto session open`: a token for those who speak no ZCP/1."""

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


def test_the_token_is_all_that_is_printed_and_it_is_good(
    serve: Serve, tmp_path: Path, home: Path, capsys: Capture
) -> None:
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


def test_the_key_may_come_from_the_environment(
    serve: Serve, home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert main(command(serve())) == 0
    assert token_from_text(capsys.readouterr().out.strip()) is not None


def test_with_a_wrong_key_there_is_no_token(
    shared: ServerThread, tmp_path: Path, home: Path, capsys: Capture
) -> None:
    assert main(command(shared, "--key-file", key_file(tmp_path, "the wrong key"))) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "UNAUTHENTICATED" in err


def test_without_a_server_to_trust_no_key_is_sent(
    shared: ServerThread, tmp_path: Path, home: Path, capsys: Capture
) -> None:
    before = shared.stats["requests"]
    wrong = f"sha256/{'A' * 43}="
    assert main([*command(shared), "--pin", wrong, "--key-file", key_file(tmp_path)]) == 3
    assert "no connection" in capsys.readouterr().err
    assert shared.stats["requests"] == before


def test_without_a_user_or_a_key_nothing_is_sent(shared: ServerThread, home: Path, capsys: Capture) -> None:
    assert main(["session", "open", f"127.0.0.1:{shared.port}"]) == 2
    assert "--user" in capsys.readouterr().err
    assert main(command(shared)) == 2
    assert "holds no key" in capsys.readouterr().err
