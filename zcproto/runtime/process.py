"""Prepares a process that is a server: protects its memory, tunes the interpreter, raises the limit on open files.

None of the protection stops root, and keys in Python `bytes` cannot be erased. It keeps the memory from the disk
and from other processes of the same user.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import MutableMapping
from typing import Final, NamedTuple

from zcproto.common.file_limit import raise_file_limit
from zcproto.config import Config
from zcproto.server.state import log

_PR_SET_DUMPABLE: Final = 4
KEY_LOG: Final = "SSLKEYLOGFILE"

GC_THRESHOLDS: Final = (20_000, 50, 100)
"""The default thresholds would walk every object of 10,000 connections again and again."""

SWITCH_INTERVAL: Final = 0.000_5
"""Seconds that another thread may hold the interpreter while the loop waits; the default of 5 ms is noticeable."""

SPARE_FILES: Final = 256
"""Descriptors in addition to those of connections: certificates, the store, the log, pipes."""


class Risk(NamedTuple):
    """A risk that the operator should remove: its log event, and the cure."""

    event: str
    cure: str


def deny_core_dumps() -> None:
    """Keep a crash from writing the memory to the disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def deny_tracing() -> bool:
    """Keep other processes of this user from tracing this one: on Linux, prctl(PR_SET_DUMPABLE, 0).

    Its folder in /proc belongs to root from then on; stat, statm and status stay readable for everyone. Core dumps
    through a pipe, which RLIMIT_CORE does not forbid, are prevented too. Return False on an unsupported system.
    """
    if sys.platform != "linux":
        return False
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):  # a C library without it
        return False
    return bool(prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)


def forget_key_log(environ: MutableMapping[str, str]) -> bool:
    """Remove SSLKEYLOGFILE from the environment; return whether it was set.

    Some builds of OpenSSL write the keys of every connection to that file. It is meant for debugging a client; a
    variable that was left over must not expose a server.
    """
    return environ.pop(KEY_LOG, None) is not None


def harden(environ: MutableMapping[str, str]) -> list[Risk]:
    """Protect this process; return the risks that only the operator can remove."""
    found = []
    deny_core_dumps()
    if not deny_tracing():
        found.append(Risk("server.traceable", "keep other processes from its user"))
    if forget_key_log(environ):
        found.append(Risk("server.key_log_ignored", f"unset {KEY_LOG}; no keys are written"))
    if os.geteuid() == 0:
        found.append(Risk("server.runs_as_root", "run it as a separate user: zcproto deploy systemd"))
    return found


def tune_interpreter() -> None:
    """Give other threads (certificates, the disk) short turns, and exclude long-lived objects from collections."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


class FileLimit:
    """The limit on open files. A limit that cannot be raised far enough is logged once."""

    def __init__(self) -> None:
        self._wanted = 0

    def raise_for(self, config: Config) -> None:
        """Raise the limit to what a configuration needs."""
        wanted = config.limits.max_connections + SPARE_FILES
        if wanted == self._wanted:
            return
        self._wanted = wanted
        limit = raise_file_limit(wanted)
        if limit < wanted:
            log.warning(
                "server.file_limit",
                limit=limit,
                wanted=wanted,
                cure="raise it with ulimit -n or LimitNOFILE=",
            )
