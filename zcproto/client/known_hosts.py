"""Hosts that announced an `sts` policy, to which verification stays on until the policy expires.

Decides: which policies are remembered, and whether a connection without verification is allowed (zcp1.md, section
6.2; RFC 6797 for programs).

Rules:
- A policy is learned over a verified connection only. `max_age` 0 forgets it. With `include_subdomains` it covers
  the names below the host. Addresses have no policy.
- The file is JSON of mode 0600, replaced atomically under a lock. It is limited to MAX_HOSTS; policies that expire
  first are dropped. An unreadable file is never treated as empty.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from zcproto.client.address import is_ip
from zcproto.common.clock import MS_PER_SECOND
from zcproto.common.files import locked, replace_file
from zcproto.common.home import resolve_home
from zcproto.common.text import counted, escape_text
from zcproto.errors import ConfigError, TlsError

FILE_NAME: Final = "known_hosts.json"
MAX_HOSTS: Final = 1_000
MAX_FILE_SIZE: Final = 1_048_576
MAX_AGE: Final = 10 * 365 * 86_400
"""Maximum of seconds for which a policy is remembered."""

MAX_UNTIL: Final = 2**53 - 1
"""Maximum expiry in the file, which clients in JavaScript share."""

REWRITE_AFTER: Final = 86_400
"""Minimum of seconds between the stored and the new expiry for a write: every connection extends the policy."""

LOCK_WAIT_S: Final = 10.0


class Policy(NamedTuple):
    """The expiry of a policy in seconds since the Unix epoch, and whether it covers subdomains."""

    until: int
    include_subdomains: bool


class KnownHosts:
    """The policies in one file. Methods access the disk."""

    __slots__ = ("path",)

    def __init__(self, path: Path) -> None:
        self.path = path

    def learn(self, host: str, sts: Mapping[str, Any], wall: int) -> None:
        """Store the policy that a host sent over a verified connection. Raises OSError, ConfigError."""
        if is_ip(host):
            return
        now = wall // MS_PER_SECOND
        max_age = min(sts["max_age"], MAX_AGE)
        policy = Policy(now + max_age, sts["include_subdomains"])
        if self._is_known(host, policy, max_age, now):
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self.path.with_name(f"{self.path.name}.lock"), LOCK_WAIT_S):
            hosts = {name: known for name, known in self._read().items() if known.until > now}
            if max_age:
                hosts[host] = policy
            else:
                hosts.pop(host, None)
            while len(hosts) > MAX_HOSTS:
                del hosts[min(hosts, key=lambda name: hosts[name].until)]
            self._write(hosts)

    def _is_known(self, host: str, policy: Policy, max_age: int, now: int) -> bool:
        """Return whether the file has this policy with about the same expiry."""
        known = self._read().get(host)
        if known is None:
            return not max_age
        if not max_age:
            return False
        near = abs(known.until - policy.until) < min(REWRITE_AFTER, max_age // 2)
        return near and known.until > now and known.include_subdomains == policy.include_subdomains

    def require(self, host: str, wall: int) -> None:
        """Raise TlsError if a policy forbids connecting to a host without verification."""
        if is_ip(host):
            return
        try:
            hosts = self._read()
        except ConfigError as error:
            raise TlsError("sts_policy", f"verification cannot be off: {error}") from error
        now = wall // MS_PER_SECOND
        labels = host.split(".")
        for start in range(len(labels)):
            name = ".".join(labels[start:])
            known = hosts.get(name)
            if known is None or known.until <= now or not (start == 0 or known.include_subdomains):
                continue
            days = (known.until - now) // 86_400 + 1
            raise TlsError(
                "sts_policy",
                f"{name} requires verified connections for {counted(days, 'more day')}; remove verify=False"
                f" (policy stored in {escape_text(str(self.path))})",
            )

    def _read(self) -> dict[str, Policy]:
        """Return all policies of the file. Raises ConfigError if it is damaged or unreadable."""
        try:
            with self.path.open("rb") as file:
                content = file.read(MAX_FILE_SIZE + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._unreadable(error.strerror or type(error).__name__) from error
        try:
            if len(content) > MAX_FILE_SIZE:
                raise ValueError("too large")
            hosts = json.loads(content)["hosts"]
            return {name: _policy(entry) for name, entry in hosts.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._unreadable("cannot be parsed") from error

    def _unreadable(self, cause: str) -> ConfigError:
        return ConfigError(
            [f"{escape_text(str(self.path))}: {cause}; repair it, or delete it to forget its hosts"]
        )

    def _write(self, hosts: dict[str, Policy]) -> None:
        text = json.dumps(
            {"hosts": {name: policy._asdict() for name, policy in sorted(hosts.items())}}, indent=1
        )
        replace_file(self.path, f"{text}\n".encode())


def _policy(entry: dict[str, Any]) -> Policy:
    until, include_subdomains = entry["until"], entry["include_subdomains"]
    if until.__class__ is not int or abs(until) > MAX_UNTIL or include_subdomains.__class__ is not bool:
        raise ValueError("wrong types")
    return Policy(until, include_subdomains)


def find_known_hosts(home: str | Path | None) -> KnownHosts | None:
    """Return the policies in a home folder. None for a user without one, as in some containers."""
    try:
        return KnownHosts(resolve_home(home, os.environ).path / FILE_NAME)
    except ConfigError:
        if home is not None:
            raise
        return None
