"""`zcproto serve --dev`: what a developer wants to see of the server, instead of a log for operators.

    gw:app listens on localhost:7443: ask, history, models     one line for a start
    10:03:12 ada  ask  1.4 ms                                  one for each request
    10:03:15 -  modles  UNIMPLEMENTED: ...; did you mean 'models'?

Rules: results and items are checked against the annotations, so that a method that returns something else fails
here and not in a client. Nothing of this runs without --dev.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import click

from zcproto.app.app import RESERVED_PREFIXES, App, default_app
from zcproto.app.context import Context
from zcproto.cli.connect import CALL_CLIENT
from zcproto.common.clock import MS_PER_SECOND, system_clock
from zcproto.common.middleware import CallNext
from zcproto.common.text import escape_text
from zcproto.errors import CallError, Code
from zcproto.wire.message import decode_error, encode_error

if TYPE_CHECKING:
    from zcproto.runtime.server import Server
    from zcproto.server.idempotency import Answer
    from zcproto.sessions import Session

MAX_TEXT = 500


class Development:
    """Serves an application for its developer."""

    def __init__(self, app: App | None, name: str | None) -> None:
        self._name = name or "echo, sleep and time"
        inner = default_app() if app is None else app
        self.app = App(authenticators=inner.authenticators)
        self.app.middleware(self._report)
        self.app.include(inner)
        self._methods = {method.name: method for method in self.app}
        for method in self._methods.values():
            method.check_items()

    def ready(self, server: Server) -> None:
        """Let the server report the requests that it refuses."""
        server.state.on_refused = self._refused
        self._record = server.state.registry.record

    def print_banner(self, addresses: Sequence[tuple[str, int]]) -> None:
        ports = sorted({port for _, port in addresses})
        where = ", ".join(f"localhost:{port}" for port in ports)
        names = escape_text(", ".join(self._methods), MAX_TEXT)
        click.echo(f"zcproto: {escape_text(self._name)} listens on {where}: {names}")

    async def _report(self, context: Context, call_next: CallNext[Context]) -> Any:
        began, outcome = system_clock.now(), "cancelled"
        try:
            result = await call_next(context)
            self._methods[context.method].check_result(result)
        except CallError as error:
            outcome = str(error)
            raise
        except Exception as error:  # its traceback is in the log
            outcome = f"INTERNAL: {error or type(error).__name__}"
            raise
        else:
            outcome = ""
            return result
        finally:
            spent = f"{MS_PER_SECOND * (system_clock.now() - began):.1f} ms"
            _print(context.session, context.method, f"{spent}  {outcome}".rstrip())

    def _is_of_command(self, session: Session | None) -> bool:
        record = None if session is None else self._record(session.raw_id)
        return record is not None and record.client == CALL_CLIENT

    def _refused(self, name: str, session: Session | None, answer: Answer) -> Answer:
        """Report a request that may not run. Return its answer, with the method that was meant."""
        code, message, details = decode_error(answer.body)
        if "shape" in details and self._is_of_command(session):
            return answer  # it is sent again as a stream
        if name not in self._methods and not name.startswith(RESERVED_PREFIXES):
            near = get_close_matches(name, self._methods, 1)
            message = f"no method {name!r}; " + (
                f"did you mean {near[0]!r}?" if near else "see the first line"
            )
            answer = answer._replace(body=encode_error(Code(code), message, details))
        _print(session, name, f"{Code(code).name}: {message}")
        return answer


def _print(session: Session | None, method: str, outcome: str) -> None:
    now = datetime.fromtimestamp(system_clock.wall() // MS_PER_SECOND)
    user = "-" if session is None else session.user
    line = escape_text(f"{user}  {method}  {outcome}", MAX_TEXT)
    click.echo(f"{now:%H:%M:%S} {line}", err=True)
