"""What is done with a recipe, a model or a run: compare, measure; orchestration and run folders only."""

from .compare import Comparison
from .measure import Measurement, MeasureSettings
from .settings import CompareSettings

__all__ = ["CompareSettings", "Comparison", "MeasureSettings", "Measurement"]
