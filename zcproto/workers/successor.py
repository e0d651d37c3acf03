"""The successor of a server: a process that runs the same command, with descriptors of this one."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from zcproto.workers.channel import Channel


class Successor:
    """A process that is to take over. It has `descriptors`, and the other end of `channel` among them."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        descriptors: Sequence[int],
        channel: Channel,
    ) -> None:
        self.channel = channel
        self._process = subprocess.Popen(command, env=environment, pass_fds=descriptors)  # noqa: S603 - our own
        self.pid = self._process.pid

    @property
    def reason(self) -> str | None:
        """How it has ended; None while it runs."""
        code = self._process.poll()
        return None if code is None else f"it ended with exit code {code}"

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Close the channel, by which a successor that does not serve notices that it is not wanted."""
        self.channel.close()
