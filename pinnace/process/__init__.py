"""The process: the command line, the life of the server, its workers, and what is checked before a start."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
