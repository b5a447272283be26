"""Scalars that say how sharp a minimum is."""

from .one_step import OneStep, one_step

__all__ = ["OneStep", "one_step"]
