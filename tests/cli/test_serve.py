"""`zcproto serve`: loading the application, output, refused starts."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zcproto.app.app import App
from zcproto.cli import main
from zcproto.cli.serve import load_app
from zcproto.common.files import try_lock
from zcproto.config import Config, LogConfig
from zcproto.errors import ConfigError
from zcproto.observe.log import configure_logging
from zcproto.runtime import process_setup, run

Capture = pytest.CaptureFixture[str]

APPLICATION = """
from zcproto.app.app import App

api = App()
number = 5

@api.method("hello")
def hello() -> str:
    return "hello"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder with an application."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (folder / "shop_of_tests.py").write_text(APPLICATION)
    (folder / "package_of_tests").mkdir()
    (folder / "package_of_tests" / "api.py").write_text(APPLICATION)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith(("shop_of_tests", "package_of_tests", "broken_of_tests")):
            del sys.modules[name]


class Started:
    """Record the parameters of `serve` instead of running."""

    def __init__(self) -> None:
        self.app: App | None = None
        self.config: Config | None = None
        self.options: dict[str, Any] = {}
        self.count = 0

    def __call__(self, app: App | None, config: Config, **options: Any) -> None:
        self.app, self.config, self.options = app, config, options
        self.count += 1


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    started = Started()
    monkeypatch.setattr("zcproto.cli.serve.run_server", started)
    return started


# --- the application -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shop_of_tests:api", "package_of_tests.api:api"])
def test_application_of_the_current_folder_is_loaded(folder: Path, name: str) -> None:
    assert [method.name for method in load_app(name)] == ["hello"]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("shop_of_tests", "give the application as MODULE:APP"),
        ("shop_of_tests:", "give the application as MODULE:APP"),
        (":api", "give the application as MODULE:APP"),
        ("", "give the application as MODULE:APP"),
        (".shop_of_tests:api", "give the application as MODULE:APP"),
        ("..:api", "give the application as MODULE:APP"),
        ("package_of_tests..api:api", "give the application as MODULE:APP"),
        ("no_such_module:api", "no module 'no_such_module'"),
        ("package_of_tests.nothing:api", "no module 'package_of_tests.nothing'"),
        ("shop_of_tests:nothing", "shop_of_tests has no App object named 'nothing'; it has: api"),
        (
            "shop_of_tests.py:api",
            "no module 'shop_of_tests.py' in this folder or installed; write shop_of_tests:api",
        ),
        ("shop_of_tests:number", "shop_of_tests has no App object named 'number'"),
        ("shop_of_tests:api.hello", "has no App object named 'api.hello'"),
    ],
)
def test_missing_application_is_a_fault(folder: Path, name: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_app(name)
    (fault,) = raised.value.faults
    assert complaint in fault


BROKEN = "zcproto: 'broken_of_tests:api': broken_of_tests cannot be imported; correct what it raises:"


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        (
            "1 / 0",
            [
                BROKEN,
                "Traceback (most recent call last):",
                '  File "{file}", line 1, in <module>',
                "    1 / 0",
                "ZeroDivisionError: division by zero",
            ],
        ),
        (
            "def",
            [
                BROKEN,
                '  File "{file}", line 1',
                "    def",
                "SyntaxError: invalid syntax (broken_of_tests.py, line 1)",
            ],
        ),
        (
            "import no_such_dependency",
            [
                BROKEN,
                "Traceback (most recent call last):",
                '  File "{file}", line 1, in <module>',
                "    import no_such_dependency",
                "ModuleNotFoundError: No module named 'no_such_dependency'",
            ],
        ),
    ],
)
def test_application_that_cannot_be_imported_is_a_fault(
    folder: Path, source: str, lines: list[str], started: Started, capsys: Capture, home: Path
) -> None:
    file = folder / "broken_of_tests.py"
    file.write_text(source)
    assert main(["serve", "broken_of_tests:api"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", [line.format(file=file) for line in lines])
    assert started.count == 0


# --- options -------------------------------------------------------------------------------------------------


def test_options_override_the_configuration(home: Path, folder: Path, started: Started) -> None:
    home.mkdir(0o700)
    (home / "config.toml").write_text('[server]\nhost = "::"\nport = 1111\n[log]\nlevel = "error"')
    assert main(["serve"]) == 0
    assert started.app is None
    assert started.config is not None
    assert (started.config.server.host, started.config.server.port) == (("::",), 1111)
    assert started.options["home"] == home
    arguments = ["--host", "127.0.0.1", "--host", "::1", "--port", "0", "--log-level", "debug"]
    assert main(["serve", *arguments, "shop_of_tests:api"]) == 0
    assert started.app is not None
    assert (started.config.server.host, started.config.server.port) == (("127.0.0.1", "::1"), 0)
    assert started.config.log.level == "debug"


@pytest.mark.parametrize(
    "arguments", [["--port", "65536"], ["--port", "x"], ["--host", "a b"], ["--log-level", "loud"], ["--x"]]
)
def test_wrong_options_start_nothing(
    home: Path, started: Started, capsys: Capture, arguments: list[str]
) -> None:
    assert main(["serve", *arguments]) == 2
    assert capsys.readouterr().out == ""
    assert started.count == 0


def test_serve_prints_addresses_and_progress(
    home: Path, started: Started, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["serve"])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    started.options["listening"]([("127.0.0.1", 7443), ("::1", 7443)])
    started.options["progress"]("Making keys.")
    out, err = capsys.readouterr()
    assert out == "zcproto: listening on 127.0.0.1:7443\nzcproto: listening on [::1]:7443\n"
    assert err == "zcproto: Making keys.\n"


def test_progress_is_logged_without_a_terminal(home: Path, started: Started, capsys: Capture) -> None:
    main(["serve"])
    configure_logging(LogConfig(format="json"))
    started.options["progress"]("Making keys.")
    started.options["progress"]("ATTENTION: clients need another CA.")
    lines = map(json.loads, capsys.readouterr().err.splitlines())
    assert [(each["level"], each["event"], each["message"]) for each in lines] == [
        ("info", "certificate.progress", "Making keys."),
        ("warning", "certificate.attention", "ATTENTION: clients need another CA."),
    ]


# --- no start without what it needs ----------------------------------------------------------------------------


@pytest.fixture
def prepared(home: Path, certs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home.mkdir(0o700)
    shutil.copytree(certs, home / "certs")
    (home / "config.toml").write_text('[certificates]\nkey_types = ["ecdsa-p256"]\n[server]\nport = 0')
    # Do not tune this process: it runs other tests too.
    monkeypatch.setattr(process_setup, "raise_file_limit", lambda wanted: 1_000_000)
    monkeypatch.setattr(run, "harden", lambda environ: [])
    return home


def refused(capsys: Capture, *arguments: str) -> str:
    assert main(["serve", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o666])
def test_key_readable_by_others_is_refused_with_the_fix(prepared: Path, capsys: Capture, mode: int) -> None:
    path = prepared / "certs" / "server-ecdsa.key"
    path.chmod(mode)
    assert f"chmod 600 {path}" in refused(capsys)
    assert path.read_text().splitlines()[1] not in refused(capsys)


def test_second_server_of_a_home_folder_changes_nothing(prepared: Path, capsys: Capture) -> None:
    shutil.rmtree(prepared / "certs")
    held = try_lock(prepared / "control.lock")
    assert held is not None
    before = sorted(prepared.rglob("*"))
    assert f"{prepared}: a server runs with this home folder; stop it, or give this one another" in refused(
        capsys
    )
    assert sorted(prepared.rglob("*")) == before
    os.close(held)


def test_port_in_use_is_refused(prepared: Path, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = refused(capsys, "--port", str(port))
    assert f"server.port = {port}: cannot listen: Address already in use" in text


@pytest.mark.requirement("fallback", "configuration")
@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda home: (home / "certs" / "ca.key").chmod(0o644), "ca.key"),
        (lambda home: home.chmod(0o770), "chmod go-w"),
        (lambda home: (home / "users.toml").write_text("users = 5"), "users.toml"),
        (lambda home: (home / "config.toml").write_text("[servr]"), "did you mean"),
        (
            lambda home: (home / "config.toml").chmod(0o666),
            "others can change this file (mode 0666); run: chmod",
        ),
    ],
)
def test_unusable_configuration_starts_nothing(
    prepared: Path, capsys: Capture, spoil: Callable[[Path], Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind(*args: Any) -> Any:
        raise AssertionError("a port was bound")

    monkeypatch.setattr("zcproto.runtime.server.bind", bind)
    spoil(prepared)
    assert word in refused(capsys)
