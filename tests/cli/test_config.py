from __future__ import annotations

from pathlib import Path

import pytest
import tomli

from zcproto.cli import main
from zcproto.config import config_as_toml, load_config

Capture = pytest.CaptureFixture[str]


@pytest.mark.requirement("first_run")
def test_init_writes_a_private_file(home: Path, capsys: Capture) -> None:
    assert main(["config", "init"]) == 0
    assert (
        capsys.readouterr().out == f"{home}/config.toml: written; uncomment the keys that you want to set\n"
    )
    assert (home / "config.toml").stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("free_default_port")
def test_file_of_init_is_valid(home: Path, capsys: Capture) -> None:
    main(["config", "init"])
    capsys.readouterr()
    assert main(["config", "check"]) == 0
    assert capsys.readouterr() == (f"{home}/config.toml: valid\n", "")


def test_init_loses_no_configuration(home: Path, capsys: Capture) -> None:
    home.mkdir(mode=0o700)
    file, kept = home / "config.toml", home / "config.toml~"
    assert main(["config", "init", "--force"]) == 0
    file.write_text("[server]\nport = 1")
    capsys.readouterr()
    assert main(["config", "init"]) == 1
    assert capsys.readouterr().err == (
        f"zcproto: {file}: already exists; zcproto config check finds its faults, --force keeps it as {kept}\n"
    )
    assert file.read_text() == "[server]\nport = 1"
    assert main(["config", "init", "--force"]) == 0
    assert f"{file}: written, the old one is {kept}; uncomment" in capsys.readouterr().out
    assert file.read_text().startswith("# Configuration of zcproto.")
    assert kept.read_text() == "[server]\nport = 1"
    assert main(["config", "init", "--force"]) == 1
    assert capsys.readouterr().err == f"zcproto: {kept}: is a replaced configuration; move it away first\n"
    assert kept.read_text() == "[server]\nport = 1"


def test_init_with_config_creates_no_home(home: Path, tmp_path: Path) -> None:
    assert main(["config", "init", "--config", str(tmp_path / "zc.toml")]) == 0
    assert (tmp_path / "zc.toml").exists()
    assert not home.exists()


def test_init_writes_the_certificate_folder_of_the_home(home: Path) -> None:
    main(["config", "init"])
    assert f'#directory = "{home}/certs"' in (home / "config.toml").read_text()


@pytest.mark.requirement("configuration")
def test_check_prints_each_fault_on_a_line(home: Path, capsys: Capture) -> None:
    home.mkdir(mode=0o700)
    (home / "config.toml").write_text("[server]\nprot = 7443\nport = 70000\n[limits]\nmax_streams = 0")
    assert main(["config", "check"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "zcproto: server.prot = 7443 (config.toml): unknown key; did you mean server.port?",
        "zcproto: server.port = 70000 (config.toml): must be a whole number from 1 to 65535, or 0 for any free"
        " port",
        "zcproto: limits.max_streams = 0 (config.toml): must be a whole number from 1 to 65535",
    ]


def test_check_includes_the_environment(home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir(0o700)
    monkeypatch.setenv("ZCPROTO_SERVER__PORT", "x")
    assert main(["config", "check"]) == 2
    assert capsys.readouterr().err.startswith('zcproto: server.port = "x" (ZCPROTO_SERVER__PORT): must be')


def test_check_includes_the_home_folder(home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir()
    home.chmod(0o777)
    (home / "config.toml").touch()
    monkeypatch.setenv("ZCPROTO_SERVER__PORT", "-1")
    assert main(["config", "check"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"zcproto: {home}: others can change this folder (mode 0777); run: chmod go-w {home}"
    assert second.startswith("zcproto: server.port = -1")


@pytest.mark.usefixtures("free_default_port")
@pytest.mark.requirement("configuration")
def test_check_creates_nothing(home: Path, capsys: Capture) -> None:
    home.mkdir(0o700)
    assert main(["config", "check"]) == 0
    note = (
        f"{home}/config.toml does not exist, so all keys have their defaults; zcproto config init writes it"
    )
    assert capsys.readouterr().out == f"valid: {note}\n"
    assert list(home.iterdir()) == []


@pytest.mark.usefixtures("free_default_port")
def test_check_prints_the_given_file(tmp_path: Path, home: Path, capsys: Capture) -> None:
    (tmp_path / "zc.toml").write_text("")
    assert main(["config", "check", "--config", str(tmp_path / "zc.toml")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/zc.toml: valid\n"
    assert main(["config", "check", "--config", str(tmp_path / "absent.toml")]) == 2


def test_show_prints_the_effective_settings(
    home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir(mode=0o700)
    (home / "config.toml").write_text('[server]\nport = 1\n[sessions]\nidle_timeout = "90m"')
    monkeypatch.setenv("ZCPROTO_SERVER__PORT", "2")
    assert main(["config", "show"]) == 0
    out = capsys.readouterr().out
    shown = tomli.loads(out)
    assert (shown["server"]["port"], shown["sessions"]["idle_timeout"]) == (2, "90m")
    assert out == config_as_toml(load_config(None, home=home, environ={"ZCPROTO_SERVER__PORT": "2"}))


def test_show_changed_prints_only_what_differs_from_the_defaults(
    home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir(mode=0o700)
    assert main(["config", "show", "--changed"]) == 0
    assert capsys.readouterr().out == ""
    (home / "config.toml").write_text('[server]\nport = 1\nhost = "127.0.0.1"\n[alerts]\nrepeat = "5m"')
    monkeypatch.setenv("ZCPROTO_ALERTS__WEBHOOK", "https://h.example/secret")
    assert main(["config", "show", "--changed"]) == 0
    out = capsys.readouterr().out
    assert out == '[server]\nport = 1\n\n[alerts]\nwebhook = "https://h.example/(hidden)"\nrepeat = "5m"\n'


def test_sites_are_checked_and_shown(home: Path, capsys: Capture) -> None:
    home.mkdir(mode=0o700)
    (home / "config.toml").write_text(
        '[[certificates.site]]\nnames = ["A.example"]\ncertificate = ["/a.pem"]'
    )
    assert main(["config", "show"]) == 0
    out = capsys.readouterr().out
    assert '\n[[certificates.site]]\nnames = ["a.example"]\ncertificate = ["/a.pem"]\nkey = []\n' in out
    (home / "config.toml").write_text('[[certificates.site]]\nnames = ["a.example", "::1"]')
    assert main(["config", "check"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(
        'zcproto: certificates.site[0].names[1] = "::1" (config.toml): must be a DNS name'
    )
    assert second.startswith(
        "zcproto: certificates.site[0].certificate = (nothing) (config.toml): must be a list of 1 to 2"
    )


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("valkey://zcp:hunter2@db.example:6379/1", "valkey://zcp:(hidden)@db.example:6379/1"),
        ("rediss+sentinel://:hunter2@a,b/service", "rediss+sentinel://:(hidden)@a,b/service"),
        ("valkey://zcp@db.example", "valkey://zcp@db.example"),
        ("sqlite", "sqlite"),
    ],
)
def test_show_hides_passwords(
    url: str, shown: str, home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir(0o700)
    monkeypatch.setenv("ZCPROTO_STORE__URL", url)
    assert main(["config", "show"]) == 0
    out = capsys.readouterr().out
    assert tomli.loads(out)["store"]["url"] == shown
    assert "hunter2" not in out


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://hooks.example.com/T0/hunter2", "https://hooks.example.com/(hidden)"),
        ("https://hooks.example.com:8443?key=hunter2", "https://hooks.example.com:8443?(hidden)"),
        ("http://localhost:9000/", "http://localhost:9000/"),
        ("", ""),
    ],
)
def test_show_hides_the_path_of_a_webhook(
    url: str, shown: str, home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir(0o700)
    monkeypatch.setenv("ZCPROTO_ALERTS__WEBHOOK", url)
    assert main(["config", "show"]) == 0
    assert tomli.loads(capsys.readouterr().out)["alerts"]["webhook"] == shown


def test_show_prints_faults_instead(home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir(0o700)
    monkeypatch.setenv("ZCPROTO_HTTP__ENABLED", "perhaps")
    assert main(["config", "show"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert 'http.enabled = "perhaps" (ZCPROTO_HTTP__ENABLED): must be true or false' in err
