"""Load certificates: both key types from the disk, checked, into a new context.

A load is all that a server does with the files before it may serve them: read certificates and keys, check who
else could read or change them, check names, purpose, dates, strengths and that each key is its certificate's,
make a TLS 1.3 context, and load the pairs into it.

The certificates are those of the default configuration: RSA-4096 and ECDSA P-256. The files are in the system's
cache, as they are when a server loads new ones. The parts are timed apart and do not add up to the whole
exactly.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import click

from bench.command import COUNT, measurement
from bench.micro.timing import time_rows, timed
from bench.report import Row
from bench.stage import make_own_certificates
from zcproto.certs.pair import load_pair
from zcproto.config.model import CertificatesConfig
from zcproto.tls.context import server_context

MAX_MEDIAN_MS: Final = 10.0
MAX_P99_MS: Final = 50.0


class Files(NamedTuple):
    """A certificate, its key, and which type of key it is."""

    key_type: str
    certificate: Path
    key: Path


def files_in(folder: Path) -> list[Files]:
    """Return the files of a server's own certificates."""
    families = {"rsa": "server", "ecdsa": "server-ecdsa"}
    names = {each: families[each.partition("-")[0]] for each in CertificatesConfig().key_types}
    return [Files(each, folder / f"{name}.crt", folder / f"{name}.key") for each, name in names.items()]


def measure(files: Sequence[Files], loads: int) -> list[Row]:
    bars = {"p50": MAX_MEDIAN_MS, "p99": MAX_P99_MS}
    whole = timed(lambda: load(files), loads)
    rows = [
        Row("loads", "loads", loads),
        *time_rows(
            "all", "all key types into a new context", whole, "ms", "p50", "p99", "longest", below=bars
        ),
    ]
    parts: dict[str, Callable[[], object]] = {
        "read and checked": lambda: check(files),
        "into a context": lambda: into_context(files),
        **{f"{each.key_type} alone": lambda each=each: load([each]) for each in files},  # type: ignore[misc]
    }
    for name, part in parts.items():
        rows += time_rows(name.replace(" ", "_"), name, timed(part, loads), "ms", "p50", "p99")
    return rows


def load(files: Sequence[Files]) -> None:
    check(files)
    into_context(files)


def check(files: Sequence[Files]) -> None:
    now = datetime.now(UTC)
    for each in files:
        load_pair(each.certificate, each.key, now)


def into_context(files: Sequence[Files]) -> None:
    server_context([(each.certificate, each.key) for each in files], ("zcp/1",))


@measurement
@click.option("--loads", type=COUNT, default=300, show_default=True, help="Loads that are timed.")
def command(loads: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="zcproto-loading-") as folder:
        make_own_certificates(Path(folder) / "certs")
        return measure(files_in(Path(folder) / "certs"), loads)
