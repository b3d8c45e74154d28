"""Errors that vlm_steer raises on purpose.

Every message says what was given, what was expected and what to do about it.
"""

__all__ = [
    "CompositionError",
    "ConfigError",
    "DataError",
    "SteerError",
    "SteerWarning",
    "UnsupportedModelError",
    "without_effect",
]


class SteerError(Exception):
    """Base class: catching it catches everything that vlm_steer raises on purpose."""


class ConfigError(SteerError, ValueError):
    """An option, a YAML file or a command-line value is wrong."""


class UnsupportedModelError(SteerError):
    """This model, or the way it is being run, cannot be steered as asked."""


class CompositionError(SteerError):
    """Two interventions cannot act together."""


class DataError(SteerError):
    """A data set, an image or an answer file cannot be used as given."""


class SteerWarning(UserWarning):
    """Something legal but probably not wanted, such as a steering that changes nothing."""


def without_effect(method: str, option: str, reason: str) -> str:
    """What a user is told who sets an option that has no effect under the others."""
    return f"{method}: {option} has no effect here: {reason}. Remove it."
