"""The configuration of one worker of a server: its share of what the workers use together.

Decides: which limits are divided.

Rules:
- Limits of memory are divided. Each worker keeps what it needs to serve its clients fairly.
- Limits of addresses, users and connections are not: the workers count these together.
- Limits of the work in one event loop (`tls.max_handshakes`, `limits.threads`, ...) apply to each worker.
"""

from __future__ import annotations

from typing import Final

from zcproto.config.model import Config

LEAST_PENDING: Final = 256
"""Pending connections of a worker: several batches of accepts, or clients that are not slow displace each other."""

LEAST_STREAM_BYTES: Final = 1_048_576
LEAST_PARTIAL_BYTES: Final = 65_536


def share_of(config: Config, workers: int) -> Config:
    """Return the configuration of each of so many workers."""
    tls, limits, streams = config.tls, config.limits, config.streams
    partial = _share(limits.partial_frame_bytes, workers, LEAST_PARTIAL_BYTES)
    return config.model_copy(
        update={
            "tls": tls.model_copy(
                update={"max_pending": _share(tls.max_pending, workers, LEAST_PENDING)},
            ),
            "limits": limits.model_copy(
                update={
                    "partial_frame_bytes": partial,
                    "partial_frame_bytes_per_user": min(limits.partial_frame_bytes_per_user, partial),
                },
            ),
            "streams": streams.model_copy(
                update={"memory_bytes": _share(streams.memory_bytes, workers, LEAST_STREAM_BYTES)},
            ),
        }
    )


def _share(limit: int, workers: int, least: int) -> int:
    return max(-(-limit // workers), min(limit, least))
