"""The root of every error that inflash raises on purpose."""


class InflashError(Exception):
    """Bad input or an impossible request, told in one sentence: what, where, expected, found, what to do."""
