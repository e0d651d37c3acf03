"""A value that never shows itself."""

from __future__ import annotations

import hmac
from typing import Generic, NoReturn, TypeVar

_T = TypeVar("_T", bytes, str)


class Secret(Generic[_T]):
    """Holds a token, a key or a passphrase: `repr`, `str`, formatting, logs and tracebacks show a mask.

    `reveal` is the only way to the value, so that each place that uses it can be found by that name.
    Comparing takes the same time for every secret of one length. It cannot be pickled.
    """

    __slots__ = ("_value",)
    _value: _T

    def __init__(self, value: _T) -> None:
        self._value = value

    def reveal(self) -> _T:
        """The value itself."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(hidden)"

    __str__ = __repr__

    def __format__(self, format_spec: str) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(_as_bytes(self._value), _as_bytes(other._value))

    def __hash__(self) -> int:
        return hash(self._value)

    def __len__(self) -> int:
        return len(self._value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled or copied into another process")


def _as_bytes(value: bytes | str) -> bytes:
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
