"""Errors of flatmin's own; each message says what is wrong and what to do.

Wrong arguments raise ``ValueError``. These two are about the state of the weights and of files.
"""


class PerturbedStateError(RuntimeError):
    """The weights are at w + ε, where the requested operation would read or save the wrong values."""


class RunFolderError(RuntimeError):
    """A run folder cannot be read, resumed or written."""
