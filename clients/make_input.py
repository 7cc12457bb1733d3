#!/usr/bin/env python3
"""This script writes a V1 request with the given pictures: `python clients/make_input.py photo.jpg > input.json`."""

import base64
import json
import sys
from pathlib import Path


def main() -> int:
    """Write the request to standard output. Return the exit code: 1 if a file cannot be read, 2 without arguments."""
    if len(sys.argv) < 2:
        sys.stderr.write("usage: make_input.py PICTURE [PICTURE …] > input.json\n")
        return 2
    try:
        pictures = [base64.b64encode(Path(name).read_bytes()).decode() for name in sys.argv[1:]]
    except OSError as error:
        sys.stderr.write(f"make_input.py: {error.filename}: {error.strerror}\n")
        return 1
    json.dump({"instances": [{"image": {"b64": picture}} for picture in pictures]}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
