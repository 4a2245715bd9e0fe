"""The one exception for what the user has to mend."""

__all__ = ["InputError"]


class InputError(ValueError):
    """
    Data, weights, a config or arguments cannot be used.

    The message is one sentence or two: which file, field and value, and what is allowed. Programs
    print it without a traceback.
    """
