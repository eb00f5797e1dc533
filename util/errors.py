"""How a run ends other than by finishing."""

import signal


class UserError(Exception):
    """One line that says what was given and what is allowed; shown without a traceback, exit 1."""


class Stopped(Exception):
    """The run was asked to stop, and has saved its state; `signal` is what asked."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number
