"""Replay the corpus of every target, try mutated inputs, and test the search itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.fuzz.__main__ import UNLIMITED, main, search_randomly
from tests.fuzz.corpus import CORPUS, inputs, minimize
from tests.fuzz.mutate import mutations
from tests.fuzz.target import Target, TooSlowError, check_input, check_time, divide
from tests.fuzz.targets import NAMES, target_named

MUTATIONS = {"certificates": 60, "config": 60, "http": 100, "server": 150, "client": 150}
"""Mutated inputs for targets that are slow; others get DEFAULT_MUTATIONS."""

DEFAULT_MUTATIONS = 300
MAX_CORPUS_SIZE = 500 * 1_024


@pytest.mark.parametrize("name", NAMES)
def test_corpus_input_keeps_invariants(name: str) -> None:
    target = target_named(name)
    corpus = inputs(CORPUS / name)
    assert corpus
    for file, data in corpus.items():
        try:
            check_input(target, data)
        except Exception as error:
            error.add_note(f"the input is tests/fuzz/corpus/{name}/{file}")
            raise


@pytest.mark.parametrize("name", NAMES)
def test_mutated_input_keeps_invariants(name: str) -> None:
    target = target_named(name)
    made = mutations(list(inputs(CORPUS / name).values()), target.max_size, seed=1)
    for data in itertools.islice(made, MUTATIONS.get(name, DEFAULT_MUTATIONS)):
        try:
            check_input(target, data)
        except Exception as error:
            error.add_note(f"the input is {data!r}")
            raise


# --- corpus and search ----------------------------------------------------------------------------------


def test_corpus_is_small() -> None:
    corpus = {name: inputs(CORPUS / name) for name in NAMES}
    assert sorted(path.name for path in CORPUS.iterdir()) == sorted([*NAMES, "README.md"])
    assert sum(map(len, corpus.values())) <= 600
    assert sum(len(data) for found in corpus.values() for data in found.values()) <= MAX_CORPUS_SIZE


def broken(data: bytes) -> None:
    assert b"bad" not in data


def harmless(data: bytes) -> None:
    pass


def test_failing_input_is_reported_and_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "seed").write_bytes(b"bad")
    target = Target("broken", harmless, broken)
    assert not search_randomly(target, tmp_path, UNLIMITED, 0, seed=1)
    (path,) = (tmp_path / "failed").iterdir()
    assert b"bad" in path.read_bytes()
    assert "AssertionError" in capsys.readouterr().err
    assert search_randomly(Target("good", harmless, harmless), tmp_path, 5, 0, seed=1)


class SlowRun:
    """Take 20 ms of CPU on a fake clock for inputs with b"slow" that are long enough."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, min_size: int = 0) -> None:
        self.now = 0.0
        self.min_size = min_size
        monkeypatch.setattr("tests.fuzz.target.cpu_time", lambda: self.now)
        self.set_slowdown = lambda factor: monkeypatch.setattr("bench.machine.slowdown", lambda: factor)
        self.set_slowdown(1.0)

    def __call__(self, data: bytes) -> None:
        if b"slow" in data and len(data) >= self.min_size:
            self.now += 0.020


def test_slow_input_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("slow", SlowRun(monkeypatch), harmless)
    check_time(target, b"quick")
    with pytest.raises(TooSlowError, match="4 bytes take more than 10 ms"):
        check_input(target, b"slow")


def test_input_that_is_slow_when_repeated_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TooSlowError, match="16384 bytes"):
        check_input(Target("flood", SlowRun(monkeypatch, min_size=9), harmless), b"slow")


def test_cpu_limit_is_scaled_on_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SlowRun(monkeypatch)
    run.set_slowdown(3.0)
    check_input(Target("slow", run, harmless), b"slow")


def test_unknown_target_is_reported_with_known_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frame"]) == 2
    assert "unknown target frame; choose from frames," in capsys.readouterr().out


def test_replay_includes_inputs_of_given_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "proxy_header").mkdir()
    (tmp_path / "proxy_header" / "mine").write_bytes(b"PROXY")
    assert main(["proxy_header", "--replay", "--corpus", str(tmp_path)]) == 0
    count = len(inputs(CORPUS / "proxy_header")) + 1
    assert f"proxy_header: {count} inputs, 0 failed" in capsys.readouterr().out


def test_minimize_keeps_smallest_of_inputs_with_same_coverage() -> None:
    run = target_named("proxy_header").run
    target = Target("whole", run, run)
    found = [b"PROXY TCP4 and more", b"PROXY TCP4", b"PROXY TCP4"]
    assert minimize(target, found) == [b"PROXY TCP4"]
    assert minimize(target, found, always=found[:1]) == found[:1]


def test_divisions_and_mutations_are_deterministic() -> None:
    data = bytes(range(200))
    assert divide(data) == divide(data)
    assert b"".join(divide(data)) == data
    first, again = (list(itertools.islice(mutations([data], 100, seed=3), 50)) for _ in range(2))
    assert first == again
    assert max(map(len, first)) <= 100
