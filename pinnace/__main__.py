"""The command line, for `python -m pinnace`: the same as the command `pinnace`."""

import sys

from pinnace.process.cli import main

if __name__ == "__main__":
    sys.exit(main())
