"""The bars of each scenario: a good outcome meets them, and each broken promise misses its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.curves.watch import Watched
from bench.report import Report
from bench.samples import Sample, Span
from bench.scenarios import (
    attacks,
    failover,
    failover_clients,
    frozen_server,
    hostile,
    kills,
    outages,
    rolling_clients,
    rolling_restart,
    rotation,
    soak,
    soak_clients,
    storms,
    streams,
    worker_kills,
)
from bench.scenarios.attackers import Logins
from bench.scenarios.churning_clients import Seen
from bench.scenarios.failover_times import Connected, Done, FailoverTimes, Load
from bench.scenarios.outage_churn import Phase, Waits
from bench.scenarios.rotation import Newcomer, Rotated
from bench.scenarios.sessions import Broken
from bench.scenarios.storm_clients import CameBack, Served
from tests.load import helpers
from zcproto.errors import Code
from zcproto.load.record import Latencies, RequestKind, Tally
from zcproto.load.result import Moment

MIB = 1 << 20


def latencies(*millis: float) -> Latencies:
    return helpers.latencies(*(round(each * 1000) for each in millis))


def made(kind: Callable[..., Any], usual: dict[str, Any], changes: dict[str, Any]) -> Any:
    return kind(**{**usual, **changes})


# --- one good outcome of each scenario, but for the changes ---------------------------------------------------


def attack(
    name: str,
    logins: dict[str, Any] | None = None,
    requests: dict[str, Any] | None = None,
    figures: dict[str, Any] | None = None,
    quiet_ms: float = 1.0,
) -> Report:
    usual_logins = {"begun": 100, "opened": 100, "latency": latencies(*[10.0] * 99, 150.0)}
    usual_requests = {"sent": 50, "equal": 50, "connections": 5, "latency": latencies(1.0)}
    usual_figures = {"before": 50 * MIB, "peak": 60 * MIB, "after": 51 * MIB, "stats": {"refused_full": 3}}
    begun = made(Logins, usual_logins, logins or {})
    begun.failed["refused"] = begun.begun - begun.opened
    outcome = attacks.Outcome(
        attacks.ATTACKS[name],
        rest=Logins(10, 10, latency=latencies(9.0)),
        quiet=Served(50, 50, 5, latency=latencies(quiet_ms)),
        logins=begun,
        served=made(Served, usual_requests, requests or {}),
        connections=5,
        counts=Counter({"connects": 7}),
        figures=made(attacks.Figures, usual_figures, figures or {}),
    )
    return attacks.report({name: outcome})


def failovers(**changes: Any) -> Report:
    usual = {
        **{"wanted": 1, "faults": 1, "dead": 7, "tried": 100, "accepted": 3, "lost": 2},
        "last_accepted_s": failover.MAX_LATE_S,
        "counts": Counter({"opened": 5, "refreshed": 4, "ended": 3}),
    }
    return Report({"planned": made(failover.Outcome, usual, changes).rows()})


def fleet(
    killed: int = 7443, runs: tuple[str, ...] = ("1-1", "2-1"), unanswered: int = 0, sessions_lost: int = 0
) -> Report:
    """The second call is slow; its client was connected to 7444."""
    times = FailoverTimes(
        done=[Done(10.5, 10.5, 10.6, 1), Done(10.5, 10.75, 15.0, 2)],
        ports={10.0: {1: 7443, 2: 7444}},
        loads=[Load(0.25, 0.5)],
    )
    times.connected[2] += [Connected(8.0, 8.1, 8.2), Connected(11.5, 12.0, 14.0), Connected(16.0, 16.1, 16.2)]
    seen = failover_clients.FleetSeen(times, names=["1-1", "2-1"], keyed=2, keyless=1, reconnects=1)
    seen.unanswered["DEADLINE_EXCEEDED"] += unanswered
    seen.sessions_lost = sessions_lost
    plan = failover_clients.FailoverClientsPlan(seconds=5)
    return failover_clients.report(plan, seen, {10.0: killed}, Counter(runs))


def frozen(**changes: Any) -> Report:
    usual = {"sent": 9, "answered": 8, "at_stopped": 2, "moved": 2, "unknown": 1, "gaps_s": [0.5, 7.5]}
    return frozen_server.report(frozen_server.FrozenPlan(), made(frozen_server.Seen, usual, changes))


def hostile_servers(growth_mib: float = 7.9, cpu_s: float = 1.9, ended: bool = False) -> Report:
    before = hostile.Usage(100.0, 40.0, 1.0)
    after = hostile.Usage(110.0, 40.0 + growth_mib, 1.0 + cpu_s)
    return hostile.report({"pings, python": hostile.Outcome(before, after, ended=ended)})


def killed_server(wanted: int = 1, **changes: Any) -> Report:
    seen = kills.Seen(kills=1, starts_s=[1.0, 3.0, 2.0])
    seen.acknowledged.update({"open": 3, "refresh": 2, "close": 1})
    for name, value in changes.items():
        setattr(seen, name, value)
    return seen.report(wanted)


def killed_workers(**late: Any) -> Report:
    seen = kills.Seen(kills=1, starts_s=[1.0])
    seen.acknowledged.update({"open": 1, "refresh": 1, "close": 1})
    back_s = {"worker": 0.2, "supervisor": 0.3, **late.get("returns", {})}
    returns = [worker_kills.Return(name, 3, 1e9, each, 2) for name, each in back_s.items()]
    found: Any = SimpleNamespace(returns=returns, gone_s=late.get("gone_s", [0.5]), left=late.get("left", 0))
    return worker_kills.report(found, seen, 1)


def by_phase(*seconds: float) -> dict[Phase, float]:
    return dict(zip(Phase, seconds, strict=True))


def outage(name: str = "hung", **changes: Any) -> Report:
    servers = ("the server", "the other server", "the server, started again", "a new server")
    last = changes.pop("last", {})
    usual = {
        **{"sent": 1_000, "put_off": 20, "revoked": 10, "revoked_during": 6, "live": 30},
        "load_waits": by_phase(0.1, 0.2, 0.15),
        "call_waits": Waits(by_phase(0.02, 0.3, 0.01), {Phase.DURING: "open"}),
        "checks": {each: Broken(**last if each == servers[-1] else {}) for each in servers},
        "outage": outages.OUTAGES[name],
    }
    return outages.report({name: made(outages.OutageOutcome, usual, changes)})


def restarts(faults: tuple[str, ...] = (), times: tuple[float, ...] = (1.0,), **changes: Any) -> Report:
    usual = {"sent": 50_000, "answered": 50_000, "visits": 1_000, "seconds": 10.0}
    seen = made(rolling_clients.Seen, usual, changes)
    found = rolling_restart.Restarts([*times], [*times], faults=[*faults])
    return rolling_restart.report(rolling_restart.RollingPlan(restarts=1), seen, found)


def figures(at: float, longest_ms: float = 2.0, own_ms: float = 1.0) -> Sample:
    return Sample(at, at / 10, 1, 1, 1, longest_ms / 1000, own_ms / 1000, (0,) * 11)


def newcomer(begun: float, leaf: str, failure: str = "") -> Newcomer:
    return Newcomer(begun, begun + 0.01 if leaf else 0.0, leaf, failure)


HISTORY = [
    Rotated(0, False, -0.05, 0.0, {"rsa": "r0", "ecdsa": "e0"}),
    Rotated(1, False, 9.95, 10.0, {"rsa": "r1", "ecdsa": "e1"}),
    Rotated(2, True, 10.95, 11.0, {"ecdsa": "e2"}),  # the RSA certificate of the first stays right
]
FAILED = Rotated(2, True, 11.0, 11.1, {}, "the disk is full")
NEWCOMERS = [newcomer(9.5, "e0"), newcomer(10.75, "e1"), newcomer(500.0, "r1"), newcomer(12.0, "e2")]
AT_REST = Span(figures(0.0), figures(20.0))


def rotated(harm: Callable[[helpers.Result], object] | None = None, **changes: Any) -> Report:
    load = helpers.verified_result(plan=helpers.plan(connections=10))
    if harm is not None:
        harm(load)
    usual = {
        "history": [*HISTORY],
        "newcomers": [*NEWCOMERS],
        "tls_failures": {},
        "resting": AT_REST,
        "rotating": Span(AT_REST.after, figures(50.0, 8.0, 7.0)),
    }
    plan = rotation.RotationPlan(rotations=2, connections=10)
    parts = {**usual, **changes}
    return rotation.RotationOutcome(plan, load, *parts.values()).report()


def lose_a_request(load: helpers.Result) -> None:
    load.record.tallies[RequestKind.LOAD].equal -= 1
    load.record.tallies[RequestKind.LOAD].lost += 1


def lose_a_connection(load: helpers.Result) -> None:
    load.record.tallies[RequestKind.LAST].equal -= 1
    load.record.lost_connections["closed by the server"] = 1


def sample(minute: int, **changes: float) -> soak.Sample:
    usual: dict[str, float] = {"memory_mib": 70.0, "descriptors": 36, "tasks": 9, "threads": 6}
    usual |= {"connections": 13, "sessions": 100, "answers": minute * 60_000}
    return cast("soak.Sample", made(soak.Sample, {"at_s": minute * 60.0, **usual}, changes))


def soaked(
    memory: dict[int, float] | None = None, minutes: int = 9, grows: str = "", **changes: Any
) -> Report:
    usual = {
        "plan": soak.SoakPlan(30.0),
        "seen": Seen(right=Counter({"echo": 1000, "open": 20})),
        "samples": [
            sample(each, memory_mib=(memory or {}).get(each, 70.0), **({grows: 30 + each} if grows else {}))
            for each in range(1, minutes + 1)
        ],
        "done": Counter({"rotation": 9, "reload": 9, "outage": 4}),
        "seconds": 540.0,
    }
    return cast("Report", made(soak.SoakOutcome, usual, changes).report())


def soaked_clients(**changes: Any) -> Report:
    usual = {"calls": 10, "compared": 9, "reconnects": 3, "uncertain": Counter({"run: closed": 1})}
    done = changes.pop("done", soak_clients.FAULTS)
    tally = made(soak_clients.Tally, usual, changes)
    return soak_clients.SoakClientsOutcome({"Go": tally}, Counter(done)).report()


STATS = {
    "longest_pause_s": 0.01,
    "tls_failures": {"handshake_timeout": 1},
    "errors": {str(int(Code.REPLAYED)): 2},
}


def served(**changes: Any) -> Served:
    usual = {"sent": 100, "equal": 100, "connections": 16, "latency": latencies(*[1.0] * 99, 20.0)}
    return cast("Served", made(Served, {**usual, "lag": latencies(0.1, 0.2)}, changes))


def storm(served_s: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0), wrong: int = 0, **changes: Any) -> Report:
    usual = {
        **{"clients": 4, "has_bars": True, "at_rest": served(), "served": served(), "answered": 4},
        "back": CameBack([*served_s], 5, wrong, Counter({"TLS: disconnected": 1}), 0.5, 0.7),
        **{"memory_after": 60 * MIB, "memory_peak": 61 * MIB, "stats": STATS},
    }
    return storms.report({"storm": made(storms.Storm, usual, changes)})


def mix(**changes: Any) -> Report:
    usual = {
        **{"kinds": ("slow", "garbage", "replay", "deaf"), "honest": 16, "served": served()},
        **{"memory_peak": 60 * MIB, "stats": STATS},
        "counts": Counter({"connected": 6, "disconnected": 4, "replays_sent": 2}),
    }
    return storms.report({"mix": made(storms.Mix, usual, changes)})


def open_streams(items: Tally | None = None, latency_ms: float = 1.0) -> Report:
    items = items or Tally(50, 50, 50)
    result = helpers.verified_result(plan=helpers.plan(stream="repeat"))
    result.record.items = items
    last = result.readings[Moment.VERIFIED]
    sent = items.equal + items.unequal
    result.readings[Moment.VERIFIED] = last._replace(stats=last.stats._replace(items=sent))
    result.record.latencies["item"] = latencies(latency_ms)
    memory = [Sample(0.0, 0.0, 0, 0, each, 0.0, 0.0, ()) for each in (1_000_000, 1_020_480, 1_010_000)]
    return streams.report(Watched(result, {"load": memory}))


# --- what each change misses ----------------------------------------------------------------------------------

SILENCE, FLOOD = partial(attack, "silence: nothing"), partial(attack, "flood: nothing")
TENTH_IS_SLOW = latencies(*[1.0] * 9, 101.0)

UNMET: list[tuple[Callable[..., Report], dict[str, Any], str]] = [
    (SILENCE, {"logins": {"opened": 99}}, "logins_failed"),
    (SILENCE, {"logins": {"latency": latencies(*[10.0] * 9, 200.0)}}, "login_p99_ms"),
    (FLOOD, {"logins": {"opened": 96, "latency": latencies(*[900.0] * 95, 3000.0)}}, ""),  # a few may be late
    (FLOOD, {"logins": {"latency": latencies(*[900.0] * 94)}}, "at_once"),
    (FLOOD, {"logins": {"latency": latencies(*[900.0] * 94, *[1000.0] * 6)}}, "at_once"),
    (FLOOD, {"requests": {"connections": 4}}, "connections_lost"),
    (partial(attack, "requests"), {"requests": {"equal": 49}}, "requests_lost"),
    (partial(attack, "requests"), {"figures": {"unhealthy": 1}}, "unhealthy"),
    (partial(attack, "frames: of one user"), {"figures": {"peak": 146 * MIB}}, "growth_mib"),
    (partial(attack, "frames: of 60 users"), {"figures": {"after": 66 * MIB}}, "kept_mib"),
    (partial(attack, "waste"), {"quiet_ms": 0.25}, "times_quiet"),
    (failovers, {"faults": 0}, "faults"),
    (failovers, {"counts": Counter({"opened": 5, "refreshed": 4})}, "ended"),
    (failovers, {"failed": Counter({"open: INTERNAL": 1})}, "calls_failed"),
    (failovers, {"tried": 0}, "tried"),
    (failovers, {"late": ["ada/1 on node-0"]}, "accepted_late"),
    (failovers, {"stale": ["ada/1"]}, "accepted_stale"),
    (failovers, {"above_limit": ["ada on node-0"]}, "above_limit"),
    (failovers, {"disagreed": ["ada/1"]}, "disagreed"),
    (fleet, {"killed": 7444}, "failover_p99_ms"),  # only clients of the killed server count
    (fleet, {"runs": ("1-1", "1-1")}, "twice never"),
    (fleet, {"unanswered": 1, "sessions_lost": 1}, "unanswered sessions_lost"),
    (frozen, {"moved": 1, "unknown": 0, "gaps_s": [8.5]}, "moved not_answered gap_s"),
    (frozen, {"sent": 0, "answered": 0, "at_stopped": 0, "moved": 0, "unknown": 0}, "at_stopped calls"),
    (hostile_servers, {"growth_mib": 8.1}, "growth_mib"),
    (hostile_servers, {"cpu_s": 2.1}, "cpu_percent"),
    (hostile_servers, {"ended": True}, "ended"),
    (killed_server, {"wanted": 2}, "kills"),
    (killed_server, {"broken": Broken(lost={"a"})}, "lost"),
    (killed_server, {"broken": Broken(revived={"a"})}, "revived"),
    (killed_server, {"broken": Broken(reused={"a"})}, "reused"),
    (killed_server, {"pairs_refused": 1}, "pairs_refused"),
    (killed_server, {"half_done": 1}, "half_done"),
    (killed_server, {"damage": 1}, "damage"),
    (killed_server, {"failed": Counter({"close: NOT_FOUND": 2})}, "failed fault"),
    (killed_workers, {"returns": {"worker": 1.5}}, "worker_back_s"),
    (killed_workers, {"returns": {"supervisor": 1.5}}, "over_start"),
    (killed_workers, {"gone_s": [2.0], "left": 1}, "gone_s left"),
    (outage, {"lost": 1}, "lost"),
    (outage, {"failed": Counter({"TOKEN_REVOKED": 2})}, "failed"),
    (outage, {"calls_failed": Counter({"end: UNAVAILABLE": 1})}, "calls_failed"),
    (outage, {"load_waits": by_phase(0.1, 0.2, 0.401)}, "wait_added_ms"),
    (outage, {"call_waits": Waits(by_phase(0.1, 0.401, 0.1), {Phase.DURING: "open"})}, "call_added_ms"),
    (outage, {"checks": {}}, "checks"),
    (outage, {"last": {"lost": {"ada/1"}}}, "live_refused"),
    (outage, {"last": {"revived": {"ada/1"}}}, "revived"),
    (outage, {"last": {"reused": {"ada/1"}}}, "reused"),
    (outage, {"revoked_during": 0}, "revoked_during"),
    (outage, {"put_off": 0}, "put_off"),
    (outage, {"name": "emptied", "put_off": 0}, ""),  # it lets openings through
    (restarts, {"lost": Counter({"no answer": 1})}, "lost"),
    (restarts, {"refused": Counter({"connection reset": 1})}, "refused"),
    (restarts, {"faults": ("in the log: error: worker.killed",)}, "fault"),
    (restarts, {"sent": 0, "answered": 0, "visits": 0, "skipped": 1}, "rate visit_rate skipped"),
    (restarts, {"times": ()}, "restarts"),
    (rotated, {"history": HISTORY[:2]}, "rotations newcomers_unknown"),
    (rotated, {"history": [*HISTORY[:2], FAILED], "newcomers": NEWCOMERS[:3]}, "rotations fault"),
    (rotated, {"newcomers": [*NEWCOMERS, newcomer(12.5, "e1")]}, "old_longest_s"),
    (rotated, {"newcomers": [*NEWCOMERS, newcomer(500.0, "r0")]}, "old_longest_s"),
    (rotated, {"newcomers": NEWCOMERS[:2]}, "last_seen"),
    (rotated, {"newcomers": []}, "old_longest_s last_seen"),
    (rotated, {"newcomers": [*NEWCOMERS, newcomer(12.1, "x")]}, "newcomers_unknown"),
    (rotated, {"newcomers": [*NEWCOMERS, newcomer(12.1, "", "reset")]}, "newcomers_failed fault"),
    (rotated, {"tls_failures": {"not_tls": 2}}, "handshakes_failed fault"),
    (rotated, {"tls_failures": None}, "handshakes_failed"),
    (rotated, {"rotating": None}, "longest_pause_ms longest_own_pause_ms"),
    (rotated, {"rotating": Span(AT_REST.after, figures(50.0, 10.4, 9.0))}, "longest_pause_ms"),
    (
        rotated,
        {"rotating": Span(AT_REST.after, figures(50.0, 12.0, 10.4))},
        "longest_pause_ms longest_own_pause_ms",
    ),
    (rotated, {"harm": lose_a_request}, "requests_lost fault"),
    (rotated, {"harm": lose_a_connection}, "connections_kept connections_lost fault"),
    (soaked, {"memory": {each: 70.0 + each for each in range(10)}}, "memory_growth"),
    (soaked, {"memory": {1: 20.0, 2: 40.0, 3: 60.0}}, ""),  # a warm-up
    (soaked, {"grows": "descriptors"}, "descriptor_growth"),
    (soaked, {"grows": "tasks"}, "task_growth"),
    (soaked, {"grows": "threads"}, "thread_growth"),
    (soaked, {"minutes": 3}, "memory_growth descriptor_growth task_growth thread_growth"),
    (soaked, {"seen": Seen(wrong=Counter({"echo: a different answer": 1}))}, "wrong"),
    (soaked, {"seen": Seen(lost=Counter({"reset": 1}))}, "lost"),
    (soaked, {"errors": {"13": 1}}, "internal"),
    (soaked, {"failed": {"rotation": "no"}}, "not_done"),
    (soaked, {"interrupted": True}, "interrupted"),
    (soaked_clients, {"wrong": Counter({"echo: a different answer": 1})}, "wrong"),
    (soaked_clients, {"lost": Counter({"echo: UNAVAILABLE": 1})}, "lost"),
    (soaked_clients, {"twice": 1}, "twice"),
    (soaked_clients, {"compared": 0}, "compared"),
    (soaked_clients, {"done": soak_clients.FAULTS[1:]}, soak_clients.FAULTS[0]),
    (storm, {"served_s": (1.0, 2.0, 3.0)}, "served all_served_s"),
    (storm, {"served_s": (1.0, 2.0, 3.0, 15.0)}, "all_served_s"),
    (storm, {"answered": 3}, "verified"),
    (storm, {"served": served(equal=99)}, "honest_lost"),
    (storm, {"served": served(latency=TENTH_IS_SLOW)}, "honest_p99_ms"),
    (storm, {"served_s": (20.0,), "served": served(equal=99), "has_bars": False}, ""),
    (storm, {"wrong": 1, "has_bars": False}, "wrong"),
    (mix, {"served": served(equal=99)}, "honest_lost"),
    (mix, {"served": served(connections=15)}, "honest_open"),
    (mix, {"served": served(latency=TENTH_IS_SLOW)}, "honest_p99_ms"),
    (mix, {"served": served(latency=Latencies())}, "honest_p99_ms"),
    (mix, {"counts": Counter(replays_sent=3)}, "replays"),
    (mix, {"counts": Counter(replays_sent=2, garbage_tolerated=1)}, "tolerated"),
    (open_streams, {"items": Tally(50, 50, 49, 0, 1)}, "lost unverified fault"),
    (open_streams, {"items": Tally(50, 50, 49, 1)}, "wrong unverified fault"),
    (open_streams, {"latency_ms": 200.0}, "p99_ms"),
]


def failing(report: Report) -> set[str]:
    assert bool(report.exit_code) == bool(report.reasons() or report.interrupted)
    rows = [row for column in report.columns.values() for row in column]
    others = {"fault": bool(report.faults), "interrupted": report.interrupted}
    return {row.key for row in rows if not row.holds} | {name for name, is_so in others.items() if is_so}


@pytest.mark.parametrize(("outcome", "changes", "missed"), UNMET)
def test_each_broken_promise_misses_its_bar(
    outcome: Callable[..., Report], changes: dict[str, Any], missed: str
) -> None:
    assert failing(outcome()) == set()
    assert failing(outcome(**changes)) == {*missed.split()}


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_good_outcome_of_every_attack_passes(name: str) -> None:
    assert failing(attack(name)) == set()
