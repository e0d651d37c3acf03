"""The parts of a running server.

zcproto/runtime/build.py builds them in order of dependency, zcproto/runtime/server.py starts and stops them. The
snapshot, the admin operations, the HTTPS resources and the reload use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from zcproto.admin.https import HttpSide
from zcproto.admin.machines import MachineTokens
from zcproto.admin.traffic import Traffic
from zcproto.alerts.service import ServerAlerts
from zcproto.auth import Login, RegisteredDevice, User
from zcproto.auth.directory import Directory
from zcproto.auth.oidc import JwtAuthenticator
from zcproto.certs.manager import CertificateManager
from zcproto.certs.pair import CertificatePair
from zcproto.common.clock import Clock
from zcproto.common.home import Home
from zcproto.config import Config
from zcproto.observe.loop_lag import LoopLag
from zcproto.observe.metrics import Metrics
from zcproto.server.lifespan import Lifespans
from zcproto.server.listener import Listener
from zcproto.server.state import ServerState
from zcproto.stores.sync import StoreSync
from zcproto.tls.server import TlsAcceptor


@dataclass(slots=True)
class ActiveConfig:
    """The configuration that applies now; a reload replaces it."""

    config: Config


class FleetFigures(Protocol):
    """The reports of a server of several processes, as snapshot.py makes them of one. Each raises Unavailable."""

    async def status(self) -> dict[str, Any]: ...

    async def readiness(self) -> Mapping[str, Any]: ...

    async def stats(self) -> dict[str, Any]: ...

    async def metrics(self) -> Metrics: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of one server.

    `store` is None if sessions end with the process, `users` and `devices` if the program brings its own
    authenticators, `jwt` without identity providers, `tokens` and `http` if HTTP is switched off, `fleet` if this
    process is the whole server. `started_at` is milliseconds since the Unix epoch.
    """

    active: ActiveConfig
    home: Home
    clock: Clock
    started_at: int
    alerts: ServerAlerts
    certificates: CertificateManager
    state: ServerState
    store: StoreSync | None
    login: Login
    jwt: JwtAuthenticator | None = None
    users: Directory[User] | None
    devices: Directory[RegisteredDevice] | None
    tokens: MachineTokens | None
    acceptor: TlsAcceptor
    listener: Listener
    http: HttpSide | None
    lifespans: Lifespans
    loop_lag: LoopLag
    traffic: Traffic
    fleet: FleetFigures | None = None

    @property
    def config(self) -> Config:
        """The configuration that applies now."""
        return self.active.config

    @property
    def certificate_pairs(self) -> tuple[CertificatePair, ...]:
        """The certificates of the default site, which clients get that name no other one."""
        return tuple(self.certificates.serving.sites[0].pairs)

    def certificate_names(self) -> list[str]:
        """Return the names of all certificates that are served."""
        return [name for pair in self.certificates.serving.pairs for name in pair.names]
