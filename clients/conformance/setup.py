"""Copy the vectors of the specification into the distributions.

The only source of the vectors is `spec/vectors`, which no configuration of setuptools can reach from here. A copy
under version control would double 850 KB and every change to them; a symbolic link does not survive a checkout on
every system, nor an sdist. So the sdist gets a copy, and so does a wheel that is built from a checkout. An editable
installation gets none: the kit falls back to `spec/vectors` of its checkout.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
IN_CHECKOUT = HERE.parent.parent / "spec" / "vectors"
DATA = "zcproto_conformance/data"


def copy_vectors(target: Path) -> None:
    """Copy the vectors to a folder. An sdist (it has PKG-INFO) has its own copy to take them from."""
    source = HERE / DATA if (HERE / "PKG-INFO").exists() else IN_CHECKOUT
    files = sorted(source.rglob("*.json"))
    if not files:
        raise FileNotFoundError(f"{source}: no vectors; build from a complete checkout or from an sdist")
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


class BuildWithVectors(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            copy_vectors(Path(self.build_lib) / DATA)


class SdistWithVectors(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        copy_vectors(Path(base_dir) / DATA)


setup(cmdclass={"build_py": BuildWithVectors, "sdist": SdistWithVectors})
