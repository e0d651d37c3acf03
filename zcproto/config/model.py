"""Define every setting: its name, what it accepts, its default and the reason for it.

Rules: an attribute has the name of its key in the TOML file; a duration is float seconds, None if it is off. All
defaults together are a safe server. The models are frozen; a new configuration is a new object.

Must not know: files, the environment, the command line.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, Field, model_validator

from zcproto.common.home import resolve_home
from zcproto.config.checks import SITE_CHECKS, contradictions
from zcproto.config.types import (
    BINDING,
    CERTIFICATE_NAME,
    CLAIM_TEXT,
    COLLECTOR_URL,
    COMMAND,
    EAB_KID,
    EMAIL,
    FILE_PATH,
    FLAG,
    FRACTION,
    HOST_NAME,
    HTTPS_URL,
    ISSUER_URL,
    METHOD_PATTERN,
    NETWORK,
    OPTIONAL_PATH,
    PIN,
    ROLE_NAME,
    ROLE_OF_CLAIM,
    SERVICE_NAME,
    SITE_NAME,
    STORE_URL,
    USER_PREFIX,
    VARIABLE_NAME,
    WEBHOOK_URL,
    Accepts,
    Fault,
    FaultsError,
    Settings,
    duration,
    each_of,
    list_of,
    one_of,
    settings_of,
    tables_of,
    whole,
    whole_or_auto,
)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Those of zcproto/auth/jwt.py: a test compares them."""

KEY_TYPES = ("rsa-4096", "ecdsa-p256")


class ServerConfig(Settings):
    """Where the server listens, and how it stops."""

    host: Annotated[tuple[str, ...], list_of(HOST_NAME, 1, 16, bare=True)] = ("127.0.0.1",)
    """The addresses to listen on. The default is this machine only: opening a server to a network is a
    decision. "::" is all IPv6 addresses of the machine, "0.0.0.0" all IPv4 addresses."""
    port: Annotated[int, whole(1, 65_535, "any free port")] = 7443
    """The TCP port. The default needs no privilege and is not 443, where people expect a web site."""
    drain_timeout: Annotated[float, duration("0s", "1h")] = 30.0
    """How long requests may run after SIGTERM before they are cancelled. The default is what service managers
    commonly wait."""
    lifespan_timeout: Annotated[float, duration("100ms", "1h")] = 30.0
    """How long the lifespan of the application may take to start, and again to end. A start that takes longer
    fails, since a service manager would wait without a reason in the log."""
    upgrade_timeout: Annotated[float, duration("1s", "1h")] = 60.0
    """How long `zcproto upgrade` waits for the new server. If it does not serve by then, the old one serves on. The
    default is twice the time that a lifespan may take to start."""
    workers: Annotated[int | None, whole_or_auto(1, 256)] = 1
    """The number of processes that serve connections, on Linux and macOS; one process uses one core. "auto" is the
    number of cores that this process may use. With 1 there is a single process. With more there are also a
    supervisor and a coordinator, so that small machines do better with the default. Limits hold for all of
    them together."""
    hang_timeout: Annotated[float | None, duration("1s", "1h", off=True)] = 30.0
    """How long the event loop of a worker or of the coordinator may stand still. Then the process is aborted,
    writes the stack of each thread to stderr, and is started again; so is one that is not ready within this time,
    but at least 30 s, and `lifespan_timeout`. Time in which it waits for a processor does not count, on Linux.
    WatchdogSec= of systemd applies if it is shorter. "off" is for a debugger in a worker. With one process only
    systemd can notice."""
    proxy_protocol_from: Annotated[tuple[str, ...], list_of(NETWORK, 0, 64)] = ()
    """The load balancers that send the client's address in a PROXY protocol header, version 2, before TLS
    begins. From these the header is required; from all others, who could forge any address with it, it is
    refused as invalid TLS."""


class TlsConfig(Settings):
    """The TLS endpoint. It speaks TLS 1.3 only; no key changes that."""

    handshake_timeout: Annotated[float, duration("100ms", "30s")] = 5.0
    """Time from accept to the end of the handshake: two round trips, room for several lost packets, and
    little for a slow attacker."""
    max_handshakes: Annotated[int, whole(1, 65_536)] = 256
    """Concurrent handshakes, each counted from its complete ClientHello to its end. It costs tens of KiB and up
    to 2 ms of CPU; the default is about half a second of work. A network gets at most as many as it leaves free:
    half of them alone, a fifth each beside three others. Each worker has as many."""
    max_pending: Annotated[int, whole(1, 1_000_000)] = 4096
    """Connections without a complete ClientHello, or that wait for their handshake. They are shared between
    networks as above. Beyond its share a new connection replaces the oldest one that sent no complete ClientHello.
    Each takes about 5 KiB, and up to 16 KiB of half a ClientHello. Raise it if a load balancer without PROXY
    protocol forwards all clients from one address. Divided among workers, each of which has at least 256."""
    client_auth: Annotated[str, one_of("off", "optional", "required")] = "off"
    """Whether clients present certificates. "optional": a client with a certificate may open sessions with
    it; "required": connections without one are refused. By default users open sessions with keys, which need
    no certificates."""
    client_ca_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """The CA certificates that sign client certificates. Empty: the managed client CA, client-ca.crt in the
    folder of certificates, since an external CA would admit every client that it signs for."""
    client_crl_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """The revoked client certificates, as a CRL. Empty: those that the managed client CA has revoked."""
    client_pins: Annotated[tuple[str, ...], each_of(PIN, 0, 64)] = ()
    """The pins of client certificates to accept, among those that the CA has signed. Empty: all of them."""
    client_name: Annotated[str, one_of("dns", "email", "uri")] = "dns"
    """Which kind of name (SubjectAltName) in a client certificate is the user's name. The default is the kind
    that every tool can write."""


class SiteConfig(Settings):
    """An external certificate for some names."""

    names: Annotated[tuple[str, ...], each_of(SITE_NAME, 1, 100)] = Field(
        examples=[("a.example.com", "*.a.example.com")]
    )
    """The names for which clients get this certificate. Exact names precede wildcards."""
    certificate: Annotated[tuple[Path, ...], list_of(FILE_PATH, 1, 2)] = Field(
        examples=[(Path("/etc/zcproto/a.example.com.pem"),)]
    )
    """Files of certificate chains, one for each type of key."""
    key: Annotated[tuple[Path, ...], list_of(FILE_PATH, 0, 2)] = ()
    """Files of private keys, in the order of the certificates. Empty: the same files hold the keys too."""
    key_passphrase_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """A file with the passphrase of the keys. Empty: the keys are not encrypted."""
    key_passphrase_variable: Annotated[str | None, VARIABLE_NAME] = None
    """The environment variable with the passphrase, to keep it off the disk."""

    @model_validator(mode="after")
    def _check_keys(self) -> SiteConfig:
        faults = [
            Fault(f".{subject}", getattr(self, subject), f"{check.demand} {measure}")
            for check in SITE_CHECKS
            for subject, measure in [check.keys[:2]]
            if not check.holds(*(getattr(self, key) for key in check.keys))
        ]
        if faults:
            raise FaultsError(faults)
        return self


def _duplicate_names(sites: Mapping[int, SiteConfig]) -> Iterator[Fault]:
    """Yield a fault for each name that a site shares with an earlier one."""
    owners: dict[str, int] = {}
    for index, site in sites.items():
        for place, name in enumerate(site.names):
            owner = owners.setdefault(name, index)
            if owner != index:
                sentence = f"is a name of certificates.site[{owner}] too; a name is served by one site"
                yield Fault(f"[{index}].names[{place}]", name, sentence)


class CertificatesConfig(Settings):
    """The server's certificates."""

    directory: Annotated[Path, FILE_PATH] = Field(default_factory=lambda: resolve_home(None, {}).certs)
    """The folder of certificates and keys, of mode 0700. The default is certs in the home folder."""
    mode: Annotated[str, one_of("own", "acme", "files")] = "own"
    """Who issues the certificates. "own": a private CA in the folder above, created on first start. "acme": a
    public CA, as [acme] says, and the private CA until the first certificate is there. "files": an external tool,
    and the server watches the files named below."""
    key_types: Annotated[tuple[str, ...], list_of(one_of(*KEY_TYPES), 1, 2)] = KEY_TYPES
    """The types of keys to serve, all on one port. RSA is for clients that accept nothing else; ECDSA signs
    about 15 times faster and is used for every client that accepts it."""
    names: Annotated[tuple[str, ...], list_of(CERTIFICATE_NAME, 0, 100)] = ()
    """Names and addresses in a managed certificate, in addition to localhost and those of the host. With mode =
    "acme": those for which certificates are ordered, and no others. With mode = "files": those that the
    certificates must have; without any, a new one must share a name with the one that it replaces."""
    lifetime: Annotated[float, duration("1m", "397d")] = 90 * 86_400.0
    """How long a new certificate is valid. Short lifetimes limit the damage of a lost key; 397 days is the
    most that web clients accept."""
    renew_before: Annotated[float, duration("1s", "396d")] = 30 * 86_400.0
    """How long before its expiry a certificate is renewed: time to notice a failure. At most a third of its
    lifetime counts, so that a short lifetime needs no other value."""
    renew_key: Annotated[bool, FLAG] = False
    """Whether a new certificate gets a new key. The default keeps the pins of clients valid."""
    announce_key: Annotated[float, duration("0s", "396d")] = 7 * 86_400.0
    """How long the pin of a new key is announced to clients before the key is used: a client that connects
    once a week still learns it in time. At most the time until the certificate's renewal counts."""
    repair: Annotated[bool, FLAG] = True
    """Whether a managed key that is damaged or lost is replaced. The server stays available, but clients that
    pin the old key refuse it. With false it does not start until the key is restored."""
    certificate: Annotated[tuple[Path, ...], list_of(FILE_PATH, 0, 2)] = ()
    """With mode = "files": files of certificate chains, one for each type of key."""
    key: Annotated[tuple[Path, ...], list_of(FILE_PATH, 0, 2)] = ()
    """With mode = "files": files of private keys, in the order of the certificates. Empty: the same files
    hold the keys too."""
    key_passphrase_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """With mode = "files": a file with the passphrase of the keys. Empty: the keys are not encrypted; managed
    ones never are."""
    key_passphrase_variable: Annotated[str | None, VARIABLE_NAME] = None
    """With mode = "files": the environment variable with the passphrase, to keep it off the disk."""
    watch_interval: Annotated[float, duration("100ms", "1h")] = 0.25
    """How often the certificate files are checked for changes. A check costs a few system calls; with the
    default a new certificate is active before a person can look. With workers the coordinator checks, and the
    workers follow; by themselves they check every two seconds at most."""
    alert_days: Annotated[tuple[int, ...], list_of(whole(1, 396), 0, 16)] = (30, 14, 7, 3, 1)
    """Days before the expiry of a certificate at which an alert is sent, in the last third of its life."""
    site: Annotated[
        tuple[SiteConfig, ...], tables_of(SiteConfig, "certificates.site", 100, _duplicate_names)
    ] = ()
    """External certificates for some names, in either mode. Clients that ask for none of these names get the
    certificate above."""


class AcmeConfig(Settings):
    """The public CA of certificates.mode = "acme", with which the server speaks ACME (RFC 8555)."""

    directory: Annotated[str, HTTPS_URL] = "https://acme-v02.api.letsencrypt.org/directory"
    """The address of the CA's directory. The default is Let's Encrypt; its staging directory,
    https://acme-staging-v02.api.letsencrypt.org/directory, is for tests."""
    terms_agreed: Annotated[bool, FLAG] = False
    """Whether the operator agrees to the terms of service of the CA, without which it issues nothing. The
    directory names their address."""
    contact: Annotated[tuple[str, ...], list_of(EMAIL, 0, 4)] = ()
    """E-mail addresses that the CA gets when the account is created. Many CAs send nothing to them any more: set
    an alert instead."""
    challenge: Annotated[str, one_of("tls-alpn-01", "http-01")] = "tls-alpn-01"
    """How the CA checks the names. "tls-alpn-01": by TLS on port 443, which must lead to server.port. "http-01": by
    HTTP on port 80, which must lead to http.redirect_port."""
    ca_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """The CA certificates that verify the directory. Empty: those of the system. A company's own ACME server
    usually needs it."""
    eab_kid: Annotated[str, EAB_KID] = ""
    """The key identifier of an external account, which some CAs require to create the account. Empty: none."""
    eab_key_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """A file of mode 0600 with the key of that external account, in base64url. It is used once."""


class SessionsConfig(Settings):
    """Sessions and their tokens."""

    lifetime: Annotated[float, duration("1s", "365d")] = 86_400.0
    """A session ends this long after it was opened, used or not. A day limits the value of a stolen token."""
    idle_timeout: Annotated[float | None, duration("1s", "365d", off=True)] = 3600.0
    """A session that is not used for this long ends. An hour outlasts a pause, but not a forgotten client."""
    per_user: Annotated[int, whole(1, 100_000)] = 5
    """Concurrent sessions of one user: enough for one person's machines, few enough that a thief is
    noticed."""
    when_full: Annotated[str, one_of("evict_disconnected", "evict_oldest", "refuse")] = "evict_disconnected"
    """What happens at the limit: the oldest session that no connection uses ends, and the new one is refused if
    all are in use; or the oldest session ends; or the new one is refused. By default clients that crashed do
    not lock their user out, and a login does not end the session of a client that is connected."""
    refresh: Annotated[bool, FLAG] = True
    """Whether a session has a refresh token, so that a client can continue without its key."""
    refresh_lifetime: Annotated[float, duration("1s", "365d")] = 30 * 86_400.0
    """How long a session can be refreshed, counted from its opening. After that the key is needed again."""
    refresh_grace: Annotated[float, duration("0s", "1m")] = 10.0
    """How long a used refresh token returns the same new pair to the same client: a lost answer is retried
    within seconds, a thief comes later."""
    open_timeout: Annotated[float, duration("100ms", "5m")] = 10.0
    """A connection that opens no session within this time is closed. A request in flight whose session has ended
    is answered within this time."""
    bind_address: Annotated[str, BINDING] = "off"
    """Whether a token is valid only from the address of its opening: that exact address, or its network. Up
    to 32 bits apply to IPv4 addresses; IPv6 ones then match by 64. Clients that move between networks open a
    session in each."""
    bind_client: Annotated[bool, FLAG] = False
    """Whether a refresh token is valid only with the client string of its opening. A new version of a client
    then has to open a new session."""


class StoreConfig(Settings):
    """Where sessions are stored."""

    url: Annotated[str, STORE_URL] = Field(default="sqlite", repr=False)
    """The session store. "sqlite" is the file sessions.db in the home folder, for one server: sessions
    survive a restart. "memory": sessions end with the server, and nothing is on the disk. An address of
    Valkey or Redis is for several servers that share sessions."""
    password_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """A file with the password for Valkey or Redis, to keep it out of this file. Empty: the password in the
    address, if any."""
    ca_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """The CA certificates for the Valkey or Redis server. Empty: those of the system. TLS needs an address
    that begins with rediss:// or valkeys://."""
    certificate_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """The client certificate for that server, if it requires one. Empty: none."""
    key_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """The private key of that certificate. Empty: the same file holds it."""
    timeout: Annotated[float, duration("10ms", "10s")] = 0.25
    """How long one operation of the store may take. A store nearby answers in a few ms; longer is an
    outage."""
    grace: Annotated[float, duration("0s", "24h")] = 300.0
    """How long known sessions stay valid during an outage of the store. After that they are refused."""


class IdempotencyConfig(Settings):
    """Requests with an idempotency key, which run once."""

    keep: Annotated[float, duration("1s", "24h")] = 600.0
    """How long an answer is kept for retries, and how long a request is not run again after the process that
    ran it is gone. Longer than clients retry; methods may take longer. The clock of a shared store counts."""
    max_bytes: Annotated[int, whole(65_536, 17_179_869_184)] = 67_108_864
    """Bytes of all kept answers; one user gets at most a quarter. Beyond the limit the oldest answers are
    dropped early. Most answers are under 1 KiB."""
    per_user: Annotated[int, whole(1, 1_000_000)] = 10_000
    """Keys of one user, beyond which the oldest are dropped: 16 requests a second, each with its own key, for
    the ten minutes that they are kept."""
    running_per_user: Annotated[int, whole(1, 65_536)] = 256
    """Requests with a key of one user that run at the same time. They go on when their connection has ended, and
    each may wait for the store: without a limit one user could make all others wait."""


class FreshnessConfig(Settings):
    """Protection against replayed frames."""

    tolerance: Annotated[float, duration("1s", "10m")] = 30.0
    """How far the timestamp of a frame may be off, inclusive. Clients learn the server's clock when they
    connect, so only delay and drift remain."""


class LimitsConfig(Settings):
    """What one client, and all clients together, can use."""

    max_connections: Annotated[int, whole(1, 1_000_000)] = 20_000
    """Concurrent connections. Each takes about 40 KiB and a file descriptor: 800 MB at the default."""
    connections_per_address: Annotated[int, whole(1, 1_000_000, "no limit")] = 1000
    """Concurrent connections of one address: room for many clients behind one gateway, but not for all."""
    failed_handshakes_per_network: Annotated[int, whole(1, 1_000_000, "no limit")] = 200
    """Connections a second of one network that end before their handshake is complete, on average; twice as many
    at once. One whose handshake had begun counts as four. Beyond it new connections of the network are reset. Set 0
    if a load balancer without PROXY protocol forwards all clients from one address."""
    max_frame_bytes: Annotated[int, whole(1024, 67_108_864)] = 1_048_576
    """The largest frame of a connection with a session, in bytes. It is held in memory as a whole."""
    max_frame_bytes_before_session: Annotated[int, whole(512, 67_108_864)] = 16_384
    """The largest frame of a connection without a session, in bytes: opening a session takes under 1 KiB."""
    partial_frame_bytes: Annotated[int, whole(65_536, 17_179_869_184)] = 50_331_648
    """Bytes of all incomplete frames. Beyond the limit the slowest frame of the user that holds the most is refused
    and its connection closed; 48 MiB are 48 of the largest frames on their way at once. Divided among workers."""
    partial_frame_bytes_per_user: Annotated[int, whole(16_384, 17_179_869_184)] = 16_777_216
    """Bytes of the incomplete frames of one user, or of one address without a session. One frame of
    `max_frame_bytes` always fits."""
    max_streams: Annotated[int, whole(1, 65_535)] = 128
    """Requests in flight on one connection. HTTP/2 servers commonly allow 100 to 128."""
    idle_timeout: Annotated[float, duration("100ms", "24h")] = 300.0
    """A connection that is silent for this long is closed. Clients learn the timeout and ping in time."""
    frame_timeout: Annotated[float, duration("1s", "24h")] = 300.0
    """How long a frame may take from its header to its last byte; then its connection is closed, so that no request
    is held back and run hours later. At the default, 1 MiB needs 3.5 KB a second."""
    write_buffer_bytes: Annotated[int, whole(16_384, 1_073_741_824)] = 1_048_576
    """Bytes waiting for a client that reads slowly, beyond which the server stops reading from it."""
    write_timeout: Annotated[float, duration("100ms", "10m")] = 20.0
    """How long a client may read nothing of the waiting bytes before it is disconnected."""
    requests_per_user: Annotated[int, whole(1, 1_000_000, "no limit")] = 0
    """Requests a second of one user with a session, on average; twice as many at once. More are refused. Set it
    where users can harm each other: one flat out takes half of the server from all others."""
    requests_per_address: Annotated[int, whole(1, 1_000_000, "no limit")] = 0
    """Requests a second of one address, counted alike. Many users may share an address."""
    public_requests_per_address: Annotated[int, whole(1, 1_000_000, "no limit")] = 1000
    """Requests a second without a session of one address, also by HTTP, counted alike: a client has one or two.
    Logins have limits of their own."""
    running_per_user: Annotated[int, whole(1, 1_000_000, "no limit")] = 0
    """Requests in progress of one user: those that wait for something. Requests with a key also have
    idempotency.running_per_user."""
    running_per_address: Annotated[int, whole(1, 1_000_000, "no limit")] = 0
    """Requests in progress of one address. Many users may share an address."""
    threads: Annotated[int, whole(1, 1024)] = 16
    """Methods with `thread=True` that run at once in one worker, each in a thread. One user holds at most three
    quarters of the threads, and the last free one is for a user that holds none."""
    waiting_for_thread: Annotated[int, whole(1, 65_536)] = 64
    """Calls of these methods that wait for a thread; more are refused. Users are served in turn. The calls of one
    user that run or wait are as many as there are threads, or half of both if that is more."""
    login_failures: Annotated[int, whole(1, 100)] = 5
    """Failed logins before delays begin: a person mistypes a few times, a program keeps guessing."""
    login_timeout: Annotated[float, duration("100ms", "10m")] = 8.0
    """How long an authenticator of the application may take for one login. Clients wait 10 seconds."""
    logins_pending: Annotated[int, whole(4, 1_000_000)] = 1024
    """Logins that wait for their authenticators at once; one address may have a quarter of them, one user 16."""


class StreamsConfig(Settings):
    """Streams of items, which methods send and take while they run."""

    max_open: Annotated[int, whole(1, 65_535, "no streams")] = 64
    """Streams in flight on one connection. They also count against `limits.max_streams`; a lower limit than that
    leaves room for requests."""
    max_item_bytes: Annotated[int, whole(1024, 1_048_576)] = 65_536
    """The largest frame of an item, in bytes, in both directions; at most `limits.max_frame_bytes`."""
    window_items: Annotated[int, whole(1, 65_535)] = 32
    """Items that a client may send before its method takes them, per stream; fewer as memory_bytes fills."""
    window_bytes: Annotated[int, whole(1024, 67_108_864)] = 65_536
    """Bytes of these items."""
    memory_bytes: Annotated[int, whole(1_048_576, 1_099_511_627_776)] = 67_108_864
    """Bytes of items of all clients that wait for their methods, at least four of the largest items. One user may
    hold as much as it leaves free: half of it, or a third each of two users. Beyond it the user's own streams are
    cancelled and its new ones refused. What may still be sent counts, too: windows shrink, down to one item, before
    all is promised. Divided among workers."""
    stall_timeout: Annotated[float, duration("1s", "24h")] = 300.0
    """How long an item may wait for a client to ask for it; then its stream is cancelled."""
    durable_per_user: Annotated[int, whole(1, 1_000)] = 16
    """Durable runs of one user that run or are kept. The oldest that has ended makes room for a new one."""
    durable_bytes: Annotated[int, whole(1_048_576, 1_099_511_627_776)] = 268_435_456
    """Bytes of all durable runs: their items and results, 4 KiB and the params of each, and 256 for each id that a
    user cannot use again yet. Beyond it no run starts. One run may keep 1 MiB of items, one user 8 MiB."""
    durable_keep: Annotated[float, duration("1s", "1h")] = 900.0
    """How long a durable run is kept after its end, or after the last client has read it; at most an hour."""
    durable_abandon_after: Annotated[float, duration("1s", "30d")] = 900.0
    """How long a durable method runs without a client that reads it. Then it is cancelled."""
    durable_drain: Annotated[float, duration("0s", "1h")] = 300.0
    """How long durable methods may go on in a process that ends, after its connections, while clients read them at
    another one: at an upgrade of the workers, and with a store that servers share."""


class CallsConfig(Settings):
    """Calls of the server to clients that handle methods."""

    max: Annotated[int, whole(1, 65_535, "no calls")] = 32
    """Calls in flight on one connection; the client may allow fewer."""
    per_user: Annotated[int, whole(1, 1_000_000)] = 256
    """Calls in flight to the clients of one user, in one worker."""
    total: Annotated[int, whole(1, 10_000_000)] = 16_384
    """Calls in flight to all clients, in one worker."""
    pending_per_user: Annotated[int, whole(1, 1_000_000)] = 256
    """Pending calls to one user, in one worker."""
    pending_total: Annotated[int, whole(1, 10_000_000)] = 16_384
    """Pending calls to all users, in one worker."""


class RoleConfig(Settings):
    """What sessions with a role may call, besides what the application says."""

    name: Annotated[str, ROLE_NAME] = Field(examples=["billing"])
    """The role, as users, devices and tokens have it."""
    allow: Annotated[tuple[str, ...], each_of(METHOD_PATTERN, 0, 256)] = ()
    """The methods that need this role, or another one that allows them or that the application names: names, or
    beginnings with a star. "*" is all methods of the application that need a session; those of the server, such as
    "server.sessions", are meant by "server.*" only."""
    deny: Annotated[tuple[str, ...], each_of(METHOD_PATTERN, 0, 256)] = ()
    """The methods that no session with this role may call, whatever its other roles."""


class OidcConfig(Settings):
    """An identity provider whose tokens open sessions, by the scheme jwt. It needs the extra "oidc"."""

    issuer: Annotated[str, ISSUER_URL] = Field(examples=["https://login.example.com/realms/staff"])
    """The provider's address, exactly as in the claim `iss` of its tokens. Its metadata is read from
    /.well-known/openid-configuration below."""
    audience: Annotated[tuple[str, ...], list_of(CLAIM_TEXT, 1, 16, bare=True)] = Field(
        examples=[("zcproto",)]
    )
    """What this server is called in the claim `aud`. A token for another one is refused."""
    algorithms: Annotated[tuple[str, ...], list_of(one_of(*ALGORITHMS), 1, len(ALGORITHMS))] = (
        "RS256",
        "PS256",
        "ES256",
        "EdDSA",
    )
    """The algorithms of signatures to accept. All of them are asymmetric; the default has those that providers
    use."""
    user_claim: Annotated[str, CLAIM_TEXT] = "sub"
    """The claim that names the user. "sub" never changes and is never given to another person; names and email
    addresses may be."""
    user_prefix: Annotated[str, USER_PREFIX] = ""
    """What is put before the name, such as "oidc:". Without it, a user of the provider and a user of this server
    with the same name are one."""
    roles_claim: Annotated[str, CLAIM_TEXT] = "roles"
    """The claim with the roles: a list, or a text with spaces between them, such as "scope". Dots lead into
    objects: "realm_access.roles"."""
    roles: Annotated[tuple[str, ...], each_of(ROLE_OF_CLAIM, 0, 1000)] = ()
    """The values of that claim that are roles here: "billing", or "Finance Team=billing" for another name. None by
    default, so that people who name groups at the provider cannot make operators."""
    outlive_token: Annotated[bool, FLAG] = False
    """Whether a session may last longer than its token, as `sessions` says. By default it ends with the token, and
    the client opens another one with a fresh token; then a user who is disabled at the provider is out when the
    token expires."""
    ca_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """The CA certificates for the provider. Empty: those of the system."""


def _distinct(name: str, role: str) -> Callable[[Mapping[int, Any]], Iterator[Fault]]:
    """Return a check that yields a fault for each table whose setting `name` repeats that of an earlier one."""

    def faults(tables: Mapping[int, Any]) -> Iterator[Fault]:
        first: dict[str, int] = {}
        for index, table in tables.items():
            value = getattr(table, name)
            if first.setdefault(value, index) != index:
                yield Fault(f"[{index}].{name}", value, f"is {role}[{first[value]}] too")

    return faults


class AuthConfig(Settings):
    """Who may call which methods."""

    role: Annotated[
        tuple[RoleConfig, ...],
        tables_of(RoleConfig, "auth.role", 100, _distinct("name", "the role of auth.role")),
    ] = ()
    """What the roles of a session allow and deny. Checked against the methods of the application when the server
    starts, and at each reload."""
    oidc: Annotated[
        tuple[OidcConfig, ...],
        tables_of(OidcConfig, "auth.oidc", 8, _distinct("issuer", "the issuer of auth.oidc"), bare=True),
    ] = ()
    """The identity providers whose tokens open sessions. One provider may be written as [auth.oidc]."""


class AlertsConfig(Settings):
    """Where alerts are sent, beside the log, and at which thresholds."""

    webhook: Annotated[str, WEBHOOK_URL] = Field(default="", repr=False)
    """The address that receives alerts as JSON over HTTPS. The certificate is verified, and redirects are not
    followed. Empty: none."""
    webhook_secret_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """A file of mode 0600 with the secret that signs messages. Empty: messages are not signed, for receivers
    that authenticate by a secret address."""
    webhook_ca_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """The CA certificates for the webhook. Empty: those of the system."""
    command: Annotated[tuple[str, ...], COMMAND] = ()
    """A program that gets each message as JSON on its standard input, without a shell, one message at a time.
    Empty: none."""
    repeat: Annotated[float | None, duration("1m", "365d", off=True)] = 86_400.0
    """After this time an alert that is still open is sent again: once a day is hard to forget."""
    tls_failures: Annotated[int, whole(1, 1_000_000_000, "no such alert")] = 100
    """Failed TLS connections of one cause within the window. The threshold is tenfold for causes that any
    port scanner triggers."""
    throttled_logins: Annotated[int, whole(1, 1_000_000_000, "no such alert")] = 100
    """Throttled logins within the window. A program that retries a wrong key forever causes only a few."""
    internal_errors: Annotated[int, whole(1, 1_000_000_000, "no such alert")] = 10
    """Requests within the window that failed with INTERNAL: an exception of a method, or a fault of the server."""
    stale_frames: Annotated[int, whole(1, 1_000_000_000, "no such alert")] = 100
    """Requests refused within the window because of a timestamp that is too far off."""
    revocation_rate: Annotated[int, whole(1, 1_000_000_000, "no such alert")] = 100
    """Sessions revoked within the window, by anyone."""
    refused_connections: Annotated[int, whole(1, 1_000_000_000, "no such alert")] = 10
    """Connections refused within the window because a limit was reached."""
    revocations: Annotated[str, one_of("operators", "any", "rate")] = "operators"
    """Which revocations are reported one by one. "operators": those by operators, and those caused by the
    removal of a user or a device. "any": also those by users themselves. "rate": none, only very many."""


class HttpConfig(Settings):
    """HTTPS on the same port: health, metrics and a status page."""

    enabled: Annotated[bool, FLAG] = True
    """Whether clients that offer http/1.1, or no protocol at all, are served. If not, they get the TLS alert
    no_application_protocol."""
    metrics: Annotated[str, one_of("session", "token", "address", "open", "off")] = "session"
    """Who can read /metrics. "session": holders of a session token; "token": machines, with a token of
    `zcproto token create` that has the scope metrics; "address": the networks of allow; "open":
    anyone; "off": no one."""
    allow: Annotated[tuple[str, ...], list_of(NETWORK, 0, 64)] = ("127.0.0.1/32", "::1/128")
    """The networks that can read /metrics with metrics = "address"."""
    redirect_port: Annotated[int, whole(1, 65_535, "none")] = 0
    """A port without TLS that redirects browsers to https. None by default: programs must not get used to
    plaintext."""


class LogConfig(Settings):
    """The log."""

    level: Annotated[str, one_of("debug", "info", "warning", "error")] = "info"
    """The least severe events that are written. info has one line for each session and none for a request."""
    format: Annotated[str, one_of("auto", "json", "console")] = "auto"
    """json: one object a line. console: text for people. auto: console on a terminal, json otherwise."""
    exceptions: Annotated[str, one_of("full", "frames")] = "full"
    """How an unexpected exception is written. full: message, causes and traceback, with everything masked that has
    the form of a token, key or password. frames: its type and the places in the code, for methods whose exceptions
    may quote personal data."""
    file: Annotated[Path | None, OPTIONAL_PATH] = None
    """The file to append to, created with mode 0600; SIGHUP reopens it. Empty: standard error, for the
    service manager."""
    audit_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """A second file, for the audit trail alone: JSON lines, whatever level and format are. It is created and
    reopened like `file`. Empty: none; the events of the trail are in the log only."""


class TelemetryConfig(Settings):
    """OpenTelemetry: traces, metrics and log records, sent by OTLP over HTTP. It needs the extra "otel"."""

    traces: Annotated[bool, FLAG] = False
    """Whether requests, streams and calls to clients are traced."""
    metrics: Annotated[bool, FLAG] = False
    """Whether the metrics of /metrics are sent too, by each process with its own."""
    logs: Annotated[bool, FLAG] = False
    """Whether the lines of the log are sent too. They are written as [log] says all the same."""
    endpoint: Annotated[str, COLLECTOR_URL] = Field(default="", repr=False)
    """The address of the collector, to which /v1/traces and such is added. Empty: OTEL_EXPORTER_OTLP_ENDPOINT, or
    http://localhost:4318."""
    headers_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """A file of mode 0600 with headers of each request to the collector, one "Name: value" a line, such as its
    access token. Empty: OTEL_EXPORTER_OTLP_HEADERS, or none."""
    ca_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """The CA certificates for the collector. Empty: OTEL_EXPORTER_OTLP_CERTIFICATE, or those that are common."""
    service_name: Annotated[str, SERVICE_NAME] = ""
    """The name of this server in traces (service.name). Empty: OTEL_SERVICE_NAME, or zcproto."""
    sample_ratio: Annotated[float, FRACTION] = 1.0
    """The part of the traces that begin here which is recorded: 0.01 is one of a hundred. Requests of a trace that
    has begun elsewhere are recorded if their caller's are. If it is not set, OTEL_TRACES_SAMPLER may choose another
    sampler."""
    trust: Annotated[str, one_of("all", "sessions", "none")] = "sessions"
    """Whose `traceparent` is followed. "sessions": that of requests with a session, since a stranger could have all
    requests recorded by it. For others a trace begins here."""
    metrics_interval: Annotated[float, duration("1s", "1h")] = 60.0
    """How often metrics are sent."""


class Config(Settings):
    """The whole configuration. Without any settings it is a safe server."""

    server: ServerConfig = ServerConfig()
    tls: TlsConfig = TlsConfig()
    certificates: CertificatesConfig = Field(default_factory=CertificatesConfig)
    acme: AcmeConfig = AcmeConfig()
    sessions: SessionsConfig = SessionsConfig()
    store: StoreConfig = StoreConfig()
    idempotency: IdempotencyConfig = IdempotencyConfig()
    freshness: FreshnessConfig = FreshnessConfig()
    limits: LimitsConfig = LimitsConfig()
    streams: StreamsConfig = StreamsConfig()
    calls: CallsConfig = CallsConfig()
    http: HttpConfig = HttpConfig()
    auth: AuthConfig = AuthConfig()
    alerts: AlertsConfig = AlertsConfig()
    log: LogConfig = LogConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _check_pairs(self) -> Config:
        for check in contradictions(self):
            raise ValueError(f"{check.keys[0]} {check.demand} {check.keys[1]}")
        return self


@cache
def sections() -> dict[str, type[Settings]]:
    """Return the sections by name, in their order."""
    return {name: cast(type[Settings], field.annotation) for name, field in Config.model_fields.items()}


@cache
def settings() -> dict[str, Accepts]:
    """Return what each key ("server.port") accepts, in their order."""
    return {
        f"{section}.{name}": accepts
        for section, model in sections().items()
        for name, accepts in settings_of(model).items()
    }


@cache
def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Return the description of each key of a section or table.

    Read from the source on demand: pydantic's `use_attribute_docstrings` would parse it at every import.
    """
    (definition,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for key, text in pairwise(definition.body):
        match key, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(about))):
                found[name] = " ".join(about.split())
    return found


@cache
def keys() -> frozenset[str]:
    """Return the names of all keys, including those in tables: `certificates.site.names`."""
    tables = [(key, each.tables) for key, each in settings().items() if each.tables is not None]
    return frozenset(
        [*settings(), *(f"{key}.{name}" for key, model in tables for name in model.model_fields)]
    )
