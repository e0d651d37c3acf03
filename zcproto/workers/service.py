"""What a supervisor runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from zcproto.workers.channel import Channel
from zcproto.workers.successor import Successor


class SupervisedService(Protocol):
    """What is supervised. Its methods run in the supervisor, except for `run`, and must return soon."""

    def run(self, number: int, channel: Channel, lifeline: int) -> int:
        """Run a process, in the child; return its exit code. The lifeline is at its end when the supervisor is."""

    def coordinator_ready(self, values: dict[str, Any]) -> None:
        """The coordinator has started for the first time. `values` are those of its message."""

    def listen(self) -> None:
        """All processes have started for the first time: let the sockets listen. Raises ConfigError."""

    def serving(self) -> None:
        """The workers accept from now on."""

    def process_ended(self, number: int) -> None:
        """Clear what the process has left in shared memory."""

    def reloading(self, is_begun: bool) -> None:
        """A reload has begun, or ended."""

    def reload(self) -> None:
        """Read the configuration again, which the coordinator has applied, for processes to come."""

    def drain_limit(self) -> float:
        """Return the seconds of a drain."""

    def stopping(self, limit: float) -> None:
        """A drain of the server has begun."""

    def start_successor(self) -> Successor:
        """Start this program again, with the sockets and locks of this one. Raises OSError."""

    def upgrade_limit(self) -> float:
        """Return the seconds within which a successor must serve."""

    def left(self, pid: int) -> None:
        """The successor serves: it owns the home folder and speaks to the service manager from now on."""

    def tick(self, ready: int) -> float:
        """Report that this many workers are ready; return the seconds until the next call."""

    def renew_sockets(self) -> bool:
        """Make sockets again that were removed. Return whether a new coordinator is needed, which gets them."""

    def hang_limit(self) -> float | None:
        """Return the seconds within which a process must send a beat; None without a limit."""

    def start_limit(self) -> float | None:
        """Return the seconds within which a process must be ready; None without a limit."""

    def report(self, ended: Sequence[tuple[str, str]]) -> int:
        """Raise the alerts of processes that ended, by name and reason, in a child; return its exit code."""
