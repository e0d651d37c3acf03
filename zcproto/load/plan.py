"""What a run asks for, checked before anything is opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from zcproto.common.file_limit import raise_file_limit
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError

SESSIONS_PER_USER: Final = 5
"""The server's default cap, `sessions.per_user`."""

DEFAULT_ARRIVAL_RATE: Final = 500.0
"""New connections a second. Both ends of a handshake cost about a millisecond, so two cores have room left."""

SPARE_FILES: Final = 64
"""Open files of a process beside its connections: pipes, the loop, modules."""

MAX_KEY_FILE_BYTES: Final = 64 * 1024 * 1024
MAX_PAYLOAD_BYTES: Final = 16 * 1024 * 1024
PARAMS_OVERHEAD: Final = 256
"""Bytes of a request beside its payload, at most: header, method, names."""


class Credential(NamedTuple):
    """A user and the key that opens its sessions."""

    user: str
    key: str

    def __repr__(self) -> str:
        return f"Credential(user={self.user!r})"


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. Rates are per second, over all processes."""

    host: str
    port: int
    connections: int
    sessions: int
    """Sessions opened; with fewer than connections, the other connections use the tokens of these."""
    rate: float
    duration_s: float
    payload_bytes: int
    credentials: tuple[Credential, ...] = field(repr=False)
    operator: Credential = field(repr=False)
    pipeline: int = 1
    """Requests in one write."""
    arrival_rate: float = DEFAULT_ARRIVAL_RATE
    processes: int = 1
    ca_file: Path | None = None
    """None is the system's store."""
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Share:
    """One process's part of a plan, as it travels to that process."""

    number: int
    """Of the process, from 0."""
    processes: int
    address: str
    """Numeric, so that 10,000 connections do not ask for the name 10,000 times."""
    host: str
    port: int
    ca_file: str | None
    connections: int
    credentials: list[list[str]] = field(repr=False)
    """User and key of each session."""
    rate: float
    duration_s: float
    payload_bytes: int
    pipeline: int
    arrival_rate: float
    verify_rate: float
    seed: int
    origin: float
    """The start of the run in monotonic seconds, which all processes of a machine share."""

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(**value)


def check_plan(plan: Plan) -> None:
    """Raises ConfigError with every reason for which a plan cannot be carried out as asked."""
    faults = []
    if plan.sessions > plan.connections:
        faults.append(
            f"--sessions {plan.sessions}: a session needs a connection to be used on, and there are "
            f"{plan.connections}; give at most --sessions {plan.connections}"
        )
    if plan.processes > plan.sessions:
        faults.append(
            f"--processes {plan.processes}: each process needs a session of its own, and there are {plan.sessions}"
        )
    if plan.payload_bytes > MAX_PAYLOAD_BYTES:
        faults.append(f"--payload {plan.payload_bytes}: at most {MAX_PAYLOAD_BYTES} bytes")
    capacity = session_capacity(plan.credentials, plan.operator)
    if capacity < plan.sessions:
        users = -(-plan.sessions // SESSIONS_PER_USER)
        faults.append(
            f"--sessions {plan.sessions}: the {len(plan.credentials)} users in the keys file may have "
            f"{capacity} sessions, {SESSIONS_PER_USER} each; make enough by: "
            f"zcproto user add load --count {users + 1} --keys-out FILE"
        )
    if faults:
        raise ConfigError(faults)


def session_capacity(credentials: tuple[Credential, ...], operator: Credential) -> int:
    """Sessions that the users may open. The operator's own, if it is one of them, takes a place."""
    return SESSIONS_PER_USER * len(credentials) - (operator in credentials)


def session_credentials(plan: Plan) -> list[Credential]:
    """Whose each session is, as many for a user as its cap allows."""
    places = [each for each in plan.credentials for _ in range(SESSIONS_PER_USER)]
    if plan.operator in plan.credentials:
        places.remove(plan.operator)
    return places[: plan.sessions]


def shares(plan: Plan, address: str, origin: float, verify_rate: float) -> list[Share]:
    """The plan, dealt out to its processes as evenly as it goes."""
    credentials = session_credentials(plan)
    count = plan.processes
    return [
        Share(
            number=number,
            processes=count,
            address=address,
            host=plan.host,
            port=plan.port,
            ca_file=None if plan.ca_file is None else str(plan.ca_file),
            connections=len(range(number, plan.connections, count)),
            credentials=[[*each] for each in credentials[number::count]],
            rate=plan.rate / count,
            duration_s=plan.duration_s,
            payload_bytes=plan.payload_bytes,
            pipeline=plan.pipeline,
            arrival_rate=plan.arrival_rate / count,
            verify_rate=verify_rate / count,
            seed=plan.seed + number,
            origin=origin,
        )
        for number in range(count)
    ]


def read_credentials(path: Path) -> tuple[Credential, ...]:
    """The users of a keys file: a name, a tab and a key on each line. Raises ConfigError."""
    shown = escape_text(str(path))
    try:
        if path.stat().st_size > MAX_KEY_FILE_BYTES:
            raise ConfigError([f"{shown}: too large to be a keys file"])
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            [f"{shown}: {error.strerror}; make it by: zcproto user add load --count N --keys-out FILE"]
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{shown}: is no text"]) from error
    credentials = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        user, tab, key = line.partition("\t")
        if not (user and tab and key.strip()):
            # The line is not shown: what is wrong with it may be that it is a key alone.
            raise ConfigError([f"{shown}, line {number}: must be a name, a tab and a key"])
        credentials.append(Credential(user, key.strip()))
    if not credentials:
        raise ConfigError([f"{shown}: there is no key in it"])
    if len({each.user for each in credentials}) < len(credentials):
        raise ConfigError([f"{shown}: a user is in it twice"])
    return tuple(credentials)


def require_open_files(needed: int, connections: int, fitting: Callable[[int], int]) -> None:
    """Raise this process's limit of open files, which its children inherit, to what each of them needs.

    `fitting` tells how many connections fit into a limit. Raises ConfigError that says what can be done if the
    system does not allow it.
    """
    limit = raise_file_limit(needed)
    if limit < needed:
        raise ConfigError(
            [
                f"{connections} connections need {needed} open files in a process, and this user may have {limit}. "
                f"Raise the limit (as root: `ulimit -Hn {needed}` in the shell that starts this, "
                f"LimitNOFILE={needed} in a unit, or /etc/security/limits.conf), or give --connections "
                f"{max(fitting(limit), 0)}"
            ]
        )
