"""The error of a checkpoint that cannot be loaded."""


class CheckpointError(ValueError):
    """A checkpoint's file says something that cannot be loaded: file, tensor, expected, found."""
