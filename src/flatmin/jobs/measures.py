"""The measures of every package, joined."""

from ..curvature.measures import MEASURES as CURVATURE
from ..generalization.measures import MEASURES as GENERALIZATION
from ..landscape.measures import MEASURES as LANDSCAPE
from ..paths.measures import MEASURES as PATHS
from ..sharpness.measures import MEASURES as SHARPNESS

MEASURES = {**SHARPNESS, **CURVATURE, **LANDSCAPE, **PATHS, **GENERALIZATION}
