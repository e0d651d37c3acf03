"""Private files and locks on Windows, which has neither modes nor flock.

A private file has a protected access control list (ACL) that grants its owner, the system and administrators full
access; it has that list from the moment of its creation. `os.chmod` would set the read-only flag alone. Whether a
file is private is read from its ACL, as the text that the Windows API makes of it (SDDL).

A lock is one byte that `msvcrt.locking` locks; the system releases it when its process ends.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterator
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Final

PRIVATE: Final = "D:P(A;;FA;;;OW)(A;;FA;;;SY)(A;;FA;;;BA)"
"""SDDL: full access for the owner, the system and administrators, and nothing inherited from the folder."""

_TRUSTED: Final = frozenset({"OW", "SY", "BA", "S-1-3-4", "S-1-5-18", "S-1-5-32-544"})
"""Those three, by their abbreviations and their identifiers (SIDs)."""

_RIGHTS: Final = {
    **{"FA": 0x1F01FF, "FR": 0x120089, "FW": 0x120116, "FX": 0x1200A0},
    **{"GA": 0x10000000, "GR": 0x80000000, "GW": 0x40000000, "GX": 0x20000000},
    **{"SD": 0x10000, "RC": 0x20000, "WD": 0x40000, "WO": 0x80000},
    **{
        "CC": 0x1,
        "DC": 0x2,
        "LC": 0x4,
        "SW": 0x8,
        "RP": 0x10,
        "WP": 0x20,
        "DT": 0x40,
        "LO": 0x80,
        "CR": 0x100,
    },
}
CHANGE: Final = 0x100D0156
"""The rights by which a file or what is in a folder can be changed, deleted or given other rights: GA, GW excepted,
WD, WO, SD, and to write or append data, attributes and children."""

ANY: Final = 0xFFFFFFFF & ~0x120080
"""All rights except to read attributes, to read the list itself, and to wait."""

_INHERIT_ONLY: Final = "IO"
_ACCESS_FILE: Final = 0xC0000000  # GENERIC_READ | GENERIC_WRITE
_SHARE_ALL: Final = 0x7
_CREATE_NEW: Final = 1
_NORMAL_FILE: Final = 0x80
_FILE_OBJECT: Final = 1
_OWNER_AND_LIST: Final = 0x5
_TOKEN_USER: Final = 1
_TOKEN_QUERY: Final = 0x8
_ENTRY: Final = re.compile(r"\(([A-Z]*);([A-Z]*);([^;]*);[^;]*;[^;]*;([^;)]*)[^)]*\)")


def others_with(path: Path, rights: int) -> list[str]:
    """Return the SIDs of others that have one of these rights to a file or folder. Raises OSError."""
    return list(untrusted(_security_of(path), _own_sid(), rights))


def untrusted(sddl: str, own: str, rights: int) -> Iterator[str]:
    """Yield who has one of these rights by a list in SDDL, besides the user `own`, the system and administrators.

    Any other owner is yielded as well: it can change the list.
    """
    trusted = _TRUSTED | {own}
    owner = re.match(r"O:(S-[0-9-]+|[A-Z]{2})", sddl)
    if owner is None or owner[1] not in trusted:
        yield owner[1] if owner is not None else "no owner"
    _, is_list, entries = sddl.partition("D:")
    if not is_list or entries.startswith("NO_ACCESS_CONTROL"):
        yield "everyone"
    for kind, flags, granted, sid in _ENTRY.findall(entries):
        if "A" in kind and _INHERIT_ONLY not in flags and sid not in trusted and _mask(granted) & rights:
            yield sid


def _mask(text: str) -> int:
    if text.startswith("0x"):
        return int(text, 16)
    rights = (text[at : at + 2] for at in range(0, len(text), 2))
    return reduce(or_, (_RIGHTS.get(right, 0xFFFFFFFF) for right in rights), 0)


def lock(descriptor: int) -> None:
    """Lock a file until its descriptor is closed. Raises BlockingIOError if another one holds the lock."""
    import msvcrt  # noqa: PLC0415 - a module of Windows

    module: Any = msvcrt
    try:
        module.locking(descriptor, module.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EDEADLK):
            raise BlockingIOError(errno.EAGAIN, "the lock is held") from error
        raise


# --- the Windows API -------------------------------------------------------------------------------------------


class _SecurityAttributes(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint32), ("descriptor", ctypes.c_void_p), ("inherits", ctypes.c_int))


def _library(name: str) -> Any:
    make: Any = ctypes.WinDLL  # type: ignore[attr-defined]
    return make(name, use_last_error=True)


def _failed(path: Path | None, code: int | None = None) -> OSError:
    system: Any = ctypes
    error: OSError = system.WinError(system.get_last_error() if code is None else code)
    error.filename = None if path is None else str(path)
    return error


def create_private(path: Path) -> int:
    """Create a private file and return a descriptor for it. Raises FileExistsError, also for a link."""
    import msvcrt  # noqa: PLC0415 - a module of Windows

    module: Any = msvcrt
    kernel, advapi = _library("kernel32"), _library("advapi32")
    descriptor = ctypes.c_void_p()
    if not advapi.ConvertStringSecurityDescriptorToSecurityDescriptorW(
        ctypes.c_wchar_p(PRIVATE), 1, ctypes.byref(descriptor), None
    ):
        raise _failed(path)
    try:
        attributes = _SecurityAttributes(ctypes.sizeof(_SecurityAttributes), descriptor, 0)
        kernel.CreateFileW.restype = ctypes.c_void_p
        handle = kernel.CreateFileW(
            ctypes.c_wchar_p(str(path)),
            *(_ACCESS_FILE, _SHARE_ALL, ctypes.byref(attributes), _CREATE_NEW, _NORMAL_FILE, None),
        )
        if handle == ctypes.c_void_p(-1).value:
            raise _failed(path)
    finally:
        kernel.LocalFree(descriptor)
    opened: int = module.open_osfhandle(handle, os.O_RDWR | getattr(os, "O_BINARY", 0))
    return opened


def _security_of(path: Path) -> str:
    """Return the owner and the ACL of a file or folder in SDDL."""
    advapi, kernel = _library("advapi32"), _library("kernel32")
    descriptor, text = ctypes.c_void_p(), ctypes.c_wchar_p()
    code = advapi.GetNamedSecurityInfoW(
        ctypes.c_wchar_p(str(path)),
        *(_FILE_OBJECT, _OWNER_AND_LIST, None, None, None, None, ctypes.byref(descriptor)),
    )
    if code:
        raise _failed(path, code)
    try:
        if not advapi.ConvertSecurityDescriptorToStringSecurityDescriptorW(
            descriptor, 1, _OWNER_AND_LIST, ctypes.byref(text), None
        ):
            raise _failed(path)
        return str(text.value)
    finally:
        kernel.LocalFree(text)
        kernel.LocalFree(descriptor)


def _own_sid() -> str:
    """Return the SID of the user of this process."""
    advapi, kernel = _library("advapi32"), _library("kernel32")
    token, size, text = ctypes.c_void_p(), ctypes.c_uint32(), ctypes.c_wchar_p()
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    if not advapi.OpenProcessToken(
        ctypes.c_void_p(kernel.GetCurrentProcess()), _TOKEN_QUERY, ctypes.byref(token)
    ):
        raise _failed(None)
    try:
        advapi.GetTokenInformation(token, _TOKEN_USER, None, 0, ctypes.byref(size))
        user = ctypes.create_string_buffer(size.value)
        if not advapi.GetTokenInformation(token, _TOKEN_USER, user, size, ctypes.byref(size)):
            raise _failed(None)
        sid = ctypes.c_void_p.from_buffer(user)  # TOKEN_USER begins with the pointer to it
        if not advapi.ConvertSidToStringSidW(sid, ctypes.byref(text)):
            raise _failed(None)
        found = str(text.value)
        kernel.LocalFree(text)
        return found
    finally:
        kernel.CloseHandle(token)
