"""A real server on a free port of loopback, in a thread of its own, so that tests may await or block."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

from zcproto.app.app import App
from zcproto.auth import UserFile
from zcproto.client import BlockingClient, Client
from zcproto.common.process import new_event_loop
from zcproto.config import CertificatesConfig, Config, StoreConfig, TlsConfig
from zcproto.runtime.server import Server
from zcproto.testing.incidents import record_incident
from zcproto.testing.memory import Users

T = TypeVar("T")


class LocalServer:
    """A real server, with sockets, TLS, certificates and a file of users. It ends with its block.

        with LocalServer(app) as server, server.connect_blocking("ada") as client:
            assert client.call("greet", name="world") == "hello world"

    Unless `config` names a port it listens on a free one of 127.0.0.1. Without `config` it issues an ECDSA
    certificate, and keeps sessions in memory. `home` is a new folder by default; `options` are those of `Server`.
    """

    _stuck_after_s = 30.0
    """Seconds after which the server's thread is stuck, and a connection: a machine that runs tests may be busy."""

    def __init__(
        self,
        app: App[Any],
        config: Config | None = None,
        *,
        home: Path | None = None,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] = new_event_loop,
        **options: Any,
    ) -> None:
        self._ending = ExitStack()
        if home is None:
            home = Path(self._ending.enter_context(tempfile.TemporaryDirectory(prefix="zcproto-")))
        if config is None:
            certificates = CertificatesConfig(key_types=("ecdsa-p256",))  # issued in milliseconds
            tls = TlsConfig(handshake_timeout=self._stuck_after_s)
            config = Config(certificates=certificates, store=StoreConfig(url="memory"), tls=tls)
        if "port" not in config.server.model_fields_set:
            config = config.model_copy(update={"server": config.server.model_copy(update={"port": 0})})
        self.server = Server(app, config, home=home, **options)
        self.home = home
        self.users = Users(UserFile(self.server.home.users))
        self._loop_factory = loop_factory
        self._started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="zcproto-server", daemon=True)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The server's event loop, in its thread. Raises the error of a failed start."""
        return self._started.result()

    @property
    def address(self) -> str:
        """What clients connect to, as `localhost:PORT`."""
        return f"localhost:{self.server.port}"

    @property
    def ca_file(self) -> Path | None:
        """The CA certificate that clients have to trust; None with certificates from files."""
        return self.server.ca_file

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.push(self._ending)
            self._thread.start()
            self._started.result()
            self._ending = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._ending:
            self.drain(0.0)

    def drain(self, limit: float | None = None) -> None:
        """Drain like `Server.drain`, and wait for the end. Leaving the block does it with a limit of 0."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self.loop.call_soon_threadsafe(self.server.begin_drain, limit)
        self._thread.join(self._stuck_after_s)
        if self._thread.is_alive():
            raise TimeoutError(
                f"the server did not end in {self._stuck_after_s:g} s: one of its methods blocks the loop"
            )

    def _run(self) -> None:
        loop = self._loop_factory()  # asyncio.Runner would wait for methods that ignore their cancellation
        try:
            loop.run_until_complete(self._serve())
        finally:
            loop.close()

    async def _serve(self) -> None:
        try:
            await self.server.start()
        except BaseException as error:
            self._started.set_exception(error)
            return
        self.server.state.on_incident = record_incident
        self._started.set_result(asyncio.get_running_loop())
        await self.server.wait_closed()
        await asyncio.sleep(0)  # the task that has closed it ends too

    def in_loop(self, function: Callable[[], T]) -> T:
        """Call a function in the server's thread, for instance to look at `server.clients()`."""

        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(self._stuck_after_s)

    def connect(self, user: str | None = None, **options: Any) -> Client:
        """Return a client, as `zcproto.connect` does. The user is added if necessary; None opens no session."""
        usual = {
            "ca_file": self.ca_file,
            "home": self.home / "client",
            "connect_timeout": self._stuck_after_s,
        }
        return Client(self.address, self.users.options(user, usual | options))

    def connect_blocking(self, user: str | None = None, **options: Any) -> BlockingClient:
        """Return a client, as `zcproto.connect_blocking` does; otherwise as `connect`."""
        return BlockingClient(self.connect(user, **options))
