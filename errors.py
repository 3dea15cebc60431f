"""The errors that inflash raises on purpose: bad input, and a run that failed."""


class InflashError(Exception):
    """Bad input or an impossible request, told in one sentence: what, where, expected, found, what to do."""


class RunError(InflashError):
    """Something failed while running that the input is not to blame for: a loader died, a disk gave an error.

    The command line ends with 1 for it, and with 2 for any other `InflashError`.
    """
