"""Run the alerts of a server, from its parts to the log and the sinks.

    raise_ / resolve, and counters read once a second -> AlertCenter -> log, and a SinkQueue for each sink

Rules:
- Raising an alert never waits and never raises.
- Counters of frequent events are evaluated once a second.
- A failing sink is an alert itself, sent by the other sinks and, on recovery, by that sink too.

It must not know: the causes of alerts (runtime/alert_sources.py).
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from zcproto.alerts import CATALOGUE, Alert, AlertCenter, AlertKind, Message, Phase, Severity
from zcproto.alerts.center import RateRule, RateWatch
from zcproto.alerts.sinks import Command, Sink, SinkQueue, Undelivered, Webhook
from zcproto.common.clock import MS_PER_SECOND, Clock, Entropy, random_fraction
from zcproto.common.deadlines import sleep_together
from zcproto.common.files import read_secret
from zcproto.common.secret import Secret
from zcproto.common.text import escape_text
from zcproto.config.model import AlertsConfig
from zcproto.errors import ConfigError
from zcproto.observe.log import get_logger

SINKS: Final = (Webhook.name, Command.name)
"""Names of all possible sinks."""

TICK_S: Final = 1.0
STOP_S: Final = 3.0
"""Seconds to deliver queued messages at shutdown, less than service managers wait."""

LEAST_SECRET: Final = 16
"""Minimum characters of a webhook's secret: a shorter one could be guessed from one message."""

TEST_TITLE: Final = "test alert of zcproto: alerts are delivered here"
NO_DETAILS: Final[Mapping[str, object]] = {}
_ORIGIN_SIZE: Final = 8

WINDOW_S: Final = 300.0
"""The window in which events are counted that raise an alert only in large numbers."""

QUIET_S: Final = 900.0
"""How long it must be quiet before such an alert ends, and how long the same event is not reported again."""

WEBHOOK_S: Final = 10.0
"""Time for one attempt, from the name lookup to the end of the answer."""

COMMAND_S: Final = 10.0
"""Time for one run of the program."""

log = get_logger("zcproto.alerts")


class _WatchedCounter(NamedTuple):
    """A counter that raises an alert if it grows too fast. `title` gets the number of events in the window."""

    read: Callable[[], int]
    watch: RateWatch
    title: Callable[[int], str]


class ServerAlerts:
    """All alerts of one server. `source` names the server to receivers."""

    def __init__(
        self, config: AlertsConfig, sinks: Sequence[Sink], *, clock: Clock, entropy: Entropy, source: str = ""
    ) -> None:
        self.config = config
        self.source = source
        self.center = AlertCenter(repeat_s=config.repeat, quiet_s=QUIET_S)
        self._clock = clock
        self.origin = entropy(_ORIGIN_SIZE).hex()
        """Random id of this process in the ids of messages."""
        self._watched: dict[tuple[AlertKind, str], _WatchedCounter] = {}
        self.reported: Counter[tuple[AlertKind, str]] = Counter()
        """What other processes have counted, by kind and subject; added to the counters."""
        self._entropy = entropy
        self._running = False
        self._ending: set[asyncio.Task[None]] = set()
        self.queues = [self._queue_for(sink) for sink in sinks]

    def _queue_for(self, sink: Sink) -> SinkQueue:
        random = partial(random_fraction, self._entropy)
        return SinkQueue(sink, clock=self._clock, random=random, on_down=self._sink_down, on_up=self._sink_up)

    def reconfigure(self, config: AlertsConfig, sinks: Sequence[Sink]) -> None:
        """Apply another configuration. Call `watch` again for each counter afterwards.

        Queued messages go to the sink that replaces theirs; those of a removed sink are delivered within
        `STOP_S` or dropped.
        """
        self.config = config
        self.center.repeat_s = config.repeat
        self._replace_sinks(sinks)

    def _replace_sinks(self, sinks: Sequence[Sink]) -> None:
        queues = {queue.name: queue for queue in self.queues}
        self.queues = []
        for sink in sinks:
            queue = queues.pop(sink.name, None)
            if queue is None:
                queue = self._queue_for(sink)
                if self._running:
                    queue.start()
            queue.sink = sink
            self.queues.append(queue)
        for queue in queues.values():
            self.resolve(AlertKind.UNDELIVERED, f"the {queue.name} is no longer configured", about=queue.name)
            ending = asyncio.get_running_loop().create_task(queue.stop(STOP_S))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    # --- input ---------------------------------------------------------------------------------------

    def raise_(
        self,
        kind: AlertKind,
        title: str,
        *,
        about: str = "",
        severity: Severity | None = None,
        changed: bool = False,
        count: int = 1,
        details: Mapping[str, object] = NO_DETAILS,
    ) -> None:
        """Raise an alert now, see `AlertCenter.raise_`."""
        self.center.raise_(
            kind,
            title,
            about=about,
            details=details,
            severity=severity,
            changed=changed,
            count=count,
            wall=self._clock.wall(),
            now=self._clock.now(),
        )
        self._send()

    def resolve(
        self, kind: AlertKind, title: str = "", *, about: str = "", details: Mapping[str, object] = NO_DETAILS
    ) -> None:
        """Resolve an alert now, see `AlertCenter.resolve`."""
        self.center.resolve(
            kind, about=about, title=title, details=details, wall=self._clock.wall(), now=self._clock.now()
        )
        self._send()

    def watch(
        self,
        kind: AlertKind,
        read: Callable[[], int],
        threshold: int,
        title: Callable[[int], str],
        about: str = "",
    ) -> None:
        """Raise an alert while a counter grows by at least `threshold` within the window; 0 for never.

        Called again for a counter, it starts over if the threshold or the window has changed.
        """
        rule = RateRule(threshold, WINDOW_S, QUIET_S)
        old = self._watched.pop((kind, about), None)
        if old is not None and old.watch.rule == rule:
            self._watched[kind, about] = _WatchedCounter(read, old.watch, title)
            return
        if old is not None and old.watch.is_on:
            self.resolve(kind, about=about)
        if threshold:
            # Earlier events are of another window.
            watch = RateWatch(rule, 0 if old is None else read() + self.reported[kind, about])
            self._watched[kind, about] = _WatchedCounter(read, watch, title)

    # --- lifecycle -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start delivery, including alerts raised before."""
        self._running = True
        for queue in self.queues:
            queue.start()

    async def run(self) -> None:
        """Evaluate counters once a second until cancelled."""
        while True:
            await sleep_together(TICK_S)
            try:
                self.tick()
            except Exception as error:  # an internal error must not stop alerts
                log.error("alert.tick_failed", exc_info=error)

    def tick(self) -> None:
        """Evaluate the counters and due timers."""
        now = self._clock.now()
        for (kind, about), each in self._watched.items():
            watch = each.watch
            if not watch.read(each.read() + self.reported[kind, about], now):
                continue
            if watch.is_on:
                details = {
                    "in_window": watch.in_window,
                    "window_s": watch.rule.window_s,
                    "threshold": watch.rule.threshold,
                }
                title, count = each.title(watch.in_window), max(1, watch.events)
                self.raise_(kind, title, about=about, count=count, details=details)
            else:
                self.resolve(kind, about=about)
        self.center.handle_time(self._clock.wall(), now)
        self._send()

    async def stop(self, within: float = STOP_S) -> None:
        """Deliver queued messages within so many seconds."""
        await asyncio.gather(*(queue.stop(within) for queue in self.queues), *self._ending)

    # --- output --------------------------------------------------------------------------------------

    def _send(self) -> None:
        for message in self.center.take_messages():
            _log(message)
            alert = message.alert
            body = message.as_json(self.origin, self.source)
            for queue in self.queues:
                is_about_sink = alert.kind is AlertKind.UNDELIVERED and alert.about == queue.name
                if not is_about_sink or message.phase is Phase.ENDED:
                    queue.put(body, f"{alert.kind.value} {message.phase.value}")

    def _sink_down(self, name: str, reason: str) -> None:
        title = f"alerts do not reach the {name}: {reason}"
        self.raise_(AlertKind.UNDELIVERED, title, about=name, details={"reason": reason})

    def _sink_up(self, name: str) -> None:
        self.resolve(AlertKind.UNDELIVERED, f"alerts reach the {name} again", about=name)

    # --- reports -------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Return the open alerts, those ended within the last day, and the state of delivery, as JSON fields."""
        return {
            "open": [alert.as_dict() for alert in self.center.open_alerts()],
            "over": [alert.as_dict() for alert in self.center.history()],
            "sinks": [
                {
                    "name": queue.name,
                    "down": queue.is_down,
                    "waiting": len(queue),
                    "delivered": queue.delivered,
                    "failures": queue.failures,
                    "lost": queue.lost,
                }
                for queue in self.queues
            ],
        }


def sinks_of(config: AlertsConfig, clock: Clock) -> list[Sink]:
    """Return the configured sinks. Raises ConfigError with all faults that a retry cannot fix."""
    sinks: list[Sink] = []
    faults: list[str] = []
    wanted: tuple[tuple[object, Callable[[AlertsConfig, Clock], Sink]], ...] = (
        (config.webhook, webhook_of),
        (config.command, _command),
    )
    for is_wanted, build in wanted:
        if is_wanted:
            try:
                sinks.append(build(config, clock))
            except ConfigError as error:
                faults += error.faults
    if faults:
        raise ConfigError(faults)
    return sinks


def webhook_of(config: AlertsConfig, clock: Clock) -> Webhook:
    """Return the webhook. Raises ConfigError."""
    secret = None
    if config.webhook_secret_file is not None:
        key = "alerts.webhook_secret_file"
        secret = Secret(read_secret(config.webhook_secret_file, key, least=LEAST_SECRET))
    return Webhook(config.webhook, secret, ca_file=config.webhook_ca_file, timeout=WEBHOOK_S, clock=clock)


def _command(config: AlertsConfig, clock: Clock) -> Sink:
    return Command(config.command, timeout=COMMAND_S, environ=os.environ)


async def try_sinks(
    sinks: Iterable[Sink], clock: Clock, entropy: Entropy, source: str
) -> list[dict[str, Any]]:
    """Deliver a test alert to each sink in turn, for `zcproto alert test`. Return the results as JSON fields.

    Its id is that of no other message, so that receivers which skip repeated ids take it.
    """
    kind, wall = AlertKind.TEST, clock.wall()
    alert = Alert(kind, "", CATALOGUE[kind].severity, TEST_TITLE, {}, wall, wall, None, 1)
    body = Message(1, Phase.BEGAN, alert).as_json(entropy(_ORIGIN_SIZE).hex(), source)
    results = []
    for sink in sinks:
        began = clock.now()
        try:
            answer, arrived = await sink.deliver(body), True
        except Undelivered as error:
            answer, arrived = str(error), False
        results.append(
            {
                "sink": sink.name,
                "where": sink.where,
                "arrived": arrived,
                "ms": round((clock.now() - began) * MS_PER_SECOND),
                "said": escape_text(answer),
            }
        )
    return results


def _log(message: Message) -> None:
    described = message.alert.as_dict()
    fields = {name: described[name] for name in ("kind", "about", "severity", "title", "details", "count")}
    severity = Severity.INFO if message.phase is Phase.ENDED else message.alert.severity
    level = min(severity, Severity.ERROR).word  # the log has no higher one
    getattr(log, level)(f"alert.{message.phase.value}", **fields)
