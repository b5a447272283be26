"""The measures of the two paths by name; what each is and costs stands in ``flatmin.measures``."""

from ..measures import bind
from .sharpness_paths import sharpness_paths

MEASURES = bind("paths", {"sharpness_paths": lambda o, a: sharpness_paths(o, error=not (a.value_only or a.quick))})
