"""The SAM family by name, so that ``from flatmin.presets import sam`` works; made in ``flatmin.ascent.presets``."""

from .ascent.presets import (
    PRESETS,
    asam,
    esam,
    fisher_sam,
    friendly_sam,
    functional_sam,
    gsam,
    layer_sam,
    looksam,
    momentum_sam,
    preconditioned_functional_sam,
    preconditioned_sam,
    random_sam,
    sam,
    sam_on,
    unnormalized_sam,
    wsam,
)

__all__ = [
    "PRESETS", "asam", "esam", "fisher_sam", "friendly_sam", "functional_sam", "gsam", "layer_sam", "looksam",
    "momentum_sam", "preconditioned_functional_sam", "preconditioned_sam", "random_sam", "sam", "sam_on",
    "unnormalized_sam", "wsam",
]
