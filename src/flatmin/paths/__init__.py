"""The two paths of sharpness: through the statistics of the outputs, and through the function itself.

    sharpness_paths             H_G ε* and H_F ε* along SAM's direction: shares, ratio, cosine, per layer
    preconditioned_spectrum     the Gauss-Newton matrix before and after preconditioning by Adam's second moment
    eigenspace_share            how much of a vector lies in the span of eigenvectors
"""

from .preconditioned_spectrum import PreconditionedSpectrum, eigenspace_share, preconditioned_spectrum
from .sharpness_paths import LayerPaths, SharpnessPaths, sharpness_paths

__all__ = ["LayerPaths", "PreconditionedSpectrum", "SharpnessPaths", "eigenspace_share", "preconditioned_spectrum",
           "sharpness_paths"]
