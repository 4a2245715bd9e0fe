"""The one exception for what the user has to mend."""

import importlib.util

__all__ = ["InputError", "require"]


class InputError(ValueError):
    """
    Data, weights, a config or arguments cannot be used.

    The message is one sentence or two: which file, field and value, and what is allowed. Programs
    print it without a traceback.
    """


def require(extra: str, *packages: str) -> None:
    """Raise an InputError if packages of an extra of this project are not installed."""
    missing = [x for x in packages if importlib.util.find_spec(x) is None]
    if missing:
        raise InputError(
            f"Not installed: {', '.join(missing)}; pip install 'teacher-student-mask[{extra}]'."
        )
