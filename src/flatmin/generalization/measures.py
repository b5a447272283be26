"""The measures of robust weights by name; what each is and costs stands in ``flatmin.measures``."""

from ..measures import bind
from . import robustness

NOISE = 0.05
"""The standard deviation of the noise, in units of the root mean square of each tensor."""

MEASURES = bind("generalization", {
    "weight_noise": lambda o, a: robustness.weight_noise(o, NOISE, relative=True, predict=not a.value_only,
                                                         seed=a.seed),
    "quantized": lambda o, a: robustness.quantized(o, bits=4, predict=not a.value_only),
    "pruned": lambda o, a: robustness.pruned(o, share=0.5, predict=not a.value_only),
    "truncated": lambda o, a: robustness.truncated(o, keep=0.5, predict=not a.value_only),
})
