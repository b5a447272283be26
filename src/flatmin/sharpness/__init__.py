"""Scalars that say how sharp a minimum is."""

from .one_step import FirstOrder, OneStep, first_order, one_step, scaled_radius

__all__ = ["FirstOrder", "OneStep", "first_order", "one_step", "scaled_radius"]
