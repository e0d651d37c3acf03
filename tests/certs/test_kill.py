"""A folder of certificates whose writer is stopped at any moment: old or new, never a mix, and nothing that
was announced is lost.

Run as a program (`python -m tests.certs.test_kill FOLDER SEED SECONDS`) this file kills its own children while
they write, which no process with the threads of a test run should do.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.certs.support import DAY, NOW, constrain, ensure, settings
from tests.killed_child import lines_of_killed_child
from tests.limits import TIMEOUT
from zcproto.certs import keys, managed, profile, rollover
from zcproto.certs.managed import ManagedCertificates, ManagedSettings, renew, rotate
from zcproto.certs.pair import CertificatePair
from zcproto.certs.rollover import cancel

pytestmark = pytest.mark.no_cover  # the other tests of the room cover all lines, sooner

BOTH = settings()
ONE = settings(key_types=["ecdsa-p256"])
LATE = NOW + 61 * DAY
"""When certificates that were made at NOW are due for renewal."""


# --- a machine that stops -----------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """The machine stops: no handler and no clean-up runs after it."""


@dataclass
class Machine:
    """One that stops at its `last` change to the disk: before it, or with half of a file that was written."""

    last: int
    done: int = 0

    def run(self, action: Callable[[], object]) -> bool:
        """Whether it stopped before the action was done."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("open", "fchmod", "fsync", "replace", "rename", "unlink", "mkdir", "chmod"):
                patch.setattr(os, name, self._stopping(name, getattr(os, name)))
            try:
                action()
            except PowerCut:
                return True
        return False

    def _stopping(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if name != "open" or arguments[1] & os.O_CREAT:
                self.done += 1
                if self.done == self.last and name == "fsync":
                    tear(arguments[0])
                if self.done >= self.last:
                    raise PowerCut
            return real(*arguments, **options)

        return call


def tear(descriptor: int) -> None:
    """What was written has reached the disk in part."""
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        os.ftruncate(descriptor, status.st_size // 2)


def stops() -> Iterator[Machine]:
    """Machines that stop at the first step, the second, and so on."""
    yield from (Machine(step) for step in range(1, 500))
    pytest.fail("it never came to its end")


def pool_keys(patch: Callable[[object, str, object], object]) -> None:
    """New keys come from a pool, as RSA keys take long and a stop is tried at each of many steps."""
    pool = {kind: [keys.generate(kind) for _ in range(8)] for kind in BOTH.key_types}

    def generate(key_type: str) -> keys.PrivateKey:
        pool[key_type].append(pool[key_type].pop(0))
        return pool[key_type][-1]

    patch(keys, "generate", generate)


@pytest.fixture(scope="module")
def pooled_keys() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        pool_keys(patch.setattr)
        yield


# --- what has to be true after it -------------------------------------------------------------------------------


def pins(pairs: Iterable[CertificatePair]) -> set[str]:
    return {pair.pin for pair in pairs}


def announced_pins(folder: Path) -> set[str]:
    announced = rollover.announced(folder)
    return set() if announced is None else set(announced.pins)


def repaired(folder: Path, wanted: ManagedSettings, now: datetime) -> ManagedCertificates:
    """What the next start finds. It has no authority's key, so it must do with what is in the folder."""
    key, away = folder / "ca.key", folder.parent / "ca.key.away"
    if key.exists():
        key.rename(away)
    try:
        found = managed.ensure(folder, wanted, now)
    finally:
        if away.exists():
            away.rename(key)
    assert not list(folder.glob(".*.new"))
    assert not list(folder.glob("*.aside"))
    return found


def check_promises(before: ManagedCertificates, announced: set[str], after: ManagedCertificates) -> None:
    """What was announced before the stop, or could be read after it, is announced or in use: one of both."""
    in_use, waiting = pins(after.pairs), set() if after.next_pins is None else set(after.next_pins.pins)
    promised = announced | (set() if before.next_pins is None else set(before.next_pins.pins))
    for pin in promised:
        assert (pin in waiting) is not (pin in in_use)
    assert waiting <= promised


# --- every step, one after the other --------------------------------------------------------------------------


RENEWS_KEYS = settings(key_types=["ecdsa-p256"], renew_key=True)
NOT_ANNOUNCED = settings(key_types=["ecdsa-p256"], renew_key=True, announce_key=timedelta(0))


@dataclass(frozen=True)
class Case:
    """Something that is done to a folder."""

    act: Callable[[Path, datetime], object]
    now: datetime = NOW
    wanted: ManagedSettings = ONE
    announced: bool = False
    """Whether the next keys are announced before it."""
    issues: bool = True


CASES = {
    "renewal": Case(lambda folder, now: managed.ensure(folder, ONE, now), LATE),
    "renewal with a new key": Case(lambda folder, now: managed.ensure(folder, NOT_ANNOUNCED, now), LATE),
    "renewal and announcement": Case(
        lambda folder, now: managed.ensure(folder, RENEWS_KEYS, now), LATE + 5 * DAY
    ),
    "use of the announced key": Case(
        lambda folder, now: managed.ensure(folder, ONE, now), LATE, announced=True
    ),
    "use of two announced keys": Case(
        lambda folder, now: managed.ensure(folder, BOTH, now), LATE, BOTH, announced=True
    ),
    "announcement": Case(lambda folder, now: rotate(folder, ONE, now), issues=False),
    "a clock set back": Case(
        lambda folder, now: managed.ensure(folder, ONE, now), NOW - 20 * DAY, announced=True
    ),
    "rotation at once": Case(lambda folder, now: rotate(folder, ONE, now, at_once=True)),
    "rotation to the announced key": Case(
        lambda folder, now: rotate(folder, ONE, now, at_once=True), announced=True
    ),
    "renewal asked for": Case(lambda folder, now: renew(folder, BOTH, now), wanted=BOTH),
}


@pytest.mark.usefixtures("pooled_keys")
@pytest.mark.parametrize("name", CASES)
def test_crash_at_any_step_leaves_old_or_new_pair_and_announced_keys(
    made: Path, tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    before = (rotate if case.announced else managed.ensure)(made, case.wanted, NOW)
    old = [pair.leaf_sha256 for pair in before.pairs]
    seen = set()
    for machine in stops():
        folder = tmp_path / str(machine.last)
        shutil.copytree(made, folder)
        stopped = machine.run(lambda folder=folder: case.act(folder, case.now))
        announced = announced_pins(folder)
        found = repaired(folder, case.wanted, max(case.now, NOW))
        check_promises(before, announced, found)
        seen.update(new.leaf_sha256 in old for new in found.pairs)

        done = managed.ensure(folder, case.wanted, case.now)
        check_promises(before, announced, done)
        again = managed.ensure(folder, case.wanted, case.now)
        assert (again.pairs, again.next_pins, again.new_pins) == (done.pairs, done.next_pins, ())
        if not stopped:
            break
        shutil.rmtree(folder)
    assert machine.last > 5
    assert seen == ({True, False} if case.issues else {True})


@pytest.mark.usefixtures("pooled_keys")
def test_crash_at_any_step_of_the_first_run_is_repaired_by_the_next(tmp_path: Path) -> None:
    for machine in stops():
        folder = tmp_path / str(machine.last) / "certs"
        stopped = machine.run(lambda folder=folder: ensure(folder))
        authority_before = (folder / "ca.crt").read_bytes() if (folder / "ca.crt").exists() else None
        assert len(ensure(folder)) == 2
        assert not list(folder.glob(".*.new"))
        assert not list(folder.glob("*.aside"))
        # An authority that was in place may be trusted by clients already.
        assert authority_before in (None, (folder / "ca.crt").read_bytes())
        if not stopped:
            break
        shutil.rmtree(folder)
    assert machine.last > 30


@pytest.mark.usefixtures("pooled_keys")
def test_crash_while_the_authority_is_reissued_leaves_verifiable_leaves(made: Path, tmp_path: Path) -> None:
    wider = settings(key_types=["ecdsa-p256"], names=[*ONE.names, "new.example"])
    widened = set()
    constrain(made, "localhost", ONE.names[0])
    for machine in stops():
        folder = tmp_path / str(machine.last)
        shutil.copytree(made, folder)
        stopped = machine.run(lambda folder=folder: managed.ensure(folder, wider, NOW))
        found = repaired(folder, ONE, NOW)
        authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        widened.add(profile.permits(authority, "new.example"))
        assert all(profile.permits(authority, name) for pair in found.pairs for name in pair.names)
        assert "new.example" in managed.ensure(folder, wider, NOW).pairs[0].names
        if not stopped:
            break
    assert widened == {True, False}


@pytest.mark.usefixtures("pooled_keys")
def test_crash_while_cancelling_leaves_keys_announced_or_set_aside(made: Path, tmp_path: Path) -> None:
    rotate(made, BOTH, NOW)
    everything = {path.read_bytes() for path in made.glob("*.next.key")}
    for machine in stops():
        folder = tmp_path / str(machine.last)
        shutil.copytree(made, folder)
        stopped = machine.run(lambda folder=folder: cancel(folder))
        assert {path.read_bytes() for path in folder.glob("*.next.key*")} == everything
        if not stopped:
            break
    assert announced_pins(folder) == set()


# --- killed for real, at random moments -----------------------------------------------------------------------


KILLS = 60


def test_writer_killed_at_random_moments_leaves_old_or_new_pair(made: Path) -> None:
    command = [sys.executable, "-m", "tests.certs.test_kill", str(made), "20260601"]
    done = subprocess.run(
        command, capture_output=True, check=False, text=True, timeout=TIMEOUT, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["kills"] == KILLS
    assert all(report.values())


def write_for_ever(folder: Path, now: datetime, output: int) -> None:
    """Does one thing after another to the folder, and says before each when that is."""
    acts: list[Callable[[datetime], object]] = [
        lambda now: rotate(folder, BOTH, now),
        lambda now: managed.ensure(folder, BOTH, now),  # uses what was announced
        lambda now: renew(folder, BOTH, now),
        lambda now: rotate(folder, BOTH, now),
        lambda now: rotate(folder, BOTH, now, at_once=True),
    ]
    for act in itertools.cycle(acts):
        now += 8 * DAY
        os.write(output, f"{now.isoformat()}\n".encode())
        act(now)


def kill_a_writer(folder: Path, now: datetime, after_s: float) -> list[datetime]:
    """Return the times of a child's writes to the folder. It is killed during the last one."""
    lines = lines_of_killed_child(lambda output: write_for_ever(folder, now, output), after_s)
    return [datetime.fromisoformat(line) for line in lines]


def main(folder: Path, seed: int) -> dict[str, int]:
    chance = random.Random(seed)
    pool_keys(setattr)
    before = managed.ensure(folder, BOTH, NOW)
    now, patience = NOW, 1.0
    report = {"kills": 0, "old": 0, "new": 0, "finished": 0}
    while report["kills"] < KILLS:
        times = kill_a_writer(folder, now, patience * chance.choice([0.01, 0.03, 0.1]) * chance.random())
        now = times[-1]
        announced = announced_pins(folder)
        after = repaired(folder, BOTH, now)
        for pair in after.pairs:
            assert pair.not_before <= now <= pair.not_after
        assert announced <= pins(after.pairs) | announced_pins(folder)
        if len(times) == 1:  # then what was there before is known
            check_promises(before, announced, after)
        report["kills"] += 1
        report["finished"] += len(times) - 1
        if not (report["finished"] and report["new"]):
            patience *= 1.1  # the machine is busy with other things
        for old, new in zip(before.pairs, after.pairs, strict=True):
            report["old" if old == new else "new"] += 1
        before = managed.ensure(folder, BOTH, now)
    return report


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
