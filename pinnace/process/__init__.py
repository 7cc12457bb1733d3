"""The server as a process: its command line, its life from start to stop, and its workers."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
