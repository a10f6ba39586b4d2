"""``python -m fabric`` is the command ``fabric``."""

from __future__ import annotations

import sys

from fabric.cli import main

if __name__ == "__main__":
    sys.exit(main())
