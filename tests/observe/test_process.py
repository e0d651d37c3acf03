"""Test process metrics against the system and prometheus_client's collector."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families as parse

from zcproto.observe.metrics import Metrics
from zcproto.observe.process import PROC, open_descriptors, process_readings


def read(proc: Path = PROC) -> dict[str, float]:
    text = Metrics(lambda: process_readings(proc)).render("")[1].decode()
    return {
        sample.name: sample.value
        for family in parse(text)
        for sample in family.samples
        if sample.name.startswith("process_")
    }


def test_values_match_prometheus_client_collector() -> None:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    theirs = {sample.name: sample.value for family in registry.collect() for sample in family.samples}
    ours = read()
    assert ours.keys() == theirs.keys()
    for name in ("process_open_fds", "process_max_fds"):
        assert abs(ours[name] - theirs[name]) <= 2  # each opens a file of its own while reading
    assert ours["process_start_time_seconds"] == pytest.approx(theirs["process_start_time_seconds"], abs=0.1)
    for name in ("process_resident_memory_bytes", "process_virtual_memory_bytes"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.2)
    assert ours["process_cpu_seconds_total"] == pytest.approx(theirs["process_cpu_seconds_total"], abs=1)
    assert ours["process_start_time_seconds"] < time.time()


def test_interpreter_metrics_match_prometheus_client_collectors() -> None:
    registry = CollectorRegistry()
    GCCollector(registry=registry)
    PlatformCollector(registry=registry)

    def series(families: Iterable[Metric]) -> set[tuple[str, frozenset[tuple[str, str]]]]:
        return {
            (sample.name, frozenset(sample.labels.items()))
            for family in families
            for sample in family.samples
            if sample.name.startswith("python_")
        }

    ours = Metrics(process_readings).render("")[1].decode()
    assert series(parse(ours)) == series(registry.collect())


def test_open_descriptors_are_counted(tmp_path: Path) -> None:
    before = open_descriptors(Path("/proc/self/fd"))
    descriptors = [os.open("/dev/null", os.O_RDONLY) for _ in range(50)]
    try:
        assert open_descriptors(Path("/proc/self/fd")) == before + 50
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_descriptor_folder_without_size_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in "012":
        (tmp_path / name).touch()

    class Nothing:
        st_size = 0

    monkeypatch.setattr(os, "stat", lambda path: Nothing())
    assert open_descriptors(tmp_path) == 3


@pytest.mark.parametrize("files", [[], ["stat"]])
def test_system_without_proc_yields_fewer_metrics(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).write_text("cpu 1 2 3\n")
    assert set(read(tmp_path)) == {"process_cpu_seconds_total", "process_max_fds"}
