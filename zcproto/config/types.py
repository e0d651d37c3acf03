"""Define what a key of the configuration accepts: its pydantic schema, the words for it, and its form in TOML.

Numbers, choices, durations, lists and tables come first, then the kinds of text: addresses, names, paths, URLs.

Rules:
- Every text has a maximum length.
- A type accepts the form of a TOML file and its own result, so that values set in Python pass too.
- A message gives what would be right, and never the value.
- All faults in a list or table are reported, each with its place.

Must not know: which keys exist, where a value came from, anything on the disk.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self
from urllib.parse import urlsplit

import tomli
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo
from pydantic_core import CoreSchema, SchemaValidator, core_schema

from zcproto.common.home import MAX_PATH
from zcproto.common.roles import ROLE_WORDS, is_role
from zcproto.common.text import toml_string

MAX_FAULTS: Final = 100
"""Faults reported at once. Each costs a search for the nearest name."""

_MAX_NAME: Final = 120
"""Characters of an unknown key that are compared with known keys."""

_MAX_LONGER: Final = 2
"""A beginning shared by more names suggests none of them."""

_MS: Final = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
# Twelve digits are 31 years in milliseconds; longer numbers would only take time to parse.
_DURATION: Final = re.compile(
    "".join(rf"(?:([0-9]{{1,12}}(?:\.[0-9]{{1,9}})?){unit}(?![a-z]))?" for unit in _MS)
)
INTEGER: Final = re.compile(r"[+-]?[0-9]{1,19}")


# --- faults ----------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """A fault within a value: its place, such as `[2].names[0]`, what stands there, and a sentence."""

    place: str
    value: object
    sentence: str


class FaultsError(ValueError):
    """Faults within a list or a table."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = list(islice(faults, MAX_FAULTS + 1))
        super().__init__("; ".join(f"{fault.place} {fault.sentence}" for fault in self.faults))


def faults_of(error: ValidationError, model: type[BaseModel], table: str) -> Iterator[Fault]:
    """Translate the errors of a model. `table` is the name of its tables in messages: "[[certificates.site]]"."""
    for each in error.errors(include_url=False):
        place = "".join(f".{name}" for name in each["loc"])
        cause = each.get("ctx", {}).get("error")
        if isinstance(cause, FaultsError):
            yield from (Fault(place + fault.place, fault.value, fault.sentence) for fault in cause.faults)
        elif each["type"] == "extra_forbidden":
            yield Fault(place, each["input"], unknown_key(str(each["loc"][0]), model.model_fields, table))
        elif each["type"] == "missing":
            yield Fault(place, None, f"must be {settings_of(model)[str(each['loc'][0])].words}")
        else:
            yield Fault(place, each["input"], each["msg"])


def unknown_key(name: str, known: Iterable[str], table: str) -> str:
    near = nearest(name, known)
    if near:
        return f"unknown key; did you mean {' or '.join(near)}?"
    return f"unknown key; {table} has {', '.join(known)}"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Return the known names that `name` may stand for: those it is the beginning of, or the most similar one."""
    known = list(known)
    name = name[:_MAX_NAME]
    longer = [each for each in known if each.startswith(f"{name}_")]
    if 1 <= len(longer) <= _MAX_LONGER:
        return longer
    return difflib.get_close_matches(name, known, 1, cutoff)


# --- tables ----------------------------------------------------------------------------------------------


class Settings(BaseModel):
    """A frozen table of settings. The docstring below each attribute describes it, see `descriptions`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    if not TYPE_CHECKING:

        def __new__(cls, /, *values: object, **settings: object) -> Self:
            """Raise TypeError for an unknown setting in code; `faults_of` reports those of a file."""
            if values:
                raise TypeError(
                    f"{cls.__name__}: give settings by name, such as {next(iter(cls.model_fields))}=..."
                )
            for name in settings:
                if name not in cls.model_fields:
                    raise TypeError(
                        f"{cls.__name__}: {name} is an {unknown_key(name, cls.model_fields, 'it')}"
                    )
            return super().__new__(cls)


# --- kinds of values -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Accepts:
    """What a key accepts, as metadata of its annotation."""

    words: str
    """What is right, to follow "must be"."""

    schema: CoreSchema
    """How pydantic validates it. Its messages are replaced by "must be" and the words, except for FaultsError."""

    from_variable: Callable[[str], object] = str
    """Returns the text of an environment variable as TOML would give it, or unchanged if it does not fit."""

    none: str = ""
    """How None is written in TOML."""

    bare: bool = False
    """Whether a list of one is written as that value."""

    tables: type[BaseModel] | None = None
    """The model of the tables that stand under the key, if it holds tables."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return self.schema

    def write(self, value: Any) -> str:
        """Return a valid value as TOML."""
        if value is None:
            return toml_string(self.none)
        return to_toml(value[0] if self.bare and len(value) == 1 else value)


def accepts(words: str, schema: CoreSchema, **more: Any) -> Accepts:
    """Replace all messages of a schema by the words."""
    reworded = core_schema.custom_error_schema(schema, "refused", custom_error_message=f"must be {words}")
    return Accepts(words, reworded, **more)


def whole(low: int, high: int, zero: str = "") -> Accepts:
    """Accept a whole number from `low` to `high`; with `zero`, also 0, which stands for what `zero` says."""
    words = f"a whole number from {low} to {high}"
    schema: CoreSchema = core_schema.int_schema(strict=True, ge=low, le=high)
    if zero:
        words += f", or 0 for {zero}"
        schema = core_schema.union_schema([schema, core_schema.int_schema(strict=True, ge=0, le=0)])
    return accepts(words, schema, from_variable=_int_from)


def whole_or_auto(low: int, high: int) -> Accepts:
    """Accept a whole number from `low` to `high`, or "auto", which is None."""
    schema: CoreSchema = core_schema.no_info_before_validator_function(
        lambda value: None if value == "auto" else value,
        core_schema.nullable_schema(core_schema.int_schema(strict=True, ge=low, le=high)),
    )
    words = f'a whole number from {low} to {high}, or "auto"'
    return accepts(words, schema, from_variable=_int_from, none="auto")


def one_of(*choices: str) -> Accepts:
    """Accept one of some words."""
    *others, last = map(toml_string, choices)
    words = f"{', '.join(others)} or {last}" if others else last
    return accepts(words, core_schema.literal_schema(list(choices)))


def duration(low: str, high: str, *, off: bool = False) -> Accepts:
    """Accept text with a unit: float seconds in the program. With `off`, "off" is allowed and is None.

    In Python a number of seconds is accepted too. In a file `timeout = 30` does not say 30 of what: fields named
    in `text_fields` of the validation context must be text.
    """
    least, most = parse_duration(low), parse_duration(high)

    def check(value: object, info: ValidationInfo) -> float | None:
        if off and (value is None or value == "off"):
            return None
        if isinstance(value, str):
            value = parse_duration(value)
        elif info.context is not None and info.field_name in info.context["text_fields"]:
            raise ValueError
        # Written so that NaN, which compares with nothing, is refused.
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ValueError
        return round(value * 1000) / 1000

    words = f'text with a unit (ms, s, m, h, d), from "{low}" to "{high}"' + (', or "off"' if off else "")
    return accepts(words, core_schema.with_info_plain_validator_function(check), none="off")


def text(words: str, is_valid: Callable[[Any], object], read: Callable[[str], Any] = str) -> Accepts:
    """Accept text that `read` can read, and that `is_valid` then."""

    def check(value: object) -> Any:
        if not isinstance(value, str | Path):
            raise ValueError
        return require(is_valid)(read(str(value)))

    return accepts(words, core_schema.no_info_plain_validator_function(check))


def optional(item: Accepts) -> Accepts:
    """Accept "" too, which is None."""
    schema = core_schema.no_info_before_validator_function(
        lambda value: None if value == "" else value, core_schema.nullable_schema(item.schema)
    )
    return accepts(f'{item.words}, or ""', schema)


def list_of(item: Accepts, least: int, most: int, *, bare: bool = False) -> Accepts:
    """Accept a list of `least` to `most` different values: a tuple in the program. With `bare`, also one text."""
    values = core_schema.tuple_schema([item.schema], variadic_item_index=0, min_length=least, max_length=most)
    schema: CoreSchema = core_schema.no_info_after_validator_function(
        require(lambda items: len(set(items)) == len(items)), values
    )
    words = _words_of_list(item, least, most)
    if bare:
        words = f"{item.words}, or a list of up to {most} of them, all different"
        schema = core_schema.no_info_before_validator_function(
            lambda value: (value,) if isinstance(value, str) else value, schema
        )
    return accepts(words, schema, from_variable=partial(_list_from, item), bare=bare)


def each_of(item: Accepts, least: int, most: int) -> Accepts:
    """Accept a long list of different values, as `list_of`; every fault in it is reported with its place."""
    words = _words_of_list(item, least, most)
    validator = SchemaValidator(item.schema)

    def check(values: object) -> tuple[Any, ...]:
        if not isinstance(values, list | tuple) or not least <= len(values) <= most:
            raise FaultsError([Fault("", values, f"must be {words}")])
        items: dict[Any, int] = {}
        faults = []
        for index, value in enumerate(values):
            try:
                first = items.setdefault(validator.validate_python(value), index)
            except ValidationError:
                faults.append(Fault(f"[{index}]", value, f"must be {item.words}"))
                continue
            if first != index:
                faults.append(Fault(f"[{index}]", value, f"is the same as [{first}]; each may appear once"))
        if faults:
            raise FaultsError(faults)
        return tuple(items)

    schema = core_schema.no_info_plain_validator_function(check)
    return Accepts(words, schema, from_variable=partial(_list_from, item))


def tables_of(
    model: type[BaseModel],
    key: str,
    most: int,
    between: Callable[[Mapping[int, Any]], Iterable[Fault]] = lambda tables: (),
    *,
    bare: bool = False,
) -> Accepts:
    """Accept up to `most` tables under [[`key`]]: a tuple of models in the program.

    `between` finds faults between valid tables, by their index. With `bare`, also one table under [`key`].
    """
    words = f"up to {most} tables, each under a line [[{key}]]" + (f", or one under [{key}]" if bare else "")

    def check(tables: object) -> tuple[BaseModel, ...]:
        if bare and isinstance(tables, dict):
            tables = (tables,)
        if not isinstance(tables, list | tuple) or len(tables) > most:
            raise FaultsError([Fault("", tables, f"must be {words}")])
        valid: dict[int, BaseModel] = {}
        error = FaultsError(faults(tables, valid))
        if error.faults:
            raise error
        return tuple(valid.values())

    def faults(tables: Iterable[object], valid: dict[int, BaseModel]) -> Iterator[Fault]:
        for index, table in enumerate(tables):
            if not isinstance(table, Mapping | model):
                yield Fault(f"[{index}]", table, f"must be a table under a line [[{key}]]")
                continue
            try:
                valid[index] = model.model_validate(table)
            except ValidationError as error:
                for fault in faults_of(error, model, f"[[{key}]]"):
                    yield fault._replace(place=f"[{index}]{fault.place}")
        yield from between(valid)

    return Accepts(words, core_schema.no_info_plain_validator_function(check), tables=model)


def settings_of(model: type[BaseModel]) -> dict[str, Accepts]:
    """Return what each key of a model accepts, in their order."""
    return {
        name: next(each for each in field.metadata if isinstance(each, Accepts))
        for name, field in model.model_fields.items()
    }


def table_lines(table: BaseModel) -> list[str]:
    """Return the TOML lines of one table."""
    return [f"{name} = {each.write(getattr(table, name))}" for name, each in settings_of(type(table)).items()]


def _words_of_list(item: Accepts, least: int, most: int) -> str:
    count = f"{least} to" if least else "up to"
    return f"a list of {count} {most} different values, each {item.words}"


def require(is_valid: Callable[[Any], object]) -> Callable[[Any], Any]:
    """Return a validator that passes valid values on."""

    def check(value: Any) -> Any:
        if not is_valid(value):
            raise ValueError
        return value

    return check


# --- values as text --------------------------------------------------------------------------------------


def to_toml(value: object) -> str:
    """Return a value as TOML. A float is a duration."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return toml_string(format_duration(value))
    if isinstance(value, BaseModel):
        return f"{{{', '.join(table_lines(value))}}}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(to_toml, value))}]"
    return toml_string(str(value))


def parse_duration(text: str) -> float:
    """Return a duration in seconds: whole milliseconds, at least 0. Raises ValueError for other text.

    Units are d, h, m, s and ms, each at most once, the largest first: "24h", "500ms", "1h30m".
    """
    match = _DURATION.fullmatch(text)
    if match is None or not text:
        raise ValueError("not a duration")
    parts = zip(match.groups(), _MS.values(), strict=True)
    return round(sum(float(number) * ms for number, ms in parts if number is not None)) / 1000


def format_duration(seconds: float) -> str:
    """Return the shortest text for a duration, in one unit: "90d", "36h", "90m", "1500ms"."""
    ms = round(seconds * 1000)
    if ms == 0:
        return "0s"
    if ms == _MS["d"]:
        return "24h"  # more common than "1d"
    unit = next(unit for unit, size in _MS.items() if ms % size == 0)
    return f"{ms // _MS[unit]}{unit}"


def _int_from(text: str) -> object:
    return int(text) if INTEGER.fullmatch(text.strip()) else text


def _bool_from(text: str) -> object:
    return {"true": True, "false": False}.get(text.strip().lower(), text)


def array_from(text: str) -> object:
    """Parse the text of a variable as a TOML array. Other text is returned unchanged, and refused later."""
    try:
        return tomli.loads(f"value = {text.strip()}")["value"]
    except (ValueError, RecursionError):  # tomli's error for nesting is the latter
        return text


def _list_from(item: Accepts, text: str) -> object:
    """Parse the text of a variable as a TOML array, or as values with commas between them."""
    if text.lstrip().startswith("["):
        return array_from(text)
    return [item.from_variable(part.strip()) for part in text.split(",") if part.strip()]


FLAG: Final = accepts("true or false", core_schema.bool_schema(strict=True), from_variable=_bool_from)


MAX_NETWORK: Final = 49
"""Characters of the longest IPv6 network, with an IPv4 address at its end and a prefix."""

MAX_DNS_NAME: Final = 253
"""Characters of a DNS name without the dot at its end."""

_HOST_NAME: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})")
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
# Base64 of 32 bytes: the last of 43 digits carries four bits only, so its other two are 0.
_PIN: Final = re.compile(r"(cert-)?sha256/[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")
_VARIABLE: Final = re.compile(r"(?!ZCPROTO_)[A-Za-z_][A-Za-z0-9_]{0,127}")
_MAX_CLAIM: Final = 256
"""Characters of the name or of a value of a claim."""

_METHOD_PATTERN: Final = re.compile(r"(?!\Z)[a-z0-9_.]{0,128}\*?")
_EMAIL: Final = re.compile(r"[A-Za-z0-9!#$%&'*+/=^_{|}~.-]{1,64}@[A-Za-z0-9][A-Za-z0-9.-]{0,252}")
_EAB_KID: Final = re.compile(r"[!-~]{0,1024}")
_WEBHOOK: Final = re.compile(r"https?://[!$-~]{1,2000}")
_STORE: Final = re.compile(
    r"memory|sqlite|((redis|rediss|valkey|valkeys)(\+(sentinel|cluster))?|((redis|valkey)\+)?unix)://.{1,1000}"
)


# --- what text is valid ----------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    """Return whether a name or an address always means this machine."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return text.isprintable()


def _is_network(text: str) -> bool:
    if len(text) > MAX_NETWORK or not text.isascii() or "%" in text:
        return False
    ipaddress.ip_network(text)  # raises ValueError
    return True


def _is_certificate_name(text: str) -> bool:
    labels = text.removeprefix("*.").removesuffix(".").split(".")
    is_name = len(text) <= MAX_DNS_NAME + 1 and all(label.replace("-", "").isalnum() for label in labels)
    return is_name or _is_address(text)


def _is_site_name(name: str) -> bool:
    if len(name) > MAX_DNS_NAME:
        return False
    labels = name.split(".")
    if labels[0] == "*":
        labels = labels[1:]
        # `*.com` would cover a whole registry: clients refuse such certificates.
        if len(labels) < 2:
            return False
    # Clients read a name that ends in a number as an IPv4 address (RFC 1123, section 2.1).
    return all(map(_LABEL.fullmatch, labels)) and not _NUMBER.fullmatch(labels[-1])


def _read_path(text: str) -> Path:
    if len(text) > MAX_PATH or not text.isprintable():
        raise ValueError
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~name of an unknown user
        raise ValueError from None


def _is_webhook(text: str) -> bool:
    if text == "":
        return True
    parts = urlsplit(text)
    host, port = parts.hostname or "", parts.port  # both raise ValueError
    return (
        _WEBHOOK.fullmatch(text) is not None
        and port != 0
        and "@" not in parts.netloc
        and (_HOST_NAME.fullmatch(host) is not None or _is_address(host))
        and (parts.scheme == "https" or is_loopback(host))
    )


def is_issuer(text: str) -> bool:
    """Return whether a text is the address of an identity provider."""
    return text != "" and _is_webhook(text) and not {"?", "#"} & {*text}


def _is_command(arguments: tuple[str, ...]) -> bool:
    return all(map(str.isprintable, arguments)) and (not arguments or Path(arguments[0]).is_absolute())


# --- kinds of text ---------------------------------------------------------------------------------------

HOST_NAME: Final = text(
    'an address or a host name, such as "127.0.0.1", "::" or "server.example.com"',
    lambda name: _HOST_NAME.fullmatch(name) or _is_address(name),
)
NETWORK: Final = text(
    'a network or an address, such as "10.0.0.0/8", "2001:db8::/32" or "192.0.2.1", with no bit set behind the'
    " prefix",
    _is_network,
)
CERTIFICATE_NAME: Final = text(
    'a DNS name or an address, such as "server.example.com", "*.example.com" or "192.0.2.1"',
    _is_certificate_name,
)
"""Checked closely when a certificate is issued."""

SITE_NAME: Final = text(
    'a DNS name of letters, digits and hyphens, such as "a.example.com", or "*.example.com", where any one'
    " label may stand for the star",
    _is_site_name,
    lambda name: name.lower().removesuffix("."),
)
"""A name that clients send."""

PIN: Final = text(
    '"sha256/" and 44 characters of base64, for a public key, or "cert-sha256/" and such, for a whole'
    " certificate",
    _PIN.fullmatch,
)
"""The SHA-256 of a public key or of a certificate in its only form: pins are compared as text."""

VARIABLE_NAME: Final = optional(
    text(
        'the name of an environment variable, such as "SERVER_KEY_PASSPHRASE", that does not begin with ZCPROTO_',
        _VARIABLE.fullmatch,
    )
)
FILE_PATH: Final = text(
    'an absolute path, such as "/var/lib/zcproto" or "~/zcproto"', Path.is_absolute, _read_path
)
"""Absolute, since a relative path would mean another file when the server is started elsewhere."""

OPTIONAL_PATH: Final = optional(FILE_PATH)

STORE_URL: Final = text(
    '"sqlite", "memory", or an address that begins with redis://, rediss://, valkey:// or unix://, and with'
    " +sentinel or +cluster for several servers, such as valkey+sentinel://a,b/service",
    lambda url: url.isprintable() and _STORE.fullmatch(url),
)
"""The rest of an address is validated on connect."""

HTTPS_URL: Final = text(
    'an address such as "https://ca.example.com/directory", of printable ASCII and without a user or a fragment',
    lambda url: url.startswith("https:") and _is_webhook(url),
)
EMAIL: Final = text('an e-mail address, such as "admin@example.com"', _EMAIL.fullmatch)
EAB_KID: Final = text('up to 1024 printable characters of ASCII, or ""', _EAB_KID.fullmatch)
WEBHOOK_URL: Final = text(
    'an address such as "https://alerts.example.com/zcproto", of printable ASCII and without a user or a'
    ' fragment; http:// is for this machine alone, such as "http://127.0.0.1:9000/"; or ""',
    _is_webhook,
)
BINDING: Final = text(
    '"off", "exact", or a prefix length such as "24"',
    lambda text: text in ("off", "exact") or (INTEGER.fullmatch(text) and 1 <= int(text) <= 128),
)
"""How much of a client's address a session is bound to."""

COLLECTOR_URL: Final = text(
    'an address such as "https://collector.example.com:4318", of printable ASCII and without a user, a query or a'
    ' fragment; http:// is for this machine alone; or ""',
    lambda url: url == "" or is_issuer(url),
)
SERVICE_NAME: Final = text(
    'a text of up to 128 printable characters, or ""', lambda name: name.isprintable() and len(name) <= 128
)

ISSUER_URL: Final = text(
    'the address of an identity provider, such as "https://login.example.com/realms/staff", of printable ASCII and'
    " without a user, a query or a fragment; http:// is for this machine alone",
    is_issuer,
)

ROLE_NAME: Final = text(f'the name of a role, such as "admin": {ROLE_WORDS}', is_role)

ROLE_OF_CLAIM: Final = text(
    'the name of a role, such as "admin", or a value of the claim, "=" and a role, such as "Finance Team=billing"',
    lambda value: value.isprintable() and len(value) <= _MAX_CLAIM and is_role(value.rpartition("=")[2]),
)

CLAIM_TEXT: Final = text(
    f"a text of 1 to {_MAX_CLAIM} printable characters",
    lambda value: value.isprintable() and 0 < len(value) <= _MAX_CLAIM,
)

USER_PREFIX: Final = text(
    'a text of up to 32 printable characters without spaces, such as "oidc:"',
    lambda value: value.isprintable() and len(value) <= 32 and " " not in value,
)

METHOD_PATTERN: Final = text(
    'the name of a method, such as "invoice.create", or its beginning and a star, such as "invoice.*" or "*"',
    _METHOD_PATTERN.fullmatch,
)

_ARGUMENTS: Final = core_schema.tuple_schema(
    [core_schema.str_schema(strict=True, max_length=4096)], variadic_item_index=0, max_length=64
)
COMMAND: Final = accepts(
    "a list of up to 64 texts, a program by its absolute path and its arguments, such as"
    ' ["/usr/local/bin/page", "--team", "ops"], or []',
    core_schema.no_info_after_validator_function(require(_is_command), _ARGUMENTS),
    from_variable=array_from,  # an argument may contain commas
)
"""A program with its arguments, run without a shell."""


_DECIMAL: Final = re.compile(r"[01](\.[0-9]{1,18})?")


class _Fraction(Accepts):
    """A number from 0 to 1."""

    def write(self, value: Any) -> str:
        return repr(float(value))


_FRACTION_WORDS: Final = "a number from 0 to 1"
FRACTION: Final = _Fraction(
    _FRACTION_WORDS,
    core_schema.custom_error_schema(
        core_schema.float_schema(ge=0, le=1, strict=True, allow_inf_nan=False),
        "refused",
        custom_error_message=f"must be {_FRACTION_WORDS}",
    ),
    from_variable=lambda value: float(value) if _DECIMAL.fullmatch(value.strip()) else value,
)
