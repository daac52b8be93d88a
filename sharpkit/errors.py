"""Every exception that sharpkit raises on purpose.

A message says what was expected, what came, and what to do; the command line prints it
as it stands, in one line.
"""

__all__ = [
    "CheckpointError",
    "DistributedError",
    "MeasureError",
    "ObjectiveError",
    "OperatorError",
    "RecipeError",
    "SettingsError",
    "ShapeError",
    "SharpkitError",
    "SharpkitWarning",
    "StoreError",
    "UnknownMeasureError",
]


class SharpkitError(Exception):
    """Base of all errors that sharpkit raises on purpose."""


class ObjectiveError(SharpkitError):
    """The model, the loss, the data or the selection do not make one fixed function."""


class ShapeError(SharpkitError, ValueError):
    """A tensor does not have the shape that the operation needs."""


class SettingsError(SharpkitError, ValueError):
    """A setting has a value that makes no sense."""


class OperatorError(SharpkitError):
    """A matrix-vector product gave numbers that no symmetric matrix gives."""


class MeasureError(SharpkitError):
    """A measure is not defined, or cannot be computed, at this point."""


class UnknownMeasureError(SharpkitError, KeyError):
    """No measure has this name."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


class CheckpointError(SharpkitError):
    """A checkpoint cannot be read, or does not fit the model."""


class RecipeError(SharpkitError):
    """A recipe file does not say how to build the model, the loss and the data."""


class StoreError(SharpkitError):
    """A study's file cannot be read or written, or is none."""


class DistributedError(SharpkitError):
    """Processes that measure together do not do the same, or one of them is gone."""


class SharpkitWarning(UserWarning):
    """Something that the reader of a number should know."""
