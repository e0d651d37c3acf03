"""Addresses of servers, and where a client connects next (sans-IO): time, randomness and the resolver's answers in,
attempts out.

    `host`, `host:port`, `[::1]:7443`, several of them -> addresses
    addresses -> resolved in each round -> endpoints -> attempts, each one a while after that before (RFC 8305)

Decides: the order of attempts, when the next one begins beside those under way, how long an endpoint rests after a
failure, and which error a round without success raises.

Rules:
- Each endpoint has a backoff of its own. One that has not failed is tried without a delay. The delays start again
  once a connection has lasted STABLE_AFTER: a server that answers and ends each one must not make its clients
  reconnect many times a second.
- The endpoint of the last connection comes first unless it rests. The others come in random order, so that the
  clients of a server that went down spread evenly; or as listed. The addresses of one name alternate by family.
- While an attempt has no TCP connection, the next one begins after ATTEMPT_DELAY. Then the server has
  HANDSHAKE_DELAY: a fleet that is merely slow must not get several times the handshakes.
- An endpoint is tried once in a round.

Must not know: sockets, TLS, how a name is resolved, sessions, calls.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final, NamedTuple, TypeVar

from zcproto.client.retry import Backoff, Random, is_transient
from zcproto.common.clock import MS_PER_SECOND
from zcproto.common.text import escape_text
from zcproto.errors import CannotConnect, ConfigError, TlsError, ZcprotoError

DEFAULT_PORT: Final = 7443
MAX_ADDRESSES: Final = 32
_NAME_MAX_LENGTH: Final = 253
"""RFC 1035, section 2.3.4."""

_LABEL_ALPHABET: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")

ATTEMPT_DELAY: Final = 0.25
"""Seconds from one attempt to the next, while there is no TCP connection: as RFC 8305, section 8, recommends."""

HANDSHAKE_DELAY: Final = 2.0
"""Seconds from a TCP connection to the next attempt, while there is no WELCOME."""

RESOLUTION_DELAY: Final = 0.05
"""Seconds that the first name to be resolved waits for those before it."""

STABLE_AFTER: Final = 5.0
"""Seconds after which a connection counts as a success."""

MAX_START_DELAY: Final = 1.0
"""Maximum of seconds between two attempts to connect to a server that is starting."""

MAX_ENDPOINTS: Final = 64
"""Endpoints of a round: a resolver may return any number."""

MAX_KNOWN: Final = 256
"""Endpoints whose backoff is kept: a name may resolve to others each time."""


class Address(NamedTuple):
    """A host and a port. The host is an IP address, or a name in lower case, if international with A-labels."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Endpoint(NamedTuple):
    """Where a client is connected: the host and the port that it was given, and the IP address of the host."""

    host: str
    port: int
    ip: str

    @property
    def address(self) -> Address:
        """The host and the port."""
        return Address(self.host, self.port)

    def __str__(self) -> str:
        return str(self.address) if self.ip == self.host else f"{self.address} ({self.ip})"


def parse_addresses(given: str | Sequence[str]) -> tuple[Address, ...]:
    """Parse a list of addresses, or a text that separates them by commas. Raises ConfigError."""
    texts = given.split(",") if isinstance(given, str) else given
    if not isinstance(texts, Iterable) or not all(isinstance(text, str) for text in texts):
        raise TypeError('the address is a str, such as "host:7443", or a list of these')
    addresses = tuple(dict.fromkeys(parse_address(text.strip()) for text in texts))
    if not 1 <= len(addresses) <= MAX_ADDRESSES:
        raise ConfigError([f"addresses: {len(addresses)} are given; give from 1 to {MAX_ADDRESSES} of them"])
    return addresses


def parse_address(text: str) -> Address:
    """Parse an address. Raises ConfigError."""
    shown = escape_text(text, 120)
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")) or not (":" in host and is_ip(host)):
            raise ConfigError([f"{shown!r}: write an IPv6 address with a port as [::1]:{DEFAULT_PORT}"])
        port = rest[1:] if rest else str(DEFAULT_PORT)
    elif text.count(":") > 1:
        if not is_ip(text):
            raise ConfigError([f"{shown!r}: write HOST:PORT, or [ADDRESS]:PORT for IPv6"])
        ip, _, last = text.rpartition(":")
        if last == str(DEFAULT_PORT) and is_ip(ip):
            raise ConfigError([f"{shown!r}: write [{ip}]:{last} for a port, or [{text}] for an address"])
        host, port = text, str(DEFAULT_PORT)
    else:
        host, colon, port = text.partition(":")
        if not colon:
            port = str(DEFAULT_PORT)
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65_535):
        raise ConfigError([f"{shown!r}: the port must be a number from 1 to 65535"])
    return Address(_host(host, shown), int(port))


def _host(host: str, shown: str) -> str:
    if is_ip(host):
        return host.lower()
    try:
        name = host.rstrip(".").encode("idna").decode("ascii").lower()
    except UnicodeError:
        name = ""
    labels = name.split(".")
    if (
        not name
        or len(name) > _NAME_MAX_LENGTH
        or not all(_LABEL_ALPHABET.issuperset(label) and label for label in labels)
        or labels[-1].isdigit()  # resolvers would accept "1.2.3" as an IP address
    ):
        raise ConfigError([f"{shown!r}: not a host name or address; write HOST:PORT"])
    return name


def is_ip(host: str) -> bool:
    """Return whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


T = TypeVar("T")

Target = Address | Endpoint
"""An endpoint, or an address that cannot be resolved."""


class GoingAway(CannotConnect):
    """GOAWAY arrived together with WELCOME."""


@dataclass(slots=True)
class _Health:
    """What is known of a target: `error` is that of the last attempt."""

    backoff: Backoff
    rests_until: float = -inf
    error: ZcprotoError | None = None


@dataclass(eq=False, repr=False)
class Endpoints:
    """The endpoints of a client, and when each may be tried. `last_error` is that of the last failure.

    Args:
        addresses: what the application gave.
        is_random: whether to try addresses in random order instead of as listed.
        random: also for the delays.
    """

    addresses: Sequence[Address]
    is_random: bool
    random: Random
    last_error: ZcprotoError | None = field(default=None, init=False)
    was_connected: bool = field(default=False, init=False)
    _health: dict[Target, _Health] = field(default_factory=dict, init=False)
    _listed: list[Target] = field(default_factory=list, init=False)  # in the last round
    _unlisted: set[Address] = field(default_factory=set, init=False)  # not resolved by the end of it
    _last: Endpoint | None = field(default=None, init=False)  # of the last connection
    _stable_at: float = field(default=inf, init=False)  # when that counts as a success

    @property
    def due_at(self) -> float:
        """When the next round may begin. An address that the last one has not resolved may be tried at any time."""
        if self._unlisted:
            return -inf
        return min(map(self.rests_until, self._listed), default=-inf)

    @property
    def is_refused(self) -> bool:
        """Whether nothing listens at one of the endpoints."""
        return any(isinstance(error, CannotConnect) and error.refused for error in self._errors())

    @property
    def has_several(self) -> bool:
        """Whether there is more than one endpoint, as far as the addresses were resolved."""
        return len(self._listed) + len(self._unlisted) > 1

    def begin_round(self, without: Endpoint | None = None) -> Round:
        """Begin a round: resolve the addresses in its `order`, and make its attempts, `without` an endpoint."""
        order = list(self.addresses)
        if self.is_random:
            _shuffle(order, self.random)
        if self._last is not None:
            order.sort(key=self._last.address.__ne__)
        self._listed = []
        self._unlisted = set(order)
        return Round(self, order, without)

    def connected(self, endpoint: Endpoint, now: float) -> None:
        """Note the connection that the client uses from now on."""
        self._last, self._stable_at = endpoint, now + STABLE_AFTER
        health = self._of(endpoint)
        health.rests_until, health.error = -inf, None
        if not self.was_connected:
            self.was_connected = True
            for each in self._health.values():
                each.backoff.reset()  # waiting for the start does not delay the first reconnect

    def lost(self, endpoint: Endpoint, now: float, retry_after_ms: int = 0) -> None:
        """Let the endpoint of the connection rest that was lost, or whose server goes away."""
        health = self._of(endpoint)
        if now >= self._stable_at:
            health.backoff.reset()
        self._stable_at = inf
        _rest(health, now + health.backoff.next(retry_after_ms))

    def failed(self, target: Target, error: ZcprotoError, now: float, retry_after_ms: int = 0) -> None:
        """Let a target rest after a failed attempt."""
        health = self._of(target)
        health.error = self.last_error = error
        delay = health.backoff.next()
        if not self.was_connected:
            delay = min(delay, MAX_START_DELAY)
        _rest(health, now + delay + retry_after_ms / MS_PER_SECOND)

    def failure(self, starts_until: float) -> ZcprotoError | None:
        """Return the error of a round without success; None if another round may have success.

        Before the first connection it may while a server is starting, until `starts_until`; later unless all
        endpoints have failed permanently.
        """
        errors = self._errors()
        permanent = next(filter(_is_permanent, errors), None)
        if self.was_connected:
            if not all(map(_is_permanent, errors)):
                return None
            for each in self._listed:
                self._of(each).rests_until = -inf  # the next call tries again
            return permanent
        if None in errors:
            return None  # not all were tried
        others = (error for error in errors if not _is_starting(error))
        is_starting = any(map(_is_starting, errors)) and self.due_at < starts_until
        return permanent or (None if is_starting else next(others, self.last_error))

    def _errors(self) -> list[ZcprotoError | None]:
        return [self._of(each).error for each in self._listed]

    def _of(self, target: Target) -> _Health:
        """Return what is known of a target, which counts as used."""
        health = self._health.pop(target, None) or _Health(Backoff(self.random))
        self._health[target] = health
        if len(self._health) > MAX_KNOWN:
            del self._health[next(iter(self._health))]
        return health

    # --- called by a round ------------------------------------------------------------------------

    def rests_until(self, target: Target) -> float:
        """Return when a target may be tried."""
        health = self._health.get(target)
        return -inf if health is None else health.rests_until

    def list_resolved(self, address: Address, ips: Sequence[str]) -> list[Endpoint]:
        """List the endpoints of an address, in the order of their attempts."""
        self._unlisted.discard(address)
        families: dict[bool, list[str]] = {}
        for ip in dict.fromkeys(ips):
            families.setdefault(":" in ip, []).append(ip)
        if self.is_random:
            for family in families.values():
                _shuffle(family, self.random)
        positions = (
            (at, turn, ip) for turn, each in enumerate(families.values()) for at, ip in enumerate(each)
        )
        found = [Endpoint(*address, ip) for _, _, ip in sorted(positions)]
        if self._last is not None:
            found.sort(key=self._last.__ne__)
        del found[max(0, MAX_ENDPOINTS - len(self._listed)) :]
        self._listed += found
        return found

    def list_unresolved(self, address: Address, error: ZcprotoError, now: float) -> None:
        self._unlisted.discard(address)
        self._listed.append(address)
        self.failed(address, error, now)


class Round:
    """The attempts to connect to each endpoint once. Call `next` after everything that happens."""

    def __init__(self, endpoints: Endpoints, order: Sequence[Address], without: Endpoint | None) -> None:
        self.order = order
        self._endpoints = endpoints
        self._found: dict[Address, list[Endpoint]] = {}
        self._tried: set[Endpoint | None] = {without}
        self._latest: Endpoint | None = None
        self._next_at = -inf  # the next attempt beside the latest
        self._names_until = inf  # when names that are not resolved yet are no longer waited for

    def resolved(self, address: Address, ips: Sequence[str], now: float) -> None:
        """Add the IP addresses of an address, in the resolver's order."""
        self._found[address] = self._endpoints.list_resolved(address, ips)
        self._names_until = min(self._names_until, now + RESOLUTION_DELAY)

    def unresolved(self, address: Address, error: ZcprotoError, now: float) -> None:
        """Note that an address cannot be resolved."""
        self._found[address] = []
        self._endpoints.list_unresolved(address, error, now)

    def reached(self, endpoint: Endpoint, now: float) -> None:
        """Note that an attempt has a TCP connection."""
        if endpoint == self._latest:
            self._next_at = now + HANDSHAKE_DELAY

    def failed(self, endpoint: Endpoint, error: ZcprotoError, now: float) -> None:
        """Note that an attempt has failed."""
        if endpoint == self._latest:
            self._next_at = -inf
        self._endpoints.failed(endpoint, error, now)

    def next(self, now: float) -> Endpoint | float:
        """Return the endpoint to try now, or when to ask again: infinite if only an attempt or a name counts."""
        rests_until = inf
        for address in self.order:
            found = self._found.get(address)
            if found is None and now < self._names_until:
                return self._names_until
            for endpoint in found or ():
                if endpoint in self._tried:
                    continue
                if (until := self._endpoints.rests_until(endpoint)) > now:
                    rests_until = min(rests_until, until)
                elif now < self._next_at:
                    return self._next_at
                else:
                    self._tried.add(endpoint)
                    self._latest, self._next_at = endpoint, now + ATTEMPT_DELAY
                    return endpoint
        return rests_until


def _rest(health: _Health, until: float) -> None:
    health.rests_until = max(health.rests_until, until)


def _is_permanent(error: ZcprotoError | None) -> bool:
    return isinstance(error, TlsError) and not is_transient(error.failure)


def _is_starting(error: ZcprotoError | None) -> bool:
    """Return whether a server at this endpoint may be starting, or be replaced by a new one."""
    return isinstance(error, GoingAway) or (isinstance(error, CannotConnect) and error.refused)


def _shuffle(items: list[T], random: Random) -> None:
    """Bring items into random order (Fisher-Yates)."""
    for last in range(len(items) - 1, 0, -1):
        at = int(random() * (last + 1))
        items[at], items[last] = items[last], items[at]
