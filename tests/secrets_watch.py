"""Check that no secret created by a test appears in its logs, errors, answers or pages.

Secrets are: random values of 16 bytes and more, tokens, users' keys, pairing codes, private keys, and the value
of every Secret. Outputs are: log lines, Python's logging, standard error of this and of other processes, messages
of our exceptions, bodies of ERROR, EVENT and GOAWAY, the figures of `server.stats`, and everything that an HTTP
server sends. Standard output is not searched: `zcproto user add` prints a key there.

A secret is found raw, in hex, base64, base64url, escaped or as a list of numbers, by any eight bytes of it,
anywhere in encoded data. `--secrets-at-least N` fails a run that created fewer secrets: it would prove little.
"""

from __future__ import annotations

import binascii
import functools
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import currently_in_test_context

import zcproto.common.clock

WINDOW = 8
SECRETS_PER_TEST = 2_000
"""Secrets watched for one test; some tests create a hundred thousand."""

ONE_OUTPUT = 1_000_000
"""Bytes searched in one output."""

_HEX = re.compile(rb"[0-9A-Fa-f]{16,}")
_PAIRS = re.compile(rb"(?:[0-9A-Fa-f]{2}[: -]){7,}[0-9A-Fa-f]{2}")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{12,}")
_NUMBERS = re.compile(rb"(?:\d{1,3}, ?){7,}\d{1,3}")
_ESCAPED = re.compile(rb"\\+(?:x|u00)([0-9A-Fa-f]{2})|\\+([\\'\"abfnrtv])")
_LETTERS = dict(zip(b"abfnrtv", b"\a\b\f\n\r\t\v", strict=True))
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


class SecretWatch:
    """Created secrets, and outputs to search for them. Thread-safe."""

    def __init__(self) -> None:
        self._windows: dict[bytes, bytes] = {}  # with the text that must follow
        self._outputs: list[tuple[str, bytes]] = []
        self._lock = threading.Lock()
        self._known: set[bytes] = set()
        self._left = SECRETS_PER_TEST
        self.created = 0
        self.searched = 0
        self.seconds = 0.0
        self.found: list[str] = []

    def begin_test(self) -> None:
        self._left = SECRETS_PER_TEST

    def add_secret(self, value: bytes | str | None) -> None:
        """Record a secret: random bytes, or a text."""
        if value is None:
            return
        if isinstance(value, str) and currently_in_test_context():
            return  # Hypothesis draws words from sources and other tests: not secret there
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else bytes(value)
        if self._left <= 0 or len(data) < WINDOW or data in self._known:
            return
        starts = range(0, len(data) - WINDOW + 1, WINDOW) if isinstance(value, bytes) else [0]
        with self._lock:
            recorded = False
            for start in starts:
                window = data[start : start + WINDOW]
                if is_handwritten(window, value):
                    continue
                recorded = True
                self._windows[window] = b"" if isinstance(value, bytes) else data[WINDOW:]
            if recorded:
                self._known.add(data)
                self._left -= 1
                self.created += 1

    def add_output(self, where: str, output: Any) -> None:
        """Record an output, which is searched at the end of the test."""
        if not isinstance(output, bytes):
            output = (output if isinstance(output, str) else repr(output)).encode("utf-8", "surrogatepass")
        if output:
            self._outputs.append((where, output[:ONE_OUTPUT]))

    def search(self) -> list[str]:
        """Return where the outputs since the last call contain secrets."""
        began = time.thread_time()
        outputs, self._outputs = self._outputs, []
        joined: dict[str, list[bytes]] = {}
        for where, output in dict.fromkeys(outputs):
            joined.setdefault(where, []).append(output)
        found = []
        for where, parts in joined.items():
            data = b"\n".join(parts)
            self.searched += len(data)
            found += [f"{where}: {context}" for context in self._search(data)]
        self.found += found
        self.seconds += time.thread_time() - began
        return found

    def _search(self, data: bytes) -> Iterator[str]:
        for form, text in forms(data):
            windows = self._windows
            for at in range(len(text) - WINDOW + 1):
                rest = windows.get(text[at : at + WINDOW])
                if rest is not None and text.startswith(rest, at + WINDOW):
                    shown = text[max(0, at - 60) : at].decode("utf-8", "backslashreplace")
                    yield f"{form}, after {shown!r}"
                    break


def is_handwritten(window: bytes, secret: bytes | str) -> bool:
    """Return whether a value looks like one written in a test, such as `bytes(range(32))`, or a common word."""
    if len(set(window)) < WINDOW - 3 or len({second - first for first, second in pairwise(window)}) == 1:
        return True
    if isinstance(secret, bytes):
        return all(0x20 <= byte < 0x7F for byte in window)  # one in 2,500 random values
    return not any(character.isdigit() or character.isupper() for character in secret)


def forms(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield an output as it is, and everything that is encoded in it."""
    yield "as it is", data
    if b"\\" in data:
        plain = _ESCAPED.sub(_unescaped, data)
        yield "escaped", plain
        if not plain.isascii():
            yield "escaped text", plain.decode("utf-8", "replace").encode("latin-1", "replace")
    if not data.isascii():
        yield "text", data.decode("utf-8", "replace").encode("latin-1", "replace")
    for run in set(_HEX.findall(data)):
        for start in (0, 1):
            yield "hex", bytes.fromhex(run[start : start + (len(run) - start) // 2 * 2].decode())
    for run in set(_PAIRS.findall(data)):
        yield "hex in pairs", bytes.fromhex(re.sub(rb"[: -]", b"", run).decode())
    for run in set(_BASE64.findall(data)):
        standard = run.translate(_URL_SAFE)
        for start in range(4):
            whole = standard[start : start + (len(run) - start) // 4 * 4]
            rest = standard[start + len(whole) : start + len(run)]
            if len(rest) > 1:
                whole += rest + b"=" * (4 - len(rest))
            yield "base64", binascii.a2b_base64(whole)
    for run in set(_NUMBERS.findall(data)):
        numbers = [int(number) for number in run.split(b",")]
        if max(numbers) < 256:
            yield "numbers", bytes(numbers)


def _unescaped(found: re.Match[bytes]) -> bytes:
    if found[1]:
        return bytes.fromhex(found[1].decode())
    return bytes([_LETTERS.get(found[2][0], found[2][0])])


watch = SecretWatch()
"""The watch that all hooks below report to."""


# --- hooks of secrets and outputs ----------------------------------------------------------------------------


def _entropy(size: int, /) -> bytes:
    data = _system_entropy(size)
    if size >= 16:  # shorter values are salts or jitter
        watch.add_secret(data)
    return data


_system_entropy = zcproto.common.clock.system_entropy
zcproto.common.clock.system_entropy = _entropy  # before a module uses it as a default


def _after(report: Callable[..., None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function: call `report` with its result and its arguments."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            report(result, *arguments)
            return result

        return wrapper

    return wrap


def _tokens(_: Any, holder: Any, *__: Any) -> None:
    watch.add_secret(holder.token)
    watch.add_secret(holder.refresh_token)


def _new_tokens(made: Any, *_: Any) -> None:
    _, token, refresh_token = made
    watch.add_secret(token)
    watch.add_secret(refresh_token)


def _client_tokens(_: Any, holder: Any, *__: Any) -> None:
    watch.add_secret(holder.token_bytes)
    watch.add_secret(holder.refresh_token_bytes)


def _answer(answer: Any, *_: Any) -> None:
    if isinstance(answer, dict):
        for name in ("token", "refresh_token"):
            if isinstance(answer.get(name), bytes):
                watch.add_secret(answer[name])


def _frame(frame: Any, *_: Any) -> None:
    if frame.kind in (4, 8, 9):
        watch.add_output("a frame to a peer", frame.body)


def _code(code: Any, *_: Any) -> None:
    text = code.reveal() if hasattr(code, "reveal") else code
    watch.add_secret(text)
    watch.add_secret(text.replace("-", ""))


def _private_key(key: Any, *_: Any) -> None:
    if hasattr(key, "private_bytes_raw"):
        watch.add_secret(key.private_bytes_raw())
        return
    numbers = key.private_numbers()
    secrets = (
        [numbers.private_value] if hasattr(numbers, "private_value") else [numbers.d, numbers.p, numbers.q]
    )
    for number in secrets:
        watch.add_secret(number.to_bytes((number.bit_length() + 7) // 8, "big"))


def _secret(_: Any, holder: Any, *__: Any) -> None:
    value = holder.reveal()
    watch.add_secret(value if isinstance(value, str | bytes) else None)


def _exception(_: Any, __: Any, *arguments: Any) -> None:
    watch.add_output("an exception", "\n".join(str(each)[:4_096] for each in arguments))


def _sent_by_http(data: Any, connection: Any, *_: Any) -> None:
    import h11

    if connection.our_role is h11.SERVER and data:
        watch.add_output("an answer over HTTP", bytes(data))


def _process_log(_: Any, process: Any, *__: Any) -> None:
    watch.add_output("the log of a process", process.log)


def _standard_error(outcome: Any, *_: Any) -> None:
    if outcome[1]:
        watch.add_output("standard error of a process", outcome[1])


def _captured(captured: Any, *_: Any) -> None:
    watch.add_output("standard error", captured.err)


def _page(rendered: Any, *_: Any) -> None:
    watch.add_output("metrics", rendered[1])


_last_statistics: dict[int, Any] = {}


def _statistics(figures: Any, server: Any, *_: Any) -> None:
    _last_statistics[id(server)] = figures  # requested often, searched once


PLACES: list[tuple[str, str, Callable[..., None]]] = [
    ("zcproto.sessions.session", "OpenedSession.__init__", _tokens),
    ("zcproto.sessions.registry", "SessionRegistry.new_session", _new_tokens),
    ("zcproto.client.session", "ClientSession.__init__", _client_tokens),
    ("zcproto.auth.pairing", "PairingFile.make", _code),
    ("zcproto.common.secret", "Secret.__init__", _secret),
    ("cryptography.hazmat.primitives.asymmetric.rsa", "generate_private_key", _private_key),
    ("cryptography.hazmat.primitives.asymmetric.ec", "generate_private_key", _private_key),
    ("tests.server.helpers", "Client.call", _answer),
    ("tests.server.helpers", "Client.receive", _frame),
    ("tests.server.process", "ServerProcess.wait", _process_log),
    ("zcproto.errors", "ZcprotoError.__init__", _exception),
    ("zcproto.runtime.server", "Server.statistics", _statistics),
    ("zcproto.observe.metrics", "Metrics.render", _page),
    ("h11", "Connection.send", _sent_by_http),
    ("subprocess", "Popen.communicate", _standard_error),
    ("_pytest.capture", "CaptureFixture.readouterr", _captured),
]
"""Module, name in it, and the report of each call."""

_waiting = list(PLACES)


def hook_places() -> None:
    """Hook the modules that have been imported since the last call."""
    for place in list(_waiting):
        module_name, name, report = place
        owner: Any = sys.modules.get(module_name)
        if owner is None:
            continue
        _waiting.remove(place)
        *owners, last = name.split(".")
        for each in owners:
            owner = getattr(owner, each)
        setattr(owner, last, _after(report)(getattr(owner, last)))


def _hook_log() -> None:
    from zcproto.observe import log

    def line_written(_: Any, state: Any, line: str) -> None:
        watch.add_output("the log", line)

    log._LogState.write = _after(line_written)(log._LogState.write)  # type: ignore[method-assign]


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        watch.add_output("logging", self.format(record))


# --- pytest -----------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--secrets-at-least", type=int, default=0, help="secrets that the run must create")


def pytest_configure() -> None:
    _hook_log()
    logging.getLogger().addHandler(_Handler())


def pytest_runtest_setup() -> None:
    hook_places()
    watch.begin_test()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    yield
    for figures in _last_statistics.values():
        watch.add_output("statistics", figures)
    _last_statistics.clear()
    found = watch.search()
    if found:
        pytest.fail("a secret is in " + "\n".join(found[:20]), pytrace=False)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, text in report.sections:
        if "stderr" in name or "log" in name:
            watch.add_output(name, text)


def pytest_sessionfinish(session: pytest.Session) -> None:
    watch.search()
    wanted = session.config.getoption("--secrets-at-least")
    if watch.found or watch.created < wanted:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    wanted = config.getoption("--secrets-at-least")
    if wanted or watch.found:
        terminalreporter.write_line(
            f"secrets: {watch.created:,} created (at least {wanted:,} expected), {len(watch.found)} found"
            f" in {watch.searched / 1e6:.1f} MB of logs, errors, pages and figures, by {watch.seconds:.1f} s of CPU"
        )
        for each in watch.found[:20]:
            terminalreporter.write_line(f"a secret is in {each}")
