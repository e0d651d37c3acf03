"""The project's own proof, which is not installed: `python -m bench` in a clone.

The conformance kit is a separate distribution. Its folder is added to the path of this process.
"""

import sys
from pathlib import Path

KIT = Path(__file__).parents[1] / "clients" / "conformance"
if str(KIT) not in sys.path:
    sys.path.append(str(KIT))
