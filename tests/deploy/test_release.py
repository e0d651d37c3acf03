"""Releases are signed by keys that are listed, and not built before one is."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.support import needs
from tests.limits import TIMEOUT

ROOT = Path(__file__).parent.parent.parent
SIGNERS = ROOT / ".ci" / "release-signers"
POLICY = (ROOT / "SECURITY.md").read_text()


def run(*command: str, cwd: Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, cwd=cwd, input=data, capture_output=True, timeout=TIMEOUT, check=False)


def test_release_without_signers_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    release = shutil.copy(ROOT / ".ci" / "release", tmp_path / ".ci")
    (tmp_path / ".ci" / "release-signers").write_text("# none\n\n")
    done = run("bash", release, "v1", "key", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        b".ci/release-signers: no key may sign releases yet; add one as SECURITY.md describes\n"
    )


@needs("git")
def test_ready_lists_what_a_release_lacks(tmp_path: Path) -> None:
    ready = runpy.run_path(str(ROOT / ".ci" / "ready"), run_name="versions")
    for name in (".ci/ready", "pyproject.toml", *ready["VERSIONS"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def lacks() -> list[str]:
        done = run(sys.executable, str(tmp_path / ".ci" / "ready"), cwd=tmp_path)
        lines = done.stdout.decode().splitlines()
        assert done.returncode == (not lines[0].startswith("ready:")), done
        return [line.partition(": ")[0] for line in lines]

    def write(changelog: str, protocol: str, signers: str) -> None:
        (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {changelog}\n\n## 0.0.1, 2020-01-01\n")
        (tmp_path / "spec").mkdir(exist_ok=True)
        (tmp_path / "spec" / "CHANGES.md").write_text(f"## Version 1\n\n### {protocol}\n")
        (tmp_path / ".ci" / "release-signers").write_text(f"# keys\n{signers}")

    def git(*arguments: str) -> None:
        done = run("git", "-c", "user.name=a", "-c", "user.email=a@example.com", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    version = ready["version"]
    git("init", "-q")
    write(f"{version}, not yet released", "Draft", "")
    (tmp_path / "clients/rust/Cargo.toml").write_text('version = "0.0.1"\n')
    assert lacks() == [
        "clients/rust/Cargo.toml", "CHANGELOG.md", "spec/CHANGES.md", ".ci/release-signers", "git",
    ]  # fmt: skip
    shutil.copy(ROOT / "clients/rust/Cargo.toml", tmp_path / "clients/rust/Cargo.toml")
    write(f"{version}, 2027-01-15", "2027-01-15", "release@zcproto ssh-ed25519 AAAA\n")
    git("add", ".")
    git("commit", "-q", "-m", "release")
    assert lacks() == ["ready"]
    git("tag", f"v{version}")
    assert lacks() == ["git"]


def test_actions_of_workflows_are_pinned_to_commits() -> None:
    used = [
        line.partition("uses: ")[2]
        for path in (ROOT / ".github" / "workflows").glob("*.yml")
        for line in path.read_text().splitlines()
        if "uses: " in line
    ]
    assert used
    assert [each for each in used if not re.fullmatch(r"\S+@[0-9a-f]{40} # v\S+", each)] == []


def test_policy_states_whether_releases_can_be_signed() -> None:
    lines = [line for line in SIGNERS.read_text().splitlines() if line and not line.startswith("#")]
    assert ("no key may sign one yet" in POLICY) == (not lines)
    for line in lines:
        assert re.match(r'release@zcproto namespaces="git,zcproto-release"(,\S+)? \S+ AAAA\S+', line), line


@needs("ssh-keygen")
@pytest.mark.parametrize(("signer", "verifies"), [("listed", True), ("other", False)])
def test_documented_command_verifies_checksums(tmp_path: Path, signer: str, verifies: bool) -> None:
    for name in ("listed", "other"):
        made = run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", name, cwd=tmp_path)
        assert made.returncode == 0, made.stderr
    (options,) = re.findall(r"(?m)^(release@zcproto namespaces=\S+) ", POLICY)
    (tmp_path / "release-signers").write_text(f"{options} {(tmp_path / 'listed.pub').read_text()}")
    (tmp_path / "SHA256SUMS").write_text("0  x\n")
    (sign,) = re.findall(r"(?m)^ssh-keygen -q -Y sign .*$", (ROOT / ".ci" / "release").read_text())
    done = run("bash", "-c", sign.replace('"$key"', signer), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (verify,) = re.findall(r"(?m)^ssh-keygen -Y verify .*$", POLICY)
    assert (run("bash", "-c", verify, cwd=tmp_path).returncode == 0) is verifies
