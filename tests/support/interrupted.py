"""A module that gets SIGTERM while it is imported, and turns the exception into an ImportError, as C extensions do."""

import os
import signal

try:
    os.kill(os.getpid(), signal.SIGTERM)
except BaseException:
    raise ImportError("initialization failed") from None
