"""How a run ends other than by finishing."""

import signal


class UserError(Exception):
    """One line that says what was given and what is allowed; shown without a traceback, exit 1."""


class Stopped(BaseException):
    """The run was asked to stop; `signal` is what asked, `saved` whether its state was saved.

    As KeyboardInterrupt, it is no Exception: what meets garbage of any kind must let it pass.
    """

    def __init__(self, number: int, saved: bool = False):
        super().__init__(signal.Signals(number).name)
        self.signal, self.saved = number, saved
