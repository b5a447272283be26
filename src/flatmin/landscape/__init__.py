"""Pictures of the loss around a solution."""

from .lines import Line, line

__all__ = ["Line", "line"]
