"""What it takes to load certificates: both key types from disk, checked, into a new context.

    python -m bench.micro.certificate_loading [--loads 300] [--json FILE]

- A load is all that a server does with the files before it may serve them: it reads certificates and keys, looks at
  who else could read or change them, checks names, purpose, dates, strengths and that each key is its
  certificate's, makes a context that takes TLS 1.3 alone, and has OpenSSL load the pairs into it.
- The certificates are those of the default configuration, made in a temporary folder: RSA-4096 and ECDSA P-256.
- Each load is timed alone, by the wall clock. The files are in the system's cache, as they are just after somebody
  has written them, which is when a server loads them while it runs.
- The parts and the key types alone are timed apart, as many times; they do not add up to the whole exactly.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

from zcproto.certs import CertificatePair, ensure_own_certificates, load_pair
from zcproto.config.model import CertificatesConfig
from zcproto.tls.context import server_context

PROTOCOLS: Final = ("zcp/1",)
WARM_UP: Final = 5
NS_PER_MS: Final = 1_000_000

MAX_MEDIAN_MS: Final = 10.0
MAX_P99_MS: Final = 50.0


class Figure(NamedTuple):
    """One line of the table. Without a target it only informs."""

    name: str
    value: float
    unit: str
    target: float | None = None

    @property
    def holds(self) -> bool:
        return self.target is None or self.value < self.target


class Files(NamedTuple):
    """A certificate, its key, and which type of key it is."""

    key_type: str
    certificate: Path
    key: Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.micro.certificate_loading", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--loads", type=int, default=300, help="loads that are timed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if options.loads < 1:
        parser.error("at least one load is needed")
    with tempfile.TemporaryDirectory(prefix="zcproto-loading-") as folder:
        figures = measure(make(Path(folder) / "certs", CertificatesConfig().key_types), options.loads)
    show(figures)
    if options.json:
        rows = [{**figure._asdict(), "holds": figure.holds} for figure in figures]
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(figure.holds for figure in figures) else 1


def make(folder: Path, key_types: Sequence[str]) -> list[Files]:
    """Own certificates as a server makes them on its first start."""
    usual = CertificatesConfig()
    pairs = ensure_own_certificates(
        folder,
        names=(),
        key_types=key_types,
        lifetime=timedelta(seconds=usual.lifetime),
        renew_before=timedelta(seconds=usual.renew_before),
        renew_key=False,
        now=datetime.now(UTC),
    )
    return [Files(pair.key_type, pair.certificate, pair.key) for pair in pairs]


def measure(files: list[Files], loads: int) -> list[Figure]:
    whole = timed(lambda: load(files), loads)
    figures = [
        Figure("loads", loads, ""),
        Figure("all key types into a new context, p50", quantile(whole, 0.5), "ms", MAX_MEDIAN_MS),
        Figure("all key types into a new context, p99", quantile(whole, 0.99), "ms", MAX_P99_MS),
        Figure("all key types into a new context, longest", whole[-1] / NS_PER_MS, "ms"),
    ]
    parts: dict[str, Callable[[], object]] = {
        "read and checked": lambda: check(files),
        "into a context": lambda: into_context(files),
        **{f"{each.key_type} alone": lambda each=each: load([each]) for each in files},  # type: ignore[misc]
    }
    for name, part in parts.items():
        times = timed(part, loads)
        figures += [
            Figure(f"{name}, p50", quantile(times, 0.5), "ms"),
            Figure(f"{name}, p99", quantile(times, 0.99), "ms"),
        ]
    return figures


def load(files: list[Files]) -> None:
    check(files)
    into_context(files)


def check(files: list[Files]) -> list[CertificatePair]:
    now = datetime.now(UTC)
    return [load_pair(each.certificate, each.key, now) for each in files]


def into_context(files: list[Files]) -> None:
    server_context([(each.certificate, each.key) for each in files], PROTOCOLS)


def timed(act: Callable[[], object], times: int) -> list[int]:
    """Nanoseconds of each time, in order of length. The first ones, which find everything cold, are left out."""
    for _ in range(WARM_UP):
        act()
    durations = []
    for _ in range(times):
        begin = time.perf_counter_ns()
        act()
        durations.append(time.perf_counter_ns() - begin)
    return sorted(durations)


def quantile(ordered: list[int], share: float) -> float:
    """A quantile of sorted nanoseconds, in milliseconds."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] / NS_PER_MS


def show(figures: list[Figure]) -> None:
    width = max(len(figure.name) for figure in figures)
    print(f"{'':{width}}  {'figure':>10}     {'target':>10}")
    for figure in figures:
        target, verdict = "", ""
        if figure.target is not None:
            target = f"< {figure.target:,g}"
            verdict = "pass" if figure.holds else "FAIL"
        value = f"{figure.value:,.2f}" if figure.unit else f"{figure.value:,.0f}"
        print(f"{figure.name:{width}}  {value:>10} {figure.unit:2}  {target:>10}  {verdict}".rstrip())


if __name__ == "__main__":
    raise SystemExit(main())
