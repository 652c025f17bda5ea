"""The one exception for mistakes that a user can mend. Commands print its message on one line and exit with 2."""


class InputError(ValueError):
    """Bad input: a file, key, field or flag. The message names the culprit and says how to mend it."""


class RunInterrupted(RuntimeError):
    """Work that was ended in good order before it was done; the message says how to go on. Exit code 1."""
