"""The pictures of the loss that ``flatmin measure`` takes; what each is and costs stands in ``flatmin.measures``."""

from ..measures import bind
from .lines import line
from .surfaces import surface

MEASURES = bind("landscape", {
    "line": lambda o, a: line(o, "filter", draws=3, seed=a.seed),
    "surface": lambda o, a: surface(o, seed=a.seed, checkpoint=a.checkpoint),
})
