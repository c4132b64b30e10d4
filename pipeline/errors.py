"""Mistakes in what a command was asked for."""


class StepError(ValueError):
    """A step was asked for something that the parameters do not provide."""
