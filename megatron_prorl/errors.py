"""Errors that a user can fix: one line that says what is wrong, where, and what to do."""


class UserError(ValueError):
    """Shown as one line without a traceback; the command exits with `exit_code`."""

    exit_code = 2
    is_of_all_ranks = False  # raised by all of them together, so that rank 0 alone tells it


class ToldToEnd(UserError):
    """The run was told to end, and has: to be started again, when it goes on (EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75
    is_of_all_ranks = True


class RunStopped(UserError):
    """A guard ended the run: to go on needs somebody's decision, so that no scheduler should start it again."""

    exit_code = 3
