"""The one exception for mistakes that a user can fix. Commands print its message on one line and exit with 2."""


class InputError(ValueError):
    """Bad input: a file, key, field or flag. The message names the culprit and says how to fix it."""


class RunInterrupted(RuntimeError):
    """Work that was interrupted in good order; the message says how to resume. Exit code 1."""
