"""Values that never show themselves: tokens, keys, pairing codes, passphrases.

`SecretBytes` and `SecretText` are bytes and text, for what is sent, compared, hashed and cut as such many times;
they hide in `repr`, `str` and formatting, and thereby in logs, tracebacks and messages. What is made of a part of
one, or of one and something else, is plain again: use that at once. `Secret` is neither bytes nor text: nothing but
`reveal` leads to what it holds. It is for what is kept long and used in few places, as the secret of a webhook.
"""

from __future__ import annotations

import hmac
from typing import Final, Generic, NoReturn, Self, TypeVar

_T = TypeVar("_T", bytes, str)
_MASK: Final = "Secret(hidden)"


class Secret(Generic[_T]):
    """Holds a secret: `repr`, `str`, formatting, logs and tracebacks show a mask.

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
        return _MASK

    __str__ = __repr__

    def __format__(self, format_spec: str) -> str:
        return _MASK

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


class SecretBytes(bytes):
    """Bytes that do not show themselves."""

    __slots__ = ()

    def reveal(self) -> bytes:
        """The same as plain bytes."""
        return self[:]

    def __repr__(self) -> str:
        return _MASK

    __str__ = __repr__

    def __format__(self, format_spec: str) -> str:
        return _MASK


class SecretText(str):
    """Text that does not show itself."""

    __slots__ = ()

    def __new__(cls, value: str) -> Self:
        return super().__new__(cls, value[:])  # `str` of one that hides itself already would be the mask

    def reveal(self) -> str:
        """The same as plain text, to be shown to whom it is for."""
        return self[:]

    def __repr__(self) -> str:
        return _MASK

    __str__ = __repr__

    def __format__(self, format_spec: str) -> str:
        return _MASK


def _as_bytes(value: bytes | str) -> bytes:
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
