"""Home folders for measurements, with their users, and the servers that run on them.

One `Stage` is one home folder. Its configuration is written from a map of keys; servers may run on it one after
the other, and several stages may share certificates.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import ssl
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from zcproto.auth import UserFile
from zcproto.certs import managed
from zcproto.certs.managed import ManagedSettings
from zcproto.common.home import Home
from zcproto.common.roles import OPERATORS
from zcproto.config.model import CertificatesConfig
from zcproto.load.caller import LoadTarget, Operator
from zcproto.load.demo import ARRIVAL_RATE, PAYLOAD_BYTES, SERVER_SPARE, SPARE_CONNECTIONS, DemoServer
from zcproto.load.plan import SESSIONS_PER_USER, Credential, Plan, check_plan, require_open_files
from zcproto.load.processes import module_environment, on_processor
from zcproto.tls.client import ALPN
from zcproto.tls.context import client_context

HOST: Final = "127.0.0.1"
NAME: Final = "localhost"
SERVER_CPU: Final = 0
CLIENT_CPU: Final = 1
KIB: Final = 1_024
SETTLE_S: Final = 1.0

ECDSA_ONLY: Final = {"certificates.key_types": ["ecdsa-p256"]}
"""Settings for servers that need not make RSA keys, which takes seconds."""


def room_for(connections: int) -> dict[str, Any]:
    """Return the settings for so many connections, all from one address."""
    return {
        "limits.max_connections": connections + SPARE_CONNECTIONS,
        "limits.connections_per_address": 0,
        "tls.max_pending": 2 * connections,  # a single network gets half of them
    }


class Stage:
    """A home folder with an operator."""

    def __init__(
        self, folder: Path, settings: Mapping[str, Any] | None = None, *, certificates: Path | None = None
    ) -> None:
        """`certificates` is a folder of the server's own certificates to copy; without one it makes them."""
        self._set_folder(folder)
        folder.mkdir(mode=0o700, exist_ok=True)
        if certificates is not None:
            shutil.copytree(certificates, self.home.certs)
        self.operator = Credential("operator", UserFile(self.home.users).add("operator", roles=OPERATORS))
        self.configure(settings or {})

    def _set_folder(self, folder: Path) -> None:
        self.home = Home(folder)
        self.log_file = folder / "server.log"
        self.ca_file = self.home.certs / "ca.crt"

    def copy(self, folder: Path) -> Stage:
        """Return a stage in another folder with the same users, certificates and settings."""
        shutil.copytree(self.home.path, folder)
        made = copy.copy(self)
        made._set_folder(folder)
        made.configure(self._settings)
        return made

    def configure(self, settings: Mapping[str, Any], more: str = "") -> None:
        """Write the configuration: values by their keys, and `more` as it is."""
        self._settings = settings
        sections: dict[str, list[str]] = {}
        for key, value in {"log.file": str(self.log_file), "log.format": "json", **settings}.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, []).append(f"{name} = {json.dumps(value)}")
        text = "\n".join(f"[{name}]\n" + "\n".join(lines) + "\n" for name, lines in sections.items())
        self.home.config.write_text(text + more, encoding="utf-8")
        self.home.config.chmod(0o600)

    def add_users(self, name: str, count: int) -> list[Credential]:
        """Add users NAME-0, NAME-1, ..."""
        return [
            Credential(*each)
            for each in UserFile(self.home.users).add_many([f"{name}-{n}" for n in range(count)])
        ]

    def add_users_for(self, name: str, sessions: int) -> list[Credential]:
        """Add users for so many sessions; return the user of each session."""
        users = self.add_users(name, -(-sessions // SESSIONS_PER_USER))
        return [user for user in users for _ in range(SESSIONS_PER_USER)][:sessions]

    def make_certificates(self) -> None:
        """Have a server make its certificates, so that none does while it is measured."""
        with self.serve():
            pass

    @contextmanager
    def serve(
        self, store: str = "memory", cpu: int | None = SERVER_CPU, app: str | None = None, port: int = 0
    ) -> Iterator[Server]:
        """Run a server, on one processor if there are several. `store` is its `store.url`, `app` a MODULE:APP."""
        server = Server(self, store, app, port)
        with nullcontext() if cpu is None else on_processor(cpu):
            server.__enter__()
        try:
            yield server
        finally:
            server.__exit__(None, None, None)

    def log_events(self) -> Counter[str]:
        """Return the warnings and errors of the servers' log, by event."""
        found: Counter[str] = Counter()
        with self.log_file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    event = json.loads(line)
                except ValueError:  # the process was killed, or the disk full, in the middle of it
                    found["(a broken line)"] += 1
                    continue
                if event.get("level") in ("warning", "error", "critical"):
                    found[f"{event['level']}: {event.get('event')}"] += 1
        return found


class Server(DemoServer):
    """A server on a stage, in a process of its own."""

    def __init__(self, stage: Stage, store: str, app: str | None = None, port: int = 0) -> None:
        super().__init__(stage.home.path, store, app, port)
        self.stage = stage

    def target(self) -> LoadTarget:
        """Return where callers connect. Made in an event loop; close it at the end."""
        return LoadTarget(HOST, HOST, self.port, self.stage.ca_file)

    def context(self, *protocols: str) -> ssl.SSLContext:
        """Return a TLS context that trusts this server."""
        return client_context(ca_file=self.stage.ca_file, protocols=protocols or (ALPN,))

    async def operator(self) -> Operator:
        """Return the operator's connection, with its session."""
        return await Operator.connect(HOST, HOST, self.port, self.stage.ca_file, self.stage.operator)

    async def stats(self) -> dict[str, Any]:
        """Ask for `server.stats` once, so that its longest pause is the one since the start."""
        user, key = self.stage.operator
        target = self.target()
        try:
            caller = await target.caller()
            params = {"scheme": "api_key", "user": user, "key": key, "client": "zcproto-bench/1"}
            caller.token = (await caller.call("session.open", params))["token"]
            stats: dict[str, Any] = await caller.call("server.stats", {})
            await caller.call("session.close", {})
            await caller.disconnect()
        finally:
            target.close()
        return stats

    def load(
        self, users: Iterable[Credential], connections: int, rate: float, seconds: float, **more: Any
    ) -> Plan:
        """Return a load of so many connections, each with a session of these users."""
        plan = Plan(
            host=HOST,
            port=self.port,
            connections=connections,
            sessions=connections,
            rate=rate,
            duration_s=seconds,
            payload_bytes=PAYLOAD_BYTES,
            credentials=tuple(dict.fromkeys(users)),
            operator=self.stage.operator,
            ca_file=self.stage.ca_file,
            **{"arrival_rate": ARRIVAL_RATE, **more},
        )
        check_plan(plan)
        return plan


class Stages:
    """Stages in one folder, with copies of the same certificates, as RSA keys take seconds to make."""

    def __init__(self, folder: Path, certificates: Path | None = None) -> None:
        """`certificates` is a folder of a server's own certificates; without one they are made when needed."""
        self.folder = folder
        self._certificates = certificates

    @property
    def certificates(self) -> Path:
        if self._certificates is None:
            self._certificates = self.folder / "certs"
            make_own_certificates(self._certificates)
        return self._certificates

    def new(self, name: str, settings: Mapping[str, Any] | None = None) -> Stage:
        return Stage(self.folder / name, settings, certificates=self.certificates)


def check_open_files(connections: int, beside: int = SERVER_SPARE) -> None:
    """Raise ConfigError if the system does not allow a process so many connections."""
    require_open_files(connections + beside, connections, lambda limit: limit - beside)


def make_own_certificates(folder: Path) -> None:
    """Make own certificates of the default configuration, as a server does on its first start."""
    usual = CertificatesConfig()
    settings = ManagedSettings(
        names=(),
        key_types=usual.key_types,
        lifetime=timedelta(seconds=usual.lifetime),
        renew_before=timedelta(seconds=usual.renew_before),
        renew_key=False,
    )
    managed.ensure(folder, settings, datetime.now(UTC))


def bench_environment() -> dict[str, str]:
    """Return the environment for processes that import `bench`, which is not installed."""
    environment = module_environment()
    clone = str(Path(__file__).parents[1])
    return {**environment, "PYTHONPATH": os.pathsep.join([clone, environment["PYTHONPATH"]])}


@contextmanager
def compiled() -> Iterator[None]:
    """Let processes that are started in the body keep bytecode, as an installed package has it."""
    names = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    with TemporaryDirectory(prefix="zcproto-bytecode-") as folder:
        os.environ["PYTHONPYCACHEPREFIX"] = folder
        try:
            yield
        finally:
            del os.environ["PYTHONPYCACHEPREFIX"]
            os.environ.update(before)


def settle() -> None:
    """Wait until servers have closed their ends of closed connections and released memory, before a count."""
    time.sleep(SETTLE_S)


def memory_bytes(pid: int) -> tuple[int, int]:
    """Return a process's resident memory now, and its peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["VmRSS"].split()[0]) * KIB, int(fields["VmHWM"].split()[0]) * KIB


def family(pid: int) -> list[int]:
    """Return a process and its children, the first made first: of a server its coordinator, then its workers."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()  # in the order of their making
    return [pid, *map(int, children)]


def private_bytes(pid: int) -> int:
    """Return the memory of a process that it shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * KIB for line in lines if line.startswith("Private_"))


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads of a process, from the scheduler's account."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9
