"""`zcproto session`: list and revoke in the store and at a remote server; open."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.admin.https_client import ask, bearer
from tests.cli.helpers import HOUR_MS, fill, id_of, kept, new_session, secrets_of
from tests.server.conftest import Serve
from tests.server.helpers import KEY, ServerThread
from zcproto.auth import UserFile
from zcproto.cli import main
from zcproto.client.options import KEY_VARIABLE
from zcproto.common.roles import OPERATORS
from zcproto.sessions.token import id_from_text, token_from_text
from zcproto.stores.base import MAX_LISTED

Capture = pytest.CaptureFixture[str]


def listed(capsys: Capture, *options: str) -> list[dict[str, Any]]:
    assert main(["session", "list", "--json", *options]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


# --- in the store --------------------------------------------------------------------------------------------


def test_session_list_without_a_store_creates_nothing(home: Path, capsys: Capture) -> None:
    home.mkdir(mode=0o700)
    assert listed(capsys) == []
    assert main(["session", "list"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["ID", "USER"]
    assert main(["session", "revoke", "--all"]) == 0
    assert list(home.iterdir()) == []


def test_sessions_are_listed_oldest_first_without_secrets(home: Path, capsys: Capture) -> None:
    sessions = [
        new_session("ada", 24 * 40 * HOUR_MS),
        new_session("ada", 25 * HOUR_MS),
        new_session("bob", 2 * HOUR_MS, roles=OPERATORS, client="b/1"),
        new_session("ada", HOUR_MS, key="device:phone", client="a/1"),
    ]
    fill(home, *sessions)
    found = listed(capsys)
    assert [each["id"] for each in found] == [id_of(session) for session in sessions]
    assert [(each["user"], each["roles"], each["bound"]) for each in found[2:]] == [
        ("bob", ["operator"], False),
        ("ada", [], True),
    ]
    assert [each["id"] for each in listed(capsys, "--user", "bob")] == [id_of(sessions[2])]
    assert listed(capsys, "--user", "unknown") == []
    assert main(["session", "list"]) == 0
    out = capsys.readouterr().out
    head, over, lapsed, operator, bound = out.splitlines()
    assert head.split("  ")[0] == "ID"
    assert over.endswith("over")
    assert lapsed.endswith("to be refreshed")
    assert operator.endswith("open, operator")
    assert bound.endswith("open, bound")
    for session in sessions:
        for secret in secrets_of(session):
            assert secret not in out
            assert secret not in str(found)


def test_client_name_is_escaped_for_the_terminal(home: Path, capsys: Capture) -> None:
    fill(home, new_session("ada", client="\x1b[2J\nx"))
    assert main(["session", "list"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2
    assert out.replace("\n", "").isprintable()
    assert main(["session", "list", "--json"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_sessions_are_revoked_by_id_by_user_and_all(home: Path, capsys: Capture) -> None:
    sessions = [new_session(user) for user in ("ada", "ada", "bob", "bob", "eve")]
    fill(home, *sessions)
    first, second = id_of(sessions[0]), id_of(sessions[2])
    assert main(["session", "revoke", first, second, first]) == 0
    assert capsys.readouterr().err == "2 sessions ended\n"
    assert main(["session", "revoke", "--user", "bob"]) == 0
    assert capsys.readouterr().err == "1 session ended\n"
    assert [record.user for record in kept(home)] == ["ada", "eve"]
    assert main(["session", "revoke", "--all"]) == 0
    assert capsys.readouterr().err == "2 sessions ended\n"
    assert kept(home) == []


def test_id_with_a_leading_dash_is_not_an_option(home: Path, capsys: Capture) -> None:
    ids = ["-" * 21 + "A", "-user" + "A" * 17, "-h" + "A" * 20]  # the last begins as --help
    dashed = []
    for text in ids:
        session, raw = new_session(), id_from_text(text)
        assert raw is not None
        dashed.append(session._replace(record=session.record._replace(id=raw)))
    fill(home, *dashed)
    assert main(["session", "revoke", ids[0], "--json", "--", ids[1], ids[2]]) == 0
    assert json.loads(capsys.readouterr().out) == {"revoked": 3}


@pytest.mark.parametrize("ids", [["A" * 22], ["no id"], ["A" * 22, "B" * 22]])
def test_unknown_id_is_reported(home: Path, capsys: Capture, ids: list[str]) -> None:
    session = new_session()
    fill(home, session)
    assert main(["session", "revoke", *ids]) == 1
    assert "0 sessions ended" in capsys.readouterr().err
    assert main(["session", "revoke", id_of(session), *ids]) == 1
    assert "1 session ended" in capsys.readouterr().err
    assert kept(home) == []


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["A" * 22, "--all"],
        ["--all", "--user", "ada"],
        ["A" * 22, "--user", "ada"],
        [f"x{n}" for n in range(1_001)],
        ["--usr", "ada"],
        ["-x"],
    ],
)
def test_ambiguous_selection_is_wrong_usage(home: Path, capsys: Capture, options: list[str]) -> None:
    fill(home, new_session())
    assert main(["session", "revoke", *options]) == 2
    assert len(kept(home)) == 1


def test_memory_store_needs_the_server(home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir(0o700)
    monkeypatch.setenv("ZCPROTO_STORE__URL", "memory")
    for command in (["list"], ["revoke", "--all"]):
        assert main(["session", *command]) == 2
        assert "zcproto session list --server HOST:PORT --operator NAME" in capsys.readouterr().err


def test_incomplete_list_is_noted(home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcproto.cli.backends.MAX_LISTED", 2)
    fill(home, new_session(), new_session())
    assert main(["session", "list"]) == 0
    assert "the list ends after 2 sessions" in capsys.readouterr().err
    assert MAX_LISTED > 1_000


# --- at a server ---------------------------------------------------------------------------------------------


class Running:
    """A server with the key of an operator in a file."""

    def __init__(self, server: ServerThread, keys: dict[str, str], key_file: Path) -> None:
        self.server = server
        self.keys = keys
        key_file.write_text(keys["root"])
        key_file.chmod(0o600)
        self.options = [
            *("--server", f"127.0.0.1:{server.port}", "--operator", "root", "--key-file", str(key_file)),
        ]


@pytest.fixture
def running(tmp_path: Path, home: Path, certs: Path) -> Iterator[Running]:
    home.mkdir(mode=0o700)
    users = UserFile(home / "users.toml")
    keys = {name: users.add(name) for name in ("ada", "bob")}
    keys["root"] = users.add("root", roles=OPERATORS)
    with ServerThread(home, certs, users_file=True) as server:
        yield Running(server, keys, tmp_path / "root.key")


def test_remote_server_lists_sessions_for_an_operator(running: Running, capsys: Capture) -> None:
    with running.server.client() as client:
        client.open_session("ada", running.keys["ada"])
        found = listed(capsys, *running.options)
        assert [each["user"] for each in found] == ["ada", "root"]
        assert found[0]["id"] == client.opened["id"]
        assert [each["user"] for each in listed(capsys, "--user", "ada", *running.options)] == ["ada"]
        assert main(["session", "list", *running.options]) == 0
        assert client.opened["id"] in capsys.readouterr().out


def test_remote_server_revokes_sessions_for_an_operator(running: Running, capsys: Capture) -> None:
    with running.server.client() as ada, running.server.client() as bob:
        ada.open_session("ada", running.keys["ada"])
        bob.open_session("bob", running.keys["bob"])
        assert main(["session", "revoke", ada.opened["id"], *running.options]) == 0
        assert ada.event().value == ["session.revoked", {"reason": "revoked by an operator"}]
        bob.echo()
        assert main(["session", "revoke", "--user", "bob", *running.options]) == 0
        bob.event()
        capsys.readouterr()
        assert main(["session", "revoke", "A" * 22, *running.options]) == 1
        assert "no session has this ID" in capsys.readouterr().err
        assert main(["session", "revoke", "--all", *running.options]) == 0


def test_remote_server_refuses_users_who_are_not_operators(
    running: Running, capsys: Capture, tmp_path: Path
) -> None:
    key_file = tmp_path / "ada.key"
    key_file.write_text(running.keys["ada"])
    key_file.chmod(0o600)
    options = [*running.options[:2], "--operator", "ada", "--key-file", str(key_file)]
    assert main(["session", "list", *options]) == 1
    assert "PERMISSION_DENIED" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--server", "127.0.0.1:1"],
        ["--operator", "root"],
        ["--key-file", "x"],
        ["--ca", "x"],
        ["--pin", "x"],
    ],
)
def test_server_and_operator_options_go_together(home: Path, capsys: Capture, options: list[str]) -> None:
    assert main(["session", "list", *options]) == 2
    assert "--server" in capsys.readouterr().err


def test_missing_key_or_malformed_pin_sends_nothing(
    home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ["--server", "127.0.0.1:1", "--operator", "root"]
    monkeypatch.delenv("ZCPROTO_KEY", raising=False)
    assert main(["session", "list", *server]) == 2
    assert "no key is given; use --key-file FILE" in capsys.readouterr().err
    monkeypatch.setenv("ZCPROTO_KEY", "A" * 43)
    assert main(["session", "list", *server, "--pin", "nonsense"]) == 2


@pytest.mark.parametrize("is_pinned", [False, True])
def test_remote_server_is_trusted_by_pin(running: Running, capsys: Capture, is_pinned: bool) -> None:
    trust = ["--pin", running.server.server.pins[0]] if is_pinned else []
    assert len(listed(capsys, *running.options, *trust)) == 1


Sqlite = Callable[[], ServerThread]


def test_store_in_use_is_reported(home: Path, capsys: Capture) -> None:
    fill(home, new_session())
    with ExitStack() as stack:
        holder = stack.enter_context(open(home / "sessions.db.lock", "r+"))
        import fcntl

        fcntl.flock(holder, fcntl.LOCK_EX)
        for command in (["list"], ["revoke", "--all"]):
            assert main(["session", *command]) == 2
            err = capsys.readouterr().err
            assert "a server runs with these sessions" in err
            assert "--server HOST:PORT" in err
    assert len(listed(capsys)) == 1


# --- open ----------------------------------------------------------------------------------------------------


def open_command(server: ServerThread, *more: str, user: str = "ada") -> list[str]:
    ca = str(server.home / "certs" / "ca.crt")
    return ["session", "open", f"127.0.0.1:{server.port}", "--user", user, "--ca", ca, *more]


def key_file(folder: Path, key: str = KEY) -> str:
    path = folder / "key"
    path.write_text(key + "\n")
    path.chmod(0o600)
    return str(path)


def test_open_prints_only_a_valid_token(serve: Serve, tmp_path: Path, home: Path, capsys: Capture) -> None:
    server = serve()
    assert main(open_command(server, "--key-file", key_file(tmp_path))) == 0
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
    assert main(open_command(serve())) == 0
    assert token_from_text(capsys.readouterr().out.strip()) is not None


def test_wrong_key_prints_no_token(shared: ServerThread, tmp_path: Path, home: Path, capsys: Capture) -> None:
    assert main(open_command(shared, "--key-file", key_file(tmp_path, "the wrong key"))) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "UNAUTHENTICATED" in err


def test_key_is_not_sent_to_an_untrusted_server(
    shared: ServerThread, tmp_path: Path, home: Path, capsys: Capture
) -> None:
    before = shared.stats["requests"]
    wrong = f"sha256/{'A' * 43}="
    assert main([*open_command(shared), "--pin", wrong, "--key-file", key_file(tmp_path)]) == 3
    assert "no connection" in capsys.readouterr().err
    assert shared.stats["requests"] == before


def test_missing_user_or_key_sends_nothing(shared: ServerThread, home: Path, capsys: Capture) -> None:
    assert main(["session", "open", f"127.0.0.1:{shared.port}"]) == 2
    assert "--user" in capsys.readouterr().err
    assert main(open_command(shared)) == 2
    assert "no key is given" in capsys.readouterr().err
