"""The process: the command line, the life of the server, its workers, and what is checked before a start."""

import signal

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    # The terminal has closed. nohup has the process ignore it, and it stays ignored.
    *(() if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)),
)
"""The signals that stop the server, which answers what it has accepted."""
