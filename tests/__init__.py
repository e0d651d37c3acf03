"""The tests of zcproto.

They start hundreds of processes. If Python does not write bytecode, as in many containers, each process compiles
all modules, which takes half a second of CPU. Bytecode is therefore written to pytest's cache folder.

The conformance kit is a separate distribution, which the development environment does not install. Its folder is
added to the path of this process and its subprocesses.
"""

import os
import sys
from pathlib import Path

if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parent.parent / ".pytest_cache" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

_KIT = str(Path(__file__).parent.parent / "clients" / "conformance")
if _KIT not in sys.path:
    sys.path.insert(0, _KIT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_KIT, os.environ.get("PYTHONPATH"))))
