"""The tests of zcproto.

They start hundreds of processes. Where Python is told not to write bytecode, as in many containers, each of
these would compile all modules anew, half a second of CPU: so bytecode is kept in pytest's folder for what lasts
from run to run.

The conformance kit is a distribution of its own, which the development environment does not install: its folder is
put on the path of this process and of all that it starts.
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
