"""The dependencies that CI installs are locked, with hashes, and match pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent.parent
LOCKS = ROOT / ".ci" / "requirements"
PYTHONS = ("3.11", "3.13")
_ENTRY = re.compile(r"(?m)^(\S+==\S+.*?)((?: \\\n    --hash=sha256:[0-9a-f]{64})*)$")


def entries(name: str) -> list[tuple[Requirement, int]]:
    """Return the locked requirements with the number of their hashes."""
    text = "".join(
        line for line in (LOCKS / f"{name}.txt").read_text().splitlines(True) if not line.startswith("#")
    )
    found = [(Requirement(entry), hashes.count("--hash")) for entry, hashes in _ENTRY.findall(text)]
    assert _ENTRY.sub("", text).strip() == ""
    return found


def locked(name: str, python: str) -> dict[str, str]:
    """Return the versions that a lock installs on Linux."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
    }
    return {
        canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement, _ in entries(name)
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }


def wanted(extra: str) -> Iterator[Requirement]:
    """Yield the requirements of the package with an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in (*project["dependencies"], *(project["optional-dependencies"][extra] if extra else ())):
        requirement = Requirement(text)
        if requirement.name == "zcproto":
            for inner in requirement.extras:
                yield from wanted(inner)
        else:
            yield requirement


@pytest.mark.parametrize("name", ["build", "deploy", "dev", "image", "package", "release", "wheels"])
def test_each_locked_version_has_hashes(name: str) -> None:
    assert entries(name)
    assert [requirement.name for requirement, hashes in entries(name) if not hashes] == []


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("name", "extra"), [("dev", "dev"), ("package", ""), ("image", "oidc"), ("image", "valkey")]
)
def test_locked_versions_meet_the_requirements_of_the_package(name: str, extra: str, python: str) -> None:
    versions = locked(name, python)
    for requirement in wanted(extra):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in {name}.txt; run .ci/lock"
        assert requirement.specifier.contains(version), (
            f"{name}.txt has {version}, not {requirement}; run .ci/lock"
        )


@pytest.mark.parametrize("python", PYTHONS)
def test_locks_agree_on_common_packages(python: str) -> None:
    everything = locked("dev", python)
    assert locked("build", python).items() <= everything.items()
    assert locked("package", python).items() <= everything.items()
    assert locked("image", python).items() <= everything.items()


def test_ci_installs_nothing_else() -> None:
    for script in (".ci/run", ".ci/container", ".ci/packages", ".ci/release"):
        for line in re.findall(r"(?m)^.*pip\" install .*$", (ROOT / script).read_text()):
            assert "--require-hashes" in line or "--no-index" in line, f"{script}: {line}"
