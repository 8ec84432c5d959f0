"""The command, where all that it imports is there; if not, the first second tells what to install."""

from __future__ import annotations

import sys

from benchmarks.device.needs import lacking

if __name__ == "__main__":
    short = lacking()
    if short is not None:
        sys.exit(short)
    from benchmarks.device.command import main

    sys.exit(main())
