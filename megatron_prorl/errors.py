"""Errors that a user can fix: one line that says what is wrong, where, and what to do."""


class UserError(ValueError):
    """Shown as one line without a traceback; the command exits with code 2."""
