"""Errors pyft raises on purpose; the command line prints their message as one line and exits with
their code.
"""


class PyftError(Exception):
    """A run failed; the message is one line that says what, where and what to do."""

    exit_code = 1


class UsageError(PyftError, ValueError):
    """Wrong input from the user; the message is one line: what is wrong, where, what to write
    instead.
    """

    exit_code = 2
