"""Test that writing never blocks, keeps lines up to a limit, and terminates every line."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.capabilities import obeying_file_modes
from tests.limits import TIMEOUT
from zcproto.config.model import LogConfig
from zcproto.errors import ConfigError
from zcproto.observe import log as log_module
from zcproto.observe import output as output_module
from zcproto.observe.log import (
    configure_logging,
    flush_log,
    get_logger,
    is_on,
    level,
    lost_lines,
    reopen_log,
    set_level,
)
from zcproto.observe.output import MAX_WAITING, Descriptor, LogFile, StandardError, check_log_file

log = get_logger("zcproto.test")

LINE = "x" * 199 + "\n"


def events(text: str) -> list[str]:
    return [json.loads(line)["event"] for line in text.splitlines()]


def fill(output: Descriptor) -> int:
    """Write lines until one is lost. Return the number kept."""
    for lines in range(100_000):
        if output.write(LINE):
            return lines
    raise AssertionError("there was no end")


class Pipe:
    """A pipe that is read only on request."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)

    def read(self) -> str:
        taken = []
        while True:
            try:
                part = os.read(self.reader, 65_536)
            except BlockingIOError:
                break
            if not part:
                break
            taken.append(part)
        return b"".join(taken).decode("ascii")

    def close(self) -> None:
        for end in (self.reader, self.writer):
            os.close(end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Simulate a disk with space for this many bytes; None for no limit."""
    write, room = os.write, [0]

    def limited(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, data[: room[0]])
        room[0] -= written
        return written

    def leave(count: int | None) -> None:
        room[0] = count or 0
        monkeypatch.setattr(os, "write", write if count is None else limited)

    return leave


# --- pipes -------------------------------------------------------------------------------------------------------


def test_unread_pipe_does_not_block_and_loses_nothing_up_to_limit(pipe: Pipe) -> None:
    output = Descriptor(pipe.writer)
    lines = fill(output)
    assert lines * len(LINE) > MAX_WAITING
    assert MAX_WAITING - len(LINE) < output.waiting <= MAX_WAITING
    text = ""
    while output.waiting:
        text += pipe.read()
        output.flush()
    text += pipe.read()
    assert text == lines * LINE


def test_space_is_available_after_reading(pipe: Pipe) -> None:
    output = Descriptor(pipe.writer)
    fill(output)
    read = pipe.read()
    output.write(LINE)
    assert read.startswith(LINE)


def test_long_line_is_not_interleaved(pipe: Pipe) -> None:
    output = Descriptor(pipe.writer)
    line = "".join(chr(ord("a") + number % 26) for number in range(300_000)) + "\n"
    output.write(line)
    output.write(LINE)
    text = pipe.read()
    while output.waiting:
        output.flush()
        text += pipe.read()
    assert text == line + LINE


def test_concurrent_threads_do_not_mix_lines(pipe: Pipe) -> None:
    output = Descriptor(pipe.writer)

    def work(letter: str) -> None:
        for _ in range(400):
            output.write(letter * 499 + "\n")

    threads = [threading.Thread(target=work, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    text = ""
    while any(thread.is_alive() for thread in threads) or output.waiting:
        text += pipe.read()
        output.flush()
    for thread in threads:
        thread.join()
    text += pipe.read()
    lines = text.splitlines()
    assert len(lines) == 1_600
    assert all(len(line) == 499 and len(set(line)) == 1 for line in lines)


def test_closed_pipe_loses_lines_and_counts_them(pipe: Pipe) -> None:
    output = Descriptor(pipe.writer)
    for _ in range(1_000):
        output.write(LINE)
    waiting = output.waiting
    os.close(pipe.reader)
    assert output.write(LINE) >= waiting // len(LINE)
    assert output.waiting == 0
    assert [output.write(LINE), output.write(LINE)] == [1, 1]
    pipe.reader = os.open(os.devnull, os.O_RDONLY)


def test_socket_of_service_manager_is_written_to(pipe: Pipe) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        output = Descriptor(ours.fileno())
        output.write(LINE)
        assert theirs.recv(1_000).decode() == LINE
        assert fill(output) * len(LINE) > MAX_WAITING


def test_unread_stderr_does_not_block_program(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with os.fdopen(os.dup(pipe.writer), "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        configure_logging(LogConfig(format="json"))
        for _ in range(10_000):
            log.info("a.b", text="x" * 200)
        assert lost_lines() > 1_000
        lines = pipe.read()
        while log_module._state.output.waiting:
            flush_log()
            lines += pipe.read()
        log.info("a.c")
        lines += pipe.read()
    assert events(lines)[-2:] == ["a.c", "log.lost"]
    assert json.loads(lines.splitlines()[-1])["lines"] == lost_lines()
    assert events(lines).count("a.b") + lost_lines() == 10_000


def test_replaced_stderr_is_used(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    output = StandardError()
    with os.fdopen(os.dup(pipe.writer), "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        output.write("first\n")
        in_memory = io.StringIO()
        monkeypatch.setattr(sys, "stderr", in_memory)
        output.write("second\n")
        output.flush()
        monkeypatch.setattr(sys, "stderr", stream)
        output.write("third\n")
    output.flush()
    assert pipe.read() == "first\nthird\n"
    assert in_memory.getvalue() == "second\n"


def test_finish_waits_for_slow_reader(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module, "FINISH_TRY_MS", 10_000)
    output = Descriptor(pipe.writer)
    lines = fill(output)
    taken: list[bytes] = []

    def read() -> None:
        os.set_blocking(pipe.reader, True)
        while sum(map(len, taken)) < lines * len(LINE):
            taken.append(os.read(pipe.reader, 65_536))

    reader = threading.Thread(target=read)
    reader.start()
    output.finish()
    reader.join(TIMEOUT)
    assert b"".join(taken).decode() == lines * LINE


def test_finish_does_not_wait_for_missing_reader(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module, "FINISH_TRY_MS", 1)
    output = Descriptor(pipe.writer)
    lines = fill(output)
    output.finish()
    assert output.waiting > 0
    assert lines * len(LINE) > MAX_WAITING


def test_closed_descriptor_number_is_never_reused(tmp_path: Path) -> None:
    output = LogFile(tmp_path / "log")
    output.close()
    other = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)  # reuses the freed number
    assert output.write(LINE) == 1
    assert output.flush() == 0
    assert output.close() == 0
    os.close(other)
    assert (tmp_path / "other").read_text() == ""


# --- files -------------------------------------------------------------------------------------------------------


def test_lines_are_written_when_full_disk_has_space_again(
    tmp_path: Path, full_disk: Callable[[int | None], None]
) -> None:
    configure_logging(LogConfig(file=tmp_path / "log"))
    log.info("a.b")
    full_disk(10)
    for _ in range(3):
        log.info("a.c")
    assert lost_lines() == 0
    full_disk(None)
    log.info("a.d")
    assert events((tmp_path / "log").read_text()) == ["a.b", "a.c", "a.c", "a.c", "a.d"]


def test_full_disk_gets_no_part_of_a_line_that_others_would_continue(
    tmp_path: Path, full_disk: Callable[[int | None], None]
) -> None:
    one, other = LogFile(tmp_path / "log"), LogFile(tmp_path / "log")
    full_disk(len(LINE) + 50)
    assert one.write(2 * LINE) == 0
    full_disk(None)
    other.write("y\n")
    one.write("z\n")
    assert (tmp_path / "log").read_text() == f"{LINE}y\n{LINE}z\n"
    one.close()
    other.close()


def test_line_of_another_process_is_not_removed_with_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: Callable[[int | None], None]
) -> None:
    one, other = LogFile(tmp_path / "log"), LogFile(tmp_path / "log")
    seek = os.lseek

    def seek_late(*place: int) -> int:
        full_disk(None)
        other.write("y\n")
        return seek(*place)

    with monkeypatch.context() as context:
        context.setattr(os, "lseek", seek_late)
        full_disk(7)
        one.write(LINE)
    assert (tmp_path / "log").read_text() == f"{'x' * 7}y\n{LINE[7:]}"
    one.close()
    other.close()


def test_part_of_a_line_that_cannot_be_removed_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: Callable[[int | None], None]
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EPERM, "append only")

    output = LogFile(tmp_path / "log")
    monkeypatch.setattr(os, "ftruncate", refuse)
    full_disk(7)
    output.write(LINE)
    full_disk(None)
    output.write(LINE)
    assert (tmp_path / "log").read_text() == 2 * LINE
    output.close()


def test_flush_writes_waiting_lines(tmp_path: Path, full_disk: Callable[[int | None], None]) -> None:
    configure_logging(LogConfig(file=tmp_path / "log"))
    full_disk(0)
    log.info("a.b")
    flush_log()
    assert (tmp_path / "log").read_text() == ""
    full_disk(None)
    flush_log()
    assert events((tmp_path / "log").read_text()) == ["a.b"]


def test_full_disk_loses_lines_and_reports_them_later(
    tmp_path: Path, full_disk: Callable[[int | None], None]
) -> None:
    configure_logging(LogConfig(file=tmp_path / "log"))
    full_disk(5)
    for _ in range(10_000):
        log.info("a.b", text="x" * 200)
    lost = lost_lines()
    assert 0 < lost < 10_000
    full_disk(None)
    log.info("a.c")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["event"] for line in lines[-2:]] == ["a.c", "log.lost"]
    assert lines[-1]["lines"] == lost
    assert len(lines) == 10_000 - lost + 2


def test_disk_error_within_a_line_keeps_next_line_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = LogFile(tmp_path / "log")
    write, parts = os.write, [7]

    def broken(descriptor: int, data: bytes) -> int:
        if not parts:
            raise OSError(errno.EIO, "Input/output error")
        return write(descriptor, data[: parts.pop()])

    with monkeypatch.context() as context:
        context.setattr(os, "write", broken)
        context.setattr(Descriptor, "_removed", lambda *_: False)
        assert [output.write(LINE), output.write(LINE)] == [1, 1]
    output.write(LINE)
    output.close()
    assert (tmp_path / "log").read_text() == "x" * 7 + "\n" + LINE


def test_each_write_to_a_pipe_ends_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    written: list[bytes] = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: written.append(bytes(data)) or write(fd, data))
    output = Descriptor(writer)
    output.write("".join(letter * 1_500 + "\n" for letter in "abcdefgh") + "i" * 5_000 + "\n")
    output.close()
    os.close(reader)
    assert [len(data) for data in written] == [3_002, 3_002, 3_002, 3_002, 4_096, 905]
    assert all(data.endswith(b"\n") for data in written[:4])


def test_dev_full_never_raises() -> None:
    configure_logging(LogConfig(file=Path("/dev/full")))
    for _ in range(10_000):
        log.info("a.b", text="x" * 200)
    assert lost_lines() > 0
    configure_logging(LogConfig(file=Path("/dev/full")))


def test_full_named_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    configure_logging(LogConfig(file=tmp_path / "pipe"))
    for _ in range(10_000):
        log.info("a.b", text="x" * 200)
    assert lost_lines() > 0
    os.close(reader)
    log.info("a.b")


def test_lines_waiting_for_a_closed_output_are_counted(tmp_path: Path) -> None:
    configure_logging(LogConfig(file=Path("/dev/full")))
    log.info("a.b")
    configure_logging(LogConfig(file=tmp_path / "log"))
    assert lost_lines() == 1
    log.info("a.c")
    assert events((tmp_path / "log").read_text()) == ["a.c", "log.lost"]


# --- reopening --------------------------------------------------------------------------------------------------


def test_check_of_a_log_file_finds_what_opening_it_would(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "locked").mkdir(0o500)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "none" / "log")
    (tmp_path / "there").touch()
    with obeying_file_modes():
        for name in ("folder", "locked/log", "none/log", "there/log", "pipe", "link"):
            with pytest.raises(ConfigError) as checked:
                check_log_file(tmp_path / name, "log.file")
            with pytest.raises(ConfigError) as opened:
                LogFile(tmp_path / name)
            assert checked.value.faults == opened.value.faults
        for name in ("there", "new"):
            check_log_file(tmp_path / name, "log.file")
    assert not (tmp_path / "new").exists()


def test_moved_log_file_is_reopened(tmp_path: Path) -> None:
    path = tmp_path / "log"
    configure_logging(LogConfig(file=path))
    log.info("a.b")
    path.rename(tmp_path / "log.1")
    log.info("a.c")
    assert reopen_log()
    log.info("a.d")
    assert events((tmp_path / "log.1").read_text()) == ["a.b", "a.c"]
    assert events(path.read_text()) == ["log.reopened", "a.d"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_file_created_by_logrotate_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "log"
    configure_logging(LogConfig(file=path))
    path.rename(tmp_path / "log.1")
    path.touch(0o640)
    os.chmod(path, 0o640)
    assert reopen_log()
    assert path.stat().st_mode & 0o777 == 0o640


def test_unopenable_file_leaves_old_one_in_use(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    configure_logging(LogConfig(file=folder / "log"))
    folder.rename(tmp_path / "gone")
    assert not reopen_log()
    log.info("a.b")
    lines = [json.loads(line) for line in (tmp_path / "gone" / "log").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["log.not_reopened", "a.b"]
    assert "cannot be opened: No such file or directory" in lines[0]["faults"][0]


def test_reopen_ignores_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogConfig(format="json"))
    assert reopen_log()
    assert capsys.readouterr().err == ""


# --- the level ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["debug", "info", "warning", "error"])
def test_level_change_is_logged(name: str, tmp_path: Path) -> None:
    configure_logging(LogConfig(level="info", file=tmp_path / "log"))
    set_level(name)
    assert level() == name
    written = []
    for method in ("debug", "info", "warning", "error"):
        getattr(log, method)("a.b")
        assert is_on(method) == (
            len((tmp_path / "log").read_text().splitlines()) > len(written) + (name != "info")
        )
        written = [each for each in events((tmp_path / "log").read_text()) if each == "a.b"]
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    changes = [line["new_level"] for line in lines if line["event"] == "log.level_changed"]
    assert changes == ([] if name == "info" else [name])


@pytest.mark.parametrize("name", ["", "loud", "INFO", "x" * 10_000, "a\nb"])
def test_unknown_level_is_refused(name: str) -> None:
    configure_logging(LogConfig(level="warning"))
    with pytest.raises(ConfigError, match=r"unknown log level .*; use debug, info, warning, error") as error:
        set_level(name)
    assert len(str(error.value)) < 400
    assert level() == "warning"


def test_failing_custom_stream_does_not_reach_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Strange(io.StringIO):
        def write(self, text: str) -> Any:
            raise RuntimeError(signal.SIGPIPE)

        def flush(self) -> None:
            raise RuntimeError

    configure_logging(LogConfig(format="json"))
    monkeypatch.setattr(sys, "stderr", Strange())
    log.info("a.b")
    flush_log()
    assert lost_lines() == 1


def test_batch_cut_at_a_line_end_is_not_a_broken_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    output = Descriptor(writer)
    output._poll = None  # like a file on a disk that becomes full
    write = os.write
    taken = iter([4, OSError(errno.ENOSPC, "full")])

    def short(descriptor: int, data: bytes) -> int:
        what = next(taken, len(data))
        if isinstance(what, OSError):
            raise what
        return write(descriptor, bytes(data)[:what])

    monkeypatch.setattr(os, "write", short)
    output.write("one\ntwo\n")
    output.write("three\n")
    assert os.read(reader, 100) == b"one\ntwo\nthree\n"
    output.close()
    os.close(reader)
