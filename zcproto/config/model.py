"""Every setting: its name, what it accepts, its default and the reason for it.

Rules: an attribute is named as its key in the TOML file; a duration is float seconds, `None` where it is
off. All defaults together are a safe server. The models are frozen; a new configuration is a new object.

Must not know: files, the environment, the command line.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from zcproto.config.checks import CHECKS, SITE_CHECKS, check_sites
from zcproto.config.rules import (
    Arguments,
    Binding,
    CertificateName,
    Choice,
    Duration,
    FilePath,
    Flag,
    HostName,
    ListOf,
    NetworkAddress,
    Pin,
    Rule,
    SiteName,
    StoreUrl,
    VariableName,
    WebhookUrl,
    Whole,
)
from zcproto.config.tables import TablesOf, rules_of
from zcproto.tls.suites import SUITES

KEY_TYPES = ("rsa-4096", "ecdsa-p256")
DEFAULT_HOME = "~/.zeroclaw"

_SETTINGS = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _key(default: Any, about: str, *, shown: bool = True) -> Any:
    """A setting. One that is not shown may hold a secret, as an address can: no repr has it."""
    return Field(default, description=about, repr=shown)


class ServerConfig(BaseModel):
    """Where the server listens, and how it ends."""

    model_config = _SETTINGS

    host: Annotated[tuple[str, ...], ListOf(HostName(), 1, 16, bare=True)] = _key(
        ("127.0.0.1",),
        "The addresses to listen on. The default is this machine alone: opening a server to a network is a"
        ' decision. "::" and "0.0.0.0" are every address of the machine.',
    )
    port: Annotated[int, Whole(1, 65_535, "any free port")] = _key(
        7443, "The TCP port. The default needs no privilege and is not 443, where people expect a web site."
    )
    drain_timeout: Annotated[float, Duration("0s", "1h")] = _key(
        30.0,
        "How long running requests may take to end after SIGTERM, before they are cancelled. The default is"
        " what service managers commonly wait before they kill.",
    )
    proxy_protocol_from: Annotated[tuple[str, ...], ListOf(NetworkAddress(), 0, 64)] = _key(
        (),
        "The load balancers that tell the client's address in a PROXY protocol header of version 2 before TLS"
        " begins. From these it is demanded; from all others, who could claim any address by it, it is no TLS.",
    )


class TlsConfig(BaseModel):
    """The TLS endpoint. It speaks TLS 1.3 and nothing else; no key changes that."""

    model_config = _SETTINGS

    suites: Annotated[tuple[str, ...], ListOf(Choice(SUITES), 1, 2)] = _key(
        SUITES,
        "The cipher suites, the preferred one first. Both have keys of 256 bits; the second is for clients"
        " without AES in hardware.",
    )
    handshake_timeout: Annotated[float, Duration("100ms", "30s")] = _key(
        5.0,
        "From accept to the end of the handshake, whatever arrives meanwhile. A handshake takes two round"
        " trips; the default leaves room for several lost packets and little for a slow attacker.",
    )
    max_handshakes: Annotated[int, Whole(1, 65_536)] = _key(
        256,
        "Handshakes in progress at once; further connections wait in the backlog of the system. Each costs"
        " tens of KiB and up to 2 ms of CPU; the default is about half a second of work.",
    )
    client_auth: Annotated[str, Choice(("off", "optional", "required"))] = _key(
        "off",
        'Whether clients show a certificate of their own. "optional": who has one may open sessions with it;'
        ' "required": nobody connects without. By default users open sessions by key, which needs no'
        " certificates.",
    )
    client_ca_file: Annotated[Path | None, FilePath(empty=True)] = _key(
        None,
        "The CA certificates that sign those of clients. Empty: the own CA for clients, client-ca.crt in the"
        " folder of certificates, as an authority of others would let in whoever it signs for.",
    )
    client_crl_file: Annotated[Path | None, FilePath(empty=True)] = _key(
        None,
        "The revoked certificates of clients, as a CRL. Empty: with the own CA for clients what it has"
        " revoked, with another CA none.",
    )
    client_pins: Annotated[tuple[str, ...], ListOf(Pin(), 0, 64, each=True)] = _key(
        (), "The pins of clients that are let in, of those that the CA has signed. Empty: all of them are."
    )
    client_name: Annotated[str, Choice(("dns", "email", "uri"))] = _key(
        "dns",
        "Which kind of name in a client's certificate (its SubjectAltName) is the user's name. The default is"
        " the kind that every tool can write.",
    )


class SiteConfig(BaseModel):
    """A certificate made by others, for some names."""

    model_config = _SETTINGS

    names: Annotated[tuple[str, ...], ListOf(SiteName(), 1, 100, each=True)] = Field(
        description="The names that clients ask for when they get this certificate. An exact name goes before"
        " a wildcard.",
        examples=[("a.example.com", "*.a.example.com")],
    )
    certificate: Annotated[tuple[Path, ...], ListOf(FilePath(), 1, 2)] = Field(
        description="Files of certificate chains, one for each type of key.",
        examples=[(Path("/etc/zcproto/a.example.com.pem"),)],
    )
    key: Annotated[tuple[Path, ...], ListOf(FilePath(), 0, 2)] = _key(
        (),
        "Files of private keys, in the order of the certificates. Empty: the same files hold the keys too.",
    )
    key_passphrase_file: Annotated[Path | None, FilePath(empty=True)] = _key(
        None, "A file with the passphrase of the keys. Empty: the keys are not encrypted."
    )
    key_passphrase_variable: Annotated[str | None, VariableName()] = _key(
        None, "The environment variable with the passphrase, for whoever keeps none on the disk."
    )

    @model_validator(mode="after")
    def _check_keys(self) -> SiteConfig:
        for check in SITE_CHECKS:
            if not check.holds(*(getattr(self, key) for key in check.keys)):
                raise ValueError(f"{check.keys[0]} {check.demand} {check.keys[1]}")
        return self


class CertificatesConfig(BaseModel):
    """The server's certificates."""

    model_config = _SETTINGS

    directory: Annotated[Path, FilePath()] = Field(
        default_factory=lambda: Path(DEFAULT_HOME, "certs").expanduser(),
        description="The folder of certificates and keys, of mode 0700. The default is certs in the home folder.",
    )
    mode: Annotated[str, Choice(("own", "files"))] = _key(
        "own",
        'Who makes the certificates. "own": a private CA in the folder above, made on first start. "files":'
        " others do, and the server watches their files, named below.",
    )
    key_types: Annotated[tuple[str, ...], ListOf(Choice(KEY_TYPES), 1, 2)] = _key(
        KEY_TYPES,
        "The keys to serve with, all on one port. RSA is for clients that take nothing else; ECDSA is about"
        " 15 times cheaper to sign with, and is used wherever the client takes it.",
    )
    names: Annotated[tuple[str, ...], ListOf(CertificateName(), 0, 100)] = _key(
        (), "Names and addresses in an own certificate, beside localhost and those of the host."
    )
    lifetime: Annotated[float, Duration("1m", "397d")] = _key(
        90 * 86_400.0,
        "How long a new certificate is valid. Short lives bound the damage of a lost key; 397 days is the most"
        " that clients of the web accept.",
    )
    renew_before: Annotated[float, Duration("1s", "396d")] = _key(
        30 * 86_400.0,
        "How long before its end a certificate is replaced: time to notice that this fails. It counts for"
        " at most a third of the lifetime.",
    )
    renew_key: Annotated[bool, Flag()] = _key(
        False, "Whether a new certificate gets a new key. The default keeps the pins of clients good."
    )
    announce_key: Annotated[float, Duration("0s", "396d")] = _key(
        7 * 86_400.0,
        "How long the pin of a new key is announced to clients before the key is used: a client that connects"
        " once a week still learns it in time. It counts for at most the life of a certificate until its renewal.",
    )
    certificate: Annotated[tuple[Path, ...], ListOf(FilePath(), 0, 2)] = _key(
        (), 'With mode = "files": files of certificate chains, one for each type of key.'
    )
    key: Annotated[tuple[Path, ...], ListOf(FilePath(), 0, 2)] = _key(
        (),
        'With mode = "files": files of private keys, in the order of the certificates. Empty: the same files'
        " hold the keys too.",
    )
    key_passphrase_file: Annotated[Path | None, FilePath(empty=True)] = _key(
        None,
        'With mode = "files": a file with the passphrase of the keys. Empty: the keys are not encrypted, as'
        " the server's own never are.",
    )
    key_passphrase_variable: Annotated[str | None, VariableName()] = _key(
        None,
        'With mode = "files": the environment variable with the passphrase, for whoever keeps none on the disk.',
    )
    watch_interval: Annotated[float, Duration("100ms", "1h")] = _key(
        0.25,
        "How often the files of certificates are looked at for a change. It costs a few system calls; the"
        " default has a new certificate in use while whoever renewed it still looks.",
    )
    alert_days: Annotated[tuple[int, ...], ListOf(Whole(1, 396), 0, 16)] = _key(
        (30, 14, 7, 3, 1), "Days before the end of a certificate at which its coming end is told."
    )
    site: Annotated[tuple[SiteConfig, ...], TablesOf("certificates.site", SiteConfig, 100, check_sites)] = (
        _key(
            (),
            "Certificates made by others for some names, in either mode. Who asks for none of these names gets"
            " the certificate above.",
        )
    )


class SessionsConfig(BaseModel):
    """Sessions and their tokens."""

    model_config = _SETTINGS

    lifetime: Annotated[float, Duration("1s", "365d")] = _key(
        86_400.0,
        "A session ends this long after it was opened, used or not. A day bounds what a stolen token is worth.",
    )
    idle_timeout: Annotated[float | None, Duration("1s", "365d", off=True)] = _key(
        3600.0,
        "A session that is not used for this long ends. An hour outlasts a pause, not a forgotten client.",
    )
    per_user: Annotated[int, Whole(1, 100_000)] = _key(
        5,
        "Sessions of one user at once: enough for one person's machines, few enough that a thief is noticed.",
    )
    when_full: Annotated[str, Choice(("refuse", "evict_oldest"))] = _key(
        "refuse",
        "What one session too many does: it is refused, or it ends the oldest. Refusing is the default, as"
        " whoever has a key could otherwise throw out its owner.",
    )
    refresh: Annotated[bool, Flag()] = _key(
        True, "Whether a session comes with a refresh token, so that a client goes on without its key."
    )
    refresh_lifetime: Annotated[float, Duration("1s", "365d")] = _key(
        30 * 86_400.0,
        "How long a session can be refreshed, from its opening. After that the key is needed again.",
    )
    refresh_grace: Annotated[float, Duration("0s", "1m")] = _key(
        10.0,
        "How long a spent refresh token gives the same client the same new pair again: a lost answer is"
        " repeated within seconds, a thief comes later.",
    )
    open_timeout: Annotated[float, Duration("100ms", "5m")] = _key(
        10.0, "A connection without a session is closed after this: whoever connects knows what for."
    )
    bind_address: Annotated[str, Binding()] = _key(
        "off",
        "Whether a token is good from the address of its opening alone: the very one, or its network. Up to 32"
        " bits are those of an IPv4 address, and an IPv6 one then goes by its first 64. Clients that move between"
        " networks have to open a session in each.",
    )
    bind_client: Annotated[bool, Flag()] = _key(
        False,
        "Whether a refresh token is good with the client string of its opening alone. A new version of a client"
        " then has to open a session.",
    )


class StoreConfig(BaseModel):
    """Where sessions are kept."""

    model_config = _SETTINGS

    url: Annotated[str, StoreUrl()] = _key(
        "sqlite",
        'The store of sessions. "sqlite" is the file sessions.db in the home folder, for one server: sessions'
        ' outlive it. "memory": they end with it, and nothing is on the disk. An address of Valkey or Redis is for'
        " several servers that share their sessions.",
        shown=False,
    )
    password_file: Annotated[Path | None, FilePath(empty=True)] = _key(
        None,
        "A file with the password for Valkey or Redis, for whoever keeps none in this one. Empty: that of the"
        " address, if there is one.",
    )
    ca_file: Annotated[Path | None, FilePath(empty=True)] = _key(
        None,
        "The CA certificates that sign that of the Valkey or Redis server. Empty: those of the system. TLS is for"
        " addresses that begin with rediss:// or valkeys://.",
    )
    certificate_file: Annotated[Path | None, FilePath(empty=True)] = _key(
        None, "The certificate to show to that server, if it asks for one. Empty: none."
    )
    key_file: Annotated[Path | None, FilePath(empty=True)] = _key(
        None, "The private key of that certificate. Empty: the same file holds it."
    )
    timeout: Annotated[float, Duration("10ms", "10s")] = _key(
        0.25,
        "How long one operation of a store may take. Stores nearby answer in a few ms; longer is an outage.",
    )
    grace: Annotated[float, Duration("0s", "24h")] = _key(
        300.0,
        "How long known sessions go on while the store is out. After that they are refused, never let in.",
    )
    cleanup_interval: Annotated[float, Duration("100ms", "1h")] = _key(
        30.0, "How often ended sessions are removed. They are refused from their end on, removed or not."
    )


class IdempotencyConfig(BaseModel):
    """Requests with an idempotency key, which are run once."""

    model_config = _SETTINGS

    keep: Annotated[float, Duration("1s", "24h")] = _key(
        600.0,
        "How long an answer is kept for whoever asks again, and how long nobody else runs the request after the"
        " process that ran it is gone. Longer than clients try again, and than methods take.",
    )
    max_bytes: Annotated[int, Whole(65_536, 17_179_869_184)] = _key(
        67_108_864,
        "Answers kept at once, in bytes; those of one user take at most a quarter. Beyond that the oldest are"
        " forgotten before their time. Most answers are under 1 KiB.",
    )
    per_user: Annotated[int, Whole(1, 1_000_000)] = _key(
        10_000,
        "Keys of one user at once, beyond which the oldest are forgotten: 16 requests a second, each with a key"
        " of its own, for the ten minutes that they are kept.",
    )


class FreshnessConfig(BaseModel):
    """Protection against replayed frames."""

    model_config = _SETTINGS

    tolerance: Annotated[float, Duration("1s", "10m")] = _key(
        30.0,
        "How far the timestamp of a frame may be off, inclusive. Clients learn the server's clock when they"
        " connect, so only delay and drift are left.",
    )


class LimitsConfig(BaseModel):
    """What clients can take of the server."""

    model_config = _SETTINGS

    max_connections: Annotated[int, Whole(1, 1_000_000)] = _key(
        20_000, "Connections at once. Each takes about 40 KiB and a file descriptor: 800 MB at the default."
    )
    connections_per_address: Annotated[int, Whole(1, 1_000_000, "no limit")] = _key(
        1000,
        "Connections of one address at once: room for many clients behind one gateway, not for all of them.",
    )
    max_frame_bytes: Annotated[int, Whole(1024, 67_108_864)] = _key(
        1_048_576, "The largest frame of a connection with a session, in bytes. It is held in memory whole."
    )
    max_frame_bytes_before_session: Annotated[int, Whole(512, 67_108_864)] = _key(
        16_384,
        "The largest frame of a connection without one, in bytes: opening a session takes under 1 KiB.",
    )
    max_streams: Annotated[int, Whole(1, 65_535)] = _key(
        128, "Requests in flight on one connection. HTTP/2 servers commonly allow 100 to 128."
    )
    max_depth: Annotated[int, Whole(4, 32)] = _key(
        32,
        "How deep the body of a frame may nest. 32 is the protocol's own limit; opening a session takes 2.",
    )
    idle_timeout: Annotated[float, Duration("100ms", "24h")] = _key(
        300.0, "A connection that is silent for this long is closed. Clients learn it, and ping in time."
    )
    write_buffer_bytes: Annotated[int, Whole(16_384, 1_073_741_824)] = _key(
        1_048_576, "Bytes that wait for a client that reads slowly, before no more is read from it."
    )
    write_timeout: Annotated[float, Duration("100ms", "10m")] = _key(
        20.0, "How long a client may read nothing of what waits for it, before it is disconnected."
    )
    login_failures: Annotated[int, Whole(1, 100)] = _key(
        5,
        "Failed logins before the delay begins to grow: a person mistypes a few times, a program guesses on.",
    )


class AlertsConfig(BaseModel):
    """Who is told when something is wrong, beside the log, and how much of it is."""

    model_config = _SETTINGS

    webhook: Annotated[str, WebhookUrl()] = _key(
        "",
        "Where alerts are sent to, as JSON by HTTPS. The certificate is checked, and redirects are not followed."
        " Empty: nowhere.",
        shown=False,
    )
    webhook_secret_file: Annotated[Path | None, FilePath(empty=True)] = _key(
        None,
        "A file of mode 0600 with the secret that messages are signed with. Empty: they are not signed, for"
        " receivers that know by a secret address who sends.",
    )
    webhook_ca_file: Annotated[Path | None, FilePath(empty=True)] = _key(
        None, "The CA certificates that sign that of the webhook. Empty: those of the system."
    )
    webhook_timeout: Annotated[float, Duration("100ms", "1m")] = _key(
        10.0, "How long one try may take, from the look-up of the name to the end of the answer."
    )
    command: Annotated[tuple[str, ...], Arguments()] = _key(
        (),
        "A program that gets each message as JSON on its standard input, without a shell in between, and one at a"
        " time. Empty: none.",
    )
    command_timeout: Annotated[float, Duration("100ms", "5m")] = _key(
        10.0, "How long it may run, before it is killed with all that it has started."
    )
    repeat: Annotated[float | None, Duration("1m", "365d", off=True)] = _key(
        86_400.0, "After so long what is still wrong is told again: once a day nobody has forgotten it."
    )
    rate_window: Annotated[float, Duration("10s", "1h")] = _key(
        300.0, "The time in which events are counted that are an alert only if they are many."
    )
    quiet: Annotated[float, Duration("1s", "24h")] = _key(
        900.0,
        "How long it must be quiet before such an alert is over, and how long the same event is not told again.",
    )
    tls_failures: Annotated[int, Whole(1, 1_000_000_000, "no such alert")] = _key(
        100,
        "Failed TLS connections of one cause within the window. For causes that any scanner of ports makes it is"
        " ten times as many.",
    )
    throttled_logins: Annotated[int, Whole(1, 1_000_000_000, "no such alert")] = _key(
        100,
        "Logins that were sent away to wait, within the window. A program that tries a wrong key for ever comes to"
        " a few.",
    )
    replays: Annotated[int, Whole(1, 1_000_000_000, "no such alert")] = _key(
        1, "Frames refused as replays within the window. There is no innocent reason for one."
    )
    stale_frames: Annotated[int, Whole(1, 1_000_000_000, "no such alert")] = _key(
        100, "Requests refused for a timestamp that is too far off, within the window."
    )
    revocation_rate: Annotated[int, Whole(1, 1_000_000_000, "no such alert")] = _key(
        100, "Sessions revoked within the window, by whomever."
    )
    refused_connections: Annotated[int, Whole(1, 1_000_000_000, "no such alert")] = _key(
        10, "Connections that found no room within the window."
    )
    revocations: Annotated[str, Choice(("operators", "any", "rate"))] = _key(
        "operators",
        'Which revocations are told one by one. "operators": those by operators, and those that follow from a user'
        ' or a device being removed. "any": also those by users themselves. "rate": none, only very many.',
    )


class HttpConfig(BaseModel):
    """The HTTPS side of the same port: health, metrics and a page for people."""

    model_config = _SETTINGS

    enabled: Annotated[bool, Flag()] = _key(
        True,
        "Whether clients that offer http/1.1, or no protocol at all, are served. If not, they get the TLS alert"
        " no_application_protocol.",
    )
    hsts: Annotated[bool, Flag()] = _key(
        True,
        "Whether every response has Strict-Transport-Security, by which browsers come by TLS alone from then on"
        " (RFC 6797).",
    )
    hsts_max_age_seconds: Annotated[int, Whole(0, 315_360_000)] = _key(
        31_536_000,
        "How long they keep to that, in seconds. A year is what their preload lists demand; 0 makes them forget.",
    )
    hsts_include_subdomains: Annotated[bool, Flag()] = _key(
        True, "Whether it holds for every name below the server's own, too."
    )
    hsts_preload: Annotated[bool, Flag()] = _key(
        False,
        "Whether browsers may ship the server's name in their lists. That is hard to take back, so it is a"
        " decision.",
    )
    metrics: Annotated[str, Choice(("session", "address", "open", "off"))] = _key(
        "session",
        'Who gets /metrics. "session": whoever shows the token of a session; "address": the networks of allow;'
        ' "open": anybody; "off": nobody.',
    )
    allow: Annotated[tuple[str, ...], ListOf(NetworkAddress(), 0, 64)] = _key(
        ("127.0.0.1/32", "::1/128"), 'The networks that get /metrics with metrics = "address".'
    )
    request_timeout: Annotated[float, Duration("100ms", "5m")] = _key(
        10.0,
        "How long the head of a request may take to arrive, and again its body, whatever arrives meanwhile. Both"
        " fit into a few packets.",
    )
    idle_timeout: Annotated[float, Duration("100ms", "1h")] = _key(
        60.0,
        "How long a connection is kept for the next request: longer than a monitor's usual interval of 15 or 30"
        " seconds, as a new one costs a handshake.",
    )
    redirect_port: Annotated[int, Whole(1, 65_535, "none")] = _key(
        0,
        "A port without TLS that sends people on to https. The default is none: programs must never be used to"
        " asking in the clear.",
    )


class LogConfig(BaseModel):
    """The log."""

    model_config = _SETTINGS

    level: Annotated[str, Choice(("debug", "info", "warning", "error"))] = _key(
        "info",
        "The least severe events that are written. info has one line for each session, none for a request.",
    )
    format: Annotated[str, Choice(("auto", "json", "console"))] = _key(
        "auto", "json: one object a line. console: text for people. auto: console on a terminal, else json."
    )
    file: Annotated[Path | None, FilePath(empty=True)] = _key(
        None,
        "The file to append to, made with mode 0600; SIGHUP opens it anew. Empty: standard error, for the service"
        " manager to keep.",
    )


class Config(BaseModel):
    """The whole configuration. The empty one is a safe server."""

    model_config = _SETTINGS

    server: ServerConfig = ServerConfig()
    tls: TlsConfig = TlsConfig()
    certificates: CertificatesConfig = Field(default_factory=CertificatesConfig)
    sessions: SessionsConfig = SessionsConfig()
    store: StoreConfig = StoreConfig()
    idempotency: IdempotencyConfig = IdempotencyConfig()
    freshness: FreshnessConfig = FreshnessConfig()
    limits: LimitsConfig = LimitsConfig()
    http: HttpConfig = HttpConfig()
    alerts: AlertsConfig = AlertsConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check_pairs(self) -> Config:
        for check in CHECKS:
            if not check.holds(*(getattr(getattr(self, s), k) for s, k in map(split_key, check.keys))):
                raise ValueError(f"{check.keys[0]} {check.demand} {check.keys[1]}")
        return self


def split_key(key: str) -> tuple[str, str]:
    """("server", "port") of "server.port"."""
    section, _, name = key.partition(".")
    return section, name


@cache
def sections() -> dict[str, type[BaseModel]]:
    """The sections by name, in their order."""
    return {name: cast(type[BaseModel], field.annotation) for name, field in Config.model_fields.items()}


@cache
def rules() -> dict[str, Rule]:
    """What each key ("server.port") accepts, in their order."""
    return {
        f"{section}.{name}": rule
        for section, model in sections().items()
        for name, rule in rules_of(model).items()
    }


@cache
def keys() -> frozenset[str]:
    """All keys, those in tables too: `certificates.site.names`."""
    tables = [(key, rule) for key, rule in rules().items() if isinstance(rule, TablesOf)]
    return frozenset([*rules(), *(f"{key}.{name}" for key, rule in tables for name in rules_of(rule.model))])
