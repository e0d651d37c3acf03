"""Home folders with users and certificates, and servers on them, all in one temporary folder."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from zcproto.auth import UserFile
from zcproto.certs import ensure_own_certificates
from zcproto.common.event_loop import new_event_loop
from zcproto.common.home import Home
from zcproto.config.model import CertificatesConfig
from zcproto.errors import ZcprotoError
from zcproto.load.caller import Caller, Place
from zcproto.load.demo.server import DemoServer
from zcproto.load.plan import SESSIONS_PER_USER, Credential
from zcproto.load.processes import module_environment, on_processor
from zcproto.tls.client import ALPN
from zcproto.tls.context import client_context

HOST: Final = "127.0.0.1"
NAME: Final = "localhost"
TIMEOUT: Final = 30.0
"""Seconds for one step of a check, on a machine that is busy with others."""

MAX_RESPONSE: Final = 4_000_000
T = TypeVar("T")


C = TypeVar("C", bound=Caller)


class _TidyPlace(Place):
    """Leaves every connection that was made, however the conversation ended."""

    def __init__(self, host: str, address: str, port: int, ca_file: Path | None) -> None:
        super().__init__(host, address, port, ca_file)
        self._joined: list[Caller] = []

    async def join(self, caller: C) -> C:
        self._joined.append(await super().join(caller))
        return caller

    async def leave_all(self) -> None:
        for caller in self._joined:
            if not caller.ended:
                await caller.leave()


class Served(NamedTuple):
    """A running server."""

    home: Home
    port: int
    pid: int

    @property
    def ca_file(self) -> Path:
        return self.home.certs / "ca.crt"

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def context(self, *protocols: str) -> ssl.SSLContext:
        return client_context(ca_file=self.ca_file, protocols=protocols or (ALPN,))

    def talk(self, conversation: Callable[[Place], Awaitable[T]]) -> T:
        """Have a conversation with it on an event loop of its own."""

        async def run() -> T:
            place = _TidyPlace(NAME, HOST, self.port, self.ca_file)
            try:
                return await conversation(place)
            finally:
                await place.leave_all()
                place.close()

        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(run())

    def leaf(self) -> bytes:
        """The certificate that it shows, as DER."""
        with (
            socket.create_connection((HOST, self.port), TIMEOUT) as raw,
            self.context().wrap_socket(raw, server_hostname=NAME) as tls,
        ):
            return tls.getpeercert(binary_form=True) or b""

    def log(self) -> str:
        """What it has logged, and what it has said on standard error."""
        files = (self.home.path / "server.log", self.home.path / "server.err")
        return "".join(each.read_text(errors="replace") for each in files if each.exists())


@dataclass(frozen=True, slots=True)
class House:
    """A home folder and who lives there."""

    home: Home
    operator: Credential
    users: tuple[Credential, ...]

    @contextmanager
    def serve(self, store: str = "memory", processor: int | None = None) -> Iterator[Served]:
        """A server on it, on a processor of its own if one is named. It ends with the block."""
        with ExitStack() as stack:
            with nullcontext() if processor is None else on_processor(processor):
                server = stack.enter_context(DemoServer(self.home.path, store))
            yield Served(self.home, server.port, server.pid)


class Workshop:
    """Makes houses. As RSA keys take seconds, all their certificates are copies of the same."""

    def __init__(self, folder: Path, certificates: Path | None = None) -> None:
        """`certificates` is a folder of own certificates; without it those of the default are made when needed."""
        self.folder = folder
        self._certificates = certificates

    def _own_certificates(self) -> Path:
        if self._certificates is None:
            self._certificates = self.folder / "certs"
            make_own(self._certificates, datetime.now(UTC))
        return self._certificates

    def house(self, name: str, config: str = "", *, sessions: int = 10, certificates: bool = True) -> House:
        """A home with a configuration, users for so many sessions, and an operator. The log is in server.log."""
        home = Home(self.folder / name)
        home.path.mkdir(mode=0o700)
        if certificates:
            shutil.copytree(self._own_certificates(), home.certs)
        users = UserFile(home.users)
        operator = Credential("operator", users.add("operator", operator=True))
        names = [f"user-{number}" for number in range(1, -(-sessions // SESSIONS_PER_USER) + 1)]
        credentials = tuple(Credential(*each) for each in users.add_many(names))
        if "[log]" not in config:
            config += f'\n[log]\nlevel = "debug"\nformat = "json"\nfile = "{home.path / "server.log"}"\n'
        home.config.write_text(config, encoding="utf-8")
        home.config.chmod(0o600)
        return House(home, operator, credentials)


def make_own(folder: Path, now: datetime) -> None:
    """Own certificates of the default configuration, as a server at the time `now` makes them."""
    usual = CertificatesConfig()
    ensure_own_certificates(
        folder,
        names=(),
        key_types=usual.key_types,
        lifetime=timedelta(seconds=usual.lifetime),
        renew_before=timedelta(seconds=usual.renew_before),
        renew_key=False,
        now=now,
    )


# --- commands and HTTPS -----------------------------------------------------------------------------------


class Ended(NamedTuple):
    """A command that has ended, or was ended as it took too long (`code` is None)."""

    code: int | None
    said: str


def zcproto(home: Home, *words: str) -> Ended:
    """The program, as somebody types it."""
    command = [sys.executable, "-P", "-m", "zcproto", "--home", str(home.path), *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, env=module_environment(), check=False
        )
    except subprocess.TimeoutExpired as error:
        said = error.stderr or b""
        return Ended(None, said.decode(errors="replace") if isinstance(said, bytes) else said)
    return Ended(done.returncode, done.stdout + done.stderr)


class Response(NamedTuple):
    """A response of the HTTPS side. `headers` is each field as it came, with its name in small letters."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def all(self, name: str) -> list[str]:
        return [value for field, value in self.headers if field == name]


def https(served: Served, request: bytes) -> Response:
    """One request as these bytes, on a connection of its own. Raises ZcprotoError if the answer is no response."""
    with (
        socket.create_connection((HOST, served.port), TIMEOUT) as raw,
        served.context("http/1.1").wrap_socket(raw, server_hostname=NAME) as tls,
    ):
        tls.sendall(request)
        data = b""
        while len(data) < MAX_RESPONSE and (more := tls.recv(65_536)):
            data += more
    return parse_response(data)


def parse_response(data: bytes) -> Response:
    head, separator, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if not separator or len(words) < 2 or not words[1].isdigit():
        raise ZcprotoError(f"no HTTP response, but {data[:60]!r}")
    fields = (line.partition(":") for line in lines)
    headers = tuple((name.strip().lower(), value.strip()) for name, _, value in fields)
    return Response(int(words[1]), headers, body)


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    """A request that asks for the connection to be closed after it."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {NAME}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode()
