"""Train to flat minima, and prove that they are flat.

Descend                Sharpener, presets, SAM
Measure                Objective
"""

from .ascent import presets
from .ascent.optimizer import SAM
from .ascent.sharpener import Sharpener

__version__ = "0.1.0"

__all__ = ["SAM", "Sharpener", "presets"]
