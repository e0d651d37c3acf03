"""Parse the URL of a Valkey or Redis server.

Decides: which URLs are valid, and how one is shown without its password.

    redis://[user[:password]@]host[:port][/database]      also valkey://
    rediss://...                                          also valkeys://: over TLS
    unix:///path/to/socket[?db=database]                  also redis+unix://, valkey+unix://
    redis+sentinel://[user[:password]@]host[:port],host[:port]/service[/database]
    redis+cluster://[user[:password]@]host[:port],host[:port]

In the last two `redis` may also be `rediss`, `valkey` or `valkeys`. User and password are percent-encoded.

It must not know: connections.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Final
from urllib.parse import parse_qsl, unquote

from zcproto.common.text import escape_text
from zcproto.errors import ConfigError

PORT: Final = 6379
SENTINEL_PORT: Final = 26379
MAX_ADDRESSES: Final = 64

_SCHEME: Final = re.compile(
    r"(redis|rediss|valkey|valkeys)(?:\+(sentinel|cluster))?|(?:(?:redis|valkey)\+)?unix"
)
_ADDRESS: Final = re.compile(r"(\[[0-9A-Fa-f:.%A-Za-z]+\]|[^\[\]:/?#@\s]+)(?::([0-9]{1,5}))?")
_DATABASE: Final = re.compile(r"[0-9]{1,5}")
_FIX: Final = (
    "write it as redis://user:password@host:6379/0, rediss:// for TLS, unix:///path, "
    "redis+sentinel://host,host/service or redis+cluster://host,host"
)

Address = tuple[str, int]


class ServerKind(Enum):
    """How the servers are found."""

    SINGLE = "single"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """Where the servers are, and how to log in."""

    kind: ServerKind
    addresses: tuple[Address, ...] = ()
    """The server, the sentinels, or some nodes of the cluster."""
    path: str = ""
    """The path of a Unix socket, in place of addresses."""
    tls: bool = False
    username: str = ""
    password: str = field(default="", repr=False)
    service: str = ""
    """The name of the service that the sentinels monitor."""
    database: int = 0

    def __str__(self) -> str:
        """Return the URL without its password."""
        where = self.path or ",".join(address_text(address) for address in self.addresses)
        kind = "unix" if self.path else "rediss" if self.tls else "redis"
        if self.kind is not ServerKind.SINGLE:
            kind += f"+{self.kind.value}"
        user = f"{self.username}@" if self.username else ""
        service = f"/{self.service}" if self.service else ""
        return escape_text(f"{kind}://{user}{where}{service}/{self.database}", 200)


def address_text(address: Address) -> str:
    """Return host and port as text."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_url(url: str) -> ServerUrl:
    """Parse a URL. Raises ConfigError, which never shows the URL because it may contain a password."""
    scheme, found, rest = url.partition("://")
    match = _SCHEME.fullmatch(scheme)
    if not found or match is None:
        raise _fault("is not the URL of a Valkey or Redis server")
    family, kind_name = match.groups()
    # The last @, because a password may contain one that is not encoded. The path of a socket may contain one too.
    credentials, _, rest = ("", "", rest) if rest.startswith("/") else rest.rpartition("@")
    username, _, password = credentials.partition(":")
    server_url = partial(ServerUrl, username=unquote(username), password=unquote(password))
    rest, _, query = rest.partition("?")
    if family is None:
        socket = unquote(rest)
        if not socket.startswith("/") or "\0" in socket:
            raise _fault("has no absolute path to a socket")
        return server_url(ServerKind.SINGLE, path=socket, database=_query(query))
    kind = ServerKind(kind_name or "single")
    where, _, path = rest.partition("/")
    service, database = _parts(kind, path, query)
    tls = family in ("rediss", "valkeys")
    return server_url(kind, _addresses(where, kind), tls=tls, service=service, database=database)


def _addresses(where: str, kind: ServerKind) -> tuple[Address, ...]:
    texts = where.split(",")
    if kind is ServerKind.SINGLE and len(texts) > 1:
        raise _fault("names several servers; use redis+sentinel:// or redis+cluster://")
    if len(texts) > MAX_ADDRESSES:
        raise _fault(f"names more than {MAX_ADDRESSES} servers")
    addresses: list[Address] = []
    for text in texts:
        match = _ADDRESS.fullmatch(text)
        port = int((match and match[2]) or (SENTINEL_PORT if kind is ServerKind.SENTINEL else PORT))
        if match is None or not 1 <= port <= 65_535:
            raise _fault("has no valid host and port")
        addresses.append((match[1].strip("[]"), port))
    return tuple(addresses)


def _parts(kind: ServerKind, path: str, query: str) -> tuple[str, int]:
    """Return the service and the database."""
    parts = [unquote(part) for part in path.split("/")] if path else []
    service = ""
    if kind is ServerKind.SENTINEL:
        service = parts.pop(0) if parts else ""
        if not service:
            raise _fault("does not name the sentinels' service: redis+sentinel://host,host/service")
    database = _query(query)
    if parts and parts != [""]:
        if len(parts) > 1 or query:
            raise _fault("has more in its path than the number of a database")
        database = _database(parts[0])
    if kind is ServerKind.CLUSTER and database:
        raise _fault("names a database, but a cluster has database 0 only")
    return service, database


def _query(query: str) -> int:
    pairs = parse_qsl(query, keep_blank_values=True)
    if query and [name for name, _ in pairs] != ["db"]:
        raise _fault("has a query that is not db=NUMBER")
    return _database(pairs[0][1]) if pairs else 0


def _database(text: str) -> int:
    if not _DATABASE.fullmatch(text):
        raise _fault("has a database that is not a number")
    return int(text)


def _fault(what: str) -> ConfigError:
    return ConfigError([f"store.url: it {what}; {_FIX}"])
