"""Exceptions that end a run early, and the signals that stop it."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class UserError(Exception):
    """One line that says what was given and what is allowed; shown without a traceback, exit 1."""


class NoSplit(UserError):
    """The data have no images for validation."""


class Stopped(BaseException):
    """The run was asked to stop: `signal` is what asked, `saved` whether its state was saved.

    Like KeyboardInterrupt it is not an Exception, so that `except Exception` does not catch it.
    """

    def __init__(self, number: int, saved: bool = False):
        super().__init__(signal.Signals(number).name)
        self.signal, self.saved = number, saved
