"""Measures of how sharp a minimum is; the table of them is ``flatmin.sharpness.measure_functions.MEASURES``."""

from .agreement import Agreement, Correlation, agreement, correlation
from .average_case import AverageCase, LargestRandom, average_case, largest_random
from .critical import CriticalSharpness, EdgeOfStability, critical_sharpness, edge_of_stability, update_of
from .diagnosis import Finding, diagnose, next_radius
from .m_sharpness import MSharpness, m_sharpness
from .monitor import SharpnessMonitor
from .normalized_flatness import NormalizedFlatness, normalized_flatness
from .one_step import FirstOrder, OneStep, first_order, one_step, scaled_radius
from .sharpness_warnings import SharpnessWarning
from .trust_region import TrustRegion, trust_region
from .two_models import Comparison, compare
from .worst_case import WorstCase, worst_case

__all__ = ["Agreement", "AverageCase", "Comparison", "Correlation", "CriticalSharpness", "EdgeOfStability", "Finding",
           "FirstOrder", "LargestRandom", "MSharpness", "NormalizedFlatness", "OneStep", "SharpnessMonitor",
           "SharpnessWarning", "TrustRegion", "WorstCase", "agreement", "average_case", "compare", "correlation",
           "critical_sharpness", "diagnose", "edge_of_stability", "first_order", "largest_random", "m_sharpness",
           "next_radius", "normalized_flatness", "one_step", "scaled_radius", "trust_region", "update_of", "worst_case"]
