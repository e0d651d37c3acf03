"""Test the files with the answers to challenges."""

from __future__ import annotations

import errno
import ssl
import stat
from pathlib import Path

import pytest

from tests.certs.harness import disk_fails
from tests.certs.support import NOW
from zcproto.certs.acme import challenges
from zcproto.certs.acme.challenges import ChallengeFolder, challenge_folder, server_name_of
from zcproto.config.model import AcmeConfig, CertificatesConfig, Config
from zcproto.errors import CertificateError

DIGEST = bytes(range(32))


@pytest.fixture
def folder(tmp_path: Path) -> ChallengeFolder:
    return ChallengeFolder(tmp_path / "certs")


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "certs" / "acme" / "challenges").iterdir())


def test_text_is_found_by_its_token(folder: ChallengeFolder, tmp_path: Path) -> None:
    assert folder.text("a-token_1") is None
    folder.put_text("a-token_1", "a-token_1.thumbprint")
    assert folder.text("a-token_1") == b"a-token_1.thumbprint"
    assert folder.text("a-token_2") is None
    path = tmp_path / "certs" / "acme" / "challenges" / "http-01.a-token_1"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("token", ["", "..", "../x", "a/b", "a\0b", "a" * 129, "é", ".x.new"])
def test_no_other_file_is_read_by_a_token(folder: ChallengeFolder, tmp_path: Path, token: str) -> None:
    with pytest.raises(CertificateError, match="not base64url"):
        folder.put_text(token, "x")
    assert folder.text(token) is None


def test_certificate_is_found_by_the_server_name(folder: ChallengeFolder) -> None:
    assert folder.context("a.example") is None
    folder.put_certificate("A.example", DIGEST, NOW)
    first = folder.context("a.example")
    assert isinstance(first, ssl.SSLContext)
    assert folder.context("a.example") is first  # read once
    folder.put_certificate("a.example", DIGEST[::-1], NOW)
    assert folder.context("a.example") not in (first, None)
    assert folder.context("b.example") is None


@pytest.mark.parametrize("name", [None, "", "../a", "a/b", "a\0b", "a" * 254, "A.example"])
def test_no_other_file_is_read_by_a_server_name(folder: ChallengeFolder, name: str | None) -> None:
    assert folder.context(name) is None


def test_server_name_does_not_lead_out_of_the_folder(folder: ChallengeFolder, tmp_path: Path) -> None:
    folder.put_certificate("a.example", DIGEST, NOW)
    challenge = tmp_path / "certs/acme/challenges/tls-alpn-01.a.example.pem"
    challenge.rename(tmp_path / "certs/acme/other.pem")
    (challenge.parent / "tls-alpn-01.a").mkdir()
    assert (challenge.parent / "tls-alpn-01.a/../../other.pem").exists()
    assert folder.context("a/../../other") is None


def test_damaged_certificate_answers_nothing(folder: ChallengeFolder, tmp_path: Path) -> None:
    folder.put_certificate("a.example", DIGEST, NOW)
    (tmp_path / "certs/acme/challenges/tls-alpn-01.a.example.pem").write_bytes(b"junk")
    assert folder.context("a.example") is None


def test_all_answers_are_deleted(folder: ChallengeFolder, tmp_path: Path) -> None:
    folder.clear()  # there is no folder yet
    folder.put_text("token", "text")
    folder.put_certificate("a.example", DIGEST, NOW)
    assert len(files(tmp_path)) == 2
    folder.clear()
    assert files(tmp_path) == []
    assert folder.text("token") is None
    assert folder.context("a.example") is None


def test_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "certs").touch()
    with pytest.raises(CertificateError):
        ChallengeFolder(tmp_path / "certs").put_text("token", "text")


def test_full_disk_is_reported(
    folder: ChallengeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.put_text("token", "text")
    disk_fails(monkeypatch, errno.ENOSPC, "fsync")
    with pytest.raises(CertificateError, match=r"http-01\.other: cannot be written: No space left on device"):
        folder.put_text("other", "text")


def test_large_text_is_not_read(folder: ChallengeFolder) -> None:
    folder.put_text("token", "x" * (challenges.MAX_ANSWER_BYTES + 1))
    assert folder.text("token") is None


def test_addresses_have_their_reverse_names() -> None:
    assert server_name_of("192.0.2.7") == "7.2.0.192.in-addr.arpa"
    assert server_name_of("a.example") == "a.example"


def test_only_a_server_that_orders_answers(tmp_path: Path) -> None:
    names = {"names": ("a.example",), "directory": tmp_path}
    assert challenge_folder(Config(certificates=CertificatesConfig(**names))) is None
    config = Config(certificates=CertificatesConfig(mode="acme", **names), acme=AcmeConfig(terms_agreed=True))
    assert challenge_folder(config) is not None
