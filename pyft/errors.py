"""Errors pyft raises on purpose; the command line prints the line and exits with the code."""


class PyftError(Exception):
    """A run failed; the message is one line that says what, where and what to do."""

    exit_code = 1


class UsageError(PyftError, ValueError):
    """Wrong input; the message is one line: what is wrong, where, what to write instead."""

    exit_code = 2
