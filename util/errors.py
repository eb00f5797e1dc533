"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """One line that says what was given and what is allowed; shown without a traceback, exit 1."""
