"""The few errors flatmin names; each message says what is wrong and what to do.

Wrong arguments raise ``ValueError``. These two are for a state of affairs rather than an argument.
"""


class PerturbedStateError(RuntimeError):
    """The weights stand at w + ε, where the requested operation would read or save the wrong thing."""


class RunFolderError(RuntimeError):
    """A run folder cannot be read, resumed or written."""
