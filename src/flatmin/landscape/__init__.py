"""Pictures of the loss around a solution: lines and surfaces, between models, along training runs."""

from .directions import random_direction
from .lines import Line, line
from .surfaces import Surface, surface
from .trajectories import Trajectory

__all__ = ["Line", "Surface", "Trajectory", "line", "random_direction", "surface"]
