"""`pinnace serve` without an installation: `python app.py --help`."""

import sys

from pinnace.process.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]], "python app.py"))
