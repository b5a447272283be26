"""Generalization: bounds on the risk, calibration, and robustness of weights and inputs."""

from . import calibration, pac_bayes, posteriors, robustness

__all__ = ["calibration", "pac_bayes", "posteriors", "robustness"]
