from __future__ import annotations

import builtins
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import click
import pytest

from tests.helpers import raising
from zcproto import accelerator, cli
from zcproto.cli import COMMANDS, Instance, instance_options, main
from zcproto.cli.examples import EXAMPLES
from zcproto.errors import CertificateError, ConfigError, ConnectionClosed, InvalidArgument, ZcprotoError

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Make a function the command `call`."""

    def use(function: Callable[[], object]) -> None:
        monkeypatch.setattr(cli.group, "get_command", lambda *_: click.Command("call", callback=function))

    return use


def test_help_lists_each_command_with_its_purpose(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, purpose) in COMMANDS.items():
        assert f"{name} " in out
        assert purpose in out


def test_help_imports_no_command_and_no_large_library() -> None:
    program = (
        "import sys; from zcproto.cli import main; main(['--help']);"
        "print([name for name in sys.modules if name.startswith('zcproto.cli.')"
        " or name in ('asyncio', 'pydantic', 'ssl', 'cryptography', 'uvloop')], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_help_of_each_command_has_an_example_that_is_parsed(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = click.Context(cli.group, info_name="zcproto")
    for command, path in commands_below(cli.group, root):
        assert main([*path, "--help"]) == 0
        shown = capsys.readouterr().out
        assert not re.search(r"\w\.\.\.$", shown.partition("Commands:")[2], re.MULTILINE), path
        if not isinstance(command, click.Group):
            example = EXAMPLES[" ".join(path)]
            assert shown.endswith(f"  Example:\n    {example}\n")
            words = shlex.split(example.partition(" > ")[0])
            assert words[: 1 + len(path)] == ["zcproto", *path]
            for file in (word for word in words if re.fullmatch(r"\w+\.(crt|json|key|toml)", word)):
                Path(file).touch()
            with command.make_context(path[-1], words[1 + len(path) :], root):
                pass


def commands_below(
    group: click.Group, context: click.Context, path: tuple[str, ...] = ()
) -> Iterator[tuple[click.Command, tuple[str, ...]]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield command, (*path, name)
        if isinstance(command, click.Group):
            yield from commands_below(command, click.Context(command, context, name), (*path, name))


def test_missing_command_shows_the_help(capsys: Capture) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("cnfig", "No command 'cnfig'; did you mean config?"),
        ("zzz", f"No command 'zzz'; commands: {', '.join(cli.COMMANDS)}."),
        ("\x1b[31m", "No command '\\\\x1b[31m'; commands:"),
    ],
)
def test_misspelt_command_suggests_the_nearest(word: str, hint: str, capsys: Capture) -> None:
    assert main([word]) == 2
    assert hint in capsys.readouterr().err


def test_unknown_option_is_wrong_usage(capsys: Capture) -> None:
    assert main(["--hom", "/x"]) == 2
    assert "--home" in capsys.readouterr().err


def test_shell_completion_lists_the_commands() -> None:
    context = click.Context(cli.group)
    assert cli.group.list_commands(context) == list(COMMANDS)
    assert cli.group.get_command(context, "absent") is None


@pytest.mark.parametrize("words", [["--version"], ["config", "--version"], ["config", "show", "--version"]])
def test_version_is_printed_before_and_after_the_command(
    words: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "1.2.3")
    assert main(words) == 0
    assert capsys.readouterr().out == f"zcproto 1.2.3\naccelerator: {accelerator.describe()}\n"


def test_version_of_an_uninstalled_checkout(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("zcproto (not installed)\n")


@pytest.mark.parametrize(
    ("words", "port"),
    [
        (["--home", "{a}", "config", "show"], 1),
        (["config", "--home", "{a}", "show"], 1),
        (["config", "show", "--home", "{a}"], 1),
        (["--home", "{b}", "config", "show", "--home", "{a}"], 1),
        (["--home", "{a}", "config", "show", "--home", "{b}"], 2),
        (["--config", "{b}/config.toml", "config", "show", "--home", "{a}"], 2),
        (["--home", "{a}", "config", "show", "--config", "{b}/config.toml"], 2),
        (["config", "show"], 3),
    ],
)
def test_later_home_and_config_options_win(
    words: list[str], port: int, home: Path, tmp_path: Path, capsys: Capture
) -> None:
    for number, path in enumerate((tmp_path / "a", tmp_path / "b", home), 1):
        path.mkdir()
        (path / "config.toml").write_text(f"[server]\nport = {number}")
    assert main([word.format(a=tmp_path / "a", b=tmp_path / "b") for word in words]) == 0
    assert f"port = {port}\n" in capsys.readouterr().out


def test_command_gets_its_instance_and_options(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    @click.command()
    @click.option("--rate", type=int)
    @instance_options
    @click.argument("word")
    def call(instance: Instance, rate: int, word: str) -> None:
        """Call."""
        seen.extend([instance.home.path, instance.config_file, rate, word])

    monkeypatch.setattr(cli.group, "get_command", lambda *_: call)
    assert main(["--config", "/x", "call", "--rate", "3", "word"]) == 0
    assert seen == [home, Path("/x"), 3, "word"]
    assert call.help == "Call."


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError(["a = 1: wrong", "b = 2: wrong"]), 2, "zcproto: a = 1: wrong\nzcproto: b = 2: wrong\n"),
        (ConfigError(["x"] * 202), 2, "zcproto: x\n" * 200 + "zcproto: and 2 more\n"),
        (CertificateError("/c.crt: is expired"), 2, "zcproto: /c.crt: is expired\n"),
        (ZcprotoError("no"), 1, "zcproto: no\n"),
        (ZcprotoError(), 1, "zcproto: ZcprotoError\n"),
        (ConnectionClosed("idle"), 1, "zcproto: idle\n"),
        (InvalidArgument("a\n\x1b[31mb"), 1, "zcproto: INVALID_ARGUMENT: a\\n\\x1b[31mb\n"),
        (ZcprotoError("x" * 5000), 1, "zcproto: " + "x" * 1997 + "...\n"),
        (
            FileNotFoundError(2, "No such file or directory", "/a\n"),
            1,
            "zcproto: /a\\n: No such file or directory\n",
        ),
        (OSError(98, "Address already in use"), 1, "zcproto: Address already in use\n"),
        (
            ModuleNotFoundError("…", name="hdrh.histogram"),
            1,
            "zcproto: the Python package hdrh.histogram is required and not installed;"
            ' run in a clone of zcproto: pip install ".[hdr]"\n',
        ),
        (
            ModuleNotFoundError("…", name="absent"),
            1,
            "zcproto: the Python package absent is required and not installed\n",
        ),
        (
            ValueError("hunter2"),
            1,
            "zcproto: internal error (ValueError); ZCPROTO_DEBUG=1 shows the traceback\n",
        ),
        (
            OSError("hunter2"),
            1,
            "zcproto: internal error (OSError); ZCPROTO_DEBUG=1 shows the traceback\n",
        ),
        (
            ModuleNotFoundError("hunter2"),
            1,
            "zcproto: internal error (ModuleNotFoundError); ZCPROTO_DEBUG=1 shows the traceback\n",
        ),
        (click.ClickException("no"), 1, "zcproto: no\n"),
        (KeyboardInterrupt(), 130, ""),
        (click.Abort(), 130, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_error_is_one_message_and_an_exit_code(
    error: BaseException,
    code: int,
    text: str,
    command: Callable[[Callable[[], object]], None],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ZCPROTO_DEBUG", raising=False)
    command(raising(error))
    assert main(["call"]) == code
    assert capsys.readouterr() == ("", text)


def test_traceback_is_shown_with_zcproto_debug(
    command: Callable[[Callable[[], object]], None], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCPROTO_DEBUG", "1")
    command(raising(ZcprotoError("no")))
    assert main(["call"]) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("zcproto: no\n")


@pytest.mark.parametrize(("result", "code"), [(None, 0), (3, 3), ("text", 0)])
def test_returned_exit_code_is_used(
    result: object, code: int, command: Callable[[Callable[[], object]], None]
) -> None:
    command(lambda: result)
    assert main(["call"]) == code


def test_exit_of_a_command_is_used(command: Callable[[Callable[[], object]], None]) -> None:
    command(raising(click.exceptions.Exit(5)))
    assert main(["call"]) == 5


def test_broken_pipe_exits_with_141(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    home.mkdir(0o700)
    (home / "config.toml").touch()
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["config", "show"]) == 141
        pipe.write("what is buffered goes nowhere, and quietly")
    assert capfd.readouterr().err == ""


def test_broken_pipe_at_the_final_flush_exits_with_141(
    monkeypatch: pytest.MonkeyPatch, command: Callable[[Callable[[], object]], None]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        command(lambda: builtins.print("word"))
        assert main(["call"]) == 141


def test_closed_stdout_is_not_an_error(
    monkeypatch: pytest.MonkeyPatch, command: Callable[[Callable[[], object]], None]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    command(lambda: click.echo("word"))
    assert main(["call"]) == 0


def test_package_runs_as_a_module(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["zcproto", "config", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(Path(cli.__file__).parents[1] / "__main__.py"), run_name="__main__")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("Usage: zcproto config ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_imported(name: str) -> None:
    module, attribute = COMMANDS[name][0].split(":")
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command)
    assert command.name == name


# --- the home folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["status"], ["reload"], ["drain"], ["log", "level"], ["alert", "list"], ["alert", "test"],
        ["user", "list"], ["user", "disable", "ada"], ["user", "new-key", "ada"],
        ["session", "list"], ["session", "revoke", "--all"],
        ["device", "list"], ["device", "remove", "phone"], ["pair"], ["store", "check"],
        ["store", "migrate", "a", "b"],
        ["cert", "show"], ["cert", "pins"], ["cert", "export-ca"], ["cert", "revoke-client", "ada"],
        ["config", "show"], ["config", "check"],
    ],
)  # fmt: skip
def test_missing_home_folder_is_an_error(words: list[str], home: Path, capsys: Capture) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        f"zcproto: {home}: this home folder does not exist; name another one with --home or ZCPROTO_HOME"
    )
    assert not home.exists()


# --- shell completion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_printed_for_each_shell(
    shell: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_ZCPROTO_COMPLETE", f"{shell}_source")
    assert main([]) == 0
    assert f"_ZCPROTO_COMPLETE={shell}_complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("zcproto s", ["serve", "status", "stubs", "session", "store"]),
        ("zcproto --h", ["--home", "--help"]),
        ("zcproto session ", ["list", "open", "revoke"]),
        ("zcproto call localhost echo --k", ["--key-file", "--key-log"]),
    ],
)
def test_bash_completes_commands_and_options(
    typed: str, found: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = typed.split(" ")
    monkeypatch.setenv("_ZCPROTO_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    assert main([]) == 0
    assert [line.partition(",")[2] for line in capsys.readouterr().out.splitlines()] == found


def test_completion_of_a_command_name_imports_no_command() -> None:
    program = (
        "import sys; from zcproto.cli import main; main([]);"
        "print([name for name in sys.modules if name.startswith('zcproto.cli.')], file=sys.stderr)"
    )
    environ = {
        **os.environ,
        "_ZCPROTO_COMPLETE": "bash_complete",
        "COMP_WORDS": "zcproto ",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environ
    )
    assert done.stderr == "[]\n"
    assert len(done.stdout.splitlines()) == len(COMMANDS)


@pytest.mark.parametrize("words", [["-h"], ["session", "-h"], ["call", "-h"]])
def test_short_help_option_works_everywhere(words: list[str], home: Path, capsys: Capture) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("Usage: zcproto")


@pytest.mark.parametrize("arguments", [["config", "check"], ["serve", "--nonsense"]])
@pytest.mark.parametrize("is_journal", [True, False])
def test_error_of_a_service_has_the_priority_of_errors_in_the_journal(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], is_journal: bool
) -> None:
    home.mkdir(0o700)
    (home / "config.toml").write_text("[server]\nport = 'x'\nprot = 1\n")
    with (tmp_path / "journal").open("w+") as stream:
        found = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}" if is_journal else "1:1")
        monkeypatch.setattr("sys.stderr", stream)
        assert main(arguments) == 2
    lines = (tmp_path / "journal").read_text().splitlines()
    assert lines
    assert all(line.startswith("<3>") is is_journal for line in lines)
