"""`python -m zcproto`."""

from __future__ import annotations

import sys

from zcproto.cli import main

sys.exit(main())
