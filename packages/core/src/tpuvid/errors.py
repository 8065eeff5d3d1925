"""What can go wrong, by exit code: the message of each says the value, the rule and the remedy, in one line."""


class TpuvidError(Exception):
    """Something failed while running; exit code 1."""

    exit_code = 1


class InputError(TpuvidError):
    """The request itself is wrong (a flag, a file, a folder); known before any weight is loaded; exit code 2."""

    exit_code = 2
