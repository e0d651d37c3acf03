from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zcproto.common.clock import system_clock
from zcproto.common.secret import Secret
from zcproto.config.model import LogConfig
from zcproto.errors import ConfigError
from zcproto.observe.log import MAX_LINE, configure_logging, get_logger, lost_lines

log = get_logger("zcproto.test")


class Clock:
    """A fixed clock: 1 March, 02:15:00.007."""

    def wall(self) -> int:
        return 1_772_374_500_007

    def now(self) -> float:
        return 0.0


def configure(**settings: Any) -> None:
    configure_logging(LogConfig(**settings), clock=Clock())


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("time", ["first", "second"])
def test_each_test_starts_with_default_logging(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], time: str
) -> None:
    log.info("session.opened")
    assert capsys.readouterr().err == ""
    configure(level="debug", file=tmp_path / "log")
    log.debug("session.opened")
    assert (tmp_path / "log").read_text().count("\n") == 1


@pytest.mark.requirement("logs")
def test_event_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="json")
    log.info("session.opened", user="alice", count=2)
    assert capsys.readouterr().err == (
        '{"timestamp":"2026-03-01T14:15:00.007Z","level":"info","event":"session.opened",'
        '"logger":"zcproto.test","user":"alice","count":2}\n'
    )


def test_event_is_one_line_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="console")
    log.warning("session.opened", user="alice", agent='a "b" c', count=2, ok=True, names=["x"])
    assert capsys.readouterr().err == (
        "2026-03-01T14:15:00.007Z warning session.opened logger=zcproto.test user=alice"
        ' agent="a \\"b\\" c" count=2 ok=true names=["x"]\n'
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_format_follows_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(format="auto")
    for stream, first in ((Terminal(), "2"), (io.StringIO(), "{")):
        monkeypatch.setattr(sys, "stderr", stream)
        log.info("a.b")
        assert stream.getvalue()[0] == first


def test_file_gets_json_even_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    configure(file=tmp_path / "log")
    log.info("a.b")
    assert records((tmp_path / "log").read_text())[0]["event"] == "a.b"


@pytest.mark.parametrize(
    ("level", "written"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_events_below_level_are_not_written(
    level: str, written: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    configure(level=level, format="json")
    for method in (log.debug, log.info, log.warning, log.error):
        method("a.b")
    assert [record["level"] for record in records(capsys.readouterr().err)] == written


def test_values_below_level_are_never_evaluated() -> None:
    class Untouchable(list[int]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError

    configure(level="error")
    log.info("a.b", value=Untouchable())
    assert lost_lines() == 0


def test_unconfigured_log_writes_warnings_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("a.b")
    log.warning("a.c")
    assert [record["event"] for record in records(capsys.readouterr().err)] == ["a.c"]


def test_system_clock_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    before = system_clock.wall()
    log.warning("a.b")
    (record,) = records(capsys.readouterr().err)
    assert record["timestamp"].startswith("20")
    assert before > 0


def test_bound_values_are_logged_with_each_event(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="json")
    bound = log.bind(connection="c1")
    bound.info("a.b")
    bound.info("a.c", connection="c2")
    log.info("a.d")
    assert [record.get("connection") for record in records(capsys.readouterr().err)] == ["c1", "c2", None]


HOSTILE = "a\r\nb\x1b[2J\x00\x7f\x85\x9b\u2028\u2029\u202e\ud800\"'\\ =x"


@pytest.mark.parametrize("format_", ["json", "console"])
def test_values_cannot_start_a_line_or_move_the_cursor(
    format_: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(format=format_)
    log.info("a.b", name=HOSTILE, names=[HOSTILE], map={HOSTILE: HOSTILE})
    log.bind(bound=HOSTILE).info("a.c")
    text = capsys.readouterr().err
    assert text.count("\n") == 2
    assert all(line.isprintable() for line in text.split("\n"))


def test_json_value_round_trips(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="json")
    log.info("a.b", name="a\r\n\x1b\x7f\u2028ü")
    assert records(capsys.readouterr().err)[0]["name"] == "a\r\n\x1b\x7f\u2028ü"


def test_text_cannot_inject_a_second_value(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="console")
    log.info("a.b", user='x" operator=true')
    assert capsys.readouterr().err.endswith(' user="x\\" operator=true"\n')


@pytest.mark.requirement("logs")
@pytest.mark.parametrize("format_", ["json", "console"])
def test_secrets_are_not_written(format_: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure(format=format_, level="debug", exceptions="frames")
    for method in (log.debug, log.info, log.warning, log.error):
        method(
            "a.b",
            a=Secret("hunter2"),
            b=b"hunter2",
            token="hunter2",
            c={"api_key": "hunter2", "d": [Secret("hunter2")]},
            error=ValueError("hunter2"),
        )
    assert "hunter2" not in capsys.readouterr().err


def test_invalid_event_name_is_written_as_value(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="json")
    for event in ("user alice\nlogged in", "Word", "a.", ""):
        log.info(event)
    log.info("x" * 1000)
    lines = records(capsys.readouterr().err)
    assert {record["event"] for record in lines} == {"log.misnamed"}
    assert lines[0]["text"] == "user alice\nlogged in"
    assert len(lines[-1]["text"]) == 256


def test_flood_of_invalid_event_names_is_limited(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="json")
    for number in range(200):
        log.info(f"user {number} logged in")
    assert len(records(capsys.readouterr().err)) == 60


@pytest.mark.parametrize("format_", ["json", "console"])
def test_megabyte_anywhere_is_cut(format_: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure(format=format_)
    flood = HOSTILE * (1_000_000 // len(HOSTILE))
    log.info("a.b", user=flood, names=[flood] * 100, map={flood: {flood: flood}}, error=ConfigError([flood]))
    log.info(flood)
    text = capsys.readouterr().err
    assert text.count("\n") == 2
    assert len(text) < 2 * MAX_LINE


def test_value_never_replaces_built_in_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="json")
    log.info("a.b", level="x", timestamp=0)
    (record,) = records(capsys.readouterr().err)
    assert (record["level"], record["level_"], record["timestamp_"]) == ("info", "x", 0)


NAMES = st.sampled_from(["user", "client", "level", "event", "text", "api_key", "peer", "50%", 'a"b', "%s"])
TEXTS = st.one_of(
    st.text(alphabet=st.sampled_from("aZ09 .:/-_%'\"\\\x00\x1b\n\x7fé\ud800"), max_size=50),
    st.sampled_from(["", "%s", "%(user)s", "x" * 42, "x" * 43, "A" * 43]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, st.one_of(TEXTS, st.none(), st.integers(0, 9))))
def test_fast_path_equals_general_rendering(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], values: dict[str, Any]
) -> None:
    configure(format="json")
    with monkeypatch.context() as patch:
        write_as_long_way(patch)
        get_logger("zcproto.test")._log(20, "info", "a.b", dict(values))
    log._log(20, "info", "a.b", dict(values))
    the_long_way, the_usual_way = capsys.readouterr().err.splitlines(keepends=True)
    assert the_usual_way == the_long_way


def test_every_ascii_character_is_valid_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="json")
    for code in range(128):
        log.info("a.b", user=f"a{chr(code)}")
    lines = capsys.readouterr().err.split("\n")[:-1]
    assert [json.loads(line)["user"] for line in lines] == [f"a{chr(code)}" for code in range(128)]
    assert all(line.isprintable() for line in lines)


def write_as_long_way(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("zcproto.observe.log._are_plain", lambda values: False)


def test_many_plain_values_are_all_written(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="json")
    values = {f"value{number}": "x" for number in range(100)}
    log.info("a.b", **values)
    (record,) = records(capsys.readouterr().err)
    assert values.items() <= record.items()


def test_error_is_logged_with_its_frames(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="json", exceptions="frames")
    try:
        raise KeyError("hunter2")
    except KeyError as error:
        log.error("a.b", cause=error)
        log.warning("a.c", cause=error)
    lines, brief = records(capsys.readouterr().err)
    assert lines["cause"] == brief["cause"] == "KeyError"
    assert lines["cause_at"][-1].startswith("observe/test_log.py:")
    assert "cause_at" not in brief


def fail_with(text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError as error:
        log.error("a.b", cause=error, what=text)
        log.warning("a.c", cause=error)


def test_error_is_logged_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="json")
    fail_with("no tea")
    line, brief = records(capsys.readouterr().err)
    assert line["cause"] == "ValueError: no tea"
    assert line["traceback"][-1] == "ValueError: no tea"
    assert "cause_at" not in line
    assert (brief["cause"], set(brief) & {"traceback", "cause_at"}) == ("ValueError", set())


def test_traceback_follows_a_line_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="console")
    fail_with("no tea\n2026 error   server.ended\x1b[2J")
    line, *lines, brief = capsys.readouterr().err.splitlines()
    assert line.endswith('what="no tea\\n2026 error   server.ended\\u001b[2J"')
    assert brief.endswith("a.c logger=zcproto.test cause=ValueError")
    assert lines[0] == "    Traceback (most recent call last):"
    assert all(each.startswith("    ") for each in lines)
    fail_with("no tea\n2026 error   server.ended")
    assert capsys.readouterr().err.splitlines()[-3:-1] == [
        "    ValueError: no tea",
        "    2026 error   server.ended",
    ]


def test_tracebacks_are_limited_and_the_rest_have_frames(capsys: pytest.CaptureFixture[str]) -> None:
    configure(format="json")
    for number in range(100):
        fail_with(f"method {number // 10}")
    lines = [line for line in records(capsys.readouterr().err) if line["event"] == "a.b"]
    assert len(lines) == 100
    with_traceback = [line["what"] for line in lines if "traceback" in line]
    assert with_traceback == [f"method {number}" for number in range(5) for _ in range(6)]
    assert all(
        "cause_at" in line and line["cause"] == "ValueError" for line in lines if "traceback" not in line
    )


@pytest.mark.parametrize("format_", ["json", "console"])
def test_longest_traceback_fits_into_a_line(format_: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure(format=format_)
    for character in ("x ", "\u00fc ", "\U0001f600", '"'):
        fail_with(character * 10_000)
    text = capsys.readouterr().err
    assert "oversize" not in text
    assert text.count("in fail_with") == 4


@pytest.mark.parametrize("format_", ["json", "console"])
def test_oversized_line_is_written_without_its_longest_values(
    format_: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(format=format_)
    log.info("a.b", **{f"v{number}": "x" * 256 for number in range(200)}, peer="192.0.2.1")
    text = capsys.readouterr().err
    assert len(text) < MAX_LINE
    assert "oversize" in text
    assert "192.0.2.1" in text
    log.info("a.c", **{f"v{number}": "x" * 256 for number in range(40)})
    assert 10_000 < len(capsys.readouterr().err) < MAX_LINE


@pytest.mark.parametrize("character", ["\u0100", "\U0001f600", '"', "\n"])
@pytest.mark.parametrize("format_", ["json", "console"])
def test_oversized_line_of_any_characters_fits(
    format_: str, character: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(format=format_)
    log.info("a.b", **{f"v{number}": [character * 256] * 16 for number in range(16)})
    text = capsys.readouterr().err
    assert len(text) < MAX_LINE
    assert "oversize" in text


def test_log_file_is_appended_to_with_mode_0600(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for event in ("a.b", "a.c"):
        configure(file=path)
        log.info(event)
    assert [record["event"] for record in records(path.read_text())] == ["a.b", "a.c"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_configuring_again_reopens_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    configure(file=path)
    log.info("a.b")
    path.rename(tmp_path / "log.1")
    configure(file=path)
    log.info("a.c")
    assert records(path.read_text())[0]["event"] == "a.c"


def test_unopenable_log_file_raises_and_changes_nothing(tmp_path: Path) -> None:
    configure(file=tmp_path / "log")
    with pytest.raises(
        ConfigError, match=r'^log\.file = ".*": cannot be opened: No such file or directory; create'
    ):
        configure(file=tmp_path / "absent" / "log", level="error")
    log.info("a.b")
    assert records((tmp_path / "log").read_text())[0]["event"] == "a.b"


def test_named_pipe_without_reader_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="cannot be opened"):
        configure(file=tmp_path / "pipe")


def test_closed_pipe_is_counted_and_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as raw:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, write_through=True))
        configure(format="json")
        log.info("a.b")
        assert lost_lines() == 1


@pytest.mark.parametrize("format_", ["json", "auto"])
def test_closed_or_missing_stderr_is_counted(format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(format=format_)
    stream = io.StringIO()
    stream.close()
    for broken in (stream, None):
        monkeypatch.setattr(sys, "stderr", broken)
        log.info("a.b")
    assert lost_lines() == 2


def test_value_that_raises_is_counted_and_never_raises() -> None:
    class BrokenError(ConfigError):
        def __str__(self) -> str:
            raise RuntimeError

    configure(format="json")
    log.info("a.b", error=BrokenError([]))
    assert lost_lines() == 1


@given(
    st.dictionaries(
        st.text(st.characters(categories=["Ll"]), min_size=1), st.text() | st.binary(), max_size=5
    )
)
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_give_one_printable_line_in_both_formats(values: dict[str, Any]) -> None:
    for format_ in ("json", "console"):
        stream, sys.stderr = sys.stderr, io.StringIO()
        try:
            configure(format=format_)
            log.info("a.b", **{f"v_{name}": value for name, value in values.items()})
            text = sys.stderr.getvalue()
        finally:
            sys.stderr = stream
        assert text.endswith("\n")
        assert text[:-1].isprintable()


@pytest.mark.parametrize("format", ["json", "console"])
def test_lines_for_the_journal_begin_with_their_priority(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "journal").open("w+") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        configure(format=format, level="debug")
        for level in ("debug", "info", "warning"):
            getattr(log, level)("session.opened", user="ada")
        log.error("server.fault", exc_info=ValueError("one\ntwo"))
        lines = (tmp_path / "journal").read_text().splitlines()
    assert [line[:3] for line in lines[:3]] == ["<7>", "<6>", "<4>"]
    assert {line[:3] for line in lines[3:]} == {"<3>"}
    assert len(lines) == 4 or format == "console"


@pytest.mark.parametrize("stream", ["", "1:2"])
def test_lines_for_anything_else_have_no_priority(
    stream: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", stream)
    configure(format="json")
    log.error("server.fault")
    assert capfd.readouterr().err.startswith("{")
