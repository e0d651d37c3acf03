"""The plan of a run, checked before anything is opened."""

from __future__ import annotations

import base64
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from zcproto.common.process import raise_file_limit
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError
from zcproto.wire.message import decode_body, encode_body

CLIENT_NAME: Final = "zcproto-bench/1"
SESSIONS_PER_USER: Final = 5
"""The default of `sessions.per_user`."""

DEFAULT_ARRIVAL_RATE: Final = 500.0
"""New connections per second. Both ends of a handshake take about 1 ms of CPU, so two cores are not saturated."""

SPARE_FILES: Final = 64
"""Open files of a process besides its connections: pipes, the event loop, modules."""

CONNECTIONS_PER_SOURCE: Final = 20_000
"""Connections from one address before the next is used. Linux has 28,232 ephemeral ports by default."""

PORT_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
USUAL_PORTS: Final = 16_384
"""Ephemeral ports of other systems (RFC 6335)."""

FIRST_SOURCE: Final = IPv4Address("127.0.0.1")

CONNECT_TIMEOUT: Final = 30.0
"""Seconds for a TCP connection, for its handshake, and after the last arrival for all that are still connecting."""

ANSWER_TIMEOUT: Final = 10.0
"""Seconds after the last request of a phase during which answers count, and at the end for the server to close."""

MAX_KEY_FILE_BYTES: Final = 64 * 1024 * 1024
MAX_PAYLOAD_BYTES: Final = 16 * 1024 * 1024


class Credential(NamedTuple):
    """A user and their API key."""

    user: str
    key: str

    def __repr__(self) -> str:
        return f"Credential(user={self.user!r})"


class Target(NamedTuple):
    """A method of the server's application, its params, and the result that every call must have."""

    method: str
    params: dict[str, Any]
    expected: tuple[Any] | tuple[()] = ()
    """Empty if any result will do."""
    is_stream: bool = False
    """Whether each request is a stream, whose items may be any."""

    def is_right(self, value: Any) -> bool:
        return not self.expected or value == self.expected[0]

    def to_text(self) -> str:
        """Return it for a process. Raises MessageError if the params cannot be sent."""
        return base64.b64encode(
            encode_body([self.method, self.params, [*self.expected], self.is_stream])
        ).decode()

    @classmethod
    def from_text(cls, text: str) -> Self:
        method, params, expected, is_stream = decode_body(base64.b64decode(text))
        return cls(method, params, tuple(expected), is_stream)


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a run. Rates are per second, for all processes together."""

    host: str
    port: int
    connections: int
    sessions: int
    """Sessions to open. With fewer sessions than connections, the remaining connections share them."""
    rate: float
    duration_s: float
    payload_bytes: int
    credentials: tuple[Credential, ...] = field(repr=False)
    operator: Credential | None = field(repr=False)
    """Who reads the server's counters. None: they are not read, and only the answers are verified."""
    pipeline: int = 1
    """Requests per write; streams per connection if there is a stream."""
    target: Target | None = None
    """What the requests call; None for `echo` with random bytes."""
    stream: str = ""
    """The method whose items are the load, `rate` of them per second; empty for requests."""
    arrival_rate: float = DEFAULT_ARRIVAL_RATE
    processes: int = 1
    sources: int | None = None
    """Addresses of 127.0.0.0/8 that connections come from; None for as many as their ports require."""
    ca_file: Path | None = None
    """None for the system's store."""
    seed: int = 1

    @property
    def streams(self) -> int:
        """The number of streams, all open at once."""
        return self.connections * self.pipeline if self.stream else 0

    @property
    def items_per_stream(self) -> int:
        return round(self.rate * self.duration_s / self.streams) if self.stream else 0

    @property
    def load(self) -> int:
        """The number of items or requests of the load."""
        return self.streams * self.items_per_stream if self.stream else round(self.rate * self.duration_s)


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a plan for one process, to which it is sent as JSON."""

    number: int
    """The index of the process."""
    processes: int
    address: str
    """Numeric: resolved once instead of 10,000 times."""
    host: str
    port: int
    ca_file: str | None
    connections: int
    credentials: list[list[str]] = field(repr=False)
    """The user and key of each session."""
    rate: float
    duration_s: float
    payload_bytes: int
    pipeline: int
    arrival_rate: float
    verify_rate: float
    seed: int
    origin: float
    """The start of the run in monotonic seconds, which are the same in all processes of a machine."""
    sources: int = 1
    target: str = ""
    """A Target; empty for `echo`."""
    stream: str = ""
    items_per_stream: int = 0
    interval_s: float = 0.0
    """Seconds between the items of a stream."""
    connect_timeout_s: float = CONNECT_TIMEOUT
    answer_timeout_s: float = ANSWER_TIMEOUT

    def source(self, index: int) -> tuple[str, int] | None:
        """Return the local address of a connection, or None to let the system choose."""
        if self.sources == 1:
            return None
        return str(FIRST_SOURCE + (self.number + index * self.processes) % self.sources), 0

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(**value)


def check_plan(plan: Plan) -> None:
    """Raise ConfigError with every reason why a plan cannot be carried out."""
    faults = []
    if plan.sessions > plan.connections:
        faults.append(
            f"--sessions {plan.sessions}: each session needs a connection; give at most"
            f" --sessions {plan.connections}"
        )
    if plan.processes > plan.sessions:
        faults.append(
            f"--processes {plan.processes}: each process needs a session; give at most --processes {plan.sessions}"
        )
    if plan.payload_bytes > MAX_PAYLOAD_BYTES:
        faults.append(f"--payload {plan.payload_bytes}: give at most {MAX_PAYLOAD_BYTES} bytes")
    if plan.stream and not plan.items_per_stream:
        faults.append(
            f"--rate {plan.rate:g}: too low for one item of each of the {plan.streams} streams; give at least"
            f" --rate {plan.streams / plan.duration_s:g}"
        )
    capacity = session_capacity(plan.credentials, plan.operator)
    if capacity < plan.sessions:
        faults.append(
            f"--sessions {plan.sessions}: the {len(plan.credentials)} users of the keys file may open"
            f" {capacity} sessions, {SESSIONS_PER_USER} each; create enough users with:"
            f" zcproto user add load --count {users_for(plan.sessions)} --out FILE"
        )
    if faults:
        raise ConfigError(faults)


def sources_for(plan: Plan, address: str) -> int:
    """Return how many local addresses the connections to a numeric address come from.

    Raises ConfigError if this system cannot give them enough ports.
    """
    connections, sources = plan.connections, plan.sources
    is_possible = sys.platform == "linux" and address.startswith("127.")
    if sources is None:
        sources = -(-connections // CONNECTIONS_PER_SOURCE) if is_possible else 1
    elif sources > 1 and not is_possible:
        raise ConfigError(
            [
                f"--sources {sources}: connections can come from further addresses only on Linux, to a server at"
                " 127.0.0.1; leave it out, or connect from several machines"
            ]
        )
    ports = _ephemeral_ports()
    if connections > sources * ports:
        more = f"--sources {-(-connections // ports)}, or " if is_possible else ""
        raise ConfigError(
            [
                f"{connections} connections: each address of this machine has {ports} ports for one server; give"
                f" {more}--connections {sources * ports} on each of several machines"
            ]
        )
    return sources


def _ephemeral_ports() -> int:
    try:
        first, last = PORT_RANGE.read_text().split()
    except OSError:
        return USUAL_PORTS
    return int(last) - int(first) + 1


def processes_for(connections: int) -> int:
    """Return how many processes the limit of open files requires for so many connections, after raising it."""
    limit = raise_file_limit(connections + SPARE_FILES)
    return -(-connections // max(limit - SPARE_FILES, 1))


def users_for(sessions: int) -> int:
    """Return how many users may open these sessions, and one more for the operator."""
    return -(-sessions // SESSIONS_PER_USER) + 1


def session_capacity(credentials: tuple[Credential, ...], operator: Credential | None) -> int:
    """Return the number of sessions that the users may open. The operator's own session counts."""
    return SESSIONS_PER_USER * len(credentials) - (operator in credentials)


def session_credentials(plan: Plan) -> list[Credential]:
    """Return the user of each session, repeated up to the limit per user."""
    places = [each for each in plan.credentials for _ in range(SESSIONS_PER_USER)]
    if plan.operator in plan.credentials:
        places.remove(plan.operator)
    return places[: plan.sessions]


def shares(plan: Plan, address: str, origin: float, verify_rate: float) -> list[Share]:
    """Divide a plan evenly between its processes. Raises ConfigError like `sources_for`."""
    credentials = session_credentials(plan)
    count = plan.processes
    sources = sources_for(plan, address)
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
            sources=sources,
            target="" if plan.target is None else plan.target.to_text(),
            stream=plan.stream,
            items_per_stream=plan.items_per_stream,
            interval_s=plan.streams / plan.rate,
            connect_timeout_s=CONNECT_TIMEOUT,
            answer_timeout_s=ANSWER_TIMEOUT,
        )
        for number in range(count)
    ]


def read_credentials(path: Path) -> tuple[Credential, ...]:
    """Read a keys file, with a name, a tab and a key on each line. Raises ConfigError."""
    shown = escape_text(str(path))
    try:
        if path.stat().st_size > MAX_KEY_FILE_BYTES:
            raise ConfigError([f"{shown}: is too large for a keys file; check the path"])
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            [f"{shown}: {error.strerror}; create it with: zcproto user add load --count N --out FILE"]
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{shown}: is not a text file; check the path"]) from error
    credentials = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        user, tab, key = line.partition("\t")
        if not (user and tab and key.strip()):
            # The line is not quoted: it may be a key without a name.
            raise ConfigError(
                [
                    f"{shown}, line {number}: must have a name, a tab and a key; create it with: zcproto user add"
                    " load --count N --out FILE"
                ]
            )
        credentials.append(Credential(user, key.strip()))
    if not credentials:
        raise ConfigError(
            [f"{shown}: contains no key; create it with: zcproto user add load --count N --out FILE"]
        )
    if len({each.user for each in credentials}) < len(credentials):
        raise ConfigError([f"{shown}: contains a user twice; remove one of the lines"])
    return tuple(credentials)


def require_open_files(needed: int, connections: int, fitting: Callable[[int], int]) -> None:
    """Raise the limit of open files, which child processes inherit, to `needed` per process.

    `fitting` returns the number of connections that a limit allows. Raises ConfigError if the system refuses.
    """
    limit = raise_file_limit(needed)
    if limit < needed:
        raise ConfigError(
            [
                f"{connections} connections need {needed} open files in one process, but the limit of this user is"
                f" {limit}. Raise it (as root: `ulimit -Hn {needed}` in the shell that starts this,"
                f" LimitNOFILE={needed} in a unit, or /etc/security/limits.conf), or give --connections"
                f" {max(fitting(limit), 0)}"
            ]
        )
