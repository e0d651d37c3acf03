"""What a process that holds keys does about itself before it has any: nobody else is to look into its memory.

None of this stops root. A key in a `bytes` object of Python cannot be wiped either: what helps is that nothing of
the memory gets to the disk or to another process of the same user.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import MutableMapping
from typing import Final, NamedTuple

_PR_SET_DUMPABLE: Final = 4
KEY_LOG: Final = "SSLKEYLOGFILE"


class Risk(NamedTuple):
    """What the operator should know of this process: an event of the log, and what to do."""

    event: str
    cure: str


def deny_core_dumps() -> None:
    """No crash writes the memory to the disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def deny_tracing() -> bool:
    """No other process of this user may trace this one or read its memory: on Linux, prctl(PR_SET_DUMPABLE, 0).

    The folder in /proc is root's from here on; what is for everybody there (stat, statm, status) stays readable.
    Also no core is dumped by a crash, not even through a pipe, which RLIMIT_CORE does not forbid. False if the
    system has no such thing.
    """
    if sys.platform != "linux":
        return False
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):  # another C library than Linux programs commonly have
        return False
    return bool(prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)


def forget_key_log(environ: MutableMapping[str, str]) -> bool:
    """Take SSLKEYLOGFILE out of the environment; True if it was there.

    Some builds of OpenSSL write the keys of every connection to the file that it names. It is there for debugging
    a client; a server must not do so because a variable was left over.
    """
    return environ.pop(KEY_LOG, None) is not None


def harden(environ: MutableMapping[str, str]) -> list[Risk]:
    """Do all of this to this process. What is left for the operator to mend comes back."""
    found = []
    deny_core_dumps()
    if not deny_tracing():
        found.append(Risk("server.traceable", "keep other processes from its user"))
    if forget_key_log(environ):
        found.append(Risk("server.key_log_ignored", f"unset {KEY_LOG}; no keys are written"))
    if os.geteuid() == 0:
        found.append(
            Risk(
                "server.runs_as_root",
                "run it as a user of its own: zcproto deploy systemd",
            )
        )
    return found
