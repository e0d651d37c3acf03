"""Measure and prove zcproto: `python -m bench COMMAND`, from a clone.

Exit code: 0 if all bars are met, 1 if not, 2 if it cannot be measured like this, 130 after Ctrl-C.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Final

import click

from zcproto.errors import ConfigError, ZcprotoError

CANNOT: Final = 2
INTERRUPTED: Final = 130

SCENARIOS: Final = {
    "accelerator_fuzz": "The accelerator under sanitizers: the same results as Python.",
    "acme": "Order and renew certificates of a CA under load: no connection is lost.",
    "attacks": "Floods, half frames, frames without effect, blocked threads: others notice nothing.",
    "durable": "Durable runs on workers and servers that are killed: each item once, or the right error.",
    "durable_costs": "Items of durable runs beside those of plain streams, and 10,000 idle runs: CPU and memory.",
    "failover": "Failovers of Valkey and paused servers: no dead token is accepted again.",
    "failover_clients": "Kill one of three servers again and again: clients go on at the others.",
    "frozen_server": "One of two servers hangs: clients go on at the other within seconds.",
    "half_rate": "Latency at half of the maximum rate, with 10,000 connections.",
    "hostile": "Clients of hostile servers: their memory and CPU stay bounded.",
    "kills": "Kill a server again and again: nothing acknowledged is lost.",
    "matrix": "Every operation of a session, under every fault, with every store.",
    "outages": "Kill, hang, slow down, empty and cut off Valkey under load.",
    "pending": "Pending calls on workers and servers that are killed: answered once, or refused.",
    "topics": "A topic of 10,000 subscribers, in one process and on two workers: what one event costs.",
    "readers": "Topics, unread streams and rapid cancels: memory and time stay bounded.",
    "reloads": "Reload the configuration under load: no request fails.",
    "rolling_restart": "Replace the server by a new one under load: no request is lost, no connection refused.",
    "rotation": "Replace certificates once a second under load: no request fails.",
    "soak": "Churn and faults for a long time: no wrong answer, no growth.",
    "soak_clients": "The clients of all languages under faults: no wrong answer, no lost call.",
    "storms": "10,000 reconnects at once, and hostile clients among honest ones.",
    "worker_kills": "Kill workers, coordinator and supervisor at random: nothing acknowledged is lost.",
    "workers": "Several workers: balance, cost, a limit over all, and 58,000 connections.",
    "streams": "10,000 connections, each with an open stream: every item in order and in time.",
}
MICRO: Final = {
    "certificate_loading": "Load a server's certificates from the disk.",
    "hot_path": "The steps of a request, beside the bare server's.",
    "hsts_header": "Strict-Transport-Security in a response.",
    "large_bodies": "Echoes of 1 MiB, and the memory after a burst of them.",
    "metrics_cost": "Counting, for each request, and a scrape.",
    "session_cleanup": "Remove expired sessions from the registry and from stores.",
    "session_opening": "Open sessions durably, in a file.",
    "session_opening_workers": "Open sessions durably from two workers, and revoke some on the other.",
    "session_opening_valkey": "Open sessions in Valkey or Redis.",
    "token_check": "Check a token among 100,000.",
    "typed_values": "A nested dataclass as parameter and result, beside pydantic alone.",
}
COMMANDS: Final = {
    "requirements": (
        "bench.requirements.command:requirements",
        "Check every requirement; exit with 1 if any fails.",
    ),
    "curves": (
        "bench.requirements.command:curves",
        "How cost grows by connections, payload, depth and sessions.",
    ),
    "compare": (
        "bench.compare.command:command",
        "CPU of a request beside a bare server that checks nothing.",
    ),
    "guard": (
        "bench.guard.command:command",
        "Bytecodes and calls of a fixed script, beside the accepted counts.",
    ),
    "tracing": (
        "bench.tracing:command",
        "CPU of a request with OpenTelemetry off, and with 1 % recorded.",
    ),
    "peers": (
        "bench.peers.command:command",
        "CPU and memory beside gRPC, uvicorn, websockets and asyncio's streams.",
    ),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used: matplotlib and redis take long."""

    def __init__(self, name: str, commands: dict[str, tuple[str, str]], help: str) -> None:
        super().__init__(name, help=help)
        self._places = commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._places, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._places:
            return super().get_command(ctx, cmd_name)
        module, attribute = self._places[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        purposes = {name: purpose for name, (_, purpose) in self._places.items()}
        purposes |= {name: each.get_short_help_str(80) for name, each in self.commands.items()}
        with formatter.section("Commands"):
            formatter.write_dl([*purposes.items()])


def _modules(folder: str, purposes: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {name: (f"bench.{folder}.{name}:command", purpose) for name, purpose in purposes.items()}


bench = LazyGroup("bench", COMMANDS, __doc__ or "")
bench.add_command(
    LazyGroup("scenario", _modules("scenarios", SCENARIOS), "A server under load to which something happens.")
)
bench.add_command(LazyGroup("micro", _modules("micro", MICRO), "One part measured alone."))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    try:
        return int(bench.main(arguments, prog_name="python -m bench", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ConfigError as error:
        print(error, file=sys.stderr)
        return CANNOT
    except (ZcprotoError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
