"""Measures of how sharp a minimum is; the table of them is ``flatmin.sharpness.measures.MEASURES``."""

from .agreement import Agreement, Correlation, agreement, correlation
from .average_case import AverageCase, LargestRandom, average_case, largest_random
from .cautions import SharpnessWarning
from .compare import Comparison, compare
from .critical import CriticalSharpness, EdgeOfStability, critical_sharpness, edge_of_stability, update_of
from .diagnosis import Finding, diagnose, next_radius
from .flatness import NormalizedFlatness, normalized_flatness
from .monitor import SharpnessMonitor
from .one_step import FirstOrder, OneStep, first_order, one_step, scaled_radius
from .trust_region import TrustRegion, trust_region
from .variants import MSharpness, m_sharpness
from .worst_case import WorstCase, worst_case

__all__ = ["Agreement", "AverageCase", "Comparison", "Correlation", "CriticalSharpness", "EdgeOfStability", "Finding",
           "FirstOrder", "LargestRandom", "MSharpness", "NormalizedFlatness", "OneStep", "SharpnessMonitor",
           "SharpnessWarning", "TrustRegion", "WorstCase", "agreement", "average_case", "compare", "correlation",
           "critical_sharpness", "diagnose", "edge_of_stability", "first_order", "largest_random", "m_sharpness",
           "next_radius", "normalized_flatness", "one_step", "scaled_radius", "trust_region", "update_of", "worst_case"]
