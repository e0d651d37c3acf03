"""Decides what one key of the configuration accepts, in which words a wrong value is refused, and how a
value is written as TOML.

Rules: a rule reads the form of a TOML file as well as its own result, so that values set in Python pass too.
A value that belongs to a later version is refused like a wrong one: what is silently ignored would be a
setting that an operator relies on and does not have.

Must not know: which keys there are, where a value came from, anything on the disk.
"""

from __future__ import annotations

import ipaddress
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tomli
from pydantic_core import CoreSchema, core_schema

from zcproto.config.duration import format_duration, parse_duration

MAX_PATH = 4096
"""PATH_MAX of Linux."""

MAX_NETWORK = 49
"""Characters of the longest IPv6 network, with an IPv4 address at its end and a prefix."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
# Base64 of 32 bytes: the last of 43 digits carries four bits only, so its other two are 0.
_PIN = re.compile(r"(cert-)?sha256/[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")
_VARIABLE = re.compile(r"(?!ZCPROTO_)[A-Za-z_][A-Za-z0-9_]{0,127}")
_URL = re.compile(r"https?://[!$-~]{1,2000}")
_STORE = re.compile(
    r"memory|sqlite|((redis|rediss|valkey|valkeys)(\+(sentinel|cluster))?|((redis|valkey)\+)?unix)://.{1,1000}"
)


@dataclass(frozen=True)
class Refusal:
    """A fault within a value: where it is, such as `[2].names[0]`, what stands there, and what to say of it."""

    where: str
    value: object
    sentence: str


class RefusedError(ValueError):
    """A value that its key does not accept. The text says what would be right, and never what was given.

    `refusals` are the faults within a list or a table; empty where the fault is that of the whole value.
    """

    def __init__(self, sentence: str, refusals: Sequence[Refusal] = ()) -> None:
        super().__init__(sentence)
        self.refusals = tuple(refusals)


class _Any:
    """No restriction to one value."""


_ANY = _Any()


@dataclass(frozen=True)
class Rule(ABC):
    """What one key accepts.

    `only` is the one value that this version takes, where later ones take more; `instead` then says what
    to do.
    """

    _: KW_ONLY
    only: Any = _ANY
    instead: str = ""

    @abstractmethod
    def expects(self) -> str:
        """What is right, to follow "must be"."""

    @abstractmethod
    def read(self, value: object) -> Any:
        """The value as the program uses it. Raises RefusedError."""

    def write(self, value: Any) -> str:
        """The value as TOML."""
        return quoted(value)

    def accept(self, value: object) -> Any:
        """As `read`, and nothing that this version lacks. Raises RefusedError."""
        result = self.read(value)
        if self.only is not _ANY and result != self.only:
            raise RefusedError(f"not in this version; {self.instead}")
        return result

    def load(self, value: object) -> Any:
        """As `accept`, for a value from a TOML file or the environment."""
        return self.accept(value)

    def from_environ(self, text: str) -> object:
        """The text of a variable as TOML would give it; text that does not fit stays text, and is refused."""
        return text

    def range(self) -> str:
        """`expects`, narrowed to what this version takes."""
        if self.only is _ANY:
            return self.expects()
        return f"{self.write(self.only)}; no other value is in this version"

    def refused(self) -> RefusedError:
        return RefusedError(f"must be {self.range()}")

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.accept)


@dataclass(frozen=True)
class Whole(Rule):
    """A whole number from `low` to `high`; with `zero`, also 0, which means what `zero` says."""

    low: int
    high: int
    zero: str = ""

    def expects(self) -> str:
        zero = f", or 0 for {self.zero}" if self.zero else ""
        return f"a whole number from {self.low} to {self.high}{zero}"

    def read(self, value: object) -> int:
        # A bool is an int to Python, and no number to anyone else.
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refused()
        if not self.low <= value <= self.high and not (self.zero and value == 0):
            raise self.refused()
        return value

    def write(self, value: int) -> str:
        return str(value)

    def from_environ(self, text: str) -> object:
        return int(text) if _INTEGER.fullmatch(text.strip()) else text


@dataclass(frozen=True)
class Flag(Rule):
    """true or false."""

    def expects(self) -> str:
        return "true or false"

    def read(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise self.refused()
        return value

    def write(self, value: bool) -> str:
        return "true" if value else "false"

    def from_environ(self, text: str) -> object:
        return {"true": True, "false": False}.get(text.strip().lower(), text)


@dataclass(frozen=True)
class Choice(Rule):
    """One of some words."""

    words: tuple[str, ...]

    def expects(self) -> str:
        return _either([quoted(word) for word in self.words])

    def read(self, value: object) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise self.refused()
        return value


@dataclass(frozen=True)
class Duration(Rule):
    """Text with a unit; float seconds in the program. With `off`, "off" is allowed and is None."""

    low: str
    high: str
    off: bool = False

    def expects(self) -> str:
        off = ', or "off"' if self.off else ""
        return f'text with a unit (ms, s, m, h, d), from "{self.low}" to "{self.high}"{off}'

    def read(self, value: object) -> float | None:
        if self.off and (value is None or value == "off"):
            return None
        seconds: float | None = None
        if isinstance(value, str):
            seconds = parse_duration(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            seconds = value
        # Written so that NaN, which compares with nothing, is refused.
        if seconds is None or not _seconds(self.low) <= seconds <= _seconds(self.high):
            raise self.refused()
        return round(seconds * 1000) / 1000

    def load(self, value: object) -> Any:
        # In a file, `timeout = 30` does not say 30 of what.
        if not isinstance(value, str):
            raise self.refused()
        return self.accept(value)

    def write(self, value: float | None) -> str:
        return '"off"' if value is None else quoted(format_duration(value))


@dataclass(frozen=True)
class HostName(Rule):
    """An address or a name to listen on."""

    def expects(self) -> str:
        return 'an address or a host name, such as "127.0.0.1", "::" or "server.example.com"'

    def read(self, value: object) -> str:
        if isinstance(value, str) and (_HOST_NAME.fullmatch(value) or _is_address(value)):
            return value
        raise self.refused()


@dataclass(frozen=True)
class NetworkAddress(Rule):
    """A network or a single address, written as its prefix demands."""

    def expects(self) -> str:
        return (
            'a network or an address, such as "10.0.0.0/8", "2001:db8::/32" or "192.0.2.1", with no bit set'
            " behind the prefix"
        )

    def read(self, value: object) -> str:
        if isinstance(value, str) and len(value) <= MAX_NETWORK and value.isascii() and "%" not in value:
            try:
                ipaddress.ip_network(value)
            except ValueError:
                pass
            else:
                return value
        raise self.refused()


@dataclass(frozen=True)
class CertificateName(Rule):
    """A DNS name or an address for a certificate. Looked at closely only when one is issued."""

    def expects(self) -> str:
        return 'a DNS name or an address, such as "server.example.com", "*.example.com" or "192.0.2.1"'

    def read(self, value: object) -> str:
        if isinstance(value, str) and (_is_address(value) or self._is_name(value)):
            return value
        raise self.refused()

    @staticmethod
    def _is_name(value: str) -> bool:
        if not 1 <= len(value) <= 254 or not value.isprintable():
            return False
        labels = value.removeprefix("*.").removesuffix(".").split(".")
        return all(label.replace("-", "").isalnum() for label in labels)


@dataclass(frozen=True)
class SiteName(Rule):
    """A DNS name that clients ask for; in lower case and without a dot at the end in the program."""

    def expects(self) -> str:
        return (
            'a DNS name of letters, digits and hyphens, such as "a.example.com", or "*.example.com", where any'
            " one label may stand for the star"
        )

    def read(self, value: object) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= 254 or not value.isascii():
            raise self.refused()
        name = value.lower().removesuffix(".")
        labels = name.split(".")
        if labels[0] == "*":
            labels = labels[1:]
            # `*.com` would be a name for a whole registry: clients take no such certificate.
            if len(labels) < 2:
                raise self.refused()
        # Clients read a name that ends in a number as an IPv4 address (RFC 1123 section 2.1).
        if len(name) > 253 or not all(map(_LABEL.fullmatch, labels)) or _NUMBER.fullmatch(labels[-1]):
            raise self.refused()
        return name


@dataclass(frozen=True)
class Pin(Rule):
    """The SHA-256 of a public key or of a whole certificate, in its one form: pins are compared as text."""

    def expects(self) -> str:
        return (
            '"sha256/" and 44 characters of base64, for a public key, or "cert-sha256/" and such, for a'
            " whole certificate"
        )

    def read(self, value: object) -> str:
        if not isinstance(value, str) or not _PIN.fullmatch(value):
            raise self.refused()
        return value


@dataclass(frozen=True)
class VariableName(Rule):
    """The name of an environment variable; "" is None. Those of zcproto are settings, never read for this."""

    def expects(self) -> str:
        return (
            'the name of an environment variable, such as "SERVER_KEY_PASSPHRASE", that does not begin with'
            ' ZCPROTO_, or ""'
        )

    def read(self, value: object) -> str | None:
        if value is None or value == "":
            return None
        if not isinstance(value, str) or not _VARIABLE.fullmatch(value):
            raise self.refused()
        return value

    def write(self, value: str | None) -> str:
        return quoted(value or "")


@dataclass(frozen=True)
class FilePath(Rule):
    """An absolute path, or one that begins with ~. With `empty`, "" is allowed and is None."""

    empty: bool = False

    def expects(self) -> str:
        empty = ', or ""' if self.empty else ""
        return f'an absolute path, such as "/var/lib/zcproto" or "~/zcproto"{empty}'

    def read(self, value: object) -> Path | None:
        if self.empty and (value is None or value == ""):
            return None
        if isinstance(value, Path):
            value = str(value)
        # A relative path would mean another file whenever the server is started elsewhere.
        if not isinstance(value, str) or not 1 <= len(value) <= MAX_PATH or not value.isprintable():
            raise self.refused()
        try:
            path = Path(value).expanduser()
        except RuntimeError:  # ~name of a user who is not there
            raise self.refused() from None
        if not path.is_absolute():
            raise self.refused()
        return path

    def write(self, value: Path | None) -> str:
        return '""' if value is None else quoted(str(value))


@dataclass(frozen=True)
class StoreUrl(Rule):
    """Where sessions are kept. The rest of an address is looked at by whoever connects."""

    def expects(self) -> str:
        return (
            '"sqlite", "memory", or an address that begins with redis://, rediss://, valkey:// or unix://, and'
            " with +sentinel or +cluster for several servers, such as valkey+sentinel://a,b/service"
        )

    def read(self, value: object) -> str:
        if not isinstance(value, str) or not _STORE.fullmatch(value) or not value.isprintable():
            raise self.refused()
        return value


@dataclass(frozen=True)
class WebhookUrl(Rule):
    """Where messages are sent to by HTTPS. "" is none."""

    def expects(self) -> str:
        return (
            'an address such as "https://alerts.example.com/zcproto", of printable ASCII and without a user or a'
            ' fragment; http:// is for this machine alone, such as "http://127.0.0.1:9000/"; or ""'
        )

    def read(self, value: object) -> str:
        if value == "":
            return ""
        if not isinstance(value, str) or not _URL.fullmatch(value):
            raise self.refused()
        try:
            parts = urlsplit(value)
            host, port = parts.hostname, parts.port
        except ValueError:  # a port or an address in brackets that is none
            raise self.refused() from None
        if (
            not host
            or port == 0
            or "@" in parts.netloc
            or not (_HOST_NAME.fullmatch(host) or _is_address(host))
        ):
            raise self.refused()
        if parts.scheme == "http" and not is_loopback(host):
            raise self.refused()
        return value


@dataclass(frozen=True)
class Arguments(Rule):
    """A program with its arguments, run without a shell. [] is none."""

    most: int = 64
    longest: int = 4096

    def expects(self) -> str:
        return (
            f"a list of up to {self.most} texts, a program by its absolute path and its arguments, such as"
            ' ["/usr/local/bin/page", "--team", "ops"], or []'
        )

    def read(self, value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or len(value) > self.most:
            raise self.refused()
        for argument in value:
            if not isinstance(argument, str) or len(argument) > self.longest or not argument.isprintable():
                raise self.refused()
        if value and not Path(value[0]).is_absolute():
            raise self.refused()
        return tuple(value)

    def write(self, value: tuple[str, ...]) -> str:
        return f"[{', '.join(map(quoted, value))}]"

    def from_environ(self, text: str) -> object:
        """A TOML array: commas may be in an argument."""
        return array_from_environ(text)


@dataclass(frozen=True)
class Binding(Rule):
    """How much of an address a session is bound to."""

    def expects(self) -> str:
        return '"off", "exact", or a prefix length such as "24"'

    def read(self, value: object) -> str:
        if isinstance(value, str) and (
            value in ("off", "exact") or (_INTEGER.fullmatch(value) and 1 <= int(value) <= 128)
        ):
            return value
        raise self.refused()


@dataclass(frozen=True)
class ListOf(Rule):
    """A list of `least` to `most` different values; a tuple in the program.

    With `bare`, also one alone. With `each`, every fault is told by the place where it stands: for long lists.
    """

    item: Rule
    least: int
    most: int
    bare: bool = False
    each: bool = False

    def expects(self) -> str:
        if self.bare:
            return f"{self.item.expects()}, or a list of up to {self.most} of them, all different"
        count = f"{self.least} to" if self.least else "up to"
        return f"a list of {count} {self.most} different values, each {self.item.expects()}"

    def read(self, value: object) -> tuple[Any, ...]:
        values = value if isinstance(value, list | tuple) else (value,) if self.bare else None
        if values is None or not self.least <= len(values) <= self.most:
            raise self.refused()
        items: dict[Any, int] = {}
        refusals: list[Refusal] = []
        for index, given in enumerate(values):
            try:
                first = items.setdefault(self.item.read(given), index)
            except RefusedError as error:
                refusals.append(Refusal(f"[{index}]", given, str(error)))
                continue
            if first != index:
                refusals.append(
                    Refusal(f"[{index}]", given, f"is the same as [{first}]; each may stand once")
                )
        if refusals:
            raise RefusedError(str(self.refused()), refusals if self.each else ())
        return tuple(items)

    def write(self, value: tuple[Any, ...]) -> str:
        if self.bare and len(value) == 1:
            return self.item.write(value[0])
        return f"[{', '.join(self.item.write(each) for each in value)}]"

    def from_environ(self, text: str) -> object:
        """A TOML array, or values with commas between them."""
        if text.lstrip().startswith("["):
            return array_from_environ(text)
        return [self.item.from_environ(part.strip()) for part in text.split(",") if part.strip()]


def array_from_environ(text: str) -> object:
    """A variable's text as a TOML array; text that is none stays text, and is refused."""
    try:
        return tomli.loads(f"value = {text.strip()}")["value"]
    except (ValueError, RecursionError):  # tomli's error for nesting is the latter
        return text


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, wherever it is asked."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def quoted(text: str) -> str:
    """`text` as a TOML basic string. It must be printable, as every text that a rule lets in is."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _seconds(text: str) -> float:
    seconds = parse_duration(text)
    assert seconds is not None
    return seconds


def _is_address(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return value.isprintable()
