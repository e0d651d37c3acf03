"""What a run of rotations has shown, and whether that is what was promised. Pure: it only counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from bench.rotation.newcomers import Newcomer
from bench.rotation.pauses import FEW_MS, MANY_MS, Span
from bench.rotation.plan import RotationPlan
from bench.rotation.rotator import Rotated
from bench.row import Row
from zcproto.load.result import Result, Verdict
from zcproto.load.tally import Kind

MAX_PAUSE_MS: Final = 10.0
LONGEST_PAUSE: Final = "longest pause of the server's loop"
SCHEMA: Final = "zcproto-rotation/2"


class Made(NamedTuple):
    """A certificate's place in the order in which they were made."""

    number: int
    """Of the rotation that made it; 0 is from before."""
    replaced: float | None
    """When the files of the next of its key family were in place; None for the last."""


@dataclass(slots=True)
class Outcome:
    """A run, whole or broken off."""

    plan: RotationPlan
    load: Result
    history: list[Rotated] = field(default_factory=list)
    """What was there, then the rotations."""
    newcomers: list[Newcomer] = field(default_factory=list)
    server_failures: dict[str, int] | None = None
    """Handshakes that the server saw fail in the meantime, by cause; None if it could not be asked."""
    at_rest: Span | None = None
    """The time under load before the first rotation; None if the server's figures could not be read."""
    rotating: Span | None = None
    """The time from there on, until the last rotation was taken up."""

    # --- rotations and who saw them --------------------------------------------------------------------

    @property
    def rotated(self) -> list[Rotated]:
        """The rotations that succeeded."""
        return [each for each in self.history[1:] if not each.problem]

    def made(self) -> dict[str, Made]:
        """Every certificate that there was, by its SHA-256."""
        orders: dict[str, list[tuple[str, Rotated]]] = {}
        for each in self.history:
            for family, leaf in each.leaves.items():
                orders.setdefault(family, []).append((leaf, each))
        found = {}
        for order in orders.values():
            ends: list[float | None] = [later.done for _, later in order[1:]]
            for (leaf, each), replaced in zip(order, [*ends, None], strict=True):
                found[leaf] = Made(each.number, replaced)
        return found

    def strangers(self) -> int:
        """Newcomers that were shown a certificate which was never made here."""
        made = self.made()
        return sum(1 for each in self.newcomers if each.leaf and each.leaf not in made)

    def ages(self) -> list[float]:
        """For each newcomer, how long the certificate that it was shown had been replaced when it came."""
        made = self.made()
        known = [(each, made[each.leaf]) for each in self.newcomers if each.leaf in made]
        return [
            0.0 if place.replaced is None else max(0.0, each.begun - place.replaced) for each, place in known
        ]

    def seen_after(self) -> dict[int, float]:
        """By the rotation's number: seconds until the first newcomer was shown its certificate or a later one."""
        made = self.made()
        sights = sorted((each.shaken, made[each.leaf].number) for each in self.newcomers if each.leaf in made)
        first: dict[int, float] = {}
        waiting = iter(sorted(self.rotated, key=lambda each: each.number))
        next_one = next(waiting, None)
        for shaken, number in sights:
            while next_one is not None and next_one.number <= number:
                first[next_one.number] = max(0.0, shaken - next_one.done)
                next_one = next(waiting, None)
        return first

    # --- what is promised ------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """All figures, in the order of the tables."""
        return [*self.count_rows(), *self.pause_rows()]

    def count_rows(self) -> list[Row]:
        """What was asked for and what came of it."""
        plan, record = self.plan, self.load.record
        rotated, seen, ages = self.rotated, self.seen_after(), self.ages()
        asked = [record.tallies[kind] for kind in (Kind.LOAD, Kind.LAST)]
        handshakes = sorted(each.shaken - each.begun for each in self.newcomers if each.shaken)
        seen_numbers = {self.made()[each.leaf].number for each in self.newcomers if each.leaf in self.made()}
        failures = None if self.server_failures is None else sum(self.server_failures.values())
        span = rotated[-1].done - rotated[0].done if len(rotated) > 1 else 0.0
        slowest = max((each.done - each.began for each in rotated), default=None)
        return [
            Row("rotations", "rotations", len(rotated), bar=plan.rotations, exact=True),
            Row("new_keys", "rotations that brought a new key", sum(each.new_key for each in rotated)),
            Row("rotation_rate", "rotations a second", (len(rotated) - 1) / span if span else None),
            Row("rotation_longest_ms", "longest rotation, of the files alone", _ms(slowest), "ms"),
            Row("requests_equal", "requests answered with what was sent", sum(each.equal for each in asked)),
            Row(
                "requests_lost",
                "requests lost",
                sum(each.failed for each in asked),
                bar=0,
                exact=True,
            ),
            Row(
                "connections_kept",
                "old connections that answered to the end",
                self.load.verified_connections,
                bar=plan.connections,
                exact=True,
            ),
            Row("newcomers", "new connections", len(self.newcomers)),
            Row(
                "newcomers_failed",
                "new connections that failed",
                sum(1 for each in self.newcomers if each.failure),
                bar=0,
                exact=True,
            ),
            Row(
                "newcomers_strange",
                "new connections shown an unknown certificate",
                self.strangers(),
                bar=0,
                exact=True,
            ),
            Row("handshakes_failed", "handshakes that failed at the server", failures, bar=0, exact=True),
            Row(
                "handshake_p50_ms", "handshake of a new connection, p50", _ms(quantile(handshakes, 0.5)), "ms"
            ),
            Row(
                "handshake_p99_ms",
                "handshake of a new connection, p99",
                _ms(quantile(handshakes, 0.99)),
                "ms",
            ),
            Row("certificates_seen", "certificates that a new connection saw", len(seen_numbers)),
            Row(
                "seen_after_p50_s", "a new one is seen after, p50", quantile(sorted(seen.values()), 0.5), "s"
            ),
            Row(
                "seen_after_longest_s",
                "a new one is seen after, longest",
                max(seen.values(), default=None),
                "s",
            ),
            Row(
                "old_longest_s",
                "an old one is shown after, longest",
                max(ages, default=None),
                "s",
                plan.delay_s,
            ),
            Row("last_seen", "the last one is seen", self._last_seen(seen), bar=1, exact=True),
        ]

    def pause_rows(self) -> list[Row]:
        """How the server's loop fared, at rest and while certificates changed."""

        def row(
            key: str, label: str, figure: Callable[[Span], float], unit: str = "", bar: float | None = None
        ) -> Row:
            rotating, at_rest = (
                None if span is None else figure(span) for span in (self.rotating, self.at_rest)
            )
            return Row(key, label, rotating, unit, bar, at_rest=at_rest)

        own = "longest, other programs left out"
        return [
            row("measured_s", "measured for", lambda span: span.seconds, "s"),
            row("server_cpu_percent", "CPU of the server, of one core", lambda span: span.cpu_percent, "%"),
            row("pauses_over_5", "pauses over 5 ms, a minute", lambda span: span.over_a_minute(FEW_MS)),
            row("pauses_over_10", "pauses over 10 ms, a minute", lambda span: span.over_a_minute(MANY_MS)),
            row("longest_pause_ms", LONGEST_PAUSE, lambda span: span.longest_ms, "ms", MAX_PAUSE_MS),
            row("longest_own_pause_ms", own, lambda span: span.longest_own_ms, "ms", MAX_PAUSE_MS),
        ]

    @property
    def machine_was_busy(self) -> bool:
        """Whether a pause is too long, and none would be if no other program had had the processor."""
        longest, own = self.pause_rows()[-2:]
        return own.holds and not longest.holds

    def _last_seen(self, seen: dict[int, float]) -> int:
        return int(bool(self.rotated) and self.rotated[-1].number in seen)

    def reasons(self) -> list[str]:
        """Why it does not hold; empty if it does."""
        return [*self.load.reasons(), *self._causes(), *self._missed()]

    def _missed(self) -> Iterator[str]:
        for row in self.rows():
            if not row.holds:
                value = "not measured" if row.value is None else f"{row.value:,.6g} {row.unit}".rstrip()
                must = f"be {row.bar:,g}" if row.exact else f"be below {row.bar:,g}"
                yield f"{row.label}: {value}, must {must}"

    def _causes(self) -> Iterator[str]:
        """What was said of the failures, each once."""
        yield from dict.fromkeys(
            f"rotation {each.number} failed: {each.problem}" for each in self.history if each.problem
        )
        yield from dict.fromkeys(
            f"a new connection failed: {each.failure}" for each in self.newcomers if each.failure
        )
        if self.server_failures:
            causes = ", ".join(f"{count} {cause}" for cause, count in sorted(self.server_failures.items()))
            yield f"handshakes failed at the server: {causes}"

    @property
    def verdict(self) -> Verdict:
        if self.load.interrupted:
            return Verdict.INTERRUPTED
        return Verdict.FAILED if self.reasons() else Verdict.VERIFIED


def quantile(ordered: list[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000
