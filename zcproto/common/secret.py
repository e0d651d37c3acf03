"""Hold tokens, keys, pairing codes and passphrases so that they are not shown by accident.

`SecretBytes` and `SecretText` are bytes and text, for values that are often sent, compared, hashed and sliced. They
are masked by `repr`, `str` and formatting, and so in logs, tracebacks and messages. Slices and concatenations are
plain: use them immediately. `Secret` is neither bytes nor text, and only `reveal` returns its value. Use it for
long-lived values with few users, such as the secret of a webhook.
"""

from __future__ import annotations

from typing import Final, NoReturn, Self

_MASK: Final = "Secret(hidden)"


class _Masked:
    """Mask `repr`, `str` and formatting."""

    __slots__ = ()

    def __repr__(self) -> str:
        return _MASK

    __str__ = __repr__

    def __format__(self, format_spec: str) -> str:
        return _MASK


class Secret(_Masked):
    """Text that `repr`, `str` and formatting mask, and that cannot be pickled.

    Only `reveal` returns the value, so that each use can be found by that name.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value."""
        return self._value

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled or copied into another process")


class SecretBytes(_Masked, bytes):
    """Bytes with a masked representation."""

    __slots__ = ()


class SecretText(_Masked, str):
    """Text with a masked representation."""

    __slots__ = ()

    def __new__(cls, value: str) -> Self:
        return super().__new__(cls, value[:])  # str() of a SecretText would be the mask

    def reveal(self) -> str:
        """Return the value as plain text, to show it to its owner."""
        return self[:]
