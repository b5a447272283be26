"""Common corruptions of images by severity, deterministic, without a download.

The severities are those of the authors' scripts that made CIFAR-10-C (32 pixels) and ImageNet-C (224 pixels); the
implementations are this library's own, so that single pixels differ from the published files (their noise came from
another generator, their images passed through 8 bits). D. Hendrycks and T. Dietterich, arXiv 1903.12261.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import vectors

# name: severities 1 to 5 as for CIFAR-10-C, and as for ImageNet-C
SEVERITIES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),     # standard deviation
    "shot_noise": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),                            # photons at white
    "impulse_noise": ((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),      # share of values hit
    "gaussian_blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),                          # standard deviation, pixels
    "defocus_blur": (((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),            # radius, smoothing, pixels
                     ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),                 # added to the HSV value
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),                  # factor around the mean
    "jpeg_compression": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),                        # quality
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),                # side of the small image
}


def corrupt(images: Tensor, name: str, severity: int = 3, *, seed: int | torch.Generator = 0,
            scale: str = "auto") -> Tensor:
    """Images with one of the common corruptions, in [0, 1], of the same shape and dtype.

    Args:
        images: (..., C, H, W) with values in [0, 1]; C is 1 or 3 for "jpeg_compression".
        name: "gaussian_noise", "shot_noise", "impulse_noise", "gaussian_blur", "defocus_blur", "brightness",
            "contrast", "jpeg_compression" (needs Pillow) or "pixelate".
        severity: 1 to 5.
        seed: of the noise; the same seed gives the same noise for images of the same shape.
        scale: "cifar" or "imagenet" severities; "auto" takes "cifar" below 64 pixels a side.

    Raises:
        ValueError: an unknown name, a severity outside 1 to 5, or values outside [0, 1].

    >>> x = torch.full((2, 3, 8, 8), 0.5)
    >>> round(corrupt(x, "brightness", severity=5).mean().item(), 3)
    0.8

    D. Hendrycks and T. Dietterich, arXiv 1903.12261; severities from github.com/hendrycks/robustness.
    """
    if name not in SEVERITIES:
        raise ValueError(f"unknown corruption {name!r}: there are {', '.join(SEVERITIES)}")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity}")
    if scale not in ("auto", "cifar", "imagenet"):
        raise ValueError(f'scale must be "auto", "cifar" or "imagenet", got {scale!r}')
    if images.dim() < 3 or not images.is_floating_point():
        raise ValueError(f"expected floating-point images (..., C, H, W), got {tuple(images.shape)} of {images.dtype}")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(f"images must have values in [0, 1], got {float(images.min()):.3g} to "
                         f"{float(images.max()):.3g}: corrupt before normalization, and divide bytes by 255")
    small = scale == "cifar" or scale == "auto" and max(images.shape[-2:]) < 64
    setting = SEVERITIES[name][0 if small else 1][severity - 1]
    flat = images.detach().reshape(-1, *images.shape[-3:])
    out = _KINDS[name](flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat, setting,
                       vectors.seeded(seed))
    return out.clamp(0, 1).to(images.dtype).view(images.shape)


def _normal(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=g, device=g.device, dtype=x.dtype).to(x.device)


def _uniform(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.rand(x.shape, generator=g, device=g.device, dtype=x.dtype).to(x.device)


def _gaussian_noise(x: Tensor, sigma: float, g: torch.Generator) -> Tensor:
    return x + sigma * _normal(x, g)


def _shot_noise(x: Tensor, photons: float, g: torch.Generator) -> Tensor:
    return torch.poisson((x * photons).to(g.device), generator=g).to(x.device) / photons


def _impulse_noise(x: Tensor, share: float, g: torch.Generator) -> Tensor:
    hit, white = _uniform(x, g) < share, (_uniform(x, g) < 0.5).to(x.dtype)
    return torch.where(hit, white, x)


def _gaussian_blur(x: Tensor, sigma: float, g: torch.Generator) -> Tensor:
    line = _bell(max(1, int(4 * sigma + 0.5)), sigma, x)
    return _filtered(x, line[:, None] * line, "replicate")


def _defocus_blur(x: Tensor, setting: tuple[float, float], g: torch.Generator) -> Tensor:
    radius, smoothing = setting
    reach = 8 if radius <= 8 else math.ceil(radius)
    at = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    disk = (at[:, None].square() + at.square() <= radius**2).to(x.dtype)
    disk = F.pad(disk / disk.sum(), (2, 2, 2, 2))
    line = _bell(1 if radius <= 8 else 2, smoothing, x)
    kernel = F.conv2d(disk[None, None], (line[:, None] * line)[None, None], padding="same")[0, 0]
    return _filtered(x, _cropped(kernel), "reflect")


def _cropped(kernel: Tensor) -> Tensor:
    """Without the margin of zeros: a border as wide as it would not fit small images."""
    middle = len(kernel) // 2
    used = (kernel != 0).nonzero()
    r = int((used - middle).abs().max())
    return kernel[middle - r:middle + r + 1, middle - r:middle + r + 1]


def _bell(reach: int, sigma: float, like: Tensor) -> Tensor:
    at = torch.arange(-reach, reach + 1, dtype=like.dtype, device=like.device)
    line = torch.exp(-0.5 * (at / sigma).square())
    return line / line.sum()


def _filtered(x: Tensor, kernel: Tensor, border: str) -> Tensor:
    r, C = len(kernel) // 2, x.shape[1]
    if border == "reflect" and r >= min(x.shape[-2:]):
        border = "replicate"
    weight = kernel.expand(C, 1, *kernel.shape)
    return F.conv2d(F.pad(x, (r, r, r, r), mode=border), weight, groups=C)


def _brightness(x: Tensor, added: float, g: torch.Generator) -> Tensor:
    """V + c in HSV: hue and saturation stay, so that all channels of a pixel are scaled alike."""
    value = x.amax(1, keepdim=True)
    raised = (value + added).clamp(max=1)
    return torch.where(value > 0, x * (raised / value.clamp(min=torch.finfo(x.dtype).tiny)), raised)


def _contrast(x: Tensor, factor: float, g: torch.Generator) -> Tensor:
    mean = x.mean((-2, -1), keepdim=True)
    return (x - mean) * factor + mean


def _jpeg(x: Tensor, quality: int, g: torch.Generator) -> Tensor:
    from PIL import Image

    if x.shape[1] not in (1, 3):
        raise ValueError(f"JPEG is for images of 1 or 3 channels, got {x.shape[1]}")
    out = []
    for image in (x * 255).round().to(torch.uint8).cpu():
        mode, rows = ("L", image[0]) if len(image) == 1 else ("RGB", image.movedim(0, -1))
        file = io.BytesIO()
        Image.frombytes(mode, (x.shape[-1], x.shape[-2]), bytes(rows.contiguous().flatten().tolist())).save(
            file, "JPEG", quality=quality)
        data = torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8)
        out.append(data.view(*x.shape[-2:], -1).movedim(-1, 0))
    return (torch.stack(out).to(x.dtype) / 255).to(x.device)


def _pixelate(x: Tensor, side: float, g: torch.Generator) -> Tensor:
    """Down to ``side`` of the size and back, each pixel a mean over the area it covers (Pillow's box filter)."""
    for size in ([max(1, int(n * side)) for n in x.shape[-2:]], x.shape[-2:]):
        rows, columns = (_box(a, b, x) for a, b in zip(x.shape[-2:], size, strict=True))
        x = rows @ x @ columns.T
    return x


def _box(n: int, m: int, like: Tensor) -> Tensor:
    """(m, n): Pillow's box filter. Shrinking, pixel i is the mean of those whose centres lie within its area;
    enlarging, the one nearest."""
    ratio = n / m
    centre = (torch.arange(m, dtype=torch.float64) + 0.5) * ratio
    if ratio <= 1:
        return F.one_hot(centre.long().clamp(max=n - 1), n).to(like)
    at = torch.arange(n, dtype=torch.float64) + 0.5
    inside = ((at - centre[:, None]) / ratio > -0.5) & ((at - centre[:, None]) / ratio <= 0.5)
    weight = inside.double()
    return (weight / weight.sum(1, keepdim=True)).to(like)


_KINDS: dict[str, Callable[[Tensor, Any, torch.Generator], Tensor]] = {
    "gaussian_noise": _gaussian_noise, "shot_noise": _shot_noise, "impulse_noise": _impulse_noise,
    "gaussian_blur": _gaussian_blur, "defocus_blur": _defocus_blur, "brightness": _brightness, "contrast": _contrast,
    "jpeg_compression": _jpeg, "pixelate": _pixelate,
}
