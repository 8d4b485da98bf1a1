"""Errors that are the user's to fix."""


class UserError(Exception):
    """A wrong input: the message says what was given, what was expected and what to do, in one or two lines.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class PassingError(UserError):
    """A UserError that may be over by the next start, such as another process that does not answer (EX_TEMPFAIL)."""

    exit_code = 75


class LocalError(UserError):
    """A UserError that one process of several may meet alone: it ends that process, and the others hear of it."""


class LocalPassingError(LocalError, PassingError):
    """A PassingError that one process of several may meet alone, such as a store that does not answer it."""
