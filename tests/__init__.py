"""The tests of zcproto.

They start hundreds of processes. Where Python is told not to write bytecode, as in many containers, each of
these would compile all modules anew, half a second of CPU: so bytecode is kept in pytest's folder for what lasts
from run to run.
"""

import os
import sys
from pathlib import Path

if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parent.parent / ".pytest_cache" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
