"""Render exceptions for a log: message, causes and traceback, without secrets and within bounds.

Rules:
- Values of variables are never read. Messages, notes and source lines are written, with everything masked that has
  the form of a secret (`masked`): a message may quote what a peer has sent.
- An exception, its causes and the members of groups are rendered as Python does, the raised one last.
- A traceback shows the code of the application without the calls inside this package that lead to it.
- Frames, exceptions, messages and the whole are bounded.

Must not know: how a line is written, how often.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

MASK: Final = "(hidden)"

MAX_FRAMES: Final = 16
"""Frames of one exception; the innermost are kept."""

_READ_FRAMES: Final = 64

MAX_EXCEPTIONS: Final = 8
"""Exceptions of one traceback: the raised one, its causes, the members of groups."""

MAX_MESSAGE: Final = 1024
MAX_MESSAGE_LINES: Final = 16
MAX_NOTES: Final = 4
MAX_SOURCE: Final = 160
MAX_PATH: Final = 256

MAX_TRACEBACK: Final = 12_000
"""Characters of a traceback as JSON, so that its line stays below the limit of a line."""

_READ: Final = 4 * MAX_MESSAGE
"""Characters of a message that are read."""

_PART: Final = 256
"""Characters before the end of what was read that may belong to a part of a secret, which has no form."""

_PACKAGE: Final = f"{Path(__file__).parents[1]}/"

_CAUSE: Final = "The above exception was the direct cause of the following exception:"
_CONTEXT: Final = "During handling of the above exception, another exception occurred:"

_RUN: Final = re.compile(r"[A-Za-z0-9_+/-]{16,}={0,2}")
_PIN: Final = re.compile(r"(?:cert-)?sha256/[A-Za-z0-9+/]{43}=")
_PADDED: Final = re.compile(r"[A-Za-z0-9+/_-]{16,}={1,2}")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]{40,}")
_HEX: Final = re.compile(r"[0-9A-Fa-f]{32,}")
_PIECE: Final = re.compile(r"[A-Za-z0-9_-]{24,}")
_NOT_TEXT: Final = re.compile(r"\\x[0-9A-Fa-f]{2}|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_START: Final = r"(?:(?<![\w-])|(?<=\\[nrt]))"
"""The beginning of a word, also behind an escaped character: the message of a KeyError is quoted."""

_BYTES: Final = re.compile(
    r"""(?:(?<![\w"'])|(?<=\\[nrt]))b(["'])(?:\\.|(?!\1)[^\\]){8,}(?:\1|\\?\Z)""", re.DOTALL
)
_QUOTED: Final = r"""(?P<quote>["'])(?:\\.|(?!(?P=quote))[^\\])*(?:(?P=quote)|\\?\Z)"""
_NAMED: Final = (
    r"(?P<name>(?:token|key|secret|passw(?:or)?d|passphrase|signature|credentials?)"
    r"""["']?\s{0,4}[:=]{1,2}\s{0,4})"""
)


def _keep_name(found: re.Match[str]) -> str:
    return found["name"] + MASK


_FORMS: Final[tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...]] = (
    (re.compile(r"-----BEGIN [^-]{1,64}-----.*?(?:-----END [^-]{1,64}-----|\Z)", re.DOTALL), MASK),
    (re.compile(r"""(?<=://)[^\s/@"']{1,512}@"""), f"{MASK}@"),
    (
        re.compile(r"(?P<name>(?:authorization|cookie)\b[^\r\n:=]{0,4}[:=])[^\r\n]*", re.IGNORECASE),
        _keep_name,
    ),
    (re.compile(_NAMED + _QUOTED, re.IGNORECASE | re.DOTALL), _keep_name),
    (re.compile(r"(?:[0-9A-Fa-f]{2}[: -]){7,}[0-9A-Fa-f]{2}"), MASK),
    (re.compile(r"(?:\d{1,3},\s?){15,}\d{1,3}"), MASK),
    # 32 bytes as base64, also at the end of a path. The pin of a public key is public.
    (re.compile(r"(?<!sha256/)[A-Za-z0-9+/_-]{43}=(?!=)"), MASK),
    # The codes of `zcproto pair`, in the form in which they are printed.
    (re.compile(_START + r"[0-9A-HJKMNP-TV-Z]{4}-[0-9A-HJKMNP-TV-Z]{4}(?![\w-])"), MASK),
)
"""Forms of secrets in messages and in source lines, each with its replacement."""

_NAMED_WORD: Final = re.compile(_NAMED + r"""[^\s,;(){}\[\]"']{1,4096}""", re.IGNORECASE)
"""An unquoted word behind the name of a secret: in a message, as in source it is an expression."""


def masked(text: str, *, is_source: bool = False) -> str:
    """Return a message, or a line of source, with everything masked that has the form of a secret.

    Forms are: tokens and keys as base64, base64url, hex, bytes or a list of numbers, PEM, pairing codes, passwords
    in URLs, and what follows the name of a secret. A message that is not text is masked as a whole.
    """
    text = _BYTES.sub("(bytes)", text)
    if not is_source and _NOT_TEXT.search(text):
        return f"({len(text)} characters that are not text)"
    for form, replacement in _FORMS:
        text = form.sub(replacement, text)
    if not is_source:
        text = _NAMED_WORD.sub(_keep_name, text)
    return _RUN.sub(_masked_run, text)


def _masked_run(found: re.Match[str]) -> str:
    """Mask a run of base64 characters, or the parts of a path in it, if they look random."""
    run = found[0]
    if _PIN.fullmatch(run):
        return run
    if (len(run) % 4 == 0 and _PADDED.fullmatch(run)) or (_BASE64.fullmatch(run) and _looks_random(run, 4)):
        return MASK
    return _PIECE.sub(_masked_piece, run)


def _masked_piece(found: re.Match[str]) -> str:
    piece = found[0]
    is_name = piece.islower() and not any(map(str.isdigit, piece))
    is_long = len(piece) >= 40 and not is_name
    return MASK if is_long or _HEX.fullmatch(piece) or _looks_random(piece, 2) else piece


def _looks_random(text: str, least: int) -> bool:
    """Return whether a text has digits, and letters of both cases or capitals alone, `least` of each."""
    digits = sum(map(str.isdigit, text))
    upper = sum(map(str.isupper, text))
    return digits >= 2 and upper >= least and (text.upper() == text or sum(map(str.islower, text)) >= least)


# --- messages --------------------------------------------------------------------------------------------


def message_of(error: BaseException) -> str:
    """Return the message of an exception, masked and bounded. It may have several lines."""
    try:
        text = str(error)
    except Exception:  # of the application's class
        return "(its message cannot be read)"
    return _masked_message(text)


def _masked_message(text: str) -> str:
    text = _masked_part(text)
    is_wide = len(json.dumps(text[:MAX_MESSAGE])) > 4 * MAX_MESSAGE  # up to 12 characters for each
    limit = MAX_MESSAGE // 4 if is_wide else MAX_MESSAGE
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _masked_part(text: str, *, is_source: bool = False) -> str:
    """Mask the beginning of a text."""
    part = masked(text[:_READ], is_source=is_source)
    return part if len(text) <= _READ else part[:-_PART] + "..."


def summary(error: BaseException) -> str:
    """Return the type of an exception and the first line of its message."""
    return _named(type(error).__name__, message_of(error).partition("\n")[0])


def _named(name: str, message: str) -> str:
    return f"{name}: {message}" if message else name


# --- tracebacks ------------------------------------------------------------------------------------------


def traceback_lines(error: BaseException) -> list[str]:
    """Return the lines of a traceback, without those of the import system."""
    return _within_bounds(_Traceback().lines(error))


def _within_bounds(lines: list[str]) -> list[str]:
    """Leave out the middle of a traceback that is too long: the end says most, then the first cause."""
    sizes = [len(json.dumps(line)) + 1 for line in lines]
    if sum(sizes) <= MAX_TRACEBACK:
        return lines
    head = _fitting(sizes, MAX_TRACEBACK // 3)
    tail = _fitting(reversed(sizes), MAX_TRACEBACK // 2)
    return [*lines[:head], f"({len(lines) - head - tail} lines are left out)", *lines[len(lines) - tail :]]


def _fitting(sizes: Iterable[int], limit: int) -> int:
    """Return how many of these sizes fit within the limit."""
    count = 0
    for size in sizes:
        limit -= size
        if limit < 0:
            break
        count += 1
    return count


class _Traceback:
    """The rendering of one exception with all that belongs to it. `_seen` bounds it, and ends a circle."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def lines(self, error: BaseException | None) -> list[str]:
        chain: list[tuple[BaseException, str]] = []
        link = ""
        while error is not None and id(error) not in self._seen and len(self._seen) < MAX_EXCEPTIONS:
            self._seen.add(id(error))
            chain.append((error, link))
            if error.__cause__ is not None:
                error, link = error.__cause__, _CAUSE
            else:
                error, link = None if error.__suppress_context__ else error.__context__, _CONTEXT
        lines = []
        for each, link in reversed(chain):
            lines += self._own_lines(each)
            if link:
                lines.append(link)
        return lines

    def _own_lines(self, error: BaseException) -> list[str]:
        lines = [*_frames(error), *_messages(error)]
        if isinstance(error, BaseExceptionGroup):
            for number, member in enumerate(error.exceptions, 1):
                inner = self.lines(member)
                if not inner:
                    break
                lines.append(f"Exception {number} of {len(error.exceptions)} in the group:")
                lines += [f"  {line}" for line in inner]
        return lines


def _frames(error: BaseException) -> list[str]:
    frames = _without_calls(traceback.extract_tb(error.__traceback__, limit=-_READ_FRAMES))[-MAX_FRAMES:]
    lines = ["Traceback (most recent call last):"] if frames else []
    for frame in frames:
        lines.append(
            f'  File "{frame.filename[-MAX_PATH:]}", line {frame.lineno}, in {frame.name[:MAX_PATH]}'
        )
        if frame.line:
            lines.append(f"    {_source(frame.line)}")
    return lines


def _without_calls(frames: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Leave out the import system, and this package where it calls other code; its own faults stay."""
    within = [frame.filename.startswith(_PACKAGE) for frame in frames]
    last = max((index for index, is_within in enumerate(within) if not is_within), default=-1)
    return [
        frame
        for index, frame in enumerate(frames)
        if (index > last or not within[index]) and not frame.filename.startswith("<frozen importlib")
    ]


def _source(line: str) -> str:
    line = _masked_part(line, is_source=True)
    return line if len(line) <= MAX_SOURCE else line[: MAX_SOURCE - 3] + "..."


def _messages(error: BaseException) -> list[str]:
    kind = type(error)
    name = (
        kind.__qualname__
        if kind.__module__ in ("builtins", "__main__")
        else f"{kind.__module__}.{kind.__qualname__}"
    )
    texts = [_named(name[-MAX_PATH:], message_of(error))]
    if isinstance(error, SyntaxError) and error.text:
        texts.insert(0, f'  File "{error.filename}", line {error.lineno}')
        texts.insert(1, f"    {_source(error.text.strip())}")
    notes = getattr(error, "__notes__", None)
    if isinstance(notes, list):
        texts += [_masked_message(note) for note in notes[:MAX_NOTES] if isinstance(note, str)]
    return [line for text in texts for line in text.split("\n")[:MAX_MESSAGE_LINES]]
