"""The successor of a server: a process that runs the same command, with descriptors of this one."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence

from zcproto.workers.channel import Channel


class Successor:
    """A process that is to take over. It has `descriptors`, and `theirs`, the other end of `channel`, among them.

    Until its supervisor runs, it ends at once with this process: it has the sockets and the locks of the home,
    and the import of the application may take long.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        descriptors: Sequence[int],
        channel: Channel,
        theirs: Channel,
    ) -> None:
        self.channel = channel
        self.failure = ""
        """Why it cannot serve, in its own words or in those of the server that waited for it."""
        self.is_ending = False
        """Whether it has closed its end of the channel: it ends by itself."""
        self._process = subprocess.Popen(  # noqa: S603 - our own
            command,
            env=environment,
            pass_fds=descriptors,
            preexec_fn=theirs.end_with_peer,  # noqa: PLW1509 - the supervisor has one thread
        )
        self.pid = self._process.pid

    @property
    def reason(self) -> str | None:
        """Why, or how, it has ended; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        how = (
            f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
        )
        return self.failure or how

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Close the channel, by which a successor that does not serve notices that it is not wanted."""
        self.channel.close()
