"""`zcproto deploy` prints the files of a tool, or writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from zcproto.cli import main
from zcproto.cli.config import TOOLS, read_files


def test_systemd_units_are_printed_each_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "systemd"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("# zcproto.")] == [
        "# zcproto.service",
        "# zcproto.socket",
        "# zcproto.sysusers",
    ]
    assert "ListenStream=7443" in printed


def test_dashboard_is_printed_as_json_that_can_be_imported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "grafana"]) == 0
    assert json.loads(capsys.readouterr().out)["uid"] == "zcproto"


def test_manifests_are_printed_as_one_stream_of_documents(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "kubernetes"]) == 0
    printed = [each["kind"] for each in yaml.safe_load_all(capsys.readouterr().out)]
    assert printed[0] == "Namespace"
    assert {"Deployment", "StatefulSet", "PodDisruptionBudget", "NetworkPolicy"} <= {*printed}


@pytest.mark.parametrize("tool", TOOLS)
def test_files_are_written_to_a_folder_that_is_made(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a" / "b"
    assert main(["deploy", tool, "--out", str(folder)]) == 0
    assert {path.name: path.read_text() for path in folder.iterdir()} == read_files(tool)
    assert capsys.readouterr().out.splitlines() == [str(folder / name) for name in read_files(tool)]


def test_existing_file_is_replaced_only_with_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    existing = tmp_path / "alerts.yml"
    existing.write_text("mine")
    assert main(["deploy", "prometheus", "--out", str(tmp_path)]) == 1
    assert "already exists; --force replaces it" in capsys.readouterr().err
    assert existing.read_text() == "mine"
    assert main(["deploy", "prometheus", "--out", str(tmp_path), "--force"]) == 0
    assert existing.read_text() == read_files("prometheus")["alerts.yml"]


def test_folder_that_cannot_be_made_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["deploy", "systemd", "--out", str(tmp_path / "file" / "folder")]) == 1
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_unknown_tool_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "docker"]) == 2
    assert "docker" in capsys.readouterr().err
