"""What one outage has shown, and whether that is what was promised. Pure: it only counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from bench.outages.load import Phase, Waits
from bench.row import Row
from bench.told import Broken

MAX_WAIT_MS: Final = 300.0
NAMED: Final = 3
SCHEMA: Final = "zcproto-outages/1"


class Check(NamedTuple):
    """What one server said afterwards of all sessions."""

    where: str
    broken: Broken


@dataclass(slots=True)
class Outcome:
    """One outage."""

    name: str
    title: str
    refuses: bool
    sent: int = 0
    answered: int = 0
    lost: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """Requests of the load with another end, by why."""
    calls_failed: Counter[str] = field(default_factory=Counter)
    """Openings, refreshes and revocations with another end than was promised, by why."""
    load_waits: Waits = field(default_factory=Waits)
    call_waits: Waits = field(default_factory=Waits)
    lateness: Waits = field(default_factory=Waits)
    pauses: dict[Phase, float] = field(default_factory=dict)
    """The longest of the server's loop, in seconds."""
    opened: int = 0
    """Openings that were answered with a session since the outage began."""
    refreshed: int = 0
    refused: int = 0
    """Openings and refreshes that were answered with UNAVAILABLE and a time to wait since then."""
    revoked: int = 0
    """Sessions whose revocation was acknowledged in the whole run."""
    revoked_meanwhile: int = 0
    live: int = 0
    """Sessions that must be good at the end."""
    degraded_after_s: float | None = None
    recovered_after_s: float | None = None
    checks: list[Check] = field(default_factory=list)

    @property
    def broken(self) -> Broken:
        """What any of the servers did not keep."""
        whole = Broken()
        for each in self.checks:
            whole.add(each.broken)
        return whole

    def rows(self) -> list[Row]:
        """All figures, in the order of the table."""
        broken, load, calls = self.broken, self.load_waits, self.call_waits
        return [
            Row("sent", "requests", self.sent),
            Row("lost", "without an answer", self.lost, bar=0, exact=True),
            Row("failed", "refused, or answered otherwise", self.failed.total(), bar=0, exact=True),
            *(
                Row(f"{key}_{phase.value}_ms", f"longest {label}, {phase.value}", waits.longest[phase] * 1e3, "ms")
                for key, label, waits in (
                    ("wait", "request", load),
                    ("call", "other call", calls),
                    ("late", "lateness of the load itself", self.lateness),
                )
                for phase in Phase
            ),
            *(
                Row(f"pause_{phase.value}_ms", f"longest pause of the server, {phase.value}",
                    self.pauses[phase] * 1e3 if phase in self.pauses else None, "ms")
                for phase in Phase
            ),
            Row("wait_added_ms", "the request's more than before", load.added * 1e3, "ms", MAX_WAIT_MS),
            Row("call_added_ms", "the other call's", calls.added * 1e3, "ms", MAX_WAIT_MS),
            Row("opened", "opened since it began", self.opened),
            Row("refreshed", "refreshed since it began", self.refreshed),
            Row("refused", "told to wait", self.refused),
            Row("calls_failed", "other calls with another end", self.calls_failed.total(), bar=0, exact=True),
            Row("degraded_s", "degraded after", self.degraded_after_s, "s"),
            Row("recovered_s", "healthy again after", self.recovered_after_s, "s"),
            Row("revoked_meanwhile", "sessions revoked meanwhile", self.revoked_meanwhile),
            Row("revoked", "sessions revoked in all", self.revoked),
            Row("held", "of these, refused everywhere after", self.revoked - len(broken.risen), bar=self.revoked,
                exact=True),
            Row("live", "sessions that live", self.live),
            Row("kept", "of these, good everywhere after", self.live - len(broken.lost), bar=self.live, exact=True),
            Row("spent", "replaced tokens that were taken after", len(broken.spent), bar=0, exact=True),
        ]  # fmt: skip

    def reasons(self) -> list[str]:
        """Why it failed, in words; empty if it did not."""
        said = [
            f"{row.label}: {'not measured' if row.value is None else f'{row.value:,.6g}'}"
            for row in self.rows()
            if not row.holds
        ]
        if calls := [f"{what} {phase.value}" for phase, what in self.call_waits.what.items()]:
            said += [f"the longest other calls: {', '.join(calls)}"] if said else []
        said += [f"{count:,} requests: {why}" for why, count in self.failed.items()]
        said += [f"{count:,} calls: {why}" for why, count in self.calls_failed.items()]
        if not self.checks:
            said.append("it did not recover, and nothing was checked afterwards")
        for where, broken in self.checks:
            if broken:
                some = sorted(broken.lost | broken.risen | broken.spent)[:NAMED]
                said.append(
                    f"{where}: {len(broken.lost)} sessions lost, {len(broken.risen)} revoked ones let in, "
                    f"{len(broken.spent)} replaced tokens taken, such as {', '.join(some)}"
                )
        if not self.revoked_meanwhile:
            said.append("nothing was revoked meanwhile")
        if self.refuses and not self.refused:
            said.append("nothing had to wait: there was no outage")
        return said

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": not self.reasons(),
            "reasons": self.reasons(),
            "figures": {
                row.key: {"value": row.value, "unit": row.unit, "bar": row.bar, "holds": row.holds}
                for row in self.rows()
            },
            "checks": {
                each.where: {
                    "lost": len(each.broken.lost),
                    "risen": len(each.broken.risen),
                    "spent": len(each.broken.spent),
                }
                for each in self.checks
            },
        }
