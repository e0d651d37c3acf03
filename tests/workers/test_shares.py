"""The configuration of one worker."""

from __future__ import annotations

import pytest

from zcproto.config import Config
from zcproto.workers.limits import share_of


def test_share_of_the_only_worker_is_everything() -> None:
    assert share_of(Config(), 1) == Config()


@pytest.mark.parametrize(
    ("workers", "pending", "partial", "per_user", "streams"),
    [
        (2, 2_048, 25_165_824, 16_777_216, 33_554_432),
        (3, 1_366, 16_777_216, 16_777_216, 22_369_622),
        (64, 256, 786_432, 786_432, 1_048_576),
    ],
)
def test_limits_of_memory_are_divided_down_to_what_a_worker_needs(
    workers: int, pending: int, partial: int, per_user: int, streams: int
) -> None:
    config = share_of(Config(), workers)
    assert config.tls.max_pending == pending
    assert config.limits.partial_frame_bytes == partial
    assert config.limits.partial_frame_bytes_per_user == per_user
    assert config.streams.memory_bytes == streams


def test_share_is_never_more_than_the_limit() -> None:
    config = Config.model_validate({"tls": {"max_pending": 8}})
    assert share_of(config, 64).tls.max_pending == 8


def test_share_divides_nothing_else() -> None:
    before, after = Config().model_dump(), share_of(Config(), 4).model_dump()
    changed = {
        f"{section}.{name}"
        for section, values in before.items()
        for name, value in values.items()
        if after[section][name] != value
    }
    assert changed == {
        "tls.max_pending",
        "limits.partial_frame_bytes",
        "streams.memory_bytes",
        "limits.partial_frame_bytes_per_user",
    }
