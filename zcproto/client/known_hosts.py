"""Hosts that were seen with an `sts` policy: until it ends, they are not connected to with verification off.

RFC 6797 for native clients. Rules: learned over verified connections only; `max_age` 0 forgets; a policy with
`include_subdomains` holds for names below the host; addresses have none. The file is JSON, mode 0600, replaced
in one step; a lock beside it keeps processes from losing each other's entries. It is bounded: the policies that
end first make room. One that cannot be read is never taken for empty.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from zcproto.client.address import is_ip
from zcproto.common.files import locked, replace_file
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError, TlsError

MAX_HOSTS: Final = 1_000
MAX_FILE_SIZE: Final = 1_048_576
MAX_AGE: Final = 10 * 365 * 86_400
"""Seconds; a longer policy is remembered for so long."""

REWRITE_AFTER: Final = 86_400
"""Seconds. Each connection moves a policy's end; the file is written again when it moves by more than this."""

LOCK_WAIT_S: Final = 10.0

_MS: Final = 1000


class Policy(NamedTuple):
    """Until when (seconds since the Unix epoch) verification is a must, and whether for subdomains too."""

    until: int
    include_subdomains: bool


class KnownHosts:
    """The hosts known, in one file. Its methods read and write the disk."""

    __slots__ = ("path",)

    def __init__(self, path: Path) -> None:
        self.path = path

    def learn(self, host: str, sts: Mapping[str, Any], wall: int) -> None:
        """Take in the policy that a host sent over a verified connection. Raises OSError, ConfigError."""
        if is_ip(host):
            return
        max_age = min(sts["max_age"], MAX_AGE)
        policy = Policy(wall // _MS + max_age, sts["include_subdomains"])
        if self._is_known(host, policy, max_age, wall):
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self.path.with_name(f"{self.path.name}.lock"), LOCK_WAIT_S):
            hosts = {name: known for name, known in self._read().items() if known.until > wall // _MS}
            if max_age:
                hosts[host] = policy
            else:
                hosts.pop(host, None)
            while len(hosts) > MAX_HOSTS:
                del hosts[min(hosts, key=lambda name: hosts[name].until)]
            self._write(hosts)

    def _is_known(self, host: str, policy: Policy, max_age: int, wall: int) -> bool:
        """Whether the file says so already, near enough."""
        known = self._read().get(host)
        if known is None:
            return not max_age
        if not max_age:
            return False
        near = abs(known.until - policy.until) < min(REWRITE_AFTER, max_age // 2)
        return near and known.until > wall // _MS and known.include_subdomains == policy.include_subdomains

    def require(self, host: str, wall: int) -> None:
        """Raise TlsError if a policy forbids to connect to a host with verification off."""
        if is_ip(host):
            return
        try:
            hosts = self._read()
        except ConfigError as error:
            raise TlsError("sts_policy", f"verification stays on: {error}") from error
        labels = host.split(".")
        for start in range(len(labels)):
            name = ".".join(labels[start:])
            known = hosts.get(name)
            if known is None or known.until <= wall // _MS or not (start == 0 or known.include_subdomains):
                continue
            days = (known.until - wall // _MS) // 86_400 + 1
            raise TlsError(
                "sts_policy",
                f"{name} demanded verified connections, for {days} more days; verification cannot be off"
                f" (remembered in {escape_text(str(self.path))})",
            )

    def _read(self) -> dict[str, Policy]:
        """All policies of the file. Raises ConfigError if it is there and is not as we write it."""
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
            return {str(name): _policy(entry) for name, entry in hosts.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._unreadable("its content is damaged") from error

    def _unreadable(self, cause: str) -> ConfigError:
        return ConfigError(
            [f"{escape_text(str(self.path))}: {cause}; mend it, or remove it to forget its hosts"]
        )

    def _write(self, hosts: dict[str, Policy]) -> None:
        text = json.dumps(
            {"hosts": {name: policy._asdict() for name, policy in sorted(hosts.items())}}, indent=1
        )
        replace_file(self.path, f"{text}\n".encode())


def _policy(entry: dict[str, Any]) -> Policy:
    until, include_subdomains = entry["until"], entry["include_subdomains"]
    if until.__class__ is not int or include_subdomains.__class__ is not bool:
        raise ValueError("wrong types")
    return Policy(until, include_subdomains)
