"""The options of a connection: their names, types and defaults, once for every way to connect, and the credentials
that they name."""

from __future__ import annotations

import functools
import inspect
import ipaddress
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, ParamSpec, Protocol, TypedDict, TypeVar

from zcproto.client.credentials import (
    ApiKey,
    CertificateLogin,
    Credentials,
    Device,
    DeviceKey,
    LoginSource,
    SchemeLogin,
    read_key_file,
    usable_key,
)
from zcproto.client.endpoints import Address, Endpoint, is_ip, parse_addresses
from zcproto.client.handlers import Call, Event
from zcproto.client.streams import OutgoingCall
from zcproto.common.home import Home, resolve_home
from zcproto.common.middleware import Middleware
from zcproto.common.secret import SecretText
from zcproto.errors import ConfigError
from zcproto.tls.context import Passphrase

MAX_CONNECTIONS: Final = 64

USER_VARIABLE: Final = "ZCPROTO_USER"
KEY_FILE_VARIABLE: Final = "ZCPROTO_KEY_FILE"
KEY_VARIABLE: Final = "ZCPROTO_KEY"
CA_VARIABLE: Final = "ZCPROTO_CA_FILE"

Keywords = ParamSpec("Keywords")
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectOptions:
    """The keyword arguments of `zcproto.connect` and `zcproto.connect_blocking`."""

    user: str | None = None
    """The user whose session is opened. Without a key the client certificate identifies the user, and must name
    this one. Without any credentials it is the user of ZCPROTO_USER; without that, only public methods can be
    called."""

    key: str | None = field(default=None, repr=False)
    """The user's API key. White space around it is removed."""

    key_file: str | Path | None = None
    """The file of the user's API key, readable by its owner alone. Without it and `key`, the key of a `user` is in
    the file of ZCPROTO_KEY_FILE, or in ZCPROTO_KEY."""

    ca_file: str | Path | None = None
    """PEM file of the CA to trust. Without it, `pins` and `system_store` it is the file of ZCPROTO_CA_FILE, or else
    `certs/ca.crt` of the home folder, if that exists or the address is this machine, or else the system's store."""

    pins: Iterable[str] | str = ()
    """Keys to trust: `sha256/BASE64` of the server's public key or `cert-sha256/BASE64`, as a list or as one text
    separated by commas or white space. List future keys too. Pins are checked in addition to `ca_file` or
    `system_store`; without those they replace the CA, and only dates and name of the certificate are checked."""

    system_store: bool = False
    """Trust the CAs of the system."""

    verify: bool = True
    """False trusts any server. It is refused for hosts that have announced an `sts` policy."""

    server_hostname: str | None = None
    """The name to verify in the certificate instead of the host's."""

    certificate: str | Path | None = None
    """PEM file of the client certificate, followed by its intermediate CAs. After a renewal, the next connection
    reads it again."""

    certificate_key: str | Path | None = None
    """The file of the certificate's private key, readable by its owner alone. By default it is in the certificate's
    file."""

    certificate_passphrase: Passphrase | None = field(default=None, repr=False)
    """The passphrase of an encrypted `certificate_key`, or a function that returns it."""

    device: Device | str | Path | None = None
    """The device whose key opens the session instead of `user` and `key`, or the file of its key."""

    device_name: str | None = None
    """The name under which the device was enrolled."""

    login: LoginSource | None = field(default=None, repr=False)
    """A login by a scheme of the server's application, instead of a key or a device: a mapping with `scheme` and
    its fields, or a function that returns one for each session that is opened. The function may be async; otherwise
    it must not block, except in `connect_blocking`, which runs it in a thread."""

    session_file: str | Path | None = None
    """The file that keeps the session, so that this client continues it after a restart instead of logging in.
    Closing the client then leaves the session open. The file has mode 0600 and is for one client at a time: further
    ones have sessions of their own, which they do not keep."""

    session: bool = True
    """False connects without opening a session; `open_session` opens one later."""

    timeout: float | None = 30.0
    """Seconds for a call, including all attempts, unless the call has a timeout of its own; None is unlimited."""

    connect_timeout: float = 10.0
    """Seconds for one attempt to connect to an IP address, until the server's WELCOME, and for resolving a name."""

    start_timeout: float = 10.0
    """Seconds to wait for a server that is starting: while nothing listens at its address, or the server is going
    away, the first attempt is repeated, and a missing `ca_file` may still be created. 0 raises at once."""

    address_order: Literal["random", "listed"] = "random"
    """The order in which several addresses are tried, and those of one name. "random" spreads clients over the
    servers; "listed" prefers the first. The last one that worked comes first, those that failed lately last."""

    max_connections: int = 1
    """Connections to a server at once, up to 64. With more than 1, a further one is made when calls wait because
    the server's `max_streams` are in flight on all others, and closed after 30 s without a call."""

    client: str | None = None
    """The product and version that the server lists, by default this package's."""

    on_event: Callable[[Event], object] | None = None
    """Called with each event of the server. Without it, events are queued in `client.events`."""

    on_connected: Callable[[Endpoint], object] | None = None
    """Called with the host, port and IP address after each connect, also after a reconnect; then handlers are
    registered again."""

    middleware: Sequence[Middleware[OutgoingCall]] = ()
    """Functions `async def middleware(call, call_next)` around each call and stream, the first one outermost. They
    may change the call, and raise an error instead of `await call_next(call)`."""

    handler_middleware: Sequence[Middleware[Call]] = ()
    """Functions `async def middleware(call, call_next)` around each handler, the first one outermost. They get the
    `Call`, run before the params are checked, and may raise an error instead of `await call_next(call)`."""

    max_calls: int = 16
    """Calls of the server that run at once, for each session; more of them are refused."""

    home: str | Path | None = None
    """The folder with the CA of this machine's server and the hosts with an `sts` policy: by default ZCPROTO_HOME,
    or else ~/.zeroclaw."""

    key_log_file: str | Path | None = None
    """The file to which the TLS secrets of all connections are appended, so that Wireshark can decrypt them.
    Anyone who can read it can decrypt captured connections. SSLKEYLOGFILE is ignored."""


class EnrollOptions(TypedDict, total=False):
    """The options of ConnectOptions that apply before a device can log in."""

    ca_file: str | Path | None
    pins: Iterable[str] | str
    system_store: bool
    server_hostname: str | None
    timeout: float | None
    home: str | Path | None


def check_options(options: ConnectOptions) -> None:
    """Raise ConfigError for options on connections that are out of range."""
    if options.timeout is not None and options.timeout < 0:
        raise ConfigError([f"timeout: {options.timeout:g} is below 0; give seconds, or None for no limit"])
    if options.address_order not in ("random", "listed"):
        raise ConfigError([f'address_order: {options.address_order!r} is unknown; give "random" or "listed"'])
    if not 1 <= options.max_connections <= MAX_CONNECTIONS:
        raise ConfigError(
            [f"max_connections: {options.max_connections} is out of range; give from 1 to {MAX_CONNECTIONS}"]
        )


def complete_options(options: ConnectOptions, addresses: Sequence[Address]) -> ConnectOptions:
    """Return the options with `~` expanded, and with what they leave to the environment and to the home folder: the
    CA, the user and the key. Raises ConfigError."""
    changes: dict[str, Any] = {
        name: _expanded(path)
        for name in _PATHS
        if isinstance(path := getattr(options, name), str | Path) and str(path).startswith("~")
    }
    home = find_home(options.home)
    if not (options.ca_file or options.pins or options.system_store) and options.verify:
        ca_file = os.environ.get(CA_VARIABLE)
        changes["ca_file"] = _expanded(ca_file) if ca_file else own_ca(home, addresses)
    others = options.login, options.device, options.certificate
    if others == (None, None, None) and (options.session or options.user):
        user = changes["user"] = options.user or os.environ.get(USER_VARIABLE) or None
        if user is not None and options.key is options.key_file is None:
            key_file = os.environ.get(KEY_FILE_VARIABLE)
            changes["key_file"] = _expanded(key_file) if key_file else None
            changes["key"] = None if key_file else os.environ.get(KEY_VARIABLE) or None
    return replace(options, **changes)


_PATHS: Final = (
    *("key_file", "ca_file", "certificate", "certificate_key", "device", "session_file", "key_log_file"),
)
_MAX_PATH: Final = 255


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user, or one without a home folder
        return Path(path)


def find_home(home: str | Path | None) -> Home | None:
    """Return the home folder. None for a user without one, as in some containers."""
    try:
        return resolve_home(home, os.environ)
    except ConfigError:
        if home is not None:
            raise
        return None


def own_ca(home: Home | None, addresses: Sequence[Address]) -> Path | None:
    """Return the CA in the home folder if it exists, or if all addresses are of this machine, whose server may be
    starting and create it. None is the system's store."""
    if home is None:
        return None
    own = home.certs / "ca.crt"
    if not own.exists() and not all(_is_loopback(each.host) for each in addresses):
        return None
    if any((home.certs / "acme").glob("server*.crt")):  # a public CA has issued what is served
        return None
    return own


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (is_ip(host) and ipaddress.ip_address(host).is_loopback)


def choose_credentials(options: ConnectOptions) -> Credentials | None:
    """Return the credentials that the options name: the login, the device, the key or the certificate.

    Return None without any. Raises ConfigError for options that are incomplete or contradict each other,
    CertificateError for an unusable device key.
    """
    user, key, device, device_name = options.user, options.key, options.device, options.device_name
    if options.key_file is not None:
        if key is not None:
            raise ConfigError(["key and key_file: both are given; remove one of them"])
        if options.certificate is not None and user is None:
            raise ConfigError(
                [
                    "key_file: it is the file of an API key; name that of the certificate's key as certificate_key"
                ]
            )
        key = "" if user is None else read_key_file(options.key_file)
    elif key is not None:
        key = _given_key(key)
    if options.login is not None:
        if not (user is key is device is device_name is None):
            raise ConfigError(["login: its fields name the user; remove user, key, device and device_name"])
        return SchemeLogin(options.login)
    if isinstance(device, str | Path):
        device = Device.load(device)
    if device is not None and device_name is not None:
        if user is not None or key is not None:
            raise ConfigError(["device: it determines the user; remove user and key"])
        return DeviceKey(device, device_name)
    if device is not None:
        raise ConfigError(["device: device_name is missing; give the name under which it was enrolled"])
    if device_name is not None:
        raise ConfigError(["device_name: device is missing; give the device or the file of its key"])
    if key is not None and user is not None:
        return ApiKey(user, SecretText(key))
    if key is not None:
        raise ConfigError([f"key: user is missing; give the name of the key's user, or set {USER_VARIABLE}"])
    if options.certificate is not None:
        return CertificateLogin(user)
    if user is not None:
        raise ConfigError(
            [f"user: the key is missing; give key_file, key or certificate, or set {KEY_FILE_VARIABLE}"]
        )
    return None


def _given_key(key: object) -> str:
    """Return an API key. Raises ConfigError for anything else, such as the path of its file."""
    is_path = isinstance(key, Path) or (
        isinstance(key, str)
        and (key.endswith((".key", ".txt", ".pem")) or (len(key) < _MAX_PATH and Path(key).is_file()))
    )
    if is_path:
        raise ConfigError(["key: this is the path of a file; give it as key_file"])
    if not isinstance(key, str):
        raise ConfigError(
            [f"key: must be a str, not {type(key).__name__}; give the text of the key, or key_file"]
        )
    return usable_key(key, "key")


_OTHER_NAMES: Final = {
    **dict.fromkeys(("api_key", "apikey", "password", "secret", "token"), "key or key_file"),
    **dict.fromkeys(("keyfile", "key_path", "api_key_file"), "key_file"),
    **dict.fromkeys(("ca", "cafile", "ca_cert", "ca_certs", "ca_path", "cacert", "root_ca"), "ca_file"),
    **dict.fromkeys(("username", "name", "login_name"), "user"),
    **dict.fromkeys(("cert", "certfile", "cert_file", "client_cert", "certificate_file"), "certificate"),
    **dict.fromkeys(("certificate_key_file", "cert_key", "private_key"), "certificate_key"),
    **dict.fromkeys(("key_passphrase", "passphrase"), "certificate_passphrase"),
    **dict.fromkeys(("verify_ssl", "verify_tls", "insecure", "ssl_verify", "check_hostname"), "verify"),
    **dict.fromkeys(("ssl", "ssl_context", "context", "tls"), "ca_file or system_store"),
    **dict.fromkeys(("host", "port", "url", "uri"), 'the address, as in connect("host:7443")'),
    **dict.fromkeys(("pin", "fingerprint"), "pins"),
    **dict.fromkeys(("sni", "server_name", "hostname"), "server_hostname"),
    **dict.fromkeys(("pool_size", "connections"), "max_connections"),
    **dict.fromkeys(("request_timeout", "call_timeout", "deadline"), "timeout"),
}
"""Names that people try for options, by those of other libraries."""


_KNOWN: Final = tuple(each.name for each in fields(ConnectOptions))

_KINDS: Final[Mapping[str, tuple[Any, str]]] = {
    "timeout": (int | float | None, "a number of seconds, such as timeout=5.0, or None"),
    **{
        name: (int | float, f"a number of seconds, such as {name}=5.0")
        for name in ("connect_timeout", "start_timeout")
    },
    **dict.fromkeys(("verify", "system_store", "session"), (bool, "True or False")),
    **dict.fromkeys(("max_connections", "max_calls"), (int, "an int")),
    **dict.fromkeys(("on_event", "on_connected"), (Callable | None, "a function")),
    **{
        name: (Sequence, f"a list of functions, such as {name}=[trace]")
        for name in ("middleware", "handler_middleware")
    },
}
"""The types of options whose values would fail later, or would be ignored."""


def _check_given(function: str, given: Mapping[str, Any]) -> None:
    """Raise TypeError for a name that no option has, and for a value of another type."""
    for name, value in given.items():
        if name not in _KNOWN:
            near = get_close_matches(name, _KNOWN, 1)
            meant = _OTHER_NAMES.get(name) or (near[0] if near else "")
            cure = f"give {meant}" if meant else "see zcproto.client.ConnectOptions"
            raise TypeError(f"{function}() has no option {name!r}; {cure}")
        if name in _KINDS and not isinstance(value, _KINDS[name][0]):
            raise TypeError(f"{name} is {_KINDS[name][1]}, not {type(value).__name__}")


class WithOptions(Protocol[Keywords, Result_co]):
    """A function of addresses, with each option as a keyword argument."""

    def __call__(
        self, address: str | Sequence[str], *args: Keywords.args, **options: Keywords.kwargs
    ) -> Result_co: ...


def accept_options(
    options: Callable[Keywords, ConnectOptions],
) -> Callable[[Callable[[str | Sequence[str], ConnectOptions], Result]], WithOptions[Keywords, Result]]:
    """Decorate a function of addresses and ConnectOptions to accept each option as a keyword argument, and to
    complete them.

    Type checkers (by `Keywords`) and `help` (by `__signature__`) show every option, although only ConnectOptions
    lists them.
    """

    def decorate(
        function: Callable[[str | Sequence[str], ConnectOptions], Result],
    ) -> WithOptions[Keywords, Result]:
        def with_options(
            address: str | Sequence[str], *args: Keywords.args, **keywords: Keywords.kwargs
        ) -> Result:
            if args:
                raise TypeError(
                    f'{function.__name__}() takes one address, as in {function.__name__}("host:7443"), or a list;'
                    " give options by name"
                )
            _check_given(function.__name__, keywords)
            given = options(*args, **keywords)
            return function(address, complete_options(given, parse_addresses(address)))

        functools.update_wrapper(with_options, function)
        positional, _ = inspect.signature(function).parameters.values()
        parameters = [positional, *inspect.signature(options).parameters.values()]
        signature = inspect.signature(function).replace(parameters=parameters)
        with_options.__signature__ = signature  # type: ignore[attr-defined]
        return with_options

    return decorate
