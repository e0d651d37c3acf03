"""`zcproto new` writes an application that works as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.limits import TIMEOUT
from zcproto.cli import main


@pytest.fixture
def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "shop"]) == 0
    return tmp_path / "shop"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def test_new_application_has_four_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["Containerfile", "app.py", "config.toml", "test_app.py"]
    assert main(["new", str(tmp_path / "shop")]) == 0
    assert sorted(path.name for path in (tmp_path / "shop").iterdir()) == names
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "shop" / name) for name in names]


def test_tests_of_a_new_application_pass(application: Path) -> None:
    done = run(application, "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_configuration_of_a_new_application_is_valid(application: Path) -> None:
    (application / "config.toml").write_text(
        (application / "config.toml").read_text().replace("port = 7443", "port = 0")
    )
    options = ("--app", "app:app", "--config", "config.toml", "--home", "home")
    done = run(application, "zcproto", "config", "check", *options)
    assert (done.returncode, done.stdout) == (0, "config.toml: valid\n"), done.stderr


@pytest.mark.usefixtures("application")
def test_existing_application_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    Path("shop", "app.py").write_text("mine")
    Path("shop", "Containerfile").unlink()
    assert main(["new", "shop"]) == 1
    assert "shop/app.py: already exists" in capsys.readouterr().err
    assert Path("shop", "app.py").read_text() == "mine"


def test_new_application_has_the_style_of_the_project(application: Path) -> None:
    for tool in (("ruff", "check"), ("ruff", "format", "--check")):
        done = run(application, *tool, ".")
        assert done.returncode == 0, done.stdout
