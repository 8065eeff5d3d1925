"""What can go wrong, by exit code: the message of each says the value, the rule and the remedy, in one line."""

DEBUG_VARIABLE = "TPUVID_DEBUG"


class TpuvidError(Exception):
    """Something failed while running; exit code 1."""

    exit_code = 1


class InputError(TpuvidError):
    """The request itself is wrong (a flag, a file, a folder); known before any weight is loaded; exit code 2."""

    exit_code = 2


def unexpected(error: BaseException) -> str:
    """One line for a user about an error that nobody foresaw: a bug, or a backend's failure."""
    first = (str(error).splitlines() or [""])[0]
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        return f"out of memory ({first}); use fewer frames, a smaller size, --dtype bfloat16 or more devices"
    return f"{type(error).__name__}: {first} (unexpected; {DEBUG_VARIABLE}=1 shows the traceback)"
