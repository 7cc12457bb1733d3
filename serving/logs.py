"""Where log lines go and what they look like: KServe's format, on standard error."""

from __future__ import annotations

import logging

FORMAT = (
    "%(asctime)s.%(msecs)03d %(process)d %(name)s %(levelname)s [%(filename)s:%(funcName)s():%(lineno)d] %(message)s"
)
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"


def configure_logging() -> None:
    logging.basicConfig(level=logging.INFO, format=FORMAT, datefmt=DATE_FORMAT)
    logging.getLogger("hypercorn.error").setLevel(logging.WARNING)  # its start-up lines repeat ours
