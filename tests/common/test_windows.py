"""What Windows has instead of modes and flock. The calls of its API are not run here."""

from __future__ import annotations

import errno
import sys
from types import SimpleNamespace

import pytest

from zcproto.common import windows
from zcproto.common.windows import ANY, CHANGE, PRIVATE, untrusted

ADA, BOB = "S-1-5-21-1-2-3-1001", "S-1-5-21-1-2-3-1002"
OF_ADA = f"O:{ADA}"
PROFILE = f"{OF_ADA}D:AI(A;ID;FA;;;SY)(A;ID;FA;;;BA)(A;ID;FA;;;{ADA})"
"""A file in the folder of a user."""


@pytest.mark.parametrize(
    ("sddl", "readers", "writers"),
    [
        pytest.param(PROFILE, [], [], id="in the folder of the user"),
        pytest.param(OF_ADA + PRIVATE, [], [], id="created by us"),
        pytest.param(f"O:BA{PRIVATE}", [], [], id="of administrators"),
        pytest.param(f"O:{BOB}{PRIVATE}", [BOB], [BOB], id="of another user, who can change the list"),
        pytest.param(PRIVATE, ["no owner"], ["no owner"], id="without an owner"),
        pytest.param(f"{PROFILE}(A;;0x1200a9;;;BU)", ["BU"], [], id="readable by all users, as a mask"),
        pytest.param(f"{PROFILE}(A;;FR;;;WD)", ["WD"], [], id="readable by everyone"),
        pytest.param(f"{PROFILE}(A;;FRFX;;;{BOB})", [BOB], [], id="readable by one"),
        pytest.param(f"{PROFILE}(A;;FW;;;{BOB})", [BOB], [BOB], id="writable by one"),
        pytest.param(f"{PROFILE}(A;;GA;;;AU)", ["AU"], ["AU"], id="all rights"),
        pytest.param(f"{PROFILE}(A;;SD;;;AU)", ["AU"], ["AU"], id="deletable"),
        pytest.param(f"{PROFILE}(A;;XY;;;AU)", ["AU"], ["AU"], id="a right of another version"),
        pytest.param(f"{PROFILE}(XA;;FR;;;AU;(x))", ["AU"], [], id="on a condition"),
        pytest.param(f"{PROFILE}(D;;FA;;;WD)", [], [], id="denied"),
        pytest.param(f"{PROFILE}(A;OICIIO;FA;;;CO)", [], [], id="for what is created in a folder only"),
        pytest.param(f"{OF_ADA}D:NO_ACCESS_CONTROL", ["everyone"], ["everyone"], id="no list"),
        pytest.param(OF_ADA, ["everyone"], ["everyone"], id="no list at all"),
    ],
)
def test_access_of_others_is_read_from_the_list(sddl: str, readers: list[str], writers: list[str]) -> None:
    assert list(untrusted(sddl, ADA, ANY)) == readers
    assert list(untrusted(sddl, ADA, CHANGE)) == writers


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(errno.EACCES, BlockingIOError), (errno.EDEADLK, BlockingIOError), (errno.EIO, OSError), (None, None)],
)
def test_lock_that_is_held_is_reported_as_by_flock(
    monkeypatch: pytest.MonkeyPatch, raised: int | None, expected: type[OSError] | None
) -> None:
    calls: list[tuple[int, ...]] = []

    def locking(*arguments: int) -> None:
        calls.append(arguments)
        if raised is not None:
            raise OSError(raised, "refused")

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    if expected is None:
        windows.lock(7)
    else:
        with pytest.raises(OSError, match=r"held|refused") as refused:
            windows.lock(7)
        assert type(refused.value) is expected
    assert calls == [(7, 2, 1)]
