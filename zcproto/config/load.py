"""Read the configuration from its sources and report all faults at once; write it as TOML.

Rules:
- The command line overrides the environment, which overrides the file. Only the value that applies is checked, but
  an unknown name is a fault in every source. Nothing is ignored.
- Each fault is one line, with the key, its value, where the value came from, and what would be right. Text of the
  operator is escaped and truncated. Values of keys named like secrets, what follows the scheme of an address, and
  PEM text are never shown.
- The file belongs to this user or root, and others can change neither it nor its folder.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import tomli
from pydantic import BaseModel, ValidationError

from zcproto.common.files import UnusableFileError, access_fix, read_trusted_file
from zcproto.common.home import Home
from zcproto.common.text import escape_text, toml_string
from zcproto.config.checks import contradictions, split_key, value_of
from zcproto.config.model import CertificatesConfig, Config, descriptions, keys, sections, settings
from zcproto.config.types import MAX_FAULTS, faults_of, nearest, settings_of, table_lines
from zcproto.errors import ConfigError

MAX_FILE_BYTES: Final = 1_048_576
"""The example with all comments has about 10 KiB."""

PREFIX: Final = "ZCPROTO_"
COMMAND_LINE: Final = "command line"
DEFAULT: Final = "default"

_NAME: Final = re.compile(r"\.([^.\[]*)")

_MAX_SHOWN: Final = 60
"""Characters of a key or a value that are shown."""

_SECRET: Final = re.compile(
    r"secret|passw|passphrase|token|credential|private|(^|[._-])keys?$", re.IGNORECASE
)
# An operator may put the passphrase itself where its file or variable is expected.
_PLACE_OF_SECRET: Final = re.compile(r"passphrase", re.IGNORECASE)
_INDEX: Final = re.compile(r"\[[0-9]+\]")
_PEM: Final = "-----BEGIN"
_ADDRESS: Final = re.compile(r"([A-Za-z0-9+.-]{1,20})://.*", re.DOTALL)
_MAX_BITS: Final = 256
_MAX_NESTING: Final = 2


class _Given(NamedTuple):
    """A value as it is in its source."""

    value: object
    source: str


_Items = Iterator[str | tuple[str, _Given]]
"""Faults of a source, and keys with their values."""


def load_config(
    path: Path | None,
    *,
    home: Path,
    environ: Mapping[str, str],
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Return the configuration of a file, the environment and the command line.

    `path` is the TOML file; None means config.toml in `home`, if it exists. `overrides` are settings of the command
    line by their dotted keys, as text or as Python values; None is ignored. Paths are absolute or begin with ~.

    Raises ConfigError with all faults.
    """
    given: dict[str, _Given] = {}
    faults: list[str] = []
    command_line = (_item(key, value, COMMAND_LINE) for key, value in overrides.items() if value is not None)
    for item in chain(_from_file(path, home), _from_environ(environ), command_line):
        if isinstance(item, str):
            faults.append(item)
        else:
            given[item[0]] = item[1]
        if len(faults) > MAX_FAULTS:
            raise _error(faults)
    given.setdefault("certificates.directory", _Given(Home(home).certs, DEFAULT))
    refused: set[str] = set()
    models = {section: _validated(section, given, refused, faults) for section in sections()}
    config = Config.model_construct(None, **models)
    for check in contradictions(config):
        if refused.isdisjoint(check.keys):
            subject, measure = (
                f"{_written(key, value_of(config, key))} ({given[key].source if key in given else DEFAULT})"
                for key in check.keys[:2]
            )
            fix = f"; {check.fix}" if check.fix else ""
            faults.append(
                f"{check.keys[0]} = {subject}: {check.demand} {check.keys[1]}, which is {measure}{fix}"
            )
    if faults:
        raise _error(faults)
    return config


def _error(faults: list[str]) -> ConfigError:
    more = [f"and more; the first {MAX_FAULTS} are shown"] if len(faults) > MAX_FAULTS else []
    return ConfigError([*faults[:MAX_FAULTS], *more])


def _validated(section: str, given: Mapping[str, _Given], refused: set[str], faults: list[str]) -> BaseModel:
    """Return a section. The keys of wrong values are added to `refused` and have their defaults."""
    model = sections()[section]
    found = {name: given[f"{section}.{name}"] for name in model.model_fields if f"{section}.{name}" in given}
    values = {name: entry.value for name, entry in found.items()}
    text = {name for name, entry in found.items() if entry.source not in (COMMAND_LINE, DEFAULT)}
    context = {"text_fields": text}
    try:
        return model.model_validate(values, context=context)
    except ValidationError as error:
        for each in islice(faults_of(error, model, f"[{section}]"), MAX_FAULTS + 1):
            name = _NAME.match(each.place)[1]  # type: ignore[index]  # every place begins with the name of a key
            refused.add(f"{section}.{name}")
            faults.append(_fault(f"{section}{each.place}", each.value, found[name].source, each.sentence))
            values.pop(name, None)
    return model.model_validate(values, context=context)


def _from_file(path: Path | None, home: Path) -> _Items:
    source = path or Home(home).config
    where, name = escape_text(str(source)), escape_text(source.name, _MAX_SHOWN)
    try:
        # It names a program that the server runs, addresses that receive alerts, and who may log in.
        data = read_trusted_file(source, MAX_FILE_BYTES)
    except FileNotFoundError:
        if path is not None:
            yield f"{where}: no such file; correct the path, or create it: zcproto --config {where} config init"
        return
    except OSError as error:
        fix = access_fix(source) if isinstance(error, PermissionError) else "check the path and its disk"
        yield f"{where}: cannot be read: {error.strerror}; {fix}"
        return
    except UnusableFileError as error:
        yield from error.faults
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield f"{where}: is not UTF-8 text (line {line}); correct this line, or save the file as UTF-8"
        return
    try:
        document = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        yield f"{where}: is not TOML: {_where(str(error), text)}; correct this line, or the one before"
        return
    except (ValueError, RecursionError):
        # Limits of Python that tomli does not translate: numbers of thousands of digits, and deep nesting.
        yield f"{where}: holds a number of thousands of digits, or lists nested too deeply; remove it"
        return
    yield from _from_document(document, name)


def _where(message: str, text: str) -> str:
    end = "(at end of document)"
    if message.endswith(end):
        lines = text.split("\n")
        place = f"(at line {len(lines)}, column {len(lines[-1]) + 1}, the end of the file)"
        message = message.removesuffix(end) + place
    return escape_text(message)


def _from_document(document: Mapping[str, Any], source: str) -> _Items:
    for section, table in document.items():
        if section in sections():
            if isinstance(table, dict):
                for name, value in table.items():
                    yield _item(f"{section}.{name}", value, source)
            else:
                yield _fault(
                    section, table, source, f"is a section: write [{section}], and its keys below it"
                )
        elif isinstance(table, dict):
            yield f"[{escape_text(section, _MAX_SHOWN)}] ({source}): {_unknown_section(section)}"
        else:
            yield _fault(section, table, source, _outside_section(section))


def _from_environ(environ: Mapping[str, str]) -> _Items:
    for variable in sorted(environ):
        if not variable.startswith(PREFIX):
            continue
        section, separator, name = variable.removeprefix(PREFIX).lower().partition("__")
        shown = escape_text(variable, _MAX_SHOWN)
        if not separator:
            # One underscore is a mistake that would leave a setting without effect. ZCPROTO_HOME has no section.
            first, separator, rest = section.partition("_")
            if separator and first in sections():
                yield _fault(
                    f"{first}.{rest}", environ[variable], shown, "two underscores must follow the section"
                )
            continue
        key = f"{section}.{name}"
        outer = key.partition("__")[0]
        accepts = settings().get(key)
        # ZCPROTO_CERTIFICATES__SITE__0__NAMES is an attempt to set a key of a table.
        if outer in settings() and settings()[outer].tables is not None:
            sentence = f"cannot be set by a variable; write [[{outer}]] tables in the file"
            yield _fault(key, environ[variable], shown, sentence)
        elif accepts is not None:
            yield key, _Given(accepts.from_variable(environ[variable]), shown)
        else:
            yield _item(key, environ[variable], shown)


def _item(key: str, value: object, source: str) -> str | tuple[str, _Given]:
    if key in settings():
        return key, _Given(value, source)
    section, name = split_key(key)
    sentence = _unknown_key(key) if section in sections() else _unknown_section(section, name)
    return _fault(key, value, source, sentence)


# --- the wording of faults -----------------------------------------------------------------------------------


def _fault(key: str, value: object, source: str, sentence: str) -> str:
    """Return one fault as a line."""
    return f"{escape_text(key, _MAX_SHOWN)} = {_shown(key, value)} ({source}): {sentence}"


def _shown(key: str, value: object) -> str:
    """Return the value of `key` for people."""
    return "(hidden)" if _is_hidden(key) else escape_text(_text(value), _MAX_SHOWN)


def _written(key: str, value: object) -> str:
    """Return the valid value of `key` as TOML for people."""
    return "(hidden)" if _is_hidden(key) else _ADDRESS.sub(r'\1://(hidden)"', settings()[key].write(value))


def _is_hidden(key: str) -> bool:
    """Return whether the value of `key` may be a secret."""
    # A known key is safe unless it locates a passphrase: certificates.key holds paths.
    secret = _PLACE_OF_SECRET if _INDEX.sub("", key) in keys() else _SECRET
    return secret.search(key) is not None


def _text(value: object, depth: int = 0) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Path):
        return toml_string(str(value))
    if value is None:
        return "(nothing)"
    if isinstance(value, str):
        # An @ may belong to a malformed address, behind a password.
        if _PEM in value or ("@" in value and not _ADDRESS.match(value)):
            return "(hidden)"
        return toml_string(_ADDRESS.sub(r"\1://(hidden)", value[: 2 * _MAX_SHOWN]))
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return "(a huge number)"  # Python refuses to convert the largest ones to text
    if isinstance(value, list | tuple):
        if depth == _MAX_NESTING:
            return "[...]"
        return f"[{', '.join(_text(each, depth + 1) for each in value[:_MAX_SHOWN])}]"
    if isinstance(value, dict):
        return "(a table)"
    return str(value)


_OTHER_NAMES: Final = {
    **dict.fromkeys(
        ("cert", "certfile", "cert_file", "certificate_file", "chain_file"), "certificates.certificate"
    ),
    **dict.fromkeys(("keyfile", "key_file", "private_key", "certificate_key"), "certificates.key"),
}
"""Names that people try for the files of the server's certificate, by those of other servers."""


def _unknown_key(key: str) -> str:
    """Return the sentence for an unknown key of a known section."""
    section, name = split_key(key[: 2 * _MAX_SHOWN])
    if section in ("tls", "server", "certificates") and name in _OTHER_NAMES:
        return f'unknown key; did you mean {_OTHER_NAMES[name]} (with certificates.mode = "files")?'
    known = list(sections()[section].model_fields)
    near = [f"{section}.{each}" for each in nearest(name, known)]
    candidates = _keys_named(name) or near or _nearest_anywhere(name)
    if candidates:
        return f"unknown key; did you mean {' or '.join(candidates)}?"
    return f"unknown key; [{section}] has {', '.join(known)}"


def _unknown_section(section: str, name: str = "") -> str:
    """Return the sentence for an unknown section. `name` is the key in it, if the fault is about one key."""
    near = difflib.get_close_matches(section[: 2 * _MAX_SHOWN], sections(), 1)
    if near and not name:
        return f"unknown section; did you mean [{near[0]}]?"
    is_key = near and f"{near[0]}.{name}" in settings()
    candidates = [f"{near[0]}.{name}"] if is_key else _nearest_anywhere(name)
    if candidates:
        return f"unknown section; did you mean {' or '.join(candidates)}?"
    return f"unknown section; there are {', '.join(sections())}"


def _outside_section(name: str) -> str:
    """Return the sentence for a key above all sections."""
    candidates = _nearest_anywhere(name[: 2 * _MAX_SHOWN])
    if candidates:
        return f"must be in a section; did you mean {' or '.join(candidates)}?"
    return f"must be in a section; the sections are {', '.join(sections())}"


def _keys_named(name: str) -> list[str]:
    return [key for key in settings() if split_key(key)[1] == name]


def _nearest_anywhere(name: str) -> list[str]:
    names = {split_key(key)[1] for key in settings()}
    # Among all names a match by chance is likelier than within one section, so it has to be closer.
    return [key for near in nearest(name, sorted(names), 0.75) for key in _keys_named(near)]


_WIDTH = 100


def config_as_toml(config: Config, without: Config | None = None) -> str:
    """Return all settings with their values, except those that are the same in `without`.

    Reading them gives an equal configuration.
    """
    lines: list[str] = []
    for section, model in sections().items():
        values = getattr(config, section)
        others = None if without is None else getattr(without, section)
        if values == others:
            continue
        lines.append(f"[{section}]")
        tables: list[str] = []  # behind the keys, which would belong to them
        for name, accepts in settings_of(model).items():
            value = getattr(values, name)
            if others is not None and value == getattr(others, name):
                continue
            if accepts.tables is not None and value:
                for table in value:
                    tables += ["", f"[[{section}.{name}]]", *table_lines(table)]
            else:
                lines.append(f"{name} = {accepts.write(value)}")
        lines += [*tables, ""]
    return "\n".join(lines[:-1]) + "\n" if lines else ""


def default_config(home: Path) -> Config:
    """Return the configuration of a home folder without a file."""
    return Config(certificates=CertificatesConfig(directory=Home(home).certs))


def default_config_file(home: Path) -> str:
    """Return a file that describes every key and sets none.

    Each default is a comment: a default that is set would stay when a later version has a better one.
    """
    lines = _comment(
        "Configuration of zcproto. Every key is optional: this file, as it is, changes nothing. Uncomment a"
        " key to set it. An environment variable overrides this file (server.port is"
        " ZCPROTO_SERVER__PORT), and a command-line option overrides both. `zcproto config check` reports all"
        " faults."
    )
    defaults = default_config(home)
    for section, model in sections().items():
        lines += ["", "", *_comment(model.__doc__ or ""), f"[{section}]"]
        lines += _keys(section, model, getattr(defaults, section))
    return "\n".join(lines) + "\n"


def _keys(section: str, model: type[BaseModel], defaults: BaseModel | None) -> list[str]:
    """Return the keys of a section, or of a table, with their defaults; examples for keys that have none."""
    lines: list[str] = []
    for name, accepts in settings_of(model).items():
        field = model.model_fields[name]
        lines += ["", *_comment(descriptions(model)[name]), *_comment(f"Must be {accepts.words}.")]
        if accepts.tables is not None:
            lines += [f"#[[{section}.{name}]]", *_keys(f"{section}.{name}", accepts.tables, None)]
        elif defaults is not None:
            lines.append(f"#{name} = {accepts.write(getattr(defaults, name))}")
        else:
            value = field.examples[0] if field.examples else field.get_default()
            lines.append(f"#{name} = {accepts.write(value)}")
    return lines


def _comment(text: str) -> list[str]:
    return [
        f"# {line}" for line in textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    ]
