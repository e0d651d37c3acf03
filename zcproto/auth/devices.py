"""The file of devices, `devices.toml`: names, whose they are, their public keys.

    [devices.laptop]
    user = "alice"
    public_key = "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"
    added = 2026-01-01T12:00:00Z

What this file decides: how devices are read, added and removed, and which of them are gone.

Rules:
- A device has a name of its own, whoever's it is. Its public key is one of Ed25519, 32 bytes.
- The file is its owner's alone, and replaced in one step (private_text.py). It is written whole: comments in it
  do not stay.
- Reading keeps the devices known before if the file has any fault; every fault is told.
- A device whose user or key is another one now is gone, as one that was removed is.

It must not know: sessions, who tries to log in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from zcproto.auth.current_file import CurrentFile
from zcproto.auth.ed25519 import is_public_key
from zcproto.auth.names import name_faults, quoted, toml_key, toml_string
from zcproto.auth.private_text import LOCK_WAIT_S, NOT_READ, PrivateText
from zcproto.common.watcher import NO_FILE, Identity
from zcproto.errors import AlreadyExists, ConfigError, NotFound
from zcproto.sessions.token import token_from_text, token_text

MAX_FILE_BYTES: Final = 64 << 20
"""About 400,000 devices; anything larger is another kind of file."""

_HEADER: Final = "# The devices that may open sessions. Written by zcproto: comments do not stay.\n"
_DEVICE_KEYS: Final = ("user", "public_key", "added")


class Device(NamedTuple):
    """What is kept of a device."""

    user: str
    public_key: bytes
    added: datetime
    """Aware, in UTC."""


class DeviceFile:
    """Devices in a file. Making one touches nothing; `load` reads. Faults raise ConfigError."""

    __slots__ = ("_file", "_stamp", "devices")

    def __init__(self, path: str | os.PathLike[str], *, lock_wait_s: float = LOCK_WAIT_S) -> None:
        self._file = PrivateText(path, "file of devices", max_bytes=MAX_FILE_BYTES, lock_wait_s=lock_wait_s)
        self._stamp = NOT_READ
        self.devices: Mapping[str, Device] = {}
        """Those known, by name, in the order of the file. It is another mapping after each change."""

    def __repr__(self) -> str:
        return f"DeviceFile({str(self.path)!r})"

    def __len__(self) -> int:
        return len(self.devices)

    @property
    def path(self) -> Path:
        return self._file.path

    def find(self, name: str) -> Device | None:
        return self.devices.get(name)

    def names(self) -> list[str]:
        """The names in the file now. What is known here stays as it is."""
        return list(self._read()[1])

    # Reading

    def load(self) -> None:
        """Read the file. If there is none, there are no devices yet."""
        self._stamp, self.devices = self._read()

    def changed(self) -> bool:
        """Whether the file is another one than was read last. Takes one stat, and never raises."""
        return self._file.look() != self._stamp

    def reload(self) -> None:
        """Read the file again. After any fault, and if it is gone, the devices known before stay known.

        The fault is raised once: `changed` is False then until the file changes again.
        """
        stamp = self._file.look()
        try:
            stamp, devices = self._read()
            if stamp == NO_FILE and self.devices:
                raise self._file.fault("is gone; the devices known before stay known until the server ends")
            self.devices = devices
        finally:
            # Last: whoever finds the file unchanged must find its devices.
            self._stamp = stamp

    def _read(self) -> tuple[Identity, dict[str, Device]]:
        stamp, text = self._file.read()
        return stamp, self._parse(text)

    def _parse(self, text: str) -> dict[str, Device]:
        document = self._file.document(text)
        tables = document.pop("devices", {})
        faults = [f"unknown key {quoted(key)}; only tables [devices.NAME] belong here" for key in document]
        devices: dict[str, Device] = {}
        if isinstance(tables, dict):
            for name, table in tables.items():
                found = _device_faults(name, table)
                faults += [f"device {quoted(name)}: {fault}" for fault in found]
                if not found:
                    public_key = token_from_text(table["public_key"])
                    assert public_key is not None
                    devices[name] = Device(table["user"], public_key, table["added"].astimezone(UTC))
        else:
            faults.append("devices must be tables: [devices.NAME]")
        if faults:
            raise self._file.fault(*faults)
        return devices

    # Writing. What is known here stays as it is: a change is seen by reading again, whoever made it.

    def add(self, name: str, user: str, public_key: bytes, added: datetime) -> None:
        """Add a device. Raises AlreadyExists for a name that is taken."""
        faults = [*name_faults(name), *name_faults(user)]
        if not is_public_key(public_key):
            faults.append("its public key is none of Ed25519")
        if faults:
            raise self._file.fault(*(f"device {quoted(name)}: {fault}" for fault in faults))
        with self._file.locked():
            _, devices = self._read()
            if name in devices:
                raise AlreadyExists(f"there is a device {quoted(name)} already; choose another name")
            self._write({**devices, name: Device(user, public_key, added.astimezone(UTC))})

    def remove(self, name: str) -> Device:
        """Remove a device; what it was. Raises NotFound if there is none of this name."""
        with self._file.locked():
            _, devices = self._read()
            if name not in devices:
                raise NotFound(f"there is no device {quoted(name)}")
            device = devices.pop(name)
            self._write(devices)
        return device

    def _write(self, devices: dict[str, Device]) -> None:
        text = _HEADER + "".join(_entry(name, device) for name, device in devices.items())
        self._parse(text)
        self._file.replace(text)


class CurrentDevices(CurrentFile):
    """Devices as they are in their file now: it is looked at whenever a device is sought, and by `refresh`.

    `on_gone` is called, between two turns of the loop, with the devices that were removed or became others.
    """

    __slots__ = ("_file", "_known", "_on_gone")

    def __init__(
        self,
        file: DeviceFile,
        *,
        on_fault: Callable[[ConfigError], None],
        on_recovered: Callable[[], None] | None = None,
        on_gone: Callable[[Mapping[str, Device]], None] = lambda devices: None,
    ) -> None:
        super().__init__(file, on_fault=on_fault, on_recovered=on_recovered)
        self._file = file
        self._known = file.devices
        self._on_gone = on_gone

    async def find(self, name: str) -> Device | None:
        await self.refresh()
        return self._file.find(name)

    def known(self, name: str) -> Device | None:
        """A device as of the last look at the file."""
        return self._file.find(name)

    def _was_read(self) -> None:
        before, self._known = self._known, self._file.devices
        gone = gone_between(before, self._known)
        if gone:
            self._on_gone(gone)


def gone_between(before: Mapping[str, Device], now: Mapping[str, Device]) -> dict[str, Device]:
    """Those of the devices before whose name has nobody now, or another user or key."""
    return {
        name: device
        for name, device in before.items()
        if (other := now.get(name)) is None
        or (other.user, other.public_key) != (device.user, device.public_key)
    }


def _device_faults(name: str, table: Any) -> list[str]:
    """What is wrong with one device's table."""
    if not isinstance(table, dict):
        return [f"must be a table with {', '.join(_DEVICE_KEYS)}"]
    faults = name_faults(name)
    user, public_key, added = (table.get(key) for key in _DEVICE_KEYS)
    if not isinstance(user, str) or name_faults(user):
        faults.append("user must be the name of a user")
    raw = token_from_text(public_key) if isinstance(public_key, str) else None
    if raw is None or not is_public_key(raw):
        faults.append("public_key must be 43 characters of base64url, a public key of Ed25519")
    if not isinstance(added, datetime) or not _is_moment(added):
        faults.append("added must be a date and time with an offset, such as 2026-01-01T12:00:00Z")
    faults += [
        f"unknown key {quoted(key)}; it takes {', '.join(_DEVICE_KEYS)}"
        for key in table
        if key not in _DEVICE_KEYS
    ]
    return faults


def _is_moment(value: datetime) -> bool:
    try:
        value.astimezone(UTC)
    except OverflowError:
        return False
    return value.tzinfo is not None


def _entry(name: str, device: Device) -> str:
    """One device as TOML."""
    return (
        f"\n[devices.{toml_key(name)}]\n"
        f"user = {toml_string(device.user)}\n"
        f'public_key = "{token_text(device.public_key)}"\n'
        f"added = {device.added.replace(microsecond=0, tzinfo=None).isoformat()}Z\n"
    )
