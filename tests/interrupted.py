"""A module that is told to stop while it is imported, and takes the exception for one of its own, as C modules do."""

import os
import signal

try:
    os.kill(os.getpid(), signal.SIGTERM)
except BaseException:
    raise ImportError("initialization failed") from None
