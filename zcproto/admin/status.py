"""The status of a running server, as JSON: for `zcproto status`, the page for people, and whoever asks the control
socket.

What this file decides: the names and units of the figures. All that is here is read when somebody asks; nothing is
secret, and nothing names a user.
"""

from __future__ import annotations

import asyncio
import os
from datetime import datetime
from importlib.metadata import version
from typing import Any, Final

from zcproto.admin.parts import Parts
from zcproto.app.app import Method
from zcproto.common.clock import MS_PER_SECOND
from zcproto.observe.log import level
from zcproto.observe.process import resident_bytes, used_cpu_s

API: Final = 1
"""The version of the control socket's resources. It changes when one of them means something else."""

DAY_S: Final = 86_400


class ServerStatus:
    """Reads the parts of one server."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def figures(self) -> dict[str, Any]:
        """All of it. Moments are milliseconds since the Unix epoch, durations seconds, memory bytes."""
        parts = self.parts
        state, config, wall = parts.state, parts.config, parts.clock.wall()
        registry = state.registry
        return {
            "api": API,
            "version": version("zcproto"),
            "pid": os.getpid(),
            "time": wall,
            "started_at": parts.started_at,
            "uptime_s": max(0, wall - parts.started_at) // MS_PER_SECOND,
            "addresses": [
                f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                for host, port in parts.listener.addresses
            ],
            "draining": state.draining,
            "log_level": level(),
            "connections": {
                "tcp": parts.listener.connections,
                "zcp": len(state.connections),
                "http": 0 if parts.http is None else len(parts.http.connections),
                "limit": config.limits.max_connections,
                "refused": {
                    "full": state.counters.refused_full,
                    "per_address": state.counters.refused_per_address,
                    "exhausted": state.counters.accept_failed,
                },
            },
            "sessions": {
                "live": len(registry),
                "lapsed": registry.lapsed,
                "opened": registry.opened,
                "revoked": registry.revoked,
            },
            "requests": {
                "total": state.counters.requests,
                "in_flight": sum(protocol.in_flight for protocol in state.connections),
                "incidents": state.counters.incidents,
            },
            "traffic": parts.traffic.figures(),
            "handshakes": {
                "completed": parts.acceptor.handshakes_completed,
                "in_progress": parts.acceptor.handshakes_in_progress,
                "failed": {cause.value: count for cause, count in parts.acceptor.failures.items() if count},
            },
            "certificates": self._certificates(),
            "store": {"url": config.store.url.partition(":")[0], **state.sessions.statistics()},
            "alerts": parts.alerts.report(),
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
            for one in self.parts.certificates.status()
        ]


def server_stats(parts: Parts) -> Method:
    """Return the method `server.stats`."""

    def server_stats() -> dict[str, Any]:
        """Connections, sessions, requests, CPU, memory and loop pauses."""
        return statistics(parts)

    return Method("server.stats", server_stats, operator=True)


def statistics(parts: Parts) -> dict[str, Any]:
    """Return the figures of `server.stats`: times in seconds, memory in bytes, loop pauses since the last call."""
    state, acceptor, counters = parts.state, parts.acceptor, parts.state.counters
    return {
        "connections": len(state.connections),
        "tcp_connections": parts.listener.connections,
        "http": None if parts.http is None else parts.http.figures(),
        "sessions": len(state.registry),
        "requests": counters.requests,
        "running": state.tasks.running,
        "tasks": len(asyncio.all_tasks()),
        "errors": {str(code): count for code, count in counters.errors.items()},
        "connections_opened": counters.connections_opened,
        "connections_ended": counters.connections_ended,
        "refused_per_address": counters.refused_per_address,
        "refused_full": counters.refused_full,
        "accept_failed": counters.accept_failed,
        "dropped_stale": counters.dropped_stale,
        "refused_users": state.binding.refused_users,
        "refused_addresses": state.binding.refused_addresses,
        "refused_clients": state.binding.refused_clients,
        "idempotency": state.idempotency.counts,
        "store": state.sessions.statistics(),
        "handshakes_completed": acceptor.handshakes_completed,
        "handshakes_in_progress": acceptor.handshakes_in_progress,
        "tls_failures": {failure.value: count for failure, count in acceptor.failures.items() if count},
        "cpu_s": used_cpu_s(),
        "rss_bytes": resident_bytes(),
        "longest_pause_s": parts.loop_lag.take_longest(),
        "longest_own_pause_s": parts.loop_lag.take_longest_own(),
        "pauses": parts.loop_lag.counts,
        **parts.certificates.figures(),
    }


def _ms(moment: datetime) -> int:
    return round(moment.timestamp() * MS_PER_SECOND)
