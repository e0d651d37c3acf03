"""The status of a running server, as JSON: for `zcproto status`, the page for people, and whoever asks the control
socket.

What this file decides: the names and units of the figures. All that is here is read when somebody asks; nothing is
secret, and nothing names a user.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any, Final

from zcproto.admin.https import HttpSide
from zcproto.admin.traffic import Traffic
from zcproto.alerts.service import ServerAlerts
from zcproto.certs.keeper import CertificateKeeper
from zcproto.common.clock import MS_PER_SECOND, Clock
from zcproto.config import Config
from zcproto.observe.log import level
from zcproto.observe.loop_lag import PauseMeter
from zcproto.observe.process import resident_bytes, used_cpu_s
from zcproto.server.listener import Listener
from zcproto.server.state import Serving
from zcproto.tls.server import TlsAcceptor

API: Final = 1
"""The version of the control socket's resources. It changes when one of them means something else."""

DAY_S: Final = 86_400


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """Reads one server. `config` gives the configuration in force, `addresses` where it listens."""

    config: Callable[[], Config]
    addresses: Callable[[], Sequence[tuple[str, int]]]
    clock: Clock
    started_at: int
    serving: Serving
    acceptor: TlsAcceptor
    listener: Listener
    certificates: CertificateKeeper
    pauses: PauseMeter
    alerts: ServerAlerts
    traffic: Traffic
    http: HttpSide | None = None

    def figures(self) -> dict[str, Any]:
        """All of it. Moments are milliseconds since the Unix epoch, durations seconds, memory bytes."""
        serving, config, wall = self.serving, self.config(), self.clock.wall()
        registry = serving.registry
        return {
            "api": API,
            "version": version("zcproto"),
            "pid": os.getpid(),
            "time": wall,
            "started_at": self.started_at,
            "uptime_s": max(0, wall - self.started_at) // MS_PER_SECOND,
            "addresses": [
                f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.addresses()
            ],
            "draining": serving.draining,
            "log_level": level(),
            "connections": {
                "tcp": self.listener.connections,
                "zcp": len(serving.connections),
                "http": 0 if self.http is None else len(self.http.connections),
                "limit": config.limits.max_connections,
                "refused": {
                    "full": serving.counters.refused_full,
                    "per_address": serving.counters.refused_per_address,
                    "exhausted": serving.counters.accept_failed,
                },
            },
            "sessions": {
                "live": len(registry),
                "lapsed": registry.lapsed,
                "opened": registry.opened,
                "revoked": registry.revoked,
            },
            "requests": {
                "total": serving.counters.requests,
                "in_flight": sum(protocol.in_flight for protocol in serving.connections),
                "incidents": serving.counters.incidents,
            },
            "traffic": self.traffic.figures(),
            "handshakes": {
                "completed": self.acceptor.handshakes_completed,
                "in_progress": self.acceptor.handshakes_in_progress,
                "failed": {cause.value: count for cause, count in self.acceptor.failures.items() if count},
            },
            "certificates": self._certificates(),
            "store": {"url": config.store.url.partition(":")[0], **serving.sessions.statistics()},
            "alerts": self.alerts.report(),
            "process": {"cpu_s": used_cpu_s(), "rss_bytes": resident_bytes()},
        }

    def _certificates(self) -> list[dict[str, Any]]:
        return [
            {
                "file": one.path.name,
                "source": one.source.value,
                "names": list(one.names),
                "site": list(one.site),
                "key_type": one.key_type,
                "pin": one.pin,
                "sha256": one.sha256.hex(),
                "not_after": _ms(one.not_after),
                "days_left": int(one.seconds_left // DAY_S),
                "seconds_left": round(one.seconds_left),
            }
            for one in self.certificates.status()
        ]


def _ms(moment: datetime) -> int:
    return round(moment.timestamp() * MS_PER_SECOND)
