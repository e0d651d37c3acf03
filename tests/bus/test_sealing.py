"""What passes through a store is sealed; real files and real keys."""

from __future__ import annotations

import base64
import stat
from pathlib import Path

import pytest

from tests.sessions.helpers import CountedEntropy
from zcproto.bus import sealing
from zcproto.bus.sealing import KEY_SIZE, MAX_KEYS, Opener, Sealer, fingerprint, load_keys
from zcproto.errors import ConfigError

OLD, NEW = b"o" * KEY_SIZE, b"n" * KEY_SIZE


def test_what_is_sealed_opens_for_the_same_purpose_alone() -> None:
    sealer, opener = Sealer((OLD,), CountedEntropy()), Opener((OLD,))
    sealed = sealer.seal(b"news", b"secret")
    assert b"secret" not in sealed
    assert opener.open(b"news", sealed) == b"secret"
    assert opener.open(b"other", sealed) is None
    for at in range(len(sealed)):
        assert opener.open(b"news", sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]) is None
        assert opener.open(b"news", sealed[:at]) is None


def test_no_two_messages_share_a_nonce_and_no_two_processes_a_subkey() -> None:
    entropy = CountedEntropy()
    sealed = [sealer.seal(b"", b"same") for sealer in (Sealer((OLD,), entropy), Sealer((OLD,), entropy))] * 2
    sealer = Sealer((OLD,), entropy)
    sealed = [*sealed[:2], sealer.seal(b"", b"same"), sealer.seal(b"", b"same")]
    assert len({data[:24] for data in sealed}) == 4
    assert len({data[24:] for data in sealed}) == 4


def test_rotation_opens_by_all_keys_and_seals_by_the_first() -> None:
    entropy = CountedEntropy()
    old, new = Sealer((OLD, NEW), entropy).seal(b"", b"a"), Sealer((NEW, OLD), entropy).seal(b"", b"b")
    assert [Opener((OLD, NEW)).open(b"", data) for data in (old, new)] == [b"a", b"b"]
    assert [Opener((NEW,)).open(b"", data) for data in (old, new)] == [None, b"b"]


def test_subkeys_of_other_processes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "MAX_SENDERS", 2)
    entropy, opener = CountedEntropy(), Opener((OLD,))
    sealed = [Sealer((OLD,), entropy).seal(b"", b"%d" % n) for n in range(4)]
    assert [opener.open(b"", data) for data in sealed * 2] == [b"0", b"1", b"2", b"3"] * 2


def test_key_is_created_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.key"
    keys = load_keys(path, CountedEntropy())
    assert load_keys(path, CountedEntropy()) == keys
    assert [len(key) for key in keys] == [KEY_SIZE]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_keys(path, CountedEntropy())


def test_file_may_have_several_keys(tmp_path: Path) -> None:
    path = tmp_path / "store.key"
    path.write_bytes(b"\n".join(base64.urlsafe_b64encode(key) for key in (NEW, OLD)) + b"\n")
    path.chmod(0o600)
    assert load_keys(path, CountedEntropy()) == (NEW, OLD)
    assert len({fingerprint(key) for key in (NEW, OLD)}) == 2


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\n", b"not base64!\n", base64.urlsafe_b64encode(b"short")),
        base64.urlsafe_b64encode(OLD)[:-4] + b"\n",
        b"\n".join([base64.urlsafe_b64encode(OLD)] * (MAX_KEYS + 1)),
    ],
)
def test_file_of_another_content_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "store.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="copy it from another server"):
        load_keys(path, CountedEntropy())
