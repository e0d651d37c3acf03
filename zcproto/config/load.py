"""Reads the configuration from its sources and tells all faults at once.

Rules: the command line wins over the environment, the environment over the file; only the winner's value is
checked, but a name that does not exist is a fault wherever it stands. Nothing is ignored. The file is bounded
before it is parsed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tomli

from zcproto.common.text import escape_text
from zcproto.config.checks import CHECKS
from zcproto.config.faults import fault, outside_section, unknown_key, unknown_section, written
from zcproto.config.model import Config, rules, sections, split_key
from zcproto.config.rules import Refusal, RefusedError
from zcproto.config.tables import TablesOf
from zcproto.errors import ConfigError

MAX_FILE_BYTES = 1_048_576
"""The example with all comments has about 10 KiB."""

MAX_FAULTS = 100
"""Nobody reads more, and each costs a search for the nearest name."""

FILE_NAME = "config.toml"
PREFIX = "ZCPROTO_"
COMMAND_LINE = "command line"
DEFAULT = "default"

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class _Given:
    """A value as it stands in its source."""

    value: object
    source: str


def load_config(
    path: Path | None,
    *,
    home: Path,
    environ: Mapping[str, str],
    overrides: Mapping[str, Any] = _NOTHING,
) -> Config:
    """The configuration from a file, the environment and the command line.

    `path` is the TOML file; None means config.toml in `home`, if there is one. `overrides` are settings of the
    command line by their dotted keys, as text or as Python values; a None is no setting. Relative things do
    not exist here: paths are absolute or begin with ~.

    Raises ConfigError with all faults.
    """
    given: dict[str, _Given] = {}
    faults: list[str] = []
    for source in (_from_file(path, home), _from_environ(environ), _from_overrides(overrides)):
        for item in source:
            if len(faults) > MAX_FAULTS:
                raise _error(faults)
            if isinstance(item, str):
                faults.append(item)
            else:
                given[item[0]] = item[1]
    given.setdefault("certificates.directory", _Given(home / "certs", DEFAULT))
    values = _check_values(given, faults)
    _check_pairs(values, given, faults)
    if faults:
        raise _error(faults)
    tables: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    for key in given:
        section, name = split_key(key)
        tables[section][name] = values[key]
    return Config.model_validate(tables)


def _error(faults: list[str]) -> ConfigError:
    more = [f"and more; the first {MAX_FAULTS} are shown"] if len(faults) > MAX_FAULTS else []
    return ConfigError([*faults[:MAX_FAULTS], *more])


_Items = Iterator[str | tuple[str, _Given]]
"""What a source yields: a fault, or a key with what stands there."""


def _from_file(path: Path | None, home: Path) -> _Items:
    source = path or home / FILE_NAME
    name = escape_text(source.name, 60)
    try:
        with source.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        if path is not None:
            yield f"{escape_text(str(source))}: there is no such file; `config init` makes one"
        return
    except OSError as error:
        yield f"{escape_text(str(source))}: cannot be read: {error.strerror}"
        return
    if len(data) > MAX_FILE_BYTES:
        yield f"{name}: is larger than {MAX_FILE_BYTES} bytes"
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield f"{name}: is not UTF-8 text (line {line})"
        return
    try:
        document = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        yield f"{name}: is not TOML: {_where(str(error), text)}"
        return
    except (ValueError, RecursionError):
        # What tomli lets through of Python: numbers of thousands of digits, and deep nesting.
        yield f"{name}: holds a number of thousands of digits, or lists within lists beyond all use"
        return
    yield from _from_document(document, name)


def _where(message: str, text: str) -> str:
    end = "(at end of document)"
    if message.endswith(end):
        last = text.split("\n")
        place = f"(at line {len(last)}, column {len(last[-1]) + 1}, the end of the file)"
        message = message.removesuffix(end) + place
    return escape_text(message)


def _from_document(document: Mapping[str, Any], source: str) -> _Items:
    for section, table in document.items():
        if section in sections():
            if isinstance(table, dict):
                for name, value in table.items():
                    yield _item(f"{section}.{name}", value, source)
            else:
                yield fault(
                    section, table, source, f"is a section: write [{section}], and its keys below that"
                )
        elif isinstance(table, dict):
            yield f"[{escape_text(section, 60)}] ({source}): {unknown_section(section)}"
        else:
            yield fault(section, table, source, outside_section(section))


def _from_environ(environ: Mapping[str, str]) -> _Items:
    for variable in sorted(environ):
        if not variable.startswith(PREFIX):
            continue
        section, separator, name = variable.removeprefix(PREFIX).lower().partition("__")
        shown = escape_text(variable, 60)
        if not separator:
            # One underscore is a slip that would leave a setting without effect. ZCPROTO_HOME has no section.
            first, separator, rest = section.partition("_")
            if separator and first in sections():
                yield fault(
                    f"{first}.{rest}", environ[variable], shown, "two underscores must follow the section"
                )
            continue
        key = f"{section}.{name}"
        outer = key.partition("__")[0]
        # Who tries it for a key of a table writes further underscores: ZCPROTO_CERTIFICATES__SITE__0__NAMES.
        if isinstance(rules().get(outer), TablesOf):
            sentence = f"cannot be set by a variable; write [[{outer}]] tables in the file"
            yield fault(key, environ[variable], shown, sentence)
        elif key in rules():
            yield key, _Given(rules()[key].from_environ(environ[variable]), shown)
        else:
            yield _item(key, environ[variable], shown)


def _from_overrides(overrides: Mapping[str, Any]) -> _Items:
    for key, value in overrides.items():
        if value is not None:
            yield _item(key, value, COMMAND_LINE)


def _item(key: str, value: object, source: str) -> str | tuple[str, _Given]:
    if key in rules():
        return key, _Given(value, source)
    section, name = split_key(key)
    sentence = unknown_key(key) if section in sections() else unknown_section(section, name)
    return fault(key, value, source, sentence)


def _check_values(given: Mapping[str, _Given], faults: list[str]) -> dict[str, Any]:
    """All settings as the program uses them, those with a fault left out."""
    values: dict[str, Any] = {}
    for key, rule in rules().items():
        section, name = split_key(key)
        entry = given.get(key)
        if entry is None:
            values[key] = sections()[section].model_fields[name].get_default(call_default_factory=True)
            continue
        from_text = entry.source not in (COMMAND_LINE, DEFAULT)
        try:
            values[key] = rule.load(entry.value) if from_text else rule.accept(entry.value)
        except RefusedError as error:
            for each in error.refusals or [Refusal("", entry.value, str(error))]:
                faults.append(fault(f"{key}{each.where}", each.value, entry.source, each.sentence))
    return values


def _check_pairs(values: Mapping[str, Any], given: Mapping[str, _Given], faults: list[str]) -> None:
    for check in CHECKS:
        if not all(key in values for key in check.keys) or check.holds(*(values[key] for key in check.keys)):
            continue
        subject, measure = (
            f"{written(key, values[key])} ({given[key].source if key in given else DEFAULT})"
            for key in check.keys[:2]
        )
        cure = f"; {check.cure}" if check.cure else ""
        faults.append(
            f"{check.keys[0]} = {subject}: {check.demand} {check.keys[1]}, which is {measure}{cure}"
        )
