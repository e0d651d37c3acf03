"""All kept inputs once more, some that chance makes of them, and what searches for others."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from tests.fuzz.__main__ import NO_END, main, search_by_chance
from tests.fuzz.corpus import KEPT, inputs, worth_keeping
from tests.fuzz.mutate import mutations
from tests.fuzz.target import Target, TooSlowError, check_time, cut, judge
from tests.fuzz.targets import NAMES, target_named

CHANGED = {"certificates": 60, "config": 60, "http": 100, "server": 150, "client": 150}
"""Inputs made by chance; for the other targets, which are quicker, there are MANY."""

MANY = 300
LARGEST_CORPUS = 500 * 1_024


@pytest.mark.parametrize("name", NAMES)
def test_kept_inputs_are_taken_as_they_should_be(name: str) -> None:
    target = target_named(name)
    kept = inputs(KEPT / name)
    assert kept
    for file, data in kept.items():
        try:
            judge(target, data)
        except Exception as error:
            error.add_note(f"the input is tests/fuzz/corpus/{name}/{file}")
            raise


@pytest.mark.parametrize("name", NAMES)
def test_inputs_changed_by_chance_are_taken_as_they_should_be(name: str) -> None:
    target = target_named(name)
    made = mutations(list(inputs(KEPT / name).values()), target.longest, seed=1)
    for data in itertools.islice(made, CHANGED.get(name, MANY)):
        try:
            judge(target, data)
        except Exception as error:
            error.add_note(f"the input is {data!r}")
            raise


# --- the kept inputs, and what searches -------------------------------------------------------------------


def test_the_kept_inputs_are_few_and_small() -> None:
    kept = {name: inputs(KEPT / name) for name in NAMES}
    assert sorted(path.name for path in KEPT.iterdir()) == sorted([*NAMES, "README.md"])
    assert sum(map(len, kept.values())) <= 600
    assert sum(len(data) for found in kept.values() for data in found.values()) <= LARGEST_CORPUS


def broken(data: bytes) -> None:
    assert b"bad" not in data


def busy(data: bytes) -> None:
    if b"slow" in data:
        began = time.thread_time()
        while time.thread_time() - began < 0.02:
            pass


def harmless(data: bytes) -> None:
    pass


def test_what_is_wrong_is_found_told_and_left_in_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "seed").write_bytes(b"bad")
    target = Target("broken", harmless, broken)
    assert not search_by_chance(target, tmp_path, NO_END, 0, seed=1)
    (path,) = (tmp_path / "wrong").iterdir()
    assert b"bad" in path.read_bytes()
    assert "AssertionError" in capsys.readouterr().err
    assert search_by_chance(Target("good", harmless, harmless), tmp_path, 5, 0, seed=1)


def test_an_input_that_takes_too_long_is_wrong() -> None:
    target = Target("slow", busy, harmless)
    check_time(target, b"quick")
    with pytest.raises(TooSlowError, match="4 bytes take 10 ms and more"):
        judge(target, b"slow")
    with pytest.raises(TooSlowError, match="16384 bytes"):
        judge(Target("flood", lambda data: busy(data if len(data) > 9 else b""), harmless), b"slow")


def test_a_target_that_does_not_exist_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frame"]) == 2
    assert "there is no target frame; there are frames," in capsys.readouterr().out


def test_replay_judges_what_is_in_the_folder_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "proxy_header").mkdir()
    (tmp_path / "proxy_header" / "mine").write_bytes(b"PROXY")
    assert main(["proxy_header", "--replay", "--corpus", str(tmp_path)]) == 0
    count = len(inputs(KEPT / "proxy_header")) + 1
    assert f"proxy_header: {count} inputs, 0 of them bad" in capsys.readouterr().out


def test_of_inputs_that_reach_the_same_the_smallest_is_kept() -> None:
    take = target_named("proxy_header").take
    target = Target("whole", take, take)
    found = [b"PROXY TCP4 and more", b"PROXY TCP4", b"PROXY TCP4"]
    assert worth_keeping(target, found) == [b"PROXY TCP4"]
    assert worth_keeping(target, found, always=found[:1]) == found[:1]


def test_an_input_is_cut_and_changed_in_the_same_way_each_time() -> None:
    data = bytes(range(200))
    assert cut(data) == cut(data)
    assert b"".join(cut(data)) == data
    first, again = (list(itertools.islice(mutations([data], 100, seed=3), 50)) for _ in range(2))
    assert first == again
    assert max(map(len, first)) <= 100
