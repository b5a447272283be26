"""The measures of every package, joined."""

from ..curvature.measure_functions import MEASURES as CURVATURE
from ..generalization.measure_functions import MEASURES as GENERALIZATION
from ..landscape.measure_functions import MEASURES as LANDSCAPE
from ..paths.measure_functions import MEASURES as PATHS
from ..sharpness.measure_functions import MEASURES as SHARPNESS

MEASURES = {**SHARPNESS, **CURVATURE, **LANDSCAPE, **PATHS, **GENERALIZATION}
