"""Exceptions that end a run early, and the signals that stop it."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class UserError(Exception):
    """One line that says what was given and what is allowed; shown without a traceback, exit 1."""


class NoSplit(UserError):
    """The data have no images for validation."""


class Stopped(BaseException):
    """The run was asked to stop.

    Like KeyboardInterrupt it is not an Exception, so that `except Exception` does not catch it.

    Attributes:
        signal: what asked for it.
        agreed, saved: whether all ranks stop at this step; whether the run's state was saved.
    """

    def __init__(self, number: int, agreed: bool = False, saved: bool = False):
        super().__init__(signal.Signals(number).name)
        self.signal, self.agreed, self.saved = number, agreed, saved
