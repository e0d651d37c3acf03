"""The history of one user's sessions as clients saw it, and what it must not contain.

Decides: whether a history breaks a promise.

Rules:
- What was acknowledged is not lost: a session that nothing has ended is never refused, an answer stays the same, a
  last use is not forgotten.
- What was ended is refused: by the server that acknowledged it within HERE_S, by others within ELSEWHERE_S of the
  acknowledgement, or of the moment from which both reach the store again.
- A token whose refresh the store may have lost is accepted elsewhere within ELSEWHERE_S: its server repeats that.
- At most `per_user` sessions are live at any time, and at the end at most one token of each.
- A request with a key runs at most once.
- Until an operation that may end a session is acknowledged, both answers are right.

Times are arguments: seconds of one clock. It must not know: connections, servers, stores.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple

HERE_S: Final = 1.0
ELSEWHERE_S: Final = 5.0
NEVER: Final = float("inf")
CLOCK_MS: Final = 1_000
"""By how much a last use may be off: it is read from the server's clock before the use."""


class Verdict(Enum):
    ACCEPTED = "accepted"
    REFUSED = "refused"
    UNKNOWN = "unknown"
    """No answer, or one that leaves it open."""


@dataclass(slots=True)
class End:
    """When something that ends a token was first sent, and when and where it was acknowledged."""

    sent: float = NEVER
    acked: float = NEVER
    node: str = ""


@dataclass(slots=True, eq=False)
class Session:
    """One that was opened; `may_be_lost` if the store may have lost it although it was acknowledged."""

    name: str
    opened: float
    end: End = field(default_factory=End)
    may_be_lost: bool = False


@dataclass(slots=True, eq=False)
class Token:
    """An access token; `replaced` by a refresh.

    `repeated_by` is the server that made it, if the store may have lost it.
    """

    session: Session
    number: int
    replaced: End = field(default_factory=End)
    repeated_by: str = ""

    @property
    def name(self) -> str:
        return f"{self.session.name}, token {self.number}"

    @property
    def ends(self) -> tuple[End, End]:
        return self.session.end, self.replaced

    @property
    def doubtful_from(self) -> float:
        return min(end.sent for end in self.ends)

    @property
    def is_ended(self) -> bool:
        return any(end.acked < NEVER for end in self.ends)


class Probe(NamedTuple):
    """One try of a token. Those of one `census` are made when everything is settled."""

    token: Token
    node: str
    sent: float
    done: float
    verdict: Verdict
    census: str = ""
    answer: str = ""
    """The code of the refusal."""


class CutOff(NamedTuple):
    """A time in which a node does not reach the store."""

    node: str
    since: float
    until: float


class History:
    """What happened to the sessions of one user."""

    def __init__(self, per_user: int) -> None:
        self._per_user = per_user
        self.sessions: list[Session] = []
        self.tokens: list[Token] = []
        self.probes: list[Probe] = []
        self.cut_offs: list[CutOff] = []
        self._openings: list[tuple[float, float, Session]] = []
        self._answers: dict[str, list[Any]] = defaultdict(list)
        self._may_repeat: set[str] = set()
        self._runs: Counter[str] = Counter()
        self._uses: list[tuple[Session, int]] = []
        self._seen_uses: list[tuple[Session, str, int]] = []
        self.faults: list[str] = []
        """Answers that no rule of this history explains."""

    # --- what happens --------------------------------------------------------------------------------

    def opened(self, sent: float, done: float, *, may_be_lost: bool = False) -> Token:
        session = Session(f"session {len(self.sessions)}", done, may_be_lost=may_be_lost)
        self.sessions.append(session)
        self._openings.append((sent, done, session))
        return self._issue(session)

    def refreshed(self, old: Token, node: str, done: float, *, may_be_lost: bool = False) -> Token:
        """Record an acknowledged refresh, of which `begin` was called before."""
        acknowledge(old.replaced, node, done)
        token = self._issue(old.session)
        token.repeated_by = node if may_be_lost else ""
        return token

    def _issue(self, session: Session) -> Token:
        token = Token(session, sum(token.session is session for token in self.tokens))
        self.tokens.append(token)
        return token

    def answered(self, key: str, answer: Any, *, may_repeat: bool = False) -> None:
        """Record an answer to a request with a key. With `may_repeat` the store may have lost it."""
        self._answers[key].append(answer)
        if may_repeat:
            self._may_repeat.add(key)

    def ran(self, keys: Counter[str]) -> None:
        """Record how often requests ran, by key."""
        self._runs = keys

    def used(self, session: Session, wall: int) -> None:
        """Record a use that is acknowledged as stored."""
        self._uses.append((session, wall))

    def shown_use(self, session: Session, node: str, wall: int) -> None:
        """Record the last use that a node shows."""
        self._seen_uses.append((session, node, wall))

    # --- what must not have happened -----------------------------------------------------------------

    def violations(self) -> list[str]:
        found = [*self.faults, *self._broken_limit(), *self._broken_runs(), *self._forgotten_uses()]
        for probe in self.probes:
            found += self._broken_by(probe)
        found += self._broken_census()
        return [*dict.fromkeys(found)]

    def _broken_by(self, probe: Probe) -> Iterator[str]:
        token, node = probe.token, probe.node
        if probe.verdict is Verdict.UNKNOWN:
            if probe.census:
                yield f"{token.name} gets no answer {node}, {probe.census}"
        elif probe.verdict is Verdict.REFUSED:
            is_excused = token.session.may_be_lost or self._may_be_unknown(probe)
            if probe.done < token.doubtful_from and not is_excused:
                yield f"{token.name} was refused {node} although nothing has ended it: {probe.answer}"
        else:
            late = [probe.sent - self._bound(end, node) for end in token.ends if end.acked < NEVER]
            if late and max(late) > 0:
                yield f"{token.name} was accepted {node} {max(late):.1f} s after the latest time for it"

    def _may_be_unknown(self, probe: Probe) -> bool:
        """Return whether the refresh that made the token may not have been repeated yet."""
        if probe.token.repeated_by in ("", probe.node) or probe.census:
            return False
        return any(
            cut_off.since <= probe.done and probe.sent <= cut_off.until + ELSEWHERE_S
            for cut_off in self.cut_offs
        )

    def _bound(self, end: End, node: str) -> float:
        """Return until when a node may accept a token after this end of it."""
        if node == end.node:
            return end.acked + HERE_S
        since = end.acked
        for cut_off in sorted(self.cut_offs):
            if cut_off.node == end.node and cut_off.since <= end.acked:
                since = max(since, cut_off.until)  # only then the store has it
        for cut_off in sorted(self.cut_offs):
            if cut_off.node == node and cut_off.since <= since + ELSEWHERE_S:
                since = max(since, cut_off.until)
        return since + ELSEWHERE_S

    def _broken_limit(self) -> Iterator[str]:
        found = {
            probe.token.session for probe in self.probes if probe.census and probe.verdict is Verdict.ACCEPTED
        }
        for sent, done, opened in self._openings:
            live = [
                other
                for other in self.sessions
                if other is not opened and other.opened <= sent and other.end.sent > done
                if other in found or not other.may_be_lost
            ]
            if len(live) >= self._per_user:
                yield f"{opened.name} was opened beside {len(live)} live ones"

    def _broken_census(self) -> Iterator[str]:
        accepted: dict[tuple[str, str], dict[Token, None]] = defaultdict(dict)
        for probe in self.probes:
            if probe.census and probe.verdict is Verdict.ACCEPTED:
                accepted[probe.census, probe.node][probe.token] = None
        for (census, node), tokens in accepted.items():
            families = Counter(token.session.name for token in tokens)
            if len(families) > self._per_user:
                yield f"{len(families)} sessions are accepted {node}, {census}"
            for name, count in families.items():
                if count > 1:
                    yield f"{count} tokens of {name} are accepted {node}, {census}"

    def _broken_runs(self) -> Iterator[str]:
        for key, answers in self._answers.items():
            if key in self._may_repeat:
                continue
            if any(answer != answers[0] for answer in answers):
                yield f"the request {key} got different answers"
            if not self._runs[key]:
                yield f"the request {key} was answered and did not run"
        for key, count in self._runs.items():
            if count > 1 and key not in self._may_repeat:
                yield f"the request {key} ran {count} times"

    def _forgotten_uses(self) -> Iterator[str]:
        for session, wall in self._uses:
            for shown, node, seen in self._seen_uses:
                if shown is session and seen < wall - CLOCK_MS and not session.may_be_lost:
                    yield f"{session.name} was last used {wall - seen} ms before it was, {node}"


def begin(end: End, sent: float) -> None:
    """Record that something was sent that may end a token."""
    end.sent = min(end.sent, sent)


def acknowledge(end: End, node: str, done: float) -> None:
    if done < end.acked:
        end.acked, end.node = done, node
