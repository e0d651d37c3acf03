"""Prepare the process of a server: its protection, the interpreter, its limit of open files, faults of its loop."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from functools import cache
from pathlib import Path
from typing import Any, Final, NoReturn

from zcproto.common.process import deny_core_dumps, raise_file_limit, tune_heap
from zcproto.config import Config
from zcproto.errors import ConfigError
from zcproto.observe.log import finish_log
from zcproto.server.state import log

_PR_SET_DUMPABLE: Final = 4
KEY_LOG: Final = "SSLKEYLOGFILE"

GC_THRESHOLDS: Final = (10_000, 5, 2_000)
"""The defaults would walk every object of 10,000 connections again and again. The second number bounds what one
collection walks: with 50, that was every object of those connections, for 200 ms."""

SWITCH_INTERVAL: Final = 0.000_5
"""Seconds that another thread may hold the interpreter while the loop waits; the default of 5 ms is noticeable."""

SPARE_FILES: Final = 256
"""Descriptors in addition to those of connections: certificates, the store, the log, pipes."""

LEAST_FILES: Final = 64
"""Descriptors without which a server cannot start and serve a few connections."""

_PHRASE: Final = re.compile(r"[A-Za-z][A-Za-z' ]*")
"""What asyncio writes before a callback and its arguments."""


UPGRADE: Final = "ZCPROTO_UPGRADE"
"""The variable with what a server of several processes passes to its successor."""

_CPU_LIMIT: Final = Path("/sys/fs/cgroup/cpu.max")
"""The share of a container: the microseconds of CPU time in each period, or "max", and the period."""


def deny_tracing() -> bool:
    """Keep other processes of this user from tracing this one: on Linux, prctl(PR_SET_DUMPABLE, 0).

    Its folder in /proc belongs to root from then on; stat, statm and status stay readable for everyone. Core dumps
    through a pipe, which RLIMIT_CORE does not forbid, are prevented too. Return False on an unsupported system.
    """
    if sys.platform != "linux":
        return False
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError, TypeError):  # a C library without it, or Windows
        return False
    return bool(prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)


def harden(environ: MutableMapping[str, str]) -> dict[str, str]:
    """Protect this process; return the log events of risks that only the operator can remove, and the cures.

    None of it stops root, and keys in Python `bytes` cannot be erased. It keeps the memory from the disk and from
    other processes of the same user.
    """
    found = {}
    deny_core_dumps()
    if not deny_tracing():
        found["server.traceable"] = "keep other processes from its user"
    if environ.pop(KEY_LOG, None) is not None:  # some builds of OpenSSL write the keys of connections to it
        found["server.key_log_ignored"] = f"unset {KEY_LOG}; no keys are written"
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        found["server.runs_as_root"] = "run it as a separate user: zcproto deploy systemd"
    return found


def log_risks(risks: Mapping[str, str]) -> None:
    """Log what `harden` has returned."""
    for event, cure in risks.items():
        log.warning(event, cure=cure)


def tune_interpreter() -> None:
    """Give other threads (certificates, the disk) short turns, keep the memory of large bodies, and exclude
    long-lived objects from collections."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    tune_heap()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def raise_limit_for(config: Config, least: int = 0) -> None:
    """Raise the limit on open files to what a configuration needs. Raises ConfigError if it stays below `least`."""
    limit = _raise_file_limit(config.limits.max_connections + SPARE_FILES)
    if limit < least:
        raise ConfigError(
            [
                f"{limit} open files are allowed, and a server needs {least};"
                " raise the limit with ulimit -n or LimitNOFILE="
            ]
        )


@cache
def _raise_file_limit(wanted: int) -> int:
    limit = raise_file_limit(wanted)
    if limit < wanted:
        log.warning(
            "server.file_limit", limit=limit, wanted=wanted, cure="raise it with ulimit -n or LimitNOFILE="
        )
    return limit


def log_loop_fault(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an uncaught exception of the loop; asyncio's own handler would print arguments of callbacks."""
    phrase = _PHRASE.match(str(context.get("message", "")))
    log.error("server.fault", what=phrase[0].strip() if phrase else None, exc_info=context.get("exception"))


def exit_at_once(code: int = 1) -> NoReturn:
    """End the process without waiting for its threads."""
    finish_log()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def worker_count(config: Config) -> int:
    """Return the number of workers of a configuration."""
    return usable_cores() if config.server.workers is None else config.server.workers


def usable_cores(cpu_limit: Path = _CPU_LIMIT) -> int:
    """Return the number of cores that this process may use, by its affinity and the limit of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, period = cpu_limit.read_text().split()
        return max(1, min(cores, round(int(share) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no container, or no limit
        return cores
