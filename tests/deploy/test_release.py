"""Releases are signed by keys that are listed, and not built before one is."""

from __future__ import annotations

import re
import shutil
import subprocess
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
