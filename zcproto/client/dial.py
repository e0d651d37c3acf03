"""Connect to an endpoint: TCP, TLS, WELCOME and the host's `sts` policy. Resolve a name.

Decides: which servers are trusted, which TLS context a connection uses, which `sts` policies are remembered, and
which error a failed attempt raises.

Must not know: calls, sessions, retries, which endpoint is tried when.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import socket
import ssl
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from zcproto.client.endpoints import Address, Endpoint, is_ip, parse_address
from zcproto.client.options import ConnectOptions, find_home
from zcproto.client.protocol import ClientProtocol, ConnectionOwner, mark_retrieved
from zcproto.client.retry import is_transient
from zcproto.common.clock import MS_PER_SECOND, Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.files import locked, replace_file
from zcproto.common.text import counted, escape_text
from zcproto.common.watcher import NO_FILE, FileIdentity, file_identity
from zcproto.connection.client import ClientConnection
from zcproto.errors import CannotConnect, CertificateError, ConfigError, ConnectionClosed, TlsError
from zcproto.tls.client import TlsClientTransport, TlsConnector
from zcproto.tls.context import client_context
from zcproto.tls.failure import TlsFailure
from zcproto.tls.pins import CERTIFICATE_PREFIX, MAX_PINS, parse_pins
from zcproto.tls.transport import receive_buffer

log: Final = logging.getLogger("zcproto.client")

MAX_CONTEXTS: Final = 64
"""Maximum of cached contexts; connections hold their own references."""

KNOWN_HOSTS_FILE: Final = "known_hosts.json"
MAX_HOSTS: Final = 1_000
MAX_FILE_SIZE: Final = 1_048_576
MAX_AGE: Final = 10 * 365 * 86_400
"""Maximum of seconds for which a policy is remembered."""

MAX_UNTIL: Final = 2**53 - 1
"""Maximum expiry in the file, which clients in JavaScript share."""

REWRITE_AFTER: Final = 86_400
"""Minimum of seconds between the stored and the new expiry for a write: every connection extends the policy."""

LOCK_WAIT_S: Final = 10.0

Contexts = dict[tuple[object, ...], tuple[tuple[FileIdentity, ...], ssl.SSLContext]]
"""Contexts by files and options, each with the state of the files from which it was made."""


class Trust:
    """The servers that a client trusts, by CA or pin or both, and the certificate and key log that it uses.

    Raises ConfigError for options that contradict each other, TlsError for a malformed pin.
    """

    def __init__(self, options: ConnectOptions) -> None:
        self.ca_file = _path(options.ca_file)
        self.pins = parse_pins(options.pins)
        self.system_store = options.system_store or not (self.ca_file or self.pins)
        self.verify = options.verify
        self._by_ca = self.verify and (self.ca_file is not None or self.system_store)
        self.certificate = _path(options.certificate)
        self.key_file = _path(options.certificate_key)
        self.key_passphrase = options.certificate_passphrase
        self.key_log = _path(options.key_log_file)
        if not self.verify and (self.ca_file or self.pins or options.system_store):
            raise ConfigError(
                ["verify=False: it excludes ca_file, pins and system_store; remove it or the others"]
            )
        if self.ca_file and options.system_store:
            raise ConfigError(["ca_file and system_store: only one of them can be trusted; remove the other"])
        if self.certificate is None and (self.key_file is not None or self.key_passphrase is not None):
            raise ConfigError(
                ["certificate_key and certificate_passphrase: certificate is missing; give its file"]
            )
        if len(self.pins) == 1:
            _warn_of_single_pin(*self.pins)

    @property
    def key(self) -> tuple[object, ...]:
        """What distinguishes a context: whether a CA verifies, the files, the passphrase and the key log."""
        return self._by_ca, self.ca_file, self.certificate, self.key_file, self.key_passphrase, self.key_log

    def context(self, cache: Contexts) -> ssl.SSLContext:
        """Return a cached context if its files have not changed, or make one. Reads the disk.

        The next connection uses a renewed certificate. While the certificate and its key do not match, as during
        their replacement, the previous context stays in use. Raises CertificateError, and ConfigError for a key log
        that cannot be written.
        """
        key, files = self.key, (self.ca_file, self.certificate, self.key_file)
        # Before reading, so that a later change is noticed next time.
        stamp = tuple(NO_FILE if file is None else file_identity(file) for file in files)
        found = cache.get(key)
        if found is None or found[0] != stamp:
            try:
                context = client_context(
                    ca_file=self.ca_file,
                    verify=self._by_ca,
                    certificate=self.certificate,
                    key=self.key_file,
                    passphrase=self.key_passphrase,
                    key_log=self.key_log,
                )
            except CertificateError as error:
                if found is None or found[0][0] != stamp[0]:  # never trust the previous CA file
                    raise
                log.warning("%s; still presenting the previous client certificate", escape_text(str(error)))
                return found[1]
            if self.key_log is not None:
                _warn_of_key_log(self.key_log)
            found = cache[key] = stamp, context
            if len(cache) > MAX_CONTEXTS:
                cache.pop(next(iter(cache)), None)
        return found[1]

    def is_ca_missing(self) -> bool:
        """Return whether there is no file at `ca_file`."""
        return self.ca_file is not None and not self.ca_file.exists()


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


@lru_cache(MAX_PINS)
def _warn_of_single_pin(pin: str) -> None:
    """Log a warning once per pin, not once per client."""
    log.warning(
        "%s is the only pin: when the server's %s is replaced, this client cannot connect; add the pin of the"
        " server's next key as a backup",
        pin,
        "certificate" if pin.startswith(CERTIFICATE_PREFIX) else "key",
    )


@lru_cache(MAX_CONTEXTS)
def _warn_of_key_log(path: Path) -> None:
    """Log a warning once per file."""
    log.warning(
        "TLS secrets are appended to %s: anyone who can read it can decrypt captured connections",
        escape_text(str(path)),
    )


class StsPolicy(NamedTuple):
    """The expiry in seconds since the Unix epoch, and whether the policy covers subdomains."""

    until: int
    include_subdomains: bool


class KnownHosts:
    """The file of the hosts that announced an `sts` policy (zcp1.md, section 6.2; RFC 6797 for programs).

    A policy is learned over a verified connection only. `max_age` 0 removes it. With `include_subdomains` it covers
    the names below the host. Addresses have no policy. The file is JSON of mode 0600, replaced atomically under a
    lock. It holds MAX_HOSTS; policies that expire first are dropped. A file that cannot be read is never treated as
    empty.
    """

    __slots__ = ("path",)

    def __init__(self, path: Path) -> None:
        self.path = path

    def learn(self, host: str, sts: Mapping[str, Any], wall: int) -> None:
        """Store the policy that a host sent over a verified connection. Raises OSError, ConfigError."""
        if is_ip(host):
            return
        now = wall // MS_PER_SECOND
        max_age = min(sts["max_age"], MAX_AGE)
        policy = StsPolicy(now + max_age, sts["include_subdomains"])
        if self._is_known(host, policy, max_age, now):
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self.path.with_name(f"{self.path.name}.lock"), LOCK_WAIT_S):
            hosts = {name: known for name, known in self._read().items() if known.until > now}
            if max_age:
                hosts[host] = policy
            else:
                hosts.pop(host, None)
            while len(hosts) > MAX_HOSTS:
                del hosts[min(hosts, key=lambda name: hosts[name].until)]
            self._write(hosts)

    def _is_known(self, host: str, policy: StsPolicy, max_age: int, now: int) -> bool:
        """Return whether the file has this policy with about the same expiry."""
        known = self._read().get(host)
        if known is None:
            return not max_age
        if not max_age:
            return False
        near = abs(known.until - policy.until) < min(REWRITE_AFTER, max_age // 2)
        return near and known.until > now and known.include_subdomains == policy.include_subdomains

    def require(self, host: str, wall: int) -> None:
        """Raise TlsError if a policy forbids connecting to a host without verification."""
        if is_ip(host):
            return
        try:
            hosts = self._read()
        except ConfigError as error:
            raise TlsError("sts_policy", f"verification cannot be off: {error}") from error
        now = wall // MS_PER_SECOND
        labels = host.split(".")
        for start in range(len(labels)):
            name = ".".join(labels[start:])
            known = hosts.get(name)
            if known is None or known.until <= now or not (start == 0 or known.include_subdomains):
                continue
            days = (known.until - now) // 86_400 + 1
            raise TlsError(
                "sts_policy",
                f"{name} requires verified connections for {counted(days, 'more day')}; remove verify=False"
                f" (policy stored in {escape_text(str(self.path))})",
            )

    def _read(self) -> dict[str, StsPolicy]:
        """Return all policies of the file. Raises ConfigError if it is damaged or unreadable."""
        try:
            with self.path.open("rb") as file:
                content = file.read(MAX_FILE_SIZE + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._unreadable(error.strerror or type(error).__name__) from error
        try:
            if len(content) > MAX_FILE_SIZE:
                raise ValueError("too large")
            hosts = json.loads(content)["hosts"]
            return {name: _policy(entry) for name, entry in hosts.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._unreadable("cannot be parsed") from error

    def _unreadable(self, cause: str) -> ConfigError:
        return ConfigError(
            [f"{escape_text(str(self.path))}: {cause}; repair it, or delete it to forget its hosts"]
        )

    def _write(self, hosts: dict[str, StsPolicy]) -> None:
        text = json.dumps(
            {"hosts": {name: policy._asdict() for name, policy in sorted(hosts.items())}}, indent=1
        )
        replace_file(self.path, f"{text}\n".encode())


def _policy(entry: dict[str, Any]) -> StsPolicy:
    until, include_subdomains = entry["until"], entry["include_subdomains"]
    if until.__class__ is not int or abs(until) > MAX_UNTIL or include_subdomains.__class__ is not bool:
        raise ValueError("wrong types")
    return StsPolicy(until, include_subdomains)


def find_known_hosts(home: str | Path | None) -> KnownHosts | None:
    """Return the policies in a home folder. None for a user without one, as in some containers."""
    found = find_home(home)
    return None if found is None else KnownHosts(found.path / KNOWN_HOSTS_FILE)


class LoopResources:
    """What the clients of one event loop share, because a buffer takes 64 KiB and a context with the system's CAs
    more."""

    __slots__ = ("_loop", "_starting", "buffer", "contexts", "users", "wheel")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._starting: dict[tuple[object, ...], asyncio.Task[ssl.SSLContext]] = {}
        self.buffer = receive_buffer()
        self.wheel = DeadlineWheel(loop)
        self.contexts: Contexts = {}
        self.users = 0

    async def context(self, trust: Trust) -> ssl.SSLContext:
        """Return the context of a trust. Raises like `Trust.context`.

        Attempts of one turn of the loop share one look at the files: after the loss of a server its clients would
        otherwise wait for each other in the threads.
        """
        shared = self._starting.get(trust.key)
        if shared is None:
            shared = self._starting[trust.key] = self._loop.create_task(self._load(trust))
            shared.add_done_callback(mark_retrieved)  # all that wait may have been cancelled
        await asyncio.wait([shared])  # cancelling one attempt does not cancel it
        return shared.result()

    async def _load(self, trust: Trust) -> ssl.SSLContext:
        del self._starting[trust.key]  # later attempts must see later changes of the files
        return await asyncio.to_thread(trust.context, self.contexts)


_resources: dict[asyncio.AbstractEventLoop, LoopResources] = {}


def acquire_resources(loop: asyncio.AbstractEventLoop) -> LoopResources:
    """Return the resources of a loop, until `release_resources`."""
    resources = _resources.get(loop)
    if resources is None:
        resources = _resources[loop] = LoopResources(loop)
    resources.users += 1
    return resources


def release_resources(loop: asyncio.AbstractEventLoop) -> None:
    resources = _resources[loop]
    resources.users -= 1
    if not resources.users:
        del _resources[loop]
        resources.wheel.close()


Resolve = Callable[[Address], Coroutine[Any, Any, Sequence[str]]]
"""Returns the IP addresses of a name, the resolver's choice first. Raises CannotConnect, TlsError."""

Dial = Callable[
    [ConnectionOwner, LoopResources, Endpoint, Callable[[], None]], Coroutine[Any, Any, ClientProtocol]
]
"""Returns a connection that has received WELCOME, and calls the function as soon as there is a TCP connection."""


class Dialer:
    """Connects to the servers of a client, any number of times. Raises ConfigError and TlsError like Trust."""

    def __init__(self, options: ConnectOptions, clock: Clock, system_clock: Clock) -> None:
        self._trust = Trust(options)
        self._known_hosts = find_known_hosts(options.home)
        name = options.server_hostname
        self._server_hostname = None if name is None else parse_address(name).host
        self._connect_timeout = options.connect_timeout
        self._clock = clock
        self._system_clock = system_clock

    async def resolve(self, address: Address) -> Sequence[str]:
        """Return the IP addresses of a name. Raises CannotConnect, TlsError."""
        await self._require_verification(address.host)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout):
                found = await loop.getaddrinfo(*address, type=socket.SOCK_STREAM)
        except TimeoutError:
            raise CannotConnect(
                f"{address}: DNS has not answered within {self._connect_timeout:g} s; check the host name and DNS"
            ) from None
        except OSError as failure:
            raise connect_error(address, failure) from failure
        return [_ip_of(sockaddr) for *_, sockaddr in found]

    async def __call__(
        self,
        owner: ConnectionOwner,
        resources: LoopResources,
        endpoint: Endpoint,
        on_reached: Callable[[], None],
    ) -> ClientProtocol:
        """Return a connection that has received WELCOME. Call `on_reached` as soon as there is a TCP connection.

        Raises CannotConnect, ConnectionClosed, TlsError, CertificateError, ConfigError.
        """
        await self._require_verification(endpoint.host)
        hostname, wall = self._hostname(endpoint.host), self._system_clock.wall
        context = await self._context(resources, endpoint)
        connector = TlsConnector(
            context,
            hostname,
            resources.wheel,
            pins=self._trust.pins,
            wall=wall,
            buffer=resources.buffer,
            handshake_timeout=self._connect_timeout,
        )
        return await self._connect(connector, owner, resources, endpoint, on_reached)

    def _hostname(self, host: str) -> str:
        """Return the name that the certificate of a host must be valid for."""
        return host if self._server_hostname is None else self._server_hostname

    async def _require_verification(self, host: str) -> None:
        """Raise TlsError if a policy forbids connecting to a host without verification."""
        if not self._trust.verify and self._known_hosts is not None:
            for name in {host, self._hostname(host)}:
                await asyncio.to_thread(self._known_hosts.require, name, self._system_clock.wall())

    async def _context(self, resources: LoopResources, endpoint: Endpoint) -> ssl.SSLContext:
        try:
            return await resources.context(self._trust)
        except CertificateError:  # a server that is starting writes its CA before it listens
            if self._trust.is_ca_missing():
                await self._require_listening(endpoint)
            return await resources.context(self._trust)

    async def _require_listening(self, endpoint: Endpoint) -> None:
        """Raise CannotConnect if nothing accepts a connection."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout):
                transport, _ = await loop.create_connection(asyncio.Protocol, endpoint.ip, endpoint.port)
        except TimeoutError:
            raise self._no_answer(endpoint) from None
        except OSError as failure:
            raise self._cannot_connect(endpoint, failure) from failure
        transport.abort()

    async def _connect(
        self,
        connector: TlsConnector,
        owner: ConnectionOwner,
        resources: LoopResources,
        endpoint: Endpoint,
        on_reached: Callable[[], None],
    ) -> ClientProtocol:
        loop = asyncio.get_running_loop()
        connection = ClientProtocol(owner, loop, resources.wheel, self._clock, ClientConnection(), endpoint)
        handshaken: asyncio.Future[TlsError | None] = loop.create_future()

        def on_handshake(error: TlsError | None) -> None:
            if not handshaken.done():  # the attempt may have been cancelled
                handshaken.set_result(error)

        transport = TlsClientTransport(connector, connection, on_handshake)
        try:
            async with asyncio.timeout(self._connect_timeout):
                await loop.create_connection(lambda: transport, endpoint.ip, endpoint.port)
                on_reached()
                error = await handshaken
                if error is not None:
                    raise error
                await connection.welcomed
            await self._remember(connection)
        except ConnectionClosed as closed:
            # In TLS 1.3 a server refuses a client certificate after the client has finished the handshake: with an
            # alert, or by closing the connection.
            refusal = transport.error
            if refusal is not None and not is_transient(refusal.failure):
                raise refusal from None
            if closed.clean and self._trust.certificate is not None:
                raise ConnectionClosed(
                    f"{closed.reason} before its WELCOME: it may have refused the client certificate;"
                    " see the server's log",
                    clean=True,
                ) from None
            raise
        except TimeoutError:
            transport.abort()
            refusal = transport.error
            if refusal is not None and refusal.failure != TlsFailure.HANDSHAKE_TIMEOUT.value:
                raise refusal from None  # reported late, because the server has not closed its end
            raise self._no_answer(endpoint) from None
        except OSError as failure:
            raise self._cannot_connect(endpoint, failure) from failure
        except asyncio.CancelledError:
            transport.abort()
            raise
        return connection

    def _no_answer(self, endpoint: Endpoint) -> CannotConnect:
        return CannotConnect(
            f"{endpoint}: no answer within {self._connect_timeout:g} s; check the address and the firewall"
        )

    def _cannot_connect(self, endpoint: Endpoint, failure: OSError) -> CannotConnect:
        missing_ca = self._trust.ca_file if self._trust.is_ca_missing() else None
        return connect_error(endpoint.address, failure, missing_ca)

    async def _remember(self, connection: ClientProtocol) -> None:
        """Store the policy of a verified server. If that fails, log a warning and connect anyway."""
        hostname = self._hostname(connection.endpoint.host)
        if not self._trust.verify or self._known_hosts is None or is_ip(hostname):
            return
        try:
            await asyncio.to_thread(
                self._known_hosts.learn,
                hostname,
                connection.conversation.welcome["sts"],
                self._system_clock.wall(),
            )
        except (OSError, ConfigError) as error:
            log.warning("the sts policy of %s cannot be stored: %s", hostname, escape_text(str(error)))


def _ip_of(sockaddr: tuple[Any, ...]) -> str:
    """Return the address of a socket address, with the zone of a link-local one."""
    ip, _, *more = sockaddr
    zone = more[1] if len(more) > 1 else 0
    return f"{ip}%{zone}" if zone and "%" not in ip else str(ip)


def report_wait(addresses: Sequence[Address], seconds: float) -> None:
    """Log that no server listens yet."""
    listed = ", ".join(map(str, addresses))
    log.warning("%s: nothing listens there yet; waiting up to %g s for the server to start", listed, seconds)


def connect_error(address: Address, error: OSError, missing_ca: Path | None = None) -> CannotConnect:
    """Return the error of a failed attempt, with the system's message."""
    if isinstance(error, socket.gaierror) or error.errno is None:
        return CannotConnect(
            f"{address}: {error.strerror or type(error).__name__}; check the host name and DNS"
        )
    if error.errno != errno.ECONNREFUSED:
        return CannotConnect(f"{address}: {os.strerror(error.errno)}; check the address and the network")
    missing = "" if missing_ca is None else f", and {escape_text(str(missing_ca))} does not exist"
    return CannotConnect(
        f"{address}: {os.strerror(error.errno)}{missing}; start the server, or check the host and the port",
        refused=True,
    )
